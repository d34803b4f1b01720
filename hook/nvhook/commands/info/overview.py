# SPDX-License-Identifier: Apache-2.0
"""A host and its GPUs at this moment, as `nvhook info` shows them: /proc, the driver's files and NVML in one record.

Nothing is touched, and what is not there is part of the answer, never an error. doctor says what to do about it.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import Any

from nvhook import plan
from nvhook.commands import hardware
from nvhook.commands.info import live, processes
from nvhook.commands.info.live import Now
from nvhook.commands.info.processes import Process
from nvhook.driver import inventory
from nvhook.driver.records import Driver
from nvhook.errors import DriverError, NvhookError, reason
from nvhook.host import host, mig, modules, procfs
from nvhook.host.gpus import Gpus
from nvhook.request import requirements
from nvhook.request.config import CAPABILITIES, Config


@dataclass
class MigStatus:
    """`index` among the MIG devices of its GPU; it, `uuid` and `profile` are NVML's, None or empty without it."""

    index: int | None
    gi: int
    ci: int
    uuid: str
    profile: str
    memory_used: int | None
    memory_total: int | None


@dataclass
class GpuStatus:
    """`minor` None on WSL 2; what NVML alone tells is None or empty where it does not."""

    index: int
    minor: int | None
    uuid: str
    pci: str
    name: str
    brand: str = ""
    compute_capability: str = ""
    mig_enabled: bool | None = None
    memory_used: int | None = None
    memory_total: int | None = None
    load: int | None = None
    temperature: int | None = None
    mig_devices: list[MigStatus] = field(default_factory=list)


@dataclass
class Overview:
    """`kind`: linux, wsl2, or none where there is no driver that nvhook serves; `module`: open or proprietary, empty on
    WSL 2; `hidden`: processes that could not be inspected; `missing`: a sentence each, with the remedy."""

    kind: str
    missing: list[str]
    version: str = ""
    module: str = ""
    cuda: str = ""
    gpus: list[GpuStatus] = field(default_factory=list)
    processes: list[Process] = field(default_factory=list)
    hidden: int = 0
    files: Driver | None = None

    def indexes(self, process: Process) -> list[int]:
        """Of the GPUs that it has open; on WSL 2 all."""
        return [gpu.index for gpu in self.gpus if gpu.minor is None or gpu.minor in process.minors]

    def describe(self) -> dict[str, object]:
        """The object of `--json`."""
        driver = {"version": self.version, "module": self.module} if self.kind != "none" else None
        return {
            "host": self.kind,
            "driver": driver,
            "cuda": self.cuda or None,
            "gpus": [asdict(gpu) for gpu in self.gpus],
            "processes": [self._process(item) for item in self.processes],
            "hidden_processes": self.hidden,
            "missing": self.missing,
        }

    def _process(self, item: Process) -> dict[str, object]:
        container = item.container.describe() if item.container else None
        return {"pid": item.pid, "name": item.name, "gpus": self.indexes(item), "container": container}


def make(config: Config, warnings: list[str], files: Driver | None = None) -> Overview:
    """`files`: those of an earlier look, if there was one, which are not looked for again."""
    try:
        found = host.read(config, CAPABILITIES, warnings, modprobe="")
    except NvhookError as error:
        return Overview("none", [without_driver(config.proc_root, error)])
    made = Overview("linux" if found.dxg is None else "wsl2", lacking(config, found), found.driver_version)
    if made.kind == "linux":
        made.module = _module(config.proc_root)
    made.files = files if files and files.version == found.driver_version else _files(config, found, made, warnings)
    made.missing += lacking_libraries(made.files) if made.files else []
    now = _ask(config, made)
    _fill(made, found, now)
    _look_for_processes(config, made, warnings)
    return made


def without_driver(proc_root: str, error: NvhookError) -> str:
    cards = len(hardware.pci_gpus(os.path.join(proc_root, "sys")))
    count = f"{cards or 'no'} NVIDIA GPU{'s' * (cards > 1)} on the PCI bus"
    return f"{count}, and no driver that containers could have: {sentence(error)}"


def sentence(error: NvhookError) -> str:
    """Without its stage: nothing has failed here."""
    return f"{error.message}; {error.remedy}" if error.remedy else error.message


def _module(proc_root: str) -> str:
    try:
        version = procfs.read(proc_root).files.get("version", "")
    except NvhookError:
        return ""
    return "open" if "Open Kernel Module" in version else "proprietary"


