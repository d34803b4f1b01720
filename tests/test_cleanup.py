# SPDX-License-Identifier: Apache-2.0
"""What a container leaves behind in its root filesystem, and that it is taken away when it is deleted."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from nvhook import leftovers
from nvhook.errors import SpecError
from nvhook.linux.root import DIRECTORY, Root
from nvhook.spec import State

NAME = "a-container"


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    directory = tmp_path / "rootfs"
    (directory / "usr/lib").mkdir(parents=True)
    (directory / "etc").mkdir()
    return directory


def note(
    tmp_path: Path, rootfs: Path, traces: list[dict[str, Any]], former: int = -1, bundle: str = "/bundle"
) -> State:
    state = State(0, bundle, NAME)
    leftovers.Notes(str(tmp_path / "state"), state).write(state, str(rootfs), traces, former)
    return state


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
    leftovers.clean(str(tmp_path / "state"), state)
    assert before == tree(rootfs)
    assert os.listdir(tmp_path / "state/containers") == []
    leftovers.clean(str(tmp_path / "state"), state)  # a second poststop has nothing to do


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
    leftovers.clean(str(tmp_path / "state"), note(tmp_path, rootfs, traces))
    assert before == tree(rootfs)


def test_clean_puts_a_former_link_back(tmp_path: Path, rootfs: Path) -> None:
    (rootfs / "usr/lib/libcuda.so.1").symlink_to("ours")
    trace = {"kind": "link", "path": "/usr/lib/libcuda.so.1", "target": "ours", "former": "libcuda.so.0.9"}
    leftovers.clean(str(tmp_path / "state"), note(tmp_path, rootfs, [trace]))
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
    trace = {"kind": "cache", "path": "/etc/ld.so.cache", "made": leftovers.identity(cache.stat()), "former": True}
    state = note(tmp_path, rootfs, [trace], former)
    if touched:
        cache.write_text("the container's own ldconfig was here")
    leftovers.clean(str(tmp_path / "state"), state)
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
    trace = {"kind": "cache", "path": "/etc/ld.so.cache", "made": leftovers.identity(cache.stat()), "former": True}
    with (tmp_path / "former").open("w+b") as former:
        former.truncate(2 << 20)
        state = note(tmp_path, rootfs, [trace], former.fileno())
    assert os.listdir(tmp_path / "state/containers") == [NAME]
    leftovers.clean(str(tmp_path / "state"), state)
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
    leftovers.clean(str(tmp_path / "state"), note(tmp_path, rootfs, traces))
    assert tree(canary) == ["libcuda.so.1.2"]


def test_clean_of_another_bundle_with_the_same_name(tmp_path: Path, rootfs: Path) -> None:
    (rootfs / "usr/lib/empty").touch()
    note(tmp_path, rootfs, [{"kind": "file", "path": "/usr/lib/empty"}])
    leftovers.clean(str(tmp_path / "state"), State(0, "/another/bundle", NAME))
    assert (rootfs / "usr/lib/empty").exists()


def test_write_keeps_the_first_start_that_was_not_cleaned(tmp_path: Path, rootfs: Path) -> None:
    (rootfs / "usr/lib/one").touch()
    (rootfs / "usr/lib/two").touch()
    note(tmp_path, rootfs, [{"kind": "file", "path": "/usr/lib/one"}])
    state = note(tmp_path, rootfs, [{"kind": "file", "path": "/usr/lib/two"}])
    leftovers.clean(str(tmp_path / "state"), state)
    assert tree(rootfs) == ["etc", "usr", "usr/lib"]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", json.dumps({"bundle": "/bundle"}), "[" * 100, "[" * 9000],
    ids=lambda text: text[:9],
)
def test_clean_of_a_damaged_note(tmp_path: Path, rootfs: Path, content: str) -> None:
    state = note(tmp_path, rootfs, [])
    (tmp_path / "state/containers" / NAME).write_text(content)
    leftovers.clean(str(tmp_path / "state"), state)
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
    state = note(tmp_path, rootfs, [{"kind": "file", "path": "/usr/lib/ours"}, trace])
    leftovers.clean(str(tmp_path / "state"), state)
    assert tree(rootfs) == ["etc", "usr", "usr/lib"]
    assert os.listdir(tmp_path / "state/containers") == []


def test_clean_of_a_root_that_is_no_path(tmp_path: Path, rootfs: Path) -> None:
    state = note(tmp_path, rootfs, [])
    content = json.dumps({"bundle": "/bundle", "rootfs": "/\0", "traces": []})
    (tmp_path / "state/containers" / NAME).write_text(content)
    leftovers.clean(str(tmp_path / "state"), state)
    assert os.listdir(tmp_path / "state/containers") == []


def test_clean_when_the_root_filesystem_is_gone(tmp_path: Path, rootfs: Path) -> None:
    state = note(tmp_path, rootfs / "nowhere", [{"kind": "file", "path": "/x"}])
    leftovers.clean(str(tmp_path / "state"), state)
    assert os.listdir(tmp_path / "state/containers") == []


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "a\0b", "a b", ".hidden"], ids=repr)
def test_names_that_are_no_container(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError, match="is not a container's name"):
        leftovers.Notes(str(tmp_path), State(0, "/bundle", name))
    assert list(tmp_path.iterdir()) == []


def _mtime(path: Path) -> int:
    return path.stat().st_mtime_ns


@pytest.mark.parametrize("somebody", [False, True], ids=["untouched", "written-to-by-the-container"])
def test_clean_gives_a_directory_its_time_back(tmp_path: Path, rootfs: Path, somebody: bool) -> None:
    """Who asks whether a linker cache is older than its directories shall find it as the image had it."""
    library = rootfs / "usr/lib"
    os.utime(library, ns=(0, 1_000_000_007))
    (library / "libcuda.so.1.2").touch()
    root = Root(os.open(rootfs, DIRECTORY))
    traces = leftovers.times(root, {"/usr/lib": 1_000_000_007})
    traces.append({"kind": "file", "path": "/usr/lib/libcuda.so.1.2"})
    state = note(tmp_path, rootfs, traces)
    if somebody:
        (library / "libz.so.1").touch()
        os.utime(library, ns=(0, _mtime(library) + 5))  # a clock that ticks slowly
    leftovers.clean(str(tmp_path / "state"), state)
    assert (_mtime(library) == 1_000_000_007) != somebody
