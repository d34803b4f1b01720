# SPDX-License-Identifier: Apache-2.0
"""A machine within the machine, for one engine: mount, process and network namespaces made for it.

Everything is shared there as systemd has it, /etc is a copy, /run and /opt are empty, and there is no network. Whatever
goes wrong, it all ends with the first process of the process namespace, and that one ends when the tests do. What is
left then is a directory and empty cgroups.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from containers import REPOSITORY, configure, why_not

PLACES = "/usr/sbin:/usr/bin:/sbin:/bin"  # of a distribution's packages, which are what is tested

# For a command in a mount namespace of its own: a cgroup hierarchy of version 2, whatever the machine has.
UNIFIED = ("sh", "-euc", 'mount -t cgroup2 cgroup2 /sys/fs/cgroup; exec "$@"', "-")

# In a mount namespace of one's own, with two empty directories in `$place`: engines write to both unasked.
OWN_PLACES = """
mount -t overlay -o "lowerdir=/etc,upperdir=$place/etc,workdir=$place/work" overlay /etc
if [ -d /opt ]; then mount -t tmpfs tmpfs /opt; fi
"""

# `$1` is the machine's directory, the rest a daemon. The shell adopts whom that leaves behind.
_INIT = f"""
place=$1
shift
{OWN_PLACES}
mount -t tmpfs -o mode=755 tmpfs /run
mount --make-rshared /
if [ $# -gt 0 ]; then "$@" </dev/null >>"$place/log" 2>&1 & fi
touch "$place/is-ready"
cat
"""


def program(name: str) -> str:
    return shutil.which(name, path=PLACES) or name


def missing(programs: Iterable[str]) -> str:
    """Empty when they are there."""
    return ", ".join(name for name in programs if not shutil.which(name, path=PLACES))


def install(
    prefix: Path, host: Path, state: Path, *, runtime: str = "runc", more: str = "", python: str = "/usr/bin/python3"
) -> Path:
    """nvhook below `prefix`, with a config.toml, which is the answer, for the simulated host."""
    config = prefix / "etc/nvidia-container-runtime/config.toml"
    config.parent.mkdir(parents=True)
    configure(host, config, state, runtime=runtime, more=more)
    command = [str(REPOSITORY / "scripts/install"), "install", str(prefix), str(prefix / "etc")]
    subprocess.run(command, env={**os.environ, "PYTHON": python}, check=True, capture_output=True)
    return config


def make_crun(program: Path) -> None:
    """crun, with what it has to be told to start containers on this machine below version 2 of cgroups; LookupError.

    For device rules there it raises the limit on locked memory, which takes CAP_SYS_RESOURCE.
    """
    said = ""
    for option in ("", "--cgroup-manager=disabled"):
        said = why_not("crun", ("unshare", "--mount", *UNIFIED), tuple(option.split()))
        if not said:
            program.write_text(f'#!/bin/sh\nexec crun {option} "$@"\n')
            program.chmod(0o755)
            return
    raise LookupError(f"crun starts no container on this machine: {said}")


class Machine:
    """`place`, an existing directory, holds all that is kept; /etc has what is in `place/etc`. `start` comes first."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.etc = place / "etc"
        self._init: subprocess.Popen[bytes] | None = None
        self._namespace = ""  # of processes, as its link in /proc reads
        self._daemon = ""
        place.chmod(0o755)  # who is not root has to come through
        for name in ("etc", "work"):
            (place / name).mkdir()

    def start(self, *daemon: str, path: str = PLACES, unified: bool = False) -> None:
        """The namespaces, and `daemon` in them, which writes to the log and may see cgroups of version 2 alone."""
        if daemon:
            self._daemon = os.path.basename(daemon[0])
        unshare = ["unshare", "--mount", "--pid", "--fork", "--net", "--mount-proc", "sh", "-euc", _INIT, "-"]
        self._init = subprocess.Popen(
            [*unshare, str(self.place), *(UNIFIED if unified else ()), *daemon],
            env={"PATH": path},
            stdin=subprocess.PIPE,  # it ends when this is closed
            stdout=subprocess.DEVNULL,
            cwd="/",
        )
        init = self._init
        wait("the namespaces are made", lambda: init.poll() is not None or (self.place / "is-ready").exists(), 10)
        if init.poll() is not None:
            raise RuntimeError(f"no namespaces of one's own on this machine: status {init.returncode}")
        self._namespace = os.readlink(f"/proc/{self._first}/ns/pid")

    def wait_for_daemon(self, answers: Callable[[], bool]) -> None:
        """RuntimeError, with the end of its log, when it does not come up."""

        def has_ended() -> bool:
            return not {self._daemon, "sh"} & {name for _, name in self.processes()}  # sh: not executed yet

        wait(f"{self._daemon} answers", lambda: has_ended() or answers(), 40)
        if has_ended():
            log = "\n".join((self.place / "log").read_text(errors="replace").splitlines()[-30:])
            raise RuntimeError(f"{self._daemon} did not start:\n{log}")

    def server(self) -> int:
        """The process of nvhook's server (id out here); 0 for none."""
        return next((pid for pid, name in self._everyone() if name == "nvhook-server"), 0)

    @property
    def _first(self) -> int:
        assert self._init, "start() comes first"
        (first,) = children(self._init.pid)
        return first

    def processes(self) -> list[tuple[int, str]]:
        """(id out here, name) of everyone but our own two, and the two that nvhook leaves for a while."""
        first = self._first
        below = children(first)
        found = [
            (pid, name)
            for pid, name in self._everyone()
            if name not in ("nvhook-server", "nvhook-ready", "nvhook-busy")
        ]
        return [(pid, name) for pid, name in found if pid != first and not (pid in below and name == "cat")]

    def _everyone(self) -> list[tuple[int, str]]:
        found = []
        for number in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if number.isdecimal() and os.readlink(f"/proc/{number}/ns/pid") == self._namespace:
                    found.append((int(number), Path(f"/proc/{number}/comm").read_text().strip()))
        return found

    def send(self, number: int) -> None:
        """A signal, to the daemon."""
        for pid, name in self.processes():
            if name == self._daemon:
                os.kill(pid, number)

    def enter(self) -> list[str]:
        """The words before a command that is to run in there."""
        return [program("nsenter"), f"--target={self._first}", "--mount", "--pid", "--net", "--wd=/"]

    def here(self, *command: str) -> str:
        """The output of a command in there that has to succeed."""
        return subprocess.run([*self.enter(), *command], check=True, capture_output=True, text=True, timeout=30).stdout

    def end(self) -> list[str]:
        """Ask the daemon to end, and end everything; the answer is what it had left at that time."""
        if not self._init:
            return []
        left = []
        if self._namespace:
            if self._daemon:
                self.send(signal.SIGTERM)
            # Without a daemon there is what follows a container's end all the same: Podman's conmon.
            with contextlib.suppress(TimeoutError):
                wait("only the first process is left", lambda: not self.processes(), 20)
            left = [f"process: {name}" for _, name in self.processes()]
        assert self._init.stdin
        self._init.stdin.close()
        self._init.wait(20)
        self._init = None
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return left + [f"mount on the machine: {line}" for line in lines if str(self.place) in line]


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def remove_cgroups(name: str) -> list[str]:
    """The cgroup of that name right below each hierarchy, and below it; the answer is what an engine had to remove.

    The cgroup itself is one that engines make and do not take away.
    """
    tops = [*Path("/sys/fs/cgroup").glob(name), *Path("/sys/fs/cgroup").glob(f"*/{name}")]
    below = [Path(directory) for top in tops for directory, _, _ in os.walk(top, topdown=False)]
    for path in below:
        with contextlib.suppress(OSError):
            path.rmdir()
    return [str(path) for path in below if path not in tops or path.exists()]


def wait(what: str, is_so: Callable[[], bool], seconds: float) -> None:
    """Until `is_so()`; TimeoutError, which says `what`, if it is not so in time."""
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            raise TimeoutError(f"not in {seconds} s: {what}")
        time.sleep(0.05)


def commands(text: str) -> list[str]:
    """The commands of the machine's processes that have `text` in them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            found.append(path.read_text(errors="replace").replace("\0", " "))
    return [command for command in found if text in command]


def traces() -> list[str]:
    """What engines leave on a machine that is theirs: nothing of this may be new when the tests are over."""
    found = []
    for top in (
        "/run/docker",
        "/run/containerd",
        "/opt/containerd",
        "/etc/containerd",
        "/etc/docker",
        "/var/lib/containerd",
        "/var/lib/docker",
        "/var/run/docker",
    ):
        found += [os.path.join(directory, name) for directory, _, names in os.walk(top) for name in [".", *names]]
    found += [str(path) for depth in ("docker", "*/docker") for path in Path("/sys/fs/cgroup").glob(depth)]
    return [*found, *sorted(os.listdir("/sys/class/net"))]
