# SPDX-License-Identifier: Apache-2.0
"""The host's GPUs and MIG instances, as the kernel module shows them below /proc.

Cheap on purpose: a few small files of /proc, no library, no NVML. The order is NVML's (ascending PCI bus id), so that
index 0 here is index 0 of nvidia-smi.
"""

from __future__ import annotations

import os

from nvhook.errors import DeviceError, reason
from nvhook.formats.record import Record
from nvhook.request import device_list

from . import procfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    # GPU minor -> (GPU instance, compute instance), as /proc shows them
    Instances = dict[int, list[tuple[int, int]]]

_MAX_VERSION = 64  # characters
_MAJOR_BITS, _MINOR_BITS = 12, 20
_IMEX_CHANNELS = 2048  # that the kernel module has unless its administrator says otherwise
_LOAD_REMEDY = "load it with `modprobe nvidia`, or install the NVIDIA driver on this host"


class Gpu(Record):
    """`index` in NVML's order, `minor` of /dev/nvidia<minor>, `pci` as below /proc/driver/nvidia/gpus.

    `uuid` contains question marks until something has initialised the GPU (no persistence mode, nothing running).
    """

    index: int
    minor: int
    uuid: str
    pci: str
    model: str

    def describe(self) -> dict[str, object]:
        return {"index": self.index, "minor": self.minor, "uuid": self.uuid, "pci": self.pci}

    def __str__(self) -> str:
        return f"{self.index} ({self.uuid}, {self.pci})"


class Gpus:
    """One look at the host.

    driver_version   of the loaded kernel module; on WSL 2 the name of the driver store, which changes with the driver
    gpus             those that the driver uses, in NVML's order; none on WSL 2, where they cannot be told apart
    majors           name -> character device major, from /proc/devices
    node_owner       (uid, gid, mode) that the module wants its device nodes to have
    dxg              (major, minor) of /dev/dxg on WSL 2, the one node for all GPUs; None elsewhere
    instances        the MIG devices
    """

    __slots__ = ("driver_version", "dxg", "gpus", "instances", "majors", "node_owner")

    def __init__(
        self,
        driver_version: str,
        gpus: list[Gpu],
        majors: dict[str, int],
        node_owner: tuple[int, int, int],
        dxg: tuple[int, int] | None = None,
        instances: Instances | None = None,
    ) -> None:
        self.driver_version = driver_version
        self.dxg = dxg
        self.gpus = gpus
        self.majors = majors
        self.node_owner = node_owner
        self.instances = instances or {}


def is_loaded(proc_root: str) -> bool:
    """Whether the kernel module is there, which says nothing about what it tells."""
    return os.path.exists(os.path.join(proc_root, "proc/driver/nvidia/version"))


def read(proc_root: str) -> Gpus:
    """Reads `proc_root`/proc; DeviceError when the kernel module is not there or says something unreadable."""
    proc = os.path.join(proc_root, "proc")
    version = driver_version(proc_root)
    return Gpus(version, _gpus(proc), _majors(proc), _node_owner(proc), instances=instances(proc))


def pci_address(text: str) -> tuple[int, int, int, int] | None:
    """(domain, bus, device, function) of `[domain:]bus:device[.function]` in hex, or None."""
    parts = text.split(":")
    # int() would also take signs, underscores, blanks, `0x` and the digits of other scripts.
    if len(parts) not in (2, 3) or text.strip("0123456789abcdefABCDEF:."):
        return None
    device, _, function = parts[-1].partition(".")
    try:
        domain = int(parts[0], 16) if len(parts) == 3 else 0
        return domain, int(parts[-2], 16), int(device, 16), int(function or "0", 16)
    except ValueError:
        return None


def driver_version(proc_root: str) -> str:
    """Of the kernel module that is loaded at this moment; DeviceError."""
    path = os.path.join(proc_root, "proc/driver/nvidia/version")
    try:
        content = procfs.text(path)
    except FileNotFoundError:
        raise DeviceError(f"the nvidia kernel module is not loaded: no `{path}`", _LOAD_REMEDY) from None
    except OSError as error:
        raise DeviceError(f"read `{path}`: {reason(error)}") from None
    for word in content.partition("\n")[0].split():
        if "." in word and word.replace(".", "").isdecimal() and len(word) < _MAX_VERSION:
            return word
    raise DeviceError(f"read `{path}`: no driver version in `{content.strip()}`")


def _gpus(proc: str) -> list[Gpu]:
    directory = os.path.join(proc, "driver/nvidia/gpus")
    found: list[Gpu] = []
    try:
        addresses = os.listdir(directory)
    except FileNotFoundError:
        addresses = []
    except OSError as error:
        raise DeviceError(f"read `{directory}`: {reason(error)}") from None
    for address in sorted(addresses, key=lambda name: pci_address(name) or (1 << 32, 0, 0, 0)):
        values = information(os.path.join(directory, address, "information"))
        # NVML numbers only the GPUs that the module was not told to leave alone.
        if values.get("GPU Excluded", "No") != "Yes":
            minor = number(values.get("Device Minor", ""))
            if minor < 0:
                raise DeviceError(f"read `{directory}/{address}/information`: no `Device Minor`")
            model = values.get("Model", "")
            found.append(Gpu(len(found), minor, values.get("GPU UUID", ""), address, model))
    return found


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
    numbers = [device_list.small_number(name[len(start) :]) for name in names if name.startswith(start)]
    return [(number, f"{directory}/{start}{number}") for number in sorted(numbers) if number >= 0]


def information(path: str) -> dict[str, str]:
    """Name -> value of a file of the driver's below /proc, a line each; DeviceError where it cannot be read."""
    try:
        lines = procfs.text(path).splitlines()
    except OSError as error:
        raise DeviceError(f"read `{path}`: {reason(error)}") from None
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def number(text: str, bits: int = _MINOR_BITS) -> int:
    """Of a device: -1 for what is none, or has more bits than the kernel gives it."""
    found = int(text) if text.isdecimal() and text.isascii() and len(text) < 8 else -1
    return found if found < 1 << bits else -1


def _majors(proc: str) -> dict[str, int]:
    """Name -> major, character devices only. The GPU major is fixed (195) whatever name a version gives it."""
    path = os.path.join(proc, "devices")
    majors: dict[str, int] = {}
    try:
        lines = procfs.text(path).splitlines()
    except OSError as error:
        raise DeviceError(f"read `{path}`: {reason(error)}") from None
    for line in lines:
        if line.startswith("Block"):
            break
        major, _, name = line.strip().partition(" ")
        if number(major, _MAJOR_BITS) >= 0 and name:
            majors.setdefault(name, int(major))
    return majors


def _node_owner(proc: str) -> tuple[int, int, int]:
    try:
        values = information(os.path.join(proc, "driver/nvidia/params"))
        return (
            int(values.get("DeviceFileUID", "0")),
            int(values.get("DeviceFileGID", "0")),
            int(values.get("DeviceFileMode", str(0o666))) & 0o777,
        )
    except (DeviceError, ValueError):  # what nvidia-modprobe falls back to as well
        return 0, 0, 0o666


def imex_channel_count(proc_root: str) -> int:
    """How many IMEX channels the kernel module has, from 0 on; 2048, its default, where it does not say."""
    try:
        text = information(os.path.join(proc_root, "proc/driver/nvidia/params")).get("ImexChannelCount", "")
    except DeviceError:
        text = ""
    count = number(text)
    return count if count >= 0 else _IMEX_CHANNELS
