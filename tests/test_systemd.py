# SPDX-License-Identifier: Apache-2.0
"""linux/systemd.py; and a systemd as a host has it: containers whose control groups it manages, the package's units."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from booted import HOST, PROC_OF_HOST, Booted, missing
from conftest import cannot
from containers import TRY, Workshop
from engines.machine import wait
from nvhook.linux import systemd

pytestmark = pytest.mark.root

NAME = "a100x2"
VERSION = "550.163.01"
WRAPPER = Path("/usr/bin/nvidia-container-runtime")
ALL = {"NVIDIA_VISIBLE_DEVICES": "all"}
NODES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm")
INVENTORY = "/run/nvhook/inventory.json"


@pytest.fixture(scope="module")
def machine(shop: Workshop) -> Iterator[Booted]:
    if reason := missing():
        cannot(reason)
    copy, _ = shop.copy_of(NAME)
    place = shop.new("machine")
    place.mkdir()
    try:
        booted = Booted(place, copy, shop.place)
    except (RuntimeError, TimeoutError) as error:
        cannot(str(error))
    yield booted
    booted.end()


# What it is told of a container that runs; engines/test_docker_systemd.py has containers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("0::/system.slice/docker-ab.scope\n", "docker-ab.scope", id="docker"),
        pytest.param("0::/machine.slice/libpod-ab.scope/container\n", "libpod-ab.scope", id="crun-below-its-scope"),
        pytest.param("9:devices:/x\n1:name=systemd:/system.slice/docker-ab.scope\n0::/\n", "docker-ab.scope", id="v1"),
        pytest.param("0::/docker/ab\n", "", id="no-systemd"),
        pytest.param("0::/system.slice/docker.service\n", "", id="service-of-the-engine"),
        pytest.param("9:devices:/a.scope\n0::/\n", "", id="only-called-so"),
        pytest.param("", "", id="nothing"),
        pytest.param("0", "", id="cut"),
    ],
)
def test_scope(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "cgroup").write_text(text)
    fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    try:
        assert systemd._scope(fd) == expected
    finally:
        os.close(fd)


TELL = """
import os, sys
sys.path[:0] = ["/usr/lib/nvhook"]
from nvhook.linux import cgroups, systemd
systemd.allow(os.open(sys.argv[1], os.O_PATH), [cgroups.Rule("c", 195, 0, "rw")])
"""


def test_scope_without_a_list_gets_none(machine: Booted) -> None:
    """With one systemd would refuse all other devices."""
    machine.here("/usr/bin/python3", "-IS", "-c", TELL, "/proc/1")
    shown = machine.here("systemctl", "show", "--property=DeviceAllow", "--property=DevicePolicy", "init.scope")
    assert shown == "DevicePolicy=auto\n"


# Containers whose control groups systemd manages


@pytest.fixture
def living(machine: Booted, shop: Workshop) -> Iterator[Callable[[], str]]:
    """A container with both GPUs that lives; asked, it says which nodes it can open."""
    bundle = shop.bundle("busybox").write(["/bin/sleep", "100"], ALL)
    bundle.through = machine.enter()
    bundle.config["linux"]["cgroupsPath"] = f"system.slice:nvhook:{bundle.id}"
    bundle.write()

    def look() -> str:
        if not (bundle.directory / "log").exists():
            words = ("--systemd-cgroup", "run", "--detach", "--bundle", str(bundle.directory), bundle.id)
            started = bundle.call(None, *words, wrapper=WRAPPER, output=bundle.directory / "log")
            assert started.returncode == 0, (bundle.directory / "log").read_text()
        script = TRY + "\n".join(f"try {node}" for node in NODES)
        return bundle.call(None, "exec", bundle.id, "sh", "-c", script, wrapper=WRAPPER).stdout

    yield look
    bundle.delete()


def _all(state: str) -> str:
    return "".join(f"{node} {state}\n" for node in NODES)


def test_gpus_stay_after_a_daemon_reload(machine: Booted, living: Callable[[], str]) -> None:
    """On a host whose driver's nodes have no links; nothing of ours has been started but this container."""
    machine.shell("rm -f /dev/char/* /dev/nvidia*")
    machine.configure("")
    assert living() == _all("open")
    machine.here("systemctl", "daemon-reload")
    assert living() == _all("open")
    machine.here("systemctl", "daemon-reexec")
    assert living() == _all("open")


