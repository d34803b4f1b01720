# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from nvhook.errors import RequestError
from nvhook.request import config, request, spec
from nvhook.request.request import Request

DEVICES = "NVIDIA_VISIBLE_DEVICES"
CAPABILITIES = "NVIDIA_DRIVER_CAPABILITIES"
ALL = ("compat32", "compute", "display", "graphics", "ngx", "utility", "video")
VOLUMES = "/var/run/nvidia-container-devices"
ACCEPT_MOUNTS = "accept-nvidia-visible-devices-as-volume-mounts = true\n"
REFUSE_ENV = "accept-nvidia-visible-devices-envvar-when-unprivileged = false\n"


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def _ask(
    settings: Path,
    env: dict[str, str] | None = None,
    *,
    text: str = "",
    mounts: list[str] | None = None,
    annotations: dict[str, str] | None = None,
    privileged: bool = False,
    warnings: list[str] | None = None,
) -> Request | None:
    settings.write_text(text)
    described = spec.Spec(
        env=env or {},
        mounts=[("/dev/null", destination) for destination in mounts or []],
        annotations=annotations or {},
        privileged=privileged,
        rootfs="/",
        device_rules=[],
    )
    return request.read(described, config.load(str(settings)), warnings)


def _devices(found: Request | None) -> tuple[str, ...] | None:
    return found.devices if found else None


# NVIDIA_VISIBLE_DEVICES


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(None, None, id="unset"),
        pytest.param("", None, id="empty"),
        pytest.param("void", None, id="void"),
        pytest.param(" ", None, id="blank"),
        pytest.param(",", None, id="comma"),
        pytest.param(" , ,", None, id="commas-and-blanks"),
        pytest.param("all", ("all",), id="all"),
        pytest.param("none", ("none",), id="none"),
        pytest.param("0", ("0",), id="index"),
        pytest.param("0,1", ("0", "1"), id="indexes"),
        pytest.param("1,0", ("1", "0"), id="order-is-kept"),
        pytest.param(" 0 , 1 ", ("0", "1"), id="blanks"),
        pytest.param("0,,1,", ("0", "1"), id="empty-items"),
        pytest.param("0,1,0", ("0", "1"), id="twice"),
        pytest.param("GPU-5f3c,MIG-77,0:1", ("GPU-5f3c", "MIG-77", "0:1"), id="uuid-mig"),
        pytest.param("0000:00:06.0", ("0000:00:06.0",), id="pci"),
        pytest.param("0,void", None, id="void-in-a-list"),
        pytest.param("all,void", None, id="void-after-all"),
        pytest.param("none,all", ("none",), id="none-first"),
        pytest.param("all,none", ("all",), id="all-first"),
        pytest.param("0,all", ("all",), id="index-and-all"),
        pytest.param("0,none,all", ("none",), id="index-none-all"),
        pytest.param("ALL", ("ALL",), id="upper-case-is-an-id"),
        pytest.param("nvidia.com/gpu=0", ("0",), id="cdi"),
        pytest.param("nvidia.com/gpu=all", ("all",), id="cdi-all"),
        pytest.param("nvidia.com/gpu=none", ("none",), id="cdi-none"),
        pytest.param("runtime.nvidia.com/gpu=1", ("1",), id="cdi-runtime"),
        pytest.param("nvidia.com/gpu=0,0", ("0",), id="cdi-and-index"),
        pytest.param("vendor.com/net=0", ("vendor.com/net=0",), id="cdi-of-another"),
        pytest.param("0;1", ("0;1",), id="semicolon"),
        pytest.param("0\n1", ("0\n1",), id="newline"),
    ],
)
def test_devices_of_variable(settings: Path, value: str | None, expected: tuple[str, ...] | None) -> None:
    env = {} if value is None else {DEVICES: value}
    assert expected == _devices(_ask(settings, env))


