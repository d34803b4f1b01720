# SPDX-License-Identifier: Apache-2.0
"""Descriptors below one directory that somebody else fills: a container's root filesystem, a driver root.

A path is resolved once, by the kernel, as if the directory were `/` (openat2(2), RESOLVE_IN_ROOT); what comes back
is a descriptor, and everything after that is done to the descriptor. No path below the root is ever built by
joining strings and then opened: between the two the owner of the tree can put a link there.

Where the kernel has no openat2, or a seccomp filter hides it, the same walk is done here component by component.
"""

from __future__ import annotations

import errno
import os
import stat

from . import kernel

_MAX_LINKS = 40  # MAXSYMLINKS of the kernel's own walk
_NOT_HERE = (errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP)
_TRIES = 32

DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


class Root:
    """`fd` is an O_PATH descriptor of the directory that counts as `/`; the object owns it."""

    __slots__ = ("_openat2", "fd")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._openat2 = True

    def open(self, path: str, flags: int = os.O_PATH) -> int:
        """A descriptor for `path`, links followed inside the root; OSError as open(2) has it.

        Magic links (/proc/<pid>/root, /proc/<pid>/fd) are refused with ELOOP. Give O_NOFOLLOW to hold a final
        link itself (with O_PATH) or to refuse it (without), and O_NONBLOCK where a FIFO may stand in the way.
        """
        flags |= os.O_CLOEXEC
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
            return _read_all(fd, limit)
        finally:
            os.close(fd)

    def open_file(self, path: str, flags: int = 0) -> int:
        """A regular file, for reading; OSError with EINVAL for anything else. In the host's mount namespace alone.

        It is opened when it is known to be one: to open a device is to use it, and an image may hold any.
        """
        held = self.open(path, os.O_PATH | flags)
        try:
            if not stat.S_ISREG(os.fstat(held).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", path)
            return os.open(f"/proc/self/fd/{held}", os.O_RDONLY | os.O_CLOEXEC)
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
        """What a directory holds, sorted; nothing where there is none."""
        try:
            fd = self.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            return []
        try:
            return sorted(os.listdir(fd))
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


def _read_all(fd: int, limit: int) -> bytes:
    chunks = []
    size = 0
    while chunk := os.read(fd, 1 << 20):
        size += len(chunk)
        if size > limit:
            raise OSError(errno.EFBIG, f"larger than {limit} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


def _walk(root_fd: int, path: str, flags: int) -> int:
    """openat2's RESOLVE_IN_ROOT by hand: `..` ends at the root, absolute links begin again at the root.

    The descriptors from the root down to here are kept open, so that `..` is a step back on that list and never a
    look-up that a rename in between could lead elsewhere.
    """
    opened: list[int] = []
    if not path:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    todo = path.split("/")[::-1]
    links = 0
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
                todo += target.split("/")[::-1]
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
