# SPDX-License-Identifier: Apache-2.0
"""/dev of an image, or something below it, is not what a runtime expects there.

CVE-2026-41579 of runc and CVE-2026-47766 of crun: device nodes and links were made wherever an image's /dev led. A
runtime of a distribution may still have that fault, so the hook is called on its own as well, with a root filesystem
whose /dev is a link.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import containers
from conftest import cannot
from containers import HOOK, Workshop, tree
from nvhook.linux import kernel
from security import hostile
from security.hostile import OLD_KERNEL, Place

pytestmark = pytest.mark.root

WITH_CHANNELS = {**hostile.EVERYTHING, "NVIDIA_IMEX_CHANNELS": "0,1"}

# Where an image has a trap -> a node or link of the plan that is there or below, and what the trap should have been.
# Those of nvidia-caps are planned on a host with MIG and IMEX channels, the others on a workstation.
PLACES = {
    "/dev": ("/dev/nvidia0", "directory"),
    "/dev/char": ("/dev/nvidia0", "directory"),  # systemd's links are there, and none in a container
    "/dev/nvidia0": ("/dev/nvidia0", "node"),
    "/dev/nvidiactl": ("/dev/nvidiactl", "node"),
    "/dev/dri": ("/dev/dri/renderD129", "directory"),
    "/dev/dri/by-path": ("/dev/dri/by-path/pci-0000:01:00.0-card", "directory"),
    "/dev/dri/by-path/pci-0000:01:00.0-card": ("/dev/dri/by-path/pci-0000:01:00.0-card", "file"),
    "/dev/nvidia-caps": ("/dev/nvidia-caps/nvidia-cap3", "directory"),
    "/dev/nvidia-caps/nvidia-cap3": ("/dev/nvidia-caps/nvidia-cap3", "node"),
    "/dev/nvidia-caps-imex-channels": ("/dev/nvidia-caps-imex-channels/channel0", "directory"),
    "/dev/nvidia-caps-imex-channels/channel1": ("/dev/nvidia-caps-imex-channels/channel1", "node"),
}


def _link(target: str) -> Callable[[Place, Path, str], None]:
    return lambda place, path, kind: path.symlink_to(target.format(canary=place.canary, kind=kind))


def _node(type_: int, major: int, minor: int) -> Callable[[Place, Path, str], None]:
    return lambda _, path, __: os.mknod(path, type_ | 0o666, os.makedev(major, minor))


TRAPS: dict[str, Callable[[Place, Path, str], None]] = {
    "absolute": _link("{canary}/{kind}"),
    "relative": _link("../../../../../../../../../../../../..{canary}/{kind}"),
    "dangling": _link("{canary}/new"),
    "to-the-directory": _link("{canary}/directory"),
    "to-a-volume": _link("/srv/volume/{kind}"),
    "proc-self-root": _link("/proc/self/root{canary}/{kind}"),
    "proc-1-root": _link("/proc/1/root{canary}/{kind}"),
    "dots": _link("../../../../../../../../../../../../.."),
    "file": lambda _, path, __: path.touch(),
    "fifo": lambda _, path, __: os.mkfifo(path),
    "socket": lambda _, path, __: hostile.make_socket(path),
    "another-node": _node(stat.S_IFCHR, 1, 3),
    "block-node": _node(stat.S_IFBLK, 195, 0),
    "hard-link": lambda place, path, _: os.link(place.canary / "node", path),
}


@pytest.fixture
def place_of(settings: Path, mig_settings: Path, tmp_path: Path) -> Callable[[str], Place]:
    def make(where: str) -> Place:
        if not where.startswith("/dev/nvidia-caps"):
            return Place(tmp_path, settings)
        place = Place(tmp_path, mig_settings)
        place.env = WITH_CHANNELS
        return place

    return make


def _set(place: Place, where: str, trap: str, dev: Path | None = None) -> None:
    """`dev` is what the container has as /dev, if that is not the image's."""
    path = (dev or place.root / "dev") / os.path.relpath(where, "/dev")
    if path.is_dir():
        path.rename(path.with_name(f"{path.name}.was"))
    path.parent.mkdir(parents=True, exist_ok=True)
    TRAPS[trap](place, path, PLACES[where][1])


