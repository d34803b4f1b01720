# SPDX-License-Identifier: Apache-2.0
"""A Docker engine of one's own, with an installation of nvhook on a simulated host.

The engine lives in mount, process and network namespaces made for it, where everything is shared as systemd has it,
/etc is a copy, /run is empty, and there is no network. Whatever goes wrong, it all ends with the first process
of the process namespace, and that one ends when the tests do. What is left then is a directory and empty cgroups.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from containers import REPOSITORY, configure

_PLACES = "/usr/sbin:/usr/bin:/sbin:/bin"  # of a distribution's packages, which are what is tested
_PROGRAMS = ("dockerd", "docker", "docker-compose", "containerd", "docker-init", "runc", "nsenter", "unshare")

# `$1` is the engine's directory, the rest its command. The shell adopts whom the engine leaves behind.
_INIT = """
place=$1
shift
mount -t overlay -o "lowerdir=/etc,upperdir=$place/etc,workdir=$place/work" overlay /etc
cp "$place/subid" /etc/subuid
cp "$place/subid" /etc/subgid
mount -t tmpfs tmpfs /run
if [ -d /opt ]; then mount -t tmpfs tmpfs /opt; fi
mount --make-rshared /
"$@" </dev/null >>"$place/log" 2>&1 &
cat
"""

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


def program(name: str) -> str:
    return shutil.which(name, path=_PLACES) or name


def missing() -> str:
    """Empty when the programs are there."""
    return ", ".join(name for name in _PROGRAMS if not shutil.which(name, path=_PLACES))


class Docker:
    """One engine; `place`, an existing directory, holds all that it keeps. `start` comes first and `stop` last."""

    def __init__(self, place: Path, host: Path, **settings: object) -> None:
        """`settings` go into daemon.json; `host` is the simulated host that nvhook finds."""
        self.place = place
        self.host = host
        self.bin = place / "prefix/bin"
        self.records = place / "records"
        self.config = place / "prefix/etc/nvidia-container-runtime/config.toml"
        self.recorder = self._recorder("low-level", "after", "runc")
        self.cgroup = f"nvhook-docker-{uuid.uuid4().hex[:8]}"
        self._settings: dict[str, object] = {
            "runtimes": {"nvidia": {"path": str(self.bin / "nvidia-container-runtime")}},
            "default-runtime": "runc",  # a reload leaves alone what the file does not name
            **settings,
        }
        self._init: subprocess.Popen[bytes] | None = None
        self._pids = ""  # the process namespace, as its link in /proc reads
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
        self.place.chmod(0o755)
        self.config.parent.mkdir(parents=True)
        configure(self.host, self.config, self.place / "state", runtime=str(self.recorder))
        install = [str(REPOSITORY / "scripts/install"), "install"]
        subprocess.run([*install, self.place / "prefix", self.place / "prefix/etc"], check=True, capture_output=True)
        for name in ("etc", "work", "home"):
            (self.place / name).mkdir()
        (self.place / "subid").write_text(f"{REMAPPED}:{FIRST_ID}:65536\n")
        self._write_settings(self._settings)
        unshare = ["unshare", "--mount", "--pid", "--fork", "--net", "--mount-proc", "sh", "-euc", _INIT, "-"]
        self._init = subprocess.Popen(
            [*unshare, str(self.place), *self._command()],
            env={"PATH": f"{self.bin}:{_PLACES}"},
            stdin=subprocess.PIPE,  # it ends when this is closed
            stdout=subprocess.DEVNULL,
            cwd="/",
        )
        wait("the engine answers", lambda: self._has_ended() or self.docker("version").returncode == 0, 40)
        if self._has_ended():
            raise RuntimeError(f"the engine did not start:\n{self.log()}")
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
            "--ip-forward=false",
            "--ip-masq=false",
        ]

    def _has_ended(self) -> bool:
        assert self._init, "start() comes first"
        if self._init.poll() is not None:
            return True
        if not self._pids:
            with contextlib.suppress(OSError, ValueError):
                (first,) = _children(self._init.pid)
                own, theirs = os.readlink("/proc/self/ns/pid"), os.readlink(f"/proc/{first}/ns/pid")
                self._pids = theirs if theirs != own else ""
            return False
        names = [name for _, name in self._processes()]
        return "cat" in names and "dockerd" not in names

    def stop(self) -> list[str]:
        """End everything; the answer is what the engine and its containers had left at that time."""
        if not self._init:
            return []
        left = []
        if self._mounts:
            names = self.docker("ps", "--all", "--quiet").stdout.split()
            if names:
                self.docker("rm", "--force", "--volumes", *names)
            left += [f"mount: {line}" for line in self.mounts() if line not in self._mounts]
        for pid, name in self._processes():
            if name == "dockerd":
                os.kill(pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            wait("only the first process is left", lambda: len(self._processes()) <= 2, 20)
        left += [f"process: {name}" for _, name in self._processes() if name not in ("sh", "cat")]
        assert self._init.stdin
        self._init.stdin.close()
        self._init.wait(20)
        self._init = None
        left += [f"cgroup: {path}" for path in self._remove_cgroups()]
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return left + [f"mount on the machine: {line}" for line in lines if str(self.place) in line]

    def _remove_cgroups(self) -> list[str]:
        """Those below the engine's own, which had to be empty; that one Docker has made and does not take away."""
        tops = [*Path("/sys/fs/cgroup").glob(self.cgroup), *Path("/sys/fs/cgroup").glob(f"*/{self.cgroup}")]
        below = [Path(directory) for top in tops for directory, _, _ in os.walk(top, topdown=False)]
        for path in below:
            with contextlib.suppress(OSError):
                path.rmdir()
        return [str(path) for path in below if path not in tops or path.exists()]

    def _processes(self) -> list[tuple[int, str]]:
        """(id out here, name) of everyone in the process namespace."""
        found = []
        for name in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if name.isdecimal() and os.readlink(f"/proc/{name}/ns/pid") == self._pids:
                    found.append((int(name), Path(f"/proc/{name}/comm").read_text().strip()))
        return found

    # Use

    @property
    def _socket(self) -> str:
        return f"unix://{self.place}/socket"

    @property
    def environment(self) -> dict[str, str]:
        """Of a client; its own configuration is nobody else's."""
        home = str(self.place / "home")
        return {"PATH": _PLACES, "HOME": home, "DOCKER_HOST": self._socket, "DOCKER_BUILDKIT": "0"}

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

    def here(self, *command: str) -> str:
        """The output of a command in the engine's namespaces, which are what it takes for the host."""
        (dockerd,) = [pid for pid, name in self._processes() if name == "dockerd"]
        enter = [program("nsenter"), f"--target={dockerd}", "--mount", "--pid", "--net"]
        return subprocess.run([*enter, *command], check=True, capture_output=True, text=True, timeout=30).stdout

    def mounts(self) -> list[str]:
        """Mounts on what is the host for the engine: root, place and options, in the order of their age."""
        lines = self.here("cat", "/proc/self/mountinfo").splitlines()
        lines = [line for line in lines if "/exec/netns/" not in line]  # Docker's own, one for each kind of network
        return [" ".join(line.split()[2:6]) for line in lines]

    def kill_main_process(self, name: str) -> None:
        pid = self.inspect(name, "{{.State.Pid}}")
        assert int(pid) > 0, f"{name} does not run"  # 0 is whoever calls, with all its group
        self.here("sh", "-c", f"kill -KILL {pid}")  # a minimal Debian has no program of that name

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

    def _reload(self, settings: dict[str, object]) -> None:
        self._write_settings(settings)
        (dockerd,) = [pid for pid, name in self._processes() if name == "dockerd"]
        os.kill(dockerd, signal.SIGHUP)

        def is_in_force() -> bool:
            info: dict[str, Any] = json.loads(self.do("info", "--format", "{{json .}}"))
            ours = {name: value for name, value in info["Runtimes"].items() if name not in _OWN_RUNTIMES}
            return (ours, info["DefaultRuntime"]) == (settings["runtimes"], settings["default-runtime"])

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

    def log(self) -> str:
        return "\n".join((self.place / "log").read_text(errors="replace").splitlines()[-30:])


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait(what: str, is_so: Callable[[], bool], seconds: float) -> None:
    """Until `is_so()`; TimeoutError, which says `what`, if it is not so in time."""
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            raise TimeoutError(f"not in {seconds} s: {what}")
        time.sleep(0.05)


def traces() -> list[str]:
    """What engines leave on a machine that is theirs: nothing of this may be new when the tests are over."""
    found = []
    for top in (
        "/run/docker",
        "/run/containerd",
        "/opt/containerd",
        "/etc/docker",
        "/var/lib/docker",
        "/var/run/docker",
    ):
        found += [os.path.join(directory, name) for directory, _, names in os.walk(top) for name in [".", *names]]
    found += [str(path) for depth in ("docker", "*/docker") for path in Path("/sys/fs/cgroup").glob(depth)]
    return [*found, *sorted(os.listdir("/sys/class/net"))]
