# SPDX-License-Identifier: Apache-2.0
"""A request never widens: a device list is understood, refused in one line, or dropped. Nothing takes its place.

From config.json to the request, in a container whose image asks for everything.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nvhook import audit
from nvhook.errors import RequestError
from nvhook.request import config, request, spec

DEVICES = "NVIDIA_VISIBLE_DEVICES"
REFUSE = "accept-nvidia-visible-devices-envvar-when-unprivileged = false\n"
MOUNTS = "accept-nvidia-visible-devices-as-volume-mounts = true\n"
OFF = "accept-device-annotations = false\n"
ON = "accept-device-annotations = true\n"
KEY = "cdi.k8s.io/x"
ALL = [f"{DEVICES}=all", "NVIDIA_DRIVER_CAPABILITIES=all", "NVIDIA_IMEX_CHANNELS=0", "NVIDIA_GDS=enabled"]
PRIVILEGED = {"capabilities": {"bounding": ["CAP_SYS_ADMIN"]}}


def _document(annotations: dict[str, str], env: list[str] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "process": {"env": ALL if env is None else env, **more.pop("process", {})},
        "root": {"path": "rootfs"},
        "annotations": annotations,
        **more,
    }


def _ask(
    place: Path, document: dict[str, Any], policy: str = "", warnings: list[str] | None = None
) -> tuple[str, ...] | None:
    (place / "config.json").write_text(json.dumps(document))
    (place / "config.toml").write_text(policy)
    described = spec.parse(spec.read_config(str(place))[0], str(place))
    asked = request.read(described, config.load(str(place / "config.toml")), warnings)
    return asked.devices if asked else None


def _null(*places: str) -> list[dict[str, str]]:
    return [{"source": "/dev/null", "destination": f"/var/run/nvidia-container-devices/{place}"} for place in places]


# Annotations that are not understood

NOT_UNDERSTOOD = {
    "unknown-class": (KEY, "nvidia.com/unknown=0", "is of an unknown kind `nvidia.com/unknown`"),
    "class-of-a-resource": (KEY, "nvidia.com/mig-1g.10gb=0", "is of an unknown kind `nvidia.com/mig-1g.10gb`"),
    "unknown-vendor": (KEY, "foo.nvidia.com/gpu=0", "is of an unknown kind `foo.nvidia.com/gpu`"),
    "claim-of-dra": (KEY, "k8s.gpu.nvidia.com/claim=1-0", "is of an unknown kind `k8s.gpu.nvidia.com/claim`"),
    "class-of-the-device-plugin": (KEY, "k8s.device-plugin.nvidia.com/gds=all", "is of an unknown kind"),
    "vendor-in-capitals": (KEY, "NVIDIA.com/gpu=0", "is of an unknown kind `NVIDIA.com/gpu`"),
    "no-kind": (KEY, "0", "`0` in the annotation `cdi.k8s.io/x`=`0` is not a CDI name"),
    "no-kind-for-all": (KEY, "all", "is not a CDI name"),
    "void": (KEY, "void", "is not a CDI name"),
    "one-of-two": (KEY, "nvidia.com/gpu=0,1", "`1` in the annotation"),
    "one-of-two-vendors": (KEY, "vendor.com/net=0,1", "`1` in the annotation"),
    "known-and-unknown": (KEY, "nvidia.com/gpu=0,nvidia.com/foo=0", "`nvidia.com/foo=0` in the annotation"),
    "all-and-unknown": (KEY, "nvidia.com/gpu=all,nvidia.com/foo=0", "is of an unknown kind `nvidia.com/foo`"),
    "no-device": (KEY, "nvidia.com/gpu=", "is not a CDI name"),
    "no-equals": (KEY, "nvidia.com/gpu", "is not a CDI name"),
    "no-class": (KEY, "nvidia.com/=0", "is not a CDI name"),
    "no-vendor": (KEY, "/gpu=0", "is not a CDI name"),
    "vendor-with-a-dot-at-its-end": (KEY, "nvidia.com./gpu=0", "is not a CDI name"),
    "vendor-with-a-hyphen-before-it": (KEY, "-nvidia.com/gpu=0", "is not a CDI name"),
    "class-with-a-dot-at-its-end": (KEY, "vendor.com/net.=0", "is not a CDI name"),
    "device-with-a-hyphen-before-it": (KEY, "vendor.com/net=-0", "is not a CDI name"),
    "semicolons": (KEY, "nvidia.com/gpu;0", "is not a CDI name"),
    "json": (KEY, '["nvidia.com/gpu=0"]', "is not a CDI name"),
    "mig-for-a-gpu": (KEY, "nvidia.com/mig=0", "names no MIG device"),
    "mig-for-all": (KEY, "nvidia.com/mig=all", "names no MIG device"),
    "management-unprivileged": (KEY, "management.nvidia.com/gpu=all", "is for privileged containers alone"),
    "management-of-one": (KEY, "management.nvidia.com/gpu=0", "is not a device of this kind"),
    "key-of-another-domain-of-cdi": ("x.cdi.k8s.io/a", "nvidia.com/gpu=0", "under a key that is not read"),
    "key-in-capitals": ("CDI.k8s.io/a", "nvidia.com/gpu=0", "under a key that is not read"),
    "key-of-anybody": ("example.com/devices", "nvidia.com/gpu=0", "under a key that is not read"),
    "key-of-anybody-and-two-vendors": ("a", "vendor.com/net=1,nvidia.com/gpu=0", "under a key that is not read"),
}  # fmt: skip


@pytest.mark.parametrize(("key", "value", "message"), NOT_UNDERSTOOD.values(), ids=NOT_UNDERSTOOD)
@pytest.mark.parametrize("policy", ["", ON, MOUNTS], ids=["auto", "on", "mounts"])
def test_annotation_is_refused(tmp_path: Path, key: str, value: str, message: str, policy: str) -> None:
    """In one line that names the key, the value and what to do; the image's `all` does not apply."""
    with pytest.raises(RequestError) as raised:
        _ask(tmp_path, _document({key: value}, mounts=_null("all")), policy)
    line = str(raised.value)
    assert message in line
    assert f"`{key}`=`{value}`" in line
    assert raised.value.remedy
    assert line.isprintable()


