# SPDX-License-Identifier: Apache-2.0
"""What users do with Podman and GPUs, as root and rootless, by its runtime and by hooks.d."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import HOSTS, cannot
from containers import gpu_lines, make_image
from engines import machine
from engines import podman as engine
from engines.podman import USER, Podman
from simhost.build import build

pytestmark = [pytest.mark.root, pytest.mark.engines]

HOST = "a100x2"
SECOND = "GPU-08e5f9a3-1c6b-42d7-b0f4-e95d3187ac26"
BOTH = gpu_lines(HOST, 0, 1)
ALL = ("--env=NVIDIA_VISIBLE_DEVICES=all",)
USERS = pytest.mark.parametrize("user", [0, USER], ids=["root", "rootless"])


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    absent = machine.missing(engine.PROGRAMS)
    if absent:
        cannot(f"not installed: {absent}")
    with tempfile.TemporaryDirectory(prefix="nvhook-podman-") as name:
        place = Path(name)
        place.chmod(0o755)  # who is not root has to come through
        (description,) = HOSTS.glob(f"{HOST}*.json")
        build(description, place / "host")
        podman = Podman(place, place / "host")
        podman.start()
        try:
            root = make_image("debian", place / "image")
            for user in (0, USER):
                podman.load("debian", root, user=user)
            yield podman
        finally:
            left = podman.stop()
        assert left == []
    assert machine.commands(name) == []


Roads = Callable[[str], tuple[str, ...]]


@pytest.fixture
def roads(podman: Podman) -> Roads:
    """The options before `run` by which a container comes to us."""
    hooks = f"--hooks-dir={podman.hooks}"
    return {
        "runtime": (f"--runtime={podman.runtime}",),
        "hooks": ("--runtime=runc", hooks),
        "both": (f"--runtime={podman.runtime}", hooks),
    }.__getitem__


WAYS = pytest.mark.parametrize("way", ["runtime", "hooks", "both"])


@USERS
@WAYS
def test_all_gpus(podman: Podman, roads: Roads, way: str, user: int) -> None:
    assert podman.run(roads(way), *ALL, user=user) == BOTH


@USERS
@WAYS
def test_one_gpu(podman: Podman, roads: Roads, way: str, user: int) -> None:
    one = f"--env=NVIDIA_VISIBLE_DEVICES={SECOND}"
    assert podman.run(roads(way), one, user=user) == gpu_lines(HOST, 1)


@USERS
@WAYS
def test_nothing_for_who_does_not_ask(podman: Podman, roads: Roads, way: str, user: int) -> None:
    look = "ls /dev | grep nvidia || echo nothing; ls /usr/bin/nvidia-smi 2>/dev/null || echo nothing"
    assert podman.run(roads(way), script=look, user=user) == "nothing\nnothing\n"


@USERS
@WAYS
def test_device_that_is_not_there(podman: Podman, roads: Roads, way: str, user: int) -> None:
    said = podman.refused(roads(way), "--env=NVIDIA_VISIBLE_DEVICES=7", user=user)
    assert "device error: unknown device `7`" in said


def test_both_roads_do_the_work_once(podman: Podman, roads: Roads) -> None:
    mounts = podman.run(roads("both"), *ALL, script="cat /proc/self/mountinfo").splitlines()
    ours = [path for path in (line.split()[4] for line in mounts) if "nvidia" in path or "libcuda" in path]
    assert ours
    assert len(ours) == len(set(ours))


@WAYS
def test_user_namespace_of_a_rootful_container(podman: Podman, roads: Roads, way: str) -> None:
    """Its nodes are bind mounts of the host's: nobody may make one there."""
    maps = ("--uidmap=0:500000:65536", "--gidmap=0:500000:65536")
    script = "nvidia-smi -L; grep -c ' /dev/nvidia0 ' /proc/self/mountinfo"
    assert podman.run(roads(way), *ALL, *maps, script=script) == f"{BOTH}1\n"


@USERS
@WAYS
def test_tmpfs_of_ours(podman: Podman, roads: Roads, way: str, user: int) -> None:
    """EGL's profile, in a file system that a rootless engine's hook has to be able to make as well."""
    place = "/etc/nvidia/nvidia-application-profiles-rc.d"
    script = f"cd {place}; ls; grep -o 0x. *; stat -c '%a %u' . *; {{ echo x >new; }} 2>/dev/null || echo refused"
    shown = podman.run(roads(way), *ALL, "--env=NVIDIA_DRIVER_CAPABILITIES=graphics", script=script, user=user)
    assert shown.splitlines() == ["10-container.conf", "0x3", "555 0", "444 0", "refused"]


