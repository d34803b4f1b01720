# SPDX-License-Identifier: Apache-2.0
"""cap_nodes.py: device nodes and files of MIG instances, of the right to set MIG up, and of IMEX channels."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from nvhook.errors import DeviceError, NvhookError, RequestError
from nvhook.host import cap_nodes, gpus, mig, selection
from nvhook.host.gpus import Gpus
from nvhook.host.report import Report
from nvhook.host.selection import Selection
from nvhook.request import config as configuration
from nvhook.request.config import Config
from nvhook.request.request import Request

FILES = "/proc/driver/nvidia/capabilities"
CAPS = "/dev/nvidia-caps/nvidia-cap"
CHANNELS = "/dev/nvidia-caps-imex-channels/channel"
# Capability -> (minor, mode). The host of conftest.py has GPUs 0 and 1 with the minors 1 and 0.
MIG = {
    "mig/config": (1, 0o400),
    "mig/monitor": (2, 0o444),
    "gpu1/mig/gi7/access": (201, 0o444),
    "gpu1/mig/gi7/ci0/access": (202, 0o444),
    "gpu0/mig/gi1/access": (12, 0o444),
    "gpu0/mig/gi1/ci0/access": (13, 0o444),
    "gpu0/mig/gi1/ci1/access": (14, 0o440),
}


@pytest.fixture
def root(proc: Path) -> Path:
    """MIG instances on both GPUs, and IMEX channels."""
    for name, (minor, mode) in MIG.items():
        path = proc / FILES.lstrip("/") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"DeviceFileMinor: {minor}\nDeviceFileMode: {mode}\nDeviceFileModify: 1\n")
    devices = proc / "proc/devices"
    text = "511 nvidia-uvm\n236 nvidia-caps\n237 nvidia-caps-imex-channels"
    devices.write_text(devices.read_text().replace("511 nvidia-uvm", text))
    return proc


def _config(root: Path, more: str = "") -> Config:
    path = root / "config.toml"
    path.write_text(f"{more}\n[nvhook]\nproc-root = '{root}'\ndev-root = '{root}'\n")
    return configuration.load(str(path))


def _asked_too_much(again: bool) -> Report:
    raise AssertionError(f"NVML is asked: {again}")


def _request(devices: str, *, rights: str = "", channels: tuple[int, ...] = ()) -> Request:
    names = tuple(devices.split(","))
    return Request(names, ("utility",), (), "", imex_channels=channels, mig_rights=tuple(rights.split()))


def _find(root: Path, request: Request, more: str = "") -> list[str]:
    """Nodes, then files: a file has to be the host's, by the same path."""
    config = _config(root, more)
    host = gpus.read(config.proc_root)
    found, files = cap_nodes.find(config, request, selection.select(request.devices, host, _asked_too_much), host)
    assert [f"{root}{item.destination}" for item in files] == [item.path for item in files]
    nodes = [f"{node.path} {node.major}:{node.minor} {node.owner[2]:o}" for node in found]
    return nodes + [item.destination.removeprefix(f"{FILES}/") for item in files]


def _fail(root: Path, request: Request, kind: type[NvhookError], more: str = "") -> str:
    with pytest.raises(kind) as raised:
        _find(root, request, more)
    return str(raised.value)


GI7 = [f"{CAPS}201 236:201 444", f"{CAPS}202 236:202 444", "gpu1/mig/gi7/access", "gpu1/mig/gi7/ci0/access"]
GI1 = [f"{CAPS}12 236:12 444", f"{CAPS}13 236:13 444", f"{CAPS}14 236:14 440"]
GI1_FILES = ["gpu0/mig/gi1/access", "gpu0/mig/gi1/ci0/access", "gpu0/mig/gi1/ci1/access"]
CONFIG, MONITOR = f"{CAPS}1 236:1 400", f"{CAPS}2 236:2 444"


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        pytest.param(_request("MIG-GPU-aa/7/0"), GI7, id="one"),
        pytest.param(_request("MIG-GPU-bb/1/0"), GI1[:2] + GI1_FILES[:2], id="not-what-it-shares-an-instance-with"),
        pytest.param(_request("MIG-GPU-bb/1/1,MIG-GPU-bb/1/0"), GI1 + GI1_FILES, id="shared-instance-once"),
        pytest.param(_request("all"), [*GI7[:2], *GI1, *GI7[2:], *GI1_FILES], id="all"),
        pytest.param(_request("0,1"), [], id="whole-gpus"),
        pytest.param(_request("none"), [], id="none"),
        pytest.param(_request("none", rights="monitor"), [MONITOR, "mig/monitor"], id="right-alone"),
        pytest.param(
            _request("0", rights="config"), [CONFIG, *GI7[:2], "mig/config", *GI7[2:]], id="config-of-one-gpu"
        ),
        pytest.param(
            _request("all", rights="config monitor"),
            [CONFIG, MONITOR, *GI7[:2], *GI1, "mig/config", "mig/monitor", *GI7[2:], *GI1_FILES],
            id="both-of-all",
        ),
        pytest.param(
            _request("1", channels=(0, 2047)),
            [f"{CHANNELS}0 237:0 666", f"{CHANNELS}2047 237:2047 666"],
            id="imex",
        ),
    ],
)
def test_find(root: Path, request_: Request, expected: list[str]) -> None:
    assert expected == _find(root, request_)


