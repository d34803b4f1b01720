# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from nvhook.errors import SpecError
from nvhook.request import spec
from nvhook.request.spec import Spec, State

MINIMAL: dict[str, Any] = {"process": {}, "root": {"path": "rootfs"}}


def _state(directory: Path, content: str | bytes) -> State:
    """Read as from stdin: a descriptor, to its end."""
    path = directory / "state"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    fd = os.open(path, os.O_RDONLY)
    try:
        return spec.read_state(fd)
    finally:
        os.close(fd)


def _record(found: Spec) -> dict[str, Any]:
    return {name: getattr(found, name) for name in Spec.__slots__}


# State


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param({"pid": 7, "bundle": "/b", "id": "x"}, (7, "/b", "x"), id="plain"),
        pytest.param({"pid": 7, "bundle": "/b"}, (7, "/b", ""), id="no-id"),
        pytest.param({"pid": 7, "bundlePath": "/old"}, (7, "/old", ""), id="bundlePath"),
        pytest.param({"pid": 7, "bundle": "/b", "bundlePath": "/old"}, (7, "/b", ""), id="both"),
        pytest.param({"pid": 7, "bundle": "/b", "ociVersion": "9", "x": [1]}, (7, "/b", ""), id="unknown-members"),
    ],
)
def test_read_state(tmp_path: Path, content: dict[str, Any], expected: tuple[int, str, str]) -> None:
    found = _state(tmp_path, json.dumps(content))
    assert (found.pid, found.bundle, found.id) == expected


