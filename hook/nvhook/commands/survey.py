# SPDX-License-Identifier: Apache-2.0
"""The stages of a container start, looked at and not done: nothing is touched, not even the inventory."""

from __future__ import annotations

import os

from nvhook import compat, container, host, inventory, prestart, request, selection, spec
from nvhook.errors import SpecError, reason
from nvhook.linux.root import DIRECTORY, Root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nvhook.config import Config
    from nvhook.container import Layout
    from nvhook.driver import Driver
    from nvhook.edits import Edit
    from nvhook.gpus import Gpus, Selection
    from nvhook.request import Request


class Survey:
    """What a container that is `described` would get, stage by stage. `root` is its root filesystem."""

    __slots__ = ("asked", "chosen", "compat", "driver", "edits", "gpus", "layout", "root")

    def __init__(
        self,
        asked: Request,
        gpus: Gpus,
        chosen: Selection,
        driver: Driver,
        root: Root,
        layout: Layout,
        edits: list[Edit],
        compat: str = "",
    ) -> None:
        self.asked = asked
        self.gpus = gpus
        self.chosen = chosen
        self.driver = driver
        self.root = root
        self.layout = layout
        self.edits = edits
        self.compat = compat  # the image's directory of CUDA compatibility libraries, if they are used


def make(described: spec.Spec, config: Config, warnings: list[str]) -> Survey | None:
    """None if the container asks for nothing; the error that would stop its start, if one would."""
    asked = request.read(described, config, warnings)
    if asked is None:
        return None
    gpus = host.read(config, asked, warnings, modprobe="")
    chosen = selection.choose(config, asked, gpus, warnings, keep=False)
    driver = inventory.load(config, gpus.driver_version, warnings, keep=False)
    root = _root(described.rootfs)
    layout = container.layout(root)
    compatible = compat.find(config, asked, root, gpus.driver_version, chosen.brands, warnings)
    edits = prestart.draw(config, asked, gpus, chosen, driver, layout, compatible, warnings)
    return Survey(asked, gpus, chosen, driver, root, layout, edits, compatible)


def imagined(env: list[str], rootfs: str) -> spec.Spec:
    """A container with the variables `env` (NAME=VALUE) over the directory `rootfs`; SpecError."""
    variables = {}
    for item in env:
        name, equals, value = item.partition("=")
        if not name or not equals:
            raise SpecError(f"--env `{item}` is not of the form NAME=VALUE")
        variables[name] = value
    place = os.path.abspath(rootfs)
    return spec.Spec(env=variables, mounts=[], annotations={}, privileged=False, rootfs=place, device_rules=[])


def _root(rootfs: str) -> Root:
    try:
        return Root(os.open(rootfs, DIRECTORY), container.SECONDS)
    except OSError as error:
        raise SpecError(f"open the root filesystem `{rootfs}`: {reason(error)}") from None
