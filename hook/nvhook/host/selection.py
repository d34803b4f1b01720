# SPDX-License-Identifier: Apache-2.0
"""Which GPUs a container gets, and whether they are what its image requires.

/proc and the driver's version answer that for nearly every container. NVML is asked only where they cannot, and the
caller hands in how: for the UUID of a GPU that nothing has initialised yet, and for a requirement that does not hold by
what the version alone tells. Where NVML does not answer, the container starts on what is known, with a warning.
"""

from __future__ import annotations

from nvhook.errors import DeviceError, DriverError
from nvhook.formats.record import Record
from nvhook.request import requirements
from nvhook.request.device_list import is_mig
from nvhook.request.requirements import Facts

from . import mig
from .gpus import Gpu, pci_address

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nvhook.request.request import Request

    from .gpus import Gpus
    from .mig import MigDevice, Reporter
    from .report import Report


class Selection(Record):
    """What a container has asked for: `gpus` in NVML's order, and `migs`, whose GPUs are among them."""

    gpus: list[Gpu]
    migs: list[MigDevice]

    def brands(self) -> set[str]:
        """The first word of each product's name in lower case: geforce of NVIDIA GeForce RTX 4090."""
        return {gpu.model.lower().removeprefix("nvidia ").partition(" ")[0] for gpu in self.gpus}


def choose(request: Request, host: Gpus, report: Reporter, warnings: list[str]) -> Selection:
    """What `request` names, in NVML's order; UUIDs that `host` does not know and NVML does are put there.

    `report` asks NVML. DeviceError for a name that is none, RequirementError for a requirement that does not hold for
    each GPU.
    """
    by_uuid = any(device.lower().startswith(("gpu-", "mig-gpu-")) for device in request.devices)
    must_identify = by_uuid and any("?" in gpu.uuid for gpu in host.gpus)
    answer = _ask(report, warnings) if must_identify else None
    if answer:
        host.gpus = identified(host.gpus, answer)
    chosen = select(request.devices, host, report)
    by_version = requirements.facts_of(host.driver_version)
    # On WSL 2 there is no NVML to ask, and the version is no number.
    if host.dxg is not None or requirements.are_sure(request.requirements, by_version):
        return chosen
    if not must_identify:
        answer = _ask(report, warnings)
    for facts in _facts(by_version, answer, chosen.gpus, warnings):
        requirements.check(request.requirements, facts)
    return chosen


def _ask(report: Reporter, warnings: list[str]) -> Report | None:
    try:
        return report(False)
    except DriverError as error:
        warnings.append(f"{error}; assuming the GPU meets the image's brand and architecture requirements")
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
                f"NVML does not report GPU {gpu}; assuming it meets the image's brand and architecture requirements"
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


# Names


def select(devices: tuple[str, ...], host: Gpus, report: Reporter) -> Selection:
    """What `devices` (a Request's) names of `host`, in NVML's order, each once.

    An id is an index, a UUID or the beginning of one, a PCI bus id, or the name of a MIG device (mig.py).
    DeviceError, with the list of what exists, for one that names nothing or several.
    """
    if host.dxg is not None and devices not in (("all",), ("none",)):
        raise DeviceError(
            f"`{devices[0]}` is asked for, and on WSL 2 the GPUs have one node, /dev/dxg, for all of them",
            "ask for `all`",
        )
    if host.dxg is not None or devices == ("none",):
        return Selection([], [])
    if devices == ("all",):
        if not host.gpus:
            raise DeviceError("all GPUs are asked for and the driver has none", "see `dmesg | grep -i nvrm`")
        return Selection(host.gpus, mig.every(host))
    found = [mig.find(device, host, report) for device in devices if is_mig(device)]
    migs = {(item.gpu.index, item.gi, item.ci): item for item in found}
    chosen = {_find(device, host.gpus).index for device in devices if not is_mig(device)}
    chosen |= {item.gpu.index for item in found}
    return Selection([gpu for gpu in host.gpus if gpu.index in chosen], [migs[key] for key in sorted(migs)])


def _find(device: str, gpus: list[Gpu]) -> Gpu:
    found = [gpu for gpu in gpus if _is_named(gpu, device)]
    if len(found) > 1:
        exact = [gpu for gpu in found if gpu.uuid.lower() == device.lower()]
        if len(exact) != 1:
            raise DeviceError(f"`{device}` is the beginning of several UUIDs: {_listed(found)}")
        return exact[0]
    if not found:
        raise DeviceError(f"unknown device `{device}`", f"this host has {_listed(gpus)}" + _uuid_remedy(device, gpus))
    return found[0]


def _is_named(gpu: Gpu, device: str) -> bool:
    if device.isdecimal() and device.isascii():
        return len(device) < 8 and int(device) == gpu.index
    if device.lower().startswith("gpu-") and len(device) > len("gpu-"):
        return gpu.uuid.lower().startswith(device.lower())
    address = pci_address(device)
    return address is not None and address == pci_address(gpu.pci)


def _listed(gpus: list[Gpu]) -> str:
    return ", ".join(str(gpu) for gpu in gpus) or "no GPU"


def _uuid_remedy(device: str, gpus: list[Gpu]) -> str:
    if device.lower().startswith("gpu-") and any("?" in gpu.uuid for gpu in gpus):
        return "; a UUID with question marks is known once the GPU is initialised: run `nvidia-smi -L` on the host"
    return ""
