# SPDX-License-Identifier: Apache-2.0
"""The pages of docs/ as tests: every command in a ```console block is run, and prints what the page says."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)

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
