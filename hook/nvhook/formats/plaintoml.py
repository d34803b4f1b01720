# SPDX-License-Identifier: Apache-2.0
"""The TOML that configuration files are written in: tables, and strings, booleans and lists of strings on one line.

`import tomllib` costs 14 ms at every container start, twice an interpreter. What is written in any other way, or
wrongly, is left to it: this reader then answers None, and never guesses.
"""

from __future__ import annotations

import sys

_KEY = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
_OTHER = object()
_MAX_DOTS = 200  # in one key; strings of more are not seen in configuration files


def parse(text: str) -> dict[str, object] | None:
    """What tomllib.loads makes of `text`, or None where the file holds more than this reader knows."""
    document: dict[str, object] = {}
    table = document
    for line in text.split("\n"):
        line = line.strip(" \t")  # noqa: PLW2901 - the line without its margins
        # Control characters and blanks beyond ASCII are TOML's business.
        if not line.replace("\t", "").isprintable():
            return None
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            name, end, rest = line[1:].partition("]")
            made = _table(document, name) if end and _is_comment(rest) else None
            if made is None:
                return None
            table = made
            continue
        name, equals, rest = line.partition("=")
        name = name.rstrip(" \t")
        value = _value(rest.strip(" \t"))
        if not equals or not name or not _KEY.issuperset(name) or name in table or value is _OTHER:
            return None
        table[name] = value
    return document


def _is_comment(rest: str) -> bool:
    rest = rest.lstrip(" \t")
    return not rest or rest.startswith("#")


def _table(document: dict[str, object], name: str) -> dict[str, object] | None:
    """A new table under a dotted name; None for one that is there already, in whatever form."""
    table = document
    parts = name.strip(" \t").split(".")
    for index, part in enumerate(parts):
        if not part or not _KEY.issuperset(part):
            return None
        is_last = index == len(parts) - 1
        if part not in table:
            table[part] = {}
        elif is_last:
            return None  # written before as a key, or as the parent of another table: allowed, and rare
        below = table[part]
        if not isinstance(below, dict):
            return None
        table = below
    return table


def _value(text: str) -> object:
    for word, value in (("true", True), ("false", False)):
        if text.startswith(word):
            return value if _is_comment(text[len(word) :]) else _OTHER
    if text.startswith("["):
        return _list(text[1:])
    string, rest = _string(text)
    return string if string is not None and _is_comment(rest) else _OTHER


def _list(rest: str) -> object:
    items = []
    rest = rest.lstrip(" \t")
    while not rest.startswith("]"):
        string, rest = _string(rest)
        if string is None:
            return _OTHER
        items.append(string)
        rest = rest.lstrip(" \t")
        if rest.startswith(","):
            rest = rest[1:].lstrip(" \t")
        elif not rest.startswith("]"):
            return _OTHER
    return items if _is_comment(rest[1:]) else _OTHER


def _string(text: str) -> tuple[str | None, str]:
    """(the string that `text` begins with, what follows); None for one with escapes, or none at all."""
    quote = text[:1]
    if quote not in ('"', "'") or text.startswith(quote * 3):
        return None, ""
    string, end, rest = text[1:].partition(quote)
    return (string, rest) if end and (quote == "'" or "\\" not in string) else (None, "")


def parse_all(text: str) -> dict[str, object]:
    """All of TOML, by tomllib. ValueError (not only its own: numbers of thousands of digits), or RecursionError.

    A key of thousands of dots would cost it memory that grows with their square: 1 GB for 32 KiB.
    """
    import re

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    if any(part.count(".") > _MAX_DOTS for part in re.split(r"[\n=,#\[\]{}]", text)):
        raise RecursionError
    table: dict[str, object] = tomllib.loads(text)
    return table
