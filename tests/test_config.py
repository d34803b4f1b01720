# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from nvhook.errors import ConfigError
from nvhook.request import config
from nvhook.request.config import Config

SHIPPED = Path(__file__).parent.parent / "etc/config.toml"
COMPAT_MODE = "nvidia-container-runtime.modes.legacy.cuda-compat-mode"
ALL = ("compat32", "compute", "display", "graphics", "ngx", "utility", "video")
HOST_LDCONFIG = "/sbin/ldconfig.real" if os.path.exists("/sbin/ldconfig.real") else "/sbin/ldconfig"

DEFAULTS: dict[str, Any] = {
    "accept_device_annotations": None,
    "accept_env_when_unprivileged": True,
    "accept_volume_mounts": False,
    "annotation_prefixes": ("cdi.k8s.io/", "nvidia.cdi.k8s.io/"),
    "cuda_compat": True,
    "dev_root": "/",
    "disable_require": False,
    "driver_root": "/",
    "ignore_imex_channels": False,
    "imex_channels_of_host_only": False,
    "ldcache": "/etc/ld.so.cache",
    "ldconfig": HOST_LDCONFIG,
    "load_kmods": True,
    "log_file": "/dev/null",
    "log_level": "info",
    "no_additional_gids": False,
    "no_cgroups": False,
    "path": "",
    "proc_root": "/",
    "runtimes": ("runc", "crun"),
    "state_dir": "/run/nvhook",
    "strict": False,
    "supported_capabilities": ALL,
    "swarm_resources": (),
    "user": "",
    "warnings": [],
}


def _record(found: Config) -> dict[str, Any]:
    return {name: getattr(found, name) for name in Config.__slots__}


def _load(directory: Path, text: str | bytes) -> Config:
    path = directory / "config.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return config.load(str(path))


def _error(directory: Path, text: str | bytes) -> str:
    with pytest.raises(ConfigError) as raised:
        _load(directory, text)
    line = str(raised.value)
    assert "\n" not in line
    assert line.startswith("config error: ")
    assert str(directory / "config.toml") in line
    return line


# The file


def test_load_no_file_is_defaults(tmp_path: Path) -> None:
    assert _record(config.load(str(tmp_path / "none.toml"))) == DEFAULTS


def test_load_no_file_that_must_exist(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    with pytest.raises(ConfigError) as raised:
        config.load(str(path), must_exist=True)
    assert str(raised.value) == f"config error: read `{path}`: no such file"


def test_load_while_a_package_is_installed_over_it(tmp_path: Path) -> None:
    """packaging/deb/preinst: the administrator's policy has no gap."""
    path = tmp_path / "config.toml"
    path.write_text("")
    (tmp_path / "config.toml.before-nvhook").write_text('supported-driver-capabilities = "utility"\n')
    found = config.load(str(path), must_exist=True)
    assert found.supported_capabilities == ("utility",)
    assert found.path == str(path)  # the hook reads it again, and by then it may be back


def test_load_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        config.load(str(tmp_path))
    assert str(raised.value) == f"config error: read `{tmp_path}`: is a directory"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("# nothing\n", id="comment"),
        pytest.param("[nvidia-container-cli]\n[nvhook]\n", id="empty-tables"),
    ],
)
def test_load_says_nothing_is_defaults(tmp_path: Path, text: str) -> None:
    assert _record(_load(tmp_path, text)) == {**DEFAULTS, "path": str(tmp_path / "config.toml")}


def test_load_shipped_file_is_defaults() -> None:
    assert _record(config.load(str(SHIPPED))) == {**DEFAULTS, "path": str(SHIPPED)}


