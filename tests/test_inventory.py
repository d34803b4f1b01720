# SPDX-License-Identifier: Apache-2.0
"""discovery.py and inventory.py: driver roots of small ELF files, and the inventory that is kept of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import HOSTS
from nvhook.driver import inventory
from nvhook.driver.records import Driver
from nvhook.errors import DriverError
from nvhook.host import gpus
from nvhook.host.report import Report
from nvhook.request import config as configuration
from nvhook.request.config import Config
from simhost import cachewriter, elfwriter
from simhost.build import build
from simhost.compiler import native_machine

V = "580.1.2"
NATIVE = native_machine()
LIB = f"usr/lib/{os.uname().machine}-linux-gnu"
needs_32_bit = pytest.mark.skipif(NATIVE != "x86-64", reason="there is no 32-bit driver for this machine")


def _settle(top: Path) -> None:
    """Wait until no directory has been changed just now: it would be looked into again."""
    last = max((os.stat(path).st_mtime_ns for path, _, _ in os.walk(top)), default=0)
    while time.time_ns() - last < 30_000_000:
        time.sleep(0.005)


class Place:
    """A driver root `root`, with /proc and a state directory beside it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.root = directory / "driver"
        self.state = directory / "state"
        self.inventory = self.state / "inventory.json"
        self.boot_id = directory / "proc/sys/kernel/random/boot_id"
        for path in (self.root / LIB, self.root / "etc", self.boot_id.parent):
            path.mkdir(parents=True)
        self.boot_id.write_text("first\n")
        (directory / "config.toml").write_text(
            f"[nvidia-container-cli]\nroot = '{self.root}'\n"
            f"[nvhook]\nproc-root = '{directory}'\nstate-dir = '{self.state}'\n"
        )

    def library(
        self,
        stem: str,
        soname: str | None = "",
        needed: tuple[str, ...] = (),
        *,
        at: str = LIB,
        version: str = V,
        machine: str = NATIVE,
        abi: list[int] | None = None,
    ) -> Path:
        """`stem`.so.`version` below the root; the SONAME is `stem`.so.1 unless given, and its link is made."""
        path = self.root / at / f"{stem}.so.{version}"
        path.parent.mkdir(parents=True, exist_ok=True)
        soname = f"{stem}.so.1" if soname == "" else soname
        path.write_bytes(elfwriter.shared_object(soname, [*needed, "libc.so.6"], machine=machine, abi=abi))
        if soname and soname != path.name and not os.path.lexists(path.parent / soname):
            (path.parent / soname).symlink_to(path.name)
        return path

    def cache(self, *entries: tuple[str, str]) -> None:
        flags = {"x86-64": "libc6,x86-64", "aarch64": "libc6,AArch64"}[NATIVE]
        content = [{"name": name, "path": path, "flags": flags} for name, path in entries]
        (self.root / "etc/ld.so.cache").write_bytes(cachewriter.cache(content))

    @property
    def config(self) -> Config:
        return configuration.load(str(self.directory / "config.toml"))

    def load(self, version: str = V, **options: bool) -> Driver:
        """The driver, without warnings."""
        _settle(self.root)
        warnings: list[str] = []
        found = inventory.load(self.config, version, warnings, **options)
        assert warnings == []
        return found

    def error(self, version: str = V) -> str:
        with pytest.raises(DriverError) as raised:
            inventory.load(self.config, version, [])
        assert "\n" not in str(raised.value)
        return str(raised.value)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A driver of two libraries and one program."""
    made = Place(tmp_path)
    made.library("libcuda")
    made.library("libnvidia-ml")
    (made.root / "usr/bin").mkdir()
    (made.root / "usr/bin/nvidia-smi").write_bytes(elfwriter.program(["libc.so.6"], machine=NATIVE))
    (made.root / "usr/bin/nvidia-smi").chmod(0o755)
    return made


def _names(found: Driver) -> list[str]:
    return [item.name for item in found.libraries]


def _record(found: Driver) -> Any:
    libraries = [
        (
            *(item.path, item.name, item.soname, item.bits, item.needed, item.capabilities, item.directory),
            *(item.foreign, item.glibc),
        )
        for item in found.libraries
    ]
    binaries = [(item.path, item.name, item.capability, *item.directories) for item in found.binaries]
    return (
        found.version,
        libraries,
        binaries,
        [(item.path, item.destination, item.capabilities, item.bits) for item in found.files],
    )


def _is_cached(place: Place, version: str = V) -> bool:
    """Whether the next load believes the inventory: told from a mark that only that file has."""
    inventory = json.loads(place.inventory.read_text())
    inventory["binaries"] = [{"path": "/mark", "name": "mark", "capability": "utility", "directories": []}]
    place.inventory.write_text(json.dumps(inventory))
    return [item.name for item in place.load(version).binaries] == ["mark"]


# What is found


def test_discover_whole(place: Place) -> None:
    lib = place.root / LIB
    libc: Any = (("libc.so.6",), ())
    expected: Any = (
        V,
        [
            (f"{lib}/libcuda.so.{V}", f"libcuda.so.{V}", "libcuda.so.1", 64, (), ("compute", "video"), "", *libc),
            (
                f"{lib}/libnvidia-ml.so.{V}",
                f"libnvidia-ml.so.{V}",
                "libnvidia-ml.so.1",
                64,
                (),
                ("utility",),
                "",
                *libc,
            ),
        ],
        [(f"{place.root}/usr/bin/nvidia-smi", "nvidia-smi", "utility")],
        [],
    )
    assert expected == _record(place.load())


def test_discover_what_the_c_library_must_have(place: Place) -> None:
    """Kept in the inventory too: the second load reads no ELF file."""
    path = place.library("libnvidia-encode")
    needs = {"libc.so.6": ["GLIBC_2.2.5", "GLIBC_2.27"], "libm.so.6": ["GLIBC_2.29", "GLIBC_PRIVATE"]}
    soname = "libnvidia-encode.so.1"
    path.write_bytes(elfwriter.shared_object(soname, ["libm.so.6", "libcuda.so.1"], machine=NATIVE, needs=needs))
    for _ in range(2):
        (library,) = [item for item in place.load().libraries if item.soname == soname]
        assert (library.needed, library.foreign, library.glibc) == (("libcuda.so.1",), ("libm.so.6",), (2, 29))


def test_discover_versions_differ(place: Place) -> None:
    assert place.error("590.3") == (
        f"driver error: the kernel module is version 590.3 and the libraries below `{place.root}` are version {V}; "
        "the driver was changed without loading the new module: reboot, or reinstall the driver"
    )


def test_discover_beside_an_older_version(place: Place) -> None:
    expected = _record(place.load())
    for stem in ("libcuda", "libnvidia-ml", "libnvidia-encode"):
        place.library(stem, version="550.163.01")
    assert expected == _record(place.load(again=True))


def test_discover_nothing(tmp_path: Path) -> None:
    empty = Place(tmp_path)
    line = empty.error()
    assert line.startswith(
        f"driver error: no libraries of driver {V} below `{empty.root}`, neither in its linker cache"
    )
    assert "set `nvidia-container-cli.root` in config.toml" in line


def test_discover_no_driver_root(place: Place) -> None:
    place.root.rename(place.directory / "away")
    assert place.error().startswith(f"driver error: open the driver root `{place.root}`: no such file or directory; ")


@needs_32_bit
def test_discover_both_classes(place: Place) -> None:
    place.library("libcuda", at="usr/lib/i386-linux-gnu", machine="i386")
    assert [(item.soname, item.bits) for item in place.load().libraries] == [
        ("libcuda.so.1", 64),
        ("libnvidia-ml.so.1", 64),
        ("libcuda.so.1", 32),
    ]


@needs_32_bit
def test_discover_32_bit_library_in_the_wrong_place(place: Place) -> None:
    """Under the right name where 64-bit libraries are: it is what its header says, and no 64-bit library."""
    place.library("libnvidia-encode", machine="i386")
    assert [item.bits for item in place.load().libraries if item.soname == "libnvidia-encode.so.1"] == [32]


def test_discover_library_of_another_machine(place: Place) -> None:
    place.library("libnvidia-encode", machine="aarch64" if NATIVE == "x86-64" else "x86-64")
    assert _names(place.load()) == [f"libcuda.so.{V}", f"libnvidia-ml.so.{V}"]


@pytest.mark.parametrize("kind", ["empty", "text", "program", "directory", "fifo", "dangling", "loop"])
def test_discover_what_is_no_library(place: Place, kind: str) -> None:
    path = place.root / LIB / f"libnvidia-encode.so.{V}"
    if kind in ("empty", "text"):
        path.write_text("" if kind == "empty" else "GROUP ( libnvidia-encode.so.1 )\n")
    elif kind == "program":
        path.write_bytes(elfwriter.program([], machine=NATIVE))
    elif kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere" if kind == "dangling" else path.name)
    assert _names(place.load()) == [f"libcuda.so.{V}", f"libnvidia-ml.so.{V}"]


@pytest.mark.parametrize("length", [5, 63, 64, 200])
def test_discover_damaged_library(place: Place, length: int) -> None:
    path = place.library("libnvidia-encode")
    path.write_bytes(path.read_bytes()[:length])
    line = place.error()
    assert line.startswith(f"driver error: read `{path}`: ")
    assert line.endswith("; reinstall the driver")
    assert not place.inventory.exists()


def test_discover_link_out_of_the_list(place: Place) -> None:
    """A SONAME link in a usual place, the file in one that nobody looks in."""
    path = place.library("libnvidia-encode", at="opt/vendor")
    (place.root / LIB / "libnvidia-encode.so.1").symlink_to(f"/opt/vendor/{path.name}")
    assert [str(path)] == [item.path for item in place.load().libraries if item.soname == "libnvidia-encode.so.1"]


def test_discover_link_of_another_version_is_not_followed(place: Place) -> None:
    path = place.library("libnvidia-encode", at="opt/vendor", version="550.163.01")
    (place.root / LIB / "libnvidia-encode.so.1").symlink_to(f"/opt/vendor/{path.name}")
    assert f"libnvidia-encode.so.{V}" not in _names(place.load())


def test_discover_link_that_leaves_the_root(place: Place) -> None:
    """Links are followed as if the driver root were `/`."""
    outside = place.directory / f"libnvidia-encode.so.{V}"
    place.library("libnvidia-encode").rename(outside)
    (place.root / LIB / outside.name).symlink_to(outside)
    assert outside.name not in _names(place.load())


def test_discover_library_with_a_version_of_its_own(place: Place) -> None:
    """EGL's platforms: the one that its SONAME link leads to, not one that an older driver left."""
    path = place.library("libnvidia-egl-gbm", version="1.1.2")
    place.library("libnvidia-egl-gbm", version="1.1.1")
    place.library("libnvidia-foo", version="1.1.1")
    assert [(str(path), ("display", "graphics"))] == [
        (item.path, item.capabilities) for item in place.load().libraries if item.name.endswith((".1.1.1", ".1.1.2"))
    ]


