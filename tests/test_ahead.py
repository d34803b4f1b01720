# SPDX-License-Identifier: Apache-2.0
"""The process that prepares a start while the low-level runtime makes the container: whatever becomes of it, the
container gets its GPUs, and nothing of it is left."""

from __future__ import annotations

import json
import os
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

import containers
from conftest import cannot
from containers import Bundle, Workshop
from installed import ALL, BOTH, HOST, LIST, Installed, is_over, name_of, wait_until

pytestmark = pytest.mark.root

# In the place of runc: something happens to the process that prepares, $pid, and then it is runc.
MEANWHILE = """\
#!/bin/sh
case " $* " in *" run "* | *" create "*) ;; *) exec {runc} "$@" ;; esac
for word; do
    [ "${{last-}}" != --bundle ] || bundle=$word
    last=$word
done
pid=$(sed -n 's/.*"--child","\\([0-9]*\\)".*/\\1/p' "$bundle/config.json")
echo "$pid" >>{pids}
if [ "$pid" ]; then {what}; fi
exec {runc} "$@"
"""


class Between:
    """A configuration whose low-level runtime does something before it is runc."""

    def __init__(self, shop: Workshop, installed: Installed, what: str) -> None:
        self.shop = shop
        self.installed = installed
        runtime = shop.new("runtime")
        self._pids = shop.new("pids")
        runtime.write_text(MEANWHILE.format(what=what, runc=shutil.which("runc"), pids=self._pids))
        runtime.chmod(0o755)
        self.config = containers.configure(
            shop.simhost(HOST), shop.new("config.toml"), shop.place / "state", runtime=str(runtime)
        )

    def start(self, bundle: Bundle | None = None) -> subprocess.CompletedProcess[str]:
        """A container, for which a process has prepared: where the server's answer comes within 200 ms, one does."""
        for _ in range(20):
            self._pids.unlink(missing_ok=True)
            made = bundle or self.shop.bundle().write(LIST, ALL)
            text = made.path.read_text()
            result = made.run(self.config, wrapper=self.installed.wrapper)
            if any(pid.strip() for pid in self._pids.read_text().splitlines()):
                return result
            assert result.stdout == BOTH or bundle, result.stderr
            made.path.write_text(text)
        raise AssertionError("the server never answered")

    def pid(self) -> int:
        return int(self._pids.read_text())


@pytest.fixture
def between(shop: Workshop, installed: Installed) -> Callable[[str], Between]:
    return lambda what: Between(shop, installed, what)


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(":", id="nothing"),
        pytest.param("sleep 0.3", id="long-ready"),
        pytest.param("kill -9 $pid", id="killed-at-work"),
        pytest.param("sleep 0.3; kill -9 $pid", id="killed"),
        pytest.param("kill -STOP $pid", id="stopped-at-work"),
        pytest.param("sleep 0.3; kill -STOP $pid", id="stopped"),
        pytest.param("rm {server}/child-$pid", id="its-socket-removed"),
        pytest.param("rm {server}/child-$pid; touch {server}/child-$pid", id="a-file-there"),
        pytest.param("rm {server}/*", id="all-sockets-removed"),
        pytest.param("kill -9 $pid $(cat {server}/pid)", id="server-killed-too"),
    ],
)
def test_container_gets_its_gpus_whatever_happens(
    between: Callable[[str], Between], installed: Installed, what: str
) -> None:
    start = between(what.format(server=installed.server))
    result = start.start()
    assert (result.returncode, result.stdout, result.stderr) == (0, BOTH, "")
    pid = start.pid()
    if "STOP" in what:
        os.kill(pid, signal.SIGCONT)
    assert wait_until(lambda: is_over(pid))
    if str(installed.server) in what.format(server=installed.server) or not installed.pid():
        installed.end()
    assert wait_until(lambda: not list(installed.server.glob("child-*")))


def test_it_is_asked_and_no_interpreter(between: Callable[[str], Between], installed: Installed) -> None:
    start = between("sleep 0.3")

    def is_light() -> bool:
        installed.interpreters()
        assert start.start().stdout == BOTH
        return installed.interpreters() == 0

    assert any(is_light() for _ in range(20))


