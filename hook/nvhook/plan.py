# SPDX-License-Identifier: Apache-2.0
"""What a container asks for and what the host has, turned into a list of edits. Pure: reads no file, changes nothing.

The order of the list is the order of application: what covers directories and is inside, libraries, binaries, other
files of the driver and sockets, the links to them, device nodes, and the linker cache last, when everything it shall
list is in place. Two runs on one host give the same list.
"""

from __future__ import annotations

from .container.edits import Device, Edit, Mount, Symlink, Tmpfs, WrittenFile
from .container.linkercache import Ldcache
from .errors import DeviceError, DriverError
from .host.procfs import DIRECTORY as PROC

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .container.container import Layout
    from .driver.records import Driver, Library
    from .host.gpus import Gpu
    from .host.offers import HostFile, Offers
    from .host.procfs import DriverProc
    from .host.selection import Selection
    from .request.request import Request

# The GPU major is fixed by the kernel's list of devices, and so are these two minors of it by the driver.
_MAJOR = 195
_CONTROL_MINOR = 255
_MODESET_MINOR = 254

_READ_ONLY = ("ro", "nosuid", "nodev")
_WRITABLE = ("nosuid", "nodev", "noexec")
_DATA = ("ro", "nosuid", "nodev", "noexec")

# Where the driver looks for profiles besides those in the home directory.
_PROFILES = "/etc/nvidia/nvidia-application-profiles-rc.d"
_PROFILE = """\
{"profiles": [{"name": "_container_", "settings": ["EGLVisibleDGPUDevices", %#x]}],
 "rules": [{"pattern": [], "profile": "_container_"}]}
"""

# What a program may open by a name that is neither the file's nor its SONAME: SONAME -> that name, and its target.
_FURTHER_LINKS = {
    "libcuda.so.1": ("libcuda.so", "libcuda.so.1"),
    "libnvidia-opticalflow.so.1": ("libnvidia-opticalflow.so", "libnvidia-opticalflow.so.1"),
    "libGLX_nvidia.so.0": ("libGLX_indirect.so.0", "libGLX_nvidia.so.0"),
}

# What libgbm opens for the kernel module nvidia-drm, below the directory of this library.
_GBM_LIBRARY = "libnvidia-allocator.so.1"
_GBM_BACKEND = "gbm/nvidia-drm_gbm.so"

# Without these the capability is not there at all; the libraries of the others differ from driver to driver.
INDISPENSABLE = {"compute": "libcuda.so.1", "utility": "libnvidia-ml.so.1"}


def make(request: Request, chosen: Selection, offers: Offers, driver: Driver, layout: Layout) -> list[Edit]:
    """The edits for a container of this `layout`. DriverError or DeviceError where the host lacks a part."""
    libraries = _libraries(request, driver)
    capabilities = set(request.capabilities)
    edits = covers(request.capabilities, chosen, offers)
    directories = [layout.compat] if layout.compat else []
    names = []
    for library in libraries:
        directory = _directory(library, layout)
        edits.append(Mount(library.path, f"{directory}/{library.name}", _READ_ONLY))
        if directory not in directories:
            directories.append(directory)
        names += [(directory, name, library.bits) for name in _linker_names(library)]
    binaries = [binary for binary in driver.binaries if binary.capability in request.capabilities]
    edits += [Mount(binary.path, f"{layout.binaries}/{binary.name}", _READ_ONLY) for binary in binaries]
    # What several of them need they have once.
    needed = dict.fromkeys(directory for binary in binaries for directory in binary.directories)
    edits += [Mount(source, place, _READ_ONLY, "directory") for source, place in needed]
    files = [
        item
        for item in driver.files
        if capabilities & set(item.capabilities) and (item.bits == 64 or "compat32" in capabilities)
    ]
    edits += [Mount(item.path, item.destination, _READ_ONLY) for item in files]
    edits += [
        Mount(item.path, item.destination, _WRITABLE, item.what)
        for item in offers.sockets
        if capabilities & set(item.capabilities)
    ]
    edits += [Mount(item.path, item.destination, _DATA, item.what) for item in offers.files if not _is_proc(item)]
    for library in libraries:
        directory = _directory(library, layout)
        edits += _links(library, directory)
        if library.soname == _GBM_LIBRARY and capabilities & {"display", "graphics"}:
            edits.append(Symlink(f"{directory}/{_GBM_BACKEND}", f"../{library.name}"))
    # The X server opens its module by a name without the version.
    edits += [
        Symlink(item.destination.removesuffix(f".{driver.version}"), item.destination.rpartition("/")[2])
        for item in files
        if item.destination.endswith(f".so.{driver.version}")
    ]
    for node in offers.dri:
        edits.append(Symlink(f"/dev/dri/by-path/pci-{node.pci}-{node.role}", f"../{node.name}"))
    edits += devices(request.capabilities, chosen.gpus, offers)
    if directories:
        # What is in the image's directory only ldconfig can say.
        edits.append(Ldcache(tuple(directories), () if layout.compat else tuple(names)))
    return edits


