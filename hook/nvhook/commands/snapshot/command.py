# SPDX-License-Identifier: Apache-2.0
"""`nvhook snapshot`: a host's description, from which a maintainer builds the same host as a simulated one.

The form is that of tests/hosts/*.json, and tests/simhost/schema.json says what it may hold. What is read is what a
container start reads: the driver's files by name and header, the driver's part of /proc and /sys, and its device nodes.
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys

from nvhook.commands import hardware, load
from nvhook.commands.hostview import HostView
from nvhook.commands.kernelfiles import kernel_text, listed
from nvhook.commands.snapshot import hostfiles
from nvhook.driver import inventory
from nvhook.errors import ConfigError, NvhookError, reason
from nvhook.host import features, wsl
from nvhook.host import host as hosts
from nvhook.request import requirements

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from nvhook.commands import Subparsers
    from nvhook.commands.snapshot.hostfiles import Entry
    from nvhook.host.gpus import Gpus
    from nvhook.host.report import GpuReport, Report

_ROOMS = ("", "nvidia-caps", "nvidia-caps-imex-channels", "dri", "infiniband")
_MODULES = ("nvidia", "nouveau")
_FREE_TEXT = ("content", "object", "reason", "remedy")
_UUID = re.compile(r"\b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b")


def add(commands: Subparsers) -> None:
    import argparse

    parser = commands.add_parser(
        "snapshot",
        help="describe this host's GPUs and driver, so that it can be rebuilt as a simulated one",
        description="Describe this host's GPUs and driver as one JSON object, from which it can be rebuilt.",
        epilog="examples:\n  nvhook snapshot --mask host.json\n  sudo nvhook snapshot | jq .gpus",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", nargs="?", default="", help="a new file, instead of standard output")
    add_options(parser)
    parser.set_defaults(run=run)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those that `doctor --report` has too."""
    parser.add_argument("--mask", action="store_true", help="put other UUIDs and another host name in their place")
    parser.add_argument("--root", metavar="DIR", default="/", help="where the host's /etc, /usr and /run are (/)")


def run(options: argparse.Namespace, warnings: list[str]) -> int:
    host = HostView(load(options, warnings), options.config_path, options.root)
    text = render(describe(host, warnings), host, mask=options.mask)
    warnings[:] = dict.fromkeys(warnings)
    if options.file:
        write(options.file, text)
    else:
        sys.stdout.write(text)
    return 0


