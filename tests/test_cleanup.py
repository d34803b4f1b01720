# SPDX-License-Identifier: Apache-2.0
"""What a container leaves behind in its root filesystem, and that it is taken away when it is deleted."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import stat
import subprocess
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nvhook.container import cleanup, container_dir
from nvhook.container.container import Container
from nvhook.linux import identity, kernel
from nvhook.linux.root import DIRECTORY, Root
from nvhook.request.spec import State

pytestmark = pytest.mark.usefixtures("closed_descriptors")
NAME = "a-container"


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    directory = tmp_path / "rootfs"
    (directory / "usr/lib").mkdir(parents=True)
    (directory / "etc").mkdir()
    return directory


def container(rootfs: Path, pid: int = 0) -> Container:
    """As container.find makes one, of a process that is not in a namespace of its own."""
    root = Root(os.open(rootfs, DIRECTORY))
    return Container(
        proc=os.open(f"/proc/{pid or os.getpid()}", DIRECTORY),
        namespace=-1,
        root=root,
        rootfs=str(rootfs),
        owner=(0, 0),
        in_userns=False,
        rootless=False,
        shared=frozenset(),
        host_identity=identity.of(root.fd),
    )


def start(
    tmp_path: Path,
    rootfs: Path,
    traces: list[Any],
    former: int = -1,
    *,
    bundle: str = "/bundle",
    name: str = NAME,
    pid: int = 0,
) -> State:
    """A start that leaves `traces`; the container's first process is `pid`, or one that `clean` ends."""
    if not pid:
        _sleepers.setdefault(name, []).append(subprocess.Popen(["sleep", "600"]))
        pid = _sleepers[name][-1].pid
    state = State(pid, bundle, name)
    begun = register(tmp_path, state, container(rootfs, pid))
    assert begun.directory
    cleanup.note(begun.directory, traces, former)
    return state


def register(tmp_path: Path, state: State, begun: Container, warnings: list[str] | None = None) -> Container:
    said: list[str] = []
    begun.lock_root(str(tmp_path / "state"))
    with begun.lock:
        begun.directory = begun.lock.register(state, begun.proc, begun.rootfs, said)
    assert warnings is not None or said == []
    (warnings if warnings is not None else []).extend(said)
    return begun


def note(tmp_path: Path, rootfs: Path, traces: list[Any], former: int = -1) -> State:
    return start(tmp_path, rootfs, traces, former)


_sleepers: dict[str, list[subprocess.Popen[bytes]]] = {}


def end_of(name: str) -> None:
    for process in _sleepers.pop(name, []):
        end(process)


@pytest.fixture(autouse=True)
def no_sleepers() -> Iterator[None]:
    yield
    for name in list(_sleepers):
        end_of(name)


def end(process: subprocess.Popen[bytes]) -> None:
    """Also in a child of ours, whose own child it is not."""
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def clean(tmp_path: Path, state: State) -> list[str]:
    """The end of the container's process, and the poststop hook; what that warns of."""
    end_of(state.id)
    warnings: list[str] = []
    cleanup.poststop(str(tmp_path / "state"), state, warnings)
    return warnings


