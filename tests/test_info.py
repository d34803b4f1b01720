# SPDX-License-Identifier: Apache-2.0
"""`nvhook info` on simulated hosts: what it shows, that it shows something whatever is missing, and `--watch`."""

from __future__ import annotations

import copy
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rich

import docpages
from conftest import HOSTS
from nvhook import cli
from nvhook.commands import terminal
from nvhook.commands.info import command as info
from simhost.build import build

A100 = json.loads((HOSTS / "a100x2-debian12.json").read_text())
REPOSITORY = Path(__file__).parent.parent
NVHOOK = REPOSITORY / "scripts/nvhook"
Info = Callable[..., str]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Info:
    """`nvhook info` on the host in that directory; what it prints."""

    def run(host: Path, *words: str, warning: str = "") -> str:
        assert cli.main(["info", *words], str(host / "config.toml")) == 0
        printed = capfd.readouterr()
        assert warning in printed.err
        assert bool(printed.err) == bool(warning)
        return printed.out

    return run


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """The two A100, to be damaged."""
    build(A100, tmp_path / "host")
    return tmp_path / "host"


def _json(text: str) -> Any:
    return json.loads(text)


def _listing(place: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_mtime_ns) for path in place.rglob("*"))


@pytest.mark.root
def test_page_is_true(simhost: Callable[[str], Path]) -> None:
    docpages.check("info.md", simhost("a100x2"), {})


@pytest.mark.root
def test_info_touches_nothing(host: Path, run: Info) -> None:
    before = _listing(host)
    run(host)
    assert before == _listing(host)


@pytest.mark.root
def test_info_json(host: Path, run: Info) -> None:
    document = _json(run(host, "--json"))
    first, second = document.pop("gpus")
    assert document.pop("processes")[1]["container"]["engine"] == "docker"
    assert document == {
        "host": "linux",
        "driver": {"version": "550.163.01", "module": "proprietary"},
        "cuda": "12.4",
        "hidden_processes": 0,
        "missing": [],
    }
    assert first == {
        "index": 0,
        "minor": 1,
        "uuid": A100["gpus"][0]["uuid"],
        "pci": "0000:07:00.0",
        "name": "NVIDIA A100-SXM4-40GB",
        "brand": "nvidia",
        "compute_capability": "8.0",
        "mig_enabled": False,
        "memory_used": 31207 << 20,
        "memory_total": 40960 << 20,
        "load": 97,
        "temperature": 64,
        "mig_devices": [],
    }
    assert (second["index"], second["minor"], second["load"]) == (1, 0, 0)


@pytest.mark.root
def test_info_mig_devices(simhost: Callable[[str], Path], run: Info) -> None:
    host = simhost("a100x8")
    gpus = _json(run(host, "--json"))["gpus"]
    assert [len(gpu["mig_devices"]) for gpu in gpus] == [7, 4, 1, 3, 0, 0, 0, 0]
    assert [gpu["mig_enabled"] for gpu in gpus] == [True] * 5 + [False] * 3
    assert gpus[3]["mig_devices"][1] == {
        "index": 1,
        "gi": 1,
        "ci": 1,
        "uuid": "MIG-eefa183d-6954-5226-8fe3-2e6550da3d1e",
        "profile": "2c.3g.40gb",
        "memory_used": 512 << 20,
        "memory_total": 16384 << 20,
    }
    line = "3:1  2c.3g.40gb   0.5 of 16.0    1/1  MIG-eefa183d-6954-5226-8fe3-2e6550da3d1e"
    assert line in run(host)


@pytest.mark.root
def test_info_open_module(simhost: Callable[[str], Path], run: Info) -> None:
    assert run(simhost("h200")).startswith("Linux, driver 580.159.04 (open kernel module), CUDA 13.0\n")


@pytest.mark.root
def test_info_wsl(simhost: Callable[[str], Path], run: Info) -> None:
    """NVML alone knows the GPUs there, and the driver's version."""
    document = _json(run(simhost("wsl2"), "--json"))
    assert (document["host"], document["driver"]["version"], document["missing"]) == ("wsl2", "581.29", [])
    (gpu,) = document["gpus"]
    assert (gpu["minor"], gpu["name"], gpu["load"]) == (None, "NVIDIA GeForce RTX 4080", 7)


# What is missing


CARD = {"/sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n", "/sys/bus/pci/devices/0000:01:00.0/class": "0x030200\n"}
AUDIO = {
    "/sys/bus/pci/devices/0000:01:00.1/vendor": "0x10de\n",
    "/sys/bus/pci/devices/0000:01:00.1/class": "0x040300\n",
}


