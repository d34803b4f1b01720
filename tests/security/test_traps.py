# SPDX-License-Identifier: Apache-2.0
"""Whatever an image has in the place of a file, a node, a link, or of a directory above: nothing happens outside.

Every trap in every place that the plan of a workstation comes through, by all kinds of edit at once. The effect stays
below the root filesystem, or the start fails with a line that names the place and takes everything back.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from containers import Workshop, tree
from nvhook.container.edits import Edit
from nvhook.linux import kernel
from security import hostile
from security.hostile import LIBRARIES, MS_SHARED, OLD_KERNEL, VERSION, Place

pytestmark = pytest.mark.root

# What the plan makes: an edit of each kind -> what is at its place, as a name of something in the canary.
PLACES = {
    f"{LIBRARIES}/libcuda.so.{VERSION}": "file",
    f"{LIBRARIES}/libcuda.so.1": "file",
    f"{LIBRARIES}/gbm/nvidia-drm_gbm.so": "file",
    "/usr/bin/nvidia-smi": "file",
    f"/lib/firmware/nvidia/{VERSION}/gsp_ga10x.bin": "file",
    "/etc/vulkan/icd.d/nvidia_icd.json": "file",
    "/usr/lib/nvidia/nvidia_drv.so": "file",
    "/run/nvidia-persistenced/socket": "socket",
    "/tmp/nvidia-mps": "directory",
    "/dev/nvidia0": "node",
    "/dev/dri/renderD129": "node",
    "/dev/dri/by-path/pci-0000:01:00.0-card": "file",
    "/proc/driver/nvidia": "directory",
    "/proc/driver/nvidia/params": "file",
    "/proc/driver/nvidia/gpus/0000:01:00.0": "directory",
    "/etc/nvidia/nvidia-application-profiles-rc.d": "directory",
    "/etc/nvidia/nvidia-application-profiles-rc.d/10-container.conf": "file",
    "/etc/ld.so.cache": "file",
}
# What we make beside such a place for a moment, and rename.
BESIDE = {f"{LIBRARIES}/.libcuda.so.1.nvhook": "file", "/etc/.ld.so.cache.nvhook": "file"}
ABOVE = sorted({str(above) for path in PLACES for above in Path(path).parents} - {"/", *PLACES})
ALL = {**PLACES, **BESIDE, **dict.fromkeys(ABOVE, "directory")}

# A link's target: `{canary}` is a directory of the host's, `{kind}` what of it is of the type that is expected there.
LINKS = {
    "link": "{canary}/{kind}",
    "link-relative": "../../../../../../../../../../../../..{canary}/{kind}",
    "link-to-another-type": "{canary}/{other}",
    "link-dangling": "{canary}/new",
    "link-loop": "{name}",
    "link-dots": "../../../../../../../../../../../../..",
    "link-proc-root": "/proc/self/root{canary}/{kind}",
    "link-proc-1": "/proc/1/root{canary}/{kind}",
    "link-cwd": "/proc/self/cwd/canary/{kind}",
    "link-to-a-device": "/dev/null",
    "link-to-the-node": "{canary}/node",
}


def _node(major: int, minor: int) -> Callable[[Place, Path], None]:
    return lambda _, path: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(major, minor))


THINGS: dict[str, Callable[[Place, Path], None]] = {
    "file": lambda _, path: path.touch(),
    "directory": lambda _, path: path.mkdir(),
    "fifo": lambda _, path: os.mkfifo(path),
    "socket": lambda _, path: hostile.make_socket(path),
    "the-node": _node(195, 0),
    "another-node": _node(1, 3),
    "hard-link": lambda place, path: os.link(place.canary / "file", path),
    "hard-link-to-a-node": lambda place, path: os.link(place.canary / "node", path),
}


def _clear(path: Path) -> None:
    """The place is free; what the image had there is beside it, and its parents are there."""
    if os.path.lexists(path):
        path.rename(path.with_name(f"{path.name}.was"))
    path.parent.mkdir(parents=True, exist_ok=True)


def _set(place: Place, where: str, trap: str) -> None:
    path = place.root / where[1:]
    kind = ALL[where]
    _clear(path)
    if trap in THINGS:
        THINGS[trap](place, path)
        return
    other = "file" if kind == "directory" else "directory"
    path.symlink_to(LINKS[trap].format(canary=place.canary, kind=kind, other=other, name=path.name))


def _check(place: Place, outcome: hostile.Outcome, where: str, before: dict[str, str]) -> None:
    assert outcome.faults == []
    if outcome.line:
        named = re.findall(r"`([^`]*)`", outcome.line)
        is_named = any(f"{path}/".startswith(f"{where}/") for path in named)
        assert is_named or os.path.basename(where) in named, outcome.line
        assert "\n" not in outcome.line
        assert outcome.mounted == []
        assert before == tree(place.root)


@pytest.mark.parametrize("trap", [*LINKS, *THINGS])
@pytest.mark.parametrize("where", ALL)
def test_trap(place: Place, where: str, trap: str) -> None:
    (place.root / LIBRARIES[1:] / "libcuda.so.1").symlink_to("libcuda.so.1.2.3")  # to be replaced
    _set(place, where, trap)
    before, outside = tree(place.root), place.outside()
    outcome = place.start()
    assert outside == place.outside()
    _check(place, outcome, where, before)


@pytest.mark.parametrize("trap", ["link", "link-dots", "link-proc-root", "fifo", "the-node", "hard-link"])
@pytest.mark.parametrize("where", PLACES)
def test_trap_on_an_old_kernel(place: Place, where: str, trap: str) -> None:
    _set(place, where, trap)
    before, outside = tree(place.root), place.outside()
    outcome = place.start(missing=OLD_KERNEL)
    assert outside == place.outside()
    _check(place, outcome, where, before)


def test_whole_plan_without_a_trap(place: Place) -> None:
    """What the traps above are set for is there, and the judge sees nothing wrong with it."""
    (place.root / "proc/driver/nvidia/gpus/0000:01:00.0").mkdir()

    def watch(edits: list[Edit]) -> None:
        plan = [edit.describe() for edit in edits]
        planned = {str(item.get("path", item.get("destination", "/etc/ld.so.cache"))) for item in plan}
        assert set(PLACES) <= planned

    before = place.outside()
    for missing in ((), OLD_KERNEL):
        outcome = place.start(watch=watch, missing=missing)
        assert (outcome.line, outcome.faults) == ("", [])
        assert len(outcome.mounted) > 60
    assert before == place.outside()


@pytest.mark.parametrize("where", [*(path for path in ALL if path not in BESIDE)])
def test_link_that_leads_inside(place: Place, where: str) -> None:
    """The image has, where the link would lead on the host, something of its own: that alone is meant."""
    mirrored = place.root / str(place.canary)[1:]
    mirrored.parent.mkdir(parents=True)
    shutil.copytree(place.canary, mirrored, ignore=lambda *_: ["socket", "node"])
    _set(place, where, "link")
    before, outside = tree(place.root), place.outside()
    outcome = place.start()
    assert outside == place.outside()
    _check(place, outcome, where, before)


@pytest.mark.parametrize("sharing", ["private", "shared"])
@pytest.mark.parametrize("where", [*(path for path in ALL if path not in BESIDE)])
def test_mount_point(place: Place, where: str, sharing: str) -> None:
    """A volume of the host's. What is made in it is gone with a failure; what is mounted on it is in no peer of it."""
    kind = "directory" if ALL[where] == "directory" else "file"
    path = place.root / where[1:]
    _clear(path)
    path.mkdir() if kind == "directory" else path.touch()

    def volume() -> None:
        if sharing == "shared":
            kernel.mount(str(place.volume), str(place.volume), None, kernel.MS_BIND)
            kernel.mount("none", str(place.volume), None, MS_SHARED)
        kernel.mount(str(place.volume / kind), str(path), None, kernel.MS_BIND)

    before, outside, empty = tree(place.root), place.outside(), tree(place.volume)
    outcome = place.start(arrange=volume)
    assert outside == place.outside()
    _check(place, outcome, where, before)
    if outcome.line:
        assert empty == tree(place.volume)


