# SPDX-License-Identifier: Apache-2.0
"""What a shared object says about itself: for which machine it is, its name, what it needs (elf(5), gABI chapter 5).

Not for symbols, sections or debugging data. Only program headers and what they lead to are read, as a dynamic linker
does: section headers may be missing or wrong, and a library of 90 MB costs some 10 kB of reading. The file may be
hostile, so every offset is checked against the file's size and every count against a limit before it is used.

`headers` is for every container start, and imports nothing; symver.py goes on from there. `read` is for the driver's
files, once per driver. Libraries that know the format walk all the section headers, and sizes in the file decide how
much they read.
"""

from __future__ import annotations

import os
import struct

_MAX_SEGMENTS = 256
_MAX_DYNAMIC = 64 << 10  # bytes; libLLVM has 600
_MAX_NOTES = 64 << 10  # bytes
_MAX_NEEDED = 1024
_MAX_STRING = 4096  # bytes, without the NUL

# EI_CLASS -> bits, and the forms of the header, a program header and an entry of the dynamic segment
_CLASSES = {1: (32, "16s2H5I6H", "8I", "2I"), 2: (64, "16s2HI3QI6H", "2I6Q", "2Q")}
_ORDERS = {1: "<", 2: ">"}  # EI_DATA
_NOTE = "3I"  # bytes of the name, bytes of the description, type

_ET_EXEC, _ET_DYN = 2, 3
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP, _PT_NOTE = 1, 2, 3, 4
_DT_NULL, _DT_NEEDED, _DT_STRSZ, _DT_SONAME, _DT_RPATH, _DT_RUNPATH = 0, 1, 10, 14, 15, 29
DT_STRTAB = 5
_TEXTS = (_DT_NEEDED, _DT_RPATH, _DT_RUNPATH, _DT_SONAME)
_NT_GNU_ABI_TAG = 1

