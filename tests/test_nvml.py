# SPDX-License-Identifier: Apache-2.0
"""nvml.py: what the NVML of simulated hosts answers, and what a library could do that is not NVML at all."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pynvml
import pytest

from conftest import HOSTS
from nvhook.driver import inventory, nvml
from nvhook.errors import ConfigError, DriverError
from nvhook.host import gpus
from nvhook.linux import kernel
from nvhook.request import config as configuration
from nvhook.request.config import Config
from simhost.build import build

A100 = json.loads((HOSTS / "a100x2-debian12.json").read_text())
A100_UUIDS = ["GPU-c41d7b52-93e6-4f0a-8d15-2b7e60a9f3c8", "GPU-08e5f9a3-1c6b-42d7-b0f4-e95d3187ac26"]
MIGS = ["MIG-5e0c7f1a-93b2-5d48-8a61-c24fe7039b15", "MIG-a1f4d620-7b3e-5c99-b058-39e6d2c8470f"]


def _config(host: Path) -> Config:
    return configuration.load(str(host / "config.toml"))


def _library(host: Path) -> str:
    """As the inventory has it: the 64-bit one, without links."""
    config = _config(host)
    driver = inventory.load(config, gpus.read(config.proc_root).driver_version, [], keep=False)
    return inventory.nvml_library(driver)


# Answers


@pytest.mark.root
@pytest.mark.parametrize(
    ("name", "cuda", "arch", "brands"),
    [
        ("a100x2", "12.4", "8.0", ["nvidia", "nvidia"]),
        ("h200", "13.0", "9.0", ["nvidia"]),
        ("h100x8", "12.8", "9.0", ["nvidia"] * 8),
        ("workstation-debian12", "12.2", "8.6", ["nvidiartx"]),
    ],
)
def test_ask_simulated_host(simhost: Callable[[str], Path], name: str, cuda: str, arch: str, brands: list[str]) -> None:
    """Its devices and /proc are in a place of their own."""
    host = simhost(name)
    report = nvml.ask(_config(host), _library(host))
    (path,) = HOSTS.glob(f"{name}*.json")
    described = json.loads(path.read_text())["gpus"]
    assert cuda == report.cuda
    assert [
        (gpu["uuid"], gpu["pci_bus_id"][4:].lower(), arch, brand) for gpu, brand in zip(described, brands, strict=True)
    ] == [(item.uuid, item.pci, item.arch, item.brand) for item in report.devices]
    assert not any(item.mig_enabled or item.instances for item in report.devices)


@pytest.mark.root
def test_ask_below_a_directory_that_only_root_may_enter(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    build(A100, tmp_path / "host")
    report = nvml.ask(_config(tmp_path / "host"), _library(tmp_path / "host"))
    assert [item.uuid for item in report.devices] == A100_UUIDS


@pytest.mark.root
def test_ask_mig(tmp_path: Path) -> None:
    description = copy.deepcopy(A100)
    description["gpus"][1]["mig"] = [
        {"gi": 3, "ci": 0, "profile": "2g.10gb", "uuid": MIGS[0]},
        {"gi": 9, "ci": 1, "profile": "1g.5gb", "uuid": MIGS[1]},
    ]
    build(description, tmp_path)
    first, second = nvml.ask(_config(tmp_path), _library(tmp_path)).devices
    assert (first.mig_enabled, first.instances) == (False, ())
    assert second.mig_enabled
    assert [(item.index, item.gi, item.ci, item.uuid) for item in second.instances] == [
        (0, 3, 0, MIGS[0]),
        (1, 9, 1, MIGS[1]),
    ]


@pytest.mark.root
def test_ask_without_the_driver_s_node(tmp_path: Path) -> None:
    """The text of NVML itself."""
    build(A100, tmp_path)
    (tmp_path / "dev/nvidiactl").unlink()
    library = _library(tmp_path)
    assert _error(_config(tmp_path), library) == (
        f"driver error: ask `{library}`: NVML: driver Not Loaded; see whether `nvidia-smi` works on this host"
    )


@pytest.mark.root
def test_ask_leaves_out_a_gpu_that_is_lost(tmp_path: Path) -> None:
    build(A100, tmp_path)
    (tmp_path / "dev/nvidia1").unlink()
    assert [A100_UUIDS[1]] == [item.uuid for item in nvml.ask(_config(tmp_path), _library(tmp_path)).devices]


@pytest.mark.root
def test_ask_changes_no_mount_of_the_host(simhost: Callable[[str], Path]) -> None:
    """Where mounts are shared, as systemd makes them, so that a new one would be seen by everybody."""
    host = simhost("a100x2")
    library = _library(host)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        said = b"the child failed"
        try:
            kernel.unshare(kernel.CLONE_NEWNS)
            kernel.mount("none", "/", None, kernel.MS_REC | 1 << 20)  # MS_SHARED
            before = Path("/proc/self/mountinfo").read_bytes()
            nvml.ask(_config(host), library)
            with contextlib.suppress(DriverError):  # this machine has no such GPUs, but it has the mounts
                nvml.ask(configuration.load("/nonexistent"), library)
            same = Path("/proc/self/mountinfo").read_bytes() == before and b" shared:" in before
            said = b"same" if same else b"changed"
        finally:
            os.write(writing, said)
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == "same"
    os.waitpid(child, 0)


_ASK = """
import json, sys
from nvhook.request import config
from nvhook import errors
from nvhook.driver import nvml
try:
    print(json.dumps(nvml.ask(config.load(sys.argv[1]), sys.argv[2]).describe()))
