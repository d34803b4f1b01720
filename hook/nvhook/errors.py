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
Anything that is not an NvhookError is a fault of ours and keeps its traceback.
"""

from __future__ import annotations


class NvhookError(Exception):
    """`message` names the object and the reason; `hint` is what the user can do about it, or empty."""

    stage = "internal"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        line = f"{self.stage} error: {self.message}"
        if self.hint:
            line += f"; {self.hint}"
        return one_line(line)


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


# The remedy where look-ups in a container's tree have taken too long (linux/root.py).
SLOW_TREE = "take chains of symbolic links out of the image, or start it again when its storage is less busy"


def one_line(text: str) -> str:
    """An image can put newlines and terminal escapes into the names we quote; the line stays one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def reason(error: OSError) -> str:
    """The operating system's text for an OSError, without errno and file name, and without its capital letter."""
    text = error.strerror or str(error)
    return text[:1].lower() + text[1:]  # the rest may be text of ours, with paths in it
