# SPDX-License-Identifier: Apache-2.0
"""sockets.py: the daemons' sockets as they are at this moment, and what is not taken for one."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from nvhook.host import sockets

pytestmark = pytest.mark.root

PERSISTENCED = "nvidia-persistenced/socket"
FABRIC = "nvidia-fabricmanager/socket"


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)


def _socket(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mknod(path, stat.S_IFSOCK | 0o666)


def _find(root: Path) -> list[tuple[str, str, str, str]]:
    return [
        (item.path.removeprefix(str(root)), item.destination, item.what, " ".join(item.capabilities))
        for item in sockets.find(str(root))
    ]


def test_none(tmp_path: Path) -> None:
    assert _find(tmp_path) == []
    assert _find(tmp_path / "nowhere") == []


@pytest.mark.parametrize("run", ["run", "var/run"])
def test_sockets_of_daemons(tmp_path: Path, run: str) -> None:
    for name in (PERSISTENCED, FABRIC):
        _socket(tmp_path / run / name)
    assert _find(tmp_path) == [
        (f"/{run}/{PERSISTENCED}", f"/run/{PERSISTENCED}", "socket", "utility"),
        (f"/{run}/{FABRIC}", f"/run/{FABRIC}", "socket", "compute utility"),
    ]


def test_sockets_through_a_link(tmp_path: Path) -> None:
    _socket(tmp_path / "run" / FABRIC)
    (tmp_path / "var").mkdir()
    (tmp_path / "var/run").symlink_to("/run")
    assert [path for path, *_ in _find(tmp_path)] == [f"/run/{FABRIC}"]


@pytest.mark.parametrize("kind", ["file", "directory", "link-out"])
def test_what_is_no_socket(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, kind: str) -> None:
    path = tmp_path / "run" / PERSISTENCED
    path.parent.mkdir(parents=True)
    if kind == "file":
        path.touch()
    elif kind == "directory":
        path.mkdir()
    else:
        outside = tmp_path_factory.mktemp("outside") / "socket"
        _socket(outside)
        path.symlink_to(outside)
    assert _find(tmp_path) == []


@pytest.mark.parametrize("place", ["", "/srv/mps", "/srv/mps/"])
def test_mps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    if place:
        monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", place)
    path = place.rstrip("/") or "/tmp/nvidia-mps"
    (tmp_path / path[1:]).mkdir(parents=True)
    os.mkfifo(tmp_path / path[1:] / "control")
    assert _find(tmp_path) == [(path, path, "directory", "compute")]


@pytest.mark.parametrize("fault", ["no-daemon", "another-user", "another-users-pipe", "link", "file"])
def test_mps_that_is_not_believed(tmp_path: Path, fault: str) -> None:
    pipes = tmp_path / "tmp/nvidia-mps"
    real = tmp_path / "tmp/elsewhere" if fault == "link" else pipes
    real.mkdir(parents=True)
    if fault == "file":
        (real / "control").touch()
    elif fault != "no-daemon":
        os.mkfifo(real / "control")
    if fault == "link":
        pipes.symlink_to("elsewhere")
    if fault.startswith("another"):
        os.chown(real if fault == "another-user" else real / "control", 1000, 1000)
    assert _find(tmp_path) == []
