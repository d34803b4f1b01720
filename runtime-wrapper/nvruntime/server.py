# SPDX-License-Identifier: Apache-2.0
"""A preforked server on a Unix socket: it has loaded every module, and each of its children does one launcher's work.

The first `create` leaves it. Podman's and CRI-O's is called by conmon, which ends after its last child; there `start`
does, which these call themselves. The server ends after five idle minutes, or when other modules are installed. In its
directory, which is root's alone, are:

    pid         held by a lock for as long as the server lives: there is one
    socket      where one child waits in accept(), the next one once that is over, or as soon as somebody else connects
    child-PID   of a child that prepares a container's start (ahead.py)
    wanted      `create` could leave none: the next `start` is to (launcher.c)

A connection is one piece of work. The child greets a caller that lives as the server does (`_identity`); the launcher
sends its arguments, environment, current directory and standard streams, and the child runs what Python would have run
(main.py) and answers with the exit status. Whatever goes wrong on either side closes the connection, and the launcher
starts Python. Nothing is left of one container for the next: every child ends after its work.
"""

from __future__ import annotations

import _socket
import array
import fcntl
import gc
import os
import select
import signal
import struct
import sys
import time

from nvhook import state_dir
from nvhook.linux import kernel, memory, mountinfo, userns
from nvhook.linux.child import readable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from nvhook.start import Start

    from .ahead import Ahead

_IDLE = 300  # seconds without work, after which the server ends
_LIMIT = 60  # seconds for one piece of work; then SIGALRM ends the child
_SILENCE = 1.0  # seconds until a caller that has been greeted must have sent its request
_BACKLOG = 64
_MOST = 64  # children at a time: then a launcher starts Python

_MAGIC = b"NVH1"
_HEAD = struct.Struct("=III")  # numbers of words and of variables, umask: launcher.c, `encode`
_MAX_REQUEST = 1 << 17
_DESCRIPTORS = 4  # current directory, stdin, stdout, stderr
_CREDENTIALS = struct.Struct("=iII")  # struct ucred
_SO_PEERCRED, _SO_PASSCRED, _SCM_CREDENTIALS = 17, 16, 2

# Processes that inherit others and wait for none of them.
_REAPERS = ("systemd", "init", "containerd-shim")
_CODE = os.path.dirname(os.path.abspath(__file__))


class Refused(Exception):  # noqa: N818 - the caller does the work itself
    pass


# Leaving it behind


def leave(place: str) -> bool:
    """Start it, unless there is one, or the caller is not the machine's root; `place` is its directory.

    False where it cannot stay: the process that inherits it would wait for its end.
    """
    if os.geteuid() != 0 or not userns.is_first():
        return True
    try:
        os.close(state_dir.open_directory(*os.path.split(place)))
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
    os.setsid()
    os.environ.clear()  # the first caller's
    os.umask(0o077)
    os.closerange(3, lock)
    os.closerange(lock + 1, 1 << 16)
    null_streams = NullStreams()
    null_streams.take()
    code = _version_of_code()
    _sweep(place)
    if None in (sys.stdin, sys.stdout, sys.stderr):  # Python has none that were closed
        return
    _leave_control_groups()
    listener = _listen(f"{place}/socket")  # from now on a caller waits: it is sooner served than by an interpreter
    try:
        _load()
        _be_called("nvhook-server")
        gc.freeze()
        gc.disable()  # a child is soon over, and a collection would copy all that it shares with this process
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the children
        os.ftruncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
        Server(place, lock, listener, null_streams, code).serve()
    finally:
        os.unlink(f"{place}/socket")


def _load() -> None:
    """All that a container may need, so that no child has to."""
    from nvhook import cleanup, hook, prestart  # noqa: F401

    from . import ahead, create, main  # noqa: F401


def _be_called(name: str) -> None:
    """What `ps` and `top` show; 15 characters at most."""
    kernel.prctl(kernel.PR_SET_NAME, name.encode())


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
    """Remove the sockets of children that are over, of a server that was killed."""
    for name in os.listdir(place):
        if name.startswith("child-") and not os.path.exists(f"/proc/{name[6:]}"):
            _unlink(f"{place}/{name}")


def _listen(path: str) -> _socket.socket:
    _unlink(path)
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    listener.bind(path)
    os.chmod(path, 0o600)
    listener.listen(_BACKLOG)
    return listener


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


class NullStreams:
    """Streams and a directory that are no caller's: its engine waits for the end of its own, and unmounts the bundle.

    They are opened once: in a container's mount namespace no path may be looked up.
    """

    __slots__ = ("_directory", "_null")

    def __init__(self) -> None:
        self._null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self._directory = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def take(self) -> None:
        for fd in (0, 1, 2):
            os.dup2(self._null, fd)
        os.fchdir(self._directory)