# Through the wrapper and runc


@pytest.mark.parametrize(
    ("where", "trap", "starts"),
    [
        (f"{LIBRARIES}/libcuda.so.{VERSION}", "link", False),
        (f"{LIBRARIES}/libcuda.so.1", "link-proc-root", True),
        (f"{LIBRARIES}/gbm", "link-relative", False),
        ("/usr/bin/nvidia-smi", "link-to-a-device", False),
        (f"/lib/firmware/nvidia/{VERSION}", "link", False),
        ("/etc/nvidia", "link-dots", True),
        ("/run/nvidia-persistenced/socket", "hard-link", True),
        ("/run", "link", False),
        ("/tmp/nvidia-mps", "link", False),
        ("/etc/ld.so.cache", "fifo", False),
    ],
)
def test_trap_in_a_container(shop: Workshop, settings: Path, where: str, trap: str, starts: bool) -> None:
    bundle = shop.bundle()
    place = Place(shop.new("place"), settings, bundle.rootfs)
    _set(place, where, trap)
    before, outside, mounts = tree(place.root), place.outside(), Path("/proc/self/mountinfo").read_text()
    result = bundle.write(["/bin/cat", "/proc/self/mountinfo"], hostile.EVERYTHING).run(settings)
    assert (result.returncode == 0) == starts, result.stderr
    assert outside == place.outside()
    assert before == tree(place.root)
    assert mounts == Path("/proc/self/mountinfo").read_text()
    if starts:
        assert result.stdout.count(f"{LIBRARIES}/lib") > 30
    else:
        assert f"`{where}" in result.stderr


# The judge


@pytest.mark.parametrize(
    ("where", "trap"),
    [
        (f"{LIBRARIES}/libcuda.so.{VERSION}", "link"),
        (f"{LIBRARIES}/libcuda.so.{VERSION}", "link-dangling"),
        (f"/lib/firmware/nvidia/{VERSION}", "link"),
        ("/usr/bin", "link-relative"),
        ("/usr/lib", "link-proc-root"),
        ("/dev", "link"),
        ("/run/nvidia-persistenced/socket", "link"),
        ("/tmp/nvidia-mps", "link"),
    ],
)
def test_judge_sees_what_a_naive_program_does(place: Place, where: str, trap: str) -> None:
    _set(place, where, trap)
    outside = place.outside()
    outcome = place.start(apply=hostile.naive)
    assert outcome.faults or outside != place.outside()
