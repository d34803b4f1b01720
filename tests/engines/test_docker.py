# SPDX-License-Identifier: Apache-2.0
"""What users do with Docker and GPUs, from `docker run` to a container's end, on a simulated host with two GPUs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import cannot
from containers import TRIPLET, TRY, gpu_lines, make_image
from engines import docker as engine
from engines import machine
from engines.docker import FIRST_ID, REMAPPED, Docker
from engines.machine import wait

pytestmark = [pytest.mark.root, pytest.mark.engines]

HOST = "a100x2"
FIRST, SECOND = "GPU-c41d7b52-93e6-4f0a-8d15-2b7e60a9f3c8", "GPU-08e5f9a3-1c6b-42d7-b0f4-e95d3187ac26"
LIBRARIES = f"usr/lib/{TRIPLET}"
VERSION = "550.163.01"  # of the host's driver
BOTH = gpu_lines(HOST, 0, 1)
NONE = "nothing here\n"
LOOK = f"""
if [ -e /usr/bin/nvidia-smi ]; then nvidia-smi -L
elif [ -e /dev/nvidiactl ]; then ls /dev
else printf '{NONE}'
fi"""

RUNTIME = ("--runtime=nvidia", "-e", "NVIDIA_VISIBLE_DEVICES=all")
WAYS = {
    "runtime": RUNTIME,
    "gpus": ("--gpus", "all"),
    "gpus-and-runtime": ("--gpus", "all", "--runtime=nvidia"),
}
_CAP_SYS_RESOURCE = 24


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """After everything of this file: no trace of an engine on the machine."""
    absent = machine.missing(engine.PROGRAMS)
    if absent:
        cannot(f"not installed: {absent}")
    before = machine.traces()
    with tempfile.TemporaryDirectory(prefix="nvhook-docker-") as name:
        directory = Path(name)
        directory.chmod(0o755)  # root of a user namespace has to come through
        yield directory
    assert before == machine.traces()
    assert machine.commands(name) == []


@pytest.fixture(scope="module")
def images(place: Path) -> Path:
    """Root filesystems, one directory each, for `Docker.load`."""
    for family in ("debian", "fedora", "busybox"):
        make_image(family, place / "images" / family)
    return place / "images"


@pytest.fixture(scope="module")
def docker(place: Path, images: Path, simhost: Callable[[str], Path]) -> Iterator[Docker]:
    (place / "docker").mkdir()
    docker = Docker(place / "docker", simhost(HOST))
    try:
        docker.start()
        for root in images.iterdir():
            docker.load(root.name, root)
        yield docker
    finally:
        left = docker.stop()
    assert left == []


@pytest.fixture(scope="module")
def remapped(place: Path, images: Path, simhost: Callable[[str], Path]) -> Iterator[Docker]:
    """An engine whose containers have a user namespace."""
    (place / "remapped").mkdir()
    docker = Docker(place / "remapped", simhost(HOST), settings={"userns-remap": REMAPPED})
    try:
        docker.start()
        docker.load("debian", images / "debian")
        yield docker
    finally:
        left = docker.stop()
    assert left == []


@pytest.fixture(params=["runtime", "gpus"])  # the third is the first once its hook is in place
def way(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return WAYS[request.param]


# Registration


def test_runtime_that_is_not_registered(docker: Docker) -> None:
    with docker.settings(runtimes={}):
        assert "Unknown runtime specified nvidia" in docker.refused(*RUNTIME)
        assert docker.run("--gpus", "all") == BOTH


def test_runtime_path_that_is_gone(docker: Docker) -> None:
    with docker.settings(runtimes={"nvidia": {"path": "/gone/nvidia-container-runtime"}}):
        message = docker.refused(*RUNTIME)
    assert "/gone/nvidia-container-runtime" in message
    assert "no such file" in message


# --runtime=nvidia


@pytest.mark.parametrize("family", ["debian", "fedora"])
@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        pytest.param("all", BOTH, id="all"),
        pytest.param("0", gpu_lines(HOST, 0), id="index"),
        pytest.param(SECOND, gpu_lines(HOST, 1), id="uuid"),
        pytest.param("none", "No devices found.\n", id="none"),
        pytest.param("void", NONE, id="void"),
        pytest.param(None, NONE, id="unset"),
    ],
)
def test_runtime_gives_the_devices_of_the_variable(
    docker: Docker, family: str, devices: str | None, expected: str
) -> None:
    env = [] if devices is None else ["-e", f"NVIDIA_VISIBLE_DEVICES={devices}"]
    assert expected == docker.run("--runtime=nvidia", *env, image=family, script=LOOK)


def test_variable_of_the_image(docker: Docker, images: Path) -> None:
    change = ["--change", "ENV NVIDIA_VISIBLE_DEVICES=1 NVIDIA_DRIVER_CAPABILITIES=utility"]
    archive = images.parent / "image.tar"
    subprocess.run(["tar", "-C", str(images / "debian"), "-cf", str(archive), "."], check=True)
    docker.do("import", *change, str(archive), "with-variable")
    assert gpu_lines(HOST, 1) == docker.run("--runtime=nvidia", image="with-variable")
    assert gpu_lines(HOST, 0) == docker.run(*RUNTIME[:1], "-e", "NVIDIA_VISIBLE_DEVICES=0", image="with-variable")
    assert docker.run(image="with-variable", script=LOOK) == NONE


def test_variable_without_the_runtime_gives_nothing(docker: Docker) -> None:
    assert docker.run("-e", "NVIDIA_VISIBLE_DEVICES=all", script=LOOK) == NONE


@pytest.mark.parametrize(
    ("env", "expected"), [({}, BOTH), ({"NV_GPU": "1"}, gpu_lines(HOST, 1))], ids=["all", "NV_GPU"]
)
def test_nvidia_docker(docker: Docker, env: dict[str, str], expected: str) -> None:
    """As an old script calls it, with an image that asks for all."""
    with docker.container(script="exit") as name:
        docker.do("commit", "--change", "ENV NVIDIA_VISIBLE_DEVICES=all", name, "asks-for-all")
    command = [str(docker.bin / "nvidia-docker"), "run", "--rm", "asks-for-all", "nvidia-smi", "-L"]
    done = subprocess.run(
        command, env={**docker.environment, **env}, capture_output=True, text=True, timeout=60, check=False
    )
    assert (0, expected) == (done.returncode, done.stdout), done.stderr


# --gpus


@pytest.mark.parametrize("runtime", ["runc", "nvidia"])
@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        pytest.param("all", BOTH, id="all"),
        pytest.param("1", gpu_lines(HOST, 0), id="count-1"),
        pytest.param("2", BOTH, id="count-2"),
        pytest.param("device=1", gpu_lines(HOST, 1), id="index"),
        pytest.param(f'"device=0,{SECOND}"', BOTH, id="index-and-uuid"),
        pytest.param(f"device={FIRST}", gpu_lines(HOST, 0), id="uuid"),
        pytest.param("all,capabilities=utility", BOTH, id="utility"),
    ],
)
def test_gpus_option(docker: Docker, runtime: str, gpus: str, expected: str) -> None:
    assert expected == docker.run("--gpus", gpus, "--runtime", runtime)


@pytest.mark.parametrize("runtime", ["runc", "nvidia"])
@pytest.mark.parametrize(
    ("capabilities", "there", "absent"),
    [
        ("compute", ["libcuda.so.1"], ["libnvidia-ml.so.1", "libnvcuvid.so.1"]),
        ("video", ["libnvcuvid.so.1"], ["libnvidia-ml.so.1"]),
        ("compute,utility", ["libcuda.so.1", "libnvidia-ml.so.1"], ["libnvcuvid.so.1"]),
    ],
)
def test_gpus_option_with_capabilities(
    docker: Docker, runtime: str, capabilities: str, there: list[str], absent: list[str]
) -> None:
    gpus = f'all,"capabilities={capabilities}"'  # a line of CSV
    shown = docker.run("--gpus", gpus, "--runtime", runtime, script="ldconfig -p")
    assert [name for name in there + absent if f"\t{name} " in shown] == there


def test_gpus_option_with_the_runtime_runs_one_hook(docker: Docker) -> None:
    """The wrapper takes over the hook that dockerd put in."""
    with docker.container("--gpus", "all", "--runtime=nvidia") as name:
        config = json.loads(docker.recorded(name))
        assert docker.do("exec", name, "nvidia-smi", "-L") == BOTH
    hooks = [hook for hook in config["hooks"]["prestart"] if "nvidia" in hook["path"]]
    (hook,) = hooks
    assert hook["path"] == str(docker.bin / "nvidia-container-runtime-hook")
    name, *words = hook["args"]
    if words[0] == "--child":  # where the server has edited config.json
        assert words[1].isdecimal()
        words = words[2:]
    assert name == os.path.basename(hook["path"])
    assert words == ["--no-audit", "--config", str(docker.config), "prestart"]
    assert all(hook["env"][0].startswith("PATH=") and len(hook["env"]) == 1 for hook in hooks)
    rules = [(rule.get("major"), rule.get("minor")) for rule in config["linux"]["resources"]["devices"]]
    assert all(rules.count((195, minor)) == 1 for minor in (0, 1, 255))


def test_other_gpu_stays_denied(docker: Docker) -> None:
    """Minors, which run against the order of the indices; Docker's containers may make nodes."""
    script = f"{TRY}\ntry /dev/nvidia0; mknod /dev/nvidia1 c 195 1; try /dev/nvidia1"
    for words in (["--runtime=nvidia", "-e", "NVIDIA_VISIBLE_DEVICES=1"], ["--gpus", "device=1"]):
        assert docker.run(*words, script=script) == "/dev/nvidia0 open\n/dev/nvidia1 denied\n"


