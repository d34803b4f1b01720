# SPDX-License-Identifier: Apache-2.0
"""Paths below a root, resolved by the kernel and by hand: the same answers, and never anything outside."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvhook.linux import kernel
from nvhook.linux.root import DIRECTORY, Root


def _absent(*_: object, **__: object) -> int:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """`outside` is what no path may reach; everything in `root` points there somehow."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("outside")
    root = tmp_path / "root"
    (root / "a/b").mkdir(parents=True)
    (root / "a/b/file").write_text("inside")
    links = {
        "absolute": "/a/b/file",
        "a/up": "../a/b",
        "a/over": "../../../../../../a/b/file",
        "out": str(tmp_path / "outside/file"),
        "a/out": "../../outside",
        "dangling": "nowhere",
        "loop": "pool",
        "pool": "loop",
        "self": "self",
        "chain": "absolute",
        "magic": "/proc/self/root",
        "dot": ".",
        "root": "/",
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "fifo")
    return root


PATHS = {
    "/": None,
    "": errno.ENOENT,
    ".": None,
    "..": None,
    "a/b/file": "a/b/file",
    "//a//./b///file": "a/b/file",
    "/a/b/": "a/b",
    "../../a/b/file": "a/b/file",
    "a/../../../a/b/file": "a/b/file",
    "absolute": "a/b/file",
    "chain": "a/b/file",
    "a/up/file": "a/b/file",
    "a/over": "a/b/file",
    "dot/a/dot": errno.ENOENT,
    "root/root/a/b/file": "a/b/file",
    "out": errno.ENOENT,
    "a/out/file": errno.ENOENT,
    "dangling": errno.ENOENT,
    "dangling/x": errno.ENOENT,
    "loop": errno.ELOOP,
    "self/x": errno.ELOOP,
    "a/b/file/x": errno.ENOTDIR,
    "a/b/file/..": errno.ENOTDIR,
    "a/b/file/": errno.ENOTDIR,
    "chain/": errno.ENOTDIR,
    "fifo/": errno.ENOTDIR,
    "a/up/": "a/b",
    "magic/etc/passwd": errno.ENOENT,
    "x" * 300: errno.ENAMETOOLONG,
}


@pytest.mark.parametrize("by_hand", [False, True], ids=["openat2", "by-hand"])
@pytest.mark.parametrize(("path", "expected"), PATHS.items(), ids=[name[:24] or "empty" for name in PATHS])
def test_open(
    tree: Path, monkeypatch: pytest.MonkeyPatch, path: str, expected: str | int | None, by_hand: bool
) -> None:
    if by_hand:
        monkeypatch.setattr(kernel, "openat2", _absent)
    root = Root(os.open(tree, DIRECTORY))
    if isinstance(expected, int):
        with pytest.raises(OSError, match=r".") as caught:
            root.open(path)
        assert caught.value.errno == expected
        return
    fd = root.open(path)
    assert os.path.samestat(os.fstat(fd), (tree / (expected or ".")).stat())
    os.close(fd)


@pytest.mark.parametrize("by_hand", [False, True], ids=["openat2", "by-hand"])
def test_open_of_a_magic_link_of_the_kernel(monkeypatch: pytest.MonkeyPatch, by_hand: bool) -> None:
    """In a real /proc: by name /proc/self/root leads to the host's root, here it must stay below /proc."""
    if by_hand:
        monkeypatch.setattr(kernel, "openat2", _absent)
    proc = Root(os.open("/proc", DIRECTORY))
    for path in (f"{os.getpid()}/root/etc", f"{os.getpid()}/cwd/tests", f"{os.getpid()}/fd/0"):
        with pytest.raises(OSError, match=r".") as caught:
            proc.open(path)
        assert caught.value.errno in (errno.ELOOP, errno.ENOENT, errno.ENOTDIR)


@pytest.mark.parametrize("by_hand", [False, True], ids=["openat2", "by-hand"])
def test_open_not_following(tree: Path, monkeypatch: pytest.MonkeyPatch, by_hand: bool) -> None:
    if by_hand:
        monkeypatch.setattr(kernel, "openat2", _absent)
    root = Root(os.open(tree, DIRECTORY))
    fd = root.open("absolute", os.O_PATH | os.O_NOFOLLOW)
    assert stat.S_ISLNK(os.fstat(fd).st_mode)
    with pytest.raises(OSError, match=r".") as caught:
        root.open("absolute", os.O_RDONLY | os.O_NOFOLLOW)
    assert caught.value.errno == errno.ELOOP


