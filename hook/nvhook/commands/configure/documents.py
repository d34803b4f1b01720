# SPDX-License-Identifier: Apache-2.0
"""JSON and TOML as people write them: a value is set or taken away, and every other character stays.

A document is text, and the table that the text says. Nothing here reads or writes a file; the name of the file is for
the errors, all of which are ConfigErrors. After each step the new text is parsed again and compared with what it ought
to say, so that an oddity of a library or of a file ends in an error and never in a broken file.
"""

from __future__ import annotations

import copy
import json
import re

from nvhook.errors import ConfigError
from nvhook.formats import plaintoml

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    # The keys that lead to a value, outermost first.
    Path = tuple[str, ...]
    Table = dict[str, Any]


class Document:
    """`name` is the file's, `text` is the whole of it, and `table` is what it says; the table is not to be changed."""

    def __init__(self, text: str, name: str) -> None:
        self.text = text
        self.name = name
        self.table = self._parse(text)

    def get(self, path: Path) -> object:
        return lookup(self.table, path)

    def put(self, path: Path, value: object) -> None:
        wanted = copy.deepcopy(self.table)
        inner = wanted
        for depth, key in enumerate(path[:-1], 1):
            inner = inner.setdefault(key, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"`{self.name}`: `{dotted(path[:depth])}` must be a table, not `{inner}`")
        inner[path[-1]] = value
        self._become(lambda: self._with(path, value), wanted, path)

    def drop(self, path: Path) -> None:
        """Does nothing where there is no such value."""
        if self.get(path) is None:
            return
        wanted = copy.deepcopy(self.table)
        del lookup(wanted, path[:-1])[path[-1]]  # type: ignore[attr-defined]
        self._become(lambda: self._without(path), wanted, path)

    def _become(self, change: Callable[[], str], wanted: Table, path: Path) -> None:
        try:
            text = change()
            found = self._parse(text)
        except Exception:  # whatever a library says that cannot cope with the file
            text, found = "", {"": None}
        if not same(found, wanted):
            raise ConfigError(
                f"`{self.name}`: `{dotted(path)}` cannot be changed without harm to the rest of the file",
                "write it as a table of its own, or change it by hand",
            )
        self.text = text
        self.table = found

    def _parse(self, text: str) -> Table:
        raise NotImplementedError

    def _with(self, path: Path, value: object) -> str:
        raise NotImplementedError

    def _without(self, path: Path) -> str:
        raise NotImplementedError

    def _refuse(self, why: str, line: int, column: int) -> ConfigError:
        return ConfigError(f"parse `{self.name}`: {why} at line {line}, column {column}; it is left as it is")


def lookup(table: Table, path: Path) -> object:
    """None where there is nothing; neither format's values are ever None, but for a null in JSON."""
    found: object = table
    for key in path:
        if not isinstance(found, dict) or key not in found:
            return None
        found = found[key]
    return found


def merged(documents: Iterable[Document]) -> Table:
    """What files say together that are read one after the other: tables are merged, of other values the last counts."""
    table: Table = {}
    for document in documents:
        _merge(table, copy.deepcopy(document.table))
    return table


def _merge(table: Table, other: Table) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(table.get(key), dict):
            _merge(table[key], value)
        else:
            table[key] = value


def same(one: object, other: object) -> bool:
    """Equal, and of the same types throughout: True is not 1 in a configuration."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and (one == other or str(one) == str(other) == "nan")


def dotted(path: Path) -> str:
    return ".".join(map(_key, path))


def _key(key: str) -> str:
    return key if re.fullmatch("[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


class Toml(Document):
    def _parse(self, text: str) -> Table:
        try:
            table = plaintoml.parse_all(text)
            copy.deepcopy(table)  # dots nest deeper than brackets can
            return table
        except ValueError as error:
            raise self._refuse(*fault(error, text)) from None
        except RecursionError:
            raise self._refuse("too deeply nested", 1, 1) from None

    def _with(self, path: Path, value: object) -> str:
        import tomlkit

        text = self.text
        if text and not text.endswith("\n"):
            text += "\n"
        if lookup(self.table, path[:-1]) is None:
            # A table of its own at the end of the file, where it is plain to see; unless one around it is written as
            # `{…}` or with dots, which closes it.
            line = f"{_key(path[-1])} = {tomlkit.item(value).as_string()}\n"
            gap = "\n" if text else ""
            longer = f"{text}{gap}[{dotted(path[:-1])}]\n{line}"
            try:
                self._parse(longer)
                return self._lines_as_before(longer)
            except ConfigError:
                pass
        document = tomlkit.parse(text)
        table: Any = document
        for key in path[:-1]:
            if key not in table:
                inline = isinstance(table, tomlkit.items.InlineTable)
                table[key] = tomlkit.inline_table() if inline else tomlkit.table()
            table = table[key]
        last = path[-1]
        old = table.get(last)
        if isinstance(old, list) and isinstance(value, list) and value[: len(old)] == old:
            for item in value[len(old) :]:  # the lines of a long list, and the comments in it, stay
                old.append(item)
        else:
            indent = _indent(table)
            item = tomlkit.item(value)
            table[last] = item
            if old is None and indent:
                item.trivia.indent = indent
        return self._lines_as_before(tomlkit.dumps(document))

    def _without(self, path: Path) -> str:
        import tomlkit

        document = tomlkit.parse(self.text)
        table: Any = document
        for key in path[:-1]:
            table = table[key]
        del table[path[-1]]
        return self._lines_as_before(tomlkit.dumps(document))

    def _lines_as_before(self, text: str) -> str:
        """tomlkit ends the lines it adds with a line feed, whatever the others end with."""
        if "\r\n" in self.text and not re.search(r"(?<!\r)\n", self.text):
            return re.sub(r"(?<!\r)\n", "\r\n", text)
        return text


def _indent(table: Any) -> str:
    """How the lines of this table are indented: as the first one that is there."""
    for value in table.values():
        trivia = getattr(value, "trivia", None)
        if trivia is not None and not isinstance(value, dict):
            return str(trivia.indent)
    return ""


def fault(error: ValueError, text: str) -> tuple[str, int, int]:
    """What is wrong with `text`, and in which line and column, by tomllib's error."""
    why, at, place = str(error).rpartition(" (at ")
    line, column = (re.findall(r"\d+", place) if at else []) or _end(text)
    return why if at else str(error), int(line), int(column)


