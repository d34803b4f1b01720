# SPDX-License-Identifier: Apache-2.0
"""A CDI specification of this host, from the same plan as a container start.

Per device are the nodes of its GPU; common are the driver's files, the nodes that every GPU needs, and our hook, which
does what CDI has no words for (nvhook/cdihook.py). A library's place in the container is that of the host's own family:
whose image it will be is not known, and the linker cache finds it there.

Majors and minors are left to the engine, which looks at the node when it starts a container: those of nvidia-uvm and of
MIG's nodes change from boot to boot. Owner and mode are recorded where they are not the usual ones.
"""

from __future__ import annotations

import os

from nvhook import plan
from nvhook.container.edits import Mount, Symlink
from nvhook.container.linkercache import Ldcache
from nvhook.driver import inventory
from nvhook.errors import DriverError, RequestError, reason
from nvhook.formats.record import Record
from nvhook.host import gpus as hosts
from nvhook.host import host, mig, modules, selection
from nvhook.host.selection import Selection
from nvhook.linux.root import DIRECTORY, Root
from nvhook.request.request import Request
from nvhook.request.spec import HOOK, HOOK_ENV, Spec
from nvhook.start import Start, reporter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from nvhook.container.edits import Device, Edit
    from nvhook.host.gpus import Gpus
    from nvhook.host.mig import MigDevice
    from nvhook.request.config import Config

    Json = dict[str, Any]

VERSIONS = ("0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0")

# How devices are called, for each strategy: a GPU, and a MIG device.
_GPU_NAMES: dict[str, Callable[[hosts.Gpu], str]] = {
    "index": lambda gpu: f"{gpu.index}",
    "uuid": lambda gpu: gpu.uuid,
    "type-index": lambda gpu: f"gpu{gpu.index}",
}
_MIG_NAMES: dict[str, Callable[[MigDevice], str]] = {
    "index": lambda item: f"{item.gpu.index}:{item.index}",
    "uuid": lambda item: item.uuid,
    "type-index": lambda item: f"mig{item.gpu.index}:{item.index}",
}
STRATEGIES = tuple(_GPU_NAMES)

# For nvhook and NVIDIA's runtime, should the container come to one of them as well.
_ENV = ["NVIDIA_VISIBLE_DEVICES=void"]


class SpecificationOptions(Record):
    """kind         vendor and class, as in nvidia.com/gpu
    strategies   those of STRATEGIES
    version      of VERSIONS, or empty for the lowest that is enough
    hook         absolute path of our hook's launcher; hook_config: the config.toml it is to read, or empty
    """

    kind: str
    capabilities: tuple[str, ...]
    strategies: tuple[str, ...]
    version: str
    hook: str
    hook_config: str


def make(config: Config, wanted: SpecificationOptions, warnings: list[str]) -> Json:
    """The specification, the same for the same host. As for a container start, kernel modules are loaded, missing nodes
    of the host made, and the inventory kept: what is named here has to be there when an engine looks for it."""
    request = Request(("all",), wanted.capabilities, (), "CDI")
    start = Start(config, Spec(rootfs=config.driver_root), request, "", warnings)
    gpus = start.gpus = host.read(config, request.capabilities, warnings)
    gpus.gpus = _identified(config, gpus, wanted, warnings)
    start.chosen = selection.select(request.devices, gpus, reporter(config, gpus, warnings))
    start.offers = host.now(config, request, start.chosen, gpus, warnings)
    _draw(start)
    control = _nodes(start, Selection([], []))
    nodes = _nodes(start, start.chosen)
    modules.make_nodes(config, nodes, warnings)
    shared = [] if len(control) == len(nodes) else control  # on WSL 2 one node is all there is, and no device is empty
    document: Json = {
        "cdiVersion": "",
        "kind": wanted.kind,
        "devices": [
            {"name": name, "containerEdits": _node_edits(config, _nodes(start, chosen), shared)}
            for name, chosen in _devices(start, wanted)
        ],
        "containerEdits": {
            "env": _ENV,
            **_node_edits(config, shared, []),
            "mounts": [_mount(edit) for edit in _mounts(start)],
            "hooks": [_hook(start.edits, wanted)],
        },
    }
    document["cdiVersion"] = _version(document, wanted.version)
    return document


def _identified(config: Config, gpus: Gpus, wanted: SpecificationOptions, warnings: list[str]) -> list[hosts.Gpu]:
    """A GPU that nothing has initialised has no UUID yet; NVML initialises it."""
    if "uuid" not in wanted.strategies or not any("?" in gpu.uuid for gpu in gpus.gpus):
        return gpus.gpus
    return selection.identified(gpus.gpus, inventory.report(config, gpus, None, warnings))


def _draw(start: Start) -> None:
    """An inventory that names a file which has gone is made again, once."""
    config = start.config
    try:
        root = Root(os.open(config.driver_root, DIRECTORY))
    except OSError as error:
        raise DriverError(f"open the driver root `{config.driver_root}`: {reason(error)}") from None
    try:
        for again in (False, True):
            start.draw(root, again=again)
            lost = [edit.source for edit in _mounts(start) if not os.path.exists(edit.source)]
            if not lost:
                return
    finally:
        os.close(root.fd)
    raise DriverError(f"`{lost[0]}` disappeared while the specification was made", "reinstall the driver")


