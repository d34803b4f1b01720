# SPDX-License-Identifier: Apache-2.0
"""An image against the host's ldconfig: what it has to read, what it has to walk through, and what it runs from.

Time and memory are bounded, the program's file on the host stays as it is, and nothing outside of the tree is read or
written (CVE-2024-0135, -0136, -0137, CVE-2025-23267).
"""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from containers import Workshop, make_image
from nvhook.linux import ldconfig
from test_ldconfig import PROGRAM, cached, run
from test_seccomp import CALLS, build_probe

pytestmark = pytest.mark.root

LIBRARIES = f"usr/lib/{os.uname().machine}-linux-gnu"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image("debian", tmp_path_factory.mktemp("image") / "rootfs")


@pytest.fixture
def rootfs(tmp_path: Path, image: Path) -> Path:
    return Path(shutil.copytree(image, tmp_path / "rootfs", symlinks=True))


def _sparse(path: Path, size: int = 8 << 30) -> None:
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(size)


def _conf(text: str) -> Callable[[Path], None]:
    def write(rootfs: Path) -> None:
        (rootfs / "etc/ld.so.conf").write_text(text)

    return write


def _deep_includes(rootfs: Path) -> None:
    """Every file includes all of them."""
    for number in range(200):
        (rootfs / f"etc/ld.so.conf.d/{number}.conf").write_text("include /etc/ld.so.conf.d/*.conf\n")


def _many_directories(rootfs: Path) -> None:
    (rootfs / "etc/ld.so.conf").write_text("".join(f"/d/{number}\n" for number in range(20000)))
    (rootfs / "d").mkdir()
    for number in range(2000):
        (rootfs / f"d/{number}").mkdir()


def _sparse_conf(rootfs: Path) -> None:
    _sparse(rootfs / "etc/ld.so.conf")


def _sparse_library(rootfs: Path) -> None:
    _sparse(rootfs / LIBRARIES / "libsparse.so.1", 1 << 40)


def _special_libraries(rootfs: Path) -> None:
    place = rootfs / LIBRARIES
    os.mkfifo(place / "libpipe.so.1")
    os.mknod(place / "libzero.so.1", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    (place / "libproc.so.1").symlink_to("/proc/self/exe")
    (place / "libloop.so.1").symlink_to("libloop.so.1")
    (place / "libup.so.1").symlink_to("../" * 30 + "etc/shadow")
    (place / "libdirectory.so.1").mkdir()


def _elf_that_lies(rootfs: Path) -> None:
    whole = (rootfs / LIBRARIES / "libm.so.6").read_bytes()
    (rootfs / LIBRARIES / "libcut.so.1").write_bytes(whole[:100])
    (rootfs / LIBRARIES / "libhuge.so.1").write_bytes(whole[:32] + b"\xff" * 200 + whole[232:4096])


TRAPS = [
    pytest.param(_conf("include /proc/*/*/*/*\n"), id="includes-of-proc"),
    pytest.param(_conf("include /*/*/*/*/*/*/*/*\n"), id="glob-of-everything"),
    pytest.param(_conf("include " + "{*,*}/" * 12 + "\n"), id="braces"),
    pytest.param(_conf("include " + "*/../" * 20 + "\n"), id="glob-there-and-back"),
    pytest.param(_conf("/proc/self/root\n/dev\n/sys/kernel\n/../../../../etc\n"), id="directories-outside"),
    pytest.param(_conf("x" * (4 << 20)), id="one-line-of-megabytes"),
    pytest.param(_conf("include /etc/ld.so.conf\n" * 1000), id="includes-itself"),
    pytest.param(_conf("hwcap 0 nosegneg\n" * 100000), id="old-words"),
    pytest.param(_sparse_conf, id="conf-of-gigabytes"),
    pytest.param(_deep_includes, id="includes-of-includes"),
    pytest.param(_many_directories, id="directories-by-thousands"),
    pytest.param(_sparse_library, id="library-of-a-terabyte"),
    pytest.param(_special_libraries, id="libraries-that-are-none"),
    pytest.param(_elf_that_lies, id="libraries-that-lie"),
]


@pytest.mark.parametrize("trap", TRAPS)
def test_tree_that_is_a_trap(
    rootfs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trap: Callable[[Path], None]
) -> None:
    """A cache or a line that says why not, in time and in the child's memory; nothing beside the tree is touched."""
    monkeypatch.setattr(ldconfig, "_SECONDS", 2)
    (tmp_path / "canary").write_text("untouched")
    trap(rootfs)
    before = (rootfs / "etc/ld.so.cache").read_bytes()
    begin = time.monotonic()
    said = run(rootfs, PROGRAM, f"/{LIBRARIES}")
    assert time.monotonic() - begin < 4
    assert sorted(os.listdir(tmp_path)) == ["canary", "rootfs"]
    assert (tmp_path / "canary").read_text() == "untouched"
    if said:
        assert "\n" not in said
        assert before == (rootfs / "etc/ld.so.cache").read_bytes()
    else:
        assert "libc.so.6" in cached(rootfs)
    # In KiB, of the largest process until now: mapped libraries are pages of files.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 400 << 10


def test_directory_of_many_names(rootfs: Path) -> None:
    """ldconfig opens each of 100,000."""
    place = rootfs / "opt/many"
    place.mkdir(parents=True)
    for number in range(100_000):
        first = place / f"libm{number - number % 50_000}.so.6"  # a file has 65,000 names at most
        if number % 50_000:
            os.link(first, place / f"libm{number}.so.6")
        else:
            shutil.copy(rootfs / LIBRARIES / "libm.so.6", first)
    begin = time.monotonic()
    said = run(rootfs, PROGRAM, "/opt/many")
    assert time.monotonic() - begin < 12
    assert said in ("", "not finished after 10 s")
    if not said:
        assert cached(rootfs)["libm.so.6"].startswith("/opt/many/")  # they all say that this is their name


CACHES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _whole: b"",
    "truncated": lambda whole: whole[: len(whole) // 2],
    "offsets-outside": lambda whole: whole[:48] + b"\xff" * (len(whole) - 48),
    "count-of-billions": lambda whole: whole[:20] + b"\xff\xff\xff\x7f" + whole[24:],
    "strings-of-billions": lambda whole: whole[:24] + b"\xff\xff\xff\x7f" + whole[28:],
    "big-endian": lambda whole: whole[:28] + b"\x03" + whole[29:],
    "zeros": lambda whole: bytes(len(whole)),
    "old-format": lambda _whole: b"ld.so-1.7.0\0" + b"\xff" * 100,
}
LIST = ["/bin/sh", "-ec", "nvidia-smi -L"]
ALL = {"NVIDIA_VISIBLE_DEVICES": "all"}


@pytest.mark.parametrize("damage", CACHES.values(), ids=CACHES)
def test_start_with_a_cache_that_is_none(shop: Workshop, damage: Callable[[bytes], bytes]) -> None:
    """The container's programs find the driver: ldconfig has made another."""
    bundle = shop.bundle().write(LIST, ALL)
    cache = bundle.rootfs / "etc/ld.so.cache"
    cache.write_bytes(damage(cache.read_bytes()))
    result = bundle.run(shop.config("a100x2"))
    assert (result.returncode, result.stdout.count("GPU ")) == (0, 2), result.stderr


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.unlink()
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))


