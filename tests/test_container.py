# SPDX-License-Identifier: Apache-2.0
"""The container of a bundle, told from everything else; its family; and the mounts of a process as text."""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nvhook.container import container as containers
from nvhook.container.container import find, here, layout
from nvhook.errors import ContainerError
from nvhook.linux import kernel, mountinfo
from nvhook.linux.root import DIRECTORY, Root

pytestmark = pytest.mark.usefixtures("closed_descriptors")
TRIPLET = f"{os.uname().machine}-linux-gnu"
MULTIARCH = (f"/usr/lib/{TRIPLET}", "/usr/lib/i386-linux-gnu")
MS_SHARED = 1 << 20


def _absent(*_: object, **__: object) -> int:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


# A process that could be a container's first


def _mounted(rootfs: Path, then: Callable[[], None] = lambda: None) -> Callable[[], None]:
    """What a runtime does: a mount namespace in which the root filesystem is a mount. `then` adds to it."""

    def work() -> None:
        kernel.unshare(kernel.CLONE_NEWNS)
        kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
        kernel.mount(str(rootfs), str(rootfs), None, kernel.MS_BIND | kernel.MS_REC)
        then()

    return work


def _in_user_namespace(work: Callable[[], None]) -> Callable[[], None]:
    def both() -> None:
        work()
        kernel.unshare(kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS)

    return both