def _mounts(start: Start) -> list[Mount]:
    """What is inside a cover of ours the hook mounts."""
    return [edit for edit in start.edits if isinstance(edit, Mount) and not edit.inside]


def _nodes(start: Start, chosen: Selection) -> list[Device]:
    offers = host.now(start.config, start.request, chosen, start.gpus, start.warnings)
    return plan.devices(start.request.capabilities, chosen.gpus, offers)


def _devices(start: Start, wanted: SpecificationOptions) -> Iterator[tuple[str, Selection]]:
    """By name. A GPU that is divided into MIG devices is of no use by itself, and has no name."""
    gpus = start.gpus
    for gpu in gpus.gpus:
        if gpu.minor not in gpus.instances:
            yield from ((name, Selection([gpu], [])) for name in _names(wanted, _GPU_NAMES, gpu))
    if gpus.instances:
        for item in mig.named(gpus, reporter(start.config, gpus, start.warnings)):
            yield from ((name, Selection([item.gpu], [item])) for name in _names(wanted, _MIG_NAMES, item))
    yield "all", start.chosen


def _names(
    wanted: SpecificationOptions, names: dict[str, Callable[[Any], str]], thing: hosts.Gpu | MigDevice
) -> list[str]:
    return [names[strategy](thing) for strategy in STRATEGIES if strategy in wanted.strategies]


def _node_edits(config: Config, nodes: list[Device], common: list[Device]) -> Json:
    left_out = {node.path for node in common}
    own = [node for node in nodes if node.path not in left_out]
    groups = sorted({node.gid for node in own if node.needs_group()}) if not config.no_additional_gids else []
    return {
        **({"deviceNodes": [_node(node, config.dev_root) for node in own]} if own else {}),
        **({"additionalGids": groups} if groups else {}),
    }


def _node(node: Device, dev_root: str) -> Json:
    source = os.path.join(dev_root, node.path.lstrip("/"))
    return {
        "path": node.path,
        **({"hostPath": source} if source != node.path else {}),
        "permissions": node.access,
        **({"fileMode": node.mode} if node.mode != 0o666 else {}),
        **({"gid": node.gid} if node.gid else {}),
    }


def _mount(mount: Mount) -> Json:
    # What is mounted elsewhere later on, here or there, is no business of the other side.
    options = [*mount.options, "rbind", "rprivate"]
    return {"hostPath": mount.source, "containerPath": mount.destination, "options": options}


def _hook(edits: list[Edit], wanted: SpecificationOptions) -> Json:
    words = [HOOK, "cdi", "--capabilities", ",".join(wanted.capabilities)]
    if wanted.hook_config:
        words += ["--config", wanted.hook_config]
    for edit in edits:
        if isinstance(edit, Symlink):
            words += ["--link", f"{edit.target}::{edit.path}"]
        elif isinstance(edit, Ldcache):
            for directory, name, bits in edit.names:
                words += ["--library" if bits == 64 else "--library32", f"{directory}/{name}"]
    return {"hookName": "createRuntime", "path": wanted.hook, "args": words, "env": HOOK_ENV}


# Versions of CDI


def _version(document: Json, wanted: str) -> str:
    needed, what, remedy = needs(document)
    if wanted and VERSIONS.index(wanted) < VERSIONS.index(needed):
        raise RequestError(
            f"CDI {wanted} has no {what}, which this specification needs", f"{remedy}, or --cdi-version {needed}"
        )
    return wanted or needed


def needs(document: Json) -> tuple[str, str, str]:
    """(the lowest version that has all that is in a valid specification, what of it is the newest, how to avoid it)."""
    return max(_needed(document), key=lambda item: VERSIONS.index(item[0]))


def _needed(document: Json) -> Iterator[tuple[str, str, str]]:
    yield VERSIONS[0], "older form", "take it out"
    if "." in document["kind"].partition("/")[2]:
        yield "0.6.0", "class with a dot", "choose another --class"
    devices = document["devices"]
    if "annotations" in document or any("annotations" in device for device in devices):
        yield "0.6.0", "`annotations`", "take them out"
    for device in devices:
        if device["name"][0].isdecimal():
            yield "0.5.0", f"device name that begins with a digit (`{device['name']}`)", "--device-name-strategy uuid"
    for edits in [document.get("containerEdits", {}), *(device["containerEdits"] for device in devices)]:
        yield from _needed_by(edits)


def _needed_by(edits: Json) -> Iterator[tuple[str, str, str]]:
    nodes, mounts = edits.get("deviceNodes", []), edits.get("mounts", [])
    if any("type" in mount for mount in mounts):
        yield "0.4.0", "`type` of a mount", "take it out"
    if any("hostPath" in node for node in nodes):
        yield "0.5.0", "`hostPath` of a device node", "a `nvhook.dev-root` of `/`"
    if "additionalGids" in edits:
        remedy = "`features.no-additional-gids-for-device-nodes` in config.toml"
        yield "0.7.0", "`additionalGids` for nodes that not everybody may use", remedy
    if "intelRdt" in edits:
        yield "0.7.0", "`intelRdt`", "take it out"
    if "netDevices" in edits:
        yield "1.1.0", "`netDevices`", "take it out"


# Text


def as_text(document: Json, format: str) -> str:  # noqa: A002 - its usual name
    if format == "json":
        import json

        return json.dumps(document, indent=2) + "\n"
    import yaml

    return "---\n" + yaml.safe_dump(document, sort_keys=False, width=1 << 16)