def test_error_is_the_hooks(between: Callable[[str], Between], shop: Workshop) -> None:
    """One that only shows when the container is there."""
    bundle = shop.bundle()
    (bundle.rootfs / "usr/bin/nvidia-smi").mkdir()
    result = between("sleep 0.3").start(bundle.write(LIST, ALL))
    assert (result.returncode, result.stdout) == (1, "")
    assert "nvidia-container-runtime-hook: mount error: mount `" in result.stderr
    assert "the image has a directory there" in result.stderr


def test_error_that_was_found_ahead(between: Callable[[str], Between], shop: Workshop) -> None:
    """The hook reports it, in the words that it uses without the server."""
    bundle = shop.bundle()
    (bundle.rootfs / "etc/ld.so.cache").unlink()
    shutil.rmtree(bundle.rootfs / "usr/lib" / containers.TRIPLET)
    (bundle.rootfs / "usr/lib" / containers.TRIPLET).write_text("")
    result = between("sleep 0.3").start(bundle.write(["/bin/true"], ALL))
    assert (result.returncode, result.stdout) == (1, "")
    assert "nvidia-container-runtime-hook: " in result.stderr
    assert "Traceback" not in result.stderr


def test_container_that_is_not_as_it_looked(between: Callable[[str], Between], shop: Workshop) -> None:
    """A volume makes a Debian of it: where libraries go is found out again."""
    bundle = shop.bundle("fedora")
    etc = shop.new("etc")
    shutil.copytree(bundle.rootfs / "etc", etc)
    (etc / "debian_version").write_text("12\n")
    bundle.config["mounts"].append(
        {"destination": "/etc", "type": "bind", "source": str(etc), "options": ["bind", "private"]}
    )
    bundle.write(["/bin/sh", "-c", f"ls /usr/lib/{containers.TRIPLET}/libcuda.so.1; nvidia-smi -L"], ALL)
    result = between("sleep 0.3").start(bundle)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"/usr/lib/{containers.TRIPLET}/libcuda.so.1\n{BOTH}"


@pytest.mark.parametrize("root", ["mounted", "missing"])
def test_runtime_that_makes_no_container(shop: Workshop, installed: Installed, root: str) -> None:
    """It ends with the runtime, and holds nothing of the engine's."""
    runtime = shop.new("runtime")
    runtime.write_text("#!/bin/sh\nsleep 0.2\nexit 0\n")
    runtime.chmod(0o755)
    config = containers.configure(shop.simhost(HOST), shop.new("config.toml"), shop.new("state"), runtime=str(runtime))
    bundle = shop.bundle().write(LIST, ALL)
    if root == "missing":
        shutil.rmtree(bundle.rootfs)
    words = ("create", "--bundle", str(bundle.directory), bundle.id)
    assert bundle.call(config, *words, wrapper=installed.wrapper).returncode == 0  # its streams were at their end
    assert wait_until(lambda: not installed.children("nvhook-ahead"))
    assert wait_until(lambda: not list(installed.server.glob("child-*")))


def test_streams_and_directory_are_given_back_before_it_waits(shop: Workshop, installed: Installed) -> None:
    """An engine waits for the end of its pipes, and unmounts the bundle."""
    start = Between(shop, installed, "sleep 0.5; ls -l /proc/$pid/fd /proc/$pid/cwd >&2; cat /proc/$pid/cgroup >&2")
    bundle = shop.bundle().write(LIST, ALL)
    lines = start.start(bundle).stderr.splitlines()
    links = [line.split(" -> ") for line in lines if " -> " in line]
    targets = {name.split(" ")[-1]: target for name, target in links}
    assert {targets[fd] for fd in "012"} == {"/dev/null"}
    assert targets[f"/proc/{start.pid()}/cwd"] == "/"
    held = [target for target in targets.values() if target.startswith((str(bundle.directory), str(bundle.rootfs)))]
    assert held == []
    groups = [line for line in lines if line[:1].isdecimal()]
    assert groups
    assert all(line.endswith(":/") for line in groups)


def test_no_path_is_looked_up_in_the_container(shop: Workshop, installed: Installed) -> None:
    """After the process has entered its mount namespace there are descriptors alone (docs/rules.md, rule 1)."""
    if not shutil.which("strace"):
        cannot("strace is not installed")
    lines: list[str] = []
    for _ in range(20):
        child, log = installed.ready(), shop.new("trace")
        calls = "trace=open,openat,openat2,chdir,execve,setns,stat,newfstatat"
        strace = subprocess.Popen(["strace", "-qq", "-e", calls, "-o", str(log), "-p", str(child)])
        assert wait_until(lambda: "TracerPid:\t0\n" not in Path(f"/proc/{child}/status").read_text())  # noqa: B023
        assert shop.bundle().write(LIST, ALL).run(shop.config(HOST), wrapper=installed.wrapper).stdout == BOTH
        strace.wait(60)
        lines = log.read_text().splitlines()
        if any(line.startswith("setns(") for line in lines):
            break
    (entered,) = [number for number, line in enumerate(lines) if line.startswith("setns(")]
    late = [line for line in lines[entered:] if '(AT_FDCWD, "/' in line or line.startswith(("chdir(", "execve("))]
    assert late == []


