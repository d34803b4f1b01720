# SPDX-License-Identifier: Apache-2.0
"""Who may ask the server, and what a caller can send it: root does nothing for a caller that is not what it is itself.

The attacker asks for a poststop with notes of its own making, which would remove a file of the host (the canary).
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import cannot
from containers import Workshop
from installed import ALL, HOST, LIST, Installed, is_served, wait_until

pytestmark = pytest.mark.root

# attack SOCKET STATE-DIR BUNDLE: connects, and if it is greeted sends a request. It prints how far it came.
ATTACK = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
int main(int argc, char **argv) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    char greeting[16], content[4096], state[1024];
    if (argc < 4) return 2;
    strcpy(address.sun_path, argv[1]);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET, 0);
    if (connect(fd, (struct sockaddr *)&address, sizeof address)) return perror("connect"), 1;
    puts("connected");
    struct pollfd waiting = {.fd = fd, .events = POLLIN};
    poll(&waiting, 1, 20000);
    if (recv(fd, greeting, sizeof greeting, MSG_DONTWAIT) <= 0) puts("not greeted");
    else puts("greeted");
    uint32_t head[] = {5, 0, 022};
    memcpy(content, head, sizeof head);
    char *end = content + sizeof head;
    const char *words[] = {"hook", "/c", "--state-dir", argv[2], "poststop"};
    for (int i = 0; i < 5; i++) end = stpcpy(end, words[i]) + 1;
    int memory = memfd_create("state", 0), here = open("/", O_PATH);
    int size = snprintf(state, sizeof state, "{\"id\":\"x\",\"bundle\":\"%s\"}", argv[3]);
    if (write(memory, state, size) != size) return 1;
    lseek(memory, 0, SEEK_SET);
    int fds[] = {here, memory, 1, 2};
    union { char space[CMSG_SPACE(sizeof fds)]; struct cmsghdr head; } control = {0};
    struct iovec part = {content, end - content};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
                             .msg_controllen = sizeof control.space};
    control.head = (struct cmsghdr){CMSG_LEN(sizeof fds), SOL_SOCKET, SCM_RIGHTS};
    memcpy(CMSG_DATA(&control.head), fds, sizeof fds);
    if (sendmsg(fd, &message, MSG_NOSIGNAL) < 0) return perror("sendmsg"), 0;
    poll(&waiting, 1, 20000);
    puts(recv(fd, greeting, 1, MSG_DONTWAIT) == 1 ? "answered" : "not answered");
}
"""


class Canary:
    """A directory of the host, and notes for the poststop of container `x` that would change it."""

    def __init__(self, place: Path) -> None:
        self.place = place / "canary"
        self.state = place / "evil"
        (self.place / "etc").mkdir(parents=True)
        (self.place / "etc/empty-lock").touch()
        notes = {
            "bundle": "/b",
            "rootfs": str(self.place),
            "traces": [{"kind": "file", "path": "/etc/empty-lock"}],
        }
        (self.state / "containers").mkdir(parents=True)
        (self.state / "containers/x").write_text(json.dumps(notes))

    def is_whole(self) -> bool:
        return (self.place / "etc/empty-lock").exists()


@pytest.fixture
def canary(tmp_path: Path) -> Canary:
    return Canary(tmp_path)


@pytest.fixture(scope="module")
def attack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("attack")
    (place / "attack.c").write_text(ATTACK)
    subprocess.run(["gcc", "-static", "-o", place / "attack", place / "attack.c"], check=True)
    return place / "attack"


def _served(shop: Workshop, installed: Installed, canary: Canary, pid: int) -> None:
    assert canary.is_whole()
    assert is_served(shop, installed)
    assert installed.pid() == pid


