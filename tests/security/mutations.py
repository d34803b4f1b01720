# SPDX-License-Identifier: Apache-2.0
"""Real input, damaged: what a fuzz target is fed with.

A mutation is a small record that hypothesis draws, and that is applied to a sample here; so what fails shrinks to one
or two mutations of one sample. Positions are numbers of any size, taken modulo what there is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

# What is put in the place of numbers, in as many bytes as they have.
_NUMBERS = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 62, (1 << 64) - 1)
_MAX_BYTES = 1 << 18
_PLACE = st.integers(0, 1 << 20)
_LENGTH = st.sampled_from((0, 1, 2, 3, 4, 8, 16, 24, 48, 100, 500, 5000, 1 << 18))

# (kind, place, other place or number, length, bytes)
_Mutation = tuple[str, int, int, int, bytes]
_KINDS = ("cut", "drop", "flip", "number", "repeat", "move", "insert", "splice")


def damaged(samples: Sequence[bytes], words: Sequence[bytes] = (b"\0",)) -> st.SearchStrategy[bytes]:
    """One of `samples` with a few mutations, `words` among what is inserted; or bytes at random."""
    mutation = st.tuples(
        st.sampled_from(_KINDS), _PLACE, _PLACE, _LENGTH, st.sampled_from(tuple(words)) | st.binary(max_size=8)
    )
    mutated = st.builds(
        _mutated,
        st.sampled_from(tuple(samples)),
        st.just(tuple(samples)),
        st.lists(mutation, min_size=1, max_size=6),
    )
    soup = st.lists(st.sampled_from(tuple(words)), max_size=40).map(b"".join)
    return st.one_of(mutated, mutated, mutated, soup, st.binary(max_size=300))


def text(samples: Sequence[str], words: Sequence[str] = ("\0",)) -> st.SearchStrategy[str]:
    """The same as text, with what is not UTF-8 as os.fsdecode has it."""
    encoded = damaged([os.fsencode(item) for item in samples], [os.fsencode(word) for word in words])
    return encoded.map(lambda data: data.decode("utf-8", "surrogateescape"))


def _mutated(data: bytes, others: tuple[bytes, ...], mutations: list[_Mutation]) -> bytes:
    for kind, place, other, length, word in mutations:
        at = place % (len(data) + 1)
        if kind == "cut":
            data = data[:at]
        elif kind == "drop":
            data = data[:at] + data[at + length :]
        elif kind == "flip" and data:
            at %= len(data)
            data = data[:at] + bytes([data[at] ^ 1 << other % 8]) + data[at + 1 :]
        elif kind == "number":
            size = (1, 2, 4, 8)[length % 4]
            number = _NUMBERS[other % len(_NUMBERS)] & ((1 << 8 * size) - 1)
            at -= at % size
            data = data[:at] + number.to_bytes(size, "little") + data[at + size :]
        elif kind == "repeat":
            piece = data[at : at + 1 + length % 64]
            data = data[:at] + piece * (1 + length) + data[at:]
        elif kind == "move":
            to = other % (len(data) + 1)
            data = data[:to] + data[at : at + length] + data[to:]
        elif kind == "insert":
            data = data[:at] + word * (1 + length % 3) + data[at:]
        elif kind == "splice":
            second = others[other % len(others)]
            data = data[:at] + second[other % (len(second) + 1) :]
        data = data[:_MAX_BYTES]
    return data


_LEAVES = (
    *(None, True, False, 0, 1, -1, 7, 255, 1 << 31, 1 << 63, 10**40, -(10**40), 1.5, 1e308, float("inf")),
    *("", "a", "0", "/", "..", "\0", "/a\0b", "\n", "\x1b[1m", "\ud800", "é", "\u202e", "9" * 5000, "x" * 5000, "all"),
    *("none", "void", "/dev/null", "0:1", "MIG-", "GPU-", ",", ",,,", "=", "a=", "٣"),
)
# Few on purpose: hypothesis takes seconds to make a table of all characters.
_WORDS = st.text(st.sampled_from("ab01/=,:.- \n\0é٣\u2028"), max_size=8)
_VALUES = st.one_of(
    st.sampled_from(_LEAVES),
    st.sampled_from(("[]", "{}", "[[]]", "[{}]", '{"": {}}', '["a"]', '{"a": "b"}', "[0]")).map(json.loads),
    st.sampled_from((300, 3000)).map(lambda count: ["0"] * count),
    st.integers(),
    _WORDS,
)
_DOCUMENT_KINDS = ("put", "put", "put", "drop", "repeat", "rename")


def documents(samples: Sequence[Any], words: Sequence[str] = ()) -> st.SearchStrategy[Any]:
    """A JSON value like one of `samples`, with parts of other types, sizes and names, or missing; or any at all."""
    values = st.one_of(_VALUES, st.sampled_from(tuple(words))) if words else _VALUES
    mutation = st.tuples(st.sampled_from(_DOCUMENT_KINDS), st.lists(st.integers(0, 30), max_size=6), values)
    mutated = st.builds(
        _mutated_document,
        st.sampled_from([json.dumps(item) for item in samples]),
        st.lists(mutation, min_size=1, max_size=4),
    )
    anything = st.recursive(_VALUES, lambda inner: st.lists(inner, max_size=3) | _objects(inner), max_leaves=6)
    return st.one_of(mutated, mutated, mutated, mutated, anything)


def _objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.dictionaries(_WORDS, inner, max_size=3)


def _mutated_document(sample: str, mutations: list[tuple[str, list[int], Any]]) -> Any:
    top = {"": json.loads(sample)}
    often = 300  # once: that to the power of all mutations would be more than there is memory
    for kind, steps, value in mutations:
        _mutate(top, [0, *steps], kind, value, often)
        often = 2 if kind == "repeat" else often
    return top.get("")


def _mutate(top: Any, steps: list[int], kind: str, value: Any, often: int) -> None:
    """At the end of `steps`, or where there is nothing further inside."""
    parent: Any = None
    key: Any = None
    here = top
    for step in steps:
        if not isinstance(here, (dict, list)) or not here:
            break
        keys = list(here) if isinstance(here, dict) else range(len(here))
        parent, key = here, keys[step % len(keys)]
        here = parent[key]
    if parent is None or (parent is top and kind != "put"):
        return
    if kind == "drop":
        del parent[key]
    elif kind == "repeat" and isinstance(parent, list):
        parent += [here] * often
    elif kind == "rename" and isinstance(parent, dict):
        parent[value if isinstance(value, str) else "other"] = parent.pop(key)
    else:
        parent[key] = value