def test_request_whole(settings: Path) -> None:
    found = _ask(settings, {DEVICES: "1,0", CAPABILITIES: "utility,compute", "NVIDIA_REQUIRE_CUDA": "cuda>=12.2"})
    assert found is not None
    expected = {"devices": ["1", "0"], "capabilities": ["compute", "utility"], "requirements": ["cuda>=12.2"]}
    assert (expected, DEVICES) == (found.describe(), found.origin)


def test_request_of_other_variables_is_none(settings: Path) -> None:
    env = {CAPABILITIES: "nonsense", "NVIDIA_REQUIRE_CUDA": "nonsense", "CUDA_VERSION": "nonsense", DEVICES: "void"}
    assert _ask(settings, env) is None


# swarm-resource


@pytest.mark.parametrize(
    ("env", "resource", "expected"),
    [
        pytest.param({"A": "1", DEVICES: "all"}, "A", ("1",), id="replaces"),
        pytest.param({DEVICES: "0"}, "A", ("0",), id="not-set"),
        pytest.param({"A": "", DEVICES: "0"}, "A", None, id="set-and-empty"),
        pytest.param({"A": "1", "B": "2,1"}, "A,B", ("1", "2"), id="two"),
        pytest.param({"B": "2", DEVICES: "0"}, "A,B", ("2",), id="the-second-alone"),
        pytest.param({"A": "1", "B": "void"}, "A,B", None, id="void-in-one"),
        pytest.param({"A": "1", DEVICES: "0"}, "", ("0",), id="not-configured"),
    ],
)
def test_devices_of_swarm_resource(
    settings: Path, env: dict[str, str], resource: str, expected: tuple[str, ...] | None
) -> None:
    assert expected == _devices(_ask(settings, env, text=f"swarm-resource = '{resource}'"))


# Who may ask, and how


@pytest.mark.parametrize(
    ("policy", "privileged", "mounts", "expected", "origin"),
    [
        pytest.param("", False, ["0"], ("1",), DEVICES, id="default-env"),
        pytest.param("", True, ["0"], ("1",), DEVICES, id="default-env-privileged"),
        pytest.param(ACCEPT_MOUNTS, False, ["0"], ("0",), "volume mounts", id="mounts-come-first"),
        pytest.param(ACCEPT_MOUNTS, False, [], ("1",), DEVICES, id="no-mounts-then-env"),
        pytest.param(ACCEPT_MOUNTS + REFUSE_ENV, False, ["0"], ("0",), "volume mounts", id="mounts-alone"),
        pytest.param(ACCEPT_MOUNTS + REFUSE_ENV, False, [], None, "", id="env-refused"),
        pytest.param(ACCEPT_MOUNTS + REFUSE_ENV, True, [], ("1",), DEVICES, id="env-of-a-privileged-one"),
        pytest.param(REFUSE_ENV, False, ["0"], None, "", id="neither"),
        pytest.param(REFUSE_ENV, True, ["0"], ("1",), DEVICES, id="mounts-refused-privileged"),
    ],
)
def test_policy(
    settings: Path, policy: str, privileged: bool, mounts: list[str], expected: tuple[str, ...] | None, origin: str
) -> None:
    warnings: list[str] = []
    found = _ask(
        settings,
        {DEVICES: "1"},
        text=policy,
        mounts=[f"{VOLUMES}/{name}" for name in mounts],
        privileged=privileged,
        warnings=warnings,
    )
    ignored = [f"{DEVICES} of an unprivileged container is ignored, as config.toml says"]
    assert (expected, origin) == (_devices(found), found.origin if found else "")
    assert warnings == ([] if found else ignored)


@pytest.mark.parametrize("env", [{}, {DEVICES: "void"}, {DEVICES: ""}], ids=["unset", "void", "empty"])
def test_policy_is_silent_where_nothing_is_asked(settings: Path, env: dict[str, str]) -> None:
    warnings: list[str] = []
    assert _ask(settings, env, text=REFUSE_ENV, warnings=warnings) is None
    assert warnings == []


