# SPDX-License-Identifier: Apache-2.0
"""What the launcher parses, on damaged input: it stays in its memory, and never says another thing than Python.

It is compiled with the address and the undefined-behaviour sanitizer; `make fuzz` (NVHOOK_FUZZ_SECONDS) goes on
for that long.
"""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from containers import REPOSITORY
from nvruntime import bundle

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_SECONDS = float(os.environ.get("NVHOOK_FUZZ_SECONDS", "60" if "CI" in os.environ else "5"))
# What it allocates is freed by the program that it becomes.
_ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
_WORDS = ("NVIDIA_", "CUDA_VERSION", "nvidia-container-devices", "cdi.k8s.io")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("launcher") / "launcher"
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1", "-Wall", "-Wextra"]
    paths = [f'-D{name}=""' for name in ("PYTHON", "LIBRARY", "CONFIG", "HOOK_PATH", "SERVER", "VERSION")]
    source = REPOSITORY / "tests/security/launcher.c"
    subprocess.run(["gcc", "-std=gnu11", *sanitizers, *paths, "-o", made, source], check=True)
    return made


def _ask(program: Path, kind: str, inputs: list[bytes]) -> list[str]:
    """Its line for each."""
    content = b"".join(kind.encode() + struct.pack("=I", len(item)) + item for item in inputs)
    done = subprocess.run([program, "serve"], env=_ENVIRONMENT, input=content, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-4000:]
    return done.stdout.decode("utf-8", "surrogateescape").split("\n")[:-1]


def test_it_stays_in_its_memory(program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed = random.getrandbits(32) if "NVHOOK_FUZZ_SECONDS" in os.environ else 1
    command = [str(program), "fuzz", str(_SECONDS), str(seed)]
    done = subprocess.run(
        command, env=_ENVIRONMENT, capture_output=True, text=True, check=False, timeout=_SECONDS * 3 + 60
    )
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-4000:]}"
    assert int(done.stdout) > 1000
    if "NVHOOK_FUZZ_SECONDS" in os.environ:
        with capsys.disabled():
            print(f"\n{done.stdout.strip()} executions")


# config.toml

_LINES = st.sampled_from(
    [
        "[nvidia-container-runtime]", "[ nvidia-container-runtime ]", "[nvidia-container-runtime.modes.cdi]", "[x]",
        "[[nvidia-container-runtime]]", "['nvidia-container-runtime']", "[nvidia-container-runtime] # x", "[x.y] #",
        'runtimes = ["a"]', "runtimes = ['a']", 'runtimes = ["a", "b/c"]', '  runtimes\t=["a",]', 'runtimes = ["a#b"]',
        'runtimes = ["a"] # x', 'runtimes = [\n"a"\n]', 'runtimes = ["a,b" , "c:d"]', 'runtimes = ["\\u0061"]',
        "runtimes = []", 'runtimes-x = ["b"]', '"runtimes" = ["a"]', "runtimes.x = 1",
        'nvidia-container-runtime.x = "y"',
        'nvidia-container-runtime.runtimes = ["z"]', 'nvidia-container-runtime = {runtimes = ["z"]}',
        'x = """', '"""', "x = '''", "'''", 'y = ["z"]', "# [nvidia-container-runtime]", 'swarm-resource = "A"',
        '"swarm-resource" = "A"', '"swarm\\u002dresource" = "A"', "z = [", "]", "", "\t", "\\", "x = 1\r",
    ]
)  # fmt: skip


