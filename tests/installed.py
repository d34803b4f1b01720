# SPDX-License-Identifier: Apache-2.0
"""An installation with a server of its own, and what its processes are at a moment."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from containers import REPOSITORY, Workshop, gpu_lines, server_of

HOST = "a100x2"
ALL = {"NVIDIA_VISIBLE_DEVICES": "all"}
BOTH = gpu_lines(HOST, 0, 1)
LIST = ["/bin/sh", "-c", "nvidia-smi -L"]


class Python:
    """A program in the place of Python: it notes that it was started, whoever does it."""

    def __init__(self, place: Path) -> None:
        self.path = place / "python3"
        self._log = place / "interpreters"
        self._log.touch()
        self._log.chmod(0o666)
        self.path.write_text(f'#!/bin/sh\necho >>{self._log}\nexec /usr/bin/python3 "$@"\n')
        self.path.chmod(0o755)

    def starts(self) -> int:
        """How often since this was asked last."""
        count = len(self._log.read_text())
        self._log.write_text("")
        return count


def wait_until(condition: Callable[[], object], seconds: float = 20) -> bool:
    """Whether it comes about."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


class Installed:
    """`place` is its directory. It counts the interpreters that its launchers start."""

    def __init__(self, place: Path) -> None:
        self.prefix = place / "prefix"
        self.wrapper = self.prefix / "bin/nvidia-container-runtime"
        self.hook = self.prefix / "bin/nvidia-container-runtime-hook"
        self.server = server_of(self.prefix)
        self.python = Python(place)
        self.install()

    def install(self) -> None:
        script = str(REPOSITORY / "scripts/install")
        env = {**os.environ, "PYTHON": str(self.python.path)}
        subprocess.run([script, "install", str(self.prefix), f"{self.prefix}/etc"], check=True, env=env)
        self.python.starts()

    def interpreters(self) -> int:
        """How many were started since this was asked last."""
        return self.python.starts()

    def pid(self) -> int:
        """The server's process; 0 for none."""
        try:
            number = int((self.server / "pid").read_text())
        except (OSError, ValueError):
            return 0
        return number if name_of(number) == "nvhook-server" and state_of(number) != "Z" else 0

    def children(self, name: str) -> list[int]:
        """The server's children that are called so."""
        pid = self.pid()
        try:
            numbers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split() if pid else []
        except OSError:
            return []
        return [int(number) for number in numbers if name_of(int(number)) == name]

    def ready(self) -> int:
        """The child that waits for the next caller, once it does."""
        found: list[int] = []

        def is_there() -> bool:
            found[:] = [pid for pid in self.children("nvhook-ready") if state_of(pid) == "S"]
            return bool(found)

        assert wait_until(is_there), "there is no child that waits"
        return found[0]

    def wait(self) -> int:
        """The server's process, once it is there."""
        wait_until(self.pid)
        return self.pid()

    def end(self) -> None:
        pid = self.pid()
        if pid:
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: is_over(pid))
        shutil.rmtree(self.server, ignore_errors=True)


def signal_to(pid: int, signum: signal.Signals) -> None:
    """Until it has come about: a process that waits for a processor has not stopped yet."""
    os.kill(pid, signum)
    if signum == signal.SIGSTOP:
        assert wait_until(lambda: state_of(pid) == "T")
    elif signum != signal.SIGCONT:
        assert wait_until(lambda: is_over(pid))


def state_of(pid: int) -> str:
    """The letter that /proc has; empty for one that is over."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return ""


def is_over(pid: int) -> bool:
    return state_of(pid) in ("", "Z", "X")


def name_of(pid: int) -> str:
    """Empty for one that is over."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def start(shop: Workshop, installed: Installed, env: dict[str, str], *through: str) -> subprocess.CompletedProcess[str]:
    """A container with all GPUs of the simulated host, which lists them."""
    bundle = shop.bundle().write(LIST, {**ALL, **env})
    bundle.through += through
    return bundle.run(shop.config(HOST), wrapper=installed.wrapper)


def start_right(shop: Workshop, installed: Installed, *through: str) -> int:
    """A container that gets its GPUs; how many interpreters that took."""
    installed.interpreters()
    result = start(shop, installed, {}, *through)
    assert (result.returncode, result.stdout, result.stderr) == (0, BOTH, "")
    return installed.interpreters()


def is_served(shop: Workshop, installed: Installed, *through: str) -> bool:
    """Whether containers are started without an interpreter: one is if the server answers within 200 ms."""
    return any(start_right(shop, installed, *through) == 0 for _ in range(20))