@pytest.mark.parametrize(
    ("destinations", "expected"),
    [
        pytest.param([f"{VOLUMES}/all"], ("all",), id="all"),
        pytest.param([f"{VOLUMES}/0", f"{VOLUMES}/1"], ("0", "1"), id="two"),
        pytest.param([f"{VOLUMES}/0", f"{VOLUMES}/0/"], ("0",), id="twice"),
        pytest.param([f"{VOLUMES}/./x/../0"], ("0",), id="dots"),
        pytest.param([f"{VOLUMES}//0"], ("0",), id="slashes"),
        pytest.param([f"/{VOLUMES}/0"], ("0",), id="two-slashes"),
        pytest.param([f"///{VOLUMES}/0"], ("0",), id="four-slashes"),
        pytest.param([f"{VOLUMES[1:]}/0"], ("0",), id="relative"),
        pytest.param([f"/../{VOLUMES}/0"], ("0",), id="above-the-root"),
        pytest.param([f"./{VOLUMES}/0"], ("0",), id="relative-with-a-dot"),
        pytest.param([f"{VOLUMES}/GPU-5f3c"], ("GPU-5f3c",), id="uuid"),
        pytest.param([VOLUMES], None, id="root-alone"),
        pytest.param([f"{VOLUMES}/"], None, id="root-with-slash"),
        pytest.param([f"{VOLUMES}X/0"], None, id="beyond-the-boundary"),
        pytest.param([f"{VOLUMES}/../x/0"], None, id="out-of-it"),
        pytest.param(["/else/0"], None, id="elsewhere"),
        pytest.param([f"{VOLUMES}/imex/0"], None, id="imex-alone"),
        pytest.param([f"{VOLUMES}/imex/0", f"{VOLUMES}/1"], ("1",), id="imex-and-gpu"),
        pytest.param([f"{VOLUMES}/cdi/nvidia.com/gpu/0"], ("0",), id="cdi-slashes"),
        pytest.param([f"{VOLUMES}/cdi/nvidia.com/gpu=0"], ("0",), id="cdi-equals"),
        pytest.param([f"{VOLUMES}/cdi/nvidia.com/gpu/all"], ("all",), id="cdi-all"),
        pytest.param([f"{VOLUMES}/cdi/vendor.com/net/0"], ("vendor.com/net=0",), id="cdi-of-another"),
        pytest.param([f"{VOLUMES}/none"], ("none",), id="none"),
        pytest.param([f"{VOLUMES}/void"], None, id="void"),
    ],
)
def test_devices_of_mounts(settings: Path, destinations: list[str], expected: tuple[str, ...] | None) -> None:
    assert expected == _devices(_ask(settings, text=ACCEPT_MOUNTS, mounts=destinations))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        pytest.param("/dev/null", ("0",), id="null"),
        pytest.param("//dev/null", ("0",), id="two-slashes"),
        pytest.param("/dev/./null", ("0",), id="dots"),
        pytest.param("/dev/zero", None, id="zero"),
        pytest.param("", None, id="none"),
        pytest.param("/", None, id="root"),
    ],
)
def test_devices_of_mounts_source(settings: Path, source: str, expected: tuple[str, ...] | None) -> None:
    settings.write_text(ACCEPT_MOUNTS)
    described = spec.Spec(
        env={}, mounts=[(source, f"{VOLUMES}/0")], annotations={}, privileged=False, rootfs="/", device_rules=[]
    )
    assert expected == _devices(request.read(described, config.load(str(settings))))


X, N = "cdi.k8s.io/x", "nvidia.cdi.k8s.io/x"