except errors.NvhookError as error:
    print(error)
"""

USERS = {
    "root-of-a-user-namespace": ("unshare", "-Ur"),
    "ordinary-user": ("setpriv", "--reuid", "1234", "--regid", "1234", "--clear-groups"),
    "root-of-an-ordinary-user": (
        *("setpriv", "--reuid", "1234", "--regid", "1234", "--clear-groups"),
        *("unshare", "-Ur"),
    ),
}


@pytest.mark.root
@pytest.mark.parametrize("through", USERS.values(), ids=USERS)
def test_ask_as_another_user(through: tuple[str, ...]) -> None:
    """Rootless engines, and people who look at a plan. They have no more ids than their own."""
    if subprocess.run([*through, "unshare", "-Urm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine's users may have no user namespaces")
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        place.chmod(0o755)
        build(A100, place / "host")
        shutil.copytree(Path(nvml.__file__).parents[1], place / "modules/nvhook")
        shutil.copy(str(pynvml.__file__), place / "modules")
        words = ["/usr/bin/python3", "-c", _ASK, str(place / "host/config.toml"), _library(place / "host")]
        environment = {"PYTHONPATH": str(place / "modules"), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run([*through, *words], env=environment, cwd="/", capture_output=True, text=True, check=True)
        assert [item["uuid"] for item in json.loads(done.stdout)["devices"]] == A100_UUIDS


@pytest.mark.root
@pytest.mark.parametrize("kind", ["directory", "file", "not-elf"])
def test_ask_without_a_library(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "lib/libnvidia-ml.so.1"
    if kind != "directory":
        path.parent.mkdir()
    if kind == "not-elf":
        path.write_text("GROUP ( libnvidia-ml.so.2 )")
    line = _error(configuration.load("/nonexistent"), str(path))
    assert {
        "directory": f"driver error: open the directory of `{path}`: no such file or directory; reinstall the driver",
        "file": f"ask `{path}`: NVML: ./libnvidia-ml.so.1: cannot open shared object file: No such file or directory",
        "not-elf": f"ask `{path}`: NVML: ./libnvidia-ml.so.1: ",
    }[kind] in line


def _error(config: Config, library: str) -> str:
    begin = time.monotonic()
    with pytest.raises(DriverError) as raised:
        nvml.ask(config, library)
    assert time.monotonic() - begin < nvml._SECONDS + 1
    line = str(raised.value)
    assert "\n" not in line
    assert len(line) < 1600
    return line


# Libraries that are not NVML


# What NVML has, so far as it is called, with the values that an attack replaces.
_LIBRARY = r"""
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef COUNT
#define COUNT 1
#endif
#ifndef CUDA
#define CUDA 12040
#endif
#ifndef UUID
#define UUID strcpy(uuid, "GPU-1")
#endif

