# SPDX-License-Identifier: Apache-2.0
"""`nvhook list`: what this host has to give of its driver, file by file, and for which capability.

The records are those that a container start works with, and which node is for which capability is plan.py's answer. No
container is looked at: where its libraries are, and what it asks for, `nvhook plan` says.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nvhook import plan
from nvhook.commands import load, terminal
from nvhook.commands.info import overview
from nvhook.driver import inventory
from nvhook.errors import NvhookError, one_line
from nvhook.host import cap_nodes, dri, features, host, mig, sockets
from nvhook.host.gpus import Gpus
from nvhook.host.offers import Offers
from nvhook.request.config import CAPABILITIES
from nvhook.request.request import FEATURES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nvhook.commands import Subparsers
    from nvhook.container.edits import Device
    from nvhook.driver.records import Driver
    from nvhook.host.offers import HostNode
    from nvhook.request.config import Config

# In the order of the table -> the list of it in JSON.
_KINDS = {
    "library": "libraries",
    "program": "programs",
    "file": "files",
    "firmware": "firmware",
    "socket": "sockets",
    "node": "nodes",
}


@dataclass
class Item:
    """`path` on the host; `capabilities` that bring it, and `features` (NVIDIA_GDS=enabled, MIG devices); `bits` 32 for
    what comes with compat32 alone; `details` for programs."""

    kind: str
    path: str
    capabilities: list[str]
    bits: int = 64
    features: list[str] = field(default_factory=list)
    details: dict[str, object] = field(default_factory=dict)

    def describe(self) -> dict[str, object]:
        further = {"features": self.features} if self.kind == "node" else {}
        return {"path": self.path, "capabilities": self.capabilities, **further, **self.details}

    def wanted_by(self, names: set[str]) -> bool:
        """Whether a container that asks for `names` gets it; compat32 alone means all that is 32-bit."""
        is_asked = bool(names & {*self.capabilities, *self.features})
        if self.bits == 32:
            return "compat32" in names and (is_asked or len(names) == 1)
        return is_asked

    def reasons(self) -> str:
        if tuple(self.capabilities) == CAPABILITIES:
            return "all"
        text = " ".join([*self.capabilities, *self.features])
        return f"{text} + compat32" if self.bits == 32 else text


@dataclass
class Listing:
    version: str
    items: list[Item]
    missing: list[str]

    def describe(self) -> dict[str, object]:
        return {
            "driver": {"version": self.version} if self.version else None,
            **{name: [item.describe() for item in self.items if item.kind == kind] for kind, name in _KINDS.items()},
            "missing": self.missing,
        }


def add(commands: Subparsers) -> None:
    names = [*CAPABILITIES, *FEATURES, "mig"]
    parser = commands.add_parser(
        "list",
        help="the driver's files, nodes and sockets, by capability",
        description="List what this host has to give to containers: the driver's libraries, programs, other files and "
        "firmware, sockets and device nodes, with the capabilities (NVIDIA_DRIVER_CAPABILITIES) that bring each. "
        "Nothing is touched. A host without a driver is an answer as well: exit status 0.",
        epilog="examples:\n"
        "  nvhook list\n"
        "  nvhook list video\n"
        "  nvhook list compute compat32\n"
        "  nvhook list --json | jq -r '.libraries[].path'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "capabilities",
        metavar="CAPABILITY",
        nargs="*",
        default=[],
        help=f"only what a container with these gets: {', '.join(names)}",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object, for programs")
    parser.set_defaults(run=run, check=lambda given: _refuse_unknown(parser, given, names))


def _refuse_unknown(parser: argparse.ArgumentParser, given: list[str], names: list[str]) -> None:
    """argparse's own `choices` would not take an empty list."""
    for name in given:
        if name not in names:
            parser.error(f"unknown capability `{name}`; there are {', '.join(names)}")


