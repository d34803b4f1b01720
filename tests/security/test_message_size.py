# SPDX-License-Identifier: Apache-2.0
"""What an image can make root write and compute: no entry of a log beyond 8 KiB, and no work beyond reading the file.

Work is counted, not timed: how many terms are parsed, how many characters are escaped.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from containers import HOOK, WRAPPER, Bundle, Workshop
from nvhook import audit, errors
from nvhook.errors import DeviceError, RequestError, RequirementError
from nvhook.request import config, device_list, request, requirements, spec

MOST = 8192
ALL = "NVIDIA_VISIBLE_DEVICES=all"
MARK = re.compile(r" \[… of [0-9]+ characters …\] ")

HUGE = {
    "unprintable": "\U000e0001" * 1_000_000,
    "letters": "x" * 1_000_000,
    "quotes": '"' * 1_000_000,
    "backslashes": "\\" * 1_000_000,
    "newlines": "\n" * 1_000_000,
    "surrogates": "\ud800" * 1_000_000,
    "wide": "\U0001f600" * 500_000,
    "mixed": '\x1b[1m"\\é\U000e0001 ' * 100_000,
}


def _message(line: bytes, *, as_json: bool) -> str:
    """Of one entry; it has to be whole."""
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    if as_json:
        return str(json.loads(line)["msg"])
    found = re.fullmatch(rb'time="[^"]+" level=\w+ msg=(".*")\n', line)
    assert found, line[:200]
    return str(json.loads(found[1]))


# One line


@pytest.mark.parametrize("text", HUGE.values(), ids=HUGE)
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_entry_has_a_limit(text: str, *, as_json: bool) -> None:
    line = audit.entry("error", f"begin {text} end", as_json=as_json)
    assert len(line) <= MOST
    message = _message(line, as_json=as_json)
    assert message.startswith("begin ")
    assert message.endswith(" end")
    assert MARK.search(message)
    # No escape is cut, be it before the mark or behind it.
    assert not re.search(r"\\(?:U[0-9a-f]{0,7}|u[0-9a-f]{0,3}|x[0-9a-f]?)(?:$| \[…)", message)
    assert message.isprintable()


@pytest.mark.parametrize("text", HUGE.values(), ids=HUGE)
def test_remedy_survives(text: str) -> None:
    error = RequestError(f"unknown capability `{text}`", "known are compute and utility")
    assert str(error).startswith("request error: unknown capability `")
    assert str(error).endswith("; known are compute and utility")
    assert len(json.dumps(str(error), ensure_ascii=False).encode()) < 8000


def test_short_line_is_as_it_was() -> None:
    assert errors.one_line("a\nb\x1b`é`" + "x" * 700) == "a\\nb\\x1b`é`" + "x" * 700
    text = '"' * (errors.MAX_LINE // 2)
    assert errors.one_line(text) == text
    assert errors.one_line(text + '"') != text + '"'


@pytest.mark.parametrize("most", [100, 101, 103, 107, 109, 200])
def test_cut_of_a_line_keeps_its_escapes_whole(most: int) -> None:
    """An error's text is a line already when it becomes a value in the audit."""
    line = errors.one_line("\U000e0001" * 500)
    again = errors.one_line(line, most)
    head, tail = MARK.split(again)
    assert head.replace("\\U000e0001", "") == ""
    assert tail.replace("\\U000e0001", "") == ""


def test_huge_text_is_not_escaped_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    escape = errors._escape

    def counted(character: str) -> str:
        nonlocal count
        count += 1
        return escape(character)

    monkeypatch.setattr(errors, "_escape", counted)
    errors.one_line(HUGE["unprintable"])
    assert 0 < count < 3 * errors.MAX_LINE


# The audit


