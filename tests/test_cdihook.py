# SPDX-License-Identifier: Apache-2.0
"""The hook of a CDI specification, in real containers to which tests/cdi_engine.py gives what an engine would."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cdi_engine
from containers import HOOK, REPOSITORY, TRY, WRAPPER, Bundle, Workshop, gpu_lines, tree
from nvhook import cdihook
from nvhook.commands.cdi import specification as cdispec
from nvhook.errors import SpecError
from nvhook.host import gpus
from nvhook.request import config
from test_journey_mig import SHOW_PROC

A100, MIG, WORKSTATION = "a100x2", "a100x8", "workstation"
SECOND = "GPU-08e5f9a3-1c6b-42d7-b0f4-e95d3187ac26"
GPU3_MIG = "MIG-eefa183d-6954-5226-8fe3-2e6550da3d1e"  # GPU instance 1, compute instance 1 of GPU 3
ALL = config.CAPABILITIES


# Arguments


def test_arguments_are_those_that_generate_writes() -> None:
    links = ["libcuda.so.9::/usr/lib64/libcuda.so.1", "../card1::/dev/dri/by-path/pci-0000:01:00.0-card"]
    words = ["--capabilities", "compute,utility", "--config", "/etc/x.toml"]
    words += [word for link in links for word in ("--link", link)]
    words += ["--library", "/usr/lib64/libcuda.so.1", "--library32", "/usr/lib/libcuda.so.1"]
    found = cdihook.parse(words)
    assert found.capabilities == ("compute", "utility")
    assert found.config == "/etc/x.toml"
    assert found.links == [
        ("libcuda.so.9", "/usr/lib64/libcuda.so.1"),
        ("../card1", "/dev/dri/by-path/pci-0000:01:00.0-card"),
    ]
    assert found.libraries == [("/usr/lib64", "libcuda.so.1", 64), ("/usr/lib", "libcuda.so.1", 32)]


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["--folder", "/usr/lib64"], id="unknown"),
        pytest.param(["--link", "libcuda.so.1"], id="link-without-place"),
        pytest.param(["--link", "x::usr/lib/x"], id="link-below-nothing"),
        pytest.param(["--library", "libcuda.so.1"], id="library-without-directory"),
        pytest.param(["--library", "/usr/lib64/"], id="library-without-name"),
        pytest.param(["--config"], id="config-without-value"),
        pytest.param(["prestart"], id="word"),
    ],
)
def test_unknown_argument_is_refused(words: list[str]) -> None:
    with pytest.raises(
        SpecError, match=r"not known to this version of nvhook; generate it again with `nvhook cdi generate`"
    ):
        cdihook.parse(words)


def test_program_says_what_is_wrong_in_one_line() -> None:
    done = subprocess.run([str(HOOK), "cdi", "--x", "y\nz"], input="", capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "nvidia-container-runtime-hook: spec error: `--x y\\nz` of the CDI specification's hook is not known to this "
        "version of nvhook; generate it again with `nvhook cdi generate`\n"
    )


# What is chosen


@pytest.mark.parametrize(
    ("linux", "paths"),
    [
        pytest.param({"devices": [{"path": "/dev/nvidia0"}, {"path": "/dev/x"}]}, {"/dev/nvidia0", "/dev/x"}, id="two"),
        pytest.param({}, set(), id="none"),
        pytest.param(None, set(), id="no-linux"),
        pytest.param({"devices": {"path": "/dev/nvidia0"}}, set(), id="odd-list"),
        pytest.param({"devices": ["/dev/nvidia0"]}, set(), id="odd-entry"),
    ],
)
def test_nodes_of_a_config_json(linux: object, paths: set[str]) -> None:
    assert paths == cdihook.node_paths({"linux": linux})


@pytest.mark.root
@pytest.mark.parametrize(
    ("nodes", "chosen", "migs"),
    [
        pytest.param({"/dev/nvidia1"}, [3], [], id="gpu-without-rights"),
        pytest.param({"/dev/nvidia1", "/dev/nvidia-caps/nvidia-cap147"}, [3], [], id="half-of-the-rights"),
        pytest.param(
            {"/dev/nvidia1", "/dev/nvidia-caps/nvidia-cap147", "/dev/nvidia-caps/nvidia-cap149"},
            [3],
            [(1, 1)],
            id="mig-device",
        ),
        pytest.param(
            {"/dev/nvidia-caps/nvidia-cap147", "/dev/nvidia-caps/nvidia-cap149"}, [], [], id="rights-without-gpu"
        ),
        pytest.param({"/dev/nvidiactl", "/dev/nvidia"}, [], [], id="none"),
    ],
)
def test_chosen_are_those_that_can_be_opened(
    simhost: Callable[[str], Path], nodes: set[str], chosen: list[int], migs: list[tuple[int, int]]
) -> None:
    settings = config.load(str(simhost(MIG) / "config.toml"))
    found = cdihook.chosen(nodes, settings, gpus.read(settings.proc_root))
    assert chosen == [gpu.index for gpu in found.gpus]
    assert migs == [(item.gi, item.ci) for item in found.migs]


# Containers


def specification(settings: Path, capabilities: tuple[str, ...] = ALL) -> Path:
    """Beside the config.toml."""
    path = settings.with_suffix(f".{'-'.join(capabilities)}.yaml")
    wanted = cdispec.SpecificationOptions(
        kind="nvidia.com/gpu",
        capabilities=capabilities,
        strategies=("index", "uuid"),
        version="",
        hook=str(HOOK),
        hook_config=str(settings),
    )
    document = cdispec.make(config.load(str(settings)), wanted, [])
    path.write_text(cdispec.as_text(document, "yaml"))
    return path


def prepared(
    shop: Workshop, host: str, *devices: str, capabilities: tuple[str, ...] = ALL, family: str = "debian"
) -> Bundle:
    bundle = shop.bundle(family)
    show_proc(shop, bundle, host)
    names = [f"nvidia.com/gpu={device}" for device in devices]
    cdi_engine.inject(bundle.config, specification(shop.config(host), capabilities), *names)
    return bundle


def show_proc(shop: Workshop, bundle: Bundle, host: str) -> None:
    program = bundle.directory.with_suffix(".hook")
    program.write_text(SHOW_PROC.format(host=shop.simhost(host), rootfs=bundle.rootfs))
    program.chmod(0o755)
    hook = {"path": str(program), "args": ["show-proc"], "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]}
    bundle.config["hooks"] = {"prestart": [hook]}


def start(bundle: Bundle, script: str) -> str:
    bundle.config["process"]["args"] = ["/bin/sh", "-euc", script]
    result = bundle.write().run(None, wrapper=Path("runc"))
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


@pytest.mark.root
@pytest.mark.parametrize("family", ["debian", "fedora", "no-etc"])
@pytest.mark.parametrize(
    ("host", "devices", "expected"),
    [
        pytest.param(A100, ("all",), gpu_lines(A100, 0, 1), id="all"),
        pytest.param(A100, ("1",), gpu_lines(A100, 1), id="index"),
        pytest.param(A100, (SECOND,), gpu_lines(A100, 1), id="uuid"),
        pytest.param(A100, ("0", SECOND), gpu_lines(A100, 0, 1), id="two"),
        pytest.param("h200", ("all",), gpu_lines("h200", 0), id="h200"),
        pytest.param(MIG, (GPU3_MIG,), gpu_lines(MIG, 3, migs=(GPU3_MIG,)), id="mig-uuid"),
        pytest.param(MIG, ("3:1",), gpu_lines(MIG, 3, migs=(GPU3_MIG,)), id="mig-index"),
        pytest.param(MIG, ("5", "3:1"), gpu_lines(MIG, 3, 5, migs=(GPU3_MIG,)), id="mig-beside-a-gpu"),
        pytest.param(MIG, ("all",), gpu_lines(MIG, *range(8)), id="mig-all"),
    ],
)
def test_listed_are_the_devices_asked_for(
    shop: Workshop, host: str, devices: tuple[str, ...], expected: str, family: str
) -> None:
    assert expected == start(prepared(shop, host, *devices, family=family), "nvidia-smi -L")


@pytest.mark.root
def test_other_gpu_is_hidden_and_closed(shop: Workshop) -> None:
    script = f"""{TRY}
        ls /proc/driver/nvidia/gpus; grep Modify /proc/driver/nvidia/params
        mknod -m 666 /dev/nvidia1 c 195 1; try /dev/nvidia0; try /dev/nvidia1
    """
    shown = start(prepared(shop, A100, "1"), script)
    pci = next(gpu.pci for gpu in gpus.read(str(shop.simhost(A100))).gpus if gpu.uuid == SECOND)
    assert shown.splitlines() == [pci, "ModifyDeviceFiles: 0", "/dev/nvidia0 open", "/dev/nvidia1 denied"]


@pytest.mark.root
def test_files_below_proc_are_those_of_the_mig_device(shop: Workshop) -> None:
    script = "cd /proc/driver/nvidia/capabilities; find . -type f | sort; ls ../gpus | wc -l"
    shown = start(prepared(shop, MIG, "3:1"), script)
    assert shown.split() == ["./gpu1/mig/gi1/access", "./gpu1/mig/gi1/ci1/access", "1"]


@pytest.mark.root
def test_who_draws_gets_links_and_a_profile_of_its_gpus(shop: Workshop) -> None:
    """A GPU that is not chosen has no link that leads nowhere."""
    script = "ls /dev/dri /dev/dri/by-path; cat /etc/nvidia/nvidia-application-profiles-rc.d/*"
    shown = start(prepared(shop, WORKSTATION, "0"), script)
    assert "pci-0000:01:00.0-card" in shown
    assert '"EGLVisibleDGPUDevices", 0x1]' in shown
    bundle = prepared(shop, WORKSTATION, "0")
    bundle.config["linux"]["devices"] = [
        node for node in bundle.config["linux"]["devices"] if not node["path"].startswith("/dev/dri/")
    ]
    assert start(bundle, "ls /dev/dri 2>/dev/null || echo none") == "none\n"


@pytest.mark.root
def test_libraries_are_found_by_the_linker_cache(shop: Workshop) -> None:
    """A Fedora image does not look into Debian's directories by itself."""
    script = "ldconfig -p | grep -E 'libcuda.so.1|-ml.so.1' | grep -c x86-64; readlink /usr/lib/x86_64*/libcuda.so.1"
    shown = start(prepared(shop, A100, "all", family="fedora"), script)
    assert shown.split() == ["2", "libcuda.so.550.163.01"]


