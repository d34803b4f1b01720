# SPDX-License-Identifier: Apache-2.0
"""What a container asks for: devices, driver capabilities, requirements.

The rules are NVIDIA's (NVIDIA Container Toolkit, image model), so that an image means the same here. Nothing of the
host is looked at: whether the devices exist is gpus.py's question.

Where a device list comes from, the first that has one wins:
    annotations   under `annotation-prefixes`, what they name of NVIDIA's (nvidia.com/gpu=0), as far as
                  `accept-device-annotations` of config.toml trusts them
    mounts        /dev/null onto /var/run/nvidia-container-devices/<device>, if config.toml accepts them
    environment   the variables of `swarm-resource` that are set, else NVIDIA_VISIBLE_DEVICES; of an unprivileged
                  container only if config.toml accepts that

A request never widens: a list that wins and is not understood stops the start, and one that the policy drops gives
nothing. The next source is not asked in its place. A container that has its devices by CDI already gets nothing more.
"""

from __future__ import annotations

import posixpath

from nvhook.errors import RequestError
from nvhook.formats.record import Record

from . import device_list
from .config import CAPABILITIES, Config
from .spec import Spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

DEFAULT_CAPABILITIES = ("compute", "utility")
VOLUME_ROOT = "/var/run/nvidia-container-devices/"
ANNOTATIONS, MOUNTS = "annotations", "volume mounts"
_MAX_CHANNEL = (1 << 20) - 1  # a minor number has 20 bits
_MAX_DEVICES = 1024
_MAX_CHANNELS = 2048  # of one container
# NVIDIA_<name>=enabled
FEATURES = ("gds", "mofed", "gdrcopy", "nvswitch")
_TRUE = ("1", "t", "T", "TRUE", "true", "True")  # Go's strconv.ParseBool, which images were written for


class Request(Record):
    """`devices`: ids as written, once each, or ("all",) or ("none",). `capabilities`: sorted names. `requirements`:
    NVIDIA_REQUIRE_* expressions, sorted. `origin`: where the device list came from, for messages.

    imex_channels   numbers, as written, once each
    features        those of FEATURES
    mig_rights      `config`, to set up MIG on the GPUs, and `monitor`, to watch it
    library_path    LD_LIBRARY_PATH: where its programs look for what they get
    """

    devices: tuple[str, ...]
    capabilities: tuple[str, ...]
    requirements: tuple[str, ...]
    origin: str
    imex_channels: tuple[int, ...] = ()
    features: tuple[str, ...] = ()
    mig_rights: tuple[str, ...] = ()
    library_path: str = ""

    def describe(self) -> dict[str, object]:
        """Devices, capabilities and requirements; of the rest what is asked for."""
        further: dict[str, object] = {
            "imex_channels": list(self.imex_channels),
            "features": list(self.features),
            "mig_rights": list(self.mig_rights),
        }
        return {
            "devices": list(self.devices),
            "capabilities": list(self.capabilities),
            "requirements": list(self.requirements),
            **{name: value for name, value in further.items() if value},
        }


def read(spec: Spec, config: Config, warnings: list[str] | None = None) -> Request | None:
    """The request in `spec`, or None for a container that asks for nothing.

    A request that is dropped is named in `warnings`. Raises RequestError for a device list that is not understood, an
    unknown capability, one that config.toml does not support, a CUDA_VERSION that is no version, an IMEX channel that
    is none, and a right to MIG that the container may not have.
    """
    warnings = warnings if warnings is not None else []
    devices, origin = _devices(spec, config, warnings)
    if not devices:
        return None
    legacy = _is_legacy_image(spec.env)
    return Request(
        devices,
        _capabilities(spec.env, config, legacy),
        _requirements(spec.env, config, legacy),
        origin,
        imex_channels=_imex_channels(spec, config, warnings),
        features=tuple(name for name in FEATURES if spec.env.get(f"NVIDIA_{name.upper()}") == "enabled"),
        mig_rights=tuple(right for right in ("config", "monitor") if _has_mig_right(spec, right)),
        library_path=spec.env.get("LD_LIBRARY_PATH", ""),
    )


def _devices(spec: Spec, config: Config, warnings: list[str]) -> tuple[tuple[str, ...], str]:
    lists = device_list.annotated(spec.annotations, config.annotation_prefixes)
    names, source = _found(lists, spec, config)
    if not names or (not lists and "void" in names):
        return (), ""
    if spec.cdi_injected and lists:
        return (), ""  # what the annotations name is what the engine has injected
    dropped = _why_dropped(lists, source, spec, config)
    if dropped:
        warnings.append(dropped)
        return (), ""
    if lists:
        return _decided(_of_annotations(lists, spec, config)), source
    stray = device_list.stray(spec.annotations, config.annotation_prefixes)
    if stray:
        raise device_list.unread(stray, spec.annotations[stray], config.annotation_prefixes)
    return _decided([device_list.plain(name, source, privileged=spec.privileged) for name in _once(names)]), source


