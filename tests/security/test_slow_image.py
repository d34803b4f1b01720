# SPDX-License-Identifier: Apache-2.0
"""An image that takes its time: chains of long links, caches and libraries that are slow to read, files under lease.

A start is held up for 15 s at most. What can be left out has a second, the edits have what is left of twelve, and then
the start fails with one line and is undone. The tests count steps, or make a look-up take a known time, where a fast
machine would hide the fault.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from containers import Workshop, configure, tree
from nvhook import cli
from nvhook.commands import preview
from nvhook.container import container, cuda_compat, edits, image_check
from nvhook.container.container import Container
from nvhook.container.edits import Edit
from nvhook.driver import inventory
from nvhook.driver.records import Driver, Library
from nvhook.errors import ContainerError
from nvhook.host.gpus import Gpus
from nvhook.host.offers import Offers
from nvhook.host.selection import Selection
from nvhook.linux import kernel, ldconfig, symver
from nvhook.linux import root as roots
from nvhook.linux.root import DIRECTORY, OutOfTimeError, Root
from nvhook.request import config as configuration
from nvhook.request.request import Request
from nvhook.start import Start
from nvruntime import ahead
from security.hostile import LIBRARIES, OLD_KERNEL, Place
from simhost import cachewriter, elfwriter

_MOST = 39  # links, with one that leads to the first of them
# The kernel may begin its walk again beside a rename, and goes on counting links: it always follows half of them.
_SAFE = 19
# What the target of a link begins with: the root directory, at length. Of a `..` the kernel can be unsure.
_ROOTS = {
    "dots": "/" + "./" * 2000,
    "slashes": "/" * 4000,
    "up-and-down": "/" + "l/../" * 800,
    "through-another": "/l/" + "x/../" * 800 + "../",
}


def _chain(top: Path, final: str, kind: str = "dots", name: str = "c", count: int = _MOST) -> str:
    """A path in the tree `top` that leads to `final`, by `count` links of 4 KB each."""
    (top / "l/x").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        onward = f"l/{name}{number + 1}" if number < count - 1 else final.lstrip("/")
        (top / "l" / f"{name}{number}").symlink_to(f"{_ROOTS[kind]}{onward}")
    return f"/l/{name}0"


@contextlib.contextmanager
def _renaming(directory: Path) -> Iterator[None]:
    """Another process renames without end, so the kernel's walks are not sure of their `..`."""
    directory.mkdir()
    (directory / "0").touch()
    busy = os.fork()
    if busy == 0:
        while True:
            os.rename(directory / "0", directory / "1")
            os.rename(directory / "1", directory / "0")
    try:
        yield
    finally:
        os.kill(busy, 9)
        os.waitpid(busy, 0)


@pytest.fixture
def open_root(tmp_path: Path) -> Iterator[Root]:
    (tmp_path / "usr/lib").mkdir(parents=True)
    (tmp_path / "usr/lib/file").write_text("here")
    root = Root(os.open(tmp_path, DIRECTORY), 60)
    yield root
    os.close(root.fd)


# One look-up


@pytest.mark.parametrize("kind", _ROOTS)
def test_walk_by_hand_ends_after_some_thousand_names(tmp_path: Path, open_root: Root, kind: str) -> None:
    path = _chain(tmp_path, "/usr/lib", kind)
    open_root._openat2 = False
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="links lead through more than 4096 names") as caught:
        open_root.open(path)
    assert caught.value.errno == errno.ELOOP
    assert before == os.listdir("/proc/self/fd")


@pytest.mark.parametrize("by_hand", [False, True], ids=["openat2", "by-hand"])
def test_links_of_a_sane_image_are_followed(tmp_path: Path, open_root: Root, by_hand: bool) -> None:
    """Forty links with long relative targets, as package managers with a store of their own make them."""
    (tmp_path / "store").mkdir()
    for number in range(40):
        onward = f"../store/{'../store/' * 20}{number + 1}" if number < 39 else "../usr/lib"
        (tmp_path / "store" / str(number)).symlink_to(onward)
    open_root._openat2 = not by_hand
    os.close(open_root.open("/store/0/file"))


