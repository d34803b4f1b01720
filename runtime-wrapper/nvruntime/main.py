# SPDX-License-Identifier: Apache-2.0
"""A Python that the launcher has started, because no server answered: it does what it is asked to (call.py) by itself,
and leaves a server for those that come after. Nobody prepares the start then; what was made on the host for it is
looked after all the same."""

from __future__ import annotations

import os
import sys

from . import work
from .call import parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nvhook.start import Start

    from .call import Call


def main(words: list[str]) -> None:
    """Do it in this process, which ends then, or becomes the low-level runtime."""
    status = 1
    try:
        if words[0] == "leave":
            from . import server

            server.leave(words[1])
            os._exit(0)
        call = parse(words)
        if call and call.server and words[0] == "edit":
            from . import server

            if not server.leave(call.server):  # before anything of this container is in memory
                server.want(call.server)
        status = work.run(words, call, _watch)
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


def _watch(start: Start) -> str:
    """For create.edit, in a process that becomes the low-level runtime. Empty: nobody prepares the start.

    If the runtime ends before our hook has come, as for a root filesystem that is not there, it calls no hook at all.
    Another process, which it does not know, waits for that, and takes back what was made on the host.
    """
    if not start.made:
        return ""
    runtime = os.pidfd_open(os.getpid())
    first = os.fork()
    if not first:
        try:
            if not os.fork():
                _take_back_after(runtime, start)
        finally:
            os._exit(0)
    os.close(runtime)
    try:
        os.waitpid(first, 0)
    except ChildProcessError:
        return ""  # the caller has SIGCHLD ignored, and this process with it
    return ""


def _take_back_after(runtime: int, start: Start) -> None:
    from nvhook.container import container_dir
    from nvhook.linux.child import readable

    from . import create

    os.setsid()
    os.chdir("/")
    os.closerange(0, runtime)  # its streams are the engine's, which waits for their end
    os.closerange(runtime + 1, 1 << 16)
    registered = f"{start.config.state_dir}/{container_dir.CONTAINERS}/{start.id}"
    while not readable([runtime], 1):
        if os.path.exists(registered):  # by the hook; that, poststart and poststop know what to do
            return
    if not os.path.exists(registered):
        create.take_back(start.config, start.id)