# e_machine of those that have a driver, in the only class and byte order that it comes in; x32 is none of them.
_MACHINES = {
    (62, 64, "<"): "x86-64",
    (3, 32, "<"): "i386",
    (183, 64, "<"): "aarch64",
    (21, 64, "<"): "ppc64le",
}

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
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

    `source` is a descriptor or a seekable binary stream; it stays open. ValueError says what is damaged; OSError is the
    system's.
    """
    found = headers(source)
    if found is None:
        return None
    texts = _dynamic(found)
    soname = next(iter(texts[_DT_SONAME]), None)
    search = next(iter(texts[_DT_RUNPATH] or texts[_DT_RPATH]), "")
    interpreter = found.segment(_PT_INTERP)
    return Elf(
        found.bits,
        _MACHINES.get((found.machine, found.bits, found.order), str(found.machine)),
        _kind(found.type, is_program=interpreter is not None and soname is None),
        soname,
        tuple(texts[_DT_NEEDED]),
        _abi(found),
        interpreter=_string(found.file, interpreter.offset, interpreter.size, 0) if interpreter else "",
        search=tuple(path for path in search.split(":") if path),
    )


def headers(source: int | BinaryIO) -> Headers | None:
    """The beginning of `read`, with the same faults."""
    file = File(source)
    start = file.start(64)  # the header of the 64-bit class; the other one is shorter
    return Headers(file, start) if start[:4] == b"\x7fELF" else None


class File:
    """Reads pieces of a descriptor or a stream that lie wholly inside it."""

    __slots__ = ("_fd", "_stream", "size")

    def __init__(self, source: int | BinaryIO) -> None:
        self._stream: Any = None  # a raw or a buffered one
        self._fd = -1
        if isinstance(source, int):
            self._fd = source
            self.size = os.fstat(source).st_size
        else:
            self._stream = source
            self.size = source.seek(0, os.SEEK_END)

    def start(self, length: int) -> bytes:
        """The first bytes; fewer where the file is shorter."""
        return self._some(0, length)

    def piece(self, offset: int, length: int, what: str) -> bytes:
        """`length` bytes at `offset`; ValueError names `what` lies outside the file."""
        if offset + length > self.size:  # neither is negative: the fields of an ELF file are unsigned
            raise ValueError(f"{what} at {offset:#x} lies outside the file of {self.size} bytes")
        data = self._some(offset, length)
        while len(data) < length:
            chunk = self._some(offset + len(data), length - len(data))
            if not chunk:
                raise ValueError(f"{what} at {offset:#x} ends early: the file became shorter")
            data += chunk
        return data

    def _some(self, offset: int, most: int) -> bytes:
        if self._stream is None:
            return os.pread(self._fd, most, offset)
        self._stream.seek(offset)
        data: bytes = self._stream.read(most)
        return data


class Segment:
    """What a program header says: where it lies in the file, with how many bytes, and at which address in memory."""

    __slots__ = ("address", "align", "kind", "offset", "size")

    def __init__(self, kind: int, offset: int, address: int, size: int, align: int) -> None:
        self.kind = kind
        self.offset = offset
        self.address = address
        self.size = size
        self.align = align


class Headers:
    """`bits` is 32 or 64, `order` the byte order in the notation of struct, `type` and `machine` the ELF numbers."""

    __slots__ = ("_entry", "bits", "file", "machine", "order", "segments", "type")

    def __init__(self, file: File, start: bytes) -> None:
        self.file = file
        try:
            self.order = _ORDERS[start[5]]
            self.bits, header, segment, self._entry = _CLASSES[start[4]]
            fields = struct.unpack_from(self.order + header, start)
        except (IndexError, KeyError, struct.error):
            raise ValueError("the ELF header is damaged") from None
        self.type: int = fields[1]
        self.machine: int = fields[2]
        self.segments = self._segments(segment, fields[5], size=fields[9], count=fields[10])

    def _segments(self, form: str, offset: int, *, size: int, count: int) -> list[Segment]:
        if count == 0:
            return []
        if count > _MAX_SEGMENTS:
            raise ValueError(f"{count} program headers, more than {_MAX_SEGMENTS}")
        layout = struct.Struct(self.order + form)
        if size != layout.size:
            raise ValueError(f"program headers of {size} bytes, not {layout.size}")
        table = layout.iter_unpack(self.file.piece(offset, count * size, "program header table"))
        if self.bits == 64:
            return [Segment(kind, at, address, length, align) for kind, _, at, address, _, length, _, align in table]
        return [Segment(kind, at, address, length, align) for kind, at, address, _, length, _, _, align in table]

    def segment(self, kind: int) -> Segment | None:
        """The first of this kind."""
        return next((segment for segment in self.segments if segment.kind == kind), None)

    def entries(self) -> Iterator[tuple[int, int]]:
        """(tag, value) of the dynamic segment; none of a file without one: object files, static programs."""
        segment = self.segment(_PT_DYNAMIC)
        if segment is None:
            return
        layout = struct.Struct(self.order + self._entry)
        data = self.file.piece(segment.offset, min(segment.size, _MAX_DYNAMIC), "dynamic segment")
        for tag, value in layout.iter_unpack(data[: len(data) // layout.size * layout.size]):
            if tag == _DT_NULL:
                return
            yield tag, value
        if segment.size > _MAX_DYNAMIC:
            raise ValueError(f"the dynamic segment has no end within {_MAX_DYNAMIC} bytes")

    def place(self, address: int) -> tuple[int, int]:
        """(where in the file is what will be at `address` in memory, bytes from there to the end of its segment)."""
        for segment in self.segments:
            inside = address - segment.address
            if segment.kind == _PT_LOAD and 0 <= inside < segment.size:
                return segment.offset + inside, segment.size - inside
        raise ValueError(f"the address {address:#x} is in no segment of the file")


def _kind(number: int, *, is_program: bool) -> str:
    if number == _ET_EXEC or (number == _ET_DYN and is_program):
        return "executable"
    return "shared" if number == _ET_DYN else "other"


def _dynamic(found: Headers) -> dict[int, list[str]]:
    """Tag -> texts."""
    wanted: list[tuple[int, int]] = []
    table: dict[int, int] = {}
    for tag, value in found.entries():
        if tag in _TEXTS:
            wanted.append((tag, value))
        elif tag in (DT_STRTAB, _DT_STRSZ):
            table[tag] = value
    texts: dict[int, list[str]] = {tag: [] for tag in _TEXTS}
    if len(wanted) > _MAX_NEEDED:
        raise ValueError(f"more than {_MAX_NEEDED} needed libraries")
    if wanted:
        if len(table) < 2:
            raise ValueError("the dynamic segment names no string table")
        start, most = found.place(table[DT_STRTAB])
        for tag, offset in wanted:
            texts[tag].append(_string(found.file, start, min(table[_DT_STRSZ], most), offset))
    return texts


def _string(file: File, start: int, size: int, offset: int) -> str:
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


def _abi(found: Headers) -> tuple[int, int, int] | None:
    """The Linux version of the first GNU ABI note."""
    for segment in found.segments:
        if segment.kind == _PT_NOTE:
            # Bytes beyond the limit are a core's; what is asked for stands at the start of a library.
            data = found.file.piece(segment.offset, min(segment.size, _MAX_NOTES), "note segment")
            version = _abi_among(data, 8 if segment.align == 8 else 4, found.order)
            if version:
                return version
    return None


def _abi_among(data: bytes, align: int, order: str) -> tuple[int, int, int] | None:
    """`data` is a row of notes: sizes of name and description, type; name; description; each part aligned."""
    layout = struct.Struct(order + _NOTE)
    place = 0
    while place + layout.size <= len(data):
        name_size, size, kind = layout.unpack_from(data, place)
        name_start = place + layout.size
        start = _aligned(name_start + name_size, align)
        end = start + size
        name = data[name_start : name_start + name_size]
        if kind == _NT_GNU_ABI_TAG and name == b"GNU\0" and size >= 16 and end <= len(data):
            system, major, minor, patch = struct.unpack_from(f"{order}4I", data, start)
            return (major, minor, patch) if system == 0 else None  # 0 is Linux
        place = _aligned(end, align)
    return None


def _aligned(place: int, align: int) -> int:
    return place + -place % align