def _version_of_code() -> list[tuple[int, int]]:
    """Of the directories with our modules, which an upgrade replaces or changes; empty if they are gone."""
    found = []
    library = os.path.dirname(_CODE)
    for path in (_CODE, f"{library}/nvhook", f"{library}/nvhook/linux"):
        try:
            status = os.stat(path)
        except OSError:
            return []
        found.append((status.st_ino, status.st_mtime_ns))
    return found


# Serving


class Server:
    """`_busy`: what tells that a child is over, by descriptor: the end of a pipe that it holds; its process number.

    `_ready`: the same of the one child that waits in accept(), which writes a byte when it has a caller; -1 for none.
    """

    __slots__ = ("_busy", "_code", "_listener", "_lock", "_null_streams", "_own", "_place", "_ready")

    def __init__(
        self, place: str, lock: int, listener: _socket.socket, null_streams: NullStreams, code: list[tuple[int, int]]
    ) -> None:
        self._place = place
        self._lock = lock
        self._listener = listener
        self._null_streams = null_streams
        self._code = code
        self._own = _identity("self")
        self._ready = -1
        self._busy: dict[int, int] = {}

    def serve(self) -> None:
        """Until nothing has been asked for so long, or other modules are installed."""
        self._fork(is_awaited=False)
        while True:
            waited = list(self._busy)
            if self._ready >= 0:
                waited.append(self._ready)
            elif len(self._busy) < _MOST:
                waited.append(self._listener.fileno())
            events = readable(waited, _IDLE)
            if (not events and len(self._busy) <= 1) or _version_of_code() != self._code:
                return  # the child that waits ends with us
            is_over = [self._end(fd) for fd in events if fd in self._busy]
            is_awaited = self._listener.fileno() in events
            if self._ready < 0 and (any(is_over) or is_awaited):
                self._fork(is_awaited)

    def _end(self, fd: int) -> bool:
        """Whether a child is over; else it has a caller now."""
        if os.read(fd, 1):
            self._ready = -1
            return False
        os.close(fd)
        _unlink(f"{self._place}/child-{self._busy.pop(fd)}")
        was_ready = fd == self._ready
        if was_ready:
            self._ready = -1
        return not was_ready  # one that ended by itself is not replaced before somebody asks

    def _fork(self, is_awaited: bool) -> None:
        """A child that waits in accept(), or has a caller there already."""
        done, theirs = os.pipe2(os.O_CLOEXEC)
        server = os.getpid()
        pid = os.fork()
        if pid:
            os.close(theirs)
            self._busy[done] = pid
            self._ready = done
            return
        try:
            os.close(self._lock)
            for fd in (done, *self._busy):
                os.close(fd)
            kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == server:
                if not is_awaited:
                    memory.populate()  # every page that is written to would cost a fault and a copy later
                worker = Worker(self._place, self._null_streams, self._own, self._code)
                worker.listener = self._listener
                worker.serve(theirs)
        finally:
            os._exit(0)


