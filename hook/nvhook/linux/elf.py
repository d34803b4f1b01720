# SPDX-License-Identifier: Apache-2.0
"""What a shared object says about itself: for which machine it is, its name, what it needs (elf(5), gABI chapter 5).

Not for symbols, sections or debugging data. Only program headers and what they lead to are read, as a dynamic linker
does: section headers may be missing or wrong, and a library of 90 MB costs some 10 kB of reading. The file may be
hostile, so every offset is held against the file's size and every count against a limit before it is followed.

pyelftools knows the layouts. Its own walks (segments, notes) are not used: they go through all the section headers,
and sizes in the file decide how much they read.
"""

from __future__ import annotations

import os
import struct

_MAX_SEGMENTS = 256
_MAX_DYNAMIC = 64 << 10  # bytes; libLLVM has 600
_MAX_NOTES = 64 << 10  # bytes
_MAX_NEEDED = 1024
_MAX_STRING = 4096  # bytes, without the NUL

_TEXTS = ("DT_NEEDED", "DT_RPATH", "DT_RUNPATH", "DT_SONAME")

# The machines that have a driver, in the only class and byte order that it comes in; x32 is none of them.
_MACHINES = {
    ("EM_X86_64", 64, True): "x86-64",
    ("EM_386", 32, True): "i386",
    ("EM_AARCH64", 64, True): "aarch64",
    ("EM_PPC64", 64, True): "ppc64le",
}

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, BinaryIO  # noqa: TID251 - never at run time


class Elf:
    """`bits` 32 or 64; `machine` x86-64, i386, aarch64, ppc64le, or the number of any other as text.

    `soname` and `needed` are DT_SONAME and DT_NEEDED in the file's order. `abi` is the oldest Linux that the GNU ABI
    note asks for, as three numbers. `kind` is `shared`, `executable`, or `other` (object file, core). A program is
    told from a library by its interpreter, but libc.so.6 has one too: what has a SONAME is a library.

    interpreter   the dynamic linker that starts it, or empty
    search        where that looks for libraries first: DT_RUNPATH, else DT_RPATH
    """

    __slots__ = ("abi", "bits", "interpreter", "kind", "machine", "needed", "search", "soname")

    def __init__(
        self,
        bits: int,
        machine: str,
        kind: str,
        soname: str | None,
        needed: tuple[str, ...],
        abi: tuple[int, int, int] | None,
        *,
        interpreter: str = "",
        search: tuple[str, ...] = (),
    ) -> None:
        self.interpreter = interpreter
        self.search = search
        self.bits = bits
        self.machine = machine
        self.kind = kind
        self.soname = soname
        self.needed = needed
        self.abi = abi


def read(source: int | BinaryIO) -> Elf | None:
    """What the ELF file `source` says, or None if it is no ELF file.

    `source` is a descriptor or a seekable binary stream; it stays open and its position changes. ValueError says what
    is damaged; OSError is the system's.
    """
    if not isinstance(source, int):
        return _read(_File(source))
    # Without a buffer: what is read lies far apart.
    with open(source, "rb", buffering=0, closefd=False) as stream:
        return _read(_File(stream))


def _read(file: _File) -> Elf | None:
    if file.start(4) != b"\x7fELF":
        return None
    header, structs = _header(file)
    segments = _segments(file, header, structs)
    texts = _dynamic(file, segments, structs)
    soname = next(iter(texts["DT_SONAME"]), None)
    search = next(iter(texts["DT_RUNPATH"] or texts["DT_RPATH"]), "")
    has_interpreter = any(segment["p_type"] == "PT_INTERP" for segment in segments)
    return Elf(
        structs.elfclass,
        _machine(header, structs),
        _kind(header["e_type"], is_program=has_interpreter and soname is None),
        soname,
        tuple(texts["DT_NEEDED"]),
        _abi(file, segments, structs),
        interpreter=_interpreter(file, segments),
        search=tuple(path for path in search.split(":") if path),
    )


class _File:
    """Reads pieces of a stream that lie wholly inside it."""

    def __init__(self, stream: Any) -> None:  # a raw or a buffered stream
        self._stream = stream
        self.size: int = stream.seek(0, os.SEEK_END)

    def start(self, length: int) -> bytes:
        """The first bytes; fewer where the file is shorter."""
        return self.piece(0, min(length, self.size), "start")

    def piece(self, offset: int, length: int, what: str) -> bytes:
        """`length` bytes at `offset`; ValueError names `what` lies outside the file."""
        if offset + length > self.size:  # neither is negative: the fields of an ELF file are unsigned
            raise ValueError(f"{what} at {offset:#x} lies outside the file of {self.size} bytes")
        self._stream.seek(offset)
        data = bytearray()
        while len(data) < length:
            chunk = self._stream.read(length - len(data))
            if not chunk:
                raise ValueError(f"{what} at {offset:#x} ends early: the file became shorter")
            data += chunk
        return bytes(data)


def _header(file: _File) -> tuple[Any, Any]:
    """(the ELF header, pyelftools' layouts for this class and byte order)."""
    # Inside: 50 ms to import, and needed once per driver, not once per container.
    from io import BytesIO

    from elftools.elf.elffile import ELFFile

    try:
        elffile = ELFFile(BytesIO(file.start(64)))  # the header of the 64-bit class has 64 bytes
    except Exception as error:  # ELFError, AssertionError, KeyError, …: all mean the same, and none is documented
        raise ValueError(f"the ELF header is damaged: {error}") from None
    return elffile.header, elffile.structs