def in_child(work: Callable[[], None]) -> None:
    """`work` in a process of its own, which may leave our namespaces."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0


def tree(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_clean_takes_away_what_was_made(tmp_path: Path, rootfs: Path) -> None:
    before = tree(rootfs)
    (rootfs / "usr/lib64/deep").mkdir(parents=True)
    (rootfs / "usr/lib64/deep/libcuda.so.1.2").touch()
    (rootfs / "usr/lib64/deep/libcuda.so.1").symlink_to("libcuda.so.1.2")
    traces: list[dict[str, Any]] = [
        {"kind": "directory", "path": "/usr/lib64"},
        {"kind": "directory", "path": "/usr/lib64/deep"},
        {"kind": "file", "path": "/usr/lib64/deep/libcuda.so.1.2"},
        {"kind": "link", "path": "/usr/lib64/deep/libcuda.so.1", "target": "libcuda.so.1.2", "former": None},
    ]
    state = note(tmp_path, rootfs, traces)
    clean(tmp_path, state)
    assert before == tree(rootfs)
    assert os.listdir(tmp_path / "state/containers") == []
    clean(tmp_path, state)  # a second poststop has nothing to do


def test_clean_leaves_what_the_container_made_of_it(tmp_path: Path, rootfs: Path) -> None:
    """Not empty any more, another link, a directory in use, another kind of file."""
    library = rootfs / "usr/lib"
    (library / "written").write_text("by the container")
    (library / "relinked").symlink_to("elsewhere")
    (library / "used").mkdir()
    (library / "used/file").touch()
    (library / "replaced").mkdir()
    before = tree(rootfs)
    traces: list[dict[str, Any]] = [
        {"kind": "file", "path": "/usr/lib/written"},
        {"kind": "link", "path": "/usr/lib/relinked", "target": "ours", "former": None},
        {"kind": "directory", "path": "/usr/lib/used"},
        {"kind": "file", "path": "/usr/lib/replaced"},
        {"kind": "file", "path": "/usr/lib/gone"},
        {"kind": "file", "path": "/no/such/directory"},
    ]
    clean(tmp_path, note(tmp_path, rootfs, traces))
    assert before == tree(rootfs)


def test_clean_puts_a_former_link_back(tmp_path: Path, rootfs: Path) -> None:
    (rootfs / "usr/lib/libcuda.so.1").symlink_to("ours")
    trace = {"kind": "link", "path": "/usr/lib/libcuda.so.1", "target": "ours", "former": "libcuda.so.0.9"}
    clean(tmp_path, note(tmp_path, rootfs, [trace]))
    assert os.readlink(rootfs / "usr/lib/libcuda.so.1") == "libcuda.so.0.9"


@pytest.mark.parametrize("touched", [False, True], ids=["as-made", "made-again-by-the-container"])
def test_clean_puts_the_cache_back(tmp_path: Path, rootfs: Path, touched: bool) -> None:
    cache = rootfs / "etc/ld.so.cache"
    cache.write_text("the image's")
    cache.chmod(0o640)
    os.utime(cache, ns=(1, 2))
    former = os.open(cache, os.O_RDONLY)
    (rootfs / "etc/new").write_text("ours")
    (rootfs / "etc/new").rename(cache)
    trace: dict[str, Any] = {"kind": "cache", "path": "/etc/ld.so.cache", "made": cleanup.version(cache.stat())}
    trace["former"] = cleanup.former(os.fstat(former))
    state = note(tmp_path, rootfs, [trace], former)
    if touched:
        cache.write_text("the container's own ldconfig was here")
    clean(tmp_path, state)
    status = cache.stat()
    if touched:
        assert cache.read_text() == "the container's own ldconfig was here"
    else:
        assert (cache.read_text(), stat.S_IMODE(status.st_mode), status.st_mtime_ns) == ("the image's", 0o640, 2)
    assert tree(rootfs) == ["etc", "etc/ld.so.cache", "usr", "usr/lib"]
    assert os.listdir(tmp_path / "state/containers") == []


def test_write_keeps_no_cache_that_would_fill_the_state_directory(tmp_path: Path, rootfs: Path) -> None:
    """An image may bring what it likes under that name, and the state directory is in memory: ours stays then."""
    cache = rootfs / "etc/ld.so.cache"
    cache.write_text("ours")
    trace = {"kind": "cache", "path": "/etc/ld.so.cache", "made": cleanup.version(cache.stat())}
    trace["former"] = [1, 2 << 20, 3, 0, 0, 0o644]
    with (tmp_path / "former").open("w+b") as former:
        former.truncate(2 << 20)
        state = note(tmp_path, rootfs, [trace], former.fileno())
    assert sorted(os.listdir(tmp_path / "state/containers" / NAME)) == ["container.json", "traces.json"]
    clean(tmp_path, state)
    assert cache.read_text() == "ours"


def test_clean_stays_below_the_root(tmp_path: Path, rootfs: Path) -> None:
    """The image turned a directory into a link out of it while the container ran."""
    canary = tmp_path / "canary"
    canary.mkdir()
    (canary / "libcuda.so.1.2").touch()
    (rootfs / "usr/lib").rmdir()
    (rootfs / "usr/lib").symlink_to(canary)
    (rootfs / "usr/up").symlink_to("../../../../../../../../.." + str(canary))
    traces = [{"kind": "file", "path": f"/usr/{name}/libcuda.so.1.2"} for name in ("lib", "up")]
    clean(tmp_path, note(tmp_path, rootfs, traces))
    assert tree(canary) == ["libcuda.so.1.2"]


def test_clean_of_another_bundle_with_the_same_name(tmp_path: Path, rootfs: Path) -> None:
    (rootfs / "usr/lib/empty").touch()
    note(tmp_path, rootfs, [{"kind": "file", "path": "/usr/lib/empty"}])
    clean(tmp_path, State(0, "/another/bundle", NAME))
    assert (rootfs / "usr/lib/empty").exists()


def test_write_keeps_the_first_start_that_was_not_cleaned(tmp_path: Path, rootfs: Path) -> None:
    (rootfs / "usr/lib/one").touch()
    (rootfs / "usr/lib/two").touch()
    note(tmp_path, rootfs, [{"kind": "file", "path": "/usr/lib/one"}])
    end_of(NAME)
    state = note(tmp_path, rootfs, [{"kind": "file", "path": "/usr/lib/two"}])
    clean(tmp_path, state)
    assert tree(rootfs) == ["etc", "usr", "usr/lib"]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", json.dumps({"bundle": "/bundle"}), "[" * 100, "[" * 9000],
    ids=lambda text: text[:9],
)
@pytest.mark.parametrize("name", ["container.json", "traces.json"])
def test_clean_of_a_damaged_note(tmp_path: Path, rootfs: Path, content: str, name: str) -> None:
    state = note(tmp_path, rootfs, [])
    (tmp_path / "state/containers" / NAME / name).write_text(content)
    clean(tmp_path, state)
    assert tree(rootfs) == ["etc", "usr", "usr/lib"]


@pytest.mark.parametrize(
    "trace",
    [
        None,
        {},
        {"kind": "file"},
        {"kind": "file", "path": 7},
        {"kind": "file", "path": "/usr/lib/\0"},
        {"kind": "node", "path": "/usr/lib", "major": 10**40, "minor": 0},
        {"kind": "time", "path": None, "after": 1},
        {"kind": "time", "path": "/usr/lib", "before": 10**40, "after": 7},
    ],
    ids=lambda trace: ascii(trace)[:40],
)
def test_clean_of_a_damaged_trace(tmp_path: Path, rootfs: Path, trace: Any) -> None:
    """It costs itself, and the others are taken away."""
    (rootfs / "usr/lib/ours").touch()
    os.utime(rootfs / "usr/lib", ns=(7, 7))
    state = note(tmp_path, rootfs, [])
    kept = tmp_path / "state/containers" / NAME / "traces.json"
    kept.write_text(json.dumps([{"kind": "file", "path": "/usr/lib/ours"}, trace]))
    clean(tmp_path, state)
    assert tree(rootfs) == ["etc", "usr", "usr/lib"]
    assert os.listdir(tmp_path / "state/containers") == []


def test_clean_of_a_root_that_is_no_path(tmp_path: Path, rootfs: Path) -> None:
    state = note(tmp_path, rootfs, [])
    path = tmp_path / "state/containers" / NAME / "container.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rootfs": "/\0"}))
    assert clean(tmp_path, state) == ["clean up `/\0`: embedded null byte; what the container left stays there"]
    assert os.listdir(tmp_path / "state/containers") == []


def test_clean_when_the_root_filesystem_is_gone(tmp_path: Path, rootfs: Path) -> None:
    state = note(tmp_path, rootfs, [{"kind": "file", "path": "/x"}])
    rootfs.rename(tmp_path / "elsewhere")
    assert clean(tmp_path, state) == []
    assert os.listdir(tmp_path / "state/containers") == []


def _mtime(path: Path) -> int:
    return path.stat().st_mtime_ns


@pytest.mark.parametrize("somebody", [False, True], ids=["untouched", "written-to-by-the-container"])
def test_clean_gives_a_directory_its_time_back(tmp_path: Path, rootfs: Path, somebody: bool) -> None:
    """Programs compare the linker cache's mtime with those of its directories, so a clean-up restores these too."""
    library = rootfs / "usr/lib"
    os.utime(library, ns=(0, 1_000_000_007))
    (library / "libcuda.so.1.2").touch()
    root = Root(os.open(rootfs, DIRECTORY))
    traces = cleanup.times(root, {"/usr/lib": 1_000_000_007})
    traces.append({"kind": "file", "path": "/usr/lib/libcuda.so.1.2"})
    state = note(tmp_path, rootfs, traces)
    if somebody:
        (library / "libz.so.1").touch()
        os.utime(library, ns=(0, _mtime(library) + 5))  # a clock that ticks slowly
    clean(tmp_path, state)
    assert (_mtime(library) == 1_000_000_007) != somebody