def test_discover_compiler_with_a_version_of_its_own(place: Place) -> None:
    """libnvidia-nvvm70.so.4 is the file itself."""
    (place.root / LIB / "libnvidia-nvvm70.so.4").write_bytes(
        elfwriter.shared_object("libnvidia-nvvm70.so.4", [], machine=NATIVE)
    )
    assert _names(place.load()) == ["libcuda.so.580.1.2", "libnvidia-ml.so.580.1.2", "libnvidia-nvvm70.so.4"]


def test_discover_soname_that_is_a_hard_link(place: Place) -> None:
    """The other name comes first in the directory and is not of the driver's version; the file still is."""
    path = place.library("libnvidia-encode")
    soname = path.parent / "libnvidia-encode.so.1"
    soname.unlink()
    soname.hardlink_to(path)
    assert path.name in _names(place.load())


def test_discover_directory_of_the_linker_cache(place: Place) -> None:
    """Where the linker would look comes first, and need not be a usual place."""
    path = place.library("libcuda", at="vendor/lib")
    place.cache(("libcuda.so.1", "/vendor/lib/libcuda.so.1"), ("libc.so.6", "/lib/libc.so.6"))
    assert [str(path)] == [item.path for item in place.load().libraries if item.soname == "libcuda.so.1"]


