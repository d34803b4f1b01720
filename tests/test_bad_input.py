# SPDX-License-Identifier: Apache-2.0
"""What cannot work: one line that says why, exit 1, and everything as it was. And what has to work all the same."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import containers
from containers import HOOK, TRIPLET, WRAPPER, Bundle, Workshop, gpu_lines, own_mounts, tree

pytestmark = pytest.mark.root

A100 = "a100x2"
VERSION = "550.163.01"
LIBRARIES = f"usr/lib/{TRIPLET}"
ALL = {"NVIDIA_VISIBLE_DEVICES": "all"}
LIST = ["/usr/bin/nvidia-smi", "-L"]
BOTH = gpu_lines(A100, 0, 1)


def refused_by_wrapper(bundle: Bundle, config: Path) -> str:
    """The one line; nothing below bundle, root filesystem and host was changed, and no runtime was started."""
    log = bundle.directory.with_suffix(".log")
    places = (bundle.directory, bundle.rootfs)
    before = [tree(place) for place in places]
    result = bundle.run(config, options=("--log", str(log), "--log-format", "json"))
    assert (result.returncode, result.stdout) == (1, "")
    assert before == [tree(place) for place in places]
    (line,) = result.stderr.splitlines()
    (entry,) = log.read_text().splitlines()
    assert (json.loads(entry)["level"], json.loads(entry)["msg"]) == ("error", line)
    return line


def refused_by_hook(bundle: Bundle, config: Path) -> str:
    """The same where only the hook can know: the runtime passes its line on, and takes the container away again."""
    log = bundle.directory.with_suffix(".log")
    before = tree(bundle.rootfs)
    result = bundle.run(config, options=("--log", str(log), "--log-format", "json"))
    assert (result.returncode, result.stdout) == (1, "")
    assert before == tree(bundle.rootfs)
    assert f"{bundle.rootfs}" not in Path("/proc/self/mountinfo").read_text()
    messages = [json.loads(line) for line in log.read_text().splitlines()]
    (message,) = (entry["msg"] for entry in messages if "nvidia-container-runtime-hook: " in entry["msg"])
    said = str(message).partition("nvidia-container-runtime-hook: ")[2]
    assert "Traceback" not in said
    assert said.rstrip('\\n"').count("\\n") == 0
    return said


# The bundle of a container that seems to ask; what holds no word of a request is the low-level runtime's to refuse.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "read `{path}`: no such file or directory", id="missing"),
        pytest.param("{NVIDIA_", "parse `{path}`: Expecting property name", id="not-json"),
        pytest.param('["NVIDIA_"]', "parse `{path}`: not a JSON object", id="not-an-object"),
        pytest.param({"process": None}, "`{path}`: `process` is missing", id="no-process"),
        pytest.param({"root": None}, "`{path}`: `root` is missing", id="no-root"),
        pytest.param({"root": {}}, "`{path}`: `root.path` is missing", id="no-root-path"),
        pytest.param(
            {"process": {"env": "NVIDIA_VISIBLE_DEVICES=all"}},
            "`{path}`: `process.env` is not a list of strings",
            id="env",
        ),
    ],
)
def test_bundle(shop: Workshop, content: str | dict[str, object] | None, message: str) -> None:
    bundle = shop.bundle("busybox")
    if isinstance(content, str):
        bundle.path.write_text(content)
    elif content is not None:
        bundle.config |= {"annotations": {"why": "NVIDIA_"}, **content}
        bundle.write()
    line = refused_by_wrapper(bundle, shop.config(A100))
    assert line.startswith(f"nvidia-container-runtime: spec error: {message.format(path=bundle.path)}")


def test_bundle_directory_missing(shop: Workshop) -> None:
    bundle = shop.bundle("busybox")
    bundle.directory.rmdir()
    line = refused_by_wrapper(bundle, shop.config(A100))
    assert line == f"nvidia-container-runtime: spec error: read `{bundle.path}`: no such file or directory"


# The state


def run_hook(config: Path, state: str | dict[str, object]) -> str:
    """The line with which the hook refuses this state."""
    result = subprocess.run(
        [str(HOOK), "--config", str(config), "prestart"],
        input=state if isinstance(state, str) else json.dumps(state),
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    return line.removeprefix("nvidia-container-runtime-hook: ")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        pytest.param("", "stdin is not JSON", id="empty"),
        pytest.param('{"pid": 1', "stdin is not JSON", id="cut-off"),
        pytest.param("[" * 100_000, "stdin is not JSON", id="deep"),
        pytest.param("7", "stdin is not a JSON object", id="number"),
        pytest.param({"bundle": "/b"}, "`pid` is `None`", id="no-pid"),
        pytest.param({"pid": 0, "bundle": "/b"}, "`pid` is `0`", id="stopped"),
        pytest.param({"pid": "1", "bundle": "/b"}, "`pid` is `1`, not a process", id="pid-a-string"),
        pytest.param({"pid": 1}, "`bundle` is `None`", id="no-bundle"),
        pytest.param({"pid": 1, "bundle": "b"}, "`bundle` is `b`, not an absolute path", id="bundle-relative"),
    ],
)
def test_state(shop: Workshop, state: str | dict[str, object], message: str) -> None:
    line = run_hook(shop.config(A100), state)
    assert line.startswith("spec error: read the container's state: ")
    assert message in line


def state_of(bundle: Bundle, pid: int) -> dict[str, object]:
    return {"ociVersion": "1.0.2", "id": bundle.id, "status": "creating", "pid": pid, "bundle": str(bundle.directory)}


def test_state_process_is_gone(shop: Workshop) -> None:
    bundle = shop.bundle("busybox").write(env=ALL)
    with subprocess.Popen(["true"]) as process:
        process.wait()
    line = run_hook(shop.config(A100), state_of(bundle, process.pid))
    assert line == f"container error: process {process.pid} of the container is gone"


def test_state_process_is_no_container(shop: Workshop) -> None:
    bundle = shop.bundle("busybox").write(env=ALL)
    before = tree(bundle.rootfs)
    line = run_hook(shop.config(A100), state_of(bundle, os.getpid()))
    assert line.startswith(f"container error: process {os.getpid()} has no mount namespace of its own")
    assert before == tree(bundle.rootfs)


def test_state_process_of_another_container(shop: Workshop) -> None:
    config = shop.config(A100)
    other = shop.bundle("busybox").write(["/bin/sleep", "60"])
    bundle = shop.bundle("busybox").write(env=ALL)
    before = tree(bundle.rootfs), tree(other.rootfs)
    try:
        made = other.call(
            config, "create", "--bundle", str(other.directory), other.id, output=other.directory / "output"
        )
        assert made.returncode == 0
        pid = json.loads(other.call(config, "state", other.id).stdout)["pid"]
        line = run_hook(config, state_of(bundle, pid))
        mounted = Path(f"/proc/{pid}/mountinfo").read_text()
    finally:
        other.delete()
    assert line.startswith(f"container error: process {pid} has not mounted `{bundle.rootfs}`")
    assert before == (tree(bundle.rootfs), tree(other.rootfs))
    assert "nvidia" not in mounted


# The request and the configuration


@pytest.mark.parametrize(
    ("env", "message"),
    [
        pytest.param(
            {"NVIDIA_VISIBLE_DEVICES": "2"}, "device error: unknown device `2`; this host has 0 (GPU-", id="2"
        ),
        pytest.param({"NVIDIA_VISIBLE_DEVICES": "0,GPU-1"}, "device error: unknown device `GPU-1`", id="uuid"),
        pytest.param({"NVIDIA_VISIBLE_DEVICES": "0\n\x1b[1m"}, "device error: unknown device `0\\n\\x1b[1m`", id="odd"),
        pytest.param(
            {**ALL, "NVIDIA_DRIVER_CAPABILITIES": "cuda"}, "request error: unknown capability `cuda`", id="cap"
        ),
        pytest.param({**ALL, "NVIDIA_REQUIRE_CUDA": "cuda>=99"}, "requirement error: ", id="requirement"),
    ],
)
def test_request(shop: Workshop, env: dict[str, str], message: str) -> None:
    bundle = shop.bundle().write(LIST, env)
    assert refused_by_wrapper(bundle, shop.config(A100)).startswith(f"nvidia-container-runtime: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("[[", "parse `{path}`: ", id="not-toml"),
        pytest.param(
            "disable-require = 'no'", "`{path}`: `disable-require` must be true or false, not `no`", id="type"
        ),
        pytest.param("supported-driver-capabilities = 'cuda'", "`{path}`: unknown capability `cuda`", id="capability"),
        pytest.param("[nvidia-container-runtime]\nmode = 'best'", "`{path}`: unknown value `best`", id="value"),
        pytest.param("[nvidia-container-cli]\nldconfig = '/x'", "`{path}`: `nvidia-container-cli.ldconfig`", id="path"),
        pytest.param(None, "read `{path}`: no such file", id="missing"),
    ],
)
def test_configuration(shop: Workshop, text: str | None, message: str) -> None:
    path = shop.new("config.toml")
    if text is not None:
        path.write_text(text)
    line = refused_by_wrapper(shop.bundle("busybox").write(LIST, ALL), path)
    assert line.startswith(f"nvidia-container-runtime: config error: {message.format(path=path)}")


# The host


def test_no_kernel_module(shop: Workshop) -> None:
    line = refused_by_wrapper(shop.bundle().write(LIST, ALL), shop.config("no-driver"))
    assert re.search(r"device error: the nvidia kernel module is not loaded: .*; load it with `modprobe nvidia`", line)


def test_no_kernel_module_and_nothing_asked(shop: Workshop) -> None:
    assert shop.bundle("busybox").write(["/bin/true"]).run(shop.config("no-driver")).returncode == 0


def _emptied(path: Path) -> None:
    path.write_text("")


def _made_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


INFORMATION = "driver/nvidia/gpus/0000:0a:00.0/information"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        pytest.param(
            "driver/nvidia/gpus",
            shutil.rmtree,
            "all GPUs are asked for and the driver has none; see `dmesg | grep -i nvrm`",
            id="no-gpus",
        ),
        pytest.param(INFORMATION, os.unlink, "read `{path}`: no such file or directory", id="no-information"),
        pytest.param(INFORMATION, _made_directory, "read `{path}`: is a directory", id="information-is-a-directory"),
        pytest.param(INFORMATION, _emptied, "read `{path}`: no `Device Minor`", id="information-empty"),
        pytest.param("devices", os.unlink, "read `{path}`: no such file or directory", id="no-devices"),
        pytest.param("devices", _made_directory, "read `{path}`: is a directory", id="devices-is-a-directory"),
        pytest.param(
            "devices",
            _emptied,
            "compute or video is asked for and the nvidia-uvm kernel module is not loaded; load it with "
            "`nvidia-modprobe -u -c 0` or `modprobe nvidia-uvm`",
            id="devices-empty",
        ),
        pytest.param("driver/nvidia/version", _emptied, "read `{path}`: no driver version in ``", id="version-empty"),
        pytest.param(
            "driver/nvidia/version", _made_directory, "read `{path}`: is a directory", id="version-is-a-directory"
        ),
    ],
)
def test_proc_tree_half_there(shop: Workshop, name: str, damage: Callable[[Path], None], message: str) -> None:
    host, config = shop.copy_of(A100)
    path = host / "proc" / name
    damage(path)
    line = refused_by_wrapper(shop.bundle().write(LIST, ALL), config)
    assert line == f"nvidia-container-runtime: device error: {message.format(path=path)}"


def test_proc_tree_without_params(shop: Workshop) -> None:
    """They have defaults."""
    host, config = shop.copy_of(A100)
    (host / "proc/driver/nvidia/params").unlink()
    assert shop.bundle().write(LIST, ALL).run(config).stdout == BOTH


def test_tegra(shop: Workshop) -> None:
    host, config = shop.copy_of("no-driver")
    (host / "driver/etc").mkdir(exist_ok=True)
    (host / "driver/etc/nv_tegra_release").write_text("# R36 (release), REVISION: 4.3\n")
    line = refused_by_wrapper(shop.bundle().write(LIST, ALL), config)
    assert line.startswith(f"nvidia-container-runtime: driver error: this is a Tegra, as `{host}/driver/etc/nv_tegra_")
    assert shop.bundle("busybox").write(["/bin/true"]).run(config).returncode == 0


def test_wsl_one_gpu_alone(shop: Workshop) -> None:
    line = refused_by_wrapper(shop.bundle().write(LIST, {"NVIDIA_VISIBLE_DEVICES": "0"}), shop.config("wsl2"))
    assert line == (
        "nvidia-container-runtime: device error: `0` is asked for, and on WSL 2 the GPUs have one node, /dev/dxg, "
        "for all of them; ask for `all`"
    )


@pytest.mark.parametrize("library", ["libcuda.so.1.1", "libnvidia-ml.so.1"])
def test_wsl_store_half_there(shop: Workshop, library: str) -> None:
    host, config = shop.copy_of("wsl2")
    (path,) = (host / "driver/usr/lib/wsl/drivers").glob(f"*/{library}")
    path.unlink()
    bundle = shop.bundle().write(LIST, ALL)
    if library == "libcuda.so.1.1":
        assert "driver error: this is WSL 2, as `/dev/dxg` says, and no directory" in refused_by_wrapper(bundle, config)
    else:
        assert "driver error: `utility` is asked for and driver nv_dispi" in refused_by_hook(bundle, config)


def test_wsl_store_damaged(shop: Workshop) -> None:
    host, config = shop.copy_of("wsl2")
    (path,) = (host / "driver/usr/lib/wsl/drivers").glob("*/libnvdxgdmal.so.1")
    path.write_bytes(path.read_bytes()[:50])
    line = refused_by_hook(shop.bundle().write(LIST, ALL), config)
    assert f"driver error: read `{path}`: " in line


def test_libraries_of_another_version_than_the_module(shop: Workshop) -> None:
    host, config = shop.copy_of(A100)
    version = host / "proc/driver/nvidia/version"
    version.write_text(version.read_text().replace(VERSION, "570.124.06"))
    line = refused_by_hook(shop.bundle().write(LIST, ALL), config)
    assert f"the kernel module is version 570.124.06 and the libraries below `{host}/driver` are " in line
    assert f"version {VERSION}; " in line


@pytest.mark.parametrize("family", ["debian", "fedora"])
def test_no_libcuda(shop: Workshop, family: str) -> None:
    host, config = shop.copy_of(A100)
    for path in (host / "driver/usr/lib").rglob("libcuda.so*"):
        path.unlink()
    line = refused_by_hook(shop.bundle(family).write(LIST, ALL), config)
    assert f"driver error: `compute` is asked for and driver {VERSION} on this host has no libcuda.so.1" in line


def test_library_moved_after_the_inventory(shop: Workshop) -> None:
    host, config = shop.copy_of(A100)
    assert shop.bundle().write(LIST, ALL).run(config).stdout == BOTH
    inventory = host / "run/inventory.json"
    first = inventory.read_text()
    place = host / "driver" / LIBRARIES
    (place / "nvidia/current").mkdir(parents=True)
    (place / f"libcuda.so.{VERSION}").rename(place / f"nvidia/current/libcuda.so.{VERSION}")
    bundle = shop.bundle().write(["/bin/sh", "-ec", f"nvidia-smi -L; readlink -f /{LIBRARIES}/libcuda.so.1"], ALL)
    assert bundle.run(config).stdout == f"{BOTH}/{LIBRARIES}/libcuda.so.{VERSION}\n"
    assert first != inventory.read_text()
    assert f"nvidia/current/libcuda.so.{VERSION}" in inventory.read_text()


def test_library_gone_after_the_inventory(shop: Workshop) -> None:
    host, config = shop.copy_of(A100)
    assert shop.bundle().write(LIST, ALL).run(config).stdout == BOTH
    (host / "driver" / LIBRARIES / f"libcuda.so.{VERSION}").unlink()
    line = refused_by_hook(shop.bundle().write(LIST, ALL), config)
    assert "has no libcuda.so.1; install the driver package that holds it" in line


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"origin": null}', "\0" * 4096])
def test_inventory_damaged(shop: Workshop, damage: str) -> None:
    host, config = shop.copy_of(A100)
    (host / "run").mkdir()
    (host / "run/inventory.json").write_text(damage)
    assert shop.bundle().write(LIST, ALL).run(config).stdout == BOTH
    assert VERSION in (host / "run/inventory.json").read_text()


def test_state_directory_on_a_full_disk(shop: Workshop) -> None:
    state = shop.new("state")
    state.mkdir()
    config = containers.configure(shop.simhost(A100), shop.new("config.toml"), state)
    fill = f"mount -t tmpfs -o size=8k,mode=755 tmpfs {state}\n! cat /dev/zero >{state}/fill 2>/dev/null"
    bundle = shop.bundle().write(LIST, ALL)
    bundle.through = (*bundle.through, *own_mounts(fill))
    result = bundle.run(config)
    assert (result.returncode, result.stdout) == (0, BOTH), result.stderr
    assert os.listdir(state) == []


@pytest.mark.parametrize("form", ["file", "below-a-file", "read-only"])
def test_state_directory_cannot_be_written(shop: Workshop, form: str) -> None:
    place = shop.new("state")
    bundle = shop.bundle().write(LIST, ALL)
    if form == "read-only":
        place.mkdir()
        bundle.through = (*bundle.through, *own_mounts(f"mount -t tmpfs -o ro,mode=755 tmpfs {place}"))
    else:
        place.touch()
    state = place / "below" if form == "below-a-file" else place
    config = containers.configure(shop.simhost(A100), shop.new("config.toml"), state)
    result = bundle.run(config)
    assert (result.returncode, result.stdout) == (0, BOTH), result.stderr
    assert place.is_dir() or place.read_bytes() == b""


@pytest.mark.parametrize("count", [2, 8])
def test_several_at_once_without_inventory(shop: Workshop, count: int) -> None:
    state = shop.new("state")
    config = containers.configure(shop.simhost(A100), shop.new("config.toml"), state)
    bundles = [shop.bundle().write(LIST, ALL) for _ in range(count)]
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "NVHOOK_CONFIG": str(config)}
    running = []
    try:
        for bundle in bundles:
            command = [*bundle.through, str(WRAPPER), "run", "--bundle", str(bundle.directory), bundle.id]
            pipe = subprocess.PIPE
            running.append(
                subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)
            )
        said = [process.communicate(timeout=60) for process in running]
    finally:
        for bundle in bundles:
            bundle.delete()
    assert said == [(BOTH, "")] * count
    assert sorted(os.listdir(state)) == ["containers", "inventory.json"]
    assert os.listdir(state / "containers") == []


# The image


def test_root_filesystem_that_cannot_be_written(shop: Workshop) -> None:
    bundle = shop.bundle().write(LIST, ALL)
    root = bundle.rootfs
    bind = f"mount --bind {root} {root}\nmount -o remount,bind,ro {root}"
    bundle.through = (*bundle.through, *own_mounts(bind))
    line = refused_by_hook(bundle, shop.config(A100))
    assert re.search(r"mount error: mount `.*` on `.*`: read-only file system", line)


@pytest.mark.parametrize(
    ("place", "kind", "message"),
    [
        (f"{LIBRARIES}/libcuda.so.{VERSION}", "fifo", "mount error: mount `.*` on `{}`: the image has a FIFO there"),
        (f"{LIBRARIES}/libcuda.so.1", "fifo", "mount error: link `{}` to `.*`: the image has a FIFO there"),
        (f"{LIBRARIES}/libcuda.so.{VERSION}", "link", "mount error: mount `.*` on `{}`: the image has a symbolic link"),
        ("usr/bin/nvidia-smi", "directory", "mount error: mount `.*` on `{}`: the image has a directory there"),
        ("etc/ld.so.cache", "fifo", "ldcache error: make `{}` of `.*`: the image has a FIFO there"),
        ("etc/ld.so.cache", "link", "ldcache error: make `{}` of `.*`: the image has a symbolic link there"),
        ("etc/ld.so.cache", "directory", "ldcache error: make `{}` of `.*`: the image has a directory there"),
    ],
)
def test_something_in_the_way(shop: Workshop, place: str, kind: str, message: str) -> None:
    """Nothing of the image may be followed or replaced, and what came before it is taken back."""
    bundle = shop.bundle().write(LIST, ALL)
    path = bundle.rootfs / place
    if kind != "directory":
        path.unlink(missing_ok=True)
    victim = shop.new("victim")
    victim.write_text("the host's")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(victim)
    else:
        path.unlink(missing_ok=True)
        path.mkdir()
    line = refused_by_hook(bundle, shop.config(A100))
    assert re.search(message.format(f"/{place}"), line), line
    assert victim.read_text() == "the host's"


@pytest.mark.parametrize("target", ["/tmp", "../../../../../../../..", "/nowhere"])
def test_library_directory_leads_out(shop: Workshop, target: str) -> None:
    """The image's links end inside the image. What is outside is a directory that exists on the host alone."""
    bundle = shop.bundle("busybox")
    outside = shop.new("outside")
    outside.mkdir()
    place = bundle.rootfs / "usr/lib64"
    place.symlink_to(outside if target == "/nowhere" else target + str(outside))
    line = refused_by_hook(bundle.write(["/bin/true"], ALL), shop.config(A100))
    assert "mount error: " in line
    assert os.listdir(outside) == []


def test_ldconfig_that_fails(shop: Workshop) -> None:
    """The linker cache is the last edit: all of the others are taken back, and the image's cache is the one it was."""
    bundle = shop.bundle().write(LIST, ALL)
    os.utime(bundle.rootfs / "etc/ld.so.cache", (0, 0))  # older than what it lists: ldconfig has to be run
    host = shop.simhost(A100)
    config = containers.configure(host, shop.new("config.toml"), shop.place / f"state-{A100}")
    config.write_text(config.read_text().replace("@/sbin/ldconfig", f"@{shutil.which('false')}"))
    assert "ldcache error: make `/etc/ld.so.cache` of " in refused_by_hook(bundle, config)