@contextmanager
def process(work: Callable[[], None]) -> Iterator[int]:
    """The pid of a child that has done `work` and waits."""
    ready, said = os.pipe()
    held, release = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(release)
            work()
            os.write(said, b"ready")
            os.read(held, 1)
        except BaseException:  # told through the pipe
            os.write(said, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(said)
    os.close(held)
    try:
        assert os.read(ready, 1 << 16).decode() == "ready"
        yield pid
    finally:
        os.close(ready)
        os.close(release)
        os.waitpid(pid, 0)


def elsewhere(work: Callable[[], None]) -> None:
    """`work` in a child, which may enter what namespaces it likes."""
    with process(work):
        pass


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    (tmp_path / "rootfs/usr/lib64").mkdir(parents=True)
    return tmp_path / "rootfs"


# find()


@pytest.mark.parametrize("path", ["/", "//", "/usr/..", "/proc/self/root"])
def test_find_refuses_the_root_of_the_host(path: str) -> None:
    with pytest.raises(
        ContainerError, match=f"the container's root is `{path}`: that is the host's own root filesystem"
    ):
        find(os.getpid(), path)


def test_find_process_is_gone(rootfs: Path) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(ContainerError, match=f"process {pid} of the container is gone"):
        find(pid, str(rootfs))  # it has ended, and nobody has asked how
    os.waitpid(pid, 0)
    with pytest.raises(ContainerError, match=f"process {pid} of the container is gone$"):
        find(pid, str(rootfs))


def test_find_refuses_our_own_mount_namespace(rootfs: Path) -> None:
    wanted = "has no mount namespace of its own: it is not a container"
    with pytest.raises(ContainerError, match=wanted):
        find(os.getpid(), str(rootfs))
    with process(lambda: None) as pid, pytest.raises(ContainerError, match=f"process {pid} {wanted}"):
        find(pid, str(rootfs))


@pytest.mark.root
@pytest.mark.parametrize("other", ["other", "rootfs/usr", "rootfs-2", "missing"])
def test_find_refuses_another_root_filesystem(rootfs: Path, other: str) -> None:
    for name in ("other", "rootfs-2"):
        (rootfs.parent / name).mkdir()
    wanted = f"has not mounted `{rootfs.parent}/{other}`: it is not a container of this bundle"
    with process(_mounted(rootfs)) as pid, pytest.raises(ContainerError, match=wanted):
        find(pid, f"{rootfs.parent}/{other}")


NAMES = {
    "plain": "merged",
    "space": "with space",
    "escapes": "tab\tline\nback\\slash",
    "looks-escaped": r"\040",
    "other-separators": "no-break\u00a0form\x0creturn\rline\u2028end",
    "not-utf8": os.fsdecode(b"\xff\xfe"),
}


@pytest.mark.root
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_find(tmp_path: Path, name: str) -> None:
    rootfs = tmp_path / name
    (rootfs / "usr/lib64").mkdir(parents=True)
    (tmp_path / "link").symlink_to(rootfs)
    with process(_mounted(rootfs)) as pid:
        for path in (str(rootfs), f"{rootfs}/", str(tmp_path / "link")):
            container = find(pid, path)
            assert container.rootfs == str(rootfs)
            assert os.path.samestat(os.fstat(container.root.fd), rootfs.stat())
            assert (container.uid, container.gid, container.in_userns, container.rootless) == (0, 0, False, False)
            assert layout(container.root).libraries == "/usr/lib64"
            assert os.readlink("cwd", dir_fd=container.proc) == os.getcwd()


@pytest.mark.root
def test_find_sees_what_is_mounted_in_the_container_alone(rootfs: Path) -> None:
    def image() -> None:
        kernel.mount("none", str(rootfs), "tmpfs", 0)
        (rootfs / "etc").mkdir()
        (rootfs / "etc/debian_version").touch()

    with process(_mounted(rootfs, image)) as pid:
        assert layout(find(pid, str(rootfs)).root).libraries == MULTIARCH[0]
    assert os.listdir(rootfs) == ["usr"]


def _map(pid: int, uids: str, gids: str) -> None:
    Path(f"/proc/{pid}/uid_map").write_text(uids)
    Path(f"/proc/{pid}/gid_map").write_text(gids)


@pytest.mark.root
def test_find_in_a_user_namespace(rootfs: Path) -> None:
    with process(_in_user_namespace(_mounted(rootfs))) as pid:
        _map(pid, "1000 5 1\n0 100000 1000\n", "0 200000 65536\n")
        container = find(pid, str(rootfs))
        assert (container.uid, container.gid, container.in_userns, container.rootless) == (100000, 200000, True, False)


@pytest.mark.root
def test_find_in_a_user_namespace_without_root(rootfs: Path) -> None:
    with process(_in_user_namespace(_mounted(rootfs))) as pid:
        _map(pid, "1000 100000 1\n", "0 200000 65536\n")
        with pytest.raises(ContainerError, match="the container's user namespace has no id 0"):
            find(pid, str(rootfs))


@pytest.mark.root
def test_find_from_inside_a_user_namespace(rootfs: Path) -> None:
    """The engine itself has no root: everything is in its user namespace, and so are we."""

    def ask() -> None:
        with process(_mounted(rootfs)) as pid:
            container = find(pid, str(rootfs))
            facts = (container.uid, container.gid, container.in_userns, container.rootless)
            assert facts == (0, 0, True, True)

    ask_now, said = os.pipe()

    def engine() -> None:
        kernel.unshare(kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS)
        os.write(said, b"x")
        while not Path("/proc/self/gid_map").read_text():
            os.sched_yield()
        ask()

    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            engine()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.read(ask_now, 1)
    _map(pid, "0 0 65536\n", "0 0 65536\n")
    assert os.waitpid(pid, 0)[1] == 0
    os.close(ask_now)
    os.close(said)


def _engine(rootfs: Path, before: Callable[[], None], ask: Callable[[int], None], then: Callable[[], None]) -> None:
    """`before` in a mount namespace that stands for the host's; `ask` about a container that was begun in it."""

    def work() -> None:
        kernel.unshare(kernel.CLONE_NEWNS)
        kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
        before()
        with process(_mounted(rootfs, then)) as pid:
            ask(pid)

    elsewhere(work)


def _replace_by_link(rootfs: Path, target: Path) -> None:
    rootfs.rename(rootfs.with_name("moved"))
    rootfs.symlink_to(target)


@pytest.mark.root
@pytest.mark.parametrize("kind", ["tmpfs", "bind", "another-container"])
def test_find_refuses_a_mount_of_the_host(rootfs: Path, kind: str) -> None:
    """The container's namespace began as a copy of ours: all that is mounted here is mounted there as well."""
    other = rootfs.with_name("other")
    other.mkdir()

    def before() -> None:
        if kind == "tmpfs":
            kernel.mount("none", str(other), "tmpfs", 0)
        else:
            kernel.mount(str(rootfs if kind == "another-container" else other), str(other), None, kernel.MS_BIND)

    def ask(pid: int) -> None:
        _replace_by_link(rootfs, other)
        with pytest.raises(ContainerError, match=f"has not mounted `{other}`: it is not a container of this bundle"):
            find(pid, str(rootfs))

    _engine(rootfs, before, ask, lambda: None)


@pytest.mark.root
def test_find_refuses_a_volume_of_the_container(rootfs: Path) -> None:
    """It is a mount of the container's alone, and what is in it may be the host's /etc."""
    volume = rootfs.with_name("volume")
    for place in (volume, rootfs / "data"):
        place.mkdir()

    def ask(pid: int) -> None:
        with pytest.raises(ContainerError, match=f"`{rootfs}/data` is a volume of process {pid}, and not its root"):
            find(pid, f"{rootfs}/data")

    _engine(
        rootfs,
        lambda: None,
        ask,
        lambda: kernel.mount(str(volume), f"{rootfs}/data", None, kernel.MS_BIND),
    )


@pytest.mark.root
@pytest.mark.parametrize("kind", ["link", "directory", "above", "inside"])
def test_find_root_filesystem_is_exchanged_after_it_was_found(
    rootfs: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Between the look into mountinfo and the open, the owner of a directory above acts."""
    above = rootfs.parent / "above"
    above.mkdir()
    rootfs = rootfs.rename(above / "rootfs")
    (rootfs / "rootfs").mkdir()
    other = above.with_name("other")
    (other / "rootfs").mkdir(parents=True)
    check = containers._check_mount

    def check_and_exchange(pid: int, path: str, mounts: str) -> None:
        check(pid, path, mounts)
        if kind == "link":
            _replace_by_link(rootfs, other)
        elif kind == "directory":
            rootfs.rename(rootfs.with_name("moved"))
            other.rename(rootfs)
        elif kind == "above":
            above.rename(above.with_name("above-moved"))
            other.rename(above)
        else:  # what was the root filesystem is the directory above it now
            rootfs.rename(above.with_name("mounted"))
            above.rename(above.with_name("above-moved"))
            above.with_name("mounted").rename(above)

    def ask(pid: int) -> None:
        monkeypatch.setattr(containers, "_check_mount", check_and_exchange)
        with pytest.raises(ContainerError, match=r"is another directory than|: not a directory|symbolic links"):
            find(pid, str(rootfs))

    _engine(rootfs, lambda: None, ask, lambda: None)


@pytest.mark.root
def test_find_over_a_mount_of_the_host(rootfs: Path) -> None:
    """Docker's `merged`: the root filesystem is a mount already, and the runtime mounts it on itself."""

    def before() -> None:
        kernel.mount("none", str(rootfs), "tmpfs", 0)

    def ask(pid: int) -> None:
        container = find(pid, str(rootfs))
        assert container.host_identity is not None
        assert container.host_identity.inode == rootfs.stat().st_ino

    _engine(rootfs, before, ask, lambda: None)


# here()


@pytest.mark.parametrize("path", ["/", "//", "/usr/..", "/proc/self/root"])
def test_here_refuses_the_root_of_the_host(path: str) -> None:
    with pytest.raises(ContainerError, match=f"the container's root is `{path}`: that is the host's own root"):
        here(path)


def test_here_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(ContainerError, match=f"open `{tmp_path}/none`: no such file or directory"):
        here(f"{tmp_path}/none")


@pytest.mark.root
def test_here(rootfs: Path) -> None:
    """A directory that is no mount point will do: who calls chroot needs none. The namespace stays what it is."""

    def ask() -> None:
        kernel.unshare(kernel.CLONE_NEWNS)
        kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
        namespace = os.stat("/proc/self/ns/mnt")
        container = here(str(rootfs))
        container.enter()
        assert os.path.samestat(os.stat("/proc/self/ns/mnt"), namespace)
        assert os.path.samestat(os.fstat(container.root.fd), rootfs.stat())
        assert (container.uid, container.gid, container.in_userns, container.rootless) == (0, 0, False, False)
        assert layout(container.root).libraries == "/usr/lib64"

    elsewhere(ask)


@pytest.mark.root
def test_here_refuses_a_tree_that_others_see_change(rootfs: Path) -> None:
    def ask() -> None:
        kernel.unshare(kernel.CLONE_NEWNS)
        kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
        kernel.mount(str(rootfs), str(rootfs), None, kernel.MS_BIND)
        kernel.mount("none", str(rootfs), None, MS_SHARED)
        with pytest.raises(ContainerError, match=r"is in a mount that other mount namespaces share: .*unshare --mount"):
            here(str(rootfs))

    elsewhere(ask)


# enter(), be_host(), shares()


@pytest.mark.root
@pytest.mark.parametrize("in_userns", [False, True])
def test_enter_makes_files_as_the_container_root(rootfs: Path, in_userns: bool) -> None:
    ids = (100000, 200000) if in_userns else (0, 0)
    os.chown(rootfs, *ids)

    def hook(pid: int) -> None:
        container = find(pid, str(rootfs))
        namespace = os.stat("ns/mnt", dir_fd=container.proc)
        container.enter()
        assert os.path.samestat(os.stat("/proc/self/ns/mnt"), namespace)
        os.mkdir("theirs", dir_fd=container.root.fd)
        container.be_host()
        os.mkdir("ours", dir_fd=container.root.fd)

    work = _mounted(rootfs)
    with process(_in_user_namespace(work) if in_userns else work) as pid:
        if in_userns:
            _map(pid, "0 100000 65536\n", "0 200000 65536\n")
        elsewhere(lambda: hook(pid))
    theirs, ours = ((rootfs / name).stat() for name in ("theirs", "ours"))
    assert (theirs.st_uid, theirs.st_gid) == ids
    assert (ours.st_uid, ours.st_gid) == (0, 0)


@pytest.mark.root
@pytest.mark.parametrize("caller", ["root", "with-less"])
def test_enter_keeps_the_capabilities_that_are_needed(rootfs: Path, caller: str) -> None:
    """And no more than the caller had; nothing is inherited, and nothing comes back."""
    needed = {"CHOWN", "DAC_OVERRIDE", "FOWNER", "MKNOD", "NET_ADMIN", "SETGID", "SETPCAP", "SETUID", "SYS_ADMIN"}
    expected = sum(1 << int(getattr(kernel, f"CAP_{name}")) for name in needed | {"SYS_CHROOT"})

    def hook(pid: int) -> None:
        container = find(pid, str(rootfs))
        allowed = expected
        if caller == "with-less":
            allowed = 1 << kernel.CAP_SYS_ADMIN | 1 << kernel.CAP_SYS_CHROOT
            kernel.keep_capabilities(kernel.CAP_SYS_ADMIN, kernel.CAP_SYS_CHROOT, 19)  # 19: SYS_PTRACE
        container.enter()
        fields = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
        assert [int(fields[name], 16) for name in ("CapPrm", "CapEff", "CapInh", "CapAmb")] == [allowed, allowed, 0, 0]
        assert fields["NoNewPrivs"] == "1"

    with process(_mounted(rootfs)) as pid:
        elsewhere(lambda: hook(pid))


VOLUMES = {
    "plain": "volume",
    "space": "volume a - b",
    "looks-like-fields": "volume\u00a0a\u00a0-\u00a0tmpfs",
    "looks-like-a-line": "volume\u202899\u00a098\u00a00:1\u00a0/\u00a0/x",
    "return": "volume\r1 2",
}


@pytest.mark.root
@pytest.mark.parametrize("name", VOLUMES.values(), ids=VOLUMES)
def test_shares(rootfs: Path, name: str) -> None:
    """The path of a volume may be the image's own choice: it cannot hide that the volume is shared, nor say so."""
    for directory in (name, f"{name}-private"):
        (rootfs / directory).mkdir(parents=True)

    def volumes() -> None:
        kernel.mount("none", f"{rootfs}/{name}", "tmpfs", 0)
        kernel.mount("none", f"{rootfs}/{name}", None, MS_SHARED)
        kernel.mount("none", f"{rootfs}/{name}-private", "tmpfs", 0)

    with process(_mounted(rootfs, volumes)) as pid:
        container = find(pid, str(rootfs))
        assert container.shares(container.root.open(f"/{name}"))
        assert not container.shares(container.root.open(f"/{name}-private"))
        assert not container.shares(container.root.fd)


@pytest.mark.root
def test_shares_nothing_out_of_a_user_namespace(rootfs: Path) -> None:
    def shared() -> None:
        kernel.mount("none", str(rootfs), None, MS_SHARED)

    with process(_in_user_namespace(_mounted(rootfs, shared))) as pid:
        _map(pid, "0 100000 65536\n", "0 200000 65536\n")
        container = find(pid, str(rootfs))
        assert not container.shares(container.root.fd)


# layout()

# Directories end with a slash, links are "name -> target", the rest are files.
FAMILIES = {
    "empty": ([], ("/usr/lib64", "/usr/lib32")),
    "debian": (["etc/debian_version", "usr/lib/"], MULTIARCH),
    "debian-version-linked": (["etc/debian_version -> /usr/share/version", "usr/share/version"], MULTIARCH),
    "debian-version-linked-upwards": (["etc/debian_version -> ../../../usr/version", "usr/version"], MULTIARCH),
    "debian-version-dangling": (["etc/debian_version -> nowhere", "usr/lib/"], ("/usr/lib64", "/usr/lib")),
    "multiarch-without-etc": ([f"usr/lib/{TRIPLET}/"], MULTIARCH),
    "multiarch-of-another-machine": (["usr/lib/riscv64-linux-gnu/"], ("/usr/lib64", "/usr/lib")),
    "fedora": (["etc/fedora-release", "usr/lib/", "usr/lib64/"], ("/usr/lib64", "/usr/lib")),
    "lib-alone": (["usr/lib/"], ("/usr/lib64", "/usr/lib")),
    "lib64-alone": (["usr/lib64/"], ("/usr/lib64", "/usr/lib32")),
    "lib32-is-there": (["usr/lib/", "usr/lib64/", "usr/lib32/"], ("/usr/lib64", "/usr/lib32")),
    "arch": (["usr/lib/", "usr/lib64 -> lib"], ("/usr/lib64", "/usr/lib32")),
    "arch-absolute": (["usr/lib/", "usr/lib64 -> /usr/lib"], ("/usr/lib64", "/usr/lib32")),
    "lib-is-lib64": (["usr/lib64/", "usr/lib -> lib64"], ("/usr/lib64", "/usr/lib32")),
    "lib64-dangling": (["usr/lib/", "usr/lib64 -> nowhere"], ("/usr/lib64", "/usr/lib")),
    "lib64-loop": (["usr/lib/", "usr/lib64 -> lib64"], ("/usr/lib64", "/usr/lib")),
    "lib64-leads-out": (["usr/lib/", "usr/lib64 -> {outside}"], ("/usr/lib64", "/usr/lib")),
    "etc-leads-out": (["etc -> {outside}", "usr/lib/"], ("/usr/lib64", "/usr/lib")),
    "etc-leads-up-and-out": (["etc -> ../outside", "usr/lib/"], ("/usr/lib64", "/usr/lib")),
}


@pytest.mark.parametrize("by_hand", [False, True], ids=["openat2", "by-hand"])
@pytest.mark.parametrize(("content", "expected"), FAMILIES.values(), ids=FAMILIES)
def test_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: list[str], expected: tuple[str, str], by_hand: bool
) -> None:
    if by_hand:
        monkeypatch.setattr(kernel, "openat2", _absent)
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (outside / "debian_version").touch()
    for item in content:
        name, _, target = item.partition(" -> ")
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if target:
            path.symlink_to(target.format(outside=outside))
        elif name.endswith("/"):
            path.mkdir(parents=True)
        else:
            path.touch()
    answer = layout(Root(os.open(root, DIRECTORY)))
    assert (*expected, "/usr/bin") == (answer.libraries, answer.libraries32, answer.binaries)


@pytest.mark.parametrize(
    ("id_map", "expected"),
    [
        pytest.param("         0          0 4294967295\n", 0, id="full"),
        pytest.param("0 100000 65536\n", 100000, id="usual"),
        pytest.param("1 5 1\n0 7 1\n", 7, id="second-line"),
        pytest.param("0 4294967295 1\n", 4294967295, id="not-ours"),
    ],
)
def test_mapped_root(id_map: str, expected: int) -> None:
    assert expected == containers._mapped_root(id_map)


@pytest.mark.parametrize("id_map", ["", "1 100000 65536\n"], ids=["empty", "no-root"])
def test_mapped_root_is_missing(id_map: str) -> None:
    with pytest.raises(ContainerError, match="has no id 0"):
        containers._mapped_root(id_map)


# mountinfo


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("/plain", "/plain"),
        ("", ""),
        (r"/a\040b", "/a b"),
        (r"/a\011b\012c\134d", "/a\tb\nc\\d"),
        (r"/a\043b", "/a#b"),
        (r"\040", " "),
        (r"/a\134040b", r"/a\040b"),
        (r"/a\04", r"/a\04"),
        (r"/a\089", r"/a\089"),
        ("/a\\", "/a\\"),
        ("/a\\\u0664\u0660\u0660", "/a\\\u0664\u0660\u0660"),
        ("/\udcff\u00a0", "/\udcff\u00a0"),
    ],
    ids=ascii,
)
def test_unescape(field: str, expected: str) -> None:
    assert expected == mountinfo.unescape(field)


