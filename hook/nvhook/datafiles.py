# SPDX-License-Identifier: Apache-2.0
"""Finds the driver's files that are neither libraries nor programs: what loaders, the X server and the GPU itself read.

A file keeps its place in the container: below /etc if it is there on the host, else below /usr/share, where every
loader looks. A driver in a place of its own, such as /usr/local/nvidia, has its share/, etc/ and firmware/ beside its
libraries. Of several with one name the first counts, in the order of the tables here.
"""

from __future__ import annotations

import json
import os
import stat

from .driver import File
from .linux.root import Root

_MAX_JSON = 1 << 20
_MAX_NAMES = 10_000
_MACHINE = os.uname().machine

_GRAPHICS = ("display", "graphics")
_DISPLAY = ("display",)

# Directory below share/ -> the files in it; `{version}` is the driver's.
_SHARED: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("vulkan/icd.d", ("nvidia_icd.json", f"nvidia_icd.{_MACHINE}.json"), _GRAPHICS),
    ("vulkan/implicit_layer.d", ("nvidia_layers.json",), _GRAPHICS),
    ("glvnd/egl_vendor.d", ("10_nvidia.json",), _GRAPHICS),
    (
        "egl/egl_external_platform.d",
        (
            "09_nvidia_wayland2.json",
            "10_nvidia_wayland.json",
            "15_nvidia_gbm.json",
            "20_nvidia_xcb.json",
            "20_nvidia_xlib.json",
        ),
        _GRAPHICS,
    ),
    (
        "nvidia",
        (
            "nvoptix.bin",
            "nvidia-application-profiles-{version}-rc",
            "nvidia-application-profiles-{version}-key-documentation",
        ),
        _GRAPHICS,
    ),
    ("X11/xorg.conf.d", ("10-nvidia.conf", "nvidia-drm-outputclass.conf"), _DISPLAY),
)
_OPENCL = "OpenCL/vendors/nvidia.icd"  # its loader looks below /etc alone

# Below a library directory. Debian has links in /usr/lib/nvidia, Fedora and the installer a directory of X's own.
_XORG_SUBDIRECTORIES = (
    "nvidia/xorg",
    "xorg/modules/updates/drivers",
    "xorg/modules/updates/extensions",
    "xorg/modules/drivers",
    "xorg/modules/extensions",
    "xorg/modules",
    "nvidia",
)
_XORG_DRIVER = "nvidia_drv.so"
_XORG_GLX = "libglxserver_nvidia.so"

# Where a driver is part of the system: paths below these are the same in a container.
_SYSTEM = ("/usr/lib", "/lib", "/usr/lib32", "/lib32", "/usr/lib64", "/lib64", "/usr/X11R6")


def find(root: Root, directories: list[str], version: str, warnings: list[str]) -> list[File]:
    """What goes with the libraries of driver `version`; `directories` are those that may hold them, best first.

    JSON that cannot be read would stop a loader, or make it forget the driver: it is left out with a warning.
    """
    beside = list(dict.fromkeys(os.path.dirname(directory) for directory in directories))
    found = [
        *_shared(root, beside, version, warnings),
        *_opencl(root, beside),
        *_xorg(root, directories, version),
        *_firmware(root, beside, version),
    ]
    return sorted(found, key=lambda item: item.destination)


def _shared(root: Root, beside: list[str], version: str, warnings: list[str]) -> list[File]:
    # An empty place is the driver root itself, which is where GKE has its vulkan/.
    places = dict.fromkeys(["/usr/share", "/etc", "/usr/local/share", *(f"{place}/share" for place in beside), ""])
    files = []
    for directory, names, capabilities in _SHARED:
        for template in names:
            name = template.replace("{version}", version)
            for place in places:
                path = _real_path(root, f"{place}/{directory}/{name}")
                if path and (not name.endswith(".json") or _is_json(path, warnings)):
                    keeps = "/etc" if place == "/etc" else "/usr/share"
                    files.append(File(path, f"{keeps}/{directory}/{name}", capabilities))
                    break
    return files


def _opencl(root: Root, beside: list[str]) -> list[File]:
    for place in dict.fromkeys(["/etc", *(f"{place}/etc" for place in beside)]):
        path = _real_path(root, f"{place}/{_OPENCL}")
        if path:
            return [File(path, f"/etc/{_OPENCL}", ("compute",))]
    return []


def _xorg(root: Root, directories: list[str], version: str) -> list[File]:
    """The X server's modules, under the name of the file where that holds the version: the plan makes the link."""
    places = [
        f"{directory}/{below}"
        for directory in [*directories, "/usr/X11R6/lib64/modules", "/usr/X11R6/lib/modules"]
        for below in (_XORG_SUBDIRECTORIES if "X11R6" not in directory else ("drivers", "extensions"))
    ]
    files = []
    for names in ((_XORG_DRIVER,), (f"{_XORG_GLX}.{version}", _XORG_GLX)):
        for place, name in ((place, name) for place in places for name in names):
            path = _real_path(root, f"{place}/{name}")
            real_name = os.path.basename(path)
            if path and real_name in names:
                files.append(File(path, f"{_in_system(place)}/{real_name}", _DISPLAY))
                break
    return files


def _in_system(directory: str) -> str:
    """Where a directory of X modules is in a container: a place of the driver's own becomes /usr."""
    if any(directory.startswith(f"{place}/") for place in _SYSTEM):
        return directory
    parts = directory.split("/")
    libraries = [index for index, part in enumerate(parts) if part in ("lib", "lib64", "lib32")]
    return "/".join(["/usr", *parts[libraries[0] :]]) if libraries else directory


def _firmware(root: Root, beside: list[str], version: str) -> list[File]:
    """That of the GPU system processor, whole from the first place that has any."""
    for place in dict.fromkeys(["/lib/firmware", "/usr/lib/firmware", *(f"{place}/firmware" for place in beside)]):
        directory = f"{place}/nvidia/{version}"
        keeps = directory if place == "/usr/lib/firmware" else f"/lib/firmware/nvidia/{version}"
        files = []
        for name in _names(root, directory):
            path = _real_path(root, f"{directory}/{name}")
            if path and name.startswith("gsp") and name.endswith(".bin"):
                files.append(File(path, f"{keeps}/{name}", ("compute", "utility")))
        if files:
            return files
    return []


def _names(root: Root, directory: str) -> list[str]:
    try:
        fd = root.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return []
    try:
        return sorted(os.listdir(fd)[:_MAX_NAMES])
    finally:
        os.close(fd)


def _real_path(root: Root, path: str) -> str:
    """The path without links of a regular file; empty where there is none."""
    try:
        fd = root.open(path)
    except OSError:
        return ""
    try:
        return os.readlink(f"/proc/self/fd/{fd}") if stat.S_ISREG(os.fstat(fd).st_mode) else ""
    finally:
        os.close(fd)


def _is_json(path: str, warnings: list[str]) -> bool:
    try:
        with open(path, "rb") as file:
            json.loads(file.read(_MAX_JSON))
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        warnings.append(f"leave out `{path}`: {'not JSON: ' if isinstance(error, ValueError) else ''}{why}")
        return False
    return True