@pytest.mark.root
def test_compatibility_libraries_come_first(shop: Workshop) -> None:
    bundle = prepared(shop, A100, "all")
    place = bundle.rootfs / "usr/local/cuda/compat"
    place.mkdir(parents=True)
    library = shop.simhost(A100) / "driver/usr/lib/x86_64-linux-gnu/libcuda.so.550.163.01"
    shutil.copy(library, place / "libcuda.so.560.1")
    (place / "libcuda.so.1").symlink_to("libcuda.so.560.1")
    assert "=> /usr/local/cuda/compat/libcuda.so.1" in start(bundle, "ldconfig -p | grep -m 1 'libcuda.so.1 '")


@pytest.mark.root
def test_compute_alone_brings_no_more(shop: Workshop) -> None:
    script = (
        "ls /usr/lib/*/ | grep -cE 'libGLX_nvidia|libEGL_nvidia' || :; ls /etc/nvidia 2>/dev/null || echo no-profile"
    )
    shown = start(prepared(shop, A100, "all", capabilities=("compute", "utility")), script)
    assert shown.split() == ["0", "no-profile"]


@pytest.mark.root
def test_second_start_is_like_the_first(shop: Workshop) -> None:
    """Podman start after a stop: the links and the cache are there already."""
    bundle = prepared(shop, A100, "all")
    first = start(bundle, "nvidia-smi -L")
    assert first == start(bundle, "nvidia-smi -L") == gpu_lines(A100, 0, 1)


