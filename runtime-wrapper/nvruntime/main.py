# SPDX-License-Identifier: Apache-2.0
"""A Python that the launcher has started, because no server answered: it does what it is asked to (call.py) by itself,
and leaves a server for those that come after."""

from __future__ import annotations

import os
import sys

from . import work
from .call import parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .call import Call


def main(words: list[str]) -> None:
    """Do it in this process, which ends then, or becomes the low-level runtime."""
    status = 1
    try:
        call = parse(words)
        if call and call.server and words[0] != "pass":
            from . import server

            is_left = server.leave(call.server)  # before anything of this container is in memory
            if not is_left and words[0] == "edit":
                server.want(call.server)
        status = work.run(words, call)
        if call and not status:
            status = become(call)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)  # taking the interpreter down in order costs a millisecond, and nothing is open


def become(call: Call) -> int:
    """Replace this process by the low-level runtime, its environment unchanged; 1 where that does not work."""
    try:
        os.execv(call.runtime, [call.runtime, *call.arguments])
    except OSError as error:
        from nvhook.errors import reason
        from nvhook.request import config as configuration

        from . import create

        create.take_back(configuration.load(call.config_path, must_exist=call.must_exist), call.arguments[-1])

        print(
            f"nvidia-container-runtime: runtime error: execute `{call.runtime}`: {reason(error)}",
            file=sys.stderr,
        )
    return 1
