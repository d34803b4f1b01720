# SPDX-License-Identifier: Apache-2.0
"""The main job, run by the low-level runtime between the making of a container and its start.

    state + config.json -> request -> gpus -> driver -> plan -> edits, applied in the container

`prepare` is all of it that happens in the host's namespace; after `Container.enter` nothing is imported, and no path
is looked up from `/`.
"""

from __future__ import annotations

import sys

from . import (
    caps,
    cleanup,
    compat,
    container_dir,
    dri,
    features,
    fitness,
    host,
    inventory,
    kmods,
    linkercache,
    plan,
    procfs,
    selection,
    sockets,
    spec,
)
from . import container as containers
from . import edits as editing
from . import gpus as gpus_of_host
from .errors import ContainerError, DriverError, SpecError, reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .audit import Audit
    from .config import Config
    from .container import Container
    from .container_dir import Lock, Unlocked
    from .driver import Driver
    from .gpus import Gpus, Selection
    from .linux.cgroups import Rule
    from .linux.root import Root
    from .request import Request


def prestart(config: Config, warnings: list[str], trail: Audit) -> None:
    """Give the container on stdin what it asks for, or nothing and an NvhookError."""
    state = spec.read_state(sys.stdin.fileno())
    trail.container = state.id
    described = spec.parse(spec.read_config(state.bundle)[0], state.bundle)
    asked = trail.read(described, warnings)
    if asked is not None:
        serve(config, described, asked, state, None, warnings, trail=trail)


def serve(
    config: Config,
    described: spec.Spec,
    asked: Request,
    state: spec.State,
    ahead: Preparation | None,
    warnings: list[str],
    *,
    trail: Audit | None = None,
) -> None:
    """Give it to the container of `state`. What was prepared `ahead` of it is used if the container is as expected.

    Without a `trail` the wrapper has been here: it wrote down who gets what, and the rules of the device cgroup.
    """
    container = containers.find(state.pid, described.rootfs)
    if ahead:
        ahead.expect_same_driver(config)
    if ahead is None or not ahead.fits(config, asked, container.root, container.layout):
        ahead = prepare(config, asked, container.root, container.layout, warnings, start=state.id)
    if trail:
        trail.chosen = ahead.chosen
    edits = ahead.edits
    closed = _not_allowed(edits, described) if trail else []
    try:
        with _lock(config, container, warnings):
            container.directory = _register(state, container, warnings)
            try:
                _tell_systemd(closed, config, container, warnings)
                change(config, container, edits, closed)
            except BaseException:
                cleanup.forget(container)
                raise
            if container.directory:
                _note(container.directory, container, edits, warnings)
    except BaseException:
        ahead.take_back()
        raise
    if trail:
        trail.grant()
    # Where the wrapper was, it has written a hook that does this when the container's program runs.
    if trail and not trail.silent and ahead.made:
        ahead.made.keep()


def _lock(config: Config, container: Container, warnings: list[str]) -> Lock | Unlocked:
    try:
        container.lock = container_dir.lock(config.state_dir, container)
    except OSError as error:
        what = f"keep a note of the container below `{config.state_dir}`"
        warnings.append(f"{what}: {reason(error)}; empty files will stay in the container's layer")
    return container.lock


def _register(state: spec.State, container: Container, warnings: list[str]) -> container_dir.ContainerDirectory | None:
    """Before anything is made in the root filesystem: whoever cleans up another container's looks for ours.

    ContainerError where nothing can be kept about it, and there is another one.
    """
    try:
        return container.lock.register(state, container, warnings)
    except SpecError as error:
        why = error.message
    except OSError as error:
        why = f"note the container `{state.id}`: {reason(error)}"
    container_dir.expect_none(container.lock.others(""), container, why)
    warnings.append(f"{why}; empty files will stay in the container's layer")
    return None


def _note(
    directory: container_dir.ContainerDirectory,
    container: Container,
    edits: list[editing.Edit],
    warnings: list[str],
) -> None:
    traces = [trace for edit in edits for trace in edit.traces]
    former = next((edit.former for edit in edits if isinstance(edit, linkercache.Ldcache)), -1)
    try:
        cleanup.note(directory, cleanup.times(container.root, container.times) + traces, former)
    except OSError as error:
        warnings.append(f"note what to clean up: {reason(error)}; empty files will stay in the container's layer")


class Preparation:
    """`edits` for what was `chosen`, their sources open, made for a root filesystem that may turn out to be another.

    `made`: what was made for it on the host, until the start has succeeded.
    """

    __slots__ = ("_compat", "_gpus", "_layout", "chosen", "edits", "made")

    def __init__(
        self,
        edits: list[editing.Edit],
        chosen: Selection,
        layout: containers.Layout,
        compatible: str,
        gpus: Gpus,
        made: kmods.Made | None,
    ) -> None:
        self.made = made
        self.edits = edits
        self.chosen = chosen
        self._layout = layout
        self._compat = compatible
        self._gpus = gpus

    def fits(self, config: Config, asked: Request, root: Root, layout: containers.Layout) -> bool:
        """Whether the plan would be the same for this one, and can be carried out."""
        compatible = compat.find(config, asked, root, self._gpus.driver_version, self.chosen.brands, [])
        is_same = layout.describe() == self._layout.describe() and compatible == self._compat
        return is_same and not any(edit.is_gone() for edit in self.edits)

    def take_back(self) -> None:
        """The start has failed."""
        if self.made:
            self.made.take_back()

    def expect_same_driver(self, config: Config) -> None:
        """DriverError for another kernel module than then: its devices have other numbers than those in the spec."""
        if self._gpus.dxg is not None:
            return  # on WSL 2 there is no module
        before, now = self._gpus.driver_version, gpus_of_host.driver_version(config.proc_root)
        if before != now:
            raise DriverError(f"driver {before} was replaced by {now} while the container was made", "start it again")


