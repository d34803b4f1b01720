# SPDX-License-Identifier: Apache-2.0
"""What a running dockerd says and shows of itself: its answer on the socket, its PATH, and when it was started."""

from __future__ import annotations

import http.client
import json
import os
import socket

from .examined import kernel_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .examined import Host

SOCKET = "/run/docker.sock"
_SECONDS = 5
_MAX_ANSWER = 1 << 20


class _Connection(http.client.HTTPConnection):
    """HTTP over the socket that a descriptor holds, whatever the length of its path."""

    def __init__(self, held: int) -> None:
        super().__init__("localhost", timeout=_SECONDS)
        self.held = held

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_SECONDS)
        self.sock.connect(f"/proc/self/fd/{self.held}")


def info(host: Host) -> dict[str, Any]:
    """What `docker info` shows, `Runtimes` among it; OSError where nobody answers, ValueError for no such answer."""
    held = host.files.open(SOCKET)
    connection = _Connection(held)
    try:
        connection.request("GET", "/info")
        answer = connection.getresponse().read(_MAX_ANSWER)
    except http.client.HTTPException as error:
        raise ValueError(f"no HTTP: {error}") from None
    finally:
        connection.close()
        os.close(held)
    try:
        document = json.loads(answer)
    except RecursionError:
        raise ValueError("too deeply nested") from None
    if not isinstance(document, dict) or not isinstance(document.get("Runtimes"), dict):
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


def started(host: Host, process: str) -> float:
    """When the process was started, in seconds since the epoch; 0 where /proc does not tell."""
    boot = next((line for line in kernel_text(f"{host.proc}/stat").splitlines() if line.startswith("btime ")), "")
    # The second field is the program's name in brackets, with any characters in it.
    fields = kernel_text(f"{process}/stat").rpartition(")")[2].split()
    try:
        return int(boot.split()[1]) + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (IndexError, ValueError):
        return 0.0
