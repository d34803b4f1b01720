# SPDX-License-Identifier: Apache-2.0
"""The host that `doctor` and `snapshot` look at: its files, its /proc and its /sys, which need not be this machine's.

`--root` says where /etc, /usr and /run are, config.toml where /dev, /proc, /sys and the driver are. Nothing here is
written or run.
"""

from __future__ import annotations

import os
import stat

from nvhook.commands.kernelfiles import MAX_NAMES, MAX_TEXT
from nvhook.errors import ConfigError, reason
from nvhook.linux.root import DIRECTORY, Root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nvhook.request.config import Config


class HostView:
    """`files` is the host's root directory; `proc`, `sys` and `dev` are paths; `is_here`: they are this machine's."""

    __slots__ = ("config", "config_path", "dev", "files", "is_here", "proc", "root", "sys")

    def __init__(self, config: Config, config_path: str, root: str) -> None:
        self.config = config
        self.config_path = config_path
        self.root = os.path.abspath(root)
        self.proc = os.path.join(config.proc_root, "proc")
        self.sys = os.path.join(config.proc_root, "sys")
        self.dev = os.path.join(config.dev_root, "dev")
        self.is_here = self.root == "/" and config.proc_root == "/"
        try:
            self.files = Root(os.open(self.root, DIRECTORY))
        except OSError as error:
            raise ConfigError(f"open `{self.root}`: {reason(error)}", "name the host's root directory") from None

    def read(self, path: str) -> bytes:
        """A file of at most 1 MiB below the root; OSError for another, and for what is no file."""
        return self.files.read(path, MAX_TEXT)

    def text(self, path: str) -> str:
        """Its text, or empty."""
        try:
            return self.read(path).decode(errors="replace")
        except OSError:
            return ""

    def names(self, path: str) -> list[str]:
        return self.files.names(path)[:MAX_NAMES]

    def is_program(self, path: str) -> bool:
        try:
            fd = self.files.open(path)
        except OSError:
            return False
        try:
            status = os.fstat(fd)
            return stat.S_ISREG(status.st_mode) and bool(status.st_mode & 0o111)
        finally:
            os.close(fd)
