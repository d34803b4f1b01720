# SPDX-License-Identifier: Apache-2.0
"""Manual pages and completion: made from the commands' own words, so that they cannot tell of others."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from containers import REPOSITORY
from nvhook import cli
from nvhook.commands.config import check as configcheck

PAGES = ("nvhook-config.toml.5", "nvhook.1", "nvidia-container-cli.1", "nvidia-container-runtime.8")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _make(tmp_path_factory.mktemp("man"))


def _make(place: Path) -> Path:
    subprocess.run([sys.executable, str(REPOSITORY / "scripts/manpages.py"), str(place)], check=True)
    return place


def _commands() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in cli.make_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


COMMANDS = dict(_commands())


def test_all_pages_are_there(pages: Path) -> None:
    assert tuple(sorted(path.name for path in pages.iterdir())) == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_page_is_a_manual_page(pages: Path, page: str) -> None:
    """Its name and what it is stand where apropos looks, and man finds nothing wrong in it."""
    lines = (pages / page).read_text().splitlines()
    assert lines[0].startswith(".TH ")
    assert " \\- " in lines[lines.index(".SH NAME") + 1]
    if not shutil.which("groff"):
        return
    command = ["groff", "-man", "-Tutf8", "-ww", "-rLL=160n", str(pages / page)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_page_has_every_command_and_option(pages: Path, name: str) -> None:
    text = (pages / "nvhook.1").read_text().replace("\\", "")
    assert f"nvhook {name}" in text
    for action in COMMANDS[name]._actions:
        for option in action.option_strings:
            assert option == "-h" or option in text or option == "--help"


def test_page_has_every_key_of_the_configuration(pages: Path) -> None:
    text = (pages / "nvhook-config.toml.5").read_text().replace("\\", "")
    keys = configcheck.keys(json.loads(Path(configcheck.SCHEMA).read_text()))
    assert [key for key in keys if f".B {key}\n" not in text] == []


def test_pages_are_the_same_twice(pages: Path, tmp_path: Path) -> None:
    _make(tmp_path)
    assert [(tmp_path / page).read_bytes() for page in PAGES] == [(pages / page).read_bytes() for page in PAGES]


def test_bash_completes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "bash"], "/nonexistent") == 0
    script = capsys.readouterr().out + 'COMP_WORDS=(nvhook d); COMP_CWORD=1; COMP_LINE="nvhook d"; COMP_POINT=8\n'
    script += '_shtab_nvhook; printf "%s\\n" "${COMPREPLY[@]}"\n'
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "doctor\n"
