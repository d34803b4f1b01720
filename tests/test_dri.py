# SPDX-License-Identifier: Apache-2.0
"""dri.py: which of /dev/dri is which GPU's, from a /sys made by hand."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from nvhook.host import dri, host
from nvhook.host.gpus import Gpu, Gpus
from nvhook.host.selection import Selection
from nvhook.request import config as configuration
from nvhook.request.config import Config
from nvhook.request.request import Request

FIRST = Gpu(0, 0, "GPU-aa", "0000:07:00.0", "")
SECOND = Gpu(1, 1, "GPU-bb", "0000:c1:00.0", "")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    path = tmp_path / "config.toml"
    path.write_text(f"[nvhook]\nproc-root = '{tmp_path}'\ndev-root = '{tmp_path}'\n")
    return configuration.load(str(path))


def _shown(top: Path, pci: str, **devices: str) -> None:
    for name, device in devices.items():
        path = top / "sys/bus/pci/devices" / pci / "drm" / name / "dev"
        path.parent.mkdir(parents=True)
        path.write_text(device)


def _find(config: Config, *chosen: Gpu) -> list[tuple[str, str, int, int, str]]:
    return [(node.name, node.role, node.major, node.minor, node.pci) for node in dri.find(config, list(chosen))]


def test_nodes_by_address(tmp_path: Path, config: Config) -> None:
    _shown(tmp_path, "0000:00:02.0", card0="226:0\n", renderD128="226:128\n")
    _shown(tmp_path, "0000:07:00.0", card2="226:2\n", renderD130="226:130\n")
    _shown(tmp_path, "0000:c1:00.0", card1="226:1\n", renderD129="226:129\n")
    first = [("card2", "card", 226, 2, FIRST.pci), ("renderD130", "render", 226, 130, FIRST.pci)]
    second = [("card1", "card", 226, 1, SECOND.pci), ("renderD129", "render", 226, 129, SECOND.pci)]
    assert first == _find(config, FIRST)
    assert first + second == _find(config, FIRST, SECOND)
    assert _find(config) == []


def test_none_without_nvidia_drm(config: Config) -> None:
    assert _find(config, FIRST) == []


@pytest.mark.parametrize("device", ["", "226", "226:x", "195:0", "226:-1", "ä"])
def test_unreadable_number_is_no_node(tmp_path: Path, config: Config, device: str) -> None:
    _shown(tmp_path, FIRST.pci, card0=device, renderD128="226:128\n")
    assert [name for name, *_ in _find(config, FIRST)] == ["renderD128"]


def test_other_names_are_no_nodes(tmp_path: Path, config: Config) -> None:
    """Connectors are named after their card."""
    _shown(tmp_path, FIRST.pci, card0="226:0\n", controlD64="226:64\n", **{"card0-DP-1": "226:0\n", "cardx": "226:7\n"})
    assert [name for name, *_ in _find(config, FIRST)] == ["card0"]


@pytest.mark.root
def test_owner_is_that_of_the_hosts_node(tmp_path: Path, config: Config) -> None:
    _shown(tmp_path, FIRST.pci, card0="226:0\n", renderD128="226:128\n")
    (tmp_path / "dev/dri").mkdir(parents=True)
    os.mknod(tmp_path / "dev/dri/card0", stat.S_IFCHR, os.makedev(226, 0))
    os.chown(tmp_path / "dev/dri/card0", 0, 44)
    (tmp_path / "dev/dri/card0").chmod(0o640)
    assert [node.owner for node in dri.find(config, [FIRST])] == [(0, 44, 0o640), (0, 0, 0o660)]


@pytest.mark.parametrize(
    ("capabilities", "count"),
    [(("compute", "utility", "video"), 0), (("display",), 1), (("graphics", "utility"), 1)],
)
def test_none_for_a_container_that_does_not_draw(
    tmp_path: Path, config: Config, capabilities: tuple[str, ...], count: int
) -> None:
    _shown(tmp_path, FIRST.pci, card0="226:0\n")
    asked = Request(("all",), capabilities, (), "")
    found = host.now(config, asked, Selection([FIRST], []), Gpus("9.1", [FIRST], {}, (0, 0, 0o666)), [])
    assert len(found.dri) == count