@pytest.mark.parametrize("by_hand", [False, True], ids=["openat2", "by-hand"])
def test_path_longer_than_the_kernel_s(open_root: Root, by_hand: bool) -> None:
    """LD_LIBRARY_PATH may hold one of megabytes."""
    open_root._openat2 = not by_hand
    assert open_root.exists("/" * 4090 + "usr")
    with pytest.raises(OSError, match=r".") as caught:
        open_root.open("/" * 4096 + "usr")
    assert caught.value.errno == errno.ENAMETOOLONG


def test_kernel_is_asked_a_few_times_and_not_more(open_root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def unsure(dir_fd: int, path: str, flags: int, *, resolve: int) -> int:  # noqa: ARG001 - as kernel.openat2
        asked.append(path)
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), path)

    monkeypatch.setattr(kernel, "openat2", unsure)
    os.close(open_root.open("/usr/lib"))
    assert len(asked) <= 32


@pytest.mark.parametrize("kind", _ROOTS)
def test_look_up_beside_a_process_that_renames(tmp_path: Path, open_root: Root, kind: str) -> None:
    """An answer or ELOOP; a walk of 80,000 names by hand is neither."""
    path = _chain(tmp_path, "/usr/lib", kind)
    answers = set()
    with _renaming(tmp_path / "busy"):
        for _ in range(20):
            try:
                os.close(open_root.open(path))
                answers.add(0)
            except OSError as error:
                answers.add(error.errno or 0)
    assert answers <= {0, errno.ELOOP}
    assert open_root.left > 60 - 20 * 1.0


def test_directory_with_very_many_names(tmp_path: Path, open_root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roots, "_MAX_NAMES", 500)
    (tmp_path / "many").mkdir()
    for number in range(2000):
        (tmp_path / "many" / str(number)).touch()
    assert len(open_root.names("/many")) == 500


def test_file_under_lease_is_not_waited_for(tmp_path: Path, open_root: Root) -> None:
    """open(2) would wait until the process that holds it gives it up, or 45 s."""
    holder = _lease(tmp_path / "usr/lib/file")
    try:
        with pytest.raises(BlockingIOError):
            open_root.read("/usr/lib/file", 99)
    finally:
        os.kill(holder, 9)
        os.waitpid(holder, 0)
    assert open_root.read("/usr/lib/file", 99) == b"here"


def _lease(path: Path) -> int:
    """A process that holds a write lease on the file and does not hear the kernel's SIGIO."""
    reading, writing = os.pipe()
    holder = os.fork()
    if holder == 0:
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        fcntl.fcntl(os.open(path, os.O_RDWR), fcntl.F_SETLEASE, fcntl.F_WRLCK)
        os.write(writing, b"held")
        signal.pause()
        os._exit(0)
    os.close(writing)
    assert os.read(reading, 4) == b"held"
    os.close(reading)
    return holder


# All of them together

_READERS: dict[str, Callable[[Root], object]] = {
    "open": lambda root: root.open("/usr/lib"),
    "open-missing": lambda root: root.open("/missing"),
    "exists": lambda root: root.exists("/missing"),
    "read": lambda root: root.read("/usr/lib/file", 99),
    "names": lambda root: root.names("/usr/lib"),
    "real-path": lambda root: root.real_path("/usr/lib", 0),
    "open-directory": lambda root: root.open_directory("/new/deep", []),
}


@pytest.mark.parametrize("reader", _READERS.values(), ids=_READERS)
def test_no_reader_takes_the_end_of_its_time_for_an_answer(
    tmp_path: Path, open_root: Root, reader: Callable[[Root], object]
) -> None:
    open_root.spend(60)
    before = tree(tmp_path)
    with pytest.raises(OutOfTimeError, match="have taken 60 s, and may take no longer"):
        reader(open_root)
    assert before == tree(tmp_path)


def test_what_can_be_left_out_has_a_second_of_the_whole(open_root: Root) -> None:
    os.close(open_root.optional.open("/usr/lib"))
    assert open_root.left == pytest.approx(60 - (1 - open_root.optional.left))
    open_root.optional.spend(1)
    with pytest.raises(OutOfTimeError):
        open_root.optional.open("/usr/lib")
    os.close(open_root.open("/usr/lib"))
    assert open_root.left == pytest.approx(59, abs=0.9)


