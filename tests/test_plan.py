# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvhook import cli, plan
from nvhook.container.container import Layout
from nvhook.container.edits import Mount
from nvhook.driver.records import Binary, Driver, DriverFile, Library
from nvhook.errors import DeviceError, DriverError
from nvhook.host.dri import DriNode
from nvhook.host.gpus import Gpu, Gpus
from nvhook.host.offers import HostFile, HostNode, Offers
from nvhook.host.procfs import DriverProc
from nvhook.host.selection import Selection
from nvhook.host.sockets import Socket
from nvhook.request.request import Request

# A driver of a few files, made by hand

DEBIAN = Layout("/usr/lib/x86_64-linux-gnu", "/usr/lib/i386-linux-gnu")
OTHERS = Layout("/usr/lib64", "/usr/lib32")
GPU0 = Gpu(0, 1, "GPU-aa", "0000:07:00.0", "")
GPU1 = Gpu(1, 0, "GPU-bb", "0000:41:00.0", "")
MAJORS = {"nvidia": 195, "nvidia-modeset": 195, "nvidia-uvm": 511}


def _library(name: str, soname: str, capabilities: str, bits: int = 64) -> Library:
    return Library(f"/host/lib{bits}/{name}.9.1", soname, bits, (), tuple(capabilities.split()))


LIBRARIES = [
    _library("libGLX_nvidia.so", "libGLX_nvidia.so.0", "display graphics"),
    _library("libcuda.so", "libcuda.so.1", "compute video"),
    _library("libnvidia-encode.so", "libnvidia-encode.so.1", "video"),
    _library("libnvidia-glcore.so", "libnvidia-glcore.so.9.1", "display graphics"),
    _library("libnvidia-ml.so", "libnvidia-ml.so.1", "utility"),
    _library("libnvidia-nosoname.so", "", "graphics"),
    _library("libcuda.so", "libcuda.so.1", "compute video", 32),
    _library("libnvidia-ml.so", "libnvidia-ml.so.1", "utility", 32),
]
BINARIES = [Binary("/host/bin/smi-9.1", "nvidia-smi", "utility"), Binary("/host/bin/mps", "mps", "compute")]
FILES = [
    DriverFile("/host/x/libglxserver_nvidia.so.9.1", "/usr/lib/x/libglxserver_nvidia.so.9.1", ("display",)),
    DriverFile("/host/share/icd.json", "/usr/share/icd.json", ("display", "graphics")),
]
SOCKETS = [
    Socket("/host/run/p", "/run/p", "socket", ("utility",)),
    Socket("/host/mps", "/tmp/mps", "directory", ("compute",)),
]
DRI = [
    DriNode("card3", "card", 3, GPU0.pci, (0, 44, 0o660)),
    DriNode("renderD130", "render", 130, GPU0.pci, (0, 105, 0o660)),
    DriNode("card0", "card", 0, GPU1.pci, (0, 44, 0o660)),
]


def _gpus(majors: dict[str, int] | None = None) -> Gpus:
    return Gpus("9.1", [GPU0, GPU1], MAJORS if majors is None else majors, (0, 44, 0o660))


def _make(
    capabilities: str,
    chosen: list[Gpu] | None = None,
    *,
    layout: Layout = DEBIAN,
    majors: dict[str, int] | None = None,
    libraries: list[Library] | None = None,
    proc: DriverProc | None = None,
    compat: str = "",
) -> list[str]:
    """The plan, one line an edit, as short as it can be compared whole."""
    request = Request(("0",), tuple(capabilities.split()), (), "")
    driver = Driver("9.1", LIBRARIES if libraries is None else libraries, BINARIES, FILES)
    gpus = [GPU0] if chosen is None else chosen
    drawn = [gpu.pci for gpu in gpus if {"graphics", "display"} & set(request.capabilities)]
    cards = [node for node in DRI if node.pci in drawn]
    offers = Offers(_gpus(majors), dri=cards, sockets=SOCKETS, proc=proc)
    place = Layout(layout.libraries, layout.libraries32, layout.binaries, compat)
    edits = plan.make(request, Selection(gpus, []), offers, driver, place)
    return [_short(edit.describe()) for edit in edits]


def _short(edit: dict[str, Any]) -> str:
    kind = edit.pop("kind")
    if kind == "mount":
        options = edit.pop("options")
        if edit["source"] == "tmpfs":
            assert options == ["ro", "nosuid", "nodev", "noexec", "mode=0555"]
            return "tmpfs on {destination}".format(**edit)
        assert [item for item in options if item not in ("ro", "noexec")] == ["nosuid", "nodev"]
        assert {"ro", "noexec"} & set(options)
        return "{source} {arrow} {destination}".format(arrow=">" if "ro" in options else "<>", **edit)
    if kind == "device":
        assert edit.pop("type") == "c"
        return "{path} {major}:{minor} {access}".format(**edit)
    if kind == "symlink":
        return "{path} -> {target}".format(**edit)
    if kind == "file":
        return "{path}: {content}".format(**edit)
    assert list(edit) == ["directories"]
    return " ".join([kind, *edit["directories"]])


