# SPDX-License-Identifier: Apache-2.0
"""The edits, applied to throwaway roots in mount namespaces of their own, by the kernel's new calls and the old ones.

A canary directory outside of the root is what every trap in the tree points at: nothing may ever change there.
"""

from __future__ import annotations

import errno
import os
import stat
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from nvhook import config, edits
from nvhook.container import Container, layout
from nvhook.edits import Device, Edit, Ldcache, Mount, Symlink
from nvhook.errors import MountError, NvhookError
from nvhook.linux import kernel
from nvhook.linux.root import DIRECTORY, Root

pytestmark = pytest.mark.root

LIBRARIES = "/usr/lib64"
LIBRARY = f"{LIBRARIES}/libx.so.1.2"
OPTIONS = ("ro", "nosuid", "nodev")


class Place:
    def __init__(self, directory: Path) -> None:
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
            for edit in wanted:
                edit.prepare(settings)
            kernel.mount(str(self.root), str(self.root), None, kernel.MS_BIND)
            try:
                edits.apply(wanted, self.container())
            except NvhookError as error:
                return str(error)
            finally:
                after()
        except BaseException:  # told through the pipe
            return traceback.format_exc()
        return ""

    def container(self, *, in_userns: bool = False) -> Container:
        root = Root(os.open(self.root, DIRECTORY))
        return Container(
            proc=-1,
            namespace=-1,
            root=root,
            rootfs=str(self.root),
            layout=layout(root),
            owner=(0, 0),
            in_userns=in_userns,
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
            content = path.read_text()
        size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
        found[str(path.relative_to(directory))] = (status.st_mode, status.st_rdev, size, content)
    return found


def _absent(*_: object, **__: object) -> int:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


@pytest.fixture(params=["new-calls", "no-openat2", "no-open_tree", "no-mount_setattr", "none-of-them"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    missing = {
        "new-calls": [],
        "no-openat2": ["openat2"],
        "no-open_tree": ["open_tree"],
        "no-mount_setattr": ["mount_setattr"],
        "none-of-them": ["openat2", "open_tree", "mount_setattr"],
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


TRAPS: dict[str, Callable[[Path], None]] = {"directory": _directory, "fifo": _fifo, "device": _null}
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
    tmpfs = _Tmpfs(place.root / "dev", kernel.MS_NODEV)
    line = place.apply(tmpfs, node())
    assert line == "mount error: make device `/dev/nvidia0`: has to be bound, and `/dev/nvidia0` is not 60:7"


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
        Mount(path, LIBRARY, OPTIONS).prepare(config.load("/nonexistent"))