@pytest.mark.root
def test_user_who_is_not_root(shop: Workshop) -> None:
    bundle = shop.bundle()
    bundle.config["process"]["user"] = {"uid": 1000, "gid": 1000}
    cdi_engine.inject(bundle.config, specification(shop.config(A100)), "nvidia.com/gpu=0")
    assert start(bundle, "nvidia-smi -L") == gpu_lines(A100, 0)


@pytest.mark.root
def test_our_runtime_does_not_inject_again(shop: Workshop) -> None:
    """An image that asks for GPUs by itself, below an engine whose default runtime is ours."""
    bundle = shop.bundle()
    bundle.config["process"]["env"].append("NVIDIA_VISIBLE_DEVICES=all")
    cdi_engine.inject(bundle.config, specification(shop.config(A100)), "nvidia.com/gpu=1")
    bundle.config["process"]["args"] = ["/bin/sh", "-euc", "nvidia-smi -L; grep -c libcuda.so.5 /proc/self/mountinfo"]
    result = bundle.write().run(shop.config(A100), wrapper=WRAPPER)
    assert (result.stdout, result.stderr) == (gpu_lines(A100, 1) + "2\n", "")  # 64 and 32 bits, once each


@pytest.mark.root
def test_what_cannot_be_done_stops_the_container_and_is_undone(shop: Workshop) -> None:
    bundle = prepared(shop, A100, "all")
    (bundle.rootfs / "etc/ld.so.cache").unlink()
    (bundle.rootfs / "etc/ld.so.cache").mkdir()
    result = bundle.write(["/bin/true"]).run(None, wrapper=Path("runc"))
    assert result.returncode != 0
    assert "ldcache error: make `/etc/ld.so.cache`" in result.stderr
    assert "the image has a directory there" in result.stderr
    assert [path for path, what in tree(bundle.rootfs).items() if "libcuda" in path and "->" in what] == []
    assert not list(bundle.rootfs.rglob("libcuda.so.1"))


