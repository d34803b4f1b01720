# SPDX-License-Identifier: Apache-2.0
"""Who got which GPUs, and who was refused: in syslog, in the file of config.toml, and through both programs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from containers import HOOK, WRAPPER, Workshop, configure
from installed import Installed
from nvhook import audit
from nvhook.errors import RequestError
from nvhook.host.gpus import Gpu
from nvhook.host.mig import MigDevice
from nvhook.host.selection import Selection
from nvhook.request import config, request, spec

GPUS = [Gpu(0, 1, "GPU-aa", "0000:07:00.0", ""), Gpu(2, 0, "GPU-bb", "0000:0f:00.0", "")]
ALL = {"NVIDIA_VISIBLE_DEVICES": "all"}
A100 = "a100x2"
A100_GPUS = "0 (GPU-c41d7b52-93e6-4f0a-8d15-2b7e60a9f3c8), 1 (GPU-08e5f9a3-1c6b-42d7-b0f4-e95d3187ac26)"


class Host:
    """A /dev/log that somebody reads, and a config.toml with a log file."""

    def __init__(self, place: Path) -> None:
        self.place = place
        (place / "dev").mkdir()
        self.log = place / "log"
        self.syslog = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.syslog.bind(str(place / "dev/log"))
        self.syslog.setblocking(False)

    def config(self, more: str = "") -> config.Config:
        path = self.place / "config.toml"
        path.write_text(
            f"{more}\n[nvidia-container-runtime]\ndebug = '{self.log}'\n[nvhook]\ndev-root = '{self.place}'\n"
        )
        return config.load(str(path))

    def logged(self) -> list[str]:
        """`info …`: level and message of each line of the file."""
        if not self.log.exists():
            return []
        lines = self.log.read_text().split("\n")[:-1]
        found = [re.fullmatch(r'time="[^"]+" level=(\w+) msg=(".*")', line) for line in lines]
        return [f"{match[1]} {json.loads(match[2])}" for match in found if match]

    def told(self) -> list[str]:
        """`<86> …` of each datagram, without time and process."""
        found: list[str] = []
        while True:
            try:
                text = self.syslog.recv(1 << 16).decode()
            except BlockingIOError:
                return found
            match = re.fullmatch(r"(<\d+>)[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d (\S+)\[\d+\]: (.*)", text)
            assert match, text
            found.append(f"{match[1]} {match[2]}: {match[3]}")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    found = Host(tmp_path)
    yield found
    found.syslog.close()


def _begin(trail: audit.Audit, described: spec.Spec) -> list[str]:
    """As the hook does it; what the policy has dropped."""
    dropped: list[str] = []
    trail.spec = described
    trail.begin(request.read(described, trail._config, dropped), dropped)
    return dropped


def _spec(env: dict[str, str], **more: object) -> spec.Spec:
    known = {"mounts": [], "annotations": {}, "privileged": False, "rootfs": "/", "device_rules": []}
    return spec.Spec(env=env, **{**known, **more})  # type: ignore[arg-type]


def test_grant(host: Host) -> None:
    trail = audit.Audit(host.config(), "hook", "a-container")
    env = {**ALL, "NVIDIA_GDS": "enabled", "NVIDIA_IMEX_CHANNELS": "7,9", "NVIDIA_MIG_CONFIG_DEVICES": "all"}
    _begin(trail, _spec(env, privileged=True))
    trail.grant(Selection(GPUS, [MigDevice(GPUS[0], 7, 0), MigDevice(GPUS[1], 1, 0, 3, "MIG-5a")]))
    line = (
        'GPUs granted: container="a-container" asked_by="NVIDIA_VISIBLE_DEVICES" gpus="0 (GPU-aa), 2 (GPU-bb)" '
        'migs="MIG-GPU-aa/7/0, 2:3 (MIG-5a)" capabilities="compute, utility" imex_channels="7, 9" features="gds" '
        'mig_rights="config"'
    )
    assert host.logged() == [f"info hook: {line}"]
    assert host.told() == [f"<86> hook: {line}"]


@pytest.mark.parametrize(
    ("described", "text", "origin"),
    [
        pytest.param(_spec(ALL), "", "NVIDIA_VISIBLE_DEVICES", id="variable"),
        pytest.param(_spec({"CUDA_VERSION": "8.0"}), "", "CUDA_VERSION", id="old-image"),
        pytest.param(_spec({"GPU": "0"}), "swarm-resource = 'GPU'", "GPU", id="swarm"),
        pytest.param(
            _spec({}, annotations={"cdi.k8s.io/a": "nvidia.com/gpu=0"}), "", "annotations cdi.k8s.io/a", id="annotation"
        ),
        pytest.param(
            _spec({}, annotations={"nvidia.cdi.k8s.io/b": "nvidia.com/gpu=0", "cdi.k8s.io/a": "nvidia.com/gpu=0"}),
            "",
            "annotations cdi.k8s.io/a, nvidia.cdi.k8s.io/b",
            id="annotations",
        ),
        pytest.param(
            _spec({}, mounts=[("/dev/null", "/var/run/nvidia-container-devices/0")]),
            "accept-nvidia-visible-devices-as-volume-mounts = true",
            "volume mounts",
            id="mount",
        ),
    ],
)
def test_who_asked(host: Host, described: spec.Spec, text: str, origin: str) -> None:
    trail = audit.Audit(host.config(text), "hook", "name")
    _begin(trail, described)
    trail.refuse("device error: there are none")
    trail.grant(Selection(GPUS, []))
    refused, granted = host.told()
    assert (
        refused == f'<83> hook: GPUs refused: container="name" asked_by="{origin}" why="device error: there are none"'
    )
    assert f' asked_by="{origin}" ' in granted


def test_refusal_of_a_request_that_is_none(host: Host) -> None:
    trail = audit.Audit(host.config(), "hook", "name")
    with pytest.raises(RequestError) as raised:
        _begin(trail, _spec({**ALL, "NVIDIA_DRIVER_CAPABILITIES": "cuda"}))
    trail.refuse(str(raised.value))
    (line,) = host.told()
    assert line.startswith('<83> hook: GPUs refused: container="name" asked_by="NVIDIA_VISIBLE_DEVICES" why="request')


def test_refusal_by_policy(host: Host) -> None:
    trail = audit.Audit(host.config("accept-nvidia-visible-devices-envvar-when-unprivileged = false"), "hook", "name")
    assert len(_begin(trail, _spec(ALL))) == 1
    (line,) = host.told()
    assert line.startswith('<84> hook: GPUs refused: container="name" asked_by="NVIDIA_VISIBLE_DEVICES" why="NVIDIA_')


def test_nothing_of_who_asks_for_nothing(host: Host) -> None:
    trail = audit.Audit(host.config(), "hook", "name")
    trail.refuse("spec error: it cannot be read")
    assert _begin(trail, _spec({})) == []
    assert (host.told(), host.logged()) == ([], [])


def test_silent(host: Host) -> None:
    trail = audit.Audit(host.config(), "hook", "name", silent=True)
    _begin(trail, _spec(ALL))
    trail.grant(Selection(GPUS, []))
    trail.refuse("by policy", "warning")
    assert (host.told(), host.logged()) == ([], [])
    trail.refuse("mount error: x")  # of who was granted, by another process, and does not start
    assert [line.partition(" why=")[2] for line in host.told()] == ['"mount error: x"']


@pytest.mark.parametrize(("level", "expected"), [("debug", 3), ("info", 3), ("warning", 2), ("error", 1), ("panic", 1)])
def test_log_level(host: Host, level: str, expected: int) -> None:
    settings = host.config()
    settings.log_level = level
    trail = audit.Audit(settings, "hook", "name")
    _begin(trail, _spec(ALL))
    trail.grant(Selection(GPUS, []))
    trail.refuse("x", "warning")
    trail.refuse("x", "error")
    assert (len(host.told()), len(host.logged())) == (expected, expected)


FORGED = 'x" gpus="0 (GPU-all)"\nJan  1 00:00:00 host sshd[1]: \x1b[2J\u2028\u202e\x9b31m'


def test_what_an_image_writes_is_no_fact_and_no_line(host: Host) -> None:
    trail = audit.Audit(host.config(), "hook", FORGED)
    _begin(trail, _spec(ALL))
    trail.refuse(f"device error: unknown device `{FORGED}`")
    trail.refuse("y" * 100_000)
    for lines in (host.told(), host.logged()):
        assert len(lines) == 2
        assert all(line.isprintable() for line in lines)
        assert 'gpus="' not in lines[0].replace('\\"', "")
        assert len(lines[1]) < 5000
    assert host.log.read_bytes().count(b"\n") == 2


def _nobody_reads(host: Host) -> None:
    host.syslog.close()


def _nobody_reads_any_more(host: Host) -> None:
    """As a logger that is behind: what there is room for is there."""
    other = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    other.connect(str(host.place / "dev/log"))
    with contextlib.suppress(BlockingIOError):
        for _ in range(10000):
            other.send(b"x" * 1000)
    other.close()


def _no_log(host: Host) -> None:
    (host.place / "dev/log").unlink()


def _file_for_a_socket(host: Host) -> None:
    (host.place / "dev/log").unlink()
    (host.place / "dev/log").touch()


def _pipe_for_a_file(host: Host) -> None:
    os.mkfifo(host.log)


def _directory_for_a_file(host: Host) -> None:
    host.log.mkdir()


@pytest.mark.parametrize(
    "harm",
    [_nobody_reads, _nobody_reads_any_more, _no_log, _file_for_a_socket, _pipe_for_a_file, _directory_for_a_file],
)
def test_place_that_cannot_be_written(host: Host, harm: Callable[[Host], None]) -> None:
    """It costs the line there, and neither time nor the start."""
    harm(host)
    begin = time.monotonic()
    trail = audit.Audit(host.config(), "hook", "name")
    _begin(trail, _spec(ALL))
    trail.grant(Selection(GPUS, []))
    assert time.monotonic() - begin < 1
    if harm in (_pipe_for_a_file, _directory_for_a_file):
        assert len(host.told()) == 1
    else:
        assert len(host.logged()) == 1


def test_nothing_is_looked_for_a_second_time(tmp_path: Path) -> None:
    """A start that fails in the container's mount namespace looks up no path there, though neither place was there."""
    host = _bare(tmp_path)
    host.log = tmp_path / "none/log"
    trail = audit.Audit(host.config(), "hook", "name")
    _begin(trail, _spec(ALL))
    host.log.parent.mkdir()
    trail.refuse("x")
    assert not host.log.exists()


