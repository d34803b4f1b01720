# SPDX-License-Identifier: Apache-2.0
"""The container that `nvhook explain` is asked about, whichever way it is named: an OCI bundle, one that an engine
knows, or a line of `docker run`. Not for what nvhook makes of it."""

from __future__ import annotations

import os

from nvhook.commands import dockerapi
from nvhook.commands.explain import actual, dockerline, locate
from nvhook.request import device_list, spec

# Under these names dockerd, Podman and the wrapper put it there.
_UNKNOWN = "image or command line"
# What these engines write into a config.json besides the annotations of the command line.
_MARKS = {"podman": {"io.container.manager": "libpod"}, "nerdctl": {"nerdctl/namespace": "default"}}


class Subject:
    """The container in question. `origins`: who set a variable; `root` where its files are now, or -1."""

    def __init__(self, described: spec.Spec) -> None:
        self.described = described
        self.container: dict[str, object] = {}
        self.origins: dict[str, str] = {}
        self.unknown = _UNKNOWN  # of a variable that is not among these
        self.notes: list[str] = []
        self.running: actual.RunningContainer | None = None
        self.arguments: list[str] = []
        self.is_served = True  # nvhook is asked at all
        self.is_whole = True  # the root filesystem is the container's

    def origin_of(self, name: str) -> str:
        return self.origins.get(name, self.unknown)


def of_bundle(bundle: str) -> Subject:
    document = spec.read_config(bundle)[0]
    subject = Subject(spec.parse(document, bundle))
    subject.container = {"bundle": os.path.abspath(bundle)}
    subject.arguments = _arguments(document)
    return subject


def of_container(name: str, empty: str) -> Subject:
    found = locate.find(name)
    assert found.described is not None
    subject = Subject(found.described)
    subject.container = found.describe()
    if found.bundle:
        document = spec.read_config(found.bundle)[0]
        subject.arguments = _arguments(document)
        if found.pid and not _has_hook(document):
            subject.notes.append(
                "its config.json has no hook of nvhook's, which was not asked when it started; "
                "start it with --runtime=nvidia or --gpus"
            )
    if found.image is not None:
        for variable, value in found.described.env.items():
            is_of_image = found.image.get(variable) == value
            subject.origins[variable] = f"image {found.image_name}" if is_of_image else "command line"
    if found.gpus:
        for variable in ("NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"):
            if subject.origins.get(variable) != f"image {found.image_name}":
                subject.origins[variable] = "--gpus"
    if found.pid:
        subject.running = actual.RunningContainer(found.pid, found.described)
        subject.described.rootfs = f"/proc/{found.pid}/root"
    elif not os.path.isdir(found.described.rootfs):
        _without_files(subject, empty, "it does not run")
    return subject


def of_line(line: dockerline.Line, rootfs: str, empty: str) -> Subject:
    """A container that is not there yet."""
    image, api = _image(line)
    env = dockerapi.variables(image, "Config", "Env")
    origins = dict.fromkeys(env, f"image {line.image}")
    for name, (value, where) in line.env.items():
        env[name], origins[name] = value, where
    for name, value in line.gpus.items():
        env[name], origins[name] = value, "--gpus"
    described = spec.Spec(
        env=env,
        mounts=line.mounts,
        annotations={**line.annotations, **_MARKS.get(line.engine, {})},
        privileged=line.privileged,
        rootfs=os.path.abspath(rootfs) if rootfs else "",
        device_rules=[],
        cdi_injected=any(map(device_list.is_nvidia, line.cdi)),
    )
    subject = Subject(described)
    subject.origins = origins
    subject.container = {"engine": line.engine, "image": line.image}
    if image is None:
        subject.notes.append(f"{line.engine} has no image {line.image}: its environment variables are unknown")
    _say_who_is_asked(subject, line, api)
    if not rootfs:
        layer = _only_layer(image)
        if layer:
            described.rootfs = layer
        else:
            _without_files(
                subject, empty, "its layers are not unpacked in one place (--rootfs DIR says where they are)"
            )
    return subject


def _image(line: dockerline.Line) -> tuple[dockerapi.Json | None, dockerapi.Api]:
    """What the engine says of the image; None if it does not."""
    api = dockerapi.podman() if line.engine == "podman" else dockerapi.docker()
    found = api.image(line.image)
    if found is None and line.engine == "podman":
        found = locate.podman_image(line.image)
    return found, api


def _say_who_is_asked(subject: Subject, line: dockerline.Line, api: dockerapi.Api) -> None:
    """Whether nvhook has a say in this container."""
    for name in line.cdi:
        subject.notes.append(
            f"--device {name} is a CDI device: {line.engine} makes it of /etc/cdi, nvhook is not asked"
        )
    if line.gpus or line.annotations:
        return
    runtime = line.runtime or str(dockerapi.member(api.info(), "DefaultRuntime") or "")
    if not runtime:
        subject.notes.append(
            f"without --runtime and --gpus nvhook is asked only if it is {line.engine}'s default runtime"
        )
    elif "nvidia" not in runtime:
        subject.is_served = False
        subject.notes.append(
            f"nvhook is not asked: the runtime is {runtime}, and there is no --gpus; add --runtime=nvidia or --gpus"
        )


def _only_layer(image: dockerapi.Json | None) -> str:
    """The directory of an image with one layer; of others no directory has all files."""
    data = dockerapi.member(image, "GraphDriver", "Data")
    if not isinstance(data, dict) or data.get("LowerDir"):
        return ""
    path = str(data.get("UpperDir") or "")
    return path if os.path.isabs(path) and os.path.isdir(path) else ""


def _without_files(subject: Subject, empty: str, why: str) -> None:
    subject.described.rootfs = empty
    subject.is_whole = False
    subject.notes.append(f"the image's files are not inspected, and paths are those of an empty image: {why}")


def _has_hook(document: spec.Json) -> bool:
    hooks = document.get("hooks")
    stages = hooks.values() if isinstance(hooks, dict) else []
    listed = [hook for stage in stages if isinstance(stage, list) for hook in stage if isinstance(hook, dict)]
    return any(os.path.basename(str(hook.get("path"))) in spec.HOOK_NAMES for hook in listed)


def _arguments(document: spec.Json) -> list[str]:
    arguments = document["process"].get("args") if isinstance(document.get("process"), dict) else None
    return [str(item) for item in arguments] if isinstance(arguments, list) else []
