# SPDX-License-Identifier: Apache-2.0
"""Finds the driver's files that are neither libraries nor programs: what loaders, the X server and the GPU itself read.

A file keeps its place in the container: below /etc if it is there on the host, else below /usr/share, where every
loader looks. A driver in a place of its own, such as /usr/local/nvidia, has its share/, etc/ and firmware/ beside its
libraries. Of several with one name the first counts, in the order of the tables here.

What names a library by its path on the host (NixOS: /nix/store/<hash>-nvidia-x11/lib/libGLX_nvidia.so.0) is given to
the container with the library's name alone, which its linker finds.
"""

from __future__ import annotations

import json
import os
import stat

from nvhook.linux.root import Root

from .records import DriverFile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_MAX_JSON = 1 << 20
_MAX_NAMES = 10_000
_MACHINE = os.uname().machine

_GRAPHICS = ("display", "graphics")
_DISPLAY = ("display",)

# Directory below share/ -> the files in it; `{version}` is the driver's.
_SHARED: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    (
        "vulkan/icd.d",
        ("nvidia_icd.json", f"nvidia_icd.{_MACHINE}.json", "nvidia_icd.i686.json", "nvidia_layers.json"),
        _GRAPHICS,
    ),
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
_32_BIT = ("nvidia_icd.i686.json",)  # an ICD for 64-bit programs names no architecture, or its own
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


def find(
    root: Root, directories: list[str], version: str, warnings: list[str], firmware: Sequence[str] = ("/lib/firmware",)
) -> list[DriverFile]:
    """What goes with the libraries of driver `version`; `directories` are those that may hold them, best first.

    `firmware` is firmware_directories(). JSON that cannot be read would stop a loader, or make it forget the driver:
    it is left out with a warning.
    """
    beside = list(dict.fromkeys(os.path.dirname(directory) for directory in directories))
    found = [
        *_shared(root, beside, version, warnings),
        *_opencl(root, beside),
        *_xorg(root, directories, version),
        *_firmware(root, [*firmware, "/usr/lib/firmware", *(f"{place}/firmware" for place in beside)], version),
    ]
    return sorted(found, key=lambda item: item.destination)


def firmware_directories(proc_root: str, driver_root: str) -> list[str]:
    """Where the kernel looks (drivers/base/firmware_loader), in its order; an administrator's first."""
    places = []
    try:
        with open(os.path.join(proc_root, "sys/module/firmware_class/parameters/path"), encoding="utf-8") as file:
            named = file.read(4096).strip()
    except (OSError, ValueError):
        named = ""
    if named.startswith("/"):
        # It is the kernel's path; a driver container mounts itself at the driver root, and names that.
        places += [named.removeprefix(driver_root.rstrip("/")), named]
    release = os.uname().release
    return [
        *dict.fromkeys(places),
        f"/lib/firmware/updates/{release}",
        "/lib/firmware/updates",
        f"/lib/firmware/{release}",
        "/lib/firmware",
    ]


def _shared(root: Root, beside: list[str], version: str, warnings: list[str]) -> list[DriverFile]:
    # An empty place is the driver root itself, which is where GKE has its vulkan/.
    places = dict.fromkeys(["/usr/share", "/etc", "/usr/local/share", *(f"{place}/share" for place in beside), ""])
    files = []
    for directory, names, capabilities in _SHARED:
        for template in names:
            name = template.replace("{version}", version)
            for place in places:
                path = root.real_path(f"{place}/{directory}/{name}", stat.S_IFREG)
                content = _json(path, warnings) if path and name.endswith(".json") else ""
                if path and content is not None:
                    keeps = "/etc" if place == "/etc" else "/usr/share"
                    bits = 32 if name in _32_BIT else 64
                    files.append(
                        DriverFile(path, f"{keeps}/{directory}/{name}", capabilities, bits=bits, content=content)
                    )
                    break
    return files


def _opencl(root: Root, beside: list[str]) -> list[DriverFile]:
    for place in dict.fromkeys(["/etc", *(f"{place}/etc" for place in beside)]):
        path = root.real_path(f"{place}/{_OPENCL}", stat.S_IFREG)
        if path:
            return [DriverFile(path, f"/etc/{_OPENCL}", ("compute",), content=_opencl_content(path))]
    return []


def _opencl_content(path: str) -> str:
    """The file is one line, the library; empty where that needs no change."""
    try:
        with open(path, encoding="utf-8") as file:
            line = file.read(4096).strip()
    except (OSError, ValueError):
        return ""
    return f"{os.path.basename(line)}\n" if "/" in line else ""


def _xorg(root: Root, directories: list[str], version: str) -> list[DriverFile]:
    """The X server's modules, under the name of the file where that holds the version: the plan makes the link."""
    places = [
        f"{directory}/{below}"
        for directory in [*directories, "/usr/X11R6/lib64/modules", "/usr/X11R6/lib/modules"]
        for below in (_XORG_SUBDIRECTORIES if "X11R6" not in directory else ("drivers", "extensions"))
    ]
    files = []
    for names in ((_XORG_DRIVER,), (f"{_XORG_GLX}.{version}", _XORG_GLX)):
        for place, name in ((place, name) for place in places for name in names):
            path = root.real_path(f"{place}/{name}", stat.S_IFREG)
            real_name = os.path.basename(path)
            if path and real_name in names:
                files.append(DriverFile(path, f"{_in_system(place)}/{real_name}", _DISPLAY))
                break
    return files


def _in_system(directory: str) -> str:
    """Where a directory of X modules is in a container: a place of the driver's own becomes /usr, and so does `/`."""
    if directory.startswith("/lib"):  # a link to /usr/lib, by which the linker cache knows it
        return f"/usr{directory}"
    if any(directory.startswith(f"{place}/") for place in _SYSTEM):
        return directory
    parts = directory.split("/")
    libraries = [index for index, part in enumerate(parts) if part in ("lib", "lib64", "lib32")]
    return "/".join(["/usr", *parts[libraries[0] :]]) if libraries else directory


def _firmware(root: Root, places: list[str], version: str) -> list[DriverFile]:
    """That of the GPU system processor, whole from the first place that has any."""
    for place in dict.fromkeys(places):
        directory = f"{place}/nvidia/{version}"
        keeps = directory if place == "/usr/lib/firmware" else f"/lib/firmware/nvidia/{version}"
        files = []
        for name in root.names(directory)[:_MAX_NAMES]:
            path = root.real_path(f"{directory}/{name}", stat.S_IFREG)
            if path and name.startswith("gsp") and name.endswith(".bin"):
                files.append(DriverFile(path, f"{keeps}/{name}", ("compute", "utility")))
        if files:
            return files
    return []


def _json(path: str, warnings: list[str]) -> str | None:
    """What a container gets in its place, empty if it can have the file itself; None, and a warning, for damage."""
    try:
        with open(path, "rb") as file:
            document = json.loads(file.read(_MAX_JSON))
        return json.dumps(document, indent=4) + "\n" if _shorten(document) else ""
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        warnings.append(f"leave out `{path}`: {'not JSON: ' if isinstance(error, ValueError) else ''}{why}")
        return None


def _shorten(value: object) -> int:
    """Cut every `library_path` in a JSON value down to the library's name; how many there were to cut."""
    if isinstance(value, list):
        return sum(_shorten(item) for item in value)
    if not isinstance(value, dict):
        return 0
    count = sum(_shorten(item) for item in value.values())
    library = value.get("library_path")
    if isinstance(library, str) and "/" in library:
        value["library_path"] = os.path.basename(library)
        count += 1
    return count
