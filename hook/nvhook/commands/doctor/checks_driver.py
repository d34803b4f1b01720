# SPDX-License-Identifier: Apache-2.0
"""What `doctor` asks of the driver: its kernel modules, libraries and device nodes, and why one of them is missing.

On a host without a GPU nothing but `hardware` has something to say.
"""

from __future__ import annotations

import os
import stat

from nvhook.commands import hardware
from nvhook.commands.doctor.findings import failure, ok, several, skipped, warning
from nvhook.commands.kernelfiles import kernel_text
from nvhook.driver import inventory
from nvhook.errors import DriverError, Finding
from nvhook.host import host as hosts
from nvhook.host import sockets

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from nvhook.commands.hostview import HostView
    from nvhook.host.gpus import Gpus

_SECURE_BOOT = "firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
_KEYS = ("/var/lib/shim-signed/mok/MOK.der", "/var/lib/dkms/mok.pub")  # what Ubuntu and DKMS sign modules with
_NOUVEAU = "printf 'blacklist nouveau\\noptions nouveau modeset=0\\n' > /etc/modprobe.d/nouveau.conf"
_LOG = "dmesg | grep -i -e nvrm -e xid"


def driver(host: HostView) -> Gpus | None:
    """The GPUs that NVIDIA's driver has; None where there is none. DeviceError, DriverError."""
    return hosts.find(host.config)


def has_gpu(host: HostView) -> bool:
    return hosts.kind(host.config) != hosts.NONE or bool(hardware.pci_gpus(host.sys))


def check_module(host: HostView) -> Iterator[Finding]:
    if hosts.kind(host.config) == hosts.TEGRA:
        reason = "this is a Tegra, whose integrated GPU has another driver"
        yield failure("kernel module", reason, "use NVIDIA's container toolkit on this host")
        return
    found = driver(host)
    if found is None:
        yield _missing_module(host)
    elif found.dxg is not None:
        yield ok("kernel module", f"WSL 2 needs none; the driver store is {found.driver_version}")
    else:
        yield ok("kernel module", f"nvidia {found.driver_version} is loaded")


def _missing_module(host: HostView) -> Finding:
    """The first cause that can be seen."""
    drivers = set(hardware.pci_gpus(host.sys).values())
    name = "kernel module"
    if "nouveau" in drivers or "nouveau " in kernel_text(f"{host.proc}/modules"):
        return failure(
            name, "nouveau has the GPU, and NVIDIA's module cannot", f"{_NOUVEAU} && {_new_initramfs(host)} && reboot"
        )
    if drivers == {"vfio-pci"}:
        return warning(
            name, "vfio-pci has every GPU, for virtual machines", "start the containers in the machine that has the GPU"
        )
    if _is_built(host) is False:
        reason = f"there is no nvidia module for the kernel {_release(host)} that runs"
        remedy = "dkms autoinstall && modprobe nvidia" if _has_dkms(host) else "install the NVIDIA driver on this host"
        return failure(name, reason, remedy)
    if kernel_text(f"{host.sys}/{_SECURE_BOOT}")[4:5] == "\x01":  # behind four bytes of attributes
        key = next((path for path in _KEYS if host.files.exists(path)), "")
        remedy = f"mokutil --import {key} && reboot" if key else "install the driver that the distribution has signed"
        return failure(
            name, "it is not loaded, and Secure Boot is on: the kernel refuses a module that is not signed", remedy
        )
    return failure(name, "nvidia is not loaded", "modprobe nvidia")


def check_gpus(host: HostView) -> Iterator[Finding]:
    found = driver(host)
    if found is None or found.dxg is not None:
        return
    if not found.gpus:
        yield failure("GPUs", "the driver is loaded and has none", _LOG)
        return
    yield ok("GPUs", ", ".join(f"{gpu.index} {gpu.model or gpu.pci}" for gpu in found.gpus))
    known = {gpu.pci.lower() for gpu in found.gpus}
    for address, name in hardware.pci_gpus(host.sys).items():
        if address.lower() not in known and name in ("", "nvidia"):
            yield warning(f"GPU {address}", "is on the PCI bus, and the driver does not use it", _LOG)


def check_libraries(host: HostView) -> Iterator[Finding]:
    """NVML calls the usual fault `Driver/library version mismatch`."""
    found = driver(host)
    if found is None:
        return
    notes: list[str] = []
    try:
        files = inventory.load(host.config, found.driver_version, notes, keep=False)
    except DriverError as error:
        yield failure(
            "driver libraries", error.message, "reboot" if "the libraries below" in error.message else error.remedy
        )
        return
    what = f"{len(files.libraries)} libraries and {several(len(files.binaries), 'program')}"
    yield ok("driver libraries", f"{what} of {files.version} below {host.config.driver_root}")
    for note in notes:
        yield warning("driver files", note, "reinstall the driver")


