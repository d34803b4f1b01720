# SPDX-License-Identifier: Apache-2.0
"""The driver's files, found once and kept.

Finding them is dear (discovery.py: every ELF file is opened) and the same for every container, so what was found is
kept as `inventory.json` below the state directory. It is good exactly as long as what it was made from is the same:
driver version, boot, linker cache, configuration. Whoever can write there decides what is mounted into containers, so a
file that others than root and ourselves can have written is not believed. What a container gets with another content
than the host has it (File.content) is kept as files of `files` beside it.
"""

from __future__ import annotations

import json
import os
import stat

from .config import Config
from .driver import Binary, Driver, File, Library
from .errors import reason

_NAME = "inventory.json"
_FILES = "files"
_FORMAT = 3
_MAX_SIZE = 4 << 20

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any  # noqa: TID251 - never at run time

    Json = dict[str, Any]


def load(config: Config, version: str, warnings: list[str], *, again: bool = False, keep: bool = True) -> Driver:
    """The driver `version` (the kernel module's), from the inventory if that is good and `again` does not forbid it.

    What had to be made is written to the state directory, unless `keep` says to touch nothing.

    DriverError when this host has no libraries of that version. A state directory that cannot be written costs a
    warning and the work of the next start.
    """
    path = os.path.join(config.state_dir, _NAME)
    origin = _origin(config, version)
    if not again:
        driver = _read(path, origin)
        if driver is not None:
            return driver
    driver = _discover(config, version, warnings)
    try:
        _lay_out(driver, config.state_dir, keep=keep)
        if keep:
            _write(path, origin, driver)
    except OSError as error:
        warnings.append(f"write `{path}`: {reason(error)}; the next container makes the inventory again")
    return driver


def _discover(config: Config, version: str, warnings: list[str]) -> Driver:
    from . import discovery, wsl  # pyelftools and what it brings, once per driver

    if wsl.is_store(version):
        return wsl.discover(config.driver_root, version)
    return discovery.discover(config.driver_root, config.ldcache, version, warnings, proc_root=config.proc_root)


def _lay_out(driver: Driver, directory: str, *, keep: bool) -> None:
    """Give files with a content of their own a place there; one that cannot be written stays as the host has it."""
    for item in driver.files:
        if item.content:
            path = os.path.join(directory, _FILES, item.destination.lstrip("/").replace("/", "-"))
            if keep:
                _replace(path, item.content)
            item.path = path


def _origin(config: Config, version: str) -> Json:
    """What an inventory was made from; compared whole."""
    return {
        "format": _FORMAT,
        "driver": version,
        "boot": _boot_id(config.proc_root),
        "driver root": config.driver_root,
        "linker cache": _identity(os.path.join(config.driver_root, config.ldcache.lstrip("/"))),
        "configuration": _identity(config.path) if config.path else None,
    }


def _boot_id(proc_root: str) -> str:
    try:
        with open(os.path.join(proc_root, "proc/sys/kernel/random/boot_id"), encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def _identity(path: str) -> list[object] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]


def _read(path: str, origin: Json) -> Driver | None:
    """None for an inventory that is missing, not ours, of another origin, or damaged."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        if not _is_ours(status) or status.st_size > _MAX_SIZE:
            return None
        with open(fd, "rb", closefd=False) as file:
            inventory = json.loads(file.read())
        if inventory["origin"] != origin:
            return None
        return _driver(inventory)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    finally:
        os.close(fd)


def _is_ours(status: os.stat_result) -> bool:
    """Written by us or by root, and by nobody else; in a user namespace root is whoever owns `/`."""
    writers = (os.geteuid(), 0, os.stat("/").st_uid)
    return stat.S_ISREG(status.st_mode) and status.st_uid in writers and not status.st_mode & 0o022


def _driver(inventory: Json) -> Driver:
    return Driver(
        inventory["origin"]["driver"],
        [
            Library(
                item["path"],
                item["soname"],
                item["bits"],
                tuple(item["needed"]),
                tuple(item["capabilities"]),
                item["directory"],
            )
            for item in inventory["libraries"]
        ],
        [
            Binary(
                item["path"],
                item["name"],
                item["capability"],
                tuple((source, place) for source, place in item["directories"]),
            )
            for item in inventory["binaries"]
        ],
        [
            File(item["path"], item["destination"], tuple(item["capabilities"]), bits=item["bits"])
            for item in inventory["files"]
        ],
    )


def _write(path: str, origin: Json, driver: Driver) -> None:
    inventory = {
        "origin": origin,
        "libraries": [
            {
                "path": item.path,
                "soname": item.soname,
                "bits": item.bits,
                "needed": item.needed,
                "capabilities": item.capabilities,
                "directory": item.directory,
            }
            for item in driver.libraries
        ],
        "binaries": [
            {
                "path": item.path,
                "name": item.name,
                "capability": item.capability,
                "directories": item.directories,
            }
            for item in driver.binaries
        ],
        "files": [
            {
                "path": item.path,
                "destination": item.destination,
                "capabilities": item.capabilities,
                "bits": item.bits,
            }
            for item in driver.files
        ],
    }
    _replace(path, json.dumps(inventory, indent=1))


def _replace(path: str, content: str) -> None:
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    # Several containers may start at once with no inventory yet: each writes its own file, the last one stays.
    beside = f"{path}.{os.getpid()}"
    if os.path.lexists(beside):
        os.unlink(beside)  # of a process that was killed, and whose number is now ours
    fd = os.open(beside, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY | os.O_CLOEXEC, 0o644)
    try:
        with open(fd, "wb") as file:
            os.fchmod(fd, 0o644)  # whatever the engine's umask: a container's other users read some of them
            file.write(content.encode())
        os.rename(beside, path)
    except OSError:
        os.unlink(beside)
        raise
