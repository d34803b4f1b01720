# SPDX-License-Identifier: Apache-2.0
"""Names added to a linker cache: the same as if ldconfig had run again, on many trees, and nothing of what is odd."""

from __future__ import annotations

import itertools
import shutil
import struct
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import cannot
from nvhook.linux import ldcache, ldmerge
from nvhook.linux.ldmerge import Name
from simhost import cachewriter, elfwriter

LIBRARIES = "usr/lib/x86_64-linux-gnu"
LIBRARIES32 = "usr/lib/i386-linux-gnu"
MACHINES = {LIBRARIES: "x86-64", LIBRARIES32: "i386"}
CONF = f"/{LIBRARIES}\n/{LIBRARIES32}\n/opt/lib\n"

# Names whose order is what makes a cache: digits, letters behind digits, one the beginning of another.
NAMES = st.sampled_from(
    [
        *("libcuda.so.1", "libcuda.so.2", "libcuda.so.10", "libcuda.so", "libcudart.so.12", "libcudadebugger.so.1"),
        *("libc.so.6", "libnvidia-ml.so.1", "libnvidia-tls.so.550.163.01", "libnvidia-tls.so.55", "libGLX_nvidia.so.0"),
        *("liba.so.1", "lib9.so.1", "lib10.so.1", "libz.so.1", "libzz.so.1", "lib-a.so.1", "lib_a.so.1", "libA.so.1"),
    ]
)
PLACES = st.sampled_from(list(MACHINES))


def _ldconfig(root: Path, *directories: str) -> None:
    if not shutil.which("ldconfig", path="/sbin:/usr/sbin"):
        cannot("needs ldconfig")
    command = ["/sbin/ldconfig", "-X", "-r", str(root), "-f", "/etc/ld.so.conf", "-C", "/etc/ld.so.cache"]
    subprocess.run([*command, *directories], check=True, capture_output=True)


def _tree(root: Path, libraries: set[tuple[str, str]], extra: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    (root / "etc").mkdir(parents=True, exist_ok=True)
    (root / "etc/ld.so.conf").write_text(CONF)
    for place, name in libraries:
        _add(root, place, name)
    for name in extra:
        _add(root, f"{LIBRARIES}/glibc-hwcaps/x86-64-v2", name)
        _add(root, "opt/lib", name)


def _add(root: Path, place: str, name: str) -> None:
    """A library whose SONAME is its name."""
    path = root / place / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        machine = MACHINES.get(place, "x86-64")
        path.write_bytes(elfwriter.shared_object(name, ["libc.so.6"], machine=machine))


def _entries(data: bytes) -> list[tuple[str, str, int, int, int]]:
    return [(item.name, item.path, item.flags, item.hwcap, item.osversion) for item in ldcache.parse(data)]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sets(st.tuples(PLACES, NAMES), max_size=14),
    st.sets(NAMES, max_size=3),
    st.lists(st.tuples(PLACES, NAMES), min_size=1, max_size=8, unique=True),
)
def test_as_ldconfig(
    tmp_path_factory: pytest.TempPathFactory, before: set[tuple[str, str]], extra: set[str], ours: list[tuple[str, str]]
) -> None:
    """The image's libraries, some for better processors; then ours, some in the place of the image's."""
    root = tmp_path_factory.mktemp("tree")
    _tree(root, before, extra)
    _ldconfig(root)
    data = (root / "etc/ld.so.cache").read_bytes()
    for place, name in ours:
        _add(root, place, name)
    _ldconfig(root, *dict.fromkeys(f"/{place}" for place, _ in ours))
    merged = ldmerge.merge(data, [Name(f"/{place}", name, MACHINES[place]) for place, name in ours])
    assert _entries(merged) == _entries((root / "etc/ld.so.cache").read_bytes())
    listed = subprocess.run(
        ["/sbin/ldconfig", "-p", "-C", "/dev/stdin"], input=merged, capture_output=True, check=False
    )
    assert listed.returncode == 0, listed.stderr
    shutil.rmtree(root)