def test_what_the_links_are_for(machine: Booted, living: Callable[[], str]) -> None:
    """`load-kmods = false` makes none."""
    if "runc version 1.1.5" not in machine.here("runc", "--version"):
        pytest.skip("a newer runc tells systemd of devices without links")
    machine.shell("rm -f /dev/char/*")
    machine.configure("nvidia-container-cli.load-kmods = false\n")
    assert living() == _all("open")
    machine.here("systemctl", "daemon-reload")
    assert living() == _all("denied")


# The units


@pytest.fixture
def watching(machine: Booted) -> Iterator[Booted]:
    machine.configure(PROC_OF_HOST)
    machine.shell(f"systemctl start nvhook-refresh.path; rm -f {INVENTORY} /dev/char/*")
    yield machine
    machine.shell("systemctl stop nvhook-refresh.path; systemctl reset-failed")


def _change_the_cache(machine: Booted) -> None:
    """As ldconfig does it: another file in its place."""
    machine.shell("cp /etc/ld.so.cache /etc/ld.so.cache~; mv /etc/ld.so.cache~ /etc/ld.so.cache")


def _is_over(machine: Booted) -> bool:
    return machine.call("systemctl", "is-active", "nvhook-refresh.service").stdout == "inactive\n"


def _version(machine: Booted) -> str:
    """Of the driver in the inventory, or empty."""
    done = machine.call("cat", INVENTORY)
    return json.loads(done.stdout)["origin"]["driver"] if done.returncode == 0 else ""


def test_new_linker_cache_makes_the_inventory_anew(watching: Booted) -> None:
    assert _version(watching) == ""
    _change_the_cache(watching)
    wait("the inventory is made", lambda: _version(watching) == VERSION, 120)
    assert watching.here("readlink", "/dev/char/195:0", "/dev/char/511:0") == "../nvidia0\n../nvidia-uvm\n"


def test_an_upgrade_of_many_steps(watching: Booted) -> None:
    """Each makes an inventory: more of them in ten seconds than systemd starts a service by default."""
    for _ in range(8):
        watching.shell(f"rm -f {INVENTORY}")
        _change_the_cache(watching)
        wait("the inventory is made", lambda: _version(watching) == VERSION, 120)
        wait("the service is over", lambda: _is_over(watching), 120)


def test_libraries_of_another_driver(watching: Booted) -> None:
    """In the middle of an upgrade: the service fails and says why, and the next change is seen all the same."""
    path = f"{HOST}/proc/driver/nvidia/version"
    watching.shell(f"cp {path} /run/version; sed -i s/{VERSION}/570.86.15/ {path}")
    try:
        done = watching.call("systemctl", "restart", "nvhook-refresh.service")
        assert done.returncode != 0
        assert watching.here("readlink", "/dev/char/195:0")  # the links come first
    finally:
        watching.shell(f"cp /run/version {path}")
    _change_the_cache(watching)
    wait("the inventory is made", lambda: _version(watching) == VERSION, 120)


def test_driver_root_below_home(watching: Booted) -> None:
    """Where GKE has it."""
    config = "/etc/nvidia-container-runtime/config.toml"
    watching.shell(
        f"mkdir -p /home/driver; mount --bind {HOST}/driver /home/driver; sed -i s,{HOST}/driver,/home/driver, {config}"
    )
    try:
        watching.here("systemctl", "restart", "nvhook-refresh.service")
        assert _version(watching) == VERSION
    finally:
        watching.configure(PROC_OF_HOST)
        watching.shell("umount --lazy /home/driver")


def test_state_directory_of_ones_own(watching: Booted) -> None:
    """As docs/upgrades.md has it."""
    place, drop_in = "/var/lib/nvhook-of-test", "/etc/systemd/system/nvhook-refresh.service.d"
    watching.configure(f'{PROC_OF_HOST}nvhook.state-dir = "{place}"\n')
    watching.shell(f"mkdir {place} {drop_in}; printf '[Service]\\nReadWritePaths={place}\\n' >{drop_in}/x.conf")
    watching.here("systemctl", "daemon-reload")
    try:
        watching.here("systemctl", "restart", "nvhook-refresh.service")
        assert VERSION in watching.here("cat", f"{place}/inventory.json")
    finally:
        watching.configure(PROC_OF_HOST)
        watching.shell(f"rm -r {drop_in}; systemctl daemon-reload")


def test_no_driver_is_no_failure(watching: Booted) -> None:
    path = f"{HOST}/proc/driver/nvidia/version"
    watching.shell(f"mv {path} /run/version")
    try:
        watching.here("systemctl", "restart", "nvhook-refresh.service")
    finally:
        watching.shell(f"mv /run/version {path}")