def origin(spec: Spec, config: Config) -> str:
    """Where the device list comes from, whatever becomes of it; empty where there is none."""
    names, source = _found(device_list.annotated(spec.annotations, config.annotation_prefixes), spec, config)
    return source if names else ""


def _found(lists: dict[str, list[str]], spec: Spec, config: Config) -> tuple[list[str], str]:
    """The devices as written, and where."""
    if lists:
        return [name for names in lists.values() for name in names], f"{ANNOTATIONS} {', '.join(lists)}"
    if config.accept_volume_mounts:
        devices = [name for name in _from_mounts(spec.mounts) if not name.startswith("imex/")]
        if devices:
            return devices, MOUNTS
    return _from_env(spec.env, config)


def _why_dropped(lists: dict[str, list[str]], source: str, spec: Spec, config: Config) -> str:
    """Why this request gives nothing, for a warning; empty for one that counts."""
    if spec.cdi_injected:
        return f"{source} ignored: the engine has injected the container's devices by CDI already"
    if lists and config.accept_device_annotations is False:
        return f"{source} ignored: `accept-device-annotations` in config.toml is false"
    is_trusted = trusts_annotations(spec, config) if lists else source == MOUNTS
    if is_trusted or spec.privileged or config.accept_env_when_unprivileged:
        return ""
    why = f"{source} of an unprivileged container is ignored, as config.toml says"
    return f"{why}; `accept-device-annotations = true` trusts what this engine passes on" if lists else why


def trusts_annotations(spec: Spec, config: Config) -> bool:
    """Whether they count whatever the policy for variables is; else they count as variables do, or not at all."""
    if config.accept_device_annotations is None:
        return not device_list.passes_on(spec.annotations)
    return config.accept_device_annotations


def _of_annotations(lists: dict[str, list[str]], spec: Spec, config: Config) -> list[str]:
    found = []
    for key, names in lists.items():
        if not device_list.is_read(key, config.annotation_prefixes):
            raise device_list.unread(key, spec.annotations[key], config.annotation_prefixes)
        place = device_list.quoted(key, spec.annotations[key])
        found += [device_list.plain(name, place, privileged=spec.privileged, must_be_cdi=True) for name in _once(names)]
    return found


def _imex_channels(spec: Spec, config: Config, warnings: list[str]) -> tuple[int, ...]:
    if config.ignore_imex_channels:
        return ()
    places = _from_mounts(spec.mounts) if config.accept_volume_mounts else []
    names = [name[len("imex/") :] for name in places if name.startswith("imex/")]
    if names:
        return channels(names, f"a mount below {VOLUME_ROOT}imex")
    names = [name.strip() for name in spec.env.get("NVIDIA_IMEX_CHANNELS", "").split(",") if name.strip()]
    # These words are for GPUs: which channels there are is agreed on by the hosts of a domain, and not by one of them.
    if not names or {"all", "none", "void"} & set(names):
        return ()
    if not (spec.privileged or config.accept_env_when_unprivileged):
        warnings.append("NVIDIA_IMEX_CHANNELS of an unprivileged container is ignored, as config.toml says")
        return ()
    return channels(names, "NVIDIA_IMEX_CHANNELS")


def channels(names: list[str], origin: str) -> tuple[int, ...]:
    """As numbers, once each; RequestError names `origin` and the one that is none."""
    names = list(dict.fromkeys(names))
    if len(names) > _MAX_CHANNELS:  # before the others are read: an image can write a million
        raise RequestError(f"{len(names)} IMEX channels in {origin}, more than {_MAX_CHANNELS}")
    for name in names:
        if not (name.isdecimal() and name.isascii() and len(name) < 8 and int(name) <= _MAX_CHANNEL):
            raise RequestError(f"`{name}` in {origin} is no IMEX channel", f"they are numbers from 0 to {_MAX_CHANNEL}")
    return tuple(dict.fromkeys(int(name) for name in names))


def _has_mig_right(spec: Spec, right: str) -> bool:
    variable = f"NVIDIA_MIG_{right.upper()}_DEVICES"
    value = spec.env.get(variable, "")
    if not value:
        return False
    if not spec.privileged:
        raise RequestError(
            f"{variable} is set for a container that is not privileged",
            "start it with CAP_SYS_ADMIN (`docker run --privileged`), or unset the variable",
        )
    if value.lower() != "all":
        raise RequestError(f"{variable}=`{value}` is not supported", "the one value it can have is `all`")
    return True


