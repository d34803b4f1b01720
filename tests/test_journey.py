# SPDX-License-Identifier: Apache-2.0
"""From config.json to a program that lists its GPUs: real containers under runc and crun, on simulated hosts."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import containers
from conftest import cannot
from containers import HOOK, TRIPLET, TRY, Bundle, Workshop, gpu_lines, tree
from simhost import description, elfwriter
from simhost.compiler import Compiler

pytestmark = pytest.mark.root

A100 = "a100x2"
H100 = "h100x8"
LIBRARIES = f"usr/lib/{TRIPLET}"
VERSION = "550.163.01"  # of the A100 host's driver
needs_x86 = pytest.mark.skipif(not TRIPLET.startswith("x86_64"), reason="only x86-64 has 32-bit driver libraries")


@pytest.fixture(scope="module")
def shop(simhost: Callable[[str], Path]) -> Iterator[Workshop]:
    """Whatever the tests of this file do, the simulated hosts and the machine's cgroups are as before."""
    before = {name: tree(simhost(name)) for name in (A100, H100)}
    with tempfile.TemporaryDirectory(prefix="nvhook-journey-") as name:
        yield Workshop(Path(name), simhost)
    assert before == {name: tree(simhost(name)) for name in (A100, H100)}


@pytest.fixture(params=[1, 2], ids=["v1", "v2"])
def hierarchy(request: pytest.FixtureRequest) -> tuple[str, ...]:
    try:
        return containers.cgroups(request.param)
    except LookupError as error:
        pytest.skip(str(error))


def start(bundle: Bundle, config: Path, script: str, env: dict[str, str]) -> str:
    """What a container prints that ends well."""
    result = bundle.write(["/bin/sh", "-euc", script], env).run(config)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


ALL = {"NVIDIA_VISIBLE_DEVICES": "all"}
ONE = {"NVIDIA_VISIBLE_DEVICES": "0"}
LIST = ["/usr/bin/nvidia-smi", "-L"]


def test_a_cgroup_hierarchy_is_there() -> None:
    containers.any_cgroups()


# Which GPUs


@pytest.mark.parametrize(
    ("host", "devices", "expected"),
    [
        pytest.param(A100, "all", (0, 1), id="all-of-two"),
        pytest.param(A100, "0", (0,), id="index"),
        pytest.param(A100, "1", (1,), id="other-index"),
        pytest.param(A100, "GPU-c41d7b52-93e6-4f0a-8d15-2b7e60a9f3c8", (0,), id="uuid"),
        pytest.param(A100, "GPU-08e5", (1,), id="uuid-prefix"),
        pytest.param(A100, "0000:0a:00.0", (1,), id="pci"),
        pytest.param(A100, "00000000:07:00.0", (0,), id="pci-as-nvml-writes-it"),
        pytest.param(A100, "none", (), id="none"),
        pytest.param(H100, "all", (0, 1, 2, 3, 4, 5, 6, 7), id="all-of-eight"),
        pytest.param(H100, "6,2", (2, 6), id="two-of-eight"),
        pytest.param(H100, "3,3,GPU-91f6d8e7,0000:61:00.0", (3,), id="duplicates"),
    ],
)
def test_listed_gpus_are_those_asked_for(
    shop: Workshop, hierarchy: tuple[str, ...], host: str, devices: str, expected: tuple[int, ...]
) -> None:
    bundle = shop.bundle()
    bundle.through = hierarchy
    shown = start(bundle, shop.config(host), "nvidia-smi -L", {"NVIDIA_VISIBLE_DEVICES": devices})
    assert (gpu_lines(host, *expected) or "No devices found.\n") == shown


@pytest.mark.parametrize(
    "env",
    [
        pytest.param({}, id="unset"),
        pytest.param({"NVIDIA_VISIBLE_DEVICES": ""}, id="empty"),
        pytest.param({"NVIDIA_VISIBLE_DEVICES": "void"}, id="void"),
        pytest.param({"NVIDIA_DRIVER_CAPABILITIES": "all"}, id="capabilities-alone"),
    ],
)
def test_nothing_asked_nothing_there(shop: Workshop, hierarchy: tuple[str, ...], env: dict[str, str]) -> None:
    bundle = shop.bundle().write(["/bin/sh", "-euc", "ls /dev"], env)
    bundle.through = hierarchy
    written, files = bundle.path.read_bytes(), tree(bundle.rootfs)
    result = bundle.run(shop.config(A100))
    assert (result.returncode, result.stderr) == (0, "")
    assert "nvidia" not in result.stdout
    assert written == bundle.path.read_bytes()
    assert files == tree(bundle.rootfs)
    assert os.listdir(bundle.directory) == ["config.json"]


@pytest.mark.parametrize(
    ("host", "devices", "asked", "other"), [(A100, "1", 0, 1), (A100, "0", 1, 0), (H100, "2,6", 6, 3)]
)
def test_other_gpu_stays_denied(
    shop: Workshop, hierarchy: tuple[str, ...], host: str, devices: str, asked: int, other: int
) -> None:
    """Minors, which on the first host run against the order of the indices."""
    bundle = shop.bundle()
    bundle.through = hierarchy
    script = f"""{TRY}
        try /dev/nvidia{asked}; try /dev/nvidiactl
        mknod /dev/mine c 195 {asked}; try /dev/mine
        mknod /dev/nvidia{other} c 195 {other}; try /dev/nvidia{other}
        mknod /tmp/unknown c 195 100; try /tmp/unknown
        mknod /dev/disk b 7 0; try /dev/disk
        nvidia-smi -L
    """
    shown = start(bundle, shop.config(host), script, {"NVIDIA_VISIBLE_DEVICES": devices})
    chosen = [int(device) for device in devices.split(",")]
    assert shown.splitlines() == [
        f"/dev/nvidia{asked} open",
        "/dev/nvidiactl open",
        "/dev/mine open",
        f"/dev/nvidia{other} denied",
        "/tmp/unknown denied",
        "/dev/disk denied",
        *gpu_lines(host, *chosen).splitlines(),
    ]


# What is in the container


def cached(listing: str) -> dict[str, str]:
    """Name -> path from the output of `ldconfig -p`; of several the first, which is the one that the linker takes."""
    found: dict[str, str] = {}
    for name, path in re.findall(r"^\t(\S+) \(.*\) => (\S+)$", listing, re.MULTILINE):
        found.setdefault(name, path)
    return found


@pytest.mark.parametrize(
    ("family", "libraries"), [("debian", LIBRARIES), ("fedora", "usr/lib64"), ("no-etc", LIBRARIES)]
)
def test_linker_cache_names_new_and_old(shop: Workshop, family: str, libraries: str) -> None:
    bundle = shop.bundle(family)
    before = cached(start(bundle, shop.config(A100), "ldconfig -p 2>&1 || :", {}))
    after = cached(start(bundle, shop.config(A100), "ldconfig -p", ALL))
    assert f"/{libraries}/libcuda.so.1" == after["libcuda.so.1"]
    assert f"/{libraries}/libnvidia-ml.so.1" == after["libnvidia-ml.so.1"]
    assert f"/{libraries}/libc.so.6" == after["libc.so.6"]
    assert not before.keys() - after.keys()
    assert ("libc.so.6" in before) == (family != "no-etc")


