# SPDX-License-Identifier: Apache-2.0
"""Another container shares the tree, and is quick: it exchanges files, links and directories while the hook works.

First one exchange, before every system call of every kind of edit in turn: whatever is looked up once and used later is
caught. Then as many as the machine can, for NVHOOK_SECURITY_SECONDS (a few, if it is not set).
"""

from __future__ import annotations

import mmap
import os
import random
import re
import select
import signal
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from containers import Workshop
from nvhook.container import cuda_compat
from nvhook.container import edits as editing
from nvhook.container.container import Container
from nvhook.container.edits import Edit
from nvhook.linux import kernel
from security import hostile
from security.hostile import LIBRARIES, OLD_KERNEL, VERSION, Outcome, Place

pytestmark = pytest.mark.root

SECONDS = float(os.environ.get("NVHOOK_SECURITY_SECONDS", "4"))
LIBRARY = f"{LIBRARIES}/libcuda.so.{VERSION}"
LINK = f"{LIBRARIES}/libcuda.so.1"
_RENAMEAT2 = {"x86_64": 316, "aarch64": 276}[os.uname().machine]
_RENAME_EXCHANGE = 2


# One exchange


def _nothing(_: Place) -> None:
    return


def _old_link(place: Place) -> None:
    (place.root / LINK[1:]).symlink_to("libcuda.so.1.2.3")


def _own_file(place: Place) -> None:
    (place.root / LINK[1:]).write_text("the image's own")


def _old_cache(place: Place) -> None:
    os.utime(place.root / "etc/ld.so.cache", (0, 0))  # older than what it lists: ldconfig makes another


def _no_cache(place: Place) -> None:
    (place.root / "etc/ld.so.cache").unlink()


# name -> (place of the edit, what is expected there, what the image has, further edits that it needs)
EDITS: dict[str, tuple[str, str, Callable[[Place], None], tuple[str, ...]]] = {
    "library": (LIBRARY, "file", _nothing, ()),
    "firmware": (f"/lib/firmware/nvidia/{VERSION}/gsp_ga10x.bin", "file", _nothing, ()),
    "binary": ("/usr/bin/nvidia-smi", "file", lambda place: (place.root / "usr/bin/nvidia-smi").touch(), ()),
    "socket": ("/run/nvidia-persistenced/socket", "socket", _nothing, ()),
    "directory": ("/tmp/nvidia-mps", "directory", _nothing, ()),
    "new-link": (LINK, "file", _nothing, ()),
    "old-link": (LINK, "file", _old_link, ()),
    "link-over-a-file": (LINK, "file", _own_file, (LIBRARY,)),
    "node": ("/dev/nvidia0", "node", _nothing, ()),
    "node-bound": ("/dev/dri/renderD129", "node", _nothing, ()),
    "proc": ("/proc/driver/nvidia", "directory", _nothing, ("/proc/driver/nvidia/",)),
    "profile": (
        "/etc/nvidia/nvidia-application-profiles-rc.d",
        "directory",
        _nothing,
        ("/etc/nvidia/nvidia-application-profiles-rc.d/",),
    ),
    "cache": ("/etc/ld.so.cache", "file", _nothing, ()),
    "cache-of-ldconfig": ("/etc/ld.so.cache", "file", _old_cache, ()),
    "new-cache": ("/etc/ld.so.cache", "file", _no_cache, ()),
}


def _for_link(path: Path, target: Path) -> None:
    with suppress(FileNotFoundError):
        path.rename(path.with_name(f"{path.name}.was"))
    with suppress(FileNotFoundError):
        path.symlink_to(target)


def _final_link(place: Place, path: Path, kind: str) -> None:
    _for_link(path, place.canary / kind)


def _final_other(_: Place, path: Path, kind: str) -> None:
    with suppress(FileNotFoundError):
        path.rename(path.with_name(f"{path.name}.was"))
    with suppress(FileNotFoundError):
        path.touch() if kind == "directory" else path.mkdir()


def _parent_link(place: Place, path: Path, kind: str) -> None:  # noqa: ARG001
    _for_link(path.parent, place.canary / "directory")


def _above_link(place: Place, path: Path, kind: str) -> None:  # noqa: ARG001
    if path.parent.parent != place.root:
        _for_link(path.parent.parent, place.canary / "directory")