def test_clean_in_a_root_that_is_too_slow(tmp_path: Path, rootfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What there was no time for stays in the layer, and what is kept about the container goes."""
    (rootfs / "usr/lib/libcuda.so.1").touch()
    traces: list[dict[str, Any]] = [
        {"kind": "time", "path": "/usr/lib", "before": 5, "after": (rootfs / "usr/lib").stat().st_mtime_ns},
        {"kind": "file", "path": "/usr/lib/libcuda.so.1"},
    ]
    state = note(tmp_path, rootfs, traces)
    before = tree(rootfs)
    monkeypatch.setattr(cleanup, "_SECONDS", 0)
    clean(tmp_path, state)
    assert before == tree(rootfs)
    assert os.listdir(tmp_path / "state/containers") == []


# The root filesystem is another one by now


def _with_ours(rootfs: Path) -> list[dict[str, Any]]:
    """An empty file, a link and a directory, as an edit leaves them, and their traces."""
    (rootfs / "usr/lib/ours").touch()
    (rootfs / "usr/lib/link").symlink_to("ours")
    (rootfs / "usr/lib/made").mkdir()
    return [
        {"kind": "file", "path": "/usr/lib/ours"},
        {"kind": "link", "path": "/usr/lib/link", "target": "ours", "former": "evil"},
        {"kind": "directory", "path": "/usr/lib/made"},
    ]


def _link(rootfs: Path, other: Path) -> None:
    rootfs.rename(rootfs.with_name("moved"))
    rootfs.symlink_to(other)


def _exchanged(rootfs: Path, other: Path) -> None:
    rootfs.rename(rootfs.with_name("moved"))
    other.rename(rootfs)


def _made_again(rootfs: Path, other: Path) -> None:
    """With the same inode number, where the file system gives that to the next directory."""
    shutil.rmtree(rootfs)
    shutil.copytree(other, rootfs, symlinks=True)


def _link_above(rootfs: Path, other: Path) -> None:
    above = rootfs.parent
    above.rename(above.with_name("above-moved"))
    (above.with_name("instead")).mkdir()
    other.rename(above.with_name("instead") / rootfs.name)
    above.symlink_to(above.with_name("instead"))


def _mounted_over(rootfs: Path, other: Path) -> None:
    kernel.mount(str(other), str(rootfs), None, kernel.MS_BIND)


def _mounted_itself(rootfs: Path, other: Path) -> None:  # noqa: ARG001 - the same directory, by another mount
    kernel.mount(str(rootfs), str(rootfs), None, kernel.MS_BIND)


@pytest.mark.root
@pytest.mark.parametrize(
    "exchange",
    [_link, _exchanged, _made_again, _link_above, _mounted_over, _mounted_itself],
    ids=lambda function: function.__name__.strip("_"),
)
def test_poststop_leaves_another_root_filesystem_alone(tmp_path: Path, exchange: Callable[[Path, Path], None]) -> None:
    rootfs, other = tmp_path / "above/rootfs", tmp_path / "other"
    for place in (rootfs, other):
        (place / "usr/lib").mkdir(parents=True)
    traces = _with_ours(rootfs)
    _with_ours(other)
    state = note(tmp_path, rootfs, traces)

    def poststop() -> None:
        kernel.unshare(kernel.CLONE_NEWNS)
        kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
        exchange(rootfs, other)
        before = tree(rootfs)
        (said,) = clean(tmp_path, state)
        assert "is not the root filesystem that container" in said or said.startswith("clean up `")
        assert before == tree(rootfs)
        assert (rootfs / "usr/lib/link").readlink() == Path("ours")
        assert os.listdir(tmp_path / "state/containers") == []

    in_child(poststop)


def test_second_poststop_does_not_touch_the_next_container(tmp_path: Path, rootfs: Path) -> None:
    """The same id and bundle, another image: the note of the first is gone, whoever calls."""
    note(tmp_path, rootfs, _with_ours(rootfs))
    end_of(NAME)
    rootfs.rename(tmp_path / "first")
    rootfs.mkdir()
    _sleepers[NAME] = [subprocess.Popen(["sleep", "600"])]
    state = State(_sleepers[NAME][0].pid, "/bundle", NAME)
    warnings: list[str] = []
    directory = register(tmp_path, state, container(rootfs, state.pid), warnings).directory
    assert directory
    assert warnings == [
        f"what was kept about a container `{NAME}` was of another root filesystem or bundle; "
        f"what that container left in `{rootfs}` stays there"
    ]
    assert directory.traces() == []
    clean(tmp_path, state)
    assert tree(tmp_path / "first") == ["etc", "usr", "usr/lib", "usr/lib/link", "usr/lib/made", "usr/lib/ours"]


@pytest.mark.parametrize(
    "missing",
    [
        {"statx_mount": errno.ENOSYS},
        {"name_to_handle": errno.ENOSYS},
        {"statx_mount": errno.ENOSYS, "name_to_handle": errno.ENOSYS},
        {"name_to_handle": errno.EOPNOTSUPP},
        {"name_to_handle": errno.EOVERFLOW},
        {"statx_mount": errno.EPERM, "name_to_handle": errno.EPERM},
    ],
    ids=lambda missing: "-".join(f"{name}-{errno.errorcode[number]}" for name, number in missing.items()),
)
def test_identity_where_something_is_missing(
    tmp_path: Path, rootfs: Path, monkeypatch: pytest.MonkeyPatch, missing: dict[str, int]
) -> None:
    """In an old kernel, a seccomp filter, or a file system: NFS has no handle where its server's are too long."""

    def absent(number: int) -> Callable[..., bytes]:
        def call(*_: object) -> bytes:
            raise OSError(number, os.strerror(number))

        return call

    for name, number in missing.items():
        monkeypatch.setattr(kernel, name, absent(number))
    state = note(tmp_path, rootfs, _with_ours(rootfs))
    assert clean(tmp_path, state) == []
    assert tree(rootfs) == ["etc", "usr", "usr/lib", "usr/lib/link"]  # what it was before
    (rootfs / "usr/lib/link").unlink()
    state = note(tmp_path, rootfs, _with_ours(rootfs))
    rootfs.rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", rootfs, symlinks=True)
    assert len(clean(tmp_path, state)) == 1


# Several containers over one root filesystem


@pytest.fixture
def processes() -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts what counts as a container's first process."""
    started: list[subprocess.Popen[bytes]] = []

    def begin() -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["sleep", "600"]))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize("lost", [None, 0, 1], ids=["all-poststops", "first-lost", "second-lost"])
