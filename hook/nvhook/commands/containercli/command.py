# SPDX-License-Identifier: Apache-2.0
"""The command nvidia-container-cli, for the programs that call NVIDIA's: LXC, enroot, `ctr run --gpus`.

Its options, formats and messages are NVIDIA's (options.py), what is done is what the hook does (configure.py), and
`info` and `list` look at the host (info.py). What a container may ask for is not held against config.toml: whoever
calls this decides for himself. From there come places alone.
"""

from __future__ import annotations

import os
import sys
import time

from nvhook import version as ours
from nvhook.commands.containercli import options as containeroptions
from nvhook.commands.containercli.log import CommandLog
from nvhook.commands.containercli.options import NAME, InputError
from nvhook.errors import NvhookError, one_line
from nvhook.request import config as configuration

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from nvhook.request.config import Config

# NVIDIA's release whose options these are: callers compare it.
_VERSION = "1.17.8"

# Our stages -> NVIDIA's classes of errors, where they differ.
_CLASSES = {"config": "initialization", "driver": "initialization", "request": "input"}


def main(arguments: list[str], default_config: str) -> int:
    """0 done, 1 anything else, with an error on stderr."""
    warnings: list[str] = []
    log = CommandLog(None, warnings)
    try:
        options = containeroptions.parse(arguments, _version)
        os.environ.clear()  # LXC's hook has the variables of an image, and none of them says where a daemon listens
        log = CommandLog(options.debug, warnings)
        config = _settings(options, default_config, warnings)
        if options.command == "configure":
            from nvhook.commands.containercli import configure as containerconfigure

            containerconfigure.configure(options, config, warnings, log)
        else:
            from nvhook.commands.containercli import info as containerinfo

            {"info": containerinfo.info, "list": containerinfo.list_all}[options.command](options, config, warnings)
        return 0
    except NvhookError as error:
        _tell(log, "error", _line(error))
        return 1
    finally:
        for warning in warnings:
            _tell(log, "warning", f"warning: {warning}")


def _line(error: NvhookError) -> str:
    return _CLASSES.get(error.stage, error.stage) + str(error).removeprefix(error.stage)


def _tell(log: CommandLog, level: str, text: str) -> None:
    print(one_line(f"{NAME}: {text}"), file=sys.stderr)
    log.write(level, text)


def _settings(options: argparse.Namespace, default: str, warnings: list[str]) -> Config:
    """config.toml's places, unless an option names others; whether something is done, the options alone say."""
    config = configuration.load(options.config or default, must_exist=bool(options.config))
    root = config.driver_root if options.root is None else _path("--root", options.root)
    cache = config.ldcache if options.ldcache is None else _path("--ldcache", options.ldcache)
    if (root, cache) != (config.driver_root, config.ldcache):
        config.state_dir += f"/{NAME}"  # what is kept for the hook stays good
    config.driver_root, config.ldcache = root, cache
    if options.user is not None:
        config.user = containeroptions.user(options.user)
    config.load_kmods = options.load_kmods
    config.imex_channels_of_host_only |= options.no_create_imex_channels
    if options.no_pivot:
        warnings.append("--no-pivot is not honoured: the linker cache is made behind a pivot_root")
    return config


def _path(option: str, value: str) -> str:
    if not os.path.isabs(value):
        raise InputError(f"invalid argument: {option}=`{value}` is no absolute path")
    return value


def _version(_: object) -> str:
    """NVIDIA's lines; the build is ours, and its date that of the installation."""
    made = time.gmtime(os.stat(ours.__file__).st_mtime)
    python = ".".join(map(str, sys.version_info[:3]))
    lines = {
        "cli-version": _VERSION,
        "lib-version": _VERSION,
        "build date": time.strftime("%Y-%m-%dT%H:%M+00:00", made),
        "build revision": f"nvhook {ours.VERSION}",
        "build compiler": f"python {python}",
        "build platform": os.uname().machine,
        "build flags": "",
    }
    return "".join(f"{name}: {value}".rstrip() + "\n" for name, value in lines.items())