def test_load_shipped_file_comments_are_keys_that_exist(tmp_path: Path) -> None:
    """Whoever takes a comment mark away gets what the comment says, and no warning."""
    lines = SHIPPED.read_text().splitlines()
    text = "\n".join(line.removeprefix("#") if line[1:2].isalpha() and "=" in line else line for line in lines)
    found = _load(tmp_path, text)
    changed = {
        "path": str(tmp_path / "config.toml"),
        "swarm_resources": ("DOCKER_RESOURCE_GPU",),
        "driver_root": "/run/nvidia/driver",
        "log_file": "/var/log/nvidia-container-runtime.log",
        "user": "65534:65534",
    }
    assert _record(found) == {**DEFAULTS, **changed}


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("disable-require", id="no-value"),
        pytest.param("disable-require = yes", id="word"),
        pytest.param("a = 1\na = 2", id="twice"),
        pytest.param("[nvhook]\n[nvhook]", id="table-twice"),
        pytest.param("a = '''\x07\n", id="control-character"),
        pytest.param(b"a = '\xff'", id="not-utf-8"),
        pytest.param(b"\x00", id="nul"),
        pytest.param("a = " + "9" * 5000, id="endless-number"),
        pytest.param(f"[{'.'.join('a' * 5000)}]", id="deeply-nested-table"),
        pytest.param(f"{'.'.join('a' * 5000)} = 1", id="deeply-nested-key"),
    ],
)
def test_load_does_not_parse(tmp_path: Path, text: str | bytes) -> None:
    assert "error: parse `" in _error(tmp_path, text)


def test_load_file_without_end(tmp_path: Path) -> None:
    assert "larger than 65536 bytes; this is no config.toml" in _error(tmp_path, "#" * 65537)
    _load(tmp_path, "#" * 65536)


# Values


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        pytest.param("disable-require = true", "disable_require", True, id="disable-require"),
        pytest.param(f"{COMPAT_MODE} = 'disabled'", "cuda_compat", False, id="compat-disabled"),
        pytest.param(f"{COMPAT_MODE} = 'hook'", "cuda_compat", True, id="compat-hook"),
        pytest.param("features.disable-cuda-compat-lib-hook = true", "cuda_compat", False, id="compat-no-hook"),
        pytest.param("swarm-resource = 'A'", "swarm_resources", ("A",), id="swarm-one"),
        pytest.param("swarm-resource = 'A, B,'", "swarm_resources", ("A", "B"), id="swarm-commas"),
        pytest.param("swarm-resource = ['A', 'B']", "swarm_resources", ("A", "B"), id="swarm-list"),
        pytest.param(
            "accept-nvidia-visible-devices-as-volume-mounts = true", "accept_volume_mounts", True, id="accept-mounts"
        ),
        pytest.param(
            "supported-driver-capabilities = 'utility,compute'",
            "supported_capabilities",
            ("compute", "utility"),
            id="capabilities-sorted",
        ),
        pytest.param(
            "supported-driver-capabilities = ['video', 'video']",
            "supported_capabilities",
            ("video",),
            id="capabilities-list",
        ),
        pytest.param("supported-driver-capabilities = 'all'", "supported_capabilities", ALL, id="capabilities-all"),
        pytest.param("nvidia-container-cli.root = '/r'", "driver_root", "/r", id="root"),
        pytest.param("nvidia-container-cli.root = ''", "driver_root", "/", id="root-empty"),
        pytest.param("nvidia-container-cli.ldcache = '/c'", "ldcache", "/c", id="ldcache"),
        pytest.param("nvidia-container-cli.no-cgroups = true", "no_cgroups", True, id="no-cgroups"),
        pytest.param("nvidia-container-cli.user = '1000'", "user", "1000", id="user"),
        pytest.param("nvidia-container-cli.user = 'root:video'", "user", "root:video", id="user-and-group"),
        pytest.param("nvidia-container-cli.user = '4294967294:0'", "user", "4294967294:0", id="user-last-number"),
        pytest.param("nvidia-container-cli.load-kmods = false", "load_kmods", False, id="load-kmods"),
        pytest.param(
            "features.no-additional-gids-for-device-nodes = true", "no_additional_gids", True, id="no-additional-gids"
        ),
        pytest.param("nvidia-container-runtime.debug = '/l'", "log_file", "/l", id="debug"),
        pytest.param("nvidia-container-runtime.log-level = 'error'", "log_level", "error", id="log-level"),
        pytest.param("nvidia-container-runtime.runtimes = ['/x/runc']", "runtimes", ("/x/runc",), id="runtimes"),
        pytest.param(
            "features.ignore-imex-channel-requests = true", "ignore_imex_channels", True, id="ignore-imex-channels"
        ),
        pytest.param(
            "features.disable-imex-channel-creation = true",
            "imex_channels_of_host_only",
            True,
            id="no-imex-channel-creation",
        ),
        pytest.param("nvhook.dev-root = '/d'", "dev_root", "/d", id="dev-root"),
        pytest.param("nvhook.proc-root = '/p'", "proc_root", "/p", id="proc-root"),
        pytest.param("nvhook.state-dir = '/s'", "state_dir", "/s", id="state-dir"),
        pytest.param("nvhook.strict = true", "strict", True, id="strict"),
        pytest.param("nvidia-container-runtime.mode = 'legacy'", "warnings", [], id="mode-legacy"),
    ],
)
def test_load_value(tmp_path: Path, text: str, name: str, value: object) -> None:
    expected = {**DEFAULTS, "path": str(tmp_path / "config.toml"), name: value}
    assert _record(_load(tmp_path, text)) == expected


