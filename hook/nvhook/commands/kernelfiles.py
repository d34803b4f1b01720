# SPDX-License-Identifier: Apache-2.0
"""Files and directories of /proc and /sys, for commands that show or judge what is there. What is missing is empty."""

from __future__ import annotations

import os
import stat

MAX_TEXT = 1 << 20
MAX_NAMES = 4096


def kernel_text(path: str, limit: int = MAX_TEXT) -> str:
    """What a file of /proc or /sys says, or empty where it is not there or not for us.

    Their sizes say nothing, so that it is read until it ends.
    """
    try:
        # A pipe without a writer would hold us up; in a tree that is no /proc one can be.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        with open(fd, "rb") as file:
            is_file = stat.S_ISREG(os.fstat(fd).st_mode)
            return file.read(limit).decode(errors="replace") if is_file else ""
    except OSError:
        return ""


def listed(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))[:MAX_NAMES]
    except OSError:
        return []
