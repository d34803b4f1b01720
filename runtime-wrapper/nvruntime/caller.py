# SPDX-License-Identifier: Apache-2.0
"""The server's end of a connection with a launcher: whether that may ask, what it asks, the answer.

Root does here what the caller says. So it serves one that could have done the same itself, and no other.
"""

from __future__ import annotations

import _socket
import array
import os
import select
import struct
import sys

import nvhook
import nvruntime
from nvhook.linux.child import readable

_BACKLOG = 64
_SILENCE = 1.0  # seconds until a caller that has been greeted must have sent its request

_MAGIC = b"NVH1"
_HEAD = struct.Struct("=III")  # numbers of words and of variables, umask: launcher.c, `encode`
_MAX_REQUEST = 1 << 17
_DESCRIPTORS = 4  # current directory, stdin, stdout, stderr
_CREDENTIALS = struct.Struct("=iII")  # struct ucred
_SO_PEERCRED, _SO_PASSCRED, _SCM_CREDENTIALS = 17, 16, 2


# Where our modules are.
_CORE = nvhook.__path__[0]
_DIRECTORIES = [*nvruntime.__path__, _CORE]
_DIRECTORIES += [entry.path for entry in os.scandir(_CORE) if entry.is_dir() and entry.name != "__pycache__"]


class Refused(Exception):  # noqa: N818 - the caller does the work itself
    pass


def listen(path: str) -> _socket.socket:
    remove(path)
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    listener.bind(path)
    os.chmod(path, 0o600)
    listener.listen(_BACKLOG)
    return listener


def remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


class Caller:
    """The next one at `listener`. `process` is a pidfd of it."""

    __slots__ = ("_connection", "_descriptors", "_directory", "_null", "_pid", "process")

    def __init__(self, listener: _socket.socket) -> None:
        fd, _ = listener._accept()  # type: ignore[attr-defined]  # what the package `socket` calls, at 6 ms
        self._connection = _socket.socket(fileno=fd)
        self._null = self._directory = self._pid = self.process = -1
        self._descriptors = array.array("i")

    def receive(self, own: list[object]) -> list[str]:
        """The words of call.parse; this process has the caller's directory, streams, environment and umask then.

        Refused for one that does not live as we do, which is `own`, or would load other modules: our work would not be
        what it would do itself.
        """
        try:
            words, variables, umask = self._request(own)
        except BaseException:
            self._end()  # whoever may not ask can do so as often as he likes
            raise
        self._live_as(variables, umask)
        return words

    def _request(self, own: list[object]) -> tuple[list[str], dict[bytes, bytes], int]:
        connection = self._connection
        self._pid, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(_socket.SOL_SOCKET, _SO_PEERCRED, 12))
        if uid != 0 or self._pid <= 0:
            raise Refused
        self.process = os.pidfd_open(self._pid)
        if identity(str(self._pid)) != own or version_of_modules() != LOADED:
            raise Refused
        # The process that connected may be over, and its number another's by now. So the kernel is to say which process
        # sends the request: if that has the number, and the process of the pidfd still lives, they are the same.
        connection.setsockopt(_socket.SOL_SOCKET, _SO_PASSCRED, 1)
        connection.send(_MAGIC + struct.pack("=i", os.getpid()))
        if not readable([connection.fileno()], _SILENCE):
            raise Refused
        space = _socket.CMSG_SPACE(_CREDENTIALS.size) + _socket.CMSG_SPACE(4 * _DESCRIPTORS)
        content, messages, flags, _ = connection.recvmsg(_MAX_REQUEST + 1, space, _socket.MSG_CMSG_CLOEXEC)
        found = {kind: data for level, kind, data in messages if level == _socket.SOL_SOCKET}
        self._descriptors = array.array("i", found.get(_socket.SCM_RIGHTS, b""))
        sender = _CREDENTIALS.unpack(found.get(_SCM_CREDENTIALS, bytes(12)))
        if flags & (_socket.MSG_TRUNC | _socket.MSG_CTRUNC) or len(self._descriptors) != _DESCRIPTORS:
            raise Refused
        if sender[:2] != (self._pid, 0) or readable([self.process], 0):
            raise Refused
        return parse(content)

    def _end(self) -> None:
        self._connection.close()
        for fd in (self.process, *self._descriptors):
            if fd >= 0:
                os.close(fd)

    def _live_as(self, variables: dict[bytes, bytes], umask: int) -> None:
        # Ours are kept open: where the work ends, in a container's mount namespace, no path may be looked up.
        self._null = os.dup(0)
        self._directory = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        os.fchdir(self._descriptors[0])
        for target in (0, 1, 2):
            os.dup2(self._descriptors[target + 1], target)
        for fd in self._descriptors:
            os.close(fd)
        os.umask(umask)
        os.environb.clear()
        os.environb.update(variables)

    def answer(self, status: int) -> None:
        """Give back its streams and its directory, for whose end an engine waits, and tell the exit status.

        And wait until it has closed the connection: ending takes processor time that it needs.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        for target in (0, 1, 2):
            os.dup2(self._null, target)
        os.fchdir(self._directory)
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


def identity(pid: str) -> list[object]:
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


def version_of_modules() -> list[tuple[int, int]]:
    """Of the directories that they are in, which an upgrade replaces or changes; empty if these are gone."""
    try:
        found = [os.stat(path) for path in _DIRECTORIES]
    except OSError:
        return []
    return [(status.st_ino, status.st_mtime_ns) for status in found]


LOADED = version_of_modules()


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()
