# SPDX-License-Identifier: Apache-2.0
"""What users do with containerd and GPUs: `ctr run --runc-binary`, and pods of the runtime class, through CRI."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import containers
from conftest import HOSTS, cannot
from containers import TRIPLET, TRY, Bundle, gpu_lines, make_image
from engines import containerd as engine
from engines import machine
from engines.containerd import IMAGE, Containerd
from engines.cri import CriError
from simhost.build import build

pytestmark = [pytest.mark.root, pytest.mark.engines]

HOST = "a100x2"
SECOND = "GPU-08e5f9a3-1c6b-42d7-b0f4-e95d3187ac26"
VERSION = "550.163.01"  # of the host's driver
BOTH = gpu_lines(HOST, 0, 1)
NONE = "nothing here\n"
LOOK = f"if [ -e /usr/bin/nvidia-smi ]; then nvidia-smi -L; else ls /dev | grep nvidia || printf '{NONE}'; fi"
ALL = ("--env=NVIDIA_VISIBLE_DEVICES=all",)
ONE = ("--env=NVIDIA_VISIBLE_DEVICES=1",)
FIRST_ID = 300000

Start = Callable[..., Containerd]


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """A containerd that runs, by the keywords of its class; after everything of this file no trace of any is left."""
    absent = machine.missing(engine.PROGRAMS)
    if absent:
        cannot(f"not installed: {absent}")
    before = machine.traces()
    started: list[Containerd] = []
    left: list[str] = []
    with tempfile.TemporaryDirectory(prefix="nvhook-containerd-") as name:
        place = Path(name)
        place.chmod(0o755)  # root of a user namespace has to come through
        (description,) = HOSTS.glob(f"{HOST}*.json")
        build(description, place / "host")
        image = make_image("debian", place / "image")
        (image / "run").mkdir()  # as every image has it: runc makes it otherwise

        def get(name: str, **keywords: object) -> Containerd:
            (place / name).mkdir()
            containerd = Containerd(place / name, place / "host", **keywords)  # type: ignore[arg-type]
            started.append(containerd)
            containerd.start()
            containerd.load(IMAGE, image)
            return containerd

        try:
            yield get
        finally:
            for containerd in started:
                left += containerd.stop()
    assert left == []
    assert before == machine.traces()
    assert machine.commands(name) == []


@pytest.fixture(scope="module")
def containerd(start: Start) -> Containerd:
    return start("usual")


# ctr run --runc-binary


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
def test_runtime_gives_the_devices_of_the_variable(containerd: Containerd, devices: str | None, expected: str) -> None:
    env = [] if devices is None else [f"--env=NVIDIA_VISIBLE_DEVICES={devices}"]
    assert expected == containerd.run(*env, script=LOOK)


def test_variable_without_the_runtime_gives_nothing(containerd: Containerd) -> None:
    assert containerd.run(*ALL, script=LOOK, plain=True) == NONE


def test_variable_of_the_image(containerd: Containerd) -> None:
    containerd.load("localhost/asks:1", containerd.image, "NVIDIA_VISIBLE_DEVICES=1")
    assert gpu_lines(HOST, 1) == containerd.run(image="localhost/asks:1")


def test_root_filesystem_that_containerd_does_not_manage(containerd: Containerd) -> None:
    rootfs = containerd.place / "rootfs"
    make_image("fedora", rootfs)
    (rootfs / "run").mkdir()
    before = containers.tree(rootfs)
    path = "--env=PATH=/usr/bin"  # where there is no image, nobody has said it
    assert containerd.run(*ALL, path, "--rootfs", image=str(rootfs)) == BOTH
    assert before == containers.tree(rootfs)


def test_other_gpu_stays_denied(containerd: Containerd) -> None:
    """Minors, which run against the order of the indices; ctr's containers may make nodes."""
    script = f"{TRY}\ntry /dev/nvidia0; mknod /dev/nvidia1 c 195 1; try /dev/nvidia1"
    assert containerd.run(*ONE, script=script) == "/dev/nvidia0 open\n/dev/nvidia1 denied\n"


AROUND = {
    "read-only": ["--read-only"],
    "network-of-host": ["--net-host"],
    "no-capabilities": [word for name in ("MKNOD", "DAC_OVERRIDE", "CHOWN") for word in ("--cap-drop", f"CAP_{name}")],
    "seccomp": ["--seccomp"],
    "limits": ["--memory-limit", "268435456", "--cpus", "1"],
    "slave-root": ["--rootfs-propagation", "rslave"],
    "shared-root": ["--rootfs-propagation", "rshared"],
}


@pytest.mark.parametrize("options", AROUND.values(), ids=AROUND)
def test_around(containerd: Containerd, options: list[str]) -> None:
    before = containerd.mounts()
    assert containerd.run(*ALL, *options) == BOTH
    assert before == containerd.mounts()


