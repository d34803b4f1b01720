# SPDX-License-Identifier: Apache-2.0
"""Which container is meant by a name: its bundle and its process, as runc and crun keep them, and its image's variables
where an engine tells them.

Only engines' own directories are read, which are root's. A process is believed to be a container's if it began when the
runtime says that it did: a number may be another's by now.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from typing import Any

from nvhook.commands import dockerapi
from nvhook.commands.dockerapi import Json, member, variables
from nvhook.errors import ContainerError, reason
from nvhook.request import device_list, spec

# Below /run -> the names of containers; a star stands for any one directory.
_STATES = (
    "runc",
    "crun",
    "docker/runtime-*/*",
    "containerd/runc/*",
    "containerd/runtime-runc/*",
    "user/*/runc",
    "user/*/crun",
)
_FILES = ("state.json", "status")  # runc's and crun's
_MAX_STATE = 16 << 20  # runc writes the whole configuration into it
_SECONDS = 20
_MAX_SHOWN = 5


class Found:
    """`pid` of its first process, or 0 when there is none; `image`: its variables, None: not known; `gpus` what
    `--gpus` has asked for; `bundle` and `described` as spec.py has them."""

    __slots__ = ("bundle", "described", "engine", "gpus", "id", "image", "image_name", "name", "pid")

    def __init__(self, id: str, *, engine: str = "", bundle: str = "", pid: int = 0) -> None:  # noqa: A002 - OCI's name
        self.id = id
        self.engine = engine
        self.bundle = bundle
        self.pid = pid
        self.name = ""
        self.image: dict[str, str] | None = None
        self.image_name = ""
        self.gpus = False
        self.described: spec.Spec | None = None

    def describe(self) -> dict[str, object]:
        return {
            "id": self.id,
            "name": self.name,
            "engine": self.engine,
            "image": self.image_name,
            "bundle": self.bundle,
            "pid": self.pid,
        }


def find(name: str, *, run: str = "/run") -> Found:
    """The container of that id, name, or beginning of an id that no other has; ContainerError where there is none."""
    states = _states(run)
    docker: Json | None = None
    refused: ContainerError | None = None
    try:
        docker = dockerapi.docker().container(name)
    except ContainerError as error:
        refused = error  # it matters if the container is not found without
    podman: Json | None = None
    found: Found | None
    if docker:
        found = _by_id(str(docker.get("Id")), states) or Found(str(docker.get("Id")))
        _add_docker(found, docker)
    else:
        found = _by_id(name, states)
        podman = _podman("container", name) if found is None else None
        if podman:
            found = _by_id(str(podman.get("Id")), states) or Found(str(podman.get("Id")))
        found = found or _by_beginning(name, states)
    if found is None:
        raise refused or _unknown(name, run)
    if found.bundle:
        found.described = spec.parse(spec.read_config(found.bundle)[0], found.bundle)
        if not docker and found.described.annotations.get("io.container.manager") == "libpod":
            _add_podman(found, podman or _podman("container", found.id))
    elif podman:
        _add_podman(found, podman)
    if found.described is None:
        raise ContainerError(f"container `{name}` does not run, and there is no bundle of it", "start it first")
    return found


def _unknown(name: str, run: str) -> ContainerError:
    remedy = "see `docker ps`, `podman ps` or `ctr -n NAMESPACE containers ls` for their names"
    if os.geteuid() != 0:
        remedy = "run nvhook as root: what runtimes keep there is not for others to see"
    what = f"no container `{name}`: neither Docker nor Podman knows it, nor runc or crun below `{run}`"
    return ContainerError(what, remedy)


def _states(run: str) -> dict[str, str]:
    """Container id -> the file with its state; /run/user counts for its user alone."""
    found: dict[str, str] = {}
    for pattern in _STATES:
        for directory in _matching(run, pattern.split("/")):
            if "/user/" in directory and os.stat(directory).st_uid != os.geteuid():
                continue
            for name in _names(directory):
                path = next(
                    (f"{directory}/{name}/{file}" for file in _FILES if _is_file(f"{directory}/{name}/{file}")), ""
                )
                if path:
                    found.setdefault(name, path)
    return found


def _matching(top: str, parts: list[str]) -> list[str]:
    if not parts:
        return [top]
    name, star, _ = parts[0].partition("*")
    names = [entry for entry in _names(top) if entry.startswith(name)] if star else parts[:1]
    return [path for entry in names for path in _matching(f"{top}/{entry}", parts[1:]) if os.path.isdir(path)]


def _names(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


def _is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path, follow_symlinks=False).st_mode)
    except OSError:
        return False


def _by_id(name: str, states: dict[str, str]) -> Found | None:
    return _read(name, states[name]) if name in states else None


def _by_beginning(name: str, states: dict[str, str]) -> Found | None:
    names = [known for known in sorted(states) if known.startswith(name)] if name else []
    if len(names) > 1:
        shown = ", ".join(names[:_MAX_SHOWN])
        raise ContainerError(f"`{name}` is the beginning of {len(names)} containers: {shown}", "write more of the id")
    return _by_id(names[0], states) if names else None


def _read(name: str, path: str) -> Found:
    """The record in runc's or crun's file."""
    try:
        with open(path, "rb") as file:
            document: Any = json.loads(file.read(_MAX_STATE))
        if path.endswith("state.json"):
            labels = [label.partition("=") for label in member(document, "config", "labels") or []]
            bundle = next((value for key, _, value in labels if key == "bundle"), "")
            pid, start = int(document["init_process_pid"]), document["init_process_start"]
        else:
            bundle, pid, start = document["bundle"], int(document["pid"]), document["process-start-time"]
    except OSError as error:
        raise ContainerError(f"read `{path}`: {reason(error)}", "run nvhook as root") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ContainerError(f"read `{path}`: {error!r}", "is it a container of runc or crun?") from None
    engine = path.split("/")[2] if path.startswith("/run/") else ""
    return Found(name, engine=engine, bundle=str(bundle), pid=pid if _start(pid) == start else 0)


def _start(pid: int) -> int:
    """When the process began, in ticks since the boot (proc_pid_stat(5)); -1 if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read(4096).rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return -1