@USERS
@pytest.mark.parametrize("way", ["runtime", "hooks"])
def test_life_of_a_container(podman: Podman, roads: Roads, way: str, user: int) -> None:
    """Whoever enters it sees the GPUs, before and after a restart; what is left of it in the state is nothing."""
    with podman.container(roads(way), *ALL, user=user) as name:
        assert podman.do("exec", name, "nvidia-smi", "-L", user=user) == BOTH
        podman.do(*roads(way), "stop", "--time=0", name, user=user)
        podman.do(*roads(way), "start", name, user=user)
        assert podman.do("exec", name, "nvidia-smi", "-L", user=user) == BOTH


def test_server_is_left_by_the_first_container(podman: Podman, roads: Roads) -> None:
    """By `start`: conmon ends when nobody is left below it. What comes next takes no interpreter."""

    def conmons() -> list[int]:
        return [pid for pid, name in podman.machine.processes() if name == "conmon"]

    podman.end_server()
    with podman.container(roads("runtime"), *ALL):
        machine.wait("the server is there", lambda: podman.machine.server() != 0, 20)
        (conmon,) = conmons()
        assert [Path(f"/proc/{pid}/comm").read_text() for pid in machine.children(conmon)] == ["sleep\n"]
    machine.wait("conmon ends", lambda: not conmons(), 20)
    server = podman.machine.server()

    def takes_none() -> bool:
        podman.python.starts()
        assert podman.run(roads("runtime"), *ALL) == BOTH
        return podman.python.starts() == 0

    assert any(takes_none() for _ in range(20))  # the server answers within 200 ms, or Python does the work
    assert podman.machine.server() == server != 0


def test_crun_without_cgroups(podman: Podman) -> None:
    """The container is in our own cgroup, which is not opened: what Podman may open, it may."""
    road = ("--runtime=crun", f"--hooks-dir={podman.hooks}")
    assert podman.run_by_crun(road, *ALL) == BOTH


# A runtime that may not make nodes binds those of the machine's own /dev.
_DEV = """
mkdir "$1/dev"
mount -t tmpfs -o mode=755 tmpfs "$1/dev"
for name in null zero full random urandom tty; do cp -a "/dev/$name" "$1/dev"; done
cp -a "$1"/host/dev/nvidia* "$1/dev"
for name in /dev/*/; do mkdir "$1$name"; mount --rbind "$name" "$1$name"; done
mount --rbind "$1/dev" /dev
"""


@pytest.fixture(scope="module")
def by_cdi(podman: Podman) -> tuple[str, ...]:
    """Without a runtime or hooks.d of ours: what is in the specification is all."""
    podman.machine.here("sh", "-euc", _DEV, "-", str(podman.place))
    program = str(podman.prefix / "bin/nvhook")
    done = podman.here(program, "cdi", "generate", "--output", "/etc/cdi/nvidia.yaml")
    assert (done.returncode, done.stderr) == (0, "")
    assert podman.here(program, "cdi", "check").stdout == "ok\n"
    return ("--runtime=runc",)


@USERS
@pytest.mark.parametrize(
    ("devices", "gpus"),
    [
        pytest.param(("all",), (0, 1), id="all"),
        pytest.param(("1",), (1,), id="index"),
        pytest.param((SECOND,), (1,), id="uuid"),
        pytest.param(("0", "1"), (0, 1), id="both"),
    ],
)
def test_cdi(
    podman: Podman, by_cdi: tuple[str, ...], devices: tuple[str, ...], gpus: tuple[int, ...], user: int
) -> None:
    words = [f"--device=nvidia.com/gpu={device}" for device in devices]
    assert podman.run(by_cdi, *words, user=user) == gpu_lines(HOST, *gpus)


def test_cdi_in_a_user_namespace(podman: Podman, by_cdi: tuple[str, ...]) -> None:
    maps = ("--uidmap=0:500000:65536", "--gidmap=0:500000:65536")
    assert podman.run(by_cdi, "--device=nvidia.com/gpu=all", *maps) == BOTH


def test_cdi_below_crun(podman: Podman, by_cdi: tuple[str, ...]) -> None:
    assert by_cdi
    assert podman.run_by_crun(("--runtime=crun",), "--device=nvidia.com/gpu=all") == BOTH
