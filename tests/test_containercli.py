# SPDX-License-Identifier: Apache-2.0
"""nvidia-container-cli: its words, what it prints, and containers that get their GPUs from it alone.

The programs that call it are not here; what they say is, word for word: LXC's hook, enroot's, NVIDIA's, and ctr.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import docpages
from containers import REPOSITORY, TRIPLET, TRY, Workshop, gpu_lines, own_mounts, tree
from nvhook import prestart
from nvhook.commands.containercli import configure as cli_configure
from nvhook.commands.containercli import options as containeroptions
from nvhook.commands.containercli.log import CommandLog
from nvhook.commands.containercli.options import InputError
from nvhook.container import container
from nvhook.errors import ContainerError
from nvhook.request import config
from nvhook.request.request import Request
from nvhook.request.spec import Spec
from nvhook.start import Start

CLI = REPOSITORY / "scripts/nvidia-container-cli"
A100, MIG = "a100x2", "a100x8-mig"
FIRST = "GPU-c41d7b52-93e6-4f0a-8d15-2b7e60a9f3c8"
SECOND = "GPU-08e5f9a3-1c6b-42d7-b0f4-e95d3187ac26"
USER = 54321
AS_USER = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups")


@pytest.fixture(scope="module")
def shop(simhost: Callable[[str], Path]) -> Iterator[Workshop]:
    """In /tmp, where users come through."""
    before = {name: tree(simhost(name)) for name in (A100, MIG)}
    with tempfile.TemporaryDirectory(prefix="nvhook-cli-") as name:
        yield Workshop(Path(name), simhost)
    assert before == {name: tree(simhost(name)) for name in (A100, MIG)}


def for_users(shop: Workshop) -> Path:
    """config.toml of a host that everybody may look at."""
    host, config = shop.copy_of(A100)
    host.chmod(0o755)
    return config


def call(config: Path | None, *words: str, through: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*through, str(CLI), *(["--config", str(config)] if config else []), *words]
    return subprocess.run(command, env={}, cwd="/", capture_output=True, text=True, timeout=60, check=False)


def printed(config: Path | None, *words: str) -> list[str]:
    done = call(config, *words)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split("\n")[:-1]


# Words


def _facts(words: str) -> dict[str, object]:
    """What is said, without what is not."""
    options = vars(containeroptions.parse(shlex.split(words), str))
    return {name: value for name, value in options.items() if value not in (None, False, [])}


CALLS = {
    "toolkit": (
        "--root=/run/driver --load-kmods --no-create-imex-channels --no-pivot --debug=/log --ldcache=/cache --user=root"
        " configure --cuda-compat-mode=ldconfig --ldconfig=@/sbin/ldconfig.real --no-cgroups --device=0,1"
        " --mig-config=all --mig-monitor=all --imex-channel=0 --compute --utility --require=cuda>=12 --pid=7 /rootfs",
        {
            "root": "/run/driver",
            "load_kmods": True,
            "no_create_imex_channels": True,
            "no_pivot": True,
            "debug": "/log",
            "ldcache": "/cache",
            "user": "root",
            "command": "configure",
            "cuda_compat_mode": ["ldconfig"],
            "ldconfig": "@/sbin/ldconfig.real",
            "no_cgroups": True,
            "device": ["0,1"],
            "mig_config": "all",
            "mig_monitor": "all",
            "imex_channel": ["0"],
            "compute": True,
            "utility": True,
            "require": ["cuda>=12"],
            "pid": 7,
            "rootfs": "/rootfs",
        },
    ),
    "enroot": (
        "--user --debug=/dev/stderr configure --no-cgroups --ldconfig=@/usr/sbin/ldconfig --device=all --compute"
        " --compat32 --display --graphics --utility --video --require=brand=tesla,driver>=470 /enroot/name",
        {
            "user": "",
            "debug": "/dev/stderr",
            "command": "configure",
            "no_cgroups": True,
            "ldconfig": "@/usr/sbin/ldconfig",
            "device": ["all"],
            **dict.fromkeys(("compute", "compat32", "display", "graphics", "utility", "video"), True),
            "require": ["brand=tesla,driver>=470"],
            "rootfs": "/enroot/name",
        },
    ),
    "ctr": (
        "--load-kmods configure --device=0,1 --compute --compat32 --graphics --utility --video --display --pid=7 /root",
        {
            "load_kmods": True,
            "command": "configure",
            "device": ["0,1"],
            **dict.fromkeys(("compute", "compat32", "graphics", "utility", "video", "display"), True),
            "pid": 7,
            "rootfs": "/root",
        },
    ),
    "lxc": (
        "--user configure --no-cgroups --ldconfig=@/sbin/ldconfig --device=GPU-1 --utility /usr/lib/lxc/rootfs",
        {
            "user": "",
            "command": "configure",
            "no_cgroups": True,
            "ldconfig": "@/sbin/ldconfig",
            "device": ["GPU-1"],
            "utility": True,
            "rootfs": "/usr/lib/lxc/rootfs",
        },
    ),
    "short": (
        "-ku -d /log -r / -l /cache -n configure -p7 -d0 -d 1 -cu -vgDn -r 'cuda>=9' -l @/x /rootfs",
        {
            "load_kmods": True,
            "user": "",
            "debug": "/log",
            "root": "/",
            "ldcache": "/cache",
            "no_pivot": True,
            "command": "configure",
            "pid": 7,
            "device": ["0", "1"],
            **dict.fromkeys(("compute", "utility", "video", "graphics", "display", "ngx"), True),
            "require": ["cuda>=9"],
            "ldconfig": "@/x",
            "rootfs": "/rootfs",
        },
    ),
    "user-in-the-same-word": ("-u1000:5 info --csv", {"user": "1000:5", "command": "info", "csv": True}),
    "cut-short": ("--load list --lib", {"load_kmods": True, "command": "list", "libraries": True}),
    "options-last": (
        "configure /rootfs --gra --pid 7",
        {"command": "configure", "rootfs": "/rootfs", "graphics": True, "pid": 7},
    ),
}


@pytest.mark.parametrize(("words", "expected"), CALLS.values(), ids=CALLS)
def test_words(words: str, expected: dict[str, object]) -> None:
    assert expected == _facts(words)


USAGE = {
    "nothing": ("", "the following arguments are required: COMMAND"),
    "unknown-command": ("sing", "invalid choice: 'sing'"),
    "user-takes-no-next-word": ("--user 1000 info", "invalid choice: '1000'"),
    "unknown-option": ("info --xml", "unrecognized arguments: --xml"),
    "global-option-behind-the-command": ("info --load-kmods", "unrecognized arguments: --load-kmods"),
    "no-rootfs": ("configure --utility", "the following arguments are required: ROOTFS"),
    "two-rootfs": ("configure /a /b", "unrecognized arguments: /b"),
    "no-value": ("configure /a --device", "argument -d/--device: expected one argument"),
    "pid": ("configure --pid=0 /a", "parse pid failed: `0` is no process"),
    "compat-mode": ("configure --cuda-compat-mode=hook /a", "invalid choice: 'hook'"),
}


@pytest.mark.parametrize(("words", "expected"), USAGE.values(), ids=USAGE)
def test_usage(words: str, expected: str) -> None:
    with pytest.raises(InputError) as error:
        _facts(words)
    assert expected in str(error.value)
    assert re.search(r"; see `nvidia-container-cli( \w+)? --help`$", str(error.value))


REFUSED = {
    "usage": ("info --xml", "input error: unrecognized arguments: --xml; see `nvidia-container-cli --help`"),
    "root": ("--root= info", "input error: invalid argument: --root=`` is no absolute path"),
    "ldcache": ("--ldcache=x info", "input error: invalid argument: --ldcache=`x` is no absolute path"),
    "user": ("--user=nobody-here info", "input error: parse user/group failed: --user=`nobody-here` names no user"),
    "user-number": (f"--user={2**32 - 1} info", "input error: parse user/group failed: "),
    "config": ("--config /none info", "initialization error: read `/none`: no such file"),
    "rootfs": ("configure rootfs", "input error: invalid rootfs directory: `rootfs` is no absolute path"),
    "root-of-the-host": (
        "configure --no-cgroups /",
        "container error: the container's root is `/`: that is the host's",
    ),
    "ldconfig": (
        "configure --ldconfig=/sbin/ldconfig /a",
        "input error: --ldconfig=`/sbin/ldconfig` is not a path of the host; write `@` before it; the program of an ",
    ),
    "mig-config": (
        "configure --mig-config=0:1 /a",
        "input error: --mig-config=`0:1`: only 'all' devices are currently",
    ),
    "imex": ("configure --imex-channel=0,x /a", "input error: `x` in --imex-channel is no IMEX channel; they are "),
    "requirements": (
        "configure " + 33 * "-r cuda=1 " + "/a",
        "input error: too many requirements: 33 are more than 32",
    ),
    "compat-modes": (
        "configure --cuda-compat-mode=mount --cuda-compat-mode=ldconfig /a",
        "input error: only one cuda-compat-mode can be specified at a time",
    ),
    "control-characters": (
        r"configure --ldconfig='\e[2J' /a".replace(r"\e", "\x1b"),
        r"input error: --ldconfig=`\x1b[2J",
    ),
}


@pytest.mark.parametrize(("words", "expected"), REFUSED.values(), ids=REFUSED)
@pytest.mark.root
def test_refused(words: str, expected: str) -> None:
    done = call(None, *shlex.split(words))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"nvidia-container-cli: {expected}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("word", ["--help", "-?", "--usage"])
def test_help(word: str) -> None:
    assert printed(None, word)[0].startswith("usage: nvidia-container-cli")
    assert any("ROOTFS" in line for line in printed(None, "configure", word))


def test_version() -> None:
    lines = printed(None, "--version")
    assert lines == printed(None, "-V")
    names = ["cli-version", "lib-version", "date", "revision", "compiler", "platform", "flags"]
    assert [line.partition(":")[0].removeprefix("build ") for line in lines] == names
    assert re.fullmatch(r"cli-version: 1\.\d+\.\d+", lines[0])  # which callers compare


# info


def test_info(shop: Workshop) -> None:
    assert printed(shop.config(A100), "info") == [
        "NVRM version:   550.163.01",
        "CUDA version:   12.4",
        "",
        "Device Index:   0",
        "Device Minor:   1",
        "Model:          NVIDIA A100-SXM4-40GB",
        "Brand:          Unknown",
        f"GPU UUID:       {FIRST}",
        "Bus Location:   00000000:07:00.0",
        "Architecture:   8.0",
        "",
        "Device Index:   1",
        "Device Minor:   0",
        "Model:          NVIDIA A100-SXM4-40GB",
        "Brand:          Unknown",
        f"GPU UUID:       {SECOND}",
        "Bus Location:   00000000:0a:00.0",
        "Architecture:   8.0",
    ]


def test_info_csv(shop: Workshop) -> None:
    assert printed(shop.config(A100), "info", "--csv") == [
        "NVRM version,CUDA version",
        "550.163.01,12.4",
        "",
        "Device Index,Device Minor,Model,Brand,GPU UUID,Bus Location,Architecture",
        f"0,1,NVIDIA A100-SXM4-40GB,Unknown,{FIRST},00000000:07:00.0,8.0",
        f"1,0,NVIDIA A100-SXM4-40GB,Unknown,{SECOND},00000000:0a:00.0,8.0",
    ]


@pytest.mark.root
def test_info_where_nvml_does_not_answer(shop: Workshop) -> None:
    """The CUDA version is that of the table, the brand that of the product's name."""
    host, config = shop.copy_of("nixos")
    name = next(line for line in printed(config, "list", "--libraries") if "libnvidia-ml.so" in line)
    library = host / "driver" / name.lstrip("/")
    os.truncate(library, 1000)
    done = call(config, "info", "--csv")
    assert done.stderr.startswith("nvidia-container-cli: warning: driver error: ask `")
    assert done.stderr.endswith("what /proc tells is printed\n")
    assert done.stdout.splitlines()[1] == "570.153.02,12.8"
    assert re.fullmatch(
        "0,0,NVIDIA GeForce RTX 3080,GeForce,GPU-[^,]*,00000000:01:00.0,Unknown", done.stdout.splitlines()[4]
    )
    assert done.returncode == 0