@pytest.mark.parametrize(
    ("annotations", "expected", "origin"),
    [
        pytest.param({X: "nvidia.com/gpu=0"}, ("0",), f"annotations {X}", id="one"),
        pytest.param({X: "nvidia.com/gpu=0, nvidia.com/gpu=GPU-5"}, ("0", "GPU-5"), f"annotations {X}", id="two"),
        pytest.param({X: "nvidia.com/gpu=all"}, ("all",), f"annotations {X}", id="all"),
        pytest.param({X: "nvidia.com/gpu=all,nvidia.com/gpu=all"}, ("all",), f"annotations {X}", id="all-twice"),
        pytest.param({X: "nvidia.com/gpu=none"}, ("none",), f"annotations {X}", id="none-of-them"),
        pytest.param(
            {"cdi.k8s.io/b": "nvidia.com/gpu=1", "cdi.k8s.io/a": "nvidia.com/gpu=0"},
            ("0", "1"),
            "annotations cdi.k8s.io/a, cdi.k8s.io/b",
            id="keys-sorted",
        ),
        pytest.param({X: "vendor.com/net=7,nvidia.com/gpu=0"}, ("0",), f"annotations {X}", id="beside-another-vendor"),
        pytest.param({X: "vendor.com/net=7"}, ("9",), DEVICES, id="another-vendor-alone"),
        pytest.param({X: ""}, ("9",), DEVICES, id="empty"),
        pytest.param({X: "nvidia.com/gpu=0,"}, ("0",), f"annotations {X}", id="comma-at-the-end"),
        pytest.param({N: "nvidia.com/gpu=0"}, ("0",), f"annotations {N}", id="key-of-the-operator"),
        pytest.param(
            {"nvidia.cdi.k8s.io": "nvidia.com/gpu=0"}, ("0",), "annotations nvidia.cdi.k8s.io", id="key-alone"
        ),
        pytest.param({X: "k8s.device-plugin.nvidia.com/gpu=GPU-5"}, ("GPU-5",), f"annotations {X}", id="device-plugin"),
        pytest.param({X: "runtime.nvidia.com/gpu=1"}, ("1",), f"annotations {X}", id="runtime"),
        pytest.param({X: "nvidia.com/gpu=0:1"}, ("0:1",), f"annotations {X}", id="mig-by-index"),
        pytest.param({X: "nvidia.com/mig=0:1,nvidia.com/mig=MIG-7a"}, ("0:1", "MIG-7a"), f"annotations {X}", id="mig"),
        pytest.param(
            {"nvidia.cdi.k8s.io/container.b": "nvidia.com/gpu=all", "io.kubernetes.cri.container-name": "a"},
            ("9",),
            DEVICES,
            id="of-another-container",
        ),
        pytest.param(
            {"nvidia.cdi.k8s.io/container.b": "nvidia.com/gpu=all", "io.kubernetes.cri.container-type": "sandbox"},
            ("9",),
            DEVICES,
            id="of-a-container-in-the-sandbox",
        ),
        pytest.param(
            {"nvidia.cdi.k8s.io/container.b": "nvidia.com/gpu=1"},
            ("1",),
            "annotations nvidia.cdi.k8s.io/container.b",
            id="of-a-container-without-a-pod",
        ),
        pytest.param(
            {"nvidia.cdi.k8s.io/container.b": "nvidia.com/gpu=1", "io.kubernetes.container.name": "b"},
            ("1",),
            "annotations nvidia.cdi.k8s.io/container.b",
            id="of-this-container",
        ),
        pytest.param({"else/x": "gpus: nvidia.com/gpu=0"}, ("9",), DEVICES, id="text-that-is-no-list"),
        pytest.param({"else/x": "cpu=4,nvidia.com/gpu=2"}, ("9",), DEVICES, id="amounts-of-resources"),
        pytest.param({}, ("9",), DEVICES, id="none"),
    ],
)
def test_devices_of_annotations(
    settings: Path, annotations: dict[str, str], expected: tuple[str, ...], origin: str
) -> None:
    found = _ask(settings, {DEVICES: "9"}, annotations=annotations)
    assert found is not None
    assert (expected, origin) == (found.devices, found.origin)