# Callers of its socket


def _ask(path: Path, words: list[str], state: bytes) -> int | None:
    """As the launcher does it; the status that is answered, or None."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(20)
        connection.connect(str(path))
        if len(connection.recv(8)) != 8:
            return None
        memory = os.memfd_create("state")
        os.write(memory, state)
        os.lseek(memory, 0, os.SEEK_SET)
        here = os.open(".", os.O_PATH)
        null = os.open(os.devnull, os.O_RDWR)
        content = struct.pack("=III", len(words), 0, 0o22) + b"".join(word.encode() + b"\0" for word in words)
        socket.send_fds(connection, [content], [here, memory, null, null])
        for fd in (memory, here, null):
            os.close(fd)
        answer = connection.recv(1)
        return answer[0] if answer else None


@pytest.fixture
def prepared(shop: Workshop, installed: Installed) -> Iterator[tuple[Path, Bundle]]:
    """The socket of one that waits for the hook of a container, whose low-level runtime is held up."""
    go_on = shop.new("go-on")
    start = Between(shop, installed, f"until [ -e {go_on} ]; do sleep 0.02; done")
    bundle = shop.bundle().write(LIST, ALL)
    said: list[subprocess.CompletedProcess[str]] = []
    thread = threading.Thread(target=lambda: said.append(start.start(bundle)))
    thread.start()
    assert wait_until(lambda: list(installed.server.glob("child-*")), 60)
    (path,) = installed.server.glob("child-*")
    assert wait_until(lambda: name_of(int(path.name[6:])) == "nvhook-ahead")
    yield path, bundle
    go_on.touch()
    thread.join()
    assert (said[0].returncode, said[0].stdout, said[0].stderr) == (0, BOTH, "")


@pytest.mark.parametrize("case", ["another-id", "another-bundle", "not-json", "no-process", "another-command"])
def test_question_that_is_not_for_it(prepared: tuple[Path, Bundle], case: str) -> None:
    """It does nothing, and says so by closing; the container is started by somebody else."""
    path, bundle = prepared
    state = {"pid": os.getpid(), "id": bundle.id, "bundle": str(bundle.directory)}
    words = ["hook", "/etc/config.toml", "--no-audit", "prestart"]
    content = json.dumps(
        {
            "another-id": {**state, "id": "other"},
            "another-bundle": {**state, "bundle": "/"},
            "no-process": {**state, "pid": 0},
        }.get(case, state)
    )
    if case == "another-command":
        words[0] = "edit"
    assert _ask(path, words, b"{" if case == "not-json" else content.encode()) is None


def test_caller_that_does_not_wait(prepared: tuple[Path, Bundle]) -> None:
    """The next one is served."""
    path, _ = prepared
    for _ in range(3):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(str(path))
    time.sleep(0.1)
    assert path.exists()


def test_socket_is_roots_alone(prepared: tuple[Path, Bundle]) -> None:
    assert prepared[0].stat().st_mode & 0o7777 == 0o600


_WITHOUT_RIGHTS = """
import socket, sys
for _ in range(100):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(sys.argv[1])
        assert connection.recv(8) == b""
"""


def test_callers_that_are_refused_use_up_nothing(prepared: tuple[Path, Bundle]) -> None:
    """A container with uid 0 and the host's /run may ask as often as it likes, and the hook is served."""
    path, _ = prepared
    own = Path(f"/proc/{path.name[6:]}/fd")
    command = ["setpriv", "--bounding-set=-all", "/usr/bin/python3", "-c", _WITHOUT_RIGHTS, str(path)]
    subprocess.run(command, check=True, timeout=60)  # and it has prepared by then
    before = len(os.listdir(own))
    subprocess.run(command, check=True, timeout=60)
    assert wait_until(lambda: abs(len(os.listdir(own)) - before) < 10, 5)
