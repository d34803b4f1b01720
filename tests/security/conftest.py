# SPDX-License-Identifier: Apache-2.0
"""The simulated host that the whole plan is of, once for all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from security import hostile


@pytest.fixture(scope="session")
def settings(simhost: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile.make_host(simhost(hostile.HOST), tmp_path_factory.mktemp("hostile") / "host")


@pytest.fixture
def place(settings: Path, tmp_path: Path) -> hostile.Place:
    return hostile.Place(tmp_path, settings)
