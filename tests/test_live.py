# SPDX-License-Identifier: Apache-2.0
"""commands/info/live.py: NVML's values of the moment, and which answers are believed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from conftest import HOSTS
from nvhook.commands.info import live
from nvhook.commands.info.live import Now, Sample
from nvhook.driver import inventory
from nvhook.errors import DriverError
from nvhook.host import gpus
from nvhook.request import config as configuration
from simhost.build import build

A100 = json.loads((HOSTS / "a100x2-debian12.json").read_text())
UUIDS = [gpu["uuid"] for gpu in A100["gpus"]]
MIG = "MIG-5e0c7f1a-93b2-5d48-8a61-c24fe7039b15"
MIB = 1 << 20


def _ask(host: Path) -> Now:
    config = configuration.load(str(host / "config.toml"))
    driver = inventory.load(config, gpus.read(config.proc_root).driver_version, [], keep=False)
    return live.ask(config, inventory.nvml_library(driver))


@pytest.mark.root
def test_ask(tmp_path: Path) -> None:
    description = copy.deepcopy(A100)
    description["gpus"][1]["mig"] = [
        {"gi": 3, "ci": 0, "profile": "2g.10gb", "uuid": MIG, "now": {"memory_total": 9856, "memory_used": 12}}
    ]
    build(description, tmp_path)
    now = _ask(tmp_path)
    assert (now.driver_version, now.report.cuda) == ("550.163.01", "12.4")
    assert [item.uuid for item in now.report.devices] == UUIDS
    name = "NVIDIA A100-SXM4-40GB"
    assert now.samples == {
        UUIDS[0]: Sample(UUIDS[0], name, 31207 * MIB, 40960 * MIB, 97, 64),
        UUIDS[1]: Sample(UUIDS[1], name, 4 * MIB, 40960 * MIB, None, 31),
        MIG: Sample(MIG, f"{name} MIG 2g.10gb", 12 * MIB, 9856 * MIB, None, None),
    }


@pytest.mark.root
def test_ask_nvml_that_does_not_tell(tmp_path: Path) -> None:
    description = copy.deepcopy(A100)
    description["gpus"][0]["now"] = {"memory_total": 0, "load": -1, "temperature": -1}
    build(description, tmp_path)
    sample = _ask(tmp_path).samples[UUIDS[0]]
    assert (sample.memory_used, sample.memory_total, sample.load, sample.temperature) == (None,) * 4


@pytest.mark.root
def test_ask_nvml_that_does_not_answer(tmp_path: Path) -> None:
    build(A100, tmp_path)
    (tmp_path / "dev/nvidiactl").unlink()
    with pytest.raises(DriverError, match="driver Not Loaded; see whether"):
        _ask(tmp_path)


REPORT = {
    "cuda": "12.4",
    "devices": [
        {"pci": "0000:07:00.0", "uuid": "GPU-1", "brand": "", "arch": "", "mig_enabled": False, "instances": []}
    ],
}
SAMPLE = {"uuid": "GPU-1", "name": "NVIDIA X", "memory_used": 1, "memory_total": 2, "load": 100, "temperature": 40}
ANSWER = {"driver_version": "580.1", "report": REPORT, "samples": [SAMPLE]}


def test_parse() -> None:
    now = live.parse(ANSWER)
    assert (now.driver_version, now.samples["GPU-1"]) == ("580.1", Sample("GPU-1", "NVIDIA X", 1, 2, 100, 40))


def _with(**values: Any) -> dict[str, Any]:
    return {**ANSWER, "samples": [{**SAMPLE, **values}]}


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param([], id="list"),
        pytest.param({}, id="empty"),
        pytest.param({**ANSWER, "driver_version": "580\x1b[2J"}, id="version"),
        pytest.param({**ANSWER, "report": None}, id="no-report"),
        pytest.param({**ANSWER, "samples": {}}, id="samples-are-no-list"),
        pytest.param({**ANSWER, "samples": [1]}, id="sample-is-a-number"),
        pytest.param({**ANSWER, "samples": [SAMPLE] * 5000}, id="too-many"),
        pytest.param({**ANSWER, "samples": [{"uuid": "GPU-1"}]}, id="sample-without-values"),
        pytest.param(_with(uuid="nvidia0"), id="uuid"),
        pytest.param(_with(name="a\nb"), id="name-of-two-lines"),
        pytest.param(_with(name="x" * 97), id="long-name"),
        pytest.param(_with(memory_used=-1), id="negative"),
        pytest.param(_with(memory_total=1 << 60), id="more-memory-than-there-is"),
        pytest.param(_with(load=True), id="bool"),
        pytest.param(_with(load=1.5), id="fraction"),
        pytest.param(_with(temperature="40"), id="text"),
    ],
)
def test_parse_refuses(answer: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        live.parse(answer)
