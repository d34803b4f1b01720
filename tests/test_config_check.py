# SPDX-License-Identifier: Apache-2.0
"""`nvhook config check`, and that its schema says what config.py does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from nvhook.cli import main
from nvhook.commands.config import check as configcheck
from nvhook.errors import ConfigError
from nvhook.request import config

SHIPPED = Path(__file__).parent.parent / "etc/config.toml"
SCHEMA: dict[str, Any] = json.loads(Path(configcheck.SCHEMA).read_text())
KEYS = configcheck.keys(SCHEMA)
RUNTIME = "nvidia-container-runtime"

# What NVIDIA documents, with the defaults.
DOCUMENTED: dict[str, object] = {
    "disable-require": False,
    "swarm-resource": "",
    "accept-nvidia-visible-devices-envvar-when-unprivileged": True,
    "accept-nvidia-visible-devices-as-volume-mounts": False,
    "supported-driver-capabilities": "compat32,compute,display,graphics,ngx,utility,video",
    "nvidia-container-cli.root": "",
    "nvidia-container-cli.path": "",
    "nvidia-container-cli.environment": [],
    "nvidia-container-cli.debug": "",
    "nvidia-container-cli.ldcache": "",
    "nvidia-container-cli.load-kmods": True,
    "nvidia-container-cli.no-pivot": False,
    "nvidia-container-cli.no-cgroups": False,
    "nvidia-container-cli.user": "",
    "nvidia-container-cli.ldconfig": "@/sbin/ldconfig",
    "nvidia-container-runtime.debug": "/dev/null",
    "nvidia-container-runtime.log-level": "info",
    "nvidia-container-runtime.runtimes": ["runc", "crun"],
    "nvidia-container-runtime.mode": "auto",
    "nvidia-container-runtime.modes.csv.mount-spec-path": "/etc/nvidia-container-runtime/host-files-for-container.d",
    "nvidia-container-runtime.modes.csv.compat-container-root": "",
    "nvidia-container-runtime.modes.cdi.default-kind": "nvidia.com/gpu",
    "nvidia-container-runtime.modes.cdi.annotation-prefixes": ["cdi.k8s.io/"],
    "nvidia-container-runtime.modes.cdi.spec-dirs": ["/etc/cdi", "/var/run/cdi"],
    "nvidia-container-runtime.modes.jit-cdi.nvcdi-feature-flags": [],
    "nvidia-container-runtime.modes.jit-cdi.nvcdi-disable-hooks": [],
    "nvidia-container-runtime.modes.legacy.cuda-compat-mode": "ldconfig",
    "nvidia-container-runtime-hook.path": "nvidia-container-runtime-hook",
    "nvidia-container-runtime-hook.skip-mode-detection": False,
    "nvidia-ctk.path": "nvidia-ctk",
    "features.allow-cuda-compat-libs-from-container": False,
    "features.allow-ldconfig-from-container": False,
    "features.allow-unknown-oci-spec-fields": False,
    "features.disable-cuda-compat-lib-hook": False,
    "features.disable-imex-channel-creation": False,
    "features.ignore-imex-channel-requests": False,
    "features.no-additional-gids-for-device-nodes": False,
}
OURS = {
    "accept-device-annotations": "auto",
    "nvhook.dev-root": "/",
    "nvhook.proc-root": "/",
    "nvhook.state-dir": "/run/nvhook",
    "nvhook.strict": False,
}


# The schema


def test_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_schema_has_the_documented_keys_and_ours() -> None:
    assert {key: default for key, (default, _) in KEYS.items()} == {**DOCUMENTED, **OURS}


def test_schema_has_the_keys_and_defaults_of_the_program() -> None:
    assert set(KEYS) == {*config._KEYS, *config._WITHOUT_EFFECT}
    assert {key: KEYS[key][0] for key in config._KEYS} == config._KEYS
    for key, usual in config._WITHOUT_EFFECT.items():
        assert KEYS[key][0] in usual, key


@pytest.mark.parametrize("key", KEYS)
def test_schema_of_a_key(key: str) -> None:
    default, schema = KEYS[key]
    assert "Default: " in schema["description"]
    assert schema["honoured"] == (key in config._KEYS)
    name = {bool: "boolean", str: "string", list: "array"}[type(default)]
    assert schema["type"] in (name, ["string", "array"], ["string", "boolean"])
    assert not list(jsonschema.Draft202012Validator(schema).iter_errors(default))
    if key in config._WITHOUT_EFFECT:
        for value in config._WITHOUT_EFFECT[key]:
            assert not list(jsonschema.Draft202012Validator(schema).iter_errors(value))
    else:
        assert schema.get("enum") == (list(config._ALLOWED[key]) if key in config._ALLOWED else None)


VALUES: list[object] = [True, 1, 1.5, "", "x", "auto", "info", "/x", "@/x", "all", [], ["runc"], [1], {}, False, 0]


@pytest.mark.parametrize("key", config._KEYS)
def test_schema_refuses_no_less_than_the_program_and_no_more(key: str) -> None:
    """But for what only the program knows: names of capabilities, and lists that name nothing."""
    validator = jsonschema.Draft202012Validator(KEYS[key][1])
    for value in VALUES:
        refused = config.refusal(key, value, "f")
        if key == "supported-driver-capabilities" and refused and "unknown capability" in refused.message:
            continue
        if key in ("supported-driver-capabilities", "swarm-resource") and value == [1]:
            continue
        assert bool(refused) != validator.is_valid(value), value


# The command


def _check(path: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = main(["config", "check", str(path)], "/nonexistent/config.toml")
    output = capsys.readouterr()
    assert output.err == ""
    return status, output.out


def _check_text(directory: Path, text: str | bytes, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    path = directory / "config.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    status, output = _check(path, capsys)
    return status, [line.removeprefix(f"{path}:") for line in output.splitlines()]


def test_check_shipped_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert _check(SHIPPED, capsys) == (0, "ok\n")


@pytest.mark.parametrize("key", KEYS)
def test_check_default(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _check_text(tmp_path, f"{key} = {json.dumps(KEYS[key][0])}", capsys) == (0, ["ok"])


ERRORS = [
    ("disable-require = 1", "1: disable-require: must be true or false, not `1`; correct it or take it out"),
    (
        "\n[nvhook]\n\nstate-dir = 'x'",
        "4: nvhook.state-dir: must be an absolute path, not `x`; correct it or take it out",
    ),
    ("nvhook = {dev-root = ''}", "1: nvhook.dev-root: must be an absolute path, not ``; correct it or take it out"),
    (
        f"#\r\n{RUNTIME}.mode = 'fast'",
        f"2: {RUNTIME}.mode: unknown value `fast`; one of auto, legacy, cdi, jit-cdi, csv",
    ),
    (
        f"[{RUNTIME}]\nmodes.legacy.cuda-compat-mode = 'x'",
        f"2: {RUNTIME}.modes.legacy.cuda-compat-mode: unknown value `x`; one of disabled, hook, ldconfig, mount",
    ),
    (
        f"[{RUNTIME}]\nruntimes = []",
        f'2: {RUNTIME}.runtimes: names no low-level runtime; for example ["runc", "crun"]',
    ),
    (
        f"[{RUNTIME}]\nruntimes = [\n'{RUNTIME}']",
        f"2: {RUNTIME}.runtimes: names nvidia-container-runtime, which would start itself without end; "
        'name what it is to start, for example ["runc", "crun"]',
    ),
    (
        "supported-driver-capabilities = 'sound'",
        "1: supported-driver-capabilities: unknown capability `sound`; "
        "known are compat32, compute, display, graphics, ngx, utility, video",
    ),
    (
        "nvidia-container-cli.ldconfig = '/sbin/ldconfig'",
        "1: nvidia-container-cli.ldconfig: `/sbin/ldconfig` is not a path of the host; "
        "write `@` before it; the program of an image is never run",
    ),
    ("a = 1\na = 2", "2: Cannot overwrite a value at line 2, column 6; correct it"),
    ("disable-require = yes", "1: Invalid value at line 1, column 19; correct it"),
    ("x = '''\n\n", "3: Expected \"'''\" at line 3, column 1; correct it"),
    ("\n\n[a", "3: Expected ']' at the end of a table declaration at line 3, column 3; correct it"),
    (b"\na = '\xff'", "2: the byte 0xff at line 2, column 6 is not UTF-8; save it as UTF-8"),
    ("x = " + "[" * 50_000, " too deeply nested; take levels away"),
    (b"#" * 10_000_000, " is larger than 64 KiB; this is no config.toml"),
]
WARNINGS = [
    ("colour = 1", "1: colour: unknown key is ignored; check its spelling, or take it out"),
    (
        "[nvidia-container-cli]\nload-kmod = true",
        "2: nvidia-container-cli.load-kmod: unknown key is ignored; did you mean `nvidia-container-cli.load-kmods`?",
    ),
    ('"a b"."\\u0063\\n" = "]"', "1: a b.c\\n: unknown key is ignored; check its spelling, or take it out"),
    (
        "nvidia-container-cli.environment = [\n'A=b',\n]",
        "1: nvidia-container-cli.environment: is not honoured by nvhook; take it out, or leave it for NVIDIA's toolkit",
    ),
    ("nvidia-ctk.path = 1", "1: nvidia-ctk.path: must be a string, not `1`; correct it or take it out"),
    (
        f"[{RUNTIME}]\nmodes.legacy.cuda-compat-mode = 'mount'",
        f"2: {RUNTIME}.modes.legacy.cuda-compat-mode: `mount` is not honoured by nvhook, which mounts no file of an "
        "image; `ldconfig` is in force",
    ),
    (
        f"{RUNTIME}.mode = 'cdi'",
        f"1: {RUNTIME}.mode: `cdi` is not honoured by nvhook; take it out, or leave it for NVIDIA's toolkit",
    ),
    (
        "accept-nvidia-visible-devices-envvar-when-unprivileged = false",
        "1: accept-nvidia-visible-devices-envvar-when-unprivileged: is false and so is "
        "`accept-nvidia-visible-devices-as-volume-mounts`: only by annotation can an unprivileged container ask for "
        "GPUs; set one of them to true",
    ),
]


@pytest.mark.parametrize(
    ("text", "line", "status"),
    [*((*case, 1) for case in ERRORS), *((*case, 0) for case in WARNINGS)],
    ids=[line[:60] for _, line in [*ERRORS, *WARNINGS]],
)
def test_check_finds(
    text: str | bytes, line: str, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _check_text(tmp_path, text, capsys) == (status, [line])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"\na = {'9' * 5000}", ":2: Exceeds the limit"),
        (f"[{'.'.join('a' * 5000)}]", ": too deeply nested; take levels away"),
    ],
    ids=["endless-number", "deeply-nested"],
)
def test_check_text_that_python_gives_up_on(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    assert configcheck.check(str(path), must_exist=True) == 1
    assert capsys.readouterr().out.startswith(f"{path}{said}")


def test_check_finds_everything_in_the_order_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "z = '''\n[nvhook]\n'''\nswarm-resource = 1 # ]\n[nvhook]\nnew = [\n{a = ']'},\n]\nproc-root = 'x'\n"
    status, lines = _check_text(tmp_path, text, capsys)
    assert (status, [line.split(": ")[:2] for line in lines]) == (
        1,
        [["1", "z"], ["4", "swarm-resource"], ["6", "nvhook.new"], ["9", "nvhook.proc-root"]],
    )


def test_check_refuses_what_a_start_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for key in KEYS:
        for value in VALUES:
            written = "{}" if value == {} else json.dumps(value)
            status, _ = _check_text(tmp_path, f"{key} = {written}", capsys)
            try:
                config.load(str(tmp_path / "config.toml"))
                assert status == 0, (key, value)
            except ConfigError:
                assert status == 1, (key, value)


# The file


def test_check_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "none"
    assert _check(path, capsys) == (1, f"{path}: no such file or directory; check the path\n")


def test_check_default_file_need_not_be(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVHOOK_CONFIG", raising=False)
    assert main(["config", "check"], "/nonexistent/config.toml") == 0
    assert capsys.readouterr().out == "/nonexistent/config.toml: no such file; NVIDIA's defaults are in force\n"


def test_check_file_of_the_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVHOOK_CONFIG", str(tmp_path / "none"))
    assert main(["config", "check"], str(SHIPPED)) == 1
    assert capsys.readouterr().out == f"{tmp_path}/none: no such file or directory; check the path\n"


def test_check_directory_and_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert _check(tmp_path, capsys) == (1, f"{tmp_path}: is a directory; name the config.toml in it\n")
    assert _check(pipe, capsys) == (1, f"{pipe}: is not a file; name a config.toml\n")


def test_check_unreadable(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    path = tmp_path / "config.toml"
    assert _check(path, capsys) == (1, f"{path}: permission denied; check the path and who may read it\n")
