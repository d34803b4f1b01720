# SPDX-License-Identifier: Apache-2.0
"""What the dynamic linker of an image finds: its C library, and libraries by their names. Nothing is said here of what
that means (image_check.py); files are read and never executed.
"""

from __future__ import annotations

import os
import stat

from nvhook.linux import symver
from nvhook.linux.root import DIRECTORY, Root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .container import Layout

_MACHINE = {"x86_64": 62, "aarch64": 183, "ppc64le": 21}.get(os.uname().machine, 0)  # e_machine
_TRIPLET = f"{os.uname().machine}-linux-gnu"
_LIBC = "libc.so.6"
_DIRECTORIES = (
    f"/lib/{_TRIPLET}",
    f"/usr/lib/{_TRIPLET}",
    "/lib64",
    "/usr/lib64",
    "/lib",
    "/usr/lib",
    "/usr/local/lib",
)
_CACHE, _MAX_CACHE = "/etc/ld.so.cache", 4 << 20
_MAX_SEARCHED = 64  # directories of LD_LIBRARY_PATH


class Image:
    """Directories are opened when they are first looked into; `close` comes last.

    libc    the place of its C library and the version that this defines, such as (2, 36); None: none that is known
    """

    __slots__ = ("_cache", "_open", "layout", "libc", "root", "searched")

    def __init__(self, root: Root, layout: Layout, library_path: str) -> None:
        self.root = root
        self.layout = layout
        # What is relative, or empty, is where a program runs, and nobody knows where that is.
        self.searched = [
            path for path in library_path.split(":", _MAX_SEARCHED)[:_MAX_SEARCHED] if path.startswith("/")
        ]
        self._open: dict[str, int] = {}
        self._cache: bytes | None = None
        self.libc = self._find_libc()

    def close(self) -> None:
        for fd in self._open.values():
            if fd >= 0:
                os.close(fd)

    def directory(self, path: str) -> int:
        """A descriptor that stays ours, or -1."""
        if path not in self._open:
            try:
                self._open[path] = self.root.open(path, DIRECTORY)
            except (OSError, ValueError):  # a NUL in the variable
                self._open[path] = -1
        return self._open[path]

    def holds(self, directory: str, name: str) -> bool:
        """Whether it has a file or a link of that name; where a link leads is not followed."""
        fd = self.directory(directory)
        try:
            return fd >= 0 and not stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode)
        except (OSError, ValueError):
            return False

    def has(self, name: str) -> bool:
        """Whether the linker would find it: first where the C library is, last in the linker cache."""
        places = dict.fromkeys((self.layout.libraries, *_DIRECTORIES, *self.searched))
        return any(self.holds(place, name) for place in places) or b"\0%b\0" % name.encode() in self._names()

    def _names(self) -> bytes:
        """The linker cache, where a name may be the end of a path as well."""
        if self._cache is None:
            try:
                self._cache = self.root.read(_CACHE, _MAX_CACHE).replace(b"/", b"\0")
            except OSError:
                self._cache = b""
        return self._cache

    def _find_libc(self) -> tuple[str, tuple[int, ...]] | None:
        for directory in dict.fromkeys((self.layout.libraries, *_DIRECTORIES[:-1])):
            if self.holds(directory, _LIBC):
                path = f"{directory}/{_LIBC}"
                version = self._glibc(path)
                return (path, version) if version else None
        return None

    def _glibc(self, path: str) -> tuple[int, ...]:
        try:
            fd = self.root.open_file(path)
        except OSError:
            return ()
        try:
            versions = symver.read(fd)
            if versions is None or versions.machine != _MACHINE:
                return ()
            return symver.newest(versions.defined(), "GLIBC_")
        except (OSError, ValueError):
            return ()
        finally:
            os.close(fd)