@pytest.mark.root
@pytest.mark.parametrize(
    ("sys", "line"),
    [
        pytest.param(AUDIO, "No NVIDIA GPU on the PCI bus, and no driver", id="no-gpu"),
        pytest.param({**CARD, **AUDIO}, "1 NVIDIA GPU on the PCI bus, and no driver", id="gpu"),
    ],
)
def test_info_without_a_driver(tmp_path: Path, run: Info, sys: dict[str, str], line: str) -> None:
    description = json.loads((HOSTS / "no-driver.json").read_text())
    build({**description, "sys": sys}, tmp_path)
    shown = run(tmp_path)
    assert shown.startswith(line)
    assert shown.endswith("load it with `modprobe nvidia`, or install the NVIDIA driver on this host.\n")
    assert shown.count("\n") == 1
    document = _json(run(tmp_path, "--json"))
    (missing,) = document.pop("missing")
    assert "the nvidia kernel module is not loaded" in missing
    assert document == {
        "host": "none",
        "driver": None,
        "cuda": None,
        "gpus": [],
        "processes": [],
        "hidden_processes": 0,
    }


@pytest.mark.root
def test_info_driver_without_a_gpu(host: Path, run: Info) -> None:
    shutil.rmtree(host / "proc/driver/nvidia/gpus")
    shown = run(host)
    assert shown.startswith("Linux, driver 550.163.01")
    assert "The driver has no GPU; see `dmesg | grep -i nvrm`.\n" in shown


def _without_uvm(host: Path) -> None:
    devices = host / "proc/devices"
    devices.write_text("".join(line for line in devices.read_text().splitlines(True) if "nvidia-uvm" not in line))


def _without_a_library(name: str) -> Callable[[Path], None]:
    def remove(host: Path) -> None:
        for path in (host / "driver/usr/lib/x86_64-linux-gnu").glob(f"{name}.so*"):
            path.unlink()

    return remove


def _without_libraries(host: Path) -> None:
    _without_a_library("libnvidia*")(host)
    _without_a_library("libcuda")(host)
    shutil.rmtree(host / "driver/usr")


@pytest.mark.root
@pytest.mark.parametrize(
    ("damage", "missing"),
    [
        pytest.param(
            _without_uvm,
            ["the nvidia-uvm kernel module is not loaded; load it with `modprobe nvidia-uvm`"],
            id="nvidia-uvm",
        ),
        pytest.param(
            lambda host: (host / "dev/nvidia-uvm").unlink(),
            ["no /dev/nvidia-uvm; the first container that gets them makes them"],
            id="node",
        ),
        pytest.param(
            _without_a_library("libcuda"),
            [
                "no libcuda.so.1 of driver 550.163.01, so no container gets `compute`; "
                "install the driver package that holds it"
            ],
            id="libcuda",
        ),
        pytest.param(
            lambda host: (host / "dev/nvidia1").unlink(),
            [
                "no /dev/nvidia1; the first container that gets them makes them",
                "GPU 0 (0000:07:00.0) does not answer NVML; see `dmesg | grep -i -e nvrm -e xid`",
            ],
            id="gpu-that-is-lost",
        ),
    ],
)
def test_info_says_what_is_missing(host: Path, run: Info, damage: Callable[[Path], None], missing: list[str]) -> None:
    damage(host)
    document = _json(run(host, "--json"))
    assert document["missing"] == missing
    assert [gpu["index"] for gpu in document["gpus"]] == [0, 1]


@pytest.mark.root
@pytest.mark.parametrize(
    ("damage", "why"),
    [
        pytest.param(
            _without_a_library("libnvidia-ml"), "driver 550.163.01 on this host has no libnvidia-ml", id="file"
        ),
        pytest.param(lambda host: (host / "dev/nvidiactl").unlink(), "NVML: driver Not Loaded; see", id="node"),
        pytest.param(_without_libraries, "", id="no-libraries-at-all"),
    ],
)
def test_info_without_nvml(host: Path, run: Info, damage: Callable[[Path], None], why: str) -> None:
    """What /proc and the driver's version tell is there all the same."""
    damage(host)
    document = _json(run(host, "--json"))
    assert document["cuda"] == "12.4"
    assert [(gpu["uuid"], gpu["load"]) for gpu in document["gpus"]] == [(gpu["uuid"], None) for gpu in A100["gpus"]]
    assert any(why in text for text in document["missing"])
    assert "  0  NVIDIA A100-SXM4-40GB             -     -     -  -" in run(host)


