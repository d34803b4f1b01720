# SPDX-License-Identifier: Apache-2.0
"""CDI specifications as engines find them: the files of the specification directories, and the devices in them.

Engines hide a file that they cannot read, and with it all its devices. Here each has its reason. The directories are
the administrator's, and yet anything may lie there: what is read has bounds, and YAML that means more than it says is
refused.
"""

from __future__ import annotations

import collections
import json
import os
import stat

from nvhook.commands.cdi import specification as cdispec
from nvhook.errors import reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    Json = dict[str, Any]

DIRECTORIES = ("/etc/cdi", "/var/run/cdi")  # a later one has priority
SCHEMA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "cdi.schema.json")

_ENDINGS = (".json", ".yaml")
_MAX_FILES = 1000
_MAX_SIZE = 1 << 19  # bytes; NVIDIA's for eight GPUs of seven MIG devices each takes a quarter
_MAX_DEPTH = 32
_MAX_SCALAR = 2048  # characters; a hexadecimal number of twice that cannot even be printed
_MAX_SHOWN = 200  # characters of what is wrong


class Fault(Exception):  # noqa: N818 - a finding about a file, and no error of the run
    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy


class SpecFile:
    """`document` is empty where there is a `fault`; `rank` is the directory's, a higher one has priority."""

    def __init__(self, path: str, rank: int) -> None:
        self.path = path
        self.rank = rank
        self.document: Json = {}
        self.status: os.stat_result | None = None
        self.fault: Fault | None = None
        try:
            content, self.status = _read(path)
            self.document = parse(content, path)
        except Fault as fault:
            self.fault = fault


class CdiDevice:
    """`state` is empty for one that containers can have, else `conflict` or `overridden`, by what `other` says."""

    def __init__(self, name: str, file: SpecFile) -> None:
        self.name = name
        self.file = file
        self.state = ""
        self.other = ""


def find(directories: list[str]) -> list[SpecFile]:
    """All of them, in the order in which engines read them. Fault for a directory that cannot be read."""
    return [SpecFile(path, rank) for rank, directory in enumerate(directories) for path in paths(directory)]


def paths(directory: str, endings: tuple[str, ...] = _ENDINGS) -> list[str]:
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise Fault(f"`{directory}`: {reason(error)}", "check what it is and who may read it") from None
    names = [name for name in names if name.endswith(endings)]
    if len(names) > _MAX_FILES:
        raise Fault(f"`{directory}`: holds more than {_MAX_FILES} specifications", "take those away that nobody needs")
    return [os.path.join(directory, name) for name in names]


def devices(files: list[SpecFile]) -> list[CdiDevice]:
    """Those of every readable file, and what becomes of each where several have one name, as engines have it.

    The directory with priority overrides the other; in one directory all of them are of no use, whoever overrides them.
    """
    found = [CdiDevice(f"{file.document['kind']}={item['name']}", file) for file in files for item in _items(file)]
    by_name: dict[str, list[CdiDevice]] = {}
    for device in found:
        by_name.setdefault(device.name, []).append(device)
    for same in by_name.values():
        ranks = [device.file.rank for device in same]
        clash = len(set(ranks)) < len(ranks)
        for device in same:
            others = [other for other in same if other is not device]
            beside = [other for other in others if other.file.rank == device.file.rank]
            if clash:
                device.state, device.other = "conflict", (beside or others)[-1].file.path
            elif device is not same[-1]:
                device.state, device.other = "overridden", same[-1].file.path
    return found


def _items(file: SpecFile) -> list[Json]:
    items: list[Json] = file.document.get("devices", [])
    return items


# One file