def test_info_without_a_driver(shop: Workshop) -> None:
    done = call(shop.config("no-driver"), "info")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("nvidia-container-cli: device error: the nvidia kernel module is not loaded: ")


@pytest.mark.root
def test_info_for_an_ordinary_user(shop: Workshop) -> None:
    config = for_users(shop)
    done = call(config, "info", through=AS_USER)
    assert (done.stdout, done.stderr) == ("".join(f"{line}\n" for line in printed(config, "info")), "")


# list


LIBRARIES = f"/usr/lib/{TRIPLET}"
NODES = ["/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools", "/dev/nvidia-modeset"]
PROGRAMS = [
    "nvidia-smi",
    "nvidia-debugdump",
    "nvidia-persistenced",
    "nvidia-cuda-mps-control",
    "nvidia-cuda-mps-server",
]


def test_list_of_everything(shop: Workshop) -> None:
    lines = printed(shop.config(A100), "list")
    groups = ["^/dev/", "^/usr/bin/", rf"^/usr/lib/{TRIPLET}/.*\.so\.", r"^/usr/lib/i386-.*\.so\.", "/firmware/"]
    found = [next(place for place, group in enumerate(groups) if re.search(group, line)) for line in lines]
    assert found == sorted(found)
    assert set(found) == {0, 1, 2, 3, 4}
    assert lines[:6] == [*NODES, "/dev/nvidia1", "/dev/nvidia0"]
    assert len(lines) == len(set(lines))
    assert lines == printed(shop.config(A100), "list", "--imex-channel=")


