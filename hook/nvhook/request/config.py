# SPDX-License-Identifier: Apache-2.0
"""config.toml: NVIDIA's keys with NVIDIA's defaults, and the table [nvhook] of ours.

The file is the host administrator's and is trusted; what is checked here is that it says what was meant. A key that
nvhook does not honour, set to something that would matter, is named in `Config.warnings`.
"""

from __future__ import annotations

import os

from nvhook.errors import ConfigError, reason
from nvhook.formats import plaintoml

CAPABILITIES = ("compat32", "compute", "display", "graphics", "ngx", "utility", "video")

MAX_SIZE = 1 << 16  # bytes; one has a few thousand, and tomllib takes seconds for what can be in a million

# Key -> default. The type of the default is the type that the value must have.
_KEYS: dict[str, object] = {
    "disable-require": False,
    "swarm-resource": "",
    "accept-nvidia-visible-devices-envvar-when-unprivileged": True,
    "accept-nvidia-visible-devices-as-volume-mounts": False,
    "accept-device-annotations": "auto",
    "supported-driver-capabilities": ",".join(CAPABILITIES),
    "nvidia-container-cli.root": "",
    "nvidia-container-cli.ldcache": "",
    "nvidia-container-cli.ldconfig": "@/sbin/ldconfig",
    "nvidia-container-cli.load-kmods": True,
    "nvidia-container-cli.no-cgroups": False,
    "nvidia-container-cli.user": "",
    "nvidia-container-runtime.debug": "/dev/null",
    "nvidia-container-runtime.log-level": "info",
    "nvidia-container-runtime.runtimes": ["runc", "crun"],
    "nvidia-container-runtime.mode": "auto",
    "nvidia-container-runtime.modes.cdi.annotation-prefixes": ["cdi.k8s.io/"],
    "features.disable-imex-channel-creation": False,
    "features.ignore-imex-channel-requests": False,
    "nvidia-container-runtime.modes.legacy.cuda-compat-mode": "ldconfig",
    "features.disable-cuda-compat-lib-hook": False,
    "features.no-additional-gids-for-device-nodes": False,
    "nvhook.dev-root": "/",
    "nvhook.proc-root": "/",
    "nvhook.state-dir": "/run/nvhook",
    "nvhook.strict": False,
}

# NVIDIA's keys that change nothing here, with the values under which that is what the user expects.
_WITHOUT_EFFECT: dict[str, tuple[object, ...]] = {
    "nvidia-container-cli.path": ("", "/usr/bin/nvidia-container-cli"),
    "nvidia-container-cli.environment": ([],),
    "nvidia-container-cli.debug": ("", "/dev/null"),
    "nvidia-container-cli.no-pivot": (False,),
    "nvidia-container-runtime.modes.csv.mount-spec-path": ("/etc/nvidia-container-runtime/host-files-for-container.d",),
    "nvidia-container-runtime.modes.csv.compat-container-root": ("",),
    "nvidia-container-runtime.modes.cdi.default-kind": ("nvidia.com/gpu",),
    "nvidia-container-runtime.modes.cdi.spec-dirs": (["/etc/cdi", "/var/run/cdi"],),
    "nvidia-container-runtime.modes.jit-cdi.nvcdi-feature-flags": ([],),
    "nvidia-container-runtime.modes.jit-cdi.nvcdi-disable-hooks": ([],),
    "nvidia-container-runtime-hook.path": (
        "",
        "nvidia-container-runtime-hook",
        "/usr/bin/nvidia-container-runtime-hook",
    ),
    "nvidia-container-runtime-hook.skip-mode-detection": (False, True),
    "nvidia-ctk.path": ("", "nvidia-ctk", "/usr/bin/nvidia-ctk"),
    "features.allow-cuda-compat-libs-from-container": (False,),
    "features.allow-ldconfig-from-container": (False,),
    "features.allow-unknown-oci-spec-fields": (False, True),
}

_MODE = "nvidia-container-runtime.mode"
_COMPAT_MODE = "nvidia-container-runtime.modes.legacy.cuda-compat-mode"
_ENVVAR = "accept-nvidia-visible-devices-envvar-when-unprivileged"
_MOUNTS = "accept-nvidia-visible-devices-as-volume-mounts"
_ANNOTATIONS = "accept-device-annotations"
_BY_ANNOTATION = "only by annotation can an unprivileged container"
_PREFIXES = "nvidia-container-runtime.modes.cdi.annotation-prefixes"
_LDCACHE = "nvidia-container-cli.ldcache"
_MODES = ("auto", "legacy", "cdi", "jit-cdi", "csv")
_COMPAT_MODES = ("disabled", "hook", "ldconfig", "mount")
_LOG_LEVELS = ("trace", "debug", "info", "warning", "warn", "error", "fatal", "panic")

