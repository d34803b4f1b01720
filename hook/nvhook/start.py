# SPDX-License-Identifier: Apache-2.0
"""One start of a container: the record that its stages fill in, and the stages.

    request  ->  choose: the GPUs  ->  draw: the driver, the image, the plan

The wrapper needs no more than the choice, and `nvhook plan` no more than the plan. The hook goes on to prepare it and
to apply it (prestart.py).
"""

from __future__ import annotations

from .host import host, procfs, selection, sockets

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .container.container import Layout
    from .container.edits import Device, Edit
    from .driver.records import Driver
    from .host.gpus import Gpus
    from .host.mig import Reporter
    from .host.modules import Made
    from .host.offers import Offers
    from .host.report import Report
    from .host.selection import Selection
    from .linux.root import Root
    from .request.config import Config
    from .request.request import Request
    from .request.spec import Spec


def reporter(config: Config, gpus: Gpus, warnings: list[str], *, keep: bool = True) -> Reporter:
    """What NVML tells of `gpus`, for when somebody needs it. `keep` as in inventory.py."""

    def report(again: bool) -> Report:
        from .driver import inventory  # and all that NVML brings, for the few containers that need it

        return inventory.report(config, gpus, None, warnings, again=again, keep=keep)

    return report


class Start:
    """Known from the beginning:

    id          the container's
    spec        its config.json
    warnings    for its user, in the order in which they came
    is_preview  nothing is touched: no module is loaded, and nothing is kept

    After `choose`: `gpus` of the host, those `chosen`, and what else the host `offers`. After `draw`: `root`, the tree
    that the plan was made for, and its `layout`; `driver`, and the `edits`, which are the plan.

    made        what was made on the host for this start, until it has succeeded
    """

    __slots__ = (
        "chosen",
        "config",
        "driver",
        "edits",
        "gpus",
        "id",
        "is_preview",
        "layout",
        "made",
        "offers",
        "request",
        "root",
        "spec",
        "warnings",
    )

    def __init__(
        self,
        config: Config,
        spec: Spec,
        request: Request,
        id: str,  # noqa: A002 - OCI's name
        warnings: list[str],
        *,
        is_preview: bool = False,
    ) -> None:
        self.config = config
        self.spec = spec
        self.request = request
        self.id = id
        self.warnings = warnings
        self.is_preview = is_preview
        self.made: Made | None = None
        self.edits: list[Edit] = []
        self.gpus: Gpus
        self.chosen: Selection
        self.offers: Offers
        self.root: Root
        self.layout: Layout
        self.driver: Driver

    def choose(self) -> None:
        """Choose the GPUs, and find what else this host has for the container. DeviceError, DriverError, RequestError,
        RequirementError. Cheap: /proc alone, for nearly every container."""
        config, request = self.config, self.request
        modprobe = "" if self.is_preview else None
        self.gpus = host.read(config, request.capabilities, self.warnings, modprobe=modprobe)
        report = reporter(config, self.gpus, self.warnings, keep=not self.is_preview)
        self.chosen = selection.choose(request, self.gpus, report, self.warnings)
        self.offers = host.now(config, request, self.chosen, self.gpus, self.warnings)

    def draw(self, root: Root, *, again: bool = False) -> None:
        """Read the driver, and make the plan for the image at `root`; nothing of it is done. `again`: the inventory of
        the driver's files is not to be believed. DeviceError, DriverError, ContainerError."""
        from . import plan
        from .driver import inventory  # the wrapper does without

        config, request, keep = self.config, self.request, not self.is_preview
        self.driver = inventory.load(config, self.gpus.driver_version, self.warnings, again=again, keep=keep)
        if not again:
            self.root = root
            self.layout = self.layout_of(root, self.warnings)
            self.offers.sockets = sockets.find(config.driver_root)
            self.offers.proc = procfs.read(config.proc_root)
        self.edits = plan.make(request, self.chosen, self.offers, self.driver, self.layout)

    def layout_of(self, root: Root, warnings: list[str]) -> Layout:
        """Where the image at `root` keeps things. ContainerError where finding that out takes too long."""
        from .container import container, cuda_compat

        layout = container.layout(root)
        version, brands = self.gpus.driver_version, self.chosen.brands
        layout.compat = cuda_compat.find(self.config, self.request.capabilities, root, version, brands, warnings)
        return layout

    def nodes(self) -> list[Device]:
        """The device nodes of the plan."""
        from .container.edits import Device

        return [edit for edit in self.edits if isinstance(edit, Device)]

    def take_back(self) -> None:
        """The start has failed: take back what was made for it on the host."""
        if self.made:
            self.made.take_back()
