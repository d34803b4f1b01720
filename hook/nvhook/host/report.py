# SPDX-License-Identifier: Apache-2.0
"""What NVML tells of the host's GPUs beyond /proc, as records. nvml.py asks it, and inventory.py keeps the answer."""

from __future__ import annotations

from nvhook.formats.record import Record


class InstanceReport(Record):
    """A MIG device: `index` among those of its GPU, the ids of its GPU instance and compute instance, its UUID."""

    index: int
    gi: int
    ci: int
    uuid: str

    def describe(self) -> dict[str, object]:
        return {"index": self.index, "gi": self.gi, "ci": self.ci, "uuid": self.uuid}


class GpuReport(Record):
    """One GPU. `pci` as below /proc/driver/nvidia/gpus (0000:07:00.0); `brand` a word in lower case (tesla, geforce);
    `arch` the compute capability (9.0); either is empty where NVML does not tell; `mig_enabled` is MIG mode now and
    after the next reset."""

    pci: str
    uuid: str
    brand: str
    arch: str
    mig_enabled: bool
    instances: tuple[InstanceReport, ...]

    def describe(self) -> dict[str, object]:
        return {
            "pci": self.pci,
            "uuid": self.uuid,
            "brand": self.brand,
            "arch": self.arch,
            "mig_enabled": self.mig_enabled,
            "instances": [item.describe() for item in self.instances],
        }


class Report(Record):
    """`cuda`: the newest CUDA version of the driver (12.4); `devices` in NVML's order, without those that NVML cannot
    talk to (a GPU that has fallen off the bus)."""

    cuda: str
    devices: tuple[GpuReport, ...]

    def describe(self) -> dict[str, object]:
        return {"cuda": self.cuda, "devices": [item.describe() for item in self.devices]}