def _add_docker(found: Found, document: Json) -> None:
    found.engine = "docker"
    found.name = str(document.get("Name") or "").lstrip("/")
    found.image_name = str(member(document, "Config", "Image") or "")
    requests = member(document, "HostConfig", "DeviceRequests") or []
    found.gpus = any(item.get("Driver") == "nvidia" or "gpu" in str(item.get("Capabilities")) for item in requests)
    image = dockerapi.docker().image(str(document.get("Image") or ""))
    found.image = variables(image, "Config", "Env") if image else None
    if not found.bundle:
        found.described = _imagined(document)


def _imagined(document: Json) -> spec.Spec:
    """A container that does not run: what it would be started with, over a root filesystem that is not there."""
    host = document.get("HostConfig") or {}
    mounts = [(str(item.get("Source")), str(item.get("Destination"))) for item in document.get("Mounts") or []]
    added = [str(name).upper().removeprefix("CAP_") for name in host.get("CapAdd") or []]
    return spec.Spec(
        env=variables(document, "Config", "Env"),
        mounts=mounts,
        annotations={str(key): str(value) for key, value in (host.get("Annotations") or {}).items()},
        privileged=bool(host.get("Privileged")) or bool({"SYS_ADMIN", "ALL"} & set(added)),
        rootfs="",
        device_rules=[],
        cdi_injected=any(
            device_list.is_nvidia(str(name))
            for item in host.get("DeviceRequests") or []
            if item.get("Driver") == "cdi"
            for name in item.get("DeviceIDs") or []
        ),
    )


def _podman(kind: str, name: str) -> Json | None:
    """`podman inspect`, which needs no service to run; None where there is no Podman, or nothing of that name."""
    program = shutil.which("podman")
    if program is None or name.startswith("-"):
        return None
    command = [program, "inspect", "--type", kind, "--", name]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False)  # noqa: S603 - no shell
        document = json.loads(done.stdout or b"[]")
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None
    return document[0] if isinstance(document, list) and document and isinstance(document[0], dict) else None


def podman_image(name: str) -> Json | None:
    return _podman("image", name)


def _add_podman(found: Found, document: Json | None) -> None:
    found.engine = "podman"
    if document is None:
        return
    found.name = str(document.get("Name") or "")
    found.image_name = str(document.get("ImageName") or "")
    image = _podman("image", str(document.get("Image") or ""))
    found.image = variables(image, "Config", "Env") if image else None
    if not found.bundle:
        found.described = _imagined(document)
