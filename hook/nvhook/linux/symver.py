# SPDX-License-Identifier: Apache-2.0
"""Symbol versions of a shared object: those that it defines, and those that it needs of other files (LSB, "Symbol
Versioning"; dl_version.c of glibc checks them before anything of a program runs).

For the hot path of a start: a few reads by offset, and nothing imported. The file may be hostile: every table has
a limit, and nothing is read outside of the file.
"""

from __future__ import annotations

import struct

from . import elf

_MAX_TABLE = 64 << 10  # bytes; glibc's own has 1500
_MAX_STRING = 255  # bytes
_MAX_STRINGS = 1 << 20  # bytes between the first and the last name; a linker puts them side by side
_MAX_NAMES = 1024

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any  # noqa: TID251 - never at run time

_DT_VERDEF, _DT_VERDEFNUM, _DT_VERNEED, _DT_VERNEEDNUM = 0x6FFFFFFC, 0x6FFFFFFD, 0x6FFFFFFE, 0x6FFFFFFF

# Little-endian, as every driver is
_VERDEF, _VERDAUX = struct.Struct("<4H3I"), struct.Struct("<2I")
_VERNEED, _VERNAUX = struct.Struct("<2H3I"), struct.Struct("<I2H2I")


class Versions:
    """`machine` as in e_machine. ValueError for a damaged file."""

    __slots__ = ("_dynamic", "_headers", "machine")

    def __init__(self, headers: elf.Headers) -> None:
        self.machine = headers.machine
        self._headers = headers
        self._dynamic = dict(headers.entries())

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
        return self._piece(self._dynamic[tag], _MAX_TABLE) if tag in self._dynamic else b""

    def _strings(self, offsets: list[int]) -> list[str]:
        if not offsets:
            return []
        first, size = min(offsets), max(offsets) - min(offsets) + _MAX_STRING + 1
        if elf.DT_STRTAB not in self._dynamic or size > _MAX_STRINGS:
            raise ValueError("there is no string table, or it is too long")
        text = self._piece(self._dynamic[elf.DT_STRTAB] + first, size)
        ends = [text.find(b"\0", offset - first, offset - first + _MAX_STRING + 1) for offset in offsets]
        if min(ends) < 0:
            raise ValueError("a name has no end")
        pairs = zip(offsets, ends, strict=True)
        return [text[offset - first : end].decode("ascii", "backslashreplace") for offset, end in pairs]

    def _piece(self, address: int, size: int) -> bytes:
        """Of what will be at this address in memory; shorter at the end of its segment."""
        place, most = self._headers.place(address)
        return self._headers.file.piece(place, min(size, most), "a table")


def read(fd: int) -> Versions | None:
    """None if `fd`, which stays open, is no ELF file, or a big-endian one. ValueError for a damaged one; OSError is the
    system's."""
    headers = elf.headers(fd)
    return Versions(headers) if headers and headers.order == "<" else None


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
