# SPDX-License-Identifier: Apache-2.0
"""Finds the driver's files below the driver root: what inventory.py keeps, made from scratch.

Where to look is the linker cache and the directories that distributions use, together. What counts is the file: a
library belongs to the driver if its real name ends with the kernel module's version and its ELF header is for this
machine. Which capability it belongs to begins with NVIDIA's lists (libnvidia-container, nvc_info.c), because some
libraries are only ever dlopened, and goes on with what these need among the driver's own files.
"""

from __future__ import annotations

import os
import stat

from nvhook.errors import DriverError, reason
from nvhook.linux import elf, ldcache, symver
from nvhook.linux.root import DIRECTORY, Root

from . import datafiles
from .records import Binary, Driver, Library

_MAX_CACHE = 64 << 20
_MAX_NAMES = 100_000

_COMPUTE = (
    "libcuda.so",
    "libcudadebugger.so",
    "libnvidia-opencl.so",
    "libnvidia-gpucomp.so",
    "libnvidia-ptxjitcompiler.so",
    "libnvidia-fatbinaryloader.so",
    "libnvidia-allocator.so",
    "libnvidia-compiler.so",
    "libnvidia-pkcs11.so",
    "libnvidia-pkcs11-openssl3.so",
    "libnvidia-nvvm.so",
    "libnvidia-nvvm70.so",
    "libnvidia-tileiras.so",
)
# These have version numbers of their own: what their SONAME link leads to is the driver's.
_OWN_VERSIONS = (
    "libnvidia-nvvm70.so",
    "libnvidia-egl-gbm.so",
    "libnvidia-egl-wayland.so",
    "libnvidia-egl-wayland2.so",
    "libnvidia-egl-xcb.so",
    "libnvidia-egl-xlib.so",
)
_GRAPHICS = (
    "libnvidia-eglcore.so",
    "libnvidia-glcore.so",
    "libnvidia-tls.so",
    "libnvidia-glsi.so",
    "libnvidia-fbc.so",
    "libnvidia-ifr.so",
    "libnvidia-rtcore.so",
    "libnvoptix.so",
    "libGLX_nvidia.so",
    "libEGL_nvidia.so",
    "libGLESv2_nvidia.so",
    "libGLESv1_CM_nvidia.so",
    "libnvidia-glvkspirv.so",
    "libnvidia-cbl.so",
    "libnvidia-vulkan-producer.so",
    "libnvidia-allocator.so",
    "libnvidia-egl-gbm.so",
    "libnvidia-egl-wayland.so",
    "libnvidia-egl-wayland2.so",
    "libnvidia-egl-xcb.so",
    "libnvidia-egl-xlib.so",
)
# Capability -> the libraries it begins with, named up to and including `.so`. Video decodes into CUDA memory.
SEEDS: dict[str, tuple[str, ...]] = {
    "compute": _COMPUTE,
    "display": _GRAPHICS,
    "graphics": _GRAPHICS,
    "ngx": ("libnvidia-ngx.so",),
    "utility": ("libnvidia-ml.so", "libnvidia-cfg.so", "libnvidia-nscq.so"),
    "video": (
        "libvdpau_nvidia.so",
        "libnvidia-encode.so",
        "libnvidia-opticalflow.so",
        "libnvcuvid.so",
        *_COMPUTE,
    ),
}

PROGRAMS = (
    ("nvidia-smi", "utility"),
    ("nvidia-debugdump", "utility"),
    ("nvidia-persistenced", "utility"),
    ("nv-fabricmanager", "utility"),
    ("nvidia-imex", "utility"),
    ("nvidia-imex-ctl", "utility"),
    ("nvidia-xconfig", "display"),
    ("nvidia-cuda-mps-control", "compute"),
    ("nvidia-cuda-mps-server", "compute"),
)

_MACHINE = os.uname().machine
_TRIPLET = f"{_MACHINE}-linux-gnu"
_MACHINES = {"x86_64": ("x86-64", "i386"), "aarch64": ("aarch64",), "ppc64le": ("ppc64le",)}.get(_MACHINE, ())

# Debian keeps one driver version of several in nvidia/current; NixOS collects its in /run/opengl-driver; the last
# ones are where GKE, Talos and the driver container put theirs.
_LIBRARY_DIRECTORIES = (
    f"/usr/lib/{_TRIPLET}",
    f"/usr/lib/{_TRIPLET}/nvidia/current",
    "/usr/lib64",
    "/usr/lib64/nvidia",
    "/usr/lib",
    "/usr/lib/nvidia",
    f"/lib/{_TRIPLET}",
    "/lib64",
    "/usr/lib/i386-linux-gnu",
    "/usr/lib/i386-linux-gnu/nvidia/current",
    "/usr/lib32",
    "/run/opengl-driver/lib",
    "/run/opengl-driver-32/lib",
    "/usr/local/nvidia/lib64",
    "/usr/local/nvidia/lib",
    "/usr/local/lib",
    "/usr/local/glibc/usr/lib",
    "/opt/nvidia/lib64",
)
_PROGRAM_DIRECTORIES = (
    "/usr/bin",
    "/usr/sbin",
    "/bin",
    "/sbin",
    "/usr/local/bin",
    "/usr/local/sbin",
    "/usr/lib/nvidia/current",
    "/run/current-system/sw/bin",
    "/usr/local/nvidia/bin",
    "/opt/nvidia/bin",
    "/opt/bin",
)
_STORE = "/nix/store/"
# Loaders look for these libraries one level down; libnvidia-tls had variants in tls/ before driver 396.
_SUBDIRECTORIES = ("", "vdpau", "tls")


