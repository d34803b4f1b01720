# SPDX-License-Identifier: Apache-2.0
"""The edits, applied to throwaway roots in mount namespaces of their own, by the kernel's new calls and the old ones.

A canary directory outside of the root is what every trap in the tree points at: nothing may ever change there.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from nvhook.container import edits
from nvhook.container.container import Container
from nvhook.container.edits import Device, Edit, Mount, Symlink, Tmpfs, WrittenFile
from nvhook.container.linkercache import Ldcache
from nvhook.errors import MountError, NvhookError
from nvhook.linux import kernel, ldcache, tmpfs
from nvhook.linux.root import DIRECTORY, Root
from nvhook.request import config
from simhost import cachewriter

pytestmark = pytest.mark.root

LIBRARIES = "/usr/lib64"
LIBRARY = f"{LIBRARIES}/libx.so.1.2"
OPTIONS = ("ro", "nosuid", "nodev")


def _no_root() -> Root:
    """What a mount does not look at."""
    return Root(-1)


class Place:
    def __init__(self, directory: Path) -> None:
        self.in_userns = False
        self.directory = directory
        self.root = directory / "root"
        self.canary = directory / "canary"
        self.source = directory / "libx.so.1.2"
        for path in (self.root / "usr", self.canary):
            path.mkdir(parents=True)
        (self.canary / "file").write_text("untouched")
        self.source.write_text("the driver's")

    def mount(self, destination: str = LIBRARY) -> Mount:
        return Mount(str(self.source), destination, OPTIONS)

    def apply(self, *wanted: Edit, after: Callable[[], None] = lambda: None) -> str:
        """In a namespace of its own: the error's line, or empty; `after` looks around before the mounts are gone."""
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writing, self._child(list(wanted), after).encode() or b"\0")
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            said = pipe.read().decode()
        assert os.waitpid(child, 0)[1] == 0
        assert said, "the child ended early"
        assert not said.startswith("Traceback"), said
        return said.strip("\0")

    def _child(self, wanted: list[Edit], after: Callable[[], None]) -> str:
        try:
            kernel.unshare(kernel.CLONE_NEWNS)
            kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
            settings = config.load("/nonexistent")
            image = Root(os.open(self.root, DIRECTORY))
            for edit in wanted:
                edit.prepare(settings, image)
            kernel.mount(str(self.root), str(self.root), None, kernel.MS_BIND)
            container = self.container()
            try:
                for edit in wanted:
                    edit.prepare(settings, container.root, container)
                edits.apply(wanted, container)
            except NvhookError as error:
                return str(error)
            finally:
                after()
        except BaseException:  # told through the pipe
            return traceback.format_exc()
        return ""

    def container(self) -> Container:
        root = Root(os.open(self.root, DIRECTORY))
        return Container(
            proc=-1,
            namespace=-1,
            root=root,
            rootfs=str(self.root),
            owner=(0, 0),
            in_userns=self.in_userns,
            rootless=False,
            shared=frozenset(),
        )

    def mounts(self) -> dict[str, set[str]]:
        """Path below the root -> its mount options and optional fields."""
        found = {}
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields = line.split()
            if fields[4].startswith(f"{self.root}/"):
                found[fields[4][len(str(self.root)) :]] = {*fields[5].split(","), *fields[6 : fields.index("-")]}
        return found


def tree(directory: Path) -> dict[str, tuple[int, int, int, str]]:
    """Path -> mode and type, device number, size, content or target: without following anything."""
    found = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        content = ""
        if stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        elif stat.S_ISREG(status.st_mode):
            content = path.read_text(errors="surrogateescape")
        size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
        found[str(path.relative_to(directory))] = (status.st_mode, status.st_rdev, size, content)
    return found


def _absent(*_: object, **__: object) -> int:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


