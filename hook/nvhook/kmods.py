# SPDX-License-Identifier: Apache-2.0
"""What a host makes on demand: the driver's kernel modules, and the device nodes that go with them.

After a boot nvidia-uvm is not there until somebody has used CUDA, and the driver's nodes are not made by the kernel or
udev but by whoever comes first as root. A container does not need the host's nodes, it has its own; one in a user
namespace does, because a node made for it could not be opened, and so does the next program on the host. So the nodes
that a container gets and the host lacks are made on the host as well.

The driver's have no link below /dev/char either, which udev makes for others. A runtime that has systemd manage the
container's control group names each device by it, and leaves out what has none; the next `systemctl daemon-reload`
then takes that from the container.

The host is changed here, so only what `load-kmods` allows is done, and nothing where we are root of a user namespace. A
host that `dev-root` or `proc-root` put elsewhere is not the one whose kernel we could ask for a module.
"""

from __future__ import annotations

import os
import stat

from .errors import DeviceError, reason
from .linux import userns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from .config import Config
    from .edits import Device

_USUAL = "/sbin/modprobe"
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}  # for the commands that modprobe.d may name
_SECONDS = 60  # eight GPUs take the module ten


def modprobe(config: Config) -> str:
    """The program that loads modules into this machine's kernel; empty where we may not."""
    if not _is_allowed(config) or (config.proc_root, config.dev_root) != ("/", "/"):
        return ""
    try:
        with open("/proc/sys/kernel/modprobe", encoding="utf-8") as file:
            return file.read().strip() or _USUAL
    except (OSError, ValueError):
        return _USUAL


def load(module: str, program: str) -> None:
    """Run `program` for `module`, and wait; DeviceError with the last line that it printed."""
    from .linux import child  # hardly ever: once after a boot

    try:
        status, text = child.run([program, module], _ENVIRONMENT, _SECONDS)
    except OSError as error:
        status, text = -1, f"run `{program}`: {reason(error)}"
    if status != 0:
        raise DeviceError(
            f"the {module} kernel module is not loaded, and cannot be: {text or f'status {status}'}",
            f"`modprobe {module}` has to work on the host: see `dmesg`, or install the driver",
        )


def make_nodes(config: Config, nodes: Sequence[Device], warnings: list[str]) -> None:
    """Make those of the driver's `nodes` that the host lacks, and the links by which systemd knows them.

    One that cannot be made costs a warning: most need it not.
    """
    root = config.dev_root.rstrip("/")
    ours = [node for node in nodes if node.path.startswith("/dev/nvidia")]
    missing = _absent((root + node.path, node) for node in ours)
    unlinked = _absent((f"{root}/dev/char/{node.major}:{node.minor}", node) for node in ours)
    # The numbers are those of the /proc that was read: a /dev that goes with another one is left alone.
    is_one_host = config.dev_root != "/" or config.proc_root == "/"
    if not (missing or unlinked) or not is_one_host or not _is_allowed(config):
        return
    umask = os.umask(0o022)
    try:
        if missing and _may_modify(config.proc_root):
            _make(missing, _make_node, warnings)
        if unlinked and os.path.isdir(f"{root}/dev/char"):  # else nobody keeps it, and there is no systemd
            _make(unlinked, _make_link, warnings)
    finally:
        os.umask(umask)


def _absent(places: Iterable[tuple[str, Device]]) -> list[tuple[str, Device]]:
    return [(path, node) for path, node in places if not os.path.lexists(path)]


def _make(places: list[tuple[str, Device]], make: Callable[[str, Device], None], warnings: list[str]) -> None:
    for path, node in places:
        try:
            make(path, node)
        except OSError as error:
            warnings.append(f"make `{path}` on the host: {reason(error)}")


def _make_node(path: str, node: Device) -> None:
    os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
    try:
        os.mknod(path, stat.S_IFCHR | node.mode, os.makedev(node.major, node.minor))
    except FileExistsError:
        return  # another start was faster
    os.chmod(path, node.mode)  # whatever the umask
    os.chown(path, node.uid, node.gid)


def _make_link(path: str, node: Device) -> None:
    try:
        os.symlink("../" + node.path.removeprefix("/dev/"), path)
    except FileExistsError:
        return  # udev or another start was faster


def _is_allowed(config: Config) -> bool:
    return config.load_kmods and os.geteuid() == 0 and userns.is_first()


def _may_modify(proc_root: str) -> bool:
    """An administrator who makes the nodes tells the module so (NVreg_ModifyDeviceFiles)."""
    try:
        with open(os.path.join(proc_root, "proc/driver/nvidia/params"), encoding="utf-8", errors="replace") as file:
            values = dict(line.rstrip().split(": ", 1) for line in file if ": " in line)
    except OSError:
        return True  # what nvidia-modprobe takes it for
    return values.get("ModifyDeviceFiles", "1") == "1"
