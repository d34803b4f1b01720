# SPDX-License-Identifier: Apache-2.0
"""What the driver shows below /proc/driver/nvidia, and what of it a container is to read.

procfs is the same in every container. So a container would see all GPUs of the host, whoever uses them, and its
programs (nvidia-modprobe) would be told to make device nodes by themselves, also for GPUs that are not theirs.
"""

from __future__ import annotations

import os

from nvhook.errors import DeviceError, reason
from nvhook.formats.record import Record

DIRECTORY = "/proc/driver/nvidia"
_FILES = ("params", "registry", "version")
_MAKES_NODES = "ModifyDeviceFiles:"
_MAX_SIZE = 1 << 20


class DriverProc(Record):
    """`path` of the directory on the host; `files`: name -> content for a container, of those that there are."""

    path: str
    files: dict[str, str]


def read(proc_root: str) -> DriverProc:
    """DeviceError for a file that is there and cannot be read."""
    path = os.path.join(proc_root, DIRECTORY.lstrip("/"))
    files = {}
    for name in _FILES:
        content = _read(os.path.join(path, name))
        if content is not None:
            files[name] = _leave_nodes_alone(content) if name == "params" else content
    return DriverProc(path, files)


def _read(path: str) -> str | None:
    try:
        return text(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DeviceError(f"read `{path}`: {reason(error)}") from None


def text(path: str) -> str:
    """A file below /proc, without the large buffer that open() takes for a file of unknown size. OSError."""
    content = b""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while len(content) < _MAX_SIZE and (part := os.read(fd, 1 << 14)):
            content += part
    finally:
        os.close(fd)
    return content.decode("utf-8", "replace")


def _leave_nodes_alone(params: str) -> str:
    lines = [line for line in params.splitlines() if not line.startswith(_MAKES_NODES)]
    return "\n".join([*lines, f"{_MAKES_NODES} 0", ""])
