# SPDX-License-Identifier: Apache-2.0
"""Builds a simulated host from its description.

    DIR/driver       the driver's files: ELF files, links, plain files, and the linker's cache
    DIR/proc         what the driver shows below /proc
    DIR/sys          what the kernel shows of its cards below /sys
    DIR/dev          device nodes
    DIR/config.toml  points nvhook at all this; its state goes to DIR/run
    DIR/.simhost     says that DIR is ours, so that the next build may replace it

Files have the size that the description gives, but no more content than a reader needs: the rest is a hole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import uuid
from typing import Any

from simhost import cachewriter, elfwriter
from simhost.compiler import Compiler, native_machine
from simhost.description import Description, SimhostError, load

_MARKER = ".simhost"
_BUILT = ("driver", "proc", "sys", "dev", "run", "config.toml")
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_STUB = re.compile(r"lib(nvidia-ml|cuda)\.so\.(\d+(?:\.\d+)*)")
_WINDOWS = ("1", "1.1")  # how the files are named in a driver store of Windows, whatever the driver's version
_SOURCES = {"nvidia-ml": "nvml.c", "cuda": "cuda.c"}

_CONFIG = """\
[nvidia-container-cli]
root = {driver}
ldconfig = "@/sbin/ldconfig"
load-kmods = false

[nvidia-container-runtime]
runtimes = ["runc", "crun"]

