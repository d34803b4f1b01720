# SPDX-License-Identifier: Apache-2.0
"""Whose a program is that goes by one of the names which engines look for: ours, NVIDIA's, or nobody's."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nvhook.commands.hostview import HostView

RUNTIME = "nvidia-container-runtime"

OURS, NVIDIA, MISSING = "ours", "NVIDIA's", ""
_START = 16 << 10


def whose(host: HostView, path: str) -> str:
    """Ours are scripts and ELF files that name us at the beginning; MISSING for what cannot be run."""
    if not host.is_program(path):
        return MISSING
    try:
        fd = host.files.open_file(path)
    except OSError:
        return NVIDIA
    try:
        start = os.read(fd, _START)
    finally:
        os.close(fd)
    return OURS if b"nvhook" in start.lower() else NVIDIA