@pytest.fixture(params=["new-calls", "no-openat2", "no-open_tree", "no-mount_setattr", "no-fsopen", "none-of-them"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    missing = {
        "new-calls": [],
        "no-openat2": ["openat2"],
        "no-open_tree": ["open_tree"],
        "no-mount_setattr": ["mount_setattr"],
        "no-fsopen": ["fsopen"],
        "none-of-them": ["openat2", "open_tree", "mount_setattr", "fsopen"],
    }[request.param]
    for name in missing:
        monkeypatch.setattr(kernel, name, _absent)
    return Place(tmp_path)


def test_mount_in_an_empty_tree(place: Place) -> None:
    def look() -> None:
        assert (place.root / LIBRARY[1:]).read_text() == "the driver's"
        (options,) = place.mounts().values()
        assert {"ro", "nosuid", "nodev"} <= options
        assert not {item for item in options if item.startswith(("shared", "master"))}
        with pytest.raises(OSError, match="Read-only"):
            (place.root / LIBRARY[1:]).write_text("x")

    assert place.apply(place.mount(), after=look) == ""
    assert place.source.read_text() == "the driver's"


def test_mount_twice_on_one_tree(place: Place) -> None:
    """A container that is started again finds the empty file of its first start."""
    assert place.apply(place.mount()) == ""
    assert place.apply(place.mount(), after=lambda: _is(place, LIBRARY, "the driver's")) == ""


def test_mount_covers_a_file_of_the_image(place: Place) -> None:
    (place.root / "usr/lib64").mkdir()
    (place.root / LIBRARY[1:]).write_text("the image's")
    assert place.apply(place.mount(), after=lambda: _is(place, LIBRARY, "the driver's")) == ""
    assert (place.root / LIBRARY[1:]).read_text() == "the image's"


def _is(place: Place, path: str, text: str) -> None:
    assert (place.root / path[1:]).read_text() == text


def _directory(path: Path) -> None:
    path.mkdir()


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _null(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the address of a socket has room for a short path only
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


TRAPS: dict[str, Callable[[Path], None]] = {
    "directory": _directory,
    "fifo": _fifo,
    "device": _null,
    "socket": _socket,
}
LINKS = {
    "absolute": "{canary}/file",
    "relative-out": "../../../../../../../../../../../..{canary}/file",
    "dangling-out": "{canary}/new",
    "to-itself": "libx.so.1.2",
    "magic-root": "/proc/self/root{canary}/file",
    "device": "/dev/null",
}


@pytest.mark.parametrize("trap", TRAPS)
def test_mount_on_what_is_no_file(place: Place, trap: str) -> None:
    (place.root / "usr/lib64").mkdir()
    TRAPS[trap](place.root / LIBRARY[1:])
    before = tree(place.directory)
    line = place.apply(place.mount())
    assert line.startswith(f"mount error: mount `{place.source}` on `{LIBRARY}`: the image has a")
    assert before == tree(place.directory)


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("kind", ["symlink", "device"])
def test_link_and_device_where_something_is(place: Place, kind: str, trap: str) -> None:
    path = f"{LIBRARIES}/libx.so.1" if kind == "symlink" else "/dev/nvidia0"
    (place.root / path[1:]).parent.mkdir()
    TRAPS[trap](place.root / path[1:])
    before = tree(place.directory)
    line = place.apply(Symlink(path, "libx.so.1.2") if kind == "symlink" else node())
    assert f"`{path}`" in line
    assert "the image has a" in line
    assert before == tree(place.directory)


@pytest.mark.parametrize("link", LINKS)
def test_swapped_for_a_link_after_the_look(place: Place, monkeypatch: pytest.MonkeyPatch, link: str) -> None:
    """A process of a container that shares the tree is quick: whatever then happens, happens inside."""
    target = place.root / LIBRARY[1:]
    target.parent.mkdir()
    target.touch()
    look = edits.look

    def quick(parent: int, name: str) -> os.stat_result | None:
        status = look(parent, name)
        target.unlink()
        target.symlink_to(LINKS[link].format(canary=place.canary))
        return status

    def nothing_outside() -> None:
        points = [line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().split("\n") if line]
        assert not [point for point in points if point.startswith(str(place.canary)) or point == "/dev/null"]
        assert before == tree(place.canary)

    before = tree(place.canary)
    monkeypatch.setattr(edits, "look", quick)
    place.apply(place.mount(), after=nothing_outside)
    assert before == tree(place.canary)


def test_swapped_for_another_file_after_the_question_who_shares_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one may be where the host would see the mount: it goes on the file that was asked about, or nowhere."""
    target = place.root / LIBRARY[1:]
    target.parent.mkdir()
    target.touch()

    def quick(*_: object) -> bool:
        target.rename(target.with_name("asked"))
        target.touch()
        return False

    monkeypatch.setattr(Container, "shares", quick)
    line = place.apply(place.mount(), after=lambda: _is(place, LIBRARY, ""))
    assert line in ("", f"mount error: mount `{place.source}` on `{LIBRARY}`: replaced while it was mounted")


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("kind", ["mount", "device"])
def test_link_at_the_end_is_refused(place: Place, kind: str, link: str) -> None:
    path = LIBRARY if kind == "mount" else "/dev/nvidia0"
    (place.root / path[1:]).parent.mkdir()
    (place.root / path[1:]).symlink_to(LINKS[link].format(canary=place.canary))
    before = tree(place.directory)
    edit = place.mount() if kind == "mount" else node()
    line = place.apply(edit)
    assert line.endswith("the image has a symbolic link there")
    assert f"`{path}`" in line
    assert before == tree(place.directory)


ANCESTORS = {
    "absolute": "{canary}",
    "relative-out": "../../../../../../../../../../../..{canary}",
    "dangling-out": "{canary}/new",
    "to-itself": "lib64",
    "magic-root": "/proc/self/root{canary}",
    "to-a-file": "{canary}/file",
}


@pytest.mark.parametrize("link", ANCESTORS)
@pytest.mark.parametrize("kind", ["mount", "symlink", "device"])
def test_link_above_stays_inside(place: Place, kind: str, link: str) -> None:
    """Resolved below the root, where there is no canary; so it fails, or makes something inside. Never outside."""
    (place.root / "usr/lib64").symlink_to(ANCESTORS[link].format(canary=place.canary))
    before = tree(place.canary)
    edit: Edit = place.mount()
    if kind == "symlink":
        edit = Symlink(f"{LIBRARIES}/libx.so.1", "libx.so.1.2")
    elif kind == "device":
        edit = Device(f"{LIBRARIES}/nvidia0", 195, 0, "rw", mode=0o666, uid=0, gid=0)
    line = place.apply(edit)
    assert "error" in line
    assert LIBRARIES in line
    assert before == tree(place.canary)
    assert sorted(os.listdir(place.directory)) == ["canary", "libx.so.1.2", "root"]


def test_link_above_that_leads_inside_is_followed(place: Place) -> None:
    (place.root / "usr/lib").mkdir()
    (place.root / "usr/lib64").symlink_to("/usr/lib")
    assert place.apply(place.mount(), after=lambda: _is(place, "/usr/lib/libx.so.1.2", "the driver's")) == ""


IPC = ("nosuid", "nodev", "noexec")


def test_mount_of_a_socket(place: Place) -> None:
    """Writable, as connect() asks for; and the file that a first start left, or a dead socket, serves the second."""
    source = place.directory / "socket"
    _socket(source)

    def look() -> None:
        assert os.path.samestat(source.lstat(), (place.root / "run/daemon/socket").lstat())
        assert {"rw", *IPC} <= place.mounts()["/run/daemon/socket"]

    mount = Mount(str(source), "/run/daemon/socket", IPC, "socket")
    assert place.apply(mount, after=look) == ""
    assert stat.S_ISREG((place.root / "run/daemon/socket").lstat().st_mode)
    assert place.apply(mount, after=look) == ""
    (place.root / "run/daemon/socket").unlink()
    _socket(place.root / "run/daemon/socket")
    assert place.apply(mount, after=look) == ""


def test_mount_of_a_directory(place: Place) -> None:
    source = place.directory / "pipes"
    source.mkdir()
    _socket(source / "control")

    def look() -> None:
        assert os.listdir(place.root / "tmp/pipes") == ["control"]
        assert {"rw", *IPC} <= place.mounts()["/tmp/pipes"]

    mount = Mount(str(source), "/tmp/pipes", IPC, "directory")
    assert place.apply(mount, after=look) == ""
    assert os.listdir(place.root / "tmp/pipes") == []
    assert place.apply(mount, after=look) == ""
    before = tree(place.root)
    assert place.apply(mount, _Broken()) == "mount error: broken"
    assert before == tree(place.root)


@pytest.mark.parametrize("what", ["socket", "directory"])
def test_mount_of_what_a_volume_has_brought(place: Place, what: str) -> None:
    """`-v /run:/run`: it is there already, and is not mounted a second time."""
    there = place.root / "usr/there"
    (_socket if what == "socket" else _directory)(there)

    def look() -> None:
        assert place.mounts() == {}

    assert place.apply(Mount(str(there), "/usr/there", IPC, what), after=look) == ""


def test_mount_of_a_directory_is_undone(place: Place) -> None:
    before = tree(place.directory)
    assert place.apply(Mount(str(place.canary), "/tmp/pipes", IPC, "directory"), _Broken()) == "mount error: broken"
    assert before == tree(place.directory)


@pytest.mark.parametrize(
    ("what", "trap"),
    [
        *(("socket", trap) for trap in ("directory", "fifo", "device", "link")),
        *(("directory", trap) for trap in ("socket", "fifo", "device", "file", "link")),
    ],
)
def test_mount_of_a_socket_or_directory_on_something_else(place: Place, what: str, trap: str) -> None:
    source = place.directory / "source"
    (_socket if what == "socket" else _directory)(source)
    target = place.root / "usr/here"
    if trap == "link":
        target.symlink_to(place.canary)
    elif trap == "file":
        target.touch()
    else:
        TRAPS[trap](target)
    before = tree(place.directory)
    line = place.apply(Mount(str(source), "/usr/here", IPC, what))
    assert line.startswith(f"mount error: mount `{source}` on `/usr/here`: the image has a")
    assert before == tree(place.directory)


@pytest.mark.parametrize(("what", "now"), [("socket", "file"), ("directory", "file"), ("file", "socket")])
def test_source_that_has_become_something_else(place: Place, what: str, now: str) -> None:
    source = place.directory / "source"
    source.touch() if now == "file" else _socket(source)
    with pytest.raises(edits.SourceGone):
        Mount(str(source), "/usr/here", IPC, what).prepare(config.load("/nonexistent"), _no_root())


PROC = "/proc/driver/nvidia"
PROC_OPTIONS = ("ro", "nosuid", "nodev", "noexec")


def cover(*, only_over: bool = True) -> list[Edit]:
    """A tmpfs with a file, and with a file and a directory of the host's procfs."""
    top = Tmpfs(PROC, only_over=only_over)
    return [
        top,
        WrittenFile(top, "params", "ModifyDeviceFiles: 0\n"),
        Mount("/proc/version", f"{PROC}/capabilities/mig/config", PROC_OPTIONS, inside=top),
        Mount("/proc/tty", f"{PROC}/gpus/0000:07:00.0", PROC_OPTIONS, "directory", inside=top),
    ]


def _host_proc(place: Place) -> None:
    others = place.root / "proc/driver/nvidia/gpus/0000:41:00.0"
    others.mkdir(parents=True)
    (others.parent.parent / "params").write_text("ModifyDeviceFiles: 1\n")


@pytest.mark.parametrize("owner", [(0, 0), (1234, 1234)], ids=["root", "user-namespace"])
def test_tmpfs(place: Place, owner: tuple[int, int]) -> None:
    """The owner is who files are made as: root of a user namespace has no capability to write in spite of a mode."""
    _host_proc(place)
    before = tree(place.root)
    wanted = cover()

    def look() -> None:
        kernel.setfsuid(0)
        kernel.setfsgid(0)
        top = place.root / PROC[1:]
        assert sorted(os.listdir(top)) == ["capabilities", "gpus", "params"]
        assert os.listdir(top / "gpus") == ["0000:07:00.0"]
        assert (top / "params").read_text() == "ModifyDeviceFiles: 0\n"
        assert (top / "capabilities/mig/config").read_text() == Path("/proc/version").read_text()
        assert "drivers" in os.listdir(top / "gpus/0000:07:00.0")
        modes = [stat.S_IMODE(path.stat().st_mode) for path in (top, top / "params", top / "gpus")]
        assert modes == [0o555, 0o444, 0o755]
        assert (top.stat().st_uid, top.stat().st_gid) == owner
        assert set(place.mounts()) == {PROC, f"{PROC}/capabilities/mig/config", f"{PROC}/gpus/0000:07:00.0"}
        for options in place.mounts().values():
            assert set(PROC_OPTIONS) <= options
            assert not {item for item in options if item.startswith(("shared", "master"))}
        for path in (top / "new", top / "gpus/new", top / "params"):
            with pytest.raises(OSError, match="Read-only"):
                path.write_text("x")

    assert place.apply(_FilesAs(owner), *wanted, after=look) == ""
    assert before == tree(place.root)
    assert [edit.traces for edit in wanted] == [[]] * 4


class _FilesAs(Edit):
    """Not an edit of ours: makes files as somebody else, as Container.enter does in a user namespace."""

    def __init__(self, owner: tuple[int, int]) -> None:
        super().__init__()
        self.owner = owner

    def apply(self, container: Container) -> None:  # noqa: ARG002
        kernel.setfsgid(self.owner[1])
        kernel.setfsuid(self.owner[0])


def test_tmpfs_over_nothing(place: Place) -> None:
    """The nvidia kernel module is not loaded, or the container has no /proc: nothing to cover, and nothing is made."""
    before = tree(place.root)
    assert place.apply(*cover(), after=lambda: _no_mounts(place)) == ""
    assert before == tree(place.root)


def _no_mounts(place: Place) -> None:
    assert place.mounts() == {}


def test_tmpfs_makes_its_directory(place: Place) -> None:
    wanted = cover(only_over=False)
    reading, writing = os.pipe()

    def look() -> None:
        _is(place, f"{PROC}/params", "ModifyDeviceFiles: 0\n")
        os.write(writing, repr([edit.traces for edit in wanted]).encode())

    assert place.apply(*wanted, after=look) == ""
    os.close(writing)
    made = [{"kind": "directory", "path": path} for path in ("/proc", "/proc/driver", PROC)]
    with os.fdopen(reading) as pipe:
        assert pipe.read() == repr([made, [], [], []])
    assert place.apply(*wanted) == ""  # a second start, on what the first left
    assert os.listdir(place.root / PROC[1:]) == []


@pytest.mark.parametrize("trap", [*(name for name in TRAPS if name != "directory"), "file", "link-in", *LINKS])
@pytest.mark.parametrize("only_over", [True, False], ids=["over", "made"])
def test_tmpfs_on_what_is_no_directory(place: Place, trap: str, only_over: bool) -> None:
    target = place.root / PROC[1:]
    target.parent.mkdir(parents=True)
    if trap in TRAPS:
        TRAPS[trap](target)
    elif trap == "file":
        target.touch()
    elif trap == "link-in":
        target.symlink_to("/usr")
    else:
        target.symlink_to(LINKS[trap].format(canary=place.canary).replace("/file", "").replace("libx.so.1.2", "nvidia"))
    edit = Tmpfs(PROC, only_over=only_over)
    before = tree(place.directory)
    line = place.apply(edit, WrittenFile(edit, "params", "x"), after=lambda: _no_mounts(place))
    assert line.startswith(f"mount error: mount a tmpfs on `{PROC}`: the image has a")
    assert before == tree(place.directory)


@pytest.mark.parametrize("link", ANCESTORS)
def test_tmpfs_below_a_link_stays_inside(place: Place, link: str) -> None:
    (place.root / "proc").symlink_to(ANCESTORS[link].format(canary=place.canary).replace("lib64", "proc"))
    before = tree(place.canary)
    edit = Tmpfs(PROC)
    place.apply(edit, WrittenFile(edit, "params", "x"))
    assert before == tree(place.canary)


@pytest.mark.parametrize("link", LINKS)
def test_tmpfs_directory_swapped_for_a_link(place: Place, monkeypatch: pytest.MonkeyPatch, link: str) -> None:
    _host_proc(place)
    target = place.root / PROC[1:]
    look = edits.look

    def quick(parent: int, name: str) -> os.stat_result | None:
        status = look(parent, name)
        target.rename(target.with_name("away"))
        target.symlink_to(LINKS[link].format(canary=place.canary).replace("/file", ""))
        return status

    before = tree(place.canary)
    monkeypatch.setattr(edits, "look", quick)
    edit = Tmpfs(PROC)
    line = place.apply(edit, WrittenFile(edit, "params", "x"), after=lambda: _no_mounts(place))
    assert line.startswith(f"mount error: mount a tmpfs on `{PROC}`: ")
    assert before == tree(place.canary)


def test_file_is_written_where_the_tmpfs_is(place: Place) -> None:
    """Whatever its place is called by then: nothing is looked up by name after the mount."""
    edit = Tmpfs(PROC)

    class Swap(Edit):
        def apply(self, container: Container) -> None:  # noqa: ARG002
            (place.root / "proc").rename(place.root / "gone")
            (place.root / "proc/driver/nvidia").mkdir(parents=True)

    def look() -> None:
        _is(place, "/gone/driver/nvidia/params", "x")
        assert os.listdir(place.root / PROC[1:]) == []

    assert place.apply(edit, Swap(), WrittenFile(edit, "params", "x"), after=look) == ""


def test_file_twice(place: Place) -> None:
    edit = Tmpfs(PROC)
    before = tree(place.root)
    line = place.apply(
        edit, WrittenFile(edit, "params", "x"), WrittenFile(edit, "params", "y"), after=lambda: _no_mounts(place)
    )
    assert line == f"mount error: write `{PROC}/params`: file exists"
    assert before == tree(place.root)


@pytest.mark.parametrize("mask", [0o077, 0o777])
def test_tmpfs_modes_whatever_the_umask(place: Place, mask: int) -> None:
    edit = Tmpfs("/usr/here")

    def look() -> None:
        modes = [stat.S_IMODE((place.root / path).stat().st_mode) for path in ("usr/here", "usr/here/params")]
        assert modes == [0o555, 0o444]

    former = os.umask(mask)
    try:
        assert place.apply(edit, WrittenFile(edit, "params", "x"), after=look) == ""
    finally:
        os.umask(former)


@pytest.mark.parametrize("only_over", [True, False])
@pytest.mark.parametrize("broken", range(1, 5))
def test_tmpfs_is_undone(place: Place, broken: int, only_over: bool) -> None:
    if only_over:
        _host_proc(place)
    wanted = cover(only_over=only_over)
    before = tree(place.directory)
    wanted.insert(broken, _Broken())
    assert place.apply(*wanted, after=lambda: _no_mounts(place)) == "mount error: broken"
    assert before == tree(place.directory)


def test_tmpfs_that_cannot_be_sealed_is_undone(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def seal(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    _host_proc(place)
    wanted = cover()
    before = tree(place.directory)
    monkeypatch.setattr(tmpfs, "seal", seal)
    line = place.apply(*wanted, after=lambda: _no_mounts(place))
    assert line == f"mount error: make the tmpfs on `{PROC}` read-only: operation not permitted"
    assert before == tree(place.directory)


def test_tmpfs_where_the_host_would_have_it_too(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    _host_proc(place)
    monkeypatch.setattr(Container, "shares", lambda *_: True)
    line = place.apply(*cover(), after=lambda: _no_mounts(place))
    assert line.startswith(f"mount error: mount a tmpfs on `{PROC}`: a volume is there that shares its mounts")


def node() -> Device:
    return Device("/dev/nvidia0", 60, 7, "rw", mode=0o640, uid=3, gid=4)


def test_device(place: Place) -> None:
    assert place.apply(node()) == ""
    status = (place.root / "dev/nvidia0").lstat()
    assert (status.st_mode, status.st_rdev) == (stat.S_IFCHR | 0o640, os.makedev(60, 7))
    assert (status.st_uid, status.st_gid) == (3, 4)
    assert place.apply(node()) == ""  # it is there already


def test_device_of_other_numbers_in_the_way(place: Place) -> None:
    (place.root / "dev").mkdir()
    _null(place.root / "dev/nvidia0")
    line = place.apply(node())
    assert line == "mount error: make device `/dev/nvidia0`: the image has a character device there"


def test_device_where_nodes_cannot_be_opened_and_the_host_has_none(place: Place) -> None:
    (place.root / "dev").mkdir()
    line = place.apply(_Tmpfs(place.root / "dev", kernel.MS_NODEV), node())
    assert line == "mount error: make device `/dev/nvidia0`: has to be bound, and `/dev/nvidia0` is not 60:7"


def test_device_of_other_numbers_on_the_host(place: Place) -> None:
    place.in_userns = True
    line = place.apply(Device("/dev/null", 1, 5, "rw", mode=0o666, uid=0, gid=0))
    assert line == "mount error: make device `/dev/null`: has to be bound, and `/dev/null` is not 1:5"
    assert os.listdir(place.root) == ["usr"]


@pytest.mark.parametrize("there", ["nothing", "empty-file", "the-node"])
@pytest.mark.parametrize("why", ["user-namespace", "no-capability"])
def test_device_is_bound(place: Place, why: str, there: str) -> None:
    """In a user namespace always, as a node made there cannot be opened; else where mknod is denied."""
    (place.root / "dev").mkdir()
    if there == "empty-file":
        (place.root / "dev/null").touch()
    elif there == "the-node":
        _null(place.root / "dev/null")
    place.in_userns = why == "user-namespace"

    def look() -> None:
        (place.root / "dev/null").write_text("gone")
        is_bound = why == "user-namespace" or there != "the-node"
        assert is_bound == ("/dev/null" in place.mounts())

    null = Device("/dev/null", 1, 3, "rw", mode=0o666, uid=0, gid=0)
    wanted = [null] if place.in_userns else [_NoMknod(), null]
    assert place.apply(*wanted, after=look) == ""
    assert place.apply(*wanted, after=look) == ""  # a second start finds what the first left


@pytest.mark.parametrize("mask", [0o077, 0o777])
def test_device_mode_whatever_the_umask(place: Place, mask: int) -> None:
    (place.root / "dev").mkdir()
    former = os.umask(mask)
    try:
        assert place.apply(node()) == ""
    finally:
        os.umask(former)
    assert stat.S_IMODE((place.root / "dev/nvidia0").lstat().st_mode) == 0o640


def test_device_bound_where_nodes_cannot_be_opened(place: Place) -> None:
    (place.root / "dev").mkdir()
    null = Device("/dev/null", 1, 3, "rw", mode=0o666, uid=0, gid=0)

    def look() -> None:
        (place.root / "dev/null").write_text("gone")
        assert {"nosuid", "noexec"} <= place.mounts()["/dev/null"]
        assert "nodev" not in place.mounts()["/dev/null"]

    assert place.apply(_Tmpfs(place.root / "dev", kernel.MS_NODEV), null, after=look) == ""


class _Tmpfs(Edit):
    """Not an edit of ours: puts a tmpfs into the tree, in the namespace."""

    def __init__(self, path: Path, flags: int) -> None:
        super().__init__()
        self.path = path
        self.flags = flags

    def apply(self, container: Container) -> None:  # noqa: ARG002
        kernel.mount("none", str(self.path), "tmpfs", self.flags)


class _NoMknod(Edit):
    """Not an edit of ours: takes CAP_MKNOD away from whoever applies the next."""

    def apply(self, container: Container) -> None:  # noqa: ARG002
        status = Path("/proc/self/status").read_text()
        allowed = int(status.partition("CapEff:")[2].split()[0], 16) & ~(1 << 27)
        low, high = allowed & 0xFFFFFFFF, allowed >> 32
        header = struct.pack("=Ii", kernel._LINUX_CAPABILITY_VERSION_3, 0)
        kernel._syscall(kernel._NR_CAPSET, header, struct.pack("=6I", low, low, 0, high, high, 0))


def test_symlink_in_an_empty_tree(place: Place) -> None:
    assert place.apply(place.mount(), Symlink(f"{LIBRARIES}/libx.so.1", "libx.so.1.2")) == ""
    assert os.readlink(place.root / "usr/lib64/libx.so.1") == "libx.so.1.2"


@pytest.mark.parametrize("former", ["libx.so.1.2", "libx.so.0.9", "/nowhere", "{canary}/file"])
def test_symlink_takes_the_place_of_another(place: Place, former: str) -> None:
    (place.root / "usr/lib64").mkdir()
    (place.root / "usr/lib64/libx.so.1").symlink_to(former.format(canary=place.canary))
    before = tree(place.canary)
    assert place.apply(place.mount(), Symlink(f"{LIBRARIES}/libx.so.1", "libx.so.1.2")) == ""
    assert os.readlink(place.root / "usr/lib64/libx.so.1") == "libx.so.1.2"
    assert before == tree(place.canary)


def test_symlink_covers_a_file_of_the_image(place: Place) -> None:
    (place.root / "usr/lib64").mkdir()
    (place.root / "usr/lib64/libx.so.1").write_text("the image's own")
    link = Symlink(f"{LIBRARIES}/libx.so.1", "libx.so.1.2")
    assert place.apply(place.mount(), link, after=lambda: _is(place, f"{LIBRARIES}/libx.so.1", "the driver's")) == ""
    assert (place.root / "usr/lib64/libx.so.1").read_text() == "the image's own"


def test_symlink_covers_the_empty_file_of_an_earlier_start(place: Place) -> None:
    (place.root / "usr/lib64").mkdir()
    (place.root / "usr/lib64/libx.so.1").touch()
    link = Symlink(f"{LIBRARIES}/libx.so.1", "libx.so.1.2")
    assert place.apply(place.mount(), link, after=lambda: _is(place, f"{LIBRARIES}/libx.so.1", "the driver's")) == ""


@pytest.mark.parametrize("target", ["missing", "link", "directory", "fifo"])
def test_symlink_covers_with_a_file_only(place: Place, target: str) -> None:
    (place.root / "usr/lib64").mkdir()
    (place.root / "usr/lib64/libx.so.1").write_text("the image's own")
    if target == "link":
        (place.root / LIBRARY[1:]).symlink_to(place.canary / "file")
    elif target != "missing":
        TRAPS[target](place.root / LIBRARY[1:])
    before = tree(place.directory)
    line = place.apply(Symlink(f"{LIBRARIES}/libx.so.1", "libx.so.1.2"))
    assert line.startswith(f"mount error: link `{LIBRARIES}/libx.so.1` to `libx.so.1.2`: ")
    assert before == tree(place.directory)


@pytest.mark.parametrize("above", ["lib64/gbm", "lib64/deep/gbm"])
def test_symlink_to_the_directory_above_covers_a_file(place: Place, above: str) -> None:
    """Its own directory may be a link: `..` is where the linker would find it, in the root."""
    (place.root / "usr" / above).mkdir(parents=True)
    if above != "lib64/gbm":
        (place.root / "usr/lib64/gbm").symlink_to("deep/gbm")
    backend = place.root / "usr/lib64/gbm/x_gbm.so"
    backend.write_text("the image's own")
    link = Symlink(f"{LIBRARIES}/gbm/x_gbm.so", "../libx.so.1.2")
    library = os.path.normpath(f"/usr/{above}/../libx.so.1.2")
    covered = place.apply(place.mount(library), link, after=lambda: _is(place, link.path, "the driver's"))
    assert (covered, backend.read_text()) == ("", "the image's own")


def test_symlink_to_above_the_root_covers_with_nothing_outside(place: Place) -> None:
    """The directory is the root itself, beside which, outside, is a file of that name."""
    (place.root / "usr/lib64").mkdir()
    (place.root / "usr/lib64/gbm").symlink_to("/")
    (place.root / "x_gbm.so").write_text("the image's own")
    before = tree(place.directory)
    line = place.apply(Symlink(f"{LIBRARIES}/gbm/x_gbm.so", f"../{place.source.name}"))
    assert line.startswith(f"mount error: link `{LIBRARIES}/gbm/x_gbm.so` to `../{place.source.name}`: no such file")
    assert before == tree(place.directory)


CACHE = "/etc/ld.so.cache"


@pytest.mark.parametrize("trap", [*TRAPS, *LINKS])
def test_ldcache_that_is_no_file(place: Place, trap: str) -> None:
    (place.root / "etc").mkdir()
    if trap in TRAPS:
        TRAPS[trap](place.root / CACHE[1:])
    else:
        (place.root / CACHE[1:]).symlink_to(LINKS[trap].format(canary=place.canary))
    before = tree(place.directory)
    line = place.apply(Ldcache((LIBRARIES,)))
    assert line.startswith(f"ldcache error: make `{CACHE}` of `{place.root}`: the image has a")
    assert before == tree(place.directory)


@pytest.mark.parametrize("link", ANCESTORS)
def test_ldcache_below_a_link_stays_inside(place: Place, link: str) -> None:
    (place.root / "etc").symlink_to(ANCESTORS[link].format(canary=place.canary).replace("lib64", "etc"))
    before = tree(place.canary)
    line = place.apply(Ldcache((LIBRARIES,)))
    assert line.startswith(f"ldcache error: make `{CACHE}`")
    assert before == tree(place.canary)


NAMES = ((LIBRARIES, "libx.so.1", 64),)


def _image_with_a_cache(place: Place, path: str = "/opt/lib/libz.so.1") -> None:
    """Its libraries are where nobody can find them but in the cache: ldconfig would list none."""
    (place.root / "etc").mkdir()
    entry = {"name": "libz.so.1", "flags": "libc6,x86-64", "path": path}
    (place.root / CACHE[1:]).write_bytes(cachewriter.cache([entry]))


def _cached(place: Place) -> dict[str, str]:
    return {entry.name: entry.path for entry in ldcache.parse((place.root / CACHE[1:]).read_bytes())}


def test_ldcache_adds_to_the_images_own(place: Place) -> None:
    _image_with_a_cache(place)
    assert place.apply(place.mount(), Ldcache((LIBRARIES,), NAMES)) == ""
    assert _cached(place) == {"libz.so.1": "/opt/lib/libz.so.1", "libx.so.1": f"{LIBRARIES}/libx.so.1"}
    status = (place.root / CACHE[1:]).stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o644, 0)


def test_ldcache_that_names_them_already_stays(place: Place) -> None:
    _image_with_a_cache(place)
    place.apply(Ldcache((LIBRARIES,), NAMES))
    before = (place.root / CACHE[1:]).stat()
    assert place.apply(Ldcache((LIBRARIES,), NAMES)) == ""
    after = (place.root / CACHE[1:]).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("newer", ["opt/lib", "etc/ld.so.conf", "etc/ld.so.conf.d"])
def test_ldcache_older_than_what_it_lists_is_ldconfigs(place: Place, newer: str) -> None:
    _image_with_a_cache(place)
    os.utime(place.root / CACHE[1:], (0, 0))
    (place.root / newer).mkdir(parents=True)
    assert place.apply(Ldcache((LIBRARIES,), NAMES)) == ""
    assert _cached(place) == {}


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"glibc-ld.so.cache1.1\xff\xff\xff\xff"])
def test_ldcache_that_is_odd_is_ldconfigs(place: Place, content: bytes) -> None:
    (place.root / "etc").mkdir()
    (place.root / CACHE[1:]).write_bytes(content)
    assert place.apply(Ldcache((LIBRARIES,), NAMES)) == ""
    assert _cached(place) == {}


def test_ldcache_beside_what_a_killed_hook_left(place: Place) -> None:
    _image_with_a_cache(place)
    (place.root / "etc/.ld.so.cache.nvhook").symlink_to(place.canary / "file")
    assert place.apply(Ldcache((LIBRARIES,), NAMES)) == ""
    assert "libx.so.1" in _cached(place)
    assert (place.canary / "file").read_text() == "untouched"


def _all(place: Place) -> list[Edit]:
    return [
        place.mount(),
        place.mount("/usr/new/deep/program"),
        Symlink(f"{LIBRARIES}/libx.so.1", "libx.so.1.2"),
        Symlink(f"{LIBRARIES}/liby.so.1", "libx.so.1.2"),
        node(),
        Device("/dev/null", 1, 3, "rw", mode=0o666, uid=0, gid=0),
        Ldcache((LIBRARIES,)),
    ]


def test_everything_twice_on_one_tree(place: Place) -> None:
    """An image without /etc; then the container is started again on the tree that the first start left."""
    trees = []
    for _ in range(2):
        assert place.apply(*_all(place), after=lambda: _is(place, LIBRARY, "the driver's")) == ""
        trees.append({path: facts[:2] for path, facts in tree(place.root).items()})
    assert trees[0] == trees[1]
    assert "etc/ld.so.cache" in trees[0]


@pytest.mark.parametrize("half_way", range(4))
def test_failure_half_way_is_undone(place: Place, monkeypatch: pytest.MonkeyPatch, half_way: int) -> None:
    """The file to mount onto has been made, and then it cannot be mounted on."""
    place.in_userns = True
    library = place.root / "usr/lib64"
    library.mkdir()
    (library / "liby.so.1").write_text("the image's own")
    before = tree(place.directory)
    attach = Edit._attach
    left = [half_way]

    def failing(*arguments: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, "the disk is on fire")
        attach(*arguments)  # type: ignore[arg-type]

    def look() -> None:
        assert place.mounts() == {}

    monkeypatch.setattr(Edit, "_attach", failing)
    wanted = [edit for edit in _all(place) if not (isinstance(edit, Device) and edit.major == 60)]
    assert place.apply(*wanted, after=look).endswith("the disk is on fire")
    assert before == tree(place.directory)


class _Broken(Edit):
    def apply(self, container: Container) -> None:  # noqa: ARG002
        raise MountError("broken")


@pytest.mark.parametrize("broken", range(7))
def test_failure_at_every_edit_is_undone(place: Place, broken: int) -> None:
    library = place.root / "usr/lib64"
    library.mkdir()
    (library / "libx.so.1").symlink_to("libx.so.0.9")
    (library / "liby.so.1").write_text("the image's own")
    (place.root / "etc").mkdir()
    (place.root / "etc/ld.so.cache").write_text("the image's cache")
    before = tree(place.directory)
    wanted: list[Edit] = [
        place.mount(),
        place.mount("/usr/new/deep/program"),
        Symlink(f"{LIBRARIES}/libx.so.1", "libx.so.1.2"),
        Symlink(f"{LIBRARIES}/liby.so.1", "libx.so.1.2"),
        node(),
        Ldcache((LIBRARIES,)),
    ]
    wanted.insert(broken, _Broken())
    left: list[dict[str, set[str]]] = []

    def look() -> None:
        left.append(place.mounts())
        assert left == [{}]

    assert place.apply(*wanted, after=look) == "mount error: broken"
    assert before == tree(place.directory)


@pytest.mark.parametrize("gone", ["missing", "directory", "link", "below-a-file"])
def test_source_that_is_gone(place: Place, gone: str) -> None:
    place.source.unlink()
    path = str(place.source)
    if gone == "directory":
        place.source.mkdir()
    elif gone == "link":
        place.source.symlink_to(place.canary / "file")
    elif gone == "below-a-file":
        path = f"{place.canary}/file/x"
    with pytest.raises((edits.SourceGone, MountError)):
        Mount(path, LIBRARY, OPTIONS).prepare(config.load("/nonexistent"), _no_root())
