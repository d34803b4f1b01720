# SPDX-License-Identifier: Apache-2.0
"""What takes long to find out about the host, found once and kept below the state directory.

    inventory.json   the driver's files (discovery.py opens every ELF file)
    files/           those of them that a container gets with another content than the host has (File.content)
    nvml.json        what NVML tells (nvml.py), if a container ever needed it

Each is good exactly as long as what it was made from is the same: driver version, boot, linker cache, configuration;
for the files the directories in which they were found (watched_dirs.py), for NVML the GPUs and the layout of their MIG
devices. Whoever can write there decides what is mounted into containers, so a file that others than root and ourselves
can have written is not believed.
"""

from __future__ import annotations

import os
import stat
import time

from nvhook.errors import DriverError, reason
from nvhook.formats import quickjson
from nvhook.linux import files, trusted_dir
from nvhook.request.config import Config

from .records import Binary, Driver, DriverFile, Library

NAME = "inventory.json"
_NVML_NAME = "nvml.json"
_FILES = "files"
_FORMAT = 5
_MAX_SIZE = 4 << 20
_NVML_LIBRARY = "libnvidia-ml.so.1"
_A_WHILE = 60  # seconds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar  # noqa: TID251 - never at run time

    from nvhook.host.gpus import Gpus
    from nvhook.host.report import Report

    Form = dict[str, Callable[[object], bool]]
    Json = dict[str, Any]
    Kept = TypeVar("Kept")


def load(config: Config, version: str, warnings: list[str], *, again: bool = False, keep: bool = True) -> Driver:
    """The driver `version` (the kernel module's), from the inventory if that is good and `again` does not forbid it.

    What had to be made is written to the state directory, unless `keep` says to touch nothing.

    DriverError when this host has no libraries of that version. A state directory that cannot be written costs a
    warning and the work of the next start.
    """
    path = os.path.join(config.state_dir, NAME)
    origin = _origin(config, version)
    if not again:
        driver = _read(path, origin, _driver)
        if driver is not None:
            return driver
    looked: dict[str, int] = {}
    driver = _discover(config, version, warnings, looked)
    otherwise = "the next container makes the inventory again"
    try:
        _lay_out(driver, config.state_dir, keep=keep)
    except OSError as error:
        warnings.append(f"write below `{config.state_dir}`: {reason(error)}; {otherwise}")
        return driver
    if keep:
        _keep(path, {"origin": origin, "directories": [*looked.items()], **_describe(driver)}, warnings, otherwise)
    return driver


def is_kept(config: Config, version: str) -> bool:
    """Whether the next start finds an inventory of the driver `version` that is good."""
    return _read(os.path.join(config.state_dir, NAME), _origin(config, version), _driver) is not None


def _discover(config: Config, version: str, warnings: list[str], looked: dict[str, int]) -> Driver:
    """`looked` gets the directories that were looked into, and when each was changed last."""
    from nvhook.host import wsl

    from . import discovery, watched_dirs, wsl_driver  # json and what it brings, once per driver

    root = watched_dirs.noting(looked)
    if wsl.is_store(version):
        return wsl_driver.discover(config.driver_root, version, opened=root)
    return discovery.discover(
        config.driver_root, config.ldcache, version, warnings, proc_root=config.proc_root, opened=root
    )


def _lay_out(driver: Driver, directory: str, *, keep: bool) -> None:
    """Give files with a content of their own a place there; one that cannot be written stays as the host has it."""
    for item in driver.files:
        if item.content:
            path = os.path.join(directory, _FILES, item.destination.lstrip("/").replace("/", "-"))
            if keep:
                _replace(path, item.content.encode())
            item.path = path


def report(
    config: Config,
    gpus: Gpus,
    driver: Driver | None,
    warnings: list[str],
    *,
    again: bool = False,
    keep: bool = True,
) -> Report:
    """What NVML tells of this host's GPUs, kept as the inventory is; `driver` is loaded where NVML must be asked and
    the caller has none.

    DriverError when NVML does not answer. That is kept too, but for a minute, so that a library that hangs costs its
    time once and not in every process of every start; the same goes for an answer that lacks a GPU.
    """
    from . import nvml

    path = os.path.join(config.state_dir, _NVML_NAME)
    origin = _nvml_origin(config, gpus)
    kept = None if again else _read(path, origin, lambda document: _answer(document, gpus))
    if kept is None:
        driver = driver or load(config, gpus.driver_version, warnings, keep=keep)
        try:
            kept = nvml.ask(config, nvml_library(driver))
        except DriverError as error:
            kept = error
        if keep:
            _keep(path, {"origin": origin, **_describe_answer(kept)}, warnings, "the next container asks NVML again")
    if isinstance(kept, DriverError):
        raise kept
    return kept


def nvml_library(driver: Driver) -> str:
    for item in driver.libraries:
        if item.soname == _NVML_LIBRARY and item.bits == 64:
            return item.path
    raise DriverError(
        f"driver {driver.version} on this host has no {_NVML_LIBRARY}", "install the driver package that holds it"
    )


def _answer(document: Json, gpus: Gpus) -> Report | DriverError:
    """What was kept; ValueError for what is not believed any more."""
    from . import nvml

    is_fresh = 0 <= time.time() - document["time"] < _A_WHILE
    if "failure" in document:
        if not is_fresh:
            raise ValueError("it may answer by now")
        return DriverError(str(document["failure"]), str(document["hint"]))
    found = nvml.parse(document["report"])
    uuids = {device.pci: device.uuid for device in found.devices}
    for gpu in gpus.gpus:
        if gpu.pci not in uuids and not is_fresh:
            raise ValueError("it may be there by now")
        if "?" not in gpu.uuid and uuids.get(gpu.pci, gpu.uuid) != gpu.uuid:
            raise ValueError("another GPU is in that place")
    return found


