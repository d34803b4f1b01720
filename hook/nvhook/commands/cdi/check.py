# SPDX-License-Identifier: Apache-2.0
"""What is wrong in the CDI specifications of this host: what engines stumble over, and what they do not notice.

A specification is a list of paths and numbers of the day when it was made; a driver that is changed, a reboot or
another MIG layout make it wrong, and no engine generates it again.
"""

from __future__ import annotations

import os
import re
import stat

from nvhook.commands.cdi import files as cdifiles
from nvhook.errors import DeviceError, DriverError, Finding, reason
from nvhook.host import gpus, mig
from nvhook.start import reporter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from nvhook.commands.cdi.files import SpecFile
    from nvhook.host.gpus import Gpus
    from nvhook.request.config import Config

    Json = dict[str, Any]

_DRIVER_FILE = re.compile(r"/lib(?:cuda|nvidia-ml)\.so\.(\d+\.[\d.]+)$")
_TYPES = {"b": stat.S_ISBLK, "c": stat.S_ISCHR, "u": stat.S_ISCHR, "p": stat.S_ISFIFO}
_MAX_PER_FILE = 20


class HostDevices:
    """What there is now: the driver's version and the UUIDs that devices can have, empty where they are not known."""

    def __init__(self, config: Config, warnings: list[str]) -> None:
        self.version = ""
        self.uuids: set[str] = set()
        try:
            found = gpus.read(config.proc_root)
            self.version = found.driver_version
            self.uuids = _uuids(config, found, warnings)
        except DeviceError:
            return  # no driver is loaded, and that there are no nodes then is found out by itself
        except DriverError as error:
            warnings.append(str(error))


def _uuids(config: Config, found: Gpus, warnings: list[str]) -> set[str]:
    """Of GPUs and MIG devices. A GPU that is divided has no device of its own."""
    whole = {gpu.uuid for gpu in found.gpus if gpu.minor not in found.instances}
    if any("?" in uuid for uuid in whole):
        return set()  # nothing has initialised that GPU yet
    report = reporter(config, found, warnings, keep=False)
    return whole | ({item.uuid for item in mig.named(found, report)} if found.instances else set())


def examine(config: Config, directories: list[str], files: list[SpecFile], warnings: list[str]) -> list[Finding]:
    """What is wrong. The `object` of each is a file, or a directory."""
    found = [finding for directory in directories for finding in _directory(directory)]
    host = HostDevices(config, warnings)
    for file in files:
        found += _bounded(file, [Finding(what, remedy, object=file.path) for what, remedy in _file(file, host)])
    if not files:
        where = " and no ".join(f"`{directory}/*.yaml`" for directory in directories)
        remedy = f"make one with `nvhook cdi generate --output {directories[-1]}/nvidia.yaml`"
        found.append(Finding(f"no CDI specification: no {where}", remedy, object=directories[-1]))
    return found + list(_shared_names(files))


def _bounded(file: SpecFile, findings: list[Finding]) -> list[Finding]:
    if len(findings) <= _MAX_PER_FILE:
        return findings
    more = len(findings) - _MAX_PER_FILE
    return [*findings[:_MAX_PER_FILE], Finding(f"{more} more faults", _anew(file), object=file.path)]


def _directory(directory: str) -> Iterator[Finding]:
    try:
        status = os.stat(directory)
    except OSError:
        return
    if _is_open_to_others(status):
        what = "others than root can write there, and say what is mounted into containers"
        yield Finding(what, f"run `chown root: {directory}` and `chmod 755 {directory}`", object=directory)
    for path in cdifiles.paths(directory, (".yml",)):
        yield Finding("engines read .yaml and .json alone", f"rename it to `{path[:-3]}yaml`", object=path)


def _is_open_to_others(status: os.stat_result) -> bool:
    return status.st_uid not in (0, os.geteuid()) or bool(status.st_mode & 0o022)


def _file(file: SpecFile, host: HostDevices) -> Iterator[tuple[str, str]]:
    """(what is wrong, remedy) of one file."""
    if file.fault:
        yield file.fault.what, file.fault.remedy
    if file.status:
        yield from _permissions(file.path, file.status)
    if not file.document:
        return
    every = [file.document.get("containerEdits", {})]
    every += [device["containerEdits"] for device in file.document["devices"]]
    faults = [fault for edits in every for fault in _edits(edits)]
    known = [*_driver(every, host.version), *_devices(file.document, host.uuids)]
    yield from ((what, _anew(file)) for what in dict.fromkeys([*known, *faults]))