LISTS = {
    "devices": ("--device=1", [*NODES, "/dev/nvidia0"]),
    "device-twice": ("-d 0 -d 0", [*NODES, "/dev/nvidia1"]),
    "binaries": ("--binaries", [f"/usr/bin/{name}" for name in PROGRAMS]),
    "firmwares": ("-f", [f"/usr/lib/firmware/nvidia/550.163.01/gsp_{name}.bin" for name in ("ga10x", "tu10x")]),
    "ipcs-of-none": ("--ipcs", []),
}


@pytest.mark.parametrize(("words", "expected"), LISTS.values(), ids=LISTS)
def test_list(shop: Workshop, words: str, expected: list[str]) -> None:
    assert expected == printed(shop.config(A100), "list", *words.split())


def test_list_libraries(shop: Workshop) -> None:
    lines = printed(shop.config(A100), "list", "--libraries")
    both = printed(shop.config(A100), "list", "--libraries", "--compat32")
    assert f"{LIBRARIES}/libcuda.so.550.163.01" in lines
    assert both[: len(lines)] == lines
    assert all("i386" in line for line in both[len(lines) :])
    assert len(both) > len(lines)
    for line in both:
        assert (shop.simhost(A100) / "driver" / line.lstrip("/")).is_file()


@pytest.mark.root
def test_list_of_another_driver_root(shop: Workshop) -> None:
    """What is kept of it is kept apart: the hook's inventory stays good."""
    host, config = shop.copy_of(A100)
    expected = printed(config, "list", "--libraries")
    inventory = (host / "run/inventory.json").read_bytes()
    (host / "driver").rename(host / "elsewhere")
    other = f"--root={host}/elsewhere"
    assert printed(config, other, "list", "--libraries") == expected
    (host / "elsewhere/etc/ld.so.cache").rename(host / "elsewhere/etc/cache")
    assert printed(config, other, "--ldcache", "/etc/cache", "list", "--libraries") == expected
    assert (host / "run/inventory.json").read_bytes() == inventory
    assert (host / "run/nvidia-container-cli/inventory.json").exists()


