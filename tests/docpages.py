# SPDX-License-Identifier: Apache-2.0
"""Runs what a page of docs/ shows: every block ```console, against a simulated host.

A line that begins with `$ ` is a command for a shell, with `nvhook` on its PATH; what follows is what it prints on both
streams. A line `...` stands for any lines. How wide columns are depends on what is in them, which differs here, so
words count and the spaces between them do not.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ANYTHING = "..."


def check(page: str, host: Path, substitutions: Mapping[str, str]) -> None:
    """Assert that docs/`page` is true on `host`; `substitutions`: what is printed here -> what the page has for it."""
    examples = _examples((REPOSITORY / "docs" / page).read_text())
    assert examples, f"docs/{page} has no block of ```console"
    for command, expected in examples:
        printed = _run(command, host)
        for ours, theirs in substitutions.items():
            printed = printed.replace(ours, theirs)
        form = ".*".join(re.escape(part) for part in _words(expected).split(f"\n{_ANYTHING}\n"))
        shown = f"docs/{page}: `{command}` prints\n{printed}"
        assert re.fullmatch(form, _words(printed), re.DOTALL), shown


def _examples(text: str) -> list[tuple[str, str]]:
    """(command, output) in the order of the page."""
    parts = ["\n" + block for block in _BLOCK.findall(text)]
    found = [example.partition("\n") for part in parts for example in part.split("\n$ ")[1:]]
    return [(command, output) for command, _, output in found]


def _words(text: str) -> str:
    """With a newline on both ends, so that `...` may be the first or the last line."""
    return "\n" + "".join(" ".join(line.split()) + "\n" for line in text.strip().splitlines())


def _run(command: str, host: Path) -> str:
    environment = {"PATH": f"{REPOSITORY}/scripts:{os.environ['PATH']}", "NVHOOK_CONFIG": f"{host}/config.toml"}
    done = subprocess.run(
        ["sh", "-c", command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.stdout