@pytest.mark.parametrize("text", HUGE.values(), ids=HUGE)
def test_audit_has_a_limit(tmp_path: Path, text: str) -> None:
    (tmp_path / "dev").mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind(str(tmp_path / "dev/log"))
        path = tmp_path / "config.toml"
        path.write_text(f"nvidia-container-runtime.debug = '{tmp_path}/log'\nnvhook.dev-root = '{tmp_path}'\n")
        trail = audit.Audit(config.load(str(path)), "hook", "the-container")
        names = tuple(f"MIG-{number}" for number in range(1000))
        trail.begin(request.Request(names, (), (), text, imex_channels=tuple(range(2048))))
        trail.refuse(str(DeviceError(f"unknown device `{text}`", "this host has none")))
        datagram = syslog.recv(1 << 16)
        entry = (tmp_path / "log").read_bytes()
    assert len(datagram) <= MOST
    assert len(entry) <= MOST
    message = _message(entry, as_json=False)
    facts = re.findall(r'(\w+)=("(?:[^"\\]|\\.)*")', message)
    assert [name for name, _ in facts] == ["container", "asked_by", "why"]
    values = {name: json.loads(value) for name, value in facts}
    assert values["container"] == "the-container"
    assert values["why"].endswith("; this host has none")


# Work


def _read(env: dict[str, str], policy: Path) -> request.Request | None:
    described = spec.Spec(env=env, mounts=[], annotations={}, privileged=False, rootfs="/", device_rules=[])
    return request.read(described, config.load(str(policy)))


@pytest.mark.parametrize(
    "expressions",
    [
        pytest.param(["cuda>=99 " * 800_000], id="alternatives"),
        pytest.param(["cuda>=1," * 900_000], id="terms"),
        pytest.param([" " * 8_000_000], id="nothing-but-spaces"),
        pytest.param([f"cuda>=1.{number}" for number in range(200_000)], id="variables"),
        pytest.param(["brand=" + "x" * 8_000_000], id="one-long-term"),
    ],
)
def test_requirements_are_not_read_without_limit(monkeypatch: pytest.MonkeyPatch, expressions: list[str]) -> None:
    def parse(text: str) -> requirements._Term:
        raise AssertionError(f"{text[:20]} is read")

    monkeypatch.setattr(requirements, "_parse", parse)
    facts = requirements.facts_of("550.54.15")
    with pytest.raises(RequirementError, match="more than 32768 characters; shorten them"):
        requirements.check(expressions, facts)
    assert not requirements.are_sure(expressions, facts)


def test_requirements_of_the_longest_images_are_read() -> None:
    """Six times what the longest of NVIDIA's has."""
    text = " ".join(f"brand=tesla,driver>={number},driver<{number + 1}" for number in range(400, 1300))
    assert 30_000 < len(text) < 32768
    requirements.check([text], requirements.facts_of("550.54.15"))


@pytest.mark.parametrize("value", ["0," * 100_000, "," * 100_000, " 0 ," * 50_000])
def test_devices_are_read_once_each(tmp_path: Path, value: str) -> None:
    found = request._from_env({"NVIDIA_VISIBLE_DEVICES": value}, config.load(str(tmp_path / "none")))
    assert len(found[0]) <= 1


@pytest.mark.parametrize("name", ["NVIDIA_VISIBLE_DEVICES", "NVIDIA_IMEX_CHANNELS"])
def test_long_lists_are_refused_before_they_are_read(tmp_path: Path, name: str) -> None:
    env = {"NVIDIA_VISIBLE_DEVICES": "all", name: ",".join(map(str, range(500_000)))}
    with pytest.raises(RequestError, match=r"more than (1024|2048)"):
        _read(env, tmp_path / "none")


class _Counted(dict[str, str]):
    """Counts how often all keys are gone through."""

    times = 0

    def __iter__(self) -> Iterator[str]:
        self.times += 1
        return super().__iter__()