def _segments(file: _File, header: Any, structs: Any) -> list[Any]:
    """The program headers."""
    count, size = header["e_phnum"], header["e_phentsize"]
    if count == 0:
        return []
    if count > _MAX_SEGMENTS:
        raise ValueError(f"{count} program headers, more than {_MAX_SEGMENTS}")
    if size != structs.Elf_Phdr.sizeof():
        raise ValueError(f"program headers of {size} bytes, not {structs.Elf_Phdr.sizeof()}")
    return _records(structs.Elf_Phdr, file.piece(header["e_phoff"], count * size, "program header table"))


def _records(layout: Any, data: bytes) -> list[Any]:
    """As many whole records as `data` holds."""
    size = layout.sizeof()
    return [layout.parse(data[place : place + size]) for place in range(0, len(data) - size + 1, size)]


def _machine(header: Any, structs: Any) -> str:
    from elftools.elf.enums import ENUM_E_MACHINE

    machine = header["e_machine"]  # pyelftools' name, or the number where it has none
    known = _MACHINES.get((machine, structs.elfclass, structs.little_endian))
    return known or str(ENUM_E_MACHINE.get(machine, machine))


def _kind(elf_type: Any, *, is_program: bool) -> str:
    if elf_type == "ET_EXEC" or (elf_type == "ET_DYN" and is_program):
        return "executable"
    return "shared" if elf_type == "ET_DYN" else "other"


def _interpreter(file: _File, segments: list[Any]) -> str:
    segment = next((item for item in segments if item["p_type"] == "PT_INTERP"), None)
    if segment is None:
        return ""
    return _string(file, segment["p_offset"], segment["p_filesz"], 0)


def _dynamic(file: _File, segments: list[Any], structs: Any) -> dict[str, list[str]]:
    """Tag -> texts; all empty of a file without a dynamic segment: object files, static programs."""
    segment = next((item for item in segments if item["p_type"] == "PT_DYNAMIC"), None)
    if segment is None:
        return {tag: [] for tag in _TEXTS}
    size = min(segment["p_filesz"], _MAX_DYNAMIC)
    wanted: list[tuple[str, int]] = []
    table: dict[str, int] = {}
    for entry in _records(structs.Elf_Dyn, file.piece(segment["p_offset"], size, "dynamic segment")):
        tag, value = entry["d_tag"], entry["d_val"]
        if tag == "DT_NULL":
            break
        if tag in _TEXTS:
            wanted.append((tag, value))
        elif tag in ("DT_STRTAB", "DT_STRSZ"):
            table[tag] = value
    else:
        if segment["p_filesz"] > _MAX_DYNAMIC:
            raise ValueError(f"the dynamic segment has no end within {_MAX_DYNAMIC} bytes")
    return _texts(file, wanted, table, segments)


def _texts(
    file: _File, wanted: list[tuple[str, int]], table: dict[str, int], segments: list[Any]
) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {tag: [] for tag in _TEXTS}
    if len(wanted) > _MAX_NEEDED:
        raise ValueError(f"more than {_MAX_NEEDED} needed libraries")
    if wanted:
        start, size = _string_table(table, segments)
        for tag, offset in wanted:
            texts[tag].append(_string(file, start, size, offset))
    return texts


def _string_table(table: dict[str, int], segments: list[Any]) -> tuple[int, int]:
    """(offset in the file, bytes) of the dynamic string table, whose address is that in memory."""
    if "DT_STRTAB" not in table or "DT_STRSZ" not in table:
        raise ValueError("the dynamic segment names no string table")
    address = table["DT_STRTAB"]
    for segment in segments:
        place = address - segment["p_vaddr"]
        if segment["p_type"] == "PT_LOAD" and 0 <= place < segment["p_filesz"]:
            return segment["p_offset"] + place, min(table["DT_STRSZ"], segment["p_filesz"] - place)
    raise ValueError(f"the string table at address {address:#x} is in no segment of the file")


def _string(file: _File, start: int, size: int, offset: int) -> str:
    if offset >= size:
        raise ValueError(f"string {offset:#x} lies outside the string table of {size} bytes")
    length = min(_MAX_STRING + 1, size - offset)
    text, end, _ = file.piece(start + offset, length, "string").partition(b"\0")
    if not end:
        raise ValueError(f"string {offset:#x} has no end within {length} bytes")
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise ValueError(f"string {offset:#x} is not UTF-8") from None


def _abi(file: _File, segments: list[Any], structs: Any) -> tuple[int, int, int] | None:
    """The Linux version of the first GNU ABI note."""
    for segment in segments:
        if segment["p_type"] == "PT_NOTE":
            # Bytes beyond the limit are a core's; what is asked for stands at the start of a library.
            size = min(segment["p_filesz"], _MAX_NOTES)
            data = file.piece(segment["p_offset"], size, "note segment")
            found = _abi_among(data, 8 if segment["p_align"] == 8 else 4, structs)
            if found:
                return found
    return None


def _abi_among(data: bytes, align: int, structs: Any) -> tuple[int, int, int] | None:
    """`data` is a row of notes: sizes of name and description, type; name; description; each part aligned."""
    words = "<4I" if structs.little_endian else ">4I"
    header_size = structs.Elf_Nhdr.sizeof()
    place = 0
    while place + header_size <= len(data):
        note = structs.Elf_Nhdr.parse(data[place : place + header_size])
        name_start = place + header_size
        start = _aligned(name_start + note["n_namesz"], align)
        end = start + note["n_descsz"]
        name = data[name_start : name_start + note["n_namesz"]]
        if note["n_type"] == "NT_GNU_ABI_TAG" and name == b"GNU\0" and end - start >= 16 and end <= len(data):
            system, major, minor, patch = struct.unpack_from(words, data, start)
            return (major, minor, patch) if system == 0 else None  # 0 is Linux
        place = _aligned(end, align)
    return None


def _aligned(place: int, align: int) -> int:
    return place + -place % align