@pytest.mark.root
def test_info_learns_a_uuid_from_nvml(tmp_path: Path, run: Info) -> None:
    description = copy.deepcopy(A100)
    for path, text in description["proc"].items():
        description["proc"][path] = text.replace(A100["gpus"][0]["uuid"], "GPU-????????-????-????-????-????????????")
    build(description, tmp_path)
    gpus = _json(run(tmp_path, "--json"))["gpus"]
    assert [gpu["uuid"] for gpu in gpus] == [gpu["uuid"] for gpu in A100["gpus"]]


@pytest.mark.root
@pytest.mark.parametrize(
    "content", ["", "{", '{"origin": {"format": 3}', "[]", '{"origin": {"format": 1}}', "\xff" * 9]
)
@pytest.mark.parametrize("name", ["inventory.json", "nvml.json"])
def test_info_does_not_mind_what_was_kept(host: Path, run: Info, name: str, content: str) -> None:
    (host / "run").mkdir()
    (host / "run" / name).write_text(content, encoding="latin-1")
    assert _json(run(host, "--json"))["missing"] == []


@pytest.mark.root
@pytest.mark.parametrize(("uid", "remedy"), [(0, "\n"), (1000, "; run it as root to see all\n")], ids=["root", "user"])
def test_info_processes_that_are_closed(
    host: Path, run: Info, monkeypatch: pytest.MonkeyPatch, uid: int, remedy: str
) -> None:
    """As for an ordinary user, or where a security module is in the way."""
    monkeypatch.setattr("nvhook.commands.info.processes._minors", _forbidden)
    monkeypatch.setattr("nvhook.commands.info.overview.os.geteuid", lambda: uid)
    document = _json(run(host, "--json", warning=f"nvhook: warning: 3 processes could not be inspected{remedy}"))
    assert (document["processes"], document["hidden_processes"]) == ([], 3)


def _forbidden(_: str) -> None:
    raise PermissionError


