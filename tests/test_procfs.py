# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nvhook.errors import DeviceError
from nvhook.host import procfs


def _read(proc: Path) -> dict[str, str]:
    found = procfs.read(str(proc))
    assert found.path == str(proc / "proc/driver/nvidia")
    return found.files


def test_read_what_is_there(proc: Path) -> None:
    params = "DeviceFileUID: 0\nDeviceFileGID: 0\nDeviceFileMode: 438\nModifyDeviceFiles: 0\n"
    version = (proc / "proc/driver/nvidia/version").read_text()
    assert _read(proc) == {"params": params, "version": version}
    (proc / "proc/driver/nvidia/registry").write_text('Binary: ""\n')
    assert _read(proc) == {"params": params, "version": version, "registry": 'Binary: ""\n'}


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        pytest.param("ModifyDeviceFiles: 1\nA: 1\n", "A: 1\nModifyDeviceFiles: 0\n", id="on"),
        pytest.param("A: 1\nModifyDeviceFiles: 0\n", "A: 1\nModifyDeviceFiles: 0\n", id="off"),
        pytest.param("ModifyDeviceFiles: 1\nModifyDeviceFiles: 1", "ModifyDeviceFiles: 0\n", id="twice"),
        pytest.param("A: ModifyDeviceFiles: 1\n", "A: ModifyDeviceFiles: 1\nModifyDeviceFiles: 0\n", id="unsaid"),
        pytest.param("", "ModifyDeviceFiles: 0\n", id="empty"),
    ],
)
def test_read_params_leave_nodes_alone(proc: Path, params: str, expected: str) -> None:
    (proc / "proc/driver/nvidia/params").write_text(params)
    assert _read(proc)["params"] == expected


def test_read_nothing(tmp_path: Path) -> None:
    assert _read(tmp_path) == {}


def test_read_bytes_that_are_no_text(proc: Path) -> None:
    (proc / "proc/driver/nvidia/registry").write_bytes(b"a\xff\n")
    assert _read(proc)["registry"] == "a\N{REPLACEMENT CHARACTER}\n"


def test_read_a_directory(proc: Path) -> None:
    path = proc / "proc/driver/nvidia/registry"
    path.mkdir()
    with pytest.raises(DeviceError) as raised:
        procfs.read(str(proc))
    assert str(raised.value) == f"device error: read `{path}`: is a directory"


@pytest.mark.root
def test_read_a_simulated_host(simhost: Callable[[str], Path]) -> None:
    host = simhost("a100x2")
    files = _read(host)
    assert sorted(files) == ["params", "registry", "version"]
    assert "ModifyDeviceFiles: 1" in (host / "proc/driver/nvidia/params").read_text()
    assert "ModifyDeviceFiles: 1" not in files["params"]