def test_discover_linker_cache_damaged(place: Place) -> None:
    (place.root / "etc/ld.so.cache").write_text("nonsense")
    line = place.error()
    assert line.startswith("driver error: read the linker cache `/etc/ld.so.cache` of the driver root: ")
    assert line.endswith("; run `ldconfig`")


def test_discover_subdirectory(place: Place) -> None:
    path = place.library("libvdpau_nvidia", at=f"{LIB}/vdpau")
    assert [(str(path), ("video",))] == [
        (item.path, item.capabilities) for item in place.load().libraries if item.soname == "libvdpau_nvidia.so.1"
    ]


@pytest.mark.parametrize("first", [None, [2, 2, 5], [2, 3, 99]], ids=["no-note", "older", "right-one-first"])
def test_discover_of_two_builds_the_one_with_the_abi_note(place: Place, first: list[int] | None) -> None:
    one = place.library("libnvidia-tls", f"libnvidia-tls.so.{V}", abi=first)
    other = place.library("libnvidia-tls", f"libnvidia-tls.so.{V}", at=f"{LIB}/tls", abi=[2, 3, 99])
    expected = one if first == [2, 3, 99] else other
    assert [str(expected)] == [item.path for item in place.load().libraries if "tls" in item.name]


def test_discover_needed_among_the_drivers_own(place: Place) -> None:
    """What a library of a capability needs comes along, listed or not; what nothing needs and no list has does not."""
    place.library("libnvidia-ngx", needed=(f"libnvidia-foo.so.{V}", "libz.so.1"))
    place.library("libnvidia-foo", f"libnvidia-foo.so.{V}", needed=("libnvidia-bar.so.2",))
    place.library("libnvidia-bar", "libnvidia-bar.so.2", needed=(f"libnvidia-foo.so.{V}",))
    place.library("libnvidia-unheard-of")
    assert {
        "libcuda.so.1": ((), ("compute", "video")),
        "libnvidia-ml.so.1": ((), ("utility",)),
        "libnvidia-ngx.so.1": ((f"libnvidia-foo.so.{V}",), ("ngx",)),
        f"libnvidia-foo.so.{V}": (("libnvidia-bar.so.2",), ("ngx",)),
        "libnvidia-bar.so.2": ((f"libnvidia-foo.so.{V}",), ("ngx",)),
    } == {item.soname: (item.needed, item.capabilities) for item in place.load().libraries}