# As the default runtime


def test_default_runtime_leaves_others_alone(docker: Docker) -> None:
    options = ["-v", f"{docker.place}/home:/volume", "--memory=64m"]
    front = {"nvidia": {"path": str(docker.front())}}
    with (
        docker.settings(runtimes=front, default_runtime="nvidia"),
        docker.container(*options) as name,
    ):
        assert docker.inspect(name, "{{.HostConfig.Runtime}}") == "nvidia"
        mounts = docker.do("exec", name, "cat", "/proc/self/mountinfo")
        nodes = docker.do("exec", name, "ls", "/dev")
        assert docker.do("diff", name) == "A /volume\n"
    assert docker.recorded(name, "before") == docker.recorded(name, "after")
    with docker.container(*options) as plain:
        assert _destinations(docker.do("exec", plain, "cat", "/proc/self/mountinfo")) == _destinations(mounts)
        assert nodes == docker.do("exec", plain, "ls", "/dev")


def _destinations(mountinfo: str) -> list[str]:
    return [line.split()[4] for line in mountinfo.splitlines()]


def test_default_runtime_serves_the_image_variable_and_gpus(docker: Docker) -> None:
    with docker.settings(default_runtime="nvidia"):
        assert docker.run("-e", "NVIDIA_VISIBLE_DEVICES=all") == BOTH
        assert gpu_lines(HOST, 0) == docker.run("--gpus", "1")
        assert docker.run("--runtime=runc", "-e", "NVIDIA_VISIBLE_DEVICES=all", script=LOOK) == NONE


