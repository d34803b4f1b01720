# SPDX-License-Identifier: Apache-2.0
"""`nvhook create-dev-char-symlinks`: /dev/char/MAJOR:MINOR for the driver's nodes, as udev makes it for others.

systemd looks device rules up there. Where a link is missing, `systemctl daemon-reload` takes the device away from
containers whose engine has systemd manage their control groups. Name and option are those of NVIDIA's nvidia-ctk.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from nvhook.errors import ConfigError, reason

from . import load

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from . import Subparsers

_NODES = ("nvidia[0-9]*", "nvidiactl", "nvidia-*", "nvidia-caps/*", "nvidia-caps-imex-channels/*")


def add(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "create-dev-char-symlinks",
        help="link the driver's nodes below /dev/char, where systemd looks",
        description="Make /dev/char/MAJOR:MINOR for each node of the driver that has none, so that `systemctl "
        "daemon-reload` takes no GPU from a container. The systemd unit of the package does it with every change.",
        epilog="sudo nvhook create-dev-char-symlinks --dry-run",
    )
    parser.add_argument("--dev-char-path", metavar="DIR", default="", help="where the links are made, if not /dev/char")
    parser.add_argument("--dry-run", action="store_true", help="say what would be made, and make nothing")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, warnings: list[str]) -> int:
    dev = Path(load(options, warnings).dev_root, "dev")
    place = Path(options.dev_char_path or dev / "char")
    for node, name in nodes(dev):
        link, target = place / name, os.path.relpath(node, place)
        if link.is_symlink() or link.exists():
            if not (link.exists() and os.path.samefile(link, node)):
                warnings.append(f"`{link}` leads to another place than `{node}`; remove it if that is wrong")
        elif options.dry_run:
            print(f"{link} -> {target}")
        else:
            _make(link, target)
            print(f"{link} -> {target}")
    return 0


def nodes(dev: Path) -> list[tuple[Path, str]]:
    """The driver's character devices and their MAJOR:MINOR."""
    found = []
    for path in sorted({path for pattern in _NODES for path in dev.glob(pattern)}):
        status = path.lstat()
        if stat.S_ISCHR(status.st_mode):
            found.append((path, f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"))
    return found


def _make(link: Path, target: str) -> None:
    try:
        os.makedirs(link.parent, exist_ok=True)
        if not link.is_symlink():  # udev may have made it at this moment
            link.symlink_to(target)
    except OSError as error:
        raise ConfigError(f"make `{link}`: {reason(error)}", "run it as root") from None