def prepare(
    config: Config,
    asked: Request,
    root: Root,
    layout: containers.Layout,
    warnings: list[str],
    *,
    found: tuple[Gpus, Selection] | None = None,
    start: str,
) -> Preparation:
    """All that is done on the host. An inventory that names a file which has gone is made again, once.

    `found`: what the caller has found out about the GPUs for this request. `start`: the container's id, as kmods.py
    has it.
    """
    if found:
        gpus, chosen = found
    else:
        gpus = host.read(config, asked, warnings)
        chosen = selection.choose(config, asked, gpus, warnings)
    compatible = compat.find(config, asked, root, gpus.driver_version, chosen.brands, warnings)
    for again in (False, True):
        driver = inventory.load(config, gpus.driver_version, warnings, again=again)
        edits = draw(config, asked, gpus, chosen, driver, layout, compatible, warnings)
        nodes = [edit for edit in edits if isinstance(edit, editing.Device)]
        made = kmods.make_nodes(config, nodes, warnings, start)
        try:
            _prepare(edits, config, root)
            fitness.check(config, asked, driver, root, layout, compatible, warnings)
            ahead = Preparation(edits, chosen, layout, compatible, gpus, made)
            ahead.expect_same_driver(config)
            return ahead
        except editing.SourceGone as gone:
            lost = str(gone)
        except BaseException:
            if made:
                made.take_back()
            raise
    if made:
        made.take_back()
    raise DriverError(f"`{lost}` disappeared while the container was prepared", "reinstall the driver")


def draw(
    config: Config,
    asked: Request,
    gpus: Gpus,
    chosen: Selection,
    driver: Driver,
    layout: containers.Layout,
    compatible: str,
    warnings: list[str],
) -> list[editing.Edit]:
    """The plan, with the nodes, sockets and /proc that the host has at this moment; nothing of it is touched."""
    return plan.make(
        asked,
        chosen.gpus,
        gpus,
        driver,
        layout,
        dri_nodes=dri.find(config, asked, chosen.gpus),
        sockets=sockets.find(config.driver_root),
        proc=procfs.read(config.proc_root),
        extras=[caps.find(config, asked, chosen, gpus), features.find(config, asked, warnings)],
        compat=compatible,
    )


def _prepare(edits: list[editing.Edit], config: Config, root: Root) -> None:
    for edit in edits:
        edit.prepare(config)
        edit.foresee(root)


def change(config: Config, container: Container, edits: list[editing.Edit], closed: list[editing.Device]) -> None:
    """Apply `edits`, and open the device cgroup for the nodes that are `closed`: all of it, or nothing.

    The container's mount namespace is ours from then on; files are the host's root's again.
    """
    for edit in edits:
        edit.examine(container)
    undo_access = _allow(closed, config, container)
    try:
        container.enter()
        editing.apply(edits, container)
    except BaseException:
        undo_access()
        raise
    finally:
        container.be_host()


def _not_allowed(edits: list[editing.Edit], described: spec.Spec) -> list[editing.Device]:
    """The nodes that the spec's own rules do not cover.

    The wrapper writes the rules into the spec, where the runtime and systemd know them. Without it (dockerd's
    --gpus, hooks.d) the cgroup itself is all that is left.
    """
    nodes = [edit for edit in edits if isinstance(edit, editing.Device)]
    return [node for node in nodes if not described.allows(node.major, node.minor)]


def _allow(missing: list[editing.Device], config: Config, container: Container) -> Callable[[], None]:
    """Open the device cgroup for these nodes; the answer takes that back.

    In a user namespace of our own it is not ours to change.
    """
    if not missing or config.no_cgroups or container.rootless:
        return _nothing
    from .linux import cgroups  # only where there was no wrapper

    try:
        return cgroups.allow(container.proc, _rules(missing))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ContainerError(
            f"allow {', '.join(edit.path for edit in missing)} in the device cgroup: {why}",
            "start the container with --runtime=nvidia, which writes the rules into its configuration",
        ) from None


def _tell_systemd(missing: list[editing.Device], config: Config, container: Container, warnings: list[str]) -> None:
    """Before the cgroup is opened: what systemd applies then is opened with the rest."""
    if not missing or config.no_cgroups or container.rootless:
        return
    from .linux import systemd  # only where there was no wrapper

    try:
        systemd.allow(container.proc, _rules(missing))
    except OSError as error:
        warnings.append(
            f"tell systemd of the container's devices: {reason(error)}; the next `systemctl daemon-reload` takes them, "
            "and --runtime=nvidia keeps them"
        )


def _rules(nodes: list[editing.Device]) -> list[Rule]:
    from .linux.cgroups import Rule

    return [Rule("c", node.major, node.minor, node.access) for node in nodes]


def _nothing() -> None:
    """Nothing was changed, and nothing is to be taken back."""
