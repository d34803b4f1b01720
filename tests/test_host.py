# SPDX-License-Identifier: Apache-2.0
"""host.py: the kind of host, in directories that look like one, and what is loaded for a request."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from conftest import DEVICES
from nvhook.errors import DeviceError, DriverError
from nvhook.host import host
from nvhook.host.gpus import Gpus
from nvhook.request import config
from nvhook.request.config import Config


def _asked(capabilities: str = "compute utility") -> tuple[str, ...]:
    return tuple(capabilities.split())


def _config(root: Path) -> Config:
    path = root / "config.toml"
    path.write_text(
        f"nvidia-container-cli.root = '{root}'\nnvhook.dev-root = '{root}'\nnvhook.proc-root = '{root}'\n"
        f"nvhook.state-dir = '{root}/run'\n"
    )
    return config.load(str(path))


class Kernel:
    """A host whose modules are still to be loaded, and the program that does it and notes what it was asked for."""

    def __init__(self, proc: Path, *, loaded: str) -> None:
        self.root = proc
        self.warnings: list[str] = []
        self.calls = proc / "calls"
        self.calls.touch()
        self.modprobe = proc / "modprobe"
        lines = {"nvidia": "195 nvidia", "nvidia-uvm": "511 nvidia-uvm", "nvidia-modeset": "195 nvidia-modeset"}
        kept = [line for line in DEVICES.splitlines() if line not in lines.values()]
        whole = proc / "whole"
        shutil.move(proc / "proc/driver", whole)
        (proc / "proc/devices").write_text("\n".join([kept[0], *(lines[name] for name in loaded.split())]) + "\n")
        if "nvidia" in loaded.split():
            shutil.move(whole, proc / "proc/driver")
        script = f"echo $# $1 >>{self.calls}\n"
        script += "".join(f'[ "$1" = {name} ] && echo "{line}" >>{proc}/proc/devices\n' for name, line in lines.items())
        self.write(f"{script}[ $1 = nvidia ] && mv {whole} {proc}/proc/driver\nexit 0")

    def write(self, script: str) -> None:
        self.modprobe.write_text(f"#!/bin/sh\n{script}\n")
        self.modprobe.chmod(0o755)

    def read(self, capabilities: str, *, modprobe: str | None = None) -> Gpus:
        program = str(self.modprobe) if modprobe is None else modprobe
        return host.read(_config(self.root), _asked(capabilities), self.warnings, modprobe=program)

    def asked_for(self) -> list[str]:
        """Each with its one argument."""
        calls = [line.split() for line in self.calls.read_text().splitlines()]
        assert all(count == "1" for count, _ in calls)
        return [module for _, module in calls]


@pytest.mark.parametrize(
    ("loaded", "capabilities", "expected"),
    [
        pytest.param("nvidia nvidia-uvm", "compute utility", "", id="all-there"),
        pytest.param("nvidia", "utility", "", id="utility-needs-no-uvm"),
        pytest.param("nvidia", "graphics", "", id="graphics-needs-no-modeset"),
        pytest.param("nvidia", "compute", "nvidia-uvm", id="compute"),
        pytest.param("nvidia", "video", "nvidia-uvm", id="video"),
        pytest.param("nvidia", "display", "nvidia-modeset", id="display"),
        pytest.param("nvidia nvidia-uvm nvidia-modeset", "compute display", "", id="display-all-there"),
        pytest.param("", "utility", "nvidia", id="nothing-loaded"),
        pytest.param("", "compute display", "nvidia nvidia-uvm nvidia-modeset", id="nothing-loaded-all-wanted"),
    ],
)
def test_what_is_missing_is_loaded(proc: Path, loaded: str, capabilities: str, expected: str) -> None:
    kernel = Kernel(proc, loaded=loaded)
    found = kernel.read(capabilities)
    assert kernel.asked_for() == expected.split()
    assert [gpu.uuid for gpu in found.gpus] == ["GPU-aa", "GPU-bb"]
    assert {*loaded.split(), *expected.split()} <= found.majors.keys()
    assert kernel.warnings == []


def test_modules_of_an_older_driver(proc: Path) -> None:
    """Its nvidia-frontend stands for mode setting too."""
    (proc / "proc/devices").write_text("Character devices:\n195 nvidia-frontend\n")
    found = host.read(_config(proc), _asked("display"), [], modprobe="/nonexistent")
    assert found.majors == {"nvidia-frontend": 195}


@pytest.mark.parametrize(
    ("script", "said"),
    [
        pytest.param(
            "echo first >&2; echo 'modprobe: FATAL: Module not found' >&2; exit 1",
            "modprobe: FATAL: Module not found",
            id="stderr",
        ),
        pytest.param("echo 'No such device'; exit 1", "No such device", id="stdout"),
        pytest.param("exit 3", "status 3", id="says-nothing"),
        pytest.param("kill -9 $$", "status -9", id="killed"),
    ],
)
@pytest.mark.parametrize(
    ("loaded", "module"), [pytest.param("", "nvidia", id="nvidia"), pytest.param("nvidia", "nvidia-uvm", id="uvm")]
)
def test_module_that_cannot_be_loaded(proc: Path, loaded: str, module: str, script: str, said: str) -> None:
    kernel = Kernel(proc, loaded=loaded)
    kernel.write(script)
    with pytest.raises(DeviceError) as raised:
        kernel.read("compute")
    assert str(raised.value) == (
        f"device error: the {module} kernel module is not loaded, and cannot be: {said}; "
        f"`modprobe {module}` has to work on the host: see `dmesg`, or install the driver"
    )


def test_mode_setting_that_cannot_be_loaded_is_a_warning(proc: Path) -> None:
    kernel = Kernel(proc, loaded="nvidia")
    kernel.write("echo no; exit 1")
    assert kernel.read("display").majors == {"nvidia": 195}
    (warning,) = kernel.warnings
    assert "the nvidia-modeset kernel module is not loaded, and cannot be: no" in warning


def test_modprobe_that_is_not_there(proc: Path) -> None:
    with pytest.raises(DeviceError, match="cannot be: run `/nonexistent`: no such file or directory"):
        Kernel(proc, loaded="").read("compute", modprobe="/nonexistent")


@pytest.mark.parametrize("loaded", ["", "nvidia"])
def test_nothing_is_loaded_where_we_may_not(proc: Path, loaded: str) -> None:
    """Then it is as it was: no module is an error here, no nvidia-uvm one of the plan."""
    kernel = Kernel(proc, loaded=loaded)
    if loaded:
        assert kernel.read("compute", modprobe="").majors == {"nvidia": 195}
    else:
        with pytest.raises(DeviceError, match=r"the nvidia kernel module is not loaded: no `.*`; load it with"):
            kernel.read("compute", modprobe="")
    assert kernel.asked_for() == []


def test_nothing_is_loaded_for_a_simulated_host(proc: Path) -> None:
    """Its /proc is not this machine's, whose kernel would be asked."""
    Kernel(proc, loaded="nvidia")
    assert host.read(_config(proc), _asked("compute"), []).majors == {"nvidia": 195}


