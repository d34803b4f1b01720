# SPDX-License-Identifier: Apache-2.0
"""LXC of the distribution, with the hook that it brings for NVIDIA's GPUs: that calls nvidia-container-cli."""

from __future__ import annotations

import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import HOSTS, cannot
from containers import gpu_lines, make_image, tree
from engines import machine
from engines.machine import PLACES
from simhost.build import build

pytestmark = [pytest.mark.root, pytest.mark.engines]

HOST = "a100x2"
HOOK = "/usr/share/lxc/hooks/nvidia"
FIRST_ID = 300000

# In a user namespace: the hook refuses every other container.
_CONFIGURATION = f"""\
lxc.rootfs.path = dir:{{place}}/rootfs
lxc.rootfs.mount = {{place}}/mount
lxc.uts.name = container
lxc.idmap = u 0 {FIRST_ID} 65536
lxc.idmap = g 0 {FIRST_ID} 65536
lxc.net.0.type = empty
lxc.mount.auto = proc:mixed sys:ro
lxc.autodev = 1
lxc.apparmor.profile = unconfined
lxc.cgroup.dir.monitor = {{name}}/monitor
lxc.cgroup.dir.monitor.pivot = {{name}}/pivot
lxc.cgroup.dir.container = {{name}}/container
lxc.hook.version = 1
lxc.hook.mount = {HOOK}
lxc.environment = NVIDIA_DRIVER_CAPABILITIES=compute,utility
lxc.init.cmd = /init
"""

# LXC asks newuidmap, which asks /etc/subuid.
_START = """
for file in subuid subgid; do mount --bind "$1/ids" /etc/$file; done
exec lxc-start --foreground --lxcpath "$1" --name container --rcfile "$1/config" --logfile "$1/log" --logpriority DEBUG
"""


class Lxc:
    """`place` holds the simulated host, nvhook's installation and the one container."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.rootfs = place / "rootfs"
        self.name = f"nvhook-lxc-{uuid.uuid4().hex[:8]}"
        place.chmod(0o755)  # root of a user namespace has to come through
        (description,) = HOSTS.glob(f"{HOST}*.json")
        build(description, place / "host")
        machine.install(place / "prefix", place / "host", place / "state")
        make_image("debian", self.rootfs)
        init = self.rootfs / "init"
        init.write_text("#!/bin/sh\n(nvidia-smi -L; ls /dev | grep nvidia | sort) >/root/shown 2>&1\n")
        init.chmod(0o755)
        (self.rootfs / "root/shown").touch()
        subprocess.run(["chown", "-R", f"{FIRST_ID}:{FIRST_ID}", str(self.rootfs)], check=True)
        (place / "mount").mkdir()
        (place / "ids").write_text(f"root:{FIRST_ID}:65536\n")

    def run(self, *env: str) -> tuple[str, str]:
        """(what the container shows, what LXC has in its log)."""
        text = _CONFIGURATION.format(place=self.place, name=self.name)
        (self.place / "config").write_text(text + "".join(f"lxc.environment = {item}\n" for item in env))
        (self.place / "log").unlink(missing_ok=True)
        (self.rootfs / "root/shown").write_text("")
        command = ["unshare", "--mount", "sh", "-euc", _START, "-", str(self.place)]
        path = f"{self.place}/prefix/bin:{PLACES}"
        subprocess.run(
            command, env={"PATH": path}, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
        )
        return (self.rootfs / "root/shown").read_text(), (self.place / "log").read_text(errors="replace")


@pytest.fixture(scope="module")
def lxc() -> Iterator[Lxc]:
    absent = machine.missing(["lxc-start", "newuidmap", "unshare"])
    if absent or not Path(HOOK).exists():
        cannot(f"not installed: {absent or HOOK}")
    with tempfile.TemporaryDirectory(prefix="nvhook-lxc-") as name:
        container = Lxc(Path(name))
        try:
            yield container
        finally:
            machine.remove_cgroups(container.name)


GIVEN = {
    "all": ("all", gpu_lines(HOST, 0, 1), "nvidia0 nvidia1"),
    "second": ("1", gpu_lines(HOST, 1), "nvidia0"),
    "none": ("none", "No devices found.\n", ""),
}


@pytest.mark.parametrize(("devices", "gpus", "nodes"), GIVEN.values(), ids=GIVEN)
def test_gpus(lxc: Lxc, devices: str, gpus: str, nodes: str) -> None:
    shown, log = lxc.run(f"NVIDIA_VISIBLE_DEVICES={devices}", "NVIDIA_REQUIRE_CUDA=cuda>=12.0")
    expected = ["nvidia-uvm", "nvidia-uvm-tools", *nodes.split(), "nvidiactl"]
    assert shown == gpus + "".join(f"{node}\n" for node in expected), log


FAILING = {
    "device": ("NVIDIA_VISIBLE_DEVICES=7", "device error: unknown device `7`; this host has"),
    "requirement": ("NVIDIA_REQUIRE_CUDA=cuda>=99.9", "requirement error: image needs `cuda>=99.9`"),
}


@pytest.mark.parametrize(("variable", "expected"), FAILING.values(), ids=FAILING)
def test_request_that_cannot_be_met(lxc: Lxc, variable: str, expected: str) -> None:
    before = tree(lxc.rootfs / "usr")
    logs = []
    for _ in range(40):  # LXC does not always read to the end what a hook has said, least on a busy machine
        shown, log = lxc.run("NVIDIA_VISIBLE_DEVICES=0", variable)
        assert shown == ""
        assert before == tree(lxc.rootfs / "usr")
        logs.append(log)
        if f"nvidia-container-cli: {expected}" in log:
            return
    raise AssertionError(logs[-1])
