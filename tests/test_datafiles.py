# SPDX-License-Identifier: Apache-2.0
"""datafiles.py: what goes with the driver's libraries, in driver roots of empty files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nvhook.driver import datafiles
from nvhook.driver.records import DriverFile
from nvhook.linux.root import DIRECTORY, Root

V = "580.1.2"
MACHINE = os.uname().machine
LIB = f"/usr/lib/{MACHINE}-linux-gnu"
DRAW = "display graphics"


class Place:
    """A driver root; `directories` are where its libraries may be."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.warnings: list[str] = []

    def file(self, path: str, content: str = "{}") -> Path:
        made = self.root / path[1:]
        made.parent.mkdir(parents=True, exist_ok=True)
        made.write_text(content)
        return made

    def link(self, path: str, target: str) -> None:
        made = self.root / path[1:]
        made.parent.mkdir(parents=True, exist_ok=True)
        made.symlink_to(target)

    def find(self, *directories: str) -> list[tuple[str, str, str]]:
        """(path below the root, destination, capabilities) of each."""
        root = Root(os.open(self.root, DIRECTORY))
        found = datafiles.find(root, list(directories or (LIB, "/usr/lib64", "/usr/lib")), V, self.warnings)
        os.close(root.fd)
        return [(item.path[len(str(self.root)) :], item.destination, " ".join(item.capabilities)) for item in found]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize(
    ("path", "capabilities"),
    [
        ("/usr/share/vulkan/icd.d/nvidia_icd.json", DRAW),
        ("/etc/vulkan/icd.d/nvidia_icd.json", DRAW),
        (f"/usr/share/vulkan/icd.d/nvidia_icd.{MACHINE}.json", DRAW),
        ("/usr/share/vulkan/icd.d/nvidia_icd.i686.json", DRAW),
        ("/usr/share/vulkan/icd.d/nvidia_layers.json", DRAW),
        ("/etc/vulkan/icd.d/nvidia_layers.json", DRAW),
        ("/usr/share/vulkan/implicit_layer.d/nvidia_layers.json", DRAW),
        ("/etc/vulkan/implicit_layer.d/nvidia_layers.json", DRAW),
        ("/usr/share/glvnd/egl_vendor.d/10_nvidia.json", DRAW),
        ("/etc/glvnd/egl_vendor.d/10_nvidia.json", DRAW),
        ("/usr/share/egl/egl_external_platform.d/09_nvidia_wayland2.json", DRAW),
        ("/usr/share/egl/egl_external_platform.d/10_nvidia_wayland.json", DRAW),
        ("/usr/share/egl/egl_external_platform.d/15_nvidia_gbm.json", DRAW),
        ("/usr/share/egl/egl_external_platform.d/20_nvidia_xcb.json", DRAW),
        ("/usr/share/egl/egl_external_platform.d/20_nvidia_xlib.json", DRAW),
        ("/usr/share/nvidia/nvoptix.bin", DRAW),
        (f"/usr/share/nvidia/nvidia-application-profiles-{V}-rc", DRAW),
        (f"/usr/share/nvidia/nvidia-application-profiles-{V}-key-documentation", DRAW),
        ("/usr/share/X11/xorg.conf.d/10-nvidia.conf", "display"),
        ("/etc/X11/xorg.conf.d/10-nvidia.conf", "display"),
        ("/usr/share/X11/xorg.conf.d/nvidia-drm-outputclass.conf", "display"),
        ("/etc/OpenCL/vendors/nvidia.icd", "compute"),
        ("/usr/lib/xorg/modules/drivers/nvidia_drv.so", "display"),
        ("/usr/lib64/xorg/modules/drivers/nvidia_drv.so", "display"),
        ("/usr/lib64/xorg/modules/updates/drivers/nvidia_drv.so", "display"),
        (f"{LIB}/nvidia/xorg/nvidia_drv.so", "display"),
        ("/usr/X11R6/lib64/modules/drivers/nvidia_drv.so", "display"),
        (f"{LIB}/nvidia/xorg/libglxserver_nvidia.so.{V}", "display"),
        (f"/usr/lib64/xorg/modules/extensions/libglxserver_nvidia.so.{V}", "display"),
        ("/usr/lib/xorg/modules/extensions/libglxserver_nvidia.so", "display"),
        (f"/lib/firmware/nvidia/{V}/gsp_ga10x.bin", "compute utility"),
        (f"/usr/lib/firmware/nvidia/{V}/gsp.bin", "compute utility"),
    ],
)
def test_file_keeps_its_place(place: Place, path: str, capabilities: str) -> None:
    place.file(path)
    assert [(path, path, capabilities)] == place.find()


@pytest.mark.parametrize(
    "path",
    [
        "/usr/share/vulkan/icd.d/intel_icd.x86.json",
        "/usr/share/glvnd/egl_vendor.d/50_mesa.json",
        "/usr/share/nvidia/nvidia-application-profiles-550.1-rc",
        "/usr/lib/xorg/modules/extensions/libglxserver_nvidia.so.550.1",
        "/usr/share/OpenCL/vendors/nvidia.icd",
        "/lib/firmware/nvidia/550.1/gsp_ga10x.bin",
        f"/lib/firmware/nvidia/{V}/README",
    ],
)
def test_file_of_others_is_left(place: Place, path: str) -> None:
    place.file(path)
    assert place.find() == []


