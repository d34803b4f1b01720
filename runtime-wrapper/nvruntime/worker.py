# SPDX-License-Identifier: Apache-2.0
"""A child of the server: it serves one caller. If that was a `create`, it prepares the start of the container, and
serves the hook (ahead.py)."""

from __future__ import annotations

import _socket
import os
import signal

from nvhook.container import container_dir
from nvhook.linux import kernel
from nvhook.linux.child import readable

from . import ahead, call, work
from .caller import Caller, Refused, listen, remove

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nvhook.start import Start

_LIMIT = 60  # seconds for one piece of work; then SIGALRM ends the child


class Worker:
    """`place` is the server's directory; a caller has to live as `own` says (caller.py)."""

    __slots__ = ("_listener", "_own", "_path", "_start")

    def __init__(self, place: str, listener: _socket.socket, own: list[object]) -> None:
        self._path = f"{place}/child-{os.getpid()}"
        self._listener = listener
        self._own = own
        self._start: Start | None = None

    def serve(self, tell: int) -> None:
        """Wait for one caller, tell the server that it is there, and do what it asks."""
        kernel.prctl(kernel.PR_SET_NAME, b"nvhook-ready")
        caller = Caller(self._listener)
        os.write(tell, b"\n")
        kernel.prctl(kernel.PR_SET_NAME, b"nvhook-busy")
        kernel.prctl(kernel.PR_SET_PDEATHSIG, 0)
        signal.alarm(_LIMIT)
        self._listener.close()
        words = caller.receive(self._own)
        status = work.run(words, call.parse(words), self._stay)
        caller.answer(status)
        if self._start and not status:
            self._be_ahead(self._start, caller.process)

    def _stay(self, start: Start) -> str:
        """For create.edit: the socket for the hook is there before config.json names it. Empty where none can be."""
        if not container_dir.is_id(start.id):
            return ""
        try:
            self._listener = listen(self._path)
        except OSError:
            return ""
        self._start = start
        return str(os.getpid())

    def _be_ahead(self, start: Start, runtime: int) -> None:
        """Until the hook was served, or the launcher is over, which has become the low-level runtime."""
        kernel.prctl(kernel.PR_SET_NAME, b"nvhook-ahead")
        prepared = ahead.Ahead(start)
        listener = self._listener.fileno()
        while listener in readable([listener, runtime]):
            if self._serve_hook(prepared):
                return
        prepared.give_up()
        remove(self._path)

    def _serve_hook(self, prepared: ahead.Ahead) -> bool:
        """False for a caller that did not wait, or may not ask."""
        try:
            caller = Caller(self._listener)
            words = caller.receive(self._own)
        except (Refused, OSError):
            return False
        remove(self._path)
        if words[0] != "hook":
            raise Refused
        caller.answer(prepared.serve())
        return True
