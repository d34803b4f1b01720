# SPDX-License-Identifier: Apache-2.0
"""`nvhook info`: the host, its GPUs and who uses them at this moment, for people or as JSON; `--watch` does it again
and again. What there is to know is overview.py's."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from typing import TYPE_CHECKING

from nvhook.commands import load, terminal
from nvhook.commands.info import overview
from nvhook.errors import one_line

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from nvhook.commands import Subparsers
    from nvhook.commands.info.overview import Overview
    from nvhook.request.config import Config

_PERIOD = 2.0  # seconds
_SHORTEST, _LONGEST = 0.1, 86400.0
_KINDS = {"linux": "Linux", "wsl2": "WSL 2"}


def add(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "info",
        help="the host's driver and GPUs, and who uses them",
        description="Show the driver, the GPUs and MIG devices with their memory, load and temperature, the processes "
        "that have a GPU open with their containers, and what is missing. Nothing is touched. A host without a GPU is "
        "an answer as well: exit status 0.",
        epilog="examples:\n"
        "  nvhook info\n"
        "  nvhook info --watch 5\n"
        "  nvhook info --json | jq -r '.gpus[] | [.index, .name, .memory_used] | @tsv'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="one JSON object, for programs; one a line with --watch")
    parser.add_argument(
        "--watch",
        metavar="SECONDS",
        type=_period,
        nargs="?",
        const=_PERIOD,
        help=f"again and again until Ctrl-C, every {_PERIOD:g} seconds if not said otherwise",
    )
    parser.set_defaults(run=run)


def _period(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"`{text}` is no number of seconds") from None
    if not _SHORTEST <= seconds <= _LONGEST:
        raise argparse.ArgumentTypeError(f"{text} is not between {_SHORTEST:g} and {_LONGEST:g} seconds")
    return seconds


def run(options: argparse.Namespace, warnings: list[str]) -> int:
    config = load(options, warnings)
    shown = terminal.console()
    if options.watch:
        with contextlib.suppress(KeyboardInterrupt):
            _watch(shown, config, warnings, options.watch, as_json=options.json)
        return 0
    with terminal.waiting("Asking the driver about its GPUs ..."):
        made = overview.make(config, warnings)
    if options.json:
        shown.print(json.dumps(made.describe(), indent=2), soft_wrap=True)
    else:
        shown.print(_rendered(made))
    return 0


def _watch(shown: Console, config: Config, warnings: list[str], seconds: float, *, as_json: bool) -> None:
    """Until it is interrupted: on a terminal in place, elsewhere one report below the other."""
    from rich.live import Live

    with terminal.waiting("Asking the driver about its GPUs ..."):
        made = overview.make(config, warnings)
    is_live = terminal.is_interactive(shown) and not as_json
    with Live(console=shown, auto_refresh=False) if is_live else contextlib.nullcontext() as live:
        while True:
            if live:
                live.update(_rendered(made, warnings), refresh=True)
            elif as_json:
                shown.print(json.dumps(made.describe()), soft_wrap=True)
            else:
                shown.print(time.strftime("%Y-%m-%d %H:%M:%S"), _rendered(made), "", sep="\n")
            time.sleep(seconds)
            again: list[str] = []
            made = overview.make(config, again, made.files)
            warnings += [warning for warning in again if warning not in warnings]


def _rendered(made: Overview, warnings: list[str] | None = None) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    if made.kind != "none":
        parts.append(Text(_headline(made)))
    for section in (_gpus(made), _names(made), _migs(made), _processes(made)):
        if section:
            parts += ["", section]
    if made.missing:
        parts += [""] * bool(parts) + [Text(one_line(text[:1].upper() + text[1:]) + ".") for text in made.missing]
    parts += [Text(one_line(f"warning: {warning}"), style="yellow") for warning in warnings or ()]
    return Group(*parts)


def _headline(made: Overview) -> str:
    module = f" ({made.module} kernel module)" if made.module else ""
    cuda = f", CUDA {made.cuda}" if made.cuda else ""
    return one_line(f"{_KINDS[made.kind]}, driver {made.version}{module}{cuda}")


def _gpus(made: Overview) -> RenderableType | None:
    rows = [
        (
            str(gpu.index),
            gpu.name,
            _memory(gpu.memory_used, gpu.memory_total),
            _number(gpu.load, " %"),
            _number(gpu.temperature, " C"),
            {True: "on", False: "off", None: "-"}[gpu.mig_enabled],
        )
        for gpu in made.gpus
    ]
    return terminal.table((">GPU", "NAME", ">MEMORY (GiB)", ">LOAD", ">TEMP", "MIG"), rows) if rows else None


def _names(made: Overview) -> RenderableType | None:
    """A table of its own, or both would not go into eighty columns."""
    rows = [(str(gpu.index), gpu.uuid, gpu.pci, _number(gpu.minor)) for gpu in made.gpus]
    return terminal.table((">GPU", "UUID", "PCI", ">MINOR"), rows) if rows else None


def _migs(made: Overview) -> RenderableType | None:
    rows = [
        (
            f"{gpu.index}:{_number(item.index)}",
            item.profile or "-",
            _memory(item.memory_used, item.memory_total),
            f"{item.gi}/{item.ci}",
            item.uuid or f"MIG-{gpu.uuid}/{item.gi}/{item.ci}",
        )
        for gpu in made.gpus
        for item in gpu.mig_devices
    ]
    return terminal.table((">MIG", "PROFILE", ">MEMORY (GiB)", ">GI/CI", "UUID"), rows) if rows else None


def _processes(made: Overview) -> RenderableType | None:
    rows = [
        (
            str(item.pid),
            item.name,
            ",".join(map(str, made.indexes(item))) or "-",
            str(item.container or "-"),
        )
        for item in made.processes
    ]
    return terminal.table((">PID", "PROCESS", "GPU", "CONTAINER"), rows) if rows else None


def _memory(used: int | None, total: int | None) -> str:
    if used is None or total is None:
        return "-"
    return f"{used / (1 << 30):.1f} of {total / (1 << 30):.1f}"


def _number(value: int | None, unit: str = "") -> str:
    return "-" if value is None else f"{value}{unit}"
