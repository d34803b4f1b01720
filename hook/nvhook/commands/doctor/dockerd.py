# SPDX-License-Identifier: Apache-2.0
"""What a running dockerd says and shows of itself: its answer on the socket, its PATH, and when it was started."""

from __future__ import annotations

import os

from nvhook.commands import dockerapi
from nvhook.commands.kernelfiles import kernel_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from nvhook.commands.hostview import HostView

SOCKET = dockerapi.DOCKER
# A process of a container may go by any name; these files are root's.
_PID_FILES = ("/run/docker.pid", "/run/snap.docker/docker.pid")


def process(host: HostView) -> str:
    """Its directory in /proc, or empty where it does not run."""
    for path in _PID_FILES:
        number = host.text(path).strip()
        directory = f"{host.proc}/{number}"
        is_number = number.isdecimal() and number.isascii()
        if is_number and kernel_text(f"{directory}/comm").strip() == "dockerd":
            return directory
    return ""


def info(host: HostView) -> dict[str, Any]:
    """What `docker info` shows, `Runtimes` among it; OSError where nobody answers, ValueError for no such answer."""
    held = host.files.open(SOCKET)
    try:
        document = dockerapi.get(f"/proc/self/fd/{held}", "/info")  # whatever the length of its path
    finally:
        os.close(held)
    if document is None or not isinstance(document.get("Runtimes"), dict):
        raise ValueError("the answer names no runtimes")
    return document


def search_path(process: str) -> list[str]:
    """PATH of the process with this directory in /proc; PermissionError for the process of somebody else."""
    with open(f"{process}/environ", "rb") as file:
        variables = file.read(1 << 20).decode(errors="replace").split("\0")
    path = next((item for item in variables if item.startswith("PATH=")), "PATH=")
    return [place for place in path.removeprefix("PATH=").split(":") if place.startswith("/")]


def program(process: str) -> str:
    """The file that the process runs, or empty."""
    try:
        return os.readlink(f"{process}/exe")
    except OSError:
        return ""


def started(host: HostView, process: str) -> float:
    """When the process was started, in seconds since the epoch; 0 where /proc does not tell."""
    boot = next((line for line in kernel_text(f"{host.proc}/stat").splitlines() if line.startswith("btime ")), "")
    # The second field is the program's name in brackets, with any characters in it.
    fields = kernel_text(f"{process}/stat").rpartition(")")[2].split()
    try:
        return int(boot.split()[1]) + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (IndexError, ValueError):
        return 0.0