def test_discover_library_without_soname(place: Place) -> None:
    place.library("libnvidia-pkcs11", None)
    assert [("", f"libnvidia-pkcs11.so.{V}")] == [
        (item.soname, item.name) for item in place.load().libraries if "pkcs11" in item.name
    ]


def test_discover_programs(place: Place) -> None:
    """By link, and beside the libraries; no script, and none of another machine or without the right to execute."""
    programs = place.root / "usr/bin"
    (programs / "nvidia-smi").rename(programs / "smi-580")
    (programs / "nvidia-smi").symlink_to("smi-580")
    (programs / "nvidia-debugdump").write_bytes(elfwriter.program([], machine=NATIVE))
    (programs / "nvidia-persistenced").mkdir()
    (programs / "nv-fabricmanager").write_text("#!/bin/sh\n")
    foreign = elfwriter.program([], machine="aarch64" if NATIVE == "x86-64" else "x86-64")
    (programs / "nvidia-cuda-mps-control").write_bytes(foreign)
    for name in ("nv-fabricmanager", "nvidia-cuda-mps-control"):
        (programs / name).chmod(0o755)
    beside = place.root / "usr/local/nvidia/bin/nvidia-cuda-mps-server"
    beside.parent.mkdir(parents=True)
    beside.write_bytes(elfwriter.program([], machine=NATIVE))
    beside.chmod(0o755)
    assert _record(place.load())[2] == [
        (f"{programs}/smi-580", "nvidia-smi", "utility"),
        (str(beside), "nvidia-cuda-mps-server", "compute"),
    ]


@pytest.mark.parametrize(
    ("libraries", "programs"),
    [
        pytest.param(LIB, "usr/bin", id="debian-ubuntu"),
        pytest.param(f"{LIB}/nvidia/current", "usr/lib/nvidia/current", id="debian-alternatives"),
        pytest.param("usr/lib64", "usr/bin", id="fedora-suse"),
        pytest.param("usr/lib", "usr/bin", id="arch"),
        pytest.param("usr/local/nvidia/lib64", "usr/local/nvidia/bin", id="by-hand"),
        pytest.param("lib64", "bin", id="gke-with-its-directory-as-driver-root"),
        pytest.param("usr/local/glibc/usr/lib", "usr/local/bin", id="talos"),
        pytest.param("opt/nvidia/lib64", "opt/nvidia/bin", id="opt"),
        pytest.param("run/opengl-driver/lib", "run/current-system/sw/bin", id="nixos"),
    ],
)
def test_discover_layouts(tmp_path: Path, libraries: str, programs: str) -> None:
    """Without a linker cache, which not every host has."""
    place = Place(tmp_path)
    found = [place.library(name, at=libraries) for name in ("libcuda", "libnvidia-ml")]
    program = place.root / programs / "nvidia-smi"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_bytes(elfwriter.program(["libc.so.6"], machine=NATIVE))
    program.chmod(0o755)
    driver = place.load()
    assert [item.path for item in driver.libraries] == [str(path) for path in found]
    assert [item.path for item in driver.binaries] == [str(program)]


# The inventory


def test_inventory_is_believed(place: Place) -> None:
    firmware = place.root / f"lib/firmware/nvidia/{V}/gsp_ga10x.bin"
    firmware.parent.mkdir(parents=True)
    firmware.touch()
    first = place.load()
    assert len(first.files) == 1
    assert _record(first) == _record(place.load())
    assert os.listdir(place.state) == ["inventory.json"]
    assert place.inventory.stat().st_mode & 0o777 == 0o644
    assert _is_cached(place)


def test_inventory_leaves_out_damaged_json_with_a_warning(place: Place) -> None:
    """Said when the inventory is made, not at every start."""
    broken = place.root / "etc/vulkan/icd.d/nvidia_icd.json"
    broken.parent.mkdir(parents=True)
    broken.write_text("{")
    _settle(place.root)
    warnings: list[str] = []
    assert inventory.load(place.config, V, warnings).files == []
    assert [f"leave out `{broken}`: not JSON"] == [line.rpartition(": Expecting")[0] for line in warnings]
    assert place.load().files == []


