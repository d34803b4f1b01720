# SPDX-License-Identifier: Apache-2.0
"""The container as its engine describes it: the hook's state on stdin and the bundle's config.json.

Formats: the OCI runtime specification, runtime.md (state) and config.md. Past this module nobody picks in raw JSON.
The bundle is written by the engine, which is trusted; `process.env` in it comes from the image, which is not.
"""

from __future__ import annotations

import os

from nvhook.errors import SpecError, reason
from nvhook.formats import quickjson
from nvhook.formats.record import Record

_MAX_STATE = 1 << 20
_MAX_CONFIG = 8 << 20  # an image's environment is in it, and takes tenfold as a record

HOOK = "nvidia-container-runtime-hook"
# Names under which NVIDIA's hook, and ours, are found in a spec (dockerd's --gpus puts one there).
HOOK_NAMES = (HOOK, "nvidia-container-toolkit")
# Where programs are looked up besides PATH.
USUAL_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# The environment of our hooks: nothing of the image's, and not empty, because an empty list means to some runtimes that
# the hook inherits theirs (CVE-2025-23266).
HOOK_ENV = [f"PATH={USUAL_PATH}"]

# (program, first argument) of hooks in CDI specifications, besides NVIDIA's nvidia-cdi-hook
_CDI_HOOKS = (("nvidia-ctk", "hook"), (HOOK, "cdi"))
_LIBRARIES = ("libcuda.so", "libnvidia-ml.so", "libdxcore.so")

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeGuard  # noqa: TID251 - never at run time

    Json = dict[str, Any]


class State(Record):
    """`pid` of the container's first process, in our pid namespace, and the absolute path of its bundle."""

    pid: int
    bundle: str
    id: str


class Spec:
    """What nvhook needs of a config.json.

    env            name -> value; the last of several wins, as in runc
    mounts         (source, destination), as written
    annotations    key -> value
    privileged     CAP_SYS_ADMIN is in the bounding set (NVIDIA's definition)
    rootfs         absolute path of the root filesystem on the host
    bundle         the path of the bundle; empty for a container that has none
    device_rules   linux.resources.devices, in order: the last that matches an access decides
    cdi_injected   the engine has applied a CDI specification of NVIDIA's devices: the container has them already
    """

    __slots__ = ("annotations", "bundle", "cdi_injected", "device_rules", "env", "mounts", "privileged", "rootfs")

    def __init__(
        self,
        *,
        rootfs: str,
        bundle: str = "",
        env: dict[str, str] | None = None,
        mounts: list[tuple[str, str]] | None = None,
        annotations: dict[str, str] | None = None,
        privileged: bool = False,
        device_rules: list[Json] | None = None,
        cdi_injected: bool = False,
    ) -> None:
        self.env = env or {}
        self.mounts = mounts or []
        self.annotations = annotations or {}
        self.privileged = privileged
        self.rootfs = rootfs
        self.bundle = bundle
        self.device_rules = device_rules or []
        self.cdi_injected = cdi_injected

    def allows(self, major: int, minor: int) -> bool:
        """Whether the rules in the spec already let the container open this character device for `rw`."""
        allowed: set[str] = set()
        for rule in self.device_rules:
            if _matches(rule, major, minor):
                access = set(str(rule.get("access") or "rwm"))
                allowed = allowed | access if rule.get("allow") else allowed - access
        return {"r", "w"} <= allowed


def _matches(rule: Json, major: int, minor: int) -> bool:
    return (
        rule.get("type", "a") in ("a", "c", None)
        and _is_wild_or(rule.get("major"), major)
        and _is_wild_or(rule.get("minor"), minor)
    )


def _is_wild_or(value: object, number: int) -> bool:
    return value in (None, -1, number)


def read_state(fd: int) -> State:
    """The state that the low-level runtime writes to a hook's stdin; SpecError if it is none."""
    return parse_state(read_stdin(fd))


def read_stdin(fd: int) -> bytes:
    """All of it; SpecError if that is more than a state has."""
    content = b""
    while chunk := os.read(fd, 65536):
        content += chunk
        if len(content) > _MAX_STATE:
            raise SpecError(f"read the container's state: more than {_MAX_STATE} bytes on stdin")
    return content


def parse_state(content: bytes, *, is_alive: bool = True) -> State:
    """The State in the JSON `content`; SpecError if there is none.

    A container that has been stopped (`is_alive` False) has no process; its `pid` is 0 then, or missing.
    """
    try:
        state = quickjson.loads(content)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"read the container's state: stdin is not JSON: {error}") from None
    if not isinstance(state, dict):
        raise SpecError("read the container's state: stdin is not a JSON object")
    pid = state.get("pid")
    bundle = state.get("bundle") or state.get("bundlePath")  # bundlePath: before OCI 1.0
    if not is_alive:
        pid = 0
    elif not isinstance(pid, int) or isinstance(pid, bool) or pid <= 0:
        raise SpecError(f"read the container's state: `pid` is `{pid}`, not a process")
    if not isinstance(bundle, str) or not os.path.isabs(bundle):
        raise SpecError(f"read the container's state: `bundle` is `{bundle}`, not an absolute path")
    return State(pid, bundle, str(state.get("id") or ""))