def discover(
    driver_root: str,
    ldcache_path: str,
    version: str,
    warnings: list[str],
    *,
    proc_root: str = "/",
    opened: type[Root] = Root,
) -> Driver:
    """The driver `version` below `driver_root`. DriverError when there is none, naming the versions that are there.

    A file that goes with the libraries and is damaged is left out; `warnings` name it. `opened` is the kind of Root
    that is made of `driver_root`, for a caller that records what is read.
    """
    try:
        root = opened(os.open(driver_root, DIRECTORY))
    except OSError as error:
        raise DriverError(
            f"open the driver root `{driver_root}`: {reason(error)}",
            "see `nvidia-container-cli.root` in config.toml",
        ) from None
    try:
        directories = _directories(_cached(root, ldcache_path))
        libraries, others = _libraries(root, directories, version)
        if not any(item.soname in ("libcuda.so.1", "libnvidia-ml.so.1") for item in libraries):
            raise _not_found(driver_root, version, others, directories)
        firmware = datafiles.firmware_directories(proc_root, driver_root)
        files = datafiles.find(root, directories, version, warnings, firmware)
        return Driver(version, _with_capabilities(libraries), _binaries(root, directories), files)
    finally:
        os.close(root.fd)


def _not_found(driver_root: str, version: str, others: set[str], directories: list[str]) -> DriverError:
    if others:
        return DriverError(
            f"the kernel module is version {version} and the libraries below `{driver_root}` are "
            f"version {', '.join(sorted(others))}",
            "the driver was changed without loading the new module: reboot, or reinstall the driver",
        )
    return DriverError(
        f"no libraries of driver {version} below `{driver_root}`, neither in its linker cache nor in "
        f"{', '.join(directories)}",
        "install the driver's libraries, or set `nvidia-container-cli.root` in config.toml to where they are",
    )


def _cached(root: Root, path: str) -> list[ldcache.Entry]:
    """The linker cache's entries for this machine; none where there is no cache, or one that is not readable."""
    try:
        entries = ldcache.parse(root.read(path, _MAX_CACHE))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise DriverError(f"read the linker cache `{path}` of the driver root: {error}", "run `ldconfig`") from None
    return [entry for machine in _MACHINES for entry in ldcache.entries_for(entries, machine)]


def _directories(entries: list[ldcache.Entry]) -> list[str]:
    """Where to look, once each: first where the linker would find the driver."""
    stems = {stem for seeds in SEEDS.values() for stem in seeds}
    cached = [os.path.dirname(entry.path) for entry in entries if stem_of(entry.name) in stems]
    return list(dict.fromkeys([*cached, *_LIBRARY_DIRECTORIES]))


def stem_of(name: str) -> str:
    """`libcuda.so` of `libcuda.so.1` and of `libcuda.so.580.159.04`."""
    before, dot_so, _ = name.partition(".so")
    return before + dot_so


def _libraries(root: Root, directories: list[str], version: str) -> tuple[list[Library], set[str]]:
    """(the driver's libraries by path, other driver versions seen). The first of several with one SONAME counts."""
    found: dict[tuple[str, int], tuple[Library, bool]] = {}
    others: set[str] = set()
    seen: set[tuple[int, int]] = set()
    for directory in directories:
        for name in _names(root, directory):
            wanted, other = _version_in(name, version)
            if other:
                others.add(other)
            if not wanted:
                continue
            library, is_preferred = _examine(root, f"{directory}/{name}", version, seen)
            if library is None:
                continue
            key = (library.soname or library.name, library.bits)
            if key not in found or (is_preferred and not found[key][1]):
                found[key] = library, is_preferred
    return sorted((item for item, _ in found.values()), key=lambda item: (-item.bits, item.name)), others


