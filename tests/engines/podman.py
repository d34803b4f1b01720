# SPDX-License-Identifier: Apache-2.0
"""Podman on a machine of its own, with an installation of nvhook on a simulated host.

Podman has no daemon: its commands are run there, by root and by a user that only that machine has.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from installed import Python

from .machine import PLACES, UNIFIED, Machine, install, wait

PROGRAMS = ("podman", "conmon", "runc", "crun", "newuidmap", "nsenter", "setpriv", "unshare")

USER = 21701  # the one who is not root; nobody on the machine has this number
_FIRST_ID = 400000

# The soft limits of a machine without CAP_SYS_RESOURCE are above what Podman may then ask for itself.
_LIMITS = ("--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024")


class Podman:
    """`place`, an existing directory, holds all that it keeps; `host` is the simulated host. `start` comes first."""

    def __init__(self, place: Path, host: Path) -> None:
        self.place = place
        self.host = host
        self.prefix = place / "prefix"
        self.runtime = str(self.prefix / "bin/nvidia-container-runtime")
        self.hooks = str(self.prefix / "share/containers/oci/hooks.d")
        self.machine = Machine(place)
        self.python = Python(place)

    def start(self) -> None:
        install(self.prefix, self.host, self.place / "state", python=str(self.python.path))
        for name, line in (
            ("passwd", f"nvhook-test:x:{USER}:{USER}::/nonexistent:/bin/sh"),
            ("group", f"nvhook-test:x:{USER}:"),
            ("subuid", f"nvhook-test:{_FIRST_ID}:65536"),
            ("subgid", f"nvhook-test:{_FIRST_ID}:65536"),
        ):
            before = Path("/etc", name)
            (self.machine.etc / name).write_text((before.read_text() if before.exists() else "") + line + "\n")
        for who, owner in (("root", 0), ("user", USER)):
            for name in ("", "home", "xdg"):
                (self.place / who / name).mkdir(mode=0o700)
                os.chown(self.place / who / name, owner, owner)
        self.machine.start()

    def stop(self) -> list[str]:
        """End everything; the answer is what containers had left."""
        left = []
        for user in (0, USER):
            self.podman("rm", "--all", "--force", "--time=0", user=user)
            left += [line for line in self.podman("ps", "--all", "--quiet", user=user).stdout.splitlines() if line]
        left += [f"noted: {path}" for path in (self.place / "state").rglob("containers/*")]
        # "podman pause" holds the user namespace of whoever is not root, for as long as the machine is there.
        return left + [line for line in self.machine.end() if line != "process: podman pause"]

    def end_server(self) -> None:
        pid = self.machine.server()
        if pid:
            os.kill(pid, signal.SIGKILL)
            wait("the server has ended", lambda: not self.machine.server(), 20)

    def here(self, *command: str, user: int = 0) -> subprocess.CompletedProcess[str]:
        """A command in the namespaces, as this user."""
        place = self.place / ("user" if user else "root")
        change = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else []
        return subprocess.run(
            [*self.machine.enter(), *change, *command],
            env={"PATH": PLACES, "HOME": str(place / "home"), "XDG_RUNTIME_DIR": str(place / "xdg")},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def podman(self, *words: str, user: int = 0, unified: bool = False) -> subprocess.CompletedProcess[str]:
        """`unified`: in a cgroup hierarchy of version 2, whatever the machine has. crun takes no other below Podman."""
        place = self.place / ("user" if user else "root")
        places = [f"--root={place}/storage", f"--runroot={place}/run", f"--tmpdir={place}/tmp"]
        before = ["unshare", "--mount", *UNIFIED] if unified else []
        return self.here(*before, "podman", *places, "--cgroup-manager=cgroupfs", *words, user=user)

    def do(self, *words: str, user: int = 0, unified: bool = False) -> str:
        """The output of a podman command that has to succeed."""
        done = self.podman(*words, user=user, unified=unified)
        assert done.returncode == 0, f"podman {' '.join(words)}: {done.stderr}{done.stdout}"
        return done.stdout

    def load(self, name: str, root: Path, user: int = 0) -> None:
        """The directory `root` as an image."""
        archive = self.place / "image.tar"
        subprocess.run(["tar", "-C", str(root), "-cf", str(archive), "."], check=True)
        archive.chmod(0o644)
        self.do("import", str(archive), name, user=user)
        archive.unlink()

    @staticmethod
    def _run(road: tuple[str, ...], words: tuple[str, ...]) -> tuple[str, ...]:
        return (*road, "run", "--network=none", *_LIMITS, *words)

    def run(self, road: tuple[str, ...], *words: str, script: str = "nvidia-smi -L", user: int = 0) -> str:
        """What `script` prints in a container that ends well; `road` are options before `run`: runtime, hooks."""
        return self.do(*self._run(road, ("--rm", *words)), "debian", "sh", "-euc", script, user=user)

    def run_by_crun(self, road: tuple[str, ...], *words: str) -> str:
        """What nvidia-smi lists. Without cgroups: crun cannot make them where the machine may not raise limits."""
        command = self._run(road, ("--rm", "--cgroups=disabled", *words))
        return self.do(*command, "debian", "nvidia-smi", "-L", unified=True)

    def refused(self, road: tuple[str, ...], *words: str, user: int = 0) -> str:
        """What Podman says about a container that cannot be started."""
        done = self.podman(*self._run(road, ("--rm", *words)), "debian", "true", user=user)
        assert (done.returncode, done.stdout) in ((125, ""), (126, ""), (127, "")), f"it was started: {done}"
        return done.stderr

    @contextlib.contextmanager
    def container(self, road: tuple[str, ...], *words: str, user: int = 0) -> Iterator[str]:
        """The id of a container that runs, until the block ends."""
        name = self.do(*self._run(road, ("--detach", *words)), "debian", "sleep", "600", user=user).strip()
        try:
            yield name
        finally:
            self.do("rm", "--force", "--time=0", name, user=user)