def test_path_of_a_socket_that_is_too_long(tmp_path: Path) -> None:
    place = tmp_path / ("x" * 100)
    (place / "dev").mkdir(parents=True)
    (place / "dev/log").touch()
    trail = audit.Audit(Host.config(_bare(place)), "hook", "name")
    _begin(trail, _spec(ALL))
    trail.refuse("x")
    assert (place / "log").exists()


def _bare(place: Path) -> Host:
    host = Host.__new__(Host)
    host.place, host.log = place, place / "log"
    return host


# Through the programs


def _log_of(shop: Workshop) -> tuple[Path, Path]:
    path, log = shop.new("config.toml"), shop.new("log")
    configure(shop.simhost(A100), path, shop.place / f"state-{A100}")
    path.write_text(path.read_text().replace("runtimes =", f"debug = '{log}'\nruntimes ="))
    return path, log


def _messages(log: Path) -> list[Any]:
    lines = log.read_text().splitlines()
    return [json.loads(line if line.startswith("{") else line.partition(" msg=")[2]) for line in lines]


@pytest.mark.root
def test_wrapper_and_hook_write_one_line(shop: Workshop) -> None:
    path, log = _log_of(shop)
    bundle = shop.bundle().write(["/bin/true"], ALL)
    result = bundle.run(path, options=("--log", str(log.with_suffix(".engine")), "--log-format", "json"))
    assert result.returncode == 0, result.stderr
    (line,) = _messages(log)
    expected = (
        f'nvidia-container-runtime: GPUs granted: container="{bundle.id}" asked_by="NVIDIA_VISIBLE_DEVICES" '
        f'gpus="{A100_GPUS}" capabilities="compute, utility"'
    )
    assert line == {"level": "info", "msg": expected, "time": line["time"]}
    entry = json.loads(log.with_suffix(".engine").read_text().splitlines()[0])
    assert (entry["level"], entry["msg"]) == ("info", expected)


