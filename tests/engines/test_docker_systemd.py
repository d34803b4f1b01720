# SPDX-License-Identifier: Apache-2.0
"""Docker as a service of systemd, which manages its containers' control groups: reloads, restarts, another driver."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from booted import HOST, Booted
from booted import missing as missing_for_systemd
from conftest import HOSTS, cannot
from containers import TRY, Workshop, gpu_lines, make_image
from engines.machine import missing
from simhost.build import build

pytestmark = [pytest.mark.root, pytest.mark.engines]

NAME = "a100x2"
OLD, NEW = "550.163.01", "570.86.15"
BOTH = gpu_lines(NAME, 0, 1)
NODES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm")
OPEN = "".join(f"{node} open\n" for node in NODES)
LOOK = TRY + "\n".join([*(f"try {node}" for node in NODES), "nvidia-smi -L"])
SETTINGS = {
    "bridge": "none",
    "exec-opts": ["native.cgroupdriver=systemd"],
    "ip-forward": False,  # /proc/sys is read-only in there, and a machine that forwards nothing would fail
    "ip6tables": False,
    "iptables": False,
    "live-restore": True,
    "storage-driver": "overlay2",
}


@pytest.fixture(scope="module")
def machine(shop: Workshop) -> Iterator[Booted]:
    """With an image `debian`."""
    if reason := missing_for_systemd() or missing(("dockerd", "docker", "containerd")):
        cannot(reason)
    host, _ = shop.copy_of(NAME)
    place = shop.new("machine")
    place.mkdir()
    make_image("debian", shop.place / "image")
    try:
        booted = Booted(place, host, shop.place)
    except (RuntimeError, TimeoutError) as error:
        cannot(str(error))
    try:
        # Their own file systems: an overlay cannot be the upper directory of another.
        for name in ("docker", "containerd"):
            booted.shell(f"mkdir -p /var/lib/{name} /etc/{name}; mount -t tmpfs tmpfs /var/lib/{name}")
        booted.shell(f"cat >/etc/docker/daemon.json <<'.'\n{json.dumps(SETTINGS)}\n.")
        booted.here("nvhook", "configure", "docker")
        booted.here("systemctl", "start", "docker.service")
        booted.shell(f"tar -C {shop.place}/image -c . | docker import - debian")
        yield booted
    finally:
        booted.end()


WAYS = {"runtime": ("--runtime=nvidia", "--env=NVIDIA_VISIBLE_DEVICES=all"), "gpus": ("--gpus=all",)}


@pytest.fixture(params=list(WAYS))
def living(machine: Booted, request: pytest.FixtureRequest) -> Iterator[str]:
    """A container with both GPUs, on a host whose driver's nodes have no links yet."""
    machine.shell("rm -f /dev/char/*")
    options = ("--detach", "--network=none", *WAYS[request.param])
    name = machine.here("docker", "run", *options, "debian", "/bin/sleep", "600").strip()
    yield name
    machine.call("docker", "rm", "--force", name)


def _look(machine: Booted, name: str) -> str:
    return machine.here("docker", "exec", name, "/bin/sh", "-c", LOOK)


@pytest.mark.parametrize(
    "acts",
    [
        pytest.param(["systemctl daemon-reload"], id="reload"),
        pytest.param(["systemctl daemon-reexec"], id="reexec"),
        pytest.param(["systemctl restart docker.service", "systemctl daemon-reload"], id="engine-restarted"),
        pytest.param(["docker restart --time 0 $name", "systemctl daemon-reload"], id="container-restarted"),
        pytest.param(["docker update --pids-limit 100 $name", "systemctl daemon-reload"], id="updated"),
        pytest.param(["systemctl restart nvhook-refresh.service"], id="refreshed"),
    ],
)
def test_gpus_stay(machine: Booted, living: str, acts: list[str]) -> None:
    assert _look(machine, living) == OPEN + BOTH
    for act in acts:
        machine.shell(f"name={living}; {act}")
    assert _look(machine, living) == OPEN + BOTH


@pytest.fixture
def exchange(machine: Booted, shop: Workshop) -> Iterator[Callable[[], None]]:
    """To be called once: driver NEW in the place of OLD."""
    (description,) = HOSTS.glob(f"{NAME}*.json")
    newer = shop.new("newer")
    build(json.loads(description.read_text().replace(OLD, NEW)), newer)

    def put(source: Path, other: str) -> None:
        for name in ("driver", "proc"):
            command = ["cp", "-a", "--remove-destination", f"{source}/{name}/.", f"{machine.host}/{name}"]
            subprocess.run(command, check=True)
        for path in list((machine.host / "driver").rglob(f"*{other}*")):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        machine.shell(f"cat {HOST}/proc/driver/nvidia/version >/proc/driver/nvidia/version")

    yield lambda: put(newer, OLD)
    put(shop.simhost(NAME), NEW)


def test_another_driver(machine: Booted, living: str, exchange: Callable[[], None]) -> None:
    """The container keeps the files of the old one until it is started again."""
    exchange()
    libraries = ("docker", "exec", living, "/bin/sh", "-c", "cat /proc/self/mountinfo")
    before = machine.here(*libraries)
    assert (f"libcuda.so.{OLD}" in before, f"libcuda.so.{NEW}" in before) == (True, False)
    machine.here("docker", "restart", "--time", "0", living)
    after = machine.here(*libraries)
    assert (f"libcuda.so.{OLD}" in after, f"libcuda.so.{NEW}" in after) == (False, True)
    assert _look(machine, living) == OPEN + BOTH


def test_systemd_forgets_with_the_container(machine: Booted, living: str) -> None:
    script = f"find /run/systemd /etc/systemd -path '*docker-{living}.scope*'"
    assert machine.shell(script)
    machine.here("docker", "rm", "--force", living)
    assert machine.shell(script) == ""