PROC_OPTIONS = ["ro", "nosuid", "nodev", "noexec"]


def _plan(capabilities: str, driver: Driver, gpus: Gpus | None = None) -> list[str]:
    request = Request(("all",), tuple(capabilities.split()), (), "")
    return [
        _short(edit.describe())
        for edit in plan.make(request, Selection([], []), Offers(gpus or _gpus()), driver, DEBIAN)
    ]


def test_file_for_32_bit_programs_with_compat32_alone() -> None:
    driver = Driver("9.1", [], [], [DriverFile("/host/icd.i686", "/etc/icd.i686", ("graphics",), bits=32)])
    assert _plan("graphics", driver) == [CONTROL]
    assert _plan("graphics compat32", driver) == ["/host/icd.i686 > /etc/icd.i686", CONTROL]
    assert _plan("compat32", driver) == [CONTROL]


def test_programs_of_nix_have_their_directories_once() -> None:
    libc, ours, other = ("/real/libc", "/nix/store/libc/lib"), ("/real/x11", "/nix/store/x11/lib"), ("/real/mps", "/m")
    binaries = [
        Binary("/host/smi", "smi", "utility", (libc, ours)),
        Binary("/host/dump", "dump", "utility", (libc,)),
        Binary("/host/mps", "mps", "compute", (libc, other)),
    ]
    assert _plan("graphics utility", Driver("9.1", LIBRARIES[4:5], binaries, []))[1:5] == [
        "/host/smi > /usr/bin/smi",
        "/host/dump > /usr/bin/dump",
        "/real/libc > /nix/store/libc/lib",
        "/real/x11 > /nix/store/x11/lib",
    ]


def test_library_with_a_place_of_its_own() -> None:
    """WSL 2: the driver store stays where it is, and there is one node."""
    store = "/usr/lib/wsl/drivers/nv"
    library = Library(f"/host{store}/libcuda.so.1.1", "libcuda.so.1", 64, (), ("compute", "utility"), store)
    found = _plan("compute", Driver("nv", [library], [], []), Gpus("nv", [], {}, (0, 0, 0o666), (10, 125)))
    assert found == [
        f"/host{store}/libcuda.so.1.1 > {store}/libcuda.so.1.1",
        f"{store}/libcuda.so.1 -> libcuda.so.1.1",
        f"{store}/libcuda.so -> libcuda.so.1",
        "/dev/dxg 10:125 rw",
        f"ldcache {store}",
    ]


CONTROL = "/dev/nvidiactl 195:255 rw"
GPU = "/dev/nvidia1 195:1 rw"
UVM = ["/dev/nvidia-uvm 511:0 rw", "/dev/nvidia-uvm-tools 511:1 rw"]
DRI_LINKS = [
    "/dev/dri/by-path/pci-0000:07:00.0-card -> ../card3",
    "/dev/dri/by-path/pci-0000:07:00.0-render -> ../renderD130",
]
DRI_NODES = ["/dev/dri/card3 226:3 rw", "/dev/dri/renderD130 226:130 rw"]
PROFILES = "/etc/nvidia/nvidia-application-profiles-rc.d"


def _profile(mask: int) -> list[str]:
    return [
        f"tmpfs on {PROFILES}",
        f"{PROFILES}/10-container.conf: "
        f'{{"profiles": [{{"name": "_container_", "settings": ["EGLVisibleDGPUDevices", {mask:#x}]}}],\n'
        ' "rules": [{"pattern": [], "profile": "_container_"}]}\n',
    ]


