# SPDX-License-Identifier: Apache-2.0
"""Reads a host's description and checks it before anything is built.

schema.json says what a description may hold. jsonschema checks all of it; where jsonschema is not installed,
`_check` looks at the types and the required keys, which is enough for a builder that does not stumble.
"""

from __future__ import annotations

import json
import os
from typing import Any

Description = dict[str, Any]

_SCHEMA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "schema.json")
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "boolean": (bool,),
}


class SimhostError(Exception):
    """A host that cannot be built; the message is one line, for a person."""


def load(source: Description | str | os.PathLike[str]) -> Description:
    """The checked description: `source` itself, or what the file of that name holds."""
    if isinstance(source, dict):
        check(source, "description")
        return source
    name = os.fspath(source)
    try:
        with open(name, encoding="utf-8") as file:
            description = json.load(file)
    except OSError as error:
        raise SimhostError(f"read `{name}`: {(error.strerror or str(error)).lower()}") from error
    except (ValueError, RecursionError) as error:
        raise SimhostError(f"read `{name}`: not JSON: {error}") from error
    check(description, name)
    assert isinstance(description, dict)
    return description


def check(description: object, name: str) -> None:
    """Raise SimhostError, naming the key, unless `description` follows the schema and its paths are plain."""
    with open(_SCHEMA, encoding="utf-8") as file:
        schema = json.load(file)
    fault = _first_fault(description, schema)
    if fault is None:
        assert isinstance(description, dict)
        fault = _path_fault(description)
    if fault is not None:
        raise SimhostError(f"`{name}`: {fault}")


def _first_fault(description: object, schema: dict[str, Any]) -> str | None:
    try:
        import jsonschema  # here, because the builder must run without it
    except ImportError:
        return _check(description, schema, "")
    error = jsonschema.exceptions.best_match(jsonschema.Draft7Validator(schema).iter_errors(description))
    if error is None:
        return None
    where = "/".join(str(part) for part in error.absolute_path)
    return _located(where, " ".join(error.message.split()))


def _located(where: str, what: str) -> str:
    return f"{where.lstrip('/')}: {what}" if where else what


def _check(value: object, schema: dict[str, Any], where: str) -> str | None:
    """The first wrong type or missing key in `value`, depth first; None when there is none."""
    types = _TYPES.get(schema.get("type", ""))
    if types and not isinstance(value, types):
        return _located(where, f"not of type '{schema['type']}'")
    members: list[tuple[str, object, dict[str, Any]]] = []
    if isinstance(value, dict):
        for key in schema.get("required", []):
            if key not in value:
                return _located(where, f"'{key}' is a required property")
        properties = schema.get("properties", {})
        members = [(key, value[key], properties[key]) for key in properties if key in value]
    elif isinstance(value, list) and "items" in schema:
        members = [(str(index), item, schema["items"]) for index, item in enumerate(value)]
    for key, member, member_schema in members:
        fault = _check(member, member_schema, f"{where}/{key}")
        if fault is not None:
            return fault
    return None


def _path_fault(description: Description) -> str | None:
    """A path that could leave the directory that is built, or one that is named twice."""
    for key in ("files", "device_nodes"):
        seen: set[str] = set()
        for entry in description[key]:
            path = entry["path"]
            if not path.startswith("/") or os.path.normpath(path) != path or path == "/":
                return f"{key}: `{path}` is not a plain absolute path"
            if path in seen:
                return f"{key}: `{path}` is named twice"
            seen.add(path)
    for path in description["proc"]:
        if not path.startswith("/proc/") or os.path.normpath(path) != path:
            return f"proc: `{path}` is not a plain path below /proc"
    for path in description.get("sys", {}):
        if not path.startswith("/sys/") or os.path.normpath(path) != path:
            return f"sys: `{path}` is not a plain path below /sys"
    return None
