# SPDX-License-Identifier: Apache-2.0
"""The container that is being created: its process, its mount namespace, its root filesystem and family.

Everything is opened while we are still in the host's namespace; `enter` is the one step that changes where we are,
and after it no path is looked up from `/` any more.
"""

from __future__ import annotations

import os

from nvhook.errors import SLOW_TREE, ContainerError, reason
from nvhook.formats.record import Record
from nvhook.linux import identity, kernel, mountinfo, userns
from nvhook.linux import proc as procfs
from nvhook.linux.root import DIRECTORY, OutOfTimeError, Root

from . import root_lock

# For all look-ups in the container's tree from `find` to the last edit, and for ldconfig, whose own limit is 10 s. With
# what is done ahead of it (nvruntime/ahead.py) a start is not held up for more than 15 s by what is in an image.
SECONDS = 12

# What changing the container's tree takes, and the children that ldconfig.py starts there. With NET_ADMIN, rules of the
# device cgroup are taken back when that fails (kernels before 5.8).
_CAPABILITIES = (
    kernel.CAP_CHOWN,
    kernel.CAP_DAC_OVERRIDE,
    kernel.CAP_FOWNER,
    kernel.CAP_MKNOD,
    kernel.CAP_NET_ADMIN,
    kernel.CAP_SETGID,
    kernel.CAP_SETPCAP,
    kernel.CAP_SETUID,
    kernel.CAP_SYS_ADMIN,
    kernel.CAP_SYS_CHROOT,
)


TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from nvhook.linux.identity import Identity

    from .container_dir import ContainerDirectory


class Layout(Record):
    """Where an image keeps things, as absolute paths in the container.

    compat   the directory of its CUDA compatibility libraries (cuda_compat.py), if they are used; else empty
    """

    libraries: str
    libraries32: str
    binaries: str = "/usr/bin"
    compat: str = ""


class Container:
    """Descriptors of one container; `rootfs` is the root filesystem's path on the host, for messages and ldconfig.

    proc          /proc/<pid> of its first process: the same process however often the number is used again
    names         names of our descriptors in a proved procfs, for system calls that take no descriptor
    uid, gid      who root in the container is on the host
    in_userns     device nodes made here could not be opened: its filesystems belong to a user namespace
    rootless      we are in a user namespace ourselves: the machine's cgroups are not ours to change
    mounted       what detaches each mount that an edit has made in it, in order
    times         directory in the container -> its mtime in ns before an edit first came there
    host_identity of the root filesystem as the host reaches it; None where the host does not
    lock          of its root filesystem, held while something is made there
    directory     what is kept about it (container_dir.py); None where nothing is
    """

    __slots__ = (
        "_namespace",
        "_shared",
        "directory",
        "gid",
        "host_identity",
        "in_userns",
        "lock",
        "mounted",
        "names",
        "proc",
        "root",
        "rootfs",
        "rootless",
        "times",
        "uid",
    )

    def __init__(
        self,
        *,
        proc: int,
        namespace: int,  # -1: ours
        root: Root,
        rootfs: str,
        owner: tuple[int, int],
        in_userns: bool,
        rootless: bool,
        shared: frozenset[int],
        host_identity: Identity | None = None,
    ) -> None:
        self.proc = proc
        self._namespace = namespace
        self.root = root
        self.rootfs = rootfs
        self.uid, self.gid = owner
        self.in_userns = in_userns
        self.rootless = rootless
        self._shared = shared
        self.times: dict[str, int] = {}
        self.host_identity = host_identity
        self.lock: root_lock.Lock | root_lock.Unlocked = root_lock.Unlocked()
        self.directory: ContainerDirectory | None = None
        self.names = procfs.Names()
        self.mounted: list[Callable[[], None]] = []

    def lock_root(self, state_dir: str) -> None:
        """Take the lock of its root filesystem. OSError where nothing can be kept about the container; ContainerError
        where another one over the same root filesystem makes that necessary."""
        self.lock = root_lock.take(state_dir, self.names.top, self.host_identity, self.root, self.rootfs)

    def lock_root_if_possible(self, state_dir: str) -> None:
        """The same for a container that nothing is kept about. Where there can be no lock, it does without."""
        try:
            self.lock_root(state_dir)
        except OSError:
            return

    def enter(self) -> None:
        """Into the container's mount namespace, for good; files are made as the container's root from here on.

        What is not needed there is given up first. Nothing regains it: no program is executed there but ldconfig, and
        with no_new_privs that would not be root's right either.
        """
        try:
            kernel.keep_capabilities(*_CAPABILITIES)
            kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
            if self._namespace >= 0:
                kernel.setns(self._namespace, kernel.CLONE_NEWNS)
        except OSError as error:
            raise ContainerError(f"enter the mount namespace of `{self.rootfs}`: {reason(error)}") from None
        self.be_container()

    def shares(self, fd: int) -> bool:
        """Whether a mount on what this descriptor is of would show up outside of the container as well."""
        return bool(self._shared) and self.names.mount_id(fd) in self._shared

    def be_container(self) -> None:
        """Files are made as the container's root: in a user namespace one of the host's root fails with EOVERFLOW."""
        if self.uid or self.gid:
            # gid first: without uid 0 the capability to change it is gone.
            kernel.setfsgid(self.gid)
            kernel.setfsuid(self.uid)

    def be_host(self) -> None:
        """Files are the host's root's again, for what is kept on the host; the namespace stays."""
        kernel.setfsuid(os.geteuid())
        kernel.setfsgid(os.getegid())