@pytest.mark.root
def test_list_ipcs(shop: Workshop) -> None:
    host, config = shop.copy_of(A100)
    for name in ("nvidia-persistenced", "nvidia-fabricmanager"):
        path = host / f"driver/run/{name}/socket"
        path.parent.mkdir(parents=True)
        os.mknod(path, 0o140666)
    daemons = ["/run/nvidia-persistenced/socket", "/run/nvidia-fabricmanager/socket"]
    assert printed(config, "list", "--ipcs") == daemons
    assert printed(config, "list", "--ipcs", "--no-persistenced") == daemons[1:]
    assert printed(config, "list", "--ipcs", "--no-fabricmanager") == daemons[:1]


PROC = "/proc/driver/nvidia/capabilities"
CAPS = "/dev/nvidia-caps/nvidia-cap"


def test_list_of_a_mig_device(shop: Workshop) -> None:
    assert printed(shop.config(MIG), "list", "--device=0:1") == [
        *NODES,
        "/dev/nvidia2",
        f"{PROC}/gpu2/mig/gi8/access",
        f"{PROC}/gpu2/mig/gi8/ci0/access",
        f"{CAPS}345",
        f"{CAPS}346",
    ]


def test_list_of_rights_to_mig(shop: Workshop) -> None:
    lines = printed(shop.config(MIG), "list", "--device=0", "--mig-config=all", "--mig-monitor=all")
    assert lines[5] == f"{PROC}/mig/config"
    assert f"{CAPS}1" in lines  # the right to set it up
    assert f"{CAPS}2" in lines  # and to watch it
    assert lines.index(f"{PROC}/mig/monitor") > lines.index(f"{CAPS}391")


@pytest.mark.root
def test_list_of_imex_channels(shop: Workshop) -> None:
    host, config = shop.copy_of(A100)
    devices = host / "proc/devices"
    devices.write_text(devices.read_text().replace("236 nvidia-caps\n", "236 nvidia-caps-imex-channels\n"))
    channels = [f"/dev/nvidia-caps-imex-channels/channel{number}" for number in (0, 3)]
    words = ("list", "--imex-channel=0,3", "--imex-channel=0")
    assert printed(config, *words, "--device=0")[-2:] == channels
    assert [line for line in printed(config, *words) if "imex" in line] == channels
    done = call(config, "--no-create-imex-channels", *words)
    assert "device error: IMEX channel 0 is asked for and this host has no `" in done.stderr