D64, D32 = DEBIAN.libraries, DEBIAN.libraries32


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        pytest.param(
            "utility",
            [
                f"/host/lib64/libnvidia-ml.so.9.1 > {D64}/libnvidia-ml.so.9.1",
                "/host/bin/smi-9.1 > /usr/bin/nvidia-smi",
                "/host/run/p <> /run/p",
                f"{D64}/libnvidia-ml.so.1 -> libnvidia-ml.so.9.1",
                GPU,
                CONTROL,
                f"ldcache {D64}",
            ],
            id="utility",
        ),
        pytest.param(
            "compute",
            [
                f"/host/lib64/libcuda.so.9.1 > {D64}/libcuda.so.9.1",
                "/host/bin/mps > /usr/bin/mps",
                "/host/mps <> /tmp/mps",
                f"{D64}/libcuda.so.1 -> libcuda.so.9.1",
                f"{D64}/libcuda.so -> libcuda.so.1",
                GPU,
                CONTROL,
                *UVM,
                f"ldcache {D64}",
            ],
            id="compute",
        ),
        pytest.param(
            "video",
            [
                f"/host/lib64/libcuda.so.9.1 > {D64}/libcuda.so.9.1",
                f"/host/lib64/libnvidia-encode.so.9.1 > {D64}/libnvidia-encode.so.9.1",
                f"{D64}/libcuda.so.1 -> libcuda.so.9.1",
                f"{D64}/libcuda.so -> libcuda.so.1",
                f"{D64}/libnvidia-encode.so.1 -> libnvidia-encode.so.9.1",
                GPU,
                CONTROL,
                *UVM,
                f"ldcache {D64}",
            ],
            id="video-decodes-into-cuda-memory",
        ),
        pytest.param(
            "compat32 compute",
            [
                f"/host/lib64/libcuda.so.9.1 > {D64}/libcuda.so.9.1",
                f"/host/lib32/libcuda.so.9.1 > {D32}/libcuda.so.9.1",
                "/host/bin/mps > /usr/bin/mps",
                "/host/mps <> /tmp/mps",
                f"{D64}/libcuda.so.1 -> libcuda.so.9.1",
                f"{D64}/libcuda.so -> libcuda.so.1",
                f"{D32}/libcuda.so.1 -> libcuda.so.9.1",
                f"{D32}/libcuda.so -> libcuda.so.1",
                GPU,
                CONTROL,
                *UVM,
                f"ldcache {D64} {D32}",
            ],
            id="compat32",
        ),
        pytest.param(
            "graphics",
            [
                *_profile(0b10),
                f"/host/lib64/libGLX_nvidia.so.9.1 > {D64}/libGLX_nvidia.so.9.1",
                f"/host/lib64/libnvidia-glcore.so.9.1 > {D64}/libnvidia-glcore.so.9.1",
                f"/host/lib64/libnvidia-nosoname.so.9.1 > {D64}/libnvidia-nosoname.so.9.1",
                "/host/share/icd.json > /usr/share/icd.json",
                f"{D64}/libGLX_nvidia.so.0 -> libGLX_nvidia.so.9.1",
                f"{D64}/libGLX_indirect.so.0 -> libGLX_nvidia.so.0",
                *DRI_LINKS,
                GPU,
                CONTROL,
                *DRI_NODES,
                f"ldcache {D64}",
            ],
            id="graphics",
        ),
        pytest.param(
            "display",
            [
                *_profile(0b10),
                f"/host/lib64/libGLX_nvidia.so.9.1 > {D64}/libGLX_nvidia.so.9.1",
                f"/host/lib64/libnvidia-glcore.so.9.1 > {D64}/libnvidia-glcore.so.9.1",
                "/host/x/libglxserver_nvidia.so.9.1 > /usr/lib/x/libglxserver_nvidia.so.9.1",
                "/host/share/icd.json > /usr/share/icd.json",
                f"{D64}/libGLX_nvidia.so.0 -> libGLX_nvidia.so.9.1",
                f"{D64}/libGLX_indirect.so.0 -> libGLX_nvidia.so.0",
                "/usr/lib/x/libglxserver_nvidia.so -> libglxserver_nvidia.so.9.1",
                *DRI_LINKS,
                GPU,
                CONTROL,
                "/dev/nvidia-modeset 195:254 rw",
                *DRI_NODES,
                f"ldcache {D64}",
            ],
            id="display",
        ),
        pytest.param("ngx", [GPU, CONTROL], id="ngx-that-this-driver-has-not"),
        pytest.param("compat32", [GPU, CONTROL], id="compat32-alone"),
        pytest.param("", [GPU, CONTROL], id="no-capability"),
    ],
)
def test_make(capabilities: str, expected: list[str]) -> None:
    assert expected == _make(capabilities)


def test_make_other_layout() -> None:
    expected = [
        "/host/lib64/libnvidia-ml.so.9.1 > /usr/lib64/libnvidia-ml.so.9.1",
        "/host/lib32/libnvidia-ml.so.9.1 > /usr/lib32/libnvidia-ml.so.9.1",
        "/host/bin/smi-9.1 > /usr/bin/nvidia-smi",
        "/host/run/p <> /run/p",
        "/usr/lib64/libnvidia-ml.so.1 -> libnvidia-ml.so.9.1",
        "/usr/lib32/libnvidia-ml.so.1 -> libnvidia-ml.so.9.1",
        GPU,
        CONTROL,
        "ldcache /usr/lib64 /usr/lib32",
    ]
    assert expected == _make("compat32 utility", layout=OTHERS)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        pytest.param([], [CONTROL], id="none"),
        pytest.param([GPU1], ["/dev/nvidia0 195:0 rw", CONTROL], id="one"),
        pytest.param([GPU0, GPU1], [GPU, "/dev/nvidia0 195:0 rw", CONTROL], id="node-by-minor-order-by-index"),
    ],
)
def test_make_devices_of_gpus(chosen: list[Gpu], expected: list[str]) -> None:
    assert expected == [line for line in _make("utility", chosen) if line.startswith("/dev/")]