@pytest.mark.parametrize(
    ("path", "destination", "capabilities"),
    [
        ("share/vulkan/icd.d/nvidia_icd.json", "/usr/share/vulkan/icd.d/nvidia_icd.json", DRAW),
        ("share/nvidia/nvoptix.bin", "/usr/share/nvidia/nvoptix.bin", DRAW),
        ("etc/OpenCL/vendors/nvidia.icd", "/etc/OpenCL/vendors/nvidia.icd", "compute"),
        ("lib64/xorg/modules/drivers/nvidia_drv.so", "/usr/lib64/xorg/modules/drivers/nvidia_drv.so", "display"),
        (f"firmware/nvidia/{V}/gsp_tu10x.bin", f"/lib/firmware/nvidia/{V}/gsp_tu10x.bin", "compute utility"),
    ],
)
@pytest.mark.parametrize("prefix", ["/usr/local/nvidia", "/opt/nvidia"])
def test_driver_in_a_place_of_its_own(
    place: Place, prefix: str, path: str, destination: str, capabilities: str
) -> None:
    place.file(f"{prefix}/{path}")
    assert [(f"{prefix}/{path}", destination, capabilities)] == place.find(LIB, f"{prefix}/lib64")


def test_driver_root_with_vulkan_at_its_top(place: Place) -> None:
    place.file("/vulkan/icd.d/nvidia_icd.json")
    assert place.find() == [("/vulkan/icd.d/nvidia_icd.json", "/usr/share/vulkan/icd.d/nvidia_icd.json", DRAW)]


def test_first_place_counts(place: Place) -> None:
    for prefix in ("/etc", "/usr/share", "/usr/local/nvidia/share"):
        place.file(f"{prefix}/glvnd/egl_vendor.d/10_nvidia.json")
    for prefix in ("/lib/firmware", "/usr/local/nvidia/firmware"):
        place.file(f"{prefix}/nvidia/{V}/gsp_ga10x.bin")
    found = [path for path, _, _ in place.find(LIB, "/usr/local/nvidia/lib")]
    assert found == [f"/lib/firmware/nvidia/{V}/gsp_ga10x.bin", "/usr/share/glvnd/egl_vendor.d/10_nvidia.json"]


def test_links_of_alternatives(place: Place) -> None:
    """Debian's: the file is found under its real name, and is where the X server looks."""
    place.file(f"/usr/lib/nvidia/current/libglxserver_nvidia.so.{V}")
    place.link("/etc/alternatives/glx", f"/usr/lib/nvidia/current/libglxserver_nvidia.so.{V}")
    place.link("/usr/lib/nvidia/libglxserver_nvidia.so", "/etc/alternatives/glx")
    real = f"libglxserver_nvidia.so.{V}"
    assert [(f"/usr/lib/nvidia/current/{real}", f"/usr/lib/nvidia/{real}", "display")] == place.find()


def test_link_to_the_module_of_another_version(place: Place) -> None:
    place.file("/usr/lib/nvidia/old/libglxserver_nvidia.so.550.1")
    place.link(
        "/usr/lib/xorg/modules/extensions/libglxserver_nvidia.so", "/usr/lib/nvidia/old/libglxserver_nvidia.so.550.1"
    )
    assert place.find() == []