extern char **environ;

struct pci { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; };

ATTACK

int nvmlInitWithFlags(unsigned flags) { (void)flags; attack(); return 0; }
int nvmlSystemGetCudaDriverVersion(int *version) { *version = CUDA; return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = COUNT; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = (void *)(index + 1L); return 0; }
int nvmlDeviceGetPciInfo_v3(void *device, struct pci *pci) { (void)device; memset(pci, 0, sizeof *pci); return 0; }
int nvmlDeviceGetUUID(void *device, char *uuid, unsigned length) { (void)device; (void)length; UUID; return 0; }
int nvmlDeviceGetBrand(void *device, int *brand) { (void)device; *brand = 2; return 0; }
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor)
{ (void)device; *major = 7; *minor = 5; return 0; }
"""


def _compiled(directory: Path, attack: str, *defines: str) -> str:
    """A library whose nvmlInit does `attack`, C statements; `defines` as the compiler takes them."""
    directory = directory / "driver"  # whose modes are the usual ones; those above it may be as they are
    directory.mkdir()
    source = directory / "nvml.c"
    source.write_text(
        _LIBRARY.replace("ATTACK", attack if "attack(" in attack else f"static void attack(void) {{ {attack} }}")
    )
    path = directory / "libnvidia-ml.so.1"
    command = ["cc", "-shared", "-fPIC", "-O1", *defines, "-o", str(path), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return str(path)


@pytest.fixture
def defaults(monkeypatch: pytest.MonkeyPatch) -> Config:
    """NVIDIA's defaults on this machine, and a deadline that a test can wait for."""
    monkeypatch.setattr(nvml, "_SECONDS", 2)
    return configuration.load("/nonexistent")


@pytest.mark.root
def test_ask_library_made_here(tmp_path: Path, defaults: Config) -> None:
    """An older driver: no MIG in it. What follows differs from this by its attack alone."""
    report = nvml.ask(defaults, _compiled(tmp_path, 'printf("chatter");'))
    assert report.describe() == {
        "cuda": "12.4",
        "devices": [
            {
                "pci": "0000:00:00.0",
                "uuid": "GPU-1",
                "brand": "tesla",
                "arch": "7.5",
                "mig_enabled": False,
                "instances": [],
            }
        ],
    }


