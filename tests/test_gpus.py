# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from nvhook.errors import DeviceError
from nvhook.host import gpus, selection
from nvhook.host.gpus import Gpu, Gpus
from nvhook.host.report import Report

# The fixture `proc` (conftest.py) is a host with two GPUs: 0000:07:00.0 with minor 1, 0000:41:00.0 with minor 0.


def _information(root: Path, address: str) -> Path:
    return root / "proc/driver/nvidia/gpus" / address / "information"


def _add(root: Path, address: str, text: str) -> None:
    path = _information(root, address)
    path.parent.mkdir(parents=True)
    path.write_text(text)


def _found(root: Path) -> list[tuple[int, int, str, str]]:
    return [(gpu.index, gpu.minor, gpu.uuid, gpu.pci) for gpu in gpus.read(str(root)).gpus]


def _error(root: Path) -> str:
    with pytest.raises(DeviceError) as raised:
        gpus.read(str(root))
    assert "\n" not in str(raised.value)
    return str(raised.value)


# read


def test_read_whole(proc: Path) -> None:
    found = gpus.read(str(proc))
    assert found.driver_version == "580.1.2"
    assert found.majors == {"mem": 1, "nvidia": 195, "nvidia-modeset": 195, "nvidiactl": 195, "nvidia-uvm": 511}
    assert found.node_owner == (0, 0, 0o666)
    assert [gpu.model for gpu in found.gpus] == ["NVIDIA Test", "NVIDIA Test"]
    assert found.gpus[0].describe() == {"index": 0, "minor": 1, "uuid": "GPU-aa", "pci": "0000:07:00.0"}


def test_read_order_is_the_bus_not_the_minor(proc: Path) -> None:
    assert _found(proc) == [(0, 1, "GPU-aa", "0000:07:00.0"), (1, 0, "GPU-bb", "0000:41:00.0")]


def test_read_order_is_numeric(proc: Path) -> None:
    """A domain of five digits sorts after one of four, whatever its text begins with."""
    _add(proc, "10000:01:00.0", "GPU UUID: GPU-cc\nDevice Minor: 2\n")
    _add(proc, "0001:01:00.0", "GPU UUID: GPU-dd\nDevice Minor: 3\n")
    assert [uuid for _, _, uuid, _ in _found(proc)] == ["GPU-aa", "GPU-bb", "GPU-dd", "GPU-cc"]


def test_read_excluded_gpu_has_no_index(proc: Path) -> None:
    path = _information(proc, "0000:07:00.0")
    path.write_text(path.read_text().replace("Excluded:\t No", "Excluded:\t Yes"))
    assert _found(proc) == [(0, 0, "GPU-bb", "0000:41:00.0")]


def test_read_excluded_gpu_without_minor(proc: Path) -> None:
    _information(proc, "0000:07:00.0").write_text("GPU Excluded:\t Yes\n")
    assert _found(proc) == [(0, 0, "GPU-bb", "0000:41:00.0")]


def test_read_gpu_of_a_module_that_says_nothing_of_exclusion(proc: Path) -> None:
    _information(proc, "0000:07:00.0").write_text("GPU UUID: \t GPU-aa\nDevice Minor: \t 1\n")
    assert _found(proc)[0] == (0, 1, "GPU-aa", "0000:07:00.0")


def test_read_uuid_not_known_yet(proc: Path) -> None:
    unknown = "GPU-????????-????-????-????-????????????"
    _information(proc, "0000:07:00.0").write_text(f"GPU UUID: \t {unknown}\nDevice Minor: \t 1\n")
    assert _found(proc)[0] == (0, 1, unknown, "0000:07:00.0")


@pytest.mark.parametrize("minor", ["", " \t ", "x", "-1", "1048576", "9" * 5000], ids=lambda text: text[:9])
def test_read_gpu_without_minor(proc: Path, minor: str) -> None:
    path = _information(proc, "0000:07:00.0")
    path.write_text(f"Device Minor: {minor}\n" if minor else "")
    assert _error(proc) == f"device error: read `{path}`: no `Device Minor`"


