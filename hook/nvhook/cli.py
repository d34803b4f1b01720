# SPDX-License-Identifier: Apache-2.0
"""The command `nvhook`, for people and their scripts. It looks and explains; only the hook changes a container,
and only `configure` the host."""

from __future__ import annotations

import argparse
import os
import sys

from .commands import completion, create_dev_char_symlinks, plan, refresh
from .commands import list as listing
from .commands.cdi import command as cdi
from .commands.config import check as configcheck
from .commands.configure import command as configure
from .commands.doctor import command as doctor
from .commands.explain import command as explain
from .commands.info import command as info
from .commands.snapshot import command as snapshot
from .errors import NvhookError, one_line
from .version import VERSION

_COMMANDS = (
    info,
    listing,
    plan,
    explain,
    doctor,
    snapshot,
    cdi,
    refresh,
    create_dev_char_symlinks,
    configure,
    configcheck,
    completion,
)  # in the order of --help


def main(arguments: list[str], default_config: str) -> int:
    """0 done, 1 an error on stderr, 2 usage."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if not hasattr(options, "run"):
        parser.print_help(sys.stderr)
        return 2
    chosen = os.environ.get("NVHOOK_CONFIG")
    options.config_path = chosen or default_config
    options.config_must_exist = bool(chosen)
    options.parser = parser  # for `completion`
    warnings: list[str] = []
    try:
        status: int = options.run(options, warnings)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever reads us has seen enough
        return 1
    except NvhookError as error:
        print(f"nvhook: {error}", file=sys.stderr)
        return 1
    finally:
        for warning in warnings:
            print(one_line(f"nvhook: warning: {warning}"), file=sys.stderr)


def console() -> int:
    """For an installation by pip, which has no launcher of ours."""
    return main(sys.argv[1:], "/etc/nvidia-container-runtime/config.toml")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nvhook", description="NVIDIA GPUs for OCI containers.")
    parser.add_argument("--version", action="version", version=f"nvhook {VERSION}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in _COMMANDS:
        command.add(commands)
    return parser