def test_the_last_one_cleans_up(
    tmp_path: Path,
    rootfs: Path,
    processes: Callable[[], subprocess.Popen[bytes]],
    order: tuple[int, ...],
    lost: int | None,
) -> None:
    """Each makes something of its own; nothing is removed while one lives, and at last the cache is the image's."""
    cache = rootfs / "etc/ld.so.cache"
    cache.write_text("the image's")
    cache.chmod(0o640)
    os.utime(cache, ns=(5, 5))
    os.utime(rootfs / "usr/lib", ns=(7, 7))
    before = tree(rootfs)
    first = processes()
    states = []
    running = [first, processes(), processes()]
    for number, process in enumerate(running):
        former = os.open(cache, os.O_RDONLY)
        changed = _mtime(rootfs / "usr/lib")
        (rootfs / f"usr/lib/deep{number}").mkdir()
        (rootfs / f"usr/lib/deep{number}/file").touch()
        (rootfs / "etc/new").write_text(f"ours {number}")
        (rootfs / "etc/new").rename(cache)
        os.utime(rootfs / "usr/lib", ns=(9, 1000 + number))
        traces: list[Any] = [
            {"kind": "time", "path": "/usr/lib", "before": changed, "after": 1000 + number},
            {"kind": "directory", "path": f"/usr/lib/deep{number}"},
            {"kind": "file", "path": f"/usr/lib/deep{number}/file"},
            {
                "kind": "cache",
                "path": "/etc/ld.so.cache",
                "made": cleanup.version(cache.stat()),
                "former": cleanup.former(os.fstat(former)),
            },
        ]
        states.append(start(tmp_path, rootfs, traces, former, name=f"container{number}", pid=process.pid))
    full = tree(rootfs)
    for position, number in enumerate(order):
        end(running[number])
        if position < 2:
            if number != lost:
                assert clean(tmp_path, states[number]) == []
            assert (full, cache.read_text()) == (tree(rootfs), "ours 2")
        else:
            clean(tmp_path, states[number])
            assert before == tree(rootfs)
    status = cache.stat()
    assert (cache.read_text(), stat.S_IMODE(status.st_mode), status.st_mtime_ns) == ("the image's", 0o640, 5)
    assert _mtime(rootfs / "usr/lib") == 7
    assert os.listdir(tmp_path / "state/containers") == []
    for state in states:
        assert clean(tmp_path, state) == []


