# SPDX-License-Identifier: Apache-2.0
"""Which object a descriptor is of, in a form that can be written down and compared minutes later.

A path is a name, and whoever owns a directory above it can give the name to something else. Device and inode number
are not enough either: ext4 gives the inode number of a removed directory to the next one, and the kernel gives the
device number of an unmounted overlay to the next. The file handle, which holds the inode's generation, tells the first
two apart, and the mount the others.
"""

from __future__ import annotations

import os

from . import kernel, proc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar  # noqa: TID251 - never at run time

    Answer = TypeVar("Answer")

# EPERM from a seccomp filter, ENOSYS and EINVAL from an older kernel, EOPNOTSUPP from a file system without handles,
# EOVERFLOW from one that has none for this directory, as NFS where its server's are too long (name_to_handle_at(2))
_NOT_HERE = (1, 38, 22, 95, 75)


class Identity:
    """device, inode   as fstat has them
    handle   the file handle, in hexadecimal; empty where the file system has none (overlayfs)
    mount    the mount that it was reached through: a number that no other gets before a reboot (Linux 6.8), on older
             kernels the id of mountinfo, which the next mount may get
    """

    __slots__ = ("device", "handle", "inode", "mount")

    def __init__(self, device: int, inode: int, handle: str, mount: int) -> None:
        self.device = device
        self.inode = inode
        self.handle = handle
        self.mount = mount

    def is_same_object(self, other: Identity) -> bool:
        """Whether both are one directory or file, through whatever mounts they were reached."""
        return (self.device, self.inode, self.handle) == (other.device, other.inode, other.handle)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and self.is_same_object(other) and self.mount == other.mount

    def __hash__(self) -> int:
        return hash((self.device, self.inode))

    def describe(self) -> list[int | str]:
        return [self.device, self.inode, self.handle, self.mount]


def of(fd: int) -> Identity:
    """The Identity of what `fd` is a descriptor of, O_PATH or other."""
    status = os.fstat(fd)
    handle = _unless_missing(lambda: kernel.name_to_handle(fd).hex(), "")
    mount = _unless_missing(lambda: kernel.statx_mount(fd, kernel.STATX_MNT_ID_UNIQUE), 0) or proc.mount_id(fd)
    return Identity(status.st_dev, status.st_ino, handle, mount)


def parse(value: object) -> Identity:
    """What `describe` made, read back; ValueError for anything else."""
    if isinstance(value, list) and [type(item) for item in value] == [int, int, str, int]:
        return Identity(*value)
    raise ValueError("not the identity of a file")


def _unless_missing(ask: Callable[[], Answer], otherwise: Answer) -> Answer:
    try:
        return ask()
    except OSError as error:
        if error.errno in _NOT_HERE:
            return otherwise
        raise
