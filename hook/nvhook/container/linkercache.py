# SPDX-License-Identifier: Apache-2.0
"""The edit (edits.py) by which programs in a container find the driver's libraries: its /etc/ld.so.cache.

Our names are added to the image's own cache, in this process; where that cannot be right, the host's ldconfig makes
another, in a child that is trusted with nothing (linux/ldconfig.py).
"""

from __future__ import annotations

import errno
import os
import stat

from nvhook.errors import LdcacheError, reason
from nvhook.linux import files, ldmerge
from nvhook.linux.root import OutOfTimeError

from . import cleanup
from .edits import Edit, kind_of, look, remover

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nvhook.linux.root import Root
    from nvhook.request.config import Config

    from .container import Container

_CACHE = "/etc/ld.so.cache"
_MAX_CACHE = 64 << 20
_MAX_MERGED = 4 << 20  # of 150,000 libraries; an image with more is ldconfig's
_MACHINE = os.uname().machine
_MACHINES = {64: {"x86_64": "x86-64"}.get(_MACHINE, _MACHINE), 32: "i386"}
_MAX_DIRECTORIES = 512  # that the libraries of a cache are in
# What keeps us from adding our names to the image's own cache: ldconfig then makes one.
_NOT_MERGED = (OSError, ValueError, OutOfTimeError)


class Ldcache(Edit):
    """The container's linker cache, with `directories` first.

    `names` are the libraries that are in them when this edit is applied, as (directory, name, bits): what is added to
    the image's own cache. Where that is missing, odd or older than its directories, the host's ldconfig makes another.
    """

    __slots__ = ("_cache", "_is_wanted", "_ldconfig", "_merged", "_program", "directories", "former", "names")
    kind = "ldcache"

    def __init__(self, directories: tuple[str, ...], names: tuple[tuple[str, str, int], ...] = ()) -> None:
        super().__init__()
        self.directories = directories
        self.names = names
        self.former = -1  # a descriptor of the image's own cache, once it is replaced
        self._is_wanted = False
        self._cache: bytes | None = None
        self._merged = b"", b""  # a cache of an image, and what comes of it
        self._program = -1

    def describe(self) -> dict[str, object]:
        return {"kind": self.kind, "directories": list(self.directories)}

    def prepare(self, config: Config, root: Root, container: Container | None = None) -> None:
        """Open the host's ldconfig, and make the new cache if that can be done without reading the image's libraries.

        With an empty path in config.toml no cache is wanted. What was made for `root` before the container is there
        counts if the container has the same cache.
        """
        if not config.ldconfig:
            return
        if not self._is_wanted:
            self._is_wanted = True
            self._program = _open_program(config.ldconfig)
        if container is None:
            if self.names and not self._merged[0]:
                try:
                    self._merge(_old_cache(root.optional))
                except _NOT_MERGED:
                    return  # the container's is what counts
            return
        if self.names:
            try:
                self._cache = self._merge(_old_cache(root.optional))
                self._is_wanted = bool(self._cache)
                return
            except _NOT_MERGED:
                self._cache = None  # ldconfig makes one that is right
        from nvhook.linux import ldconfig  # now: nothing is imported when the namespace has been entered

        self._ldconfig = ldconfig
        try:
            self._program = ldconfig.seal(self._program)
        except OSError as error:
            raise LdcacheError(f"copy the host's ldconfig: {reason(error)}") from None

    def apply(self, container: Container) -> None:
        if not self._is_wanted:
            return
        try:
            etc, name = self._parent(container, _CACHE)
            try:
                self._remember(etc, name)
                if self._cache is None:
                    status = os.fstat(etc)
                    # With --userns=host an image that was unpacked for a user namespace belongs to that one's root, and
                    # root without capabilities cannot write there.
                    owner = (container.uid, container.gid) if container.rootless else (status.st_uid, status.st_gid)
                    self._undo.append(remover(os.unlink, etc, f"{name}~"))  # what it renames when all is well
                    self._ldconfig.run(self._program, container.rootfs, container.root, self.directories, owner)
                else:
                    files.replace(self._cache, etc, name)
                made = cleanup.version(os.stat(name, dir_fd=etc, follow_symlinks=False))
                former = cleanup.former(os.fstat(self.former)) if self.former >= 0 else None
                self.traces.append({"kind": "cache", "path": _CACHE, "made": made, "former": former})
            finally:
                os.close(etc)
        except OSError as error:
            raise LdcacheError(f"make `{_CACHE}` of `{container.rootfs}`: {reason(error)}") from None

    def _merge(self, old: bytes) -> bytes:
        """`old` with our names added, empty where they are there already. ValueError where ldconfig has to make it."""
        if self._merged[0] != old:
            names = [ldmerge.Name(directory, name, _MACHINES[bits]) for directory, name, bits in self.names]
            merged = ldmerge.merge(old, names)
            self._merged = old, b"" if merged is old else merged
        return self._merged[1]

    def _remember(self, etc: int, name: str) -> None:
        """A new file is renamed over the cache: the old one lives on in our descriptor."""
        status = look(etc, name)
        if status is None:
            self._undo.append(remover(os.unlink, etc, name))
        elif stat.S_ISREG(status.st_mode) and status.st_size <= _MAX_CACHE:
            self.former = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=etc)
            directory = os.dup(etc)
            owner, mode = files.owner_and_mode(status)
            self._undo.append(lambda: files.restore(self.former, directory, name, owner, mode, status.st_mtime_ns))
        else:
            raise OSError(errno.EEXIST, f"the image has {kind_of(status)} there")


def _open_program(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise LdcacheError(
            f"read the host's `{path}`: {reason(error)}",
            "set `nvidia-container-cli.ldconfig` in config.toml to where it is",
        ) from None


def _old_cache(root: Root) -> bytes:
    """The image's linker cache; one of _NOT_MERGED where ldconfig has to make a new one."""
    fd = root.open_file(_CACHE, os.O_NOFOLLOW)
    try:
        status = os.fstat(fd)
        if status.st_size > _MAX_MERGED:
            raise ValueError("not of a usual size")
        data = root.timed(_CACHE, lambda: os.read(fd, _MAX_MERGED))
    finally:
        os.close(fd)
    directories = ldmerge.directories(data)
    if len(directories) > _MAX_DIRECTORIES:
        raise ValueError(f"libraries in more than {_MAX_DIRECTORIES} directories")
    for path in (*directories, "/etc/ld.so.conf", "/etc/ld.so.conf.d"):
        if _changed(root, path) > status.st_mtime_ns:
            raise ValueError(f"`{path}` is newer")
    return data


def _changed(root: Root, path: str) -> int:
    """When a file or directory was changed, in ns; 0 where there is none."""
    try:
        fd = root.open(path)
    except OSError:
        return 0
    try:
        return os.fstat(fd).st_mtime_ns
    finally:
        os.close(fd)