def _from_mounts(mounts: list[tuple[str, str]]) -> list[str]:
    """GPUs, and `imex/<channel>`."""
    devices = []
    for source, destination in mounts:
        place = _from_root(destination)
        is_null = source.startswith("/") and _from_root(source) == "/dev/null"
        if not is_null or not place.startswith(VOLUME_ROOT):
            continue
        device = place[len(VOLUME_ROOT) :]
        # Both spellings are known: cdi/vendor/class/device and cdi/vendor/class=device. Others stay unknown devices.
        parts = device.replace("=", "/", 1).split("/")
        if parts[0] == "cdi" and len(parts) == 4 and all(parts):
            device = f"{parts[1]}/{parts[2]}={parts[3]}"
        devices.append(device)
    return devices


def _from_root(path: str) -> str:
    """As runc takes a path: it may begin with two slashes, which normpath keeps, or a destination with none."""
    return posixpath.normpath("/" + path.lstrip("/"))


def _from_env(env: dict[str, str], config: Config) -> tuple[list[str], str]:
    variables = [name for name in config.swarm_resources if name in env] or ["NVIDIA_VISIBLE_DEVICES"]
    label = ", ".join(variables)
    if not any(name in env for name in variables) and _is_legacy_image(env):
        return ["all"], "CUDA_VERSION"
    # Once each, before each is read: a variable can hold millions.
    tokens = dict.fromkeys(token for name in variables for token in map(str.strip, env.get(name, "").split(",")))
    return [token for token in tokens if token], label


def _decided(names: list[str]) -> tuple[str, ...]:
    """Once each; the first of `all` and `none` decides, but not for a device of another vendor, which we have not."""
    found = _once(names)
    total = next((name for name in found if name in ("all", "none")), "")
    if total:
        unknown = next((name for name in found if "=" in name or name.startswith("cdi/")), "")
        if unknown:
            raise RequestError(f"unknown device `{unknown}` is asked for beside `{total}`", "leave it out")
        return (total,)
    return tuple(found)


def _once(names: Iterable[str]) -> dict[str, None]:
    """In their order. RequestError for too many, as soon as that is known: a list may have a million."""
    found: dict[str, None] = {}
    for name in names:
        found[name] = None
        if len(found) > _MAX_DEVICES:
            raise RequestError(f"more than {_MAX_DEVICES} devices are asked for", "ask for `all`")
    return found


def _is_legacy_image(env: dict[str, str]) -> bool:
    """An image from before NVIDIA_REQUIRE_CUDA (nvidia/cuda:8.0): its CUDA_VERSION is request and requirement."""
    return bool(env.get("CUDA_VERSION")) and not env.get("NVIDIA_REQUIRE_CUDA")


def _capabilities(env: dict[str, str], config: Config, legacy: bool) -> tuple[str, ...]:
    supported = config.supported_capabilities
    value = env.get("NVIDIA_DRIVER_CAPABILITIES")
    if value is None and legacy:
        return supported
    names = [name.strip() for name in (value or "").split(",") if name.strip()]
    if not names:
        return tuple(name for name in DEFAULT_CAPABILITIES if name in supported)
    if "all" in names:
        return supported
    for name in names:
        if name not in CAPABILITIES:
            raise RequestError(
                f"unknown capability `{name}` in NVIDIA_DRIVER_CAPABILITIES=`{value}`",
                f"known are {', '.join(CAPABILITIES)} and all",
            )
        if name not in supported:
            raise RequestError(
                f"capability `{name}` in NVIDIA_DRIVER_CAPABILITIES=`{value}` is not allowed on this host",
                f"`supported-driver-capabilities` in config.toml allows {', '.join(supported) or 'none'}",
            )
    return tuple(sorted(set(names)))


def _requirements(env: dict[str, str], config: Config, legacy: bool) -> tuple[str, ...]:
    if config.disable_require or env.get("NVIDIA_DISABLE_REQUIRE") in _TRUE:
        return ()
    found = {
        value
        for name, value in env.items()
        if name.startswith("NVIDIA_REQUIRE_") and not name.startswith("NVIDIA_REQUIRE_JETPACK") and value
    }
    if legacy:
        found.add(f"cuda>={_major_minor(env['CUDA_VERSION'])}")
    return tuple(sorted(found))


def _major_minor(version: str) -> str:
    parts = version.split(".")
    numbers = [part for part in parts[:2] if part.isdecimal() and part.isascii()]
    if len(numbers) < min(2, len(parts)):
        raise RequestError(f"CUDA_VERSION=`{version}` is not a version")
    return ".".join(numbers)
