# SPDX-License-Identifier: Apache-2.0
"""MIG devices: which there are, and which one a name means.

Which there are is in /proc, as long as they exist, and costs no library. A UUID, or a place among the MIG devices of a
GPU, is known to NVML alone: it is asked through a `Reporter`, and only for such a name. What it said may be older than
the instances, because MIG is set up anew without a reboot; so it is compared with /proc, and asked again if it differs.
"""

from __future__ import annotations

import os

from .errors import DeviceError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .config import Config
    from .gpus import Gpu, Gpus
    from .nvml import Report

    # GPU minor -> (GPU instance, compute instance), as /proc shows them
    Instances = dict[int, list[tuple[int, int]]]
    # What NVML knows; True: ask it, whatever is kept.
    Reporter = Callable[[bool], Report]


class MigDevice:
    """GPU instance `gi` and compute instance `ci` of `gpu`; `index` and `uuid` where NVML has been asked."""

    __slots__ = ("ci", "gi", "gpu", "index", "uuid")

    def __init__(self, gpu: Gpu, gi: int, ci: int, index: int = -1, uuid: str = "") -> None:
        self.gpu = gpu
        self.gi = gi
        self.ci = ci
        self.index = index
        self.uuid = uuid

    def describe(self) -> dict[str, object]:
        return {"gpu": self.gpu.index, "gi": self.gi, "ci": self.ci}

    def __str__(self) -> str:
        if self.uuid:
            return f"{self.gpu.index}:{self.index} ({self.uuid})"
        return f"MIG-{self.gpu.uuid}/{self.gi}/{self.ci}"


def instances(proc: str) -> Instances:
    """The MIG devices of the host whose /proc is `proc`; empty where the driver or its GPUs know no MIG."""
    directory = os.path.join(proc, "driver/nvidia/capabilities")
    found: Instances = {}
    for minor, gpu in _numbered(directory, "gpu"):
        pairs = [(gi, ci) for gi, path in _numbered(f"{gpu}/mig", "gi") for ci, _ in _numbered(path, "ci")]
        if pairs:
            found[minor] = pairs
    return found


def _numbered(directory: str, start: str) -> list[tuple[int, str]]:
    """(number, path) of what is named `start` and a number, in the order of the numbers."""
    try:
        names = os.listdir(directory)
    except OSError:
        return []
    numbers = [_number(name[len(start) :]) for name in names if name.startswith(start)]
    return [(number, f"{directory}/{start}{number}") for number in sorted(numbers) if number >= 0]


def reporter(config: Config, host: Gpus, warnings: list[str], *, keep: bool = True) -> Reporter:
    """What NVML knows, for when somebody wants it."""

    def report(again: bool) -> Report:
        from . import inventory  # who names no MIG device does without it

        return inventory.report(config, host, None, warnings, again=again, keep=keep)

    return report


def is_name(device: str) -> bool:
    """Whether this is how a MIG device is named: MIG-<uuid>, MIG-<GPU's uuid>/<gi>/<ci>, or <gpu index>:<index>."""
    gpu, _, index = device.partition(":")
    return device.lower().startswith("mig-") or (_number(gpu) >= 0 and _number(index) >= 0)


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
        if (item.gi, item.ci) == (_number(gi), _number(ci)):
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


def _number(text: str) -> int:
    """-1 for what is no number; int() would also take signs, underscores and the digits of other scripts."""
    return int(text) if text.isdecimal() and text.isascii() and len(text) < 8 else -1
