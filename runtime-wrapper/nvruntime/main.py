# SPDX-License-Identifier: Apache-2.0
"""What the launcher (../launcher.c) asks of Python: started for it, or in a child of the server (server.py).

    edit CONFIG HOOK SERVER CANDIDATES RUNTIME ARGUMENT ...    edit the container's config.json, then become the runtime
    start CONFIG HOOK SERVER CANDIDATES RUNTIME ARGUMENT ...   leave a server, as `create` could not; become the runtime
    pass CONFIG HOOK SERVER CANDIDATES RUNTIME ARGUMENT ...    become the runtime: the launcher cannot read config.toml
    hook CONFIG ARGUMENT ...                                   nvidia-container-runtime-hook

CANDIDATES and RUNTIME are empty where Python is to read config.toml for them; RUNTIME alone is where none was found.
`run` is what both ways have in common.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from nvhook.start import Start

    from .create import Call


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
        status = run(words, call)
        if call and not status:
            status = become(call)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)  # taking the interpreter down in order costs a millisecond, and nothing is open


def parse(words: list[str]) -> Call | None:
    """None for the hook, which has no runtime to become."""
    if words[0] == "hook":
        return None
    from .create import Call

    _, config_path, hook, server, candidates, runtime, *arguments = words
    chosen = os.environ.get("NVHOOK_CONFIG")
    return Call(hook, chosen or config_path, bool(chosen), server, candidates, runtime, arguments)


def run(words: list[str], call: Call | None, stay: Callable[[Start], str] | None = None) -> int:
    """All but becoming the runtime; the exit status. `stay`: see create.edit."""
    if not call:
        from nvhook import hook

        return hook.main(words[2:], words[1])
    from . import create

    if words[0] == "edit":
        return create.main(call, stay)
    return 0 if call.runtime else create.find_runtime(call)


def become(call: Call) -> int:
    """Replace this process by the low-level runtime, its environment unchanged; 1 where that does not work."""
    try:
        os.execv(call.runtime, [call.runtime, *call.arguments])
    except OSError as error:
        from nvhook import config as configuration
        from nvhook.errors import reason

        from . import create

        create.take_back(configuration.load(call.config_path, must_exist=call.must_exist), call.arguments[-1])

        print(
            f"nvidia-container-runtime: runtime error: execute `{call.runtime}`: {reason(error)}",
            file=sys.stderr,
        )
    return 1