def test_annotation_of_anybody_is_no_request_by_itself(tmp_path: Path) -> None:
    """It is refused where something weaker would count in its place, and a note where nothing does."""
    assert _ask(tmp_path, _document({"example.com/devices": "nvidia.com/gpu=0"}, env=[])) is None
    assert _ask(tmp_path, _document({"example.com/devices": "nvidia.com/gpu=0"}), REFUSE) is None


def test_long_value_is_cut_in_the_message(tmp_path: Path) -> None:
    with pytest.raises(RequestError) as raised:
        _ask(tmp_path, _document({KEY + "x" * 10_000: f"nvidia.com/foo={'0' * 10_000}"}))
    assert len(str(raised.value)) < 1500


def test_management_is_for_privileged_containers(tmp_path: Path) -> None:
    for document in (
        _document({KEY: "management.nvidia.com/gpu=all"}, env=[], process=PRIVILEGED),
        _document({}, env=[f"{DEVICES}=management.nvidia.com/gpu=all"], process=PRIVILEGED),
    ):
        assert _ask(tmp_path, document, REFUSE) == ("all",)


# The other sources

LISTS = {
    "unknown-class": (["nvidia.com/unknown=0"], "unknown kind"),
    "unknown-class-and-all": (["nvidia.com/unknown=0", "all"], "unknown kind"),
    "all-and-unknown-class": (["all", "foo.nvidia.com/gpu=1"], "unknown kind"),
    "no-device": (["nvidia.com/gpu="], "names no device"),
    "no-device-of-the-runtime": (["runtime.nvidia.com/gpu=", "all"], "names no device"),
    "kind-alone-and-all": (["nvidia.com/gpu", "all"], "names no device"),
    "mig-for-a-gpu": (["nvidia.com/mig=1"], "names no MIG device"),
    "mig-for-all": (["nvidia.com/mig=all"], "names no MIG device"),
    "management": (["management.nvidia.com/gpu=all"], "privileged containers alone"),
    "another-vendor-and-all": (["vendor.com/foo=x", "nvidia.com/gpu=all"], "`vendor.com/foo=x` is asked for beside"),
    "none-and-another-vendor": (["none", "vendor.com/foo=x"], "`vendor.com/foo=x` is asked for beside `none`"),
}


