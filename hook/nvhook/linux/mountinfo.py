# SPDX-License-Identifier: Apache-2.0
"""/proc/<pid>/mountinfo, as text (proc_pid_mountinfo(5)).

The kernel escapes its own separators in a path, and no others: an image may name a volume with a no-break space or a
line separator of Unicode, which str.split and str.splitlines would take for the end of a field or a line.
"""

from __future__ import annotations

_MAX_DIGITS = 10  # of a mount's id


class Mount:
    """`root` is what of the file system is mounted, its end `//deleted` if that is gone; `point` where it is."""

    __slots__ = ("fstype", "id", "point", "root")

    def __init__(self, id: int, root: str, point: str, fstype: str) -> None:  # noqa: A002 - the kernel's name
        self.id = id
        self.root = root
        self.point = point
        self.fstype = fstype


def mounts(text: str) -> list[Mount]:
    """All of them, in the kernel's order."""
    found = []
    for fields in _lines(text):
        if len(fields) < 7 or "-" not in fields[6:-1] or not fields[0].isdecimal() or len(fields[0]) > _MAX_DIGITS:
            continue  # no line of the kernel's
        fstype = fields[fields.index("-", 6) + 1]
        found.append(Mount(int(fields[0]), unescape(fields[3]), unescape(fields[4]), fstype))
    return found


def mount_points(text: str) -> set[str]:
    """Every mount point, as seen from the process's root."""
    return {unescape(fields[4]) for fields in _lines(text) if len(fields) > 4}


def shared(text: str) -> frozenset[int]:
    """The ids of the mounts that tell others, of their peer group, what is mounted on them."""
    found = set()
    for fields in _lines(text):
        number, optional = fields[0], fields[6:]
        if "-" not in optional or not number.isdecimal() or len(number) > _MAX_DIGITS:
            continue  # no line of the kernel's
        if any(field.startswith("shared:") for field in optional[: optional.index("-")]):
            found.add(int(number))
    return frozenset(found)


def _lines(text: str) -> list[list[str]]:
    return [line.split(" ") for line in text.split("\n")]


def unescape(field: str) -> str:
    r"""Space, tab, newline and backslash stand in the file as \040, \011, \012 and \134."""
    if "\\" not in field:
        return field
    parts = field.split("\\")
    plain = parts[0]
    for part in parts[1:]:
        octal = part[:3]
        if len(octal) == 3 and all(digit in "01234567" for digit in octal):
            plain += chr(int(octal, 8)) + part[3:]
        else:
            plain += "\\" + part
    return plain