# Tegra


@pytest.mark.parametrize(
    ("path", "content", "is_tegra"),
    [
        ("etc/nv_tegra_release", "# R35 (release), REVISION: 4.1\n", True),
        ("etc/nv_tegra_release", "", True),
        ("sys/devices/soc0/family", "Tegra\n", True),
        ("sys/devices/soc0/family", "tegra234\n", True),
        ("sys/devices/soc0/family", "Snapdragon\n", False),
        ("sys/devices/soc0/family", "", False),
        ("etc/nv_tegra_release/directory", "", False),
    ],
)
def test_tegra(tmp_path: Path, path: str, content: str, is_tegra: bool) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(content)
    expected: type[DriverError | DeviceError] = DriverError if is_tegra else DeviceError
    with pytest.raises(expected) as raised:
        host.read(_config(tmp_path), _asked(), [], modprobe="")
    assert host.kind(_config(tmp_path)) == (host.TEGRA if is_tegra else host.NONE)
    if is_tegra:
        assert str(raised.value) == (
            f"driver error: this is a Tegra, as `{file}` says, and its integrated GPU is not supported; "
            "use NVIDIA's container toolkit on this host"
        )


def test_tegra_with_a_card(proc: Path) -> None:
    (proc / "etc").mkdir()
    (proc / "etc/nv_tegra_release").touch()
    assert len(host.read(_config(proc), _asked(), []).gpus) == 2
    assert host.kind(_config(proc)) == host.KERNEL_MODULE


# WSL 2

STORE = "nv_dispi.inf_amd64_0afec3f2050014a0"


def _windows(root: Path, *stores: str) -> Path:
    for age, name in enumerate(stores):
        directory = root / "usr/lib/wsl/drivers" / name
        directory.mkdir(parents=True)
        if name.startswith("nv"):
            (directory / "libcuda.so.1.1").touch()
            os.utime(directory / "libcuda.so.1.1", ns=(0, (100 - age) * 10**9))
    (root / "dev").mkdir(exist_ok=True)
    os.mknod(root / "dev/dxg", 0o666 | 0o020000, os.makedev(10, 125))
    (root / "dev/dxg").chmod(0o666)
    return root


@pytest.mark.root
def test_wsl(tmp_path: Path) -> None:
    found = host.read(_config(_windows(tmp_path, "u0400471.inf_amd64_1", STORE)), _asked(), [])
    assert (found.driver_version, found.dxg, found.gpus, found.majors) == (STORE, (10, 125), [], {})
    assert found.node_owner == (0, 0, 0o666)


@pytest.mark.root
def test_wsl_newest_of_several_stores(tmp_path: Path) -> None:
    found = host.read(_config(_windows(tmp_path, "nv_b.inf_amd64_2", "nv_a.inf_amd64_1", "nv_c.inf_3")), _asked(), [])
    assert found.driver_version == "nv_b.inf_amd64_2"


@pytest.mark.root
@pytest.mark.parametrize("stores", [(), ("iigd_dch.inf_amd64_5",)], ids=["none", "of-another-vendor"])
def test_wsl_without_a_driver(tmp_path: Path, stores: tuple[str, ...]) -> None:
    with pytest.raises(DriverError) as raised:
        host.read(_config(_windows(tmp_path, *stores)), _asked(), [])
    assert host.kind(_config(tmp_path)) == host.WSL
    assert str(raised.value) == (
        "driver error: this is WSL 2, as `/dev/dxg` says, and no directory below `/usr/lib/wsl/drivers` has "
        "libcuda.so.1.1; install NVIDIA's driver in Windows, and none in WSL; then `wsl --shutdown`"
    )
