# SPDX-License-Identifier: Apache-2.0
"""The bill of materials names what is bundled, as requirements.txt pins it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from containers import REPOSITORY


def _made(place: Path) -> Path:
    command = [sys.executable, str(REPOSITORY / "scripts/sbom.py"), str(place)]
    return Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())


def test_components_are_what_is_pinned(tmp_path: Path) -> None:
    made = json.loads(_made(tmp_path).read_text())
    assert (made["bomFormat"], made["specVersion"]) == ("CycloneDX", "1.5")
    pins = (REPOSITORY / "requirements.txt").read_text().partition("# tools")[0]
    wanted = dict(re.findall(r"^([a-z0-9-]+)==([\w.]+)", pins, re.MULTILINE))
    found = {item["name"]: item["version"] for item in made["components"]}
    assert {name: wanted[name] for name in found} == found
    assert set(wanted) - set(found) <= {"tomli"}  # for Python 3.10 alone
    assert all(item["purl"] == f"pkg:pypi/{item['name']}@{item['version']}" for item in made["components"])
    assert [item["name"] for item in made["components"] if not item.get("licenses")] == []


def test_same_bytes_twice(tmp_path: Path) -> None:
    assert _made(tmp_path / "a").read_bytes() == _made(tmp_path / "b").read_bytes()