FLAGS = {
    "path": os.O_PATH,
    "path-nofollow": os.O_PATH | os.O_NOFOLLOW,
    "path-directory-nofollow": DIRECTORY | os.O_NOFOLLOW,
    "read": os.O_RDONLY | os.O_NONBLOCK,
    "read-nofollow": os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW,
    "read-directory": os.O_RDONLY | os.O_DIRECTORY,
}


def _answer(root: Root, path: str, flags: int) -> tuple[int, ...]:
    try:
        fd = root.open(path, flags)
    except OSError as error:
        return (error.errno or 0,)
    status = os.fstat(fd)
    os.close(fd)
    return status.st_dev, status.st_ino


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_both_ways_agree_on_flags(tree: Path, flags: int) -> None:
    ways = [Root(os.open(tree, DIRECTORY)) for _ in range(2)]
    ways[1]._openat2 = False
    before = os.listdir("/proc/self/fd")
    for path in (*PATHS, "fifo", "a/up", "loop/", "dangling/", "absolute/.", "dot/", "root/"):
        assert _answer(ways[0], path, flags) == _answer(ways[1], path, flags), path
    assert before == os.listdir("/proc/self/fd")


@pytest.mark.parametrize("by_hand", [False, True], ids=["openat2", "by-hand"])
def test_open_through_as_many_links_as_the_kernel_follows(tree: Path, by_hand: bool) -> None:
    (tree / "link0").symlink_to("a/b/file")
    for number in range(1, 41):
        (tree / f"link{number}").symlink_to(f"link{number - 1}")
    root = Root(os.open(tree, DIRECTORY))
    root._openat2 = not by_hand
    os.close(root.open("link39"))
    with pytest.raises(OSError, match=r".") as caught:
        root.open("link40")
    assert caught.value.errno == errno.ELOOP


def test_open_while_the_machine_is_busy(tree: Path) -> None:
    """Any rename on the machine while the kernel takes a `..` makes it answer EAGAIN."""
    root = Root(os.open(tree, DIRECTORY))
    (tree.parent / "0").touch()
    busy = os.fork()
    if busy == 0:
        while True:
            os.rename(tree.parent / "0", tree.parent / "1")
            os.rename(tree.parent / "1", tree.parent / "0")
    try:
        for _ in range(20000):
            os.close(root.open("a/over"))
    finally:
        os.kill(busy, 9)
        os.waitpid(busy, 0)
    assert root._openat2


