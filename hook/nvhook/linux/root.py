# SPDX-License-Identifier: Apache-2.0
"""Descriptors below one directory that somebody else fills: a container's root filesystem, a driver root.

A path is resolved once, by the kernel, as if the directory were `/` (openat2(2), RESOLVE_IN_ROOT); what comes back
is a descriptor, and everything after that is done to the descriptor. No path below the root is ever built by
joining strings and then opened: between the two the owner of the tree can put a link there.

Where the kernel has no openat2, or a seccomp filter hides it, the same walk is done here component by component.

A tree can make a look-up slow: 40 links of 4 KB each are 80,000 components. So all look-ups together have a time, and
the walk done here a number of components.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from itertools import islice

from . import kernel, proc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar  # noqa: TID251 - never at run time

    T = TypeVar("T")

_MAX_LINKS = 40  # MAXSYMLINKS of the kernel's own walk
_MAX_PATH = 4096  # PATH_MAX: bytes, with the NUL
_MAX_COMPONENTS = 4096  # of a path and of the links on its way together; a path alone has 2048 at most
_MAX_NAMES = 100_000  # of a directory
_NOT_HERE = (errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP)
_TRIES = 32
_OPTIONAL_SECONDS = 1.0

DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


class OutOfTimeError(Exception):
    """Look-ups below a root have taken all of their time; `path` is the one that was not begun.

    No OSError: what passes over a missing file must not take this for an answer.
    """

    def __init__(self, path: str, seconds: float) -> None:
        super().__init__(f"look up `{path}`: look-ups in this tree have taken {seconds:g} s, and may take no longer")
        self.path = path


class Root:
    """`fd` is an O_PATH descriptor of the directory that counts as `/`; the object owns it.

    seconds  that all look-ups and reads may take together; what is done between them does not count
    left     of these
    """

    __slots__ = ("_openat2", "_optional", "_whole", "fd", "left", "seconds")

    def __init__(self, fd: int, seconds: float = float("inf")) -> None:
        self.fd = fd
        self.seconds = self.left = seconds
        self._openat2 = True
        self._optional: Root | None = None
        self._whole: Root | None = None

    @property
    def optional(self) -> Root:
        """The same directory, for what can be left out: that has one second, which counts for the whole as well."""
        if self._optional is None:
            self._optional = Root(self.fd, min(_OPTIONAL_SECONDS, self.seconds))
            self._optional._whole = self
        return self._optional

    def spend(self, seconds: float) -> None:
        self.left -= seconds
        if self._whole is not None:
            self._whole.spend(seconds)

    def timed(self, path: str, act: Callable[[], T]) -> T:
        """What `act` returns, which reads `path`; the time it takes is spent. OutOfTimeError where none is left."""
        if self.left <= 0 or (self._whole is not None and self._whole.left <= 0):
            raise OutOfTimeError(path, self.seconds)
        begin = time.monotonic()
        try:
            return act()
        finally:
            self.spend(time.monotonic() - begin)

    def open(self, path: str, flags: int = os.O_PATH) -> int:
        """A descriptor for `path`, links followed inside the root; OSError as open(2) has it, or OutOfTimeError.

        Magic links (/proc/<pid>/root, /proc/<pid>/fd) are refused with ELOOP. Give O_NOFOLLOW to hold a final
        link itself (with O_PATH) or to refuse it (without), and O_NONBLOCK where a FIFO may stand in the way.
        """
        return self.timed(path, lambda: self._open(path, flags | os.O_CLOEXEC))

    def _open(self, path: str, flags: int) -> int:
        resolve = kernel.RESOLVE_IN_ROOT | kernel.RESOLVE_NO_MAGICLINKS
        tries = _TRIES
        while self._openat2 and tries:
            try:
                return kernel.openat2(self.fd, path, flags, resolve=resolve)
            except OSError as error:
                if error.errno == errno.EAGAIN:
                    # A rename or a mount anywhere on the machine, while the kernel took a `..`: it could not be sure.
                    tries -= 1
                elif error.errno in _NOT_HERE:
                    self._openat2 = False  # remembered: the answer is the same for every path
                else:
                    raise
        return _walk(self.fd, path, flags)

    def exists(self, path: str) -> bool:
        try:
            os.close(self.open(path))
        except OSError:
            return False
        return True

    def read(self, path: str, limit: int) -> bytes:
        """The content of a regular file of at most `limit` bytes; OSError with EFBIG or EINVAL for another."""
        fd = self.open_file(path)
        try:
            if os.fstat(fd).st_size > limit:
                raise OSError(errno.EFBIG, f"larger than {limit} bytes", path)
            return self.timed(path, lambda: _read_all(fd, limit))
        finally:
            os.close(fd)

    def open_file(self, path: str, flags: int = 0) -> int:
        """A regular file, for reading; OSError with EINVAL for anything else. In the host's mount namespace alone.

        It is opened when it is known to be one: to open a device is to use it, and an image may hold any. Where another
        process has a lease on it (fcntl(2)), open(2) waits 45 s for that process unless O_NONBLOCK is given.
        """
        held = self.open(path, os.O_PATH | flags)
        try:
            if not stat.S_ISREG(os.fstat(held).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", path)
            return proc.reopen(held, os.O_RDONLY | os.O_NONBLOCK)
        finally:
            os.close(held)

    def real_path(self, path: str, kind: int) -> str:
        """Its path without links, or empty if it is of another kind (stat.S_IFREG, …). In the host's namespace."""
        try:
            fd = self.open(path)
        except OSError:
            return ""
        try:
            return os.readlink(f"/proc/self/fd/{fd}") if stat.S_IFMT(os.fstat(fd).st_mode) == kind else ""
        finally:
            os.close(fd)

    def names(self, path: str) -> list[str]:
        """What a directory holds, sorted; nothing where there is none. Of one with too many names, some."""
        try:
            fd = self.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            return []
        try:
            return sorted(self.timed(path, lambda: first_names(fd, _MAX_NAMES)))
        finally:
            os.close(fd)

    def open_directory(self, path: str, made: list[tuple[int, str]]) -> int:
        """A descriptor for the directory `path`; missing ones are made with mode 0755.

        Each one made is appended to `made` as (descriptor of its parent, name), outermost first, so that it can be
        removed again. NotADirectoryError where something else stands, a dangling link included.
        """
        try:
            return self.open(path, DIRECTORY)
        except FileNotFoundError:
            pass
        parent = self.open_directory(os.path.dirname(path.rstrip("/")), made)
        name = os.path.basename(path.rstrip("/"))
        umask = os.umask(0o022)  # the engine's may be 077, and the container's other users have to come through
        try:
            os.mkdir(name, 0o755, dir_fd=parent)
        except FileExistsError:
            os.close(parent)
            raise NotADirectoryError(errno.ENOTDIR, "a link that leads nowhere", path) from None
        except OSError:
            os.close(parent)
            raise
        finally:
            os.umask(umask)
        made.append((parent, name))
        return os.open(name, DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)


