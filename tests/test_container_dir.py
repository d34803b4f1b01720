# SPDX-License-Identifier: Apache-2.0
"""One directory for each container: its name, what is believed of what is in it, and its lock."""

from __future__ import annotations

import json
import os
import resource
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

import test_cleanup
from nvhook.container import cleanup, container_dir, root_lock
from nvhook.errors import ContainerError, SpecError
from nvhook.linux import identity
from nvhook.linux.root import DIRECTORY
from nvhook.request.spec import State
from test_cleanup import container

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("closed_descriptors")]


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    (tmp_path / "rootfs/usr/lib").mkdir(parents=True)
    return tmp_path / "rootfs"


def register(tmp_path: Path, rootfs: Path, name: str, pid: int = 0) -> container_dir.ContainerDirectory:
    state = State(pid or os.getpid(), "/bundle", name)
    directory = test_cleanup.register(tmp_path, state, container(rootfs, pid)).directory
    assert directory
    return directory


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a/b", "../x", "a\0b", "a b", ".hidden", "-option", "ä", "a\n", "x" * 256, "x" * 100_000],
    ids=lambda name: ascii(name[:9]),
)
def test_names_that_are_no_container(tmp_path: Path, rootfs: Path, name: str) -> None:
    with pytest.raises(SpecError, match="is not a container's id") as caught:
        register(tmp_path, rootfs, name)
    assert len(str(caught.value)) < 500
    with pytest.raises(SpecError, match="is not a container's id"):
        cleanup.poststop(str(tmp_path / "state"), State(0, "/bundle", name), [])
    assert not any((tmp_path / "state").rglob("*.json"))


SUFFIXES = ("", ".cache", ".new", ".json", ".lock", "~", ".nvhook", "-1", "+", "_")


@pytest.mark.parametrize("suffix", [suffix for suffix in SUFFIXES if suffix != "~"])
def test_no_name_is_that_of_another_containers_file(tmp_path: Path, rootfs: Path, suffix: str) -> None:
    """What a hostile image has in its linker cache must not pass for what is kept about a container of another name."""
    evil = {"bundle": "/bundle", "rootfs": str(tmp_path), "traces": [{"kind": "file", "path": "/canary"}]}
    (tmp_path / "canary").touch()
    cache = tmp_path / "cache"
    cache.write_text(json.dumps(evil))
    for name in ("web", "container.json", "traces.json", "ld.so.cache"):
        former = os.open(cache, os.O_RDONLY)
        trace: dict[str, Any] = {"kind": "cache", "path": "/etc/ld.so.cache", "made": [1, 2, 3]}
        trace["former"] = cleanup.former(os.fstat(former))
        directory = register(tmp_path, rootfs, name)
        cleanup.note(directory, [trace], former)
        saved = os.open(f"{tmp_path}/state/containers/{name}/ld.so.cache", os.O_RDONLY)
        assert os.read(saved, 1 << 16) == cache.read_bytes()
    cleanup.poststop(str(tmp_path / "state"), State(0, "/bundle", f"web{suffix}"), [])
    assert (tmp_path / "canary").exists()


def test_directory_and_files_are_for_root_alone(tmp_path: Path, rootfs: Path) -> None:
    umask = os.umask(0)
    try:
        directory = register(tmp_path, rootfs, "web")
        cleanup.note(directory, [{"kind": "file", "path": "/usr/lib/x"}], -1)
    finally:
        os.umask(umask)
    place = tmp_path / "state/containers/web"
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    found = {path.name: (stat.S_IMODE(path.stat().st_mode), path.stat().st_uid) for path in place.iterdir()}
    assert found == {"container.json": (0o600, 0), "traces.json": (0o600, 0)}
    assert os.listdir(tmp_path / "state/containers") == ["web"]


@pytest.mark.parametrize("name", [".", "container.json", "traces.json"])
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: os.chown(path, 1000, 1000), id="of-another-user"),
        pytest.param(lambda path: path.chmod(0o777 if path.is_dir() else 0o666), id="writable"),
        pytest.param(lambda path: path.chmod(0o755 if path.is_dir() else 0o4600), id="other-mode"),
    ],
)
def test_what_others_may_have_written_is_not_believed(tmp_path: Path, rootfs: Path, name: str, damage: Any) -> None:
    directory = register(tmp_path, rootfs, "web")
    (rootfs / "usr/lib/ours").touch()
    cleanup.note(directory, [{"kind": "file", "path": "/usr/lib/ours"}], -1)
    damage(tmp_path / "state/containers/web" / name)
    cleanup.poststop(str(tmp_path / "state"), State(0, "/bundle", "web"), [])
    assert (rootfs / "usr/lib/ours").exists()


