# SPDX-License-Identifier: Apache-2.0
"""modules.py: which program loads modules, and the device nodes that a host lacks, made below a directory."""

from __future__ import annotations

import fcntl
import os
import stat
import time
from pathlib import Path

import pytest

from nvhook.container.edits import Device
from nvhook.errors import DeviceError
from nvhook.host import modules
from nvhook.linux import userns
from nvhook.request import config
from nvhook.request.config import Config


def _config(directory: Path, text: str = "", *, root: str = "") -> Config:
    path = directory / "config.toml"
    place = root or str(directory)
    path.write_text(f"{text}\nnvhook.dev-root = '{place}'\nnvhook.proc-root = '{place}'\n")
    return config.load(str(path))


def _node(path: str, major: int, minor: int, *, mode: int = 0o666, gid: int = 0) -> Device:
    return Device(path, major, minor, "rw", mode=mode, uid=0, gid=gid)


NODES = [
    _node("/dev/nvidia0", 195, 0, mode=0o660, gid=44),
    _node("/dev/nvidiactl", 195, 255),
    _node("/dev/nvidia-uvm", 511, 0),
    _node("/dev/nvidia-caps/nvidia-cap1", 236, 1, mode=0o444),
    _node("/dev/dri/card1", 226, 1),
]
MADE = {
    "nvidia0": (0o660, 44, 195, 0),
    "nvidiactl": (0o666, 0, 195, 255),
    "nvidia-uvm": (0o666, 0, 511, 0),
    "nvidia-caps/nvidia-cap1": (0o444, 0, 236, 1),
}


def _made(root: Path) -> dict[str, tuple[int, int, int, int]]:
    found = {}
    for path in (root / "dev").rglob("*"):
        status = path.lstat()
        if stat.S_ISCHR(status.st_mode):
            numbers = os.major(status.st_rdev), os.minor(status.st_rdev)
            found[str(path.relative_to(root / "dev"))] = (stat.S_IMODE(status.st_mode), status.st_gid, *numbers)
    return found


# modprobe


def test_modprobe_is_the_kernels(tmp_path: Path) -> None:
    path = modules.modprobe(_config(tmp_path, root="/"))
    if os.geteuid() == 0 and userns.is_first():
        named = Path("/proc/sys/kernel/modprobe")
        assert path == (named.read_text().strip() if named.exists() else "") or path == "/sbin/modprobe"
    else:
        assert path == ""


