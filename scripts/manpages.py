#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""manpages.py DIR: write the manual pages there, run by the Python of .venv.

nvhook(1) and nvidia-container-cli(1) are made from the commands' own parsers, nvhook-config.toml(5) from the schema
that `nvhook config check` uses, and nvidia-container-runtime(8) is in docs/man/.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY / "hook")]

from argparse_manpage.manpage import Manpage  # noqa: E402

from nvhook import cli  # noqa: E402
from nvhook.commands.config import check as configcheck  # noqa: E402
from nvhook.commands.containercli import options as containeroptions  # noqa: E402
from nvhook.version import VERSION  # noqa: E402


def of_parser(parser: argparse.ArgumentParser) -> str:
    page = Manpage(parser, format="single-commands-section")
    page.date = ""  # the same source gives the same bytes
    page.source = f"nvhook {VERSION}"
    page.manual = "nvhook"
    page.description = parser.description
    page.add_section("see also", ">", "nvidia-container-runtime(8), nvhook-config.toml(5)")
    return str(page)


def of_schema() -> str:
    schema = json.loads(Path(configcheck.SCHEMA).read_text())
    lines = [
        '.TH NVHOOK-CONFIG.TOML 5 "" nvhook "File formats"',
        ".SH NAME",
        "nvhook\\-config.toml \\- the configuration of nvidia\\-container\\-runtime",
        ".SH DESCRIPTION",
        _roff(
            "/etc/nvidia-container-runtime/config.toml holds NVIDIA's keys and the table [nvhook]. What is not in it"
        ),
        _roff("has its default. `nvhook config check` says what is wrong in it."),
        ".SH KEYS",
    ]
    for key, (_, about) in configcheck.keys(schema).items():
        lines += [".TP", f".B {_roff(key)}", _roff(about["description"])]
    return "\n".join([*lines, ".SH SEE ALSO", ".BR nvidia-container-runtime (8)", ""])


def _roff(text: str) -> str:
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped


def main() -> None:
    place = Path(sys.argv[1])
    place.mkdir(parents=True, exist_ok=True)
    (place / "nvhook.1").write_text(of_parser(cli.make_parser()))
    (place / "nvidia-container-cli.1").write_text(of_parser(containeroptions.make_parser(str)))
    (place / "nvhook-config.toml.5").write_text(of_schema())
    for page in sorted((REPOSITORY / "docs/man").glob("*.[1-8]")):
        shutil.copy(page, place / page.name)


if __name__ == "__main__":
    main()
