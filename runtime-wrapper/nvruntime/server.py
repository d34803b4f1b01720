# SPDX-License-Identifier: Apache-2.0
"""A preforked server on a Unix socket: it has loaded every module, and each of its children does one launcher's work.

The first `create` leaves it. Podman's and CRI-O's is called by conmon, which ends after its last child; there `start`
does, which these call themselves. The server ends after five idle minutes, or when other modules are installed. In its
directory, which is root's alone, are:

    pid         held by a lock for as long as the server lives: there is one
    socket      where one child waits in accept(), the next one once that is over, or as soon as somebody else connects
    child-PID   of a child that prepares a container's start (worker.py)
    wanted      `create` could leave none: the next `start` is to (launcher.c)

A connection is one piece of work. The child greets a caller that lives as the server does (caller.py); the launcher
sends its arguments, environment, current directory and standard streams, and the child runs what Python would have run
(main.py) and answers with the exit status. Whatever goes wrong on either side closes the connection, and the launcher
starts Python. Nothing is left of one container for the next: every child ends after its work.
"""

from __future__ import annotations

import _socket
import fcntl
import gc
import os
import signal
import sys
import time

from nvhook.linux import kernel, memory, mountinfo, trusted_dir, userns
from nvhook.linux.child import readable

from . import caller

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_IDLE = 300  # seconds without work, after which the server ends
_MOST = 64  # children at a time: then a launcher starts Python

# Processes that inherit others and wait for none of them.
_REAPERS = ("systemd", "init", "containerd-shim")


# Leaving it behind


def leave(place: str) -> bool:
    """Start it, unless there is one, or the caller is not the machine's root; `place` is its directory.

    False where it cannot stay: the process that inherits it would wait for its end.
    """
    if os.geteuid() != 0 or not userns.is_first():
        return True
    try:
        os.close(trusted_dir.open_directory(*os.path.split(place)))
        lock = os.open(f"{place}/pid", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return _fork_twice(lambda: _run(place, lock))
        finally:
            os.close(lock)
    except OSError:
        return True  # there is one, or this file system takes none


def want(place: str) -> None:
    """Let the next `start` leave it."""
    try:
        os.close(os.open(f"{place}/wanted", os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    except OSError:
        return


def _fork_twice(work: Callable[[], None]) -> bool:
    """So that the low-level runtime, which this process becomes, has no child that it does not know. False, and no
    `work`, for a process that would be waited for."""
    told, tell = os.pipe2(os.O_CLOEXEC)
    first = os.fork()
    if not first:
        try:
            first = os.getpid()
            if not os.fork() and _is_left_alone(first):
                os.write(tell, b"\n")
                work()
        finally:
            os._exit(0)
    os.close(tell)
    os.waitpid(first, 0)
    try:
        return bool(os.read(told, 1))
    finally:
        os.close(told)


def _is_left_alone(parent: int) -> bool:
    """Whether the process that inherits us when the `parent` has ended, which it is about to, will not wait for us."""
    while os.getppid() == parent:
        time.sleep(0.001)
    try:
        with open(f"/proc/{os.getppid()}/comm") as file:
            return os.getppid() == 1 or file.read().startswith(_REAPERS)
    except OSError:
        return False


def _run(place: str, lock: int) -> None:
    if None in (sys.stdin, sys.stdout, sys.stderr):  # Python has none that were closed
        return
    os.setsid()
    os.chdir("/")
    os.umask(0o077)
    os.environ.clear()  # the first caller's
    os.closerange(3, lock)
    os.closerange(lock + 1, 1 << 16)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.close(null)
    _leave_control_groups()
    _sweep(place)
    listener = caller.listen(f"{place}/socket")  # a caller waits from now on: it is served sooner than by Python
    try:
        _load()
        kernel.prctl(kernel.PR_SET_NAME, b"nvhook-server")
        gc.freeze()
        gc.disable()  # a child is soon over, and a collection would copy all that it shares with this process
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the children
        os.ftruncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
        Server(place, lock, listener).serve()
    finally:
        os.unlink(f"{place}/socket")


def _load() -> None:
    """All that a start needs, so that no child has to import it. tests/test_architecture.py holds the list."""
    from nvhook import hook, plan, prestart  # noqa: F401
    from nvhook.container import cleanup, cuda_compat  # noqa: F401
    from nvhook.driver import inventory  # noqa: F401

    from . import create, worker  # noqa: F401


def _leave_control_groups() -> None:
    """Into the topmost of each hierarchy: the caller's is a service's or a container's, and is to end. OSError."""
    with open("/proc/self/mountinfo", "rb") as file:
        mounts = mountinfo.mounts(os.fsdecode(file.read()))
    for mount in mounts:
        if mount.fstype in ("cgroup", "cgroup2") and mount.root == "/":
            with open(f"{mount.point}/cgroup.procs", "w") as procs:
                procs.write("0")
    with open("/proc/self/cgroup") as groups:
        if any(not line.endswith(":/\n") for line in groups):
            raise OSError("there is a control group that cannot be left")


def _sweep(place: str) -> None:
    """Remove what a server that was killed has left: the sockets of children that are over."""
    for name in os.listdir(place):
        if name.startswith("child-") and not os.path.exists(f"/proc/{name[6:]}"):
            caller.remove(f"{place}/{name}")


class Server:
    """`_children`: the process number of each by a pipe that it holds, whose end tells that it is over.

    `_ready` is the pipe of the one that waits in accept(); it writes a byte when it has a caller. -1: there is none.
    """

    __slots__ = ("_children", "_listener", "_lock", "_own", "_place", "_ready")

    def __init__(self, place: str, lock: int, listener: _socket.socket) -> None:
        self._place = place
        self._lock = lock
        self._listener = listener
        self._own = caller.identity("self")
        self._children: dict[int, int] = {}
        self._ready = -1

    def serve(self) -> None:
        """Until nothing was asked for so long, or other modules are installed. The child that waits ends with us."""
        listener = self._listener.fileno()
        self._fork(is_awaited=False)
        while True:
            waited = list(self._children)
            if self._ready < 0 and len(waited) < _MOST:
                waited.append(listener)
            events = readable(waited, _IDLE)
            if (not events and len(self._children) <= 1) or caller.version_of_modules() != caller.LOADED:
                return
            is_over = [self._end(pipe) for pipe in events if pipe != listener]
            if self._ready < 0 and (any(is_over) or listener in events):
                self._fork(is_awaited=listener in events)

    def _end(self, pipe: int) -> bool:
        """Whether a child is over, and the next one may wait: not for one that had no caller, until somebody asks."""
        was_ready = pipe == self._ready
        if was_ready:
            self._ready = -1
        if os.read(pipe, 1):
            return False  # it has a caller now
        os.close(pipe)
        caller.remove(f"{self._place}/child-{self._children.pop(pipe)}")
        return not was_ready

    def _fork(self, *, is_awaited: bool) -> None:
        """A child that waits in accept(), or has a caller there already."""
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        server = os.getpid()
        pid = os.fork()
        if pid:
            os.close(theirs)
            self._children[ours] = pid
            self._ready = ours
            return
        try:
            from . import worker

            for fd in (self._lock, ours, *self._children):
                os.close(fd)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == server:
                if not is_awaited:
                    memory.populate()  # every page that is written to would cost a fault and a copy later
                worker.Worker(self._place, self._listener, self._own).serve(theirs)
        finally:
            os._exit(0)
