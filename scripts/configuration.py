# SPDX-License-Identifier: Apache-2.0
"""configuration.py: print docs/configuration.md, which is made from the schema that `nvhook config check` uses."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / "hook")]

from nvhook.commands.config import check as configcheck  # noqa: E402

_HEAD = """\
# Configuration

`/etc/nvidia-container-runtime/config.toml` holds NVIDIA's keys, with NVIDIA's defaults, and the table `[nvhook]`. A
key that is missing has its default. Each start reads the file, so you never have to restart anything. If you set a key
that nvhook does not honour, and the setting would matter, a warning names it. `nvhook config check` finds what is wrong
in a file ([configure](configure.md)).

To use another file, set the environment variable `NVHOOK_CONFIG` for the runtime and `nvhook`, or pass the option
`--config` to the hook.

This page is made from the schema: `.venv/bin/python scripts/configuration.py >docs/configuration.md`.
"""
_DEFAULT = re.compile(r' Default: ("[^"]*"|\[.*?\]|[^."\[]+)\.')
_NO_TABLE = "Outside of tables"


def page() -> str:
    keys = configcheck.keys(json.loads(Path(configcheck.SCHEMA).read_text()))
    tables: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for key, (_, about) in keys.items():
        table, _, name = key.rpartition(".")
        tables.setdefault(f"`[{table}]`" if table else _NO_TABLE, []).append((name, about))
    return _HEAD + "".join(line for title, rows in tables.items() for line in _section(title, rows))


def _section(title: str, rows: list[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    """What is honoured comes first."""
    yield f"\n## {title}\n\n| key | default | |\n|---|---|---|\n"
    for name, about in sorted(rows, key=lambda row: not row[1]["honoured"]):
        yield f"| `{name}` | `{json.dumps(about['default'])}` | {_sentence(about)} |\n"


def _sentence(about: dict[str, Any]) -> str:
    """The description without what is in the other columns; that a key is honoured is the rule."""
    text: str = _DEFAULT.sub("", about["description"])
    text = re.sub(r" Honoured: (\w?)", lambda found: f" {found[1].upper()}", text.removesuffix(" Honoured."))
    values = [f"`{json.dumps(value) if isinstance(value, bool) else value}`" for value in about.get("enum", [])]
    if any(value not in text for value in values):
        text += f" One of {', '.join(values)}."
    return text.replace("Not honoured:", "**Not honoured**:")


if __name__ == "__main__":
    sys.stdout.write(page())
