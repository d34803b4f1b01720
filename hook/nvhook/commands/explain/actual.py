# SPDX-License-Identifier: Apache-2.0
"""What of a plan a running container really has, and what of the driver it has beyond that.

Everything is read through /proc/<pid>, by descriptors below the container's root: its processes can change what is
there at any time, so an answer is of the moment, and a name in it may be theirs.
"""

from __future__ import annotations

import contextlib
import os
import stat

from nvhook.container.container import SECONDS
from nvhook.container.edits import Device, Edit, Mount, Symlink, Tmpfs, WrittenFile
from nvhook.container.linkercache import Ldcache
from nvhook.errors import ContainerError, reason
from nvhook.formats.record import Record
from nvhook.linux import cgroups, devprog, ldcache, mountinfo
from nvhook.linux.root import DIRECTORY, Root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nvhook.request.spec import Spec

_PROC = "/proc/driver/nvidia"
_CACHE, _MAX_CACHE = "/etc/ld.so.cache", 4 << 20  # of 150,000 libraries
_MAX_MOUNTS = 16 << 20  # bytes of mountinfo
_MAX_NODES = 10_000
_NODE_DIRECTORIES = ("/dev", "/dev/nvidia-caps", "/dev/nvidia-caps-imex-channels")
_STARTS = ("libcuda", "libnv", "libvdpau_nvidia", "nvidia", "nv-fabricmanager")
_DELETED = "//deleted"


class EditState(Record):
    """`word` is present, missing, stale, differs, `left out` or unknown; `detail` what there is to say, or empty."""

    word: str
    detail: str = ""


class Extra(Record):
    """What is there and not in the plan."""

    kind: str
    path: str
    detail: str

    def describe(self) -> dict[str, object]:
        return {"kind": self.kind, "path": self.path, "detail": self.detail}


