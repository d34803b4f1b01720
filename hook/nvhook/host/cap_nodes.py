# SPDX-License-Identifier: Apache-2.0
"""Capabilities of the driver's that have device nodes: MIG instances, the right to set MIG up, IMEX channels.

Who can open /dev/nvidia-caps/nvidia-cap<minor> has the capability, and a file below /proc tells its minor. A program
of the driver's reads that file first, so the container gets both. The nodes of the fabric's management
(fabric-imex-mgmt, fabric-mgmt) are no container's: no variable asks for them.
"""

from __future__ import annotations

import os
import stat

from nvhook.errors import DeviceError, RequestError

from . import mig
from .gpus import imex_channel_count, information, number
from .offers import HostFile, HostNode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nvhook.request.config import Config
    from nvhook.request.request import Request

    from .gpus import Gpus
    from .mig import MigDevice
    from .selection import Selection

_FILES = "/proc/driver/nvidia/capabilities"
_CHANNELS = "nvidia-caps-imex-channels"  # the name of the driver in /proc/devices, and of its directory in /dev


def find(config: Config, request: Request, chosen: Selection, gpus: Gpus) -> tuple[list[HostNode], list[HostFile]]:
    """Those of the `chosen` MIG devices, and what else `request` asks for.

    RequestError where it may not; DeviceError where the host lacks one.
    """
    if request.mig_rights:
        nodes, files = of_rights(config, request.mig_rights, request.devices, chosen, gpus)
    else:
        nodes, files = of_instances(config, chosen.migs, gpus)
    return nodes + of_channels(config, request.imex_channels, gpus), files


def of_instances(config: Config, migs: list[MigDevice], gpus: Gpus) -> tuple[list[HostNode], list[HostFile]]:
    return _look_up(config, _instances(migs), gpus)


def of_rights(
    config: Config, rights: tuple[str, ...], devices: tuple[str, ...], chosen: Selection, gpus: Gpus
) -> tuple[list[HostNode], list[HostFile]]:
    """The rights to set up or to watch MIG, and every instance on the GPUs of the container. RequestError for a list of
    `devices` with single MIG devices."""
    if chosen.migs and devices != ("all",):
        raise RequestError(
            f"the right to {rights[0]} MIG is asked for together with single MIG devices",
            "ask for whole GPUs, or for `all`",
        )
    minors = {gpu.minor for gpu in chosen.gpus}
    migs = [item for item in mig.every(gpus) if item.gpu.minor in minors]
    return _look_up(config, [*(f"mig/{right}" for right in rights), *_instances(migs)], gpus)


def of_channels(config: Config, numbers: tuple[int, ...], gpus: Gpus) -> list[HostNode]:
    """The nodes of these IMEX channels."""
    count = imex_channel_count(config.proc_root) if numbers else 0
    return [_channel(config, gpus, number, count) for number in numbers]


def _instances(migs: list[MigDevice]) -> list[str]:
    """The names of their capabilities below _FILES."""
    names = []
    for item in migs:
        instance = f"gpu{item.gpu.minor}/mig/gi{item.gi}"
        names += [f"{instance}/access", f"{instance}/ci{item.ci}/access"]
    return names


def _look_up(config: Config, names: list[str], gpus: Gpus) -> tuple[list[HostNode], list[HostFile]]:
    """Nodes and files of the capabilities `names`, once each."""
    nodes, files = [], []
    for name in dict.fromkeys(names):
        path = f"{_FILES}/{name}"
        source = config.proc_root.rstrip("/") + path
        values = information(source)
        minor, mode = number(values.get("DeviceFileMinor", "")), number(values.get("DeviceFileMode", ""))
        if minor < 0 or mode < 0:
            raise DeviceError(f"read `{source}`: no `DeviceFileMinor` and `DeviceFileMode`")
        files.append(HostFile(source, path))
        # The first drivers with MIG had no nodes: there the file below /proc is the capability itself.
        if "nvidia-caps" in gpus.majors:
            node = f"/dev/nvidia-caps/nvidia-cap{minor}"
            nodes.append(HostNode(node, gpus.majors["nvidia-caps"], minor, (0, 0, mode & 0o777)))
    return nodes, files


def _channel(config: Config, gpus: Gpus, number: int, count: int) -> HostNode:
    """`count`: how many channels the driver has."""
    major = gpus.majors.get(_CHANNELS)
    if major is None:
        raise DeviceError(
            f"IMEX channel {number} is asked for and the driver has none: no `{_CHANNELS}` in /proc/devices",
            "channels need an NVLink domain of several hosts, and driver 550 or newer",
        )
    if number >= count:
        raise RequestError(
            f"IMEX channel {number} is asked for and the driver has {count}, numbered from 0",
            "`NVreg_ImexChannelCount` of the nvidia module sets how many there are",
        )
    path = f"/dev/{_CHANNELS}/channel{number}"
    if config.imex_channels_of_host_only and not _is_node(config, path, os.makedev(major, number)):
        raise DeviceError(
            f"IMEX channel {number} is asked for and this host has no `{path}`",
            f"make it with `mknod {path} c {major} {number}`, "
            "or let `features.disable-imex-channel-creation` be false in config.toml",
        )
    return HostNode(path, major, number, gpus.node_owner)


def _is_node(config: Config, path: str, device: int) -> bool:
    try:
        status = os.stat(config.dev_root.rstrip("/") + path, follow_symlinks=False)
    except OSError:
        return False
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == device
