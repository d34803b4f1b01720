# SPDX-License-Identifier: Apache-2.0
"""The pages: what they show is what is printed, what they link to is there, and the site is built of all of them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import docpages
from containers import REPOSITORY, Workshop, make_image

DOCS = REPOSITORY / "docs"
# Pages with ```console blocks -> the test that runs them.
RUN_BY = {
    "cdi.md": "tests/test_cdi.py",
    "configure.md": "tests/test_docs.py",
    "doctor.md": "tests/test_doctor.py",
    "explain.md": "tests/test_explain.py",
    "info.md": "tests/test_info.py",
    "list.md": "tests/test_listing.py",
    "nvidia-container-cli.md": "tests/test_containercli.py",
    "plan.md": "tests/test_docs.py",
    "upgrades.md": "tests/test_docs.py",
}
SHOWN = sorted(page.name for page in DOCS.glob("*.md") if "```console" in page.read_text())


def _nav(items: list[object]) -> list[str]:
    found = []
    for item in items:
        for value in item.values() if isinstance(item, dict) else [item]:
            found += _nav(value) if isinstance(value, list) else [str(value)]
    return found


def test_every_page_that_shows_output_is_run() -> None:
    assert sorted(RUN_BY) == SHOWN
    for page, test in RUN_BY.items():
        assert page in (REPOSITORY / test).read_text()


def test_every_page_is_in_the_site() -> None:
    nav = _nav(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"])
    assert sorted(nav) == sorted(page.name for page in DOCS.glob("*.md"))


def test_site_is_built(tmp_path: Path) -> None:
    """Strictly: a link that leads nowhere is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site/troubleshooting/index.html").exists()


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (REPOSITORY / "README.md").read_text())
    assert len(links) > 10
    assert [link for link in links if "://" not in link and not (REPOSITORY / link).exists()] == []


def test_readme_claims_what_tests_show() -> None:
    table = (REPOSITORY / "README.md").read_text().partition("| shown by |")[2].partition("\n## ")[0]
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", table)
    assert len(named) >= table.count("\n| ")
    for path, function in named:
        assert f"\ndef {function}(" in (REPOSITORY / path).read_text()


def test_configuration_page_is_the_schema_s() -> None:
    command = [sys.executable, str(REPOSITORY / "scripts/configuration.py")]
    made = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert (DOCS / "configuration.md").read_text() == made


@pytest.mark.root
def test_plan_page(simhost: Callable[[str], Path], tmp_path: Path) -> None:
    host = simhost("a100x2")
    rootfs = make_image("fedora", tmp_path / "rootfs")
    docpages.check("plan.md", host, {f"{host}/driver": ""}, {"/srv/rootfs": str(rootfs)})


@pytest.mark.root
def test_configure_page(simhost: Callable[[str], Path], tmp_path: Path) -> None:
    runtime = tmp_path / "nvidia-container-runtime"
    runtime.write_text("#!/bin/sh\n")
    runtime.chmod(0o755)
    config = tmp_path / "config.toml"
    config.write_bytes((REPOSITORY / "etc/config.toml").read_bytes())
    places = {
        "/etc/docker/daemon.json": f"{tmp_path}/daemon.json",
        "/usr/local/bin/nvidia-container-runtime": str(runtime),
        "/etc/nvidia-container-runtime/config.toml": str(config),
    }
    docpages.check("configure.md", simhost("a100x2"), {ours: page for page, ours in places.items()}, places)


@pytest.mark.root
def test_upgrades_page(simhost: Callable[[str], Path], tmp_path: Path) -> None:
    host, _ = Workshop(tmp_path, simhost).copy_of("a100x2")
    docpages.check("upgrades.md", host, {str(host): ""})
