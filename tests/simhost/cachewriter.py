# SPDX-License-Identifier: Apache-2.0
"""Writes the dynamic linker's cache, /etc/ld.so.cache, in the form that glibc has read since 2.2 and that it
writes without the older one since 2.32 (`glibc-ld.so.cache1.1`).

    magic, number of entries, size of the strings, byte order, no extensions
    entry: flags, offset of the name, offset of the path, oldest kernel, hardware capabilities; 24 bytes each
    strings, each ended by NUL; offsets count from the start of the file
"""

from __future__ import annotations

import functools
import re
import struct

_MAGIC = b"glibc-ld.so.cache1.1"
_HEADER = "<20sIIB3xI12x"
_ENTRY = "<iIIIQ"
_LITTLE_ENDIAN = 2

# The kinds of library as `ldconfig -p` prints them (sysdeps/generic/ldconfig.h).
_KINDS = {"libc6": 0x0003, "libc6,x86-64": 0x0303, "libc6,x32": 0x0803, "libc6,AArch64": 0x0A03}


def cache(entries: list[dict[str, str]]) -> bytes:
    """The bytes of a cache with these entries (name, flags, path); equal names keep their order."""
    by_name = functools.cmp_to_key(_compare)
    entries = sorted(entries, key=lambda entry: by_name(entry["name"]), reverse=True)
    strings = bytearray()
    places: dict[str, int] = {}
    start = struct.calcsize(_HEADER) + len(entries) * struct.calcsize(_ENTRY)

    def place(text: str) -> int:
        if text not in places:
            places[text] = start + len(strings)
            strings.extend(text.encode() + b"\0")
        return places[text]

    table = b"".join(
        struct.pack(_ENTRY, _kind(entry), place(entry["name"]), place(entry["path"]), _kernel(entry), 0)
        for entry in entries
    )
    header = struct.pack(_HEADER, _MAGIC, len(entries), len(strings), _LITTLE_ENDIAN, 0)
    return header + table + bytes(strings)


def _kind(entry: dict[str, str]) -> int:
    return _KINDS[entry["flags"].split(", ")[0]]


def _kernel(entry: dict[str, str]) -> int:
    """The oldest kernel, one byte a part; 0 where none is asked for."""
    match = re.search(r"OS ABI: Linux (\d+)\.(\d+)\.(\d+)", entry["flags"])
    if match is None:
        return 0
    major, minor, patch = (int(part) for part in match.groups())
    return major << 16 | minor << 8 | patch


def _compare(first: str, second: str) -> int:
    """The order of names that the dynamic linker's binary search relies on.

    Runs of digits compare as numbers, and a digit comes after any other character; the cache descends in this
    order.
    """
    left, right = _parts(first), _parts(second)
    for one, other in zip(left, right, strict=False):
        if one == other:
            continue
        if isinstance(one, int) != isinstance(other, int):
            return 1 if isinstance(one, int) else -1
        return 1 if one > other else -1  # type: ignore[operator]
    return len(left) - len(right)


def _parts(name: str) -> list[str | int]:
    return [int(part) if part[0].isdecimal() else part for part in re.findall(r"[0-9]+|[^0-9]", name)]