SWAPS = {"link": _final_link, "other": _final_other, "parent": _parent_link, "above": _above_link}


@contextmanager
def _accomplice(act: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """A process in the host's mount namespace, where a mount point of the container's can be renamed; calling what is
    given has it `act`, once, and comes back when that is done."""
    ask, tell = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ask[1])
        if os.read(ask[0], 1):
            with suppress(OSError):  # the tree can be another by then
                act()
            os.write(tell[1], b".")
        os._exit(0)

    def now() -> None:
        with suppress(OSError):  # the child that becomes ldconfig has closed everything
            os.write(ask[1], b".")
            os.read(tell[0], 1)

    try:
        yield now
    finally:
        for fd in (*ask, *tell):
            os.close(fd)
        os.waitpid(child, 0)


_CALLS = {
    kernel: "openat2 open_tree move_mount mount_setattr fsopen fsmount mount umount2 pivot_root",
    os: "open mkdir mknod symlink rename unlink rmdir stat readlink chmod chown fchown fchmod fstatvfs chdir fchdir",
}


@contextmanager
def _before_call(number: int, act: Callable[[], None], counter: mmap.mmap) -> Iterator[None]:
    """Count the system calls of this process and its children; `act` comes before the one of that number."""

    def wrap(original: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*arguments: object, **named: object) -> object:
            (count,) = struct.unpack_from("=Q", counter)
            struct.pack_into("=Q", counter, 0, count + 1)
            if count == number:
                act()
            return original(*arguments, **named)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for module, names in _CALLS.items():
            for name in names.split():
                patch.setattr(module, name, wrap(getattr(module, name)))
        yield


def _is_at(edit: Edit, paths: tuple[str, ...]) -> bool:
    item = edit.describe()
    path = str(item.get("path", item.get("destination", "/etc/ld.so.cache")))
    return any(path == wanted or (wanted.endswith("/") and path.startswith(wanted)) for wanted in paths)


def _swapped_at(
    number: int,
    place: Place,
    name: str,
    swap: str,
    missing: tuple[str, ...],
    apply_all: Callable[[list[Edit], Container], None] = editing.apply,
) -> tuple[Outcome, int]:
    """(what came of it, how many calls there were)."""
    where, kind, arrange, others = EDITS[name]
    arrange(place)
    counter = mmap.mmap(-1, 8)
    with _accomplice(lambda: SWAPS[swap](place, place.root / where[1:], kind)) as act:

        def apply(edits: list[Edit], container: Container) -> None:
            container.in_userns = name == "node-bound"
            wanted = [edit for edit in edits if _is_at(edit, (where, *others))]
            with _before_call(number, act, counter):
                apply_all(wanted, container)

        outcome = place.start(apply=apply, missing=missing)
    return outcome, struct.unpack_from("=Q", counter)[0]


@pytest.mark.parametrize(
    ("swap", "calls"),
    [*((swap, "new-calls") for swap in SWAPS), *((swap, "old-calls") for swap in ("link", "parent"))],
)
@pytest.mark.parametrize("name", EDITS)
def test_swap_before_every_call(settings: Path, tmp_path: Path, name: str, swap: str, calls: str) -> None:
    missing = OLD_KERNEL if calls == "old-calls" else ()
    never = -1
    outcome, count = _swapped_at(never, _place(tmp_path, settings), name, swap, missing)
    assert (outcome.line, outcome.faults) == ("", [])
    assert count >= 3  # a look for the directory, one for the name, and the deed
    for number in range(count):
        place = _place(tmp_path / str(number), settings)
        outside = place.outside()
        outcome, _ = _swapped_at(number, place, name, swap, missing)
        assert outcome.faults == [], f"before call {number}: {outcome.line}"
        assert outside == place.outside(), f"before call {number}: {outcome.line}"


def _place(directory: Path, settings: Path) -> Place:
    directory.mkdir(exist_ok=True)
    return Place(directory, settings)


def test_judge_sees_what_a_naive_program_does(settings: Path, tmp_path: Path) -> None:
    seen = 0
    _, count = _swapped_at(-1, _place(tmp_path, settings), "library", "link", (), hostile.naive)
    for number in range(count):
        place = _place(tmp_path / str(number), settings)
        outside = place.outside()
        outcome, _ = _swapped_at(number, place, "library", "link", (), hostile.naive)
        seen += bool(outcome.faults or outside != place.outside())
    assert seen


