# SPDX-License-Identifier: Apache-2.0
"""A fresh tmpfs on a directory, mounted by descriptor.

It belongs to whoever files are made as at that moment, and can be written to until it is sealed. Kernels before 5.2
lack the calls for a mount that is attached when it is ready; there mount(2) is told the place through /proc/self/fd.
"""

from __future__ import annotations

import errno
import os

from . import kernel
from .bind import detach
from .root import DIRECTORY

_NOT_HERE = (errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP)
_MODE = "0755"  # its owner may have no capability to write despite the mode
_ATTRIBUTES = kernel.MOUNT_ATTR_NOSUID | kernel.MOUNT_ATTR_NODEV | kernel.MOUNT_ATTR_NOEXEC
_FLAGS = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC


def attach(target: int, parent: int, name: str) -> int:
    """Mount on the directory `target`, which is `name` in `parent`; the answer is a descriptor of the mount."""
    try:
        mounted = _unattached()
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
        return _mount(target, parent, name)
    try:
        kernel.move_mount(mounted, target)
    except OSError:
        os.close(mounted)
        raise
    return mounted


def seal(mounted: int, mode: int) -> None:
    """Nothing can be written any more, and its root directory has `mode`."""
    place = f"/proc/self/fd/{mounted}"
    os.chmod(place, mode)
    kernel.mount("none", place, None, kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | _FLAGS)


def _unattached() -> int:
    context = kernel.fsopen("tmpfs")
    try:
        kernel.fsconfig(context, kernel.FSCONFIG_SET_STRING, "source", "tmpfs")
        kernel.fsconfig(context, kernel.FSCONFIG_SET_STRING, "mode", _MODE)
        kernel.fsconfig(context, kernel.FSCONFIG_CMD_CREATE)
        return kernel.fsmount(context, _ATTRIBUTES)
    finally:
        os.close(context)


def _mount(target: int, parent: int, name: str) -> int:
    kernel.mount("tmpfs", f"/proc/self/fd/{target}", "tmpfs", _FLAGS, f"mode={_MODE}")
    mounted = os.open(name, DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    if os.fstat(mounted).st_dev == os.fstat(target).st_dev:
        os.close(mounted)  # and not unmounted: it is somebody else's
        raise OSError(errno.ESTALE, "replaced while it was mounted", name)
    try:
        kernel.mount("none", f"/proc/self/fd/{mounted}", None, kernel.MS_PRIVATE)
    except OSError:
        detach(mounted)
        raise
    return mounted
