# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import os
import platform
import random
import shutil
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import given, settings
from hypothesis import strategies as st

from nvhook.linux import elf, symver
from simhost import elfwriter

MACHINE = {"x86_64": "x86-64", "aarch64": "aarch64", "ppc64le": "ppc64le"}.get(platform.machine(), "")
SOME = elfwriter.shared_object("libsome.so.1", ["libone.so.1", "libtwo.so.2"], abi=[2, 3, 99])

# Where the fields of a 64-bit header and of its program headers stand (elf(5)).
E_TYPE, E_MACHINE, E_PHOFF, E_SHOFF, E_PHENTSIZE, E_PHNUM = 16, 18, 32, 40, 54, 56
P_OFFSET, P_VADDR, P_FILESZ = 8, 16, 32
PT_LOAD, PT_DYNAMIC, PT_NOTE = 1, 2, 4
DT_RPATH, DT_RUNPATH = 15, 29


def read(data: bytes) -> elf.Elf | None:
    return elf.read(io.BytesIO(data))


def some(**changes: int) -> bytes:
    """SOME with other values in its header: offset of the field -> value."""
    data = bytearray(SOME)
    for name, value in changes.items():
        struct.pack_into({"E_PHOFF": "<Q", "E_SHOFF": "<Q"}.get(name, "<H"), data, globals()[name], value)
    return bytes(data)


def segment(kind: int) -> int:
    """Where SOME's first program header of that kind stands."""
    (count,) = struct.unpack_from("<H", SOME, E_PHNUM)
    places = range(64, 64 + 56 * count, 56)
    return next(place for place in places if struct.unpack_from("<I", SOME, place) == (kind,))


def with_segment(kind: int, field: int, value: int, *, size: int | None = None) -> bytes:
    """SOME with a field of that program header changed, and its size too."""
    data = bytearray(SOME)
    struct.pack_into("<Q", data, segment(kind) + field, value)
    if size is not None:
        struct.pack_into("<Q", data, segment(kind) + P_FILESZ, size)
    return bytes(data)


def with_dynamic(*entries: tuple[int, int]) -> bytes:
    """SOME with other entries at the start of its dynamic segment; the rest of it stays behind them."""
    data = bytearray(SOME)
    (offset,) = struct.unpack_from("<Q", data, segment(PT_DYNAMIC) + P_OFFSET)
    for number, entry in enumerate(entries):
        struct.pack_into("<qQ", data, offset + 16 * number, *entry)
    return bytes(data)


def fields(found: elf.Elf | None) -> tuple[object, ...]:
    assert found is not None
    return found.bits, found.machine, found.kind, found.soname, found.needed, found.abi


def library(name: str) -> Path:
    """Where the system's linker finds `name`."""
    ldconfig = shutil.which("ldconfig", path="/sbin:/usr/sbin:/usr/bin:/bin")
    if ldconfig is None:
        pytest.skip("no ldconfig here")
    text = subprocess.run([ldconfig, "-p"], check=True, capture_output=True, text=True).stdout
    for line in text.splitlines():
        if line.split()[:1] == [name] and platform.machine().replace("_", "-") in line.replace("AArch64", "aarch64"):
            return Path(line.rpartition(" => ")[2])
    pytest.skip(f"no {name} in the linker cache")


def test_read_program_of_the_system() -> None:
    with Path("/bin/ls").open("rb") as stream:
        found = elf.read(stream)
    assert found is not None
    assert (found.bits, found.machine, found.kind, found.soname) == (64, MACHINE, "executable", None)
    assert any(name.startswith("libc.") for name in found.needed)
    assert os.path.exists(found.interpreter)


def test_read_libc_of_the_system() -> None:
    # It can be run, and has an interpreter for that.
    with library("libc.so.6").open("rb") as stream:
        found = elf.read(stream)
    assert found is not None
    assert (found.bits, found.machine, found.kind, found.soname) == (64, MACHINE, "shared", "libc.so.6")


