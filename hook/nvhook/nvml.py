# SPDX-License-Identifier: Apache-2.0
"""What NVML tells of the host's GPUs beyond /proc: brand, compute capability, CUDA version, MIG devices."""

from __future__ import annotations


class Instance:
    """A MIG device: `index` among those of its GPU, the ids of its GPU instance and compute instance, its UUID."""

    __slots__ = ("ci", "gi", "index", "uuid")

    def __init__(self, index: int, gi: int, ci: int, uuid: str) -> None:
        self.index = index
        self.gi = gi
        self.ci = ci
        self.uuid = uuid


class Device:
    """One GPU. `pci` as below /proc/driver/nvidia/gpus (0000:07:00.0); `brand` a word in lower case (tesla, geforce);
    `arch` the compute capability (9.0); `mig_enabled` is MIG mode now and after the next reset."""

    __slots__ = ("arch", "brand", "instances", "mig_enabled", "pci", "uuid")

    def __init__(
        self, pci: str, uuid: str, brand: str, arch: str, *, mig_enabled: bool, instances: tuple[Instance, ...]
    ) -> None:
        self.pci = pci
        self.uuid = uuid
        self.brand = brand
        self.arch = arch
        self.mig_enabled = mig_enabled
        self.instances = instances


class Report:
    """`cuda`: the newest CUDA version of the driver (12.4); `devices` in NVML's order."""

    __slots__ = ("cuda", "devices")

    def __init__(self, cuda: str, devices: tuple[Device, ...]) -> None:
        self.cuda = cuda
        self.devices = devices