def test_find_belongs_to_root(root: Path) -> None:
    """The driver's params are about /dev/nvidia0 and IMEX channels; a capability has a mode of its own."""
    (root / "proc/driver/nvidia/params").write_text("DeviceFileUID: 5\nDeviceFileGID: 44\nDeviceFileMode: 432\n")
    config = _config(root)
    host = gpus.read(config.proc_root)
    nodes, _ = cap_nodes.find(config, _request("all", channels=(3,)), Selection([], mig.every(host)[:1]), host)
    assert [node.owner for node in nodes] == [(0, 0, 0o444), (0, 0, 0o444), (5, 44, 0o660)]


def test_find_with_a_driver_from_before_the_nodes(root: Path) -> None:
    devices = root / "proc/devices"
    devices.write_text(devices.read_text().replace("236 nvidia-caps\n", ""))
    assert _find(root, _request("MIG-GPU-aa/7/0")) == GI7[2:]


@pytest.mark.parametrize("right", ["config", "monitor"])
def test_find_right_beside_single_mig_devices(root: Path, right: str) -> None:
    assert _fail(root, _request("MIG-GPU-aa/7/0", rights=right), RequestError) == (
        f"request error: the right to {right} MIG is asked for together with single MIG devices; "
        "ask for whole GPUs, or for `all`"
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param(None, "no such file or directory", id="missing"),
        pytest.param("", "no `DeviceFileMinor` and `DeviceFileMode`", id="empty"),
        pytest.param("DeviceFileMinor: 1\n", "no `DeviceFileMinor` and `DeviceFileMode`", id="no-mode"),
        pytest.param("DeviceFileMinor: -1\nDeviceFileMode: 292\n", "no `DeviceFileMinor`", id="negative"),
        pytest.param(f"DeviceFileMinor: {'9' * 5000}\nDeviceFileMode: 292\n", "no `DeviceFileMinor`", id="endless"),
        pytest.param("DeviceFileMinor: ../3\nDeviceFileMode: 292\n", "no `DeviceFileMinor`", id="path"),
    ],
)
def test_find_unreadable(root: Path, text: str | None, reason: str) -> None:
    path = root / FILES.lstrip("/") / "gpu1/mig/gi7/ci0/access"
    path.unlink() if text is None else path.write_text(text)
    message = _fail(root, _request("MIG-GPU-aa/7/0"), DeviceError)
    assert message.startswith(f"device error: read `{path}`: {reason}")


# IMEX channels


def test_channel_of_a_driver_without(root: Path) -> None:
    devices = root / "proc/devices"
    devices.write_text(devices.read_text().replace("nvidia-caps-imex-channels", "other"))
    assert _fail(root, _request("0", channels=(5,)), DeviceError).startswith(
        "device error: IMEX channel 5 is asked for and the driver has none: "
        "no `nvidia-caps-imex-channels` in /proc/devices; "
    )


HOST_ONLY = "features.disable-imex-channel-creation = true"


@pytest.mark.root
def test_channel_that_the_host_has(root: Path) -> None:
    node = root / f"{CHANNELS}5".lstrip("/")
    node.parent.mkdir(parents=True)
    os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(237, 5))
    assert _find(root, _request("0", channels=(5,)), HOST_ONLY) == [f"{CHANNELS}5 237:5 666"]


@pytest.mark.root
@pytest.mark.parametrize("there", ["nothing", "file", "other-channel", "link"])
def test_channel_that_the_host_has_not(root: Path, there: str) -> None:
    """Which there are is then the administrator's decision, and no container's."""
    node = root / f"{CHANNELS}5".lstrip("/")
    node.parent.mkdir(parents=True)
    if there == "file":
        node.touch()
    elif there == "other-channel":
        os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(237, 6))
    elif there == "link":
        os.mknod(node.with_name("real"), stat.S_IFCHR | 0o666, os.makedev(237, 5))
        node.symlink_to("real")
    assert _fail(root, _request("0", channels=(5,)), DeviceError, HOST_ONLY) == (
        f"device error: IMEX channel 5 is asked for and this host has no `{CHANNELS}5`; "
        f"make it with `mknod {CHANNELS}5 c 237 5`, "
        "or let `features.disable-imex-channel-creation` be false in config.toml"
    )
    assert _find(root, _request("0", channels=(5,))) == [f"{CHANNELS}5 237:5 666"]


def test_nothing_is_read_for_who_asks_for_nothing(tmp_path: Path) -> None:
    host = Gpus("580.1.2", [], {}, (0, 0, 0o666))
    assert cap_nodes.find(_config(tmp_path), _request("none"), Selection([], []), host) == ([], [])
