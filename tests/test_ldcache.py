# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nvhook.linux import ldcache
from simhost import elfwriter

LDCONFIG = shutil.which("ldconfig", path="/sbin:/usr/sbin:/usr/bin:/bin")
SYSTEM_CACHE = Path("/etc/ld.so.cache")

needs_ldconfig = pytest.mark.skipif(LDCONFIG is None, reason="no ldconfig here")
needs_cache = pytest.mark.skipif(not SYSTEM_CACHE.exists(), reason="no /etc/ld.so.cache here")

HEADER = "<17s3sIIB19x"
ENTRY = "<iIIIQ"
TABLE = struct.calcsize(HEADER)


def make(
    entries: Sequence[tuple[int, str | int, str | int]],
    *,
    magic: bytes = b"glibc-ld.so.cache",
    version: bytes = b"1.1",
    count: int | None = None,
    string_bytes: int | None = None,
    order: int = 2,
    strings: bytes = b"",
) -> bytes:
    """A cache of (flags, name, path); a number stands for an offset into `strings`."""
    start = TABLE + len(entries) * struct.calcsize(ENTRY)
    table = b""
    for flags, *texts in entries:
        offsets = []
        for text in texts:
            if isinstance(text, int):
                offsets.append(start + text)
            else:
                offsets.append(start + len(strings))
                strings += text.encode() + b"\0"
        table += struct.pack(ENTRY, flags, offsets[0], offsets[1], 7, 1 << 62)
    count = len(entries) if count is None else count
    string_bytes = len(strings) if string_bytes is None else string_bytes
    return struct.pack(HEADER, magic, version, count, string_bytes, order) + table + strings


def behind_old_part(cache: bytes, count: int) -> bytes:
    old = struct.pack("<11sxI", b"ld.so-1.7.0", count) + b"\xee" * 12 * count
    return old + bytes(-len(old) % 8) + cache


def pairs(entries: list[ldcache.Entry]) -> list[tuple[str, str]]:
    return [(entry.name, entry.path) for entry in entries]


def printed(*arguments: str) -> list[tuple[str, str]]:
    """What `ldconfig -p` says: `\tname (kind, …) => path`."""
    assert LDCONFIG
    text = subprocess.run([LDCONFIG, "-p", *arguments], check=True, capture_output=True, text=True).stdout
    lines = [line for line in text.splitlines() if " => " in line]
    return [(line.split(" (")[0].strip(), line.rpartition(" => ")[2]) for line in lines]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with libraries of two machines."""
    directory = tmp_path_factory.mktemp("libraries")
    for number in range(5):
        for machine in ("x86-64", "i386"):
            (directory / machine).mkdir(exist_ok=True)
            soname = f"libnumber{number}.so.1"
            content = elfwriter.shared_object(soname, ["libc.so.6"], machine=machine)
            (directory / machine / soname).write_bytes(content)
    return directory


def built(libraries: Path, directory: Path, form: str) -> Path:
    """A cache that the system's ldconfig writes, in one of its forms."""
    assert LDCONFIG
    (directory / "conf").write_text("")
    cache = directory / "cache"
    options = ["-X", "-i", "-c", form, "-C", str(cache), "-f", str(directory / "conf")]
    command = [LDCONFIG, *options, str(libraries / "x86-64"), str(libraries / "i386")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"this ldconfig cannot write the form `{form}`: {done.stderr.strip()}")
    return cache


@needs_ldconfig
@needs_cache
def test_parse_the_system_cache() -> None:
    expected = printed()
    assert expected
    assert expected == pairs(ldcache.parse(SYSTEM_CACHE.read_bytes()))