@pytest.mark.root
def test_links_stay_in_the_container(shop: Workshop) -> None:
    """The image leads the library's directory to one of the host."""
    outside = shop.new("outside")
    outside.mkdir()
    bundle = prepared(shop, "h200", "all", family="busybox")
    library = bundle.rootfs / "usr/lib/x86_64-linux-gnu"
    library.symlink_to(outside)
    bundle.write(["/bin/true"]).run(None, wrapper=Path("runc"))
    assert list(outside.iterdir()) == []


@pytest.mark.root
def test_audit_line(shop: Workshop) -> None:
    settings = shop.new("audit").with_suffix(".toml")
    log = settings.with_suffix(".log")
    more = f'[nvidia-container-runtime]\ndebug = "{log}"\nruntimes = ["runc"]\n'
    text = shop.config(A100).read_text()
    settings.write_text(text.replace('[nvidia-container-runtime]\nruntimes = ["runc"]\n', more))
    bundle = shop.bundle()
    spec = specification(settings, ("compute", "utility"))
    cdi_engine.inject(bundle.config, spec, "nvidia.com/gpu=1")
    start(bundle, "true")
    (line,) = log.read_text().splitlines()
    granted = (
        f'GPUs granted: container="{bundle.id}" asked_by="CDI" gpus="1 ({SECOND})" capabilities="compute, utility"'
    )
    assert granted in line.replace('\\"', '"')


# The road


_ROAD = """
import os, sys
sys.path[:0] = sys.argv[1:2]
from nvhook import hook
status = hook.main(["cdi", *sys.argv[2:]], "/nonexistent/config.toml")
print(*sorted(sys.modules), sep="\\n")
"""


def test_road_loads_nothing_dear(tmp_path: Path) -> None:
    """Up to the container, which is none here; what comes after is imported with the rest."""
    (tmp_path / "config.json").write_text(json.dumps({"process": {}, "root": {"path": "rootfs"}}))
    state: dict[str, Any] = {"id": "name", "pid": os.getpid(), "bundle": str(tmp_path)}
    command = [sys.executable, "-IS", "-c", _ROAD, str(REPOSITORY / "hook"), "--capabilities", "compute"]
    done = subprocess.run(command, input=json.dumps(state), capture_output=True, text=True, check=False)
    assert "has no mount namespace of its own" in done.stderr
    loaded = set(done.stdout.split())
    assert {"nvhook.cdihook", "nvhook.container.edits"} <= loaded
    assert not loaded & {
        "argparse",
        "json",
        "re",
        "pathlib",
        "subprocess",
        "nvhook.driver.discovery",
        "nvhook.driver.nvml",
    }
