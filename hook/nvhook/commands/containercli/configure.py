# SPDX-License-Identifier: Apache-2.0
"""`nvidia-container-cli configure`: the hook's work (prestart.py) for a container that is named by the caller.

With --pid it is another process's, entered as the hook enters it. Without, it is the mount namespace that we are in:
that it was made for a container, and that ROOTFS will be its root, is the caller's word. No note is kept of what stays
in the root filesystem: nobody calls when such a container ends.

After `prestart.change` nothing is imported, and no path is looked up.
"""

from __future__ import annotations

import os

from nvhook import audit, prestart
from nvhook.commands import plan
from nvhook.commands.containercli import options as containeroptions
from nvhook.commands.containercli.options import NAME, InputError
from nvhook.container import container
from nvhook.container.edits import Device, Edit, Mount
from nvhook.errors import NvhookError
from nvhook.linux import kernel
from nvhook.request import config as configuration
from nvhook.request.request import Request
from nvhook.request.spec import Spec
from nvhook.start import Start

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from nvhook.commands.containercli.log import CommandLog
    from nvhook.request.config import Config


class _PermissionError(NvhookError):
    stage = "permission"


def configure(options: argparse.Namespace, config: Config, warnings: list[str], log: CommandLog) -> None:
    """All that is asked for, or an NvhookError and nothing."""
    start = Start(config, Spec(rootfs=options.rootfs), _request(options), options.rootfs, warnings)
    _adapt(config, options, warnings)
    _must_mount()
    trail = audit.Audit(config, NAME, options.rootfs)
    trail.begin(start.request)
    try:
        _apply(options, start, log)
    except NvhookError as error:
        trail.refuse(str(error))
        raise
    trail.grant(start.chosen)


def _apply(options: argparse.Namespace, start: Start, log: CommandLog) -> None:
    place = container.find(options.pid, options.rootfs) if options.pid else container.here(options.rootfs)
    start.choose()
    prestart.prepare(start, place.root)
    try:
        _change(options, start, place, log)
    except BaseException:
        start.take_back()
        raise
    if start.made:
        start.made.keep()


def _change(options: argparse.Namespace, start: Start, place: container.Container, log: CommandLog) -> None:
    nodes = start.nodes()
    start.edits = [edit for edit in start.edits if not _is_left_out(options, edit)]
    for edit in start.edits if log else ():
        log.write("info", plan.sentence(edit.describe()))
    if nodes and not options.pid and not options.no_cgroups:
        what = "the device cgroup is the caller's own without --pid, and stays as it is"
        start.warnings.append(f"{what}; say --no-cgroups")
    place.lock_root_if_possible(start.config.state_dir)
    with place.lock:
        prestart.change(start, place, nodes if options.pid else [])


def _is_left_out(options: argparse.Namespace, edit: Edit) -> bool:
    if isinstance(edit, Device):
        return bool(options.no_devbind)
    return isinstance(edit, Mount) and containeroptions.is_left_out(options, edit.destination)


def _request(options: argparse.Namespace) -> Request:
    if not os.path.isabs(options.rootfs):
        raise InputError(f"invalid rootfs directory: `{options.rootfs}` is no absolute path")
    return Request(
        containeroptions.devices(options),
        tuple(name for name in configuration.CAPABILITIES if getattr(options, name)),
        containeroptions.requirements(options),
        f"{NAME} configure",
        imex_channels=containeroptions.imex_channels(options),
        mig_rights=containeroptions.mig_rights(options),
    )


def _adapt(config: Config, options: argparse.Namespace, warnings: list[str]) -> None:
    config.no_cgroups = options.no_cgroups
    if options.ldconfig is not None:
        if not options.ldconfig.startswith("@/"):
            raise InputError(
                f"--ldconfig=`{options.ldconfig}` is not a path of the host",
                "write `@` before it; the program of an image is never run",
            )
        config.ldconfig = configuration.ldconfig_program(options.ldconfig[1:])
    modes = set(options.cuda_compat_mode)
    if options.no_cntlibs or "disabled" in modes:
        config.cuda_compat = False
    elif len(modes) > 1:
        raise InputError("only one cuda-compat-mode can be specified at a time")
    elif modes:
        config.cuda_compat = True
    if config.cuda_compat and "mount" in modes:
        text = "--cuda-compat-mode=mount is not honoured by nvhook, which mounts no file of an image"
        warnings.append(f"{text}; `ldconfig` is in force")


def _must_mount() -> None:
    """An ordinary user is told so at once, and not by the first mount."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        effective = next(line for line in file if line.startswith("CapEff:"))
    if not int(effective.split()[1], 16) >> kernel.CAP_SYS_ADMIN & 1:
        raise _PermissionError(
            "`configure` mounts, and this process has no CAP_SYS_ADMIN", "call it as root, or in a user namespace"
        )
