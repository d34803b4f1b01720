# SPDX-License-Identifier: Apache-2.0
"""`nvhook cdi generate|list|check`: GPUs for engines that inject them on their own, by the Container Device Interface.

What is in a specification is in specification.py, what engines find in files.py, what is wrong there in check.py. Here
is what the user sees of it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys

from nvhook.commands import load, program
from nvhook.commands.cdi import check as cdicheck
from nvhook.commands.cdi import files as cdifiles
from nvhook.commands.cdi import specification as cdispec
from nvhook.commands.configure import changes
from nvhook.errors import ConfigError, NvhookError, RequestError, one_line
from nvhook.request import config as configuration
from nvhook.request.spec import HOOK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nvhook.commands import Subparsers
    from nvhook.commands.cdi.files import CdiDevice, SpecFile
    from nvhook.request.config import Config

_FORMATS = ("yaml", "json")
_NAME = re.compile(r"[A-Za-z]([A-Za-z0-9_.-]*[A-Za-z0-9])?")


class _CdiError(NvhookError):
    stage = "cdi"


def add(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "cdi",
        help="GPUs for engines that inject them themselves",
        description="CDI specifications: for Podman, Docker 25, containerd 1.7, CRI-O and Kubernetes.",
        epilog="examples:\n"
        "  nvhook cdi generate --output /var/run/cdi/nvidia.yaml\n"
        "  nvhook cdi list\n"
        "  nvhook cdi check --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    _add_generate(actions)
    listing = _add_reader(
        actions, "list", "the devices that engines find", "Print the devices that engines find, by file."
    )
    listing.set_defaults(run=show)
    checking = _add_reader(
        actions,
        "check",
        "what is wrong in the specifications",
        "Print what is wrong in the specifications, one line each, or ok. Exit 1 if there is anything.",
    )
    checking.set_defaults(run=check)


def _add_generate(actions: Subparsers) -> None:
    parser = actions.add_parser(
        "generate",
        help="a specification of this host's GPUs",
        description="Make a specification of this host's GPUs, and another when the driver or the MIG layout changes.",
        epilog="examples:\n"
        "  nvhook cdi generate --output /var/run/cdi/nvidia.yaml\n"
        "  nvhook cdi generate --device-name-strategy uuid --capabilities compute,utility",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", metavar="FILE", default="", help="a .yaml or .json file; else it is printed")
    parser.add_argument("--format", choices=_FORMATS, help="if FILE does not say it (yaml)")
    parser.add_argument("--cdi-version", choices=cdispec.VERSIONS, default="", help="if not the lowest that is enough")
    parser.add_argument(
        "--device-name-strategy",
        choices=cdispec.STRATEGIES,
        action="append",
        help="what devices are called, beside `all`; repeatable (index and uuid)",
    )
    parser.add_argument("--vendor", default="nvidia.com", help="of the devices (nvidia.com)")
    parser.add_argument("--class", dest="device_class", metavar="CLASS", default="gpu", help="of the devices (gpu)")
    parser.add_argument(
        "--capabilities", metavar="NAMES", default="all", help="of the driver, as in NVIDIA_DRIVER_CAPABILITIES (all)"
    )
    parser.add_argument("--hook-path", metavar="PATH", default="", help=f"{HOOK}, if it is not beside nvhook")
    parser.set_defaults(run=generate)


def _add_reader(actions: Subparsers, name: str, about: str, description: str) -> argparse.ArgumentParser:
    parser = actions.add_parser(
        name,
        help=about,
        description=description,
        epilog=f"example: nvhook cdi {name} --spec-dir /etc/cdi --json",
    )
    parser.add_argument(
        "--spec-dir",
        metavar="DIR",
        action="append",
        help=f"repeatable, a later one has priority ({' and '.join(cdifiles.DIRECTORIES)})",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object, for programs")
    return parser


# generate


def generate(options: argparse.Namespace, warnings: list[str]) -> int:
    config = load(options, warnings)
    format_ = _format(options.output, options.format)
    document = cdispec.make(config, _wanted(options, config), warnings)
    text = cdispec.as_text(document, format_)
    if not options.output:
        sys.stdout.write(text)
        return 0
    changes.write(options.output, text)
    print(f"{options.output}: {len(document['devices'])} devices {document['kind']}, CDI {document['cdiVersion']}")
    return 0


def _format(output: str, wanted: str | None) -> str:
    if not output:
        return wanted or "yaml"
    ending = os.path.splitext(output)[1][1:]
    if ending not in _FORMATS:
        raise _CdiError(f"`{output}` is no name for a specification", "engines read .yaml and .json alone")
    if wanted not in (None, ending):
        raise _CdiError(f"`{output}` is not to be written as {wanted}", "engines go by the ending: leave out --format")
    return ending


def _wanted(options: argparse.Namespace, config: Config) -> cdispec.SpecificationOptions:
    for what, name in (("vendor", options.vendor), ("class", options.device_class)):
        if not _NAME.fullmatch(name):
            raise _CdiError(
                f"`{name}` is no name of a {what}", "letters, digits, `_`, `.` and `-`; a letter is the first"
            )
    return cdispec.SpecificationOptions(
        kind=f"{options.vendor}/{options.device_class}",
        capabilities=_capabilities(options.capabilities, config),
        strategies=tuple(options.device_name_strategy or ("index", "uuid")),
        version=options.cdi_version,
        hook=_hook_path(options.hook_path),
        hook_config=os.path.abspath(config.path) if options.config_must_exist else "",
    )


def _capabilities(names: str, config: Config) -> tuple[str, ...]:
    """What the specification is made for is every container's that names one of its devices."""
    wanted = {name.strip() for name in names.split(",") if name.strip()}
    if "all" in wanted:
        return config.supported_capabilities
    for name in sorted(wanted):
        if name not in configuration.CAPABILITIES:
            raise RequestError(f"unknown capability `{name}`", f"known are {', '.join(configuration.CAPABILITIES)}")
        if name not in config.supported_capabilities:
            allowed = ", ".join(config.supported_capabilities) or "none"
            raise RequestError(
                f"capability `{name}` is not allowed on this host",
                f"`supported-driver-capabilities` in config.toml allows {allowed}",
            )
    return tuple(sorted(wanted))