def test_eight_at_once(containerd: Containerd) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: containerd.run(*ALL), range(8))) == [BOTH] * 8


# ctr run --gpus, which has nvidia-container-cli called by a hook


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param(["--gpus", "0"], gpu_lines(HOST, 0), id="first"),
        pytest.param(["--gpus", "1"], gpu_lines(HOST, 1), id="second"),
        pytest.param(["--gpus", "0", "--gpus", "1"], BOTH, id="both"),
    ],
)
def test_gpus(containerd: Containerd, options: list[str], expected: str) -> None:
    before = containerd.mounts()
    assert containerd.run(*options, plain=True) == expected
    assert before == containerd.mounts()


def test_gpus_opens_the_device_cgroup_for_them_alone(containerd: Containerd) -> None:
    script = f"{TRY}\ntry /dev/nvidia1; try /dev/nvidia-uvm; mknod /dev/nvidia0 c 195 0; try /dev/nvidia0"
    shown = containerd.run("--gpus", "0", script=script, plain=True)
    assert shown == "/dev/nvidia1 open\n/dev/nvidia-uvm open\n/dev/nvidia0 denied\n"


def test_gpus_that_are_not_there(containerd: Containerd) -> None:
    before = containerd.mounts()
    done = containerd.ctr("run", "--rm", "--gpus", "7", IMAGE, containerd.new_name(), "true")
    assert done.returncode == 1
    assert "nvidia-container-cli: device error: unknown device `7`; this host has 0 (" in done.stderr
    assert before == containerd.mounts()


# In a user namespace


def test_user_namespace(containerd: Containerd) -> None:
    """From a config.json made by hand: with --uidmap of its own, ctr 1.6 forgets --runc-binary."""
    rootfs = containerd.place / "remapped"
    make_image("debian", rootfs)
    subprocess.run(["chown", "-R", f"{FIRST_ID}:{FIRST_ID}", str(rootfs)], check=True)
    bundle = Bundle(containerd.place / "bundle", rootfs)
    linux = bundle.config["linux"]
    linux["namespaces"].append({"type": "user"})
    linux["uidMappings"] = linux["gidMappings"] = [{"containerID": 0, "hostID": FIRST_ID, "size": 65536}]
    linux["cgroupsPath"] = f"/{containerd.namespace}/{bundle.id}"
    made = " ".join(f"/usr/lib/{TRIPLET}/{name}" for name in ("libcuda.so.1", "libcuda.so"))
    script = f"{TRY}\nnvidia-smi -L; for node in /dev/nvidia*; do try $node; done; stat -c '%u %g' {made}"
    bundle.write(["sh", "-euc", script], {"NVIDIA_VISIBLE_DEVICES": "all"})
    before = containers.tree(rootfs)
    shown = containerd.run_bundle(bundle)
    nodes = ("nvidia-uvm", "nvidia-uvm-tools", "nvidia0", "nvidia1", "nvidiactl")
    assert shown == BOTH + "".join(f"/dev/{node} open\n" for node in nodes) + "0 0\n0 0\n"
    assert before == containers.tree(rootfs)


# The life of a container


def test_life_of_a_container(containerd: Containerd) -> None:
    """Whoever enters it sees the GPUs, in its second task as in its first, and a task that is over leaves nothing."""
    before = containerd.mounts()
    with containerd.container(*ALL) as name:
        image, layer = containerd.layers(name)
        assert containerd.execute(name, "nvidia-smi", "-L") == BOTH
        assert len(containerd.notes()) > 0
        for act in ("pause", "resume"):
            containerd.do("task", act, name)
        assert containerd.execute(name, "nvidia-smi", "-L") == BOTH
        containerd.end_task(name)
        assert (containerd.notes(), _changed(image, layer)) == ([], [])
        containerd.do("task", "start", "--detach", "--null-io", name)
        assert containerd.execute(name, "nvidia-smi", "-L") == BOTH
    assert before == containerd.mounts()
    assert containerd.notes() == []


def _changed(image: Path, layer: Path) -> list[str]:
    """What a layer has that is not in the image, or not like that."""
    old, new = containers.tree(image), containers.tree(layer)
    return [path for path in new if new[path] != old.get(path.replace(str(layer), str(image), 1))]


# Requests that cannot be met


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        pytest.param(["NVIDIA_VISIBLE_DEVICES=7"], "device error: unknown device `7`", id="device"),
        pytest.param(
            ["NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_REQUIRE_CUDA=cuda>=99.9"],
            "requirement error: .*99.9",
            id="requirement",
        ),
        pytest.param(
            ["NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=flying"],
            "request error: .*flying",
            id="capability",
        ),
    ],
)
def test_request_that_cannot_be_met(containerd: Containerd, env: list[str], expected: str) -> None:
    before = containerd.mounts()
    message = containerd.refused(*[word for value in env for word in ("--env", value)])
    assert re.search(rf"\bnvidia-container-runtime: {expected}", message), message
    assert "Traceback" not in message
    assert before == containerd.mounts()
    assert containerd.notes() == []