# The public shape of CVE-2026-24260: what the hooks create-symlinks and enable-cuda-compat have checked is exchanged

COMPAT = "/usr/local/cuda/compat"
# What is exchanged for a link to the host's canary, and what of that
SHAPES = {
    "link": (LINK, "file"),
    "library": (LIBRARY, "file"),
    "libraries": (LIBRARIES, "directory"),
    "compat": (COMPAT, "directory"),
    "above-compat": ("/usr/local/cuda", "directory"),
    "compat-library": (f"{COMPAT}/libcuda.so.999.1.1", "file"),
    "linker-configuration": ("/etc/ld.so.conf.d", "directory"),
}


def _shape_at(
    number: int,
    place: Place,
    shape: str,
    apply_all: Callable[[list[Edit], Container], None] = editing.apply,
) -> tuple[Outcome, int]:
    """The exchange comes before the system call of that number, of the search for such libraries and of the edits."""
    _old_link(place)
    (place.root / COMPAT[1:]).mkdir(parents=True)
    (place.canary / "directory/compat").mkdir()
    for directory in (place.root / COMPAT[1:], place.canary / "directory", place.canary / "directory/compat"):
        (directory / "libcuda.so.999.1.1").write_text("of the image")
        (directory / "libcuda.so.1").symlink_to("libcuda.so.999.1.1")
    where, kind = SHAPES[shape]
    counter = mmap.mmap(-1, 8)
    with _accomplice(lambda: _for_link(place.root / where[1:], place.canary / kind)) as act:
        search = cuda_compat.find

        def find(*arguments: object) -> str:
            with _before_call(number, act, counter):
                return search(*arguments)  # type: ignore[arg-type]

        def arrange() -> None:
            cuda_compat.find = find  # type: ignore[assignment]  # in the child alone, which ends with it

        def apply(edits: list[Edit], container: Container) -> None:
            with _before_call(number, act, counter):
                apply_all([edit for edit in edits if _is_at(edit, (LIBRARY, LINK, "/etc/ld.so.cache"))], container)

        def watch(edits: list[Edit]) -> None:
            if number < 0:  # the image's directory is of use here
                assert edits[-1].describe()["directories"] == [COMPAT, LIBRARIES]

        outcome = place.start(arrange=arrange, watch=watch, apply=apply)
    return outcome, struct.unpack_from("=Q", counter)[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_public_shape_of_cve_2026_24260(mig_settings: Path, tmp_path: Path, shape: str) -> None:
    outcome, count = _shape_at(-1, _place(tmp_path, mig_settings), shape)
    assert (outcome.line, outcome.faults) == ("", [])
    assert count > 20
    for number in range(count):
        place = _place(tmp_path / str(number), mig_settings)
        outcome, _ = _shape_at(number, place, shape)
        assert outcome.faults == [], f"before call {number}: {outcome.line}"
        assert sorted(str(path.relative_to(place.canary)) for path in place.canary.rglob("*")) == [
            "directory",
            "directory/compat",
            *(f"directory/compat/libcuda.so.{version}" for version in ("1", "999.1.1")),
            *(f"directory/libcuda.so.{version}" for version in ("1", "999.1.1")),
            *("file", "node", "socket"),
        ]
        assert (place.canary / "file").read_text() == "the host's"
        assert (place.canary / "directory/libcuda.so.999.1.1").read_text() == "of the image"


# As many as the machine can

# In a volume of the tree: what is exchanged there all the time -> with what it is.
_PAIRS = {
    LIBRARIES: "directory",
    f"{LIBRARIES}/libcuda.so.{VERSION}": "file",  # a target, and the source of the link's cover
    LINK: "file",
    f"{LIBRARIES}/gbm": "directory",
    "/usr/bin/nvidia-smi": "file",
    f"/lib/firmware/nvidia/{VERSION}": "directory",
    "/etc/nvidia": "directory",
    "/etc/ld.so.cache": "file",
    "/etc/vulkan/icd.d": "directory",
    "/run/nvidia-persistenced": "directory",
    "/dev/nvidia0": "node",
    "/dev/dri": "directory",
    "/tmp/nvidia-mps": "directory",
}


def _with_twins(place: Place, number: int) -> list[tuple[bytes, bytes]]:
    """Some paths of the image, and beside each a link to the host's canary, which it can be exchanged with.

    Not all of them: one would be a link whenever it is come to, and nothing after it tried.
    """
    pairs = []
    for where in random.Random(number).sample(sorted(_PAIRS), 1 + number % 3):
        path, kind = place.root / where[1:], _PAIRS[where]
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(path):
            path.mkdir() if kind == "directory" else path.touch()
        twin = path.with_name(f"{path.name}.twin")
        twin.symlink_to(place.canary / kind)
        pairs.append((bytes(path), bytes(twin)))
    return pairs


@contextmanager
def _swapper(
    pairs: list[tuple[bytes, bytes]], counter: mmap.mmap
) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """A process that exchanges `pairs` and counts, between the calls of the two that are given."""
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
        count = struct.unpack_from("=Q", counter)[0]
        order = random.Random(count)
        while True:
            one, other = pairs[order.randrange(len(pairs))]
            with suppress(OSError):  # one above it is a link to somewhere else at the moment
                kernel._syscall(_RENAMEAT2, kernel.AT_FDCWD, one, kernel.AT_FDCWD, other, _RENAME_EXCHANGE)
                count += 1
                struct.pack_into("=Q", counter, 0, count)

    pidfd = os.pidfd_open(child)
    os.waitpid(child, os.WUNTRACED)

    def stop() -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        select.select([pidfd], [], [])  # the hook's process is not its parent, and cannot wait for it otherwise

    try:
        yield lambda: signal.pidfd_send_signal(pidfd, signal.SIGCONT), stop
    finally:
        stop()
        os.waitpid(child, 0)
        os.close(pidfd)


@pytest.mark.parametrize("calls", ["new-calls", "old-calls"])
def test_swaps_without_end(settings: Path, tmp_path: Path, calls: str) -> None:
    """Nothing but the plan is mounted, and below the root; the canary and the host are as they were."""
    missing = OLD_KERNEL if calls == "old-calls" else ()
    counter = mmap.mmap(-1, 8)
    starts = refused = 0
    end = time.monotonic() + SECONDS / 2
    while time.monotonic() < end:
        place = _place(tmp_path / str(starts), settings)
        outside = place.outside()
        with _swapper(_with_twins(place, starts), counter) as (go, stop):

            def apply(edits: list[Edit], container: Container) -> None:
                try:
                    editing.apply(edits, container)
                finally:
                    stop()  # the judge wants to find things where they are

            outcome = place.start(watch=lambda _: go(), apply=apply, missing=missing)
        starts += 1
        refused += bool(outcome.line)
        assert outcome.faults == [], outcome.line
        assert outside == place.outside(), outcome.line
    swaps = struct.unpack_from("=Q", counter)[0]
    print(f"{calls}: {starts} starts, {refused} of them refused, {swaps} swaps")
    assert swaps > 100 * SECONDS


def test_swaps_while_containers_start(shop: Workshop, settings: Path) -> None:
    """Through the wrapper and runc; nothing of it is seen on the host, and who is refused is told a place by us."""
    counter = mmap.mmap(-1, 8)
    starts = refused = 0
    end = time.monotonic() + SECONDS / 2
    mounts = Path("/proc/self/mountinfo").read_text()
    while time.monotonic() < end:
        bundle = shop.bundle().write(["/bin/cat", "/proc/self/mountinfo"], hostile.EVERYTHING)
        place = Place(shop.new("place"), settings, bundle.rootfs)
        outside = place.outside()
        with _swapper(_with_twins(place, starts), counter) as (go, _):
            go()
            result = bundle.run(settings)
        starts += 1
        refused += result.returncode != 0
        assert not result.returncode or re.search(r"(mount|ldcache) error: .*`/", result.stderr), result.stderr
        assert "/canary/" not in result.stdout
        assert outside == place.outside()
        assert mounts == Path("/proc/self/mountinfo").read_text()
    print(f"containers: {starts} starts, {refused} of them refused, {struct.unpack_from('=Q', counter)[0]} swaps")