def _check(place: Place, outcome: hostile.Outcome, where: str, before: dict[str, str]) -> None:
    assert outcome.faults == []
    if outcome.line:
        named = re.findall(r"`(/dev[^`]*)`", outcome.line)
        assert any(f"{path}/".startswith(f"{where}/") for path in named), outcome.line
        assert outcome.mounted == []
        assert before == tree(place.root)


@pytest.mark.parametrize("calls", ["new-calls", "old-calls"])
@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("where", PLACES)
def test_trap(place_of: Callable[[str], Place], where: str, trap: str, calls: str) -> None:
    """Nothing is made or changed outside: the effect stays below the root, or the start fails and names the place."""
    place = place_of(where)
    _set(place, where, trap)
    volume = place.root / "srv/volume"
    (volume / "directory").mkdir(parents=True)
    before, outside, empty = tree(place.root), place.outside(), tree(place.volume)
    outcome = place.start(
        arrange=lambda: kernel.mount(str(place.volume), str(volume), None, kernel.MS_BIND),
        missing=OLD_KERNEL if calls == "old-calls" else (),
    )
    assert outside == place.outside()
    _check(place, outcome, where, before)
    if outcome.line:
        assert empty == tree(place.volume)


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("where", [path for path in PLACES if path != "/dev"])
def test_trap_in_a_mounted_dev(place_of: Callable[[str], Place], where: str, trap: str) -> None:
    """config.json binds a directory of the host, or of a volume, on /dev; who filled it is no friend either."""
    place = place_of(where)
    dev = place.volume / "dev"
    dev.mkdir()
    _set(place, where, trap, dev)
    before, outside, filled = tree(place.root), place.outside(), tree(dev)
    outcome = place.start(arrange=lambda: kernel.mount(str(dev), str(place.root / "dev"), None, kernel.MS_BIND))
    assert outside == place.outside()
    _check(place, outcome, where, before)
    if outcome.line:
        assert filled == tree(dev)
    else:
        # A link where ours has to be is replaced, and given back when the container is deleted.
        replaced = {str(dev / os.path.relpath(where, "/dev"))} if PLACES[where][1] == "file" else set()
        assert {path: tree(dev).get(path) for path in filled.keys() - replaced} == {
            path: facts for path, facts in filled.items() if path not in replaced
        }


def test_plan_has_what_the_traps_are_set_for(place_of: Callable[[str], Place]) -> None:
    for where, (made, _) in PLACES.items():
        place = place_of(where)
        outcome = place.start()
        assert (outcome.line, outcome.faults) == ("", [])
        assert os.path.lexists(place.root / made[1:])
        shutil.rmtree(place.directory)
        place.directory.mkdir()


# The hook on its own


