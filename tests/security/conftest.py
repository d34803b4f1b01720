# SPDX-License-Identifier: Apache-2.0
"""The simulated host that the whole plan is of, once for all."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from security import hostile


@pytest.fixture(scope="session")
def settings(simhost: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile.make_host(simhost(hostile.HOST), tmp_path_factory.mktemp("hostile") / "host")


@pytest.fixture(scope="session")
def mig_settings(simhost: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second one, with MIG devices and IMEX channels."""
    settings = hostile.make_host(simhost("a100x8"), tmp_path_factory.mktemp("hostile-mig") / "host")
    devices = settings.parent / "proc/devices"
    devices.write_text(devices.read_text().replace(" nvidia-caps\n", " nvidia-caps\n230 nvidia-caps-imex-channels\n"))
    channels = settings.parent / "dev/nvidia-caps-imex-channels"
    channels.mkdir()
    for number in range(2):  # they are made where there are none, and the host is to stay as it is
        os.mknod(channels / f"channel{number}", stat.S_IFCHR | 0o666, os.makedev(230, number))
    return settings


@pytest.fixture
def place(settings: Path, tmp_path: Path) -> hostile.Place:
    return hostile.Place(tmp_path, settings)
