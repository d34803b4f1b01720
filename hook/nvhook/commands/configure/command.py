# SPDX-License-Identifier: Apache-2.0
"""`nvhook configure`: registers the runtime in an engine's configuration, and takes it out again.

What is said to which engine is in engines.py, how a file is changed in changes.py. Here is what the user sees of it.
"""

from __future__ import annotations

import argparse
import os
import re
import sys

from nvhook.commands import load, program
from nvhook.commands.configure import changes
from nvhook.commands.configure.engines import ENGINES, SWARM_VARIABLE, EngineOptions
from nvhook.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nvhook.commands import Subparsers
    from nvhook.commands.configure.engines import Engine
    from nvhook.request.config import Config

_RUNTIME = "nvidia-container-runtime"
_COLOURS = {"+": "\033[32m", "-": "\033[31m", "@": "\033[36m"}


def add(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "configure",
        help="register the runtime in a container engine",
        description="Register the runtime in a container engine's configuration; the change is shown as a diff.",
        epilog="nvhook configure docker --set-as-default --restart",
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--set-as-default", action="store_true", help="make it the default runtime")
    common.add_argument("--cdi", action="store_true", help="let the engine take CDI devices")
    common.add_argument("--dry-run", action="store_true", help="show the change and write nothing")
    common.add_argument("--remove", action="store_true", help="undo what configure has done")
    common.add_argument("--restart", action="store_true", help="restart the engine afterwards; never unasked")
    common.add_argument("--config-file", metavar="PATH", default="", help="the engine's configuration, if elsewhere")
    common.add_argument("--runtime-name", metavar="NAME", default="nvidia", help="what --runtime calls it (nvidia)")
    common.add_argument("--runtime-path", metavar="PATH", default="", help=f"{_RUNTIME}, if it is not beside nvhook")
    engines = parser.add_subparsers(title="engines", metavar="ENGINE", dest="engine", required=True)
    for engine in ENGINES.values():
        about = f"{engine.title}: {engine.default_file}"
        chosen = engines.add_parser(engine.name, parents=[common], help=about, description=about)
        if engine.name == "docker":
            chosen.add_argument("--swarm-resource", action="store_true", help="announce this node's GPUs to Swarm")
    parser.set_defaults(run=run, swarm_resource=False)


def run(options: argparse.Namespace, warnings: list[str]) -> int:
    engine = ENGINES[options.engine]
    wanted = _wanted(options, load(options, warnings), engine)
    files = engine.unset(wanted) if options.remove else engine.set(wanted)
    warnings += wanted.warnings
    changed = [file for file in files if file.is_changed]
    for file in changed:
        _show(file.diff())
    if not changed:
        print(f"`{files[0].name}`: nothing to change")
    if options.dry_run:
        return 0
    changes.save(files)
    if wanted.swarm_resource and changed:
        print(
            f"Swarm gives a task its GPUs in {SWARM_VARIABLE}: `swarm-resource` in `{wanted.nvhook_config}` names it."
        )
    if options.restart:
        _restart(engine)
    elif changed and engine.unit:
        print(f"{engine.title} reads it when it starts: systemctl restart {engine.unit}")
    return 0


def _wanted(options: argparse.Namespace, config: Config, engine: Engine) -> EngineOptions:
    name: str = options.runtime_name
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_.-]*", name) or name in ("runc", "crun"):
        raise ConfigError(f"`{name}` is no name for our runtime", "`nvidia` is the usual one")
    if not options.config_file and not options.remove and not engine.is_installed():
        raise ConfigError(
            f"{engine.title} is not installed: no `{engine.signs[0]}` on the PATH, and no `{engine.signs[-1]}`",
            "install it first, or name its configuration with --config-file",
        )
    return EngineOptions(
        config=config,
        nvhook_config=options.config_path,
        runtime_name=name,
        runtime_path=runtime_path(options.runtime_path, must_exist=not options.remove),
        config_file=options.config_file,
        set_as_default=options.set_as_default,
        cdi=options.cdi,
        swarm_resource=options.swarm_resource,
    )


def runtime_path(chosen: str, *, must_exist: bool) -> str:
    found = program(_RUNTIME, chosen)
    if found:
        return found
    if not must_exist:
        return os.path.abspath(chosen) if chosen else ""
    missing = "is not executable" if chosen and os.path.isfile(chosen) else "no such program"
    raise ConfigError(
        f"find the runtime `{chosen or _RUNTIME}`: {missing}",
        "install nvhook, or name the program with --runtime-path",
    )


def _show(lines: list[str]) -> None:
    coloured = sys.stdout.isatty()
    for line in lines:
        text = line.rstrip("\n")
        colour = _COLOURS.get(text[:1], "") if coloured else ""
        print(f"{colour}{text}\033[0m" if colour else text)
        if not line.endswith("\n"):
            print("\\ No newline at end of file")


def _restart(engine: Engine) -> None:
    import subprocess

    if not engine.unit:
        print(f"{engine.title} has no daemon: there is nothing to restart.")
        return
    command = ["systemctl", "restart", engine.unit]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    except OSError:
        raise ConfigError("run `systemctl`: not found", f"restart {engine.title} as this host does it") from None
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[0]
        raise ConfigError(f"`{' '.join(command)}`: {why}", f"see `journalctl -u {engine.unit}`")
    print(f"{engine.title} has been restarted.")
