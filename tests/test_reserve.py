# SPDX-License-Identifier: Apache-2.0
"""The process that serves the next container: no interpreter is started while it is there, and it is never missed."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from containers import REPOSITORY, Bundle, Workshop, gpu_lines, reserve_of

pytestmark = pytest.mark.root

HOST = "a100x2"
ALL = {"NVIDIA_VISIBLE_DEVICES": "all"}
BOTH = gpu_lines(HOST, 0, 1)
LIST = ["/bin/sh", "-c", "nvidia-smi -L"]


# In the place of Python: it notes that it was started.
PYTHON = """\
#!/bin/sh
echo >>{log}
exec /usr/bin/python3 "$@"
"""


class Installed:
    """An installation with a reserve of its own, which is ended with it, and a count of the interpreters it starts."""

    def __init__(self, place: Path) -> None:
        self.prefix = place / "prefix"
        self.wrapper = self.prefix / "bin/nvidia-container-runtime"
        self.reserve = reserve_of(self.prefix)
        self.log = place / "interpreters"
        self.python = place / "python3"
        self.python.write_text(PYTHON.format(log=self.log))
        self.python.chmod(0o755)
        self.install()

    def install(self) -> None:
        script = str(REPOSITORY / "scripts/install")
        env = {**os.environ, "PYTHON": str(self.python)}
        subprocess.run([script, "install", str(self.prefix), f"{self.prefix}/etc"], check=True, env=env)
        self.log.write_text("")

    def interpreters(self) -> int:
        """How many were started since this was asked last."""
        count = len(self.log.read_text())
        self.log.write_text("")
        return count

    def pid(self) -> int:
        """That of the reserve; 0 for none."""
        try:
            number = int((self.reserve / "pid").read_text())
        except (OSError, ValueError):
            return 0
        return 0 if _state_of(number) in ("Z", "") else number

    def child(self, seconds: float = 10) -> int:
        """The pid of the one that is there for whoever asks next, once it is."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            children = Path(f"/proc/{self.pid()}/task/{self.pid()}/children").read_text().split()
            time.sleep(0.05)  # one that has answered is over by then
            for child in children:
                if _name_of(int(child)) == "nvhook-next":
                    return int(child)
        raise AssertionError("none was forked ahead")

    def wait(self) -> int:
        """Its pid, once it is ready."""
        end = time.monotonic() + 10
        while not self.pid() and time.monotonic() < end:
            time.sleep(0.01)
        return self.pid()

    def kill(self, signum: signal.Signals) -> None:
        """Until it has come about: a process that waits for a processor has not stopped yet."""
        pid = self.pid()
        os.kill(pid, signum)
        end = time.monotonic() + 10
        while _state_of(pid) not in ("T" if signum == signal.SIGSTOP else "Z", "") and time.monotonic() < end:
            time.sleep(0.01)

    def end(self) -> None:
        if self.pid():
            self.kill(signal.SIGKILL)
        shutil.rmtree(self.reserve, ignore_errors=True)


