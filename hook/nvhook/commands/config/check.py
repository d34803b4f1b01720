# SPDX-License-Identifier: Apache-2.0
"""`nvhook config check`: everything that is wrong in a config.toml at once, each with its line.

What stops a container is what config.py refuses, in its words. config.schema.json knows NVIDIA's keys too that nvhook
does not honour: what is wrong there, and what config.py would warn of, is shown and is no error.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import stat

from nvhook.commands.configure.documents import fault
from nvhook.errors import one_line, reason
from nvhook.formats import plaintoml
from nvhook.request import config

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from nvhook.commands import Subparsers

SCHEMA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "config.schema.json")


class _FileError(Exception):
    """The whole file, before there are any keys: where in it, and why."""

    def __init__(self, why: str, place: str = "") -> None:
        super().__init__(why)
        self.why = why
        self.place = place


def add(commands: Subparsers) -> None:
    parser = commands.add_parser("config", help="look at config.toml", description="Look at config.toml.")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    checking = actions.add_parser(
        "check",
        help="what is wrong in config.toml, line by line",
        description="Print what is wrong in config.toml, line by line, or ok. Exit 1 if no container would start.",
    )
    checking.add_argument("file", metavar="FILE", nargs="?", default="", help="another file than the one in use")
    checking.set_defaults(run=run)


def run(options: argparse.Namespace, warnings: list[str]) -> int:  # noqa: ARG001 - they are what it prints
    """What does not load is what this is for: the file is not loaded before."""
    must_exist = bool(options.file) or options.config_must_exist
    return check(options.file or options.config_path, must_exist=must_exist)


def check(path: str, *, must_exist: bool) -> int:
    """Prints a line for each finding, or `ok`; 1 if a container would not start with this file, else 0."""
    if not must_exist and not os.path.lexists(path):
        print(one_line(f"{path}: no such file; NVIDIA's defaults are in force"))
        return 0
    found = findings(path)
    for _, line in found:
        print(line)
    if not found:
        print("ok")
    return 1 if any(is_error for is_error, _ in found) else 0


def findings(path: str) -> list[tuple[bool, str]]:
    """(whether it stops a container, `FILE:LINE: KEY: what and the remedy`) in the order of the file."""
    try:
        text = _read(path)
        table = _parse(text)
    except _FileError as refused:
        return [(True, one_line(f"{path}{refused.place}: {refused.why}"))]
    errors, warnings = examine(table, path)
    lines = locate(text)
    found = [(_line(lines, key), key, what, True) for key, what in errors]
    found += [(_line(lines, key), key, what, False) for key, what in warnings]
    found.sort(key=lambda finding: finding[:2])
    return [(is_error, one_line(f"{path}:{line}: {key}: {what}")) for line, key, what, is_error in found]


def _read(path: str) -> str:
    try:
        # A pipe without a writer would hold us up.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise _FileError("is not a file; name a config.toml")
            content = file.read(config.MAX_SIZE + 1)
    except IsADirectoryError:
        raise _FileError("is a directory; name the config.toml in it") from None
    except OSError as error:
        raise _FileError(f"{reason(error)}; {_remedy(error)}") from None
    if len(content) > config.MAX_SIZE:
        raise _FileError("is larger than 64 KiB; this is no config.toml")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        before = content[: error.start].decode()
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        raise _FileError(
            f"the byte 0x{content[error.start]:02x} at line {line}, column {column} is not UTF-8; save it as UTF-8",
            f":{line}",
        ) from None


def _remedy(error: OSError) -> str:
    return "check the path" if isinstance(error, FileNotFoundError) else "check the path and who may read it"


def _parse(text: str) -> dict[str, Any]:
    try:
        table = plaintoml.parse_all(text)
        config.flatten(table, "")  # dots nest deeper than brackets can
        return table
    except ValueError as error:
        why, line, column = fault(error, text)
        raise _FileError(f"{why} at line {line}, column {column}; correct it", f":{line}") from None
    except RecursionError:
        raise _FileError("too deeply nested; take levels away") from None


def examine(table: dict[str, Any], path: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Errors and warnings, as (key, what is wrong and the remedy)."""
    import jsonschema

    with open(SCHEMA, encoding="utf-8") as file:
        schema = json.load(file)
    items = config.flatten(table, "")
    refused: dict[str, str] = {}
    for key, value in items:
        error = config.refusal(key, value, path)
        if error:
            what = _bare(error.message.removeprefix(f"`{path}`: "), key)
            refused[key] = f"{what}; {error.remedy or 'correct it or take it out'}"
    values = {key: default for key, (default, _) in keys(schema).items() if config.is_honoured(key)}
    values.update((key, value) for key, value in items if key in values and key not in refused)
    warned: dict[str, str] = {}
    for fault_found in jsonschema.Draft202012Validator(schema).iter_errors(table):
        key = ".".join(str(part) for part in fault_found.absolute_path if isinstance(part, str))
        if key not in refused and key not in warned:
            warned[key] = _in_words(fault_found.validator, fault_found.validator_value, fault_found.instance)
    known = list(keys(schema))
    for key, text in config.remarks(items, values):
        if key not in warned:
            what = _bare(text, key)
            warned[key] = what if ";" in what else f"{what}; {_advice(key, known)}"
    return list(refused.items()), list(warned.items())


