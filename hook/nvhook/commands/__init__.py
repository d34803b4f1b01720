# SPDX-License-Identifier: Apache-2.0
"""The commands of `nvhook`, for people and their scripts: one module for each, and what they are made of.

A command's module has `add`, which makes its parser, and `run`, which returns the exit status. What is slow to import
(jsonschema, rich, tomlkit) is imported by the function that needs it: all modules are loaded for `--help`.
"""

from __future__ import annotations

import os
import shutil
import sys

from nvhook.request import config as configuration

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from nvhook.request.config import Config

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def load(options: argparse.Namespace, warnings: list[str]) -> Config:
    """The config.toml in use, which NVHOOK_CONFIG may have named; ConfigError."""
    config = configuration.load(options.config_path, must_exist=options.config_must_exist)
    warnings += config.warnings
    return config


def program(name: str, chosen: str) -> str:
    """The absolute path of `chosen`, if given, or of the program `name`: the one that is installed together with this
    command, for that one belongs to it, else the one on PATH. Empty where there is none."""
    beside = os.path.join(os.path.dirname(os.path.realpath(sys.argv[0])), name)
    for path in [chosen] if chosen else [beside, shutil.which(name) or ""]:
        if path and os.path.isfile(path) and os.access(path, os.X_OK):
            return os.path.abspath(path)
    return ""