def _hook_path(chosen: str) -> str:
    found = program(HOOK, chosen)
    if found:
        return found
    raise ConfigError(
        f"find the hook `{chosen or HOOK}`: no such program",
        "install nvhook, or name the program with --hook-path",
    )


# list


def show(options: argparse.Namespace, warnings: list[str]) -> int:
    files = _find(options)
    devices = cdifiles.devices(files)
    faults = [(file.path, file.fault) for file in files if file.fault]
    if options.json:
        listed = [_describe(device) for device in devices]
        failed = [{"file": path, "fault": fault.what, "remedy": fault.remedy} for path, fault in faults]
        print(json.dumps({"devices": listed, "faults": failed}, indent=2))
        return 0
    warnings += [f"`{path}`: {fault.what}; {fault.remedy}" for path, fault in faults]
    _print_devices(files, devices)
    if not devices:
        print(f"No CDI device in {' or '.join(_directories(options))}.")
    return 0


def _directories(options: argparse.Namespace) -> list[str]:
    return [os.path.abspath(directory) for directory in options.spec_dir or cdifiles.DIRECTORIES]


def _find(options: argparse.Namespace) -> list[SpecFile]:
    try:
        return cdifiles.find(_directories(options))
    except cdifiles.Fault as fault:
        raise _CdiError(f"read {fault.what}", fault.remedy) from None


def _describe(device: CdiDevice) -> dict[str, str]:
    other = {"other_file": device.other} if device.other else {}
    return {"name": device.name, "file": device.file.path, "state": device.state or "usable", **other}


_STATES = {"conflict": "conflicts with", "overridden": "overridden by"}


def _print_devices(files: list[SpecFile], devices: list[CdiDevice]) -> None:
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    for file in files:
        own = [device for device in devices if device.file is file]
        if not own:
            continue
        console.print(one_line(file.path), style="bold")
        width = max(len(device.name) for device in own)
        for device in own:
            note = f"  {_STATES[device.state]} {device.other}" if device.state else ""
            style = {"conflict": "red", "overridden": "dim"}.get(device.state, "")
            console.print("  " + one_line(f"{device.name:{width if note else 0}}{note}"), style=style)


# check


def check(options: argparse.Namespace, warnings: list[str]) -> int:
    config = load(options, warnings)
    found = cdicheck.examine(config, _directories(options), _find(options), warnings)
    if options.json:
        listed = [{"file": item.object, "fault": item.reason, "remedy": item.remedy} for item in found]
        print(json.dumps({"findings": listed}, indent=2))
    else:
        print("\n".join(one_line(f"{item.object}: {item.reason}; {item.remedy}") for item in found) or "ok")
    return 1 if found else 0