def find(pid: int, path: str) -> Container:
    """The container of process `pid`, with the directory `path` for its root filesystem.

    ContainerError when the process is gone, is in our own mount namespace, or has not mounted that root filesystem:
    then it is not a container of this bundle, and nothing may be done to it.
    """
    rootfs = _real(path)
    try:
        proc = procfs.open_below(str(pid), os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        raise ContainerError(f"process {pid} of the container is gone") from None
    except OSError as error:
        raise ContainerError(f"open process {pid} of the container: {reason(error)}") from None
    try:
        return _open(pid, rootfs, proc)
    except (ProcessLookupError, FileNotFoundError) as error:
        raise ContainerError(f"process {pid} of the container is gone: {reason(error)}") from None
    except OSError as error:
        raise ContainerError(f"open `{path}` of process {pid}: {reason(error)}") from None


def here(path: str) -> Container:
    """The directory `path` of our own mount namespace, which the caller has made for a container.

    That it is one is his word. ContainerError where others would see the mounts as well: then it is not.
    """
    rootfs = _real(path)
    try:
        proc = procfs.open_below("self", os.O_RDONLY | os.O_DIRECTORY)
        root = Root(os.open(rootfs, DIRECTORY), SECONDS)
        mounts = _read(proc, "mountinfo")
    except OSError as error:
        raise ContainerError(f"open `{path}`: {reason(error)}") from None
    rootless = not userns.is_first()
    container = Container(
        proc=proc,
        namespace=-1,
        root=root,
        rootfs=rootfs,
        owner=(os.geteuid(), os.getegid()),
        in_userns=rootless,
        rootless=rootless,
        shared=mountinfo.shared(mounts),
        host_identity=identity.of(root.fd),
    )
    if container.shares(root.fd):
        raise ContainerError(
            f"`{path}` is in a mount that other mount namespaces share: they would have the mounts too",
            "make a mount namespace with private mounts first, as `unshare --mount` does",
        )
    return container


def _real(path: str) -> str:
    rootfs = os.path.realpath(path)
    if rootfs == "/":
        raise ContainerError(f"the container's root is `{path}`: that is the host's own root filesystem")
    return rootfs


def _open(pid: int, rootfs: str, proc: int) -> Container:
    namespace = os.open("ns/mnt", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
    if os.path.samestat(os.fstat(namespace), os.stat("/proc/self/ns/mnt")):
        raise ContainerError(f"process {pid} has no mount namespace of its own: it is not a container")
    mounts = _read(proc, "mountinfo")
    root, host_identity = _open_root(pid, rootfs, proc, mounts)
    rootless = not userns.is_first()
    owner = _owner(proc)
    return Container(
        proc=proc,
        namespace=namespace,
        root=root,
        rootfs=rootfs,
        owner=owner or (0, 0),
        in_userns=rootless or owner is not None,
        rootless=rootless,
        # Into a mount namespace of another user namespace mounts come, and none goes out.
        shared=mountinfo.shared(mounts) if owner is None else frozenset(),
        host_identity=host_identity,
    )


def _open_root(pid: int, rootfs: str, proc: int, mounts: str) -> tuple[Root, Identity | None]:
    """The container's root filesystem, proved to be the mount that the runtime has made, and its identity for the host.

    Whoever owns a directory above it can give its path to another directory at any moment. Another container's root
    filesystem and the host's /boot are mounts in this namespace too, because it began as a copy of ours.
    """
    _check_mount(pid, rootfs, mounts)
    above = Root(os.open("root", DIRECTORY, dir_fd=proc))
    try:
        parent = above.open(os.path.dirname(rootfs), DIRECTORY)
    finally:
        os.close(above.fd)
    try:
        # From there: a second look-up of the whole path could lead elsewhere.
        fd = os.open(os.path.basename(rootfs), DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    except OSError:
        os.close(parent)
        raise
    try:
        mount = procfs.mount_id(fd)
        # A directory whose parent is in another mount is the root of its mount, and not one below that.
        if mount != mountinfo.topmost(mountinfo.at(mounts, rootfs)).id or mount == procfs.mount_id(parent):
            raise ContainerError(
                f"`{rootfs}` is another directory than the one that process {pid} has mounted there",
                "start the container again, in a directory that only root can rename",
            )
        return Root(fd, SECONDS), _host_identity(rootfs, fd)
    except BaseException:
        os.close(fd)
        raise
    finally:
        os.close(parent)


def _check_mount(pid: int, rootfs: str, mounts: str) -> None:
    """ContainerError unless there is a mount at `rootfs` that we have not, on one that we have too."""
    ours = procfs.read("self/mountinfo")
    stack = mountinfo.at(mounts, rootfs)
    if len(stack) <= len(mountinfo.at(ours, rootfs)):
        raise ContainerError(f"process {pid} has not mounted `{rootfs}`: it is not a container of this bundle")
    base = mountinfo.below(mounts, stack)
    if base and len(mountinfo.at(mounts, base.point)) > len(mountinfo.at(ours, base.point)):
        raise ContainerError(f"`{rootfs}` is a volume of process {pid}, and not its root filesystem")


def _host_identity(rootfs: str, container: int) -> Identity | None:
    """None where our namespace has another directory at that path, or none: the runtime has mounted it in its own."""
    try:
        fd = os.open(rootfs, DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        found = identity.of(fd)
        return found if found.is_same_object(identity.of(container)) else None
    finally:
        os.close(fd)


def layout(root: Root) -> Layout:
    """The family of the root filesystem, as libnvidia-container tells it, and multiarch directories as a second sign.

    An image stripped of its /etc still has its libraries where its dynamic linker looks for them. ContainerError where
    looking for them takes too long.
    """
    try:
        return _layout(root)
    except OutOfTimeError as error:
        raise ContainerError(str(error), SLOW_TREE) from None


def _layout(root: Root) -> Layout:
    machine = os.uname().machine
    triplet = f"{machine}-linux-gnu"
    if root.exists("/etc/debian_version") or root.exists(f"/usr/lib/{triplet}"):
        return Layout(f"/usr/lib/{triplet}", "/usr/lib/i386-linux-gnu")
    return Layout("/usr/lib64", _libraries32(root))


def _libraries32(root: Root) -> str:
    if root.exists("/usr/lib32") or not root.exists("/usr/lib"):
        return "/usr/lib32"
    return "/usr/lib32" if _is_same(root, "/usr/lib", "/usr/lib64") else "/usr/lib"


def _is_same(root: Root, one: str, other: str) -> bool:
    try:
        first, second = root.open(one), root.open(other)
    except OSError:
        return False
    try:
        return os.path.samestat(os.fstat(first), os.fstat(second))
    finally:
        os.close(first)
        os.close(second)


def _owner(proc: int) -> tuple[int, int] | None:
    """(uid, gid) of the container's root as we see ids; None where the container has our user namespace."""
    ours = os.stat("/proc/self/ns/user")
    theirs = os.stat("ns/user", dir_fd=proc)
    if os.path.samestat(ours, theirs):
        return None
    return _mapped_root(_read(proc, "uid_map")), _mapped_root(_read(proc, "gid_map"))


def _mapped_root(id_map: str) -> int:
    for line in id_map.splitlines():
        inside, outside, _ = (int(word) for word in line.split())
        if inside == 0:
            return outside
    raise ContainerError("the container's user namespace has no id 0")


def _read(proc: int, name: str) -> str:
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
    # A carriage return may be part of a path in mountinfo; it is not the end of a line.
    with os.fdopen(fd, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        return file.read()
