# SPDX-License-Identifier: Apache-2.0
"""The main job, run by the low-level runtime between the making of a container and its start.

    state + config.json -> request -> GPUs -> driver -> plan -> edits, applied in the container

`prepare` is all of it that happens in the host's namespace; after `Container.enter` nothing is imported, and no path
is looked up from `/`.
"""

from __future__ import annotations

import sys

from .container import cleanup, image_check, linkercache, root_lock
from .container import container as containers
from .container import edits as editing
from .errors import ContainerError, DriverError, SpecError, reason
from .host import gpus as gpus_of_host
from .host import modules
from .request import request, spec
from .start import Start

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .audit import Audit
    from .container.container import Container
    from .container.container_dir import ContainerDirectory
    from .container.edits import Device
    from .linux.cgroups import Rule
    from .linux.root import Root
    from .request.config import Config
    from .request.spec import State


def prestart(config: Config, warnings: list[str], audit: Audit) -> None:
    """Give the container on stdin what it asks for, or nothing and an NvhookError."""
    state = spec.read_state(sys.stdin.fileno())
    audit.container = state.id
    described = audit.spec = spec.parse(spec.read_config(state.bundle)[0], state.bundle)
    known = len(warnings)
    asked = request.read(described, config, warnings)
    audit.begin(asked, warnings[known:])
    if asked is None:
        return
    start = Start(config, described, asked, state.id, warnings)
    container = containers.find(state.pid, described.rootfs)
    start.choose()
    prepare(start, container.root)
    give(start, state, container, audit)


def prestart_prepared(start: Start, state: State, audit: Audit) -> None:
    """The same for a `start` that was prepared while the low-level runtime made the container (nvruntime/ahead.py).

    DriverError for another kernel module than then: its devices have other numbers than those in the spec.
    """
    container = containers.find(state.pid, start.spec.rootfs)
    _expect_same_driver(start)
    if not _is_as_prepared(start, container.root):
        prepare(start, container.root)
    give(start, state, container, audit)


def prepare(start: Start, root: Root) -> None:
    """All that is done on the host for the image at `root`: the plan, its sources opened, and the nodes that the host
    lacks. An inventory that names a file which has gone is made again, once."""
    try:
        for again in (False, True):
            start.draw(root, again=again)
            made = modules.make_nodes(start.config, start.nodes(), start.warnings, start.id)
            start.made = made or start.made  # with a fault there is what the wrapper made, to be taken back
            try:
                for edit in start.edits:
                    edit.prepare(start.config, root)
                image_check.check(start.config, start.request, start.driver, root, start.layout, start.warnings)
                _expect_same_driver(start)
                return
            except editing.SourceGone as gone:
                lost = str(gone)
        raise DriverError(f"`{lost}` disappeared while the container was prepared", "reinstall the driver")
    except BaseException:
        start.take_back()
        raise


def give(start: Start, state: State, container: Container, audit: Audit) -> None:
    """Apply what is prepared: all of it, or nothing."""
    closed = _closed(start)
    try:
        with _lock(start, container):
            container.directory = _register(state, container, start.warnings)
            try:
                _tell_systemd(closed, start, container)
                change(start, container, closed)
            except BaseException:
                cleanup.forget(container)
                raise
            if container.directory:
                _note(container.directory, container, start)
    except BaseException:
        start.take_back()
        raise
    audit.grant(start.chosen)
    # Where the wrapper was, it has written a hook that does this when the container's program runs.
    if start.made and not audit.silent:
        start.made.keep()


def change(start: Start, container: Container, closed: list[Device]) -> None:
    """Apply the edits, and open the device cgroup for the nodes that are `closed`: all of it, or nothing.

    The container's mount namespace is ours from then on; files are the host's root's again.
    """
    for edit in start.edits:
        edit.prepare(start.config, container.root, container)
    undo_access = _allow(closed, start, container)
    try:
        container.enter()
        editing.apply(start.edits, container)
    except BaseException:
        undo_access()
        raise
    finally:
        container.be_host()


def _is_as_prepared(start: Start, root: Root) -> bool:
    """Whether the plan would be the same for this root filesystem, and can still be carried out."""
    if not start.edits or start.layout_of(root, []) != start.layout:
        return False
    try:
        for edit in start.edits:
            edit.prepare(start.config, root)
    except editing.SourceGone:
        return False
    return True


def _expect_same_driver(start: Start) -> None:
    if start.gpus.dxg is not None:
        return  # on WSL 2 there is no module
    before, now = start.gpus.driver_version, gpus_of_host.driver_version(start.config.proc_root)
    if before != now:
        raise DriverError(f"driver {before} was replaced by {now} while the container was made", "start it again")


# What is kept about the container


def _lock(start: Start, container: Container) -> root_lock.Lock | root_lock.Unlocked:
    state_dir = start.config.state_dir
    try:
        container.lock_root(state_dir)
    except OSError as error:
        what = f"keep a note of the container below `{state_dir}`"
        start.warnings.append(f"{what}: {reason(error)}; empty files will stay in the container's layer")
    return container.lock


def _register(state: State, container: Container, warnings: list[str]) -> ContainerDirectory | None:
    """Before anything is made in the root filesystem: whoever cleans up another container's looks for ours.

    ContainerError where nothing can be kept about it, and there is another one.
    """
    try:
        return container.lock.register(state, container.proc, container.rootfs, warnings)
    except SpecError as error:
        why = error.message
    except OSError as error:
        why = f"note the container `{state.id}`: {reason(error)}"
    root_lock.expect_none(container.lock.others(""), container.rootfs, why)
    warnings.append(f"{why}; empty files will stay in the container's layer")
    return None


def _note(directory: ContainerDirectory, container: Container, start: Start) -> None:
    traces = [trace for edit in start.edits for trace in edit.traces]
    former = next((edit.former for edit in start.edits if isinstance(edit, linkercache.Ldcache)), -1)
    try:
        cleanup.note(directory, cleanup.times(container.root, container.times) + traces, former)
    except OSError as error:
        start.warnings.append(f"note what to clean up: {reason(error)}; empty files will stay in the container's layer")


# The device cgroup


def _closed(start: Start) -> list[Device]:
    """The nodes that the spec's own rules do not cover.

    The wrapper writes the rules into the spec, where the runtime and systemd know them. Without it (dockerd's
    --gpus, hooks.d) the cgroup itself is all that is left.
    """
    return [node for node in start.nodes() if not start.spec.allows(node.major, node.minor)]


def _allow(missing: list[Device], start: Start, container: Container) -> Callable[[], None]:
    """Open the device cgroup for these nodes; the answer takes that back.

    In a user namespace of our own it is not ours to change.
    """
    if not missing or start.config.no_cgroups or container.rootless:
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


def _tell_systemd(missing: list[Device], start: Start, container: Container) -> None:
    """Before the cgroup is opened: what systemd applies then is opened with the rest."""
    if not missing or start.config.no_cgroups or container.rootless:
        return
    from .linux import systemd  # only where there was no wrapper

    try:
        systemd.allow(container.proc, _rules(missing))
    except OSError as error:
        start.warnings.append(
            f"tell systemd of the container's devices: {reason(error)}; the next `systemctl daemon-reload` takes them, "
            "and --runtime=nvidia keeps them"
        )


def _rules(nodes: list[Device]) -> list[Rule]:
    from .linux.cgroups import Rule

    return [Rule("c", node.major, node.minor, node.access) for node in nodes]


def _nothing() -> None:
    """Nothing was changed, and nothing is to be taken back."""