@needs_ldconfig
@pytest.mark.parametrize("form", ["new", "compat"])
def test_parse_what_ldconfig_writes(libraries: Path, tmp_path: Path, form: str) -> None:
    cache = built(libraries, tmp_path, form)
    entries = ldcache.parse(cache.read_bytes())
    assert printed("-C", str(cache)) == pairs(entries)
    for machine in ("x86-64", "i386"):
        own = [path for _, path in pairs(ldcache.entries_for(entries, machine)) if path.startswith(str(libraries))]
        assert {str(libraries / machine / f"libnumber{number}.so.1") for number in range(5)} == set(own)


@needs_ldconfig
def test_parse_old_form_is_unsupported(libraries: Path, tmp_path: Path) -> None:
    data = built(libraries, tmp_path, "old").read_bytes()
    assert data.startswith(b"ld.so-1.7.0")
    with pytest.raises(ValueError, match="unsupported"):
        ldcache.parse(data)


def test_parse_every_field() -> None:
    (entry,) = ldcache.parse(make([(0x303, "liba.so.1", "/lib/liba.so.1")]))
    assert (entry.name, entry.path, entry.flags) == ("liba.so.1", "/lib/liba.so.1", 0x303)
    assert (entry.hwcap, entry.osversion) == (1 << 62, 7)


def test_parse_empty_cache() -> None:
    assert ldcache.parse(make([])) == []


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_parse_behind_the_old_part(count: int) -> None:
    data = behind_old_part(make([(0x303, "liba.so.1", "/lib/liba.so.1")]), count)
    assert pairs(ldcache.parse(data)) == [("liba.so.1", "/lib/liba.so.1")]


def test_parse_name_that_is_the_end_of_its_path() -> None:
    data = make([(0x303, 5, 0)], strings=b"/lib/liba.so.1\0")
    assert pairs(ldcache.parse(data)) == [("liba.so.1", "/lib/liba.so.1")]


def test_parse_path_that_is_not_utf8() -> None:
    (entry,) = ldcache.parse(make([(0x303, 5, 0)], strings=b"/lib/\xff.so\0"))
    assert os.fsencode(entry.path) == b"/lib/\xff.so"


def test_parse_byte_order_not_said() -> None:
    assert len(ldcache.parse(make([(3, "a", "/a")], order=0))) == 1


ONE = [(0x303, "liba.so.1", "/lib/liba.so.1")]
STRINGS = 24  # bytes of the strings of ONE
WRONG = {
    "empty": (b"", "truncated"),
    "text": (b"# a list of directories, one a line, and no cache at all\n", "unsupported format"),
    "elf": (b"\x7fELF" + bytes(60), "unsupported format"),
    "header-cut": (make(ONE)[:40], "truncated"),
    "other-version": (make(ONE, version=b"1.2"), "unsupported format"),
    "big-endian": (make(ONE, order=3), "big-endian"),
    "big-endian-not-said": (
        struct.pack(">17s3sIIB19x", b"glibc-ld.so.cache", b"1.1", 1, 24, 0) + bytes(48),
        "truncated",
    ),
    "no-byte-order": (make(ONE, order=1), "byte order"),
    "count-too-large": (make(ONE, count=2), "truncated"),
    "count-huge": (make(ONE, count=0xFFFFFFFF), "truncated: 4294967295 entries"),
    "strings-too-large": (make(ONE, string_bytes=STRINGS + 2), "truncated"),
    "strings-huge": (make(ONE, string_bytes=0xFFFFFFFF), "truncated"),
    "no-strings": (make(ONE, string_bytes=0), "lies outside"),
    "offset-in-the-table": (make([(3, -1, 0)], strings=b"/a\0"), "lies outside"),
    "offset-of-the-end": (make([(3, 3, 0)], strings=b"/a\0"), "lies outside"),
    "offset-huge": (make([(3, 0x7FFFFFFF, 0)], strings=b"/a\0"), "lies outside"),
    "no-nul": (make([(3, 0, 0)], strings=b"/a"), "no end"),
    "nul-behind-the-strings": (make([(3, 0, 0)], strings=b"/a\0", string_bytes=2), "no end"),
    "string-too-long": (make([(3, "a" * 4097, "/a")]), "no end within 4097 bytes"),
    "old-header-cut": (b"ld.so-1.7.0\0\0", "truncated"),
    "old-part-alone": (behind_old_part(b"", 2), "unsupported format"),
    "old-count-huge": (struct.pack("<11sxI", b"ld.so-1.7.0", 0xFFFFFFFF) + make(ONE), "truncated"),
    "old-count-wrong": (behind_old_part(b"\0" * 8 + make(ONE), 2), "unsupported format"),
}


