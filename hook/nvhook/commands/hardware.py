# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's GPUs on the PCI bus, driver or not, and the device nodes that the loaded kernel modules have."""

from __future__ import annotations

import os

from nvhook import plan
from nvhook.commands.kernelfiles import kernel_text, listed
from nvhook.errors import DeviceError
from nvhook.host.offers import Offers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nvhook.container.edits import Device
    from nvhook.host.gpus import Gpus

NVIDIA = "0x10de"  # the PCI vendor
_DISPLAY = "0x03"  # the PCI class of display controllers, which all GPUs are


def pci_gpus(sys: str) -> dict[str, str]:
    """PCI address of each of NVIDIA's GPUs below `sys`, the host's /sys -> the driver that has it, or empty."""
    found = {}
    for address in listed(f"{sys}/bus/pci/devices"):
        place = f"{sys}/bus/pci/devices/{address}"
        is_gpu = kernel_text(f"{place}/class").startswith(_DISPLAY)
        if is_gpu and kernel_text(f"{place}/vendor").strip() == NVIDIA:
            found[address] = _target(f"{place}/driver")
    return found


def nodes(gpus: Gpus, capabilities: tuple[str, ...]) -> list[Device]:
    """The nodes of all GPUs that a container with these capabilities gets. Those of a module that is not loaded are
    left out, because their numbers are unknown."""
    found: dict[str, Device] = {}
    for capability in capabilities:
        try:
            devices = plan.devices((capability,), gpus.gpus, Offers(gpus))
        except DeviceError:
            continue
        found |= {device.path: device for device in devices}
    return list(found.values())


def _target(link: str) -> str:
    try:
        return os.path.basename(os.readlink(link))
    except OSError:
        return ""