def write(path: str, text: str) -> None:
    """A new file: whoever runs this as root must not write over another one, or through somebody's link."""
    try:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        raise ConfigError(f"write `{path}`: it exists", "name a new file") from None
    except OSError as error:
        raise ConfigError(f"write `{path}`: {reason(error)}", "name a file in a directory of yours") from None
    try:
        with open(fd, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        os.unlink(path)
        raise ConfigError(f"write `{path}`: {reason(error)}", "make room, or name another place") from None


def render(document: object, host: HostView, *, mask: bool) -> str:
    if mask:
        document = _Mask(kernel_text(f"{host.proc}/sys/kernel/hostname").strip()).of(document)
    return json.dumps(document, indent=1) + "\n"


class _Mask:
    """The same UUID has the same mask wherever it stands in one document, and every other one another.

    The host's name goes from what is free text, and not from paths: a host may be called nvidia.
    """

    def __init__(self, host_name: str) -> None:
        self.host_name = re.compile(rf"\b{re.escape(host_name)}\b") if host_name else None
        self.uuids: dict[str, str] = {}

    def of(self, value: object, key: str = "") -> object:
        if isinstance(value, dict):
            return {name: self.of(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [self.of(item, key) for item in value]
        if not isinstance(value, str):
            return value
        text = _UUID.sub(self._uuid, value)
        is_free = key in _FREE_TEXT or key.startswith("/")
        return self.host_name.sub("host", text) if self.host_name and is_free else text

    def _uuid(self, match: re.Match[str]) -> str:
        return self.uuids.setdefault(match[0].lower(), _nameless(len(self.uuids) + 1))


def describe(host: HostView, warnings: list[str]) -> Entry:
    """The description. What cannot be found out has a value that says nothing, and a line in `warnings`."""
    config = host.config
    found, version = _gpus(host, warnings)
    report = _report(host, found, warnings)
    is_store = bool(version) and wsl.is_store(version)
    cuda = report.cuda if report else "" if is_store or not version else requirements.facts_of(version).cuda or ""
    description: Entry = {"about": "Made by `nvhook snapshot`.", **_names(host)}
    description |= {
        "driver_version": "" if is_store else version,
        "cuda_driver_version": cuda,
        "gpus": _described(found, report),
        "device_nodes": _nodes(host),
        "files": hostfiles.find(config, version, warnings),
        "proc": _proc(host),
        "sys": _sys(host),
    }
    cache = hostfiles.linker_cache(config)
    return description if cache is None else {**description, "linker_cache": cache}


def _names(host: HostView) -> Entry:
    """For people."""
    found: Entry = {}
    for line in host.text("/etc/os-release").splitlines():
        if line.startswith("PRETTY_NAME="):
            found["os"] = line.partition("=")[2].strip("\"'")
    release = kernel_text(f"{host.proc}/sys/kernel/osrelease").strip()
    if release:
        found["kernel"] = release
    version = cgroup_version(host)
    return {**found, "cgroup": version} if version else found


def cgroup_version(host: HostView) -> int:
    """1, 2, or 0 where /sys does not show it."""
    if os.path.exists(f"{host.sys}/fs/cgroup/cgroup.controllers"):
        return 2
    return 1 if os.path.isdir(f"{host.sys}/fs/cgroup/devices") else 0


def _gpus(host: HostView, warnings: list[str]) -> tuple[Gpus | None, str]:
    try:
        found = hosts.find(host.config)
        return found, found.driver_version if found else ""
    except NvhookError as error:
        warnings.append(str(error))
        return None, ""


def _report(host: HostView, found: Gpus | None, warnings: list[str]) -> Report | None:
    if found is None or not found.gpus:
        return None
    try:
        return inventory.report(host.config, found, None, warnings, keep=False)
    except NvhookError as error:
        warnings.append(f"{error}; compute capabilities and MIG devices are not in the description")
        return None


def _described(found: Gpus | None, report: Report | None) -> list[Entry]:
    if found is None:
        return []
    devices = {device.pci.lower(): device for device in report.devices} if report else {}
    described = []
    for gpu in found.gpus:
        device = devices.get(gpu.pci.lower())
        uuid = device.uuid if device else gpu.uuid
        domain, bus, slot = gpu.pci.upper().partition(".")[0].split(":")
        described.append(
            {
                "index": gpu.index,
                "minor": gpu.minor,
                "name": gpu.model or "unknown",
                "uuid": _uuid("GPU", uuid, gpu.index),
                "pci_bus_id": f"{domain:>08}:{bus}:{slot}.0",
                "compute_capability": (device and device.arch) or "0.0",
                "mig": _mig(device),
            }
        )
    return described


def _uuid(kind: str, text: str, number: int) -> str:
    """One of the usual form: it is not known before the GPU is initialised, and was longer before driver 470."""
    found = _UUID.fullmatch(text.partition("-")[2])
    return f"{kind}-{found[0].lower() if found else _nameless(number)}"


def _nameless(number: int) -> str:
    return f"00000000-0000-0000-0000-{number:012x}"


def _mig(device: GpuReport | None) -> object:
    """NVML's report has no names of profiles; nothing but the list of nvidia-smi shows them."""
    if device is None or not device.mig_enabled:
        return "disabled"
    return [
        {
            "gi": item.gi,
            "ci": item.ci,
            "profile": "unknown",
            "uuid": _uuid("MIG", item.uuid, place),
        }
        for place, item in enumerate(device.instances)
    ]


def _nodes(host: HostView) -> list[Entry]:
    others = [os.path.basename(path).rstrip("*") for paths in features.NODES.values() for path in paths]
    wanted = ("nvidia", "dxg", "card", "renderD", *others)
    nodes = []
    for room in _ROOMS:
        for name in listed(f"{host.dev}/{room}"):
            path = "/".join(part for part in ("/dev", room, name) if part)
            try:
                status = os.stat(f"{host.dev}/{room}/{name}", follow_symlinks=False)
            except OSError:
                continue
            if stat.S_ISCHR(status.st_mode) and (room.startswith("nvidia") or name.startswith(wanted)):
                major, minor = os.major(status.st_rdev), os.minor(status.st_rdev)
                mode = f"0{stat.S_IMODE(status.st_mode) & 0o777:03o}"
                nodes.append({"path": path, "major": major, "minor": minor, "mode": mode})
    return nodes


def _proc(host: HostView) -> Entry:
    found: Entry = {}
    for name in listed(f"{host.proc}/driver"):
        if name.startswith("nvidia"):
            _add_tree(f"{host.proc}/driver/{name}", f"/proc/driver/{name}", found)
    for name in ("devices", "sys/kernel/modprobe"):
        text = kernel_text(f"{host.proc}/{name}")
        if text:
            found[f"/proc/{name}"] = text
    # Without the addresses, which are a secret of the kernel's.
    lines = [line.split()[:5] for line in kernel_text(f"{host.proc}/modules").splitlines()]
    modules = [" ".join([*line, "0x0"]) for line in lines if line and line[0].startswith(_MODULES)]
    return {**found, "/proc/modules": "\n".join(modules) + "\n"} if modules else found


def _add_tree(directory: str, name: str, found: Entry) -> None:
    for path, _, files in os.walk(directory):
        for file in sorted(files):
            text = kernel_text(f"{path}/{file}")
            if text:
                found[f"{name}{path[len(directory) :]}/{file}"] = text


def _sys(host: HostView) -> Entry:
    """NVIDIA's devices on the PCI bus, and where the kernel looks for firmware."""
    found: Entry = {}
    top = "bus/pci/devices"
    for address in listed(f"{host.sys}/{top}"):
        place = f"{top}/{address}"
        names = ["vendor", "device", "class", *(f"drm/{name}/dev" for name in listed(f"{host.sys}/{place}/drm"))]
        texts = {f"/sys/{place}/{name}": kernel_text(f"{host.sys}/{place}/{name}") for name in names}
        if texts[f"/sys/{place}/vendor"].strip() in ("", hardware.NVIDIA):  # a tree made by hand may not say
            found |= {path: text for path, text in texts.items() if text}
    firmware = "module/firmware_class/parameters/path"
    text = kernel_text(f"{host.sys}/{firmware}")
    return {**found, f"/sys/{firmware}": text} if text.strip() else found