@pytest.mark.parametrize("pid", [0, -1, 1 << 31, 1 << 62, "1", 1.5, None], ids=repr)
def test_number_that_is_no_process(tmp_path: Path, rootfs: Path, pid: object) -> None:
    """kill(2) takes 0 and -1 for whole groups of processes, and Python none that is larger than an int of C's."""
    register(tmp_path, rootfs, "web")
    path = tmp_path / "state/containers/web/container.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "process": [pid, 1]}))
    assert container_dir.Containers(str(tmp_path / "state")).read("web") is None


@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_another_kind_of_file_is_not_read(tmp_path: Path, rootfs: Path, kind: str) -> None:
    register(tmp_path, rootfs, "web")
    path = tmp_path / "state/containers/web/container.json"
    path.rename(tmp_path / "moved")
    if kind == "link":
        path.symlink_to(tmp_path / "moved")
    elif kind == "fifo":
        os.mkfifo(path, 0o600)
    else:
        path.mkdir(0o600)
    assert container_dir.Containers(str(tmp_path / "state")).read("web") is None


def test_what_an_earlier_version_left_is_no_obstacle(tmp_path: Path, rootfs: Path) -> None:
    """Before, a note was a file with the container's name."""
    (tmp_path / "state/containers").mkdir(parents=True)
    (tmp_path / "state/containers/web").write_text("{}")
    warnings: list[str] = []
    test_cleanup.register(tmp_path, State(os.getpid(), "/bundle", "web"), container(rootfs), warnings)
    assert warnings == ["what was kept about a container `web` was not as nvhook writes it"]
    assert (tmp_path / "state/containers/web/container.json").exists()


# Containers without a poststop hook