def test_nothing_is_optional_when_the_whole_is_over(open_root: Root) -> None:
    os.close(open_root.optional.open("/usr/lib"))
    open_root.spend(60)
    with pytest.raises(OutOfTimeError):
        open_root.optional.open("/usr/lib")


def test_time_between_look_ups_is_not_theirs(tmp_path: Path) -> None:
    """The host's part of a start, NVML's first answer for one, may take seconds."""
    root = Root(os.open(tmp_path, DIRECTORY), 0.5)
    os.close(root.open("/"))
    time.sleep(0.6)
    os.close(root.open("/"))


def test_family_of_an_image_that_is_too_slow_is_not_guessed(open_root: Root) -> None:
    open_root.spend(60)
    with pytest.raises(ContainerError, match="look up `/etc/debian_version`"):
        container.layout(open_root)


def test_compatibility_libraries_are_not_passed_over(open_root: Root) -> None:
    open_root.spend(60)
    settings = configuration.load("/nonexistent")
    with pytest.raises(ContainerError, match="look up `/usr/local/cuda/compat`"):
        cuda_compat.find(settings, ("compute",), open_root, "550.1", set, [])


def test_image_that_is_too_slow_to_look_at_gives_no_false_alarm(tmp_path: Path, open_root: Root) -> None:
    """Of this one, whose C library is musl, the same question has an answer while there is time."""
    (tmp_path / "lib").mkdir()
    (tmp_path / f"lib/ld-musl-{os.uname().machine}.so.1").touch()
    (tmp_path / "log").touch()
    settings = configuration.load("/nonexistent")
    settings.strict = True
    driver = Driver("550.1", [Library("/host/libcuda.so.550.1", "libcuda.so.1", 64, (), ("compute",))], [], [])
    layout = container.layout(open_root)
    asked = Request(("all",), ("compute",), (), "")
    with pytest.raises(ContainerError, match="musl"):
        image_check.check(settings, asked, driver, open_root, layout, [])
    open_root.optional.spend(1)
    image_check.check(settings, asked, driver, open_root, layout, [])


def test_what_is_done_ahead_leaves_a_slow_image_to_the_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process beside the low-level runtime has two seconds for it, the hook has twelve."""
    monkeypatch.setattr(ahead, "_LOOKUP_SECONDS", 0)
    asked = Request(("all",), ("compute",), (), "")
    start = Start(configuration.load("/nonexistent"), preview.imagined([], str(tmp_path)), asked, "name", [])
    start.gpus, start.chosen = Gpus("550.1", [], {}, (0, 0, 0)), Selection([], [])
    start.offers = Offers(start.gpus)
    monkeypatch.setattr(inventory, "load", lambda *_, **__: Driver("550.1", [], [], []))
    prepared = ahead.Ahead(start)
    assert (start.edits, prepared._fault) == ([], None)


@pytest.mark.parametrize("command", ["plan", "explain"])
def test_command_that_looks_at_an_image_that_is_too_slow(
    simhost: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    monkeypatch.setattr(container, "SECONDS", 0)
    monkeypatch.setenv("NVHOOK_CONFIG", str(simhost("h200") / "config.toml"))
    document = {"process": {"env": ["NVIDIA_VISIBLE_DEVICES=all"]}, "root": {"path": str(tmp_path)}}
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert cli.main([command, "--bundle", str(tmp_path)], "") == 1
    assert "container error: look up `/etc/debian_version`" in capsys.readouterr().err


def test_library_with_as_many_versions_as_are_read(tmp_path: Path) -> None:
    """1024 names of 255 bytes, and no more of either; what is read of the file does not grow with it."""
    for count, is_read in ((1024, True), (1025, False)):
        path = tmp_path / f"libc{count}.so.6"
        defines = ("libc.so.6", *(f"GLIBC_2.{number}".ljust(255, "x") for number in range(count - 1)))
        path.write_bytes(elfwriter.shared_object("libc.so.6", [], defines=defines))
        os.truncate(path, 1 << 40)
        fd = os.open(path, os.O_RDONLY)
        versions = symver.read(fd)
        assert versions is not None
        if is_read:
            assert versions.defined() == list(defines)
        else:
            with pytest.raises(ValueError, match="more than 1024 symbol versions"):
                versions.defined()
        os.close(fd)


# Whole starts


def _many_directories(top: Path) -> None:
    """505 of them in the linker cache, each through the chain; libc.so.6 keeps it a cache of glibc's."""
    start = _chain(top, "/usr/lib")
    for number in range(505):
        (top / f"usr/lib/d{number}").mkdir()
    entries = [
        {"name": f"libx{n}.so.1", "flags": "libc6,x86-64", "path": f"{start}/d{n}/libx{n}.so.1"} for n in range(505)
    ]
    entries.append({"name": "libc.so.6", "flags": "libc6,x86-64", "path": f"{LIBRARIES}/libc.so.6"})
    time.sleep(0.02)  # the cache has to be newer than they are
    (top / "etc/ld.so.cache").write_bytes(cachewriter.cache(entries))


