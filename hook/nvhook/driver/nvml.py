# SPDX-License-Identifier: Apache-2.0
"""What NVML tells of the host's GPUs beyond /proc: brand, compute capability, CUDA version, MIG devices.

NVML is a library of the driver, and its code is not ours: it is loaded by a child that is trusted with nothing
(linux/confine.py) and never meets a container. What the child says is believed only in the form that `parse` knows.

The child is a fork and runs no program, because an unprivileged user need not be able to read an interpreter and our
modules; what a copy of this process could tell the library, it may know. pynvml is imported before the privileges go,
the library is loaded after.

It takes long, so inventory.py keeps the answer.
"""

from __future__ import annotations

import errno
import json
import os
import re

from nvhook.errors import ConfigError, DriverError, reason
from nvhook.host.report import GpuReport, InstanceReport, Report
from nvhook.linux import confine, kernel, seccomp
from nvhook.linux.root import DIRECTORY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar  # noqa: TID251 - never at run time

    from nvhook.request.config import Config

    Json = dict[str, object]
    Answer = TypeVar("Answer")

_SECONDS = 10
_MEMORY = 2 << 30
_FILES = 256
_PROCESSES = 64  # it starts a thread, and does without where there are that many (driver 580 on an H100)
_OUTPUT = 1 << 20
_NOBODY = 65534  # the kernel's overflow ids
_SHOWN = 300  # characters of what it says that a message quotes
_MOST = 256  # GPUs of a host, MIG devices of a GPU

_REMEDY = "see whether `nvidia-smi` works on this host"

# NVML's brand -> the word that images have for it in `brand=`.
_BRANDS = {
    0: "unknown",
    1: "quadro",
    2: "tesla",
    3: "nvs",
    4: "grid",
    5: "geforce",
    6: "titan",
    7: "vapps",
    8: "vpc",
    9: "vcs",
    10: "vws",
    11: "cloudgaming",
    12: "quadrortx",
    13: "nvidiartx",
    14: "nvidia",
    15: "geforcertx",
    16: "titanrtx",
}


def ask(config: Config, library: str) -> Report:
    """What `library`, the host's libnvidia-ml.so.1, answers within ten seconds; DriverError where it does not."""
    return question(config, library, lambda nvml: look(nvml).describe(), parse)


def question(config: Config, library: str, find: Callable[[Any], Json], believe: Callable[[Any], Answer]) -> Answer:
    """What `library` answers to another question: `find` gets pynvml in the child, and `believe` gets here what was
    found, of which it makes a record or a ValueError. DriverError as for `ask`."""
    owner = _owner(config)
    try:
        # The library is loaded from the current directory, so that only its own file need be open to that user.
        directory = os.open(os.path.dirname(library), DIRECTORY)
    except OSError as error:
        raise DriverError(f"open the directory of `{library}`: {reason(error)}", "reinstall the driver") from None
    try:
        ended = confine.run(
            directory,
            ("prepare", lambda: _enter(config)),
            ("NVML", lambda: _answer(os.path.basename(library), find)),
            owner,
            confine.Bounds(
                seconds=_SECONDS, memory=_MEMORY, file_size=0, files=_FILES, output=_OUTPUT, processes=_PROCESSES
            ),
            or_nobody=True,
            calls=seccomp.LIBRARY,
        )
        return believe(json.loads(_said(ended)))
    except (ValueError, RecursionError) as error:
        raise DriverError(f"ask `{library}`: NVML: no answer to be believed: {str(error)[:_SHOWN]}", _REMEDY) from None
    except OSError as error:
        raise DriverError(f"ask `{library}`: {error.strerror}", _REMEDY) from None
    finally:
        os.close(directory)


def _owner(config: Config) -> tuple[int, int]:
    """`nvidia-container-cli.user`, whose form config.py has checked; a name is looked up only now."""
    if not config.user:
        return _NOBODY, _NOBODY
    from nvhook.linux import accounts  # pwd and grp

    try:
        return accounts.ids(config.user)
    except (KeyError, ValueError):
        raise ConfigError(
            f"`{config.path}`: `nvidia-container-cli.user` = `{config.user}` names no user or group of this host",
            "write numbers, uid:gid, or take the line out",
        ) from None


def _said(ended: confine.Ended) -> str:
    """The answer; OSError or ValueError where there cannot be one."""
    if ended.status is None:
        raise OSError(errno.ETIME, f"NVML: no answer within {_SECONDS} s")
    if ended.printed > _OUTPUT:
        raise OSError(errno.EFBIG, f"NVML: more than {_OUTPUT} bytes of an answer")
    line = ended.last_line()
    if ended.status > 128:
        raise OSError(errno.ECHILD, f"NVML: killed by signal {ended.status - 128}")
    if ended.status not in (0, 127):
        raise OSError(errno.ECHILD, f"NVML: ended with status {ended.status}")
    if ended.status or not line:
        raise OSError(errno.EIO, line[:_SHOWN] or "NVML: no answer")
    return line


# What is believed


_CUDA = "[0-9]{1,3}[.][0-9]{1,3}"
_PCI = "[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}[.][0-7]"
_GPU_UUID = "GPU-[0-9A-Za-z-]{1,64}"
_MIG_UUID = "MIG-[0-9A-Za-z/-]{1,80}"
_BRAND = "[a-z0-9]{0,32}"
_ARCH = f"({_CUDA})?"


def parse(document: Any) -> Report:
    """The record that `describe` made a document of; ValueError for anything else."""
    if not isinstance(document, dict):
        raise ValueError("the answer is no object")
    return Report(text(document, "cuda", _CUDA), tuple(_device(item) for item in objects(document, "devices")))