@pytest.mark.parametrize("key", ["cdi.k8s.io/{}", "nvidia.cdi.k8s.io/container.{}", "cdi.k8s.io/container.{}"])
@pytest.mark.parametrize("engine", ["io.kubernetes.container.name", "org.example"])
def test_annotations_are_gone_through_a_few_times(key: str, engine: str) -> None:
    """Podman passes on those of an image's manifest, which has room for a hundred thousand."""
    annotations = _Counted({key.format(number): "nvidia.com/gpu=0" for number in range(1000)})
    annotations[engine] = "0"
    found = device_list.annotated(annotations, ("cdi.k8s.io/", "nvidia.cdi.k8s.io/"))
    assert len(found) == (1 if "container" in key and "kubernetes" in engine else 1000)
    assert annotations.times < 5


@pytest.mark.parametrize("name", ["a", "nvidia.com/gpu=0", "example.com/class=device", ""])
def test_names_of_an_annotation_are_read_once_each(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    count = 0
    is_qualified = device_list._is_qualified

    def counted(text: str) -> bool:
        nonlocal count
        count += 1
        return is_qualified(text)

    monkeypatch.setattr(device_list, "_is_qualified", counted)
    annotations = {"cdi.k8s.io/a": f" {name} ," * 100_000, "org.example": f"{name}," * 100_000}
    device_list.annotated(annotations, ("cdi.k8s.io/",))
    device_list.stray(annotations, ("cdi.k8s.io/",))
    assert count <= 2


# The programs


def _env(*lines: str) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["process"]["env"].extend(lines)


CONFIGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "requirement": _env(ALL, "NVIDIA_REQUIRE_CUDA=cuda>=" + "\U000e0001" * 1_900_000),
    "short-requirement": _env(ALL, "NVIDIA_REQUIRE_CUDA=cuda>=" + "\U000e0001" * 8_000),
    "capability": _env(ALL, "NVIDIA_DRIVER_CAPABILITIES=" + "\x1b" * 1_200_000),
    "device": _env("NVIDIA_VISIBLE_DEVICES=" + '"\\' * 1_900_000),
    "channel": _env(ALL, "NVIDIA_IMEX_CHANNELS=" + "\\" * 3_500_000),
    "old-image": _env("CUDA_VERSION=" + "\u2028" * 2_000_000),
    "annotation": lambda document: document["annotations"].update({"cdi.k8s.io/a": "nvidia.com/gpu=" + "\x01" * 10**6}),
}


def _written(shop: Workshop, name: str) -> Bundle:
    bundle = shop.bundle("busybox").write(["/bin/true"])
    document = json.loads(bundle.path.read_text())
    CONFIGS[name](document)
    bundle.path.write_text(json.dumps(document, ensure_ascii=False))
    assert bundle.path.stat().st_size < 8 << 20
    return bundle


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_wrapper_writes_no_long_line(shop: Workshop, name: str, *, as_json: bool) -> None:
    bundle = _written(shop, name)
    debug = shop.new("debug")
    policy = shop.new("config.toml")
    text = shop.config("a100x2").read_text()
    policy.write_text(text.replace("runtimes =", f'debug = "{debug}"\nruntimes ='))
    log = shop.new("log")
    options = ("--log", str(log), "--log-format", "json" if as_json else "text")
    result = bundle.run(policy, options=options, wrapper=WRAPPER)
    assert result.returncode != 0
    assert all(len(line.encode()) <= MOST for line in result.stderr.splitlines())
    for path in (log, debug):
        lines = path.read_bytes().splitlines(keepends=True)
        assert lines
        assert all(len(line) <= MOST for line in lines)
        assert [line for line in lines if b"error" in line]


@pytest.mark.parametrize("name", CONFIGS)
def test_hook_writes_no_long_line(shop: Workshop, name: str) -> None:
    bundle = _written(shop, name)
    state = {"ociVersion": "1.0.2", "id": bundle.id, "pid": os.getpid(), "bundle": str(bundle.directory)}
    command = [str(HOOK), "--config", str(shop.config("a100x2")), "prestart"]
    result = subprocess.run(command, input=json.dumps(state).encode(), capture_output=True, timeout=60, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith(b"nvidia-container-runtime-hook: ")
    assert all(len(line) <= MOST for line in result.stderr.splitlines())