@pytest.mark.root
def test_info_as_an_ordinary_user() -> None:
    """With a state directory that only root may enter, installed: the source tree may be closed to him."""
    user = ["setpriv", "--reuid", "1234", "--regid", "1234", "--clear-groups"]
    if subprocess.run([*user, "unshare", "-Urm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine's users may have no user namespaces")
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        place.chmod(0o755)
        host = place / "host"
        build(A100, host)
        (host / "run").mkdir(mode=0o700)
        script = str(REPOSITORY / "scripts/install")
        subprocess.run([script, "install", str(place / "prefix"), str(place / "etc")], check=True)
        environment = {**os.environ, "NVHOOK_CONFIG": str(host / "config.toml")}
        words = [*user, str(place / "prefix/bin/nvhook"), "info", "--json"]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert [gpu["load"] for gpu in json.loads(done.stdout)["gpus"]] == [97, 0]


HOSTILE = "\x1b[2J[red]:x:\u202e"


@pytest.mark.root
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_info_prints_no_control_characters(host: Path, encoding: str) -> None:
    """The name of a container's process; nothing in it is markup, and no terminal has to know its letters."""
    (host / "proc/20417/comm").write_text(f"{HOSTILE}é\n")
    environment = {**os.environ, "NVHOOK_CONFIG": str(host / "config.toml"), "PYTHONIOENCODING": encoding}
    words = ["python3", str(NVHOOK), "info"]  # its own first line has -I, which would not hear PYTHONIOENCODING
    done = subprocess.run(words, env=environment, capture_output=True, check=True)
    name = {"utf-8": "é".encode(), "ascii": b"\\xe9"}[encoding]
    assert b"\\x1b[2J[red]:x:\\u202e" + name + b" " in done.stdout
    assert b"\x1b" not in done.stdout


@pytest.mark.root
@pytest.mark.parametrize("columns", ["80", "40", "1"])
def test_info_narrow_window(host: Path, run: Info, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    lines = run(host).splitlines()
    assert columns == "1" or max(map(len, lines)) <= int(columns)
    if columns == "80":
        assert any(line.split()[1:2] == [A100["gpus"][0]["uuid"]] for line in lines)


# --watch


def _start(host: Path, *words: str, out: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "NVHOOK_CONFIG": str(host / "config.toml"), "TERM": "xterm", "COLUMNS": "100"}
    return subprocess.Popen([NVHOOK, "info", *words], stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment)


def _read_until(fd: int, is_enough: Callable[[bytes], bool]) -> bytes:
    text = b""
    end = time.monotonic() + 30
    while not is_enough(text) and time.monotonic() < end:
        if select.select([fd], [], [], 1)[0]:
            text += os.read(fd, 1 << 16)
    assert is_enough(text), text
    return text


def _interrupt(child: subprocess.Popen[bytes], fd: int) -> bytes:
    """What it still says; it has to end, and well."""
    child.send_signal(signal.SIGINT)
    assert child.wait(15) == 0
    text = b""
    while select.select([fd], [], [], 0)[0]:
        try:
            chunk = os.read(fd, 1 << 16)
        except OSError:  # a terminal without anybody on the other side
            break
        if not chunk:
            break
        text += chunk
    return text


@pytest.mark.root
def test_watch_without_a_terminal(host: Path) -> None:
    reading, writing = os.pipe()
    child = _start(host, "--watch", "0.1", out=writing)
    os.close(writing)
    text = _read_until(reading, lambda text: text.count(b"Linux, driver") >= 3)
    text += _interrupt(child, reading)
    os.close(reading)
    assert b"\x1b" not in text
    assert b"Traceback" not in text
    assert text.count(b"docker 4f1b9e06c2d7") >= 2


@pytest.mark.root
def test_watch_json_is_one_object_a_line(host: Path) -> None:
    """The same each time, what is missing included."""
    _without_a_library("libcuda")(host)
    reading, writing = os.pipe()
    child = _start(host, "--watch", "0.1", "--json", out=writing)
    os.close(writing)
    text = _read_until(reading, lambda text: text.count(b"\n") >= 2)
    _interrupt(child, reading)
    os.close(reading)
    first, second = (json.loads(line) for line in text.splitlines()[:2])
    assert first == second
    assert first["gpus"][0]["load"] == 97
    assert "no libcuda.so.1" in first["missing"][0]


@pytest.mark.root
def test_watch_on_a_terminal_stays_in_its_place(host: Path) -> None:
    terminal_fd, theirs = pty.openpty()
    child = _start(host, "--watch", "0.1", out=theirs)
    os.close(theirs)
    text = _read_until(terminal_fd, lambda text: text.count(b"Linux, driver") >= 3)
    text += _interrupt(child, terminal_fd)
    os.close(terminal_fd)
    assert text.count(b"\x1b[1A") > 5  # up again
    assert text.count(b"\x1b[?25l") == text.count(b"\x1b[?25h") == 1  # the cursor is back
    assert b"Traceback" not in text


@pytest.mark.parametrize("value", ["0", "-1", "nan", "1e9", "soon", "inf"])
def test_watch_refuses_a_period(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(["info", f"--watch={value}"], "/nonexistent")
    assert raised.value.code == 2
    why = "`soon` is no number of seconds" if value == "soon" else f"{value} is not between 0.1 and 86400 seconds"
    assert f"argument --watch: {why}\n" in capsys.readouterr().err


def test_watch_period() -> None:
    assert cli.make_parser().parse_args(["info", "--watch"]).watch == info._PERIOD
    assert cli.make_parser().parse_args(["info", "--watch", "0.5"]).watch == 0.5
    assert cli.make_parser().parse_args(["info"]).watch is None


# A line for who waits


_WAIT = """
import sys, time
sys.path[:0] = sys.argv[1:3]
from nvhook.commands import terminal
terminal._PATIENCE = float(sys.argv[3])
with terminal.waiting("Looking ..."):
    time.sleep(0.3)
"""


def _waiting(patience: float) -> bytes:
    """What a terminal is told on stderr while something takes 0.3 seconds."""
    fd, theirs = pty.openpty()
    packages = Path(str(rich.__file__)).parent.parent
    words = [sys.executable, "-c", _WAIT, str(Path(cli.__file__).parent.parent), str(packages), str(patience)]
    subprocess.run(words, env={"TERM": "xterm"}, stderr=theirs, check=True)
    text = os.read(fd, 1 << 16) if select.select([fd], [], [], 0)[0] else b""
    os.close(theirs)
    os.close(fd)
    return text


def test_waiting_says_so_when_it_takes_long() -> None:
    assert b"Looking ..." in _waiting(0.1)


def test_waiting_says_nothing_when_it_does_not() -> None:
    assert _waiting(5) == b""


def test_waiting_says_nothing_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with terminal.waiting("Looking ..."):
        pass
    assert capfd.readouterr().err == ""