def test_read_gpu_without_information(proc: Path) -> None:
    path = _information(proc, "0000:07:00.0")
    path.unlink()
    assert _error(proc) == f"device error: read `{path}`: no such file or directory"


@pytest.mark.parametrize(
    ("line", "version"),
    [
        pytest.param(
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (a@b)  Mon",
            "580.159.04",
            id="open",
        ),
        pytest.param(
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.163.01  Tue Apr  8 12:41:17 UTC 2025",
            "550.163.01",
            id="proprietary",
        ),
        pytest.param(
            "NVRM version: NVIDIA UNIX aarch64 Kernel Module  535.54  Tue Apr  8 12:41:17 UTC 2025",
            "535.54",
            id="two-parts",
        ),
        pytest.param("NVRM version: NVIDIA UNIX x86_64 Kernel Module  361.45.18", "361.45.18", id="no-date"),
    ],
)
def test_read_version(proc: Path, line: str, version: str) -> None:
    (proc / "proc/driver/nvidia/version").write_text(f"{line}\nGCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n")
    assert version == gpus.read(str(proc)).driver_version


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("garbage\n", id="garbage"),
        pytest.param("\nGCC version:  gcc version 12.2.0\n", id="compiler-alone"),
        pytest.param("NVRM version: NVIDIA 12:41:17 2025 v580.1 5.x ... .\n", id="nearly"),
        pytest.param("\x00\x01\x1b[2J\n", id="control-characters"),
        pytest.param(f"NVRM version: {'9' * 5000}.1\n", id="endless"),
    ],
)
def test_read_version_unreadable(proc: Path, text: str) -> None:
    path = proc / "proc/driver/nvidia/version"
    path.write_text(text)
    assert _error(proc).startswith(f"device error: read `{path}`: no driver version in `")


def test_read_module_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "proc/driver/nvidia/version"
    assert _error(tmp_path) == (
        f"device error: the nvidia kernel module is not loaded: no `{path}`; load it with `modprobe nvidia`, "
        "or install the NVIDIA driver on this host"
    )


def test_read_module_without_gpus(proc: Path) -> None:
    for address in ("0000:07:00.0", "0000:41:00.0"):
        _information(proc, address).unlink()
        _information(proc, address).parent.rmdir()
    assert _found(proc) == []
    (proc / "proc/driver/nvidia/gpus").rmdir()
    assert _found(proc) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("Character devices:\n  1 mem\n195 nvidia\n", {"mem": 1, "nvidia": 195}, id="plain"),
        pytest.param("Character devices:\n195 nvidia-frontend\n", {"nvidia-frontend": 195}, id="older-name"),
        pytest.param(
            "Character devices:\n511 nvidia-uvm\n\nBlock devices:\n  7 loop\n259 nvidia\n",
            {"nvidia-uvm": 511},
            id="block-section",
        ),
        pytest.param("4 tty\n5 tty\n", {"tty": 4}, id="first-of-a-name"),
        pytest.param("nonsense\n\n 7\nx y\n", {}, id="garbage"),
        pytest.param(f"{'9' * 5000} nvidia\n4096 nvidia\n195 nvidia\n", {"nvidia": 195}, id="numbers-too-large"),
    ],
)
def test_read_majors(proc: Path, text: str, expected: dict[str, int]) -> None:
    (proc / "proc/devices").write_text(text)
    assert expected == gpus.read(str(proc)).majors