def check_nvml(host: HostView) -> Iterator[Finding]:
    found = driver(host)
    if found is None or not found.gpus:
        return
    if os.geteuid() != 0:
        yield skipped("NVML", "is asked in namespaces of its own, which takes root", "sudo nvhook doctor")
        return
    try:
        report = inventory.report(host.config, found, None, [], again=True, keep=False)
    except DriverError as error:
        yield failure("NVML", error.message, error.remedy)
        return
    answering = {device.pci.lower() for device in report.devices}
    silent = [gpu for gpu in found.gpus if gpu.pci.lower() not in answering]
    for gpu in silent:
        yield failure(f"GPU {gpu}", "does not answer NVML: it has fallen off the bus, or is being reset", _LOG)
    if not silent:
        yield ok("NVML", f"answers for {len(answering)} of {len(found.gpus)} GPUs; CUDA {report.cuda}")


def check_uvm(host: HostView) -> Iterator[Finding]:
    """Without it nvidia-smi works and cuInit fails."""
    found = driver(host)
    if found is None or found.dxg is not None:
        return
    if "nvidia-uvm" in found.majors:
        yield ok("nvidia-uvm", f"is loaded, with major {found.majors['nvidia-uvm']}")
        return
    why = "is not loaded: CUDA does not work before it is"
    why += "; a start as root loads it" if host.config.load_kmods else ", and `load-kmods` in config.toml is false"
    at_boot = "echo nvidia-uvm > /etc/modules-load.d/nvidia-uvm.conf"
    yield warning("nvidia-uvm", why, f"modprobe nvidia-uvm && {at_boot}")


def nodes(found: Gpus) -> dict[str, tuple[int, int]]:
    """Name in /dev -> the numbers that the loaded modules have, of the nodes that a container is given by default."""
    devices = hardware.nodes(found, ("utility", "compute"))
    return {device.path.removeprefix("/dev/"): (device.major, device.minor) for device in devices}


def check_nodes(host: HostView) -> Iterator[Finding]:
    """A module that is loaded again may have another major; a node that was made before has the old one."""
    found = driver(host)
    if found is None or found.dxg is not None:
        return
    mode = f"{found.node_owner[2]:o}"
    right = []
    for name, (major, minor) in nodes(found).items():
        path = f"{host.dev}/{name}"
        make = f"mknod -m {mode} {path} c {major} {minor}"
        shown = _numbers(path)
        if shown == "":
            yield warning(path, "is not there: programs and rootless engines on the host cannot use the GPU", make)
        elif shown != f"{major}:{minor}":
            why = f"is {shown}, and the module that is loaded has {major}:{minor}"
            yield failure(path, why, f"rm -f {path} && {make}")
        else:
            right.append(name)
    if right:
        yield ok("device nodes", f"{' '.join(right)} have the numbers of the modules that are loaded")


def check_char_links(host: HostView) -> Iterator[Finding]:
    """systemd is told /dev/char/195:0 by runc, and the driver makes no such links."""
    found = driver(host)
    if found is None or found.dxg is not None or not host.files.exists("/run/systemd/system"):
        return
    wanted = {f"{host.dev}/char/{major}:{minor}": name for name, (major, minor) in nodes(found).items()}
    missing = [path for path, name in wanted.items() if _numbers(f"{host.dev}/{name}") and not os.path.exists(path)]
    if not missing:
        yield ok(f"{host.dev}/char", "has a link for each node of the driver")
        return
    names = " ".join(wanted[path] for path in missing)
    why = "systemd cannot name these devices, and `systemctl daemon-reload` takes them from a running container"
    yield warning(f"{host.dev}/char", f"has no link for {names}: {why}", "nvhook create-dev-char-symlinks")


def check_persistence(host: HostView) -> Iterator[Finding]:
    found = driver(host)
    if found is None or not found.gpus:
        return
    if any("persistenced" in item.path for item in sockets.find(host.config.driver_root)):
        yield ok("persistence", "nvidia-persistenced keeps the GPUs initialised")
    elif any("?" in gpu.uuid for gpu in found.gpus):
        why = "no nvidia-persistenced, and a GPU that is not initialised: each first use takes seconds"
        yield warning("persistence", why, "systemctl enable --now nvidia-persistenced")
    else:
        yield ok("persistence", "no nvidia-persistenced; every GPU has been initialised")


def _numbers(path: str) -> str:
    """major:minor, what it is instead, or empty where there is nothing."""
    try:
        status = os.stat(path)
    except OSError:
        return ""
    if not stat.S_ISCHR(status.st_mode):
        return "no character device"
    return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"


def _release(host: HostView) -> str:
    return kernel_text(f"{host.proc}/sys/kernel/osrelease").strip()


def _is_built(host: HostView) -> bool | None:
    """Whether the kernel that runs has a module nvidia; None where that cannot be said."""
    release = _release(host)
    try:
        known = host.files.read(f"/lib/modules/{release}/modules.dep", 16 << 20) if release else b""
    except OSError:
        return None
    return b"/nvidia.ko" in known if known else None


def _has_dkms(host: HostView) -> bool:
    return host.is_program("/usr/sbin/dkms")


def _new_initramfs(host: HostView) -> str:
    return "update-initramfs -u" if host.is_program("/usr/sbin/update-initramfs") else "dracut --force"
