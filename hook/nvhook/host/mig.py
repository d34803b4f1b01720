# SPDX-License-Identifier: Apache-2.0
"""MIG devices: which there are, and which one a name means.

Which there are is in /proc, as long as they exist, and costs no library. A UUID, or a place among the MIG devices of a
GPU, is known to NVML alone: it is asked through a `Reporter`, and only for such a name. A kept answer may be older than
the instances, because MIG can be set up again without a reboot; so it is compared with /proc, and NVML is asked again
if it differs.
"""

from __future__ import annotations

from nvhook.errors import DeviceError
from nvhook.formats.record import Record
from nvhook.request.device_list import small_number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .gpus import Gpu, Gpus
    from .report import Report

    # What NVML knows; True: ask it, whatever is kept.
    Reporter = Callable[[bool], Report]


class MigDevice(Record):
    """GPU instance `gi` and compute instance `ci` of `gpu`; `index` and `uuid` where NVML has been asked."""

    gpu: Gpu
    gi: int
    ci: int
    index: int = -1
    uuid: str = ""

    def describe(self) -> dict[str, object]:
        return {"gpu": self.gpu.index, "gi": self.gi, "ci": self.ci}

    def __str__(self) -> str:
        if self.uuid:
            return f"{self.gpu.index}:{self.index} ({self.uuid})"
        return f"MIG-{self.gpu.uuid}/{self.gi}/{self.ci}"


def every(host: Gpus) -> list[MigDevice]:
    return [MigDevice(gpu, gi, ci) for gpu in host.gpus for gi, ci in host.instances.get(gpu.minor, ())]


def named(host: Gpus, report: Reporter) -> list[MigDevice]:
    """All of them with the index and the UUID that NVML gives them."""
    return _search(lambda _: True, host, report)[1]


def find(device: str, host: Gpus, report: Reporter) -> MigDevice:
    """The MIG device of that name; DeviceError, with what there is, for none or several."""
    if device.lower().startswith("mig-gpu-"):
        return _by_ids(device, host, report)
    if device.lower().startswith("mig-"):
        return _by_uuid(device, host, report)
    return _by_index(device, host, report)


def _by_ids(device: str, host: Gpus, report: Reporter) -> MigDevice:
    """The name that drivers before 470 gave."""
    uuid, _, ids = device[len("MIG-") :].partition("/")
    gi, _, ci = ids.partition("/")
    gpu = next((gpu for gpu in host.gpus if gpu.uuid.lower() == uuid.lower()), None)
    if gpu is None:
        raise DeviceError(f"unknown device `{device}`", f"this host has {_listed(host.gpus)}")
    there = [item for item in every(host) if item.gpu is gpu]
    for item in there:
        if (item.gi, item.ci) == (small_number(gi), small_number(ci)):
            return item
    raise _absent(device, gpu, there, report)


def _by_uuid(device: str, host: Gpus, report: Reporter) -> MigDevice:
    if not host.instances:
        raise DeviceError(f"unknown MIG device `{device}`", "this host has no MIG device")
    start = device.lower()
    found, there = _search(lambda item: start != "mig-" and item.uuid.lower().startswith(start), host, report)
    if len(found) > 1:
        exact = [item for item in found if item.uuid.lower() == start]
        if len(exact) != 1:
            raise DeviceError(f"`{device}` is the beginning of several UUIDs: {_listed(found)}")
        found = exact
    if not found:
        raise DeviceError(f"unknown MIG device `{device}`", f"this host has {_listed(there)}")
    return found[0]


def _by_index(device: str, host: Gpus, report: Reporter) -> MigDevice:
    number, _, index = device.partition(":")
    gpu = next((gpu for gpu in host.gpus if gpu.index == int(number)), None)
    if gpu is None:
        raise DeviceError(
            f"unknown device `{device}`: there is no GPU {int(number)}", f"this host has {_listed(host.gpus)}"
        )
    found, there = _search(lambda item: item.gpu is gpu and item.index == int(index), host, report)
    if not found:
        raise _absent(device, gpu, [item for item in there if item.gpu is gpu], report)
    return found[0]


def _search(
    is_meant: Callable[[MigDevice], bool], host: Gpus, report: Reporter
) -> tuple[list[MigDevice], list[MigDevice]]:
    """(those that are meant, all that NVML names)."""
    shown = {(item.gpu.index, item.gi, item.ci) for item in every(host)}
    for again in (False, True):
        named = _named(host, report(again))
        found = [item for item in named if is_meant(item)]
        if found and shown == {(item.gpu.index, item.gi, item.ci) for item in named}:
            break
    return found, named


def _named(host: Gpus, report: Report) -> list[MigDevice]:
    gpus = {gpu.pci.lower(): gpu for gpu in host.gpus}
    return [
        MigDevice(gpus[device.pci.lower()], item.gi, item.ci, item.index, item.uuid)
        for device in report.devices
        if device.pci.lower() in gpus
        for item in device.instances
    ]


def _absent(device: str, gpu: Gpu, there: list[MigDevice], report: Reporter) -> DeviceError:
    """Why `gpu` has no such MIG device: it has others, it could have some, or MIG is off."""
    if there:
        return DeviceError(f"unknown MIG device `{device}`", f"GPU {gpu} has {_listed(there)}")
    if any(item.mig_enabled for item in report(False).devices if item.pci.lower() == gpu.pci.lower()):
        return DeviceError(
            f"unknown MIG device `{device}`: MIG mode is on for GPU {gpu}, and it has no instances",
            f"make some with `nvidia-smi mig -i {gpu.index} -cgi PROFILE -C`",
        )
    return DeviceError(
        f"unknown MIG device `{device}`: MIG mode is off for GPU {gpu}",
        f"ask for the whole GPU, as `{gpu.index}`, or turn it on with `nvidia-smi -i {gpu.index} -mig 1`",
    )


def _listed(things: list[MigDevice] | list[Gpu]) -> str:
    return ", ".join(str(thing) for thing in things) or "none"