def test_what_nobody_cleans_up_does_not_grow_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers whose process and root filesystem are gone, as after `docker run --gpus`."""
    monkeypatch.setattr(root_lock, "_SWEEP_EVERY", 1)  # which starts sweep, a clock says
    monkeypatch.setattr(root_lock, "_SWEPT", 2)
    counts = []
    for number in range(60):
        rootfs = tmp_path / "rootfs"
        rootfs.mkdir()
        pid = os.fork()
        if pid == 0:
            time.sleep(600)
            os._exit(0)
        cleanup.note(register(tmp_path, rootfs, f"container{number}", pid), [], -1)
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        rootfs.rmdir()
        counts.append(len(os.listdir(tmp_path / "state/containers")))
    assert max(counts) <= 20


def test_sweep_leaves_what_lives_and_what_can_be_cleaned_up(
    tmp_path: Path, rootfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(root_lock, "_SWEEP_EVERY", 1)
    (tmp_path / "other").mkdir()
    other = tmp_path / "other"
    pid = os.fork()
    if pid == 0:
        time.sleep(600)
        os._exit(0)
    register(tmp_path, rootfs, "over-and-there", pid)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    register(tmp_path, other, "alive-and-gone")
    other.rmdir()
    for number in range(20):
        register(tmp_path, rootfs, f"next{number}").remove()
    assert sorted(os.listdir(tmp_path / "state/containers")) == ["alive-and-gone", "over-and-there"]


# The lock


_HOLD = """
import sys, time
sys.path[:0] = [sys.argv[1]]
from nvhook.container import container_dir, root_lock
from nvhook.linux.identity import Identity
with root_lock.Lock(container_dir.Containers(sys.argv[2]), Identity(*map(eval, sys.argv[3:]))):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_lock_is_one_for_each_root_filesystem(tmp_path: Path, rootfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(root_lock, "_LOCK_SECONDS", 0.05)
    containers = container_dir.Containers(str(tmp_path / "state"))
    root = identity.of(os.open(rootfs, DIRECTORY))
    other = identity.of(os.open(rootfs / "usr", DIRECTORY))
    with root_lock.Lock(containers, root):
        with root_lock.Lock(containers, other):
            assert len(os.listdir(tmp_path / "state/containers")) == 2
        with pytest.raises(ContainerError, match="lock the container's root filesystem: another container over it has"):
            root_lock.Lock(containers, root)
    with root_lock.Lock(containers, root):
        pass
    assert os.listdir(tmp_path / "state/containers") == []


def test_lock_of_a_process_that_was_killed(tmp_path: Path, rootfs: Path) -> None:
    containers = container_dir.Containers(str(tmp_path / "state"))
    root = identity.of(os.open(rootfs, DIRECTORY))
    words = [repr(item) for item in root.describe()]
    hook = str(Path(container_dir.__file__).parents[2])
    command = ["/usr/bin/python3", "-IS", "-c", _HOLD, hook, str(tmp_path / "state"), *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"held\n"
        holder.kill()
    with root_lock.Lock(containers, root):
        pass
    assert os.listdir(tmp_path / "state/containers") == []


def test_lock_many_at_once(tmp_path: Path, rootfs: Path) -> None:
    """No two have it at the same time, though each removes the file when it is done."""
    containers = container_dir.Containers(str(tmp_path / "state"))
    root = identity.of(os.open(rootfs, DIRECTORY))
    counter = tmp_path / "counter"
    counter.write_text("0")
    children = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                for _ in range(25):
                    with root_lock.Lock(containers, root):
                        number = int(counter.read_text())
                        time.sleep(0.0002)
                        counter.write_text(str(number + 1))
                status = 0
            finally:
                os._exit(status)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 8
    assert counter.read_text() == "200"


# Processes


def test_process_start_of_a_name_that_looks_like_fields(tmp_path: Path) -> None:
    fields = " ".join(["S", *map(str, range(4, 20)), "1", "21", "777", "0"])
    (tmp_path / "stat").write_text(f"1 (a) Z 1 ) {fields}\n")
    fd = os.open(tmp_path, DIRECTORY)
    assert container_dir.process_start(os.open("stat", os.O_RDONLY, dir_fd=fd)) == 777
    (tmp_path / "stat").write_text(f"1 (a) {fields.replace('S', 'Z', 1)}\n")
    assert container_dir.process_start(os.open("stat", os.O_RDONLY, dir_fd=fd)) == -1


def test_zombie_is_over(tmp_path: Path, rootfs: Path) -> None:
    """Its namespaces are gone, whether or not its parent has asked."""
    pid = os.fork()
    if pid == 0:
        time.sleep(600)
        os._exit(0)
    directory = register(tmp_path, rootfs, "web", pid)
    assert not directory.is_over()
    os.kill(pid, 9)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert directory.is_over()
    os.waitpid(pid, 0)
    assert directory.is_over()


_FIRST_THREAD_ENDS = """
import ctypes, sys, threading, time
threading.Thread(target=time.sleep, args=(600,)).start()
sys.stdin.readline()
ctypes.CDLL(None).syscall({"x86_64": 60}.get(__import__("os").uname().machine, 93), 0)
"""


def test_process_whose_first_thread_has_ended_is_alive(tmp_path: Path, rootfs: Path) -> None:
    """A program may call pthread_exit in main, and go on."""
    with subprocess.Popen(["/usr/bin/python3", "-IS", "-c", _FIRST_THREAD_ENDS], stdin=subprocess.PIPE) as process:
        try:
            directory = register(tmp_path, rootfs, "web", process.pid)
            assert process.stdin
            process.stdin.write(b"\n")
            process.stdin.flush()
            stat_file = Path(f"/proc/{process.pid}/stat")
            end = time.monotonic() + 30
            while " Z " not in stat_file.read_text() and time.monotonic() < end:
                time.sleep(0.01)
            assert " Z " in stat_file.read_text()
            assert not directory.is_over()
        finally:
            process.kill()
    assert directory.is_over()


@pytest.mark.parametrize("spare", [0, 1, 2])
def test_container_that_cannot_be_read_is_not_overlooked(tmp_path: Path, rootfs: Path, spare: int) -> None:
    """With too few open files it would seem to be none, and its mount points would go."""
    for name in ("a", "b", "c"):
        register(tmp_path, rootfs, name)
    containers = container_dir.Containers(str(tmp_path / "state"))
    root = identity.of(os.open(rootfs, DIRECTORY))

    def work() -> None:
        with pytest.raises(OSError, match="Too many open files"):  # noqa: PT012 - the limit is for this alone
            resource.setrlimit(resource.RLIMIT_NOFILE, (os.dup(0) + 1 + spare, 4096))
            list(containers.over(root))

    test_cleanup.in_child(work)


def test_process_that_proc_hides_is_alive(tmp_path: Path, rootfs: Path) -> None:
    """With hidepid the poststop hook, which has given up CAP_SYS_PTRACE, does not see another container's process."""
    directory = register(tmp_path, rootfs, "web")
    os.close(directory._containers.proc)
    directory._containers.proc = os.open(tmp_path, DIRECTORY)  # a /proc without it
    assert not directory.is_over()
