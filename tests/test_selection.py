# SPDX-License-Identifier: Apache-2.0
"""selection.py: which GPUs a container gets, and the requirements of its image held against each of them."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import HOSTS
from containers import Bundle, configure, make_image
from nvhook.errors import DeviceError, NvhookError
from nvhook.host import gpus, selection
from nvhook.request import config as configuration
from nvhook.request.request import Request
from nvhook.start import reporter
from simhost.build import build

pytestmark = pytest.mark.root

A100 = json.loads((HOSTS / "a100x2-debian12.json").read_text())
UUIDS = [gpu["uuid"] for gpu in A100["gpus"]]
FIRST = f"GPU 0 ({UUIDS[0]}, 0000:07:00.0)"
SECOND = f"GPU 1 ({UUIDS[1]}, 0000:0a:00.0)"
ANYWAY = "set NVIDIA_DISABLE_REQUIRE=1 to start it anyway"


class Host:
    """A simulated host of its own: an A100, and a card that can be another."""

    def __init__(self, directory: Path, *, version: str = "550.163.01", cuda: str = "12.4", **second: object) -> None:
        description = json.loads(json.dumps(A100).replace("550.163.01", version))
        description["gpus"][1].update(second)
        build({**description, "cuda_driver_version": cuda}, directory)
        self.directory = directory
        self.kept = directory / "run/nvml.json"
        (self.library,) = (
            path for path in directory.glob("driver/usr/lib/*/libnvidia-ml.so.*.*") if "i386" not in str(path)
        )

    def fail(self) -> None:
        self.library.chmod(0)

    def forget_uuids(self, *addresses: str) -> None:
        for address in addresses:
            path = self.directory / "proc/driver/nvidia/gpus" / address / "information"
            lines = path.read_text().splitlines()
            unknown = "GPU UUID: \t GPU-????????-????-????-????-????????????"
            path.write_text("\n".join(unknown if line.startswith("GPU UUID") else line for line in lines) + "\n")

    def choose(self, devices: str, *requirements: str, **options: bool) -> tuple[list[str], list[str]]:
        """(UUIDs, warnings)"""
        settings = configuration.load(str(self.directory / "config.toml"))
        asked = Request(tuple(devices.split(",")), ("utility",), requirements, "a test")
        warnings: list[str] = []
        there = gpus.read(settings.proc_root)
        chosen = selection.choose(asked, there, reporter(settings, there, warnings, **options), warnings)
        return [gpu.uuid for gpu in chosen.gpus], warnings

    def error(self, devices: str, *requirements: str) -> str:
        with pytest.raises(NvhookError) as raised:
            self.choose(devices, *requirements)
        return str(raised.value)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.fixture
def mixed(tmp_path: Path) -> Host:
    return Host(tmp_path, name="Tesla T4", compute_capability="7.5")


# What NVML is not asked for


@pytest.mark.parametrize(
    "requirements",
    [
        pytest.param((), id="nothing"),
        pytest.param(("cuda>=12.4",), id="cuda"),
        pytest.param(("cuda>=8.0",), id="cuda-of-a-legacy-image"),
        pytest.param(("cuda>=12.4 brand=tesla,driver>=470,driver<471",), id="cuda-image"),
        pytest.param(("driver>=535", "cuda>=11,driver<551"), id="driver"),
        pytest.param(("brand=tesla cuda>=12.4",), id="behind-a-brand"),
    ],
)
def test_choose_without_nvml(host: Host, requirements: tuple[str, ...]) -> None:
    host.fail()
    assert host.choose("all", *requirements) == (UUIDS, [])
    assert not (host.directory / "run").exists()


def test_choose_unknown_device_without_nvml(host: Host) -> None:
    host.fail()
    assert host.error("GPU-f", "brand=tesla").startswith("device error: unknown device `GPU-f`; this host has 0 (")
    assert not (host.directory / "run").exists()


# Requirements


HOLD = {
    "brand": ("all", "brand=nvidia"),
    "brand-not": ("all", "brand!=geforce"),
    "arch": ("all", "arch>=8.0,arch<9"),
    "arch-and-brand": ("0", "arch=8,brand=nvidia"),
    "second-alternative": ("all", "cuda>=99 brand=nvidia,driver>=550"),
    "malformed-behind-what-holds": ("all", "brand=nvidia brnd=x"),
    "cuda-not-above": ("all", "cuda<=12.4"),
}


@pytest.mark.parametrize(("devices", "requirement"), HOLD.values(), ids=HOLD)
def test_choose_requirement_holds(host: Host, devices: str, requirement: str) -> None:
    assert host.choose(devices, requirement) == (UUIDS[: 1 if devices == "0" else 2], [])


FAIL = {
    "brand": ("all", "brand=tesla", f"image needs `brand=tesla`, {FIRST} has brand nvidia; {ANYWAY}"),
    "arch": ("1", "arch>=9.0", f"image needs `arch>=9.0`, {SECOND} has arch 8.0; {ANYWAY}"),
    "cuda": (
        "all",
        "cuda>=12.6",
        "image needs `cuda>=12.6`, this host has cuda 12.4 (driver 550.163.01); "
        f"install driver 560.28.03 or newer, or {ANYWAY}",
    ),
    "cuda-without-gpu": (
        "none",
        "cuda>=12.6",
        "image needs `cuda>=12.6`, this host has cuda 12.4 (driver 550.163.01); "
        f"install driver 560.28.03 or newer, or {ANYWAY}",
    ),
    "driver": (
        "all",
        "driver>=560",
        f"image needs `driver>=560`, this host has driver 550.163.01; install driver 560 or newer, or {ANYWAY}",
    ),
}


@pytest.mark.parametrize(("devices", "requirement", "message"), FAIL.values(), ids=FAIL)
def test_choose_requirement_fails(host: Host, devices: str, requirement: str, message: str) -> None:
    assert host.error(devices, requirement) == f"requirement error: {message}"


@pytest.mark.parametrize("requirement", ["brand=nvidia,brnd=x", "cuda>=99 brnd=x", "arch>=x"])
def test_choose_requirement_malformed(host: Host, requirement: str) -> None:
    assert host.error("all", requirement).startswith(f"requirement error: `{requirement}` is no requirement: ")


def test_choose_requirement_holds_for_each_gpu(mixed: Host) -> None:
    assert mixed.choose("0", "arch>=8.0") == (UUIDS[:1], [])
    assert mixed.choose("none", "arch>=8.0,brand=x") == ([], [])
    assert mixed.choose("all", "arch>=7.5") == (UUIDS, [])
    assert mixed.choose("all", "brand=tesla arch>=8.0") == (UUIDS, []), "each by an alternative of its own"
    assert mixed.error("all", "arch>=8.0") == (
        f"requirement error: image needs `arch>=8.0`, {SECOND} has arch 7.5; {ANYWAY}"
    )


def test_choose_cuda_is_nvml_s(tmp_path: Path) -> None:
    """Where the table would refuse."""
    host = Host(tmp_path, cuda="12.6")
    assert host.choose("all", "cuda>=12.6") == (UUIDS, [])
    assert "this host has cuda 12.6 (driver 550.163.01)" in host.error("all", "cuda>=12.7")


def test_choose_cuda_of_a_driver_that_the_table_does_not_know(tmp_path: Path) -> None:
    host = Host(tmp_path, version="990.1.1", cuda="21.3")
    assert host.choose("all", "cuda>=21.3") == (UUIDS, [])
    assert "this host has cuda 21.3 (driver 990.1.1)" in host.error("all", "cuda>=21.4")


def test_choose_asks_once(host: Host) -> None:
    assert host.choose("all", "brand=nvidia") == (UUIDS, [])
    host.fail()
    assert host.choose("all", "brand=nvidia") == (UUIDS, [])
    assert "brand nvidia" in host.error("all", "brand=tesla")


def test_choose_keeps_nothing(host: Host) -> None:
    assert host.choose("all", "brand=nvidia", keep=False) == (UUIDS, [])
    assert not (host.directory / "run").exists()


def test_choose_without_an_answer(host: Host) -> None:
    """What NVML alone tells counts as what the image requires; the CUDA version is the table's."""
    host.fail()
    chosen, warnings = host.choose("all", "brand=x,arch>=99")
    assert chosen == UUIDS
    assert len(warnings) == 1
    assert warnings[0].startswith(f"driver error: ask `{host.library}`: NVML: ")
    assert warnings[0].endswith("; assuming the GPU meets the image's brand and architecture requirements")
    assert "this host has cuda 12.4" in host.error("all", "cuda>=12.6")