def test_build_step_finds_the_driver(docker: Docker, tmp_path: Path) -> None:
    """The build problem of the original nvidia-docker."""
    lines = ["FROM debian", "ENV NVIDIA_VISIBLE_DEVICES=all", "RUN ldconfig -p | grep libcuda.so.1 && nvidia-smi -L"]
    (tmp_path / "Dockerfile").write_text("\n".join([*lines, "RUN nvidia-smi -L >/result", ""]))
    with docker.settings(default_runtime="nvidia"):
        shown = docker.do("build", "--tag", "built", str(tmp_path))
    assert f"libcuda.so.1 (libc6,x86-64) => /{LIBRARIES}/libcuda.so.1" in shown
    assert BOTH in shown
    changed = _changes(docker, "debian", "built")
    assert changed.pop("result")
    assert changed == {}


# docker-compose


COMPOSE = """
services:
  old:
    image: debian
    runtime: nvidia
    environment: [NVIDIA_VISIBLE_DEVICES=1]
    network_mode: none
    command: nvidia-smi -L
  new:
    image: debian
    network_mode: none
    command: nvidia-smi -L
    deploy:
      resources:
        reservations:
          devices:
            - driver: nvidia
              count: 1
              capabilities: [gpu, utility]
  several:
    image: debian
    network_mode: none
    command: nvidia-smi -L
    deploy: {resources: {reservations: {devices: [{device_ids: ["0", "1"], capabilities: [gpu]}]}}}
"""