_ASIDE = ".before-nvhook"  # packaging/deb/preinst


class Config:
    """The values that count, each checked; `path` is the file they came from, or empty for built-in defaults.

    accept_device_annotations   None for `auto`
    """

    __slots__ = (
        "accept_device_annotations",
        "accept_env_when_unprivileged",
        "accept_volume_mounts",
        "annotation_prefixes",
        "cuda_compat",
        "dev_root",
        "disable_require",
        "driver_root",
        "ignore_imex_channels",
        "imex_channels_of_host_only",
        "ldcache",
        "ldconfig",
        "load_kmods",
        "log_file",
        "log_level",
        "no_additional_gids",
        "no_cgroups",
        "path",
        "proc_root",
        "runtimes",
        "state_dir",
        "strict",
        "supported_capabilities",
        "swarm_resources",
        "user",
        "warnings",
    )

    def __init__(self, values: dict[str, object], path: str, warnings: list[str]) -> None:
        self.path = path
        self.warnings = warnings
        self.disable_require = bool(values["disable-require"])
        self.swarm_resources = _names(values["swarm-resource"])
        self.accept_env_when_unprivileged = bool(values["accept-nvidia-visible-devices-envvar-when-unprivileged"])
        self.accept_volume_mounts = bool(values["accept-nvidia-visible-devices-as-volume-mounts"])
        self.accept_device_annotations = None if values[_ANNOTATIONS] == "auto" else bool(values[_ANNOTATIONS])
        self.annotation_prefixes = _prefixes(values[_PREFIXES])
        self.supported_capabilities = _capabilities(values["supported-driver-capabilities"], path)
        self.driver_root = str(values["nvidia-container-cli.root"]) or "/"
        self.ldcache = str(values["nvidia-container-cli.ldcache"]) or "/etc/ld.so.cache"
        self.ldconfig = _ldconfig(str(values["nvidia-container-cli.ldconfig"]), path)
        self.load_kmods = bool(values["nvidia-container-cli.load-kmods"])
        self.no_additional_gids = bool(values["features.no-additional-gids-for-device-nodes"])
        self.no_cgroups = bool(values["nvidia-container-cli.no-cgroups"])
        self.user = _user(str(values["nvidia-container-cli.user"]), path)
        self.log_file = str(values["nvidia-container-runtime.debug"])
        self.log_level = str(values["nvidia-container-runtime.log-level"])
        self.runtimes = _names(values["nvidia-container-runtime.runtimes"])
        self.ignore_imex_channels = bool(values["features.ignore-imex-channel-requests"])
        self.imex_channels_of_host_only = bool(values["features.disable-imex-channel-creation"])
        # NVIDIA's `hook` has the same effect as `ldconfig`, and whoever disables the hook wants none.
        self.cuda_compat = values[_COMPAT_MODE] != "disabled" and not values["features.disable-cuda-compat-lib-hook"]
        self.dev_root = str(values["nvhook.dev-root"])
        self.proc_root = str(values["nvhook.proc-root"])
        self.state_dir = str(values["nvhook.state-dir"])
        self.strict = bool(values["nvhook.strict"])


def load(path: str, *, must_exist: bool = False) -> Config:
    """The configuration in the file `path`; NVIDIA's defaults where there is no such file.

    Raises ConfigError, naming file and key, for a file that cannot be read or does not parse, a value of the wrong
    type, and a value that is none of those a key knows.
    """
    try:
        with open(_in_force(path), "rb") as file:
            content = file.read(MAX_SIZE + 1)
    except FileNotFoundError:
        if must_exist:
            raise ConfigError(f"read `{path}`: no such file") from None
        return Config(dict(_KEYS), "", [])
    except OSError as error:
        raise ConfigError(f"read `{path}`: {reason(error)}") from None
    if len(content) > MAX_SIZE:
        raise ConfigError(f"read `{path}`: larger than {MAX_SIZE} bytes", "this is no config.toml")
    try:
        return _from_table(_parse(content, path), path)
    except RecursionError:
        raise ConfigError(f"parse `{path}`: too deeply nested", "take levels away") from None


