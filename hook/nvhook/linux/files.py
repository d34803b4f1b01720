# SPDX-License-Identifier: Apache-2.0
"""A file put in the place of another in one step: written beside it, then renamed.

Directories are descriptors, names have one component, and a link under such a name is never followed.
"""

from __future__ import annotations

import errno
import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

NEW = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY | os.O_CLOEXEC


def replace(content: bytes, directory: int, name: str, beside: str = "") -> None:
    """Put a file with `content` in the place of `name`, readable for everybody, its owner that of the directory.

    `beside` is the name under which it is written, where beside_of's may be that of another process.
    """

    def fill(fd: int) -> None:
        write(fd, content)
        status = os.fstat(directory)
        os.fchmod(fd, 0o644)  # whatever the umask
        if os.fstat(fd).st_uid != status.st_uid:
            os.fchown(fd, status.st_uid, status.st_gid)

    _put(fill, directory, name, beside or beside_of(name))


def restore(source: int, directory: int, name: str, owner: tuple[int, int], mode: int, mtime: int) -> None:
    """Put a copy of the file `source` in the place of `name`, with this owner (uid, gid), mode and mtime in ns."""

    def fill(fd: int) -> None:
        copy(source, fd)
        os.fchown(fd, *owner)
        os.fchmod(fd, mode)
        os.utime(fd, ns=(mtime, mtime))

    _put(fill, directory, name, beside_of(name))


def _put(fill: Callable[[int], None], directory: int, name: str, beside: str) -> None:
    """A new file, with what `fill` writes to it, in the place of `name`."""
    clear(beside, directory)
    fd = os.open(beside, NEW, 0o600, dir_fd=directory)
    try:
        fill(fd)
        os.rename(beside, name, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError:
        clear(beside, directory)
        raise
    finally:
        os.close(fd)


def copy(source: int, target: int) -> None:
    """The whole content of the file `source`, appended to the empty file `target`."""
    os.lseek(source, 0, os.SEEK_SET)
    while os.sendfile(target, source, None, 1 << 20):
        pass


def write(fd: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]


def beside_of(name: str) -> str:
    """The name under which a file is made before it takes the place of `name`."""
    return f".{name}.nvhook"


def clear(beside: str, directory: int) -> None:
    """Remove what a hook that was killed left under such a name; an image may have something there, too."""
    try:
        os.unlink(beside, dir_fd=directory)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno == errno.EROFS:
            raise
        raise OSError(error.errno, f"`{beside}` is in the way: {os.strerror(error.errno or 0).lower()}") from None


def owner_and_mode(status: os.stat_result) -> tuple[tuple[int, int], int]:
    """(uid, gid) and the permission bits of a file."""
    return (status.st_uid, status.st_gid), stat.S_IMODE(status.st_mode)