@contextmanager
def _process(root: Path) -> Iterator[int]:
    """One with a mount namespace in which `root` is mounted, as a runtime's is when it calls a prestart hook."""
    script = 'mount --bind "$0" "$0"; echo; exec sleep 600'
    words = ["unshare", "--mount", "--propagation", "private", "sh", "-euc", script, str(root)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"\n"
            yield process.pid
        finally:
            process.kill()


def _call_hook(place: Place, shop: Workshop, pid: int) -> subprocess.CompletedProcess[str]:
    """As the runtime does, whatever the runtime would have made of that /dev before."""
    bundle = containers.Bundle(shop.new("bundle"), place.root).write(["/bin/true"], place.env)
    state = {"ociVersion": "1.0.2", "id": bundle.id, "pid": pid, "status": "created", "bundle": str(bundle.directory)}
    words = [str(HOOK), "--config", str(place.settings), "prestart"]
    return subprocess.run(
        words, input=json.dumps(state), env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("where", "trap", "starts"),
    [
        ("/dev", "absolute", False),
        ("/dev", "relative", False),
        ("/dev", "dangling", False),
        ("/dev", "proc-self-root", False),
        ("/dev", "dots", True),  # the root filesystem itself: /nvidia0
        ("/dev/char", "absolute", True),
        ("/dev/dri", "absolute", False),
        ("/dev/nvidia0", "absolute", False),
        ("/dev/nvidia0", "another-node", False),
        ("/dev/nvidiactl", "fifo", False),
        ("/dev/nvidia-caps", "relative", False),
        ("/dev/nvidia-caps-imex-channels", "proc-1-root", False),
    ],
)
def test_hook_is_called_with_such_a_root_filesystem(
    place_of: Callable[[str], Place], shop: Workshop, where: str, trap: str, starts: bool
) -> None:
    place = place_of(where)
    _set(place, where, trap)
    before, outside = tree(place.root), place.outside()
    with _process(place.root) as pid:
        done = _call_hook(place, shop, pid)
        assert (done.returncode == 0) == starts, done.stderr
        assert outside == place.outside()
        if starts:
            there = place.root / ("" if trap == "dots" else "dev") / "nvidia0"
            assert there.lstat().st_rdev == os.makedev(195, 0)
        else:
            assert f"`{where}" in done.stderr
            assert before == tree(place.root)


# Through the wrapper and a runtime


@pytest.fixture(params=["runc", "crun"])
def runtime(request: pytest.FixtureRequest) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """(name, hierarchy, options): under which it starts a container on this machine."""
    name = str(request.param)
    try:
        if name == "crun":
            return name, *containers.way_of_crun()
        return name, containers.any_cgroups(), ()
    except LookupError as error:
        cannot(str(error))


@pytest.mark.parametrize("mounted", ["tmpfs", "nothing", "volume"])
@pytest.mark.parametrize(
    ("where", "trap"),
    [
        ("/dev/nvidia0", "absolute"),
        ("/dev/nvidiactl", "another-node"),
        ("/dev/dri", "relative"),
        ("/dev/dri", "file"),
        ("/dev/char", "absolute"),
        ("/dev/nvidia-caps", "dangling"),
        ("/dev/nvidia-caps-imex-channels", "proc-self-root"),
    ],
)
def test_container(
    settings: Path,
    mig_settings: Path,
    shop: Workshop,
    runtime: tuple[str, tuple[str, ...], tuple[str, ...]],
    where: str,
    trap: str,
    mounted: str,
) -> None:
    """A tmpfs on /dev hides the trap; without any mount there the image's own /dev is the container's."""
    has_caps = where.startswith("/dev/nvidia-caps")
    given = mig_settings if has_caps else settings
    name, hierarchy, options = runtime
    bundle = shop.bundle()
    bundle.through = hierarchy
    place = Place(shop.new("place"), given, bundle.rootfs)
    dev = place.volume / "dev" if mounted == "volume" else bundle.rootfs / "dev"
    dev.mkdir(exist_ok=True)
    _set(place, where, trap, dev)
    del bundle.config["mounts"][1 if mounted == "nothing" else 3 :]
    if mounted == "volume":
        for minor, node in ((3, "null"), (5, "zero")):  # no runtime makes them in a directory that is bound
            os.mknod(dev / node, stat.S_IFCHR | 0o666, os.makedev(1, minor))
        bundle.config["mounts"][1] = {
            "destination": "/dev",
            "type": "bind",
            "source": str(dev),
            "options": ["rbind", "rw"],
        }
    config = shop.new("config.toml")
    config.write_text(given.read_text().replace('runtimes = ["runc"]', f'runtimes = ["{name}"]'))
    outside = place.outside()
    bundle.write(["/bin/ls", "-l", "/dev"], WITH_CHANNELS if has_caps else hostile.EVERYTHING)
    result = bundle.run(config, runtime=name, options=options)
    assert outside == place.outside()
    hides = mounted == "tmpfs" or where == "/dev/char"
    if hides:
        assert result.returncode == 0, result.stderr
    if result.returncode:
        # crun shows nothing of what a hook says.
        assert ("error executing hook" if name == "crun" else f"`{where}") in result.stderr, result.stderr
        assert not any(path.name.startswith("nvidia-uvm") for path in dev.iterdir())
    else:
        assert "nvidia-uvm" in result.stdout