def _nix(place: Place) -> Path:
    icd = place.root / "usr/share/vulkan/icd.d/nvidia_icd.i686.json"
    icd.parent.mkdir(parents=True)
    icd.write_text('{"ICD": {"library_path": "/nix/store/x/lib/libGLX_nvidia.so.0"}}')
    return icd


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_inventory_keeps_json_for_containers(place: Place, umask: int) -> None:
    """Readable for whoever reads it in the container, and made again with the inventory."""
    _nix(place)
    former = os.umask(umask)
    try:
        first = place.load()
    finally:
        os.umask(former)
    (item,) = first.files
    kept = place.state / "files/usr-share-vulkan-icd.d-nvidia_icd.i686.json"
    assert (item.path, item.bits) == (str(kept), 32)
    assert json.loads(kept.read_text()) == {"ICD": {"library_path": "libGLX_nvidia.so.0"}}
    assert kept.stat().st_mode & 0o777 == 0o644
    assert os.listdir(place.state / "files") == [kept.name]
    kept.unlink()
    assert _record(first) == _record(place.load())
    assert not kept.exists()
    assert _record(first) == _record(place.load(again=True))
    assert kept.exists()


def test_inventory_that_is_not_kept_names_json_for_containers(place: Place) -> None:
    """`nvhook plan` says what a start would do, and touches nothing."""
    _nix(place)
    assert [item.path for item in place.load(keep=False).files] == [item.path for item in place.load().files]


def test_inventory_no_place_for_json_for_containers(place: Place) -> None:
    icd = _nix(place)
    place.state.touch()
    warnings: list[str] = []
    found = inventory.load(place.config, V, warnings)
    assert [item.path for item in found.files] == [str(icd)]
    assert len(warnings) == 1


def test_inventory_made_again_on_demand(place: Place) -> None:
    expected = _record(place.load())
    assert _is_cached(place)
    assert expected == _record(place.load(again=True))


def test_inventory_not_kept(place: Place) -> None:
    place.load(keep=False)
    assert not place.state.exists()


def _changed_version(place: Place) -> None:
    for path in (place.root / LIB).glob(f"*.so.{V}"):
        path.rename(path.with_name(path.name.replace(V, "590.3")))


def _touched(path: str) -> Callable[[Place], None]:
    return lambda place: os.utime(place.directory / path, ns=(1, 1))


def _rewritten(path: str) -> Callable[[Place], None]:
    def change(place: Place) -> None:
        file = place.directory / path
        status = file.stat()
        file.write_bytes(file.read_bytes() + b"\n")
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

    return change


@pytest.mark.parametrize(
    ("change", "version"),
    [
        pytest.param(_changed_version, "590.3", id="driver-version"),
        pytest.param(lambda place: place.boot_id.write_text("second\n"), V, id="boot"),
        pytest.param(lambda place: place.boot_id.unlink(), V, id="boot-unknown"),
        pytest.param(_touched("driver/etc/ld.so.cache"), V, id="linker-cache-time"),
        pytest.param(lambda place: (place.root / "etc/ld.so.cache").unlink(), V, id="linker-cache-gone"),
        pytest.param(_touched("config.toml"), V, id="configuration-time"),
        pytest.param(_rewritten("config.toml"), V, id="configuration-size"),
        pytest.param(lambda place: place.library("libnvidia-cfg") and None, V, id="library-added"),
        pytest.param(lambda place: place.library("libvdpau_nvidia", at=f"{LIB}/vdpau") and None, V, id="new-directory"),
        pytest.param(lambda place: (place.root / "usr/bin/nvidia-debugdump").touch(), V, id="program-added"),
        pytest.param(lambda place: (place.root / "usr/share/vulkan/icd.d").mkdir(parents=True), V, id="vulkan-added"),
    ],
)
def test_inventory_of_another_origin(place: Place, change: Callable[[Place], None], version: str) -> None:
    place.cache(("libc.so.6", "/lib/libc.so.6"))
    place.load()
    assert _is_cached(place)
    change(place)
    assert [item.name for item in place.load(version).binaries] == ["nvidia-smi"]
    assert _is_cached(place, version)


def test_inventory_made_while_the_driver_is_unpacked(place: Place) -> None:
    """Of a driver that no linker cache knows: a start in the middle has what is there, the next one all of it."""
    (place.root / LIB / f"libcuda.so.{V}").unlink()
    assert _names(place.load()) == [f"libnvidia-ml.so.{V}"]
    place.library("libcuda")
    assert _names(place.load()) == [f"libcuda.so.{V}", f"libnvidia-ml.so.{V}"]
    assert _is_cached(place)


def test_inventory_of_directories_that_were_changed_just_now(place: Place) -> None:
    """A file that comes in the same tick of the clock leaves no trace in their times."""
    _settle(place.root)
    (place.root / LIB / "x").touch()
    inventory.load(place.config, V, [])
    directories = dict(json.loads(place.inventory.read_text())["directories"])
    assert directories[str(place.root / LIB)] == -1
    assert directories[str(place.root / "usr/bin")] > 0