_SPY = r"""
static void status(const char *name)
{
    char line[256];
    FILE *file = fopen("/proc/self/status", "r");
    while (file && fgets(line, sizeof line, file))
        if (strncmp(line, name, strlen(name)) == 0 && line[strlen(name)] == ':')
            printf(" %s=%s", name, strtok(line + strlen(name) + 1, " \t\n"));
    if (file)
        fclose(file);
}

static void attack(void)
{
    struct if_nameindex *interface = if_nameindex();
    struct dirent *entry;
    struct rlimit limit;
    int variables = 0, descriptors = 0, processes = 0, others = 0;
    DIR *proc = opendir("/proc");
    while (environ[variables])
        variables++;
    while (proc && (entry = readdir(proc)))
        processes += entry->d_name[0] >= '1' && entry->d_name[0] <= '9';
    closedir(proc);
    for (int i = 3; i < 4096; i++)
        descriptors += fcntl(i, F_GETFD) != -1;
    while (interface && interface->if_index)
        others += strcmp((interface++)->if_name, "lo") != 0;
    printf("\nuid=%d gid=%d groups=%d", getuid(), getgid(), getgroups(0, 0));
    status("CapInh"); status("CapPrm"); status("CapEff"); status("CapBnd"); status("CapAmb"); status("NoNewPrivs");
    printf(" pid=%d processes=%d env=%d fds=%d interfaces=%d", getpid(), processes, variables, descriptors, others);
    printf(" secret=%d", open(PLACE "/secret", O_RDONLY));
    printf(" write=%d", open(PLACE "/public/canary", O_WRONLY | O_TRUNC));
    printf(" create=%d", open(PLACE "/public/new", O_CREAT | O_WRONLY, 0666));
    printf(" unlink=%d", unlink(PLACE "/public/canary"));
    printf(" shm=%d", open("/dev/shm/nvhook-test", O_CREAT | O_WRONLY, 0666));
    printf(" signal=%d trace=%ld root=%d", kill(1, SIGKILL), ptrace(PTRACE_ATTACH, 1, 0, 0), setuid(0));
    printf(" mem=%d", open("/proc/1/mem", O_RDWR));
    getrlimit(RLIMIT_CORE, &limit);
    printf(" core=%ld\n", (long)limit.rlim_max);
    fflush(stdout);
    _exit(127);
}
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """With a file that only root may read, and a directory and a file that anybody may write: modes alone stand in the
    way, not the directories above."""
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        directory.chmod(0o755)
        (directory / "secret").write_text("secret")
        (directory / "secret").chmod(0o600)
        (directory / "public").mkdir()
        (directory / "public").chmod(0o777)
        (directory / "public/canary").write_text("untouched")
        (directory / "public/canary").chmod(0o666)
        yield directory


@pytest.mark.root
@pytest.mark.parametrize(
    ("user", "uid", "gid"),
    [("", 65534, 65534), ("1234:5678", 1234, 5678), ("daemon", 1, 1), ("daemon:bin", 1, 2), ("0:0", 0, 0)],
)
def test_library_is_confined(place: Path, defaults: Config, user: str, uid: int, gid: int) -> None:
    """No capability and no way to one, nothing of the host's processes, and nothing that it could write to."""
    defaults.user = user
    line = _error(defaults, _compiled(place, _SPY, f'-DPLACE="{place}"'))
    said = line[line.index("uid=") : line.rindex(";")]
    facts = dict(word.split("=") for word in said.split())
    zero = "0" * 16
    root = uid == 0  # the owner of the secret, but it can write no more than the others
    assert facts == {
        "uid": str(uid),
        "gid": str(gid),
        "groups": "0",
        **dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), zero),
        "NoNewPrivs": "1",
        "pid": "2",
        "processes": "2",
        "env": "0",
        "fds": "0",
        "interfaces": "0",
        "secret": facts["secret"] if root else "-1",
        "write": "-1",
        "create": "-1",
        "unlink": "-1",
        "shm": "-1",
        "signal": "0" if root else "-1",
        "trace": "-1",
        "root": "0" if root else "-1",
        "mem": "-1",
        "core": "0",
    }
    assert (place / "public/canary").read_text() == "untouched"
    assert os.listdir(place / "public") == ["canary"]
    assert not os.path.exists("/dev/shm/nvhook-test")


@pytest.mark.root
@pytest.mark.parametrize("user", ["1234", "nobody-has-this-name", "root:nobody-has-this-name"])
def test_ask_as_a_user_that_there_is_not(defaults: Config, user: str) -> None:
    """A number needs a group beside it, unless the host knows it."""
    defaults.user = user
    with pytest.raises(ConfigError) as raised:
        nvml.ask(defaults, "/nonexistent/libnvidia-ml.so.1")
    assert str(raised.value) == (
        f"config error: ``: `nvidia-container-cli.user` = `{user}` names no user or group of this host; "
        "write numbers, uid:gid, or take the line out"
    )


