# SPDX-License-Identifier: Apache-2.0
"""What a container asks for: devices, driver capabilities, requirements.

The rules are NVIDIA's (NVIDIA Container Toolkit, image model), so that an image means the same here. Nothing of the
host is looked at: whether the devices exist is gpus.py's question.

Where a device list comes from, the first that has one wins:
    annotations   `cdi.k8s.io/*`, when every name in them is fully qualified (nvidia.com/gpu=0)
    mounts        /dev/null onto /var/run/nvidia-container-devices/<device>, if config.toml accepts them
    environment   the variables of `swarm-resource` that are set, else NVIDIA_VISIBLE_DEVICES; of an unprivileged
                  container only if config.toml accepts that
"""

from __future__ import annotations

import posixpath

from .config import CAPABILITIES, Config
from .errors import RequestError
from .spec import Spec

DEFAULT_CAPABILITIES = ("compute", "utility")
VOLUME_ROOT = "/var/run/nvidia-container-devices/"
_ANNOTATION_PREFIX = "cdi.k8s.io/"
_OUR_KINDS = ("nvidia.com/gpu=", "runtime.nvidia.com/gpu=")
_TRUE = ("1", "t", "T", "TRUE", "true", "True")  # Go's strconv.ParseBool, which images were written for


class Request:
    """`devices`: ids as written, once each, or ("all",) or ("none",). `capabilities`: sorted names. `requirements`:
    NVIDIA_REQUIRE_* expressions, sorted. `origin`: where the device list came from, for messages."""

    __slots__ = ("capabilities", "devices", "origin", "requirements")

    def __init__(
        self,
        devices: tuple[str, ...],
        capabilities: tuple[str, ...],
        requirements: tuple[str, ...],
        origin: str,
    ) -> None:
        self.devices = devices
        self.capabilities = capabilities
        self.requirements = requirements
        self.origin = origin

    def describe(self) -> dict[str, list[str]]:
        return {
            "devices": list(self.devices),
            "capabilities": list(self.capabilities),
            "requirements": list(self.requirements),
        }


def read(spec: Spec, config: Config, warnings: list[str] | None = None) -> Request | None:
    """The request in `spec`, or None for a container that asks for nothing.

    A request that the policy drops is named in `warnings`. Raises RequestError for an unknown capability, one that
    config.toml does not support, and a CUDA_VERSION that is no version.
    """
    devices, origin = _devices(spec, config, warnings if warnings is not None else [])
    if not devices:
        return None
    legacy = _is_legacy_image(spec.env)
    return Request(devices, _capabilities(spec.env, config, legacy), _requirements(spec.env, config, legacy), origin)


def _devices(spec: Spec, config: Config, warnings: list[str]) -> tuple[tuple[str, ...], str]:
    devices = _from_annotations(spec.annotations)
    if devices:
        return _normalised(devices), "annotations"
    if config.accept_volume_mounts:
        devices = _from_mounts(spec.mounts)
        if devices:
            return _normalised(devices), "volume mounts"
    devices, variable = _from_env(spec.env, config)
    names = _normalised(devices)
    if names and not (spec.privileged or config.accept_env_when_unprivileged):
        warnings.append(f"{variable} of an unprivileged container is ignored, as config.toml says")
        return (), ""
    return names, variable


def _from_annotations(annotations: dict[str, str]) -> list[str]:
    names = [
        name.strip()
        for key in sorted(annotations)
        if key.startswith(_ANNOTATION_PREFIX)
        for name in annotations[key].split(",")
        if name.strip()
    ]
    if not all(_is_qualified(name) for name in names):
        return []
    return [name for name in names if name.startswith(_OUR_KINDS)]  # other vendors' are the engine's business


def _is_qualified(name: str) -> bool:
    kind, equals, device = name.partition("=")
    vendor, slash, class_name = kind.partition("/")
    return bool(vendor and slash and class_name and equals and device)


def _from_mounts(mounts: list[tuple[str, str]]) -> list[str]:
    devices = []
    for source, destination in mounts:
        place = posixpath.normpath(destination)
        if posixpath.normpath(source) != "/dev/null" or not place.startswith(VOLUME_ROOT):
            continue
        device = place[len(VOLUME_ROOT) :]
        if device.startswith("cdi/"):
            device = device[len("cdi/") :]
            if "=" not in device:  # both spellings are known: vendor/class/device and vendor/class=device
                device = "=".join(device.rsplit("/", 1))
        if not device.startswith("imex/"):
            devices.append(device)
    return devices


def _from_env(env: dict[str, str], config: Config) -> tuple[list[str], str]:
    variables = [name for name in config.swarm_resources if name in env] or ["NVIDIA_VISIBLE_DEVICES"]
    label = ", ".join(variables)
    if not any(name in env for name in variables) and _is_legacy_image(env):
        return ["all"], "CUDA_VERSION"
    tokens = [token.strip() for name in variables for token in env.get(name, "").split(",")]
    return [token for token in tokens if token], label


def _normalised(devices: list[str]) -> tuple[str, ...]:
    """Once each, our CDI kinds taken off; `void` anywhere cancels, the first of `all` and `none` decides."""
    if "void" in devices:
        return ()
    names = []
    for device in devices:
        name = device
        for kind in _OUR_KINDS:
            name = name.removeprefix(kind)
        if name in ("all", "none"):
            return (name,)
        names.append(name)
    return tuple(dict.fromkeys(names))


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