def _describe_answer(kept: Report | DriverError) -> Json:
    if isinstance(kept, DriverError):
        return {"time": time.time(), "failure": kept.message, "hint": kept.remedy}
    return {"time": time.time(), "report": kept.describe()}


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


def _nvml_origin(config: Config, gpus: Gpus) -> Json:
    """UUIDs are not among it: the first question makes the driver know those that it did not."""
    return {
        **_origin(config, gpus.driver_version),
        "gpus": [[gpu.pci, gpu.minor] for gpu in gpus.gpus],
        "mig": _mig_layout(os.path.join(config.proc_root, "proc/driver/nvidia/capabilities")),
    }


def _mig_layout(directory: str, depth: int = 0) -> list[object]:
    """Names and inode numbers of gpu*/mig/gi*/ci*: every new MIG device has new ones."""
    levels = ("gpu", "mig", "gi", "ci")
    if depth == len(levels):
        return []
    try:
        with os.scandir(directory) as entries:
            found = sorted((item.name, item.inode()) for item in entries if item.name.startswith(levels[depth]))
    except OSError:  # a driver or a GPU without MIG
        return []
    return [[name, inode, _mig_layout(os.path.join(directory, name), depth + 1)] for name, inode in found]


def _boot_id(proc_root: str) -> str:
    try:
        with open(os.path.join(proc_root, "proc/sys/kernel/random/boot_id"), encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return ""


def _identity(path: str) -> list[object] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]


def _read(path: str, origin: Json, reader: Callable[[Json], Kept]) -> Kept | None:
    """None for a file that is missing, not ours, of another origin, or damaged."""
    try:
        directory = trusted_dir.open_directory(os.path.dirname(path), make=False)
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            fd = os.open(os.path.basename(path), flags, dir_fd=directory)
        finally:
            os.close(directory)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        if not _is_ours(status) or status.st_size > _MAX_SIZE:
            return None
        with open(fd, "rb", closefd=False) as file:
            document = quickjson.loads(file.read())
        if document["origin"] != origin:
            return None
        return reader(document)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    finally:
        os.close(fd)


def _is_ours(status: os.stat_result) -> bool:
    """Written by us or by root, and by nobody else; in a user namespace root is whoever owns `/`."""
    writers = (os.geteuid(), 0, os.stat("/").st_uid)
    return stat.S_ISREG(status.st_mode) and status.st_uid in writers and not status.st_mode & 0o022


def _are_unchanged(directories: list[tuple[str, int]]) -> bool:
    """Whether each was changed last when it was then; watched_dirs.py has noted it. OSError when one has gone."""
    return all(os.stat(path).st_mtime_ns == changed for path, changed in directories)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_number(value: object) -> bool:
    return isinstance(value, int)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_numbers(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_texts, value))


# The form that an inventory has to have: what `_describe` writes.
_LIBRARY: Form = {
    "path": _is_text,
    "soname": _is_text,
    "bits": _is_number,
    "needed": _is_texts,
    "capabilities": _is_texts,
    "directory": _is_text,
    "foreign": _is_texts,
    "glibc": _is_numbers,
}
_BINARY: Form = {"path": _is_text, "name": _is_text, "capability": _is_text, "directories": _is_rows}
_FILE: Form = {"path": _is_text, "destination": _is_text, "capabilities": _is_texts, "bits": _is_number}


def _members(inventory: Json, key: str, form: Form) -> list[Json]:
    """TypeError for a member of another form: a damaged file must not come as far as the plan."""
    members: list[Json] = inventory[key]
    for member in members:
        for name, is_right in form.items():
            if not is_right(member[name]):
                raise TypeError(f"`{name}` of one of the {key}")
    return members


def _driver(inventory: Json) -> Driver:
    """ValueError when there may be more of it by now, or less."""
    if not _are_unchanged(inventory["directories"]):
        raise ValueError("another file may be there by now")
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
                foreign=tuple(item["foreign"]),
                glibc=tuple(item["glibc"]),
            )
            for item in _members(inventory, "libraries", _LIBRARY)
        ],
        [
            Binary(
                item["path"],
                item["name"],
                item["capability"],
                tuple((source, place) for source, place in item["directories"]),
            )
            for item in _members(inventory, "binaries", _BINARY)
        ],
        [
            DriverFile(item["path"], item["destination"], tuple(item["capabilities"]), bits=item["bits"])
            for item in _members(inventory, "files", _FILE)
        ],
    )


def _describe(driver: Driver) -> Json:
    return {
        "libraries": [
            {
                "path": item.path,
                "soname": item.soname,
                "bits": item.bits,
                "needed": item.needed,
                "capabilities": item.capabilities,
                "directory": item.directory,
                "foreign": item.foreign,
                "glibc": item.glibc,
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


def _keep(path: str, document: Json, warnings: list[str], otherwise: str) -> None:
    try:
        _replace(path, quickjson.dumps(document))
    except OSError as error:
        warnings.append(f"write `{path}`: {reason(error)}; {otherwise}")


def _replace(path: str, content: bytes) -> None:
    directory = trusted_dir.open_directory(os.path.dirname(path))
    name = os.path.basename(path)
    try:
        # Several containers may start at once with nothing kept yet: each writes its own file, the last one stays.
        files.replace(content, directory, name, f"{name}.{os.getpid()}")
    finally:
        os.close(directory)
