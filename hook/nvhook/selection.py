# SPDX-License-Identifier: Apache-2.0
"""Which GPUs a container gets, and whether they are what its image requires.

/proc and the driver's version answer that for nearly every container. NVML is asked, once per host and not in this
process (inventory.report), only where they cannot: for the UUID of a GPU that nothing has initialised yet, and for a
requirement that does not hold by what the version alone tells. Where NVML does not answer, the container starts on
what is known, with a warning.
"""

from __future__ import annotations

from . import gpus as hosts
from . import mig, requirements
from .errors import DriverError
from .gpus import Gpu, Selection
from .requirements import Facts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .config import Config
    from .gpus import Gpus
    from .nvml import Report
    from .request import Request


def choose(config: Config, asked: Request, host: Gpus, warnings: list[str], *, keep: bool = True) -> Selection:
    """What `asked` names, in NVML's order; UUIDs that `host` does not know and NVML does are put there.

    DeviceError for a name that is none, RequirementError for a requirement that does not hold for each GPU.
    `keep` as in inventory.py.
    """
    by_uuid = any(device.lower().startswith(("gpu-", "mig-gpu-")) for device in asked.devices)
    must_identify = by_uuid and any("?" in gpu.uuid for gpu in host.gpus)
    report = _report(config, host, warnings, keep=keep) if must_identify else None
    if report:
        host.gpus = identified(host.gpus, report)
    chosen = hosts.select(asked.devices, host, mig.reporter(config, host, warnings, keep=keep))
    by_version = requirements.facts_of(host.driver_version)
    # On WSL 2 there is no NVML to ask, and the version is no number.
    if host.dxg is not None or requirements.are_sure(asked.requirements, by_version):
        return chosen
    if not must_identify:
        report = _report(config, host, warnings, keep=keep)
    for facts in _facts(by_version, report, chosen.gpus, warnings):
        requirements.check(asked.requirements, facts)
    return chosen


def _report(config: Config, host: Gpus, warnings: list[str], *, keep: bool) -> Report | None:
    from . import inventory  # and all that NVML brings, for the few containers that need it

    try:
        return inventory.report(config, host, None, warnings, keep=keep)
    except DriverError as error:
        warnings.append(f"{error}; a GPU's brand and architecture count as what the image requires")
        return None


def identified(gpus: list[Gpu], report: Report) -> list[Gpu]:
    """With NVML's UUIDs in the place of those that have question marks."""
    uuids = {device.pci: device.uuid for device in report.devices}
    return [
        Gpu(gpu.index, gpu.minor, uuids.get(gpu.pci, gpu.uuid), gpu.pci, gpu.model) if "?" in gpu.uuid else gpu
        for gpu in gpus
    ]


def _facts(by_version: Facts, report: Report | None, chosen: list[Gpu], warnings: list[str]) -> list[Facts]:
    """One for each chosen GPU; without GPUs, or without NVML, one for the host."""
    if report is None:
        return [by_version]
    devices = {device.pci: device for device in report.devices}
    found = []
    for gpu in chosen:
        device = devices.get(gpu.pci)
        if device is None:
            warnings.append(
                f"NVML does not tell of GPU {gpu}; its brand and architecture count as what the image requires"
            )
        found.append(
            Facts(
                cuda=report.cuda,
                driver=by_version.driver,
                arch=device.arch or None if device else None,
                brand=device.brand or None if device else None,
                gpu=str(gpu),
            )
        )
    return found or [Facts(cuda=report.cuda, driver=by_version.driver)]
