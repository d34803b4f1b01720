# SPDX-License-Identifier: Apache-2.0
"""Which kind of host this is, its GPUs, and what else it has for a container at this moment.

A host with NVIDIA's kernel module is gpus.py's; here is what comes before and beside it: modules that are loaded when
somebody asks for them (modules.py), WSL 2, which has none (wsl.py), and Tegra, which is refused. On a host that has
what is asked for this costs one look.
"""

from __future__ import annotations

import os

from nvhook.errors import DeviceError, DriverError

from . import cap_nodes, dri, features, gpus, modules
from .offers import Offers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nvhook.request.config import Config
    from nvhook.request.request import Request

    from .gpus import Gpus
    from .selection import Selection


KERNEL_MODULE, WSL, TEGRA, NONE = "kernel module", "WSL 2", "Tegra", "none"


def kind(config: Config) -> str:
    """Through what the host has its GPUs at this moment."""
    if gpus.is_loaded(config.proc_root):
        return KERNEL_MODULE
    from . import wsl  # only where there is no kernel module

    if wsl.node(config.dev_root) is not None:
        return WSL
    return TEGRA if _tegra_sign(config) else NONE


def find(config: Config) -> Gpus | None:
    """The GPUs of the kernel module or of WSL 2; None on a host of another kind. DeviceError, DriverError."""
    found = kind(config)
    if found == KERNEL_MODULE:
        return gpus.read(config.proc_root)
    if found != WSL:
        return None
    from . import wsl

    return wsl.find(config.driver_root, config.dev_root)


def read(config: Config, capabilities: tuple[str, ...], warnings: list[str], *, modprobe: str | None = None) -> Gpus:
    """The host's GPUs, with the kernel modules that `capabilities` need.

    modprobe   the program that loads them, empty for none; None: the host's own, where config.toml and the place
               where we run allow it

    DeviceError when a module is not there, DriverError for a host that nvhook does not serve.
    """
    found = find(config)
    if found is None:
        _refuse_tegra(config)
        return _load(["nvidia", *_modules(capabilities, {})], config, warnings, modprobe)
    if found.dxg is not None:
        return found
    missing = _modules(capabilities, found.majors)
    return _load(missing, config, warnings, modprobe) if missing else found


def now(config: Config, request: Request, chosen: Selection, gpus: Gpus, warnings: list[str]) -> Offers:
    """What else the host has for `request` at this moment. RequestError and DeviceError as in cap_nodes.find()."""
    nodes, files = cap_nodes.find(config, request, chosen, gpus)
    feature_nodes, feature_files = features.find(config, request.features, warnings)
    return Offers(
        gpus,
        dri=dri.find(config, chosen.gpus) if set(dri.DRAWING) & set(request.capabilities) else [],
        nodes=nodes + feature_nodes,
        files=files + feature_files,
    )


def _modules(capabilities: tuple[str, ...], majors: dict[str, int]) -> list[str]:
    """Those that `capabilities` need and the kernel does not show."""
    missing = []
    if {"compute", "video"} & set(capabilities) and "nvidia-uvm" not in majors:
        missing.append("nvidia-uvm")
    # Before driver 560 nvidia-frontend stands for mode setting as well, loaded or not.
    if "display" in capabilities and not {"nvidia-modeset", "nvidia-frontend"} & majors.keys():
        missing.append("nvidia-modeset")
    return missing


def _load(missing: list[str], config: Config, warnings: list[str], modprobe: str | None) -> Gpus:
    """What there is when each of `missing` has been loaded, or could not be.

    Without nvidia there is nothing, without nvidia-uvm no computing. Mode setting is more than most who ask for
    `display` use; a driver without it is no reason not to start.
    """
    program = modules.modprobe(config) if modprobe is None else modprobe
    for module in missing if program else ():
        try:
            modules.load(module, program)
        except DeviceError as error:
            if module != "nvidia-modeset":
                raise
            warnings.append(str(error))
    return gpus.read(config.proc_root)


def _refuse_tegra(config: Config) -> None:
    """A Tegra's integrated GPU has another driver, whose files differ from board to board."""
    path = _tegra_sign(config)
    if path:
        raise DriverError(
            f"this is a Tegra, as `{path}` says, and its integrated GPU is not supported",
            "use NVIDIA's container toolkit on this host",
        )


def _tegra_sign(config: Config) -> str:
    """The file that says that this is a Tegra, or empty."""
    signs = (
        (os.path.join(config.driver_root, "etc/nv_tegra_release"), ""),
        (os.path.join(config.proc_root, "sys/devices/soc0/family"), "tegra"),
    )
    for path, start in signs:
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                if file.read(64).lower().startswith(start):
                    return path
        except OSError:
            continue
    return ""