BOOLEANS = (
    "disable-require",
    "accept-nvidia-visible-devices-envvar-when-unprivileged",
    "accept-nvidia-visible-devices-as-volume-mounts",
    "nvidia-container-cli.load-kmods",
    "nvidia-container-cli.no-cgroups",
    "features.disable-imex-channel-creation",
    "features.ignore-imex-channel-requests",
    "features.no-additional-gids-for-device-nodes",
    "nvhook.strict",
)
STRINGS = (
    "swarm-resource",
    "supported-driver-capabilities",
    "nvidia-container-cli.root",
    "nvidia-container-cli.ldcache",
    "nvidia-container-cli.ldconfig",
    "nvidia-container-cli.user",
    "nvidia-container-runtime.debug",
    "nvidia-container-runtime.log-level",
    "nvidia-container-runtime.mode",
    "nvhook.dev-root",
    "nvhook.proc-root",
    "nvhook.state-dir",
)
WRONG = [
    *((key, value, "true or false") for key in BOOLEANS for value in ("1", "'true'", "[]", "{a = 1}")),
    *((key, value, "a string") for key in STRINGS for value in ("1", "true", "{a = 1}")),
    *(("nvidia-container-runtime.runtimes", value, "a list of strings") for value in ("'runc'", "[1]", "{}", "true")),
]


@pytest.mark.parametrize(("key", "value", "wanted"), WRONG, ids=[f"{key}={value}" for key, value, _ in WRONG])
def test_load_wrong_type(tmp_path: Path, key: str, value: str, wanted: str) -> None:
    assert f"`{key}` must be {wanted}, not `" in _error(tmp_path, f"{key} = {value}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("nvidia-container-runtime.mode = 'fast'", "unknown value `fast` for `", id="mode"),
        pytest.param(
            f"{COMPAT_MODE} = 'on'", f"unknown value `on` for `{COMPAT_MODE}`; one of disabled, ", id="compat"
        ),
        pytest.param("nvidia-container-runtime.mode = ''", "unknown value `` for `", id="mode-empty"),
        pytest.param("nvidia-container-runtime.log-level = 'loud'", "one of trace, debug, info", id="log-level"),
        pytest.param(
            "supported-driver-capabilities = 'compute,sound'", "unknown capability `sound` in `", id="capability"
        ),
        pytest.param("nvidia-container-runtime.runtimes = []", "names no low-level runtime", id="no-runtimes"),
        pytest.param("nvhook.state-dir = 'run'", "must be an absolute path, not `run`", id="relative-state-dir"),
        pytest.param("nvidia-container-cli.root = 'r'", "must be an absolute path, not `r`", id="relative-root"),
        pytest.param(
            "nvidia-container-runtime.runtimes = ['/x/nvidia-container-runtime', 'runc']",
            "would start itself without end; name what it is to start",
            id="runtime-is-ours",
        ),
        pytest.param('nvhook.state-dir = "/a\\u0000b"', "`nvhook.state-dir` holds a NUL character", id="nul"),
        pytest.param("nvhook.dev-root = ''", "must be an absolute path, not ``", id="empty-dev-root"),
        pytest.param("nvhook.proc-root = './x'", "must be an absolute path, not `./x`", id="relative-proc-root"),
        pytest.param(
            "nvidia-container-cli.ldconfig = '/sbin/ldconfig'", "is not a path of the host", id="ldconfig-of-image"
        ),
        pytest.param("nvidia-container-cli.ldconfig = '@ldconfig'", "is not a path of the host", id="ldconfig-by-name"),
        pytest.param('nvidia-container-runtime.mode = "a\\nb"', "unknown value `a\\nb` for", id="newline-escaped"),
    ],
)
def test_load_unknown_value(tmp_path: Path, text: str, message: str) -> None:
    assert message in _error(tmp_path, text)


