# SPDX-License-Identifier: Apache-2.0
"""What a running dockerd says and shows of itself: its answer on the socket, its PATH, and when it was started."""

from __future__ import annotations

import json
import os

from nvhook.commands.kernelfiles import kernel_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from nvhook.commands.doctor.examined import Host

SOCKET = "/run/docker.sock"
# A process of a container may go by any name; these files are root's.
_PID_FILES = ("/run/docker.pid", "/run/snap.docker/docker.pid")
_SECONDS = 5
_MAX_ANSWER = 1 << 20
# Of version 1.0, so that the answer comes in one piece and ends with the connection.
_QUESTION = b"GET /info HTTP/1.0\r\nHost: localhost\r\n\r\n"


def process(host: Host) -> str:
    """Its directory in /proc, or empty where it does not run."""
    for path in _PID_FILES:
        number = host.text(path).strip()
        directory = f"{host.proc}/{number}"
        is_number = number.isdecimal() and number.isascii()
        if is_number and kernel_text(f"{directory}/comm").strip() == "dockerd":
            return directory
    return ""


def info(host: Host) -> dict[str, Any]:
    """What `docker info` shows, `Runtimes` among it; OSError where nobody answers, ValueError for no such answer."""
    head, _, body = _ask(host).partition(b"\r\n\r\n")
    if head.split(b" ", 2)[1:2] != [b"200"]:
        raise ValueError(f"`{head[:80].decode(errors='replace')}` is no answer")
    try:
        document = json.loads(body)
    except RecursionError:
        raise ValueError("too deeply nested") from None
    if not isinstance(document, dict) or not isinstance(document.get("Runtimes"), dict):
        raise ValueError("the answer names no runtimes")
    return document


def _ask(host: Host) -> bytes:
    import socket  # for one check of one command

    held = host.files.open(SOCKET)
    answer = bytearray()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_SECONDS)
            connection.connect(f"/proc/self/fd/{held}")  # whatever the length of its path
            connection.sendall(_QUESTION)
            while len(answer) <= _MAX_ANSWER and (piece := connection.recv(1 << 16)):
                answer += piece
    finally:
        os.close(held)
    return bytes(answer)


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