@pytest.mark.root
def test_library_cannot_write_where_the_kernel_cannot_make_all_read_only(
    place: Path, defaults: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*_: object, **__: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(kernel, "mount_setattr", lacking)
    attack = 'int fd = open(PLACE "/public/canary", O_WRONLY); char text[] = "x";'
    attack += 'printf("\\n%d %zd\\n", fd >= 0, write(fd, text, 1)); fflush(stdout); _exit(127);'
    assert ": 1 -1; " in _error(defaults, _compiled(place, attack, f'-DPLACE="{place}"'))
    assert (place / "public/canary").read_text() == "untouched"


_STAY = "prctl(PR_SET_PDEATHSIG, 0); setsid(); prctl(PR_SET_NAME, MARK);"
_MARK = f"nvml{os.getpid()}"

ATTACKS = {
    "waits": (f"{_STAY} for (;;) pause();", "NVML: no answer within 2 s"),
    "waits-in-another-process": (f"if (fork()) _exit(0); {_STAY} for (;;) pause();", "NVML: no answer; "),
    "spins": (f"{_STAY} for (;;);", "NVML: "),
    "ignores-signals": (
        f"{_STAY} for (int i = 1; i < 65; i++) signal(i, SIG_IGN); for (;;) pause();",
        "NVML: no answer within 2 s",
    ),
    "forks": (f"{_STAY} for (;;) if (fork() < 0) pause();", "NVML: no answer within 2 s"),
    "prints": (f'{_STAY} for (;;) puts("x");', "NVML: no answer within 2 s"),
    "prints-much": (
        "static char text[1 << 16]; for (int i = 0; i < 20; i++) write(1, text, sizeof text); _exit(0);",
        "NVML: more than 1048576",
    ),
    "prints-a-long-line": (
        'for (int i = 0; i < 9999; i++) printf("\\033]0;x"); fflush(stdout); _exit(127);',
        "`: \\x1b]0;x\\x1b]0;x",
    ),
    "crashes": ("raise(SIGSEGV);", "NVML: killed by signal 11"),
    "aborts": ("abort();", "NVML: killed by signal 6"),
    "kills-everybody": ("kill(-1, SIGKILL); kill(0, SIGKILL);", "NVML: killed by signal 9"),
    "ends": ("_exit(0);", "NVML: no answer"),
    "ends-badly": ("_exit(3);", "NVML: ended with status 3"),
    "closes-its-streams": ("for (int i = 0; i < 3; i++) close(i);", "NVML: no answer"),
    "wants-memory": (
        'if (!malloc(4L << 30)) { puts("none left"); fflush(stdout); _exit(127); }',
        "none left",
    ),
    "answers-nonsense": ('puts("{"); fflush(stdout); _exit(0);', "NVML: no answer to be believed: "),
    "answers-a-number": (
        'puts("1"); fflush(stdout); _exit(0);',
        "NVML: no answer to be believed: the answer is no object",
    ),
    "answers-deeply": (
        'for (int i = 0; i < 99999; i++) putchar(91); puts(""); fflush(stdout); _exit(0);',
        "NVML: no answer to be believed: ",
    ),
}


@pytest.mark.root
@pytest.mark.parametrize(("attack", "message"), ATTACKS.values(), ids=ATTACKS)
def test_library_that_misbehaves(tmp_path: Path, defaults: Config, attack: str, message: str) -> None:
    """One line within the deadline, and nothing of it is left."""
    line = _error(defaults, _compiled(tmp_path, attack, f'-DMARK="{_MARK}"'))
    assert message in line
    assert line.startswith(f"driver error: ask `{tmp_path}/driver/libnvidia-ml.so.1`: ")
    end = time.monotonic() + 2  # the kernel takes a moment to end a namespace
    while _MARK in _names_of_processes():
        assert time.monotonic() < end
        time.sleep(0.01)


def _names_of_processes() -> set[str]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):  # it has ended since
            found.add(path.read_text().strip())
    return found


@pytest.mark.root
def test_library_that_forks_is_bounded_in_number(tmp_path: Path, defaults: Config) -> None:
    attack = "int count = 0, child; while (count < 5000 && (child = fork()) >= 0) { if (!child) pause(); count++; }"
    attack += 'printf("\\n%s\\n", count < 64 ? "few" : "many"); fflush(stdout); _exit(127);'
    assert ": few; " in _error(defaults, _compiled(tmp_path, attack))


LIES = {
    "cuda-negative": ("-DCUDA=-1", "`cuda` is `-1.99`"),
    "cuda-large": ("-DCUDA=2000000000", "`cuda` is `2000000.0`"),
    "uuid-without-end": ("-DUUID=memset(uuid, 65, length)", "`uuid` is `AAAA"),
    "uuid-empty": ("-DUUID=uuid[0] = 0", "`uuid` is ``"),
    "uuid-with-an-escape": ('-DUUID=strcpy(uuid, "GPU-\\033[2J")', "`uuid` is `GPU-\\x1b[2J`"),
    "uuid-with-a-path": ('-DUUID=strcpy(uuid, "GPU-../../etc")', "`uuid` is `GPU-../../etc`"),
    "uuid-in-two-lines": ('-DUUID=strcpy(uuid, "GPU-1\\n")', "`uuid` is `GPU-1\\n`"),
    "uuid-not-text": ('-DUUID=strcpy(uuid, "GPU-\\377")', "NVML: UnicodeDecodeError"),
}