@pytest.mark.root
@pytest.mark.parametrize("by_hand", [False, True], ids=["openat2", "by-hand"])
def test_read_of_a_device(tree: Path, by_hand: bool) -> None:
    os.mknod(tree / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    root = Root(os.open(tree, DIRECTORY))
    root._openat2 = not by_hand
    with pytest.raises(OSError, match="not a regular file"):
        root.read("zero", 9)


@pytest.mark.parametrize("by_hand", [False, True], ids=["openat2", "by-hand"])
def test_read(tree: Path, monkeypatch: pytest.MonkeyPatch, by_hand: bool) -> None:
    if by_hand:
        monkeypatch.setattr(kernel, "openat2", _absent)
    root = Root(os.open(tree, DIRECTORY))
    assert root.read("chain", 6) == b"inside"
    for path, limit, expected in (("chain", 5, errno.EFBIG), ("fifo", 9, errno.EINVAL), ("a", 9, errno.EINVAL)):
        with pytest.raises(OSError, match=r".") as caught:
            root.read(path, limit)
        assert caught.value.errno in (expected, errno.EISDIR)


@pytest.mark.parametrize("by_hand", [False, True], ids=["openat2", "by-hand"])
def test_open_directory_makes_and_remembers(tree: Path, by_hand: bool) -> None:
    root = Root(os.open(tree, DIRECTORY))
    root._openat2 = not by_hand
    made: list[tuple[int, str]] = []
    fd = root.open_directory("/root/a/new/deep", made)
    assert os.path.samestat(os.fstat(fd), (tree / "a/new/deep").stat())
    assert [name for _, name in made] == ["new", "deep"]
    for parent, name in reversed(made):
        os.rmdir(name, dir_fd=parent)
    assert not (tree / "a/new").exists()


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_open_directory_makes_what_everybody_may_enter(tree: Path, mask: int) -> None:
    root = Root(os.open(tree, DIRECTORY))
    former = os.umask(mask)
    try:
        os.close(root.open_directory("/new/deep", []))
        assert os.umask(mask) == mask
    finally:
        os.umask(former)
    assert [stat.S_IMODE((tree / name).stat().st_mode) for name in ("new", "new/deep")] == [0o755, 0o755]


@pytest.mark.parametrize("by_hand", [False, True], ids=["openat2", "by-hand"])
@pytest.mark.parametrize("path", ["/dangling/x", "/out/x", "/a/out/x", "/a/b/file/x", "/loop/x", "/fifo"])
def test_open_directory_refuses(tree: Path, path: str, by_hand: bool) -> None:
    root = Root(os.open(tree, DIRECTORY))
    root._openat2 = not by_hand
    made: list[tuple[int, str]] = []
    with pytest.raises(OSError, match=r"."):
        root.open_directory(path, made)
    assert made == []
    assert sorted(os.listdir(tree.parent / "outside")) == ["file"]
    assert not (tree / "nowhere").exists()


_NAMES = st.sampled_from(["a", "b", "c", "d"])
_TARGETS = st.lists(st.one_of(_NAMES, st.sampled_from(["..", ".", ""])), min_size=1, max_size=5).map("/".join)


@settings(max_examples=300, deadline=None)
@given(
    links=st.dictionaries(st.tuples(_NAMES, _NAMES).map("/".join), _TARGETS.filter(bool), max_size=6),
    path=_TARGETS.filter(bool),
)
def test_both_ways_agree(tmp_path_factory: pytest.TempPathFactory, links: dict[str, str], path: str) -> None:
    directory = tmp_path_factory.mktemp("tree") / "root"
    for name in ("a", "b", "c"):
        (directory / name).mkdir(parents=True)
    for name, target in links.items():
        if (directory / name).parent.is_dir():
            (directory / name).symlink_to(target)
    inside = {(item.stat(follow_symlinks=False).st_ino) for item in [directory, *directory.rglob("*")]}
    answers = []
    for by_hand in (False, True):
        root = Root(os.open(directory, DIRECTORY))
        if by_hand:
            root._openat2 = False
        try:
            fd = root.open(path)
        except OSError as error:
            answers.append(-(error.errno or 0))
        else:
            answers.append(os.fstat(fd).st_ino)
            os.close(fd)
        os.close(root.fd)
    assert answers[0] == answers[1]
    assert answers[0] < 0 or answers[0] in inside


@pytest.mark.parametrize("times", [1, 1000], ids=["once", "for-ever"])
def test_open_when_the_kernel_could_not_be_sure(tree: Path, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """EAGAIN: something was renamed or mounted somewhere while a `..` was taken. Asked again, and then by hand."""
    real = kernel.openat2
    left = [times]

    def unsure(dir_fd: int, path: str, flags: int, *, resolve: int) -> int:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), path)
        return real(dir_fd, path, flags, resolve=resolve)

    monkeypatch.setattr(kernel, "openat2", unsure)
    fd = Root(os.open(tree, DIRECTORY)).open("a/up/file")
    assert os.path.samestat(os.fstat(fd), (tree / "a/b/file").stat())
    os.close(fd)


def test_real_path_is_of_the_kind_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/file").touch()
    (tmp_path / "link").symlink_to("/real")
    root = Root(os.open(tmp_path, DIRECTORY))
    assert root.real_path("/link/file", stat.S_IFREG) == f"{tmp_path}/real/file"
    assert root.real_path("/link", stat.S_IFDIR) == f"{tmp_path}/real"
    assert root.real_path("/link", stat.S_IFREG) == ""
    assert root.real_path("/missing", stat.S_IFREG) == ""


def test_names_of_a_directory(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).touch()
    root = Root(os.open(tmp_path, DIRECTORY))
    assert root.names("/") == ["a", "b"]
    assert root.names("/missing") == root.names("/a") == []
