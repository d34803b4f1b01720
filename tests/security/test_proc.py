# SPDX-License-Identifier: Apache-2.0
"""Something else stands at /proc than procfs: nothing is mounted, changed or opened through it.

CVE-2025-31133, CVE-2025-52565 and CVE-2025-52881 of runc: what it did below /proc, or by the name /proc/self/fd/N, went
where a container had put a link, a tmpfs or a directory of its own.
"""

from __future__ import annotations

import errno
import os
import stat
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from containers import Workshop, tree
from nvhook.container import container
from nvhook.container import edits as editing
from nvhook.container.container import Container
from nvhook.container.edits import Edit
from nvhook.errors import ContainerError, MountError
from nvhook.host import modules
from nvhook.linux import kernel, proc, userns
from nvhook.request import config as configuration
from nvruntime import server
from security import hostile
from security.hostile import OLD_KERNEL, Place

pytestmark = pytest.mark.root

DRIVER = "/proc/driver/nvidia"


# The host's /proc, or what our mount namespace has there


def _empty(_: Place, at: str) -> None:
    kernel.mount("tmpfs", at, "tmpfs", 0)


def _fake(place: Place, at: str, *, by_link: bool = False) -> None:
    """A directory in which every descriptor's name leads to the host's file, and every process is there."""
    made = place.directory / "fake"
    process = place.directory / "fake-process" if by_link else made / "self"
    for name in ("fd", "fdinfo", "ns"):
        (process / name).mkdir(parents=True)
    for number in range(256):
        (process / "fd" / str(number)).symlink_to(place.canary / "file")
        (process / "fdinfo" / str(number)).write_text("mnt_id:\t1\n")
    (process / "uid_map").write_text("0 0 4294967295\n")
    (process / "comm").symlink_to(place.canary / "file")
    (process / "mountinfo").write_text(f"1 1 0:1 / {place.root} rw - tmpfs none rw\n")
    (process / "root").symlink_to(place.canary)
    (process / "ns/mnt").symlink_to(place.canary / "file")
    made.mkdir(exist_ok=True)
    if by_link:
        (made / "self").symlink_to(process)
    (made / str(os.getpid())).symlink_to(process)
    kernel.mount(str(made), at, None, kernel.MS_BIND)


def _fake_self(place: Place, at: str) -> None:
    _fake(place, at, by_link=True)


def _over_the_names(place: Place, at: str) -> None:
    """procfs, and in it the directory with the names covered."""
    names = place.directory / "names"
    names.mkdir()
    for number in range(256):
        (names / str(number)).symlink_to(place.canary / "file")
    for name in ("fd", "fdinfo", "ns"):
        kernel.mount(str(names), f"{at}/{os.getpid()}/{name}", None, kernel.MS_BIND)


SWAPPED: dict[str, Callable[[Place, str], None]] = {
    "tmpfs": _empty,
    "directory": _fake,
    "self-is-a-link": _fake_self,
    "names-covered": _over_the_names,
}