def _watchdog(path: Path) -> None:
    """To open it is to use it."""
    path.unlink()
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(10, 130))


@pytest.mark.parametrize("make", [_fifo, _device, _watchdog, _sparse], ids=["fifo", "zero", "watchdog", "8-gigabytes"])
def test_start_with_a_cache_that_is_no_cache(shop: Workshop, make: Callable[[Path], None]) -> None:
    """At once a line that names the path, and the image's object is still the one it was."""
    bundle = shop.bundle().write(LIST, ALL)
    cache = bundle.rootfs / "etc/ld.so.cache"
    make(cache)
    before = cache.lstat()
    begin = time.monotonic()
    result = bundle.run(shop.config("a100x2"))
    assert time.monotonic() - begin < 5
    assert result.returncode != 0
    assert "ldcache error: make `/etc/ld.so.cache` of " in result.stderr
    assert os.path.samestat(before, cache.lstat())


# What it runs from


def _reopener(stop: threading.Event, opened: list[str], found: list[str]) -> None:
    """As a program in the container that sees the host's processes would: every ldconfig, for writing."""
    while not stop.is_set():
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            try:
                if not Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ldconfig\0-X"):
                    continue
                found.append(os.readlink(f"/proc/{pid}/exe"))
                fd = os.open(f"/proc/{pid}/exe", os.O_WRONLY)
            except OSError:
                continue
            opened.append(pid)
            os.close(fd)


def test_program_cannot_be_reached_through_its_process(rootfs: Path) -> None:
    """CVE-2019-5736: what is found there is a sealed copy in memory. As the host's root, which may open more."""
    before = hashlib.sha256(Path(PROGRAM).read_bytes()).hexdigest()
    place = rootfs / "opt/many"
    place.mkdir(parents=True)
    shutil.copy(rootfs / LIBRARIES / "libm.so.6", place / "libm.so.6")
    for number in range(3000):  # so that there is time
        os.link(place / "libm.so.6", place / f"libm{number}.so.6")
    stop, opened, found = threading.Event(), list[str](), list[str]()
    thread = threading.Thread(target=_reopener, args=(stop, opened, found))
    thread.start()
    try:
        for _ in range(5):
            assert run(rootfs, PROGRAM, "/opt/many") == ""
    finally:
        stop.set()
        thread.join()
    assert set(found) == {"/memfd:ldconfig (deleted)"}
    assert opened == []
    assert before == hashlib.sha256(Path(PROGRAM).read_bytes()).hexdigest()


WRITER = r"""
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>
int main(void)
{
    int ways = 0;
    ways += open("/proc/self/exe", O_RDWR) >= 0;
    ways += write(3, "x", 1) == 1;
    ways += ftruncate(3, 0) == 0;
    ways += lseek(3, 0, SEEK_SET) == 0 && write(3, "x", 1) == 1;
    printf("ways=%d\n", ways);
    fflush(stdout);
    return 1;
}
"""


def test_program_cannot_change_itself(rootfs: Path, tmp_path: Path) -> None:
    (tmp_path / "writer.c").write_text(WRITER)
    subprocess.run(
        ["cc", "-static", "-o", str(tmp_path / "writer"), str(tmp_path / "writer.c")], check=True, capture_output=True
    )
    before = (tmp_path / "writer").read_bytes()
    assert run(rootfs, str(tmp_path / "writer")) == "ways=0"
    assert before == (tmp_path / "writer").read_bytes()


@pytest.mark.parametrize("name", CALLS)
def test_program_that_is_another_may_not(rootfs: Path, tmp_path: Path, name: str) -> None:
    """Whoever took ldconfig over by a library that it misreads: no network, no tracing, no mounts, no keys."""
    assert run(rootfs, build_probe(tmp_path, name)) == f"{name}: EPERM"
