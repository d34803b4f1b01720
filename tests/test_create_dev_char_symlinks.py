# SPDX-License-Identifier: Apache-2.0
"""commands/devchar.py: the links that systemd needs, and nobody's changed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from containers import configure
from nvhook import cli

pytestmark = pytest.mark.root

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run(simhost: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    settings = configure(simhost("a100x2"), tmp_path / "config.toml", tmp_path / "state")
    monkeypatch.setenv("NVHOOK_CONFIG", str(settings))
    place = str(tmp_path / "char")
    return lambda *words: cli.main(["create-dev-char-symlinks", "--dev-char-path", place, *words], "/nonexistent")


def _links(place: Path) -> dict[str, str]:
    return {path.name: path.resolve().name for path in place.iterdir()}


def test_every_node_of_the_driver_has_a_link(
    run: Callable[..., int], tmp_path: Path, simhost: Callable[[str], Path]
) -> None:
    assert run() == 0
    dev = simhost("a100x2") / "dev"
    links = _links(tmp_path / "char")
    assert links["195:0"] == "nvidia0"
    assert links["195:255"] == "nvidiactl"
    paths = [path for path in [*dev.glob("nvidia*"), *dev.glob("nvidia-caps/*")] if not path.is_dir()]
    assert len(links) == len(paths) > 5
    for path in paths:
        number = path.stat().st_rdev
        assert os.path.samefile(tmp_path / "char" / f"{os.major(number)}:{os.minor(number)}", path)


def test_twice_is_once(run: Callable[..., int], capsys: Capture) -> None:
    run()
    capsys.readouterr()
    assert run() == 0
    assert capsys.readouterr() == ("", "")


def test_dry_run_makes_nothing(run: Callable[..., int], tmp_path: Path, capsys: Capture) -> None:
    assert run("--dry-run") == 0
    assert f"{tmp_path}/char/195:0 -> " in capsys.readouterr().out
    assert not (tmp_path / "char").exists()


def test_link_that_leads_elsewhere_stays(run: Callable[..., int], tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "char").mkdir()
    (tmp_path / "char/195:0").symlink_to("../null")
    assert run() == 0
    assert "195:0` leads to another place than `" in capsys.readouterr().err
    assert os.readlink(tmp_path / "char/195:0") == "../null"


def test_directory_that_cannot_be_made(run: Callable[..., int], tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "char").write_text("")
    assert run() == 1
    assert capsys.readouterr().err.endswith("; run it as root\n")


def test_nodes_that_may_be_made_later(
    run: Callable[..., int], tmp_path: Path, simhost: Callable[[str], Path], capsys: Capture
) -> None:
    """Each node of the host, and one for every MIG instance that there could be."""
    assert run("--create-all") == 0
    links = _links(tmp_path / "char")
    minors = simhost("a100x2") / "proc/driver/nvidia-caps/mig-minors"
    count = len(minors.read_text().splitlines())
    assert count == 20
    assert len([name for name in links if name.startswith("236:")]) == count
    assert links["236:14"] == "nvidia-cap14"
    assert {name for name in links if not name.startswith("236:")} == {
        *("195:0", "195:1", "195:254", "195:255", "511:0", "511:1")
    }
    assert capsys.readouterr() == (f"26 links made in {tmp_path}/char\n", "")
    assert run("--create-all") == 0
    assert capsys.readouterr() == ("", "")


def test_nodes_that_may_be_made_later_without_a_driver(
    simhost: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = configure(simhost("no-driver"), tmp_path / "config.toml", tmp_path / "state")
    monkeypatch.setenv("NVHOOK_CONFIG", str(settings))
    words = ["create-dev-char-symlinks", "--create-all", "--dev-char-path", str(tmp_path / "char")]
    assert cli.main(words, "/nonexistent") == 0
    assert not (tmp_path / "char").exists()