def test_extension_still_refers_to_its_strings(tmp_path: Path) -> None:
    """`ldconfig -p` prints the subdirectory of glibc-hwcaps by way of them."""
    _tree(tmp_path, {(LIBRARIES, "liba.so.1")}, {"libz.so.1"})
    _ldconfig(tmp_path)
    data = (tmp_path / "etc/ld.so.cache").read_bytes()
    (tmp_path / "merged").write_bytes(ldmerge.merge(data, [Name("/opt/ours", "libcuda.so.1", "x86-64")]))
    listed = subprocess.run(
        ["/sbin/ldconfig", "-p", "-C", str(tmp_path / "merged")], capture_output=True, text=True, check=True
    ).stdout
    assert f'libz.so.1 (libc6,x86-64, hwcap: "x86-64-v2") => /{LIBRARIES}/glibc-hwcaps/x86-64-v2/libz.so.1' in listed
    assert "libcuda.so.1 (libc6,x86-64) => /opt/ours/libcuda.so.1" in listed
    assert "ldconfig (" in listed


def _cache(*names: str) -> bytes:
    return cachewriter.cache([{"name": name, "flags": "libc6,x86-64", "path": f"/lib/{name}"} for name in names])


CUDA = [Name("/usr/lib", "libcuda.so.1", "x86-64")]


def test_before_the_image_s_own() -> None:
    merged = ldmerge.merge(_cache("libcuda.so.1"), CUDA)
    assert [path for _, path, *_ in _entries(merged)] == ["/usr/lib/libcuda.so.1", "/lib/libcuda.so.1"]


def test_second_merge_changes_nothing() -> None:
    once = ldmerge.merge(_cache("libc.so.6", "libz.so.1"), CUDA)
    assert ldmerge.merge(once, CUDA) is once


def test_old_part_is_left_away() -> None:
    """What ldconfig of glibc 2.31 and before writes: Ubuntu 20.04, CentOS 7."""
    old = struct.pack("<11sxI", b"ld.so-1.7.0", 1) + struct.pack("<iII", 1, 0, 0)
    data = old + b"\0" * (-len(old) % 8) + _cache("libc.so.6")
    assert [name for name, *_ in _entries(ldmerge.merge(data, CUDA))] == ["libcuda.so.1", "libc.so.6"]


def test_directories() -> None:
    assert ldmerge.directories(ldmerge.merge(_cache("libc.so.6"), CUDA)) == ["/lib", "/usr/lib"]


GOOD = _cache("libc.so.6", "libcuda.so.1")
ODD = {
    "empty": b"",
    "text": b"not a cache at all" * 9,
    "cut-in-the-header": GOOD[:40],
    "cut-in-the-table": GOOD[:60],
    "cut-in-the-strings": GOOD[:-1],
    "big-endian": GOOD[:28] + b"\x03" + GOOD[29:],
    "count-too-large": GOOD[:20] + struct.pack("<I", 1 << 31) + GOOD[24:],
    "name-outside": GOOD[:52] + struct.pack("<I", 1 << 31) + GOOD[56:],
    "extension-outside": GOOD[:32] + struct.pack("<I", 1 << 31) + GOOD[36:],
    "extension-inside": GOOD[:32] + struct.pack("<I", 48) + GOOD[36:],
    "extension-unknown": GOOD[:32] + struct.pack("<I", len(GOOD)) + GOOD[36:] + b"\1\2\3\4" * 8,
    "one-name-a-thousand-times": _cache(*["libcuda.so.1"] * 1000),
}


@pytest.mark.parametrize("data", ODD.values(), ids=ODD)
def test_odd_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        ldmerge.merge(data, CUDA)


@given(st.binary(max_size=64), st.integers(min_value=0, max_value=len(GOOD)))
def test_damage_is_refused_or_harmless(piece: bytes, place: int) -> None:
    data = GOOD[:place] + piece + GOOD[place + len(piece) :]
    try:
        merged = ldmerge.merge(data, CUDA)
    except ValueError:
        return
    assert len(merged) < len(data) + 200