@pytest.mark.parametrize(
    "user", [":", "a:", ":b", "a:b:c", "a b", "-1", "4294967295", "0:4294967295", "9" * 11, "\u0661", "é", "a/b", "."]
)
def test_load_user_that_is_none(tmp_path: Path, user: str) -> None:
    """The number 4294967295 means to the kernel: as it is, which is root."""
    assert f"`nvidia-container-cli.user` = `{user}` is no user" in _error(
        tmp_path, f"nvidia-container-cli.user = '{user}'"
    )


# ldconfig


@pytest.mark.parametrize(
    ("files", "value", "expected"),
    [
        pytest.param([], "", "", id="none-wanted"),
        pytest.param(["exists.real"], "@{}/exists.real", "{}/exists.real", id="real-named"),
        pytest.param(["exists.real"], "@{}/exists", "{}/exists.real", id="only-real-is-there"),
        pytest.param(["exists", "exists.real"], "@{}/exists", "{}/exists.real", id="script-around-real"),
        pytest.param(["exists"], "@{}/exists", "{}/exists", id="plain"),
        pytest.param(["exists"], "@{}/exists.real", "{}/exists", id="real-named-only-plain-is-there"),
        pytest.param([], "@/does/not/exist.real", "/does/not/exist", id="real-named-nothing-is-there"),
        pytest.param([], "@/does/not/exist", "/does/not/exist", id="nothing-is-there"),
    ],
)
def test_load_ldconfig_normalised(tmp_path: Path, files: list[str], value: str, expected: str) -> None:
    for name in files:
        (tmp_path / name).touch()
    found = _load(tmp_path, f"nvidia-container-cli.ldconfig = '{value.format(tmp_path)}'")
    assert found.ldconfig == expected.format(tmp_path)