@pytest.mark.parametrize(("names", "message"), LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("variable", [DEVICES, "DOCKER_RESOURCE_GPU"])
def test_list_of_a_variable_is_refused(tmp_path: Path, names: list[str], message: str, variable: str) -> None:
    env = [f"{DEVICES}=all", f"{variable}={','.join(names)}"]
    with pytest.raises(RequestError, match=message) as raised:
        _ask(tmp_path, _document({}, env), "swarm-resource = 'DOCKER_RESOURCE_GPU'")
    assert variable in str(raised.value) or "is asked for beside" in message


PLACES = {
    "unknown-class": (["cdi/nvidia.com/unknown/0"], "unknown kind"),
    "unknown-class-and-all": (["cdi/nvidia.com/unknown=0", "all"], "unknown kind"),
    "no-device-and-all": (["cdi/nvidia.com/gpu", "all"], "`cdi/nvidia.com/gpu` is asked for beside `all`"),
    "nothing-but-all": (["cdi/x", "cdi/nvidia.com/gpu/all"], "`cdi/x` is asked for beside `all`"),
    "mig-for-a-gpu": (["cdi/nvidia.com/mig/0"], "names no MIG device"),
    "management": (["cdi/management.nvidia.com/gpu/all"], "privileged containers alone"),
    "another-vendor-and-all": (["cdi/vendor.com/net/0", "all"], "`vendor.com/net=0` is asked for beside `all`"),
}


@pytest.mark.parametrize(("places", "message"), PLACES.values(), ids=PLACES)
def test_list_of_mounts_is_refused(tmp_path: Path, places: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        _ask(tmp_path, _document({}, mounts=_null(*places)), MOUNTS)


@pytest.mark.parametrize("place", ["cdi/all", "cdi", "cdi/a/all", "cdi/nvidia.com/gpu/0/all", "cdi/nvidia.com//all"])
def test_mount_of_an_unknown_shape_is_an_unknown_device(tmp_path: Path, place: str) -> None:
    """Which selection.py refuses; neither `all`, nor the variable in its place."""
    found = _ask(tmp_path, _document({}, mounts=_null(place)), MOUNTS)
    assert found == (place.replace("//", "/"),)


@pytest.mark.parametrize("name", ["nvidia.com/gpu/1", "nvidia.com/gpu=1", "k8s.device-plugin.nvidia.com/gpu/1"])
def test_mount_of_cdi(tmp_path: Path, name: str) -> None:
    assert _ask(tmp_path, _document({}, mounts=_null(f"cdi/{name}")), MOUNTS) == ("1",)


# Who is trusted

SMUGGLED = {KEY: "nvidia.com/gpu=all"}
# What each engine leaves in a config.json beside what it was given.
ENGINES: dict[str, dict[str, str]] = {
    "podman": {"io.container.manager": "libpod"},
    "podman-in-a-pod": {"io.podman.annotations.autoremove": "FALSE"},
    "nerdctl": {"nerdctl/namespace": "default"},
    "containerd-cri": {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.container-name": "a"},
    "containerd-cri-restored": {"io.kubernetes.cri.container-type": "container", "restored": "true"},
    "cri-o": {"io.container.manager": "cri-o", "io.kubernetes.cri-o.ContainerType": "container"},
}
NO_MARK: dict[str, str] = {}


@pytest.mark.parametrize("marks", [*ENGINES.values(), NO_MARK], ids=[*ENGINES, "docker"])
@pytest.mark.parametrize("policy", [OFF, OFF + REFUSE, OFF + MOUNTS])
@pytest.mark.parametrize("process", [{}, PRIVILEGED], ids=["unprivileged", "privileged"])
def test_key_is_off(tmp_path: Path, marks: dict[str, str], policy: str, process: dict[str, Any]) -> None:
    """CVE-2026-53492: an annotation out of a checkpoint gets nothing, and neither does what is weaker."""
    warnings: list[str] = []
    document = _document({**SMUGGLED, **marks}, mounts=_null("all"), process=process)
    assert _ask(tmp_path, document, policy, warnings) is None
    assert warnings == [f"annotations {KEY} ignored: `accept-device-annotations` in config.toml is false"]


@pytest.mark.parametrize("value", ["nvidia.com/unknown=0", "0", "nvidia.com/gpu="])
def test_key_is_off_and_nothing_is_understood(tmp_path: Path, value: str) -> None:
    assert _ask(tmp_path, _document({KEY: value}), OFF) is None


def test_key_is_off_and_another_vendor_s_device_is_no_matter(tmp_path: Path) -> None:
    assert _ask(tmp_path, _document({KEY: "vendor.com/net=0"}, [f"{DEVICES}=1"]), OFF) == ("1",)


@pytest.mark.parametrize("marks", ENGINES.values(), ids=ENGINES)
def test_auto_holds_an_engine_that_passes_annotations_on_to_the_key_of_variables(
    tmp_path: Path, marks: dict[str, str]
) -> None:
    warnings: list[str] = []
    annotations = {KEY: "nvidia.com/gpu=0", **marks}
    assert _ask(tmp_path, _document(annotations, mounts=_null("1")), REFUSE + MOUNTS, warnings) is None
    assert len(warnings) == 1
    assert warnings[0].startswith(f"annotations {KEY} of an unprivileged container is ignored, as config.toml says; ")
    assert _ask(tmp_path, _document(annotations), "") == ("0",)
    assert _ask(tmp_path, _document(annotations, process=PRIVILEGED), REFUSE) == ("0",)
    assert _ask(tmp_path, _document(annotations), REFUSE + ON) == ("0",)


@pytest.mark.parametrize("policy", [REFUSE, REFUSE + MOUNTS, REFUSE + "accept-device-annotations = 'auto'\n"])
def test_auto_trusts_the_command_line_of_docker(tmp_path: Path, policy: str) -> None:
    assert _ask(tmp_path, _document({KEY: "nvidia.com/gpu=0"}, mounts=_null("1")), policy) == ("0",)


def test_audit_names_the_key_of_a_request_that_is_dropped(tmp_path: Path) -> None:
    log = tmp_path / "log"
    policy = f"{OFF}[nvidia-container-runtime]\ndebug = '{log}'\n[nvhook]\ndev-root = '{tmp_path}'\n"
    (tmp_path / "config.toml").write_text(policy)
    trail = audit.Audit(config.load(str(tmp_path / "config.toml")), "hook", "name")
    described = spec.parse(_document({"cdi.k8s.io/smuggled": "nvidia.com/gpu=all"}), "/b")
    dropped: list[str] = []
    trail.spec = described
    assert request.read(described, config.load(str(tmp_path / "config.toml")), dropped) is None
    trail.begin(None, dropped)
    (line,) = log.read_text().splitlines()
    told = json.loads(line.partition(" msg=")[2])
    assert told.startswith('hook: GPUs refused: container="name" asked_by="annotations cdi.k8s.io/smuggled" why="annot')


# What the engine has injected

NODES = {"linux": {"devices": [{"path": path, "type": "c"} for path in ("/dev/nvidia0", "/dev/nvidiactl")]}}
LIBRARY = {"source": "/usr/lib/libcuda.so.1", "destination": "/usr/lib/libcuda.so.1"}


def _hook(stage: str, path: str, *words: str) -> dict[str, Any]:
    return {"hooks": {stage: [{"path": "/usr/bin/other"}, {"path": path, "args": [path.rpartition("/")[2], *words]}]}}


INJECTED: dict[str, dict[str, Any]] = {
    "nvidia-cdi-hook": {**NODES, **_hook("createContainer", "/usr/bin/nvidia-cdi-hook", "update-ldcache")},
    "nvidia-ctk": _hook("createContainer", "/usr/bin/nvidia-ctk", "hook", "create-symlinks"),
    "ours": _hook("createRuntime", "/usr/local/bin/nvidia-container-runtime-hook", "cdi", "--capabilities", "utility"),
    "no-hook": {**NODES, "mounts": [LIBRARY]},
    "rootless-podman": {"mounts": [{"source": "/dev/nvidia0", "destination": "/dev/nvidia0"}, LIBRARY]},
    "wsl": {"linux": {"devices": [{"path": "/dev/dxg"}]}, "mounts": [{"destination": "/usr/lib/libdxcore.so"}]},
}


@pytest.mark.parametrize("edits", INJECTED.values(), ids=INJECTED)
@pytest.mark.parametrize("value", ["nvidia.com/gpu=0", "k8s.gpu.nvidia.com/claim=1-0"])
@pytest.mark.parametrize("policy", ["", OFF, REFUSE + MOUNTS])
def test_nothing_is_given_twice(tmp_path: Path, edits: dict[str, Any], value: str, policy: str) -> None:
    """The engine has resolved the annotation, whatever its kind is; the image's `all` does not come on top."""
    warnings: list[str] = []
    assert _ask(tmp_path, _document({KEY: value}, **edits), policy, warnings) is None
    assert warnings == []


@pytest.mark.parametrize("edits", INJECTED.values(), ids=INJECTED)
def test_variable_of_an_image_is_not_added_to_injected_devices(tmp_path: Path, edits: dict[str, Any]) -> None:
    """`docker run --device nvidia.com/gpu=0 --runtime=nvidia`, of a specification that does not set it to void."""
    warnings: list[str] = []
    assert _ask(tmp_path, _document({}, **edits), "", warnings) is None
    assert warnings == [f"{DEVICES} ignored: the engine has injected the container's devices by CDI already"]


def test_void_of_a_specification_without_hooks(tmp_path: Path) -> None:
    env = [*ALL, f"{DEVICES}=void"]
    assert _ask(tmp_path, _document({KEY: "nvidia.com/gpu=0"}, env, **NODES)) is None
    # An image's own `void`, without nodes, takes nothing from a container that asks by annotation.
    assert _ask(tmp_path, _document({KEY: "nvidia.com/gpu=0"}, env)) == ("0",)


NOT_INJECTED: dict[str, dict[str, Any]] = {
    "nodes-of-the-device-plugin": NODES,
    "nodes-of-a-privileged-container": {**NODES, "mounts": [LIBRARY], "process": PRIVILEGED},
    "library-alone": {"mounts": [LIBRARY]},
    "hook-of-dockerd": _hook("prestart", "/usr/bin/nvidia-container-runtime-hook", "prestart"),
    "hook-of-another-command": _hook("createContainer", "/usr/bin/nvidia-ctk", "runtime"),
    "hooks-of-no-form": {"hooks": {"prestart": [7, {"path": 7, "args": 7}], "createContainer": 7}},
    "hooks-that-are-none": {"hooks": 7, "linux": {"devices": [{}, {"path": 7}]}},
}


@pytest.mark.parametrize("edits", NOT_INJECTED.values(), ids=NOT_INJECTED)
def test_what_is_no_injection(tmp_path: Path, edits: dict[str, Any]) -> None:
    assert _ask(tmp_path, _document({KEY: "nvidia.com/gpu=0"}, **edits)) == ("0",)
    assert _ask(tmp_path, _document({}, [f"{DEVICES}=1"], **edits)) == ("1",)


# The environment: CVE-2026-57231


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        pytest.param([DEVICES], None, id="without-equals"),
        pytest.param([f"{DEVICES}=0", DEVICES], ("0",), id="without-equals-after-a-value"),
        pytest.param([DEVICES, f"{DEVICES}=0"], ("0",), id="without-equals-before-a-value"),
        pytest.param(["NVIDIA_*", "*", "NVIDIA_*=all"], None, id="asterisk"),
        pytest.param([f"{DEVICES}=0", "NVIDIA_VISIBLE_*=all"], ("0",), id="asterisk-with-a-value"),
        pytest.param([f"{DEVICES}=all", f"{DEVICES}=0"], ("0",), id="twice"),
        pytest.param([f"{DEVICES}=0", f"{DEVICES}="], None, id="twice-and-empty"),
        pytest.param(["CUDA_VERSION", "NVIDIA_REQUIRE_CUDA"], None, id="old-image-without-equals"),
        pytest.param(["=all", "", "=", f"={DEVICES}=all"], None, id="no-name"),
        pytest.param([f" {DEVICES}=all", f"{DEVICES} =all", f"{DEVICES.lower()}=all"], None, id="almost-the-name"),
        pytest.param(["DOCKER_RESOURCE_GPU", f"{DEVICES}=0"], ("0",), id="swarm-without-equals"),
    ],
)
def test_environment_of_the_host_is_never_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env: list[str], expected: tuple[str, ...] | None
) -> None:
    for name in (DEVICES, "CUDA_VERSION", "DOCKER_RESOURCE_GPU", "NVIDIA_DRIVER_CAPABILITIES", "*"):
        monkeypatch.setenv(name, "all")
    assert _ask(tmp_path, _document({}, env), "swarm-resource = 'DOCKER_RESOURCE_GPU'") == expected