@pytest.mark.parametrize(
    ("prefixes", "key", "is_read"),
    [
        (["example.com/"], "example.com/x", True),
        (["example.com/"], X, False),
        (["example.com/"], N, False),
        (["nvidia.cdi.k8s.io/"], N, True),
        (["nvidia.cdi.k8s.io/"], X, False),
        (["cdi.k8s.io/"], N, True),
        (["cdi.k8s.io/", "example.com/gpu"], "example.com/gpus", True),
        ([], X, False),
    ],
)
def test_annotation_prefixes(settings: Path, prefixes: list[str], key: str, is_read: bool) -> None:
    text = f"nvidia-container-runtime.modes.cdi.annotation-prefixes = {prefixes}"
    if is_read:
        assert _devices(_ask(settings, {DEVICES: "all"}, text=text, annotations={key: "nvidia.com/gpu=0"})) == ("0",)
        return
    with pytest.raises(RequestError) as raised:
        _ask(settings, {DEVICES: "all"}, text=text, annotations={key: "nvidia.com/gpu=0"})
    assert f"`{key}`=`nvidia.com/gpu=0` names devices under a key that is not read" in str(raised.value)
    assert f"`annotation-prefixes` in config.toml has {', '.join(prefixes) or 'none'}" in str(raised.value)


def test_devices_of_annotations_come_before_mounts(settings: Path) -> None:
    found = _ask(
        settings,
        text=ACCEPT_MOUNTS + REFUSE_ENV,
        mounts=[f"{VOLUMES}/0"],
        annotations={"cdi.k8s.io/x": "nvidia.com/gpu=1"},
    )
    assert _devices(found) == ("1",)


# Capabilities


@pytest.mark.parametrize(
    ("value", "supported", "expected"),
    [
        pytest.param(None, "all", ("compute", "utility"), id="unset"),
        pytest.param("", "all", ("compute", "utility"), id="empty"),
        pytest.param(" , ", "all", ("compute", "utility"), id="blank"),
        pytest.param("all", "all", ALL, id="all"),
        pytest.param("compute,all", "all", ALL, id="all-in-a-list"),
        *(pytest.param(name, "all", (name,), id=name) for name in ALL),
        pytest.param("utility,compute", "all", ("compute", "utility"), id="sorted"),
        pytest.param(" video , video ", "all", ("video",), id="twice-with-blanks"),
        pytest.param(None, "utility", ("utility",), id="unset-limited"),
        pytest.param(None, "video", (), id="unset-nothing-left"),
        pytest.param("all", "utility,video", ("utility", "video"), id="all-limited"),
        pytest.param("video", "utility,video", ("video",), id="one-of-those-supported"),
        pytest.param("all", "", (), id="all-of-none"),
    ],
)
def test_capabilities(settings: Path, value: str | None, supported: str, expected: tuple[str, ...]) -> None:
    env = {DEVICES: "all"} if value is None else {DEVICES: "all", CAPABILITIES: value}
    found = _ask(settings, env, text=f"supported-driver-capabilities = '{supported}'")
    assert found is not None
    assert expected == found.capabilities


@pytest.mark.parametrize(
    ("value", "supported", "message"),
    [
        pytest.param("sound", "all", "unknown capability `sound` in NVIDIA_DRIVER_CAPABILITIES=`sound`", id="unknown"),
        pytest.param("compute,sound", "all", "unknown capability `sound`", id="unknown-in-a-list"),
        pytest.param("COMPUTE", "all", "unknown capability `COMPUTE`", id="upper-case"),
        pytest.param("compute utility", "all", "unknown capability `compute utility`", id="blank-for-comma"),
        pytest.param("a\x1b[2J\nb", "all", "unknown capability `a\\x1b[2J\\nb`", id="escapes"),
        pytest.param(
            "video",
            "compute,utility",
            "capability `video` in NVIDIA_DRIVER_CAPABILITIES=`video` is not allowed on this host; "
            "`supported-driver-capabilities` in config.toml allows compute, utility",
            id="unsupported",
        ),
        pytest.param("compute,video", "compute", "capability `video`", id="one-unsupported"),
        pytest.param("compute", "", "in config.toml allows none", id="none-supported"),
    ],
)
def test_capabilities_refused(settings: Path, value: str, supported: str, message: str) -> None:
    with pytest.raises(RequestError) as raised:
        _ask(settings, {DEVICES: "all", CAPABILITIES: value}, text=f"supported-driver-capabilities = '{supported}'")
    assert message in str(raised.value)
    assert str(raised.value).startswith("request error: ")
    assert "\n" not in str(raised.value)