@pytest.mark.parametrize("name", ["run/docker.pid", "etc/resolv.conf"])
def test_inventory_does_not_look_at_what_others_change(place: Place, name: str) -> None:
    (place.root / "run").mkdir()
    place.load()
    (place.root / name).touch()
    assert _is_cached(place)


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_inventory_that_others_may_write(place: Place, mode: int) -> None:
    place.load()
    assert _is_cached(place)
    place.inventory.chmod(mode)
    assert [item.name for item in place.load().binaries] == ["nvidia-smi"]
    assert place.inventory.stat().st_mode & 0o777 == 0o644


@pytest.mark.root
def test_inventory_of_another_owner(place: Place) -> None:
    place.load()
    assert _is_cached(place)
    os.chown(place.inventory, 1, 1)
    assert [item.name for item in place.load().binaries] == ["nvidia-smi"]
    assert place.inventory.stat().st_uid == 0


@pytest.mark.root
def test_inventory_of_root_read_by_another(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rootless engine believes what the host's root found out, and needs no inventory of its own."""
    place.load()
    before = place.inventory.stat()
    monkeypatch.setattr(os, "geteuid", lambda: 1)
    assert [item.name for item in place.load().binaries] == ["nvidia-smi"]
    after = place.inventory.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_inventory_that_is_a_link(place: Place) -> None:
    place.load()
    assert _is_cached(place)
    elsewhere = place.inventory.rename(place.directory / "elsewhere.json")
    before = elsewhere.read_bytes()
    place.inventory.symlink_to(elsewhere)
    assert [item.name for item in place.load().binaries] == ["nvidia-smi"]
    assert not place.inventory.is_symlink()
    assert elsewhere.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xff\xfe", id="not-text"),
        pytest.param(b"[" * 100_000, id="deeply-nested"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"null", id="null"),
        pytest.param(b'{"origin": {}}', id="no-origin"),
    ],
)
def test_inventory_garbage(place: Place, content: bytes) -> None:
    expected = _record(place.load())
    place.inventory.write_bytes(content)
    assert expected == _record(place.load())
    assert _is_cached(place)


def test_inventory_half_written(place: Place) -> None:
    expected = _record(place.load())
    content = place.inventory.read_bytes()
    for length in range(0, len(content), 97):
        place.inventory.write_bytes(content[:length])
        assert expected == _record(place.load())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        pytest.param("libraries", None, id="null"),
        pytest.param("libraries", "text", id="text"),
        pytest.param("libraries", {"a": 1}, id="object"),
        pytest.param("libraries", [{}], id="library-of-nothing"),
        pytest.param("libraries", [["path"]], id="library-that-is-a-list"),
        pytest.param(
            "libraries",
            [{"path": 1, "soname": "", "bits": 64, "needed": [], "capabilities": []}],
            id="path-that-is-a-number",
        ),
        pytest.param(
            "libraries",
            [{"path": "/x", "soname": "", "bits": 64, "needed": 5, "capabilities": []}],
            id="needed-that-is-a-number",
        ),
        pytest.param("directories", 1, id="directories-that-are-a-number"),
        pytest.param("directories", ["/"], id="directories-that-are-text"),
        pytest.param("directories", {"/": 1}, id="directories-that-are-an-object"),
        pytest.param("directories", [[None, 1]], id="directories-that-are-null"),
        pytest.param("binaries", [1], id="binary-that-is-a-number"),
        pytest.param(
            "binaries",
            [{"path": "/x", "name": "x", "capability": "utility", "directories": [["/a", 1]]}],
            id="directory-that-is-a-number",
        ),
        pytest.param(
            "files",
            [{"path": "/x", "destination": None, "capabilities": [], "bits": 64}],
            id="destination-that-is-null",
        ),
        pytest.param(
            "files",
            [{"path": "/x", "destination": "/x", "capabilities": [[]], "bits": 64}],
            id="capability-that-is-a-list",
        ),
    ],
)
def test_inventory_of_wrong_types(place: Place, key: str, value: object) -> None:
    expected = _record(place.load())
    inventory = json.loads(place.inventory.read_text())
    inventory[key] = value
    place.inventory.write_text(json.dumps(inventory))
    assert expected == _record(place.load())


def test_inventory_too_large(place: Place) -> None:
    place.load()
    assert _is_cached(place)
    with place.inventory.open("ab") as file:
        file.truncate((4 << 20) + 1)
    assert [item.name for item in place.load().binaries] == ["nvidia-smi"]


@pytest.mark.parametrize("kind", ["directory", "fifo"])
def test_inventory_that_is_no_file(place: Place, kind: str) -> None:
    place.state.mkdir()
    place.inventory.mkdir() if kind == "directory" else os.mkfifo(place.inventory)
    warnings: list[str] = []
    found = inventory.load(place.config, V, warnings)
    assert len(found.libraries) == 2
    assert os.listdir(place.state) == ["inventory.json"]
    expected = f"write `{place.inventory}`: is a directory; the next container makes the inventory again"
    assert warnings == ([expected] if kind == "directory" else [])