def _read(path: str) -> tuple[bytes, os.stat_result]:
    try:
        # A pipe without a writer would hold us up.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Fault("is not a regular file", "take it away")
            content = file.read(_MAX_SIZE + 1)
    except IsADirectoryError:
        raise Fault("is a directory, and engines do not look into it", "take it away, or rename it") from None
    except FileNotFoundError:
        raise Fault("is a link that leads nowhere", "take it away") from None
    except OSError as error:
        raise Fault(reason(error), "check what it is and who may read it") from None
    if len(content) > _MAX_SIZE:
        raise Fault("is larger than 512 KiB", "this is no CDI specification; take it away")
    return content, status


def parse(content: bytes, path: str) -> Json:
    """Valid by the schema and by what a schema cannot say. Fault."""
    try:
        text = content.decode()
        document: Json = _json(text) if path.endswith(".json") else _yaml(text)
    except UnicodeDecodeError as error:
        raise Fault(f"is not UTF-8 at byte {error.start}", "generate it again") from None
    _validate(document)
    return document


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise Fault("is nested too deeply", "generate it again") from None
    except ValueError as error:
        raise Fault(f"is not JSON: {_short(error)}", "generate it again") from None


def _yaml(text: str) -> Any:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _refuse_tricks(yaml.parse(text, loader))
        document = yaml.load(text, loader)  # noqa: S506 - both are safe loaders
    except yaml.MarkedYAMLError as error:
        line = f" at line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise Fault(f"is not YAML: {_short(error.problem)}{line}", "generate it again") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise Fault(f"is not YAML: {_short(error)}", "generate it again") from None
    _refuse_odd_keys(document)
    return document


def _refuse_tricks(events: Iterator[Any]) -> None:
    """A specification needs neither references nor types of YAML's own: a few lines of them can stand for gigabytes."""
    depth = 0
    for event in events:
        kind = type(event).__name__
        depth += kind.endswith(("SequenceStartEvent", "MappingStartEvent")) - kind.endswith(
            ("SequenceEndEvent", "MappingEndEvent")
        )
        line = event.start_mark.line + 1 if event.start_mark else 0
        if kind == "AliasEvent":
            raise Fault(f"has a YAML alias at line {line}", "write out what it stands for")
        if getattr(event, "tag", None) not in (None, "!"):
            raise Fault(f"has a YAML tag at line {line}", "take it out")
        if depth > _MAX_DEPTH:
            raise Fault(f"is nested too deeply at line {line}", "generate it again")
        if len(getattr(event, "value", "")) > _MAX_SCALAR:
            raise Fault(f"has a value of more than {_MAX_SCALAR} characters at line {line}", "take it out")


def _refuse_odd_keys(value: Any) -> None:
    """Numbers, dates and nothing at all are keys in YAML; the schema's validator cannot even name them."""
    for key in value if isinstance(value, dict) else ():
        if not isinstance(key, str):
            raise Fault(f"has the key `{_short(key)}`, which is no string", "write it in quotes, or take it out")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _refuse_odd_keys(inner)


def _validate(document: Any) -> None:
    import jsonschema

    with open(SCHEMA, encoding="utf-8") as file:
        validator = jsonschema.Draft202012Validator(json.load(file))
    error = min(validator.iter_errors(document), key=lambda found: len(found.absolute_path), default=None)
    if error is not None:
        raise Fault(f"{_place(error.absolute_path)}: {_short(error.message)}", "correct it, or generate the file again")
    name, count = collections.Counter(device["name"] for device in document["devices"]).most_common(1)[0]
    if count > 1:
        raise Fault(f"device `{name}` is there {count} times", "leave one of them")
    needed, what, _ = cdispec.needs(document)
    version = document["cdiVersion"]
    if cdispec.VERSIONS.index(version) < cdispec.VERSIONS.index(needed):
        raise Fault(f"cdiVersion {version} has no {what}", f"write {needed} there, if the engine knows it")


def _place(path: Any) -> str:
    """devices[0].name"""
    words = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return f"`{words.removeprefix('.')}`" if words else "the file"


def _short(text: object) -> str:
    words = str(text)
    return words if len(words) <= _MAX_SHOWN else f"{words[:_MAX_SHOWN]}…"