class Worker:
    """A child of the server: it serves one caller, and where that has edited a config.json it prepares the start."""

    __slots__ = ("_code", "_null_streams", "_own", "_place", "_socket", "_task", "listener")

    def __init__(self, place: str, null_streams: NullStreams, own: list[object], code: list[tuple[int, int]]) -> None:
        self._place = place
        self._null_streams = null_streams
        self._own = own
        self._code = code
        self._task: tuple[Start, str] | None = None
        self._socket = ""
        self.listener: _socket.socket

    def serve(self, done: int) -> None:
        """Wait for one caller at `listener`, do what is asked, and end. `done` tells the server of it."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _be_called("nvhook-ready")
        connection = _accept(self.listener)
        os.write(done, b"\n")
        kernel.prctl(kernel.PR_SET_PDEATHSIG, 0)
        signal.alarm(_LIMIT)
        self.listener.close()
        caller = Caller(connection, self._own, self._code)
        words = caller.receive()
        from . import main

        status = main.run(words, main.parse(words), self.stay)
        caller.answer(status, self._null_streams)
        if not status:
            self._be_ahead(caller.process)

    def stay(self, start: Start, directory: str) -> str:
        """For create.edit: the socket for the hook is there before config.json names it. Empty where none can be."""
        from nvhook import container_dir

        if not container_dir.is_id(start.id):
            return ""
        self._socket = f"{self._place}/child-{os.getpid()}"
        try:
            self.listener = _listen(self._socket)
        except OSError:
            return ""
        self._task = start, directory
        return str(os.getpid())

    def _be_ahead(self, runtime: int) -> None:
        if not self._task:
            return
        from . import ahead

        _be_called("nvhook-ahead")
        prepared = ahead.Ahead(*self._task)
        while self.listener.fileno() in readable([self.listener.fileno(), runtime]):
            if self._serve_hook(prepared):
                return
        prepared.give_up()
        _unlink(self._socket)

    def _serve_hook(self, prepared: Ahead) -> bool:
        """False for a caller that did not wait, or may not ask."""
        try:
            caller = Caller(_accept(self.listener), self._own, self._code)
            words = caller.receive()
        except (Refused, OSError):
            return False
        _unlink(self._socket)
        if words[0] != "hook":
            raise Refused
        caller.answer(prepared.serve(), self._null_streams)
        return True


def _accept(listener: _socket.socket) -> _socket.socket:
    fd, _ = listener._accept()  # type: ignore[attr-defined]  # what the package `socket` calls, at 6 ms
    return _socket.socket(fileno=fd)


class Caller:
    """A launcher at the other end of `connection`. `process` is a pidfd of it."""

    __slots__ = ("_connection", "_pid", "process")

    def __init__(self, connection: _socket.socket, own: list[object], code: list[tuple[int, int]]) -> None:
        """Refused for one that does not live as the server does: our work would not be what it would do itself."""
        self._connection = connection
        self._pid, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(_socket.SOL_SOCKET, _SO_PEERCRED, 12))
        if uid != 0 or self._pid <= 0:
            raise Refused
        self.process = os.pidfd_open(self._pid)
        if _identity(str(self._pid)) != own or _version_of_code() != code:
            raise Refused
        # The process that connected may be over, and its number another's by now. So the kernel is to say which process
        # sends the request: if that has the number, and the process of the pidfd still lives, they are the same.
        connection.setsockopt(_socket.SOL_SOCKET, _SO_PASSCRED, 1)

    def receive(self) -> list[str]:
        """The words of main.run; this process has the caller's directory, streams, environment and umask then."""
        self._connection.send(_MAGIC + struct.pack("=i", os.getpid()))
        if not readable([self._connection.fileno()], _SILENCE):
            raise Refused
        space = _socket.CMSG_SPACE(_CREDENTIALS.size) + _socket.CMSG_SPACE(4 * _DESCRIPTORS)
        content, messages, flags, _ = self._connection.recvmsg(_MAX_REQUEST + 1, space, _socket.MSG_CMSG_CLOEXEC)
        found = {kind: data for level, kind, data in messages if level == _socket.SOL_SOCKET}
        descriptors = array.array("i", found.get(_socket.SCM_RIGHTS, b""))
        sender = _CREDENTIALS.unpack(found.get(_SCM_CREDENTIALS, bytes(12)))
        if flags & (_socket.MSG_TRUNC | _socket.MSG_CTRUNC) or len(descriptors) != _DESCRIPTORS:
            raise Refused
        if sender[:2] != (self._pid, 0) or readable([self.process], 0):
            raise Refused
        words, variables, umask = parse(content)
        os.fchdir(descriptors[0])
        for target in (0, 1, 2):
            os.dup2(descriptors[target + 1], target)
        for fd in descriptors:
            os.close(fd)
        os.umask(umask)
        os.environb.clear()
        os.environb.update(variables)
        return words

    def answer(self, status: int, null_streams: NullStreams) -> None:
        """And wait until it has closed the connection: ending takes processor time that it needs."""
        sys.stdout.flush()
        sys.stderr.flush()
        null_streams.take()
        self._connection.send(bytes([status]))
        waiting = select.poll()
        waiting.register(self._connection.fileno(), 0)  # POLLHUP alone
        waiting.poll(1000)
        self._connection.close()


def parse(content: bytes) -> tuple[list[str], dict[bytes, bytes], int]:
    """(words, variables, umask) of a request; Refused if it is none."""
    if len(content) < _HEAD.size:
        raise Refused
    count, variables, umask = _HEAD.unpack_from(content)
    parts = content[_HEAD.size :].split(b"\0")
    if parts.pop() or count + variables != len(parts) or not count or umask > 0o777:
        raise Refused
    pairs = (part.partition(b"=") for part in parts[count:])
    return [os.fsdecode(part) for part in parts[:count]], {name: value for name, _, value in pairs if name}, umask


def _identity(pid: str) -> list[object]:
    """How the process lives: root directory, namespaces, security label, rights. Refused if it is over."""
    place = f"/proc/{pid}"
    try:
        root = os.stat(f"{place}/root")
        found: list[object] = [root.st_dev, root.st_ino]
        found += [os.stat(f"{place}/ns/{name}").st_ino for name in ("mnt", "pid", "user")]
        lines = _read(f"{place}/status").split(b"\n")
        found += [line for line in lines if line.startswith((b"Uid:", b"CapEff:", b"NoNewPrivs:", b"Seccomp:"))]
    except OSError:
        raise Refused from None
    try:
        found.append(_read(f"{place}/attr/current"))
    except OSError:  # no SELinux and no AppArmor here
        found.append(b"")
    return found


def _read(path: str) -> bytes:
    """A small file of /proc, without the buffers and the questions of open()."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 8192)
    finally:
        os.close(fd)
