# SPDX-License-Identifier: Apache-2.0
"""Which files containerd reads, as its own loader has it: cmd/containerd/server/config."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nvhook.commands import containerdfiles
from nvhook.commands.configure.documents import Toml, merged
from nvhook.linux.root import DIRECTORY, Root


def _read(place: Path, name: str) -> Toml:
    return Toml((place / name.lstrip("/")).read_text(), name)


@pytest.mark.parametrize(
    ("imports", "expected"),
    [
        pytest.param("['b.toml']", ["/etc/b.toml", "/etc/a.toml"], id="relative"),
        pytest.param(
            "['/etc/d/1.toml', './b.toml']", ["/etc/d/1.toml", "/etc/b.toml", "/etc/a.toml"], id="in-their-order"
        ),
        pytest.param("['/etc/b.toml', 'd/../b.toml']", ["/etc/b.toml", "/etc/a.toml"], id="once"),
        pytest.param("['d/*.toml']", ["/etc/d/.3.toml", "/etc/d/1.toml", "/etc/d/2.toml"], id="star"),
        pytest.param("['d/*']", ["/etc/d/.3.toml", "/etc/d/1.toml", "/etc/d/2.toml"], id="star-alone"),
        pytest.param("['*/1.toml']", ["/etc/d/1.toml"], id="star-in-a-directory"),
        pytest.param("['*.toml']", ["/etc/a.toml", "/etc/b.toml"], id="star-in-one-directory"),
        pytest.param("['d/[12].toml']", [], id="no-pattern-without-a-star"),
        pytest.param("['none.toml', 'none/*.toml', \"\\u0000\", 7]", [], id="not-there"),
        pytest.param("'b.toml'", [], id="no-list"),
    ],
)
def test_imports(tmp_path: Path, imports: str, expected: list[str]) -> None:
    files = {"a.toml": "", "b.toml": "imports = ['a.toml']\nx = 2", "d/2.toml": "", "d/1.toml": "", "d/.3.toml": ""}
    for name, text in {**files, "main": f"imports = {imports}\nx = 1"}.items():
        (tmp_path / "etc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "etc" / name).write_text(text)
    root = Root(os.open(tmp_path, DIRECTORY))
    main = _read(tmp_path, "/etc/main")
    found = list(containerdfiles.in_order(root, main, lambda name: _read(tmp_path, name)))
    os.close(root.fd)
    assert [document.name for document in found] == ["/etc/main", *expected]
    assert merged(found)["x"] == (2 if "/etc/b.toml" in expected else 1)


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("/etc/containerd/conf.d/99-nvhook.toml", "/etc/containerd/conf.d/*.toml", True),
        ("/etc/containerd/conf.d/99-nvhook.toml", "/etc/containerd/*/99*", True),
        ("/etc/containerd/conf.d/99-nvhook.toml", "/etc/containerd/*.toml", False),
        ("/etc/containerd/a1.toml", "/etc/containerd/a[1].toml", False),
        ("/etc/containerd/a1.toml", "/etc/containerd/a1.toml", True),
    ],
)
def test_matches(name: str, pattern: str, expected: bool) -> None:
    assert containerdfiles.matches(name, pattern) == expected