def test_compose(docker: Docker, tmp_path: Path) -> None:
    (tmp_path / "docker-compose.yml").write_text(COMPOSE)
    compose = [machine.program("docker-compose"), "--project-name", "test", "--no-ansi"]

    def call(*words: str) -> str:
        done = subprocess.run(
            [*compose, *words], env=docker.environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    shown = call("up", "--no-color")
    call("down")
    services = dict.fromkeys(("old", "new", "several"), "")
    for service, line in re.findall(r"^(\w+)_1 +\| (GPU .*)$", shown, re.MULTILINE):
        services[service] += f"{line}\n"
    assert services == {"old": gpu_lines(HOST, 1), "new": gpu_lines(HOST, 0), "several": BOTH}


# The life of a container


@pytest.fixture(scope="module", params=WAYS)
def living(request: pytest.FixtureRequest, docker: Docker) -> Iterator[str]:
    """A container that runs before and after each test that uses it."""
    with docker.container(*WAYS[request.param]) as name:
        yield name


def _assert_has_gpus(docker: Docker, name: str) -> None:
    assert docker.do("exec", name, "nvidia-smi", "-L") == BOTH
    opened = docker.do("exec", name, "sh", "-euc", f"{TRY}\nfor node in /dev/nvidia*; do try $node; done")
    nodes = ("nvidia-uvm", "nvidia-uvm-tools", "nvidia0", "nvidia1", "nvidiactl")
    assert sorted(opened.splitlines()) == [f"/dev/{node} open" for node in nodes]


@pytest.mark.parametrize(
    "acts",
    [
        pytest.param([], id="exec"),
        pytest.param(["exec --user=1234:1234"], id="exec-as-somebody"),
        pytest.param(["pause", "unpause"], id="pause"),
        pytest.param(["update --memory=512m --memory-swap=-1"], id="update-memory"),
        pytest.param(["update --cpu-shares=512 --pids-limit=200"], id="update-cpu-and-pids"),
        pytest.param(["update --restart=no"], id="update-restart-policy"),
        pytest.param(["restart --time=0"], id="restart"),
        pytest.param(["stop --time=0", "start"], id="stop-start"),
        pytest.param(["kill", "start"], id="kill-start"),
    ],
)
def test_gpus_stay(docker: Docker, living: str, acts: list[str]) -> None:
    for act in acts:
        docker.do(*act.split(), living, *(["nvidia-smi", "-L"] if act.startswith("exec") else []))
    _assert_has_gpus(docker, living)


def test_gpus_stay_after_a_crash(docker: Docker, living: str) -> None:
    docker.kill_main_process(living)
    assert docker.do("wait", living) == "137\n"
    docker.do("start", living)
    _assert_has_gpus(docker, living)


def test_restart_policy(docker: Docker, way: tuple[str, ...]) -> None:
    with docker.container("--restart=always", *way) as name:
        for times in (1, 2):
            docker.kill_main_process(name)
            _wait_for_restart(docker, name, times)
        _assert_has_gpus(docker, name)


def _wait_for_restart(docker: Docker, name: str, times: int) -> None:
    form = "{{.RestartCount}} {{.State.Running}} {{gt .State.Pid 0}}"
    wait("it runs again", lambda: docker.inspect(name, form) == f"{times} true true", 10)


def test_copy(docker: Docker, living: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("from outside\n")
    docker.do("cp", f"{tmp_path}/file", f"{living}:/tmp/file")
    assert docker.do("exec", living, "cat", "/tmp/file") == "from outside\n"
    docker.do("cp", f"{living}:/tmp/file", f"{tmp_path}/back")
    assert (tmp_path / "back").read_text() == "from outside\n"
    docker.do("cp", f"{living}:/{LIBRARIES}", f"{tmp_path}/libraries")
    assert (tmp_path / "libraries/libc.so.6").stat().st_size > 0
    _assert_has_gpus(docker, living)


# dockerd's --gpus alone brings a prestart hook and no poststop one: nobody calls us when the container is over.
_CLEANED = {name: way for name, way in WAYS.items() if name != "gpus"}


@pytest.mark.parametrize("way", _CLEANED.values(), ids=_CLEANED)
def test_short_life_leaves_nothing_in_the_layer(docker: Docker, way: tuple[str, ...]) -> None:
    name = docker.do("create", *way, "debian", "sh", "-euc", "nvidia-smi -L").strip()
    assert docker.do("start", "--attach", name) == BOTH
    assert docker.do("diff", name) == ""
    docker.do("rm", name)


@pytest.mark.parametrize("way", _CLEANED.values(), ids=_CLEANED)
def test_commit_of_a_stopped_container_holds_nothing_of_ours(docker: Docker, way: tuple[str, ...]) -> None:
    """No injected file, no link, no empty mount point, and the linker cache of the image."""
    assert _committed(docker, way, is_running=False) == {}
    assert docker.run(*way, image="committed") == BOTH


@pytest.mark.parametrize(
    ("way", "is_running"),
    [*((way, True) for way in WAYS.values()), (WAYS["gpus"], False)],
    ids=[*(f"running-{name}" for name in WAYS), "stopped-gpus"],
)
def test_commit_of_what_could_not_be_cleaned(docker: Docker, way: tuple[str, ...], *, is_running: bool) -> None:
    """The limit of it: mounts need something to be mounted on. Nothing of the driver's content, and the image works."""
    changed = _committed(docker, way, is_running=is_running)
    assert changed.pop("etc/ld.so.cache", None)
    empty = hashlib.sha256(b"").hexdigest()[:8]
    for path, (before, after) in changed.items():
        assert before == "", path
        is_directory = after.startswith("5 ")
        assert is_directory or after.endswith(empty) or Path(path).parent == Path(LIBRARIES), (path, after)
        is_above = is_directory and any(other.startswith(f"{path}/") for other in changed)
        assert is_above or "nvidia" in path or "cuda" in path, path
    assert docker.run(*way, image="committed") == BOTH


def _committed(docker: Docker, way: tuple[str, ...], *, is_running: bool) -> dict[str, tuple[str, str]]:
    """What the image `committed` has besides the container's own file, and the image it began with has not."""
    with docker.container(*way, script="echo mine >/mine; exec sleep 600") as name:
        wait("its own file is there", lambda: "/mine" in docker.do("diff", name), 5)
        if not is_running:
            docker.do("stop", "--time=0", name)
        docker.do("commit", name, "committed")
    changed = _changes(docker, "debian", "committed")
    assert changed.pop("mine")
    return changed


def _changes(docker: Docker, before: str, after: str) -> dict[str, tuple[str, str]]:
    """Path -> what it is in the image `before` and in the image `after`, where that is not the same."""
    old, new = _files(docker, before), _files(docker, after)
    return {
        path: (old.get(path, ""), new.get(path, "")) for path in sorted({*old, *new}) if old.get(path) != new.get(path)
    }


def _files(docker: Docker, image: str) -> dict[str, str]:
    name = docker.do("create", image, "true").strip()
    archive = docker.place / f"{name}.tar"
    docker.do("export", "--output", str(archive), name)
    docker.do("rm", name)
    found = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isfile() else None
            content = hashlib.sha256(file.read()).hexdigest()[:8] if file else member.linkname
            found[member.name] = f"{member.type.decode()} {member.mode:o} {member.uid} {member.size} {content}"
    archive.unlink()
    return found


# Around it


AROUND = {
    "user": ["--user=1000:1000"],
    "read-only": ["--read-only"],
    "no-capabilities": ["--cap-drop=ALL"],
    "no-new-privileges": ["--security-opt=no-new-privileges"],
    "all-of-these": ["--user=1000", "--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges"],
    "pid-of-host": ["--pid=host"],
    "network-of-host": ["--network=host"],
    "ipc-of-host": ["--ipc=host"],
    "no-network": ["--network=none"],
    "cgroup-namespace": ["--cgroupns=private"],
    "init": ["--init"],
    "tmpfs-on-run": ["--tmpfs=/run"],
    "tmpfs-on-etc": ["--tmpfs=/etc"],
    "tmpfs-on-tmp": ["--tmpfs=/tmp:exec"],
    "tmpfs-on-dev": ["--tmpfs=/dev:dev"],
    "admin-capability": ["--cap-add=SYS_ADMIN"],
    "no-seccomp": ["--security-opt=seccomp=unconfined"],
    "limits": ["--memory=256m", "--cpus=1", "--pids-limit=100"],
    "workdir-and-hostname": ["--workdir=/nowhere/yet", "--hostname=gpu"],
    "device-of-the-host": ["--device=/dev/null:/dev/another"],
}


@pytest.mark.parametrize("options", AROUND.values(), ids=AROUND)
def test_around(docker: Docker, way: tuple[str, ...], options: list[str]) -> None:
    assert docker.run(*way, *options) == BOTH


def test_privileged(docker: Docker, way: tuple[str, ...]) -> None:
    bounding = int(Path("/proc/self/status").read_text().partition("CapBnd:")[2].split()[0], 16)
    if not bounding >> _CAP_SYS_RESOURCE & 1:
        pytest.skip("this machine is without CAP_SYS_RESOURCE, and Docker gives all capabilities to --privileged")
    assert docker.run(*way, "--privileged") == BOTH
    assert gpu_lines(HOST, 1) == docker.run("--runtime=nvidia", "--privileged", "-e", "NVIDIA_VISIBLE_DEVICES=1")


def test_driver_files_cannot_be_written(docker: Docker, way: tuple[str, ...]) -> None:
    script = f"for file in /usr/bin/nvidia-smi /{LIBRARIES}/libcuda.so.{VERSION}; do (: >>$file) 2>&1 || :; done"
    assert docker.run(*way, script=script).count("Read-only file system") == 2


@pytest.mark.parametrize("propagation", ["shared", "rshared", "rslave"])
def test_volume_leaks_no_mount(docker: Docker, way: tuple[str, ...], propagation: str) -> None:
    volume = docker.place / f"volume-{propagation}"
    volume.mkdir(exist_ok=True)
    before = docker.mounts()
    with docker.container(*way, "-v", f"{volume}:/volume:{propagation}", script="touch /volume/x; sleep 600") as name:
        assert docker.do("exec", name, "nvidia-smi", "-L") == BOTH
        assert _foreign(docker, before) == []
    assert before == docker.mounts()
    assert os.listdir(volume) == ["x"]


def _foreign(docker: Docker, before: list[str]) -> list[str]:
    """Mounts that are new where the engine runs, and not the engine's."""
    usual = re.compile(r"/(merged|shm|rootfs)$")
    new = [line for line in docker.mounts() if line not in before]
    return [line for line in new if not usual.search(line.split()[2])]


@pytest.mark.parametrize("propagation", ["shared", "rslave", "rprivate"])
def test_library_directory_that_is_a_volume(
    docker: Docker, images: Path, way: tuple[str, ...], propagation: str, tmp_path: Path
) -> None:
    """What would be mounted in the volume of the host as well is refused; the mounts stay in the container."""
    volume = tmp_path / "libraries"
    subprocess.run(["cp", "-a", str(images / "debian" / LIBRARIES), str(volume)], check=True)
    before = docker.mounts()
    words = [*way, "-v", f"{volume}:/{LIBRARIES}:{propagation}"]
    if propagation == "shared":
        message = docker.refused(*words)
        assert re.search(r"\bnvidia-container-runtime-hook: mount error: .* shares its mounts", message), message
        assert sorted(os.listdir(volume)) == sorted(os.listdir(images / "debian" / LIBRARIES))
    else:
        with docker.container(*words) as name:
            assert docker.do("exec", name, "nvidia-smi", "-L") == BOTH
            assert _foreign(docker, before) == []
    assert before == docker.mounts()


# Images that are not as expected


def _full(root: Path) -> None:
    """Somebody has copied a driver of another version into the image."""
    for name in ("libcuda.so.1", "libcuda.so.525.60", "libnvidia-ml.so.1", f"libcuda.so.{VERSION}"):
        (root / LIBRARIES / name).write_text("of the image\n")
    (root / "usr/bin/nvidia-smi").write_text("#!/bin/sh\necho of the image\n")
    (root / "usr/bin/nvidia-smi").chmod(0o755)


def _empty(root: Path) -> None:
    """What other programs leave in an image that is committed from a container with GPUs."""
    names = ("libcuda.so.1", "libcuda.so", f"libcuda.so.{VERSION}", f"libnvidia-ml.so.{VERSION}", "libnvidia-ml.so.1")
    for name in names:
        (root / LIBRARIES / name).touch()
    (root / "usr/bin/nvidia-smi").touch()


def _stale(root: Path) -> None:
    """Links to a driver that is no more, and to nowhere good."""
    (root / LIBRARIES / "libcuda.so.1").symlink_to("libcuda.so.525.60")
    (root / LIBRARIES / "libcuda.so").symlink_to("/etc/passwd")
    (root / LIBRARIES / "libnvidia-ml.so.1").symlink_to("/dev/null")
    (root / LIBRARIES / "libnvidia-ml.so").symlink_to("libnvidia-ml.so")


def _elsewhere(root: Path) -> None:
    """The library directory is a link, absolute and upwards."""
    (root / "opt").mkdir()
    (root / LIBRARIES).rename(root / "opt/libraries")
    (root / LIBRARIES).symlink_to("/opt/../../opt/libraries")


def _merged(root: Path) -> None:
    """/usr itself is a link."""
    (root / "system").mkdir()
    (root / "usr").rename(root / "system/usr")
    (root / "usr").symlink_to("system/usr")


IMAGES: dict[str, Callable[[Path], None]] = {
    "full": _full,
    "empty": _empty,
    "stale": _stale,
    "elsewhere": _elsewhere,
    "merged": _merged,
}


@pytest.fixture(scope="module")
def odd(docker: Docker, images: Path, place: Path) -> Callable[[str], str]:
    """The name of an image made by one of IMAGES."""
    made: set[str] = set()

    def get(name: str) -> str:
        if name not in made:
            root = place / f"odd-{name}"
            subprocess.run(["cp", "-a", str(images / "debian"), str(root)], check=True)
            IMAGES[name](root)
            docker.load(name, root)
            made.add(name)
        return name

    return get


@pytest.mark.parametrize("image", IMAGES)
def test_image_that_is_odd(docker: Docker, odd: Callable[[str], str], way: tuple[str, ...], image: str) -> None:
    script = "nvidia-smi -L; ldconfig -p | grep -c 'libcuda.so.1 '"
    assert docker.run(*way, image=odd(image), script=script) == f"{BOTH}1\n"


@pytest.mark.parametrize("image", IMAGES)
def test_odd_image_is_as_before(docker: Docker, odd: Callable[[str], str], image: str) -> None:
    name = docker.do("create", *RUNTIME, odd(image), "sh", "-euc", "nvidia-smi -L").strip()
    assert docker.do("start", "--attach", name) == BOTH
    docker.do("commit", name, "odd-committed")
    docker.do("rm", name)
    assert _changes(docker, image, "odd-committed") == {}


# In a user namespace


def test_user_namespace(remapped: Docker, way: tuple[str, ...]) -> None:
    script = f"{TRY}\ncat /proc/self/uid_map; nvidia-smi -L; for node in /dev/nvidia*; do try $node; done"
    shown = remapped.run(*way, script=script).splitlines()
    assert shown[0].split() == ["0", str(FIRST_ID), "65536"]
    assert shown[1:3] == BOTH.splitlines()
    assert len(shown) == 8
    assert [line for line in shown[3:] if not line.endswith(" open")] == []


def test_user_namespace_owner_of_what_is_made(remapped: Docker, way: tuple[str, ...]) -> None:
    script = f"stat -c '%u %g' /{LIBRARIES}/libcuda.so.1 /{LIBRARIES}/libcuda.so /etc/ld.so.cache"
    assert remapped.run(*way, script=script) == "0 0\n" * 3


def test_user_namespace_leaves_nothing_in_the_layer(remapped: Docker) -> None:
    name = remapped.do("create", *RUNTIME, "debian", "sh", "-euc", "nvidia-smi -L").strip()
    assert remapped.do("start", "--attach", name) == BOTH
    assert remapped.do("diff", name) == ""
    remapped.do("rm", name)


def test_user_namespace_with_a_shared_volume(remapped: Docker, way: tuple[str, ...]) -> None:
    before = remapped.mounts()
    with remapped.container(*way, "-v", f"{remapped.place}/home:/volume:shared") as name:
        assert remapped.do("exec", name, "nvidia-smi", "-L") == BOTH
        assert _foreign(remapped, before) == []
    assert before == remapped.mounts()


def test_user_namespace_with_a_library_volume(
    remapped: Docker, images: Path, way: tuple[str, ...], tmp_path: Path
) -> None:
    """What is mounted in a namespace of lower rank does not come out of it, however the volume is mounted."""
    volume = remapped.place / f"{tmp_path.name}-libraries"
    subprocess.run(["cp", "-a", str(images / "debian" / LIBRARIES), str(volume)], check=True)
    subprocess.run(["chown", "-R", f"{FIRST_ID}:{FIRST_ID}", str(volume)], check=True)
    before = remapped.mounts()
    with remapped.container(*way, "-v", f"{volume}:/{LIBRARIES}:shared") as name:
        assert remapped.do("exec", name, "nvidia-smi", "-L") == BOTH
        assert _foreign(remapped, before) == []
    assert before == remapped.mounts()


def test_user_namespace_with_another_user(remapped: Docker, way: tuple[str, ...]) -> None:
    assert remapped.run(*way, "--user=1000:1000", "--cap-drop=ALL") == BOTH


def test_user_namespace_of_the_host(remapped: Docker, way: tuple[str, ...]) -> None:
    assert remapped.run(*way, "--userns=host") == BOTH


def test_user_namespace_other_gpu_stays_denied(remapped: Docker) -> None:
    script = f"{TRY}\ntry /dev/nvidia0; ls /dev/nvidia1 2>/dev/null || echo absent"
    for words in (["--runtime=nvidia", "-e", "NVIDIA_VISIBLE_DEVICES=1"], ["--gpus", "device=1"]):
        assert remapped.run(*words, script=script) == "/dev/nvidia0 open\nabsent\n"


def test_user_namespace_keeps_gpus(remapped: Docker, way: tuple[str, ...]) -> None:
    with remapped.container(*way) as name:
        remapped.do("update", "--memory=512m", "--memory-swap=-1", name)
        _assert_has_gpus(remapped, name)
        remapped.do("restart", "--time=0", name)
        _assert_has_gpus(remapped, name)


# Who may ask


NO_VARIABLE = "accept-nvidia-visible-devices-envvar-when-unprivileged = false"
VOLUMES = "accept-nvidia-visible-devices-as-volume-mounts = true"
SWARM = 'swarm-resource = "DOCKER_RESOURCE_GPU"'


def _volume(device: str) -> list[str]:
    return ["-v", f"/dev/null:/var/run/nvidia-container-devices/{device}"]


@pytest.mark.parametrize(
    ("configuration", "words", "expected"),
    [
        pytest.param([NO_VARIABLE], RUNTIME, NONE, id="variable-unprivileged"),
        pytest.param([NO_VARIABLE], ["--gpus", "all"], NONE, id="gpus-unprivileged"),
        pytest.param([NO_VARIABLE], [*RUNTIME, "--cap-add=SYS_ADMIN"], BOTH, id="variable-privileged"),
        pytest.param([NO_VARIABLE], ["--gpus", "all", "--cap-add=SYS_ADMIN"], BOTH, id="gpus-privileged"),
        pytest.param([], ["--runtime=nvidia", *_volume("1")], NONE, id="volume-not-accepted"),
        pytest.param([VOLUMES], ["--runtime=nvidia", *_volume("1")], gpu_lines(HOST, 1), id="volume"),
        pytest.param([VOLUMES], ["--runtime=nvidia", *_volume("0"), *_volume(SECOND)], BOTH, id="two-volumes"),
        pytest.param([VOLUMES, NO_VARIABLE], [*RUNTIME, *_volume("0")], gpu_lines(HOST, 0), id="volume-first"),
        pytest.param([VOLUMES, NO_VARIABLE], RUNTIME, NONE, id="volume-missing"),
        pytest.param(
            [SWARM], ["--runtime=nvidia", "-e", f"DOCKER_RESOURCE_GPU={SECOND}"], gpu_lines(HOST, 1), id="swarm"
        ),
        pytest.param([SWARM], [*RUNTIME, "-e", "DOCKER_RESOURCE_GPU=0"], gpu_lines(HOST, 0), id="swarm-first"),
        pytest.param([SWARM], RUNTIME, BOTH, id="swarm-unset"),
        pytest.param([], ["--runtime=nvidia", "-e", "DOCKER_RESOURCE_GPU=0"], NONE, id="swarm-not-configured"),
    ],
)
def test_who_may_ask(docker: Docker, configuration: list[str], words: list[str], expected: str) -> None:
    with docker.configured("\n".join(configuration)):
        assert expected == docker.run(*words, script=LOOK)


# Requests that cannot be met


@pytest.mark.parametrize("runtime", ["runc", "nvidia"])
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        pytest.param(["--gpus", "device=7"], "device error: .*`7`", id="no-such-index"),
        pytest.param(["--gpus", "5"], "device error: .*`2`", id="more-than-there-are"),
        pytest.param(["--gpus", "device=GPU-00000000"], "device error: .*`GPU-00000000`", id="no-such-uuid"),
        pytest.param(
            ["--gpus", "all", "-e", "NVIDIA_REQUIRE_CUDA=cuda>=99.9"], "requirement error: .*99.9", id="requirement"
        ),
        pytest.param(
            ["--gpus", "all", "-e", "NVIDIA_DRIVER_CAPABILITIES=flying"], "request error: .*flying", id="capability"
        ),
    ],
)
def test_request_that_cannot_be_met(docker: Docker, runtime: str, words: list[str], expected: str) -> None:
    message = docker.refused("--runtime", runtime, *words)
    program = "nvidia-container-runtime" if runtime == "nvidia" else "nvidia-container-runtime-hook"
    assert re.search(rf"\b{program}: {expected}", message), message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("words", "program"), [(RUNTIME, "nvidia-container-runtime"), (("--gpus", "all"), "nvidia-container-runtime-hook")]
)
def test_host_without_a_driver(
    docker: Docker, simhost: Callable[[str], Path], words: tuple[str, ...], program: str
) -> None:
    with docker.configured("", host=simhost("no-driver")):
        message = docker.refused(*words)
        assert docker.run("--runtime=nvidia", script=LOOK) == NONE
    assert re.search(rf"\b{program}: (driver|device) error: \S+", message), message