@pytest.mark.parametrize("family", ["debian", "fedora", "no-etc"])
@pytest.mark.parametrize("host", [A100, H100])
def test_families_list_gpus(shop: Workshop, family: str, host: str) -> None:
    assert gpu_lines(host, 1) == start(
        shop.bundle(family), shop.config(host), "nvidia-smi -L", {"NVIDIA_VISIBLE_DEVICES": "1"}
    )


def test_family_without_linker(shop: Workshop, hierarchy: tuple[str, ...]) -> None:
    """busybox: no C library that could load the driver, and yet everything is where it belongs."""
    bundle = shop.bundle("busybox")
    bundle.through = hierarchy
    script = f"{TRY} readlink -f /usr/lib64/libcuda.so; ls /usr/bin/nvidia-smi /etc/ld.so.cache; try /dev/nvidia1"
    shown = start(bundle, shop.config(A100), script, ONE)
    expected = [f"/usr/lib64/libcuda.so.{VERSION}", "/etc/ld.so.cache", "/usr/bin/nvidia-smi", "/dev/nvidia1 open"]
    assert expected == [shown.splitlines()[0], *sorted(shown.splitlines()[1:3]), shown.splitlines()[3]]


def test_read_only_root(shop: Workshop) -> None:
    bundle = shop.bundle()
    bundle.config["root"]["readonly"] = True
    shown = start(bundle, shop.config(A100), "nvidia-smi -L; touch /here 2>&1 || :", ALL)
    assert gpu_lines(A100, 0, 1) in shown
    assert not (bundle.rootfs / "here").exists()


def test_driver_files_are_read_only(shop: Workshop) -> None:
    script = f"echo x >>/{LIBRARIES}/libcuda.so.{VERSION} || echo refused; : >/usr/bin/nvidia-smi || echo refused"
    result = shop.bundle().write(["/bin/sh", "-c", script], ALL).run(shop.config(A100))
    assert result.stderr.count("Read-only file system") == 2


def test_process_of_another_user(shop: Workshop, hierarchy: tuple[str, ...]) -> None:
    bundle = shop.bundle()
    bundle.through = hierarchy
    bundle.config["process"]["user"] = {"uid": 1000, "gid": 1000}
    script = f"{TRY} id -u; nvidia-smi -L; try /dev/nvidia1; stat -c %a /dev/nvidia1 /dev/nvidiactl"
    assert f"1000\n{gpu_lines(A100, 0)}/dev/nvidia1 open\n666\n666\n" == start(bundle, shop.config(A100), script, ONE)


def into_user_namespace(bundle: Bundle) -> None:
    for path in (bundle.rootfs, *bundle.rootfs.rglob("*")):
        os.chown(path, 100000, 100000, follow_symlinks=False)
    linux = bundle.config["linux"]
    linux["namespaces"].append({"type": "user"})
    linux["uidMappings"] = linux["gidMappings"] = [{"containerID": 0, "hostID": 100000, "size": 65536}]


def test_user_namespace(shop: Workshop, hierarchy: tuple[str, ...]) -> None:
    """Nodes made there could not be opened: they are the host's, bound. A third one is bound by the spec itself."""
    bundle = shop.bundle()
    bundle.through = hierarchy
    into_user_namespace(bundle)
    node = shop.simhost(A100) / "dev/nvidia0"
    bundle.config["mounts"].append(
        {"destination": "/dev/other", "type": "bind", "source": str(node), "options": ["bind"]}
    )
    script = f"""{TRY} nvidia-smi -L; try /dev/nvidia1; try /dev/other
        grep -c ' /dev/nvidia' /proc/self/mountinfo
        stat -c '%u %n' /etc/ld.so.cache; find /usr /etc -type l ! -user 0
    """
    assert start(bundle, shop.config(A100), script, ONE).splitlines() == [
        *gpu_lines(A100, 0).splitlines(),
        "/dev/nvidia1 open",
        "/dev/other denied",
        "4",
        "0 /etc/ld.so.cache",
    ]


def put_hook(bundle: Bundle, *arguments: str, hook: Path = HOOK) -> None:
    """Into the spec, as dockerd's --gpus does it."""
    env = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"]
    args = ["nvidia-container-runtime-hook", *arguments, "prestart"]
    bundle.config["hooks"] = {"prestart": [{"path": str(hook), "args": args, "env": env}]}


def test_second_start(shop: Workshop) -> None:
    bundle = shop.bundle().write(LIST, ALL)
    first = bundle.run(shop.config(A100))
    written = bundle.path.read_bytes()
    second = bundle.run(shop.config(A100))
    assert gpu_lines(A100, 0, 1) == first.stdout == second.stdout
    assert written == bundle.path.read_bytes()


def test_second_start_on_what_the_first_left(shop: Workshop) -> None:
    """Nobody cleans up after dockerd's --gpus: empty files, links and a linker cache are there already."""
    bundle = shop.bundle()
    put_hook(bundle, "--config", str(shop.config(A100)))
    bundle.write(LIST, ALL)
    first = bundle.run(None, wrapper=Path("runc"))
    files = tree(bundle.rootfs)
    second = bundle.run(None, wrapper=Path("runc"))
    assert gpu_lines(A100, 0, 1) == first.stdout == second.stdout
    again = tree(bundle.rootfs)
    cache = str(bundle.rootfs / "etc/ld.so.cache")  # made anew, with another time
    assert files.pop(cache).split()[:3] == again.pop(cache).split()[:3]
    assert files == again
    through_wrapper = bundle.run(shop.config(A100))
    assert gpu_lines(A100, 0, 1) == through_wrapper.stdout


def test_second_start_with_another_driver(shop: Workshop) -> None:
    """`docker start` after the host's driver was changed: the links lead to the new one's files."""
    bundle = shop.bundle()
    look = f"nvidia-smi -L; readlink -f /{LIBRARIES}/libcuda.so"
    start(bundle, shop.config(H100), look, ALL)
    assert f"{gpu_lines(A100, 0)}/{LIBRARIES}/libcuda.so.{VERSION}\n" == start(bundle, shop.config(A100), look, ONE)


@needs_x86
def test_image_with_a_driver_of_its_own(shop: Workshop) -> None:
    """Another version's library and links, a link that leads nowhere, a file under a link's name, empty leftovers."""
    bundle = shop.bundle()
    libraries = bundle.rootfs / LIBRARIES
    own = libraries / "libcuda.so.1.2.3"
    own.write_bytes(elfwriter.shared_object("libcuda.so.1", [], machine="x86-64"))
    (libraries / "libcuda.so.1").symlink_to("libcuda.so.1.2.3")
    (libraries / "libcuda.so").symlink_to("/nowhere/libcuda.so")
    shutil.copy(own, libraries / "libnvidia-ml.so.1")
    for leftover in (libraries / f"libcuda.so.{VERSION}", libraries / "libnvidia-cfg.so.1"):
        leftover.touch()
    (bundle.rootfs / "usr/bin/nvidia-smi").touch()
    (bundle.rootfs / "etc/ld.so.cache").unlink()
    before = tree(bundle.rootfs)
    script = f"nvidia-smi -L; readlink -f /{LIBRARIES}/libcuda.so; ldconfig -p"
    shown = start(bundle, shop.config(A100), script, ALL)
    assert shown.startswith(gpu_lines(A100, 0, 1) + f"/{LIBRARIES}/libcuda.so.{VERSION}\n")
    assert f"/{LIBRARIES}/libcuda.so.1" == cached(shown)["libcuda.so.1"]
    assert before == tree(bundle.rootfs)


