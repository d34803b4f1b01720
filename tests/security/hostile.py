# SPDX-License-Identifier: Apache-2.0
"""Root filesystems that somebody hostile fills, the whole plan of a workstation applied to them, and the judge of it.

The plan is the one that a container which asks for everything gets on a simulated host: every kind of edit. It is made
and applied by the hook's own functions in a child with a mount namespace of its own, which takes 50 ms where a
container under runc takes 200. What the child says at the end is where it has mounted and made something.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path

import containers
from containers import TRIPLET, tree
from nvhook import prestart
from nvhook.container import container as container_module
from nvhook.container import edits as editing
from nvhook.container.container import Container
from nvhook.container.edits import Edit
from nvhook.errors import NvhookError
from nvhook.linux import kernel, mountinfo
from nvhook.linux.root import DIRECTORY, Root
from nvhook.request import config, request, spec
from nvhook.start import Start
from simhost import cachewriter

HOST = "workstation"
VERSION = "535.247.01"  # of its driver
LIBRARIES = f"/usr/lib/{TRIPLET}"
EVERYTHING = {"NVIDIA_VISIBLE_DEVICES": "all", "NVIDIA_DRIVER_CAPABILITIES": "all"}
MS_SHARED = 1 << 20
OLD_KERNEL = ("openat2", "open_tree", "mount_setattr", "fsopen")


def make_host(original: Path, directory: Path) -> Path:
    """A copy of the simulated host with the daemons that a plan can have sockets of; its config.toml."""
    subprocess.run(["cp", "-a", str(original), str(directory)], check=True)
    pipes = directory / "driver/tmp/nvidia-mps"
    pipes.mkdir(parents=True)
    os.mkfifo(pipes / "control")
    return containers.configure(directory, directory / "config.toml", directory / "run")


def _make_image(directory: Path) -> None:
    """What the hook looks at of a Debian image, and what the driver would show in procfs; no programs."""
    for name in ("usr/bin", f"usr/lib/{TRIPLET}", "etc/ld.so.conf.d", "proc/driver/nvidia/gpus", "dev", "run", "tmp"):
        (directory / name).mkdir(parents=True)
    for name in ("bin", "lib"):
        (directory / name).symlink_to(f"usr/{name}")
    (directory / "etc/debian_version").write_text("12.0\n")
    (directory / "proc/driver/nvidia/params").write_text("ModifyDeviceFiles: 1\n")
    entry = {"name": "libz.so.1", "flags": "libc6,x86-64", "path": f"{LIBRARIES}/libz.so.1"}
    (directory / "etc/ld.so.cache").write_bytes(cachewriter.cache([entry]))


def make_socket(path: Path) -> None:
    here = os.open(".", os.O_PATH)
    os.chdir(path.parent)  # the address of a socket has room for a short path only
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.fchdir(here)
    os.close(here)


class Outcome:
    """`line` is the error's, empty where the container would have started; `mounted` are the new mounts' places below
    the root, `faults` what may never be."""

    def __init__(self, line: str, mounted: list[str], faults: list[str]) -> None:
        self.line = line
        self.mounted = mounted
        self.faults = faults


class Place:
    """`root` is the image's, a small one where none is given; `canary` is of the host, with one thing of each type, and
    what every trap points at."""

    def __init__(self, directory: Path, settings: Path, root: Path | None = None) -> None:
        self.directory = directory
        self.settings = settings
        self.env = EVERYTHING
        self.root = root or directory / "root"
        self.canary = directory / "canary"
        self.volume = directory / "volume"
        if root is None:
            _make_image(self.root)
        for path in (self.canary / "directory", self.volume / "directory"):
            path.mkdir(parents=True)
        (self.canary / "file").write_text("the host's")
        (self.volume / "file").touch()
        os.mknod(self.canary / "node", stat.S_IFCHR | 0o666, os.makedev(195, 0))
        make_socket(self.canary / "socket")

    def outside(self) -> dict[str, str]:
        """Everything of the host that there is to harm."""
        host = self.settings.parent
        found = {**tree(self.canary), **tree(host / "driver"), **tree(host / "dev"), **tree(host / "proc")}
        # A first start makes an inventory, which is no harm.
        return {path: facts for path, facts in found.items() if not path.startswith(f"{host}/run/")}

    def start(
        self,
        *,
        arrange: Callable[[], None] = lambda: None,
        watch: Callable[[list[Edit]], None] = lambda _: None,
        apply: Callable[[list[Edit], Container], None] = editing.apply,
        missing: tuple[str, ...] = (),
    ) -> Outcome:
        """The hook's main job in a child.

        arrange   in the child's mount namespace, before anything else
        watch     when the plan is made and its sources are open
        missing   system calls that this kernel lacks
        """
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            try:
                said = self._in_child(arrange, watch, apply, missing)
            except BaseException:  # told through the pipe
                said = traceback.format_exc()
            with os.fdopen(writing, "w", errors="surrogateescape") as pipe:
                pipe.write(said)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, errors="surrogateescape") as pipe:
            said = pipe.read()
        os.waitpid(child, 0)
        assert said.startswith("\0"), said or "the child ended early"
        line, mounted, faults = said[1:].split("\0")
        return Outcome(line, mounted.split("\n")[:-1], faults.split("\n")[:-1])

    def _in_child(
        self,
        arrange: Callable[[], None],
        watch: Callable[[list[Edit]], None],
        apply: Callable[[list[Edit], Container], None],
        missing: tuple[str, ...],
    ) -> str:
        for name in missing:
            setattr(kernel, name, _absent)
        kernel.unshare(kernel.CLONE_NEWNS)
        kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
        kernel.mount(str(self.root), str(self.root), None, kernel.MS_BIND)
        self.mount_proc()
        arrange()
        before = _mounts()
        container = self._container()
        settings = config.load(str(self.settings))
        edits = self.plan(container, settings)
        allowed = _Allowed(edits, before, self)
        watch(edits)
        line = ""
        try:
            for edit in edits:
                edit.prepare(settings, container.root, container)
            apply(edits, container)
        except NvhookError as error:
            line = str(error)
        mounted, faults = self._judge(before, allowed)
        lists = ("".join(f"{item}\n" for item in items) for items in (mounted, faults))
        return "\0" + "\0".join((line, *lists))

    def mount_proc(self) -> None:
        """The container's procfs, with the image's own proc/driver in it, since this machine has no driver of NVIDIA's.

        Where a trap has taken the place of one of the two there is none.
        """
        driver = self.root / "proc/driver"
        if driver.parent.is_symlink() or driver.is_symlink() or not driver.is_dir():
            return
        aside = self.directory / "driver-of-proc"
        aside.mkdir()
        kernel.mount(str(driver), str(aside), None, kernel.MS_BIND)
        kernel.mount("proc", str(driver.parent), "proc", 0)
        kernel.mount(str(aside), str(driver), None, kernel.MS_BIND)
        kernel.umount2(str(aside), kernel.MNT_DETACH)
        aside.rmdir()

    def files(self) -> list[Path]:
        """Everything below the root but for the procfs itself, which has the whole machine in it."""
        found = []
        for directory, directories, names in os.walk(self.root):
            if os.path.ismount(directory) and os.path.isdir(f"{directory}/{os.getpid()}"):
                directories[:] = ["driver"]
                names.clear()
            found += [Path(directory, name) for name in (*directories, *names)]
        return found

    def plan(self, container: Container, settings: config.Config) -> list[Edit]:
        described = spec.Spec(env=self.env, rootfs=str(self.root))
        asked = request.read(described, settings)
        assert asked is not None
        start = Start(settings, described, asked, "", [])
        start.choose()
        prestart.prepare(start, container.root)
        return start.edits

    def _container(self) -> Container:
        root = Root(os.open(self.root, DIRECTORY), container_module.SECONDS)
        return Container(
            proc=-1,
            namespace=-1,
            root=root,
            rootfs=str(self.root),
            owner=(0, 0),
            in_userns=False,
            rootless=False,
            shared=mountinfo.shared(Path("/proc/self/mountinfo").read_text()),
        )

    def _judge(self, before: dict[str, list[str]], allowed: _Allowed) -> tuple[list[str], list[str]]:
        """(places of the new mounts, what is wrong with them and with new device nodes)."""
        mounted, faults = [], []
        for number, fields in _mounts().items():
            if number in before:
                continue
            point = mountinfo.unescape(fields[4])
            mounted.append(point.removeprefix(str(self.root)))
            if not point.startswith(f"{self.root}/"):
                faults.append(f"mounted outside: {point}")
            elif not allowed.holds(point, fields):
                faults.append(f"not of the plan: {' '.join(fields)}")
        for path in self.files():
            if path not in allowed.nodes and _is_device(path) and path.lstat().st_rdev not in allowed.numbers:
                faults.append(f"a node not of the plan: {path}")
        return mounted, faults


def naive(edits: list[Edit], container: Container) -> None:
    """What the originals did before 2024: paths joined as text, and looked up once to see and once more to act."""
    for edit in edits:
        item = edit.describe()
        path = container.rootfs + str(item.get("path", item.get("destination", "")))
        if item["kind"] == "device" or (item["kind"] == "mount" and item["source"] != "tmpfs"):
            source = str(item.get("source", "/dev/null"))
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if not os.path.exists(path):
                Path(path).mkdir() if os.path.isdir(source) else Path(path).touch()
            kernel.mount(source, path, None, kernel.MS_BIND)


class _Allowed:
    """What may be the source of a mount: the host's objects in the plan, by device and inode, and a fresh tmpfs."""

    def __init__(self, edits: list[Edit], before: dict[str, list[str]], place: Place) -> None:
        plan = [edit.describe() for edit in edits]
        sources = [str(item["source"]) for item in plan if item["kind"] == "mount" and item["source"] != "tmpfs"]
        self.objects = {(status.st_dev, status.st_ino) for status in map(os.lstat, sources)}
        self.numbers = {os.makedev(edit.major, edit.minor) for edit in edits if isinstance(edit, editing.Device)}
        self.nodes = {path for path in place.files() if _is_device(path)}  # the image's own
        self._devices = {fields[2] for fields in before.values()}

    def holds(self, point: str, fields: list[str]) -> bool:
        if fields[fields.index("-") + 1] == "tmpfs" and fields[2] not in self._devices:
            return True
        status = os.lstat(point)
        return (status.st_dev, status.st_ino) in self.objects or (
            stat.S_ISCHR(status.st_mode) and status.st_rdev in self.numbers
        )


def _is_device(path: Path) -> bool:
    mode = path.lstat().st_mode
    return stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


def _mounts() -> dict[str, list[str]]:
    """Mount id -> the fields of its line."""
    lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").split("\n")
    return {line.split(" ")[0]: line.split(" ") for line in lines if line}


def _absent(*_: object, **__: object) -> int:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
