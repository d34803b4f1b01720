# SPDX-License-Identifier: Apache-2.0
"""Tells systemd which devices a running container may open, where it manages the container's control group.

For a prestart hook, when nothing could be written into the container's spec any more. systemd applies the list that it
knows with every `daemon-reload`, whatever others have done to the control group since. Opening that is cgroups.py's.
"""

from __future__ import annotations

import os

from . import child
from .cgroups import up_to_scope

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .cgroups import Rule

_RUNNING = "/run/systemd/system"
_PROGRAMS = ("/usr/bin/systemctl", "/bin/systemctl", "/run/current-system/sw/bin/systemctl")
_SECONDS = 10
_MAX_TEXT = 1 << 16


def allow(proc_dir_fd: int, rules: list[Rule]) -> None:
    """Add `rules` to the list of the scope of the process whose /proc directory `proc_dir_fd` is, until that ends.

    Nothing to do where it is in none, or in one whose devices systemd does not limit: a list would make it begin to.
    OSError with what systemctl says.
    """
    unit = _scope(proc_dir_fd) if os.path.isdir(_RUNNING) else ""
    if not unit or _systemctl("show", "--property=DevicePolicy", "--", unit) == "DevicePolicy=auto":
        return
    _systemctl("set-property", "--runtime", "--", unit, *[f"DeviceAllow={_property(rule)}" for rule in rules])


def _property(rule: Rule) -> str:
    kind = {"c": "char", "b": "block"}[rule.type]
    return f"/dev/{kind}/{rule.major}:{rule.minor} {rule.access}"


def _scope(proc_dir_fd: int) -> str:
    """The innermost one that the process is in, or empty. Every hierarchy that systemd uses has the same."""
    fd = os.open("cgroup", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc_dir_fd)
    with open(fd, encoding="utf-8", errors="surrogateescape") as file:
        lines = file.read(_MAX_TEXT).split("\n")
    for line in lines:
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        name = up_to_scope(path)[0].rpartition("/")[2]
        if (hierarchy == "0" or controllers == "name=systemd") and name.endswith(".scope"):
            return name
    return ""


def _systemctl(*words: str) -> str:
    """The last line that it prints."""
    program = next((path for path in _PROGRAMS if os.access(path, os.X_OK)), _PROGRAMS[0])
    status, text = child.run([program, *words], {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}, _SECONDS)
    if status != 0:
        raise OSError(f"{program} {words[0]}: {text or f'status {status}'}")
    return text
