# SPDX-License-Identifier: Apache-2.0
"""The command `nvhook`, for people and their scripts. It looks and explains; only the hook changes a container,
and only `configure` the host."""

from __future__ import annotations

import argparse
import json
import os
import sys

from . import (
    caps,
    compat,
    configure,
    container,
    dri,
    features,
    host,
    inventory,
    plan,
    procfs,
    request,
    selection,
    sockets,
    spec,
)
from . import config as configuration
from .errors import NvhookError, SpecError, one_line, reason
from .linux.root import DIRECTORY, Root
from .version import VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .config import Config
    from .edits import Edit


def main(arguments: list[str], default_config: str) -> int:
    """0 done, 1 an error on stderr, 2 usage."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not hasattr(options, "command"):
        parser.print_help(sys.stderr)
        return 2
    chosen = os.environ.get("NVHOOK_CONFIG")
    if options.command is None:  # `config check`: what does not load is what it is for
        from . import configcheck  # jsonschema, for this command alone

        named = options.file or chosen
        return configcheck.run(named or default_config, must_exist=bool(named))
    warnings: list[str] = []
    try:
        config = configuration.load(chosen or default_config, must_exist=bool(chosen))
        warnings += config.warnings
        options.nvhook_config = chosen or default_config
        options.command(options, config, warnings)
        return 0
    except NvhookError as error:
        print(f"nvhook: {error}", file=sys.stderr)
        return 1
    finally:
        for warning in warnings:
            print(f"nvhook: warning: {warning}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nvhook", description="NVIDIA GPUs for OCI containers.")
    parser.add_argument("--version", action="version", version=f"nvhook {VERSION}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    planning = commands.add_parser(
        "plan",
        help="what a container would get; nothing is touched",
        description="Print what a container would get. Nothing is touched, neither in the container nor on the host.",
        epilog="nvhook plan --env NVIDIA_VISIBLE_DEVICES=all --rootfs /var/lib/machines/debian",
    )
    which = planning.add_mutually_exclusive_group(required=True)
    which.add_argument("--bundle", metavar="DIR", help="an OCI bundle, with its config.json")
    which.add_argument("--rootfs", metavar="DIR", help="a root filesystem; with --env for the request")
    planning.add_argument(
        "--env", metavar="K=V", action="append", default=[], help="an environment variable of the container; repeatable"
    )
    planning.add_argument("--json", action="store_true", help="one JSON object, for programs")
    planning.set_defaults(command=_plan)
    configuring = commands.add_parser(
        "configure",
        help="register the runtime in a container engine",
        description="Register the runtime in a container engine's configuration; the change is shown as a diff.",
        epilog="nvhook configure docker --set-as-default --restart",
    )
    configure.add_arguments(configuring)
    configuring.set_defaults(command=configure.run)
    about_config = commands.add_parser("config", help="look at config.toml", description="Look at config.toml.")
    actions = about_config.add_subparsers(title="actions", metavar="ACTION", required=True)
    checking = actions.add_parser(
        "check",
        help="what is wrong in config.toml, line by line",
        description="Print what is wrong in config.toml, line by line, or ok. Exit 1 if no container would start.",
    )
    checking.add_argument("file", metavar="FILE", nargs="?", default="", help="another file than the one in use")
    checking.set_defaults(command=None)
    return parser


def _plan(options: argparse.Namespace, config: Config, warnings: list[str]) -> None:
    described = _described(options)
    asked = request.read(described, config, warnings)
    if asked is None:
        document: dict[str, object] = {"request": None, "driver": None, "gpus": [], "edits": []}
        _print(document, [], as_json=options.json)
        return
    gpus = host.read(config, asked, warnings, modprobe="")  # nothing is touched
    chosen = selection.choose(config, asked, gpus, warnings, keep=False)
    found = inventory.load(config, gpus.driver_version, warnings, keep=False)
    root = _root(described.rootfs)
    edits = plan.make(
        asked,
        chosen.gpus,
        gpus,
        found,
        container.layout(root),
        dri_nodes=dri.find(config, asked, chosen.gpus),
        sockets=sockets.find(config.driver_root),
        proc=procfs.read(config.proc_root),
        extras=[caps.find(config, asked, chosen, gpus), features.find(config, asked, warnings)],
        compat=compat.find(config, asked, root, gpus.driver_version, chosen.brands, warnings),
    )
    document = {
        "request": asked.describe(),
        "driver": {"version": found.version},
        "gpus": [gpu.describe() for gpu in chosen.gpus],
        **({"mig_devices": [item.describe() for item in chosen.migs]} if chosen.migs else {}),
        "edits": [edit.describe() for edit in edits],
    }
    _print(document, edits, as_json=options.json)


def _described(options: argparse.Namespace) -> spec.Spec:
    if options.bundle:
        if options.env:
            raise SpecError("--env goes with --rootfs; a bundle brings its own environment")
        return spec.parse(spec.read_config(options.bundle)[0], options.bundle)
    env = {}
    for item in options.env:
        name, equals, value = item.partition("=")
        if not name or not equals:
            raise SpecError(f"--env `{item}` is not of the form NAME=VALUE")
        env[name] = value
    rootfs = os.path.abspath(options.rootfs)
    return spec.Spec(env=env, mounts=[], annotations={}, privileged=False, rootfs=rootfs, device_rules=[])


def _root(rootfs: str) -> Root:
    try:
        return Root(os.open(rootfs, DIRECTORY))
    except OSError as error:
        raise SpecError(f"open the root filesystem `{rootfs}`: {reason(error)}") from None


def _print(document: dict[str, object], edits: list[Edit], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(document, indent=2))
    elif document["request"] is None:
        print("This container asks for no GPU: nothing is done to it.")
    else:
        for edit in edits:
            print(one_line(_sentence(edit.describe())))  # a directory of the linker cache is named by the image


def _sentence(edit: dict[str, object]) -> str:
    """One line for people: the kind, the place in the container, and what comes there."""
    kind = edit["kind"]
    if kind == "mount":
        return f"mount    {edit['destination']}  from {edit['source']}"
    if kind == "device":
        return f"device   {edit['path']}  {edit['type']} {edit['major']}:{edit['minor']} {edit['access']}"
    if kind == "symlink":
        return f"symlink  {edit['path']}  to {edit['target']}"
    if kind == "file":
        return f"file     {edit['path']}"
    return f"ldcache  {' '.join(map(str, edit['directories']))}"  # type: ignore[call-overload]
