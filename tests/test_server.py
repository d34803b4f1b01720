# SPDX-License-Identifier: Apache-2.0
"""The server: no interpreter is started while it is there, and whatever becomes of it, every container is right."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from containers import REPOSITORY, Bundle, Workshop, configure
from installed import (
    ALL,
    BOTH,
    HOST,
    LIST,
    Installed,
    is_over,
    is_served,
    name_of,
    signal_to,
    start,
    start_right,
    state_of,
    wait_until,
)

pytestmark = pytest.mark.root


# It serves


def test_no_interpreter_while_it_is_there(shop: Workshop, installed: Installed) -> None:
    pid = installed.pid()
    assert is_served(shop, installed)
    assert installed.pid() == pid


def test_first_start_takes_one_interpreter(shop: Workshop, installation: Installed) -> None:
    """Its hook waits for the server that its wrapper has left, while that loads."""

    def takes_one() -> bool:
        installation.end()
        return start_right(shop, installation) == 1

    assert any(takes_one() for _ in range(20))


def test_many_at_once(shop: Workshop, installed: Installed) -> None:
    pid = installed.pid()
    bundles = [shop.bundle().write(LIST, ALL) for _ in range(20)]

    def run(bundle: Bundle) -> tuple[int, str, str]:
        result = bundle.run(shop.config(HOST), wrapper=installed.wrapper)
        return result.returncode, result.stdout, result.stderr

    with concurrent.futures.ThreadPoolExecutor(len(bundles)) as pool:
        assert list(pool.map(run, bundles)) == [(0, BOTH, "")] * len(bundles)
    assert is_served(shop, installed)
    assert installed.pid() == pid


def test_nothing_of_a_container_stays_in_it(shop: Workshop, installed: Installed) -> None:
    secret = "s3cret-of-the-container"
    before = installed.ready()
    for _ in range(3):
        assert start(shop, installed, {"TOKEN": secret}).stdout == BOTH
    assert wait_until(lambda: installed.ready() != before)
    for pid in (installed.pid(), installed.ready()):
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


def test_it_holds_nothing_of_the_process_that_left_it(installed: Installed) -> None:
    """Neither streams nor directory nor control group: an engine waits for the end of them."""
    installed.ready()
    place = Path(f"/proc/{installed.pid()}")
    targets = [os.readlink(fd) for fd in (place / "fd").iterdir()]
    others = [target.partition(":")[0] for target in targets if target != f"{installed.server}/pid"]
    assert sorted(others) == [*["/dev/null"] * 3, "pipe", "socket"]  # the pipe is of its one child
    assert os.readlink(place / "cwd") == "/"
    assert (place / "comm").read_text() == "nvhook-server\n"
    assert {line.rpartition(":")[2] for line in (place / "cgroup").read_text().splitlines()} == {"/"}
    assert os.stat(installed.server).st_mode & 0o7777 == 0o700
    assert os.stat(installed.server / "socket").st_mode & 0o777 == 0o600


def _groups() -> list[Path]:
    """A directory for a control group below the topmost, where this machine has one to make it in."""
    places = [Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/pids")]
    return [place / "nvhook-test-server" for place in places if (place / "cgroup.procs").exists()][:1]


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, ...]]:
    """A command that starts another in a control group of its own, which is empty afterwards."""
    (group,) = _groups()
    group.mkdir()
    yield ("sh", "-c", f'echo $$ >{group}/cgroup.procs && exec "$@"', "sh")
    assert wait_until(lambda: not (group / "cgroup.procs").read_text())
    assert wait_until(lambda: _is_removed(group))


def _is_removed(group: Path) -> bool:
    try:
        group.rmdir()
    except OSError:
        return False
    return True


def test_server_leaves_the_control_group(shop: Workshop, installation: Installed, elsewhere: tuple[str, ...]) -> None:
    """The first start's, which may be a service's; and it serves callers of any."""
    installation.end()
    assert start_right(shop, installation, *elsewhere) > 0
    assert installation.wait()
    assert is_served(shop, installation, *elsewhere)


# The same effects as Python's


CASES = {
    "all": ({}, ALL),
    "nothing": ({}, {"NVIDIA_VISIBLE_DEVICES": "void"}),
    "unknown-gpu": ({}, {"NVIDIA_VISIBLE_DEVICES": "7"}),
    "unknown-capability": ({}, {**ALL, "NVIDIA_DRIVER_CAPABILITIES": "x\ny"}),
    "requirement": ({}, {**ALL, "NVIDIA_REQUIRE_X": "driver>=999"}),
    "warning": ({"more": "features.allow-ldconfig-from-container = true"}, ALL),
    "config-does-not-parse": ({"more": "x = ["}, ALL),
    "runtime-is-missing": ({"runtime": "/nonexistent/runc"}, ALL),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("here", [True, False], ids=["bundle-here", "bundle-named"])
def test_same_as_python(shop: Workshop, installed: Installed, case: str, here: bool) -> None:
    """Status, streams, config.json, the engine's log and ours, with their modes."""
    settings, env = CASES[case]
    serving = {pid: _effects(shop, installed, settings, env, here, pid) for pid in (True, False)}
    assert serving[True] == serving[False]


