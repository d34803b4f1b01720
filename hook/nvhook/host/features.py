# SPDX-License-Identifier: Apache-2.0
"""What goes with GPUs and is of other drivers: GPUDirect Storage, Mellanox' InfiniBand, GDRCopy, NVSwitches.

A container asks for each by a variable (NVIDIA_GDS=enabled), beside its GPUs; it gets the device nodes that the host
has at this moment, with their numbers and owners.
"""

from __future__ import annotations

import os
import stat

from nvhook.linux.root import DIRECTORY, Root

from .offers import HostFile, HostNode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nvhook.request.config import Config

# Feature -> its nodes; a star at the end stands for anything. In NVIDIA's order.
NODES: dict[str, tuple[str, ...]] = {
    "gds": ("/dev/nvidia-fs*",),
    "mofed": ("/dev/infiniband/uverbs*", "/dev/infiniband/rdma_cm"),
    "gdrcopy": ("/dev/gdrdrv",),
    "nvswitch": ("/dev/nvidia-nvswitchctl", "/dev/nvidia-nvswitch*"),
}
# Feature -> what its programs read besides, and which kind of file it is.
_DATA = {"gds": (("/run/udev", "directory"), ("/etc/cufile.json", "file"))}
_TYPES = {"directory": stat.S_IFDIR, "file": stat.S_IFREG}


def find(config: Config, features: tuple[str, ...], warnings: list[str]) -> tuple[list[HostNode], list[HostFile]]:
    """What the host has of these; one of which it has nothing is named in `warnings`."""
    nodes: list[HostNode] = []
    files: list[HostFile] = []
    for feature in features:
        found = [node for pattern in NODES[feature] for node in _nodes(config.dev_root, pattern)]
        if not found:
            names = " or ".join(f"`{pattern}`" for pattern in NODES[feature])
            warnings.append(f"NVIDIA_{feature.upper()}=enabled gives nothing: this host has no {names}")
            continue
        nodes += {node.path: node for node in found}.values()
        files += _files(config.driver_root, feature)
    return nodes, files


def _nodes(dev_root: str, pattern: str) -> list[HostNode]:
    directory, start = os.path.split(pattern)
    top = dev_root.rstrip("/") + directory
    try:
        names = os.listdir(top) if start.endswith("*") else [start]
    except OSError:
        return []
    matching = [name for name in sorted(names) if name.startswith(start.rstrip("*"))]
    return [node for name in matching for node in _node(f"{top}/{name}", f"{directory}/{name}")]


def _node(path: str, name: str) -> list[HostNode]:
    try:
        status = os.stat(path, follow_symlinks=False)
    except OSError:
        return []
    if not stat.S_ISCHR(status.st_mode):
        return []
    owner = status.st_uid, status.st_gid, status.st_mode & 0o777
    return [HostNode(name, os.major(status.st_rdev), os.minor(status.st_rdev), owner)]


def _files(driver_root: str, feature: str) -> list[HostFile]:
    try:
        root = Root(os.open(driver_root, DIRECTORY))
    except OSError:
        return []
    try:
        found = [(root.real_path(path, _TYPES[what]), path, what) for path, what in _DATA.get(feature, ())]
    finally:
        os.close(root.fd)
    return [HostFile(real, path, what) for real, path, what in found if real]