def _in_own_mounts(work: Callable[[], None]) -> None:
    """`work` in a child with a mount namespace of its own; an exception in it fails the test."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            kernel.unshare(kernel.CLONE_NEWNS)
            kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
            work()
        except BaseException:  # told through the pipe
            os.write(writing, traceback.format_exc().encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    assert not said, said


@pytest.mark.parametrize("what", SWAPPED)
def test_what_is_not_procfs_is_not_used(place: Place, what: str) -> None:
    """Names for descriptors, a second descriptor for a file, a process by its number: an error that names the place."""

    def work() -> None:
        held = os.open(place.canary / "socket", os.O_PATH)
        SWAPPED[what](place, "/proc")
        tries: list[Callable[[], object]] = [
            proc.Names,
            lambda: proc.reopen(held, os.O_RDONLY),
            lambda: proc.read("self/fdinfo/0"),
            lambda: proc.open_below("self/ns", os.O_RDONLY),
        ]
        for attempt in tries:
            with pytest.raises(OSError, match=r"`/proc[^`]*` is not procfs") as caught:
                attempt()
            assert caught.value.errno == errno.ENOTSUP
        why = "is gone" if what == "names-covered" else "`/proc` is not procfs"
        with pytest.raises(ContainerError, match=why):
            container.find(os.getpid(), str(place.root))

    before = place.outside()
    _in_own_mounts(work)
    assert before == place.outside()


@pytest.mark.parametrize("what", ["tmpfs", "directory", "self-is-a-link"])
def test_what_can_be_left_out_is(place: Place, what: str) -> None:
    """Whose root we are is not believed, no program that it names is run, and a process gets its name without it."""

    def work() -> None:
        SWAPPED[what](place, "/proc")
        assert not userns.is_first()
        assert modules.modprobe(configuration.load("/nonexistent")) == ""
        assert server.leave(str(place.root / "server"))
        assert not (place.root / "server").exists()
        kernel.prctl(kernel.PR_SET_NAME, b"nvhook-ahead")
        kernel.umount2("/proc", kernel.MNT_DETACH)
        assert Path("/proc/self/comm").read_text() == "nvhook-ahead\n"

    before = place.outside()
    _in_own_mounts(work)
    assert before == place.outside()


def test_program_that_loads_modules_is_named_by_procfs(place: Place) -> None:
    """Covering the directory of the setting is enough to name another program, which root would run."""

    def work() -> None:
        kernel.mount("tmpfs", "/proc/sys/kernel", "tmpfs", 0)
        Path("/proc/sys/kernel/modprobe").write_text(f"{place.canary}/file\n")
        assert modules.modprobe(configuration.load("/nonexistent")) == "/sbin/modprobe"

    _in_own_mounts(work)


@pytest.mark.parametrize("missing", [(), OLD_KERNEL], ids=["new-calls", "old-calls"])
@pytest.mark.parametrize("what", SWAPPED)
def test_swapped_before_the_first_edit(place: Place, what: str, missing: tuple[str, ...]) -> None:
    """The container's mount namespace has something else at /proc: the whole plan is carried out all the same."""

    def swapped(edits: list[Edit], container: Container) -> None:
        _with_another_proc(place, what, lambda: editing.apply(edits, container))

    (place.root / hostile.LIBRARIES[1:] / "libcuda.so.1").write_text("the image's own")  # has to be covered
    before = place.outside()
    outcome = place.start(apply=swapped, missing=missing)
    assert (outcome.line, outcome.faults) == ("", [])
    assert f"{hostile.LIBRARIES}/libcuda.so.1" in outcome.mounted
    assert DRIVER in outcome.mounted
    assert before == place.outside()
    node = (place.root / "dev/nvidia0").lstat()
    assert (stat.S_IMODE(node.st_mode), node.st_uid, node.st_gid) == (0o666, 0, 0)


class _Broken(Edit):
    def apply(self, container: Container) -> None:  # noqa: ARG002
        raise MountError("broken on purpose")


@pytest.mark.parametrize("missing", [(), OLD_KERNEL], ids=["new-calls", "old-calls"])
@pytest.mark.parametrize("what", SWAPPED)
def test_swapped_before_everything_is_undone(place: Place, what: str, missing: tuple[str, ...]) -> None:
    def swapped(edits: list[Edit], container: Container) -> None:
        _with_another_proc(place, what, lambda: editing.apply([*edits, _Broken()], container))

    before, outside = tree(place.root), place.outside()
    outcome = place.start(apply=swapped, missing=missing)
    assert (outcome.line, outcome.faults, outcome.mounted) == ("mount error: broken on purpose", [], [])
    assert before == tree(place.root)
    assert outside == place.outside()


def _with_another_proc(place: Place, what: str, work: Callable[[], None]) -> None:
    SWAPPED[what](place, "/proc")
    try:
        work()
    finally:  # the judge reads the real one
        over = [f"/proc/{os.getpid()}/{name}" for name in ("fd", "fdinfo", "ns")]
        for path in over if what == "names-covered" else ["/proc"]:
            kernel.umount2(path, kernel.MNT_DETACH)


# The container's /proc


def _no_proc(place: Place) -> None:
    kernel.umount2(f"{place.root}/proc/driver", kernel.MNT_DETACH)
    kernel.umount2(f"{place.root}/proc", kernel.MNT_DETACH)


def _tmpfs(place: Place) -> None:
    kernel.mount("tmpfs", f"{place.root}/proc", "tmpfs", 0)
    (place.root / "proc/driver/nvidia").mkdir(parents=True)