def _state_of(pid: int) -> str:
    """The letter that /proc has; empty for one that is over."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return ""


def _name_of(pid: int) -> str:
    """Empty for one that is over."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _is_over(pid: int) -> bool:
    """Whether the process is, soon."""
    end = time.monotonic() + 10
    while _name_of(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return not _name_of(pid)


@pytest.fixture(scope="module")
def installation(shop: Workshop) -> Iterator[Installed]:
    made = Installed(shop.place)
    yield made
    made.end()


@pytest.fixture
def installed(installation: Installed, shop: Workshop) -> Iterator[Installed]:
    """With its reserve there, left by a first container."""
    if not installation.pid():
        assert _start(shop, installation, {}).stdout == BOTH
        assert installation.wait()
    yield installation
    with contextlib.suppress(OSError):
        os.kill(installation.pid(), signal.SIGCONT)


def _start(
    shop: Workshop, installed: Installed, env: dict[str, str], *through: str
) -> subprocess.CompletedProcess[str]:
    bundle = shop.bundle().write(LIST, {**ALL, **env})
    bundle.through += through
    return bundle.run(shop.config(HOST), wrapper=installed.wrapper)


def _interpreters(shop: Workshop, installed: Installed, *through: str) -> int:
    """How many a whole container takes, which must be right."""
    installed.interpreters()
    result = _start(shop, installed, {}, *through)
    assert (result.returncode, result.stdout, result.stderr) == (0, BOTH, "")
    return installed.interpreters()


# It serves


def test_no_interpreter_while_it_is_there(shop: Workshop, installed: Installed) -> None:
    pid = installed.pid()
    assert _interpreters(shop, installed) == 0
    assert installed.pid() == pid


def test_many_at_once(shop: Workshop, installed: Installed) -> None:
    """More than it has slots for."""
    bundles = [shop.bundle().write(LIST, ALL) for _ in range(20)]

    def start(bundle: Bundle) -> tuple[int, str, str]:
        result = bundle.run(shop.config(HOST), wrapper=installed.wrapper)
        return result.returncode, result.stdout, result.stderr

    with concurrent.futures.ThreadPoolExecutor(len(bundles)) as pool:
        assert list(pool.map(start, bundles)) == [(0, BOTH, "")] * len(bundles)
    assert _interpreters(shop, installed) == 0


def test_error_is_the_wrappers(shop: Workshop, installed: Installed) -> None:
    """In its words, on stderr and in the runtime's log, and nothing has been made."""
    log = shop.new("log")
    bundle = shop.bundle().write(LIST, {"NVIDIA_VISIBLE_DEVICES": "7"})
    before = bundle.path.read_bytes()
    pid = installed.pid()
    options = ("--log", str(log), "--log-format", "json")
    result = bundle.run(shop.config(HOST), wrapper=installed.wrapper, options=options)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("nvidia-container-runtime: device error: unknown device `7`")
    assert json.loads(log.read_text().splitlines()[-1])["msg"] == result.stderr.strip()
    assert bundle.path.read_bytes() == before
    assert installed.pid() == pid


def test_bundle_of_the_current_directory(shop: Workshop, installed: Installed) -> None:
    bundle = shop.bundle().write(LIST, ALL)
    bundle.through += ("env", "-C", str(bundle.directory))
    try:
        result = bundle.call(shop.config(HOST), "run", bundle.id, wrapper=installed.wrapper)
    finally:
        bundle.delete("runc")
    assert (result.returncode, result.stdout, result.stderr) == (0, BOTH, "")


def test_nothing_of_a_container_stays_in_it(shop: Workshop, installed: Installed) -> None:
    secret = "s3cret-of-the-container"
    before = installed.child()
    assert _start(shop, installed, {"TOKEN": secret}).stdout == BOTH
    assert installed.child() != before
    for pid in (installed.pid(), installed.child()):
        content = _memory_of(pid)
        assert b"nvhook" in content
        assert secret.encode() not in content


def _memory_of(pid: int) -> bytes:
    found = []
    maps = [line.split(" ") for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    with open(f"/proc/{pid}/mem", "rb") as memory:
        for place, rights, *_ in maps:
            begin, end = (int(number, 16) for number in place.split("-"))
            if rights.startswith("rw"):
                memory.seek(begin)
                found.append(memory.read(end - begin))
    return b"".join(found)


def test_it_holds_nothing_of_the_one_who_left_it(installed: Installed) -> None:
    """Neither streams nor directory nor environment: an engine waits for the end of the first."""
    place = Path(f"/proc/{installed.pid()}")
    installed.child()
    targets = [os.readlink(fd) for fd in (place / "fd").iterdir()]
    others = [target.partition(":")[0] for target in targets if not target.startswith(f"{installed.reserve}/")]
    assert sorted(others) == ["/dev/null", "/dev/null", "/dev/null", "pipe", "pipe"]  # those of the child ahead
    assert os.readlink(place / "cwd") == "/"
    assert (place / "comm").read_text() == "nvhook-reserve\n"
    assert os.stat(installed.reserve).st_mode & 0o777 == 0o700


# It is not missed


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
def test_container_without_it(shop: Workshop, installed: Installed, signum: signal.Signals) -> None:
    """Killed, it leaves its files behind; stopped, it would never answer."""
    pid = installed.pid()
    installed.kill(signum)
    assert _interpreters(shop, installed) > 0
    if signum != signal.SIGSTOP:
        assert installed.wait() != pid
        assert _interpreters(shop, installed) == 0


@pytest.mark.parametrize("slot", ["0", "1"], ids=["child", "reserve"])
def test_killed_while_it_works(installed: Installed, slot: str) -> None:
    """The one who asks has written, and waits for the child ahead, or for the reserve."""
    pid = installed.child() if slot == "0" else installed.pid()
    os.kill(pid, signal.SIGSTOP)
    (installed.reserve / slot / "taken").touch()
    script = f'. {installed.prefix}/lib/nvhook/ask.sh; talk {installed.reserve}/{slot} "1\nx\n"; echo $?'
    asking = subprocess.Popen(["/bin/sh", "-c", script], stdout=subprocess.PIPE, text=True)
    with pytest.raises(subprocess.TimeoutExpired):
        asking.wait(0.2)
    os.kill(pid, signal.SIGKILL)
    assert asking.communicate(timeout=10)[0] == "2\n"
    assert _is_over(pid)
    assert slot == "1" or installed.child()


def test_child_ahead_that_ends_by_itself(shop: Workshop, installed: Installed) -> None:
    """It is not made again and again; the reserve answers."""
    os.kill(installed.child(), signal.SIGKILL)
    pid = installed.pid()
    with pytest.raises(AssertionError, match="none was forked ahead"):
        installed.child(seconds=0.5)
    assert _interpreters(shop, installed) == 0
    assert installed.pid() == pid
    installed.end()


def test_child_ahead_ends_with_it(installed: Installed) -> None:
    child = installed.child()
    installed.kill(signal.SIGKILL)
    assert _is_over(child)


@pytest.mark.parametrize(
    "words", [["create"], ["poststop", "/x"], ["nothing"], ["create", "1", "/nonexistent", *"abcdef"]]
)
def test_question_that_is_none(installed: Installed, words: list[str]) -> None:
    """No answer, and it serves on."""
    pid = installed.pid()
    asked = " ".join(f"'{word}'" for word in words)
    script = f". {installed.prefix}/lib/nvhook/ask.sh; ask_reserve {installed.reserve} {asked}; echo $?"
    done = subprocess.run(["/bin/sh", "-c", script], capture_output=True, text=True, check=False, timeout=10)
    assert (done.stdout, done.stderr) == ("2\n", "")
    assert installed.pid() == pid


@pytest.mark.parametrize(
    "through",
    [
        pytest.param(("unshare", "--mount"), id="mount-namespace"),
        pytest.param(("env", "CUDA_MPS_PIPE_DIRECTORY=/run/mps"), id="environment"),
        pytest.param(("sh", "-c", "exec {wrapper}"), id="control-group"),
    ],
)
def test_who_lives_otherwise_does_not_ask(
    shop: Workshop, installed: Installed, through: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    if "control-group" in request.node.name:
        through = request.getfixturevalue("elsewhere")
    assert _interpreters(shop, installed, *through) > 0


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, ...]]:
    """A command that starts another in a control group of its own."""
    places = [Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/pids")]
    top = next(place for place in places if (place / "cgroup.procs").exists())
    group = top / "nvhook-test-reserve"
    group.mkdir()
    yield ("sh", "-c", f'echo $$ >{group}/cgroup.procs && exec "$@"', "sh")
    end = time.monotonic() + 10
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.05)


def test_argument_of_two_lines(shop: Workshop, installed: Installed) -> None:
    """It would be two words."""
    log = f"{shop.new('log')}\nx"
    bundle = shop.bundle().write(LIST, ALL)
    result = bundle.run(shop.config(HOST), wrapper=installed.wrapper, options=("--log", log))
    assert (result.returncode, result.stdout) == (0, BOTH)


def test_all_slots_taken(shop: Workshop, installed: Installed) -> None:
    for number in range(16):
        (installed.reserve / str(number) / "taken").touch()
    assert _interpreters(shop, installed) > 0
    for number in range(16):
        os.utime(installed.reserve / str(number) / "taken", (0, 0))
    (installed.reserve / "0/taken").unlink()
    _start(shop, installed, {})  # it looks after the others when it is asked
    assert list(installed.reserve.glob("*/taken")) == []


def test_another_version_is_installed(shop: Workshop, installed: Installed) -> None:
    """By something that does not know of it; `scripts/install` ends it."""
    pid = installed.pid()
    (installed.prefix / "lib/nvhook/nvhook/new.py").touch()
    result = _start(shop, installed, {})
    assert (result.returncode, result.stdout, result.stderr) == (0, BOTH, "")
    assert installed.wait() != pid
    installed.install()
    assert installed.pid() == 0


_SHORT = """
import sys
sys.path[:0] = [sys.argv[1]]
from nvruntime import reserve
reserve._SECONDS = 0.2
reserve.leave(sys.argv[2])
"""


def test_it_ends_when_nobody_asks(tmp_path: Path, installed: Installed) -> None:
    place = tmp_path / "reserve"
    subprocess.run(["/usr/bin/python3", "-IS", "-c", _SHORT, f"{installed.prefix}/lib/nvhook", str(place)], check=True)
    end = time.monotonic() + 10
    while not (place / "pid").exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert sorted(os.listdir(place)) == sorted([*map(str, range(16)), "lock", "pid"])
    while os.listdir(place) != ["lock"] and time.monotonic() < end:
        time.sleep(0.01)
    assert os.listdir(place) == ["lock"]


def test_one_alone(tmp_path: Path, installed: Installed) -> None:
    place = tmp_path / "reserve"
    script = ["/usr/bin/python3", "-IS", "-c", _SHORT.replace("0.2", "2"), f"{installed.prefix}/lib/nvhook", str(place)]
    for child in [subprocess.Popen(script) for _ in range(4)]:
        assert child.wait(10) == 0
    time.sleep(0.3)
    waiting = [path for path in Path("/proc").glob("[0-9]*/cmdline") if _ends_with(path, f"\0{place}\0")]
    assert sorted(_name_of(int(path.parent.name)) for path in waiting) == ["nvhook-next", "nvhook-reserve"]


def _ends_with(path: Path, text: str) -> bool:
    try:
        return path.read_text(errors="replace").endswith(text)
    except OSError:  # gone
        return False


# As conmon does: it inherits whoever is left below it, and ends after them.
_CONMON = """
import ctypes, os, sys
assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER
os.spawnv(os.P_WAIT, sys.argv[1], sys.argv[1:])
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
"""


def test_none_below_one_who_waits_for_it(tmp_path: Path, installed: Installed) -> None:
    place = tmp_path / "reserve"
    long = _SHORT.replace("0.2", "60")
    command = [
        "/usr/bin/python3",
        "-c",
        _CONMON,
        "/usr/bin/python3",
        "-IS",
        "-c",
        long,
        f"{installed.prefix}/lib/nvhook",
    ]
    subprocess.run([*command, str(place)], check=True, timeout=10)
    assert os.listdir(place) == ["lock"]