@pytest.mark.parametrize("target", ["lib", "/usr/lib", "../usr/lib/../../../usr/lib"])
def test_library_directory_is_a_link(shop: Workshop, target: str) -> None:
    """Resolved inside the image, whatever a path of that name is on the host."""
    bundle = shop.bundle("fedora")
    usr = bundle.rootfs / "usr"
    for path in (usr / "lib64").iterdir():
        path.rename(usr / "lib" / path.name)
    (usr / "lib64").rmdir()
    (usr / "lib64").symlink_to(target)
    shown = start(bundle, shop.config(A100), "nvidia-smi -L; readlink -f /usr/lib64/libcuda.so.1", ALL)
    assert f"{gpu_lines(A100, 0, 1)}/usr/lib/libcuda.so.{VERSION}\n" == shown


# Driver capabilities


@pytest.mark.parametrize(
    ("capabilities", "present", "absent"),
    [
        ("compute", ["libcuda.so.1", "libcuda.so"], ["libnvidia-ml.so.1", "nvidia-smi", "libnvcuvid.so.1"]),
        ("utility", ["libnvidia-ml.so.1", "nvidia-smi"], ["libcuda.so.1", "nvidia-uvm", "nvidia-cuda-mps-server"]),
        ("video", ["libnvcuvid.so.1", "libnvidia-encode.so.1", "libcuda.so.1", "nvidia-uvm"], ["nvidia-smi"]),
        ("compute,utility", ["libcuda.so.1", "libnvidia-ml.so.1", "nvidia-smi", "nvidia-uvm"], ["libnvcuvid.so.1"]),
        ("all", ["libcuda.so.1", "nvidia-smi", "nvidia-modeset", "libnvcuvid.so.1", "libEGL_nvidia.so.0"], []),
        ("", ["libcuda.so.1", "nvidia-smi", "nvidia-uvm"], ["libnvcuvid.so.1"]),
    ],
    ids=["compute", "utility", "video", "both", "all", "empty"],
)
def test_capabilities(shop: Workshop, capabilities: str, present: list[str], absent: list[str]) -> None:
    env = {**ALL, "NVIDIA_DRIVER_CAPABILITIES": capabilities}
    shown = start(shop.bundle(), shop.config(A100), f"ls /dev /usr/bin /{LIBRARIES}", env).splitlines()
    assert [name for name in present if name not in shown] == []
    assert [name for name in absent if name in shown] == []


@needs_x86
def test_capability_compat32(shop: Workshop) -> None:
    env = {**ALL, "NVIDIA_DRIVER_CAPABILITIES": "compute,compat32"}
    script = "ldconfig -p | grep libcuda.so.1; readlink -f /usr/lib/i386-linux-gnu/libcuda.so.1"
    assert start(shop.bundle(), shop.config(A100), script, env).splitlines() == [
        f"\tlibcuda.so.1 (libc6,x86-64) => /{LIBRARIES}/libcuda.so.1",
        "\tlibcuda.so.1 (libc6) => /usr/lib/i386-linux-gnu/libcuda.so.1",
        f"/usr/lib/i386-linux-gnu/libcuda.so.{VERSION}",
    ]


# What goes with the libraries: files, sockets, DRI nodes

WORKSTATION = "workstation"
DRAWS = {**ALL, "NVIDIA_DRIVER_CAPABILITIES": "all"}


def _is_there(edit: dict[str, str]) -> str:
    """A line of shell that prints what is missing of an edit of `nvhook plan --json`."""
    if str(edit.get("path", edit.get("destination"))).startswith("/proc/"):
        return ":"  # where no driver is loaded
    if edit["kind"] == "file":
        return f'[ "$(cat {edit["path"]})" = {shlex.quote(edit["content"].rstrip())} ] || echo {edit["path"]}'
    if edit["kind"] == "mount":
        place = edit["destination"]
        return f'grep -q " $(readlink -f {place}) " /proc/self/mountinfo || echo {place}'
    if edit["kind"] == "symlink":
        return f'[ "$(readlink {edit["path"]})" = {edit["target"]} ] && [ -e {edit["path"]} ] || echo {edit["path"]}'
    if edit["kind"] == "device":
        return f'[ "$(stat -c %t:%T {edit["path"]})" = {edit["major"]:x}:{edit["minor"]:x} ] || echo {edit["path"]}'
    return "ldconfig -p | grep -q libGLX_nvidia.so.0 || echo ldcache"


@needs_x86
@pytest.mark.parametrize(
    ("host", "family"),
    [
        (WORKSTATION, "debian"),
        (WORKSTATION, "fedora"),
        ("fedora42", "fedora"),
        ("fedora42", "debian"),
        ("nixos", "debian"),
        ("nixos", "fedora"),
    ],
)
def test_host_whole(shop: Workshop, hierarchy: tuple[str, ...], host: str, family: str) -> None:
    """Every line of the plan is true in the container, and nothing is left of it."""
    bundle = shop.bundle(family)
    bundle.through = hierarchy
    words = [word for name, value in DRAWS.items() for word in ("--env", f"{name}={value}")]
    planned = subprocess.run(
        [str(containers.REPOSITORY / "scripts/nvhook"), "plan", "--json", "--rootfs", str(bundle.rootfs), *words],
        env={**os.environ, "NVHOOK_CONFIG": str(shop.config(host))},
        check=True,
        capture_output=True,
        text=True,
    )
    edits = json.loads(planned.stdout)["edits"]
    assert len(edits) > 90
    before = tree(bundle.rootfs)
    shown = start(bundle, shop.config(host), "\n".join([*map(_is_there, edits), "nvidia-smi -L"]), DRAWS)
    assert gpu_lines(host, 0) == shown
    assert before == tree(bundle.rootfs)


def test_json_of_nixos_names_libraries_that_the_linker_finds(shop: Workshop) -> None:
    """In the store of the host, which the container has not, they would be found nowhere."""
    script = """
        for file in /usr/share/vulkan/*/*.json /usr/share/glvnd/*/*.json /usr/share/egl/*/*.json; do
            library=$(sed -n 's/.*"library_path": "\\(.*\\)".*/\\1/p' "$file")
            ldconfig -p | grep -qF "$library " && echo "$library"
        done; cat /etc/OpenCL/vendors/nvidia.icd"""
    bundle = shop.bundle()
    (bundle.rootfs / "usr/bin/sed").symlink_to("busybox")
    shown = start(bundle, shop.config("nixos"), script, DRAWS).split()
    names = ["libGLX_nvidia.so.0"] * 3 + ["libEGL_nvidia.so.0", "libnvidia-egl-wayland.so.1", "libnvidia-egl-gbm.so.1"]
    assert shown == [*names, "libnvidia-opencl.so.1"]


