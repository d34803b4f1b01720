# SPDX-License-Identifier: Apache-2.0
"""What can go wrong, as one family.

    NvhookError             one line for the user; exit 1
    ├── ConfigError         config.toml or an engine's file: does not parse, unknown value
    ├── SpecError           the bundle: config.json or the state on stdin
    ├── RequestError        what the container asks for: capability, device list
    ├── DeviceError         the host's GPUs and device nodes
    ├── DriverError         the host's kernel module and driver libraries
    ├── RequirementError    NVIDIA_REQUIRE_*: not satisfied, or not an expression
    ├── ContainerError      the container's process, namespace or root filesystem
    ├── MountError          an edit that could not be applied
    ├── LdcacheError        the container's linker cache
    └── RuntimeLookupError  the low-level runtime

Every message reads `<stage> error: <what we did to which object>: <why>` and, where there is one, the remedy
after a semicolon. They are raised where the fault is and printed in one place, by the program's main().
Anything that is not an NvhookError is a fault of ours and keeps its traceback. What is worth saying and stops nothing
is a Finding.

An image writes part of many messages, so their size is its choice. A text becomes a line in `one_line` alone, which
reads no more of it than the line can hold.
"""

from __future__ import annotations

# Bytes that a line of ours takes as a string in JSON, the larger of its two forms. With level and time it is an entry
# of less than 8 KiB.
MAX_LINE = 8000
_MAX_MESSAGE, _MAX_REMEDY = 6400, 900  # together less than MAX_LINE, so that the remedy is never what is cut
_LONGEST_ESCAPE = len("\\U0010ffff")


class NvhookError(Exception):
    """`message` names the object and the reason; `remedy` is what the user can do about it, or empty."""

    stage = "internal"

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        line = f"{self.stage} error: {one_line(self.message, _MAX_MESSAGE)}"
        if self.remedy:  # the useful part: what the message quotes cannot push it out
            line += f"; {one_line(self.remedy, _MAX_REMEDY)}"
        return line


class ConfigError(NvhookError):
    stage = "config"


class SpecError(NvhookError):
    stage = "spec"


class RequestError(NvhookError):
    stage = "request"


class DeviceError(NvhookError):
    stage = "device"


class DriverError(NvhookError):
    stage = "driver"


class RequirementError(NvhookError):
    stage = "requirement"


class ContainerError(NvhookError):
    stage = "container"


class MountError(NvhookError):
    stage = "mount"


class LdcacheError(NvhookError):
    stage = "ldcache"


class RuntimeLookupError(NvhookError):
    stage = "runtime"


OK, WARNING, FAILURE, SKIPPED = "ok", "warning", "failure", "skipped"


class Finding:
    """What an examination says, which stops nothing.

    reason   what `object` is like; `object` is empty where the reason names it
    remedy   what the user can do about it, or empty
    status   FAILURE where something that is asked for does not work; SKIPPED for what could not be examined
    check    the name of the check in `nvhook doctor`, the same in every version; empty elsewhere
    """

    __slots__ = ("check", "object", "reason", "remedy", "status")

    def __init__(self, reason: str, remedy: str = "", *, object: str = "", status: str = FAILURE) -> None:  # noqa: A002
        self.object = object
        self.reason = reason
        self.remedy = remedy
        self.status = status
        self.check = ""


# The remedy where look-ups in a container's tree have taken too long (linux/root.py).
SLOW_TREE = "take chains of symbolic links out of the image, or start it again when its storage is less busy"


def one_line(text: str, most: int = MAX_LINE) -> str:
    """An image can put newlines and terminal escapes into the names we quote; the line stays one line.

    Of one that would take more than `most` bytes as a string in JSON the middle is left out, and the line says so.
    """
    if len(text) <= most and (len(text) * (_LONGEST_ESCAPE + 1) <= most or _size(text) <= most):
        return text if text.isprintable() else "".join(map(_escape, text))
    mark = f" [… of {len(text)} characters …] "
    room = most - _size(mark)
    # A character takes a byte or more, so there is no need to read more of it.
    end = _fitting(text[:most], room * 3 // 4)
    begin = len(text) - _fitting(text[-most:][::-1], room // 4)
    # Where the text has been a line before, it may hold an escape, which stays whole or goes.
    escape = text.find("\\", max(0, end - _LONGEST_ESCAPE + 1), end)
    if escape >= 0:
        end = escape
    escape = text.rfind("\\", begin - _LONGEST_ESCAPE + 1, begin)
    if escape >= 0:
        begin = escape + _LONGEST_ESCAPE
    return "".join(map(_escape, text[:end])) + mark + "".join(map(_escape, text[begin:]))


def _escape(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def _size(text: str) -> int:
    """Bytes of the line that `text` becomes, as a string in JSON: it has a backslash before each `"` and backslash."""
    line = text if text.isprintable() else "".join(map(_escape, text))
    return len(line.encode()) + line.count("\\") + line.count('"')


def _fitting(text: str, room: int) -> int:
    """How many characters of `text` take no more than `room` bytes."""
    for count, character in enumerate(text):
        room -= _size(character)
        if room < 0:
            return count
    return len(text)


def reason(error: OSError) -> str:
    """The operating system's text for an OSError, without errno and file name, and without its capital letter."""
    text = error.strerror or str(error)
    return text[:1].lower() + text[1:]  # the rest may be text of ours, with paths in it
