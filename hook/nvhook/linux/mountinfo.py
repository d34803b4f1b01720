# SPDX-License-Identifier: Apache-2.0
"""/proc/<pid>/mountinfo, as text (proc_pid_mountinfo(5)).

The kernel escapes its own separators in a path, and no others: an image may name a volume with a no-break space or a
line separator of Unicode, which str.split and str.splitlines would take for the end of a field or a line.
"""

from __future__ import annotations

_MAX_DIGITS = 10  # of a mount's id


class MountEntry:
    """`root` is what of the file system is mounted, its end `//deleted` if that is gone; `point` where it is, and
    `parent` the id of the mount that it is on."""

    __slots__ = ("fstype", "id", "parent", "point", "root")

    def __init__(self, id: int, parent: int, root: str, point: str, fstype: str) -> None:  # noqa: A002 - the kernel's name
        self.id = id
        self.parent = parent
        self.root = root
        self.point = point
        self.fstype = fstype


def mounts(text: str) -> list[MountEntry]:
    """All of them, in the kernel's order."""
    return [mount for line in text.split("\n") if (mount := _mount(line))]


def at(text: str, point: str) -> list[MountEntry]:
    """Those whose mount point is `point`, in the kernel's order; only lines with that path in them are read."""
    field = f" {escape(point)} "
    found = [_mount(line) for line in text.split("\n") if field in line]
    return [mount for mount in found if mount and mount.point == point]


def topmost(stack: list[MountEntry]) -> MountEntry:
    """Of several mounts at one point the one that is seen there: none of the others is on it."""
    below = {mount.parent for mount in stack}
    return next((mount for mount in reversed(stack) if mount.id not in below), stack[-1])


def below(text: str, stack: list[MountEntry]) -> MountEntry | None:
    """The mount that the lowest of the `stack`, mounts at one point, is on; None where the process cannot reach it."""
    ids = {mount.id for mount in stack}
    wanted = {mount.parent for mount in stack} - ids
    for line in text.split("\n"):
        number = line.partition(" ")[0]
        if _is_id(number) and int(number) in wanted:
            return _mount(line)
    return None


def _mount(line: str) -> MountEntry | None:
    fields = line.split(" ")
    if len(fields) < 7 or "-" not in fields[6:-1] or not (_is_id(fields[0]) and _is_id(fields[1])):
        return None  # no line of the kernel's
    fstype = fields[fields.index("-", 6) + 1]
    return MountEntry(int(fields[0]), int(fields[1]), unescape(fields[3]), unescape(fields[4]), fstype)


def _is_id(field: str) -> bool:
    return field.isdecimal() and field.isascii() and len(field) <= _MAX_DIGITS


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


def escape(path: str) -> str:
    r"""As the kernel writes a path: space, tab, newline and backslash become \040, \011, \012 and \134."""
    for character in "\\ \t\n":
        path = path.replace(character, f"\\{ord(character):03o}")
    return path


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