def test_read_majors_missing(proc: Path) -> None:
    (proc / "proc/devices").unlink()
    assert _error(proc) == f"device error: read `{proc}/proc/devices`: no such file or directory"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(None, (0, 0, 0o666), id="missing"),
        pytest.param("", (0, 0, 0o666), id="empty"),
        pytest.param("DeviceFileUID: 5\nDeviceFileGID: 44\nDeviceFileMode: 432\n", (5, 44, 0o660), id="of-its-own"),
        pytest.param("DeviceFileGID: 44\n", (0, 44, 0o666), id="partly"),
        pytest.param("DeviceFileMode: 0x1b6\n", (0, 0, 0o666), id="unreadable"),
        pytest.param("DeviceFileMode: 4095\n", (0, 0, 0o777), id="mode-is-permissions-alone"),
    ],
)
def test_read_node_owner(proc: Path, text: str | None, expected: tuple[int, int, int]) -> None:
    path = proc / "proc/driver/nvidia/params"
    path.unlink() if text is None else path.write_text(text)
    assert expected == gpus.read(str(proc)).node_owner


# select

HOST = [
    Gpu(0, 3, "GPU-5a17c0d4-8be2-4963-a1f5-70c92e3d46b8", "0000:00:06.0", "A"),
    Gpu(1, 2, "GPU-e3b90f62-47d1-4c58-9e0a-1f6d85b27c34", "0000:1b:00.0", "B"),
    Gpu(2, 1, "GPU-5ac8432f-d609-4e7b-83b1-c4f50a96e1d7", "0001:00:06.0", "C"),
    Gpu(3, 0, "GPU-????????-????-????-????-????????????", "10000:c3:00.1", "D"),
]


def _select(devices: tuple[str, ...], there: list[Gpu] | None = None) -> list[int]:
    """Indices of the GPUs, on a host without MIG (test_mig.py has one with it)."""
    host = Gpus("580.1.2", HOST if there is None else there, {}, (0, 0, 0o666))
    chosen = selection.select(devices, host, _not_asked)
    assert chosen.migs == []
    return [gpu.index for gpu in chosen.gpus]


def _not_asked(again: bool) -> Report:
    raise AssertionError(f"NVML is asked for a whole GPU: {again}")


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        pytest.param(("all",), [0, 1, 2, 3], id="all"),
        pytest.param(("none",), [], id="none"),
        pytest.param(("0",), [0], id="index"),
        pytest.param(("3", "0"), [0, 3], id="order-of-the-host"),
        pytest.param(("0", "0"), [0], id="twice"),
        pytest.param(("0", "GPU-5a1", "00:06.0"), [0], id="one-by-three-names"),
        pytest.param(("00",), [0], id="index-with-zeros"),
        pytest.param(("GPU-5a17c0d4-8be2-4963-a1f5-70c92e3d46b8",), [0], id="uuid"),
        pytest.param(("gpu-5A17C0D4-8BE2-4963-A1F5-70C92E3D46B8",), [0], id="uuid-other-case"),
        pytest.param(("GPU-e",), [1], id="beginning-of-one-letter"),
        pytest.param(("GPU-5ac",), [2], id="beginning"),
        pytest.param(("gpu-5AC",), [2], id="beginning-other-case"),
        pytest.param(("0000:00:06.0",), [0], id="pci"),
        pytest.param(("00000000:00:06.0",), [0], id="pci-as-nvml-says-it"),
        pytest.param(("00:06.0",), [0], id="pci-without-domain"),
        pytest.param(("0:6.0",), [0], id="pci-shortest"),
        pytest.param(("0000:1B:00.0",), [1], id="pci-upper-case"),
        pytest.param(("0001:00:06.0",), [2], id="pci-another-domain"),
        pytest.param(("10000:C3:00.1",), [3], id="pci-long-domain-and-function"),
    ],
)
def test_select(devices: tuple[str, ...], expected: list[int]) -> None:
    assert expected == _select(devices)