def _device(item: Any) -> GpuReport:
    mig_enabled = item.get("mig_enabled")
    if not isinstance(mig_enabled, bool):
        raise ValueError(f"`mig_enabled` is {_shown(mig_enabled)}")
    return GpuReport(
        text(item, "pci", _PCI),
        text(item, "uuid", _GPU_UUID),
        text(item, "brand", _BRAND),
        text(item, "arch", _ARCH),
        mig_enabled=mig_enabled,
        instances=tuple(
            InstanceReport(number(mig, "index"), number(mig, "gi"), number(mig, "ci"), text(mig, "uuid", _MIG_UUID))
            for mig in objects(item, "instances")
        ),
    )


def objects(item: dict[str, Any], key: str, most: int = _MOST) -> list[dict[str, Any]]:
    value = item.get(key)
    if not isinstance(value, list) or len(value) > most or not all(isinstance(member, dict) for member in value):
        raise ValueError(f"`{key}` is no list of at most {most} objects")
    return value


def text(item: dict[str, Any], key: str, form: str) -> str:
    value = item.get(key)
    if not isinstance(value, str) or not re.fullmatch(form, value):
        raise ValueError(f"`{key}` is {_shown(value)}")
    return value


def number(item: dict[str, Any], key: str, bits: int = 16) -> int:
    value = item.get(key)
    if type(value) is not int or not 0 <= value < 1 << bits:
        raise ValueError(f"`{key}` is {_shown(value)}")
    return value


def _shown(value: object) -> str:
    return f"`{value!s:.60}`"


# In the child


def _enter(config: Config) -> None:
    """Its own mounts: a /proc without the host's processes, the simulated host's /proc and /dev, all read-only."""
    import pynvml  # noqa: F401 - slow to import, so only here, while the file can still be read

    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    if config.proc_root == "/":
        _mount_proc()
    else:
        kernel.mount(os.path.join(config.proc_root, "proc"), "/proc", None, kernel.MS_BIND | kernel.MS_REC)
    if config.dev_root != "/":
        kernel.mount(os.path.join(config.dev_root, "dev"), "/dev", None, kernel.MS_BIND | kernel.MS_REC)
    root = os.open("/", DIRECTORY)
    try:
        flags = kernel.MOUNT_ATTR_RDONLY | kernel.MOUNT_ATTR_NOSUID
        kernel.mount_setattr(root, attr_set=flags, propagation=0, recursive=True)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM):  # before Linux 5.12: files can be made, but not filled
            raise


def _mount_proc() -> None:
    try:
        kernel.mount("none", "/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    except PermissionError:
        return  # in a user namespace under masks: the processes seen there are those of its owner


def _answer(name: str, find: Callable[[Any], Json]) -> None:
    """Print what `find` finds as one line, the last one, whatever the library prints before."""
    import pynvml

    # It would look for the library by name, on a path that is not the driver's.
    pynvml.nvmlLib = pynvml.CDLL(f"./{name}")
    try:
        pynvml.nvmlInit()
        found = find(pynvml)
    except pynvml.NVMLError as error:
        said = str(error)
        raise OSError(errno.EIO, said[:1].lower() + said[1:]) from None
    os.write(1, f"\n{json.dumps(found)}\n".encode())


def look(nvml: Any) -> Report:
    """In the child: what `ask` is about."""
    cuda = nvml.nvmlSystemGetCudaDriverVersion()
    devices = [_ask_device(nvml, index) for index in range(min(nvml.nvmlDeviceGetCount(), _MOST))]
    return Report(f"{cuda // 1000}.{cuda % 1000 // 10}", tuple(device for device in devices if device))


def _ask_device(nvml: Any, index: int) -> GpuReport | None:
    try:
        device = nvml.nvmlDeviceGetHandleByIndex(index)
        pci = nvml.nvmlDeviceGetPciInfo(device)
        brand = _if_told(nvml, nvml.nvmlDeviceGetBrand, device)
        arch = _if_told(nvml, nvml.nvmlDeviceGetCudaComputeCapability, device)
        mode = _if_told(nvml, nvml.nvmlDeviceGetMigMode, device)
        mig_enabled = mode == [nvml.NVML_DEVICE_MIG_ENABLE, nvml.NVML_DEVICE_MIG_ENABLE]
        return GpuReport(
            f"{pci.domain:04x}:{pci.bus:02x}:{pci.device:02x}.0",
            nvml.nvmlDeviceGetUUID(device),
            "" if brand is None else _BRANDS.get(brand, "unknown"),
            "{}.{}".format(*arch) if arch else "",
            mig_enabled=mig_enabled,
            instances=_ask_instances(nvml, device) if mig_enabled else (),
        )
    except nvml.NVMLError:
        return None  # the others are none the worse for it; who needs this one sees that it is missing


def _if_told(nvml: Any, function: Any, device: object) -> Any:
    try:
        return function(device)
    except nvml.NVMLError as error:
        if error.value not in (nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_FUNCTION_NOT_FOUND):
            raise
        return None


def _ask_instances(nvml: Any, device: object) -> tuple[InstanceReport, ...]:
    found = []
    for index in range(min(nvml.nvmlDeviceGetMaxMigDeviceCount(device), _MOST)):
        try:
            mig = nvml.nvmlDeviceGetMigDeviceHandleByIndex(device, index)
        except nvml.NVMLError as error:
            if error.value != nvml.NVML_ERROR_NOT_FOUND:
                raise
            continue  # an index that no device has
        gi, ci = nvml.nvmlDeviceGetGpuInstanceId(mig), nvml.nvmlDeviceGetComputeInstanceId(mig)
        found.append(InstanceReport(index, gi, ci, nvml.nvmlDeviceGetUUID(mig)))
    return tuple(found)
