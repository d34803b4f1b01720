# SPDX-License-Identifier: Apache-2.0
"""`nvhook create-dev-char-symlinks`: /dev/char/MAJOR:MINOR for the driver's nodes, as udev makes it for others.

systemd looks device rules up there. Where a link is missing, `systemctl daemon-reload` takes the device away from
containers whose engine has systemd manage their control groups. Name and option are those of NVIDIA's nvidia-ctk.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from nvhook.errors import ConfigError, DeviceError, reason
from nvhook.host import gpus
from nvhook.request.config import CAPABILITIES

from . import hardware, load

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from nvhook.host.gpus import Gpus
    from nvhook.request.config import Config

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
    parser.add_argument("--create-all", action="store_true", help="for nodes that may be made later as well")
    parser.add_argument("--dev-char-path", metavar="DIR", default="", help="where the links are made, if not /dev/char")
    parser.add_argument("--dry-run", action="store_true", help="say what would be made, and make nothing")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, warnings: list[str]) -> int:
    config = load(options, warnings)
    dev = Path(config.dev_root, "dev")
    place = Path(options.dev_char_path or dev / "char")
    found = nodes(dev)
    if options.create_all:
        known = {path for path, _ in found}
        found += [(path, name) for path, name in possible(config, dev) if path not in known]
    made = 0
    for node, name in found:
        link, target = place / name, os.path.relpath(node, place)
        if link.is_symlink() or link.exists():
            if not _is_same(link, node):
                warnings.append(f"`{link}` leads to another place than `{node}`; remove it if that is wrong")
        elif options.dry_run:
            print(f"{link} -> {target}")
        else:
            _make(link, target)
            made += 1
    if made:
        print(f"{made} links made in {place}")
    return 0


def nodes(dev: Path) -> list[tuple[Path, str]]:
    """The driver's character devices and their MAJOR:MINOR."""
    found = []
    for path in sorted({path for pattern in _NODES for path in dev.glob(pattern)}):
        status = path.lstat()
        if stat.S_ISCHR(status.st_mode):
            found.append((path, f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"))
    return found


def possible(config: Config, dev: Path) -> list[tuple[Path, str]]:
    """As the kernel modules that are loaded would have them made; none without a driver."""
    try:
        host = gpus.read(config.proc_root)
    except DeviceError:
        return []
    devices = hardware.nodes(host, CAPABILITIES)
    found = {dev / item.path.removeprefix("/dev/"): f"{item.major}:{item.minor}" for item in devices}
    return [*found.items(), *_capabilities(config, dev, host)]


def _capabilities(config: Config, dev: Path, host: Gpus) -> list[tuple[Path, str]]:
    """Of every MIG instance that there could be: a line each, a name and a minor."""
    major = host.majors.get("nvidia-caps")
    try:
        lines = Path(config.proc_root, "proc/driver/nvidia-caps/mig-minors").read_text().splitlines()
    except OSError:
        lines = []
    minors = [gpus.number(line.rpartition(" ")[2]) for line in lines] if major is not None else []
    return [(dev / f"nvidia-caps/nvidia-cap{minor}", f"{major}:{minor}") for minor in minors if minor >= 0]


def _is_same(link: Path, node: Path) -> bool:
    """Whether it leads there, be there something or not yet."""
    return os.path.realpath(link) == os.path.realpath(node)


def _make(link: Path, target: str) -> None:
    try:
        os.makedirs(link.parent, exist_ok=True)
        if not link.is_symlink():  # udev may have made it at this moment
            link.symlink_to(target)
    except OSError as error:
        raise ConfigError(f"make `{link}`: {reason(error)}", "run it as root") from None
