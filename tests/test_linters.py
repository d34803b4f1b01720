# SPDX-License-Identifier: Apache-2.0
"""The linters and the type checker as tests: pytest is the only command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
CODE = ("hook", "runtime-wrapper", "scripts", "tests")


def _tool(name: str) -> str:
    """Beside the interpreter that runs the tests, where scripts/setup puts it."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        message = f"{name} is not installed beside {sys.executable}"
        if "CI" in os.environ:
            pytest.fail(message, pytrace=False)
        pytest.skip(message)
    return str(path)


def _run(*command: str) -> None:
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"{' '.join(command[1:])}\n{done.stdout}{done.stderr}", pytrace=False)


def test_ruff_check() -> None:
    _run(_tool("ruff"), "check", ".")


def test_ruff_format() -> None:
    _run(_tool("ruff"), "format", "--check", ".")


def test_mypy() -> None:
    _run(_tool("mypy"))


def _is_shell(path: Path) -> bool:
    return path.is_file() and path.read_bytes().startswith(b"#!/bin/sh")


SCRIPTS = sorted(path for room in (*CODE, ".ci") for path in (REPOSITORY / room).rglob("*") if _is_shell(path))


@pytest.mark.parametrize("script", SCRIPTS, ids=[str(path.relative_to(REPOSITORY)) for path in SCRIPTS])
def test_shell_parses(script: Path) -> None:
    _run("sh", "-n", str(script))


def test_shell_scripts_are_found() -> None:
    assert REPOSITORY / "runtime-wrapper/compile" in SCRIPTS