GLIBC = "/nix/store/q7w1h9mz4kxv2ds0yp5rbn3clf8jg6ia-glibc-2.40-66/lib"


@needs_x86
@pytest.mark.parametrize("family", ["debian", "busybox"])
def test_program_of_nixos_starts(shop: Workshop, family: str) -> None:
    """Its dynamic linker and its libraries are where it was built with them, whatever the image has."""
    host, config = shop.copy_of("nixos")
    store = host / "driver/nix/store"
    (store / GLIBC.removeprefix("/nix/store/")).mkdir(parents=True)
    donor = shop.bundle("debian").rootfs
    for path in [*(donor / LIBRARIES).glob("lib*.so.*"), donor / "usr/lib64/ld-linux-x86-64.so.2"]:
        shutil.copy(path, f"{host}/driver{GLIBC}/")
    (program,) = store.glob("*-bin/bin/nvidia-smi")
    (libraries,) = store.glob("*-nvidia-x11-570.153.02-6.12.30/lib")
    search = f"{str(libraries).removeprefix(f'{host}/driver')}:{GLIBC}:/nix/store/gone/lib:$ORIGIN"
    elf = {"soname": None, "needed": ["libpthread.so.0", "libm.so.6", "libdl.so.2", "librt.so.1", "libc.so.6"]}
    flags = f"-Wl,--dynamic-linker={GLIBC}/ld-linux-x86-64.so.2", f"-Wl,--enable-new-dtags,-rpath,{search}"
    with Compiler(description.load(containers.REPOSITORY / "tests/hosts/nixos.json")) as compiler:
        compiler.program("nvidia_smi.c", elf, str(program), *flags)
    bundle = shop.bundle(family)
    before = tree(bundle.rootfs)
    assert gpu_lines("nixos", 0) == start(bundle, config, "nvidia-smi -L", ALL)
    assert before == tree(bundle.rootfs)


STORE = "/usr/lib/wsl/drivers/nv_dispi.inf_amd64_0afec3f2050014a0"


@pytest.mark.parametrize("family", ["debian", "fedora"])
@pytest.mark.parametrize("capabilities", ["compute,utility", "all"])
def test_wsl(shop: Workshop, hierarchy: tuple[str, ...], family: str, capabilities: str) -> None:
    """The driver store is where it was, the linker finds it, and nvidia-smi goes through the one node."""
    bundle = shop.bundle(family)
    bundle.through = hierarchy
    script = f"""{TRY} nvidia-smi -L
        ldconfig -p | grep -E 'libcuda.so.1|libdxcore|libnvidia-ml.so.1'
        readlink -f {STORE}/libcuda.so; ls /dev | grep -e nvidia -e dxg; ls /proc/driver/nvidia 2>/dev/null || :
        mknod /dev/other c 10 124; try /dev/other"""
    before = tree(bundle.rootfs)
    shown = start(bundle, shop.config("wsl2"), script, {**ALL, "NVIDIA_DRIVER_CAPABILITIES": capabilities})
    first, *lines = shown.splitlines()
    assert f"{first}\n" == gpu_lines("wsl2", 0)
    assert lines == [
        f"\tlibnvidia-ml.so.1 (libc6,x86-64) => {STORE}/libnvidia-ml.so.1",
        "\tlibdxcore.so (libc6,x86-64) => /usr/lib/wsl/lib/libdxcore.so",
        f"\tlibcuda.so.1 (libc6,x86-64) => {STORE}/libcuda.so.1",
        f"{STORE}/libcuda.so.1.1",
        "dxg",
        "/dev/other denied",
    ]
    assert before == tree(bundle.rootfs)


def test_wsl_with_the_hook_alone(shop: Workshop, hierarchy: tuple[str, ...]) -> None:
    bundle = shop.bundle()
    bundle.through = hierarchy
    put_hook(bundle, "--config", str(shop.config("wsl2")))
    bundle.write(["/usr/bin/nvidia-smi", "-L"], ALL)
    result = bundle.run(None, wrapper=Path("runc"))
    assert (result.returncode, result.stdout, result.stderr) == (0, gpu_lines("wsl2", 0), "")


def test_dri_nodes_of_the_gpu_alone(shop: Workshop, hierarchy: tuple[str, ...]) -> None:
    bundle = shop.bundle()
    bundle.through = hierarchy
    script = f"""{TRY}
        ls /dev/dri /dev/dri/by-path; stat -L -c '%a %t:%T' /dev/dri/by-path/*-render
        mknod /dev/dri/card0 c 226 0; mknod /dev/mine c 226 1
        try /dev/dri/card1; try /dev/dri/renderD129; try /dev/mine; try /dev/dri/card0
    """
    shown = start(bundle, shop.config(WORKSTATION), script, {**ALL, "NVIDIA_DRIVER_CAPABILITIES": "graphics"})
    assert shown.split("\n") == [
        "/dev/dri:",
        "by-path",
        "card1",
        "renderD129",
        "",
        "/dev/dri/by-path:",
        "pci-0000:01:00.0-card",
        "pci-0000:01:00.0-render",
        "660 e2:81",
        "/dev/dri/card1 open",
        "/dev/dri/renderD129 open",
        "/dev/mine open",
        "/dev/dri/card0 denied",
        "",
    ]


def test_dri_nodes_with_the_hook_alone(shop: Workshop, hierarchy: tuple[str, ...]) -> None:
    bundle = shop.bundle()
    bundle.through = hierarchy
    put_hook(bundle, "--config", str(shop.config(WORKSTATION)))
    script = f"{TRY} try /dev/dri/renderD129; mknod /dev/dri/card0 c 226 0; try /dev/dri/card0"
    bundle.write(["/bin/sh", "-euc", script], {**ALL, "NVIDIA_DRIVER_CAPABILITIES": "graphics"})
    result = bundle.run(None, wrapper=Path("runc"))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "/dev/dri/renderD129 open\n/dev/dri/card0 denied\n"


def test_no_dri_nodes_for_who_does_not_draw(shop: Workshop) -> None:
    assert start(shop.bundle(), shop.config(WORKSTATION), "[ -e /dev/dri ] || echo none", ALL) == "none\n"


def test_daemons_sockets(shop: Workshop, hierarchy: tuple[str, ...]) -> None:
    """They are live state: one that came after the inventory was made is there, and one that has gone is no error."""
    host, config = shop.copy_of(A100)
    script = "cd /run 2>/dev/null && stat -c '%F %n' nvidia-*/socket; ls -A /tmp/nvidia-mps; touch /tmp/nvidia-mps/x; :"
    look = {**ALL, "NVIDIA_DRIVER_CAPABILITIES": "compute,utility"}

    def shown() -> str:
        bundle = shop.bundle().write(["/bin/sh", "-c", script], look)
        bundle.through = hierarchy
        result = bundle.run(config)
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert shown() == ""
    pipes = host / "driver/tmp/nvidia-mps"
    pipes.mkdir(parents=True)
    os.mkfifo(pipes / "control")
    for name in ("nvidia-persistenced", "nvidia-fabricmanager"):
        (host / "driver/run" / name).mkdir(parents=True)
        os.mknod(host / "driver/run" / name / "socket", stat.S_IFSOCK | 0o666)
    expected = "socket nvidia-fabricmanager/socket\nsocket nvidia-persistenced/socket\ncontrol\n"
    assert expected == shown()
    assert sorted(os.listdir(pipes)) == ["control", "x"]
    shutil.rmtree(host / "driver/run")
    assert shown() == "control\nx\n"


