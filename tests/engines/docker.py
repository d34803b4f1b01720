# SPDX-License-Identifier: Apache-2.0
"""Docker on a machine of its own, registered with `nvhook configure docker`, on a simulated host."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from containers import configure

from .machine import PLACES, Machine, install, program, remove_cgroups, wait

PROGRAMS = ("dockerd", "docker", "docker-compose", "containerd", "docker-init", "runc", "nsenter", "unshare")

# A low-level runtime that keeps the config.json it is given: `create … ID` as records/ID.$stage.
_RECORDER = """#!/bin/sh
for word; do
    if [ "${before-}" = --bundle ]; then bundle=$word; fi
    before=$word
    case $word in create) is_create=1 ;; esac
done
if [ "${is_create-}" ]; then cp "$bundle/config.json" "%(records)s/$word.%(stage)s"; fi
exec %(runtime)s "$@"
"""

_OWN_RUNTIMES = ("runc", "io.containerd.runc.v2", "io.containerd.runtime.v1.linux")  # of Docker itself

REMAPPED = "daemon"  # a user that every system has, in whose name the ids below stand
FIRST_ID = 300000


class Docker:
    """One engine; `place`, an existing directory, holds all that it keeps. `start` comes first and `stop` last."""

    def __init__(
        self,
        place: Path,
        host: Path,
        *,
        settings: dict[str, object] | None = None,
        runtime: str = "runc",
        unified: bool = False,
    ) -> None:
        """`settings` go into daemon.json; `host` is the simulated host that nvhook finds.

        runtime     the low-level runtime below nvhook
        unified     everything in there sees cgroups of version 2 alone
        """
        self.place = place
        self.host = host
        self.machine = Machine(place)
        self.bin = place / "prefix/bin"
        self.records = place / "records"
        self.config = place / "prefix/etc/nvidia-container-runtime/config.toml"
        self.recorder = self._recorder("low-level", "after", runtime)
        self.cgroup = f"nvhook-docker-{uuid.uuid4().hex[:8]}"
        self._settings: dict[str, Any] = {
            "default-runtime": "runc",  # a reload leaves alone what the file does not name
            **(settings or {}),
        }
        self._unified = unified
        self._mounts: list[str] = []

    def _recorder(self, name: str, stage: str, runtime: str) -> Path:
        self.records.mkdir(parents=True, exist_ok=True)
        path = self.place / name
        path.write_text(_RECORDER % {"records": self.records, "stage": stage, "runtime": runtime})
        path.chmod(0o755)
        return path

    def front(self) -> Path:
        """The runtime with a recorder before it (stage `before`), as the one after it records `after`."""
        return self._recorder("front", "before", str(self.bin / "nvidia-container-runtime"))

    # Begin and end

    def start(self) -> None:
        """RuntimeError, with the end of its log, when the engine does not come up."""
        install(self.place / "prefix", self.host, self.place / "state", runtime=str(self.recorder))
        (self.place / "home").mkdir()
        for name in ("subuid", "subgid"):
            (self.machine.etc / name).write_text(f"{REMAPPED}:{FIRST_ID}:65536\n")
        self._write_settings(self._settings)
        command = [str(self.bin / "nvhook"), "configure", "docker", "--config-file", str(self.place / "daemon.json")]
        subprocess.run(command, check=True, capture_output=True)
        self._settings = json.loads((self.place / "daemon.json").read_text())
        self.machine.start(*self._command(), path=f"{self.bin}:{PLACES}", unified=self._unified)
        self.machine.wait_for_daemon(lambda: self.docker("version").returncode == 0)
        self._mounts = self.mounts()

    def _command(self) -> list[str]:
        return [
            program("dockerd"),
            f"--config-file={self.place}/daemon.json",
            f"--data-root={self.place}/data",
            f"--exec-root={self.place}/exec",
            f"--pidfile={self.place}/pid",
            f"--host={self._socket}",
            f"--cgroup-parent=/{self.cgroup}",
            "--exec-opt=native.cgroupdriver=cgroupfs",
            "--storage-driver=overlay2",
            "--oom-score-adjust=0",  # a better score than our own needs CAP_SYS_RESOURCE
            "--bridge=none",
            "--iptables=false",
            "--ip6tables=false",
            "--ip-masq=false",
        ]

    def stop(self) -> list[str]:
        """End everything; the answer is what the engine and its containers had left at that time."""
        left = []
        if self._mounts:
            names = self.docker("ps", "--all", "--quiet").stdout.split()
            if names:
                self.docker("rm", "--force", "--volumes", *names)
            left += [f"mount: {line}" for line in self.mounts() if line not in self._mounts]
        left += self.machine.end()
        return left + [f"cgroup: {path}" for path in remove_cgroups(self.cgroup)]

    # Use

    @property
    def _socket(self) -> str:
        return f"unix://{self.place}/socket"

    @property
    def environment(self) -> dict[str, str]:
        """Of a client; its own configuration is nobody else's."""
        home = str(self.place / "home")
        return {"PATH": PLACES, "HOME": home, "DOCKER_HOST": self._socket, "DOCKER_BUILDKIT": "0"}

    def docker(self, *words: str, stdin: IO[bytes] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program("docker"), *words],
            env=self.environment,
            stdin=stdin or subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def do(self, *words: str) -> str:
        """The output of a docker command that has to succeed."""
        done = self.docker(*words)
        assert done.returncode == 0, f"docker {' '.join(words)}: {done.stderr}{done.stdout}"
        return done.stdout

    def run(self, *words: str, image: str = "debian", script: str = "nvidia-smi -L") -> str:
        """What `script` prints in a container of its own that ends well."""
        return self.do("run", "--rm", *words, image, "sh", "-euc", script)

    def refused(self, *words: str, image: str = "debian") -> str:
        """What docker says about a container that cannot be started."""
        done = self.docker("run", "--rm", *words, image, "true")
        assert (done.returncode, done.stdout) in ((125, ""), (127, "")), f"it was started: {done}"
        return done.stderr

    @contextlib.contextmanager
    def container(self, *words: str, image: str = "debian", script: str = "exec sleep 600") -> Iterator[str]:
        """The id of a container that runs, until the block ends."""
        name = self.do("run", "--detach", *words, image, "sh", "-euc", script).strip()
        try:
            yield name
        finally:
            self.do("rm", "--force", "--volumes", name)

    def inspect(self, name: str, form: str) -> str:
        return self.do("inspect", "--format", form, name).strip()

    def load(self, name: str, root: Path) -> None:
        """The directory `root` as an image."""
        with subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE) as tar:
            done = self.docker("import", "-", name, stdin=tar.stdout)
        assert (tar.returncode, done.returncode) == (0, 0), done.stderr

    def mounts(self) -> list[str]:
        """Mounts on what is the host for the engine: root, place and options, in the order of their age."""
        lines = self.machine.here("cat", "/proc/self/mountinfo").splitlines()
        lines = [line for line in lines if "/exec/netns/" not in line]  # Docker's own, one for each kind of network
        return [" ".join(line.split()[2:6]) for line in lines]

    def kill_main_process(self, name: str) -> None:
        pid = self.inspect(name, "{{.State.Pid}}")
        assert int(pid) > 0, f"{name} does not run"  # 0 is whoever calls, with all its group
        self.machine.here("sh", "-c", f"kill -KILL {pid}")  # a minimal Debian has no program of that name

    def recorded(self, name: str, stage: str = "after") -> bytes:
        """config.json of a container as the low-level runtime got it."""
        return (self.records / f"{name}.{stage}").read_bytes()

    # Settings

    @contextlib.contextmanager
    def settings(self, **changed: object) -> Iterator[None]:
        """daemon.json with these keys (`_` for `-`), reloaded, until the block ends."""
        settings = {**self._settings, **{key.replace("_", "-"): value for key, value in changed.items()}}
        self._reload(settings)
        try:
            yield
        finally:
            self._reload(self._settings)

    def _reload(self, settings: dict[str, Any]) -> None:
        self._write_settings(settings)
        paths = {name: runtime["path"] for name, runtime in settings["runtimes"].items()}
        self.machine.send(signal.SIGHUP)

        def is_in_force() -> bool:
            info: dict[str, Any] = json.loads(self.do("info", "--format", "{{json .}}"))
            ours = {name: value["path"] for name, value in info["Runtimes"].items() if name not in _OWN_RUNTIMES}
            return (ours, info["DefaultRuntime"]) == (paths, settings["default-runtime"])

        wait("the engine has its new settings", is_in_force, 10)

    def _write_settings(self, settings: dict[str, object]) -> None:
        (self.place / "daemon.json").write_text(json.dumps(settings, indent=4))

    @contextlib.contextmanager
    def configured(self, more: str, *, host: Path | None = None, runtime: str = "") -> Iterator[None]:
        """nvhook's config.toml with `more` in it, or for another host or low-level runtime, until the block ends."""
        before = self.config.read_text()
        state = self.place / f"state-{uuid.uuid4().hex[:8]}" if host else self.place / "state"
        configure(host or self.host, self.config, state, runtime=runtime or str(self.recorder), more=more)
        try:
            yield
        finally:
            self.config.write_text(before)
