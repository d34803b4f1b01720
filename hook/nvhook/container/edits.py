# SPDX-License-Identifier: Apache-2.0
"""The few kinds of change that are made to a container; the one of its linker cache is in linkercache.py.

An edit has four verbs: it describes itself (`nvhook plan`), prepares itself in the host's mount namespace (opens its
source), applies itself in the container's, and undoes itself there. Nothing here decides anything: what to do is the
plan's business.

All paths are absolute paths in the container; they are resolved below its root by descriptors, never followed at the
last step. Where something stands in the way that is not what the edit can use, the edit fails and names it.
"""

from __future__ import annotations

import errno
import os
import stat

from nvhook.errors import SLOW_TREE, MountError, reason
from nvhook.linux import bind, files, proc, tmpfs
from nvhook.linux.root import DIRECTORY, OutOfTimeError, Root

from . import cleanup

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from nvhook.linux.proc import Names
    from nvhook.request.config import Config

    from .cleanup import Trace
    from .container import Container

_NODE_BIND_OPTIONS = ("nosuid", "noexec")


class SourceGone(Exception):  # noqa: N818 - not an error yet: the inventory is made again, once
    """A file of the driver is no longer where the inventory says."""


class Edit:
    """`apply` leaves in `_undo` how to take back what it made in the tree, on which another container may have mounted,
    and in Container.mounted its mounts, which are this container's alone; also when it fails half-way.

    `traces` is what stays in the root filesystem when the container and its mounts are gone (cleanup.py).
    """

    __slots__ = ("_undo", "traces")
    kind = ""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self.traces: list[Trace] = []

    def describe(self) -> dict[str, object]:
        raise NotImplementedError

    def prepare(self, config: Config, root: Root, container: Container | None = None) -> None:
        """In the host's mount namespace, with nothing changed yet: open what is needed of the host for the tree at
        `root`. Called once more with the `container`, when that is there; what is open stays open.

        SourceGone when something of the host is not there, or has been removed since; never with a `container`.
        """

    def apply(self, container: Container) -> None:
        """In the container's mount namespace. MountError or LdcacheError."""
        raise NotImplementedError

    def undo(self) -> None:
        """Take back what was made in the tree, when nothing is mounted there any more."""
        _take_back(self._undo)

    def _parent(self, container: Container, path: str) -> tuple[int, str]:
        """(descriptor of the directory, last component); missing directories are made and remembered."""
        directory, name = os.path.split(path)
        made: list[tuple[int, str]] = []
        try:
            parent = container.root.open_directory(directory, made)
            if not made:
                container.times.setdefault(directory, os.fstat(parent).st_mtime_ns)
            return parent, name
        finally:
            for parent, child in made:
                self._undo.append(remover(os.rmdir, parent, child))
                os.close(parent)
            above = directory.split("/")
            for count in range(len(above) - len(made), len(above)):
                self.traces.append({"kind": "directory", "path": "/".join(above[: count + 1])})

    def _in_directory(self, container: Container, path: str, place: Callable[[Container, int, str], None]) -> None:
        """Call `place` with the directory that `path` is in, and its last component."""
        parent, name = self._parent(container, path)
        try:
            place(container, parent, name)
        finally:
            os.close(parent)

    def _create(self, parent: int, path: str, *, directory: bool = False) -> None:
        """An empty file, or directory, to mount onto."""
        name = os.path.basename(path)
        if directory:
            os.mkdir(name, 0o755, dir_fd=parent)
            self._undo.append(remover(os.rmdir, parent, name))
            self.traces.append({"kind": "directory", "path": path})
            return
        flags = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY | os.O_CLOEXEC
        os.close(os.open(name, flags, 0o644, dir_fd=parent))
        self._undo.append(remover(os.unlink, parent, name))
        self.traces.append({"kind": "file", "path": path})

    def _attach(
        self, container: Container, attach: Callable[[Names, int, int, str], int], parent: int, name: str
    ) -> int:
        """Mount on what is there; not in a volume that shares its mounts, where the host would have it as well."""
        target = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            if container.shares(target):
                raise OSError(errno.EXDEV, "a volume is there that shares its mounts with the host; mount it as rslave")
            mounted = attach(container.names, target, parent, name)
        finally:
            os.close(target)
        container.mounted.append(lambda: container.names.detach(mounted))
        return mounted


