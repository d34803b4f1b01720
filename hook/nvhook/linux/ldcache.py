# SPDX-License-Identifier: Apache-2.0
"""The dynamic linker's cache, /etc/ld.so.cache: which library name leads to which file (ldconfig(8)).

Not for finding a library as the linker does: hardware capabilities and the extensions after the strings are left
alone. The format is glibc's own (sysdeps/generic/dl-cache.h), little-endian:

    [old part, `ldconfig -c compat` only: magic `ld.so-1.7.0`, count at 12, 12 bytes an entry from 16; padding to 8]
    magic `glibc-ld.so.cache`, version `1.1`, count, bytes of strings, byte order, extensions; 48 bytes
    entry: flags, offset of the name, offset of the path, oldest kernel, hardware capabilities; 24 bytes each
    strings, each ended by NUL; offsets count from the start of `glibc-ld.so.cache`

The cache of a driver root may be hostile. Time and memory stay linear in its size: a string that many entries share is
decoded once, and strings that overlap (a name is the end of its path in glibc's own) may not add up to much more than
the file.
"""

from __future__ import annotations

import struct

_OLD_MAGIC = b"ld.so-1.7.0"
_OLD_HEADER = struct.Struct("<11sxI")
_OLD_ENTRY_SIZE = 12
_ALIGNMENT = 8  # of the new part behind the old one, on 64-bit machines

MAGIC = b"glibc-ld.so.cache"
VERSION = b"1.1"
HEADER = struct.Struct("<17s3sIIB3xI12x")
ENTRY = struct.Struct("<iIIIQ")
_BYTE_ORDER = 3  # mask: 0 not said (before glibc 2.33), 2 little-endian, 3 big-endian
_UNKNOWN_ORDER, LITTLE_ENDIAN, _BIG_ENDIAN = 0, 2, 3

_MAX_STRING = 4096  # bytes, PATH_MAX
_MAX_OVERLAP = 4  # times the size of the file, for all different strings together

# flags: the low byte is the kind of file, the next one the machine.
_KIND, _MACHINE = 0x00FF, 0xFF00
_KINDS = (1, 3)  # ELF; ELF for libc6
MACHINES = {"x86-64": 0x0300, "i386": 0x0000, "aarch64": 0x0A00, "ppc64le": 0x0500}


class Entry:
    """`name` is what a program asks for (libcuda.so.1), `path` the file; the numbers are as glibc keeps them."""

    __slots__ = ("flags", "hwcap", "name", "osversion", "path")

    def __init__(self, name: str, path: str, flags: int, hwcap: int, osversion: int) -> None:
        self.name = name
        self.path = path
        self.flags = flags
        self.hwcap = hwcap
        self.osversion = osversion


class Cache:
    """The parts of a cache; ValueError says what is wrong with them. No entry of `table` has been read.

    whole        the file without an old part: the offsets in it count from here
    order        its byte that has the byte order
    extension    where in `whole` its extension begins, from the header; 0 for none
    """

    __slots__ = ("count", "extension", "order", "strings", "strings_start", "table", "whole")

    def __init__(self, data: bytes) -> None:
        self.whole = data[_start_of(data) :]
        if len(self.whole) < HEADER.size:
            raise ValueError(f"truncated: {len(data)} bytes end inside the header")
        magic, version, self.count, size, self.order, self.extension = HEADER.unpack_from(self.whole)
        if magic != MAGIC or version != VERSION:
            raise ValueError("unsupported format: neither `glibc-ld.so.cache1.1` nor behind a `ld.so-1.7.0` header")
        _check_byte_order(self.order & _BYTE_ORDER)
        self.strings_start = HEADER.size + self.count * ENTRY.size
        end = self.strings_start + size
        if end > len(self.whole):
            raise ValueError(
                f"truncated: {self.count} entries and {size} bytes of strings do not fit in {len(data)} bytes"
            )
        self.table = self.whole[HEADER.size : self.strings_start]
        self.strings = self.whole[self.strings_start : end]

    def string(self, offset: int) -> bytes:
        place = offset - self.strings_start
        if not 0 <= place < len(self.strings):
            raise ValueError(f"string {offset:#x} lies outside the strings of the cache")
        end = self.strings.find(b"\0", place, place + _MAX_STRING + 1)
        if end < 0:
            raise ValueError(f"string {offset:#x} has no end within {_MAX_STRING + 1} bytes")
        return self.strings[place:end]


def parse(data: bytes) -> list[Entry]:
    """The entries of a cache, in its order. ValueError says what is wrong with it.

    Bytes that are not UTF-8 come as os.fsdecode gives them, so that `path` can be opened.
    """
    cache = Cache(data)
    strings = _Strings(cache, _MAX_OVERLAP * len(data))
    return [
        Entry(strings.at(name), strings.at(path), flags, hwcap, osversion)
        for flags, name, path, osversion, hwcap in ENTRY.iter_unpack(cache.table)
    ]


def entries_for(entries: list[Entry], machine: str) -> list[Entry]:
    """Those that `machine` (x86-64, i386, aarch64, ppc64le) can load. KeyError for another machine."""
    wanted = MACHINES[machine]
    return [entry for entry in entries if entry.flags & _MACHINE == wanted and entry.flags & _KIND in _KINDS]


def _start_of(data: bytes) -> int:
    """Where the new part begins: behind the old one, if there is one."""
    if not data.startswith(_OLD_MAGIC):
        return 0
    if len(data) < _OLD_HEADER.size:
        raise ValueError(f"truncated: {len(data)} bytes end inside the header")
    _, count = _OLD_HEADER.unpack_from(data)
    end: int = _OLD_HEADER.size + count * _OLD_ENTRY_SIZE
    if end > len(data):
        raise ValueError(f"truncated: {count} entries of the old format do not fit in {len(data)} bytes")
    start = end + -end % _ALIGNMENT
    if data[start : start + len(MAGIC)] != MAGIC:
        raise ValueError("unsupported format: `ld.so-1.7.0` alone, without a part for glibc 2.2 and later")
    return start


def _check_byte_order(order: int) -> None:
    if order == _BIG_ENDIAN:
        raise ValueError("unsupported format: big-endian")
    if order not in (_UNKNOWN_ORDER, LITTLE_ENDIAN):
        raise ValueError(f"byte order {order} is none")


class _Strings:
    """Those of `cache`, decoded once each, until they have `most` bytes together."""

    __slots__ = ("_cache", "_known", "_left")

    def __init__(self, cache: Cache, most: int) -> None:
        self._cache = cache
        self._known: dict[int, str] = {}
        self._left = most

    def at(self, offset: int) -> str:
        known = self._known.get(offset)
        if known is None:
            text = self._cache.string(offset)
            self._left -= len(text) + 1
            if self._left < 0:
                raise ValueError(f"the strings overlap: together more than {_MAX_OVERLAP} times the file")
            known = self._known[offset] = text.decode("utf-8", "surrogateescape")
        return known