class RunningContainer:
    """A running container. ContainerError if it is gone, or another's."""

    def __init__(self, pid: int, described: Spec) -> None:
        self._described = described
        try:
            proc = os.open(f"/proc/{pid}", DIRECTORY)
            try:
                self.root = Root(os.open("root", DIRECTORY, dir_fd=proc), SECONDS)
                self._mounts = {item.id: item for item in mountinfo.mounts(_read(proc, "mountinfo"))}
                self._cgroup = _read(proc, "cgroup")
            finally:
                os.close(proc)
        except OSError as error:
            raise ContainerError(f"look into process {pid} of the container: {reason(error)}", "run as root") from None
        self._seen: set[int] = set()
        self._devices: str | None = None  # devices.list of version 1
        self._programs: list[bytes] | None = None  # of version 2; None where neither can be read
        with contextlib.suppress(OSError, ValueError):
            self._read_cgroup()

    def state(self, edit: Edit) -> EditState:
        try:
            return self._state(edit)
        except FileNotFoundError:
            return EditState("missing")
        except OSError as error:
            return EditState("unknown", reason(error))

    def _state(self, edit: Edit) -> EditState:
        if isinstance(edit, Ldcache):
            return self._cache(edit)
        path = _place(edit)
        if f"{path}/".startswith(f"{_PROC}/") and not self.root.exists(_PROC):
            return EditState("left out", "its /proc has no driver/nvidia to cover")
        fd = self.root.open(path, os.O_PATH | os.O_NOFOLLOW)
        try:
            return self._state_of(edit, fd, path)
        finally:
            os.close(fd)

    def _state_of(self, edit: Edit, fd: int, path: str) -> EditState:
        if isinstance(edit, Mount):
            return self._mount(edit, fd, path)
        if isinstance(edit, Tmpfs):
            return self._tmpfs(fd, path)
        if isinstance(edit, Symlink):
            return self._link(edit, fd, path)
        if isinstance(edit, Device):
            return self._device(edit, fd, path)
        assert isinstance(edit, WrittenFile)
        content = edit.content.encode()
        is_same = self.root.read(path, len(content)) == content
        return EditState("present") if is_same else EditState("differs", "another content")

    def _mounted(self, fd: int, path: str) -> mountinfo.MountEntry | None:
        """The mount on exactly this place; None where it belongs to the file system around it."""
        parent = self.root.open(os.path.dirname(path))
        try:
            here, around = _mount_id(fd), _mount_id(parent)
        finally:
            os.close(parent)
        self._seen.add(here)
        return self._mounts.get(here) if here != around else None

    def _mount(self, edit: Mount, fd: int, path: str) -> EditState:
        mount = self._mounted(fd, path)
        if mount is None:
            return EditState("missing", "nothing is mounted there; the image has one of its own")
        if mount.root.endswith(_DELETED):
            return EditState("stale", f"`{mount.root.removesuffix(_DELETED)}` was deleted on the host since")
        try:
            is_same = os.path.samestat(os.fstat(fd), os.stat(edit.source))
        except OSError as error:
            return EditState("unknown", f"`{edit.source}` on the host: {reason(error)}")
        return EditState("present") if is_same else EditState("stale", f"another file is mounted: `{mount.root}`")

    def _tmpfs(self, fd: int, path: str) -> EditState:
        mount = self._mounted(fd, path)
        return EditState("present") if mount and mount.fstype == "tmpfs" else EditState("missing", "it is not covered")

    def _link(self, edit: Symlink, fd: int, path: str) -> EditState:
        if not stat.S_ISLNK(os.fstat(fd).st_mode):
            covered = self._mounted(fd, path)
            return (
                EditState("present", "a file of the image is covered")
                if covered
                else EditState("differs", "it is no link")
            )
        target = os.readlink("", dir_fd=fd)
        return EditState("present") if target == edit.target else EditState("differs", f"it leads to `{target}`")

    def _device(self, edit: Device, fd: int, path: str) -> EditState:
        self._mounted(fd, path)
        status = os.fstat(fd)
        if not stat.S_ISCHR(status.st_mode) or status.st_rdev != os.makedev(edit.major, edit.minor):
            return EditState("differs", "it is another file")
        return self._access(edit)

    def _access(self, edit: Device) -> EditState:
        """By the cgroup where that can be read, else by the rules in the container's config.json."""
        try:
            refused = self._refused(edit)
        except ValueError as error:
            return EditState("present", f"the device cgroup cannot be read: {error}")
        if refused is not None:
            return (
                EditState("differs", f"the device cgroup refuses `{refused}`")
                if refused
                else EditState("present", "allowed")
            )
        if self._described.allows(edit.major, edit.minor):
            return EditState("present", "allowed by config.json")
        return EditState("present", "no rule in config.json; the hook may have opened the cgroup itself")

    def _refused(self, edit: Device) -> str | None:
        """The letters that the cgroup does not allow; None where it cannot be read."""
        if self._devices is not None:
            return cgroups.uncovered(self._devices, cgroups.Rule("c", edit.major, edit.minor, edit.access))
        if self._programs is None:
            return None
        return "".join(
            letter
            for letter in edit.access
            if not all(devprog.allows(item, "c", edit.major, edit.minor, letter) for item in self._programs)
        )

    def _cache(self, edit: Ldcache) -> EditState:
        if not edit.names:
            return EditState("unknown", "made by ldconfig")
        try:
            entries = ldcache.parse(self.root.read(_CACHE, _MAX_CACHE))
        except ValueError as error:
            return EditState("unknown", str(error))
        paths = {entry.path for entry in entries}
        lacking = [name for directory, name, _ in edit.names if f"{directory}/{name}" not in paths]
        return EditState("differs", f"without {', '.join(lacking)}") if lacking else EditState("present")

    def _read_cgroup(self) -> None:
        """OSError or ValueError where it is out of reach."""
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            ours = file.read()
        version, path = cgroups.devices_cgroup(self._cgroup, v1=bool(cgroups.mounted_at(ours, 1, "/")))
        for _, directory in cgroups.mounted_at(ours, version, path):
            if version == 1:
                with open(f"{directory}/devices.list", encoding="ascii") as file:
                    self._devices = file.read()
                return
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                self._programs = cgroups.programs(fd)
            finally:
                os.close(fd)
            return

    def extras(self, planned: list[Edit], version: str) -> list[Extra]:
        """Mounts and nodes of the driver's kind that are not in the plan; `state` was asked for all of it before."""
        places = {_place(edit) for edit in planned if not isinstance(edit, Ldcache)}
        found = [
            Extra("mount", item.point, _about(item, version))
            for item in self._mounts.values()
            if item.id not in self._seen and _is_the_drivers(item.point) and item.point not in places
        ]
        for directory in _NODE_DIRECTORIES:
            for name in self.root.names(directory)[:_MAX_NODES]:
                path = f"{directory}/{name}"
                if name.startswith("nvidia") and path not in places and self._is_node(path):
                    found.append(Extra("device", path, ""))
        return found

    def _is_node(self, path: str) -> bool:
        try:
            fd = self.root.open(path, os.O_PATH | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            return stat.S_ISCHR(os.fstat(fd).st_mode)
        finally:
            os.close(fd)


def _place(edit: Edit) -> str:
    described = edit.describe()
    return str(described.get("destination") or described["path"])


def _is_the_drivers(point: str) -> bool:
    return os.path.basename(point).startswith(_STARTS) or point.startswith((f"{_PROC}/", "/run/nvidia-"))


def _about(mount: mountinfo.MountEntry, version: str) -> str:
    """Where it is from, whether that is gone, and of which other driver it is by its name."""
    details = [f"from `{mount.root.removesuffix(_DELETED)}`"]
    if mount.root.endswith(_DELETED):
        details.append("deleted on the host")
    _, is_library, other = os.path.basename(mount.point).partition(".so.")
    if is_library and other.count(".") and other != version and other.replace(".", "").isdecimal():
        details.append(f"of version {other}, and the driver is {version}")
    return ", ".join(details)


def _mount_id(fd: int) -> int:
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
        return int(file.read(4096).partition("mnt_id:")[2].split()[0])


def _read(proc: int, name: str) -> str:
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
    with os.fdopen(fd, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        return file.read(_MAX_MOUNTS)
