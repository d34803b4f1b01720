# SPDX-License-Identifier: Apache-2.0
"""What NVML tells of this moment: memory, load and temperature of each GPU and MIG device, with its Report beside it.

A second question to the confined child of nvml.py, never kept. Not for processes: NVML tells a process of those alone
that its own pid namespace shows, and the child's shows none (seen with driver 580 on an H100). processes.py finds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nvhook.driver import nvml
from nvhook.host.report import Report
from nvhook.request.config import Config

_UUID = "(GPU|MIG)-[0-9A-Za-z/-]{1,80}"
_NAME = "[ -~]{0,96}"
_VERSION = "[0-9.]{0,32}"
_BYTES, _PERCENT, _DEGREES = 56, 8, 12  # bits


@dataclass(frozen=True)
class Sample:
    """A GPU or a MIG device; memory in bytes, load in percent, temperature in degrees Celsius, each None where NVML
    does not tell."""

    uuid: str
    name: str
    memory_used: int | None
    memory_total: int | None
    load: int | None
    temperature: int | None


@dataclass(frozen=True)
class Now:
    """`driver_version` is NVML's, which alone knows it on WSL 2; `samples` by UUID."""

    driver_version: str
    report: Report
    samples: dict[str, Sample]


def ask(config: Config, library: str) -> Now:
    """What `library`, the host's libnvidia-ml.so.1, answers within ten seconds; DriverError where it does not."""
    return nvml.question(config, library, _find, parse)


def parse(document: Any) -> Now:
    """The record of what `_find` found; ValueError for anything else."""
    if not isinstance(document, dict):
        raise ValueError("the answer is no object")
    samples = [_sample(item) for item in nvml.objects(document, "samples", most=4096)]
    return Now(
        nvml.text(document, "driver_version", _VERSION),
        nvml.parse(document.get("report")),
        {sample.uuid: sample for sample in samples},
    )


def _sample(item: dict[str, Any]) -> Sample:
    return Sample(
        nvml.text(item, "uuid", _UUID),
        nvml.text(item, "name", _NAME),
        _number(item, "memory_used", _BYTES),
        _number(item, "memory_total", _BYTES),
        _number(item, "load", _PERCENT),
        _number(item, "temperature", _DEGREES),
    )


def _number(item: dict[str, Any], key: str, bits: int) -> int | None:
    return None if item.get(key, "") is None else nvml.number(item, key, bits)


# In the child


def _find(pynvml: Any) -> dict[str, object]:
    report = nvml.look(pynvml)
    uuids = [uuid for gpu in report.devices for uuid in (gpu.uuid, *(mig.uuid for mig in gpu.instances))]
    return {
        "driver_version": _told(pynvml, pynvml.nvmlSystemGetDriverVersion) or "",
        "report": report.describe(),
        "samples": [_take(pynvml, uuid) for uuid in uuids],
    }


def _take(pynvml: Any, uuid: str) -> dict[str, object]:
    device = _told(pynvml, pynvml.nvmlDeviceGetHandleByUUID, uuid)
    memory = _memory(pynvml, device)
    rates = _told(pynvml, pynvml.nvmlDeviceGetUtilizationRates, device)
    return {
        "uuid": uuid,
        "name": _told(pynvml, pynvml.nvmlDeviceGetName, device) or "",
        "memory_used": memory.used if memory else None,
        "memory_total": memory.total if memory else None,
        "load": rates.gpu if rates else None,
        "temperature": _told(pynvml, pynvml.nvmlDeviceGetTemperature, device, pynvml.NVML_TEMPERATURE_GPU),
    }


def _memory(pynvml: Any, device: object) -> Any:
    """As nvidia-smi has it: the driver's own share is not used memory. A driver before 510 counts it in."""
    return _told(pynvml, pynvml.nvmlDeviceGetMemoryInfo, device, pynvml.nvmlMemory_v2) or _told(
        pynvml, pynvml.nvmlDeviceGetMemoryInfo, device
    )


def _told(pynvml: Any, function: Any, *arguments: object) -> Any:
    """None for what NVML does not tell, whatever the reason: one value less is no reason to show none."""
    try:
        return function(*arguments)
    except pynvml.NVMLError:
        return None
