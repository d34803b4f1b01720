# SPDX-License-Identifier: Apache-2.0
"""Symbol versions of a shared object: those that it defines, and those that it needs of other files (LSB, "Symbol
Versioning"; dl_version.c of glibc checks them before anything of a program runs).

For the road of a container start: a few reads by offset and nothing imported; elf.py is for what is read once per
driver. The file may be hostile: every table has a limit, and an offset is only ever read at, so that one outside of the
file finds nothing.
"""

from __future__ import annotations

import os
import struct

_START = 64  # bytes: the ELF header
_MAX_SEGMENTS = 64
_MAX_DYNAMIC = 64 << 10  # bytes
_MAX_TABLE = 64 << 10  # bytes; glibc's own has 1500
_MAX_STRING = 255  # bytes
_MAX_STRINGS = 1 << 20  # bytes between the first and the last name; a linker puts them side by side
_MAX_NAMES = 1024

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any  # noqa: TID251 - never at run time

_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NULL, _DT_STRTAB = 0, 5
_DT_VERDEF, _DT_VERDEFNUM, _DT_VERNEED, _DT_VERNEEDNUM = 0x6FFFFFFC, 0x6FFFFFFD, 0x6FFFFFFE, 0x6FFFFFFF

# Class -> ELF header up to e_phnum, program header, dynamic entry; all little-endian, as every driver is.
_CLASSES = {
    1: (struct.Struct("<16s2H5I3H"), struct.Struct("<8I"), struct.Struct("<2I")),
    2: (struct.Struct("<16s2HI3QI3H"), struct.Struct("<2I6Q"), struct.Struct("<2Q")),
}
_VERDEF, _VERDAUX = struct.Struct("<4H3I"), struct.Struct("<2I")
_VERNEED, _VERNAUX = struct.Struct("<2H3I"), struct.Struct("<I2H2I")


class Versions:
    """Of the ELF file `fd`, which stays open. `machine` as in e_machine. ValueError for a damaged file."""

    __slots__ = ("_dynamic", "_fd", "_segments", "machine")

    def __init__(self, fd: int, start: bytes) -> None:
        header, segment, entry = _CLASSES[start[4]]
        fields = _unpacked(header, start, 0)
        self.machine: int = fields[2]
        self._fd = fd
        self._segments: list[tuple[int, int, int]] = []  # address, offset, size
        self._dynamic: dict[int, int] = {}
        dynamic = (0, 0)
        offset, count = fields[5], fields[-1]
        if count > _MAX_SEGMENTS:
            raise ValueError(f"{count} program headers, more than {_MAX_SEGMENTS}")
        for kind, *numbers in segment.iter_unpack(_whole(self._piece(offset, count * segment.size), segment)):
            where, address, size = (numbers[1], numbers[2], numbers[4]) if start[4] == 2 else (*numbers[:2], numbers[3])
            if kind == _PT_LOAD:
                self._segments.append((address, where, size))
            elif kind == _PT_DYNAMIC:
                dynamic = where, size
        for tag, value in entry.iter_unpack(_whole(self._piece(dynamic[0], min(dynamic[1], _MAX_DYNAMIC)), entry)):
            if tag == _DT_NULL:
                break
            self._dynamic[tag] = value

    def defined(self) -> list[str]:
        """Those that it has for others."""
        names = []
        table = self._table(_DT_VERDEF)
        place = 0
        for _ in range(self._count(_DT_VERDEFNUM)):
            *_, auxiliary, following = _unpacked(_VERDEF, table, place)
            names.append(_unpacked(_VERDAUX, table, place + auxiliary)[0])
            place += following
            if not following:
                break
        return self._strings(names)

    def needed(self) -> list[str]:
        """Those that it needs, of whichever file."""
        names = []
        table = self._table(_DT_VERNEED)
        place = 0
        for _ in range(self._count(_DT_VERNEEDNUM)):
            _, count, _, at, following = _unpacked(_VERNEED, table, place)
            at += place
            for _ in range(count):
                _, _, _, name, step = _unpacked(_VERNAUX, table, at)
                names.append(name)
                at += step
            if len(names) > _MAX_NAMES:
                raise ValueError(f"more than {_MAX_NAMES} symbol versions")
            place += following
            if not following:
                break
        return self._strings(names)

    def _count(self, tag: int) -> int:
        count = self._dynamic.get(tag, 0)
        if count > _MAX_NAMES:
            raise ValueError(f"more than {_MAX_NAMES} symbol versions")
        return count

    def _table(self, tag: int) -> bytes:
        return self._piece(self._place(self._dynamic[tag]), _MAX_TABLE) if tag in self._dynamic else b""

    def _strings(self, offsets: list[int]) -> list[str]:
        if not offsets:
            return []
        first, size = min(offsets), max(offsets) - min(offsets) + _MAX_STRING + 1
        if _DT_STRTAB not in self._dynamic or size > _MAX_STRINGS:
            raise ValueError("there is no string table, or it is too long")
        text = self._piece(self._place(self._dynamic[_DT_STRTAB]) + first, size)
        ends = [text.find(b"\0", offset - first, offset - first + _MAX_STRING + 1) for offset in offsets]
        if min(ends) < 0:
            raise ValueError("a name has no end")
        pairs = zip(offsets, ends, strict=True)
        return [text[offset - first : end].decode("ascii", "backslashreplace") for offset, end in pairs]

    def _place(self, address: int) -> int:
        """Where in the file is what will be at this address in memory."""
        for start, offset, size in self._segments:
            if 0 <= address - start < size:
                return offset + address - start
        raise ValueError(f"the address {address:#x} is in no segment of the file")

    def _piece(self, offset: int, size: int) -> bytes:
        """Shorter at the end of the file, and empty beyond."""
        if offset + size >= 1 << 63:  # off_t ends there
            raise ValueError(f"{offset:#x} lies outside of any file")
        return os.pread(self._fd, size, offset)


def read(fd: int) -> Versions | None:
    """None if `fd` is no ELF file, or a big-endian one. ValueError for a damaged one; OSError is the system's."""
    start = os.pread(fd, _START, 0)
    if start[:4] != b"\x7fELF" or start[4:5] not in (b"\1", b"\2") or start[5:6] != b"\1":
        return None
    return Versions(fd, start)


def newest(names: Iterable[str], prefix: str) -> tuple[int, ...]:
    """The highest of those that are `prefix` and a version, as numbers: (2, 34) of GLIBC_2.34; empty without any."""
    versions = (name[len(prefix) :].split(".") for name in names if name.startswith(prefix))
    return max(
        (tuple(map(int, parts)) for parts in versions if all(part.isdecimal() and len(part) < 6 for part in parts)),
        default=(),
    )


def _unpacked(layout: struct.Struct, data: bytes, place: int) -> tuple[Any, ...]:
    if place + layout.size > len(data):
        raise ValueError("the file ends inside a table")
    return layout.unpack_from(data, place)


def _whole(data: bytes, layout: struct.Struct) -> bytes:
    """As many whole records as there are."""
    return data[: len(data) // layout.size * layout.size]
