# SPDX-License-Identifier: Apache-2.0
"""A machine within the machine that systemd has booted, with nvhook installed as its package does it.

Its root is an overlay of the real one that is kept in memory; /proc, /dev, /run and the control groups (version 2
alone) are its own, and there is no network. /sys and /proc/sys cannot be written, and of the services that systemd
starts by itself those are masked that set the kernel up or clean directories. It ends with its first process, and that
one with `end`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from containers import REPOSITORY
from engines.machine import wait

SYSTEMD = Path("/lib/systemd/systemd")
HOST = "/srv/host"  # the simulated host, in there
CONFIG = f'nvidia-container-cli.root = "{HOST}/driver"\nnvidia-container-runtime.runtimes = ["runc"]\n'
# A service of systemd's sees a /proc of its own, without what is mounted over it here.
PROC_OF_HOST = f'nvhook.proc-root = "{HOST}"\n'

# $1 an empty directory, $2 the simulated host, $3 the source tree, $4 a directory that is shared.
_BOOT = r"""
place=$1 host=$2 source=$3 shared=$4
mount --make-rprivate /
mount -t tmpfs tmpfs "$place"
mkdir "$place/upper" "$place/work" "$place/root"
mount -t overlay -o "lowerdir=/,upperdir=$place/upper,workdir=$place/work" overlay "$place/root"
cd "$place/root"
mkdir -p "./$source" "./$shared" srv/host
mount --rbind "$source" "./$source"
mount --rbind "$shared" "./$shared"
mount --rbind "$host" srv/host
mount -t proc proc proc
mount -t tmpfs tmpfs proc/driver
cp -a "$host/proc/driver/nvidia" proc/driver
mount --bind "$host/proc/devices" proc/devices
mount --bind proc/sys proc/sys
mount -o remount,ro,bind proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs dev
for name in null zero full random urandom tty; do cp -a "/dev/$name" dev; done
mkdir dev/char dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mount -t tmpfs -o mode=755 tmpfs run
: >etc/machine-id
for name in sysctl modules-load tmpfiles-setup tmpfiles-setup-dev tmpfiles-clean udevd udev-trigger random-seed \
    timesyncd journal-flush; do
    ln -sf /dev/null "etc/systemd/system/systemd-$name.service"
done
printf '[Unit]\nDefaultDependencies=no\n' >etc/systemd/system/nvhook-test.target
pivot_root . mnt
cd /
umount --lazy /mnt
exec env -i container=nvhook PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    setpriv --bounding-set=-sys_module,-sys_time,-sys_rawio,-sys_boot \
    /lib/systemd/systemd --system --unit=nvhook-test.target --log-target=null --show-status=no
"""


class Booted:
    """`place` is an empty directory; `shared` is seen in there under its own path. RuntimeError if it does not boot."""

    def __init__(self, place: Path, host: Path, shared: Path) -> None:
        self.host = host
        # One that systemd may have for itself: it takes the root of what it sees.
        top = Path("/sys/fs/cgroup/unified")
        self._group = (top if top.exists() else top.parent) / f"nvhook-test-{os.getpid()}"
        self._group.mkdir()
        enter = f'echo $$ >"{self._group}/cgroup.procs"; exec "$@"'
        unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--cgroup", "--net", "--uts", "--ipc"]
        words = [str(place), str(host), str(REPOSITORY), str(shared)]
        command = ["sh", "-euc", enter, "-", *unshare, "sh", "-euc", _BOOT, "-", *words]
        self._init = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/"
        )
        try:
            wait("systemd answers", lambda: self._init.poll() is not None or self._answers(), 30)
            if self._init.poll() is not None:
                assert self._init.stdout
                raise RuntimeError(f"systemd does not boot here: {self._init.stdout.read().decode()}")
            self.install()
        except BaseException:
            self.end()
            raise

    def enter(self) -> tuple[str, ...]:
        """The words before a command that is to run in there."""
        children = Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children").read_text().split()
        environment = ("env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin")
        return "nsenter", f"--target={children[0]}", "--mount", "--pid", "--cgroup", "--net", "--wd=/", *environment

    def call(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.enter(), *command], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
        )

    def here(self, *command: str) -> str:
        """The output of a command that has to succeed."""
        done = self.call(*command)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def shell(self, script: str) -> str:
        return self.here("sh", "-euc", script)

    def _answers(self) -> bool:
        try:
            return "running" in self.call("systemctl", "is-system-running").stdout
        except (IndexError, OSError, subprocess.TimeoutExpired):
            return False

    def install(self) -> None:
        """As packaging/build puts it below /usr."""
        self.shell(
            f"cd {REPOSITORY}; scripts/install install /usr /etc\n"
            "cp packaging/systemd/* /usr/lib/systemd/system\n"
            "systemctl daemon-reload"
        )
        self.configure("")

    def configure(self, more: str) -> None:
        """For the simulated host."""
        self.shell(f"cat >/etc/nvidia-container-runtime/config.toml <<.\n{CONFIG}{more}.\n")

    def end(self) -> None:
        self._init.kill()  # --kill-child: everything in there goes with it
        self._init.wait(120)
        wait("its control groups are empty", self._is_empty, 120)
        for directory, _, _ in os.walk(self._group, topdown=False):
            os.rmdir(directory)

    def _is_empty(self) -> bool:
        return "populated 0" in (self._group / "cgroup.events").read_text()


def missing() -> str:
    """Empty when there is what it takes."""
    if not SYSTEMD.exists():
        return "systemd is not installed"
    absent = [name for name in ("unshare", "nsenter", "systemctl", "runc") if not shutil.which(name)]
    return f"not installed: {', '.join(absent)}" if absent else ""