@pytest.mark.parametrize("key", ["dev-root", "proc-root"])
def test_modprobe_not_for_a_simulated_host(tmp_path: Path, key: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(f"nvhook.{key} = '{tmp_path}'")
    assert modules.modprobe(config.load(str(path))) == ""


def test_modprobe_not_without_load_kmods(tmp_path: Path) -> None:
    assert modules.modprobe(_config(tmp_path, "nvidia-container-cli.load-kmods = false", root="/")) == ""


def test_load_gives_nothing_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One argument, a PATH, an empty stdin, and no descriptor."""
    monkeypatch.setenv("LD_PRELOAD_NOT", "/x")
    program = tmp_path / "modprobe"
    program.write_text(
        f'#!/bin/sh\n{{ echo "$@"; env | grep -v -e ^PWD= -e ^_= ; cat; ls /proc/$$/fd; }} >{tmp_path}/said'
    )
    program.chmod(0o755)
    kept = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 200)
    try:
        modules.load("nvidia-uvm", str(program))
    finally:
        os.close(kept)
    said = (tmp_path / "said").read_text().split()
    assert said[:2] == ["nvidia-uvm", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"]
    assert "LD_PRELOAD_NOT=/x" not in said
    assert str(kept) not in said


def test_load_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "_SECONDS", 1)
    program = tmp_path / "modprobe"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    begin = time.monotonic()
    with pytest.raises(DeviceError, match="cannot be: not finished after 1 s"):
        modules.load("nvidia", str(program))
    assert time.monotonic() - begin < 3


# Nodes


@pytest.mark.root
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_nodes_that_the_host_lacks(tmp_path: Path, umask: int) -> None:
    """Those of the driver alone: the kernel makes DRI's."""
    warnings: list[str] = []
    former = os.umask(umask)
    try:
        modules.make_nodes(_config(tmp_path), NODES, warnings)
        assert os.umask(umask) == umask
    finally:
        os.umask(former)
    assert _made(tmp_path) == MADE
    assert warnings == []
    assert stat.S_IMODE((tmp_path / "dev/nvidia-caps").stat().st_mode) == 0o755


@pytest.mark.root
@pytest.mark.parametrize("kind", ["node", "file", "dangling-link"])
def test_nodes_that_are_there_stay(tmp_path: Path, kind: str) -> None:
    (tmp_path / "dev").mkdir()
    path = tmp_path / "dev/nvidia0"
    if kind == "node":
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    elif kind == "file":
        path.touch(0o600)
    else:
        path.symlink_to("nowhere")
    before = path.lstat()
    modules.make_nodes(_config(tmp_path), NODES, [])
    assert path.lstat() == before
    assert {"nvidiactl", "nvidia-uvm", "nvidia-caps/nvidia-cap1"} <= _made(tmp_path).keys()


@pytest.mark.root
@pytest.mark.parametrize(
    ("params", "expected"),
    [
        pytest.param("ModifyDeviceFiles: 1\n", MADE, id="ours-to-make"),
        pytest.param("ModifyDeviceFiles: 0\n", {}, id="left-to-the-administrator"),
        pytest.param("DeviceFileMode: 438\n", MADE, id="not-said"),
        pytest.param("", MADE, id="empty"),
    ],
)
def test_nodes_as_the_module_is_told(tmp_path: Path, params: str, expected: dict[str, object]) -> None:
    directory = tmp_path / "proc/driver/nvidia"
    directory.mkdir(parents=True)
    (directory / "params").write_text(params)
    (tmp_path / "dev").mkdir()
    modules.make_nodes(_config(tmp_path), NODES, [])
    assert _made(tmp_path) == expected


@pytest.mark.root
def test_no_nodes_without_load_kmods(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    modules.make_nodes(_config(tmp_path, "nvidia-container-cli.load-kmods = false"), NODES, [])
    assert _made(tmp_path) == {}


@pytest.mark.root
def test_node_that_cannot_be_made_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia-caps").touch()
    warnings: list[str] = []
    modules.make_nodes(_config(tmp_path), NODES, warnings)
    assert set(_made(tmp_path)) == {"nvidia0", "nvidiactl", "nvidia-uvm"}
    assert warnings == [f"make `{tmp_path}/dev/nvidia-caps/nvidia-cap1` on the host: file exists"]


@pytest.mark.root
def test_no_nodes_in_a_dev_of_another_host(tmp_path: Path) -> None:
    """The /proc of a simulated host says nothing about this machine's /dev."""
    settings = tmp_path / "config.toml"
    settings.write_text(f"nvhook.proc-root = '{tmp_path}'\n")
    path = "/dev/nvidia-of-nvhook-tests"
    try:
        modules.make_nodes(config.load(str(settings)), [_node(path, 195, 77)], [])
        assert not os.path.lexists(path)
    finally:
        if os.path.lexists(path):
            os.unlink(path)


# Links


def _links(root: Path) -> dict[str, str]:
    return {path.name: os.readlink(path) for path in (root / "dev/char").iterdir()}


LINKS = {
    "195:0": "../nvidia0",
    "195:255": "../nvidiactl",
    "511:0": "../nvidia-uvm",
    "236:1": "../nvidia-caps/nvidia-cap1",
}


@pytest.mark.root
@pytest.mark.parametrize("are_there", [False, True], ids=["with-their-nodes", "of-nodes-that-are-there"])
def test_links_for_systemd(tmp_path: Path, *, are_there: bool) -> None:
    """The driver's alone: udev makes DRI's."""
    if are_there:
        modules.make_nodes(_config(tmp_path), NODES, [])
    (tmp_path / "dev/char").mkdir(parents=True)
    warnings: list[str] = []
    modules.make_nodes(_config(tmp_path), NODES, warnings)
    modules.make_nodes(_config(tmp_path), NODES, warnings)
    assert (_links(tmp_path), warnings) == (LINKS, [])
    assert (tmp_path / "dev/char/195:255").stat().st_rdev == os.makedev(195, 255)


@pytest.mark.root
def test_links_that_are_there_stay(tmp_path: Path) -> None:
    (tmp_path / "dev/char").mkdir(parents=True)
    (tmp_path / "dev/char/195:0").symlink_to("/dev/nvidia0")
    modules.make_nodes(_config(tmp_path), NODES, [])
    assert _links(tmp_path) == {**LINKS, "195:0": "/dev/nvidia0"}


@pytest.mark.root
def test_no_links_where_nobody_keeps_them(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    modules.make_nodes(_config(tmp_path), NODES, [])
    assert not (tmp_path / "dev/char").exists()


@pytest.mark.root
def test_no_links_without_load_kmods(tmp_path: Path) -> None:
    (tmp_path / "dev/char").mkdir(parents=True)
    modules.make_nodes(_config(tmp_path, "nvidia-container-cli.load-kmods = false"), NODES, [])
    assert _links(tmp_path) == {}


@pytest.mark.root
def test_links_where_the_administrator_makes_the_nodes(tmp_path: Path) -> None:
    (tmp_path / "dev/char").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/params").write_text("ModifyDeviceFiles: 0\n")
    modules.make_nodes(_config(tmp_path), NODES, [])
    assert (_links(tmp_path), _made(tmp_path)) == (LINKS, {})
