# SPDX-License-Identifier: Apache-2.0
"""Names added to a linker cache that somebody else made, without looking at a single library of theirs.

What ldconfig would do for the same directories when it runs again, but no program runs over a foreign tree, and the
time does not grow with the number of libraries in it. The entries there are keep their bytes and their order; only the
offsets in them move, because the table above the strings gets longer. ldcache.py has the format.

A cache is the container's own affair: a damaged one misleads the container's linker and nobody else. What is not as
glibc writes it is refused all the same, and the caller then runs ldconfig.
"""

from __future__ import annotations

import struct

from .ldcache import ENTRY, HEADER, MACHINES, MAGIC, VERSION, Cache

_LIBC6 = 3
_EXTENSION_MAGIC = 0xEAA42174
_EXTENSION = struct.Struct("<II")  # magic, number of sections
_SECTION = struct.Struct("<IIII")  # tag, flags, offset, size
_MAX_SECTIONS = 2
_GENERATOR, _HWCAPS = 0, 1  # text; offsets of strings, four bytes each
_MAX_HWCAPS = 64  # subdirectories of glibc-hwcaps; there are seven on the machines that have any
_MAX_SAME = 64  # entries of one name, in any cache that is not a trap
_MAX_NAME = 255  # bytes, NAME_MAX: to compare longer ones takes its time


class Name:
    """`directory`/`name` is there and is what a program that asks for `name` gets; `machine` as in ldcache.MACHINES."""

    __slots__ = ("directory", "machine", "name")

    def __init__(self, directory: str, name: str, machine: str) -> None:
        self.directory = directory
        self.name = name
        self.machine = machine


def merge(data: bytes, names: list[Name]) -> bytes:
    """The cache `data` with `names`, each before others of its name; `data` itself where they are so already.

    ValueError if `data` is not as glibc writes it.
    An old part in front of the cache (before glibc 2.32) is left away: every linker since glibc 2.2 reads the new one.
    """
    cache = _Cache(data)
    places: list[tuple[int, int, Name]] = []
    gone: set[int] = set()
    is_there = True
    for order, name in enumerate(names):
        place = cache.place_of(name)
        places.append((place, order, name))
        same = cache.same(place, name)
        gone.update(same)
        is_there = is_there and same[:1] == [place]
    if is_there:
        return data
    shift = ENTRY.size * (len(names) - len(gone))
    if shift < 0:
        raise ValueError("more entries of one file than names")
    strings_start = HEADER.size + len(cache.table) + shift
    added, entries = _encode(names, strings_start + len(cache.strings))
    strings = cache.strings + added
    table = _spliced(_shifted(cache.table, shift), places, entries, gone)
    extension_start = strings_start + len(strings)
    padding = b"\0" * (-extension_start % 4)
    extension = cache.extension_at(extension_start + len(padding), shift)
    header = HEADER.pack(
        MAGIC,
        VERSION,
        len(table) // ENTRY.size,
        len(strings),
        cache.order,
        extension_start + len(padding) if extension else 0,
    )
    return b"".join((header, table, strings, padding if extension else b"", extension))