def read_config(bundle: str) -> tuple[Json, os.stat_result]:
    """The bundle's config.json, whole, and the status of the file; SpecError names the file and what is wrong."""
    path = os.path.join(bundle, "config.json")
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            content = file.read(_MAX_CONFIG + 1)
    except OSError as error:
        raise SpecError(f"read `{path}`: {reason(error)}") from None
    except ValueError as error:  # a NUL or half a character in the path
        raise SpecError(f"read `{path}`: {error}") from None
    if len(content) > _MAX_CONFIG:
        raise SpecError(f"read `{path}`: more than {_MAX_CONFIG} bytes")
    try:
        config = quickjson.loads(content)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"parse `{path}`: {error}") from None
    if not isinstance(config, dict):
        raise SpecError(f"parse `{path}`: not a JSON object")
    return config, status


def parse(config: Json, bundle: str) -> Spec:
    """The record of a config.json; SpecError where a part that we need is missing or of another form."""
    path = os.path.join(bundle, "config.json")
    process = _object(config, "process", path)
    root = _object(config, "root", path)
    rootfs = root.get("path")
    if not isinstance(rootfs, str) or not rootfs:
        raise SpecError(f"`{path}`: `root.path` is missing")
    linux = _object(config, "linux", path, optional=True)
    resources = _object(linux, "resources", path, optional=True)
    env = _env(process.get("env"), path)
    mounts = [
        (str(mount.get("source") or ""), str(mount.get("destination") or ""))
        for mount in _objects(config.get("mounts"), "mounts", path)
    ]
    # A rootless engine cannot make device nodes, and mounts them.
    paths = [str(node.get("path")) for node in _objects(linux.get("devices"), "linux.devices", path)]
    paths += [destination for _, destination in mounts]
    privileged = "CAP_SYS_ADMIN" in _bounding_set(process.get("capabilities"), path)
    return Spec(
        env=env,
        mounts=mounts,
        annotations=_strings(_object(config, "annotations", path, optional=True), path),
        privileged=privileged,
        rootfs=os.path.normpath(os.path.join(os.path.abspath(bundle), rootfs)),
        bundle=bundle,
        device_rules=_objects(resources.get("devices"), "linux.resources.devices", path),
        cdi_injected=_has_cdi_hook(config) or _has_cdi_edits(paths, env, privileged=privileged),
    )


def _has_cdi_hook(config: Json) -> bool:
    """One of those in CDI specifications of NVIDIA's devices: NVIDIA's own, or ours. No image can write one."""
    hooks = config.get("hooks")
    stages = hooks.values() if isinstance(hooks, dict) else ()
    for hook in (hook for stage in stages if isinstance(stage, list) for hook in stage if isinstance(hook, dict)):
        arguments = hook.get("args")
        command = arguments[1] if isinstance(arguments, list) and len(arguments) > 1 else ""
        program = os.path.basename(str(hook.get("path")))
        if program == "nvidia-cdi-hook" or (program, command) in _CDI_HOOKS:
            return True
    return False


def _has_cdi_edits(paths: list[str], env: dict[str, str], *, privileged: bool) -> bool:
    """What a specification without hooks leaves: device nodes, and the variable `void` or libraries of the driver.

    Nodes alone say nothing: k8s-device-plugin adds them for our sake, and a privileged container has all of the host's.
    """
    if not any(path == "/dev/dxg" or path.startswith("/dev/nvidia") for path in paths):
        return False
    if env.get("NVIDIA_VISIBLE_DEVICES") == "void":
        return True
    return not privileged and any(path.rpartition("/")[2].startswith(_LIBRARIES) for path in paths)


def _object(parent: Json, key: str, path: str, *, optional: bool = False) -> Json:
    value = parent.get(key)
    if value is None and optional:
        return {}
    if not isinstance(value, dict):
        what = "is missing" if value is None else "is not an object"
        raise SpecError(f"`{path}`: `{key}` {what}")
    return value


def _objects(value: object, key: str, path: str) -> list[Json]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise SpecError(f"`{path}`: `{key}` is not a list of objects")
    return value


def _strings(value: Json, path: str) -> dict[str, str]:
    if not all(isinstance(item, str) for item in value.values()):
        raise SpecError(f"`{path}`: `annotations` holds something other than strings")
    return value


def _is_strings(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _env(value: object, path: str) -> dict[str, str]:
    if value is None:
        return {}
    if not _is_strings(value):
        raise SpecError(f"`{path}`: `process.env` is not a list of strings")
    if any("\0" in item for item in value):  # a program would see what is before it, as runc says when it refuses one
        raise SpecError(f"`{path}`: `process.env` holds a NUL character")
    # An entry without `=` is no variable, and takes none away. It has no value that could be looked up on the host
    # either, which is what Podman did (CVE-2026-57231); and a `*` is a character of a name like any other.
    pairs = (item.partition("=") for item in value)
    return {name: content for name, equals, content in pairs if equals}


def _bounding_set(value: object, path: str) -> list[str]:
    if isinstance(value, dict):
        value = value.get("bounding")
    if value is None:
        return []
    if not _is_strings(value):  # a flat list is how OCI 1.0.0-rc1 to rc4 wrote it
        raise SpecError(f"`{path}`: `process.capabilities` is not a list of names")
    return value