def test_cache_that_a_container_made_itself_is_kept(
    tmp_path: Path, rootfs: Path, processes: Callable[[], subprocess.Popen[bytes]]
) -> None:
    """Between the two starts somebody ran ldconfig: that one is put back, and not the image's."""
    cache = rootfs / "etc/ld.so.cache"
    states, running = [], [processes(), processes()]
    for number, found in enumerate(("the image's", "the container's own")):
        cache.write_text(found)
        former = os.open(cache, os.O_RDONLY)
        (rootfs / "etc/new").write_text(f"ours {number}")
        (rootfs / "etc/new").rename(cache)
        trace = {"kind": "cache", "path": "/etc/ld.so.cache", "made": cleanup.version(cache.stat())}
        trace["former"] = cleanup.former(os.fstat(former))
        states.append(start(tmp_path, rootfs, [trace], former, name=f"c{number}", pid=running[number].pid))
    for process, state in zip(running, states, strict=True):
        end(process)
        clean(tmp_path, state)
    assert cache.read_text() == "the container's own"


def test_process_with_the_number_of_another_is_not_it(tmp_path: Path, rootfs: Path) -> None:
    """A pid is used again: this process has the number, and did not start when the container's did."""
    start(tmp_path, rootfs, [], name="lost")
    kept = tmp_path / "state/containers/lost/container.json"
    document = json.loads(kept.read_text())
    document["process"][1] -= 1
    kept.write_text(json.dumps(document))
    state = note(tmp_path, rootfs, [{"kind": "file", "path": "/usr/lib/ours"}])
    (rootfs / "usr/lib/ours").touch()
    clean(tmp_path, state)
    assert tree(rootfs) == ["etc", "usr", "usr/lib"]
    assert os.listdir(tmp_path / "state/containers") == []