ROOT = "25 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda rw\n"


@pytest.mark.parametrize(
    ("text", "points", "shared"),
    [
        pytest.param("", set(), set(), id="empty"),
        pytest.param("25 1\n\n", set(), set(), id="cut-off"),
        pytest.param(ROOT, {"/"}, {25}, id="shared"),
        pytest.param(ROOT.replace("shared:1 ", ""), {"/"}, set(), id="private"),
        pytest.param(ROOT.replace("shared", "master"), {"/"}, set(), id="slave"),
        pytest.param(ROOT.replace("shared:1", "shared:1 master:2"), {"/"}, {25}, id="slave-and-shared"),
        pytest.param(ROOT.replace("shared:1", "master:2 shared:1"), {"/"}, {25}, id="the-other-way-round"),
        pytest.param(ROOT.replace("shared:1", "unbindable"), {"/"}, set(), id="unbindable"),
        pytest.param(ROOT.replace("shared:1 -", "-").replace("/dev/sda", "shared:9"), {"/"}, set(), id="source"),
        pytest.param(ROOT + "31 25 0:5 / /a\\040-\\040b rw - tmpfs none rw\n", {"/", "/a - b"}, {25}, id="two"),
        pytest.param("31 25 0:5 / /a\u00a0b\x85c\x1cd rw - t n rw\n", {"/a\u00a0b\x85c\x1cd"}, set(), id="odd"),
        pytest.param("31 25 0:5 / /a\u00a0b\u00a0- rw shared:7 - t n rw\n", {"/a\u00a0b\u00a0-"}, {31}, id="hiding"),
        pytest.param("31 25 0:5 / /a rw - t  rw\n", {"/a"}, set(), id="no-source"),
    ],
)
def test_mountinfo(text: str, points: set[str], shared: set[int]) -> None:
    assert points == mountinfo.mount_points(text)
    assert shared == mountinfo.shared(text)
