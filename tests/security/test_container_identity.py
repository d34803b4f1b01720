# SPDX-License-Identifier: Apache-2.0
"""What root does at the end of a container is done to the object that the container was made of, with real containers:
one whose root filesystem is exchanged while it runs, and several over one root filesystem."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import containers
from containers import HOOK, WRAPPER, Bundle, Workshop, gpu_lines, tree

pytestmark = pytest.mark.root

HOST = "a100x2"
ALL = {"NVIDIA_VISIBLE_DEVICES": "all"}
BOTH = gpu_lines(HOST, 0, 1)
LIBRARIES = f"usr/lib/{containers.TRIPLET}"
# Lists the GPUs; on each line that it reads, once more.
LISTS = ["/bin/sh", "-c", "nvidia-smi -L; echo; while read -r _; do nvidia-smi -L; echo; done"]


class Running:
    """A container that says what GPUs it has when it is asked."""

    def __init__(self, shop: Workshop, bundle: Bundle, config: Path, *options: str) -> None:
        self.bundle = bundle
        env = containers._environment(config)
        command = [*bundle.through, str(WRAPPER), *options, "run", "--bundle", str(bundle.directory), bundle.id]
        self.errors = shop.new("errors")
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.first = self._answer()

    def _answer(self) -> str:
        """Up to an empty line, or its end."""
        assert self.process.stdout
        lines = []
        while (line := self.process.stdout.readline()) not in ("\n", ""):
            lines.append(line)
        return "".join(lines)

    def gpus(self) -> str:
        assert self.process.stdin
        self.process.stdin.write("again\n")
        self.process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        self.process.communicate(timeout=60)

    def lose(self) -> None:
        """Its runtime and its process are killed: nobody calls a poststop hook."""
        self.process.kill()
        self.process.wait()
        subprocess.run([*self.bundle.through, "runc", "kill", self.bundle.id, "KILL"], capture_output=True, check=False)
        state = Path(f"/run/runc/{self.bundle.id}")
        end = time.monotonic() + 30
        while subprocess.run(["pgrep", "-f", self.bundle.id], capture_output=True, check=False).returncode == 0:
            assert time.monotonic() < end
            time.sleep(0.02)
        shutil.rmtree(state, ignore_errors=True)


@pytest.fixture
def config(shop: Workshop) -> Path:
    return containers.configure(shop.simhost(HOST), shop.new("config.toml"), shop.new("state"))


def state_of(config: Path) -> Path:
    return Path(config.read_text().rpartition('state-dir = "')[2].partition('"')[0])


@pytest.fixture
def started(shop: Workshop, config: Path) -> Iterator[Callable[..., Running]]:
    every: list[Running] = []

    def start(bundle: Bundle, *options: str) -> Running:
        every.append(Running(shop, bundle, config, *options))
        return every[-1]

    yield start
    for running in every:
        running.process.kill()
        running.process.wait()
        running.bundle.delete()


def over(rootfs: Path, shop: Workshop, *, readonly: bool = False, hook_alone: Path | None = None) -> Bundle:
    """A bundle over that root filesystem; with the hooks in its config.json where the wrapper is not to write them."""
    bundle = shop.bundle()
    bundle.rootfs = rootfs
    bundle.config["root"] = {"path": str(rootfs), "readonly": readonly}
    if hook_alone:
        words = ["nvidia-container-runtime-hook", "--config", str(hook_alone)]
        bundle.config["hooks"] = {
            stage: [{"path": str(HOOK), "args": [*words, stage], "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]}]
            for stage in ("prestart", "poststop")
        }
    return bundle.write(LISTS, ALL)


# The root filesystem is exchanged while the container runs


def exchange_for_link(rootfs: Path, canary: Path) -> None:
    rootfs.rename(rootfs.with_name("moved"))
    rootfs.symlink_to(canary)


def exchange_for_directory(rootfs: Path, canary: Path) -> None:
    rootfs.rename(rootfs.with_name("moved"))
    subprocess.run(["cp", "-a", str(canary), str(rootfs)], check=True)


def exchange_above(rootfs: Path, canary: Path) -> None:
    above = rootfs.parent
    above.rename(above.with_name(above.name + "-moved"))
    above.mkdir()
    rootfs.symlink_to(canary)


@pytest.mark.parametrize("exchange", [exchange_for_link, exchange_for_directory, exchange_above])
def test_poststop_after_an_exchange(
    shop: Workshop, config: Path, started: Callable[[Bundle], Running], exchange: Callable[[Path, Path], None]
) -> None:
    """The image has links in the place of the driver's; the poststop hook puts them back, wherever its path leads."""
    home = shop.new("home")
    home.mkdir()
    rootfs = shop.bundle().rootfs.rename(home / "rootfs")
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        (rootfs / LIBRARIES / name).symlink_to("/home/attacker/evil.so")
    running = started(over(rootfs, shop))
    assert running.first == BOTH
    canary = shop.new("canary")
    subprocess.run(["cp", "-a", str(shop.simhost(HOST) / "driver"), str(canary)], check=True)
    before = tree(canary)
    exchange(rootfs, canary)
    instead = tree(rootfs.resolve())
    running.end()
    assert before == tree(canary)
    assert instead == tree(rootfs.resolve())
    assert os.listdir(state_of(config) / "containers") == []


