# SPDX-License-Identifier: Apache-2.0
"""Which processes have a GPU's device node open, and which containers they are in, read from /proc alone.

CUDA opens the node of every GPU that it can see, so this is who could use a GPU, not who computes on it. Names of
processes, and paths in a container's own mounts, are written by the container: they are shown, and decide nothing.
A node is known by its path and not asked for its number, because a file system of the container's could let that
question wait for ever.

Containers are known by the cgroup that their engine made; no engine is asked. Of nested ones the outermost counts: it
is the one that this host's engine knows, and nothing inside it could have named it.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from itertools import islice, pairwise

_NODE = re.compile(r".*/nvidia([0-9]{1,7})(?: \(deleted\))?")
_DXG = re.compile(r".*/dev/dxg")
_MOST_FILES = 1 << 14  # of one process
_SECONDS = 5  # for all of them: who has many processes with many files should not hold us up
_MAX_SIZE = 1 << 16

_ID = "([0-9a-f]{64})"
# A cgroup's path has the form on the right -> what made it. With systemd a scope, else a directory in the engine's own.
_ENGINES = (
    ("docker", re.compile(rf"docker-{_ID}[.]scope|docker/{_ID}")),
    ("podman", re.compile(rf"libpod-(?:payload-)?{_ID}(?:[.]scope)?")),
    ("cri-o", re.compile(rf"crio-{_ID}(?:[.]scope)?")),
    ("containerd", re.compile(rf"(?:cri-containerd|nerdctl)-{_ID}[.]scope|(?:default|k8s[.]io)/{_ID}")),
    ("kubernetes", re.compile(rf"pod[0-9a-f-]{{32,36}}/{_ID}")),
    ("lxc", re.compile(r"lxc[.]payload[.]([^/]+)|lxc/([^/]+)")),
)


@dataclass(frozen=True)
class ContainerId:
    """`engine`: a word of _ENGINES; `id` is that engine's, with LXC a name."""

    engine: str
    id: str

    def describe(self) -> dict[str, object]:
        return {"engine": self.engine, "id": self.id}

    def __str__(self) -> str:
        return f"{self.engine} {self.id if self.engine == 'lxc' else self.id[:12]}"


@dataclass(frozen=True)
class Process:
    """`minors` of the GPUs' nodes that it has open; none on WSL 2, where one node is for all."""

    pid: int
    name: str
    minors: tuple[int, ...]
    container: ContainerId | None


def find(proc: str) -> tuple[list[Process], int]:
    """(those that have a node open, how many could not be inspected), of the /proc at `proc`."""
    found, hidden = [], 0
    end = time.monotonic() + _SECONDS
    for pid in sorted(int(name) for name in os.listdir(proc) if name.isdecimal() and name.isascii()):
        directory = f"{proc}/{pid}"
        if time.monotonic() > end:
            hidden += 1
            continue
        try:
            minors = _minors(f"{directory}/fd")
        except PermissionError:
            hidden += os.path.exists(directory)  # a link of a process that has just ended is forbidden too
            continue
        except OSError:
            continue  # it has ended
        if minors is not None:
            container = of_cgroup(_read(f"{directory}/cgroup"))
            found.append(Process(pid, _read(f"{directory}/comm").rstrip("\n"), minors, container))
    return found, hidden


def _minors(directory: str) -> tuple[int, ...] | None:
    """None for a process without any."""
    minors = set()
    has_any = False
    with os.scandir(directory) as entries:
        for entry in islice(entries, _MOST_FILES):
            path = _target(entry.path)
            node = _NODE.fullmatch(path)
            if node:
                minors.add(int(node[1]))
            has_any = has_any or bool(node or _DXG.fullmatch(path))
    return tuple(sorted(minors)) if has_any else None


def _target(path: str) -> str:
    try:
        return os.readlink(path)
    except FileNotFoundError:
        return ""  # closed meanwhile


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(_MAX_SIZE)
    except OSError:
        return ""


def of_cgroup(text: str) -> ContainerId | None:
    """Of a process whose /proc/PID/cgroup says `text`; None for one of the host."""
    for line in text.splitlines():
        parts = line.split(":", 2)[-1].split("/")
        for place in pairwise(parts):
            container = _named(*place)
            if container:
                return container
    return None


def _named(parent: str, name: str) -> ContainerId | None:
    for engine, form in _ENGINES:
        match = form.fullmatch(name) or form.fullmatch(f"{parent}/{name}")
        if match:
            return ContainerId(engine, next(group for group in match.groups() if group))
    return None
