# SPDX-License-Identifier: Apache-2.0
"""wsl.py: the driver of a store of Windows. Which host is WSL 2 is told by test_host.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvhook.driver import wsl_driver
from nvhook.driver.records import Driver
from nvhook.errors import DriverError
from nvhook.host import wsl
from nvhook.request.config import CAPABILITIES
from simhost import elfwriter
from simhost.compiler import native_machine

NATIVE = native_machine()
STORE = "nv_dispi.inf_amd64_1"
PLACE = f"/usr/lib/wsl/drivers/{STORE}"


def _library(root: Path, path: str, soname: str, machine: str = NATIVE) -> None:
    file = root / path[1:]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(elfwriter.shared_object(soname, ["libc.so.6"], machine=machine))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    _library(tmp_path, f"{PLACE}/libcuda.so.1.1", "libcuda.so.1")
    _library(tmp_path, "/usr/lib/wsl/lib/libdxcore.so", "libdxcore.so")
    return tmp_path


def _libraries(driver: Driver) -> list[tuple[str, str, str]]:
    return [(item.name, item.soname, item.directory) for item in driver.libraries]


CUDA = ("libcuda.so.1.1", "libcuda.so.1", PLACE)
DXCORE = ("libdxcore.so", "libdxcore.so", "/usr/lib/wsl/lib")


def test_discover(root: Path) -> None:
    driver = wsl_driver.discover(str(root), STORE)
    assert (driver.version, _libraries(driver), driver.binaries, driver.files) == (STORE, [CUDA, DXCORE], [], [])
    assert all(item.capabilities == CAPABILITIES and item.path.startswith(f"{root}/") for item in driver.libraries)


def test_discover_loader_does_not_take_the_name(root: Path) -> None:
    """The file that Windows copies to lib/libcuda.so.1 has that SONAME where it comes from, too."""
    _library(root, f"{PLACE}/libcuda_loader.so", "libcuda.so.1")
    assert _libraries(wsl_driver.discover(str(root), STORE)) == [CUDA, ("libcuda_loader.so", "", PLACE), DXCORE]


def test_discover_program_and_files(root: Path) -> None:
    directory = root / PLACE[1:]
    (directory / "nvidia-smi").write_bytes(elfwriter.program(["libc.so.6"], machine=NATIVE))
    (directory / "other").write_bytes(elfwriter.program(["libc.so.6"], machine=NATIVE))
    for name in ("nvcubins.bin", "nvopencl64.dll", "nvlddmkm.sys", "nv_dispi.inf"):
        (directory / name).write_text("MZ")
    driver = wsl_driver.discover(str(root), STORE)
    assert [(item.path, item.name, item.capability) for item in driver.binaries] == [
        (f"{directory}/nvidia-smi", "nvidia-smi", "utility")
    ]
    assert [(item.path, item.destination) for item in driver.files] == [
        (f"{directory}/{name}", f"{PLACE}/{name}") for name in ("nvcubins.bin", "nvopencl64.dll")
    ]


def test_discover_what_is_no_library_of_this_machine(root: Path) -> None:
    _library(root, f"{PLACE}/libforeign.so", "libforeign.so", "aarch64" if NATIVE == "x86-64" else "x86-64")
    (root / f"{PLACE[1:]}/libtext.so").write_text("no ELF file")
    (root / f"{PLACE[1:]}/libdirectory.so").mkdir()
    (root / f"{PLACE[1:]}/libdangling.so").symlink_to("nowhere")
    assert _libraries(wsl_driver.discover(str(root), STORE)) == [CUDA, DXCORE]


def test_discover_without_dxcore(root: Path) -> None:
    (root / "usr/lib/wsl/lib/libdxcore.so").unlink()
    assert _libraries(wsl_driver.discover(str(root), STORE)) == [CUDA]


def test_discover_damaged_library(root: Path) -> None:
    path = root / f"{PLACE[1:]}/libcuda.so.1.1"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DriverError, match=r"read `.*/libcuda.so.1.1`: .*; reinstall the driver"):
        wsl_driver.discover(str(root), STORE)


@pytest.mark.parametrize(
    ("version", "is_store"), [("580.95.05", False), ("9", False), (STORE, True), ("nvlt.inf_amd64_9", True)]
)
def test_is_store(version: str, is_store: bool) -> None:
    assert wsl.is_store(version) == is_store