def _effects(
    shop: Workshop, installed: Installed, settings: dict[str, str], env: dict[str, str], here: bool, with_server: bool
) -> list[object]:
    place = shop.place / "effects"
    assert wait_until(lambda: _is_gone(place))  # the process that prepares may be about to write there
    place.mkdir()
    runtime = place / "runtime"
    runtime.write_text("#!/bin/sh\necho started\numask\n")
    runtime.chmod(0o755)
    config = place / "config.toml"
    more = settings.get("more", "")
    configure(shop.simhost(HOST), config, place / "state", runtime=settings.get("runtime", str(runtime)), more=more)
    table = "[nvidia-container-runtime]\n"
    config.write_text(config.read_text().replace(table, f'{table}debug = "{place}/debug"\n'))
    bundle = shop.bundle()
    bundle.directory = place / "bundle"
    bundle.directory.mkdir()
    bundle.config = json.loads(json.dumps(bundle.config).replace(bundle.id, "name"))
    bundle.config["root"]["path"] = "/nonexistent"
    bundle.write(["/bin/true"], env)
    launcher = str(installed.wrapper)
    words = ["--log", f"{place}/log", "create", *([] if here else ["--bundle", str(bundle.directory)]), "name"]
    environment = {"PATH": "/usr/bin:/bin", "NVHOOK_CONFIG": str(config)}
    through = ["sh", "-c", 'umask 027; exec "$@"', "sh"]
    if not with_server:  # its directory is not to be seen
        through = [
            "unshare",
            "--mount",
            "sh",
            "-c",
            f'mount -t tmpfs none {installed.server}; umask 027; exec "$@"',
            "sh",
        ]
    result = subprocess.run(
        [*through, launcher, *words], env=environment, cwd=bundle.directory, capture_output=True, text=True, check=False
    )
    document = json.loads(bundle.path.read_text())
    for hook in (document.get("hooks") or {}).get("prestart", []):
        hook["args"] = [word for word in hook["args"] if word != "--child" and not word.isdecimal()]
    logs = {
        name: [(place / name).stat().st_mode, _without_times((place / name).read_text())]
        for name in ("log", "debug")
        if (place / name).exists()
    }
    return [result.returncode, result.stdout, result.stderr, document, logs]


def _is_gone(place: Path) -> bool:
    shutil.rmtree(place, ignore_errors=True)
    return not place.exists()


def _without_times(text: str) -> list[str]:
    return [" ".join(word for word in line.split(" ") if not word.startswith("time=")) for line in text.splitlines()]


