# SPDX-License-Identifier: Apache-2.0
"""Lines of `docker run` and `podman run`, as people write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvhook.commands.explain import dockerline
from nvhook.errors import SpecError


def _env(words: str) -> dict[str, str]:
    line = dockerline.parse(words.split())
    return {**{name: value for name, (value, _) in line.env.items()}, **line.gpus}


@pytest.mark.parametrize(
    ("words", "image"),
    [
        ("docker run cuda", "cuda"),
        ("docker run -it --rm cuda bash -c x", "cuda"),
        ("docker run -itd --name web -p 80:80 cuda", "cuda"),
        ("/usr/bin/docker container run --detach=true --network host cuda --gpus all", "cuda"),
        ("docker create -e A=b -eC=d -ite E=f --init cuda", "cuda"),
        ("docker run --rm -- cuda -it", "cuda"),
        ("podman run --replace --read-only-tmpfs --tls-verify=false -q nvidia/cuda:12 ls", "nvidia/cuda:12"),
        ("docker run -v /a:/b -w /x -u 0 --shm-size 1g cuda@sha256:00", "cuda@sha256:00"),
    ],
)
def test_image(words: str, image: str) -> None:
    assert dockerline.parse(words.split()).image == image


@pytest.mark.parametrize(
    ("words", "env"),
    [
        pytest.param("-e A=b -eC=d --env E=f --env=G=h=i", {"A": "b", "C": "d", "E": "f", "G": "h=i"}, id="spellings"),
        pytest.param("-e A=b -e A=c", {"A": "c"}, id="the-last-counts"),
        pytest.param("-e NVHOOK_TEST_SET -e NVHOOK_TEST_UNSET", {"NVHOOK_TEST_SET": "here"}, id="taken-from-here"),
        pytest.param("-e A=", {"A": ""}, id="empty"),
    ],
)
def test_env(words: str, env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVHOOK_TEST_SET", "here")
    assert _env(f"docker run {words} cuda") == env


def test_env_file(tmp_path: Path) -> None:
    path = tmp_path / "env"
    path.write_text("# comment\n\nA=b\n  C=d e\n")
    line = dockerline.parse(["docker", "run", "--env-file", str(path), "-e", "C=x", "cuda"])
    assert line.env == {"A": ("b", f"env file {path}"), "C": ("x", "command line")}


@pytest.mark.parametrize(
    ("value", "devices", "capabilities"),
    [
        ("all", "all", None),
        ("2", "0,1", None),
        ("0", "", None),
        ("count=1", "0", None),
        ("device=1", "1", None),
        ('"device=0,2"', "0,2", None),
        ('"device=GPU-aa",capabilities=utility', "GPU-aa", "utility"),
        ('all,"capabilities=compute,utility,gpu"', "all", "compute,utility"),
        ("driver=nvidia,count=all", "all", None),
    ],
)
def test_gpus(value: str, devices: str, capabilities: str | None) -> None:
    made = dockerline.gpus(value)
    assert (made["NVIDIA_VISIBLE_DEVICES"], made.get("NVIDIA_DRIVER_CAPABILITIES")) == (devices, capabilities)


def test_mounts_and_the_rest() -> None:
    place = "/var/run/nvidia-container-devices"
    words = [
        *("docker", "run", "-v", f"/dev/null:{place}/0:ro", "--volume=data:/data"),
        *("--mount", f"type=bind,src=/dev/null,dst={place}/1", "--runtime", "nvidia", "--annotation", "a=b=c"),
        *("--device", "/dev/kvm", "--device=nvidia.com/gpu=0", "--cap-add", "sys_admin", "cuda"),
    ]
    line = dockerline.parse(words)
    assert line.mounts == [("/dev/null", f"{place}/0"), ("data", "/data"), ("/dev/null", f"{place}/1")]
    assert (line.runtime, line.annotations, line.cdi) == ("nvidia", {"a": "b=c"}, ["nvidia.com/gpu=0"])
    assert line.privileged


@pytest.mark.parametrize(
    ("option", "is_privileged"),
    [("--privileged", True), ("--privileged=false", False), ("--cap-add=ALL", True), ("--cap-add=NET_ADMIN", False)],
)
def test_privileged(option: str, is_privileged: bool) -> None:
    assert dockerline.parse(["docker", "run", option, "cuda"]).privileged == is_privileged


def test_gpus_of_podman_are_cdi_devices() -> None:
    line = dockerline.parse(["podman", "run", "--gpus", "all", "cuda"])
    assert (line.gpus, line.cdi) == ({}, ["nvidia.com/gpu=all"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("kubectl run x", "`kubectl run x` is not understood; write `-- docker run OPTIONS IMAGE`"),
        ("docker", "`docker` is not understood"),
        ("docker run", "`docker run` names no image; write the image after the options"),
        ("docker run -e", "the option `-e` has no value; write it behind the option"),
        ("docker run --gpus x cuda", "`x` in --gpus `x` is no number; write `all`, a number, or device="),
        ("docker run --gpus devices=0 cuda", "`devices` in --gpus `devices=0` is not known; known are count, device"),
        ("docker run --env-file /nowhere/env cuda", "read the env file `/nowhere/env`: no such file or directory"),
    ],
)
def test_fault(words: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        dockerline.parse(words.split())
    assert message in str(caught.value)