def test_read_state_in_pieces() -> None:
    """A pipe gives what is there, and the writer may be slow."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.close(reader)
        for byte in b'{"pid": 1, "bundle": "/b"}':
            os.write(writer, bytes([byte]))
        os._exit(0)
    os.close(writer)
    try:
        assert spec.read_state(reader).bundle == "/b"
    finally:
        os.close(reader)
        os.wait()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("", "stdin is not JSON: ", id="empty"),
        pytest.param("{", "stdin is not JSON: ", id="cut"),
        pytest.param(b"\xff\xfe\xff", "stdin is not JSON: ", id="not-text"),
        pytest.param("[" * 100_000, "stdin is not JSON: ", id="deeply-nested"),
        pytest.param("[]", "stdin is not a JSON object", id="list"),
        pytest.param("null", "stdin is not a JSON object", id="null"),
        pytest.param('{"bundle": "/b"}', "`pid` is `None`, not a process", id="no-pid"),
        pytest.param('{"pid": 0, "bundle": "/b"}', "`pid` is `0`, not a process", id="pid-0"),
        pytest.param('{"pid": -1, "bundle": "/b"}', "`pid` is `-1`, not a process", id="pid-negative"),
        pytest.param('{"pid": true, "bundle": "/b"}', "`pid` is `True`, not a process", id="pid-true"),
        pytest.param('{"pid": "7", "bundle": "/b"}', "`pid` is `7`, not a process", id="pid-text"),
        pytest.param('{"pid": 7.0, "bundle": "/b"}', "`pid` is `7.0`, not a process", id="pid-float"),
        pytest.param('{"pid": 7}', "`bundle` is `None`, not an absolute path", id="no-bundle"),
        pytest.param('{"pid": 7, "bundle": "b"}', "`bundle` is `b`, not an absolute path", id="bundle-relative"),
        pytest.param('{"pid": 7, "bundle": ["/b"]}', "not an absolute path", id="bundle-list"),
        pytest.param(b" " * ((1 << 20) + 1), "more than 1048576 bytes on stdin", id="oversized"),
    ],
)
def test_read_state_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(SpecError) as raised:
        _state(tmp_path, content)
    assert str(raised.value).startswith("spec error: read the container's state: ")
    assert message in str(raised.value)


# config.json


def test_read_config_as_it_is(tmp_path: Path) -> None:
    content = {"z": 1, "a": {"unknown": [None, 2**70, "ä"]}, "process": {}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    found, status = spec.read_config(str(tmp_path))
    assert list(found.items()) == list(content.items())
    assert status.st_ino == (tmp_path / "config.json").stat().st_ino


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "read `{}`: no such file or directory", id="missing"),
        pytest.param("", "parse `{}`: ", id="empty"),
        pytest.param("{'a': 1}", "parse `{}`: ", id="not-json"),
        pytest.param("[" * 100_000, "parse `{}`: ", id="deeply-nested-lists"),
        pytest.param('{"a":' * 100_000, "parse `{}`: ", id="deeply-nested-objects"),
        pytest.param("9" * 5000, "parse `{}`: ", id="endless-number"),
        pytest.param("[1]", "parse `{}`: not a JSON object", id="list"),
    ],
)
def test_read_config_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SpecError) as raised:
        spec.read_config(str(tmp_path))
    assert str(raised.value).startswith("spec error: " + message.format(path))


def test_read_config_oversized(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate((8 << 20) + 1)
    with pytest.raises(SpecError, match="more than 8388608 bytes"):
        spec.read_config(str(tmp_path))


@pytest.mark.parametrize("bundle", ["/a\0b", "/\ud800"], ids=ascii)
def test_read_config_of_a_bundle_that_is_no_path(bundle: str) -> None:
    with pytest.raises(SpecError, match="spec error: read `/"):
        spec.read_config(bundle)


def test_parse_minimal() -> None:
    expected = {
        "env": {},
        "mounts": [],
        "annotations": {},
        "privileged": False,
        "rootfs": "/b/rootfs",
        "bundle": "/b",
        "device_rules": [],
        "cdi_injected": False,
    }
    assert _record(spec.parse(MINIMAL, "/b")) == expected


def test_parse_everything() -> None:
    rules = [{"allow": False, "access": "rwm"}]
    config = {
        "process": {"env": ["A=1"], "capabilities": {"bounding": ["CAP_SYS_ADMIN"], "effective": []}},
        "root": {"path": "/abs/./rootfs"},
        "mounts": [{"source": "/s", "destination": "/d", "type": "bind"}, {"destination": "/proc"}],
        "annotations": {"k": "v"},
        "linux": {"resources": {"devices": rules}},
        "more": 1,
    }
    expected = {
        "env": {"A": "1"},
        "mounts": [("/s", "/d"), ("", "/proc")],
        "annotations": {"k": "v"},
        "privileged": True,
        "rootfs": "/abs/rootfs",
        "bundle": "/b",
        "device_rules": rules,
        "cdi_injected": False,
    }
    assert _record(spec.parse(config, "/b")) == expected


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        pytest.param(None, {}, id="null"),
        pytest.param([], {}, id="empty"),
        pytest.param(["A=1", "B=2"], {"A": "1", "B": "2"}, id="plain"),
        pytest.param(["A="], {"A": ""}, id="empty-value"),
        pytest.param(["A=b=c"], {"A": "b=c"}, id="second-equals"),
        pytest.param(["A"], {}, id="without-equals"),
        pytest.param([""], {}, id="empty-entry"),
        pytest.param(["A=1", "A=2"], {"A": "2"}, id="last-wins"),
        pytest.param(["A=1", "A"], {"A": "1"}, id="without-equals-takes-nothing-away"),
        pytest.param(["A*", "*", "=x", "A=1"], {"": "x", "A": "1"}, id="asterisk-and-no-name"),
    ],
)
def test_parse_env(env: object, expected: dict[str, str]) -> None:
    assert spec.parse({**MINIMAL, "process": {"env": env}}, "/b").env == expected


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        pytest.param(None, False, id="null"),
        pytest.param({}, False, id="empty"),
        pytest.param({"bounding": None}, False, id="bounding-null"),
        pytest.param({"bounding": ["CAP_CHOWN"]}, False, id="another"),
        pytest.param({"bounding": ["CAP_CHOWN", "CAP_SYS_ADMIN"]}, True, id="bounding"),
        pytest.param({"effective": ["CAP_SYS_ADMIN"], "bounding": []}, False, id="effective-alone"),
        pytest.param(["CAP_SYS_ADMIN"], True, id="flat-list"),
        pytest.param([], False, id="flat-list-empty"),
    ],
)
def test_parse_privileged(capabilities: object, expected: bool) -> None:
    assert spec.parse({**MINIMAL, "process": {"capabilities": capabilities}}, "/b").privileged is expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"process": None}, "`process` is missing", id="no-process"),
        pytest.param({"process": []}, "`process` is not an object", id="process-list"),
        pytest.param({"root": None}, "`root` is missing", id="no-root"),
        pytest.param({"root": "/r"}, "`root` is not an object", id="root-text"),
        pytest.param({"root": {}}, "`root.path` is missing", id="no-root-path"),
        pytest.param({"root": {"path": ""}}, "`root.path` is missing", id="root-path-empty"),
        pytest.param({"root": {"path": 1}}, "`root.path` is missing", id="root-path-number"),
        pytest.param({"process": {"env": "A=1"}}, "`process.env` is not a list of strings", id="env-text"),
        pytest.param({"process": {"env": {"A": "1"}}}, "`process.env` is not a list of strings", id="env-object"),
        pytest.param({"process": {"env": ["A=1", 2]}}, "`process.env` is not a list of strings", id="env-number"),
        pytest.param({"process": {"env": ["A=1\0,2"]}}, "`process.env` holds a NUL character", id="env-nul"),
        pytest.param({"process": {"capabilities": "all"}}, "`process.capabilities` is not a list", id="caps-text"),
        pytest.param(
            {"process": {"capabilities": {"bounding": [1]}}}, "`process.capabilities` is not a list", id="caps-number"
        ),
        pytest.param({"mounts": {}}, "`mounts` is not a list of objects", id="mounts-object"),
        pytest.param({"mounts": ["/m"]}, "`mounts` is not a list of objects", id="mounts-texts"),
        pytest.param({"annotations": []}, "`annotations` is not an object", id="annotations-list"),
        pytest.param({"annotations": {"a": 1}}, "`annotations` holds something other", id="annotations-number"),
        pytest.param({"linux": []}, "`linux` is not an object", id="linux-list"),
        pytest.param({"linux": {"resources": 1}}, "`resources` is not an object", id="resources-number"),
        pytest.param(
            {"linux": {"resources": {"devices": [1]}}},
            "`linux.resources.devices` is not a list of objects",
            id="rules-number",
        ),
        pytest.param({"linux": {"devices": [7]}}, "`linux.devices` is not a list of objects", id="nodes-number"),
    ],
)
def test_parse_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as raised:
        spec.parse({**MINIMAL, **change}, "/b")
    assert str(raised.value).startswith(f"spec error: `/b/config.json`: {message}")


# Device rules

DENY_ALL = {"allow": False, "access": "rwm"}


def _rule(major: object = None, minor: object = None, *, allow: bool = True, **more: object) -> dict[str, Any]:
    return {"allow": allow, "type": "c", "major": major, "minor": minor, "access": "rw", **more}


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        pytest.param([], False, id="none"),
        pytest.param([DENY_ALL], False, id="deny-all"),
        pytest.param([DENY_ALL, _rule(195, 0)], True, id="deny-all-then-allow"),
        pytest.param([_rule(195, 0), DENY_ALL], False, id="allow-then-deny-all"),
        pytest.param([DENY_ALL, _rule(195, 1)], False, id="another-minor"),
        pytest.param([DENY_ALL, _rule(1, 0)], False, id="another-major"),
        pytest.param([_rule(195, -1)], True, id="any-minor-by-minus-one"),
        pytest.param([_rule(-1, -1)], True, id="anything-by-minus-one"),
        pytest.param([_rule(195)], True, id="any-minor-by-null"),
        pytest.param([{"allow": True}], True, id="anything-by-silence"),
        pytest.param([_rule(195, 0, type="a")], True, id="type-a"),
        pytest.param([_rule(195, 0, type=None)], True, id="type-null"),
        pytest.param([_rule(195, 0, type="b")], False, id="type-b"),
        pytest.param([_rule(195, 0), _rule(195, 0, allow=False, type="b")], True, id="deny-of-block-devices"),
        pytest.param([_rule(195, -1), _rule(195, 0, allow=False)], False, id="later-deny"),
        pytest.param([_rule(195, 0), _rule(195, 0, allow=False, access="m")], True, id="later-deny-of-mknod"),
        pytest.param([_rule(195, 0), _rule(195, 0, allow=False, access="w")], False, id="later-deny-of-write"),
        pytest.param([_rule(195, 0, access="rwm")], True, id="access-rwm"),
        pytest.param([_rule(195, 0, access="wr")], True, id="access-wr"),
        pytest.param([_rule(195, 0, access="")], True, id="access-empty-is-all"),
        pytest.param([_rule(195, 0, access="r")], False, id="access-read"),
        pytest.param([_rule(195, 0, access="m")], False, id="access-mknod"),
        pytest.param([_rule(195, 0, access="r"), _rule(195, 0, access="w")], True, id="access-over-two-rules"),
        pytest.param(
            [_rule(), _rule(195, 0, allow=False, access="r"), _rule(195, access="r")], True, id="taken-and-given-back"
        ),
        pytest.param([{"major": 195, "minor": 0}], False, id="says-neither"),
    ],
)
def test_allows(rules: list[dict[str, Any]], expected: bool) -> None:
    found = spec.parse({**MINIMAL, "linux": {"resources": {"devices": rules}}}, "/b")
    assert found.allows(195, 0) is expected