# Images from before NVIDIA_REQUIRE_CUDA, and requirements


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        pytest.param({"CUDA_VERSION": "8.0.61"}, (("all",), ALL, ("cuda>=8.0",)), id="legacy"),
        pytest.param({"CUDA_VERSION": "9"}, (("all",), ALL, ("cuda>=9",)), id="major-alone"),
        pytest.param({"CUDA_VERSION": "8.0", DEVICES: "1"}, (("1",), ALL, ("cuda>=8.0",)), id="devices-named"),
        pytest.param(
            {"CUDA_VERSION": "8.0", CAPABILITIES: "video"}, (("all",), ("video",), ("cuda>=8.0",)), id="caps-named"
        ),
        pytest.param(
            {"CUDA_VERSION": "8.0", CAPABILITIES: ""},
            (("all",), ("compute", "utility"), ("cuda>=8.0",)),
            id="caps-empty",
        ),
        pytest.param({"CUDA_VERSION": "8.0", "NVIDIA_REQUIRE_CUDA": ""}, (("all",), ALL, ("cuda>=8.0",)), id="empty"),
        pytest.param({"CUDA_VERSION": "8.0", DEVICES: ""}, None, id="devices-empty"),
        pytest.param({"CUDA_VERSION": "8.0", DEVICES: "void"}, None, id="void"),
        pytest.param({"CUDA_VERSION": "", DEVICES: "0"}, (("0",), ("compute", "utility"), ()), id="version-empty"),
        pytest.param({"CUDA_VERSION": "12.2", "NVIDIA_REQUIRE_CUDA": "cuda>=12.2"}, None, id="not-legacy"),
    ],
)
def test_legacy_image(settings: Path, env: dict[str, str], expected: object) -> None:
    found = _ask(settings, env)
    assert expected == (found and (found.devices, found.capabilities, found.requirements))


@pytest.mark.parametrize("version", ["new", "8.x", "8..1", ".8", "v8.0", "\u0668.\u0660"])
def test_legacy_image_version_refused(settings: Path, version: str) -> None:
    with pytest.raises(RequestError) as raised:
        _ask(settings, {"CUDA_VERSION": version})
    assert str(raised.value) == f"request error: CUDA_VERSION=`{version}` is not a version"


@pytest.mark.parametrize(
    ("env", "text", "expected"),
    [
        pytest.param({}, "", (), id="none"),
        pytest.param({"NVIDIA_REQUIRE_CUDA": "cuda>=12"}, "", ("cuda>=12",), id="one"),
        pytest.param({"NVIDIA_REQUIRE_B": "b", "NVIDIA_REQUIRE_A": "c"}, "", ("b", "c"), id="sorted"),
        pytest.param({"NVIDIA_REQUIRE_B": "b", "NVIDIA_REQUIRE_A": "b"}, "", ("b",), id="once"),
        pytest.param({"NVIDIA_REQUIRE_A": ""}, "", (), id="empty"),
        pytest.param({"NVIDIA_REQUIRE_JETPACK": "x", "NVIDIA_REQUIRE_JETPACK_HOST": "y"}, "", (), id="jetpack"),
        pytest.param({"NVIDIA_REQUIRED": "x", "XNVIDIA_REQUIRE_A": "y"}, "", (), id="other-names"),
        *(
            pytest.param({"NVIDIA_REQUIRE_A": "a", "NVIDIA_DISABLE_REQUIRE": word}, "", (), id=f"disabled-{word}")
            for word in ("1", "t", "T", "TRUE", "true", "True")
        ),
        *(
            pytest.param({"NVIDIA_REQUIRE_A": "a", "NVIDIA_DISABLE_REQUIRE": word}, "", ("a",), id=f"enabled-{word}")
            for word in ("", "0", "false", "yes", "tRUE", " 1")
        ),
        pytest.param({"NVIDIA_REQUIRE_A": "a"}, "disable-require = true", (), id="disabled-on-the-host"),
        pytest.param({"CUDA_VERSION": "x"}, "disable-require = true", (), id="disabled-version-not-looked-at"),
    ],
)
def test_requirements(settings: Path, env: dict[str, str], text: str, expected: tuple[str, ...]) -> None:
    found = _ask(settings, {DEVICES: "all", **env}, text=text)
    assert found is not None
    assert expected == found.requirements