def first_names(directory: int, limit: int) -> list[str]:
    """`limit` of the names in a directory at most, in its own order: it may have millions."""
    with os.scandir(directory) as entries:
        return [entry.name for entry in islice(entries, limit)]


def _read_all(fd: int, limit: int) -> bytes:
    chunks = []
    size = 0
    while chunk := os.read(fd, 1 << 20):
        size += len(chunk)
        if size > limit:
            raise OSError(errno.EFBIG, f"larger than {limit} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


def _components(path: str) -> list[str]:
    """The last one first; OSError for a path that is empty or too long, as the kernel has it."""
    if not path:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    if len(os.fsencode(path)) >= _MAX_PATH:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), path)
    return path.split("/")[::-1]


def _walk(root_fd: int, path: str, flags: int) -> int:
    """openat2's RESOLVE_IN_ROOT by hand: `..` ends at the root, absolute links begin again at the root.

    The descriptors from the root down to here are kept open, so that `..` is a step back on that list and never a
    look-up that a rename in between could lead elsewhere.
    """
    opened: list[int] = []
    todo = _components(path)
    links, components = 0, len(todo)
    try:
        while todo:
            here = opened[-1] if opened else root_fd
            name = todo.pop()
            if name in ("", ".", ".."):
                if not stat.S_ISDIR(os.fstat(here).st_mode):
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
                if name == ".." and opened:
                    os.close(opened.pop())
                continue
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
            if stat.S_ISLNK(os.fstat(fd).st_mode) and (todo or not flags & os.O_NOFOLLOW):
                links += 1
                target = os.readlink("", dir_fd=fd)
                os.close(fd)
                if links > _MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                if target.startswith("/"):
                    while opened:
                        os.close(opened.pop())
                more = _components(target)
                components += len(more)
                if components > _MAX_COMPONENTS:
                    raise OSError(errno.ELOOP, f"links lead through more than {_MAX_COMPONENTS} names", path)
                todo += more
                continue
            if todo:
                opened.append(fd)
                continue
            os.close(fd)
            # The name is looked up a second time, with the caller's flags: O_NOFOLLOW refuses a link put there since.
            return os.open(name, flags | os.O_NOFOLLOW, dir_fd=here)
        return os.open(".", flags, dir_fd=opened[-1] if opened else root_fd)
    finally:
        for fd in opened:
            os.close(fd)