def _end(text: str) -> tuple[str, str]:
    lines = text.split("\n")
    return str(len(lines)), str(len(lines[-1]) + 1)


_BLANK = re.compile(r"[ \t\r\n]*")


class Json(Document):
    """An object. Python's parser says where each value ends; what is between them is kept as it is."""

    def _parse(self, text: str) -> Table:
        if not text.strip():
            return {}
        try:
            table = json.loads(text)
        except json.JSONDecodeError as error:
            raise self._refuse(error.msg[:1].lower() + error.msg[1:], error.lineno, error.colno) from None
        except ValueError as error:  # thousands of digits, which Python refuses to convert
            raise self._refuse(str(error), 1, 1) from None
        except RecursionError:
            raise self._refuse("too deeply nested", 1, 1) from None
        if not isinstance(table, dict):
            raise self._refuse("not an object", 1, 1)
        return table

    def _with(self, path: Path, value: object) -> str:
        text = self.text if self.text.strip() else "{}\n"
        depth, members, start, end = self._innermost(text, path)
        indent, newline = self._style()
        for key in reversed(path[depth + 1 :]):
            value = {key: value}
        if path[depth] in members:
            _, begin, finish = members[path[depth]]
            return text[:begin] + _render(value, indent, newline, depth + 1) + text[finish:]
        colon = ": " if newline or ": " in text or not self.table else ":"
        member = json.dumps(path[depth], ensure_ascii=False) + colon + _render(value, indent, newline, depth + 1)
        if members:
            first_begin = min(begin for begin, _, _ in members.values())
            finish = max(finish for _, _, finish in members.values())
            gap = text[start + 1 : first_begin]
            if not newline and ", " in text:
                gap = " "
            return text[:finish] + "," + gap + member + text[finish:]
        before = newline + indent * (depth + 1)
        return text[: start + 1] + before + member + newline + indent * depth * bool(newline) + text[end:]

    def _without(self, path: Path) -> str:
        depth, members, start, end = self._innermost(self.text, path)
        begin, _, finish = members[path[depth]]
        earlier = [other for _, _, other in members.values() if other <= begin]
        later = [other for other, _, _ in members.values() if other >= finish]
        if earlier:
            return self.text[: max(earlier)] + self.text[finish:]
        if later:
            return self.text[:begin] + self.text[min(later) :]
        return self.text[: start + 1] + self.text[end:]

    def _innermost(self, text: str, path: Path) -> tuple[int, dict[str, tuple[int, int, int]], int, int]:
        """The deepest object on the way to `path`: its depth, its members, and where its braces are."""
        depth = 0
        start = _skip(text, 0)
        members, end = _members(text, start)
        while depth < len(path) - 1 and path[depth] in members:
            start = members[path[depth]][1]
            members, end = _members(text, start)
            depth += 1
        return depth, members, start, end

    def _style(self) -> tuple[str, str]:
        """One step of indentation, and the end of a line: both empty for a file of one line."""
        match = re.search(r"(\r?\n)([ \t]+)\S", self.text)
        if match:
            return match[2], match[1]
        return ("", "") if self.table and "\n" not in self.text.strip() else ("    ", "\n")


def _render(value: object, indent: str, newline: str, depth: int) -> str:
    if not newline:
        return json.dumps(value, ensure_ascii=False)
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return text.replace("\n", newline + indent * depth)


def _skip(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    return match.end() if match else at


def _members(text: str, start: int) -> tuple[dict[str, tuple[int, int, int]], int]:
    """Of the object whose brace is at `start`: key -> (where it begins, where its value begins and ends); the end."""
    decoder = json.JSONDecoder()
    members = {}
    at = _skip(text, start + 1)
    while text[at] != "}":
        begin = at
        key, at = decoder.raw_decode(text, at)
        value = _skip(text, _skip(text, at) + 1)  # behind the colon
        _, finish = decoder.raw_decode(text, value)
        members[key] = (begin, value, finish)
        at = _skip(text, finish)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return members, at