@pytest.mark.parametrize(
    ("words", "program"), [(RUNTIME, "nvidia-container-runtime"), (("--gpus", "all"), "nvidia-container-runtime-hook")]
)
def test_configuration_that_does_not_parse(docker: Docker, words: tuple[str, ...], program: str) -> None:
    with docker.configured("this is = = not\n"):
        message = docker.refused(*words)
    assert re.search(rf"\b{program}: config error: parse .*config.toml.*line 1, column", message), message


def test_low_level_runtime_that_is_gone(docker: Docker) -> None:
    with docker.configured("", runtime="/gone/runc"):
        message = docker.refused(*RUNTIME)
    line = "nvidia-container-runtime: runtime error: no runtime binary found from candidate list: [/gone/runc]"
    assert line in message


def test_hook_that_fails_in_the_container(docker: Docker, place: Path) -> None:
    """What is found out only there: the image has a directory where a library belongs."""
    root = place / "in-the-way"
    make_image("debian", root)
    (root / LIBRARIES / f"libcuda.so.{VERSION}" / "full").mkdir(parents=True)
    docker.load("in-the-way", root)
    for words in WAYS.values():
        message = docker.refused(*words, image="in-the-way")
        assert re.search(r"\bnvidia-container-runtime-hook: mount error: .*a directory there", message), message
        name = docker.do("create", *words, "in-the-way", "true").strip()
        assert docker.docker("start", name).returncode != 0
        assert docker.do("diff", name) == ""
        docker.do("rm", name)