def _in_force(path: str) -> str:
    """`path`, or the file beside it that counts in its place while a package is being installed over it."""
    aside = path + _ASIDE
    return aside if os.access(aside, os.F_OK) else path


def _parse(content: bytes, path: str) -> dict[str, object]:
    try:
        plain = plaintoml.parse(content.decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"parse `{path}`: {error}") from None
    if plain is not None:
        return plain
    # 14 ms, and only for a file that is written in an unusual way, or not right.
    try:
        return plaintoml.parse_all(content.decode())
    except ValueError as error:
        raise ConfigError(f"parse `{path}`: {error}") from None


def _from_table(table: dict[str, object], path: str) -> Config:
    values = dict(_KEYS)
    items = flatten(table, "")
    for key, value in items:
        if key in _KEYS:
            values[key] = _checked(key, value, path)
    return Config(values, path, [f"`{path}`: {text}" for _, text in remarks(items, values)])


def remarks(items: list[tuple[str, object]], values: dict[str, object]) -> list[tuple[str, str]]:
    """What does not stop a container but is hardly meant, as (key, what and the remedy).

    `items` are the file's keys, `values` those that count.
    """
    found = []
    for key, value in items:
        if key not in _KEYS and key not in _WITHOUT_EFFECT:
            found.append((key, f"unknown key `{key}` is ignored"))
        elif key not in _KEYS and not any(
            type(value) is type(usual) and value == usual for usual in _WITHOUT_EFFECT[key]
        ):
            found.append((key, f"`{key}` is not honoured by nvhook"))
    mode = values[_MODE]
    if mode not in ("auto", "legacy"):
        found.append((_MODE, f"`{_MODE}` = `{mode}` is not honoured by nvhook"))
    if values[_COMPAT_MODE] == "mount":
        text = f"`{_COMPAT_MODE}` = `mount` is not honoured by nvhook, which mounts no file of an image"
        found.append((_COMPAT_MODE, f"{text}; `ldconfig` is in force"))
    if not values[_ENVVAR] and not values[_MOUNTS]:
        who = "no unprivileged container can" if values[_ANNOTATIONS] is False else _BY_ANNOTATION
        text = f"`{_ENVVAR}` is false and so is `{_MOUNTS}`: {who} ask for GPUs"
        found.append((_ENVVAR, f"{text}; set one of them to true"))
    root, cache = str(values["nvidia-container-cli.root"]).rstrip("/"), str(values[_LDCACHE])
    if root and f"{cache}/".startswith(f"{root}/"):
        text = f"`{_LDCACHE}` is looked up below `nvidia-container-cli.root` = `{root}`, and begins with it once more"
        found.append((_LDCACHE, f"{text}; write `{cache[len(root) :]}`"))
    if not _names(values["supported-driver-capabilities"]):
        text = "`supported-driver-capabilities` is empty: no container gets a library of the driver"
        found.append(("supported-driver-capabilities", f'{text}; name some, or write "all"'))
    return found


def flatten(table: dict[str, object], prefix: str) -> list[tuple[str, object]]:
    """The keys of a table and of those in it, with dots, in the order of the file."""
    items: list[tuple[str, object]] = []
    for key, value in table.items():
        if isinstance(value, dict) and prefix + key not in _KEYS:
            items += flatten(value, f"{prefix}{key}.")
        else:
            items.append((prefix + key, value))
    return items