def _names(root: Root, directory: str) -> list[str]:
    """Libraries in `directory` and its known subdirectories, relative to it, sorted."""
    names = []
    for subdirectory in _SUBDIRECTORIES:
        try:
            fd = root.open(f"{directory}/{subdirectory}", os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue
        try:
            entries = os.listdir(fd)
        finally:
            os.close(fd)
        if len(entries) > _MAX_NAMES:
            raise DriverError(f"`{directory}` holds more than {_MAX_NAMES} names")
        prefix = f"{subdirectory}/" if subdirectory else ""
        names += [prefix + name for name in sorted(entries) if name.startswith("lib") and ".so" in name]
    return names


def _version_in(name: str, version: str) -> tuple[bool, str]:
    """(whether the file may be of driver `version`, the other driver version its name says it is of)."""
    stem = stem_of(os.path.basename(name))
    suffix = os.path.basename(name)[len(stem) + 1 :]
    if suffix == version:
        return True, ""
    if stem in ("libcuda.so", "libnvidia-ml.so") and suffix.count(".") and suffix.replace(".", "").isdecimal():
        return False, suffix
    # A SONAME link may lead to a file in a directory that is not on the list.
    return suffix.isdecimal() and any(stem in seeds for seeds in SEEDS.values()), ""


def _examine(root: Root, path: str, version: str, seen: set[tuple[int, int]]) -> tuple[Library | None, bool]:
    """(the library, whether it is the better of two with its SONAME); None for what is not the driver's.

    libnvidia-tls exists in two builds; the one that its ABI note marks for Linux 2.3.99 uses the linker's own
    thread-local storage, and is the one every glibc of the last twenty years needs.
    """
    try:
        fd = root.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None, False
    try:
        status = os.fstat(fd)
        real = os.readlink(f"/proc/self/fd/{fd}")
        if not stat.S_ISREG(status.st_mode) or (status.st_dev, status.st_ino) in seen:
            return None, False
        if not real.endswith(f".so.{version}") and stem_of(os.path.basename(real)) not in _OWN_VERSIONS:
            return None, False
        seen.add((status.st_dev, status.st_ino))
        header = _read_elf(fd, real)
        if header is None or header.machine not in _MACHINES or header.kind != "shared":
            return None, False
        library = Library(real, header.soname or "", header.bits, header.needed, glibc=_glibc(fd))
    finally:
        os.close(fd)
    return library, header.abi == (2, 3, 99)


def _glibc(fd: int) -> tuple[int, ...]:
    """The oldest C library that has what it needs; nothing if it does not say so in a way that can be read."""
    try:
        versions = symver.read(fd)
        return symver.newest(versions.needed(), "GLIBC_") if versions else ()
    except (OSError, ValueError):
        return ()


def _read_elf(fd: int, path: str) -> elf.Elf | None:
    try:
        return elf.read(fd)
    except (OSError, ValueError) as error:
        raise DriverError(f"read `{path}`: {error}", "reinstall the driver") from None


def _with_capabilities(libraries: list[Library]) -> list[Library]:
    """Each library's capabilities, NEEDED parted by whose they are; those of no capability are left out."""
    by_soname = {(item.soname or item.name, item.bits): item for item in libraries}
    names: dict[str, set[str]] = {item.path: set() for item in libraries}
    for item in libraries:
        item.foreign = tuple(name for name in item.needed if (name, item.bits) not in by_soname)
        item.needed = tuple(name for name in item.needed if (name, item.bits) in by_soname)
    for capability, seeds in SEEDS.items():
        todo = [item for item in libraries if stem_of(item.soname or item.name) in seeds]
        while todo:
            item = todo.pop()
            if capability not in names[item.path]:
                names[item.path].add(capability)
                todo += [by_soname[name, item.bits] for name in item.needed]
    for item in libraries:
        item.capabilities = tuple(sorted(names[item.path]))
    return [item for item in libraries if item.capabilities]


def _binaries(root: Root, directories: list[str]) -> list[Binary]:
    """The first of each name. A driver in a place of its own has its programs beside its libraries."""
    beside = [f"{os.path.dirname(directory)}/bin" for directory in directories]
    binaries = []
    for name, capability in PROGRAMS:
        for directory in dict.fromkeys([*_PROGRAM_DIRECTORIES, *beside]):
            path, header = examine(root, f"{directory}/{name}")
            if header is not None and os.stat(path).st_mode & 0o111:  # a script would name places of the host
                binaries.append(Binary(path, name, capability, _store_directories(root, header)))
                break
    return binaries


def _store_directories(root: Root, header: elf.Elf) -> tuple[tuple[str, str], ...]:
    """Those of Nix's store with a program's own dynamic linker and the libraries that it was built with."""
    found = []
    for path in dict.fromkeys([os.path.dirname(header.interpreter), *header.search]):
        if path.startswith(_STORE):
            try:
                fd = root.open(path, os.O_PATH | os.O_DIRECTORY)
            except OSError:
                continue
            found.append((os.readlink(f"/proc/self/fd/{fd}"), path))
            os.close(fd)
    return tuple(found)


def examine(root: Root, path: str) -> tuple[str, elf.Elf | None]:
    """(the real path of a file, or empty; what it says about itself, if it is an ELF file for this machine)."""
    try:
        fd = root.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return "", None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return "", None
        real = os.readlink(f"/proc/self/fd/{fd}")
        header = _read_elf(fd, real)
        return real, header if header is not None and header.machine in _MACHINES else None
    finally:
        os.close(fd)
