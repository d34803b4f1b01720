# SPDX-License-Identifier: Apache-2.0
"""The file of nvidia-container-cli's --debug: what is done, line by line."""

from __future__ import annotations

import os

from nvhook import audit


class CommandLog:
    """`path` is what the option says; a file that cannot be written is a warning, and nothing is written."""

    def __init__(self, path: str | None, warnings: list[str]) -> None:
        self._fd = audit.open_log(path or "")
        if path and path != os.devnull and self._fd < 0:
            warnings.append(f"--debug={path} cannot be written")

    def __bool__(self) -> bool:
        return self._fd >= 0

    def write(self, level: str, text: str) -> None:
        if self:
            audit.append(self._fd, audit.entry(level, text))