def _runtimes(text: str) -> list[str] | None:
    """What TOML says; None for what is no configuration of ours."""
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError):
        return None
    table = document.get("nvidia-container-runtime", {})
    found: Any = table.get("runtimes", ["runc", "crun"]) if isinstance(table, dict) else None
    is_list = isinstance(found, list) and found and all(isinstance(name, str) for name in found)
    return found if is_list else None


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.lists(_LINES, max_size=8).map("\n".join), min_size=50, max_size=200))
def test_config_is_read_as_python_reads_it(program: Path, texts: list[str]) -> None:
    for text, line in zip(texts, _ask(program, "c", [text.encode() for text in texts]), strict=True):
        wanted = _runtimes(text)
        if line == "?" or wanted is None:
            continue
        known, _, names = line.partition(" ")
        assert names == ":".join(wanted), text
        assert known == ("0" if "swarm-resource" in tomllib.loads(text) else "1") or known == "0", text


def test_config_as_shipped_is_understood(program: Path) -> None:
    """And what people write most."""
    texts = [
        (REPOSITORY / "etc/config.toml").read_bytes(),
        b'[nvidia-container-runtime]\nruntimes = ["docker-runc", "runc", "crun"]\n',
    ]
    assert _ask(program, "c", texts) == ["1 runc:crun", "1 docker-runc:runc:crun"]


# config.json

_PIECES = st.sampled_from(
    [*_WORDS, "NVIDIA", "_VISIBLE", "CUDA", "_VERSION=8", "cdi.k8s.io", "/", "\\", '"', "é", "A=b", "<&>", "\n\x1f"]
)


def _escape(text: str, chosen: random.Random) -> str:
    """JSON of `text`, in which any character may be written as an escape."""
    found = ""
    for character in text:
        form = chosen.randrange(4)
        if form == 0 or character < " ":
            found += f"\\u{ord(character):04{chosen.choice('xX')}}"
        elif character in '"\\' or (character == "/" and form == 1):
            found += f"\\{character}"
        else:
            found += character
    return found


_GO = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}  # what its encoder escapes


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.lists(_PIECES, max_size=4), min_size=20, max_size=100), st.randoms(use_true_random=False))
def test_no_request_in_json_is_passed_over(program: Path, texts: list[list[str]], chosen: random.Random) -> None:
    """Whether or not it is written with escapes; those of Go's encoder are no reason to start Python."""
    joined = ["".join(pieces) for pieces in texts]
    odd = [f'["{_escape(text, chosen)}", "x"]' for text in joined]
    for text, line in zip(odd, _ask(program, "j", [item.encode() for item in odd]), strict=True):
        if any(word in item for item in json.loads(text) for word in _WORDS):
            assert line == "1", text
    plain = ["[" + json.dumps(text, ensure_ascii=False).translate(_GO) + "]" for text in joined]
    for text, line in zip(plain, _ask(program, "j", [item.encode() for item in plain]), strict=True):
        assert line == str(int(any(word in item for item in json.loads(text) for word in _WORDS))), text


# Arguments

_ARGUMENTS = st.sampled_from(
    ["create", "run", "start", "name", "--bundle", "-b", "--b", "-bundle", "--bundle=x", "-b=", "--bundle=/y", "--log",
     "--log=z", "--root", "--debug", "--version", "-v", "", "--", "-"]
)  # fmt: skip


def _has_odd_value(words: list[str]) -> bool:
    """A log of the name of an option, or an option without a value, which the low-level runtime refuses."""
    options = ("--bundle", "-b", "--b", "-bundle", "--log", "--root")
    return any(
        word in options and (not value or value[0] == "-")
        for word, value in zip(words, [*words[1:], "-"], strict=False)
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.lists(_ARGUMENTS, max_size=7), min_size=50, max_size=200))
def test_bundle_is_pythons(program: Path, calls: list[list[str]]) -> None:
    """Of the commands that Python edits a config.json for, the one that it edits is the one that was looked into."""
    calls = [words for words in calls if not _has_odd_value(words)]
    inputs = [b"".join(word.encode() + b"\0" for word in words) for words in calls]
    for words, line in zip(calls, _ask(program, "a", inputs), strict=True):
        edits, is_version, place = line.split(" ", 2)
        if edits == "1":
            assert os.path.abspath(place) == bundle.directory(words), words
            assert is_version == "0" or "--version" in words or "-v" in words