def _bare(text: str, key: str) -> str:
    """Without the key, which stands at the beginning of the line."""
    for words in (f"`{key}` = ", f"`{key}` ", f" for `{key}`", f" in `{key}`", f" `{key}`"):
        text = text.replace(words, "", 1)
    return text


def _in_words(rule: object, wanted: Any, value: object) -> str:
    if rule == "enum":
        return f"unknown value `{value}`; one of {', '.join(map(str, wanted))}"
    if rule == "type":
        names = [wanted] if isinstance(wanted, str) else wanted
        return f"must be {' or '.join(_TYPES[name] for name in names)}, not `{value}`; correct it or take it out"
    return f"`{value}` is not what this key takes; correct it or take it out"


_TYPES = {"boolean": "true or false", "string": "a string", "array": "a list of strings", "object": "a table"}


def _advice(key: str, known: list[str]) -> str:
    if key in known:
        return "take it out, or leave it for NVIDIA's toolkit"
    close = difflib.get_close_matches(key, known, 1, 0.8)
    return f"did you mean `{close[0]}`?" if close else "check its spelling, or take it out"


def keys(schema: dict[str, Any], prefix: str = "") -> dict[str, tuple[object, dict[str, Any]]]:
    """The schema's keys with dots -> (default, schema of the value); tables are no keys."""
    found: dict[str, tuple[object, dict[str, Any]]] = {}
    for name, inner in schema["properties"].items():
        if "properties" in inner:
            found |= keys(inner, f"{prefix}{name}.")
        else:
            found[prefix + name] = (inner["default"], inner)
    return found


# Where a key is. tomllib does not say; what follows reads text that tomllib has found to be TOML, and no other.

_KEY = re.compile(r"""[ \t]*("(?:[^"\\\n]|\\.)*"|'[^'\n]*'|[A-Za-z0-9_-]+)[ \t]*(\.?)""")
_SPACE = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_PLAIN = re.compile(r"""[^\[\]{},"'#\r\n]+""")
_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}|' + r"'''.*?'{3,5}|" + r'"(?:[^"\\\n]|\\.)*"|' + r"'[^'\n]*'", re.DOTALL
)


def locate(text: str) -> dict[str, int]:
    """Key with dots -> the line where it is first written; tables too."""
    finder = _Finder(text)
    with contextlib.suppress(ValueError, IndexError, RecursionError):  # what has been found until then is good
        finder.document()
    return finder.lines


class _Finder:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.counted = (0, 1)  # up to which character, and the line there
        self.lines: dict[str, int] = {}

    def document(self) -> None:
        table = ""
        self._skip(_SPACE)
        while self.at < len(self.text):
            if self.text[self.at] == "[":
                self.at += 2 if self.text.startswith("[[", self.at) else 1
                table = self._key("") + "."
                self.at = self.text.index("]", self.at)
                while self.text.startswith("]", self.at):
                    self.at += 1
            else:
                self._pair(table)
            self._skip(_SPACE)

    def _pair(self, table: str) -> None:
        key = self._key(table)
        self.at = self.text.index("=", self.at) + 1
        self._skip(_SPACE)
        self._value(key)

    def _key(self, table: str) -> str:
        line = self.counted[1] + self.text.count("\n", self.counted[0], self.at)
        self.counted = (self.at, line)
        parts = []
        dot = "."
        while dot:
            match = _KEY.match(self.text, self.at)
            if not match:
                raise IndexError
            name, dot = match.groups()
            parts.append(next(iter(_parse(f"{name} = 0"))) if name[0] in "\"'" else name)
            self.at = match.end()
        for depth in range(1, len(parts) + 1):
            self.lines.setdefault(table + ".".join(parts[:depth]), line)
        return table + ".".join(parts)

    def _value(self, key: str) -> None:
        opening = self.text[self.at]
        if opening not in "[{":
            self._skip(_STRING if opening in "\"'" else _PLAIN)
            return
        closing = "]" if opening == "[" else "}"
        self.at += 1
        self._skip(_SPACE)
        while self.text[self.at] != closing:
            if opening == "[":
                self._value(key)
            else:
                self._pair(key + ".")
            self._skip(_SPACE)
            if self.text[self.at] == ",":
                self.at += 1
                self._skip(_SPACE)
        self.at += 1

    def _skip(self, what: re.Pattern[str]) -> None:
        match = what.match(self.text, self.at)
        if not match:
            raise IndexError
        self.at = match.end()


def _line(lines: dict[str, int], key: str) -> int:
    """That of the key, or else of the innermost table around it that is written down."""
    while key and key not in lines:
        key = key.rpartition(".")[0]
    return lines.get(key, 1)
