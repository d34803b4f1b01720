# SPDX-License-Identifier: Apache-2.0
"""`nvhook completion`: what a shell reads to complete the command's words. The installation puts it in its place."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from nvhook.commands import Subparsers

_SHELLS = ("bash", "zsh")


def add(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "completion",
        help="print a shell completion script",
        description="Print what a shell reads to complete nvhook's words; `make install` has put it in its place.",
        epilog='eval "$(nvhook completion bash)"',
    )
    parser.add_argument("shell", metavar="SHELL", choices=_SHELLS, help=" or ".join(_SHELLS))
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, warnings: list[str]) -> int:  # noqa: ARG001 - there are none
    import shtab

    print(shtab.complete(options.parser, options.shell))
    return 0