# What the container sees of the driver's part of /proc

PROC = "/proc/driver/nvidia"
HOST_PROC = f"mount -t tmpfs none /proc/driver\nmkdir -p {PROC}/gpus/0000:0a:00.0\necho 1 >{PROC}/params"


def show_proc(bundle: Bundle, script: str = HOST_PROC, *more: str) -> None:
    """The container's /proc has the driver's directory: procfs of this machine has none, so one is mounted there."""
    bundle.through += containers.own_mounts(script)
    bundle.config["mounts"][0] = {
        "destination": "/proc",
        "type": "bind",
        "source": "/proc",
        "options": ["rbind", *more],
    }


LOOK = f"""cd {PROC}; ls; ls gpus; tail -n 1 params; grep -h Minor gpus/*/information; grep -c . version
    for name in new gpus/new params gpus/0000:07:00.0/power; do {{ echo x >$name; }} 2>&1 || :; done"""


@pytest.mark.parametrize("form", ["plain", "user-namespace", "read-only", "masked", "privileged", "hook-alone"])
def test_proc_shows_the_chosen_gpu_alone(shop: Workshop, hierarchy: tuple[str, ...], form: str) -> None:
    bundle = shop.bundle()
    bundle.through = hierarchy
    show_proc(bundle, HOST_PROC, *(["ro"] if form == "read-only" else []))
    if form == "user-namespace":
        into_user_namespace(bundle)
    elif form == "masked":  # as Docker does it
        bundle.config["linux"]["maskedPaths"] = ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/scsi"]
        bundle.config["linux"]["readonlyPaths"] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys"]
    elif form == "hook-alone":
        put_hook(bundle, "--config", str(shop.config(A100)))
    elif form == "privileged":
        for names in bundle.config["process"]["capabilities"].values():
            names.append("CAP_SYS_ADMIN")
    wrapper = Path("runc") if form == "hook-alone" else containers.WRAPPER
    result = bundle.write(["/bin/sh", "-euc", LOOK], ONE).run(shop.config(A100), wrapper=wrapper)
    assert result.returncode == 0, result.stderr
    seen = "gpus params registry version 0000:07:00.0 ModifyDeviceFiles: 0 Device Minor: 1 2"
    assert result.stdout.split()[: len(seen.split())] == seen.split()
    assert result.stdout.count("Read-only file system") + result.stderr.count("Read-only file system") == 4


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        pytest.param("all", ["0000:07:00.0", "0000:0a:00.0"], id="all"),
        pytest.param("1", ["0000:0a:00.0"], id="other"),
        pytest.param("none", [], id="none"),
    ],
)
def test_proc_lists_gpus(shop: Workshop, devices: str, expected: list[str]) -> None:
    bundle = shop.bundle()
    show_proc(bundle)
    script = f"tail -n 1 {PROC}/params; ls {PROC}/gpus 2>/dev/null || :"
    shown = start(bundle, shop.config(A100), script, {"NVIDIA_VISIBLE_DEVICES": devices})
    assert shown.splitlines() == ["ModifyDeviceFiles: 0", *expected]


def test_proc_under_crun(shop: Workshop, crun: tuple[tuple[str, ...], tuple[str, ...], bool]) -> None:
    bundle = shop.bundle()
    bundle.through, options, _ = crun
    show_proc(bundle)
    host = shop.simhost(A100)
    config = containers.configure(host, shop.new("config"), shop.place / f"state-{A100}", runtime="crun")
    bundle.write(["/bin/sh", "-euc", f"cd {PROC}; ls . gpus; tail -n 1 params; nvidia-smi -L"], ONE)
    result = bundle.run(config, runtime="crun", options=options)
    assert result.returncode == 0, result.stderr
    shown = [".:", "gpus", "params", "registry", "version", "gpus:", "0000:07:00.0", "ModifyDeviceFiles:", "0"]
    assert result.stdout.split() == shown + gpu_lines(A100, 0).split()


@pytest.mark.parametrize("trap", [f"touch {PROC}", f"ln -s /dev {PROC}"], ids=["file", "link"])
def test_proc_that_cannot_be_covered_stops_the_start(shop: Workshop, trap: str) -> None:
    """It would show the GPUs of others: never with less than was asked."""
    bundle = shop.bundle()
    show_proc(bundle, f"mount -t tmpfs none /proc/driver\n{trap}")
    result = bundle.write(["/bin/true"], ONE).run(shop.config(A100))
    assert result.returncode == 1
    assert f"mount error: mount a tmpfs on `{PROC}`: the image has a" in result.stderr


def test_proc_without_a_driver_is_left_alone(shop: Workshop) -> None:
    script = f"ls {PROC} 2>/dev/null || echo nothing; grep -c ' /proc/' /proc/self/mountinfo || :"
    assert start(shop.bundle(), shop.config(A100), script, ONE) == "nothing\n0\n"


def test_proc_of_who_asks_for_nothing_is_left_alone(shop: Workshop) -> None:
    bundle = shop.bundle()
    show_proc(bundle)
    assert start(bundle, shop.config(A100), f"cat {PROC}/params", {}) == "1\n"


# EGL

PROFILES = "/etc/nvidia/nvidia-application-profiles-rc.d"


@pytest.mark.parametrize("form", ["plain", "user-namespace", "read-only"])
@pytest.mark.parametrize(("devices", "mask"), [("0", "0x2"), ("1", "0x1"), ("all", "0x3")])
def test_egl_sees_the_chosen_gpus(shop: Workshop, form: str, devices: str, mask: str) -> None:
    """The bits are minors; the image's own profiles are covered, and there again afterwards."""
    bundle = shop.bundle()
    own = bundle.rootfs / PROFILES[1:] / "50-own.conf"
    own.parent.mkdir(parents=True)
    own.write_text("{}")
    bundle.config["root"]["readonly"] = form == "read-only"
    if form == "user-namespace":
        into_user_namespace(bundle)
    before = tree(bundle.rootfs)
    env = {"NVIDIA_VISIBLE_DEVICES": devices, "NVIDIA_DRIVER_CAPABILITIES": "graphics"}
    script = f"cd {PROFILES}; ls; cat *; {{ echo x >new; }} 2>/dev/null || echo refused"
    shown = start(bundle, shop.config(A100), script, env)
    assert shown.startswith("10-container.conf\n")
    assert shown.endswith("refused\n")
    content = shown.removeprefix("10-container.conf\n").removesuffix("refused\n")
    assert json.loads(content.replace(mask, str(int(mask, 16)))) == {
        "profiles": [{"name": "_container_", "settings": ["EGLVisibleDGPUDevices", int(mask, 16)]}],
        "rules": [{"pattern": [], "profile": "_container_"}],
    }
    assert before == tree(bundle.rootfs)