@pytest.mark.parametrize("name", ["libc.so.6", "libm.so.6"])
def test_read_what_pyelftools_reads(name: str) -> None:
    """A reader that is not ours, and goes by the section headers."""
    path = library(name)
    with path.open("rb") as stream:
        other = ELFFile(stream)
        sections: dict[str, Any] = {section.name: section for section in other.iter_sections()}
        tags = list(sections[".dynamic"].iter_tags())
        needed = tuple(tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED")
        soname = next(tag.soname for tag in tags if tag.entry.d_tag == "DT_SONAME")
        defined = [next(names).name for _, names in sections[".gnu.version_d"].iter_versions()]
        found = elf.read(stream)
    assert fields(found)[:5] == (other.elfclass, MACHINE, "shared", soname, needed)
    fd = os.open(path, os.O_RDONLY)
    try:
        read_versions = symver.read(fd)
        assert read_versions is not None
        assert read_versions.defined() == defined
    finally:
        os.close(fd)


def test_read_abi_note_of_the_system() -> None:
    found = elf.read(io.BytesIO(library("libc.so.6").read_bytes()))
    assert found is not None
    if found.abi is None:
        pytest.skip("this libc has no ABI note")
    assert (2, 6) <= found.abi[:2] <= (9, 0)


def test_read_descriptor_stays_open() -> None:
    fd = os.open("/bin/ls", os.O_RDONLY)
    try:
        assert fields(elf.read(fd)) == fields(elf.read(fd))
        assert os.fstat(fd).st_size > 0
    finally:
        os.close(fd)


def test_read_directory() -> None:
    fd = os.open("/", os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="directory"):
            elf.read(fd)
    finally:
        os.close(fd)


NOT_ELF = {"empty": b"", "one-byte": b"\x7f", "text": b"#!/bin/sh\nexit 0\n" * 100, "zeros": bytes(4096)}


@pytest.mark.parametrize("data", NOT_ELF.values(), ids=NOT_ELF)
def test_read_not_elf(data: bytes) -> None:
    assert read(data) is None


@pytest.mark.parametrize(("machine", "bits"), [("x86-64", 64), ("i386", 32), ("aarch64", 64)])
def test_read_shared_object(machine: str, bits: int) -> None:
    data = elfwriter.shared_object("liba.so.1", ["libb.so.2", "libc.so.6"], machine=machine, abi=[2, 3, 99])
    assert (bits, machine, "shared", "liba.so.1", ("libb.so.2", "libc.so.6"), (2, 3, 99)) == fields(read(data))


def test_read_program() -> None:
    expected = (64, "x86-64", "executable", None, ("libc.so.6",), None)
    assert expected == fields(read(elfwriter.program(["libc.so.6"])))


def test_read_says_nothing() -> None:
    assert fields(read(elfwriter.shared_object(None, []))) == (64, "x86-64", "shared", None, (), None)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        pytest.param((), (), id="none"),
        pytest.param((DT_RUNPATH,), ("libone.so.1",), id="runpath"),
        pytest.param((DT_RPATH,), ("libone.so.1",), id="rpath"),
        pytest.param((DT_RPATH, DT_RUNPATH), ("libtwo.so.2",), id="runpath-goes-before-rpath"),
    ],
)
def test_read_search_path(tags: tuple[int, ...], expected: tuple[str, ...]) -> None:
    """With the names of two libraries in the place of paths."""
    data = bytearray(SOME)
    (offset,) = struct.unpack_from("<Q", data, segment(PT_DYNAMIC) + P_OFFSET)
    for number, tag in enumerate(tags):
        struct.pack_into("<q", data, offset + 16 * number, tag)
    found = read(bytes(data))
    assert found is not None
    assert found.search == expected


def test_read_interpreter() -> None:
    found = read(elfwriter.program(["libc.so.6"]))
    assert found is not None
    assert found.interpreter == "/lib64/ld-linux-x86-64.so.2"
    library = read(elfwriter.shared_object("liba.so.1", []))
    assert library is not None
    assert library.interpreter == ""


def test_read_without_section_headers() -> None:
    assert fields(read(SOME)) == fields(read(some(E_SHOFF=0)))


def test_read_section_headers_that_lie() -> None:
    assert fields(read(SOME)) == fields(read(some(E_SHOFF=0xFFFFFFFFFFFFFFF0)))


KINDS = {"object-file": (1, "other"), "static": (2, "executable"), "shared": (3, "shared"), "core": (4, "other")}


@pytest.mark.parametrize(("number", "kind"), KINDS.values(), ids=KINDS)
def test_read_kind(number: int, kind: str) -> None:
    found = read(some(E_TYPE=number))
    assert found is not None
    assert kind == found.kind


# riscv64, one that nobody has, and i386 in a 64-bit file
@pytest.mark.parametrize("number", [243, 64999, 3])
def test_read_other_machine(number: int) -> None:
    found = read(some(E_MACHINE=number))
    assert found is not None
    assert str(number) == found.machine


HUGE = 0xFFFFFFFFFFFFFFF0
DT_NULL, DT_NEEDED, DT_STRTAB, DT_STRSZ = 0, 1, 5, 10

DAMAGED = {
    "only-the-magic": (b"\x7fELF", "header is damaged"),
    "header-cut": (SOME[:40], "header is damaged"),
    "no-class": (SOME[:4] + b"\x03" + SOME[5:], "header is damaged"),
    "no-byte-order": (SOME[:5] + b"\x03" + SOME[6:], "header is damaged"),
    "many-segments": (some(E_PHNUM=0xFFFF), "65535 program headers"),
    "small-segments": (some(E_PHENTSIZE=8), "program headers of 8 bytes"),
    "segments-far-out": (some(E_PHOFF=HUGE), "program header table at"),
    "dynamic-far-out": (with_segment(PT_DYNAMIC, P_OFFSET, HUGE), "dynamic segment at"),
    "dynamic-huge": (with_segment(PT_DYNAMIC, P_FILESZ, HUGE), "dynamic segment at"),
    "strings-not-mapped": (with_segment(PT_LOAD, P_VADDR, 0x100000), "in no segment"),
    "no-string-table": (with_dynamic((DT_NEEDED, 1), (DT_NULL, 0)), "names no string table"),
    "string-outside": (with_dynamic((DT_NEEDED, 0xFFFF)), "outside the string table"),
    "string-table-empty": (with_dynamic((DT_NEEDED, 0), (DT_STRTAB, 64), (DT_STRSZ, 0), (DT_NULL, 0)), "outside"),
    "notes-far-out": (with_segment(PT_NOTE, P_OFFSET, HUGE), "note segment at"),
    "name-not-utf8": (SOME.replace(b"libone.so.1", b"lib\xffne.so.1"), "not UTF-8"),
}


