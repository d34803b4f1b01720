# SPDX-License-Identifier: Apache-2.0
"""A bind mount from one mount namespace into another, descriptor to descriptor.

`clone` is called in the namespace of the source, `attach` in that of the target. The mount gets its flags before it
is attached, so there is no moment in which it is writable. Kernels before 5.12 lack the calls for that; there the
source is opened again from the target's namespace, compared, bound and remounted with its flags, all by the names that
descriptors have in a procfs (proc.py).
"""

from __future__ import annotations

import errno
import os

from . import kernel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .proc import Names

_NOT_HERE = (errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP)

# mount option -> (MOUNT_ATTR_*, MS_*)
_OPTIONS = {
    "ro": (kernel.MOUNT_ATTR_RDONLY, kernel.MS_RDONLY),
    "nosuid": (kernel.MOUNT_ATTR_NOSUID, kernel.MS_NOSUID),
    "nodev": (kernel.MOUNT_ATTR_NODEV, kernel.MS_NODEV),
    "noexec": (kernel.MOUNT_ATTR_NOEXEC, kernel.MS_NOEXEC),
}


class BindSource:
    """A file to be bound elsewhere: `fd` is an O_PATH descriptor of it, and of the clone where there is one."""

    __slots__ = ("_cloned", "_directory", "_options", "_path", "fd")

    def __init__(self, path: str, options: tuple[str, ...], directory: int | None = None) -> None:
        """Opens `path`: an absolute path of the host's without links, or a name in `directory`, a descriptor that is
        open for as long as this object is used. OSError if it is gone, or is a link."""
        self._path = path
        self._directory = directory
        self._options = options
        self._cloned = False
        self.fd = self._open()

    def _open(self) -> int:
        return os.open(self._path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)

    def clone(self) -> None:
        """Make the unattached mount, where the kernel can."""
        try:
            fd = kernel.open_tree(self.fd, "", kernel.OPEN_TREE_CLONE | kernel.OPEN_TREE_CLOEXEC | kernel.AT_EMPTY_PATH)
        except OSError as error:
            if error.errno in _NOT_HERE:
                return
            raise
        try:
            kernel.mount_setattr(fd, attr_set=self._flags(0), propagation=kernel.MS_PRIVATE)
        except OSError as error:
            os.close(fd)
            if error.errno in _NOT_HERE:
                return
            raise
        os.close(self.fd)
        self.fd = fd
        self._cloned = True

    def attach(self, names: Names, target: int, parent: int, name: str) -> int:
        """Mount on the file or directory `target`; the answer is a descriptor of the mount, for `names.detach`.

        It is `name` in the directory `parent`, opened without following it; the caller has checked what it is.
        """
        if self._cloned:
            kernel.move_mount(self.fd, target)
            return os.dup(self.fd)
        return self._bind(names, target, parent, name)

    def _bind(self, names: Names, target: int, parent: int, name: str) -> int:
        source = self._open()
        try:
            if not os.path.samestat(os.fstat(source), os.fstat(self.fd)):
                raise OSError(errno.ESTALE, "another file than on the host", self._path)
            names.mount(source, target, None, kernel.MS_BIND)
        finally:
            os.close(source)
        mounted = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        if not os.path.samestat(os.fstat(mounted), os.fstat(self.fd)):
            os.close(mounted)  # and not unmounted: it is somebody else's
            raise OSError(errno.ESTALE, "replaced while it was mounted", name)
        try:
            names.mount("none", mounted, None, kernel.MS_PRIVATE)
            names.mount("none", mounted, None, kernel.MS_REMOUNT | kernel.MS_BIND | self._flags(1))
        except OSError:
            names.detach(mounted)
            raise
        return mounted

    def _flags(self, which: int) -> int:
        flags = 0
        for option in self._options:
            flags |= _OPTIONS[option][which]
        return flags

    def close(self) -> None:
        os.close(self.fd)