# CUDA compatibility libraries of the image

_ASK = """
#include <dlfcn.h>
#include <stdio.h>
int main(void)
{
    int version = 0;
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    int (*ask)(int *) = library ? (int (*)(int *))dlsym(library, "cuDriverGetVersion") : NULL;
    if (!ask || ask(&version)) {
        puts(dlerror());
        return 1;
    }
    printf("%d\\n", version);
    return 0;
}
"""


@pytest.fixture(scope="module")
def asking(shop: Workshop) -> Path:
    """A program that says which CUDA version the libcuda has that the linker gives it."""
    program = shop.new("ask-cuda")
    command = ["cc", "-o", str(program), "-x", "c", "-", "-ldl"]
    subprocess.run(command, input=_ASK, text=True, check=True, capture_output=True)
    return program


def with_compat(bundle: Bundle, asking: Path, version: str) -> None:
    """As NVIDIA's images have it: CUDA 12.6 by its number, where alternatives lead."""
    containers.add_program(bundle.rootfs, asking)
    place = bundle.rootfs / "usr/local/cuda-12.6/compat"
    place.mkdir(parents=True)
    (bundle.rootfs / "etc/alternatives").mkdir()
    (bundle.rootfs / "etc/alternatives/cuda").symlink_to("/usr/local/cuda-12.6")
    (bundle.rootfs / "usr/local/cuda").symlink_to("/etc/alternatives/cuda")
    (path,) = (containers.REPOSITORY / "tests/hosts").glob(f"{A100}*.json")
    description = {**json.loads(path.read_text()), "cuda_driver_version": "12.6"}
    name = f"libcuda.so.{version}"
    with Compiler(description) as compiler:
        elf = {"soname": "libcuda.so.1", "needed": ["libc.so.6"]}
        compiler.library("cuda.c", elf, str(place / name), version=version)
    (place / "libcuda.so.1").symlink_to(name)
    (place / "libcuda.so").symlink_to("libcuda.so.1")


@pytest.mark.parametrize(
    ("version", "capabilities", "more", "expected"),
    [
        pytest.param("560.35.05", "compute", "", 12060, id="newer"),
        pytest.param("560.35.05", "compute,video,utility", "", 12060, id="video"),
        pytest.param("550.999.99", "compute", "", 12040, id="same-major"),
        pytest.param("535.1.2", "compute", "", 12040, id="older"),
        pytest.param("560.35.05", "compute", "features.disable-cuda-compat-lib-hook = true", 12040, id="disabled"),
    ],
)
def test_compatibility_libraries(
    shop: Workshop, asking: Path, version: str, capabilities: str, more: str, expected: int
) -> None:
    """A program loads the newer of host's and image's, through the cache alone; nothing of the image is mounted."""
    bundle = shop.bundle()
    with_compat(bundle, asking, version)
    host = shop.simhost(A100)
    config = containers.configure(host, shop.new("config"), shop.new("state"), more=more)
    before = tree(bundle.rootfs)
    script = f"{asking.name}; grep -c compat /proc/self/mountinfo || :; ldconfig -p"
    shown = start(bundle, config, script, {**ALL, "NVIDIA_DRIVER_CAPABILITIES": capabilities})
    assert shown.splitlines()[:2] == [str(expected), "0"]
    wanted = "/usr/local/cuda-12.6/compat" if expected == 12060 else f"/{LIBRARIES}"
    assert f"{wanted}/libcuda.so.1" == cached(shown)["libcuda.so.1"]
    assert f"/{LIBRARIES}/libc.so.6" == cached(shown)["libc.so.6"]
    assert before == tree(bundle.rootfs)


@pytest.mark.parametrize("form", ["user-namespace", "volume"])
def test_compatibility_libraries_elsewhere(shop: Workshop, asking: Path, form: str) -> None:
    bundle = shop.bundle()
    with_compat(bundle, asking, "560.35.05")
    if form == "volume":
        volume = shop.new("volume")
        (bundle.rootfs / "usr/local/cuda-12.6").rename(volume)
        (bundle.rootfs / "usr/local/cuda-12.6").mkdir()
        mount = {
            "destination": "/usr/local/cuda-12.6",
            "type": "bind",
            "source": str(volume),
            "options": ["bind", "ro"],
        }
        bundle.config["mounts"].append(mount)
    else:
        into_user_namespace(bundle)
    assert start(bundle, shop.config(A100), asking.name, ALL) == "12060\n"


def test_compatibility_libraries_without_their_link(shop: Workshop, asking: Path) -> None:
    """Nobody makes it: the cache leads to a library that is there."""
    bundle = shop.bundle()
    with_compat(bundle, asking, "560.35.05")
    (bundle.rootfs / "usr/local/cuda-12.6/compat/libcuda.so.1").unlink()
    shown = start(bundle, shop.config(A100), f"{asking.name}; ldconfig -p", ALL)
    assert shown.startswith("12040\n")
    assert f"/{LIBRARIES}/libcuda.so.1" == cached(shown)["libcuda.so.1"]


@pytest.mark.parametrize("trap", ["fifo", "to-zero", "dangling", "no-link"])
def test_compatibility_libraries_that_are_none(shop: Workshop, asking: Path, trap: str) -> None:
    """Names that promise a library: the host's is loaded."""
    bundle = shop.bundle()
    containers.add_program(bundle.rootfs, asking)
    place = bundle.rootfs / "usr/local/cuda/compat"
    place.mkdir(parents=True)
    library = place / "libcuda.so.999.1"
    if trap == "fifo":
        os.mkfifo(library)
        os.mkfifo(place / "libcuda.so.1")
    elif trap == "no-link":
        library.touch()
    else:
        library.symlink_to("/dev/zero" if trap == "to-zero" else "nowhere")
        (place / "libcuda.so.1").symlink_to(library.name)
    assert start(bundle, shop.config(A100), asking.name, ALL) == "12040\n"


# What the host makes on demand


def not_yet_loaded(host: Path, place: Path, *, modprobe: str) -> tuple[str, ...]:
    """For `Bundle.through`: this machine with the simulated host's /proc/driver, and a kernel that lacks nvidia-uvm.

    All of it is in a mount namespace of its own: /dev is another one, and in the place of modprobe is a script.
    """
    place.mkdir()
    shutil.copy(host / "proc/devices", place / "whole")
    (place / "devices").write_text(re.sub(r" *\d+ nvidia-uvm\n", "", (place / "whole").read_text()))
    (place / "script").write_text(f"#!/bin/sh\n{modprobe.format(place=place)}\n")
    (place / "script").chmod(0o755)
    named = Path("/proc/sys/kernel/modprobe")
    program = (named.read_text().strip() if named.exists() else "") or "/sbin/modprobe"
    hidden = Path(program)
    mounts = f"""
        mount -t tmpfs tmpfs /proc/driver
        cp -a {host}/proc/driver/nvidia /proc/driver/
        mount --bind {place}/devices /proc/devices
        mkdir {place}/dev
        mount -t tmpfs -o mode=755 tmpfs {place}/dev
        for node in null zero full random urandom tty; do cp -a /dev/$node {place}/dev/; done
        mkdir {place}/dev/pts {place}/dev/shm
        mount --move {place}/dev /dev
    """
    if hidden.exists():
        mounts += f"mount --bind {place}/script {hidden.resolve()}\n"
    else:
        mounts += f"mount -t overlay -o lowerdir={place}/bin:{hidden.parent} overlay {hidden.parent}\n"
        (place / "bin").mkdir()
        shutil.copy(place / "script", place / "bin" / hidden.name)
    return containers.own_mounts(mounts)


