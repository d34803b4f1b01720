# SPDX-License-Identifier: Apache-2.0
"""The host's GPUs as the kernel module shows them below /proc, and the choice of those a container asked for.

Cheap on purpose: a few small files of /proc, no library, no NVML. The order is NVML's (ascending PCI bus id), so that
index 0 here is index 0 of nvidia-smi.
"""

from __future__ import annotations

import os

from . import mig
from .errors import DeviceError, reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .mig import Instances, MigDevice, Reporter

_MAX_VERSION = 64  # characters
_MAJOR_BITS, _MINOR_BITS = 12, 20
_IMEX_CHANNELS = 2048  # that the kernel module has unless its administrator says otherwise
_LOAD_HINT = "load it with `modprobe nvidia`, or install the NVIDIA driver on this host"


class Gpu:
    """`index` in NVML's order, `minor` of /dev/nvidia<minor>, `pci` as below /proc/driver/nvidia/gpus.

    `uuid` contains question marks until something has initialised the GPU (no persistence mode, nothing running).
    """

    __slots__ = ("index", "minor", "model", "pci", "uuid")

    def __init__(self, index: int, minor: int, uuid: str, pci: str, model: str) -> None:
        self.index = index
        self.minor = minor
        self.uuid = uuid
        self.pci = pci
        self.model = model

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


class Selection:
    """What a container has asked for: `gpus` in NVML's order, and `migs`, whose GPUs are among them."""

    __slots__ = ("gpus", "migs")

    def __init__(self, gpus: list[Gpu], migs: list[MigDevice]) -> None:
        self.gpus = gpus
        self.migs = migs

    def brands(self) -> set[str]:
        """The first word of each product's name in lower case: geforce of NVIDIA GeForce RTX 4090."""
        return {gpu.model.lower().removeprefix("nvidia ").partition(" ")[0] for gpu in self.gpus}


def is_loaded(proc_root: str) -> bool:
    """Whether the kernel module is there, which says nothing about what it tells."""
    return os.path.exists(os.path.join(proc_root, "proc/driver/nvidia/version"))


def read(proc_root: str) -> Gpus:
    """Reads `proc_root`/proc; DeviceError when the kernel module is not there or says something unreadable."""
    proc = os.path.join(proc_root, "proc")
    version = driver_version(proc_root)
    return Gpus(version, _gpus(proc), _majors(proc), _node_owner(proc), instances=mig.instances(proc))


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
    found = [mig.find(device, host, report) for device in devices if mig.is_name(device)]
    migs = {(item.gpu.index, item.gi, item.ci): item for item in found}
    chosen = {_find(device, host.gpus).index for device in devices if not mig.is_name(device)}
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
        raise DeviceError(f"unknown device `{device}`", f"this host has {_listed(gpus)}" + _uuid_hint(device, gpus))
    return found[0]


def _is_named(gpu: Gpu, device: str) -> bool:
    if device.isdecimal() and device.isascii():
        return len(device) < 8 and int(device) == gpu.index
    if device.lower().startswith("gpu-") and len(device) > len("gpu-"):
        return gpu.uuid.lower().startswith(device.lower())
    address = _pci_address(device)
    return address is not None and address == _pci_address(gpu.pci)


def _listed(gpus: list[Gpu]) -> str:
    return ", ".join(str(gpu) for gpu in gpus) or "no GPU"


def _uuid_hint(device: str, gpus: list[Gpu]) -> str:
    if device.lower().startswith("gpu-") and any("?" in gpu.uuid for gpu in gpus):
        return "; a UUID with question marks is known once the GPU is initialised: run `nvidia-smi -L` on the host"
    return ""


def _pci_address(text: str) -> tuple[int, int, int, int] | None:
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
        content = _read(path)
    except FileNotFoundError:
        raise DeviceError(f"the nvidia kernel module is not loaded: no `{path}`", _LOAD_HINT) from None
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
    for address in sorted(addresses, key=lambda name: _pci_address(name) or (1 << 32, 0, 0, 0)):
        values = information(os.path.join(directory, address, "information"))
        # NVML numbers only the GPUs that the module was not told to leave alone.
        if values.get("GPU Excluded", "No") != "Yes":
            minor = number(values.get("Device Minor", ""))
            if minor < 0:
                raise DeviceError(f"read `{directory}/{address}/information`: no `Device Minor`")
            model = values.get("Model", "")
            found.append(Gpu(len(found), minor, values.get("GPU UUID", ""), address, model))
    return found


def information(path: str) -> dict[str, str]:
    """Name -> value of a file of the driver's below /proc, a line each; DeviceError where it cannot be read."""
    try:
        lines = _read(path).splitlines()
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
        lines = _read(path).splitlines()
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


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read(1 << 20)