@pytest.mark.parametrize(
    ("capabilities", "chosen", "expected"),
    [
        pytest.param("graphics", [GPU1], _profile(0b01), id="minor-not-index"),
        pytest.param("display", [GPU0, GPU1], _profile(0b11), id="all-bits-at-once"),
        pytest.param("graphics", [Gpu(0, 31, "", "0000:07:00.0", "")], _profile(0x80000000), id="last-bit"),
        pytest.param("graphics", [], [], id="no-gpu"),
        pytest.param("compute utility video", [GPU0], [], id="does-not-draw"),
    ],
)
def test_make_profile(capabilities: str, chosen: list[Gpu], expected: list[str]) -> None:
    assert expected == [line for line in _make(capabilities, chosen) if PROFILES in line]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        pytest.param([], [], id="none"),
        pytest.param([GPU1], [GPU1.pci], id="one"),
        pytest.param([GPU0, GPU1], [GPU0.pci, GPU1.pci], id="all"),
    ],
)
def test_make_proc_of_the_chosen_first(chosen: list[Gpu], expected: list[str]) -> None:
    proc = DriverProc("/host/proc/nvidia", {"version": "9.1", "params": "x"})
    lines = _make("utility", chosen, proc=proc)
    place = "/proc/driver/nvidia"
    wanted = [f"tmpfs on {place}", f"{place}/params: x", f"{place}/version: 9.1"]
    wanted += [f"/host/proc/nvidia/gpus/{pci} > {place}/gpus/{pci}" for pci in expected]
    assert wanted == lines[: len(wanted)]
    assert _make("utility", chosen) == lines[len(wanted) :]


def test_make_compatibility_libraries_come_first() -> None:
    assert f"ldcache /opt/compat {D64}" == _make("compute", compat="/opt/compat")[-1]


@pytest.mark.parametrize(
    ("majors", "expected"),
    [
        pytest.param({"nvidia-frontend": 195}, [GPU, CONTROL], id="older-name"),
        pytest.param({}, [GPU, CONTROL], id="no-name"),
        pytest.param({"nvidia": 200}, ["/dev/nvidia1 200:1 rw", "/dev/nvidiactl 200:255 rw"], id="another-major"),
    ],
)
def test_make_devices_of_majors(majors: dict[str, int], expected: list[str]) -> None:
    assert expected == [line for line in _make("utility", majors=majors) if line.startswith("/dev/")]


def test_devices_have_the_owner_that_the_module_wants() -> None:
    nodes = plan.devices(("utility",), [GPU0], Offers(_gpus()))
    assert [(node.uid, node.gid, node.mode) for node in nodes] == [(0, 44, 0o660)] * 2
    assert nodes[0].rule() == {"allow": True, "type": "c", "major": 195, "minor": 1, "access": "rw"}


@pytest.mark.parametrize(("capabilities", "links"), [("compute", 0), ("graphics", 1), ("compat32 display", 2)])
def test_make_gbm_backend_for_who_draws(capabilities: str, links: int) -> None:
    name, soname = "libnvidia-allocator.so", "libnvidia-allocator.so.1"
    more = [_library(name, soname, "compute display graphics", bits) for bits in (64, 32)]
    made = [line for line in _make(capabilities, libraries=[*LIBRARIES, *more]) if "gbm" in line]
    expected = [f"{place}/gbm/nvidia-drm_gbm.so -> ../libnvidia-allocator.so.9.1" for place in (D64, D32)]
    assert expected[:links] == made


def test_devices_of_dri_have_the_hosts_owner() -> None:
    nodes = plan.devices(("graphics",), [GPU0], Offers(_gpus(), dri=DRI[:2]))
    expected = [("/dev/dri/card3", 0, 44, 0o660), ("/dev/dri/renderD130", 0, 105, 0o660)]
    assert expected == [(node.path, node.uid, node.gid, node.mode) for node in nodes if "dri" in node.path]


def test_make_what_else_the_host_has() -> None:
    """Their mounts come before the nodes, and the nodes after the driver's, each in its order."""
    nodes = [
        HostNode("/dev/nvidia-caps/nvidia-cap12", 236, 12, (0, 0, 0o444)),
        HostNode("/dev/gdrdrv", 510, 0, (0, 44, 0o660)),
    ]
    files = [HostFile("/host/proc/access", "/proc/access"), HostFile("/host/run/udev", "/run/udev", "directory")]
    offers = Offers(_gpus(), nodes=nodes, files=files)
    driver = Driver("9.1", [], [], [])
    edits = plan.make(Request(("0",), (), (), ""), Selection([GPU0], []), offers, driver, DEBIAN)
    assert [_short(edit.describe()) for edit in edits] == [
        "/host/proc/access > /proc/access",
        "/host/run/udev > /run/udev",
        GPU,
        CONTROL,
        "/dev/nvidia-caps/nvidia-cap12 236:12 rw",
        "/dev/gdrdrv 510:0 rw",
    ]
    assert [edit.what for edit in edits if isinstance(edit, Mount)] == ["file", "directory"]
    made = plan.devices((), [GPU0], offers)
    assert [(node.uid, node.gid, node.mode) for node in made[-2:]] == [(0, 0, 0o444), (0, 44, 0o660)]