def directories(data: bytes) -> list[str]:
    """Where the libraries of a cache are, as it writes it. ValueError as for merge."""
    cache = _Cache(data)
    # Of 4 MB of other strings there would be millions. glibc writes a name as the end of its path, or beside it.
    if cache.strings.count(b"\0") > 2 * (len(cache.table) // ENTRY.size) + _MAX_HWCAPS:
        raise ValueError("more strings than its entries have")
    paths = {path.rpartition(b"/")[0] for path in cache.strings.split(b"\0") if path.startswith(b"/")}
    return sorted(path.decode("utf-8", "surrogateescape") for path in paths)


class _Cache(Cache):
    """With its extension, and searched as the linker does."""

    __slots__ = ("_sections",)

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        if self.extension and self.extension < self.strings_start + len(self.strings):
            raise ValueError("truncated: the extension lies among the strings")
        self._sections = _sections(self.whole, self.extension) if self.extension else []

    def place_of(self, name: Name) -> int:
        """The first entry that comes behind `name`: a binary search, as the linker's own."""
        wanted = _key(name.name.encode()), MACHINES[name.machine] | _LIBC6, 0
        low, high = 0, self.count
        while low < high:
            middle = (low + high) // 2
            flags, offset, _, _, hwcap = ENTRY.unpack_from(self.table, middle * ENTRY.size)
            # The table descends. Entries for better processors stand before those for all.
            key = self.string(offset)
            if len(key) > _MAX_NAME:
                raise ValueError(f"a name of more than {_MAX_NAME} bytes")
            if (_key(key), flags, hwcap) > wanted:
                low = middle + 1
            else:
                high = middle
        return low

    def same(self, place: int, name: Name) -> list[int]:
        """Entries from `place` on that lead to the file which is `name` now."""
        found: list[int] = []
        wanted = name.name.encode()
        path = f"{name.directory}/{name.name}".encode()
        for index in range(place, self.count):
            flags, at, path_at, _, hwcap = ENTRY.unpack_from(self.table, index * ENTRY.size)
            if flags != MACHINES[name.machine] | _LIBC6 or hwcap or self.string(at) != wanted:
                return found
            if index - place == _MAX_SAME:
                raise ValueError(f"more than {_MAX_SAME} entries of one name")
            if self.string(path_at) == path:
                found.append(index)
        return found

    def extension_at(self, start: int, shift: int) -> bytes:
        """The extension for its new place; the strings that it refers to have moved by `shift`."""
        if not self._sections:
            return b""
        offset = start + _EXTENSION.size + len(self._sections) * _SECTION.size
        heads, bodies = [_EXTENSION.pack(_EXTENSION_MAGIC, len(self._sections))], []
        for tag, flags, content in self._sections:
            moved = content
            if tag == _HWCAPS:
                moved = b"".join(_moved(value, shift) for (value,) in struct.iter_unpack("<I", content))
            heads.append(_SECTION.pack(tag, flags, offset, len(moved)))
            bodies.append(moved)
            offset += len(moved)
        return b"".join(heads + bodies)


def _moved(offset: int, shift: int) -> bytes:
    try:
        return struct.pack("<I", offset + shift)
    except struct.error:
        raise ValueError(f"string {offset:#x} lies outside the strings of the cache") from None


def _sections(whole: bytes, start: int) -> list[tuple[int, int, bytes]]:
    """(tag, flags, content), those with numbers first so that they stay aligned; ValueError for an unknown one."""
    try:
        magic, count = _EXTENSION.unpack_from(whole, start)
        if count > _MAX_SECTIONS:  # each may be as long as the file
            raise ValueError(f"unsupported format: more than {_MAX_SECTIONS} sections")
        heads = [_SECTION.unpack_from(whole, start + _EXTENSION.size + index * _SECTION.size) for index in range(count)]
    except struct.error:
        raise ValueError("truncated: the extension ends early") from None
    if magic != _EXTENSION_MAGIC or any(tag not in (_GENERATOR, _HWCAPS) for tag, *_ in heads):
        raise ValueError("unsupported format: an extension that is not known")
    found = []
    for tag, flags, offset, size in sorted(heads, reverse=True):
        content = whole[offset : offset + size]
        if len(content) != size or (tag == _HWCAPS and (size % 4 or size > 4 * _MAX_HWCAPS)):
            raise ValueError("a section of the extension is cut off or too long")
        found.append((tag, flags, content))
    return found


def _shifted(table: bytes, shift: int) -> bytes:
    """Every entry with `shift` added to its two offsets: one addition of two very long numbers."""
    pattern = ENTRY.pack(0, shift, shift, 0, 0) * (len(table) // ENTRY.size)
    total = int.from_bytes(table, "little") + int.from_bytes(pattern, "little")
    return (total & ((1 << 8 * len(table)) - 1)).to_bytes(len(table), "little")


def _encode(names: list[Name], start: int) -> tuple[bytes, list[bytes]]:
    """(the strings, an entry for each name); a name is the end of its path, as glibc has it."""
    strings = bytearray()
    entries = []
    for name in names:
        path = f"{name.directory}/{name.name}".encode() + b"\0"
        offset = start + len(strings)
        flags = MACHINES[name.machine] | _LIBC6
        entries.append(ENTRY.pack(flags, offset + len(name.directory.encode()) + 1, offset, 0, 0))
        strings += path
    return bytes(strings), entries


def _spliced(table: bytes, places: list[tuple[int, int, Name]], entries: list[bytes], gone: set[int]) -> bytes:
    """`table` without the entries in `gone`, and with each of ours before the entry at its place."""
    ours = sorted(places, key=lambda item: (item[0], _Descending(item[2]), item[1]))
    parts = []
    cuts = sorted({place for place, _, _ in ours} | gone | {index + 1 for index in gone} | {len(table) // ENTRY.size})
    todo = 0
    before = 0
    for cut in cuts:
        if before not in gone or cut != before + 1:
            parts.append(table[before * ENTRY.size : cut * ENTRY.size])
        while todo < len(ours) and ours[todo][0] == cut:
            parts.append(entries[ours[todo][1]])
            todo += 1
        before = cut
    return b"".join(parts)


class _Descending:
    """Sorts as the table does: names down, then flags down."""

    __slots__ = ("_key",)

    def __init__(self, name: Name) -> None:
        self._key = _key(name.name.encode()), MACHINES[name.machine]

    def __lt__(self, other: _Descending) -> bool:
        return self._key > other._key


def _key(name: bytes) -> list[tuple[int, int]]:
    """_dl_cache_libcmp's order: runs of digits as numbers, and a digit behind every other character."""
    key: list[tuple[int, int]] = []
    digits = -1
    for byte in name:
        if 48 <= byte <= 57:
            digits = max(digits, 0) * 10 + byte - 48
            continue
        if digits >= 0:
            key.append((2, digits))
            digits = -1
        key.append((1, byte))
    if digits >= 0:
        key.append((2, digits))
    return key