@pytest.mark.parametrize("over", [False, True], ids=["alive", "over"])
def test_failed_start_beside_another_container(
    tmp_path: Path, rootfs: Path, processes: Callable[[], subprocess.Popen[bytes]], over: bool
) -> None:
    """What the failed one made may carry the other's mounts by now."""
    other = processes()
    start(tmp_path, rootfs, [], name="other", pid=other.pid)
    if over:
        end(other)
    first = processes()
    failed = register(tmp_path, State(first.pid, "/bundle", NAME), container(rootfs, first.pid))
    taken_back: list[str] = []
    (rootfs / "usr/lib/ours").touch()
    cleanup.undo(failed, lambda: taken_back.append("all"), [{"kind": "file", "path": "/usr/lib/ours"}])
    cleanup.forget(failed)
    assert taken_back == (["all"] if over else [])
    assert (NAME in os.listdir(tmp_path / "state/containers")) != over
    if not over:
        end(other)
        end(first)
        clean(tmp_path, State(0, "/bundle", NAME))
        assert not (rootfs / "usr/lib/ours").exists()


def test_poststop_of_a_container_that_runs(
    tmp_path: Path, rootfs: Path, processes: Callable[[], subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is called for another one of the same id and bundle, in another directory of the runtime (`runc --root`)."""
    monkeypatch.setattr(container_dir, "_END_SECONDS", 0.05)
    running = processes()
    state = start(tmp_path, rootfs, _with_ours(rootfs), pid=running.pid)
    before = tree(rootfs)
    assert clean(tmp_path, state) == [f"container `{NAME}` runs: nothing of it is removed"]
    assert before == tree(rootfs)
    end(running)
    assert clean(tmp_path, state) == []
    assert os.listdir(tmp_path / "state/containers") == []


def test_cache_is_kept_without_mode_and_owner(tmp_path: Path, rootfs: Path) -> None:
    """A set-uid program under that name would be one of root's, outside of any container."""
    cache = rootfs / "etc/ld.so.cache"
    cache.write_text("a program")
    os.chown(cache, 1000, 1000)
    cache.chmod(0o6755)
    former = os.open(cache, os.O_RDONLY)
    (rootfs / "etc/new").write_text("ours")
    (rootfs / "etc/new").rename(cache)
    trace = {"kind": "cache", "path": "/etc/ld.so.cache", "made": cleanup.version(cache.stat())}
    trace["former"] = cleanup.former(os.fstat(former))
    state = note(tmp_path, rootfs, [trace], former)
    status = (tmp_path / "state/containers" / NAME / "ld.so.cache").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o600, 0, 0)
    clean(tmp_path, state)
    status = cache.stat()
    assert (cache.read_text(), stat.S_IMODE(status.st_mode), status.st_uid) == ("a program", 0o6755, 1000)