# Warnings: a key that is not honoured is named, but only where the value would have mattered.


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        pytest.param("colour = 'red'", "unknown key `colour` is ignored", id="unknown"),
        pytest.param("nvhook.colour.x = 1", "unknown key `nvhook.colour.x` is ignored", id="unknown-in-table"),
        pytest.param("nvidia-container-cli = 'x'", "unknown key `nvidia-container-cli` is ignored", id="no-table"),
        pytest.param("[[nvhook]]", "unknown key `nvhook` is ignored", id="list-of-tables"),
        pytest.param(
            "nvidia-container-cli.environment = ['A=b']",
            "`nvidia-container-cli.environment` is not honoured by nvhook",
            id="environment",
        ),
        pytest.param("nvidia-container-cli.environment = []", "", id="environment-empty"),
        pytest.param("nvidia-container-cli.load-kmods = true", "", id="load-kmods"),
        pytest.param("nvidia-container-cli.load-kmods = false", "", id="load-kmods-not"),
        pytest.param(
            "nvidia-container-cli.no-pivot = true",
            "`nvidia-container-cli.no-pivot` is not honoured by nvhook",
            id="no-pivot",
        ),
        pytest.param("nvidia-container-cli.path = '/usr/bin/nvidia-container-cli'", "", id="path-usual"),
        pytest.param(
            "nvidia-container-cli.path = '/x'", "`nvidia-container-cli.path` is not honoured by nvhook", id="path"
        ),
        pytest.param("nvidia-container-runtime-hook.path = 'nvidia-container-runtime-hook'", "", id="hook-usual"),
        pytest.param("nvidia-container-runtime-hook.skip-mode-detection = true", "", id="skip-mode-detection"),
        pytest.param("nvidia-ctk.path = 'nvidia-ctk'", "", id="ctk-usual"),
        pytest.param("nvidia-container-runtime.modes.cdi.default-kind = 'nvidia.com/gpu'", "", id="kind-usual"),
        pytest.param(
            "nvidia-container-runtime.modes.cdi.default-kind = 'x.y/z'",
            "`nvidia-container-runtime.modes.cdi.default-kind` is not honoured by nvhook",
            id="kind",
        ),
        pytest.param(f"{COMPAT_MODE} = 'disabled'", "", id="compat-not"),
        pytest.param(f"{COMPAT_MODE} = 'hook'", "", id="compat-hook"),
        pytest.param(
            f"{COMPAT_MODE} = 'mount'",
            f"`{COMPAT_MODE}` = `mount` is not honoured by nvhook, which mounts no file of an image; "
            "`ldconfig` is in force",
            id="compat-mount",
        ),
        pytest.param(
            "features.allow-cuda-compat-libs-from-container = true",
            "`features.allow-cuda-compat-libs-from-container` is not honoured by nvhook",
            id="compat-allowed",
        ),
        pytest.param("features.allow-ldconfig-from-container = false", "", id="feature-off"),
        pytest.param(
            "features.allow-ldconfig-from-container = true",
            "`features.allow-ldconfig-from-container` is not honoured by nvhook",
            id="feature-on",
        ),
        pytest.param(
            "nvidia-container-runtime.mode = 'cdi'",
            "`nvidia-container-runtime.mode` = `cdi` is not honoured by nvhook",
            id="mode",
        ),
        pytest.param("nvidia-container-runtime.modes.jit-cdi.nvcdi-disable-hooks = []", "", id="jit-cdi-empty"),
        pytest.param(
            "nvidia-container-runtime.modes.jit-cdi.nvcdi-disable-hooks = ['chmod']",
            "`nvidia-container-runtime.modes.jit-cdi.nvcdi-disable-hooks` is not honoured by nvhook",
            id="jit-cdi-hooks",
        ),
        pytest.param(
            "nvidia-container-runtime.modes.jit-cdi.nvcdi-feature-flags = ['x']",
            "`nvidia-container-runtime.modes.jit-cdi.nvcdi-feature-flags` is not honoured by nvhook",
            id="jit-cdi-flags",
        ),
        pytest.param(
            "features.allow-ldconfig-from-container = 0",
            "`features.allow-ldconfig-from-container` is not honoured by nvhook",
            id="0-is-not-false",
        ),
        pytest.param(
            "accept-nvidia-visible-devices-envvar-when-unprivileged = false",
            "`accept-nvidia-visible-devices-envvar-when-unprivileged` is false and so is "
            "`accept-nvidia-visible-devices-as-volume-mounts`: only by annotation can an unprivileged container "
            "ask for GPUs; set one of them to true",
            id="no-way-to-ask",
        ),
        pytest.param(
            "[nvidia-container-cli]\nroot = '/run/nvidia/driver/'\nldcache = '/run/nvidia/driver/etc/ld.so.cache'",
            "`nvidia-container-cli.ldcache` is looked up below `nvidia-container-cli.root` = `/run/nvidia/driver`, "
            "and begins with it once more; write `/etc/ld.so.cache`",
            id="cache-below-the-root-twice",
        ),
        pytest.param(
            "[nvidia-container-cli]\nroot = '/run/nvidia'\nldcache = '/run/nvidia-cache'", "", id="cache-like-the-root"
        ),
        pytest.param("nvidia-container-cli.ldcache = '/etc/ld.so.cache'", "", id="cache-without-a-root"),
        pytest.param(
            "supported-driver-capabilities = ''",
            "`supported-driver-capabilities` is empty: no container gets a library of the driver; "
            'name some, or write "all"',
            id="capabilities-none",
        ),
    ],
)
def test_load_warning(tmp_path: Path, text: str, warning: str) -> None:
    expected = [f"`{tmp_path / 'config.toml'}`: {warning}"] if warning else []
    assert _load(tmp_path, text).warnings == expected


