# SPDX-License-Identifier: Apache-2.0
"""What `doctor` finds of NVIDIA's packages and of CDI: programs that come before ours, hooks of theirs, and CDI
specifications that describe a host which is no more."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import stat

from nvhook.commands.doctor.checks_driver import driver
from nvhook.commands.doctor.checks_system import search_path
from nvhook.commands.doctor.findings import failure, ok, several, warning
from nvhook.commands.doctor.programs import MISSING, NVIDIA, OURS, RUNTIME, whose
from nvhook.errors import Finding, reason
from nvhook.request.spec import HOOK, HOOK_NAMES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from nvhook.commands.hostview import HostView

_HOOKS = ("/usr/share/containers/oci/hooks.d", "/usr/local/share/containers/oci/hooks.d", "/etc/containers/oci/hooks.d")
_CDI = ("/etc/cdi", "/var/run/cdi")
_MAX_CDI = 256 << 10  # bytes; one for eight GPUs has 30 KiB, and PyYAML takes seconds for a megabyte
_MAX_ITEMS = 10_000
_VERSION = re.compile(r"/lib(?:cuda|nvidia-ml)\.so\.(\d+(?:\.\d+)+)$")


def check_programs(host: HostView) -> Iterator[Finding]:
    for name in (RUNTIME, HOOK):
        there = [f"{place}/{name}" for place in search_path(host)]
        found = {path: whose(host, path) for path in there}
        found = {path: owner for path, owner in found.items() if owner != MISSING}
        ours = next((path for path, owner in found.items() if owner == OURS), "")
        first = next(iter(found), "")
        if not first:
            yield warning(name, "is nowhere on PATH", "make install")
        elif found[first] == NVIDIA:
            after = f", and comes before ours, {ours}" if ours else ", and ours is nowhere on PATH"
            yield warning(name, f"{first} is NVIDIA's{after}", _uninstall(host) if ours else "make install")
        else:
            yield ok(name, f"{first} is ours")


def _uninstall(host: HostView) -> str:
    if host.files.exists("/var/lib/dpkg/status"):
        return "apt-get remove nvidia-container-toolkit nvidia-container-toolkit-base"
    return "dnf remove nvidia-container-toolkit nvidia-container-toolkit-base"


def check_hooks(host: HostView) -> Iterator[Finding]:
    """Podman and CRI-O start no container at all when a hook's program is not there."""
    starting = []
    for directory in _HOOKS:
        for name in host.names(directory):
            path = f"{directory}/{name}"
            hook = _hook(host, path) if name.endswith(".json") else None
            if hook is None:
                continue
            program, stages = hook
            owner = whose(host, program)
            if owner == MISSING:
                yield failure(
                    path, f"names `{program}`, which is not there: no container starts", f"rm {shlex.quote(path)}"
                )
            elif owner == NVIDIA:
                yield warning(path, f"runs NVIDIA's hook, `{program}`, as well", f"rm {shlex.quote(path)}")
            elif "prestart" in stages:
                starting.append(path)
    if len(starting) > 1:
        yield warning(starting[0], f"runs our hook, and so does {starting[1]}", f"rm {shlex.quote(starting[1])}")
    elif starting:
        yield ok(starting[0], "runs our hook")


def _hook(host: HostView, path: str) -> tuple[str, list[str]] | None:
    """(program, stages) of a file that names NVIDIA's hook or ours."""
    try:
        document = json.loads(host.read(path))
        program, stages = str(document["hook"]["path"]), document.get("stages") or document.get("stage")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # not ours to judge
    if os.path.basename(program) not in HOOK_NAMES:
        return None
    return program, [str(stage) for stage in stages] if isinstance(stages, list) else []


def check_cdi(host: HostView) -> Iterator[Finding]:
    """A specification is a picture of the host at one time: of its driver's files, and the numbers of its nodes."""
    for directory in _CDI:
        for name in host.names(directory):
            path = f"{directory}/{name}"
            if name.endswith((".json", ".yaml", ".yml")):
                yield from _check_specification(host, path)


def _check_specification(host: HostView, path: str) -> Iterator[Finding]:
    again = f"nvhook cdi generate --output {shlex.quote(path)}"
    try:
        document = _parse(host, path)
    except (OSError, ValueError) as error:
        yield failure(path, f"cannot be read: {reason(error) if isinstance(error, OSError) else error}", again)
        return
    if not isinstance(document, dict):
        yield failure(path, "is no CDI specification", again)
        return
    if not str(document.get("kind")).startswith("nvidia.com/"):
        return
    found = driver(host)
    mounts = [str(item.get("hostPath")) for item in _edits(document, "mounts")]
    versions = {match[1] for match in map(_VERSION.search, mounts) if match}
    gone = [item for item in mounts if not host.files.exists(item)]
    wrong = [text for node in _edits(document, "deviceNodes") if (text := _fault(host, node))]
    loaded = found.driver_version if found else ""
    if loaded and versions and loaded not in versions:
        yield failure(path, f"is for driver {', '.join(sorted(versions))}, and {loaded} is loaded", again)
    elif gone:
        yield failure(path, f"names {several(len(gone), 'path')} where nothing is, the first {gone[0]}", again)
    elif wrong:
        yield failure(path, wrong[0], again)
    else:
        yield ok(path, "fits this host")


def _parse(host: HostView, path: str) -> object:
    data = host.files.read(path, _MAX_CDI)
    if path.endswith(".json"):
        try:
            return json.loads(data)
        except RecursionError:
            raise ValueError("too deeply nested") from None
    import yaml  # slow to import, and few hosts have such a file

    try:
        return yaml.load(data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 - both are safe
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"no YAML: {' '.join(str(error).split())}") from None


def _edits(document: dict[str, object], kind: str) -> Iterator[dict[str, object]]:
    """Mounts or device nodes, of all devices and of each; the first ones, for an alias of YAML makes much of little."""
    devices = document.get("devices")
    holders = [document, *(devices if isinstance(devices, list) else [])]
    edits = (item.get("containerEdits") for item in holders if isinstance(item, dict))
    lists = (item.get(kind) for item in edits if isinstance(item, dict))
    items = (item for found in lists if isinstance(found, list) for item in found)
    return (item for item in itertools.islice(items, _MAX_ITEMS) if isinstance(item, dict))


def _fault(host: HostView, node: dict[str, object]) -> str:
    """What is wrong with a device node, or empty."""
    name = str(node.get("hostPath") or node.get("path"))
    path = host.dev + name.removeprefix("/dev") if name.startswith("/dev/") else name
    try:
        status = os.stat(path)
    except OSError:
        return f"names {name}, which is not there"
    told = node.get("major"), node.get("minor", 0)
    shown = os.major(status.st_rdev), os.minor(status.st_rdev)
    if stat.S_ISCHR(status.st_mode) and told[0] and told != shown:
        return f"says that {name} is {told[0]}:{told[1]}, and it is {shown[0]}:{shown[1]}"
    return ""