def run(options: argparse.Namespace, warnings: list[str]) -> int:
    options.check(options.capabilities)
    config = load(options, warnings)
    with terminal.waiting("Looking through the driver's libraries ..."):
        made = make(config, warnings)
    if options.capabilities:
        made.items = [item for item in made.items if item.wanted_by(set(options.capabilities))]
    shown = terminal.console()
    if options.json:
        shown.print(json.dumps(made.describe(), indent=2), soft_wrap=True)
        return 0
    rows = [(item.kind, item.path, item.reasons()) for item in made.items]
    if rows:
        shown.print(terminal.table(("KIND", "PATH", "CAPABILITIES"), rows))
    elif made.version:
        shown.print("This host has nothing of that.")
    for text in made.missing:
        shown.print(one_line(text[:1].upper() + text[1:]) + ".", soft_wrap=True)
    return 0


def make(config: Config, warnings: list[str]) -> Listing:
    try:
        found = host.read(config, CAPABILITIES, warnings, modprobe="")
    except NvhookError as error:
        return Listing("", [], [overview.without_driver(config.proc_root, error)])
    made = Listing(found.driver_version, [], overview.lacking(config, found))
    try:
        driver = inventory.load(config, found.driver_version, warnings, keep=False)
    except NvhookError as error:
        made.missing.append(overview.sentence(error))
    else:
        made.items += _of_driver(driver)
        made.missing += overview.lacking_libraries(driver)
    made.items += [
        Item("socket", item.path, sorted(item.capabilities), details={"kind": item.what})
        for item in sockets.find(config.driver_root)
    ]
    made.items += _nodes(config, found, made.missing)
    _leave_out_unsupported(made, config)
    return made


def _leave_out_unsupported(made: Listing, config: Config) -> None:
    """What config.toml lets no container have."""
    supported = config.supported_capabilities
    if supported == CAPABILITIES:
        return
    for item in made.items:
        item.capabilities = [name for name in item.capabilities if name in supported]
    made.items = [
        item
        for item in made.items
        if (item.capabilities or item.features) and (item.bits == 64 or "compat32" in supported)
    ]
    made.missing.append(f"`supported-driver-capabilities` in `{config.path}` is {', '.join(supported)} and no more")


def _of_driver(driver: Driver) -> list[Item]:
    libraries = [
        Item(
            "library",
            item.path,
            sorted(item.capabilities),
            item.bits,
            details={"soname": item.soname, "bits": item.bits},
        )
        for item in driver.libraries
    ]
    programs = [Item("program", item.path, [item.capability]) for item in driver.binaries]
    files = [
        Item(
            "firmware" if "/firmware/" in item.destination else "file",
            item.path,
            sorted(item.capabilities),
            item.bits,
            details={"destination": item.destination, "bits": item.bits},
        )
        for item in driver.files
    ]
    order = list(_KINDS)
    return sorted(libraries + programs + files, key=lambda item: (order.index(item.kind), item.path))


def _nodes(config: Config, found: Gpus, missing: list[str]) -> list[Item]:
    """Those that a container with all GPUs gets for each capability and feature, made already or not."""
    items: dict[str, Item] = {}
    for name in CAPABILITIES:
        offers = Offers(found, dri=dri.find(config, found.gpus) if name in dri.DRAWING else [])
        try:
            devices = plan.devices((name,), found.gpus, offers)
        except NvhookError:
            continue  # without nvidia-uvm, which is among what is missing
        for device in devices:
            _node(items, device).capabilities.append(name)
    for name, further in _further(config, found, missing):
        for node in further:
            _node(items, node).features.append(name)
    return list(items.values())


def _node(items: dict[str, Item], node: Device | HostNode) -> Item:
    details: dict[str, object] = {"major": node.major, "minor": node.minor}
    return items.setdefault(node.path, Item("node", node.path, [], details=details))


def _further(config: Config, found: Gpus, missing: list[str]) -> Iterator[tuple[str, list[HostNode]]]:
    """(what asks for them, nodes): of MIG devices, and of the features that the host has."""
    try:
        yield "mig", cap_nodes.of_instances(config, mig.every(found), found)[0]
    except NvhookError as error:
        missing.append(overview.sentence(error))
    for name in FEATURES:
        yield name, features.find(config, (name,), [])[0]
