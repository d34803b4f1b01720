# SPDX-License-Identifier: Apache-2.0
"""Two engines in a swarm, on two simulated hosts: who gets which GPU, by what nvidia-smi lists in each task."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import cannot
from engines import machine
from engines import swarm as engines
from engines.machine import wait
from engines.swarm import KIND, Swarm, Task

pytestmark = [pytest.mark.root, pytest.mark.engines]

ONE_GPU = ("--generic-resource", f"{KIND}=1")


@pytest.fixture(scope="module")
def swarm(simhost: Callable[[str], Path]) -> Iterator[Swarm]:
    """A manager with two GPUs and a worker with eight."""
    absent = machine.missing(engines.PROGRAMS)
    if absent:
        cannot(f"not installed: {absent}")
    try:
        names = [f"nvhook-probe-{os.getpid()}-{number}" for number in (1, 2)]
        with engines.namespaces(names):
            pass
    except RuntimeError as error:
        cannot(f"no network namespaces with a veth pair on this machine: {error}")
    before = machine.traces()
    with (
        tempfile.TemporaryDirectory(prefix="nvhook-swarm-") as name,
        engines.swarm(Path(name), (simhost("a100x2"), simhost("h100x8"))) as both,
    ):
        yield both
    assert before == machine.traces()


def _all(tasks: dict[str, list[Task]]) -> list[Task]:
    return [task for several in tasks.values() for task in several]


def _assert_exclusive(swarm: Swarm, tasks: dict[str, list[Task]], each: int) -> None:
    """Every task lists what it was given, `each` GPUs of its own node, and no GPU is given twice."""
    for node in swarm.nodes:
        for task in tasks[node.name]:
            assert sorted(task.given) == sorted(task.listed)
            assert len(set(task.given)) == each
            assert set(task.given) <= set(node.gpus)
            assert task.runtime == "nvidia"
    given = [gpu for task in _all(tasks) for gpu in task.given]
    assert len(given) == len(set(given))


def test_nodes_announce_their_gpus(swarm: Swarm) -> None:
    assert [len(node.gpus) for node in swarm.nodes] == [2, 8]
    for node in swarm.nodes:
        assert sorted(node.gpus) == sorted(swarm.announced(node))


def test_every_gpu_goes_to_one_task(swarm: Swarm) -> None:
    """As many tasks as GPUs, with an environment that asks for all of them; one more has to wait."""
    with swarm.service("one", *ONE_GPU, "--env", "NVIDIA_VISIBLE_DEVICES=all", replicas=10):
        tasks = swarm.tasks("one")
        _assert_exclusive(swarm, tasks, 1)
        assert {node.name: len(node.gpus) for node in swarm.nodes} == {name: len(tasks[name]) for name in tasks}
        swarm.manager.docker("service", "scale", "--detach", "one=11")
        waiting = "insufficient resources on 2 nodes"
        wait("the eleventh has to wait", lambda: any(waiting in line for line in swarm.errors("one")), 20)
        swarm.wait_for("one", 10, 11)


def test_several_gpus_for_a_task(swarm: Swarm) -> None:
    with swarm.service("two", "--generic-resource", f"{KIND}=2", replicas=5):
        tasks = swarm.tasks("two")
        _assert_exclusive(swarm, tasks, 2)
        assert sorted(len(several) for several in tasks.values()) == [1, 4]


def test_service_that_asks_for_nothing_gets_nothing(swarm: Swarm) -> None:
    with swarm.service("none", replicas=2, script="ls /dev /usr/bin | grep nvidia"):
        tasks = _all(swarm.tasks("none"))
        assert [(task.given, task.output, task.runtime) for task in tasks] == [([], "end\n", "nvidia")] * 2


def test_drained_node_hands_its_tasks_over(swarm: Swarm) -> None:
    with swarm.service("moving", *ONE_GPU, "--restart-delay", "0s", replicas=4):
        before = swarm.tasks("moving")
        _assert_exclusive(swarm, before, 1)
        assert all(before.values()), "the work is shared at first"
        swarm.set_availability(swarm.manager, "drain")
        try:
            wait("nothing runs here", lambda: not swarm.manager.running("moving"), 30)
            # The swarm's own count is behind: for a moment it still has the tasks that have just ended here.
            wait("all of them run there", lambda: len(swarm.worker.running("moving")) == 4, 40)
            after = swarm.tasks("moving")
            _assert_exclusive(swarm, after, 1)
            assert [len(after[node.name]) for node in swarm.nodes] == [0, 4]
            kept = {gpu for task in before[swarm.worker.name] for gpu in task.given}
            assert kept <= {gpu for task in after[swarm.worker.name] for gpu in task.given}
        finally:
            swarm.set_availability(swarm.manager, "active")