def test_list_of_an_unknown_device(shop: Workshop) -> None:
    done = call(shop.config(A100), "list", "--device=0,7")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("nvidia-container-cli: device error: unknown device `7`; this host has 0 (GPU-")


# configure, for a mount namespace that the caller has made

LOOK = """
nvidia-smi -L
ls /dev | grep nvidia | sort
"""
UTILITY = "--ldconfig=@/sbin/ldconfig --no-cgroups --utility"


def direct(
    shop: Workshop,
    words: str,
    *,
    config: Path | None = None,
    options: str = "",
    prepare: str = "",
    look: str = LOOK,
    before: tuple[str, ...] = (),
    namespaces: str = "--mount --pid --fork --kill-child",
    rootfs: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """As a script does without an engine: namespaces, the usual mounts, `configure`, `look` with the tree as root."""
    rootfs = rootfs or shop.bundle().rootfs
    (rootfs / "mnt").mkdir(exist_ok=True)
    script = f"""
        mount --rbind {rootfs} {rootfs}
        cd {rootfs}
        mount -t proc none proc
        mount -t tmpfs none dev
        {prepare}
        {CLI} --config {config or shop.config(A100)} {options} configure {words} {rootfs}
        pivot_root . mnt
        exec /bin/busybox sh -euc '{look}'
    """
    command = [*before, "unshare", *namespaces.split(), "sh", "-euc", script]
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    return subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.root
def test_direct_use(shop: Workshop) -> None:
    done = direct(shop, f"{UTILITY} --device 0", options="--load-kmods")
    assert (done.stdout, done.stderr) == (gpu_lines(A100, 0) + "nvidia1\nnvidiactl\n", "")
    assert done.returncode == 0


GIVEN = {
    "second-by-uuid": (f"{UTILITY} --device={SECOND}", gpu_lines(A100, 1), "nvidia0 nvidiactl"),
    "all-in-any-case": (f"{UTILITY} --device=0,ALL", gpu_lines(A100, 0, 1), "nvidia0 nvidia1 nvidiactl"),
    "no-device": (UTILITY, "No devices found.\n", "nvidiactl"),
    "compute": (
        f"{UTILITY} --compute --device=0",
        gpu_lines(A100, 0),
        "nvidia-uvm nvidia-uvm-tools nvidia1 nvidiactl",
    ),
}


@pytest.mark.root
@pytest.mark.parametrize(("words", "gpus", "nodes"), GIVEN.values(), ids=GIVEN)
def test_what_is_given(shop: Workshop, words: str, gpus: str, nodes: str) -> None:
    done = direct(shop, words)
    assert (done.stdout, done.stderr) == (gpus + "".join(f"{node}\n" for node in nodes.split()), "")


@pytest.mark.root
def test_mig_device(shop: Workshop) -> None:
    done = direct(shop, f"{UTILITY} --device=0:1", config=shop.config(MIG), look="nvidia-smi -L; ls /dev/nvidia-caps")
    assert done.stdout.count("  MIG ") == 1, done.stderr
    assert done.stdout.endswith("nvidia-cap345\nnvidia-cap346\n")


@pytest.mark.root
def test_wsl(shop: Workshop) -> None:
    done = direct(shop, f"{UTILITY} --device=all", config=shop.config("wsl2"), look="ls /dev | grep dxg; nvidia-smi -L")
    assert done.stdout.startswith("dxg\nGPU 0: "), done.stderr


@pytest.mark.root
def test_what_is_left_out(shop: Workshop) -> None:
    host, config = shop.copy_of(A100)
    for name in ("nvidia-persistenced", "nvidia-fabricmanager"):
        path = host / f"driver/run/{name}/socket"
        path.parent.mkdir(parents=True)
        os.mknod(path, 0o140666)
    look = "find /usr /run /dev -name gsp_\\* -o -name socket -o -name nvidia1"
    words = f"{UTILITY} --device=0"
    done = direct(shop, words, config=config, look=look, prepare="mkdir run")
    found = [f"/usr/lib/firmware/nvidia/550.163.01/gsp_{name}.bin" for name in ("ga10x", "tu10x")]
    found += [f"/run/nvidia-{name}/socket" for name in ("fabricmanager", "persistenced")]
    assert sorted([*found, "/dev/nvidia1"]) == sorted(done.stdout.split()), done.stderr
    without = "--no-devbind --no-persistenced --no-fabricmanager --no-gsp-firmware"
    done = direct(shop, f"{words} {without}", config=config, look=look, prepare="mkdir run")
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.mark.root
@pytest.mark.parametrize("name", ["root", "user"])
@pytest.mark.parametrize("cache", ["merged", "none-in-the-image"])
def test_in_a_user_namespace(shop: Workshop, name: str, cache: str) -> None:
    """enroot's call, of a user who is root there or stays who he is. ldconfig has to run where there is no cache."""
    rootfs = shop.bundle().rootfs
    subprocess.run(["chown", "-R", f"{USER}:{USER}", str(rootfs)], check=True)
    (rootfs / "mnt").mkdir()
    users = "--map-root-user" if name == "root" else "--map-current-user --keep-caps"
    config = for_users(shop)
    call(config, "list")  # the inventory: a user could not keep it
    words = "--no-cgroups --ldconfig=@/sbin/ldconfig --device=all --compute --utility"
    done = direct(
        shop,
        f'{words} "--require=brand=nvidia,driver>=470"',
        config=config,
        options="--user",
        prepare="rm etc/ld.so.cache" if cache != "merged" else "",
        look=LOOK + "stat -c %u /etc/ld.so.cache",
        before=AS_USER,
        namespaces=f"--user {users} --mount --pid --fork --kill-child",
        rootfs=rootfs,
    )
    nodes = "nvidia-uvm\nnvidia-uvm-tools\nnvidia0\nnvidia1\nnvidiactl\n"
    owner = 0 if name == "root" else USER
    assert (done.stdout, done.returncode) == (f"{gpu_lines(A100, 0, 1)}{nodes}{owner}\n", 0), done.stderr


@pytest.mark.root
def test_tree_that_others_share(shop: Workshop) -> None:
    done = direct(shop, UTILITY, prepare="mount --make-shared .")
    assert done.returncode == 1
    assert "nvidia-container-cli: container error: `" in done.stderr
    assert "is in a mount that other mount namespaces share" in done.stderr


FAILING = {
    "device": ("--device=7", "device error: unknown device `7`; this host has"),
    "requirement": ('--device=0 "--require=cuda>=99.9"', "requirement error: image needs `cuda>=99.9`"),
    "expression": ("--device=0 --require=cuda", "requirement error: `cuda` is no requirement"),
    "mig": ("--device=0:1", "device error: unknown MIG device `0:1`"),
    "imex": ("--device=0 --imex-channel=0", "device error: IMEX channel 0 is asked for and the driver has none"),
}


@pytest.mark.root
@pytest.mark.parametrize(("words", "expected"), FAILING.values(), ids=FAILING)
def test_configure_fails(shop: Workshop, words: str, expected: str) -> None:
    rootfs = shop.bundle().rootfs
    (rootfs / "mnt").mkdir()
    before = tree(rootfs)
    done = direct(shop, f"{UTILITY} {words}", rootfs=rootfs)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"nvidia-container-cli: {expected}")
    assert before == tree(rootfs)