def test_hook_that_fails_in_the_container(containerd: Containerd) -> None:
    """What is found out only there: the image has a directory where a library belongs."""
    root = containerd.place / "in-the-way"
    make_image("debian", root)
    (root / f"usr/lib/{TRIPLET}/libcuda.so.{VERSION}/full").mkdir(parents=True)
    before = containerd.mounts()
    containerd.load("localhost/in-the-way:1", root)
    message = containerd.refused(*ALL, image="localhost/in-the-way:1")
    assert re.search(r"\bnvidia-container-runtime-hook: mount error: .*a directory there", message), message
    assert before == containerd.mounts()


def test_runtime_path_that_is_gone(containerd: Containerd) -> None:
    gone = "/gone/nvidia-container-runtime"
    message = containerd.refused("--runc-binary", gone, *ALL)
    assert gone in message
    assert "no such file" in message


# The runtime class that `nvhook configure containerd` registers


def test_runtime_class_is_in_the_configuration_in_force(containerd: Containerd) -> None:
    cri = containerd.configuration()["containerd"]
    assert cri["default_runtime_name"] == "runc"
    assert {"nvidia", "runc"} == cri["runtimes"].keys()
    assert cri["runtimes"]["nvidia"]["options"]["BinaryName"] == str(containerd.wrapper)


def test_configuration_that_was_there_still_counts(containerd: Containerd) -> None:
    assert containerd.configuration()["sandbox_image"] == IMAGE


@pytest.mark.parametrize(
    ("runtime_class", "devices", "expected"),
    [
        pytest.param("nvidia", "all", BOTH, id="all"),
        pytest.param("nvidia", SECOND, gpu_lines(HOST, 1), id="one"),
        pytest.param("nvidia", "", NONE, id="nothing-asked"),
        pytest.param("", "all", NONE, id="another-class"),
    ],
)
def test_pod(containerd: Containerd, runtime_class: str, devices: str, expected: str) -> None:
    before = containerd.mounts()
    with containerd.cri.container(runtime_class, {"NVIDIA_VISIBLE_DEVICES": devices}) as name:
        assert expected == containerd.cri.execute(name, "sh", "-euc", LOOK)
    assert before == containerd.mounts()
    assert containerd.notes() == []


def test_pod_that_asks_for_what_is_not_there(containerd: Containerd) -> None:
    ask = containerd.cri.container("nvidia", {"NVIDIA_VISIBLE_DEVICES": "7"})
    with pytest.raises(CriError, match=r"\bnvidia-container-runtime: device error: unknown device `7`"), ask:
        pass


def test_pod_of_a_class_that_is_not_registered(containerd: Containerd) -> None:
    with (
        pytest.raises(CriError, match='no runtime for "nvidia-cdi" is configured'),
        containerd.cri.container("nvidia-cdi", {}),
    ):
        pass


def test_pod_where_it_is_the_default_runtime(start: Start) -> None:
    containerd = start("default", words=("--set-as-default",))
    with containerd.cri.container("", {"NVIDIA_VISIBLE_DEVICES": "all"}) as name:
        assert containerd.cri.execute(name, "nvidia-smi", "-L") == BOTH
    with containerd.cri.container("runc", {"NVIDIA_VISIBLE_DEVICES": "all"}) as name:
        assert containerd.cri.execute(name, "sh", "-euc", LOOK) == NONE


# crun below


def test_crun(start: Start, tmp_path: Path) -> None:
    crun = tmp_path / "crun"
    try:
        machine.make_crun(crun)
    except LookupError as error:
        cannot(str(error))
    containerd = start("crun", runtime=str(crun), unified=True)
    before = containerd.mounts()
    assert containerd.run(*ALL) == BOTH
    assert gpu_lines(HOST, 1) == containerd.run(*ONE)
    assert containerd.run(script=LOOK) == NONE
    assert "device error: unknown device `7`" in containerd.refused("--env=NVIDIA_VISIBLE_DEVICES=7")
    with containerd.container(*ALL) as name:
        assert containerd.execute(name, "nvidia-smi", "-L") == BOTH
    with containerd.cri.container("nvidia", {"NVIDIA_VISIBLE_DEVICES": "all"}) as name:
        assert containerd.cri.execute(name, "nvidia-smi", "-L") == BOTH
    assert containerd.notes() == []
    assert before == containerd.mounts()