@pytest.mark.parametrize("capabilities", ["compute", "video"])
def test_make_without_unified_memory(capabilities: str) -> None:
    with pytest.raises(DeviceError, match="nvidia-uvm kernel module is not loaded; load it with `"):
        _make(capabilities, majors={"nvidia": 195})


@pytest.mark.parametrize(
    ("capabilities", "soname"),
    [
        pytest.param("compute", "libcuda.so.1", id="compute"),
        pytest.param("compat32 compute", "libcuda.so.1", id="compute-32-alone-will-not-do"),
        pytest.param("utility", "libnvidia-ml.so.1", id="utility"),
    ],
)
def test_make_without_indispensable_library(capabilities: str, soname: str) -> None:
    libraries = [item for item in LIBRARIES if item.soname != soname or item.bits == 32]
    with pytest.raises(DriverError) as raised:
        _make(capabilities, libraries=libraries)
    asked = capabilities.rsplit(maxsplit=1)[-1]
    assert str(raised.value) == (
        f"driver error: `{asked}` is asked for and driver 9.1 on this host has no {soname}; "
        "install the driver package that holds it"
    )


# Simulated hosts, through `nvhook plan --json`

HOSTS = {
    "h200": "580.159.04",
    "a100x2": "550.163.01",
    "h100x8": "570.133.20",
    "workstation": "535.247.01",
    "fedora42": "580.95.05",
    "nixos": "570.153.02",
}
KEYS = {
    "mount": ["kind", "source", "destination", "options"],
    "device": ["kind", "path", "type", "major", "minor", "access"],
    "symlink": ["kind", "path", "target"],
    "file": ["kind", "path", "content"],
    "ldcache": ["kind", "directories"],
}
Plan = Callable[..., Any]


@pytest.fixture(scope="module")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Debian as far as anybody looks."""
    directory = tmp_path_factory.mktemp("rootfs")
    (directory / "etc").mkdir()
    (directory / "etc/debian_version").touch()
    return directory


@pytest.fixture
def run(simhost: Callable[[str], Path], rootfs: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`nvhook plan --json` on a simulated host, with these variables in the image; what it prints."""

    def run(host: str, env: dict[str, str], *, expected: int = 0, form: tuple[str, ...] = ("--json",)) -> str:
        assert "NVHOOK_CONFIG" not in os.environ
        words = [word for name, value in env.items() for word in ("--env", f"{name}={value}")]
        config = simhost(host) / "config.toml"
        assert cli.main(["plan", "--rootfs", str(rootfs), *form, *words], str(config)) == expected
        printed = capfd.readouterr()
        assert bool(printed.err) == bool(expected)
        return printed.out or printed.err

    return run


@pytest.fixture
def planned(run: Callable[..., str]) -> Plan:
    def planned(host: str, devices: str = "all", capabilities: str = "compute,utility") -> Any:
        return json.loads(run(host, {"NVIDIA_VISIBLE_DEVICES": devices, "NVIDIA_DRIVER_CAPABILITIES": capabilities}))

    return planned


def _of(document: Any, kind: str) -> list[Any]:
    return [edit for edit in document["edits"] if edit["kind"] == kind]


@pytest.mark.root
@pytest.mark.parametrize("host", HOSTS)
def test_plan_follows_the_contract(planned: Plan, host: str) -> None:
    document = planned(host, "all", "all")
    assert list(document) == ["request", "driver", "gpus", "edits"]
    assert list(document["request"]) == ["devices", "capabilities", "requirements"]
    assert document["driver"] == {"version": HOSTS[host]}
    assert {tuple(gpu) for gpu in document["gpus"]} == {("index", "minor", "uuid", "pci")}
    assert all(list(edit) == KEYS[edit["kind"]] for edit in document["edits"])
    kinds = [edit["kind"] for edit in document["edits"]]
    last = len(kinds) - kinds[::-1].index("file")
    assert set(kinds[:last]) == {"mount", "file"}, "what covers a directory comes first"
    kinds = kinds[last:]
    assert list(dict.fromkeys(kinds)) == ["mount", "symlink", "device", "ldcache"]
    assert kinds == sorted(kinds, key=["mount", "symlink", "device", "ldcache"].index)