@pytest.mark.root
@pytest.mark.parametrize(("define", "message"), LIES.values(), ids=LIES)
def test_library_that_lies(tmp_path: Path, defaults: Config, define: str, message: str) -> None:
    assert message in _error(defaults, _compiled(tmp_path, "", define))


@pytest.mark.root
def test_library_with_gpus_without_number(tmp_path: Path, defaults: Config) -> None:
    assert len(nvml.ask(defaults, _compiled(tmp_path, "", "-DCOUNT=4000000000")).devices) == 256


# What is believed

GOOD: dict[str, Any] = {
    "cuda": "12.4",
    "devices": [
        {
            "pci": "0000:07:00.0",
            "uuid": "GPU-c41d7b52-93e6-4f0a-8d15-2b7e60a9f3c8",
            "brand": "nvidia",
            "arch": "8.0",
            "mig_enabled": True,
            "instances": [{"index": 0, "gi": 1, "ci": 0, "uuid": "MIG-GPU-c41d7b52/1/0"}],
        }
    ],
}


def test_parse_is_the_reverse_of_describe() -> None:
    assert nvml.parse(GOOD).describe() == GOOD


@pytest.mark.parametrize(
    ("place", "value"),
    [
        pytest.param((), None, id="null"),
        pytest.param((), [GOOD], id="list"),
        pytest.param((), {}, id="empty"),
        pytest.param(("cuda",), 12.4, id="cuda-number"),
        pytest.param(("cuda",), "12", id="cuda-short"),
        pytest.param(("cuda",), "12.4\n", id="cuda-newline"),
        pytest.param(("cuda",), "12.\u0664", id="cuda-arabic-digit"),
        pytest.param(("devices",), {}, id="devices-object"),
        pytest.param(("devices",), [1], id="device-number"),
        pytest.param(("devices",), [{}], id="device-empty"),
        pytest.param(("devices",), GOOD["devices"] * 257, id="devices-many"),
        pytest.param(("devices", 0, "pci"), "0000:07:00", id="pci-short"),
        pytest.param(("devices", 0, "pci"), "0000:0A:00.0", id="pci-capitals"),
        pytest.param(("devices", 0, "pci"), "../../../07:00.0", id="pci-path"),
        pytest.param(("devices", 0, "uuid"), "GPU-" + "a" * 65, id="uuid-long"),
        pytest.param(("devices", 0, "uuid"), "GPU-?", id="uuid-unknown"),
        pytest.param(("devices", 0, "uuid"), "MIG-a", id="uuid-of-mig"),
        pytest.param(("devices", 0, "brand"), "Tesla", id="brand-capital"),
        pytest.param(("devices", 0, "brand"), None, id="brand-null"),
        pytest.param(("devices", 0, "arch"), "8", id="arch-short"),
        pytest.param(("devices", 0, "mig_enabled"), 1, id="mig-number"),
        pytest.param(("devices", 0, "instances"), None, id="instances-null"),
        pytest.param(("devices", 0, "instances", 0, "index"), True, id="index-true"),
        pytest.param(("devices", 0, "instances", 0, "gi"), -1, id="gi-negative"),
        pytest.param(("devices", 0, "instances", 0, "ci"), 1 << 16, id="ci-large"),
        pytest.param(("devices", 0, "instances", 0, "uuid"), "GPU-a", id="instance-uuid-of-gpu"),
    ],
)
def test_parse_refuses(place: tuple[str | int, ...], value: object) -> None:
    document: Any = {"": copy.deepcopy(GOOD)}
    here = document
    *way, last = ("", *place)
    for step in way:
        here = here[step]
    here[last] = value
    with pytest.raises(ValueError, match="is "):
        nvml.parse(document[""])


def test_parse_what_nvml_does_not_tell() -> None:
    document = copy.deepcopy(GOOD)
    document["devices"][0].update(brand="", arch="", instances=[])
    assert nvml.parse(document).describe() == document