def _slow_library_path(top: Path) -> dict[str, str]:
    start = _chain(top, "/usr/lib", "up-and-down", "p")
    for number in range(64):
        (top / f"usr/lib/e{number}").mkdir()
        (top / f"usr/lib/e{number}/libcuda.so.1").symlink_to(start)
    return {"LD_LIBRARY_PATH": ":".join(f"{start}/e{number}" for number in range(64))}


def _slow_libraries(top: Path) -> None:
    os.rename(f"{top}{LIBRARIES}", top / "usr/lib/real")
    os.symlink(_chain(top, "/usr/lib/real", name="r", count=_SAFE), f"{top}{LIBRARIES}")


def _unsure_libraries(top: Path) -> None:
    os.rename(f"{top}{LIBRARIES}", top / "usr/lib/real")
    os.symlink(_chain(top, "/usr/lib/real", "through-another", "r"), f"{top}{LIBRARIES}")


def _slow_compat(top: Path) -> None:
    (top / "usr/local/cuda").mkdir(parents=True)
    (top / "opt/compat").mkdir(parents=True)
    (top / "opt/compat/libcuda.so.1").touch()
    os.symlink(_chain(top, "/opt/compat", "slashes", "k"), top / "usr/local/cuda/compat")


def _all(top: Path) -> dict[str, str]:
    _slow_compat(top)
    _many_directories(top)
    env = _slow_library_path(top)
    _slow_libraries(top)
    return env


_IMAGES: dict[str, Callable[[Path], dict[str, str] | None]] = {
    "cache": _many_directories,
    "library-path": _slow_library_path,
    "libraries": _slow_libraries,
    "unsure-libraries": _unsure_libraries,
    "compat": _slow_compat,
    "all": _all,
}


@pytest.mark.root
@pytest.mark.parametrize("is_busy", [False, True], ids=["quiet", "beside-renames"])
@pytest.mark.parametrize("image", _IMAGES.values(), ids=_IMAGES)
def test_start(shop: Workshop, tmp_path: Path, image: Callable[[Path], dict[str, str] | None], is_busy: bool) -> None:
    """It starts, or says why not: where the kernel is not sure of a path that is too long to walk by hand."""
    bundle = shop.bundle()
    env = image(bundle.rootfs) or {}
    settings = configure(shop.simhost("h200"), tmp_path / "config.toml", tmp_path / "run")
    bundle.write(["/bin/true"], {"NVIDIA_VISIBLE_DEVICES": "all", **env})
    with _renaming(tmp_path / "busy") if is_busy else contextlib.nullcontext():
        begin = time.monotonic()
        result = bundle.run(settings)
        assert time.monotonic() - begin < 20
    if result.returncode:
        assert image is _unsure_libraries, result.stderr
        assert "links lead through more than 4096 names" in result.stderr or "levels of symbolic" in result.stderr