@pytest.mark.root
def test_wrapper_refuses(shop: Workshop) -> None:
    path, log = _log_of(shop)
    bundle = shop.bundle().write(["/bin/true"], {"NVIDIA_VISIBLE_DEVICES": "7"})
    assert bundle.run(path).returncode == 1
    refused, error = _messages(log)
    assert refused.startswith(
        f'nvidia-container-runtime: GPUs refused: container="{bundle.id}" asked_by="NVIDIA_VISIBLE_'
    )
    assert error.startswith("nvidia-container-runtime: device error: unknown device `7`")


@pytest.mark.root
@pytest.mark.parametrize("device", ["1", "7"])
def test_hook_alone(shop: Workshop, device: str) -> None:
    """As dockerd's --gpus has it."""
    path, log = _log_of(shop)
    bundle = shop.bundle()
    words = [HOOK.name, "--config", str(path), "prestart"]
    bundle.config["hooks"] = {"prestart": [{"path": str(HOOK), "args": words, "env": ["PATH=/usr/bin:/bin"]}]}
    bundle.write(["/bin/true"], {"NVIDIA_VISIBLE_DEVICES": device})
    result = bundle.run(None, wrapper=Path("runc"))
    (line,) = _messages(log)
    if device == "1":
        assert result.returncode == 0, result.stderr
        assert f'hook: GPUs granted: container="{bundle.id}" asked_by="NVIDIA_VISIBLE_DEVICES" gpus="1 (GPU-08' in line
    else:
        assert f'hook: GPUs refused: container="{bundle.id}" asked_by="NVIDIA_VISIBLE_DEVICES" why="device err' in line