def _checked(key: str, value: object, path: str) -> object:
    default = _KEYS[key]
    if key in ("swarm-resource", "supported-driver-capabilities") and isinstance(value, list):
        value = ",".join(str(item) for item in value)  # both spellings are seen in the field
    if key == _ANNOTATIONS:  # the one key of two types
        if value == "auto" or isinstance(value, bool):
            return value
        raise ConfigError(f'`{path}`: `{key}` must be "auto", true or false, not `{value}`')
    if type(value) is not type(default) or (
        isinstance(value, list) and not all(isinstance(item, str) for item in value)
    ):
        raise ConfigError(f"`{path}`: `{key}` must be {_TYPES[type(default)]}, not `{value}`")
    if "\0" in str(value):
        raise ConfigError(f"`{path}`: `{key}` holds a NUL character")
    allowed = _ALLOWED.get(key)
    if allowed and value not in allowed:
        raise ConfigError(f"`{path}`: unknown value `{value}` for `{key}`", f"one of {', '.join(map(str, allowed))}")
    if key == _PREFIXES and isinstance(value, list) and not all(item.strip() for item in value):
        raise ConfigError(f"`{path}`: `{key}` holds an empty prefix, which every annotation has", "take it out")
    is_path = key in _PATHS or (key == "nvidia-container-cli.root" and value)
    if is_path and not os.path.isabs(str(value)):
        raise ConfigError(f"`{path}`: `{key}` must be an absolute path, not `{value}`")
    if key == "nvidia-container-runtime.runtimes":
        names = _names(value)
        if not names:
            raise ConfigError(f"`{path}`: `{key}` names no low-level runtime", 'for example ["runc", "crun"]')
        if any(os.path.basename(name) == "nvidia-container-runtime" for name in names):
            raise ConfigError(
                f"`{path}`: `{key}` names nvidia-container-runtime, which would start itself without end",
                'name what it is to start, for example ["runc", "crun"]',
            )
    return value


def is_honoured(key: str) -> bool:
    return key in _KEYS


def refusal(key: str, value: object, path: str) -> ConfigError | None:
    """Why a container start would stop at this one key of the file, or None."""
    if key not in _KEYS:
        return None
    try:
        Config({**_KEYS, key: _checked(key, value, path)}, path, [])
    except ConfigError as error:
        return error
    return None


_PATHS = ("nvhook.dev-root", "nvhook.proc-root", "nvhook.state-dir")
_TYPES = {bool: "true or false", str: "a string", list: "a list of strings"}
_ALLOWED: dict[str, tuple[object, ...]] = {
    _ANNOTATIONS: ("auto", True, False),
    "nvidia-container-runtime.mode": _MODES,
    "nvidia-container-runtime.log-level": _LOG_LEVELS,
    _COMPAT_MODE: _COMPAT_MODES,
}


def _names(value: object) -> tuple[str, ...]:
    items = value if isinstance(value, list) else str(value).split(",")
    return tuple(item.strip() for item in items if item.strip())


def _prefixes(value: object) -> tuple[str, ...]:
    """`cdi.k8s.io/` brings NVIDIA's own `nvidia.cdi.k8s.io/` along, which the GPU Operator's device plugin writes."""
    names = _names(value)
    return (*names, "nvidia.cdi.k8s.io/") if "cdi.k8s.io/" in names else names


def _capabilities(value: object, path: str) -> tuple[str, ...]:
    names = _names(value)
    if "all" in names:
        return CAPABILITIES
    unknown = [name for name in names if name not in CAPABILITIES]
    if unknown:
        raise ConfigError(
            f"`{path}`: unknown capability `{unknown[0]}` in `supported-driver-capabilities`",
            f"known are {', '.join(CAPABILITIES)}",
        )
    return tuple(sorted(set(names)))


def _user(value: str, path: str) -> str:
    """uid[:gid], each a number or a name, or empty. That the names exist is known where they are needed."""
    if value and not (value.count(":") < 2 and all(_is_account(part) for part in value.split(":"))):
        raise ConfigError(
            f"`{path}`: `nvidia-container-cli.user` = `{value}` is no user and no user:group",
            "write numbers or names, for example 65534:65534",
        )
    return value


def _is_account(name: str) -> bool:
    if name.isdecimal() and name.isascii():
        return len(name) < 11 and int(name) < (1 << 32) - 1  # the last number means `as it is`: root
    first, others = name[:1], name[1:].translate(dict.fromkeys(map(ord, "_.-")))
    return name.isascii() and (first.isalnum() or first == "_") and (others.isalnum() or not others)


def _ldconfig(value: str, path: str) -> str:
    """The host's ldconfig, or empty for none: `@` marks a path of the host, and nothing else is ever run."""
    if not value:
        return ""
    if not value.startswith("@/"):
        raise ConfigError(
            f"`{path}`: `nvidia-container-cli.ldconfig` = `{value}` is not a path of the host",
            "write `@` before it; the program of an image is never run",
        )
    return ldconfig_program(value[1:])


def ldconfig_program(program: str) -> str:
    """Ubuntu's ldconfig is a shell script around ldconfig.real; a script cannot be run from a memfd."""
    if not program.endswith(".real") and os.path.exists(program + ".real"):
        return program + ".real"
    if program.endswith(".real") and not os.path.exists(program):
        return program[: -len(".real")]
    return program
