# SPDX-License-Identifier: Apache-2.0
"""Writes small ELF files: shared objects that a program can dlopen, and programs that exit with 0.

They hold what a reader of ELF files looks at: SONAME, NEEDED, the ABI note, class and machine, in program headers
and in sections. There is no code in a shared object; `symbols` gives it exported names, for a linker to find, and
`needs` and `defines` symbol versions: GLIBC_2.34 of libc.so.6.

The file is mapped twice. The first segment (read, execute) holds everything up to the dynamic section, the second
(read, write, because the dynamic linker writes addresses into it) the dynamic section alone, one _PAGE further up
in memory: so both may lie in one page of the file, which stays below 4 kB, while their permissions differ.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

_PAGE = 0x10000  # the largest page of the machines below (aarch64 has kernels with 64 kB)

_PT_LOAD, _PT_DYNAMIC, _PT_INTERP, _PT_NOTE, _PT_PHDR = 1, 2, 3, 4, 6
_PT_GNU_STACK = 0x6474E551
_PF_X, _PF_W, _PF_R = 1, 2, 4

_SHT_GNU_VERDEF, _SHT_GNU_VERNEED, _SHT_GNU_VERSYM = 0x6FFFFFFD, 0x6FFFFFFE, 0x6FFFFFFF
_SHT_PROGBITS, _SHT_STRTAB, _SHT_HASH, _SHT_DYNAMIC, _SHT_NOTE, _SHT_DYNSYM = 1, 3, 5, 6, 7, 11
_SHF_WRITE, _SHF_ALLOC, _SHF_EXECINSTR = 1, 2, 4

_DT_NULL, _DT_NEEDED, _DT_HASH, _DT_STRTAB, _DT_SYMTAB = 0, 1, 4, 5, 6
_DT_STRSZ, _DT_SYMENT, _DT_SONAME = 10, 11, 14
_DT_FLAGS_1, _DF_1_PIE = 0x6FFFFFFB, 0x08000000
_DT_VERSYM = 0x6FFFFFF0
_DT_VERDEF, _DT_VERDEFNUM, _DT_VERNEED, _DT_VERNEEDNUM = 0x6FFFFFFC, 0x6FFFFFFD, 0x6FFFFFFE, 0x6FFFFFFF


class Machine(NamedTuple):
    """What differs between machines: the numbers, the dynamic linker and how a program says exit(0)."""

    bits: int
    number: int  # e_machine
    interpreter: bytes
    exit_code: bytes


MACHINES = {
    # xor edi, edi; mov eax, 60; syscall
    "x86-64": Machine(64, 62, b"/lib64/ld-linux-x86-64.so.2", bytes.fromhex("31ff b83c000000 0f05")),
    # xor ebx, ebx; mov eax, 1; int 0x80
    "i386": Machine(32, 3, b"/lib/ld-linux.so.2", bytes.fromhex("31db b801000000 cd80")),
    # mov x0, 0; mov x8, 93; svc 0
    "aarch64": Machine(64, 183, b"/lib/ld-linux-aarch64.so.1", bytes.fromhex("000080d2 a80b80d2 010000d4")),
}


class _Layout:
    """The binary forms of one ELF class."""

    def __init__(self, bits: int) -> None:
        self.wide = bits == 64
        word = "Q" if self.wide else "I"
        self.header = f"<16sHHI{word}{word}{word}IHHHHHH"
        self.section = f"<II{word}{word}{word}{word}II{word}{word}"
        self.dynamic = "<qQ" if self.wide else "<iI"
        self.header_size = struct.calcsize(self.header)
        self.segment_size = 56 if self.wide else 32
        self.symbol_size = 24 if self.wide else 16
        self.dynamic_size = struct.calcsize(self.dynamic)

    def segment(self, kind: int, flags: int, section: _Section, align: int) -> bytes:
        offset, address, size = section.offset, section.address, len(section.content)
        if self.wide:  # the flags moved, to keep the eight-byte fields aligned
            return struct.pack("<IIQQQQQQ", kind, flags, offset, address, address, size, size, align)
        return struct.pack("<IIIIIIII", kind, offset, address, address, size, size, flags, align)

    def symbol(self, name: int, info: int, section: int, value: int) -> bytes:
        if self.wide:
            return struct.pack("<IBBHQQ", name, info, 0, section, value, 0)
        return struct.pack("<IIIBBH", name, value, 0, info, 0, section)


class _Section:
    def __init__(self, name: str, kind: int, flags: int, content: bytes, *, align: int = 8) -> None:
        self.name, self.kind, self.flags, self.content, self.align = name, kind, flags, content, align
        self.offset = self.address = self.link = self.info = self.entry_size = 0


class _Strings:
    """A string table; offset 0 is the empty string."""

    def __init__(self) -> None:
        self.content = b"\0"

    def add(self, text: str) -> int:
        offset = len(self.content)
        self.content += text.encode() + b"\0"
        return offset


def shared_object(
    soname: str | None,
    needed: list[str],
    *,
    machine: str = "x86-64",
    abi: list[int] | None = None,
    symbols: tuple[str, ...] = (),
    needs: dict[str, list[str]] | None = None,
    defines: tuple[str, ...] = (),
) -> bytes:
    """A shared object that any dynamic linker of `machine` loads, provided that it finds `needed`."""
    return _write(MACHINES[machine], soname, needed, abi, symbols, needs or {}, defines, program=False)


def program(needed: list[str], *, machine: str = "x86-64", abi: list[int] | None = None) -> bytes:
    """A program that needs `needed` to start and then exits with 0."""
    return _write(MACHINES[machine], None, needed, abi, (), {}, (), program=True)


def _write(
    machine: Machine,
    soname: str | None,
    needed: list[str],
    abi: list[int] | None,
    symbols: tuple[str, ...],
    needs: dict[str, list[str]],
    defines: tuple[str, ...],
    *,
    program: bool,
) -> bytes:
    layout = _Layout(machine.bits)
    strings = _Strings()
    dynamic = [(_DT_NEEDED, strings.add(name)) for name in needed]
    if soname is not None:
        dynamic.append((_DT_SONAME, strings.add(soname)))
    if program:
        dynamic.append((_DT_FLAGS_1, _DF_1_PIE))
    names = [strings.add(name) for name in symbols]

    sections = _sections(machine, layout, abi, program=program)
    versions = _version_sections(len(names) + 1, needs, defines, strings)
    sections += _symbol_sections(layout, names, strings) + versions
    counts = {".gnu.version_d": (_DT_VERDEFNUM, len(defines)), ".gnu.version_r": (_DT_VERNEEDNUM, len(needs))}
    dynamic += [counts[section.name] for section in versions if section.name in counts]
    size = layout.dynamic_size * (len(dynamic) + len(versions) + 6)
    sections.append(_Section(".dynamic", _SHT_DYNAMIC, _SHF_ALLOC | _SHF_WRITE, bytes(size)))
    segments = 4 + (abi is not None) + 2 * program
    _place(sections, layout.header_size + segments * layout.segment_size)
    _fill_dynamic(layout, sections, dynamic)
    return _join(machine, layout, sections, program=program)


def _sections(machine: Machine, layout: _Layout, abi: list[int] | None, *, program: bool) -> list[_Section]:
    sections = []
    if program:
        sections.append(_Section(".interp", _SHT_PROGBITS, _SHF_ALLOC, machine.interpreter + b"\0"))
    if abi is not None:
        # name size, content size, type NT_GNU_ABI_TAG, name; then 0 for Linux and the version
        note = struct.pack("<III4sIIII", 4, 16, 1, b"GNU\0", 0, *abi)
        sections.append(_Section(".note.ABI-tag", _SHT_NOTE, _SHF_ALLOC, note))
    # Exported names need a place to stand for; it is never called.
    code = machine.exit_code if program else bytes(layout.dynamic_size)
    sections.append(_Section(".text", _SHT_PROGBITS, _SHF_ALLOC | _SHF_EXECINSTR, code))
    return sections


def _symbol_sections(layout: _Layout, names: list[int], strings: _Strings) -> list[_Section]:
    """.hash, .dynsym and .dynstr. The hash table has one bucket: a chain through all the symbols."""
    count = len(names) + 1  # symbol 0 is the undefined one
    chain = [0, *range(2, count), 0][:count] if names else [0]
    hash_table = struct.pack(f"<{3 + count}I", 1, count, 1 if names else 0, *chain)
    global_function = 0x12
    table = layout.symbol(0, 0, 0, 0)
    # SHN_ABS: an absolute address is as good as any for a name that is never called
    table += b"".join(layout.symbol(name, global_function, 0xFFF1, 1) for name in names)
    symbols = _Section(".dynsym", _SHT_DYNSYM, _SHF_ALLOC, table)
    symbols.info, symbols.entry_size = 1, layout.symbol_size  # info: the first symbol that is not local
    return [
        _Section(".hash", _SHT_HASH, _SHF_ALLOC, hash_table),
        symbols,
        _Section(".dynstr", _SHT_STRTAB, _SHF_ALLOC, strings.content, align=1),
    ]


def _version_sections(
    count: int, needs: dict[str, list[str]], defines: tuple[str, ...], strings: _Strings
) -> list[_Section]:
    """None, or .gnu.version, in which each of the `count` symbols is of no version, and one or two that name some."""
    sections = []
    if defines:
        table = b"".join(
            struct.pack(
                "<4H3I2I",
                1,
                int(index == 1),
                index,
                1,
                _hash(name),
                20,
                28 * (index < len(defines)),
                strings.add(name),
                0,
            )
            for index, name in enumerate(defines, 1)
        )
        sections.append(_Section(".gnu.version_d", _SHT_GNU_VERDEF, _SHF_ALLOC, table))
    if needs:
        table, number = b"", len(defines) + 2
        for file, names in needs.items():
            is_last = file == list(needs)[-1]
            following = 0 if is_last else 16 * (len(names) + 1)
            table += struct.pack("<2H3I", 1, len(names), strings.add(file), 16, following)
            for place, name in enumerate(names, 1):
                table += struct.pack("<I2H2I", _hash(name), 0, number, strings.add(name), 16 * (place < len(names)))
                number += 1
        sections.append(_Section(".gnu.version_r", _SHT_GNU_VERNEED, _SHF_ALLOC, table))
    if sections:
        table = struct.pack(f"<{count}H", 0, *[1] * (count - 1))
        sections.append(_Section(".gnu.version", _SHT_GNU_VERSYM, _SHF_ALLOC, table))
    return sections


def _hash(name: str) -> int:
    """As the gABI has it, for the tables of versions too."""
    value = 0
    for byte in name.encode():
        value = (value << 4) + byte
        high = value & 0xF0000000
        value = (value ^ high >> 24) & ~high
    return value


_VERSION_TAGS = {".gnu.version": _DT_VERSYM, ".gnu.version_d": _DT_VERDEF, ".gnu.version_r": _DT_VERNEED}


def _place(sections: list[_Section], offset: int) -> None:
    """Give each section its offset and address; what is written to lies a page further up."""
    for section in sections:
        offset += -offset % section.align
        section.offset = offset
        section.address = offset + (_PAGE if section.flags & _SHF_WRITE else 0)
        offset += len(section.content)


def _fill_dynamic(layout: _Layout, sections: list[_Section], dynamic: list[tuple[int, int]]) -> None:
    by_name = {section.name: section for section in sections}
    dynamic = [
        *dynamic,
        *[(tag, by_name[name].address) for name, tag in _VERSION_TAGS.items() if name in by_name],
        (_DT_HASH, by_name[".hash"].address),
        (_DT_STRTAB, by_name[".dynstr"].address),
        (_DT_SYMTAB, by_name[".dynsym"].address),
        (_DT_STRSZ, len(by_name[".dynstr"].content)),
        (_DT_SYMENT, layout.symbol_size),
        (_DT_NULL, 0),
    ]
    by_name[".dynamic"].content = b"".join(struct.pack(layout.dynamic, *entry) for entry in dynamic)
    by_name[".dynamic"].entry_size = layout.dynamic_size
    order = [section.name for section in sections]
    by_name[".dynsym"].link = by_name[".dynamic"].link = order.index(".dynstr") + 1
    by_name[".hash"].link = order.index(".dynsym") + 1


def _segments(layout: _Layout, sections: list[_Section], *, program: bool) -> list[bytes]:
    by_name = {section.name: section for section in sections}
    dynamic = by_name[".dynamic"]
    everything_before = _Section("", 0, 0, bytes(dynamic.offset))
    segments = []
    if program:  # both must come before the first PT_LOAD; by PT_PHDR the dynamic linker learns where we are
        headers = _Section("", 0, 0, bytes(sections[0].offset - layout.header_size))
        headers.offset = headers.address = layout.header_size
        segments.append(layout.segment(_PT_PHDR, _PF_R, headers, 8))
        segments.append(layout.segment(_PT_INTERP, _PF_R, by_name[".interp"], 1))
    segments.append(layout.segment(_PT_LOAD, _PF_R | _PF_X, everything_before, _PAGE))
    segments.append(layout.segment(_PT_LOAD, _PF_R | _PF_W, dynamic, _PAGE))
    segments.append(layout.segment(_PT_DYNAMIC, _PF_R | _PF_W, dynamic, 8))
    if ".note.ABI-tag" in by_name:
        segments.append(layout.segment(_PT_NOTE, _PF_R, by_name[".note.ABI-tag"], 4))
    segments.append(layout.segment(_PT_GNU_STACK, _PF_R | _PF_W, _Section("", 0, 0, b""), 16))
    return segments


def _join(machine: Machine, layout: _Layout, sections: list[_Section], *, program: bool) -> bytes:
    """The file: header, segments, sections, the sections' names, section headers."""
    names = _Strings()
    name_offsets = [names.add(section.name) for section in sections]
    own_name = names.add(".shstrtab")
    last = sections[-1]
    shstrtab = _Section(".shstrtab", _SHT_STRTAB, 0, names.content, align=1)
    shstrtab.offset = last.offset + len(last.content)
    end = shstrtab.offset + len(shstrtab.content)
    table_offset = end + -end % 8

    segments = _segments(layout, sections, program=program)
    header = struct.pack(
        layout.header,
        struct.pack("<4sBBB9x", b"\x7fELF", 2 if layout.wide else 1, 1, 1),
        3,  # ET_DYN
        machine.number,
        1,
        next(section.address for section in sections if section.name == ".text") if program else 0,
        layout.header_size,
        table_offset,
        0,
        layout.header_size,
        layout.segment_size,
        len(segments),
        struct.calcsize(layout.section),
        len(sections) + 2,
        len(sections) + 1,
    )
    content = bytearray(table_offset)
    start = header + b"".join(segments)
    content[: len(start)] = start
    for section in [*sections, shstrtab]:
        content[section.offset : section.offset + len(section.content)] = section.content
    content += bytes(struct.calcsize(layout.section))  # section 0
    for section, name in zip([*sections, shstrtab], [*name_offsets, own_name], strict=True):
        content += struct.pack(
            layout.section,
            name,
            section.kind,
            section.flags,
            section.address,
            section.offset,
            len(section.content),
            section.link,
            section.info,
            section.align,
            section.entry_size,
        )
    return bytes(content)