def test_same_id_and_bundle_with_another_image(
    shop: Workshop, config: Path, started: Callable[[Bundle], Running]
) -> None:
    """The first one's poststop is lost. The next start under its name warns, and leaves the first image as it is."""
    first, second = shop.bundle(), shop.bundle()
    running = started(over(first.rootfs, shop))
    running.lose()
    left = tree(first.rootfs)
    clean = tree(second.rootfs)
    bundle = running.bundle
    bundle.config["root"]["path"] = str(second.rootfs)
    again = started(bundle.write())
    assert again.first == BOTH
    again.end()
    assert left == tree(first.rootfs)
    assert clean.keys() == tree(second.rootfs).keys()
    assert os.listdir(state_of(config) / "containers") == []


# Several containers over one root filesystem


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
@pytest.mark.parametrize("kind", ["writable", "readonly", "hook-alone"])
def test_they_keep_their_gpus(
    shop: Workshop, config: Path, started: Callable[[Bundle], Running], order: tuple[int, ...], kind: str
) -> None:
    rootfs = shop.bundle().rootfs
    before = tree(rootfs)
    alone = config if kind == "hook-alone" else None
    bundles = [over(rootfs, shop, readonly=kind == "readonly", hook_alone=alone) for _ in range(3)]
    running = [started(bundle) for bundle in bundles]
    assert [item.first for item in running] == [BOTH] * 3
    for position, number in enumerate(order):
        running[number].end()
        assert [running[other].gpus() for other in order[position + 1 :]] == [BOTH] * (2 - position)
    assert before.keys() == tree(rootfs).keys()
    assert os.listdir(state_of(config) / "containers") == []


def test_they_start_and_end_at_once(shop: Workshop, config: Path) -> None:
    """Each lists its GPUs for a while, in which others begin and end."""
    rootfs = shop.bundle().rootfs
    before = tree(rootfs)
    look = ["/bin/sh", "-c", "for i in 1 2 3; do nvidia-smi -L; sleep 0.1; done"]
    waiting = [over(rootfs, shop).write(look) for _ in range(18)]
    running: list[tuple[Bundle, subprocess.Popen[str]]] = []
    said: list[str] = []
    try:
        while waiting or running:
            while waiting and len(running) < 5:
                bundle = waiting.pop()
                command = [*bundle.through, str(WRAPPER), "run", "--bundle", str(bundle.directory), bundle.id]
                pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
                env = containers._environment(config)
                running.append((bundle, subprocess.Popen(command, env=env, text=True, **pipes)))  # type: ignore[call-overload]
            bundle, process = running.pop(0)
            said.append(process.communicate(timeout=60)[0])
            bundle.delete()
    finally:
        for bundle, process in running:
            process.kill()
            bundle.delete()
    assert said == [BOTH * 3] * 18
    assert before.keys() == tree(rootfs).keys()
    assert os.listdir(state_of(config) / "containers") == []


@pytest.mark.parametrize("lost", [0, 1])
def test_lost_poststop_costs_no_gpu(
    shop: Workshop, config: Path, started: Callable[[Bundle], Running], lost: int
) -> None:
    """And the last one cleans up for it."""
    rootfs = shop.bundle().rootfs
    before = tree(rootfs)
    running = [started(over(rootfs, shop)) for _ in range(3)]
    running.pop(lost).lose()
    assert [item.gpus() for item in running] == [BOTH, BOTH]
    running[0].end()
    assert running[1].gpus() == BOTH
    running[1].end()
    assert before.keys() == tree(rootfs).keys()
    assert os.listdir(state_of(config) / "containers") == []