def test_the_attack_would_work(installed: Installed, canary: Canary, attack: Path) -> None:
    """By a process that may ask, of whatever notes it can have by then."""
    command = [str(attack), str(installed.server / "socket"), str(canary.state), "/b"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "connected\ngreeted\nanswered\n"


CONTAINERS: dict[str, dict[str, Any]] = {
    "no-capabilities": {"capabilities": {}},
    "all-capabilities": {},
    "privileged": {"capabilities": "all"},
}


@pytest.mark.parametrize("case", CONTAINERS)
@pytest.mark.parametrize("options", [["rbind", "ro"], ["rbind", "rw"]], ids=["read-only", "writable"])
def test_container_with_the_hosts_run(
    shop: Workshop, installed: Installed, canary: Canary, attack: Path, case: str, options: list[str]
) -> None:
    """uid 0 in namespaces of its own; as monitoring agents have it (finding F2)."""
    pid = installed.pid()
    bundle = shop.bundle("busybox")
    shutil.copy(attack, bundle.rootfs / "usr/bin/attack")
    capabilities = CONTAINERS[case].get("capabilities")
    if capabilities == "all":
        every = ["CAP_SYS_ADMIN", "CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_MKNOD", "CAP_KILL"]
        bundle.config["process"]["capabilities"] = dict.fromkeys(("bounding", "effective", "permitted"), every)
    elif capabilities is not None:
        bundle.config["process"]["capabilities"] = capabilities
    bundle.config["mounts"].append({"destination": "/run", "type": "bind", "source": "/run", "options": options})
    bundle.write(["/usr/bin/attack", str(installed.server / "socket"), str(canary.state), "/b"], {})
    result = bundle.run(None, wrapper=Path("runc"))
    assert result.stdout.startswith("connected\nnot greeted\n"), result.stderr
    assert "answered" not in result.stdout.replace("not answered", "")
    _served(shop, installed, canary, pid)


@pytest.mark.parametrize(
    "through",
    [
        pytest.param("unshare --mount", id="mount"),
        pytest.param("unshare --pid --fork", id="pid"),
        pytest.param("unshare --pid --fork --mount-proc", id="pid-and-its-proc"),
        pytest.param("unshare --user --map-root-user", id="user"),
        pytest.param("unshare --mount --pid --fork --user --map-root-user", id="all"),
        pytest.param("chroot {root}", id="chroot"),
        pytest.param("setpriv --bounding-set -sys_admin --inh-caps -sys_admin", id="fewer-capabilities"),
        pytest.param("setpriv --no-new-privs", id="no-new-privs"),
    ],
)
def test_caller_that_lives_otherwise(
    shop: Workshop, installed: Installed, canary: Canary, attack: Path, tmp_path: Path, through: str
) -> None:
    pid = installed.pid()
    root = tmp_path / "root"
    words = [word.format(root=root) for word in through.split()]
    if not shutil.which(words[0]):
        cannot(f"{words[0]} is not installed")
    (root / "run").mkdir(parents=True)
    shutil.copy(attack, root / "attack")
    program = "/attack" if words[0] == "chroot" else str(attack)
    subprocess.run(["mount", "--bind", "/run", root / "run"], check=True)
    try:
        command = [*words, program, str(installed.server / "socket"), str(canary.state), "/b"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        subprocess.run(["umount", root / "run"], check=True)
    assert done.stdout.startswith("connected\nnot greeted\n") or "Permission denied" in done.stderr, done.stderr
    assert "\nanswered" not in done.stdout
    _served(shop, installed, canary, pid)


def test_another_user_cannot_connect(shop: Workshop, installed: Installed, canary: Canary, attack: Path) -> None:
    attack.parent.chmod(0o755)
    command = [str(attack), str(installed.server / "socket"), str(canary.state), "/b"]
    copy = shop.new("attack")
    shutil.copy(attack, copy)
    done = subprocess.run([str(copy), *command[1:]], user=1234, group=1234, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("", "connect: Permission denied\n")


# A connection that changes hands


def _connect(installed: Installed) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(20)
    connection.connect(str(installed.server / "socket"))
    return connection


def _request(words: list[str], *, count: int | None = None, variables: list[str] | None = None) -> bytes:
    variables = variables or []
    head = struct.pack("=III", len(words) if count is None else count, len(variables), 0o22)
    return head + b"".join(word.encode() + b"\0" for word in [*words, *variables])


def _send(connection: socket.socket, content: bytes, descriptors: int = 4) -> str:
    """How it ended."""
    null = os.open("/", os.O_PATH) if descriptors else -1
    files = [null, *(os.open(os.devnull, os.O_RDWR) for _ in range(descriptors - 1))] if descriptors else []
    try:
        socket.send_fds(connection, [content], files)
        answer = connection.recv(1)
    except (ConnectionError, OSError) as error:
        return str(error.strerror)
    finally:
        for fd in files:
            os.close(fd)
    return "answered" if answer else "closed"


def _poststop(canary: Canary) -> bytes:
    return _request(["hook", "/c", "--state-dir", str(canary.state), "poststop"])


def _in_child(work: str, installed: Installed, canary: Canary) -> str:
    """What a Python prints that has this module and a greeted connection."""
    script = (
        "import os, socket, sys, time\n"
        "sys.path[:0] = sys.argv[3].split(':')\n"
        "from security.test_server_callers import _send\n"
        "connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "connection.settimeout(20)\n"
        "connection.connect(sys.argv[1])\n"
        "content = bytes.fromhex(sys.argv[2])\n"
    ) + work
    paths = ":".join(str(path) for path in (Path(__file__).parent.parent, *_SOURCES))
    command = [_PYTHON, "-c", script, str(installed.server / "socket"), _poststop(canary).hex(), paths]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout


_SOURCES = [Path(__file__).parents[2] / name for name in ("hook", "runtime-wrapper")]
_PYTHON = str(Path(__file__).parents[2] / ".venv/bin/python")

HANDED = {
    "to-a-child": """
assert len(connection.recv(8)) == 8
if not os.fork():
    print(_send(connection, content), flush=True)
    os._exit(0)
os.wait()
""",
    "to-a-child-of-a-process-that-is-over": """
read, write = os.pipe()
if os.fork():
    os._exit(0)  # before it is greeted, or after
time.sleep(0.2)
print(_send(connection, content) if connection.recv(8) else "closed", flush=True)
""",
    "to-a-child-after-the-greeting": """
assert len(connection.recv(8)) == 8
if os.fork():
    os._exit(0)
time.sleep(0.2)
print(_send(connection, content), flush=True)
""",
    "to-another-user": """
assert len(connection.recv(8)) == 8
os.setresuid(1234, 1234, 1234)
print(_send(connection, content), flush=True)
""",
    "to-another-program": """
assert len(connection.recv(8)) == 8
os.set_inheritable(connection.fileno(), True)
code = '''import os, socket, sys
sys.path[:0] = sys.argv[3].split(":")
from security.test_server_callers import _send
connection = socket.socket(fileno=int(sys.argv[1]))
connection.settimeout(20)
print(_send(connection, bytes.fromhex(sys.argv[2])), flush=True)'''
os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code, str(connection.fileno()), content.hex(), sys.argv[3]])
""",
}


@pytest.mark.parametrize("case", HANDED)
def test_connection_that_changes_hands(shop: Workshop, installed: Installed, canary: Canary, case: str) -> None:
    """The process that sends the request is the one whose rights were checked, and its number no other's by then."""
    pid = installed.pid()
    said = _in_child(HANDED[case], installed, canary).strip()
    assert said in ("closed", "Connection reset by peer", "Broken pipe")
    _served(shop, installed, canary, pid)


def test_connection_of_the_same_process(installed: Installed, canary: Canary) -> None:
    """What the ones above would get."""
    said = _in_child(
        "assert len(connection.recv(8)) == 8\nprint(_send(connection, content), flush=True)", installed, canary
    )
    assert said == "answered\n"


# What a caller that may ask can send

GOOD = _request(["hook", "/c", "poststart"])
MESSAGES: dict[str, tuple[bytes, int]] = {
    "empty": (b"", 4),
    "half-a-head": (GOOD[:7], 4),
    "head-alone": (GOOD[:12], 4),
    "half": (GOOD[: len(GOOD) // 2], 4),
    "no-last-nul": (GOOD[:-1], 4),
    "one-word-too-few": (_request(["hook", "/c"], count=3), 4),
    "one-word-too-many": (_request(["hook", "/c", "x", "y"], count=3), 4),
    "no-words": (_request([]), 4),
    "huge-count": (_request(["hook"], count=0xFFFFFFFF), 4),
    "unknown-kind": (_request(["steal", "/c"]), 4),
    "edit-without-words": (_request(["edit"]), 4),
    "no-descriptors": (GOOD, 0),
    "too-few-descriptors": (GOOD, 3),
    "too-many-descriptors": (GOOD, 5),
    "as-many-as-a-message-takes": (GOOD, 253),
    "more-than-a-request-may-have": (_request(["hook", "/c", "x" * (140 << 10)]), 4),
    "not-utf-8": (struct.pack("=III", 1, 0, 0) + b"\xff\xfe\0", 4),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_message_that_is_none(shop: Workshop, installed: Installed, canary: Canary, case: str) -> None:
    pid = installed.pid()
    content, descriptors = MESSAGES[case]
    with _connect(installed) as connection:
        assert len(connection.recv(8)) == 8
        assert _send(connection, content, descriptors) in ("closed", "Connection reset by peer", "Broken pipe")
    _served(shop, installed, canary, pid)


def test_request_before_the_greeting(installed: Installed) -> None:
    """It is served like any other: the kernel has said whose it is, or it is refused."""
    with _connect(installed) as connection:
        assert _send(connection, GOOD) in ("answered", "closed", "Connection reset by peer")


def test_ten_megabytes_of_arguments(shop: Workshop, installed: Installed, canary: Canary) -> None:
    """The kernel takes no such message; and the launcher, with as many as a command line takes, does the work alone."""
    with _connect(installed) as connection:
        connection.recv(8)
        with pytest.raises(OSError, match="Message too long"):
            connection.send(_request(["x" * (10 << 20)]))
    bundle = shop.bundle().write(LIST, ALL)
    many = [word for _ in range(15) for word in ("--log", "x" * 120_000)]
    installed.interpreters()
    result = bundle.run(shop.config(HOST), wrapper=installed.wrapper, options=(*many, "--log", str(shop.new("log"))))
    assert result.returncode == 0, result.stderr[-300:]
    assert installed.interpreters() > 0
    assert canary.is_whole()


def test_caller_that_says_nothing(shop: Workshop, installed: Installed) -> None:
    """It has a second; others are served meanwhile."""
    with _connect(installed) as connection:
        assert len(connection.recv(8)) == 8
        assert is_served(shop, installed)
        begin = time.monotonic()
        assert connection.recv(1) == b""
        assert time.monotonic() - begin < 20


def test_caller_that_is_gone_before_it_is_greeted(shop: Workshop, installed: Installed) -> None:
    for _ in range(20):
        _connect(installed).close()
    assert is_served(shop, installed)
    assert wait_until(lambda: len(installed.children("nvhook-ready")) <= 1)
