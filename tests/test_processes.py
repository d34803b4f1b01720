# SPDX-License-Identifier: Apache-2.0
"""commands/info/processes.py: who has a GPU open, in a /proc made by hand and in this machine's; and containers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from nvhook.commands.info import processes
from nvhook.commands.info.processes import ContainerId, Process

ID = "4f1b9e06c2d75a38e9b0f4467d1c83a52e90bb17f6d84c3e0a95d2718c6fe34b"
OTHER = ID[::-1]
POD = "0c7e2f5b_1f0e_4a39_9d55_7d1b2c3e4f50"


def _process(proc: Path, pid: int, *targets: str, name: str = "python3\n", cgroup: str = "0::/init.scope\n") -> Path:
    made = proc / str(pid)
    (made / "fd").mkdir(parents=True)
    (made / "comm").write_text(name)
    (made / "cgroup").write_text(cgroup)
    for number, target in enumerate(targets):
        (made / "fd" / str(number)).symlink_to(target)
    return made


def test_find(tmp_path: Path) -> None:
    _process(tmp_path, 20, "/dev/nvidia10", "socket:[7]", "/dev/nvidiactl", "/dev/nvidia2", "/dev/nvidia2")
    _process(tmp_path, 3, "/dev/nvidia0", cgroup=f"0::/system.slice/docker-{ID}.scope\n")
    _process(
        tmp_path, 4, "/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-caps/nvidia-cap1", "/x/nvidia0.txt", "nvidia"
    )
    _process(tmp_path, 5)
    (tmp_path / "self").symlink_to("3")
    assert processes.find(str(tmp_path)) == (
        [Process(3, "python3", (0,), ContainerId("docker", ID)), Process(20, "python3", (2, 10), None)],
        0,
    )


@pytest.mark.parametrize(
    ("target", "minors"),
    [
        pytest.param("/dev/nvidia1 (deleted)", (1,), id="container-that-is-going-away"),
        pytest.param("/run/containers/root/dev/nvidia1", (1,), id="below-a-chroot"),
        pytest.param("/dev/dxg", (), id="wsl2"),
    ],
)
def test_find_other_paths(tmp_path: Path, target: str, minors: tuple[int, ...]) -> None:
    _process(tmp_path, 3, target)
    assert processes.find(str(tmp_path)) == ([Process(3, "python3", minors, None)], 0)


def test_find_what_has_ended_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "3").mkdir()
    made = _process(tmp_path, 4, "/dev/nvidia0")
    (made / "comm").unlink()
    (made / "cgroup").unlink()
    assert processes.find(str(tmp_path)) == ([Process(4, "", (0,), None)], 0)


def test_find_takes_no_more_files_of_a_process_than_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_MOST_FILES", 2)
    _process(tmp_path, 3, *(f"/dev/nvidia{minor}" for minor in range(5)))
    ((found,), _) = processes.find(str(tmp_path))
    assert len(found.minors) == 2


def test_find_takes_no_longer_than_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_SECONDS", -1)
    _process(tmp_path, 3, "/dev/nvidia0")
    _process(tmp_path, 4)
    assert processes.find(str(tmp_path)) == ([], 2)


@pytest.mark.root
def test_find_real_process(tmp_path: Path) -> None:
    """Its file is named as a node; what kind of file it is nobody asks."""
    node = tmp_path / "nvidia3"
    node.touch()
    with subprocess.Popen(["sleep", "60"], stdin=node.open()) as child:
        found, _ = processes.find("/proc")  # in some places a process is closed to root too
        child.kill()
    assert [item.minors for item in found if item.pid == child.pid] == [(3,)]


@pytest.mark.root
def test_find_as_an_ordinary_user_counts_the_others() -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setresuid(1234, 1234, 1234)
            _, hidden = processes.find("/proc")
            os.write(writing, str(hidden).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert int(pipe.read()) > 0
    os.waitpid(child, 0)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        pytest.param("/", None, id="root"),
        pytest.param("/user.slice/user-1000.slice/session-4.scope", None, id="session"),
        pytest.param(f"/system.slice/docker-{ID}.scope", ("docker", ID), id="docker-systemd"),
        pytest.param(f"/docker/{ID}", ("docker", ID), id="docker-cgroupfs"),
        pytest.param(
            f"/system.slice/docker-{ID}.scope/init.scope/docker/{OTHER}", ("docker", ID), id="docker-in-docker"
        ),
        pytest.param(f"/machine.slice/libpod-{ID}.scope/container", ("podman", ID), id="podman"),
        pytest.param(f"/libpod_parent/libpod-{ID}", ("podman", ID), id="podman-cgroupfs"),
        pytest.param(
            f"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope/container",
            ("podman", ID),
            id="podman-rootless",
        ),
        pytest.param(f"/machine.slice/libpod-conmon-{ID}.scope", None, id="conmon-is-no-container"),
        pytest.param(
            f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{POD}.slice/cri-containerd-{ID}.scope",
            ("containerd", ID),
            id="containerd-cri",
        ),
        pytest.param(f"/system.slice/nerdctl-{ID}.scope", ("containerd", ID), id="nerdctl"),
        pytest.param(f"/k8s.io/{ID}", ("containerd", ID), id="containerd-cgroupfs"),
        pytest.param(f"/kubepods.slice/kubepods-pod{POD}.slice/crio-{ID}.scope", ("cri-o", ID), id="cri-o"),
        pytest.param(f"/kubepods.slice/crio-conmon-{ID}.scope", None, id="cri-o-conmon"),
        pytest.param(
            f"/kubepods/burstable/pod{POD.replace('_', '-')}/{ID}", ("kubernetes", ID), id="kubernetes-cgroupfs"
        ),
        pytest.param("/lxc.payload.web/system.slice/nginx.service", ("lxc", "web"), id="lxc"),
        pytest.param("/lxc/web/init.scope", ("lxc", "web"), id="lxc-older"),
        pytest.param("/lxc.monitor.web", None, id="lxc-monitor"),
        pytest.param(f"/system.slice/docker-{ID[:-1]}.scope", None, id="id-too-short"),
        pytest.param(f"/system.slice/docker-{ID.upper()}.scope", None, id="not-an-id"),
    ],
)
def test_of_cgroup(path: str, expected: tuple[str, str] | None) -> None:
    container = ContainerId(*expected) if expected else None
    assert processes.of_cgroup(f"0::{path}\n") == container
    assert processes.of_cgroup(f"12:pids:{path}\n1:name=systemd:{path}\n0::/\n") == container


@pytest.mark.parametrize("text", ["", "\n", "0", "0::", "a:b:c", ":::/docker/x"])
def test_of_cgroup_odd(text: str) -> None:
    assert processes.of_cgroup(text) is None


@pytest.mark.parametrize(
    ("container", "shown"),
    [
        (ContainerId("podman", ID), f"podman {ID[:12]}"),
        (ContainerId("lxc", "a-long-name-of-lxc"), "lxc a-long-name-of-lxc"),
    ],
)
def test_container_as_people_know_it(container: ContainerId, shown: str) -> None:
    assert str(container) == shown
