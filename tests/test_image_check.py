# SPDX-License-Identifier: Apache-2.0
"""Whether an image can use the driver: small trees with a C library of a known version, against records of a driver."""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Callable
from pathlib import Path

import pytest

from containers import TRIPLET, Bundle, make_image
from nvhook.container import container, image_check
from nvhook.driver import inventory
from nvhook.driver.records import Driver, Library
from nvhook.errors import FAILURE, ContainerError
from nvhook.linux import kernel
from nvhook.linux.root import DIRECTORY, Root
from nvhook.request import config as configuration
from nvhook.request.request import Request
from simhost import elfwriter
from simhost.compiler import native_machine

MACHINE = platform.machine()
LIBC = ("libc.so.6", "libm.so.6", "libdl.so.2")
LOADERS = {"x86_64": "lib64/ld-linux-x86-64.so.2", "aarch64": "lib/ld-linux-aarch64.so.1"}
OURS = f"usr/lib/{TRIPLET}"


def _library(name: str, *capabilities: str, needed: str = "", foreign: str = "", glibc: str = "2.17") -> Library:
    version = tuple(map(int, glibc.split(".")))
    path, names = f"/host/{name}.9.1", tuple(foreign.split())
    return Library(path, name, 64, tuple(needed.split()), capabilities, foreign=names, glibc=version)


DRIVER = [
    _library("libcuda.so.1", "compute", "video", foreign="libc.so.6 libm.so.6 libdl.so.2 ld-linux.so"),
    _library("libnvidia-pkcs11.so.9.1", "compute", foreign="libcrypto.so.1.1 libc.so.6"),
    _library("libnvidia-ml.so.1", "utility", foreign="libc.so.6"),
    _library("libGLX_nvidia.so.0", "graphics", "display", foreign="libX11.so.6 libc.so.6"),
    _library("libEGL_nvidia.so.0", "graphics", "display", needed="libnvidia-glsi.so.9.1"),
    _library("libnvidia-glsi.so.9.1", "graphics", "display", foreign="libc.so.6"),
]