LOADS = 'echo "$@" >>{place}/asked; cat {place}/whole >/proc/devices'


def real_roots(shop: Workshop, host: Path, *, load_kmods: bool) -> Path:
    """config.toml with the driver of the simulated host, and /dev and /proc of this machine."""
    path = containers.configure(host, shop.new("config.toml"), shop.new("state"))
    text = path.read_text().replace(f'dev-root = "{host}"\nproc-root = "{host}"\n', "")
    kept = f'root = "{host}/driver"\n'
    path.write_text(text.replace(kept, f"{kept}load-kmods = {str(load_kmods).lower()}\n"))
    return path


@pytest.mark.parametrize("form", ["wrapper", "hook-alone"])
def test_module_is_loaded_and_nodes_are_made(shop: Workshop, hierarchy: tuple[str, ...], form: str) -> None:
    """Once, before the container starts; the nodes on the host are as in the container."""
    host, place = shop.simhost(A100), shop.new("kernel")
    config = real_roots(shop, host, load_kmods=True)
    bundle = shop.bundle().write(LIST, ALL)
    after = f"""status=0; "$@" || status=$?
        (cd /dev; stat -c '%n %a %t:%T' nvidia*) >{shop.place}/{place.name}.nodes; exit $status"""
    bundle.through = (*hierarchy, *not_yet_loaded(host, place, modprobe=LOADS), "sh", "-c", after, "-")
    if form == "wrapper":
        result = bundle.run(config)
    else:
        put_hook(bundle, "--config", str(config))
        bundle.write()
        result = bundle.run(None, wrapper=Path("runc"))
    assert (result.returncode, result.stdout) == (0, gpu_lines(A100, 0, 1)), result.stderr
    assert (place / "asked").read_text() == "nvidia-uvm\n"
    assert (shop.place / f"{place.name}.nodes").read_text().splitlines() == [
        "nvidia-uvm 666 1ff:0",
        "nvidia-uvm-tools 666 1ff:1",
        "nvidia0 666 c3:0",
        "nvidia1 666 c3:1",
        "nvidiactl 666 c3:ff",
    ]


@pytest.mark.parametrize(
    ("load_kmods", "modprobe", "message"),
    [
        pytest.param(
            True,
            "echo 'modprobe: FATAL: Module nvidia-uvm not found.' >&2; exit 1",
            "the nvidia-uvm kernel module is not loaded, and cannot be: modprobe: FATAL: Module nvidia-uvm not found.",
            id="cannot-be-loaded",
        ),
        pytest.param(
            True,
            "exit 0",
            "compute or video is asked for and the nvidia-uvm kernel module is not loaded; load it with",
            id="loaded-and-not-there",
        ),
        pytest.param(
            False,
            LOADS,
            "compute or video is asked for and the nvidia-uvm kernel module is not loaded; load it with",
            id="not-wanted",
        ),
    ],
)
def test_module_that_is_not_there(shop: Workshop, load_kmods: bool, modprobe: str, message: str) -> None:
    host, place = shop.simhost(A100), shop.new("kernel")
    bundle = shop.bundle().write(LIST, ALL)
    bundle.through = (*bundle.through, *not_yet_loaded(host, place, modprobe=modprobe))
    result = bundle.run(real_roots(shop, host, load_kmods=load_kmods))
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"nvidia-container-runtime: device error: {message}")
    assert not (place / "asked").exists()


def test_nodes_for_a_user_namespace(shop: Workshop) -> None:
    """They cannot be made in the container, and the host has none to bind: they are made there first."""
    host, config = shop.copy_of(A100)
    shutil.rmtree(host / "dev")
    (host / "dev").mkdir()
    bundle = shop.bundle()
    into_user_namespace(bundle)
    assert gpu_lines(A100, 0, 1) == start(bundle, config, "nvidia-smi -L", ALL)
    assert sorted(os.listdir(host / "dev")) == ["nvidia-uvm", "nvidia-uvm-tools", "nvidia0", "nvidia1", "nvidiactl"]


@pytest.mark.parametrize("wanted", [True, False], ids=["given", "not-given"])
def test_group_of_a_node_for_a_user(shop: Workshop, wanted: bool) -> None:
    """Who is not root gets through the node's own permissions, without being named in the image's /etc/group."""
    host, config = shop.copy_of(WORKSTATION)
    for node in (host / "dev/dri").iterdir():
        os.chown(node, 0, 4711)
    if not wanted:
        config.write_text(f"features.no-additional-gids-for-device-nodes = true\n{config.read_text()}")
    bundle = shop.bundle()
    bundle.config["process"]["user"] = {"uid": 1000, "gid": 1000}
    script = "id -G; stat -c '%a %g' /dev/dri/renderD129; exec 3<>/dev/dri/renderD129"
    bundle.write(["/bin/sh", "-c", script], {**ALL, "NVIDIA_DRIVER_CAPABILITIES": "graphics"})
    result = bundle.run(config)
    assert result.stdout == f"1000{' 4711' if wanted else ''}\n660 4711\n"
    assert ("Permission denied" in result.stderr) != wanted


# How engines start it


def test_create_start_delete(shop: Workshop, hierarchy: tuple[str, ...]) -> None:
    config = shop.config(A100)
    bundle = shop.bundle().write(["/bin/sh", "-c", "nvidia-smi -L; echo that is all"], ONE)
    bundle.through = hierarchy
    log, output = bundle.directory / "log.json", bundle.directory / "output"
    options = ("--log", str(log), "--log-format", "json")
    try:
        made = bundle.call(config, *options, "create", "--bundle", str(bundle.directory), bundle.id, output=output)
        assert (made.returncode, output.read_text()) == (0, "")
        state = json.loads(bundle.call(config, *options, "state", bundle.id).stdout)
        assert ("created", str(bundle.directory)) == (state["status"], state["bundle"])
        assert bundle.call(config, *options, "start", bundle.id).returncode == 0
        end = time.monotonic() + 20
        while "that is all" not in output.read_text() and time.monotonic() < end:
            time.sleep(0.01)
        assert f"{gpu_lines(A100, 0)}that is all\n" == output.read_text()
        while json.loads(bundle.call(config, "state", bundle.id).stdout)["status"] != "stopped":
            assert time.monotonic() < end
        assert bundle.call(config, *options, "delete", bundle.id).returncode == 0
        assert bundle.call(config, "state", bundle.id).returncode == 1
    finally:
        bundle.delete()
    assert "error" not in (log.read_text() if log.exists() else "")


