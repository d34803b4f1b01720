# SPDX-License-Identifier: Apache-2.0
"""The plain reader says what tomllib says, or nothing."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import HOSTS
from nvhook.formats import plaintoml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Pieces that lines of configuration files are made of, and that they are made wrong with.
PIECES = [
    *("[", "]", "[[", "]]", "=", ".", ",", '"', "'", '"""', "#", "\\", "\n", "\r\n", " ", "\t", "\x00", "\u00a0", "é"),
    *("true", "false", "truer", "1", "1.5", "1979-05-27", "a", "b-c", "root", "nvhook", "{", "}", "[a]", "[a.b]"),
    *('a = "x"', "b = []", 'c = ["x", "y"]', "d = true # yes", "e = 'x'"),
]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_never_another_answer(text: str) -> None:
    found = plaintoml.parse(text)
    if found is not None:
        assert found == tomllib.loads(text)


PLAIN = {
    "empty": "",
    "comments": "# one\n\n   # two",
    "strings": "a = \"x y\"\nb = 'C:\\dir' # why\n",
    "booleans": "a = true\nb=false#x",
    "lists": 'a = []\nb = ["x", \'y\',]\nc = [ "z" ]  ',
    "tables": '[a]\nb = "x"\n[a.c]\nd = "y"\n[ e.f ] # g\n',
    "as-shipped": (HOSTS.parent.parent / "etc/config.toml").read_text(),
}


@pytest.mark.parametrize("text", PLAIN.values(), ids=PLAIN)
def test_plain(text: str) -> None:
    assert plaintoml.parse(text) == tomllib.loads(text)


OTHER = {
    "number": "a = 1",
    "date": "a = 1979-05-27",
    "escape": 'a = "\\n"',
    "multi-line-string": 'a = """x\n"""',
    "multi-line-list": 'a = [\n"x"]',
    "list-in-a-list": "a = [[]]",
    "list-without-commas": 'a = ["x" "y"]',
    "dotted-key": "a.b = true",
    "quoted-key": '"a" = true',
    "quoted-table": '["a"]',
    "array-of-tables": "[[a]]",
    "inline-table": "a = {}",
    "key-twice": "a = true\na = true",
    "table-twice": "[a]\n[a]",
    "table-over-a-key": "a = true\n[a.b]",
    "parent-after-child": "[a.b]\n[a]",
    "no-value": "a =",
    "no-key": "= true",
    "no-equals": "a",
    "two-values": "a = true false",
    "open-string": 'a = "x',
    "open-table": "[a",
    "control-character": 'a = "\x01"',
    "carriage-return": "a = true\r\n",
    "no-break-space": "a\u00a0= true",
}


@pytest.mark.parametrize("text", OTHER.values(), ids=OTHER)
def test_left_to_tomllib(text: str) -> None:
    assert plaintoml.parse(text) is None


DEEP = ["a" + ".a" * 16_000 + " = 1", "[" + "a . " * 8_000 + "a]", "b = {" + '"a".' * 8_000 + "a = 1}"]


@pytest.mark.parametrize("text", DEEP, ids=["bare", "header", "inline"])
def test_key_of_thousands_of_dots(text: str) -> None:
    """tomllib takes a gigabyte for the first."""
    with pytest.raises(RecursionError):
        plaintoml.parse_all(text)


def test_value_with_many_dots() -> None:
    text = "a = [\n" + '"registry.example.org/a.b",\n' * 500 + ']\nb = "' + "1." * 150 + '"\n'
    assert plaintoml.parse_all(text)["b"] == "1." * 150
