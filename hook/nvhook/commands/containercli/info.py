# SPDX-License-Identifier: Apache-2.0
"""`nvidia-container-cli info` and `list`: what the host has, in NVIDIA's formats. Nothing is changed but what is kept.

What NVML tells is asked in its child, as ever; where it does not answer, /proc and the driver's version do.
"""

from __future__ import annotations

import os

from nvhook import plan
from nvhook.commands.containercli import options as containeroptions
from nvhook.driver import inventory
from nvhook.errors import DriverError
from nvhook.host import cap_nodes, host, selection, sockets
from nvhook.host.offers import Offers
from nvhook.request import requirements
from nvhook.request.request import Request
from nvhook.start import reporter

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from nvhook.driver.records import Driver
    from nvhook.host.gpus import Gpu, Gpus
    from nvhook.host.offers import HostFile, HostNode
    from nvhook.host.report import GpuReport, Report
    from nvhook.host.selection import Selection
    from nvhook.request.config import Config

_UNKNOWN = "Unknown"
_BRANDS = {
    "quadro": "Quadro",
    "tesla": "Tesla",
    "nvs": "NVS",
    "grid": "GRID",
    "geforce": "GeForce",
    "titan": "TITAN",
}
_DRIVER = ("NVRM version", "CUDA version")
_GPU = ("Device Index", "Device Minor", "Model", "Brand", "GPU UUID", "Bus Location", "Architecture")
_ORDER = ("utility", "compute", "ngx", "video", "graphics")  # NVIDIA's, of libraries and programs


def _request(options: argparse.Namespace, devices: tuple[str, ...], capabilities: tuple[str, ...]) -> Request:
    return Request(devices, capabilities, (), f"{containeroptions.NAME} {options.command}")


def info(options: argparse.Namespace, config: Config, warnings: list[str]) -> None:
    found = host.read(config, (), warnings)
    report = _report(config, found, warnings)
    cuda = report.cuda if report else requirements.facts_of(found.driver_version).cuda
    told = {device.pci.lower(): device for device in report.devices} if report else {}
    driver = (found.driver_version, cuda or _UNKNOWN)
    rows = [_row(gpu, told.get(gpu.pci.lower())) for gpu in found.gpus]
    if options.csv:
        for line in (_DRIVER, driver, (), _GPU, *rows):
            print(",".join(line))
        return
    _print(_DRIVER, driver)
    for row in rows:
        print()
        _print(_GPU, row)


def _print(labels: tuple[str, ...], values: tuple[str, ...]) -> None:
    for label, value in zip(labels, values, strict=True):
        print(f"{label + ':':15} {value}")


def _row(gpu: Gpu, told: GpuReport | None) -> tuple[str, ...]:
    brand = told.brand if told else _brand(gpu.model)
    domain, _, rest = gpu.pci.partition(":")
    return (
        str(gpu.index),
        str(gpu.minor),
        gpu.model or _UNKNOWN,
        _BRANDS.get(brand, _UNKNOWN),
        told.uuid if told else gpu.uuid,
        f"{domain:0>8}:{rest}",
        told.arch if told and told.arch else _UNKNOWN,
    )


def _brand(model: str) -> str:
    """The word that older products have in their names."""
    return model.lower().removeprefix("nvidia ").partition(" ")[0]


def _report(config: Config, found: Gpus, warnings: list[str]) -> Report | None:
    if found.dxg is not None:
        return None  # on WSL 2 there is no NVML to ask
    try:
        return inventory.report(config, found, None, warnings, keep=_may_keep())
    except DriverError as error:
        warnings.append(f"{error}; what /proc tells is printed")
        return None


def _may_keep() -> bool:
    """An ordinary user may look, and has no state directory."""
    return os.geteuid() == 0


# list

# Its options that ask for something
_SELECTING = (
    "device",
    "libraries",
    "binaries",
    "ipcs",
    "firmwares",
    "compat32",
    "mig_config",
    "mig_monitor",
    "no_persistenced",
    "no_fabricmanager",
)


def list_all(options: argparse.Namespace, config: Config, warnings: list[str]) -> None:
    """One path a line, without the driver root; each once."""
    _complete(options)
    request = _request(options, containeroptions.devices(options), ("compute", "display"))
    found = host.read(config, request.capabilities, warnings)
    chosen = selection.choose(request, found, reporter(config, found, warnings, keep=_may_keep()), warnings)
    paths = _nodes(request.capabilities, chosen, found) if options.device else []
    paths += _capabilities(options, config, chosen, found)
    if options.libraries or options.binaries or options.ipcs or options.firmwares:
        paths += _files(options, config, inventory.load(config, found.driver_version, warnings, keep=_may_keep()))
    print("".join(f"{path}\n" for path in dict.fromkeys(paths)), end="")


def _complete(options: argparse.Namespace) -> None:
    """No option, or --imex-channel alone, is everything."""
    others = (value for name, value in vars(options).items() if name in _SELECTING)
    if not any(others):
        options.device = ["all"]
        options.libraries = options.binaries = options.ipcs = options.firmwares = options.compat32 = True


def _nodes(capabilities: tuple[str, ...], chosen: Selection, found: Gpus) -> list[str]:
    """The driver's own first, and not those of a module that is not loaded."""
    if "nvidia-uvm" not in found.majors:
        capabilities = ("display",)
    paths = [node.path for node in plan.devices(capabilities, chosen.gpus, Offers(found))]
    own = {f"/dev/nvidia{gpu.minor}" for gpu in chosen.gpus}
    return [path for path in paths if path not in own] + [path for path in paths if path in own]


def _capabilities(options: argparse.Namespace, config: Config, chosen: Selection, found: Gpus) -> list[str]:
    """MIG devices one by one, IMEX channels, and the rights to MIG."""
    rights = containeroptions.mig_rights(options)
    paths = []
    for mig in () if rights else chosen.migs:
        paths += _paths(*cap_nodes.of_instances(config, [mig], found))
    paths += _paths(cap_nodes.of_channels(config, containeroptions.imex_channels(options), found), [])
    for right in rights:
        paths += _paths(*cap_nodes.of_rights(config, (right,), containeroptions.devices(options), chosen, found))
    return paths


def _paths(nodes: list[HostNode], files: list[HostFile]) -> list[str]:
    return [item.destination for item in files] + [node.path for node in nodes]


def _files(options: argparse.Namespace, config: Config, driver: Driver) -> list[str]:
    paths = []
    if options.binaries:
        binaries = sorted(driver.binaries, key=lambda item: _rank((item.capability,)))
        paths += [item.path for item in binaries]
    libraries = sorted(driver.libraries, key=lambda item: _rank(item.capabilities))
    for bits in (64, 32) if options.compat32 else (64,):
        paths += [item.path for item in libraries if item.bits == bits and options.libraries]
    if options.ipcs:
        paths += [item.path for item in sockets.find(config.driver_root)]
    if options.firmwares:
        paths += [item.path for item in driver.files if "/firmware/nvidia/" in item.destination]
    top = os.path.realpath(config.driver_root).rstrip("/")
    return [path.removeprefix(top) for path in paths if not containeroptions.is_left_out(options, path)]


def _rank(capabilities: tuple[str, ...]) -> int:
    return next((place for place, name in enumerate(_ORDER) if name in capabilities), len(_ORDER))
