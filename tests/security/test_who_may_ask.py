# SPDX-License-Identifier: Apache-2.0
"""What an unprivileged image can write, against what config.toml gives it: from config.json to the request.

An image writes its environment, and its labels and annotations; the engine writes the rest. No row may give an image
more than the policy says, whatever else it sets.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nvhook.errors import RequestError
from nvhook.request import config, request, spec

DEVICES = "NVIDIA_VISIBLE_DEVICES"
REFUSE = "accept-nvidia-visible-devices-envvar-when-unprivileged = false\n"
MOUNTS = "accept-nvidia-visible-devices-as-volume-mounts = true\n"
COMPUTE = 'supported-driver-capabilities = "compute"\n'
SWARM = 'swarm-resource = "DOCKER_RESOURCE_GPU"\n'
NO_IMEX = "features.ignore-imex-channel-requests = true\n"
VOLUMES = "/var/run/nvidia-container-devices"

# All that an image has heard of.
EVERYTHING = {
    DEVICES: "all",
    "NVIDIA_DRIVER_CAPABILITIES": "all",
    "NVIDIA_IMEX_CHANNELS": "0,1",
    "NVIDIA_GDS": "enabled",
    "NVIDIA_MOFED": "enabled",
    "NVIDIA_DISABLE_REQUIRE": "1",
    "CUDA_VERSION": "8.0",
    "DOCKER_RESOURCE_GPU": "all",
    "NVHOOK_CONFIG": "/image/config.toml",
    "PATH": "/image",
}


def _ask(place: Path, policy: str, env: dict[str, str], **more: Any) -> dict[str, Any] | None:
    """As the wrapper and the hook read it; None where nothing is given."""
    document: dict[str, Any] = {
        "process": {
            "env": [f"{name}={value}" for name, value in env.items()],
            "capabilities": {"bounding": ["CAP_CHOWN", "CAP_MKNOD"]},
        },
        "root": {"path": "rootfs"},
        "annotations": more.get("annotations", {}),
        "mounts": more.get("mounts", []),
        "linux": more.get("linux", {}),
    }
    document["process"].update(more.get("process", {}))
    (place / "config.json").write_text(json.dumps(document))
    (place / "config.toml").write_text(policy)
    described = spec.parse(spec.read_config(str(place))[0], str(place))
    asked = request.read(described, config.load(str(place / "config.toml")))
    return asked.describe() if asked else None


def _null(*places: str) -> list[dict[str, str]]:
    return [{"source": "/dev/null", "destination": f"{VOLUMES}/{place}"} for place in places]


NOTHING: list[tuple[str, str, dict[str, str], dict[str, Any]]] = [
    ("everything", REFUSE, EVERYTHING, {}),
    ("old-image", REFUSE, {"CUDA_VERSION": "8.0"}, {}),
    ("swarm", REFUSE + SWARM, EVERYTHING, {}),
    ("swarm-resource-named-by-the-image", REFUSE + SWARM, {**EVERYTHING, "swarm-resource": DEVICES}, {}),
    ("mounts-that-are-not-accepted", REFUSE, EVERYTHING, {"mounts": _null("0", "all")}),
    (
        "mount-of-another-source",
        REFUSE + MOUNTS,
        EVERYTHING,
        {"mounts": [{"source": "/x", "destination": f"{VOLUMES}/0"}]},
    ),
    (
        "volume-of-the-image",
        REFUSE + MOUNTS,
        EVERYTHING,
        {"mounts": [{"source": "/var/lib/v/_data", "destination": VOLUMES}]},
    ),
    ("mount-that-climbs-out", REFUSE + MOUNTS, EVERYTHING, {"mounts": _null("../nvidia/0", "..")}),
    ("imex-mount-alone", REFUSE + MOUNTS, EVERYTHING, {"mounts": _null("imex/0")}),
    ("annotation-of-another-vendor", REFUSE, EVERYTHING, {"annotations": {"cdi.k8s.io/a": "example.com/gpu=0"}}),
    (
        "annotation-of-an-image-that-podman-passes-on",
        REFUSE,
        EVERYTHING,
        {"annotations": {"cdi.k8s.io/a": "nvidia.com/gpu=all", "io.container.manager": "libpod"}},
    ),
    (
        "effective-but-not-bounding",
        REFUSE,
        EVERYTHING,
        {
            "process": {
                "capabilities": {
                    "effective": ["CAP_SYS_ADMIN"],
                    "permitted": ["CAP_SYS_ADMIN"],
                    "ambient": ["CAP_SYS_ADMIN"],
                    "bounding": [],
                }
            }
        },
    ),
    ("no-capabilities-at-all", REFUSE, EVERYTHING, {"process": {"capabilities": None}}),
    (
        "capability-of-a-similar-name",
        REFUSE,
        EVERYTHING,
        {"process": {"capabilities": {"bounding": ["cap_sys_admin"]}}},
    ),
    ("root-with-new-privileges", REFUSE, EVERYTHING, {"process": {"user": {"uid": 0}, "noNewPrivileges": False}}),
    ("device-rules", REFUSE, EVERYTHING, {"linux": {"resources": {"devices": [{"allow": True, "access": "rwm"}]}}}),
]


@pytest.mark.parametrize(("policy", "env", "more"), [row[1:] for row in NOTHING], ids=[row[0] for row in NOTHING])
def test_nothing_is_given(tmp_path: Path, policy: str, env: dict[str, str], more: dict[str, Any]) -> None:
    assert _ask(tmp_path, policy, env, **more) is None


GIVEN: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("variables", "", {}, {"devices": ["all"], "imex_channels": [0, 1], "features": ["gds", "mofed"]}),
    ("mount-before-variable", MOUNTS, {"mounts": _null("1")}, {"devices": ["1"]}),
    ("imex-mount-before-variable", MOUNTS, {"mounts": _null("1", "imex/7")}, {"devices": ["1"], "imex_channels": [7]}),
    ("mount-alone", REFUSE + MOUNTS, {"mounts": _null("1")}, {"devices": ["1"], "imex_channels": None}),
    (
        "annotation-before-all",
        REFUSE + MOUNTS,
        {"annotations": {"cdi.k8s.io/a": "nvidia.com/gpu=0"}, "mounts": _null("1")},
        {"devices": ["0"], "imex_channels": None},
    ),
    ("swarm-before-variable", SWARM, {"env": {"DOCKER_RESOURCE_GPU": "1"}}, {"devices": ["1"]}),
    ("capabilities-of-the-host", COMPUTE, {}, {"capabilities": ["compute"]}),
    ("no-imex-by-policy", NO_IMEX, {}, {"imex_channels": None}),
    (
        "privileged-by-the-bounding-set",
        REFUSE,
        {"process": {"capabilities": {"bounding": ["CAP_SYS_ADMIN"]}}},
        {"devices": ["all"], "imex_channels": [0, 1]},
    ),
    (
        "podman-as-config-says",
        "",
        {"annotations": {"cdi.k8s.io/a": "nvidia.com/gpu=0", "io.container.manager": "libpod"}},
        {"devices": ["0"]},
    ),
]


@pytest.mark.parametrize(("policy", "more", "expected"), [row[1:] for row in GIVEN], ids=[row[0] for row in GIVEN])
def test_no_more_is_given(tmp_path: Path, policy: str, more: dict[str, Any], expected: dict[str, Any]) -> None:
    env = {**EVERYTHING, **more.pop("env", {})}
    found = _ask(tmp_path, policy, env, **more)
    assert found is not None
    assert expected == {key: found.get(key) for key in expected}


@pytest.mark.parametrize("value", ["graphics", "compute,graphics", "GRAPHICS", "all,compute,x", "cuda"])
def test_capability_beyond_the_host_s(tmp_path: Path, value: str) -> None:
    env = {DEVICES: "all", "NVIDIA_DRIVER_CAPABILITIES": value}
    if value.startswith("all"):
        found = _ask(tmp_path, COMPUTE, env)
        assert found is not None
        assert found["capabilities"] == ["compute"]
        return
    with pytest.raises(RequestError, match="capability"):
        _ask(tmp_path, COMPUTE, env)


@pytest.mark.parametrize("right", ["CONFIG", "MONITOR"])
@pytest.mark.parametrize("more", [{}, {"annotations": {"cdi.k8s.io/a": "nvidia.com/gpu=0"}}, {"mounts": _null("0")}])
def test_right_to_mig(tmp_path: Path, right: str, more: dict[str, Any]) -> None:
    """However it came to its GPUs."""
    with pytest.raises(RequestError, match=f"NVIDIA_MIG_{right}_DEVICES is set for a container that is not privileged"):
        _ask(tmp_path, MOUNTS, {**EVERYTHING, f"NVIDIA_MIG_{right}_DEVICES": "all"}, **more)


def test_last_of_two_variables_counts(tmp_path: Path) -> None:
    """As for the program that is started: what the user says comes after what the image said."""
    found = _ask(tmp_path, "", {}, process={"env": [f"{DEVICES}=all", f"{DEVICES}=0"]})
    assert found is not None
    assert found["devices"] == ["0"]
    assert _ask(tmp_path, "", {}, process={"env": [f"{DEVICES}=all", f"{DEVICES}=void"]}) is None