[nvhook]
dev-root = {directory}
proc-root = {directory}
state-dir = {state}
"""


def build(source: Description | str | os.PathLike[str], directory: str | os.PathLike[str]) -> None:
    """Build the host that `source` (a file, or its content) describes below `directory`, or build it anew there."""
    description = load(source)
    root = os.path.realpath(directory)
    previous = os.umask(0o022)
    try:
        _prepare(root)
        # The nodes come first: they are what an ordinary user may not make.
        _make_nodes(description, root)
        _make_files(description, os.path.join(root, "driver"))
        _make_linker_cache(description, os.path.join(root, "driver"))
        _make_proc(description, root)
        _write(os.path.join(root, "config.toml"), _config(root).encode())
    finally:
        os.umask(previous)


def _prepare(root: str) -> None:
    """An empty `root` with our marker. A directory with anything in it that no build made is refused."""
    os.makedirs(root, exist_ok=True)
    found = os.listdir(root)
    if found and _MARKER not in found:
        raise SimhostError(f"`{root}`: exists, is not empty and was not made by simhost")
    if not found:
        _write(os.path.join(root, _MARKER), b"A simulated host; the next build in this directory replaces it.\n")
    with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as mounts:
        if any(line.split()[1].startswith(root + "/") for line in mounts):
            raise SimhostError(f"`{root}`: something is mounted below it; unmount it first")
    for name in _BUILT:
        path = os.path.join(root, name)
        if name in found:
            shutil.rmtree(path) if stat.S_ISDIR(os.lstat(path).st_mode) else os.unlink(path)
    for name in ("driver", "proc", "sys", "dev"):
        os.mkdir(os.path.join(root, name))


def _make_nodes(description: Description, root: str) -> None:
    for node in description["device_nodes"]:
        path = _parent_made(root, node["path"])
        mode = int(node["mode"], 8)
        try:
            os.mknod(path, stat.S_IFCHR | mode, os.makedev(node["major"], node["minor"]))
        except PermissionError as error:
            raise SimhostError(f"make device node `{path}`: not permitted; only real root may") from error
        os.chmod(path, mode)  # whatever the umask


def _make_files(description: Description, driver: str) -> None:
    # Links and directories first, so that what lies behind a link to a directory finds it.
    order = {"directory": 1, "file": 2, "socket": 2, "symlink": 0}
    with Compiler(description) as compiler:
        for entry in sorted(description["files"], key=lambda entry: order[entry["type"]]):
            path = _parent_made(driver, entry["path"])
            if entry["type"] == "directory":
                os.makedirs(path, exist_ok=True)
            elif entry["type"] == "symlink":
                os.symlink(entry["target"], path)
            elif entry["type"] == "socket":
                os.mknod(path, stat.S_IFSOCK | 0o666)
                os.chmod(path, 0o666)
            else:
                _make_file(entry, path, compiler)


def _parent_made(root: str, inside: str) -> str:
    """The path of `inside` below `root`, its directory made. A link of the description must not lead out."""
    path = root + inside
    parent = os.path.dirname(path)
    resolved = os.path.realpath(parent)
    if resolved != root and not resolved.startswith(root + "/"):
        raise SimhostError(f"make `{inside}`: a symbolic link leads out of `{root}`")
    os.makedirs(parent, exist_ok=True)
    return path


def _make_file(entry: dict[str, Any], path: str, compiler: Compiler) -> None:
    if "elf" in entry:
        _make_elf(entry["elf"], path, compiler)
    else:
        _write(path, _content(entry).encode())
    if os.path.getsize(path) < entry.get("size", 0):
        os.truncate(path, entry["size"])
    os.chmod(path, 0o755 if entry.get("executable") else 0o644)


def _content(entry: dict[str, Any]) -> str:
    """What the description says; JSON of which it gives the size alone is an empty object, for whoever parses it."""
    if "content" not in entry and entry["path"].endswith(".json"):
        return "{}".ljust(entry.get("size", 2))
    return str(entry.get("content", ""))


def _make_elf(elf: dict[str, Any], path: str, compiler: Compiler) -> None:
    """Compile the few files that do something, when this machine can; write the others ourselves."""
    machine = elf.get("machine", "x86-64" if elf.get("class", 64) == 64 else "i386")
    if elfwriter.MACHINES[machine].bits != elf.get("class", 64):
        raise SimhostError(f"make `{path}`: {machine} has no class {elf.get('class', 64)}")
    name = os.path.basename(path)
    stub = _STUB.fullmatch(name)
    if machine == native_machine() and stub:
        compiler.library(_SOURCES[stub[1]], elf, path, version=None if stub[2] in _WINDOWS else stub[2])
    elif machine == native_machine() and name == "nvidia-smi":
        compiler.program("nvidia_smi.c", elf, path)
    elif elf["soname"] is None and ".so" not in name:
        _write(path, elfwriter.program(elf["needed"], machine=machine, abi=elf.get("abi")))
    else:
        needs = elf.get("versions")
        content = elfwriter.shared_object(
            elf["soname"], elf["needed"], machine=machine, abi=elf.get("abi"), needs=needs
        )
        _write(path, content)


def _make_linker_cache(description: Description, driver: str) -> None:
    if "linker_cache" in description:
        _write(_parent_made(driver, "/etc/ld.so.cache"), cachewriter.cache(description["linker_cache"]))


def _make_proc(description: Description, root: str) -> None:
    content = json.dumps(description, sort_keys=True)
    boot_id = f"{uuid.uuid5(uuid.NAMESPACE_URL, content)}\n"
    for path, text in {_BOOT_ID: boot_id, **description["proc"]}.items():
        _write(_parent_made(root, path), text.encode())
    for path, text in description.get("sys", {}).items():
        _write(_parent_made(root, path), text.encode())
    for process in description.get("processes", []):
        _make_process(process, f"{root}/proc/{process['pid']}")


def _make_process(process: dict[str, Any], path: str) -> None:
    os.makedirs(f"{path}/fd")
    _write(f"{path}/comm", f"{process['name']}\n".encode())
    _write(f"{path}/cgroup", process["cgroup"].encode())
    for number, target in enumerate(process["open"]):
        os.symlink(target, f"{path}/fd/{number}")


def _config(root: str) -> str:
    # A JSON string is a TOML string too, as long as all beyond ASCII stays as it is.
    quoted = {
        key: json.dumps(os.path.join(root, name).rstrip("/"), ensure_ascii=False)
        for key, name in (("driver", "driver"), ("directory", ""), ("state", "run"))
    }
    return _CONFIG.format(**quoted)


def _write(path: str, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