@pytest.fixture(scope="module")
def installed(shop: Workshop) -> Path:
    """An installation whose own configuration file is the simulated host's."""
    prefix = shop.place / "prefix"
    command = [str(containers.REPOSITORY / "scripts/install"), "install", str(prefix), str(prefix / "etc")]
    subprocess.run(command, check=True, capture_output=True)
    shutil.copy(shop.config(A100), prefix / "etc/nvidia-container-runtime/config.toml")
    return prefix


@pytest.mark.parametrize("form", ["config-named", "config-installed"])
def test_hook_alone(shop: Workshop, hierarchy: tuple[str, ...], installed: Path, form: str) -> None:
    """`docker run --gpus` without a wrapper: dockerd puts the hook into the spec, and no device rules for it."""
    named = form == "config-named"
    hook = HOOK if named else installed / "bin/nvidia-container-runtime-hook"
    arguments = ["--config", str(shop.config(A100))] if named else []
    bundle = shop.bundle()
    bundle.through = hierarchy
    put_hook(bundle, *arguments, hook=hook)
    script = f"{TRY} nvidia-smi -L; try /dev/nvidia1; mknod /dev/nvidia0 c 195 0; try /dev/nvidia0"
    written = bundle.write(["/bin/sh", "-euc", script], ONE).path.read_bytes()
    result = bundle.run(None, wrapper=Path("runc"))
    assert (result.returncode, result.stderr) == (0, "")
    assert f"{gpu_lines(A100, 0)}/dev/nvidia1 open\n/dev/nvidia0 denied\n" == result.stdout
    assert written == bundle.path.read_bytes()


def test_wrapper_and_dockers_hook(shop: Workshop, hierarchy: tuple[str, ...]) -> None:
    """`docker run --runtime=nvidia --gpus`: both bring the hook, and it runs once."""
    bundle = shop.bundle()
    bundle.through = hierarchy
    put_hook(bundle)
    assert gpu_lines(A100, 0, 1) == start(bundle, shop.config(A100), "nvidia-smi -L", ALL)
    assert len(json.loads(bundle.path.read_text())["hooks"]["prestart"]) == 1


def test_wrapper_installed(shop: Workshop, installed: Path) -> None:
    bundle = shop.bundle().write(LIST, ALL)
    result = bundle.run(None, wrapper=installed / "bin/nvidia-container-runtime")
    assert (0, gpu_lines(A100, 0, 1), "") == (result.returncode, result.stdout, result.stderr)


@pytest.fixture(scope="module")
def crun() -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """(hierarchy, options, whether devices are limited) under which crun starts a container on this machine."""
    try:
        through, options = containers.way_of_crun()
    except LookupError as error:
        cannot(str(error))
    return through, options, not options


def test_crun(shop: Workshop, crun: tuple[tuple[str, ...], tuple[str, ...], bool]) -> None:
    through, options, is_limited = crun
    bundle = shop.bundle()
    bundle.through = through
    host = shop.simhost(A100)
    config = containers.configure(host, shop.new("config"), shop.place / f"state-{A100}", runtime="crun")
    script = f"{TRY} nvidia-smi -L; ls /dev | grep -c nvidia; try /dev/nvidia1; mknod /dev/x c 195 0; try /dev/x"
    bundle.write(["/bin/sh", "-euc", script], ONE)
    result = bundle.run(config, runtime="crun", options=options)
    assert result.returncode == 0, result.stderr
    expected = f"{gpu_lines(A100, 0)}4\n/dev/nvidia1 open\n/dev/x {'denied' if is_limited else 'open'}\n"
    assert expected == result.stdout


# What is not changed, not read, not left behind


@pytest.mark.parametrize("devices", ["all", "4711", None])
def test_mount_table_as_before(shop: Workshop, hierarchy: tuple[str, ...], devices: str | None) -> None:
    """With shared propagation, as systemd sets it: a mount that escapes from the container would show."""
    bundle = shop.bundle().write(["/bin/true"], {} if devices is None else {"NVIDIA_VISIBLE_DEVICES": devices})
    before, after = bundle.directory / "before", bundle.directory / "after"
    compare = f"mount --make-rshared /\ncat /proc/self/mountinfo >{before}\nstatus=0\n"
    compare += f'"$@" || status=$?\ncat /proc/self/mountinfo >{after}\nexit $status'
    bundle.through = (*hierarchy, *containers.own_mounts(compare))
    result = bundle.run(shop.config(A100))
    assert (devices == "4711") == (result.returncode == 1)
    assert before.read_text() == after.read_text() != ""


@pytest.mark.parametrize("family", containers.FAMILIES)
@pytest.mark.parametrize("status", [0, 3])
def test_root_filesystem_as_before(shop: Workshop, family: str, status: int) -> None:
    bundle = shop.bundle(family).write(
        ["/bin/sh", "-c", f"exit {status}"], {**ALL, "NVIDIA_DRIVER_CAPABILITIES": "all"}
    )
    before = tree(bundle.rootfs)
    result = bundle.run(shop.config(A100))
    assert result.returncode == status
    assert before == tree(bundle.rootfs)


def test_root_filesystem_as_before_in_a_user_namespace(shop: Workshop) -> None:
    bundle = shop.bundle()
    (bundle.rootfs / LIBRARIES / "libcuda.so.1").symlink_to("libcuda.so.1.2.3")
    into_user_namespace(bundle)
    before = tree(bundle.rootfs)
    assert gpu_lines(A100, 0, 1) == start(bundle, shop.config(A100), "nvidia-smi -L", ALL)
    assert before == tree(bundle.rootfs)


def test_what_the_container_wrote_stays(shop: Workshop) -> None:
    bundle = shop.bundle("busybox")
    script = """cd /usr/lib64; : >mine; rm libcuda.so.1; echo mine >libcuda.so.1; cd /etc
        rm ld.so.cache; echo mine >ld.so.cache; echo mine >/usr/bin/other"""
    start(bundle, shop.config(A100), script, ALL)
    written = [path.relative_to(bundle.rootfs) for path in bundle.rootfs.rglob("*") if "mine" in _text(path)]
    assert sorted(map(str, written)) == ["etc/ld.so.cache", "usr/bin/other", "usr/lib64/libcuda.so.1"]
    assert sorted(os.listdir(bundle.rootfs / "usr/lib64")) == ["libcuda.so.1", "mine"]


def _text(path: Path) -> str:
    return path.read_bytes()[:5].decode(errors="replace") if path.is_file() and not path.is_symlink() else ""


def test_nothing_is_left_of_a_container(shop: Workshop, hierarchy: tuple[str, ...]) -> None:
    bundle = shop.bundle().write(["/bin/true"], ALL)
    bundle.through = hierarchy
    bundle.run(shop.config(A100))
    found = subprocess.run(
        [*hierarchy, "find", "/sys/fs/cgroup", "-name", bundle.id], check=False, capture_output=True, text=True
    )
    assert found.stdout == ""
    assert not Path("/run/runc", bundle.id).exists()
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert bundle.id.encode() not in command.read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