def test_inventory_no_place_for_it(place: Place) -> None:
    place.state.write_text("a file where the directory should be")
    warnings: list[str] = []
    assert len(inventory.load(place.config, V, warnings).libraries) == 2
    assert [f"write `{place.inventory}`: not a directory; the next container makes the inventory again"] == warnings


_IN_A_FULL_PLACE = """
import json, os, sys
from nvhook.request import config
from nvhook.driver import inventory
settings = config.load(sys.argv[1])
warnings = []
found = inventory.load(settings, sys.argv[2], warnings)
print(json.dumps([len(found.libraries), warnings, os.listdir(settings.state_dir)]))
"""


@pytest.mark.root
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        pytest.param("mode=755,size=4k", "no space left on device", id="full"),
        pytest.param("mode=755,nr_inodes=1", "no space left on device", id="no-inodes"),
        pytest.param("mode=755,ro", "read-only file system", id="read-only"),
    ],
)
def test_inventory_no_room_for_it(place: Place, options: str, reason: str) -> None:
    """In a child, whose mount of a tiny file system nobody else sees."""
    for number in range(30):
        place.library(f"libnvidia-part{number}", needed=())
    needed = tuple(f"libnvidia-part{number}.so.1" for number in range(30))
    place.library("libnvidia-encode", needed=needed)
    place.state.mkdir()
    script = 'mount -t tmpfs -o "$1" none "$2" && shift 2 && exec "$@"'
    child = [sys.executable, "-c", _IN_A_FULL_PLACE, str(place.directory / "config.toml"), V]
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "-", options, str(place.state), *child],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(inventory.__file__).parents[2])},
    )
    warning = f"write `{place.inventory}`: {reason}; the next container makes the inventory again"
    assert [33, [warning], []] == json.loads(done.stdout)


def test_inventory_made_by_several_at_once(place: Place) -> None:
    place.load(keep=False)  # what it imports is there before the race
    gate, opener = os.pipe()
    children = []
    for _ in range(8):
        child = os.fork()
        if child == 0:
            os.close(opener)
            os.read(gate, 1)  # ends when the last writer closes
            status = 1
            try:
                status = 0 if len(place.load(again=True).libraries) == 2 else 1
            finally:
                os._exit(status)
        children.append(child)
    os.close(gate)
    os.close(opener)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 8
    assert os.listdir(place.state) == ["inventory.json"]
    assert _is_cached(place)


# What NVML tells


class Host:
    """A simulated host of its own, whose NVML can be made to fail."""

    def __init__(self, directory: Path) -> None:
        build(json.loads((HOSTS / "a100x2-debian12.json").read_text()), directory)
        self.directory = directory
        self.kept = directory / "run/nvml.json"
        self.library = directory / "driver" / LIB / "libnvidia-ml.so.550.163.01"
        self.capabilities = directory / "proc/driver/nvidia/capabilities"

    def report(self, **options: bool) -> Report:
        settings = configuration.load(str(self.directory / "config.toml"))
        warnings: list[str] = []
        found = inventory.report(settings, gpus.read(settings.proc_root), None, warnings, **options)
        assert warnings == []
        return found

    def uuids(self, **options: bool) -> list[str]:
        return [device.uuid for device in self.report(**options).devices]

    def fail(self, *, fails: bool = True) -> None:
        """Nobody may read the library, or everybody again."""
        self.library.chmod(0 if fails else 0o644)

    def is_asked(self, **options: bool) -> bool:
        """Whether the next report is made by asking; it is given back as it was."""
        self.fail()
        before = self.kept.read_bytes()
        try:
            self.report(**options)
        except DriverError:
            self.kept.write_bytes(before)
            return True
        finally:
            self.fail(fails=False)
        return False

    def age(self, seconds: float) -> None:
        document = json.loads(self.kept.read_text())
        document["time"] -= seconds
        self.kept.write_text(json.dumps(document))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


UUIDS = ["GPU-c41d7b52-93e6-4f0a-8d15-2b7e60a9f3c8", "GPU-08e5f9a3-1c6b-42d7-b0f4-e95d3187ac26"]


@pytest.mark.root
def test_report_is_asked_for_once(host: Host) -> None:
    first = host.report().describe()
    assert [device["uuid"] for device in json.loads(json.dumps(first))["devices"]] == UUIDS
    host.fail()
    assert host.report().describe() == first
    assert host.report(keep=False).describe() == first
    host.age(1 << 20)
    assert host.report().describe() == first
    with pytest.raises(DriverError, match="Permission denied"):
        host.report(again=True)


@pytest.mark.root
def test_report_not_kept(host: Host) -> None:
    assert host.uuids(keep=False) == UUIDS
    assert not host.kept.parent.exists()


def _new_mig_device(host: Host) -> None:
    (host.capabilities / "gpu0/mig/gi1/ci0").mkdir(parents=True)