@pytest.mark.parametrize("place", ["the-last-edit", "a-library"])
def test_start_that_fails_beside_another(
    shop: Workshop, config: Path, started: Callable[[Bundle], Running], place: str
) -> None:
    """It made nothing that is removed under the others."""
    rootfs = shop.bundle().rootfs
    running = started(over(rootfs, shop))
    broken = over(rootfs, shop)
    # A volume where the plan has a file: of this container alone.
    where = "/etc/ld.so.cache" if place == "the-last-edit" else f"/{LIBRARIES}/libcuda.so.550.163.01"
    kind = {"type": "tmpfs", "source": "tmpfs"}
    target = "/etc" if place == "the-last-edit" else where
    if place == "the-last-edit":
        fifo = shop.new("etc")
        fifo.mkdir()
        os.mkfifo(fifo / "ld.so.cache")
        kind = {"type": "bind", "source": str(fifo), "options": ["bind"]}  # type: ignore[dict-item]
    else:
        node = shop.new("node")
        os.mkfifo(node)
        kind = {"type": "bind", "source": str(node), "options": ["bind"]}  # type: ignore[dict-item]
    broken.config["mounts"].append({"destination": target, **kind})
    result = broken.write().run(config)
    assert result.returncode != 0
    assert where in result.stderr, json.dumps(result.stderr)
    assert running.gpus() == BOTH
    running.end()
    assert os.listdir(state_of(config) / "containers") == []


def test_one_after_the_other(shop: Workshop, config: Path) -> None:
    rootfs = shop.bundle().rootfs
    before = tree(rootfs)
    for _ in itertools.repeat(None, 3):
        assert over(rootfs, shop).write(["/bin/sh", "-c", "nvidia-smi -L"]).run(config).stdout == BOTH
        assert before.keys() == tree(rootfs).keys()


# A state directory in which nothing can be written any more


@pytest.fixture
def state(config: Path) -> Iterator[Path]:
    """A file system of its own, with what a start needs that is not the container's."""
    path = state_of(config)
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755,size=4m,nr_inodes=400", "tmpfs", str(path)], check=True)
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def make_read_only(state: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(state)], check=True)


def fill(state: Path) -> None:
    with contextlib.suppress(OSError), (state / "fills").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def use_up_inodes(state: Path) -> None:
    with contextlib.suppress(OSError):
        for number in itertools.count():
            (state / f"fills{number}").touch()


TROUBLES = pytest.mark.parametrize("trouble", [make_read_only, fill, use_up_inodes])
WAYS = pytest.mark.parametrize("way", ["wrapper", "hook-alone"])


@TROUBLES
@WAYS
def test_nothing_can_be_noted(
    shop: Workshop,
    config: Path,
    state: Path,
    started: Callable[[Bundle], Running],
    trouble: Callable[[Path], None],
    way: str,
) -> None:
    """It costs empty files, and no container."""
    started(shop.bundle().write(LISTS, ALL)).end()
    trouble(state)
    running = started(over(shop.bundle().rootfs, shop, hook_alone=config if way == "hook-alone" else None))
    assert running.first == BOTH, running.errors.read_text()
    running.end()
    assert "Traceback" not in running.errors.read_text()
    assert [path.name for path in (state / "containers").iterdir() if path.is_dir()] == []


@TROUBLES
@WAYS
def test_nothing_can_be_noted_beside_another(
    shop: Workshop,
    config: Path,
    state: Path,
    started: Callable[[Bundle], Running],
    trouble: Callable[[Path], None],
    way: str,
) -> None:
    """The other's end would take the GPUs away from a container that it does not know of: that is not started."""
    rootfs = shop.bundle().rootfs
    running = started(over(rootfs, shop))
    trouble(state)
    refused = started(over(rootfs, shop, hook_alone=config if way == "hook-alone" else None))
    assert refused.first == ""
    assert "give it a root filesystem of its own" in refused.errors.read_text()
    assert running.gpus() == BOTH


# Two containers of one id


@pytest.mark.parametrize("same", ["root filesystem", "bundle", "nothing"])
def test_two_containers_of_one_id(shop: Workshop, config: Path, started: Callable[..., Running], same: str) -> None:
    """Each in a directory of the runtime's own, as those of two engines. A third one ends over the root filesystem of
    the first, and must know of it."""
    rootfs = shop.bundle().rootfs
    third = started(over(rootfs, shop))
    first = started(over(rootfs, shop))
    bundle = over(shop.bundle().rootfs if same == "nothing" else rootfs, shop)
    bundle.id = first.bundle.id
    if same == "bundle":
        bundle.directory = first.bundle.directory
        bundle.config["linux"]["cgroupsPath"] += "-second"
        bundle.write()
    second = started(bundle, "--root", str(shop.new("root")))
    if same == "nothing":
        assert second.first == BOTH, second.errors.read_text()
    else:
        assert second.first == ""
        assert first.bundle.id in second.errors.read_text()
        assert "give it a root filesystem of its own" in second.errors.read_text()
    third.end()
    assert first.gpus() == BOTH
    second.end()
    assert first.gpus() == BOTH
    first.end()
    assert os.listdir(state_of(config) / "containers") == []