@pytest.mark.root
def test_image_in_the_way_is_undone(shop: Workshop) -> None:
    rootfs = shop.bundle().rootfs
    (rootfs / "mnt").mkdir()
    (rootfs / "usr/bin/nvidia-smi").mkdir()
    before = tree(rootfs)
    done = direct(shop, f"{UTILITY} --device=0", rootfs=rootfs)
    assert re.match("nvidia-container-cli: mount error: .*the image has a directory there\n", done.stderr)
    assert before == tree(rootfs)


class _Unlockable:
    """A container whose root filesystem another one has."""

    root = None

    def lock_root_if_possible(self, _: str) -> None:
        raise ContainerError("another container has it")


class _Made:
    def __init__(self) -> None:
        self.is_taken_back = False

    def take_back(self) -> None:
        self.is_taken_back = True


def test_tree_that_cannot_be_locked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What was made on the host for the container is taken back as for any other fault."""
    start = Start(config.load("/nonexistent"), Spec(rootfs="/x"), Request(("all",), (), (), ""), "/x", [])
    made = _Made()
    start.made = made  # type: ignore[assignment]
    monkeypatch.setattr(container, "here", lambda _: _Unlockable())
    monkeypatch.setattr(prestart, "prepare", lambda *_: None)
    monkeypatch.setattr(Start, "choose", lambda _: None)
    options = argparse.Namespace(pid=None, rootfs="/x", no_cgroups=True)
    with pytest.raises(ContainerError):
        cli_configure._apply(options, start, CommandLog(str(tmp_path / "log"), []))
    assert made.is_taken_back


WARNED = {
    "no-pivot": ("--no-pivot", "", "--no-pivot is not honoured"),
    "compat-mount": ("", "--cuda-compat-mode=mount", "--cuda-compat-mode=mount is not honoured"),
    "debug": ("--debug=/none/log", "", "--debug=/none/log cannot be written"),
}


@pytest.mark.root
@pytest.mark.parametrize(("options", "words", "expected"), WARNED.values(), ids=WARNED)
def test_option_that_is_not_honoured(shop: Workshop, options: str, words: str, expected: str) -> None:
    done = direct(shop, f"{UTILITY} --device=0 {words}", options=options, look="nvidia-smi -L")
    assert done.stdout == gpu_lines(A100, 0)
    assert done.stderr.startswith(f"nvidia-container-cli: warning: {expected}")
    assert done.stderr.count("\n") == 1


@pytest.mark.root
def test_cgroup_of_the_caller_stays_as_it_is(shop: Workshop) -> None:
    done = direct(shop, "--utility --device=0", look="nvidia-smi -L")
    assert done.stdout == gpu_lines(A100, 0)
    assert done.stderr.startswith("nvidia-container-cli: warning: the device cgroup is the caller's own without --pid")


@pytest.mark.root
def test_debug(shop: Workshop) -> None:
    log = shop.new("log")
    direct(shop, f"{UTILITY} --device=0", options=f"--debug={log}")
    direct(shop, f"{UTILITY} --device=7", options=f"--debug={log}")
    lines = log.read_text().splitlines()
    assert any("level=info" in line and "/usr/bin/nvidia-smi" in line for line in lines)
    assert 'level=error msg="device error: unknown device `7`' in lines[-1]


@pytest.mark.root
def test_ordinary_user_is_told(shop: Workshop) -> None:
    config = for_users(shop)
    done = call(config, "configure", "--utility", str(shop.bundle().rootfs), through=AS_USER)
    assert done.stderr.startswith("nvidia-container-cli: permission error: `configure` mounts, and this process has no")
    assert done.returncode == 1


# configure, for a container of a low-level runtime

_HOOK = """
pid=$(sed 's/.*"pid": *\\([0-9]*\\).*/\\1/')
exec {cli} --config {config} configure --pid=$pid {words} {rootfs}
"""


def hooked(shop: Workshop, words: str, script: str, *nodes: dict[str, object]) -> subprocess.CompletedProcess[str]:
    """runc, with a prestart hook that is nothing but the call."""
    bundle = shop.bundle()
    hook = _HOOK.format(cli=CLI, config=shop.config(A100), words=words, rootfs=bundle.rootfs)
    env = ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]
    bundle.config["hooks"] = {"prestart": [{"path": "/bin/sh", "args": ["sh", "-euc", hook], "env": env}]}
    bundle.config["linux"]["devices"] = list(nodes)
    bundle.write(["sh", "-euc", script])
    return bundle.run(None, wrapper=Path("runc"))


@pytest.mark.root
def test_container_of_a_runtime(shop: Workshop) -> None:
    """The device cgroup, which refuses everything, lets it open its own GPU; there is a node of the other as well."""
    script = f"{TRY}nvidia-smi -L; mknod /dev/nvidia0 c 195 0 || :; try /dev/nvidia1; try /dev/nvidiactl"
    done = hooked(shop, "--ldconfig=@/sbin/ldconfig --utility --device=0", script)
    assert done.stdout == gpu_lines(A100, 0) + "/dev/nvidia1 open\n/dev/nvidiactl open\n", done.stderr


HALVES = {
    "both": ("", "there\n/dev/nvidia1 open\n"),
    "no-cgroups": ("--no-cgroups", "there\n/dev/nvidia1 denied\n"),
    "no-devbind": ("--no-devbind", "missing\n/dev/nvidia1 open\n"),
}


@pytest.mark.root
@pytest.mark.parametrize(("words", "expected"), HALVES.values(), ids=HALVES)
def test_nodes_and_rules_for_them(shop: Workshop, words: str, expected: str) -> None:
    """The runtime makes a node of the GPU, which it does not let the container open, and none of nvidiactl."""
    node = {"path": "/dev/nvidia1", "type": "c", "major": 195, "minor": 1}
    look = f"{TRY}\n[ -e /dev/nvidiactl ] && echo there || echo missing; try /dev/nvidia1"
    done = hooked(shop, f"--utility --device=0 {words}", look, node)
    assert done.stdout == expected, done.stderr


@pytest.mark.root
def test_process_that_is_no_container(shop: Workshop) -> None:
    rootfs = shop.bundle().rootfs
    done = call(shop.config(A100), "configure", f"--pid={os.getpid()}", "--utility", str(rootfs))
    assert f"container error: process {os.getpid()} has no mount namespace of its own" in done.stderr
    done = call(shop.config(A100), "configure", f"--pid={2**22 + 1}", "--utility", str(rootfs))
    assert f"container error: process {2**22 + 1} of the container is gone" in done.stderr


@pytest.mark.root
def test_who_got_what_is_written_down(shop: Workshop) -> None:
    log = shop.new("audit")
    config = shop.new("toml")
    text = shop.config(A100).read_text()
    config.write_text(text.replace("[nvidia-container-runtime]", f'[nvidia-container-runtime]\ndebug = "{log}"'))
    rootfs = shop.bundle().rootfs
    direct(shop, f"{UTILITY} --device=0", config=config, rootfs=rootfs)
    direct(shop, f"{UTILITY} --device=7", config=config, rootfs=rootfs)
    granted, refused = log.read_text().splitlines()
    start = rf"nvidia-container-cli: GPUs granted: container=\"{rootfs}\" asked_by=\"nvidia-container-cli configure\""
    assert rf"{start} gpus=\"0 ({FIRST})\" capabilities=\"utility\"" in granted
    assert r"GPUs refused: " in refused
    assert "unknown device `7`" in refused


# Security

_LISTENING = """\
import sys
sys.path[:0] = [{hook!r}]
sys.path.append({packages!r})
from nvhook.container import container
from nvhook.commands.containercli.command import main

