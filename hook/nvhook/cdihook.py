# SPDX-License-Identifier: Apache-2.0
"""The stage `cdi` of the hook: what a CDI specification has no words for.

The engine has mounted the driver's files and made the device nodes. What is missing are the links to those files, the
linker cache, and the covers that hide the host's other GPUs; they are the same edits as prestart.py's, applied in the
same way. Links and libraries are in the arguments, as `nvhook cdi generate` has written them; which GPUs the user chose
is read from the nodes in config.json.

It is called at createRuntime: at createContainer the state has the number of the process in the container's own pid
namespace, where it cannot be told from another one.
"""

from __future__ import annotations

import os
import sys

from . import audit, plan, prestart
from .container import container as containers
from .container import edits as editing
from .container.edits import Symlink
from .container.linkercache import Ldcache
from .errors import DeviceError, NvhookError, SpecError
from .host import cap_nodes, host, mig, procfs
from .host.selection import Selection
from .request import config as configuration
from .request import spec
from .request.request import Request
from .start import Start

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .container.container import Container
    from .host.gpus import Gpus
    from .request.config import Config
    from .request.spec import Json

_BITS = {"--library": 64, "--library32": 32}


class Arguments:
    """capabilities   those that the specification was made for
    config         config.toml, if it is not the usual one
    libraries      (directory, name, bits): what the linker cache shall list
    links          (target, path): target relative to the directory of path
    """

    __slots__ = ("capabilities", "config", "libraries", "links")

    def __init__(self) -> None:
        self.capabilities: tuple[str, ...] = ()
        self.config = ""
        self.libraries: list[tuple[str, str, int]] = []
        self.links: list[tuple[str, str]] = []


def parse(words: list[str]) -> Arguments:
    """SpecError for what this version does not know."""
    found = Arguments()
    rest = iter(words)
    for word in rest:
        value = next(rest, "")
        directory, _, name = value.rpartition("/")
        target, _, path = value.partition("::")
        if word == "--capabilities":
            found.capabilities = tuple(value.split(",")) if value else ()
        elif word == "--config" and value:
            found.config = value
        elif word in _BITS and directory.startswith("/") and name:
            found.libraries.append((directory, name, _BITS[word]))
        elif word == "--link" and target and path.startswith("/"):
            found.links.append((target, path))
        else:
            raise SpecError(
                f"`{word} {value}` of the CDI specification's hook is not known to this version of nvhook",
                "generate it again with `nvhook cdi generate`",
            )
    return found


def run(words: list[str], default_config: str, warnings: list[str]) -> None:
    """Complete the container on stdin, or leave it as it is and raise an NvhookError."""
    arguments = parse(words)
    config = configuration.load(arguments.config or default_config, must_exist=bool(arguments.config))
    warnings += config.warnings
    state = spec.read_state(sys.stdin.fileno())
    document = spec.read_config(state.bundle)[0]
    described = spec.parse(document, state.bundle)
    container = containers.find(state.pid, described.rootfs)
    start = Start(config, described, Request((), arguments.capabilities, (), "CDI"), state.id, warnings)
    trail = audit.Audit(config, spec.HOOK, state.id)
    trail.begin(start.request)
    try:
        _choose(start, node_paths(document))
        _draw(start, arguments, node_paths(document), container)
        container.lock_root_if_possible(config.state_dir)
        with container.lock:
            prestart.change(start, container, [])
    except NvhookError as error:
        trail.refuse(str(error))
        raise
    trail.grant(start.chosen)


def node_paths(document: Json) -> set[str]:
    """The device nodes in a config.json, by their paths in the container."""
    linux = document.get("linux")
    devices = linux.get("devices") if isinstance(linux, dict) else None
    found = devices if isinstance(devices, list) else []
    return {str(item.get("path")) for item in found if isinstance(item, dict)}


def _choose(start: Start, nodes: set[str]) -> None:
    """The GPUs and MIG devices that a container with these nodes can open: the engine has chosen them."""
    config = start.config
    # The engine could not have made the nodes of a module that is not loaded.
    start.gpus = host.read(config, start.request.capabilities, start.warnings, modprobe="")
    start.chosen = chosen(nodes, config, start.gpus)
    start.offers = host.now(config, start.request, start.chosen, start.gpus, start.warnings)


def chosen(nodes: set[str], config: Config, gpus: Gpus) -> Selection:
    there = [gpu for gpu in gpus.gpus if f"/dev/nvidia{gpu.minor}" in nodes]
    migs = []
    for item in [item for item in mig.every(gpus) if item.gpu in there]:
        rights, _ = cap_nodes.of_instances(config, [item], gpus)
        if rights and all(node.path in nodes for node in rights):
            migs.append(item)
    return Selection(there, migs)


def _draw(start: Start, arguments: Arguments, nodes: set[str], container: Container) -> None:
    """What the specification leaves to us, with the sources open."""
    start.offers.proc = procfs.read(start.config.proc_root)
    edits = plan.covers(start.request.capabilities, start.chosen, start.offers)
    edits += [Symlink(path, target) for target, path in arguments.links if _leads_somewhere(path, target, nodes)]
    compatible = start.layout_of(container.root, start.warnings).compat
    directories = [compatible] if compatible else []
    directories += dict.fromkeys(directory for directory, _, _ in arguments.libraries)
    if directories:
        # What is in the image's directory only ldconfig can say.
        edits.append(Ldcache(tuple(directories), () if compatible else tuple(arguments.libraries)))
    start.edits = edits
    try:
        for edit in edits:
            edit.prepare(start.config, container.root)
    except editing.SourceGone as gone:
        raise DeviceError(f"`{gone}` disappeared while the container was prepared", "start it again") from None


def _leads_somewhere(path: str, target: str, nodes: set[str]) -> bool:
    """Of the links to device nodes the container gets those whose node it has."""
    return not path.startswith("/dev/") or os.path.normpath(f"{os.path.dirname(path)}/{target}") in nodes