@pytest.mark.root
@pytest.mark.parametrize("host", HOSTS)
def test_plan_is_of_this_host(planned: Plan, simhost: Callable[[str], Path], host: str) -> None:
    """Sources are files of the driver, links lead to what is mounted, nodes are those of the host."""
    root = simhost(host)
    document = planned(host, "all", "all")
    there = set()
    for mount in _of(document, "mount"):
        source = Path(mount["source"])
        there.add(mount["destination"])
        if mount["destination"].startswith("/proc/driver/nvidia/"):
            assert source == root / mount["destination"][1:]
            assert source.is_dir()
            assert mount["options"] == PROC_OPTIONS
            continue
        if mount["source"] == "tmpfs":
            continue
        if source.is_relative_to(root / "run/files"):
            continue  # a copy that the inventory keeps, and a look leaves nothing behind
        assert source.is_socket() if "run" in source.parts else source.is_file()
        assert source == source.resolve()
        assert source.is_relative_to(root / "driver")
        if ".so." in source.name:
            others = ("libnvidia-egl-", "libnvidia-nvvm70.so.")
            assert source.name.endswith(f".so.{HOSTS[host]}") or source.name.startswith(others)
    assert len(there) == len(_of(document, "mount"))
    for link in _of(document, "symlink"):
        assert link["path"] not in there
        target = os.path.normpath(os.path.join(os.path.dirname(link["path"]), link["target"]))
        assert target in there or target.startswith("/dev/dri/")
        there.add(link["path"])
    for node in _of(document, "device"):
        status = (root / node["path"].lstrip("/")).stat()
        assert status.st_rdev == os.makedev(node["major"], node["minor"])
    for file in _of(document, "file"):
        assert os.path.dirname(file["path"]) in ("/proc/driver/nvidia", PROFILES)
    (ldcache,) = _of(document, "ldcache")
    libraries = [os.path.dirname(path) for path in there if re.search(r"/lib(?!glx)[^/]*\.so\.", path)]
    assert sorted(set(libraries)) == sorted(ldcache["directories"])


@pytest.mark.root
@pytest.mark.parametrize("host", HOSTS)
def test_plan_is_the_same_twice(run: Callable[..., str], simhost: Callable[[str], Path], host: str) -> None:
    env = {"NVIDIA_VISIBLE_DEVICES": "all", "NVIDIA_DRIVER_CAPABILITIES": "all"}
    assert run(host, env) == run(host, env)
    assert not (simhost(host) / "run").exists(), "a look leaves nothing behind"


@pytest.mark.root
def test_plan_utility_whole(planned: Plan, simhost: Callable[[str], Path]) -> None:
    driver = simhost("h200") / "driver/usr/local/nvidia"
    lib = "/usr/lib/x86_64-linux-gnu"

    def mount(source: str, destination: str) -> dict[str, Any]:
        options = ["ro", "nosuid", "nodev"]
        return {"kind": "mount", "source": f"{driver}/{source}", "destination": destination, "options": options}

    def device(name: str, minor: int) -> dict[str, Any]:
        return {"kind": "device", "path": f"/dev/{name}", "type": "c", "major": 195, "minor": minor, "access": "rw"}

    def file(name: str) -> dict[str, Any]:
        content = (simhost("h200") / f"proc/driver/nvidia/{name}").read_text()
        content = content.replace("ModifyDeviceFiles: 1\n", "") + "ModifyDeviceFiles: 0\n" * (name == "params")
        return {"kind": "file", "path": f"/proc/driver/nvidia/{name}", "content": content}

    tmpfs = {"kind": "mount", "source": "tmpfs", "destination": "/proc/driver/nvidia"}
    gpu = "/proc/driver/nvidia/gpus/0000:00:06.0"
    gsp = "nvidia/580.159.04"
    cfg, ml = "libnvidia-cfg.so.580.159.04", "libnvidia-ml.so.580.159.04"
    expected = {
        "request": {"devices": ["0"], "capabilities": ["utility"], "requirements": []},
        "driver": {"version": "580.159.04"},
        "gpus": [
            {"index": 0, "minor": 0, "uuid": "GPU-5f3c1e0a-7d24-4b1e-9a36-0c8e2f4d6b71", "pci": "0000:00:06.0"},
        ],
        "edits": [
            {**tmpfs, "options": [*PROC_OPTIONS, "mode=0555"]},
            *map(file, ("params", "registry", "version")),
            {"kind": "mount", "source": f"{simhost('h200')}{gpu}", "destination": gpu, "options": PROC_OPTIONS},
            mount(f"lib64/{cfg}", f"{lib}/{cfg}"),
            mount(f"lib64/{ml}", f"{lib}/{ml}"),
            mount("bin/nvidia-smi", "/usr/bin/nvidia-smi"),
            mount("bin/nvidia-debugdump", "/usr/bin/nvidia-debugdump"),
            mount("bin/nvidia-persistenced", "/usr/bin/nvidia-persistenced"),
            mount(f"firmware/{gsp}/gsp_ga10x.bin", f"/lib/firmware/{gsp}/gsp_ga10x.bin"),
            mount(f"firmware/{gsp}/gsp_tu10x.bin", f"/lib/firmware/{gsp}/gsp_tu10x.bin"),
            {"kind": "symlink", "path": f"{lib}/libnvidia-cfg.so.1", "target": cfg},
            {"kind": "symlink", "path": f"{lib}/libnvidia-ml.so.1", "target": ml},
            device("nvidia0", 0),
            device("nvidiactl", 255),
            {"kind": "ldcache", "directories": [lib]},
        ],
    }
    assert expected == planned("h200", "0", "utility")