entered = []

def listen(event, arguments):
    if entered and event == "import":
        sys.stderr.write(f"IMPORT {{arguments[0]}}\\n")
    elif entered and event == "open" and isinstance(arguments[0], str) and arguments[0].startswith("/"):
        if not arguments[0].startswith("/proc/self/fd/"):
            sys.stderr.write(f"OPEN {{arguments[0]}}\\n")

def enter(self, real=container.Container.enter):
    real(self)
    entered.append(self)

container.Container.enter = enter
sys.addaudithook(listen)
status = main(sys.argv[1:], "/nowhere")
sys.stderr.write(f"DONE {{status}} {{len(entered)}}\\n")
import os
os._exit(0)
"""


@pytest.mark.root
@pytest.mark.parametrize("image", ["as-it-is", "in-the-way"])
def test_nothing_is_imported_or_looked_up_after_the_entry(shop: Workshop, image: str) -> None:
    rootfs = shop.bundle().rootfs
    if image == "in-the-way":
        (rootfs / "usr/bin/nvidia-smi").mkdir()
    program = shop.new("listening")
    packages = str(REPOSITORY / "hook/packages")
    program.write_text(_LISTENING.format(hook=str(REPOSITORY / "hook"), packages=packages))
    command = ["/usr/bin/python3", "-IS", str(program), "--config", str(shop.config(A100)), "configure"]
    words = [*UTILITY.split(), "--device=0", str(rootfs)]
    through = own_mounts(f"mount --bind {rootfs} {rootfs}")
    done = subprocess.run([*through, *command, *words], capture_output=True, text=True, timeout=60, check=False)
    assert f"DONE {int(image == 'in-the-way')} 1\n" in done.stderr
    assert "IMPORT" not in done.stderr.replace("IMPORT os\n", "")
    assert "OPEN" not in done.stderr


@pytest.mark.root
def test_environment_is_not_listened_to(shop: Workshop) -> None:
    """LXC's hook has the variables of an image. None of them names a configuration, a file to write, a module, or a
    directory of the multi-process service."""
    host, config = shop.copy_of(A100)
    (host / "driver/mps").mkdir()
    os.mkfifo(host / "driver/mps/control")
    env = {
        "NVHOOK_CONFIG": "/none",
        "NVC_DEBUG_FILE": str(host / "trap"),
        "PYTHONPATH": str(host),
        "PYTHONINSPECT": "1",
        "CUDA_MPS_PIPE_DIRECTORY": "/mps",
    }
    command = [str(CLI), "--config", str(config), "list", "--ipcs"]
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (host / "trap").exists()


# Documentation


@pytest.mark.root
def test_page(shop: Workshop) -> None:
    """Its script too, with this machine's places in it."""
    rootfs, start = shop.bundle().rootfs, shop.new("start")
    (rootfs / "mnt").mkdir()
    places = {
        "nvidia-container-cli ": f"{CLI} --config {shop.config(A100)} ",
        "/srv/rootfs": str(rootfs),
        "/srv/start": str(start),
    }
    page = "nvidia-container-cli.md"
    script = (REPOSITORY / "docs" / page).read_text().partition("```sh\n")[2].partition("```")[0]
    for theirs, ours in places.items():
        script = script.replace(theirs, ours)
    start.write_text(script)
    docpages.check(page, shop.simhost(A100), {str(rootfs): "/srv/rootfs"}, places)