@pytest.mark.parametrize(("data", "why"), DAMAGED.values(), ids=DAMAGED)
def test_read_damaged(data: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        read(data)


def test_read_dynamic_without_end_is_bounded() -> None:
    data = with_segment(PT_DYNAMIC, P_OFFSET, len(SOME), size=1 << 20) + struct.pack("<qQ", 21, 0) * (1 << 16)
    with pytest.raises(ValueError, match="no end within"):
        read(data)


def test_read_string_too_long() -> None:
    with pytest.raises(ValueError, match="no end within 4097 bytes"):
        read(elfwriter.shared_object("a" * 4097, []))
    found = read(elfwriter.shared_object("a" * 4096, []))
    assert found is not None
    assert found.soname == "a" * 4096


def test_read_too_many_needed() -> None:
    names = [f"lib{number}.so" for number in range(1025)]
    found = read(elfwriter.shared_object(None, names[:1024]))
    assert found is not None
    assert found.needed == tuple(names[:1024])
    with pytest.raises(ValueError, match="more than 1024"):
        read(elfwriter.shared_object(None, names))


NOTES = {
    # size of the name, size of the description, type, name, description
    "of-another-system": (struct.pack("<III4s4I", 4, 16, 1, b"GNU\0", 1, 2, 3, 99), None),
    "by-another-vendor": (struct.pack("<III4s4I", 4, 16, 1, b"XYZ\0", 0, 2, 3, 99), None),
    "of-another-type": (struct.pack("<III4s4I", 4, 16, 3, b"GNU\0", 0, 2, 3, 99), None),
    "too-short": (struct.pack("<III4s4I", 4, 12, 1, b"GNU\0", 0, 2, 3, 99), None),
    "too-long": (struct.pack("<III4s4I", 4, 0xFFFFFFFF, 1, b"GNU\0", 0, 2, 3, 99), None),
    "name-too-long": (struct.pack("<III4s4I", 0xFFFFFFFF, 16, 1, b"GNU\0", 0, 2, 3, 99), None),
    "whole": (struct.pack("<III4s4I", 4, 16, 1, b"GNU\0", 0, 3, 2, 0), (3, 2, 0)),
}


@pytest.mark.parametrize(("note", "abi"), NOTES.values(), ids=NOTES)
def test_read_note(note: bytes, abi: tuple[int, int, int] | None) -> None:
    own = struct.pack("<III4s4I", 4, 16, 1, b"GNU\0", 0, 2, 3, 99)
    assert SOME.count(own) == 1
    found = read(SOME.replace(own, note))
    assert found is not None
    assert abi == found.abi


def read_or_refuse(data: bytes) -> None:
    begin = time.monotonic()
    refusal: type[ValueError] = ValueError
    try:
        read(data)
    except ValueError as error:
        refusal = type(error)
    assert refusal is ValueError  # not a decoding error, which is one too
    assert time.monotonic() - begin < 2


def samples() -> list[bytes]:
    program = Path("/bin/ls").read_bytes()
    return [SOME, elfwriter.shared_object("liba.so.1", ["libb.so.2"], machine="i386", abi=[2, 6, 32]), program]


@pytest.mark.parametrize("number", range(3))
def test_read_truncated(number: int) -> None:
    data = samples()[number]
    for length in [*range(1024), *range(1024, len(data), max(1, len(data) // 500))]:
        read_or_refuse(data[:length])


@pytest.mark.parametrize("number", range(3))
def test_read_changed_bytes(number: int) -> None:
    chance = random.Random(number)
    original = samples()[number]
    for turn in range(600):
        data = bytearray(original)
        # every other turn where it matters: the headers
        limit = min(1024, len(data)) if turn % 2 else len(data)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(limit)] = chance.choice([0, 1, 0x7F, 0xFF, chance.randrange(256)])
        read_or_refuse(bytes(data))


@settings(deadline=2000)
@given(st.binary(max_size=300))
def test_read_any_bytes(data: bytes) -> None:
    read_or_refuse(data)
    read_or_refuse(SOME[:16] + data)
    read_or_refuse(SOME[:64] + data)


def test_read_large_file_in_pieces(tmp_path: Path) -> None:
    class Counting(io.FileIO):
        count = 0

        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size)
            self.count += len(data or b"")
            return data or b""

    path = tmp_path / "large.so"
    path.write_bytes(SOME)
    os.truncate(path, 1 << 30)
    with Counting(path) as stream:
        assert fields(read(SOME)) == fields(elf.read(stream))
        assert stream.count < 64 << 10
