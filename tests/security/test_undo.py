# SPDX-License-Identifier: Apache-2.0
"""A failure at every edit in turn, in a real container: its tree and its mounts are as before, and so is the host.

The hook that runc starts is one that breaks the plan; everything else of it is the real one.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import containers
from containers import REPOSITORY, Bundle, Workshop, tree
from security import hostile
from security.hostile import LIBRARIES, Place

pytestmark = pytest.mark.root

_BREAKING_HOOK = f"""\
#!/usr/bin/python3 -IS
import os, sys

sys.path[:0] = [{str(REPOSITORY / "hook")!r}, {str(REPOSITORY / "tests")!r}]
sys.path.append({str(REPOSITORY / "hook/packages")!r})
from containers import tree
from nvhook.request import config, request, spec
from nvhook.container import container, edits
from nvhook import errors, hook, prestart
from nvhook.start import Start


class Broken(edits.Edit):
    def apply(self, container):
        raise errors.MountError("broken on purpose")


def break_at(number, real=edits.apply):
    def apply(wanted, container):
        real([*wanted[:number], Broken(), *wanted[number:]], container)

    edits.apply = apply
    return hook.main(["--config", sys.argv[1], "prestart"], "/nowhere")


def look(rootfs):
    names = sorted(os.listdir(rootfs))
    trees = [tree(os.path.join(rootfs, name)) for name in (*names, "proc/driver") if name not in ("proc", "sys")]
    with open("/proc/self/mountinfo") as file:
        return names, trees, file.read()


def break_at_every(output):
    '''In a child each: the sources of a plan are good for one application.'''
    state = spec.read_state(0)
    described = spec.parse(spec.read_config(state.bundle)[0], state.bundle)
    settings = config.load(sys.argv[1])
    number = count = 0
    while number <= count:
        child = os.fork()
        if child == 0:
            asked = request.read(described, settings, [])
            place = container.find(state.pid, described.rootfs)
            start = Start(settings, described, asked, "", [])
            start.choose()
            prestart.prepare(start, place.root)
            wanted = start.edits
            for edit in wanted:
                edit.prepare(settings, place.root, place)
            place.enter()
            before = look(place.rootfs)
            try:
                edits.apply([*wanted[:number], Broken(), *wanted[number:]], place)
                said = "no failure"
            except errors.MountError as error:
                said = str(error)
            after = look(place.rootfs)
            print(len(wanted), said, before == after, sep="; ", file=output, flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        output.seek(0)
        count = int(output.read().splitlines()[-1].partition(";")[0])
        number += 1


if sys.argv[2] == "every":
    with open(sys.argv[3], "w+") as output:
        break_at_every(output)
    sys.exit(0)
sys.exit(break_at(int(sys.argv[2])))
"""

PROC = "/proc/driver/nvidia"
HOST_PROC = f"mount -t tmpfs none /proc/driver\nmkdir -p {PROC}/gpus/0000:41:00.0\necho 1 >{PROC}/params"


def _bundle(shop: Workshop, settings: Path, *arguments: str, cache: str = "merged") -> Bundle:
    """An image in which there is something to cover, to replace and to put back, and a /proc with the driver's part."""
    bundle = shop.bundle()
    libraries = bundle.rootfs / LIBRARIES[1:]
    (libraries / "libcuda.so.1").symlink_to("libcuda.so.1.2.3")
    (libraries / "libnvidia-ml.so.1").write_text("the image's own")
    (bundle.rootfs / "usr/bin/nvidia-smi").write_text("the image's own")
    if cache == "of-ldconfig":
        os.utime(bundle.rootfs / "etc/ld.so.cache", (0, 0))
    bundle.through += containers.own_mounts(HOST_PROC)
    bundle.config["mounts"][0] = {"destination": "/proc", "type": "bind", "source": "/proc", "options": ["rbind"]}
    hook = shop.new("hook")
    hook.write_text(_BREAKING_HOOK)
    hook.chmod(0o755)
    args = ["hook", str(settings), *arguments]
    bundle.config["hooks"] = {"prestart": [{"path": str(hook), "args": args, "env": ["PATH=/usr/bin:/bin"]}]}
    return bundle.write(["/bin/true"], hostile.EVERYTHING)


def test_failure_at_every_edit(shop: Workshop, settings: Path) -> None:
    output = shop.new("output")
    bundle = _bundle(shop, settings, "every", str(output))
    place = Place(shop.new("place"), settings, bundle.rootfs)
    before, outside = tree(bundle.rootfs), place.outside()
    result = bundle.run(None, wrapper=Path("runc"))
    assert result.returncode == 0, result.stderr
    lines = output.read_text().splitlines()
    count = len(lines) - 1
    assert count > 100
    assert set(lines) == {f"{count}; mount error: broken on purpose; True"}
    assert before == tree(bundle.rootfs)
    assert outside == place.outside()


@pytest.mark.parametrize("cache", ["merged", "of-ldconfig"])
@pytest.mark.parametrize("number", [0, 8, 75, 1000])
def test_failure_of_a_start(shop: Workshop, settings: Path, number: int, cache: str) -> None:
    """The runtime is told by one line, and the host has nothing of the container left."""
    bundle = _bundle(shop, settings, str(number), cache=cache)
    place = Place(shop.new("place"), settings, bundle.rootfs)
    before, outside, mounts = tree(bundle.rootfs), place.outside(), Path("/proc/self/mountinfo").read_text()
    result = bundle.run(None, wrapper=Path("runc"))
    assert result.returncode == 1
    assert "nvidia-container-runtime-hook: mount error: broken on purpose" in result.stderr
    assert before == tree(bundle.rootfs)
    assert outside == place.outside()
    assert mounts == Path("/proc/self/mountinfo").read_text()