def lacking(config: Config, found: Gpus) -> list[str]:
    """What the kernel and /dev lack."""
    lacks: list[str] = []
    if found.dxg is not None:
        return lacks
    if not found.gpus:
        lacks.append("the driver has no GPU; see `dmesg | grep -i nvrm`")
    if "nvidia-uvm" not in found.majors:
        by_hand = "load it with `modprobe nvidia-uvm`"
        remedy = "the first container that computes loads it" if modules.modprobe(config) else by_hand
        lacks.append(f"the nvidia-uvm kernel module is not loaded; {remedy}")
    nodes = [node.path for node in hardware.nodes(found, CAPABILITIES)]
    absent = [path for path in nodes if not os.path.lexists(config.dev_root.rstrip("/") + path)]
    if absent:
        lacks.append(f"no {', '.join(absent)}; the first container that gets them makes them")
    return lacks


def _files(config: Config, found: Gpus, made: Overview, warnings: list[str]) -> Driver | None:
    try:
        return inventory.load(config, found.driver_version, warnings, keep=False)
    except DriverError as error:
        made.missing.append(sentence(error))
        return None


def lacking_libraries(driver: Driver) -> list[str]:
    """The libraries without which a capability is not there at all."""
    names = {item.soname for item in driver.libraries if item.bits == 64}
    return [
        f"no {soname} of driver {driver.version}, so no container gets `{capability}`; "
        "install the driver package that holds it"
        for capability, soname in plan.INDISPENSABLE.items()
        if soname not in names
    ]


def _ask(config: Config, made: Overview) -> Now | None:
    if made.files is None:
        return None
    try:
        return live.ask(config, inventory.nvml_library(made.files))
    except NvhookError as error:
        made.missing.append(f"memory, load and temperature are not known: {sentence(error)}")
        return None


def _fill(made: Overview, found: Gpus, now: Now | None) -> None:
    """The GPUs of /proc with what NVML tells of each; on WSL 2 those of NVML."""
    made.cuda = now.report.cuda if now else requirements.facts_of(found.driver_version).cuda or ""
    if made.kind == "wsl2":
        made.version = (now.driver_version if now else "") or made.version
        devices = now.report.devices if now else ()
        made.gpus = [GpuStatus(index, None, item.uuid, item.pci, "") for index, item in enumerate(devices)]
    else:
        made.gpus = [GpuStatus(item.index, item.minor, item.uuid, item.pci, item.model) for item in found.gpus]
    shown = mig.every(found)
    for gpu in made.gpus:
        instances = [(item.gi, item.ci) for item in shown if item.gpu.index == gpu.index]
        gpu.mig_devices = [MigStatus(None, gi, ci, "", "", None, None) for gi, ci in instances]
        if now:
            _add(made, gpu, now)


def _add(made: Overview, gpu: GpuStatus, now: Now) -> None:
    device = next((item for item in now.report.devices if item.pci.lower() == gpu.pci.lower()), None)
    if device is None:
        made.missing.append(f"GPU {gpu.index} ({gpu.pci}) does not answer NVML; see `dmesg | grep -i -e nvrm -e xid`")
        return
    sample = now.samples.get(device.uuid)
    gpu.uuid, gpu.brand, gpu.compute_capability = device.uuid, device.brand, device.arch
    gpu.mig_enabled = device.mig_enabled
    if sample:
        gpu.name = gpu.name or sample.name
        gpu.memory_used, gpu.memory_total = sample.memory_used, sample.memory_total
        gpu.load, gpu.temperature = sample.load, sample.temperature
    for item in device.instances:
        _add_mig(gpu, item, now.samples.get(item.uuid))


def _add_mig(gpu: GpuStatus, instance: Any, sample: live.Sample | None) -> None:
    """To what /proc shows: an instance that it does not show is no container's."""
    for item in gpu.mig_devices:
        if (item.gi, item.ci) == (instance.gi, instance.ci):
            item.index, item.uuid = instance.index, instance.uuid
            if sample:
                item.profile = sample.name.rpartition(" MIG ")[2]
                item.memory_used, item.memory_total = sample.memory_used, sample.memory_total


def _look_for_processes(config: Config, made: Overview, warnings: list[str]) -> None:
    proc = os.path.join(config.proc_root, "proc")
    try:
        made.processes, made.hidden = processes.find(proc)
    except OSError as error:
        warnings.append(f"read `{proc}`: {reason(error)}; no process is shown")
    if made.hidden:
        remedy = "; run it as root to see all" if os.geteuid() else ""
        what = "one process" if made.hidden == 1 else f"{made.hidden} processes"
        warnings.append(f"{what} could not be inspected{remedy}")
