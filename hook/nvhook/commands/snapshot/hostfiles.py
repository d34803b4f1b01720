# SPDX-License-Identifier: Apache-2.0
"""The driver's files as a host's description has them: what the search for the driver opens, and the links on the way.

A link is written down by the path that has no other link in it, so that all of them can be made again in any order.
"""

from __future__ import annotations

import os
import stat

from nvhook.driver import discovery, wsl_driver
from nvhook.errors import DriverError
from nvhook.host import wsl
from nvhook.linux import elf, ldcache
from nvhook.linux.root import DIRECTORY, Root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nvhook.request.config import Config

    Entry = dict[str, object]

_MAX_CONTENT = 64 << 10
_MAX_CACHE = 64 << 20
_MAX_LINKS = 40
_MACHINES = ("x86-64", "i386", "aarch64")
_FLAGS = {"x86-64": "libc6,x86-64", "i386": "libc6", "aarch64": "libc6,AArch64"}
# Versions of the driver are told by these, and the search names them where it does not open them.
_TELLING = ("libcuda.so.", "libnvidia-ml.so.")
# What is looked for at every start, and not by the search for the driver.
_OTHERS = (
    "/run/nvidia-persistenced/socket",
    "/run/nvidia-fabricmanager/socket",
    "/etc/nv_tegra_release",
    "/etc/cufile.json",
    "/run/udev",
)


def find(config: Config, version: str, warnings: list[str]) -> list[Entry]:
    """Every file, link and directory that the search for driver `version` meets; none where it is empty."""
    paths: list[str] = list(_OTHERS)

    class Recorder(Root):
        """Notes what is there of what is asked for."""

        __slots__ = ()

        def open(self, path: str, flags: int = os.O_PATH) -> int:
            fd = super().open(path, flags)
            paths.append(path)
            return fd

    if version:
        try:
            if wsl.is_store(version):
                wsl_driver.discover(config.driver_root, version, opened=Recorder)
            else:
                discovery.discover(
                    config.driver_root, config.ldcache, version, warnings, proc_root=config.proc_root, opened=Recorder
                )
        except DriverError as error:
            warnings.append(str(error))  # what is there all the same shows why
    root = Root(os.open(config.driver_root, DIRECTORY))
    try:
        found: dict[str, Entry] = {}
        for path in dict.fromkeys(paths):
            if path != config.ldcache:  # linker_cache() has what it says
                _trace(root, path, found)
        return [found[path] for path in sorted(found)]
    finally:
        os.close(root.fd)


def linker_cache(config: Config) -> list[Entry] | None:
    """The names in it that lead to the driver; None where there is no cache that can be read."""
    root = Root(os.open(config.driver_root, DIRECTORY))
    try:
        entries = ldcache.parse(root.read(config.ldcache, _MAX_CACHE))
    except (OSError, ValueError):
        return None
    finally:
        os.close(root.fd)
    stems = {stem for seeds in discovery.SEEDS.values() for stem in seeds}
    found: list[Entry] = []
    for machine, flags in _FLAGS.items():
        for entry in ldcache.entries_for(entries, machine):
            if discovery.stem_of(entry.name) in stems and entry.path.startswith("/"):
                found.append({"name": entry.name, "flags": flags, "path": entry.path})
    return found


def _trace(root: Root, path: str, found: dict[str, Entry]) -> None:
    """Add what `path` names, and each link that leads there. What is in a directory is no part of it."""
    todo = path.split("/")[::-1]
    here: list[str] = []
    links = 0
    while todo:
        name = todo.pop()
        if name in ("", "."):
            continue
        if name == "..":
            del here[-1:]
            continue
        place = "/".join(["", *here, name])
        try:
            fd = root.open(place, os.O_PATH | os.O_NOFOLLOW)
        except OSError:
            return
        try:
            if not stat.S_ISLNK(os.fstat(fd).st_mode):
                here.append(name)
                continue
            target = os.readlink("", dir_fd=fd)
        finally:
            os.close(fd)
        found[place] = {"path": place, "type": "symlink", "target": target}
        links += 1
        if links > _MAX_LINKS:
            return
        here = [] if target.startswith("/") else here
        todo += target.split("/")[::-1]
    real = "/".join(["", *here])
    if here and real not in found:
        _add(root, real, found)


def _add(root: Root, path: str, found: dict[str, Entry]) -> None:
    fd = root.open(path, os.O_PATH | os.O_NOFOLLOW)
    try:
        status = os.fstat(fd)
    finally:
        os.close(fd)
    if stat.S_ISREG(status.st_mode):
        found[path] = _file(root, path, status)
    elif stat.S_ISSOCK(status.st_mode):
        found[path] = {"path": path, "type": "socket"}
    elif stat.S_ISDIR(status.st_mode):
        found[path] = {"path": path, "type": "directory"}
        for name in root.names(path):
            if name.startswith(_TELLING):
                _trace(root, f"{path}/{name}", found)


def _file(root: Root, path: str, status: os.stat_result) -> Entry:
    entry: Entry = {"path": path, "type": "file", "size": status.st_size}
    if status.st_mode & 0o111:
        entry["executable"] = True
    try:
        fd = root.open_file(path)
    except OSError:
        return entry
    try:
        header = elf.read(fd)
        if header is not None:
            entry.update({"elf": _elf(header)} if header.machine in _MACHINES else {})
        elif status.st_size <= _MAX_CONTENT:
            entry.update(_content(os.pread(fd, _MAX_CONTENT, 0)))
    except (OSError, ValueError):
        pass  # a damaged file: its size says as much as can be said of it
    finally:
        os.close(fd)
    return entry


def _elf(header: elf.Elf) -> Entry:
    found: Entry = {"soname": header.soname, "needed": list(header.needed)}
    if header.bits != 64:
        found["class"] = header.bits
    if header.machine == "aarch64":
        found["machine"] = header.machine
    if header.abi and max(header.abi) < 256:
        found["abi"] = list(header.abi)
    return found


def _content(data: bytes) -> Entry:
    """A text; a file of other bytes is its size alone."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return {}
    return {} if "\0" in text else {"content": text}
