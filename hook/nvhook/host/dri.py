# SPDX-License-Identifier: Apache-2.0
"""The DRI nodes of GPUs, /dev/dri/card* and renderD*, as the kernel shows them in /sys.

Which of them belongs to a GPU is known by its PCI address alone: the numbers follow the order in which drivers were
loaded, and a card on the mainboard may have the first one.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nvhook.request.config import Config

    from .gpus import Gpu

DRAWING = ("display", "graphics")  # the capabilities whose programs use them
_MAJOR = 226  # fixed by the kernel's list of devices
_OWNER = (0, 0, 0o660)  # where the host has no such node yet


class DriNode:
    """/dev/dri/`name` of the GPU at `pci`; `role` is `card` or `render`, `owner` (uid, gid, mode) the host's node's."""

    __slots__ = ("major", "minor", "name", "owner", "pci", "role")

    def __init__(self, name: str, role: str, minor: int, pci: str, owner: tuple[int, int, int]) -> None:
        self.name = name
        self.role = role
        self.major = _MAJOR
        self.minor = minor
        self.pci = pci
        self.owner = owner


def find(config: Config, chosen: list[Gpu]) -> list[DriNode]:
    """Those of `chosen`, in its order; none where nvidia-drm is not loaded."""
    nodes: list[DriNode] = []
    for gpu in chosen:
        directory = os.path.join(config.proc_root, "sys/bus/pci/devices", gpu.pci.lower(), "drm")
        try:
            names = sorted(os.listdir(directory))
        except OSError:
            continue
        for name in names:
            role = _role(name)
            minor = _minor(os.path.join(directory, name, "dev")) if role else -1
            if minor >= 0:
                owner = _owner(os.path.join(config.dev_root, "dev/dri", name))
                nodes.append(DriNode(name, role, minor, gpu.pci, owner))
    return nodes


def _role(name: str) -> str:
    for start, role in (("card", "card"), ("renderD", "render")):
        if name.startswith(start) and name[len(start) :].isdecimal():
            return role
    return ""


def _minor(path: str) -> int:
    """-1 where the file is not there, or names another kind of device."""
    try:
        with open(path, encoding="utf-8") as file:
            major, _, minor = file.read(64).strip().partition(":")
        return int(minor) if int(major) == _MAJOR else -1
    except (OSError, ValueError):
        return -1


def _owner(path: str) -> tuple[int, int, int]:
    try:
        status = os.stat(path, follow_symlinks=False)
    except OSError:
        return _OWNER
    return status.st_uid, status.st_gid, status.st_mode & 0o777