def test_choose_a_gpu_that_nvml_does_not_know(host: Host) -> None:
    (host.directory / "dev/nvidia0").unlink()
    chosen, warnings = host.choose("all", "brand=nvidia")
    assert chosen == UUIDS
    expected = f"NVML does not report {SECOND}; assuming it meets the image's brand and architecture requirements"
    assert warnings == [expected]


# UUIDs that the driver does not know yet


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        (UUIDS[0], UUIDS[:1]),
        (UUIDS[1], UUIDS[1:]),
        ("GPU-c4,gpu-08", UUIDS),
        (f"1,{UUIDS[0].upper()}", UUIDS),
    ],
)
def test_choose_by_uuid_before_the_gpus_are_initialised(host: Host, devices: str, expected: list[str]) -> None:
    host.forget_uuids("0000:07:00.0", "0000:0a:00.0")
    assert host.choose(devices) == (expected, [])
    host.fail()
    assert host.choose(devices) == (expected, [])


def test_choose_by_uuid_with_some_initialised(host: Host) -> None:
    host.forget_uuids("0000:07:00.0")
    assert host.choose(UUIDS[1]) == (UUIDS[1:], [])
    assert host.choose(UUIDS[0], "brand=nvidia") == (UUIDS[:1], [])


def test_choose_by_index_before_the_gpus_are_initialised(host: Host) -> None:
    host.forget_uuids("0000:07:00.0")
    host.fail()
    assert host.choose("0") == (["GPU-????????-????-????-????-????????????"], [])