def _same_as_table(host: str, made: str, directory: Path) -> None:
    """Against hosts/`host`.plan, a table for people."""
    table = (Path(__file__).parent / f"hosts/{host}.plan").read_text()
    for place, name in (("driver/", "HOST/"), ("run/", "RUN/"), ("", "HOST/")):
        made = made.replace(f"{directory}/{place}", name)
    lines = made.splitlines()
    assert [line.split() for line in table.splitlines()] == [line.split() for line in lines]


@pytest.mark.root
@pytest.mark.parametrize(
    ("host", "env"),
    [
        *(
            pytest.param(host, {"NVIDIA_DRIVER_CAPABILITIES": "all"}, id=host)
            for host in ("workstation-debian12", "fedora42-workstation", "nixos", "wsl2-ubuntu24")
        ),
        pytest.param(
            "a100x8-mig-ubuntu22",
            {
                "NVIDIA_VISIBLE_DEVICES": "MIG-GPU-b8ea0b71-ce42-5a07-96ba-14bf6ece0cfc/1/1,5",
                "NVIDIA_GDS": "enabled",
                "NVIDIA_MOFED": "enabled",
                "NVIDIA_GDRCOPY": "enabled",
                "NVIDIA_NVSWITCH": "enabled",
            },
            id="mig-device-and-features",
        ),
    ],
)
def test_plan_whole(run: Callable[..., str], simhost: Callable[[str], Path], host: str, env: dict[str, str]) -> None:
    made = run(host, {"NVIDIA_VISIBLE_DEVICES": "all", **env}, form=())
    _same_as_table(host, made, simhost(host))


# The machine's name is all that a plan takes of the machine that it is made on.
_ELSEWHERE = """
import os, sys
sys.path.insert(0, sys.argv[1])
os.uname = lambda: os.uname_result(("Linux", "host", "6.8", "1", "aarch64"))
from nvhook import cli
sys.exit(cli.main(sys.argv[3:], sys.argv[2]))
"""


