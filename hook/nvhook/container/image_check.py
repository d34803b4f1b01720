# SPDX-License-Identifier: Apache-2.0
"""Will it run? What of the driver a program of this image could not load, told by files alone: none is executed.

The driver's side (which libraries of others it needs, which glibc) is in the inventory. The image's side is looked at
for every start: a few names below its root and the version definitions of its C library. Not for what an image is to
have for itself, and not for what only some programs use: a capability counts as usable if one of the libraries that
programs begin with can be loaded. A false alarm is worse than silence, so whoever is in doubt says nothing.
"""

from __future__ import annotations

import os

from nvhook import audit
from nvhook.errors import WARNING, ContainerError, Finding, one_line
from nvhook.linux.root import OutOfTimeError

from .image import Image

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nvhook.driver.records import Driver, Library
    from nvhook.linux.root import Root
    from nvhook.request.config import Config
    from nvhook.request.request import Request

    from .container import Layout

# Capability -> what programs load first, of which one that works is enough.
_FIRST = {
    "compute": ("libcuda.so.1",),
    "display": ("libGLX_nvidia.so.0", "libEGL_nvidia.so.0"),
    "graphics": ("libGLX_nvidia.so.0", "libEGL_nvidia.so.0"),
    "ngx": ("libnvidia-ngx.so.1",),
    "utility": ("libnvidia-ml.so.1",),
    "video": ("libnvcuvid.so.1", "libnvidia-encode.so.1"),
}

# The dynamic linkers of glibc and of musl, by the names that a machine has there.
_LOADER = {
    "x86_64": "/lib64/ld-linux-x86-64.so.2",
    "aarch64": "/lib/ld-linux-aarch64.so.1",
    "ppc64le": "/lib64/ld64.so.2",
}.get(os.uname().machine, "")
_MUSL = f"/lib/ld-musl-{os.uname().machine}.so.1"
_OTHER_LOADERS = (
    ("/lib/ld-linux.so.2", "32-bit x86"),
    ("/lib/ld-musl-i386.so.1", "32-bit x86"),
    ("/lib64/ld-linux-x86-64.so.2", "x86-64"),
    ("/lib/ld-musl-x86_64.so.1", "x86-64"),
    ("/lib/ld-linux-aarch64.so.1", "aarch64"),
    ("/lib/ld-musl-aarch64.so.1", "aarch64"),
    ("/lib64/ld64.so.2", "ppc64le"),
    ("/lib/ld-linux-armhf.so.3", "32-bit ARM"),
    ("/lib/ld-musl-armhf.so.1", "32-bit ARM"),
)

_PRELOAD, _MAX_PRELOAD = "/etc/ld.so.preload", 4096


def check(
    config: Config,
    request: Request,
    driver: Driver,
    root: Root,
    layout: Layout,
    warnings: list[str],
) -> None:
    """At a container's start: what is grave goes to `warnings` and to the log, or is a ContainerError if config.toml
    is strict. An image that takes too long to examine has no findings."""
    try:
        findings = examine(request, driver, root.optional, layout)
    except OutOfTimeError:
        return
    for finding in findings:
        if config.strict:
            raise ContainerError(finding.reason, f"{finding.remedy}, or set `nvhook.strict` to false in config.toml")
        warnings.append(one_line(f"{finding.reason}; {finding.remedy}"))
        audit.warn(config, f"container at `{os.readlink(f'/proc/self/fd/{root.fd}')}`: {warnings[-1]}")


def examine(request: Request, driver: Driver, root: Root, layout: Layout, *, thorough: bool = False) -> list[Finding]:
    """What is grave; `thorough`: and every library that cannot be loaded, whether or not somebody wants it.

    `root` is the image's, `layout` where the libraries come in it.
    """
    first = _first(request, driver)
    if not first:
        return []
    image = Image(root, layout, request.library_path)
    try:
        findings = _of_another_kind(request, image)
        if not findings and image.libc:
            findings = _unusable(first, driver, image)
            if thorough:
                findings += _lacking(request, driver, image)
        paths = {item.soname: item.path for libraries in first.values() for item in libraries}
        return findings + _shadowing(paths, image) + _preloaded(paths, image, thorough=thorough)
    finally:
        image.close()


def _first(request: Request, driver: Driver) -> dict[str, list[Library]]:
    """Capability that is asked for -> those of _FIRST that the driver has."""
    found = {}
    for capability in request.capabilities:
        names = _FIRST.get(capability, ())
        libraries = [item for item in driver.libraries if item.bits == 64 and item.soname in names]
        if libraries:
            found[capability] = libraries
    return found


def _of_another_kind(request: Request, image: Image) -> list[Finding]:
    """An image for another machine, or with another C library. One without any has static programs, and is let be."""
    if image.libc or image.root.exists(_LOADER):
        return []
    if image.root.exists(_MUSL):
        what = f"the image's C library is musl (`{_MUSL}`), and the driver's libraries and programs need glibc"
        return [Finding(what, "take an image with glibc, such as one of Debian, Ubuntu or Fedora")]
    for loader, machine in _OTHER_LOADERS:
        if image.root.exists(loader) and not (machine == "32-bit x86" and "compat32" in request.capabilities):
            what = f"the image is for {machine} (`{loader}`), and the driver of this host for {os.uname().machine}"
            return [Finding(what, "take the image for this machine (`docker pull --platform`)")]
    return []


