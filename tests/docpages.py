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
_SHELL = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_ANYTHING = "..."


def check(page: str, host: Path, substitutions: Mapping[str, str], commands: Mapping[str, str] | None = None) -> None:
    """Assert that docs/`page` is true on `host`.

    substitutions   what is printed here -> what the page has for it
    commands        what the page has in a command -> what is run here in its place
    """
    examples = _examples((REPOSITORY / "docs" / page).read_text())
    assert examples, f"docs/{page} has no block of ```console"
    for command, expected in examples:
        words = command
        for theirs, ours in (commands or {}).items():
            words = words.replace(theirs, ours)
        printed = _run(words, host)
        for ours, theirs in substitutions.items():
            printed = printed.replace(ours, theirs)
        form = ".*".join(re.escape(part) for part in _words(expected).split(f"\n{_ANYTHING}\n"))
        shown = f"docs/{page}: `{command}` prints\n{printed}"
        assert re.fullmatch(form, _words(printed), re.DOTALL), shown


def _examples(text: str) -> list[tuple[str, str]]:
    """(command, output) in the order of the page."""
    parts = ["\n" + block for block in _BLOCK.findall(text)]
    assert [part for part in parts if not part.startswith("\n$ ")] == [], "a block begins with a command"
    found = [example.partition("\n") for part in parts for example in part.split("\n$ ")[1:]]
    return [(command, output) for command, _, output in found]


def shell_commands(page: Path) -> list[str]:
    """Those of the blocks ```sh, which no simulated host can run: without what is said beside them."""
    text = "".join(_SHELL.findall(page.read_text())).replace("\\\n", " ")
    lines = [" ".join(re.sub(r"(^|\s)# .*", "", line).split()) for line in text.splitlines()]
    return [line for line in lines if line]


def bare_blocks(page: Path) -> list[str]:
    """The first lines of blocks that are indented, so that nobody can tell commands from output in them."""
    prose = _FENCED.sub("", page.read_text())
    return re.findall(r"\n\n    (\S.*)", prose)


def _words(text: str) -> str:
    """With a newline on both ends, so that `...` may be the first or the last line."""
    return "\n" + "".join(" ".join(line.split()) + "\n" for line in text.strip().splitlines())


def _run(command: str, host: Path) -> str:
    environment = {"PATH": f"{REPOSITORY}/scripts:{os.environ['PATH']}", "NVHOOK_CONFIG": f"{host}/config.toml"}
    done = subprocess.run(
        ["sh", "-c", command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.stdout


# For pages whose blocks need a host of their own each, and hold to the letter

# (text of the page, what it stands for on this machine); an empty text is left out of the output alone
Substitutions = list[tuple[str, str]]


def blocks(page: Path) -> list[str]:
    return _BLOCK.findall(page.read_text())


def play(block: str, substitutions: Substitutions, env: dict[str, str]) -> str:
    """The block as it is here: its commands (`$ …`, or `# …` for root), each with what it prints on both streams."""
    shown = ""
    for line in block.splitlines():
        if not line.startswith(("$ ", "# ")):
            continue
        command = line[2:]
        for text, here in substitutions:
            command = command.replace(text, here) if text else command
        words = ["sh", "-c", f"exec 2>&1; {command}"]
        output = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60, check=False).stdout
        for text, here in substitutions:
            output = output.replace(here, text)
        shown += f"{line}\n{output}"
    return shown