def test_link_that_leaves_the_root(place: Place, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "nvidia_icd.json"
    outside.write_text("{}")
    place.link("/etc/vulkan/icd.d/nvidia_icd.json", str(outside))
    assert place.find() == []


@pytest.mark.parametrize("content", ["", "{", "\0" * 100, "[" * 100_000, "\xff\xfe{}"])
def test_damaged_json_is_left_out_with_a_warning(place: Place, content: str) -> None:
    broken = place.file("/usr/share/vulkan/icd.d/nvidia_icd.json", content)
    place.file("/usr/share/vulkan/implicit_layer.d/nvidia_layers.json")
    assert [Path(path).name for path, _, _ in place.find()] == ["nvidia_layers.json"]
    (warning,) = place.warnings
    assert warning.startswith(f"leave out `{broken}`: ")
    assert "\n" not in warning


def test_damaged_json_gives_way_to_the_next_place(place: Place) -> None:
    place.file("/usr/share/glvnd/egl_vendor.d/10_nvidia.json", "{")
    place.file("/etc/glvnd/egl_vendor.d/10_nvidia.json")
    assert [path for path, _, _ in place.find()] == ["/etc/glvnd/egl_vendor.d/10_nvidia.json"]
    assert len(place.warnings) == 1


@pytest.mark.parametrize("kind", ["directory", "fifo", "dangling"])
def test_what_is_no_file(place: Place, kind: str) -> None:
    path = place.root / "etc/OpenCL/vendors/nvidia.icd"
    path.parent.mkdir(parents=True)
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere")
    assert place.find() == []


# JSON that names a place of the host


def _found(place: Place) -> dict[str, DriverFile]:
    root = Root(os.open(place.root, DIRECTORY))
    found = datafiles.find(root, [LIB], V, place.warnings)
    os.close(root.fd)
    return {item.destination: item for item in found}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(
            {"ICD": {"library_path": "/nix/store/x-nvidia-x11/lib/libGLX_nvidia.so.0", "api_version": "1.4"}},
            {"ICD": {"library_path": "libGLX_nvidia.so.0", "api_version": "1.4"}},
            id="icd",
        ),
        pytest.param(
            {"layers": [{"library_path": "/a/lib1.so"}, {"library_path": "lib2.so"}, {"name": "/not/a/library"}]},
            {"layers": [{"library_path": "lib1.so"}, {"library_path": "lib2.so"}, {"name": "/not/a/library"}]},
            id="layers",
        ),
        pytest.param({"ICD": {"library_path": "../lib/libx.so"}}, {"ICD": {"library_path": "libx.so"}}, id="relative"),
        pytest.param({"ICD": {"library_path": "libGLX_nvidia.so.0"}}, None, id="by-name"),
        pytest.param({"ICD": {"library_path": ["/a"]}, "x": "/b/c"}, None, id="no-library"),
        pytest.param("/a/b", None, id="no-object"),
    ],
)
def test_json_names_libraries_alone(place: Place, content: object, expected: object) -> None:
    place.file("/usr/share/vulkan/icd.d/nvidia_icd.json", json.dumps(content))
    (item,) = _found(place).values()
    assert (json.loads(item.content) if item.content else None) == expected
    assert item.path == f"{place.root}/usr/share/vulkan/icd.d/nvidia_icd.json"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("/nix/store/x-nvidia-x11/lib/libnvidia-opencl.so.1\n", "libnvidia-opencl.so.1\n"),
        ("libnvidia-opencl.so.1\n", ""),
        ("\xff/\n", "\n"),
        ("", ""),
    ],
)
def test_opencl_names_the_library_alone(place: Place, content: str, expected: str) -> None:
    place.file("/etc/OpenCL/vendors/nvidia.icd", content)
    assert _found(place)["/etc/OpenCL/vendors/nvidia.icd"].content == expected


def test_icd_for_32_bit_programs(place: Place) -> None:
    for name in ("nvidia_icd.json", f"nvidia_icd.{MACHINE}.json", "nvidia_icd.i686.json"):
        place.file(f"/usr/share/vulkan/icd.d/{name}")
    bits = {Path(path).name: item.bits for path, item in _found(place).items()}
    assert bits == {"nvidia_icd.json": 64, f"nvidia_icd.{MACHINE}.json": 64, "nvidia_icd.i686.json": 32}


# Firmware


def _firmware(root: Path, *places: str) -> list[str]:
    for place in places:
        path = root / place.lstrip("/") / "nvidia" / V / "gsp_ga10x.bin"
        path.parent.mkdir(parents=True)
        path.touch()
    opened = Root(os.open(root, DIRECTORY))
    found = datafiles.find(opened, [LIB], V, [], datafiles.firmware_directories(str(root), str(root)))
    os.close(opened.fd)
    return [f"{item.path.removeprefix(str(root))} {item.destination}" for item in found]


@pytest.mark.parametrize(
    "place",
    [
        f"/lib/firmware/updates/{os.uname().release}",
        "/lib/firmware/updates",
        f"/lib/firmware/{os.uname().release}",
        "/lib/firmware",
    ],
)
def test_firmware_where_the_kernel_looks(tmp_path: Path, place: str) -> None:
    """The nearer place first; in the container it is where every program expects it."""
    expected = f"nvidia/{V}/gsp_ga10x.bin"
    found = _firmware(tmp_path, *dict.fromkeys([place, "/lib/firmware"]))
    assert found == [f"{place}/{expected} /lib/firmware/{expected}"]


@pytest.mark.parametrize("form", ["below-the-driver-root", "of-the-kernel"])
def test_firmware_where_the_administrator_says(tmp_path: Path, form: str) -> None:
    named = tmp_path / "sys/module/firmware_class/parameters/path"
    named.parent.mkdir(parents=True)
    named.write_text("/opt/firmware\n" if form == "of-the-kernel" else f"{tmp_path}/opt/firmware\n")
    expected = f"nvidia/{V}/gsp_ga10x.bin"
    found = _firmware(tmp_path, "/lib/firmware", "/opt/firmware")
    assert found == [f"/opt/firmware/{expected} /lib/firmware/{expected}"]


@pytest.mark.parametrize("content", ["", "\n", "relative\n", "/nowhere\n", "\xff\n"])
def test_firmware_path_that_leads_nowhere(tmp_path: Path, content: str) -> None:
    named = tmp_path / "sys/module/firmware_class/parameters/path"
    named.parent.mkdir(parents=True)
    named.write_bytes(content.encode("latin-1"))
    assert len(_firmware(tmp_path, "/lib/firmware")) == 1
