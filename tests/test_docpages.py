# SPDX-License-Identifier: Apache-2.0
"""docpages.py: a page that is not true has to fail."""

from __future__ import annotations

from pathlib import Path

import pytest

import docpages


@pytest.mark.parametrize(
    ("block", "is_true"),
    [
        pytest.param("$ printf 'one  two\\nthree\\n'\none two\nthree\n", True, id="same"),
        pytest.param("$ echo HOST/x\n/x\n", True, id="substituted"),
        pytest.param("$ echo error >&2\nerror\n", True, id="stderr"),
        pytest.param("$ echo a\na\n\n$ true\n", True, id="two-commands"),
        pytest.param("$ seq 5\n1\n...\n5\n", True, id="shortened"),
        pytest.param("$ seq 5\n...\n5\n", True, id="shortened-at-the-beginning"),
        pytest.param("$ seq 5\n1\n2\n...\n", True, id="shortened-at-the-end"),
        pytest.param("$ echo a\nb\n", False, id="other"),
        pytest.param("$ seq 5\n1\n2\n", False, id="too-short"),
        pytest.param("$ seq 5\n1\n...\n6\n", False, id="shortened-and-other"),
        pytest.param("$ echo abc\na.c\n", False, id="no-pattern"),
        pytest.param("$ echo a\na\n$ echo b\na\n", False, id="second"),
    ],
)
def test_check(tmp_path: Path, block: str, is_true: bool) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# A page\n\n```console\n{block}```\n\n```json\n$ false\n```\n")
    if is_true:
        docpages.check(str(page), tmp_path, {"HOST/": "/"})
        return
    with pytest.raises(AssertionError, match="prints"):
        docpages.check(str(page), tmp_path, {"HOST/": "/"})


def test_check_page_without_an_example(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page\n")
    with pytest.raises(AssertionError, match="no block"):
        docpages.check(str(page), tmp_path, {})


def test_check_block_that_nothing_would_run(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```console\n$ true\n```\n\n```console\n# false\n```\n")
    with pytest.raises(AssertionError, match="begins with a command"):
        docpages.check(str(page), tmp_path, {})


def test_shell_commands(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n```sh\none   --two  # of them\n# three\nfour \\\n    five#6\n```\n\n```\nseven\n```\n")
    assert docpages.shell_commands(page) == ["one --two", "four five#6"]


def test_bare_blocks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n    true\n    false\n\n```\n\n    output\n```\n")
    assert docpages.bare_blocks(page) == ["true"]
