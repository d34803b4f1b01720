# SPDX-License-Identifier: Apache-2.0
"""The same values as the json package, from the same text, and the same text back."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvhook.formats import quickjson

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(VALUES)
def test_reads_what_json_writes(value: object) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=2), f" \r\n{json.dumps(value)}\t"):
        assert quickjson.loads(text.encode("utf-8", "surrogatepass")) == value


@given(VALUES)
def test_writes_what_json_reads(value: object) -> None:
    assert json.loads(quickjson.dumps(value)) == value


@given(st.binary(max_size=40) | st.text(alphabet='{}[]",:0123eE.-+\\utrfalsn ', max_size=40).map(str.encode))
def test_takes_nothing_that_json_refuses(content: bytes) -> None:
    try:
        expected: object = json.loads(content.decode("utf-8", "surrogatepass"))
    except ValueError:
        expected = ValueError
    try:
        found: object = quickjson.loads(content)
    except ValueError:
        found = ValueError
    assert repr(found) == repr(expected)


@pytest.mark.parametrize("text", ["", " ", "{", '{"a" 1}', "1 2", "NaN", "[Infinity]", "\ufeff1", "'a'", "tru"])
def test_is_not_json(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        quickjson.loads(text.encode())


def test_nested_too_deep() -> None:
    with pytest.raises(RecursionError):
        quickjson.loads(b"[" * 200_000)


def test_lone_surrogates_survive() -> None:
    assert quickjson.loads(quickjson.dumps({"\udc80": "\ud800"})) == {"\udc80": "\ud800"}


def test_what_cannot_be_written() -> None:
    with pytest.raises(TypeError):
        quickjson.dumps({"a": {1}})
    with pytest.raises(ValueError, match=r"."):
        quickjson.dumps(float("nan"))
    circle: list[object] = []
    circle.append(circle)
    for _ in range(2):  # a failure leaves nothing behind
        with pytest.raises(ValueError, match=r"."):
            quickjson.dumps(circle)


def test_without_the_c_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package does the same work in its place."""
    monkeypatch.setitem(sys.modules, "_json", None)
    try:
        importlib.reload(quickjson)
        assert quickjson.dumps({"ä": [1, None]}) == '{"ä":[1,null]}'.encode()
        assert quickjson.loads(b' {"a": [1, true]} ') == {"a": [1, True]}
        with pytest.raises(ValueError, match=r"."):
            quickjson.loads(b"NaN")
    finally:
        monkeypatch.undo()
        importlib.reload(quickjson)