@pytest.mark.parametrize("name", ["a\nb", "", "ä \udcff", "$(id)", "-b"], ids=ascii)
def test_arguments_arrive_unchanged(shop: Workshop, installed: Installed, name: str) -> None:
    """What the child makes of them is seen in the log that they name."""
    installed.ready()
    directory = shop.new("log")
    directory.mkdir()
    log = directory / f"log{name}"
    bundle = shop.bundle().write(["/bin/true"], {"NVIDIA_VISIBLE_DEVICES": "7"})
    result = bundle.run(shop.config(HOST), wrapper=installed.wrapper, options=("--log", str(log)))
    assert result.returncode == 1
    assert [path.name for path in directory.iterdir()] == [log.name]
    assert "unknown device `7`" in log.read_text()


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_caller_without_standard_streams(shop: Workshop, installed: Installed, closed: str) -> None:
    """Its socket must not be where the child writes."""
    installed.ready()
    bundle = shop.bundle().write(["/bin/true"], {"NVIDIA_VISIBLE_DEVICES": "7"})
    bundle.through += ("sh", "-c", f'exec "$@" {closed}', "sh")
    result = bundle.call(shop.config(HOST), "create", "--bundle", str(bundle.directory), "x", wrapper=installed.wrapper)
    assert result.returncode == 1
    assert ("unknown device" in result.stderr) == ("2>&-" not in closed)


# It is not missed


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
@pytest.mark.parametrize("which", ["server", "child", "both"])
def test_container_without_it(shop: Workshop, installed: Installed, which: str, signum: signal.Signals) -> None:
    server, child = installed.pid(), installed.ready()
    if which in ("server", "both"):
        signal_to(server, signum)
    if which in ("child", "both") and not is_over(child):
        signal_to(child, signum)
    for _ in range(3):
        start_right(shop, installed)
    for pid in (server, child):
        if not is_over(pid):
            os.kill(pid, signal.SIGCONT)
    assert is_served(shop, installed)


def test_stopped_child_does_nothing_when_it_wakes(shop: Workshop, installed: Installed) -> None:
    """The launcher has given up by then, and Python has done the work."""
    child = installed.ready()
    signal_to(child, signal.SIGSTOP)
    bundle = shop.bundle().write(LIST, ALL)
    try:
        words = ("create", "--bundle", str(bundle.directory), bundle.id)
        done = bundle.call(shop.config(HOST), *words, wrapper=installed.wrapper, output=shop.new("output"))
        assert done.returncode == 0
        before = bundle.path.stat()
        os.kill(child, signal.SIGCONT)
        assert wait_until(lambda: is_over(child))
        assert (before.st_ino, before.st_mtime_ns) == (bundle.path.stat().st_ino, bundle.path.stat().st_mtime_ns)
        assert not list(installed.server.glob("child-*"))
    finally:
        bundle.delete()


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_child_that_is_stopped_at_work(shop: Workshop, installed: Installed, signum: signal.Signals) -> None:
    """It has the request, and waits for a file of the host. The launcher ends it, and does the work."""
    host, config = shop.copy_of(HOST)
    assert shop.bundle().write(LIST, ALL).run(config, wrapper=installed.wrapper).stdout == BOTH
    params = host / "proc/driver/nvidia/params"
    content = params.read_bytes()
    params.unlink()
    os.mkfifo(params)
    bundle = shop.bundle().write(LIST, ALL)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        child = installed.ready()
        running = pool.submit(bundle.run, config, wrapper=installed.wrapper)
        assert wait_until(lambda: _opens(child) or running.done())
        assert not running.done()
        signal_to(child, signum)
        assert wait_until(lambda: is_over(child))
        beside = params.with_name("params.new")
        beside.write_bytes(content)
        fifo = os.open(params, os.O_RDWR)  # whoever has it open already reads its end
        beside.rename(params)
        os.write(fifo, content)
        os.close(fifo)
        result = running.result(60)
    assert (result.returncode, result.stdout, result.stderr) == (0, BOTH, "")


def _opens(pid: int) -> bool:
    """Whether the process waits in openat(2)."""
    number = "257 " if os.uname().machine == "x86_64" else "56 "
    try:
        return Path(f"/proc/{pid}/syscall").read_text().startswith(number)
    except OSError:  # over
        return False


