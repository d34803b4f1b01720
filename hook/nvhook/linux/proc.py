# SPDX-License-Identifier: Apache-2.0
"""/proc, proved to be procfs before anything is reached through it.

An open file has a name there, /proc/self/fd/N, and mount(2), umount2(2) and chmod(2) on an O_PATH descriptor need that
name. Whoever can put something else at /proc (a tmpfs, a directory of an image, a link) decides what the name leads to,
and root would mount, unmount or change that: CVE-2025-31133, CVE-2025-52565 and CVE-2025-52881 were of this kind. So
/proc is opened in the host's mount namespace, the kernel says which file system it is, and what is needed later is
reached from that descriptor, without a path from `/`.
"""

from __future__ import annotations

import errno
import os

from . import kernel

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


def is_procfs(fd: int) -> bool:
    return kernel.fstatfs(fd) == kernel.PROC_SUPER_MAGIC


def open_below(path: str, flags: int) -> int:
    """A descriptor for `path`, which is relative to /proc. OSError with ENOTSUP where one of the two is not procfs."""
    top = os.open("/proc", _DIRECTORY)
    try:
        _prove(top, "/proc")
        fd = os.open(path, flags | os.O_CLOEXEC, dir_fd=top)
    finally:
        os.close(top)
    try:
        _prove(fd, f"/proc/{path}")
    except OSError:
        os.close(fd)
        raise
    return fd


def _prove(fd: int, path: str) -> None:
    if not is_procfs(fd):
        raise OSError(errno.ENOTSUP, f"`{path}` is not procfs; mount procfs there", path)


def read(path: str) -> str:
    """The text of the file `path` below /proc."""
    with open(open_below(path, os.O_RDONLY), encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        return file.read()


def reopen(fd: int, flags: int) -> int:
    """A second descriptor for what the O_PATH descriptor `fd` is of. In the host's mount namespace alone."""
    names = open_below("self/fd", _DIRECTORY)
    try:
        return os.open(str(fd), flags | os.O_CLOEXEC, dir_fd=names)
    finally:
        os.close(names)


def mount_id(fd: int) -> int:
    """The id, as in mountinfo, of the mount through which `fd` was opened. In the host's mount namespace alone."""
    return _mount_id_of_statx(fd) or Names().mount_id(fd)


def _mount_id_of_statx(fd: int) -> int:
    """0 where the kernel does not tell (before Linux 5.8)."""
    try:
        return kernel.statx_mount(fd, kernel.STATX_MNT_ID)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EPERM):
            return 0
        raise


class Names:
    """Names of this process's descriptors, for system calls that take a path and no descriptor.

    Made in the host's mount namespace, and good in any other; a child needs its own. mount(2) and umount2(2) take no
    descriptor of a directory either: for them /proc/self/fd becomes the current directory, which is `/` afterwards.
    """

    __slots__ = ("_names", "top")

    def __init__(self) -> None:
        """`top` is a descriptor of /proc. OSError where that is not procfs."""
        self.top = os.open("/proc", _DIRECTORY)
        _prove(self.top, "/proc")
        self._names = os.open("self/fd", _DIRECTORY, dir_fd=self.top)
        _prove(self._names, "/proc/self/fd")

    def mount(self, source: int | str, target: int, fstype: str | None, flags: int, data: str = "") -> None:
        """mount(2) on the descriptor `target`; `source` is another one for a bind mount."""
        os.fchdir(self._names)
        try:
            kernel.mount(str(source), str(target), fstype, flags, data)
        finally:
            os.chdir("/")

    def detach(self, mounted: int) -> None:
        """Take away the mount that `mounted` is a descriptor of, and close it."""
        try:
            os.fchdir(self._names)
            kernel.umount2(str(mounted), kernel.MNT_DETACH)
        finally:
            os.chdir("/")
            os.close(mounted)

    def chmod(self, fd: int, mode: int) -> None:
        os.chmod(str(fd), mode, dir_fd=self._names)

    def chown(self, fd: int, uid: int, gid: int) -> None:
        os.chown(str(fd), uid, gid, dir_fd=self._names)

    def mount_id(self, fd: int) -> int:
        """The id, as in mountinfo, of the mount through which `fd` was opened."""
        found = _mount_id_of_statx(fd)
        if found:
            return found
        info = os.open(f"self/fdinfo/{fd}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.top)
        try:
            _prove(info, f"/proc/self/fdinfo/{fd}")
            _, _, rest = os.read(info, 4096).partition(b"mnt_id:")
        finally:
            os.close(info)
        return int(rest.split()[0])
