# SPDX-License-Identifier: Apache-2.0
"""Symbol versions against files of elfwriter, against this machine's own C library, and against damage."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from nvhook.linux import symver
from simhost import elfwriter
from simhost.compiler import native_machine

NEEDS = {"libc.so.6": ["GLIBC_2.2.5", "GLIBC_2.27"], "libm.so.6": ["GLIBC_2.29"]}
DEFINES = ("libx.so.1", "X_1.0", "X_1.1")


def _read(path: Path) -> tuple[list[str], list[str]]:
    fd = os.open(path, os.O_RDONLY)
    try:
        versions = symver.read(fd)
        assert versions is not None
        return versions.defined(), versions.needed()
    finally:
        os.close(fd)


@pytest.mark.parametrize("machine", ["x86-64", "i386", "aarch64"])
def test_names(tmp_path: Path, machine: str) -> None:
    path = tmp_path / "libx.so.1"
    path.write_bytes(elfwriter.shared_object("libx.so.1", list(NEEDS), machine=machine, needs=NEEDS, defines=DEFINES))
    assert (list(DEFINES), ["GLIBC_2.2.5", "GLIBC_2.27", "GLIBC_2.29"]) == _read(path)


def test_library_without_versions(tmp_path: Path) -> None:
    path = tmp_path / "libx.so.1"
    path.write_bytes(elfwriter.shared_object("libx.so.1", ["libc.so.6"]))
    assert _read(path) == ([], [])


def test_c_library_of_this_machine() -> None:
    maps = Path("/proc/self/maps").read_text().split("\n")
    path = next(line.split()[-1] for line in maps if "/libc.so.6" in line or "/libc-2" in line)
    defined, _ = _read(Path(path))
    version = os.confstr("CS_GNU_LIBC_VERSION")
    assert version is not None
    assert tuple(map(int, version.split()[1].split("."))) == symver.newest(defined, "GLIBC_")


@pytest.mark.parametrize(("version", "loads"), [("GLIBC_2.2.5", True), ("GLIBC_9.9", False)])
def test_dynamic_linker_reads_the_same(tmp_path: Path, version: str, loads: bool) -> None:
    if native_machine() != "x86-64" and loads:
        version = "GLIBC_2.17"  # the first for every other machine here
    path = tmp_path / "libx.so.1"
    needs = {"libc.so.6": [version]}
    path.write_bytes(elfwriter.shared_object("libx.so.1", ["libc.so.6"], machine=native_machine(), needs=needs))
    assert _read(path)[1] == [version]
    if loads:
        ctypes.CDLL(str(path))
    else:
        with pytest.raises(OSError, match=version):
            ctypes.CDLL(str(path))


@pytest.mark.parametrize(
    ("names", "newest"),
    [
        pytest.param(["GLIBC_2.9", "GLIBC_2.10", "GLIBC_2.2.5"], (2, 10), id="by-number"),
        pytest.param(["GLIBC_PRIVATE", "GLIBC_ABI_DT_RELR", "GLIBC_2.4"], (2, 4), id="words"),
        pytest.param(["LIBX_9.9"], (), id="of-another-library"),
        pytest.param(["GLIBC_" + "9" * 5000, "GLIBC_2.1"], (2, 1), id="too-many-digits"),
        pytest.param(["GLIBC_2.\u0663"], (2, 3), id="digits-of-another-script"),
        pytest.param(["GLIBC_"], (), id="no-number"),
        pytest.param([], (), id="none"),
    ],
)
def test_newest(names: list[str], newest: tuple[int, ...]) -> None:
    assert newest == symver.newest(names, "GLIBC_")


def _versions(data: bytes, tmp_path: Path) -> list[str] | None:
    path = tmp_path / "file"
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    try:
        versions = symver.read(fd)
        return None if versions is None else versions.defined() + versions.needed()
    finally:
        os.close(fd)


@pytest.mark.parametrize("data", [b"", b"\x7fEL", b"#!/bin/sh\n", b"\x7fELF\x02\x02" + bytes(60)])
def test_no_elf_file(tmp_path: Path, data: bytes) -> None:
    assert _versions(data, tmp_path) is None


@pytest.mark.parametrize("machine", ["x86-64", "i386"])
def test_any_byte_may_be_wrong(tmp_path: Path, machine: str) -> None:
    """It is names, or ValueError; never another fault, and never a long time."""
    whole = elfwriter.shared_object("libx.so.1", list(NEEDS), machine=machine, needs=NEEDS, defines=DEFINES)
    for place in range(len(whole)):
        for data in (whole[:place], whole[:place] + b"\xff" + whole[place + 1 :]):
            try:
                _versions(data, tmp_path)
            except ValueError:
                continue