def test_killed_at_any_point(shop: Workshop, installed: Installed) -> None:
    """90 starts, and 30 of our processes that are killed meanwhile, each at a moment of its own."""
    chosen = random.Random(1)
    over = threading.Event()
    killed: list[str] = []

    def kill() -> None:
        while len(killed) < 30 and not over.is_set():
            time.sleep(chosen.uniform(0, 0.3))
            names = ("nvhook-ready", "nvhook-busy", "nvhook-ahead", "python3")
            pids = [installed.pid(), *(pid for name in names for pid in installed.children(name))]
            pids = [pid for pid in pids if pid]
            if pids:
                pid = chosen.choice(pids)
                killed.append(name_of(pid))
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    killed.pop()

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        count = 0
        while count < 90 or (len(killed) < 30 and count < 300):
            result = start(shop, installed, {})
            assert (result.returncode, result.stdout) == (0, BOTH), result.stderr
            count += 1
    finally:
        over.set()
        thread.join()
    assert len(killed) == 30
    assert is_served(shop, installed)
    assert wait_until(lambda: not list(installed.server.glob("child-*")))


def test_full(shop: Workshop, installed: Installed) -> None:
    """As many callers as it takes, and more, none of whom says anything."""
    pid = installed.pid()
    silent = [_connect(installed) for _ in range(200)]
    start_right(shop, installed)
    for connection in silent:
        connection.close()
    assert is_served(shop, installed)
    assert installed.pid() == pid


def _connect(installed: Installed, name: str = "socket") -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.setblocking(False)
    try:
        connection.connect(str(installed.server / name))
    except BlockingIOError:
        return connection  # its backlog is full
    connection.settimeout(20)
    return connection


def test_ready_child_that_ends_by_itself(shop: Workshop, installed: Installed) -> None:
    """It is made again when somebody asks, and not over and over."""
    pid = installed.pid()
    signal_to(installed.ready(), signal.SIGKILL)
    assert wait_until(lambda: not installed.children("nvhook-ready"))
    time.sleep(0.3)
    assert installed.children("nvhook-ready") == []
    assert is_served(shop, installed)
    assert installed.pid() == pid


def test_ready_child_ends_with_it(installed: Installed) -> None:
    child = installed.ready()
    signal_to(installed.pid(), signal.SIGKILL)
    assert wait_until(lambda: is_over(child))


def test_another_version_is_installed(shop: Workshop, installed: Installed) -> None:
    """By something that does not know of the server; `scripts/install` ends it."""
    pid = installed.pid()
    (installed.prefix / "lib/nvhook/nvhook/new.py").touch()
    assert start_right(shop, installed) > 0
    assert wait_until(lambda: is_over(pid))
    start_right(shop, installed)
    assert installed.wait() != pid
    assert is_served(shop, installed)
    installed.install()
    assert wait_until(lambda: installed.pid() == 0)


def test_modules_are_gone(shop: Workshop, installed: Installed) -> None:
    library = installed.prefix / "lib/nvhook/nvruntime"
    pid = installed.pid()
    library.rename(library.with_name("elsewhere"))
    try:
        assert start(shop, installed, {}).returncode == 1
        assert wait_until(lambda: is_over(pid))
        assert not (installed.server / "socket").exists()
    finally:
        library.with_name("elsewhere").rename(library)
    start_right(shop, installed)


# A socket that somebody else made


_MAGIC = b"NVH1"


def _greet_with(greeting: bytes) -> Callable[[socket.socket], None]:
    def answer(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.send(greeting)
        time.sleep(0.05)
        connection.close()

    return answer


PLAYED: dict[str, Callable[[socket.socket], None]] = {
    "silent": lambda listener: None,  # noqa: ARG005
    "closes": lambda listener: listener.accept()[0].close(),
    "older": _greet_with(b"NVH0" + struct.pack("=i", 1)),
    "garbage": _greet_with(b"HTTP/1.1 400 Bad Request\r\n"),
    "short": _greet_with(b"NV"),
    "empty": _greet_with(b""),
    "takes-the-request-and-closes": _greet_with(_MAGIC + struct.pack("=i", 1)),
}


@pytest.mark.parametrize("case", PLAYED)
def test_server_that_is_another(shop: Workshop, installation: Installed, case: str) -> None:
    """Of another version, or broken: Python does the work."""
    installation.end()
    installation.server.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(installation.server / "socket"))
        listener.listen(64)
        thread = threading.Thread(target=PLAYED[case], args=(listener,))
        thread.start()
        holder = _hold(installation)
        assert start_right(shop, installation) > 0
        thread.join()
        os.close(holder)
    installation.end()