@pytest.mark.parametrize(
    "device",
    [
        "4", "9999999", "12345678901", "9" * 5000, "-1", "+1", "1_0", " 0", "0x0", "1.0", "",
        "\uff11", "\u0660", "\u00b2",
        "GPU-", "GPU", "GPU-5a17c0d4-8be2-4963-a1f5-70c92e3d46b8x", "5a17c0d4", "GPU5a17", "GPU-*", "ALL", "void",
        "0:1:2:3", "99999999:0", "00:06.1", "00:07.0", "0002:00:06.0", "10000:c3:00.0", ":", "::", ":06.0", "00:06.0.0",
        "00:\u0666.\u0660", "0_0:06.0", "0x00:06.0", "-0:06.0", "00: 06.0", "00:06.g", "A:" + "f" * 5000, "../0", "0\n",
    ],
    ids=lambda device: ascii(device)[:40],
)  # fmt: skip
def test_select_unknown(device: str) -> None:
    with pytest.raises(DeviceError) as raised:
        _select((device,))
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in device)
    listed = "0 (GPU-5a17c0d4-8be2-4963-a1f5-70c92e3d46b8, 0000:00:06.0), 1 ("
    assert str(raised.value).startswith(f"device error: unknown device `{shown}`; this host has {listed}")


def test_select_one_unknown_is_enough() -> None:
    with pytest.raises(DeviceError, match="unknown device `7`"):
        _select(("0", "7", "1"))


@pytest.mark.parametrize("device", ["GPU-5", "GPU-5a", "gpu-5A"])
def test_select_beginning_of_several(device: str) -> None:
    with pytest.raises(DeviceError) as raised:
        _select((device,))
    assert str(raised.value) == (
        f"device error: `{device}` is the beginning of several UUIDs: "
        "0 (GPU-5a17c0d4-8be2-4963-a1f5-70c92e3d46b8, 0000:00:06.0), "
        "2 (GPU-5ac8432f-d609-4e7b-83b1-c4f50a96e1d7, 0001:00:06.0)"
    )


def test_select_uuid_that_begins_another() -> None:
    host = [Gpu(0, 0, "GPU-aabb", "0000:01:00.0", ""), Gpu(1, 1, "GPU-aa", "0000:02:00.0", "")]
    assert _select(("GPU-aa",), host) == [1]
    assert _select(("gpu-AAB",), host) == [0]


def test_select_unknown_uuid_where_some_are_not_known_yet() -> None:
    with pytest.raises(DeviceError, match="run `nvidia-smi -L` on the host"):
        _select(("GPU-77",))


def test_select_on_a_host_without_gpus() -> None:
    assert _select(("none",), []) == []
    with pytest.raises(DeviceError, match="all GPUs are asked for and the driver has none"):
        _select(("all",), [])
    with pytest.raises(DeviceError, match="unknown device `0`; this host has no GPU"):
        _select(("0",), [])


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        pytest.param(["NVIDIA GeForce RTX 4090"], {"geforce"}, id="geforce"),
        pytest.param(["GeForce GTX 1080"], {"geforce"}, id="geforce-of-an-older-driver"),
        pytest.param(["NVIDIA TITAN RTX", "Tesla V100-SXM2-16GB"], {"titan", "tesla"}, id="two"),
        pytest.param(["NVIDIA A100-SXM4-40GB"], {"a100-sxm4-40gb"}, id="without-a-brand"),
        pytest.param([""], {""}, id="unknown"),
        pytest.param([], set(), id="no-gpu"),
    ],
)
def test_brands(models: list[str], expected: set[str]) -> None:
    assert selection.Selection([Gpu(0, 0, "", "", model) for model in models], []).brands() == expected


WSL = Gpus("nv_dispi.inf_amd64", [], {}, (0, 0, 0o666), dxg=(10, 125))


@pytest.mark.parametrize("devices", [("all",), ("none",)])
def test_select_on_wsl(devices: tuple[str, ...]) -> None:
    chosen = selection.select(devices, WSL, _not_asked)
    assert (chosen.gpus, chosen.migs) == ([], [])


@pytest.mark.parametrize("devices", [("0",), ("GPU-1", "all"), ("MIG-1",)])
def test_select_on_wsl_one_alone(devices: tuple[str, ...]) -> None:
    with pytest.raises(DeviceError, match=f"`{devices[0]}` is asked for, and on WSL 2 .*; ask for `all`"):
        selection.select(devices, WSL, _not_asked)
