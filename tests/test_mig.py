# SPDX-License-Identifier: Apache-2.0
"""mig.py and selection.select() on a host with MIG: what a name means, when NVML is asked, and what cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nvhook.errors import DeviceError
from nvhook.host import gpus, mig, selection
from nvhook.host.gpus import Gpu, Gpus
from nvhook.host.report import GpuReport, InstanceReport, Report
from nvhook.request import device_list

# Minors that are not the indices. GPU 0 has two GPU instances, the second divided; 1 has one; 2 none; 3 no MIG.
FIRST = Gpu(0, 2, "GPU-aa", "0000:07:00.0", "")
SECOND = Gpu(1, 0, "GPU-bb", "0000:0f:00.0", "")
EMPTY = Gpu(2, 1, "GPU-cc", "0000:47:00.0", "")
WHOLE = Gpu(3, 3, "GPU-dd", "0000:4e:00.0", "")
HOST = Gpus(
    "580.1.2", [FIRST, SECOND, EMPTY, WHOLE], {}, (0, 0, 0o666), instances={2: [(7, 0), (1, 0), (1, 1)], 0: [(0, 0)]}
)
GPUS = "0 (GPU-aa, 0000:07:00.0), 1 (GPU-bb, 0000:0f:00.0), 2 (GPU-cc, 0000:47:00.0), 3 (GPU-dd, 0000:4e:00.0)"
MIGS = "0:0 (MIG-7a), 0:1 (MIG-1a), 0:2 (MIG-1b), 1:0 (MIG-1a2)"


def _device(gpu: Gpu, *instances: InstanceReport, mig_enabled: bool = True) -> GpuReport:
    return GpuReport(gpu.pci.upper(), gpu.uuid, "nvidia", "8.0", mig_enabled=mig_enabled, instances=instances)


OF_FIRST = (InstanceReport(0, 7, 0, "MIG-7a"), InstanceReport(1, 1, 0, "MIG-1a"), InstanceReport(2, 1, 1, "MIG-1b"))
OF_SECOND = _device(SECOND, InstanceReport(0, 0, 0, "MIG-1a2"))
OTHERS = (_device(EMPTY), _device(WHOLE, mig_enabled=False))
REPORT = Report("12.4", (_device(FIRST, *OF_FIRST), OF_SECOND, *OTHERS))


class Nvml:
    """Answers with the reports given, the first for what is kept, the last for whoever asks again."""

    def __init__(self, *reports: Report) -> None:
        self.reports = reports
        self.asked: list[bool] = []

    def __call__(self, again: bool) -> Report:
        self.asked.append(again)
        return self.reports[-1 if again else 0]


def _select(*devices: str, nvml: Nvml | None = None, host: Gpus = HOST) -> tuple[list[int], list[tuple[int, int, int]]]:
    chosen = selection.select(devices, host, nvml or Nvml(REPORT))
    return [gpu.index for gpu in chosen.gpus], [(item.gpu.index, item.gi, item.ci) for item in chosen.migs]


ALL = [(0, 1, 0), (0, 1, 1), (0, 7, 0), (1, 0, 0)]


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        pytest.param(["MIG-7a"], ([0], [(0, 7, 0)]), id="uuid"),
        pytest.param(["mig-7A"], ([0], [(0, 7, 0)]), id="uuid-other-case"),
        pytest.param(["MIG-7"], ([0], [(0, 7, 0)]), id="beginning"),
        pytest.param(["MIG-1a"], ([0], [(0, 1, 0)]), id="uuid-that-begins-another"),
        pytest.param(["0:1"], ([0], [(0, 1, 0)]), id="index"),
        pytest.param(["1:0"], ([1], [(1, 0, 0)]), id="index-of-another-gpu"),
        pytest.param(["01:00"], ([1], [(1, 0, 0)]), id="index-with-zeros"),
        pytest.param(["MIG-GPU-aa/1/1"], ([0], [(0, 1, 1)]), id="old"),
        pytest.param(["mig-gpu-AA/1/1"], ([0], [(0, 1, 1)]), id="old-other-case"),
        pytest.param(["1:0", "0:2", "MIG-7a"], ([0, 1], [(0, 1, 1), (0, 7, 0), (1, 0, 0)]), id="order-of-the-host"),
        pytest.param(["MIG-7a", "0:0", "MIG-GPU-aa/7/0"], ([0], [(0, 7, 0)]), id="one-by-three-names"),
        pytest.param(["2", "0:0"], ([0, 2], [(0, 7, 0)]), id="beside-a-whole-gpu"),
        pytest.param(["0"], ([0], []), id="gpu-does-not-bring-its-instances"),
        pytest.param(["none"], ([], []), id="none"),
    ],
)
def test_select(devices: list[str], expected: object) -> None:
    assert expected == _select(*devices)


def test_select_all_is_in_the_order_of_proc(mig_proc: Path) -> None:
    assert _select("all", host=gpus.read(str(mig_proc))) == ([0, 1], [(0, 1, 0), (0, 1, 1), (0, 11, 0), (1, 0, 0)])


@pytest.mark.parametrize("devices", [["all"], ["0"], ["MIG-GPU-aa/7/0"], ["none"]])
def test_nvml_is_not_asked_for_what_proc_knows(devices: list[str]) -> None:
    nvml = Nvml(REPORT)
    _select(*devices, nvml=nvml)
    assert nvml.asked == []


BEFORE = Report(
    "12.4", (_device(FIRST, InstanceReport(0, 7, 0, "MIG-7a"), InstanceReport(1, 8, 0, "MIG-8a")), OF_SECOND, *OTHERS)
)


@pytest.mark.parametrize(
    ("device", "kept", "asked", "expected"),
    [
        pytest.param("MIG-7a", REPORT, [False], (0, 7, 0), id="kept-is-good"),
        pytest.param("MIG-1b", BEFORE, [False, True], (0, 1, 1), id="uuid-is-new"),
        pytest.param("0:1", BEFORE, [False, True], (0, 1, 0), id="index-means-another-by-now"),
    ],
)
def test_nvml_is_asked_again_after_a_change(
    device: str, kept: Report, asked: list[bool], expected: tuple[int, int, int]
) -> None:
    """Otherwise `0:1` would be the instance 8/0, which is no more, or was made anew for somebody else."""
    nvml = Nvml(kept, REPORT)
    assert _select(device, nvml=nvml)[1] == [expected]
    assert asked == nvml.asked


@pytest.mark.parametrize(
    ("device", "message"),
    [
        pytest.param("MIG-9", f"unknown MIG device `MIG-9`; this host has {MIGS}", id="uuid"),
        pytest.param("MIG-", f"unknown MIG device `MIG-`; this host has {MIGS}", id="beginning-of-all"),
        pytest.param(
            "MIG-1",
            "`MIG-1` is the beginning of several UUIDs: 0:1 (MIG-1a), 0:2 (MIG-1b), 1:0 (MIG-1a2)",
            id="several",
        ),
        pytest.param("MIG-7a\n", f"unknown MIG device `MIG-7a\\n`; this host has {MIGS}", id="newline"),
        pytest.param("9:0", f"unknown device `9:0`: there is no GPU 9; this host has {GPUS}", id="no-such-gpu"),
        pytest.param(
            "1:1", "unknown MIG device `1:1`; GPU 1 (GPU-bb, 0000:0f:00.0) has 1:0 (MIG-1a2)", id="index-out-of-range"
        ),
        pytest.param(
            "2:0",
            "unknown MIG device `2:0`: MIG mode is on for GPU 2 (GPU-cc, 0000:47:00.0), and it has no instances; "
            "make some with `nvidia-smi mig -i 2 -cgi PROFILE -C`",
            id="no-instances",
        ),
        pytest.param(
            "3:0",
            "unknown MIG device `3:0`: MIG mode is off for GPU 3 (GPU-dd, 0000:4e:00.0); "
            "ask for the whole GPU, as `3`, or turn it on with `nvidia-smi -i 3 -mig 1`",
            id="mig-is-off",
        ),
        pytest.param(
            "MIG-GPU-dd/0/0", "unknown MIG device `MIG-GPU-dd/0/0`: MIG mode is off for GPU 3 (", id="old-mig-is-off"
        ),
        pytest.param(
            "MIG-GPU-bb/1/0",
            "unknown MIG device `MIG-GPU-bb/1/0`; GPU 1 (GPU-bb, 0000:0f:00.0) has MIG-GPU-bb/0/0",
            id="old-no-such-instance",
        ),
        pytest.param("MIG-GPU-bb/0", "unknown MIG device `MIG-GPU-bb/0`; GPU 1 (", id="old-without-a-part"),
        pytest.param("MIG-GPU-bb/0/0/0", "unknown MIG device `MIG-GPU-bb/0/0/0`; GPU 1 (", id="old-with-one-more"),
        pytest.param("MIG-GPU-bb/-0/+0", "unknown MIG device `MIG-GPU-bb/-0/+0`; GPU 1 (", id="old-with-signs"),
        pytest.param(f"MIG-GPU-bb/{'9' * 5000}/0", "unknown MIG device `MIG-GPU-bb/9", id="old-huge-number"),
        pytest.param("MIG-GPU-b/0/0", f"unknown device `MIG-GPU-b/0/0`; this host has {GPUS}", id="old-no-such-gpu"),
    ],
)
def test_select_unknown(device: str, message: str) -> None:
    with pytest.raises(DeviceError) as raised:
        _select(device)
    assert str(raised.value).startswith(f"device error: {message}")
    assert str(raised.value).count("\n") == 0


def test_select_uuid_on_a_host_without_mig_does_not_ask_nvml() -> None:
    nvml = Nvml(REPORT)
    with pytest.raises(DeviceError, match="unknown MIG device `MIG-7a`; this host has no MIG device"):
        _select("MIG-7a", nvml=nvml, host=Gpus("580.1.2", [WHOLE], {}, (0, 0, 0o666)))
    assert nvml.asked == []


def test_select_leaves_out_what_nvml_knows_of_a_gpu_that_proc_does_not_show() -> None:
    host = Gpus("580.1.2", [SECOND], {}, (0, 0, 0o666), instances={0: [(0, 0)]})
    assert _select("MIG-1", host=host) == ([1], [(1, 0, 0)])


@pytest.mark.parametrize("name", ["", ":", "0:", ":0", "0:0:0", "-1:0", "0:1.0", "1b:00", "GPU-aa", "0", "\u0660:0"])
def test_is_no_name(name: str) -> None:
    assert not device_list.is_mig(name)


# /proc


@pytest.fixture
def mig_proc(proc: Path) -> Path:
    """The host of conftest.py, its GPUs (minors 1 and 0) with instances whose numbers do not sort as text."""
    capabilities = proc / "proc/driver/nvidia/capabilities"
    for name in ("gpu1/mig/gi11/ci0", "gpu1/mig/gi1/ci1", "gpu1/mig/gi1/ci0", "gpu0/mig/gi0/ci0", "mig"):
        (capabilities / name).mkdir(parents=True)
    return proc


def test_instances(mig_proc: Path) -> None:
    assert gpus.instances(f"{mig_proc}/proc") == {0: [(0, 0)], 1: [(1, 0), (1, 1), (11, 0)]}


@pytest.mark.parametrize("name", ["gpu2/mig/gi1", "gpu2/mig", "gpu2", "gpux/mig/gi1/ci0", "gpu2/mig/gi/ci0"])
def test_instances_that_are_none(mig_proc: Path, name: str) -> None:
    (mig_proc / "proc/driver/nvidia/capabilities" / name).mkdir(parents=True)
    (mig_proc / "proc/driver/nvidia/capabilities/gpu3").touch()
    assert list(gpus.instances(f"{mig_proc}/proc")) == [0, 1]


def test_instances_of_a_driver_without_mig(proc: Path) -> None:
    assert gpus.read(str(proc)).instances == {}


@pytest.mark.root
def test_instances_of_a_simulated_host(simhost: Callable[[str], Path]) -> None:
    host = gpus.read(str(simhost("a100x8")))
    shown = [f"{item.gpu.index}/{item.gi}/{item.ci}" for item in mig.every(host)]
    expected = "0/7/0 0/8/0 0/9/0 0/10/0 0/11/0 0/12/0 0/13/0 1/3/0 1/4/0 1/5/0 1/13/0 2/0/0 3/1/0 3/1/1 3/2/0"
    assert expected.split() == shown
