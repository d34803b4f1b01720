# SPDX-License-Identifier: Apache-2.0
"""What a device program of a cgroup (version 2) answers for one device. The kernel cannot be asked without opening the
device from within, so the few instructions that such programs are made of are worked through here.

Not for other programs: what reads more than its context, calls, or uses maps is a ValueError. Instruction set: the
kernel's Documentation/bpf/standardization/instruction-set.rst.
"""

from __future__ import annotations

import struct

_LDX, _ALU, _JMP, _JMP32, _ALU64 = 1, 4, 5, 6, 7
_EXIT = 0x95
_FAR_JUMP = 0x06  # its distance is the constant; no device program is so long
_BY_REGISTER = 0x08
_WIDTHS = {0x00: 4, 0x08: 2, 0x10: 1}  # of a load, by the size bits of its code
_MEMORY = 0x60  # the mode of a load
_CONTEXT = 1 << 62  # what the register holds that points to the request
_MAX_STEPS = 100_000
_MASK = (1 << 64) - 1

_TYPES = {"b": 1, "c": 2}
_ACCESS = {"m": 1, "r": 2, "w": 4}


def allows(program: bytes, kind: str, major: int, minor: int, access: str) -> bool:
    """`kind` c or b; `access` letters of r, w and m, all at once."""
    wanted = sum(_ACCESS[letter] for letter in set(access))
    request = struct.pack("<3I", wanted << 16 | _TYPES[kind], major, minor)
    code = list(struct.iter_unpack("<BBhi", program))
    registers = [0] * 12
    registers[1] = _CONTEXT
    place = 0
    for _ in range(_MAX_STEPS):
        if not 0 <= place < len(code):
            raise ValueError("it jumps out of itself")
        op, both, offset, constant = code[place]
        if op == _EXIT:
            return registers[0] & 0xFFFFFFFF != 0
        place += 1 + _step(op, both & 0xF, both >> 4, offset, constant, registers, request)
    raise ValueError(f"it takes more than {_MAX_STEPS} steps")


def _step(op: int, to: int, source: int, offset: int, constant: int, registers: list[int], request: bytes) -> int:
    """Do one instruction; the answer is how far it jumps."""
    if max(to, source) >= len(registers):
        raise ValueError("it names a register that does not exist")
    value = registers[source] if op & _BY_REGISTER else constant & _MASK
    kind = op & 7
    if kind == _LDX:
        registers[to] = _load(op, registers[source], offset, request)
    elif kind in (_ALU, _ALU64):
        bits = 64 if kind == _ALU64 else 32
        registers[to] = _computed(op & 0xF0, registers[to], value, bits)
    elif kind in (_JMP, _JMP32) and op != _FAR_JUMP:
        bits = 64 if kind == _JMP else 32
        return offset if _holds(op & 0xF0, registers[to], value, bits) else 0
    else:
        raise ValueError(f"the instruction {op:#04x} is none of a device program's")
    return 0


def _load(op: int, address: int, offset: int, request: bytes) -> int:
    width = _WIDTHS.get(op & 0x18, 0)
    place = address - _CONTEXT + offset
    if op & 0xE0 != _MEMORY or not width or not 0 <= place <= len(request) - width:
        raise ValueError("it reads something else than the request")
    return int.from_bytes(request[place : place + width], "little")


def _computed(operation: int, left: int, right: int, bits: int) -> int:
    mask = (1 << bits) - 1
    left, right = left & mask, right & mask
    shift = right & (bits - 1)
    results = {
        0x00: left + right,
        0x10: left - right,
        0x40: left | right,
        0x50: left & right,
        0x60: left << shift,
        0x70: left >> shift,
        0xA0: left ^ right,
        0xB0: right,
    }
    if operation not in results:
        raise ValueError(f"the operation {operation:#04x} is none of a device program's")
    return results[operation] & mask


def _holds(operation: int, left: int, right: int, bits: int) -> bool:
    mask = (1 << bits) - 1
    left, right = left & mask, right & mask
    results = {
        0x00: True,
        0x10: left == right,
        0x20: left > right,
        0x30: left >= right,
        0x40: bool(left & right),
        0x50: left != right,
        0xA0: left < right,
        0xB0: left <= right,
    }
    if operation not in results:
        raise ValueError(f"the jump {operation:#04x} is none of a device program's")
    return results[operation]