def _new_gpu(host: Host) -> None:
    information = host.directory / "proc/driver/nvidia/gpus"
    (information / "0000:0b:00.0").mkdir()
    text = (information / "0000:0a:00.0/information").read_text()
    (information / "0000:0b:00.0/information").write_text(text.replace("Device Minor: \t 0", "Device Minor: \t 2"))


def _another_gpu_in_that_place(host: Host) -> None:
    path = host.directory / "proc/driver/nvidia/gpus/0000:0a:00.0/information"
    path.write_text(path.read_text().replace(UUIDS[1], UUIDS[1].replace("08e5", "08e6")))


def _reboot(host: Host) -> None:
    (host.directory / "proc/sys/kernel/random/boot_id").write_text("another\n")


def _configure(host: Host) -> None:
    path = host.directory / "config.toml"
    path.write_text(path.read_text() + "# another\n")


@pytest.mark.root
@pytest.mark.parametrize("change", [_new_mig_device, _new_gpu, _another_gpu_in_that_place, _reboot, _configure])
def test_report_of_another_origin(host: Host, change: Callable[[Host], None]) -> None:
    host.report()
    assert not host.is_asked()
    change(host)
    assert host.is_asked()


@pytest.mark.root
def test_report_of_mig_devices_made_anew(host: Host) -> None:
    """By their inode numbers: the names are the same. What lies beside them is not looked at."""
    _new_mig_device(host)
    host.report()
    (host.capabilities / "gpu0/mig/gi1/ci0/access").touch()
    (host.capabilities / "gpu0/mig/config").mkdir()
    assert not host.is_asked()
    old = host.capabilities / "gpu0/mig/gi1"
    old.rename(host.directory / "old")  # so that its inode number is not given out again
    _new_mig_device(host)
    assert host.is_asked()


@pytest.mark.root
def test_report_of_a_driver_without_capabilities(host: Host) -> None:
    shutil.rmtree(host.capabilities)
    assert host.uuids() == UUIDS
    assert not host.is_asked()


@pytest.mark.root
def test_report_failure_is_believed_for_a_minute(host: Host) -> None:
    """The wrapper and the hook of one start, and those of the next, wait once for a library that hangs."""
    host.fail()
    with pytest.raises(DriverError) as first:
        host.report()
    host.fail(fails=False)
    with pytest.raises(DriverError) as second:
        host.report()
    assert str(first.value) == str(second.value)
    assert host.uuids(again=True) == UUIDS
    host.fail()
    with pytest.raises(DriverError):
        host.report(again=True)
    host.fail(fails=False)
    host.age(61)
    assert host.uuids() == UUIDS


@pytest.mark.root
def test_report_failure_of_the_future_is_not_believed(host: Host) -> None:
    host.fail()
    with pytest.raises(DriverError):
        host.report()
    host.fail(fails=False)
    host.age(-3600)
    assert host.uuids() == UUIDS


@pytest.mark.root
def test_report_that_lacks_a_gpu_is_believed_for_a_minute(host: Host) -> None:
    """One that has fallen off the bus, and may be back."""
    node = host.directory / "dev/nvidia1"
    node.rename(host.directory / "away")
    assert UUIDS[1:] == host.uuids()
    (host.directory / "away").rename(node)
    assert UUIDS[1:] == host.uuids()
    host.age(61)
    assert host.uuids() == UUIDS
    assert not host.is_asked()


@pytest.mark.root
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda document: document.pop("report"), id="nothing"),
        pytest.param(lambda document: document.pop("time"), id="no-time"),
        pytest.param(lambda document: document.update(time="now"), id="time-text"),
        pytest.param(lambda document: document.update(time=10**400), id="time-without-end"),
        pytest.param(lambda document: document.update(report=[]), id="list"),
        pytest.param(lambda document: document["report"].update(cuda=13), id="cuda-number"),
        pytest.param(lambda document: document["report"].update(devices=[None]), id="device-null"),
        pytest.param(lambda document: document["report"]["devices"][0].update(uuid="GPU-\x1b"), id="uuid-escape"),
    ],
)
def test_report_of_wrong_types(host: Host, change: Callable[[Any], object]) -> None:
    host.report()
    document = json.loads(host.kept.read_text())
    change(document)
    host.kept.write_text(json.dumps(document))
    assert host.is_asked()


@pytest.mark.root
@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_report_that_others_may_write(host: Host, mode: int) -> None:
    host.report()
    host.kept.chmod(mode)
    assert host.is_asked()


@pytest.mark.root
def test_report_no_library(host: Host) -> None:
    host.library.unlink()
    with pytest.raises(DriverError) as raised:
        host.report()
    assert str(raised.value) == (
        "driver error: driver 550.163.01 on this host has no libnvidia-ml.so.1; "
        "install the driver package that holds it"
    )