def _write(path: Path, content: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _image(top: Path, family: str = "debian", glibc: str = "2.36") -> Path:
    """With a C library that defines versions up to `glibc`, and its dynamic linker."""
    libraries = {
        "debian": OURS,
        "debian-split-usr": f"lib/{TRIPLET}",
        "fedora": "usr/lib64",
        "centos-split-usr": "lib64",
        "arch": "usr/lib",
    }[family]
    if family.startswith("debian"):
        _write(top / "etc/debian_version", b"12.0\n")
    for name in LIBC:
        defines = ("libc.so.6", "GLIBC_2.2.5", "GLIBC_2.17", f"GLIBC_{glibc}", "GLIBC_PRIVATE")
        content = elfwriter.shared_object(name, [], machine=native_machine(), defines=defines)
        _write(top / libraries / name, content)
    _write(top / LOADERS[MACHINE])
    return top


def _examine(
    top: Path,
    capabilities: str = "compute utility",
    *,
    driver: list[Library] | None = None,
    library_path: str = "",
    compat: str = "",
    thorough: bool = False,
) -> list[str]:
    root = Root(os.open(top, DIRECTORY))
    asked = Request(("all",), tuple(capabilities.split()), (), "", library_path=library_path)
    try:
        layout = container.layout(root)
        layout.compat = compat
        findings = image_check.examine(asked, Driver("9.1", driver or DRIVER, [], []), root, layout, thorough=thorough)
        return [f"{'' if item.status == FAILURE else 'note: '}{item.reason}; {item.remedy}" for item in findings]
    finally:
        os.close(root.fd)


# Images that are all right


@pytest.mark.parametrize("family", ["debian", "debian-split-usr", "fedora", "centos-split-usr", "arch"])
@pytest.mark.parametrize("capabilities", ["compute utility", "compute display graphics utility video", "utility"])
def test_usual_image_gives_no_finding(tmp_path: Path, family: str, capabilities: str) -> None:
    """Of the libraries for graphics one needs no X11: EGL works, and so does a container with all capabilities."""
    assert _examine(_image(tmp_path, family), capabilities) == []


@pytest.mark.parametrize("family", ["debian", "fedora", "busybox"])
@pytest.mark.parametrize("host", ["h200", "a100x2", "workstation", "nixos", "wsl2"])
@pytest.mark.parametrize("capabilities", ["compute utility", "compute compat32 display graphics ngx utility video"])
def test_real_image_and_simulated_driver(
    tmp_path: Path, simhost: Callable[[str], Path], family: str, host: str, capabilities: str
) -> None:
    """The C library of this machine, a static image; and drivers with all that they need of others."""
    settings = configuration.load(str(simhost(host) / "config.toml"))
    version = {"h200": "580.159.04", "a100x2": "550.163.01", "workstation": "535.247.01", "nixos": "570.153.02"}
    store = next((path.name for path in simhost(host).glob("driver/usr/lib/wsl/drivers/nv_dispi*")), "")
    driver = inventory.load(settings, version.get(host, store), [], keep=False)
    assert driver.libraries
    assert _examine(make_image(family, tmp_path / "image"), capabilities, driver=driver.libraries) == []


@pytest.mark.parametrize(
    "files",
    [
        pytest.param([], id="scratch"),
        pytest.param(["app/server"], id="static"),
        pytest.param(["nix/store/x-glibc/lib/libc.so.6"], id="nixos"),
        pytest.param([f"lib/ld-musl-{MACHINE}.so.1", LOADERS[MACHINE], "lib/libgcompat.so.0"], id="alpine-gcompat"),
        pytest.param([f"lib/ld-musl-{MACHINE}.so.1", LOADERS[MACHINE], "usr/glibc/lib/libc.so.6"], id="alpine-glibc"),
        pytest.param(["usr/lib64/libc.so.6", "lib/ld-linux-armhf.so.3", LOADERS[MACHINE]], id="libc-is-no-elf-file"),
    ],
)
def test_image_of_which_nothing_is_known(tmp_path: Path, files: list[str]) -> None:
    for name in files:
        _write(tmp_path / name)
    assert _examine(tmp_path) == []


def test_request_without_libraries(tmp_path: Path) -> None:
    _write(tmp_path / f"lib/ld-musl-{MACHINE}.so.1")
    assert _examine(tmp_path, "") == []


# Images of another kind


def test_musl(tmp_path: Path) -> None:
    _write(tmp_path / f"lib/ld-musl-{MACHINE}.so.1")
    assert _examine(tmp_path) == [
        f"the image's C library is musl (`/lib/ld-musl-{MACHINE}.so.1`), and the driver's libraries and programs need "
        "glibc; take an image with glibc, such as one of Debian, Ubuntu or Fedora"
    ]


def test_debian_with_musl_beside_its_own(tmp_path: Path) -> None:
    _write(_image(tmp_path) / f"lib/ld-musl-{MACHINE}.so.1")
    assert _examine(tmp_path) == []


@pytest.mark.parametrize(
    ("loader", "machine"),
    [
        ("lib/ld-linux.so.2", "32-bit x86"),
        ("lib/ld-linux-armhf.so.3", "32-bit ARM"),
        ("lib64/ld64.so.2", "ppc64le"),
        ("lib/ld-musl-armhf.so.1", "32-bit ARM"),
    ],
)
def test_image_for_another_machine(tmp_path: Path, loader: str, machine: str) -> None:
    _write(tmp_path / loader)
    assert _examine(tmp_path) == [
        f"the image is for {machine} (`/{loader}`), and the driver of this host for {MACHINE}; "
        "take the image for this machine (`docker pull --platform`)"
    ]


def test_32_bit_image_that_gets_32_bit_libraries(tmp_path: Path) -> None:
    _write(tmp_path / "lib/ld-linux.so.2")
    assert _examine(tmp_path, "compat32 compute utility") == []


# An old C library


@pytest.mark.parametrize(
    ("glibc", "is_old"), [("2.16", True), ("2.17", True), ("2.18", True), ("2.19", False), ("2.100", False)]
)
def test_glibc(tmp_path: Path, glibc: str, is_old: bool) -> None:
    image = _image(tmp_path, glibc=glibc)
    driver = [
        _library("libcuda.so.1", "compute", needed="libx.so.9.1"),
        _library("libx.so.9.1", "compute", glibc="2.19"),
    ]
    newest = "2.17" if glibc == "2.16" else glibc  # the image's defines 2.17 in any case
    line = (
        f"`compute`: libx.so.9.1 needs glibc 2.19, and `/usr/lib/{TRIPLET}/libc.so.6` of the image is {newest}; "
        "take an image with glibc 2.19 or newer"
    )
    assert _examine(image, driver=driver) == ([line] if is_old else [])


def test_glibc_too_old_for_what_nobody_needs(tmp_path: Path) -> None:
    """A library of `compute` that libcuda does not need, such as the one for PKCS #11."""
    driver = [*DRIVER, _library("libnvidia-pkcs11-openssl3.so.9.1", "compute", glibc="2.38")]
    assert _examine(_image(tmp_path), driver=driver) == []
    assert [line for line in _examine(_image(tmp_path), driver=driver, thorough=True) if "2.38" in line] == [
        "note: libnvidia-pkcs11-openssl3.so.9.1 cannot be loaded: the image has no glibc 2.38; "
        "install what holds it in the image if its programs use them"
    ]


def test_one_line_for_one_reason(tmp_path: Path) -> None:
    cuda = _library("libcuda.so.1", "compute", "video", glibc="2.40")
    found = _examine(
        _image(tmp_path), "compute video", driver=[cuda, _library("libnvcuvid.so.1", "video", needed=cuda.soname)]
    )
    assert [line.partition(":")[0] for line in found] == ["`compute, video`"]


def test_driver_of_which_no_versions_are_known(tmp_path: Path) -> None:
    driver = [Library("/host/libcuda.so.9.1", "libcuda.so.1", 64, (), ("compute",))]
    assert _examine(_image(tmp_path, glibc="2.17"), driver=driver) == []


def test_libraries_that_need_each_other(tmp_path: Path) -> None:
    other = _library("libx.so", "compute", needed="libcuda.so.1")
    driver = [_library("libcuda.so.1", "compute", needed="libx.so"), other]
    assert _examine(_image(tmp_path), driver=driver) == []


# Libraries that are not there


def test_part_of_the_c_library_is_missing(tmp_path: Path) -> None:
    (_image(tmp_path, "fedora") / "usr/lib64/libdl.so.2").unlink()
    what = "`compute`: libcuda.so.1 needs libdl.so.2, not in the image"
    assert _examine(tmp_path) == [f"{what}; install what holds it in the image"]


@pytest.mark.parametrize(
    "place", [OURS, "usr/lib", "usr/local/lib", "opt/x"], ids=["multiarch", "lib", "local", "library-path"]
)
def test_library_is_found(tmp_path: Path, place: str) -> None:
    driver = [_library("libcuda.so.1", "compute", foreign="libX11.so.6")]
    image = _image(tmp_path)
    assert len(_examine(image, driver=driver, library_path="/opt/x")) == 1
    (image / place).mkdir(parents=True, exist_ok=True)
    (image / place / "libX11.so.6").symlink_to("libX11.so.6.4.0")
    assert _examine(image, driver=driver, library_path="/opt/x") == []


def test_library_is_in_the_linker_cache_alone(tmp_path: Path) -> None:
    _write(_image(tmp_path) / "etc/ld.so.cache", b"...\0/opt/x/libX11.so.6\0...")
    driver = [_library("libcuda.so.1", "compute", foreign="libX11.so.6")]
    assert _examine(tmp_path, driver=driver) == []


def test_thorough_names_what_each_library_lacks(tmp_path: Path) -> None:
    x11 = [
        _library(name, "graphics", foreign="libX11.so.6 libXext.so.6")
        for name in ("libGLX_nvidia.so.0", "libnvidia-fbc.so.1")
    ]
    driver = [item for item in DRIVER if "GLX" not in item.name] + x11
    hint = "install what holds it in the image if its programs use them"
    assert _examine(_image(tmp_path), "compute graphics", driver=driver, thorough=True) == [
        f"note: libnvidia-pkcs11.so.9.1 cannot be loaded: the image has no libcrypto.so.1.1; {hint}",
        "note: libGLX_nvidia.so.0, libnvidia-fbc.so.1 cannot be loaded: "
        f"the image has no libX11.so.6, libXext.so.6; {hint}",
    ]


# What comes before the driver's


@pytest.mark.parametrize(
    ("path", "is_found"),
    [
        pytest.param("/opt/cuda", True, id="shadows"),
        pytest.param("/nowhere:/opt/cuda/", True, id="second"),
        pytest.param(f"/{OURS}:/opt/cuda", False, id="behind-ours"),
        pytest.param(f"/lib/{TRIPLET}:/opt/cuda", False, id="behind-ours-by-a-link"),
        pytest.param("/opt", False, id="another-directory"),
        pytest.param(":opt/cuda:./opt/cuda", False, id="relative"),
        pytest.param("/opt/dangling", False, id="link-that-leads-nowhere"),
        pytest.param("/opt/\0", False, id="nul"),
        pytest.param("/opt/" + "x" * 300, False, id="too-long"),
    ],
)
def test_library_path(tmp_path: Path, path: str, is_found: bool) -> None:
    image = _image(tmp_path)
    (image / "lib").symlink_to("usr/lib")
    _write(image / OURS / "libcuda.so.1")  # an older one of the image's own, whose place the driver's takes
    _write(image / "opt/cuda/libcuda.so.1")
    (image / "opt/dangling").mkdir()
    (image / "opt/dangling/libcuda.so.1").symlink_to("libcuda.so.1.1")
    found = _examine(image, library_path=path)
    assert bool(found) == is_found
    if found:
        place = path.rpartition(":")[2]
        assert found == [
            f"`{place}/libcuda.so.1` of the image is found before the driver's: LD_LIBRARY_PATH leads there; "
            f"take `{place}` out of LD_LIBRARY_PATH, or the library out of the image"
        ]


@pytest.mark.parametrize("is_same", [True, False])
def test_volume_with_the_drivers_own_library(tmp_path: Path, is_same: bool) -> None:
    """A hard link stands for what is mounted there."""
    image = _image(tmp_path / "image")
    host = _write(tmp_path / "host/libcuda.so.9.1", b"x")
    _write(image / "usr/local/nvidia/lib64/other")
    os.link(host if is_same else image / "usr/local/nvidia/lib64/other", image / "usr/local/nvidia/lib64/libcuda.so.1")
    driver = [Library(str(host), "libcuda.so.1", 64, (), ("compute",))]
    assert len(_examine(image, driver=driver, library_path="/usr/local/nvidia/lib64")) == (not is_same)


@pytest.mark.parametrize(("compat", "count"), [("/usr/local/cuda-12.4/compat", 0), ("", 1)], ids=["used", "not-used"])
def test_compatibility_libraries_by_library_path(tmp_path: Path, compat: str, count: int) -> None:
    image = _image(tmp_path)
    _write(image / "usr/local/cuda-12.4/compat/libcuda.so.1")
    (image / "usr/local/cuda").symlink_to("cuda-12.4")
    assert len(_examine(image, library_path="/usr/local/cuda/compat", compat=compat)) == count


@pytest.mark.parametrize(
    ("content", "thorough", "start"),
    [
        pytest.param(b"/opt/libcuda.so.1\n", False, "`/opt/libcuda.so.1`, which", id="of-the-driver"),
        pytest.param(b"# /opt/libcuda.so.1\n", True, "", id="comment"),
        pytest.param(b"/usr/vgpu/libvgpu.so:/x.so", False, "", id="another"),
        pytest.param(b"/usr/vgpu/libvgpu.so:/x.so", True, "note: `/etc/ld.so.preload` of the image has ", id="told"),
        pytest.param(b"x" * 5000, True, "", id="too-long"),
    ],
)
def test_preload(tmp_path: Path, content: bytes, thorough: bool, start: str) -> None:
    _write(_image(tmp_path) / "etc/ld.so.preload", content)
    found = [line for line in _examine(tmp_path, thorough=thorough) if "preload" in line]
    assert [line[: len(start)] for line in found] == ([start] if start else [])


# Hostile images


def test_links_do_not_leave_the_image(tmp_path: Path) -> None:
    """The host's own C library is not taken for the image's."""
    image = tmp_path / "image"
    _write(image / LOADERS[MACHINE])
    (image / "usr").mkdir(exist_ok=True)
    (image / "usr/lib64").symlink_to(f"/../../../usr/lib/{TRIPLET}")
    assert _examine(image, driver=[_library("libcuda.so.1", "compute", glibc="9.9")]) == []


@pytest.mark.parametrize("kind", ["fifo", "directory", "endless-link", "truncated"])
def test_odd_c_library(tmp_path: Path, kind: str) -> None:
    image = _image(tmp_path)
    libc = image / OURS / "libc.so.6"
    content = libc.read_bytes()
    libc.unlink()
    if kind == "fifo":
        os.mkfifo(libc)
    elif kind == "directory":
        libc.mkdir()
    elif kind == "endless-link":
        libc.symlink_to("libc.so.6")
    else:
        libc.write_bytes(content[:100])
    assert _examine(image, driver=[_library("libcuda.so.1", "compute", glibc="9.9")]) == []


def test_kernel_without_openat2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(kernel, "openat2", missing)
    _write(_image(tmp_path, glibc="2.20") / "opt/libcuda.so.1")
    driver = [_library("libcuda.so.1", "compute", glibc="2.21")]
    found = _examine(tmp_path, driver=driver, library_path="/nul\0:/opt")
    assert [line.partition(" ")[0] for line in found] == ["`compute`:", "`/opt/libcuda.so.1`"]


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    image = _image(tmp_path, glibc="2.30")
    before = os.listdir("/proc/self/fd")
    _examine(image, "compute graphics utility", library_path="/opt/x:/opt/y", thorough=True)
    assert len(before) == len(os.listdir("/proc/self/fd"))


# A container's start


def test_check_warns_on_one_line(tmp_path: Path) -> None:
    _write(_image(tmp_path) / "opt/\n\x1b[31m/libcuda.so.1")
    root = Root(os.open(tmp_path, DIRECTORY))
    asked = Request(("all",), ("compute",), (), "", library_path="/opt/\n\x1b[31m")
    warnings: list[str] = []
    layout = container.layout(root)
    image_check.check(configuration.load("/nowhere"), asked, Driver("9.1", DRIVER, [], []), root, layout, warnings)
    assert len(warnings) == 1
    assert warnings[0].startswith(r"`/opt/\n\x1b[31m/libcuda.so.1` of the image is found before the driver's")


def test_check_is_an_error_if_strict(tmp_path: Path) -> None:
    settings = _write(tmp_path / "config.toml", b"[nvhook]\nstrict = true\n")
    _write(tmp_path / f"image/lib/ld-musl-{MACHINE}.so.1")
    root = Root(os.open(tmp_path / "image", DIRECTORY))
    asked = Request(("all",), ("compute",), (), "")
    driver = Driver("9.1", DRIVER, [], [])
    with pytest.raises(ContainerError, match=r"musl .*; take an image with glibc, .*, or set `nvhook.strict` to false"):
        image_check.check(configuration.load(str(settings)), asked, driver, root, container.layout(root), [])


@pytest.mark.root
@pytest.mark.parametrize("strict", [False, True])
def test_start_of_a_musl_image(tmp_path: Path, simhost: Callable[[str], Path], strict: bool) -> None:
    image = make_image("busybox", tmp_path / "image")
    _write(image / f"usr/lib/ld-musl-{MACHINE}.so.1")
    host = simhost("h200")
    text = (host / "config.toml").read_text().replace(f"{host}/run", f"{tmp_path}/run")
    log = tmp_path / "log"
    text = f'{text}strict = {str(strict).lower()}\n[nvidia-container-runtime]\ndebug = "{log}"\n'
    text = text.replace('[nvidia-container-runtime]\nruntimes = ["runc", "crun"]', "", 1)
    settings = _write(tmp_path / "config.toml", text.encode())
    bundle = Bundle(tmp_path / "bundle", image).write(["/bin/true"], {"NVIDIA_VISIBLE_DEVICES": "all"})
    result = bundle.run(settings)
    assert (result.returncode != 0) == strict
    assert ("the image's C library is musl" in result.stderr) == strict
    assert (f"level=warning msg=\"container at `{image}`: the image's C library is musl" in log.read_text()) != strict