def _unusable(first: dict[str, list[Library]], driver: Driver, image: Image) -> list[Finding]:
    """Capabilities of which nothing can be loaded, one line for each reason."""
    by_name = {item.soname or item.name: item for item in driver.libraries if item.bits == 64}
    capabilities: dict[tuple[str, str], list[str]] = {}
    for capability, libraries in first.items():
        faults = [_fault(item, by_name, image) for item in libraries]
        if all(what for what, _ in faults):
            capabilities.setdefault(faults[0], []).append(capability)
    return [Finding(f"`{', '.join(names)}`: {what}", hint) for (what, hint), names in capabilities.items()]


def _fault(library: Library, by_name: dict[str, Library], image: Image) -> tuple[str, str]:
    """Why it, or one that it needs, cannot be loaded, and the remedy; two empty texts if it can."""
    todo, seen = [library], {library.path}
    while todo:
        item = todo.pop()
        what, hint = _own_fault(item, image)
        if what:
            return what, hint
        needed = [by_name[name] for name in item.needed if name in by_name]
        todo += [other for other in needed if other.path not in seen]
        seen.update(other.path for other in needed)
    return "", ""


def _own_fault(library: Library, image: Image) -> tuple[str, str]:
    name = library.soname or library.name
    if image.libc and library.glibc > image.libc[1]:
        path, version = image.libc
        what = f"{name} needs glibc {_dotted(library.glibc)}, and `{path}` of the image is {_dotted(version)}"
        return what, f"take an image with glibc {_dotted(library.glibc)} or newer"
    missing = _missing(library, image)
    if missing:
        return f"{name} needs {', '.join(missing)}, not in the image", "install what holds it in the image"
    return "", ""


def _missing(library: Library, image: Image) -> list[str]:
    # The dynamic linker has found itself already, whatever its name is in the image.
    return [name for name in library.foreign if not name.startswith("ld-") and not image.has(name)]


def _lacking(request: Request, driver: Driver, image: Image) -> list[Finding]:
    """What libraries in the plan lack in the image, one line for those that fail together."""
    users: dict[str, list[str]] = {}
    for item in driver.libraries:
        if item.bits != 64 or not set(item.capabilities) & set(request.capabilities):
            continue
        lacks = _missing(item, image)
        if image.libc and item.glibc > image.libc[1]:
            lacks.append(f"glibc {_dotted(item.glibc)}")
        for name in lacks:
            users.setdefault(name, []).append(item.soname or item.name)
    together: dict[tuple[str, ...], list[str]] = {}
    for name, failing in users.items():
        together.setdefault(tuple(failing), []).append(name)
    return [
        Finding(
            f"{', '.join(failing)} cannot be loaded: the image has no {', '.join(names)}",
            "install what holds it in the image if its programs use them",
            status=WARNING,
        )
        for failing, names in together.items()
    ]


def _shadowing(paths: dict[str, str], image: Image) -> list[Finding]:
    """Libraries of the image that LD_LIBRARY_PATH has found first. `paths`: SONAME -> the driver's file."""
    for path in image.searched:
        fd = image.directory(path)
        found = [name for name in paths if fd >= 0 and image.holds(path, name)]
        found = [name for name in found if _is_another(image, f"{path}/{name}", paths[name])]
        if not found:
            continue
        if _is_at(image, fd, image.layout.libraries):
            break  # from here on the driver's own come first
        if not (image.layout.compat and _is_at(image, fd, image.layout.compat)):
            what = f"`{path}/{found[0]}` of the image is found before the driver's: LD_LIBRARY_PATH leads there"
            return [Finding(what, f"take `{path}` out of LD_LIBRARY_PATH, or the library out of the image")]
    return []


def _is_another(image: Image, path: str, driver: str) -> bool:
    """Whether there is a file, and not the driver's own: a volume brings that with Kubernetes' device plugins."""
    try:
        fd = image.root.open(path)
    except OSError:
        return False  # a link that leads nowhere is passed over by the linker too
    try:
        return not os.path.samestat(os.fstat(fd), os.stat(driver))
    except OSError:
        return True
    finally:
        os.close(fd)


def _is_at(image: Image, fd: int, directory: str) -> bool:
    other = image.directory(directory)
    return other >= 0 and os.path.samestat(os.fstat(fd), os.fstat(other))


def _preloaded(paths: dict[str, str], image: Image, *, thorough: bool) -> list[Finding]:
    try:
        text = image.root.read(_PRELOAD, _MAX_PRELOAD).decode("utf-8", "backslashreplace")
    except OSError:
        return []
    named = [path for line in text.split("\n") for path in line.partition("#")[0].replace(":", " ").split()]
    ours = [path for path in named if path.rpartition("/")[2] in paths]
    if ours:
        what = f"`{ours[0]}`, which `{_PRELOAD}` of the image names, is loaded before the driver's library of that name"
        return [Finding(what, f"take it out of `{_PRELOAD}`")]
    if thorough and named:
        what = f"`{_PRELOAD}` of the image has {', '.join(named)} loaded into every program before the driver's"
        return [Finding(what, "take it out if the driver's functions fail in odd ways", status=WARNING)]
    return []


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