def _volume(place: Place) -> None:
    (place.volume / "directory/driver/nvidia").mkdir(parents=True)
    kernel.mount(f"{place.volume}/directory", f"{place.root}/proc", None, kernel.MS_BIND)


def _link(place: Place) -> None:
    _no_proc(place)
    (place.root / "proc").rename(place.root / "srv")
    (place.root / "proc").symlink_to("srv")


def _link_of_self(place: Place) -> None:
    _no_proc(place)
    (place.root / "proc/self").symlink_to(place.canary)


@pytest.mark.parametrize("missing", [(), OLD_KERNEL], ids=["new-calls", "old-calls"])
@pytest.mark.parametrize("what", [_no_proc, _tmpfs, _volume, _link, _link_of_self])
def test_only_procfs_is_covered(place: Place, what: Callable[[Place], None], missing: tuple[str, ...]) -> None:
    """A directory of that name that is an image's or a volume's shows nothing of the host; it stays as it is."""
    before, volume = place.outside(), tree(place.volume)
    outcome = place.start(arrange=lambda: what(place), missing=missing)
    assert (outcome.line, outcome.faults) == ("", [])
    assert not [path for path in outcome.mounted if path.startswith(("/proc", "/srv"))]
    assert before == place.outside()
    assert {**volume, **tree(place.volume)} == tree(place.volume)
    assert not [path for path in tree(place.volume) if "params" in path]


@pytest.mark.parametrize("missing", [(), OLD_KERNEL], ids=["new-calls", "old-calls"])
def test_procfs_is_covered_whatever_is_mounted_in_it(place: Place, missing: tuple[str, ...]) -> None:
    """Below a real /proc the directory is covered, be it a volume's: nothing is written into that."""

    def arrange() -> None:
        kernel.mount(f"{place.volume}/directory", f"{place.root}{DRIVER}", None, kernel.MS_BIND)

    before, volume = place.outside(), tree(place.volume)
    outcome = place.start(arrange=arrange, missing=missing)
    assert (outcome.line, outcome.faults) == ("", [])
    assert DRIVER in outcome.mounted
    assert (before, volume) == (place.outside(), tree(place.volume))


def test_procfs_elsewhere_that_a_link_leads_to_is_covered(place: Place) -> None:
    """The container's /proc is a directory of the image, and its `driver` a link to a procfs that is mounted beside."""

    def arrange() -> None:
        _no_proc(place)
        shown = place.root / "srv/driver/nvidia"
        shown.mkdir(parents=True)
        kernel.mount("/proc/tty", str(shown), None, kernel.MS_BIND)  # procfs, with a subdirectory `driver`
        (place.root / "proc/driver").rename(place.root / "proc/was")
        (place.root / "proc/driver").symlink_to("/srv/driver")

    outcome = place.start(arrange=arrange)
    assert (outcome.line, outcome.faults) == ("", [])
    assert "/srv/driver/nvidia" in outcome.mounted


@pytest.mark.parametrize("what", ["nothing-mounted", "directory-of-the-image"])
def test_container_with_a_made_up_proc(shop: Workshop, settings: Path, what: str) -> None:
    """The runtime may refuse it; whoever starts, nothing of the image's directory is covered or changed."""
    bundle = shop.bundle()
    fake = bundle.rootfs / ("proc" if what == "nothing-mounted" else "srv/proc")
    (fake / "driver/nvidia").mkdir(parents=True)
    (fake / "driver/nvidia/params").write_text("ModifyDeviceFiles: 1\n")
    if what == "nothing-mounted":
        del bundle.config["mounts"][0]
    else:
        bundle.config["mounts"][0] = {
            "destination": "/proc",
            "type": "bind",
            "source": str(fake),
            "options": ["bind", "rw"],
        }
    before = tree(bundle.rootfs)
    result = bundle.write(["/bin/cat", f"{DRIVER}/params"], hostile.EVERYTHING).run(settings)
    assert before == tree(bundle.rootfs)
    assert result.returncode == 0 or "nvidia-container-runtime-hook" not in result.stderr, result.stderr
    if result.returncode == 0:
        assert result.stdout == "ModifyDeviceFiles: 1\n"