@pytest.mark.root
def test_hook_that_fails_in_the_container(shop: Workshop) -> None:
    """The line is written though no path of the host can be looked up any more."""
    path, log = _log_of(shop)
    bundle = shop.bundle()
    words = [HOOK.name, "--config", str(path), "prestart"]
    bundle.config["hooks"] = {"prestart": [{"path": str(HOOK), "args": words, "env": ["PATH=/usr/bin:/bin"]}]}
    (bundle.rootfs / "usr/bin/nvidia-smi").mkdir()
    bundle.write(["/bin/true"], ALL)
    assert bundle.run(None, wrapper=Path("runc")).returncode != 0
    (line,) = _messages(log)
    assert ' why="mount error: ' in line


@pytest.mark.root
@pytest.mark.parametrize("by", ["server", "python"])
def test_granted_by_the_wrapper_and_failed_in_the_container(shop: Workshop, installed: Installed, by: str) -> None:
    """By the process that has prepared for the hook, and by the hook itself."""
    path, log = _log_of(shop)
    bundle = shop.bundle()
    (bundle.rootfs / "usr/bin/nvidia-smi").mkdir()
    bundle.write(["/bin/true"], ALL)
    assert bundle.run(path, wrapper=installed.wrapper if by == "server" else WRAPPER).returncode == 1
    granted, refused = (line if isinstance(line, str) else line["msg"] for line in _messages(log))
    assert f'GPUs granted: container="{bundle.id}"' in granted
    assert (
        f'hook: GPUs refused: container="{bundle.id}" asked_by="NVIDIA_VISIBLE_DEVICES" why="mount error: ' in refused
    )
