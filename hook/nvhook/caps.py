# SPDX-License-Identifier: Apache-2.0
"""Capabilities of the driver's that have device nodes: MIG instances, the right to set MIG up, IMEX channels.

Who can open /dev/nvidia-caps/nvidia-cap<minor> has the capability, and a file below /proc tells its minor. A program
of the driver's reads that file first, so the container gets both. The nodes of the fabric's management
(fabric-imex-mgmt, fabric-mgmt) are no container's: no variable asks for them.
"""

from __future__ import annotations

import os
import stat

from . import mig
from .errors import DeviceError, RequestError
from .extras import Data, Extras, Node
from .gpus import imex_channel_count, information, number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .config import Config
    from .gpus import Gpus, Selection
    from .request import Request

_FILES = "/proc/driver/nvidia/capabilities"
_CHANNELS = "nvidia-caps-imex-channels"  # the name of the driver in /proc/devices, and of its directory in /dev


def find(config: Config, request: Request, chosen: Selection, host: Gpus) -> Extras:
    """Those of the `chosen` MIG devices, and what else `request` asks for.

    RequestError where it may not; DeviceError where the host lacks one.
    """
    found = Extras()
    for name in _names(request, chosen, host):
        _add(found, config, host, name)
    count = imex_channel_count(config.proc_root) if request.imex_channels else 0
    found.nodes += [_channel(config, host, number, count) for number in request.imex_channels]
    return found


def _names(request: Request, chosen: Selection, host: Gpus) -> list[str]:
    """The capabilities' names below _FILES, once each."""
    names = [f"mig/{right}" for right in request.mig_rights]
    migs = chosen.migs
    if names:
        if migs and request.devices != ("all",):
            raise RequestError(
                f"the right to {request.mig_rights[0]} MIG is asked for together with single MIG devices",
                "ask for whole GPUs, or for `all`",
            )
        minors = {gpu.minor for gpu in chosen.gpus}
        migs = [item for item in mig.every(host) if item.gpu.minor in minors]
    for item in migs:
        instance = f"gpu{item.gpu.minor}/mig/gi{item.gi}"
        names += [f"{instance}/access", f"{instance}/ci{item.ci}/access"]
    return list(dict.fromkeys(names))


def _add(found: Extras, config: Config, host: Gpus, name: str) -> None:
    path = f"{_FILES}/{name}"
    source = config.proc_root.rstrip("/") + path
    values = information(source)
    minor, mode = number(values.get("DeviceFileMinor", "")), number(values.get("DeviceFileMode", ""))
    if minor < 0 or mode < 0:
        raise DeviceError(f"read `{source}`: no `DeviceFileMinor` and `DeviceFileMode`")
    found.data.append(Data(source, path))
    # The first drivers with MIG had no nodes: there the file below /proc is the capability itself.
    if "nvidia-caps" in host.majors:
        node = f"/dev/nvidia-caps/nvidia-cap{minor}"
        found.nodes.append(Node(node, host.majors["nvidia-caps"], minor, (0, 0, mode & 0o777)))


def _channel(config: Config, host: Gpus, number: int, count: int) -> Node:
    """`count`: how many channels the driver has."""
    major = host.majors.get(_CHANNELS)
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
    return Node(path, major, number, host.node_owner)


def _is_node(config: Config, path: str, device: int) -> bool:
    try:
        status = os.stat(config.dev_root.rstrip("/") + path, follow_symlinks=False)
    except OSError:
        return False
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == device