# IMEX channels

CHANNELS = "NVIDIA_IMEX_CHANNELS"
IGNORE = "features.ignore-imex-channel-requests = true\n"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(None, (), id="unset"),
        pytest.param("", (), id="empty"),
        pytest.param("0", (0,), id="one"),
        pytest.param(" 7 ,0,,7", (7, 0), id="several"),
        pytest.param("0,1048575", (0, 1048575), id="last"),
        pytest.param("00", (0,), id="zeros"),
        pytest.param("all", (), id="all"),
        pytest.param("0,all", (), id="number-and-all"),
        pytest.param("none", (), id="none"),
        pytest.param("void", (), id="void"),
    ],
)
def test_imex_channels(settings: Path, value: str | None, expected: tuple[int, ...]) -> None:
    env = {DEVICES: "0"} if value is None else {DEVICES: "0", CHANNELS: value}
    found = _ask(settings, env)
    assert found is not None
    assert expected == found.imex_channels


def test_more_imex_channels_than_a_driver_has(settings: Path) -> None:
    """Each would be a node, made on the host if it has none."""
    found = _ask(settings, {DEVICES: "0", CHANNELS: ",".join(map(str, range(2048)))})
    assert found is not None
    assert len(found.imex_channels) == 2048
    with pytest.raises(RequestError, match=f"2049 IMEX channels in {CHANNELS}, more than 2048"):
        _ask(settings, {DEVICES: "0", CHANNELS: ",".join(map(str, range(2049)))})


def test_more_devices_than_a_host_has(settings: Path) -> None:
    with pytest.raises(RequestError, match="more than 1024 devices are asked for; ask for `all`"):
        _ask(settings, {DEVICES: ",".join(map(str, range(1025)))})


@pytest.mark.parametrize("name", ["1048576", "-1", "+1", "0x1", "1_0", "channel0", "9" * 500, "\u0660", "0 1", "../0"])
def test_imex_channel_refused(settings: Path, name: str) -> None:
    with pytest.raises(RequestError) as raised:
        _ask(settings, {DEVICES: "0", CHANNELS: f"0,{name}"})
    assert str(raised.value) == (
        f"request error: `{name}` in {CHANNELS} is no IMEX channel; they are numbers from 0 to 1048575"
    )


