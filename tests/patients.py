# SPDX-License-Identifier: Apache-2.0
"""Simulated hosts for `nvhook doctor`: one that is in order, and what tests do to it."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import os
import shutil
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from containers import HOOK, WRAPPER, configure
from nvhook.cli import main

DOCKERD = "proc/4711"
_STARTED = 2_000_000_000  # after everything that a test makes was made


class Patient:
    """A copy of a simulated host, with what belongs to a host in order; `root` is its root directory."""

    def __init__(self, source: Path, place: Path) -> None:
        subprocess.run(["cp", "-a", str(source), str(place)], check=True)
        self.host = place
        self.root = place / "driver"
        self.config = configure(place, place / "config.toml", place / "run")
        self.program("usr/bin/runc", "#!/bin/sh\n")
        for program in (WRAPPER, HOOK):
            shutil.copy(program, self.root / "usr/bin" / program.name)
        self.write("sys/fs/cgroup/cgroup.controllers", "cpu memory\n")
        self.write("proc/stat", f"cpu 1 2\nbtime {_STARTED}\n")

    def write(self, name: str, text: str) -> Path:
        path = self.host / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def program(self, name: str, text: str) -> Path:
        path = self.write(f"driver/{name}", text)
        path.chmod(0o755)
        return path

    def theirs(self, name: str) -> Path:
        """A program of NVIDIA's: an ELF file."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy("/bin/true", path)
        return path

    def docker(self, text: str = "", *, path: str = "/usr/bin:/bin", started: int = 0) -> None:
        """Docker, registered as `text` or as `nvhook configure docker` does, and a dockerd that runs."""
        self.program("usr/bin/dockerd", "#!/bin/sh\n")
        runtimes = {"runtimes": {"nvidia": {"path": "/usr/bin/nvidia-container-runtime", "runtimeArgs": []}}}
        self.write("driver/etc/docker/daemon.json", text or json.dumps(runtimes))
        self.write("driver/run/docker.pid", DOCKERD.removeprefix("proc/"))
        self.write(f"{DOCKERD}/comm", "dockerd\n")
        self.write(f"{DOCKERD}/environ", f"HOME=/\0PATH={path}\0")
        self.write(f"{DOCKERD}/stat", f"4711 (docker) d) S {' '.join(['0'] * 18)} {started} 0\n")
        (self.host / DOCKERD / "exe").symlink_to("/usr/bin/dockerd")

    @contextlib.contextmanager
    def answering(self, info: object) -> Iterator[None]:
        """dockerd's socket, for as long as the context lasts."""
        body = info if isinstance(info, bytes) else json.dumps(info).encode()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def address_string(self) -> str:
                return "unix"

            def log_message(self, *_: object) -> None:
                """Nothing."""

        (self.root / "run").mkdir(exist_ok=True)
        directory = os.open(self.root / "run", os.O_PATH)
        server = socketserver.UnixStreamServer(f"/proc/self/fd/{directory}/docker.sock", Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
            os.close(directory)

    def run(self, *words: str) -> tuple[int, str, str]:
        """(exit status, standard output, standard error) of `nvhook` on this host."""
        return nvhook(self.config, *words)

    def doctor(self, *options: str) -> tuple[int, list[dict[str, str]]]:
        """(exit status, findings), without a test container."""
        status, output, errors = self.run("doctor", "--json", "--no-container", "--root", str(self.root), *options)
        assert errors == ""
        document: dict[str, Any] = json.loads(output)
        return status, document["findings"]

    def finding(self, check: str) -> dict[str, str]:
        """The first of this check that is not well."""
        _, found = self.doctor()
        return next(item for item in found if item["check"] == check and item["status"] != "ok")


def nvhook(config: Path, *words: str) -> tuple[int, str, str]:
    output, errors = io.StringIO(), io.StringIO()
    os.environ["NVHOOK_CONFIG"] = str(config)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            status = main(list(words), "/nonexistent/config.toml")
    finally:
        del os.environ["NVHOOK_CONFIG"]
    return status, output.getvalue(), errors.getvalue()