# crun below


def test_crun(place: Path, images: Path, simhost: Callable[[str], Path]) -> None:
    directory = place / "crun"
    directory.mkdir()
    try:
        machine.make_crun(directory / "crun")
    except LookupError as error:
        cannot(str(error))
    docker = Docker(directory, simhost(HOST), runtime=str(directory / "crun"), unified=True)
    try:
        docker.start()
        docker.load("debian", images / "debian")
        assert docker.run(*RUNTIME) == BOTH
        assert gpu_lines(HOST, 1) == docker.run("--gpus", "device=1", "--runtime=nvidia")
        assert docker.run("--runtime=nvidia", script=LOOK) == NONE
        with docker.container(*RUNTIME) as name:
            assert docker.do("exec", name, "nvidia-smi", "-L") == BOTH
            docker.do("restart", "--time=0", name)
            assert docker.do("exec", name, "nvidia-smi", "-L") == BOTH
        assert "device error: unknown device `7`" in docker.refused("--gpus", "device=7", "--runtime=nvidia")
    finally:
        left = docker.stop()
    assert left == []


# Several at once


def test_eight_at_once(docker: Docker, simhost: Callable[[str], Path]) -> None:
    """With no inventory of the driver at first."""
    ways = [*WAYS.values()]
    command = [machine.program("docker"), "run", "--rm"]
    with docker.configured("", host=simhost(HOST)):
        running: list[subprocess.Popen[str]] = [
            subprocess.Popen(
                [*command, *ways[number % len(ways)], "debian", "nvidia-smi", "-L"],
                env=docker.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(8)
        ]
        results: list[Any] = [process.communicate(timeout=60) for process in running]
    assert results == [(BOTH, "")] * 8