@pytest.mark.parametrize(("data", "why"), WRONG.values(), ids=WRONG)
def test_parse_wrong(data: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        ldcache.parse(data)


def test_parse_longest_string() -> None:
    assert ldcache.parse(make([(3, "a" * 4096, "/a")]))[0].name == "a" * 4096


def test_parse_shared_string_is_kept_once() -> None:
    entries = ldcache.parse(make([(3, 0, 0)] * 10_000, strings=b"/" + b"a" * 4000 + b"\0"))
    assert len({id(text) for entry in entries for text in (entry.name, entry.path)}) == 1


def test_parse_overlapping_strings_are_refused() -> None:
    data = make([(3, place, place + 1) for place in range(0, 4000, 2)], strings=b"a" * 4000 + b"\0")
    with pytest.raises(ValueError, match="overlap"):
        ldcache.parse(data)


MACHINES = {"x86-64": 0x0303, "i386": 0x0003, "aarch64": 0x0A03, "ppc64le": 0x0503}


@pytest.mark.parametrize("machine", MACHINES)
def test_entries_for_one_machine(machine: str) -> None:
    entries = ldcache.parse(make([(flags, name, f"/{name}") for name, flags in MACHINES.items()]))
    assert [machine] == [entry.name for entry in ldcache.entries_for(entries, machine)]


def test_entries_for_kinds_of_file() -> None:
    # any ELF, libc5, libc6, not ELF; x32 is another machine, and glibc keeps bits of its own above
    kinds = [0x0301, 0x0302, 0x0303, 0x0300, 0x0803, 0x10303]
    entries = ldcache.parse(make([(flags, hex(flags), "/a") for flags in kinds]))
    names = [entry.name for entry in ldcache.entries_for(entries, "x86-64")]
    assert names == ["0x301", "0x303", "0x10303"]


def sample() -> bytes:
    entries = [(0x303, f"lib{number}.so.1", f"/usr/lib/lib{number}.so.{number}") for number in range(40)]
    return behind_old_part(make(entries), 3)


def parse_or_refuse(data: bytes) -> None:
    refusal: type[ValueError] = ValueError
    try:
        ldcache.parse(data)
    except ValueError as error:
        refusal = type(error)
    assert refusal is ValueError  # not a decoding error, which is one too


@needs_cache
def test_parse_truncated_system_cache() -> None:
    data = SYSTEM_CACHE.read_bytes()
    for length in range(0, len(data), 7):
        parse_or_refuse(data[:length])


def test_parse_truncated() -> None:
    data = sample()
    for length in range(len(data)):
        with pytest.raises(ValueError, match=r"truncated|unsupported format"):
            ldcache.parse(data[:length])


def test_parse_changed_bytes() -> None:
    chance = random.Random(20)
    original = sample()
    for _ in range(3000):
        data = bytearray(original)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        parse_or_refuse(bytes(data))


@settings(deadline=500)
@given(st.binary())
@example(b"glibc-ld.so.cache1.1")
def test_parse_any_bytes(data: bytes) -> None:
    parse_or_refuse(data)
    parse_or_refuse(b"glibc-ld.so.cache1.1" + data)
    parse_or_refuse(b"ld.so-1.7.0\0" + data)
    count = max(0, len(data) - 28) // 24
    parse_or_refuse(struct.pack("<20sI", b"glibc-ld.so.cache1.1", count) + data)
