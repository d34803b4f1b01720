# SPDX-License-Identifier: Apache-2.0
"""The words of nvidia-container-cli, read as GNU argp reads them, and what they say. What is done is not here.

Options of the program come before the command, those of the command after it; long ones may be cut short, and the value
of `--user` is optional, so that only one in the same word is its own.
"""

from __future__ import annotations

import argparse
import os
import re

from nvhook.errors import NvhookError
from nvhook.request import request

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, NoReturn

NAME = "nvidia-container-cli"
CAPABILITIES = {"compute": "c", "utility": "u", "video": "v", "graphics": "g", "display": "D", "ngx": "n"}

_MAX_DEVICES = 1024
_MAX_REQUIREMENTS = 32  # NVIDIA's number

# Option -> what the paths have in them that it leaves out.
_PARTS = {
    "no_persistenced": "/nvidia-persistenced/",
    "no_fabricmanager": "/nvidia-fabricmanager/",
    "no_gsp_firmware": "/firmware/nvidia/",
}

_EXAMPLES = f"""\
examples:
  {NAME} info
  {NAME} list --libraries --binaries
  {NAME} configure --ldconfig=@/sbin/ldconfig --no-cgroups --utility --device=0 /srv/rootfs
  {NAME} --load-kmods configure --pid=4711 --compute --utility --device=all /srv/rootfs
"""


class InputError(NvhookError):
    stage = "input"


class _Parser(argparse.ArgumentParser):
    """Faults are raised, as everybody's are."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(add_help=False, formatter_class=argparse.RawDescriptionHelpFormatter, **keywords)
        self.add_argument("-?", "--help", action="help", help="print this help")
        usage = argparse.ArgumentParser.format_usage
        self.add_argument("--usage", action=_Print, const=usage, help="print the options alone")

    def error(self, message: str) -> NoReturn:
        raise InputError(message, f"see `{self.prog} --help`")


class _Print(argparse.Action):
    """`const` makes a text of the parser; printing it is all that is done."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(nargs=0, default=argparse.SUPPRESS, **keywords)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(self.const(parser), end="")
        parser.exit()


def parse(arguments: Sequence[str], version: Callable[[object], str]) -> argparse.Namespace:
    """InputError for words that are none of ours."""
    return make_parser(version).parse_args(_attached(arguments))


def _attached(arguments: Sequence[str]) -> list[str]:
    """With `--user=` for a `-u` or `--user` without a value: argparse would take the next word for it."""
    words = list(arguments)
    place = 0
    while place < len(words) and words[place].startswith("-"):
        word = words[place]
        if word in ("-d", "-r", "-l", "--debug", "--root", "--ldcache", "--config"):
            place += 1  # and over its value
        elif re.fullmatch("-[kn]*u|--us(er?)?", word):
            before = [word[:-1]] if re.fullmatch("-[kn]+u", word) else []
            words[place : place + 1] = [*before, "--user="]
            place += len(before)
        place += 1
    return words