def _hold(installation: Installed) -> int:
    """The lock of a server that is there, so that no other is left."""
    import fcntl

    lock = os.open(installation.server / "pid", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


@pytest.mark.parametrize(
    ("mode", "owner"), [(0o755, 0), (0o770, 0), (0o700, 1234), (0o777, 1234)], ids=["read", "group", "theirs", "open"]
)
def test_directory_that_others_can_change(shop: Workshop, installation: Installed, mode: int, owner: int) -> None:
    """Nothing is sent to a socket in it, and no server is left there."""
    installation.end()
    installation.server.mkdir()
    installation.server.chmod(mode)
    asked = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(installation.server / "socket"))
        listener.listen(64)
        os.chown(installation.server, owner, owner)
        assert start_right(shop, installation) > 0
        listener.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            asked.append(listener.accept())
    assert asked == []
    if owner or mode & 0o022:
        assert sorted(os.listdir(installation.server)) == ["socket"]
    installation.end()


def test_socket_of_another_user(shop: Workshop, installation: Installed) -> None:
    """A listener that is not root's, however it came into root's directory."""
    installation.end()
    installation.server.mkdir(mode=0o700)
    script = (
        "import os, socket, sys, time\n"
        "listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "listener.bind(sys.argv[1])\n"
        "os.setresuid(1234, 1234, 1234)\n"
        "listener.listen(8)\n"
        "print('there', flush=True)\n"
        "connection, _ = listener.accept()\n"
        "connection.send(b'NVH1' + bytes(4))\n"
        "print(len(connection.recv(1 << 20)), flush=True)\n"
    )
    command = ["/usr/bin/python3", "-c", script, str(installation.server / "socket")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "there\n"
        holder = _hold(installation)
        assert start_right(shop, installation) > 0
        os.close(holder)
        assert other.stdout.read() in ("", "0\n")
        other.kill()
    installation.end()


# Where and for how long it is


_SHORT = """
import sys
sys.path[:0] = [sys.argv[1]]
from nvruntime import server
server._IDLE = 0.2
print(server.leave(sys.argv[2]))
"""


def _leave(installation: Installed, place: Path, seconds: str = "0.2") -> list[str]:
    script = _SHORT.replace("0.2", seconds)
    return ["/usr/bin/python3", "-IS", "-c", script, f"{installation.prefix}/lib/nvhook", str(place)]


def _servers_of(place: Path) -> list[int]:
    found = [path for path in Path("/proc").glob("[0-9]*/cmdline") if _ends_with(path, f"\0{place}\0")]
    return [int(path.parent.name) for path in found]


def _ends_with(path: Path, text: str) -> bool:
    try:
        return path.read_text(errors="replace").endswith(text)
    except OSError:  # gone
        return False


def test_it_ends_when_nobody_asks(tmp_path: Path, installation: Installed) -> None:
    place = tmp_path / "server"
    subprocess.run(_leave(installation, place), check=True)
    assert wait_until((place / "socket").exists)
    assert wait_until(lambda: os.listdir(place) == ["pid"])
    assert wait_until(lambda: not _servers_of(place))


def test_one_alone(tmp_path: Path, installation: Installed) -> None:
    place = tmp_path / "server"
    for process in [subprocess.Popen(_leave(installation, place, "60")) for _ in range(4)]:
        assert process.wait(20) == 0
    assert wait_until(lambda: sorted(map(name_of, _servers_of(place))) == ["nvhook-ready", "nvhook-server"])
    time.sleep(0.3)
    assert sorted(map(name_of, _servers_of(place))) == ["nvhook-ready", "nvhook-server"]
    os.kill(int((place / "pid").read_text()), signal.SIGKILL)


# As conmon does: it inherits whatever is left below it, and ends after that.
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


def test_none_below_a_process_that_waits_for_it(tmp_path: Path, installation: Installed) -> None:
    place = tmp_path / "server"
    command = ["/usr/bin/python3", "-c", _CONMON, *_leave(installation, place, "60")]
    assert subprocess.run(command, check=True, timeout=20, stdout=subprocess.PIPE, text=True).stdout == "False\n"
    assert os.listdir(place) == ["pid"]


def test_start_leaves_it_where_create_could_not(shop: Workshop, installation: Installed) -> None:
    """As Podman and CRI-O call them: `create` through conmon, `start` themselves."""
    installation.end()
    bundle = shop.bundle().write(LIST, ALL)
    below = copy.copy(bundle)
    below.through += ("/usr/bin/python3", "-c", _CONMON)
    config, output, number = shop.config(HOST), shop.new("output"), shop.new("pid")
    words = ("create", "--pid-file", str(number), "--bundle", str(bundle.directory), bundle.id)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        conmon = pool.submit(below.call, config, *words, wrapper=installation.wrapper, output=output)
        try:
            assert wait_until(lambda: number.exists() or conmon.done())
            assert installation.pid() == 0
            assert sorted(os.listdir(installation.server)) == ["pid", "wanted"]
            done = bundle.call(config, "start", bundle.id, wrapper=installation.wrapper)
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
            assert installation.wait()
            assert conmon.result(20).returncode == 0  # with the container: nothing else is below it
            assert output.read_text() == BOTH
            assert not (installation.server / "wanted").exists()
        finally:
            bundle.delete()
    assert is_served(shop, installation)


@pytest.mark.parametrize("asks", [False, True], ids=["plain", "with-gpus"])
def test_start_that_cannot_leave_it(shop: Workshop, installation: Installed, *, asks: bool) -> None:
    """Python, or its modules, may be gone for a moment, as while they are upgraded: the container starts."""
    bundle = shop.bundle().write(["/bin/sleep", "60"], ALL if asks else {})
    config, output = shop.config(HOST), shop.new("output")
    words = ("create", "--bundle", str(bundle.directory), bundle.id)
    python = installation.python.path
    content = python.read_text()
    try:
        assert bundle.call(config, *words, wrapper=installation.wrapper, output=output).returncode == 0
        installation.end()
        installation.server.mkdir(mode=0o700)
        (installation.server / "wanted").touch()
        python.write_text("#!/bin/sh\necho >&2 no Python; exit 1\n")
        assert bundle.call(config, "start", bundle.id, wrapper=installation.wrapper).returncode == 0
        assert not (installation.server / "wanted").exists()
    finally:
        python.write_text(content)
        bundle.delete()


def test_callers_below_such_a_process_are_served(shop: Workshop, installed: Installed) -> None:
    """Podman's containers, once there is a server."""
    assert is_served(shop, installed, "/usr/bin/python3", "-c", _CONMON)


def test_sockets_of_a_server_that_was_killed_are_removed(tmp_path: Path, installation: Installed) -> None:
    place = tmp_path / "server"
    place.mkdir(mode=0o700)
    for name in ("socket", "child-4194305", f"child-{os.getpid()}"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(place / name))
    subprocess.run(_leave(installation, place, "60"), check=True)
    assert wait_until(lambda: not (place / "child-4194305").exists())
    assert (place / f"child-{os.getpid()}").exists()  # the process lives
    assert wait_until((place / "pid").read_text)
    os.kill(int((place / "pid").read_text()), signal.SIGKILL)


def test_longest_prefix_has_a_socket() -> None:
    script = f". {REPOSITORY}/packaging/steps.sh; server_of /usr; server_of /{'x' * 60}; server_of /{'x' * 200}"
    done = subprocess.run(["sh", "-euc", script], capture_output=True, text=True, check=True)
    usr, long, longest = done.stdout.splitlines()
    assert usr == "/run/nvhook/server~usr"
    assert long != longest
    assert max(map(len, (long, longest))) + len("/child-4194304") <= 107


def test_state_of_this_process() -> None:
    assert (state_of(os.getpid()), is_over(os.getpid())) == ("R", False)