class _Slow:
    """The kernel's openat2 on storage where each look-up of a link of the chain takes `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._openat2 = kernel.openat2

    def install(self) -> None:
        kernel.openat2 = self  # type: ignore[assignment]

    def __call__(self, dir_fd: int, path: str, flags: int, *, resolve: int) -> int:
        if path.startswith("/l/"):
            time.sleep(self._seconds)
        return self._openat2(dir_fd, path, flags, resolve=resolve)


@pytest.mark.root
def test_cache_that_is_slow_to_judge_is_made_by_ldconfig(place: Place) -> None:
    """505 look-ups of 0.1 s each would be 50 s, and once more for what is done ahead."""
    _many_directories(place.root)
    begin = time.monotonic()
    outcome = place.start(arrange=_Slow(0.1).install)
    assert (outcome.line, outcome.faults) == ("", [])
    assert time.monotonic() - begin < 15
    content = (place.root / "etc/ld.so.cache").read_bytes()
    assert f"{LIBRARIES}/libcuda.so.1".encode() in content
    assert b"libx1.so.1" not in content  # ldconfig has found that none of them is there


@pytest.mark.root
@pytest.mark.parametrize("left", [0.0, 0.001, 0.002, 0.005], ids=lambda left: f"{left * 1000:g}-ms")
def test_edits_in_a_tree_that_is_too_slow_are_undone(place: Place, left: float) -> None:
    """Every look-up of the libraries' directory takes milliseconds, and the plan has a hundred."""
    _slow_libraries(place.root)
    before, outside = tree(place.root), place.outside()

    def apply(plan: list[Edit], whole: Container) -> None:
        whole.root.left = left
        edits.apply(plan, whole)

    outcome = place.start(apply=apply)
    assert outcome.line.startswith("mount error: look up `/"), outcome.line
    assert "may take no longer; take chains of symbolic links out of the image" in outcome.line
    assert (outcome.mounted, outcome.faults) == ([], [])
    assert (tree(place.root), place.outside()) == (before, outside)


@pytest.mark.root
def test_libraries_behind_a_chain_on_an_old_kernel(place: Place) -> None:
    """The kernel follows it in milliseconds; the walk by hand took 0.1 to 0.2 s for each of a hundred edits."""
    _slow_libraries(place.root)
    before, outside = tree(place.root), place.outside()
    outcome = place.start(missing=OLD_KERNEL)
    assert "links lead through more than 4096 names" in outcome.line
    assert LIBRARIES in outcome.line
    assert (outcome.mounted, outcome.faults) == ([], [])
    assert (tree(place.root), place.outside()) == (before, outside)


@pytest.mark.root
def test_cache_of_many_directories_on_an_old_kernel(place: Place) -> None:
    _many_directories(place.root)
    begin = time.monotonic()
    outcome = place.start(missing=OLD_KERNEL)
    assert (outcome.line, outcome.faults) == ("", [])
    assert time.monotonic() - begin < 15


@pytest.mark.root
def test_cache_under_lease(place: Place) -> None:
    """Its content cannot be kept: the start fails, and at once."""
    holder = _lease(place.root / "etc/ld.so.cache")
    try:
        outcome = place.start()
    finally:
        os.kill(holder, 9)
        os.waitpid(holder, 0)
    assert outcome.line.startswith("ldcache error: make `/etc/ld.so.cache`"), outcome.line
    assert outcome.mounted == []


@pytest.mark.root
def test_ldconfig_has_what_the_look_ups_have_left(tmp_path: Path) -> None:
    (tmp_path / "root/bin").mkdir(parents=True)
    source = tmp_path / "forever.c"
    source.write_text('#include <unistd.h>\nint main(void) { for (;;) { write(1, "x\\n", 2); usleep(1000); } }\n')
    subprocess.run(["cc", "-static", "-o", str(tmp_path / "forever"), str(source)], check=True, capture_output=True)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        said = "the child failed"
        try:
            kernel.unshare(kernel.CLONE_NEWNS)
            kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
            kernel.mount(str(tmp_path / "root"), str(tmp_path / "root"), None, kernel.MS_BIND)
            root = Root(os.open(tmp_path / "root", DIRECTORY), 12)
            root.spend(10.5)
            begin = time.monotonic()
            program = os.open(tmp_path / "forever", os.O_RDONLY)
            try:
                ldconfig.run(ldconfig.seal(program), str(tmp_path / "root"), root, (), (0, 0))
            except OSError as error:
                said = f"{error.strerror}; {time.monotonic() - begin < 5}; {root.left < 1}"
        finally:
            os.write(writing, said.encode())
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == "not finished after 1 s; True; True"
    os.waitpid(child, 0)