def _take_back(steps: list[Callable[[], None]]) -> None:
    """Newest first; what cannot be taken back is left, so that the rest still is."""
    while steps:
        try:
            steps.pop()()
        except OSError:
            continue  # the fault that brought us here is the one to report


def remover(remove: Callable[..., None], parent: int, name: str) -> Callable[[], None]:
    parent = os.dup(parent)

    def take_back() -> None:
        try:
            remove(name, dir_fd=parent)
        finally:
            os.close(parent)

    return take_back


def look(parent: int, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return None


def kind_of(status: os.stat_result) -> str:
    names = {
        stat.S_IFDIR: "a directory",
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFREG: "a regular file",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a character device",
        stat.S_IFBLK: "a block device",
    }
    return names[stat.S_IFMT(status.st_mode)]


# What a mount's source may be -> its type, and those that may be in its place in the container.
_MOUNTABLE = {
    "file": (stat.S_IFREG, (stat.S_IFREG,)),
    "socket": (stat.S_IFSOCK, (stat.S_IFREG, stat.S_IFSOCK)),
    "directory": (stat.S_IFDIR, (stat.S_IFDIR,)),
}


class Tmpfs(Edit):
    """A file system of our own on the directory `destination`; read-only once all edits have been applied.

    What goes into it (`inside`) is made by the descriptor of the mount: nothing of the container is looked up again.
    With `only_over` the directory has to be there, and it and all that goes inside are left out where it is not; with
    `in_proc` it has to be in a procfs as well.
    """

    __slots__ = ("_in_proc", "_names", "_only_over", "destination", "root")
    kind = "mount"

    def __init__(self, destination: str, *, only_over: bool = False, in_proc: bool = False) -> None:
        super().__init__()
        self.destination = destination
        self.root: Root | None = None  # once it is mounted
        self._names: Names | None = None
        self._only_over = only_over
        self._in_proc = in_proc

    def describe(self) -> dict[str, object]:
        options = ["ro", "nosuid", "nodev", "noexec", "mode=0555"]
        return {"kind": self.kind, "source": "tmpfs", "destination": self.destination, "options": options}

    def apply(self, container: Container) -> None:
        try:
            if self._only_over and not self._is_there(container.root):
                return
            parent, name = self._parent(container, self.destination)
            try:
                status = look(parent, name)
                if status is None:
                    self._create(parent, self.destination, directory=True)
                elif not stat.S_ISDIR(status.st_mode):
                    raise OSError(errno.EEXIST, f"the image has {kind_of(status)} there")
                self.root = Root(self._attach(container, tmpfs.attach, parent, name))
                self._names = container.names
            finally:
                os.close(parent)
        except OSError as error:
            raise MountError(f"mount a tmpfs on `{self.destination}`: {reason(error)}") from None

    def _is_there(self, root: Root) -> bool:
        try:
            fd = root.open(self.destination, os.O_PATH | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        try:
            return not self._in_proc or proc.is_procfs(fd) or _has_proc(root)
        finally:
            os.close(fd)

    def seal(self) -> None:
        """Make it read-only, once everything is in it. MountError."""
        if self.root is None or self._names is None:
            return
        try:
            tmpfs.seal(self._names, self.root.fd, 0o555)
        except OSError as error:
            raise MountError(f"make the tmpfs on `{self.destination}` read-only: {reason(error)}") from None


def _has_proc(root: Root) -> bool:
    """Whether the container's /proc is procfs; a mount of the engine's below it need not be."""
    try:
        fd = root.open("/proc", DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return proc.is_procfs(fd)
    finally:
        os.close(fd)


class WrittenFile(Edit):
    """A new file with `content` in a tmpfs of ours, with which it goes; `name` is of one component."""

    __slots__ = ("_inside", "_name", "content")
    kind = "file"

    def __init__(self, inside: Tmpfs, name: str, content: str) -> None:
        super().__init__()
        self._inside = inside
        self._name = name
        self.content = content

    def describe(self) -> dict[str, object]:
        return {"kind": self.kind, "path": f"{self._inside.destination}/{self._name}", "content": self.content}

    def apply(self, container: Container) -> None:  # noqa: ARG002 - nothing of it is looked up
        if self._inside.root is None:
            return
        try:
            flags = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY | os.O_CLOEXEC
            fd = os.open(self._name, flags, 0o444, dir_fd=self._inside.root.fd)
            with open(fd, "wb") as file:
                os.fchmod(fd, 0o444)
                file.write(self.content.encode())
        except OSError as error:
            raise MountError(f"write `{self._inside.destination}/{self._name}`: {reason(error)}") from None


class Mount(Edit):
    """A file, socket or directory (`what`) of the host, bound; `source` is an absolute path without links.

    `inside` is the tmpfs of ours that `destination` is below, if it is.
    """

    __slots__ = ("_source", "destination", "inside", "options", "source", "what")
    kind = "mount"

    def __init__(
        self,
        source: str,
        destination: str,
        options: tuple[str, ...],
        what: str = "file",
        *,
        inside: Tmpfs | None = None,
    ) -> None:
        super().__init__()
        self.inside = inside
        self.source = source
        self.destination = destination
        self.options = options
        self.what = what
        self._source: bind.BindSource | None = None

    def describe(self) -> dict[str, object]:
        return {
            "kind": self.kind,
            "source": self.source,
            "destination": self.destination,
            "options": list(self.options),
        }

    def prepare(self, config: Config, root: Root, container: Container | None = None) -> None:  # noqa: ARG002
        if self._source is not None:
            if container is None and os.fstat(self._source.fd).st_nlink == 0:
                raise SourceGone(self.source)  # what is removed cannot be mounted any more
            return
        try:
            self._source = bind.BindSource(self.source, self.options)
            if stat.S_IFMT(os.fstat(self._source.fd).st_mode) != _MOUNTABLE[self.what][0]:
                raise SourceGone(self.source)
            self._source.clone()
        except (FileNotFoundError, NotADirectoryError):
            raise SourceGone(self.source) from None
        except OSError as error:
            raise MountError(f"open `{self.source}`: {reason(error)}") from None

    def apply(self, container: Container) -> None:
        assert self._source is not None, "prepare() comes first"
        if self.inside and not self.inside.root:
            return  # left out, with the directory that it is below
        try:
            parent, name = self._parent(container, self.destination)
            try:
                status = look(parent, name)
                if status is None:
                    self._create(parent, self.destination, directory=self.what == "directory")
                elif stat.S_IFMT(status.st_mode) not in _MOUNTABLE[self.what][1]:
                    raise OSError(errno.EEXIST, f"the image has {kind_of(status)} there")
                elif self.what != "file" and os.path.samestat(status, os.fstat(self._source.fd)):
                    return  # a volume of the container's own brings it
                self._attach(container, self._source.attach, parent, name)
            finally:
                os.close(parent)
                if self.inside:
                    self.traces.clear()  # what was made is gone with the tmpfs
        except OSError as error:
            if error.errno == errno.ENOENT and not os.fstat(self._source.fd).st_nlink:
                why = f"`{self.source}` disappeared while the container was prepared"
                raise MountError(why, "start it again, when the driver is not being replaced") from None
            raise MountError(f"mount `{self.source}` on `{self.destination}`: {reason(error)}") from None

    def _parent(self, container: Container, path: str) -> tuple[int, str]:
        if not self.inside or not self.inside.root:
            return super()._parent(container, path)
        directory, name = os.path.split(path.removeprefix(self.inside.destination))
        made: list[tuple[int, str]] = []
        try:
            return self.inside.root.open_directory(directory, made), name
        finally:
            for parent, _ in made:
                os.close(parent)


class Device(Edit):
    """A character device node; made with mknod, or bound from the host's where nodes made here cannot be opened."""

    __slots__ = ("_host_path", "_is_cloned", "_source", "access", "gid", "major", "minor", "mode", "path", "uid")
    kind = "device"

    def __init__(self, path: str, major: int, minor: int, access: str, *, mode: int, uid: int, gid: int) -> None:
        super().__init__()
        self.path = path
        self.major = major
        self.minor = minor
        self.access = access
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self._host_path = ""
        self._source: bind.BindSource | None = None
        self._is_cloned = False

    def describe(self) -> dict[str, object]:
        return {
            "kind": self.kind,
            "path": self.path,
            "type": "c",
            "major": self.major,
            "minor": self.minor,
            "access": self.access,
        }

    def rule(self) -> dict[str, object]:
        """The entry of linux.resources.devices that lets the container open it (OCI, config-linux.md)."""
        return {"allow": True, "type": "c", "major": self.major, "minor": self.minor, "access": self.access}

    def needs_group(self) -> bool:
        """Whether a user who is not root needs the node's group to use it, and may be given that group."""
        return self.gid != 0 and self.mode & 0o006 != 0o006

    def prepare(self, config: Config, root: Root, container: Container | None = None) -> None:  # noqa: ARG002
        """Hold the host's node, in case it has to be bound. That there is none, or another, is found out then."""
        if not self._host_path:
            self._host_path = os.path.join(config.dev_root, self.path.lstrip("/"))
            self._source = self._open()
        # A clone that is not needed costs half a millisecond of the kernel's when it is closed.
        if container and self._source is not None and not self._is_cloned and self._is_bound(container):
            try:
                self._source.clone()
            except OSError as error:
                raise MountError(f"open `{self._host_path}`: {reason(error)}") from None
            self._is_cloned = True

    def _open(self) -> bind.BindSource | None:
        try:
            source = bind.BindSource(self._host_path, _NODE_BIND_OPTIONS)
        except OSError:
            return None
        if self._is_this(os.fstat(source.fd)):
            return source
        source.close()
        return None

    def _is_bound(self, container: Container) -> bool:
        """Whether it will be, as far as can be seen now; if it has to be all the same, the source is opened then."""
        if container.in_userns:
            return True
        directory, name = os.path.split(self.path)
        try:
            parent = container.root.open(directory, DIRECTORY)
        except (OSError, OutOfTimeError):
            return False
        try:
            status = look(parent, name)
            is_taken = status is not None and not self._is_this(status)
            return is_taken or bool(os.fstatvfs(parent).f_flag & os.ST_NODEV)
        finally:
            os.close(parent)

    def apply(self, container: Container) -> None:
        try:
            self._in_directory(container, self.path, self._place)
        except OSError as error:
            raise MountError(f"make device `{self.path}`: {reason(error)}") from None

    def _place(self, container: Container, parent: int, name: str) -> None:
        status = look(parent, name)
        if status is not None and not self._is_this(status) and not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EEXIST, f"the image has {kind_of(status)} there")
        nodev = container.in_userns or os.fstatvfs(parent).f_flag & os.ST_NODEV
        if status is not None and self._is_this(status) and not nodev:
            return  # the runtime made it, from the spec
        if status is not None or nodev or not self._make_node(container.names, parent, name):
            self._bind(container, parent, name, is_there=status is not None)

    def _make_node(self, names: Names, parent: int, name: str) -> bool:
        """False where mknod is not allowed."""
        try:
            os.mknod(name, stat.S_IFCHR | self.mode, os.makedev(self.major, self.minor), dir_fd=parent)
        except PermissionError:
            return False
        self._undo.append(remover(os.unlink, parent, name))
        self.traces.append({"kind": "node", "path": self.path, "major": self.major, "minor": self.minor})
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            if not self._is_this(os.fstat(fd)):
                raise OSError(errno.ESTALE, "replaced while it was made")
            # mknod's mode goes through the umask, and O_PATH descriptors take no fchmod.
            names.chmod(fd, self.mode)
            names.chown(fd, self.uid, self.gid)
        finally:
            os.close(fd)
        return True

    def _bind(self, container: Container, parent: int, name: str, *, is_there: bool) -> None:
        if self._source is None:
            raise OSError(errno.ENODEV, f"has to be bound, and `{self._host_path}` is not {self.major}:{self.minor}")
        if not is_there:
            self._create(parent, self.path)
        self._attach(container, self._source.attach, parent, name)

    def _is_this(self, status: os.stat_result) -> bool:
        return stat.S_ISCHR(status.st_mode) and status.st_rdev == os.makedev(self.major, self.minor)


class Symlink(Edit):
    """A link to what was mounted or made. `target` is relative to the directory of `path`."""

    __slots__ = ("path", "target")
    kind = "symlink"

    def __init__(self, path: str, target: str) -> None:
        super().__init__()
        self.path = path
        self.target = target

    def describe(self) -> dict[str, object]:
        return {"kind": self.kind, "path": self.path, "target": self.target}

    def apply(self, container: Container) -> None:
        try:
            self._in_directory(container, self.path, self._place)
        except OSError as error:
            raise MountError(f"link `{self.path}` to `{self.target}`: {reason(error)}") from None

    def _place(self, container: Container, parent: int, name: str) -> None:
        """Missing: made. Another link: replaced. A file of the image, or the empty one of an earlier mount: covered."""
        status = look(parent, name)
        if status is None:
            os.symlink(self.target, name, dir_fd=parent)
            self._undo.append(remover(os.unlink, parent, name))
            self._trace(None)
        elif stat.S_ISLNK(status.st_mode):
            if os.readlink(name, dir_fd=parent) != self.target:
                self._replace(parent, name)
        elif stat.S_ISREG(status.st_mode):
            self._cover(container, parent, name)
        else:
            raise OSError(errno.EEXIST, f"the image has {kind_of(status)} there")

    def _replace(self, parent: int, name: str) -> None:
        former = os.readlink(name, dir_fd=parent)
        self._swap(parent, name, self.target)
        self._trace(former)
        kept = os.dup(parent)

        def take_back() -> None:
            try:
                self._swap(kept, name, former)
            finally:
                os.close(kept)

        self._undo.append(take_back)

    def _trace(self, former: str | None) -> None:
        self.traces.append({"kind": "link", "path": self.path, "target": self.target, "former": former})

    @staticmethod
    def _swap(parent: int, name: str, target: str) -> None:
        beside = files.beside_of(name)
        files.clear(beside, parent)
        os.symlink(target, beside, dir_fd=parent)
        try:
            os.rename(beside, name, src_dir_fd=parent, dst_dir_fd=parent)
        except OSError:
            os.unlink(beside, dir_fd=parent)
            raise

    def _cover(self, container: Container, parent: int, name: str) -> None:
        """The image's own file stays as it is below the mount: it may be in a layer that others share."""
        beside, file = os.path.split(self.target)
        # A `..` counts from where the directory really is, and ends at the container's root.
        directory = container.root.open(os.path.join(os.path.dirname(self.path), beside), DIRECTORY)
        try:
            source = bind.BindSource(file, ("ro", "nosuid", "nodev"), directory)
            try:
                if not stat.S_ISREG(os.fstat(source.fd).st_mode):
                    raise OSError(errno.EEXIST, f"`{self.target}` beside it is no regular file")
                source.clone()
                self._attach(container, source.attach, parent, name)
            finally:
                source.close()
        finally:
            os.close(directory)


def apply(edits: list[Edit], container: Container) -> None:
    """All of them in order, or none: the first failure undoes those before it, in reverse, and is raised.

    MountError as well where the container's tree has taken too long.
    """
    done: list[Edit] = []
    try:
        for edit in edits:
            done.append(edit)
            edit.apply(container)
        for cover in edits:
            if isinstance(cover, Tmpfs):
                cover.seal()
    except BaseException as fault:
        _undo(done, container)
        if isinstance(fault, OutOfTimeError):
            raise MountError(str(fault), SLOW_TREE) from None
        raise


def _undo(done: list[Edit], container: Container) -> None:
    _take_back(container.mounted)

    def undo_tree() -> None:
        for edit in reversed(done):
            edit.undo()

    cleanup.undo(container, undo_tree, [trace for edit in done for trace in edit.traces])
