# SPDX-License-Identifier: Apache-2.0
"""features.py: what the host has of GPUDirect Storage, InfiniBand, GDRCopy and NVSwitches, from a /dev made by hand."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from nvhook.host import features
from nvhook.request import config as configuration
from nvhook.request import request
from nvhook.request.config import Config

NODES = {
    "nvidia-fs0": (511, 0),
    "nvidia-fs15": (511, 15),
    "nvidia-fsx": (511, 16),
    "nvidia0": (195, 0),
    "infiniband/uverbs1": (231, 193),
    "infiniband/uverbs0": (231, 192),
    "infiniband/umad0": (231, 0),
    "infiniband/rdma_cm": (10, 58),
    "gdrdrv": (510, 0),
    "gdrdrv2": (510, 1),
    "nvidia-nvswitch0": (507, 0),
    "nvidia-nvswitchctl": (507, 255),
    "nvidia-nvlink": (508, 0),
}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A host with a /dev, and a driver root of its own."""
    path = tmp_path / "config.toml"
    path.write_text(f"nvidia-container-cli.root = '{tmp_path}/driver'\nnvhook.dev-root = '{tmp_path}'\n")
    (tmp_path / "dev").mkdir()
    (tmp_path / "driver").mkdir()
    return configuration.load(str(path))


@pytest.fixture
def dev(config: Config) -> None:
    directory = Path(config.dev_root) / "dev"
    for name, device in NODES.items():
        (directory / name).parent.mkdir(exist_ok=True)
        os.mknod(directory / name, stat.S_IFCHR | 0o660, os.makedev(*device))
        (directory / name).chmod(0o660)
    os.chown(directory / "gdrdrv", 0, 44)
    (directory / "nvidia-fs1").touch()
    (directory / "nvidia-fs2").symlink_to("nvidia-fs0")
    (directory / "nvidia-fs.d").mkdir()
    os.mknod(directory / "nvidia-fs3", stat.S_IFBLK | 0o660, os.makedev(7, 0))


def _find(config: Config, *names: str) -> tuple[list[str], list[str], list[str]]:
    """(nodes, files, warnings)"""
    warnings: list[str] = []
    found, files = features.find(config, names, warnings)
    nodes = [f"{node.path} {node.major}:{node.minor}" for node in found]
    return nodes, [f"{item.path} > {item.destination} {item.what}" for item in files], warnings


FS = ["/dev/nvidia-fs0 511:0", "/dev/nvidia-fs15 511:15", "/dev/nvidia-fsx 511:16"]
MOFED = ["/dev/infiniband/uverbs0 231:192", "/dev/infiniband/uverbs1 231:193", "/dev/infiniband/rdma_cm 10:58"]
SWITCHES = ["/dev/nvidia-nvswitchctl 507:255", "/dev/nvidia-nvswitch0 507:0"]
GDR = ["/dev/gdrdrv 510:0"]


@pytest.mark.root
@pytest.mark.usefixtures("dev")
@pytest.mark.parametrize(
    ("names", "expected"),
    [
        pytest.param([], [], id="none"),
        pytest.param(["gds"], FS, id="gds"),
        pytest.param(["mofed"], MOFED, id="mofed"),
        pytest.param(["gdrcopy"], GDR, id="gdrcopy"),
        pytest.param(["nvswitch"], SWITCHES, id="nvswitch"),
        pytest.param(request.FEATURES, FS + MOFED + GDR + SWITCHES, id="all"),
    ],
)
def test_nodes(config: Config, names: list[str], expected: list[str]) -> None:
    assert (expected, [], []) == _find(config, *names)


@pytest.mark.root
@pytest.mark.usefixtures("dev")
def test_nodes_have_the_hosts_owner(config: Config) -> None:
    nodes, _ = features.find(config, ("gdrcopy",), [])
    assert [node.owner for node in nodes] == [(0, 44, 0o660)]


def test_every_feature_has_nodes() -> None:
    assert tuple(features.NODES) == request.FEATURES


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("gds", "`/dev/nvidia-fs*`"),
        ("mofed", "`/dev/infiniband/uverbs*` or `/dev/infiniband/rdma_cm`"),
        ("gdrcopy", "`/dev/gdrdrv`"),
        ("nvswitch", "`/dev/nvidia-nvswitchctl` or `/dev/nvidia-nvswitch*`"),
    ],
)
def test_feature_that_the_host_has_not_is_a_warning(config: Config, name: str, names: str) -> None:
    (Path(config.driver_root) / "run/udev").mkdir(parents=True)
    warning = f"NVIDIA_{name.upper()}=enabled gives nothing: this host has no {names}"
    assert _find(config, name) == ([], [], [warning])


# What GPUDirect Storage reads


@pytest.mark.root
@pytest.mark.usefixtures("dev")
def test_files(config: Config) -> None:
    driver = Path(config.driver_root)
    (driver / "run/udev").mkdir(parents=True)
    (driver / "usr/local/gds").mkdir(parents=True)
    (driver / "usr/local/gds/cufile.json").write_text("{}")
    (driver / "etc").mkdir()
    (driver / "etc/cufile.json").symlink_to("/usr/local/gds/cufile.json")
    expected = [
        f"{driver}/run/udev > /run/udev directory",
        f"{driver}/usr/local/gds/cufile.json > /etc/cufile.json file",
    ]
    assert _find(config, "gds") == (FS, expected, [])
    assert _find(config, "gdrcopy") == (GDR, [], [])


@pytest.mark.root
@pytest.mark.usefixtures("dev")
def test_files_of_another_kind(config: Config) -> None:
    driver = Path(config.driver_root)
    (driver / "run").mkdir()
    (driver / "run/udev").touch()
    (driver / "etc/cufile.json").mkdir(parents=True)
    assert _find(config, "gds") == (FS, [], [])
    driver.rename(driver.with_name("gone"))
    assert _find(config, "gds") == (FS, [], [])