@pytest.mark.root
def test_plan_whole_on_aarch64(simhost: Callable[[str], Path], rootfs: Path) -> None:
    host = simhost("gb200x4")
    hook = Path(cli.__file__).parent.parent
    env = ["NVIDIA_VISIBLE_DEVICES=1", "NVIDIA_IMEX_CHANNELS=1,7"]
    words = ["plan", "--rootfs", str(rootfs), *(f"--env={item}" for item in env)]
    places = [str(hook), str(host / "config.toml")]
    done = subprocess.run(
        [sys.executable, "-IS", "-c", _ELSEWHERE, *places, *words], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    _same_as_table("gb200x4-ubuntu24", done.stdout, host)


@pytest.mark.root
@pytest.mark.parametrize("host", [*HOSTS, "no-driver"])
@pytest.mark.parametrize("env", [{}, {"NVIDIA_VISIBLE_DEVICES": "void"}], ids=["unset", "void"])
def test_plan_nothing_asked(run: Callable[..., str], host: str, env: dict[str, str]) -> None:
    assert json.loads(run(host, env)) == {"request": None, "driver": None, "gpus": [], "edits": []}


@pytest.mark.root
def test_plan_none_has_the_libraries_and_no_gpu(planned: Plan) -> None:
    document = planned("h200", "none")
    assert document["gpus"] == []
    assert "libcuda.so.1" in {os.path.basename(link["path"]) for link in _of(document, "symlink")}
    nodes = [node["path"] for node in _of(document, "device")]
    assert nodes == ["/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools"]


@pytest.mark.root
def test_plan_requirements(run: Callable[..., str]) -> None:
    env = {"NVIDIA_VISIBLE_DEVICES": "all", "NVIDIA_REQUIRE_CUDA": "cuda>=12.2"}
    assert json.loads(run("h200", env))["request"]["requirements"] == ["cuda>=12.2"]
    line = run("h200", {**env, "NVIDIA_REQUIRE_CUDA": "driver>=999"}, expected=1)
    assert line.startswith("nvhook: requirement error: image needs `driver>=999`")


@pytest.mark.root
def test_plan_takes_nothing_of_an_older_driver(run: Callable[..., str]) -> None:
    env = {"NVIDIA_VISIBLE_DEVICES": "all", "NVIDIA_DRIVER_CAPABILITIES": "all"}
    assert "550.163.01" not in run("h100x8", env)


@pytest.mark.root
@pytest.mark.parametrize(
    ("host", "device", "expected"),
    [
        pytest.param("a100x2", "0", [(0, 1, "0000:07:00.0")], id="first-on-the-bus-is-nvidia1"),
        pytest.param("a100x2", "1", [(1, 0, "0000:0a:00.0")], id="second-on-the-bus-is-nvidia0"),
        pytest.param("a100x2", "1,0", [(0, 1, "0000:07:00.0"), (1, 0, "0000:0a:00.0")], id="order-of-the-host"),
        pytest.param("a100x2", "00000000:0A:00.0", [(1, 0, "0000:0a:00.0")], id="pci"),
        pytest.param("h100x8", "GPU-5ac", [(2, 2, "0000:52:00.0")], id="beginning-of-a-uuid"),
        pytest.param("h100x8", "7,GPU-e3", [(1, 1, "0000:43:00.0"), (7, 7, "0000:df:00.0")], id="index-and-uuid"),
    ],
)
def test_plan_chooses(planned: Plan, host: str, device: str, expected: list[tuple[int, int, str]]) -> None:
    document = planned(host, device, "utility")
    assert expected == [(gpu["index"], gpu["minor"], gpu["pci"]) for gpu in document["gpus"]]
    nodes = [node["path"] for node in _of(document, "device")]
    assert nodes == [*(f"/dev/nvidia{minor}" for _, minor, _ in expected), "/dev/nvidiactl"]


@pytest.mark.root
def test_plan_of_mig_devices_names_them(planned: Plan) -> None:
    document = planned("a100x8", "MIG-GPU-b8ea0b71-ce42-5a07-96ba-14bf6ece0cfc/1/1", "utility")
    assert list(document) == ["request", "driver", "gpus", "mig_devices", "edits"]
    assert [gpu["index"] for gpu in document["gpus"]] == [3]
    assert document["mig_devices"] == [{"gpu": 3, "gi": 1, "ci": 1}]


@pytest.mark.root
@pytest.mark.parametrize(
    ("capabilities", "directories"),
    [
        pytest.param("compute", ["/usr/lib/x86_64-linux-gnu"], id="without"),
        pytest.param("compute,compat32", ["/usr/lib/x86_64-linux-gnu", "/usr/lib/i386-linux-gnu"], id="with"),
    ],
)
def test_plan_32_bit_libraries_with_compat32_alone(planned: Plan, capabilities: str, directories: list[str]) -> None:
    document = planned("a100x2", "all", capabilities)
    assert directories == _of(document, "ldcache")[0]["directories"]
    found = {os.path.dirname(item["destination"]) for item in _of(document, "mount") if ".so." in item["destination"]}
    assert found == set(directories)


@pytest.mark.root
@pytest.mark.parametrize(
    ("host", "env", "message"),
    [
        pytest.param("no-driver", {}, "device error: the nvidia kernel module is not loaded: no `", id="no-driver"),
        pytest.param(
            "h100x8",
            {"NVIDIA_VISIBLE_DEVICES": "GPU-5a"},
            "device error: `GPU-5a` is the beginning of several UUIDs: 0 (GPU-5a17c0d4",
            id="ambiguous",
        ),
        pytest.param(
            "a100x2",
            {"NVIDIA_VISIBLE_DEVICES": "2"},
            "device error: unknown device `2`; this host has 0 (GPU-c41d7b52",
            id="unknown",
        ),
        pytest.param(
            "h200",
            {"NVIDIA_DRIVER_CAPABILITIES": "sound"},
            "request error: unknown capability `sound`",
            id="capability",
        ),
        pytest.param(
            "a100x8",
            {"NVIDIA_VISIBLE_DEVICES": "MIG-GPU-b8ea0b71-ce42-5a07-96ba-14bf6ece0cfc/1/2"},
            "device error: unknown MIG device `MIG-GPU-b8ea0b71-ce42-5a07-96ba-14bf6ece0cfc/1/2`; GPU 3 (GPU-b8ea0b71-",
            id="mig-device",
        ),
        pytest.param(
            "a100x2",
            {"NVIDIA_IMEX_CHANNELS": "0"},
            "device error: IMEX channel 0 is asked for and the driver has none",
            id="imex-channel",
        ),
    ],
)
def test_plan_error_is_one_line(run: Callable[..., str], host: str, env: dict[str, str], message: str) -> None:
    line = run(host, {"NVIDIA_VISIBLE_DEVICES": "all", **env}, expected=1)
    assert line.startswith(f"nvhook: {message}")
    assert line.count("\n") == 1