def make_parser(version: Callable[[object], str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=NAME,
        description="Give containers the NVIDIA GPUs of this host: NVIDIA's command, as nvhook does it.",
        epilog=_EXAMPLES,
    )
    add = parser.add_argument
    add("-V", "--version", action=_Print, const=version, help="print the version")
    add("-d", "--debug", metavar="FILE", help="write what is done to FILE")
    add("-k", "--load-kmods", action="store_true", help="load kernel modules that are missing, make the host's nodes")
    add("-n", "--no-pivot", action="store_true", help="is not honoured")
    add("-u", "--user", metavar="UID[:GID]", help="who asks NVML; without a value the caller; else nobody")
    add("-r", "--root", metavar="PATH", help="the driver root")
    add("-l", "--ldcache", metavar="FILE", help="the host's linker cache, below the driver root")
    add("--no-create-imex-channels", action="store_true", help="only IMEX channels that have a node on the host")
    add("--config", metavar="FILE", help="another config.toml (nvhook's own option)")
    commands = parser.add_subparsers(dest="command", required=True, title="commands", metavar="COMMAND")
    _add_info(commands.add_parser("info", help="the driver and its GPUs"))
    _add_list(commands.add_parser("list", help="the driver's files and nodes on this host"))
    _add_configure(commands.add_parser("configure", help="give a container its GPUs"))
    return parser


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--csv", action="store_true", help="values separated by commas")


def _add_list(parser: argparse.ArgumentParser) -> None:
    parser.description = "Without an option: everything that there is."
    _add_devices(parser)
    for name, what in (("libraries", "libraries"), ("binaries", "programs"), ("ipcs", "sockets of its daemons")):
        parser.add_argument(f"-{name[0]}", f"--{name}", action="store_true", help=f"the driver's {what}")
    parser.add_argument("-f", "--firmwares", action="store_true", help="the GPUs' firmware")
    parser.add_argument("--compat32", action="store_true", help="with --libraries, the 32-bit ones too")


def _add_configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Give the container of process PID, whose root filesystem is ROOTFS, its GPUs. Without --pid ROOTFS is a tree\n"
        "in the mount namespace of the caller, who has made it for a container."
    )
    add = parser.add_argument
    add("-p", "--pid", metavar="PID", type=_pid, help="a process of the container")
    _add_devices(parser)
    add("-r", "--require", metavar="EXPR", action="append", default=[], help="what the host must have: cuda>=12.4")
    add("-l", "--ldconfig", metavar="@PATH", help="the host's ldconfig")
    for name, letter in CAPABILITIES.items():
        add(f"-{letter}", f"--{name}", action="store_true", help=f"the driver capability {name}")
    add("--compat32", action="store_true", help="32-bit libraries too")
    add("--no-cgroups", action="store_true", help="leave the device cgroup as it is")
    add("--no-devbind", action="store_true", help="no device nodes")
    add("--no-gsp-firmware", action="store_true", help="no firmware")
    add("--no-cntlibs", action="store_true", help="as --cuda-compat-mode=disabled")
    modes = ("mount", "ldconfig", "disabled")
    text = "whether a newer libcuda of the image is found first (mount is taken as ldconfig)"
    add("--cuda-compat-mode", metavar="MODE", action="append", default=[], choices=modes, help=text)
    add("rootfs", metavar="ROOTFS", help="an absolute path")


def _add_devices(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "index, UUID or PCI bus id of a GPU, UUID or GPU:MIG of a MIG device, or all; repeatable"
    add("-d", "--device", metavar="ID", action="append", default=[], help=text)
    for right in ("config", "monitor"):
        add(f"--mig-{right}", metavar="ID", help=f"the right to {right} MIG; ID is all")
    add("--imex-channel", metavar="CHANNEL", action="append", default=[], help="a number; repeatable")
    add("--no-persistenced", action="store_true", help="without the socket of nvidia-persistenced")
    add("--no-fabricmanager", action="store_true", help="without the socket of nv-fabricmanager")


def _pid(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 11 and int(text)):
        raise argparse.ArgumentTypeError(f"parse pid failed: `{text}` is no process")
    return int(text)


# What they say


def devices(options: argparse.Namespace) -> tuple[str, ...]:
    """As a Request has them: once each, or ("all",), or ("none",)."""
    names = _names(options.device)
    if any(name.lower() == "all" for name in names):
        return ("all",)
    if len(names) > _MAX_DEVICES:
        raise InputError(f"{len(names)} devices are asked for, more than {_MAX_DEVICES}", "ask for `all`")
    return names or ("none",)


def imex_channels(options: argparse.Namespace) -> tuple[int, ...]:
    return request.channels(list(_names(options.imex_channel)), "--imex-channel")


def _names(values: list[str]) -> tuple[str, ...]:
    names = (name.strip() for value in values for name in value.split(","))
    return tuple(dict.fromkeys(name for name in names if name))


def mig_rights(options: argparse.Namespace) -> tuple[str, ...]:
    values = {"config": options.mig_config, "monitor": options.mig_monitor}
    for right, value in values.items():
        if value and value.lower() != "all":
            raise InputError(f"--mig-{right}=`{value}`: only 'all' devices are currently supported")
    return tuple(right for right, value in values.items() if value)


def requirements(options: argparse.Namespace) -> tuple[str, ...]:
    if len(options.require) > _MAX_REQUIREMENTS:
        raise InputError(f"too many requirements: {len(options.require)} are more than {_MAX_REQUIREMENTS}")
    return tuple(options.require)


def is_left_out(options: argparse.Namespace, path: str) -> bool:
    """Whether an option says that what is at `path` is not wanted."""
    return any(getattr(options, name, False) and part in path for name, part in _PARTS.items())


def user(text: str) -> str:
    """uid:gid in numbers, of `UID[:GID]` in numbers or names; of nothing: ours."""
    if not text:
        return f"{os.geteuid()}:{os.getegid()}"
    from nvhook.linux import accounts  # pwd and grp

    try:
        uid, gid = accounts.ids(text)
    except (KeyError, ValueError):
        raise InputError(
            f"parse user/group failed: --user=`{text}` names no user or group of this host", "write numbers, uid:gid"
        ) from None
    return f"{uid}:{gid}"