def test_extension_of_many_sections_is_refused() -> None:
    """Each may be as long as the file: a cache of 1 MB would have taken gigabytes."""
    extension = struct.pack("<II", 0xEAA42174, 3) + struct.pack("<IIII", 0, 0, 0, len(GOOD)) * 3
    data = GOOD[:32] + struct.pack("<I", len(GOOD)) + GOOD[36:] + extension
    with pytest.raises(ValueError, match="more than 2 sections"):
        ldmerge.merge(data, CUDA)
    with pytest.raises(ValueError, match="more than 2 sections"):
        ldmerge.directories(data)


def test_name_longer_than_a_file_name_is_refused() -> None:
    with pytest.raises(ValueError, match="a name of more than 255 bytes"):
        ldmerge.merge(_cache("9" * 256), CUDA)


def test_time_does_not_grow_with_the_image() -> None:
    data = _cache(*(f"lib{number}.so.1" for number in range(3000)))
    names = [Name("/usr/lib", f"libnvidia-{number}.so.1", "x86-64") for number in range(30)]
    spent = min(_spent(lambda: ldmerge.merge(data, names)) for _ in range(5))
    few = min(_spent(lambda: ldmerge.merge(GOOD, names)) for _ in range(5))
    assert spent < few + 0.02


def _spent(work: object) -> float:
    begin = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - begin


def test_order_of_names_is_the_linkers() -> None:
    names = ["libcuda.so", "libcuda.so.1", "libcuda.so.2", "libcuda.so.10", "libcudart.so.1", "liba1", "liba", "lib-1"]
    for one, other in itertools.product(names, names):
        ordered = cachewriter._compare(one, other)
        assert (ldmerge._key(one.encode()) > ldmerge._key(other.encode())) == (ordered > 0)


def _raw_cache(strings: bytes, entries: int = 1, extension: bytes = b"") -> bytes:
    start = ldcache.HEADER.size + entries * ldcache.ENTRY.size
    at = start + len(strings) if extension else 0
    header = ldcache.HEADER.pack(ldcache.MAGIC, ldcache.VERSION, entries, len(strings), ldcache.LITTLE_ENDIAN, at)
    return header + ldcache.ENTRY.pack(0x303, start, start, 0, 0) * entries + strings + extension


@pytest.mark.parametrize(
    "strings",
    [
        pytest.param(b"/\0" * 2_000_000, id="one-directory-millions-of-times"),
        pytest.param(b"".join(b"/%x/\0" % number for number in range(500_000)), id="as-many-directories"),
        pytest.param(b"\0" * 4_000_000, id="empty-ones"),
        pytest.param(b"/a/b\0" * 200, id="a-few-too-many"),
    ],
)
def test_cache_with_more_strings_than_its_entries_have(strings: bytes) -> None:
    with pytest.raises(ValueError, match="more strings than its entries have"):
        ldmerge.directories(_raw_cache(strings))


def test_cache_with_as_many_strings_as_its_entries_have() -> None:
    entries = [{"name": f"l{n}", "flags": "libc6,x86-64", "path": f"/d{n}/l{n}"} for n in range(3000)]
    assert len(ldmerge.directories(cachewriter.cache(entries))) == 3000


def _extension(content: bytes, start: int) -> bytes:
    return struct.pack("<II", 0xEAA42174, 1) + struct.pack("<IIII", 1, 0, start + 24, len(content)) + content


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"\xff" * 4, id="string-beyond-any-file"),
        pytest.param(b"\0" * (4 << 20), id="a-million-of-them"),
    ],
)
def test_cache_with_subdirectories_that_cannot_be(content: bytes) -> None:
    strings = b"libc.so.6\0"
    start = ldcache.HEADER.size + ldcache.ENTRY.size + len(strings)
    data = _raw_cache(strings, extension=_extension(content, start))
    with pytest.raises(ValueError, match=r"lies outside|cut off or too long"):
        ldmerge.merge(data, CUDA)