def covers(capabilities: Sequence[str], chosen: Selection, offers: Offers) -> list[Edit]:
    """What hides the host's other GPUs: below /proc, and from EGL."""
    files = [item for item in offers.files if _is_proc(item)]
    return _proc(offers.proc, chosen.gpus, files) + _profile(set(capabilities), chosen.gpus)


def _proc(proc: DriverProc | None, chosen: list[Gpu], files: list[HostFile]) -> list[Edit]:
    """Of /proc/driver/nvidia the driver's own files, the chosen GPUs and `files`; the rest of the host is covered."""
    if proc is None:
        return []
    cover = Tmpfs(PROC, only_over=True, in_proc=True)
    edits: list[Edit] = [cover]
    edits += [WrittenFile(cover, name, content) for name, content in sorted(proc.files.items())]
    for gpu in chosen:
        place = f"gpus/{gpu.pci}"
        edits.append(Mount(f"{proc.path}/{place}", f"{PROC}/{place}", _DATA, "directory", inside=cover))
    edits += [Mount(item.path, item.destination, _DATA, item.what, inside=cover) for item in files]
    return edits


def _is_proc(item: HostFile) -> bool:
    return item.destination.startswith(f"{PROC}/")


def _profile(capabilities: set[str], chosen: list[Gpu]) -> list[Edit]:
    """What tells EGL which GPUs to look at: the minors of the others have no nodes in the container."""
    if not chosen or not capabilities & {"display", "graphics"}:
        return []
    cover = Tmpfs(_PROFILES)
    mask = sum(1 << gpu.minor for gpu in chosen)
    return [cover, WrittenFile(cover, "10-container.conf", _PROFILE % mask)]


def devices(capabilities: Sequence[str], chosen: list[Gpu], offers: Offers) -> list[Device]:
    """The device nodes: one for each GPU; control, unified memory and mode setting as the capabilities say; what else
    is in `offers`. DeviceError without nvidia-uvm where it is needed."""
    gpus = offers.gpus
    uid, gid, mode = gpus.node_owner

    def node(name: str, major: int, minor: int) -> Device:
        return Device(f"/dev/{name}", major, minor, "rw", mode=mode, uid=uid, gid=gid)

    if gpus.dxg is not None:
        return [node("dxg", *gpus.dxg)]
    control = gpus.majors.get("nvidia", gpus.majors.get("nvidia-frontend", _MAJOR))
    nodes = [node(f"nvidia{gpu.minor}", control, gpu.minor) for gpu in chosen]
    nodes.append(node("nvidiactl", control, _CONTROL_MINOR))
    if "compute" in capabilities or "video" in capabilities:
        major = gpus.majors.get("nvidia-uvm")
        if major is None:
            raise DeviceError(
                "compute or video is asked for and the nvidia-uvm kernel module is not loaded",
                "load it with `nvidia-modprobe -u -c 0` or `modprobe nvidia-uvm`",
            )
        nodes += [node("nvidia-uvm", major, 0), node("nvidia-uvm-tools", major, 1)]
    # Before driver 560 one name, nvidia-frontend, stands for all nodes of this major.
    modeset = gpus.majors.get("nvidia-modeset", gpus.majors.get("nvidia-frontend"))
    if "display" in capabilities and modeset is not None:
        nodes.append(node("nvidia-modeset", modeset, _MODESET_MINOR))
    for item in offers.dri:
        owner, group, bits = item.owner
        nodes.append(Device(f"/dev/dri/{item.name}", item.major, item.minor, "rw", mode=bits, uid=owner, gid=group))
    for other in offers.nodes:
        owner, group, bits = other.owner
        nodes.append(Device(other.path, other.major, other.minor, "rw", mode=bits, uid=owner, gid=group))
    return nodes


def _libraries(request: Request, driver: Driver) -> list[Library]:
    capabilities = set(request.capabilities)
    for capability, soname in INDISPENSABLE.items():
        if capability in capabilities and not any(
            item.soname == soname and item.bits == 64 for item in driver.libraries
        ):
            raise DriverError(
                f"`{capability}` is asked for and driver {driver.version} on this host has no {soname}",
                "install the driver package that holds it",
            )
    return [
        library
        for library in driver.libraries
        if capabilities & set(library.capabilities) and (library.bits == 64 or "compat32" in capabilities)
    ]


def _linker_names(library: Library) -> list[str]:
    """What ldconfig would list of it: the SONAME, and the name that programs are linked by where there is a link."""
    soname = library.soname or library.name
    further = _FURTHER_LINKS.get(soname, ("",))[0]
    return [soname, further] if further.endswith(".so") else [soname]


def _directory(library: Library, layout: Layout) -> str:
    """Where it is in the container."""
    return library.directory or (layout.libraries if library.bits == 64 else layout.libraries32)


def _links(library: Library, directory: str) -> list[Symlink]:
    links = []
    if library.soname and library.soname != library.name:
        links.append(Symlink(f"{directory}/{library.soname}", library.name))
    if library.soname in _FURTHER_LINKS:
        name, target = _FURTHER_LINKS[library.soname]
        links.append(Symlink(f"{directory}/{name}", target))
    return links