def _anew(file: SpecFile) -> str:
    kind = str(file.document.get("kind", ""))
    if not kind.startswith("nvidia.com/"):
        return "generate it again with the tool that made it"
    return f"generate it again with `nvhook cdi generate --output {file.path}`"


def _permissions(path: str, status: os.stat_result) -> Iterator[tuple[str, str]]:
    if _is_open_to_others(status):
        what = "others than root can write it, and say what is mounted into containers"
        yield what, f"run `chown root: {path}` and `chmod 644 {path}`"
    elif not status.st_mode & 0o004:
        yield "rootless engines cannot read it", f"run `chmod 644 {path}`"


def _driver(every: list[Json], version: str) -> Iterator[str]:
    mounts = [mount["hostPath"] for edits in every for mount in edits.get("mounts", [])]
    named = {match[1] for match in map(_DRIVER_FILE.search, mounts) if match}
    for other in sorted(named - {version}) if version else []:
        yield f"is of driver {other}, and the loaded kernel module is of {version}"


def _devices(document: Json, uuids: set[str]) -> Iterator[str]:
    """By UUIDs: an index says nothing about which GPU it was."""
    names = {device["name"] for device in document["devices"]}
    named = {name for name in names if name.startswith(("GPU-", "MIG-"))}
    if not named or not uuids or not document["kind"].startswith("nvidia.com/"):
        return
    for name in sorted(named - uuids):
        yield f"has a device `{name}`, and this host has none"
    for name in sorted(uuids - named):
        yield f"has no device `{name}`, and this host has one"


def _edits(edits: Json) -> Iterator[str]:
    for node in edits.get("deviceNodes", []):
        yield from _node(node)
    for mount in edits.get("mounts", []):
        if mount.get("type", "") in ("", "bind", "none"):
            _, why = _look(mount["hostPath"])
            if why:
                yield f"mounts `{mount['hostPath']}`: {why}"
    for hook in edits.get("hooks", []):
        if hook["hookName"] != "startContainer":  # that one is looked up in the container
            yield from _hook(hook["path"])


def _node(node: Json) -> Iterator[str]:
    path = node.get("hostPath") or node["path"]
    status, why = _look(path)
    if status is None:
        yield f"device node `{path}`: {why}"
        return
    wanted = node.get("type", "")
    if not (_TYPES[wanted](status.st_mode) if wanted else any(test(status.st_mode) for test in _TYPES.values())):
        yield f"device node `{path}`: is another kind of file"
        return
    numbers = {"major": os.major(status.st_rdev), "minor": os.minor(status.st_rdev)}
    for name, now in numbers.items():
        if node.get(name, now) != now:
            yield f"device node `{path}`: its {name} is {now} now, and {node[name]} in the file"


def _hook(path: str) -> Iterator[str]:
    status, why = _look(path)
    if status is None:
        yield f"runs the hook `{path}`: {why}"
    elif not stat.S_ISREG(status.st_mode) or not status.st_mode & 0o111:
        yield f"runs the hook `{path}`: is no program"


def _look(path: str) -> tuple[os.stat_result | None, str]:
    """(what is there, or why it cannot be seen)."""
    try:
        return os.stat(path), ""
    except OSError as error:
        return None, reason(error)
    except ValueError as error:  # a NUL or half a character
        return None, str(error)


def _shared_names(files: list[SpecFile]) -> Iterator[Finding]:
    """One line for each two files, however many devices they share."""
    shared: dict[tuple[str, str, str], list[str]] = {}
    for device in cdifiles.devices(files):
        if device.state:
            shared.setdefault((device.file.path, device.other, device.state), []).append(device.name)
    for (path, other, state), names in shared.items():
        which = f"`{names[0]}`" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        if state == "overridden":
            yield Finding(f"`{other}` overrides {which}", "remove the one that is not up to date", object=path)
        elif path < other:  # each is the other's
            what = f"`{other}` has {which} as well, and engines take neither"
            yield Finding(what, "remove one of the two", object=path)