def test_choose_by_uuid_without_an_answer(host: Host) -> None:
    host.forget_uuids("0000:07:00.0", "0000:0a:00.0")
    host.fail()
    line = host.error(UUIDS[0], "brand=x")
    assert line.startswith(f"device error: unknown device `{UUIDS[0]}`; this host has 0 (GPU-????")
    assert line.endswith("run `nvidia-smi -L` on the host")


def test_choose_by_uuid_that_nobody_has(host: Host) -> None:
    host.forget_uuids("0000:07:00.0")
    with pytest.raises(DeviceError) as raised:
        host.choose("GPU-f")
    assert str(raised.value) == (
        f"device error: unknown device `GPU-f`; this host has 0 ({UUIDS[0]}, 0000:07:00.0), "
        f"1 ({UUIDS[1]}, 0000:0a:00.0)"
    )


# A whole start


def test_start_asks_nvml_once(tmp_path: Path) -> None:
    """The wrapper asks, the hook and the next start do not; what they say is the same."""
    image = make_image("debian", tmp_path / "image")
    host = Host(tmp_path / "host")
    host.forget_uuids("0000:07:00.0")
    config = configure(host.directory, tmp_path / "config.toml", tmp_path / "state")
    env = {"NVIDIA_VISIBLE_DEVICES": UUIDS[0], "NVIDIA_REQUIRE_CUDA": "cuda>=99 brand=nvidia,arch>=8"}

    def run(name: str, **more: str) -> Any:
        bundle = Bundle(tmp_path / name, image)
        return bundle.write(["/bin/sh", "-c", "nvidia-smi -L"], {**env, **more}).run(config)

    first = run("first")
    assert first.returncode == 0, first.stderr
    assert first.stdout == f"GPU 0: NVIDIA A100-SXM4-40GB (UUID: {UUIDS[0]})\n"
    assert {"inventory.json", "nvml.json"} <= set(os.listdir(tmp_path / "state"))
    status = (tmp_path / "state/nvml.json").stat()
    assert run("second").stdout == first.stdout
    again = (tmp_path / "state/nvml.json").stat()
    assert (status.st_ino, status.st_mtime_ns) == (again.st_ino, again.st_mtime_ns)
    refused = run("third", NVIDIA_REQUIRE_CUDA="brand=tesla")
    assert refused.returncode != 0
    assert "requirement error: image needs `brand=tesla`, GPU 0 (GPU-c41d7b52" in refused.stderr
    assert run("fourth", NVIDIA_REQUIRE_CUDA="brand=tesla", NVIDIA_DISABLE_REQUIRE="1").stdout == first.stdout


def test_start_with_a_library_that_hangs(tmp_path: Path) -> None:
    """One deadline for the wrapper and the hook together, and the container starts on what is known."""
    host = Host(tmp_path / "host")
    (tmp_path / "hangs.c").write_text("#include <unistd.h>\nint nvmlInitWithFlags(unsigned f) { for (;;) pause(); }\n")
    flags = ["-shared", "-fPIC", "-w", "-Wl,-soname,libnvidia-ml.so.1"]
    subprocess.run(["cc", *flags, "-o", str(host.library), str(tmp_path / "hangs.c")], check=True)
    config = configure(host.directory, tmp_path / "config.toml", tmp_path / "state")
    bundle = Bundle(tmp_path / "bundle", make_image("debian", tmp_path / "image"))
    begin = time.monotonic()
    done = bundle.write(
        ["/bin/sh", "-c", "echo started"], {"NVIDIA_VISIBLE_DEVICES": "all", "NVIDIA_REQUIRE_X": "brand=nvidia"}
    ).run(config)
    assert (done.returncode, done.stdout) == (0, "started\n"), done.stderr
    assert 9 < time.monotonic() - begin < 15
