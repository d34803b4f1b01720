# SPDX-License-Identifier: Apache-2.0
"""A fresh tmpfs on a directory, mounted by descriptor.

It belongs to whoever files are made as at that moment, and can be written to until it is sealed. Kernels before 5.2
lack the calls for a mount that is attached when it is ready; there mount(2) gets the name that the descriptor of the
place has in a procfs (proc.py).
"""

from __future__ import annotations

import errno
import os

from . import kernel
from .root import DIRECTORY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .proc import Names

_NOT_HERE = (errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP)
_MODE = "0755"  # its owner may have no capability to write despite the mode
_ATTRIBUTES = kernel.MOUNT_ATTR_NOSUID | kernel.MOUNT_ATTR_NODEV | kernel.MOUNT_ATTR_NOEXEC
_FLAGS = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC


def attach(names: Names, target: int, parent: int, name: str) -> int:
    """Mount on the directory `target`, which is `name` in `parent`; the answer is a descriptor of the mount."""
    try:
        mounted = _unattached()
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
        return _mount(names, target, parent, name)
    try:
        kernel.move_mount(mounted, target)
    except OSError:
        os.close(mounted)
        raise
    return mounted


def seal(names: Names, mounted: int, mode: int) -> None:
    """Nothing can be written any more, and its root directory has `mode`."""
    names.chmod(mounted, mode)
    names.mount("none", mounted, None, kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | _FLAGS)


def _unattached() -> int:
    context = kernel.fsopen("tmpfs")
    try:
        kernel.fsconfig(context, kernel.FSCONFIG_SET_STRING, "source", "tmpfs")
        kernel.fsconfig(context, kernel.FSCONFIG_SET_STRING, "mode", _MODE)
        kernel.fsconfig(context, kernel.FSCONFIG_CMD_CREATE)
        return kernel.fsmount(context, _ATTRIBUTES)
    finally:
        os.close(context)


def _mount(names: Names, target: int, parent: int, name: str) -> int:
    names.mount("tmpfs", target, "tmpfs", _FLAGS, f"mode={_MODE}")
    mounted = os.open(name, DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    if os.fstat(mounted).st_dev == os.fstat(target).st_dev:
        os.close(mounted)  # and not unmounted: it is somebody else's
        raise OSError(errno.ESTALE, "replaced while it was mounted", name)
    try:
        names.mount("none", mounted, None, kernel.MS_PRIVATE)
    except OSError:
        names.detach(mounted)
        raise
    return mounted