@pytest.mark.parametrize(("value", "expected"), [("'auto'", None), ("true", True), ("false", False)])
def test_load_device_annotations(tmp_path: Path, value: str, expected: bool | None) -> None:
    found = _load(tmp_path, f"accept-device-annotations = {value}")
    assert (found.accept_device_annotations, found.warnings) == (expected, [])


@pytest.mark.parametrize("value", ["1", "0", "'true'", "''", "'Auto'", "['auto']"])
def test_load_device_annotations_that_are_neither(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match='`accept-device-annotations` must be "auto", true or false, not '):
        _load(tmp_path, f"accept-device-annotations = {value}")


def test_load_no_way_to_ask_at_all(tmp_path: Path) -> None:
    text = "accept-nvidia-visible-devices-envvar-when-unprivileged = false\naccept-device-annotations = false"
    (warning,) = _load(tmp_path, text).warnings
    assert ": no unprivileged container can ask for GPUs; set one of them to true" in warning


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("[]", ()),
        ("['nvidia.cdi.k8s.io/']", ("nvidia.cdi.k8s.io/",)),
        ("['cdi.k8s.io/', 'a.b/']", ("cdi.k8s.io/", "a.b/", "nvidia.cdi.k8s.io/")),
    ],
)
def test_load_annotation_prefixes(tmp_path: Path, value: str, expected: tuple[str, ...]) -> None:
    found = _load(tmp_path, f"[nvidia-container-runtime.modes.cdi]\nannotation-prefixes = {value}")
    assert (found.annotation_prefixes, found.warnings) == (expected, [])


def test_load_annotation_prefix_that_every_annotation_has(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds an empty prefix"):
        _load(tmp_path, "nvidia-container-runtime.modes.cdi.annotation-prefixes = ['a/', '']")


def test_load_only_mounts_ask(tmp_path: Path) -> None:
    text = "accept-nvidia-visible-devices-envvar-when-unprivileged = false\n"
    found = _load(tmp_path, text + "accept-nvidia-visible-devices-as-volume-mounts = true")
    assert (found.accept_env_when_unprivileged, found.accept_volume_mounts, found.warnings) == (False, True, [])


def test_load_file_of_nvidia_without_warnings(tmp_path: Path) -> None:
    """What NVIDIA's packages install, as a host that moves over has it."""
    text = """
disable-require = false
supported-driver-capabilities = "compat32,compute,display,graphics,ngx,utility,video"
[nvidia-container-cli]
environment = []
ldconfig = "@/sbin/ldconfig.real"
load-kmods = true
[nvidia-container-runtime]
log-level = "info"
mode = "auto"
runtimes = ["runc", "crun"]
[nvidia-container-runtime.modes]
[nvidia-container-runtime.modes.cdi]
annotation-prefixes = ["cdi.k8s.io/"]
default-kind = "nvidia.com/gpu"
spec-dirs = ["/etc/cdi", "/var/run/cdi"]
[nvidia-container-runtime.modes.csv]
mount-spec-path = "/etc/nvidia-container-runtime/host-files-for-container.d"
[nvidia-container-runtime.modes.legacy]
cuda-compat-mode = "ldconfig"
[nvidia-container-runtime-hook]
path = "nvidia-container-runtime-hook"
skip-mode-detection = false
[nvidia-ctk]
path = "nvidia-ctk"
"""
    assert _record(_load(tmp_path, text)) == {**DEFAULTS, "path": str(tmp_path / "config.toml")}