@pytest.mark.parametrize(
    ("policy", "privileged", "mounts", "expected", "warned"),
    [
        pytest.param("", False, ["imex/3"], (1,), False, id="mounts-not-accepted"),
        pytest.param(ACCEPT_MOUNTS, False, ["imex/3", "imex/2"], (3, 2), False, id="mounts-come-first"),
        pytest.param(ACCEPT_MOUNTS, False, ["0"], (1,), False, id="no-channel-among-the-mounts"),
        pytest.param(ACCEPT_MOUNTS + REFUSE_ENV, False, ["0"], (), True, id="env-refused"),
        pytest.param(ACCEPT_MOUNTS + REFUSE_ENV, True, ["0"], (1,), False, id="env-of-a-privileged-one"),
        pytest.param(IGNORE + ACCEPT_MOUNTS, False, ["0", "imex/3"], (), False, id="ignored"),
    ],
)
def test_imex_channels_policy(
    settings: Path, policy: str, privileged: bool, mounts: list[str], expected: tuple[int, ...], warned: bool
) -> None:
    warnings: list[str] = []
    found = _ask(
        settings,
        {CHANNELS: "1"},
        text=policy,
        mounts=[f"{VOLUMES}/{name}" for name in mounts],
        annotations={"cdi.k8s.io/x": "nvidia.com/gpu=0"},
        privileged=privileged,
        warnings=warnings,
    )
    assert found is not None
    assert expected == found.imex_channels
    line = f"{CHANNELS} of an unprivileged container is ignored, as config.toml says"
    assert warnings == ([line] if warned else [])


def test_imex_channel_of_a_mount_refused(settings: Path) -> None:
    with pytest.raises(RequestError, match=f"`x` in a mount below {VOLUMES}/imex is no IMEX channel"):
        _ask(settings, {DEVICES: "0"}, text=ACCEPT_MOUNTS, mounts=[f"{VOLUMES}/imex/x"])


def test_imex_channels_without_devices_are_not_looked_at(settings: Path) -> None:
    assert _ask(settings, {CHANNELS: "nonsense", "NVIDIA_MIG_CONFIG_DEVICES": "nonsense"}) is None


# The right to set MIG up, and features


@pytest.mark.parametrize("right", ["config", "monitor"])
def test_mig_right(settings: Path, right: str) -> None:
    variable = f"NVIDIA_MIG_{right.upper()}_DEVICES"
    for value, expected in (("all", (right,)), ("ALL", (right,)), ("", ())):
        found = _ask(settings, {DEVICES: "all", variable: value}, privileged=True)
        assert found is not None
        assert expected == found.mig_rights
    with pytest.raises(RequestError) as raised:
        _ask(settings, {DEVICES: "all", variable: "0"}, privileged=True)
    assert str(raised.value) == f"request error: {variable}=`0` is not supported; the one value it can have is `all`"
    with pytest.raises(RequestError) as raised:
        _ask(settings, {DEVICES: "all", variable: "all"})
    assert str(raised.value) == (
        f"request error: {variable} is set for a container that is not privileged; "
        "start it with CAP_SYS_ADMIN (`docker run --privileged`), or unset the variable"
    )


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        pytest.param({}, (), id="none"),
        pytest.param({"NVIDIA_GDS": "enabled"}, ("gds",), id="one"),
        pytest.param({"NVIDIA_GDS": "Enabled", "NVIDIA_MOFED": "1", "NVIDIA_GDRCOPY": ""}, (), id="other-words"),
        pytest.param(
            {f"NVIDIA_{name}": "enabled" for name in ("NVSWITCH", "GDRCOPY", "MOFED", "GDS", "OTHER")},
            ("gds", "mofed", "gdrcopy", "nvswitch"),
            id="all-in-a-fixed-order",
        ),
    ],
)
def test_features(settings: Path, env: dict[str, str], expected: tuple[str, ...]) -> None:
    found = _ask(settings, {DEVICES: "none", **env})
    assert found is not None
    assert expected == found.features


def test_describe_names_what_is_asked_for_beyond_the_contract(settings: Path) -> None:
    env = {CHANNELS: "1", "NVIDIA_GDS": "enabled", "NVIDIA_MIG_MONITOR_DEVICES": "all"}
    found = _ask(settings, {DEVICES: "0", CAPABILITIES: "utility", **env}, privileged=True)
    assert found is not None
    assert found.describe() == {
        "devices": ["0"],
        "capabilities": ["utility"],
        "requirements": [],
        "imex_channels": [1],
        "features": ["gds"],
        "mig_rights": ["monitor"],
    }
