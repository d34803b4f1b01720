# SPDX-License-Identifier: Apache-2.0
"""Containers by their names: the files of runc and crun as they write them, and an engine on a socket of our own."""

from __future__ import annotations

import contextlib
import json
import os
import socketserver
import tempfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from nvhook.commands import dockerapi
from nvhook.commands.explain import locate
from nvhook.errors import ContainerError

pytestmark = pytest.mark.usefixtures("socket_path")

ID = "3f2a" + "0" * 60
OTHER = "3f2b" + "0" * 60


@contextlib.contextmanager
def engine(path: Path, answers: dict[str, Any]) -> Iterator[None]:
    """Answers GET with what is under its path; bytes as they are."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = answers.get(self.path)
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(404 if answer is None else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            return

        def address_string(self) -> str:
            return ""

    server = socketserver.ThreadingUnixStreamServer(str(path), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def socket_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where DOCKER_HOST leads; a socket's path may not be long. No Podman of this machine is asked."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        path = Path(directory) / "docker.sock"
        monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
        monkeypatch.setenv("PATH", "/nowhere")
        yield path


def _bundle(directory: Path, *env: str) -> Path:
    directory.mkdir(parents=True)
    document = {"process": {"env": list(env)}, "root": {"path": "rootfs"}}
    (directory / "config.json").write_text(json.dumps(document))
    return directory


def _runc(state: Path, bundle: Path, *, pid: int = 0, start: int = 0) -> None:
    state.mkdir(parents=True)
    labels = ["org.example=a=b", f"bundle={bundle}"]
    document = {"id": state.name, "init_process_pid": pid, "init_process_start": start, "config": {"labels": labels}}
    (state / "state.json").write_text(json.dumps(document))


def _start(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


@pytest.mark.parametrize(
    "place",
    ["runc", "docker/runtime-runc/moby", "docker/runtime-nvidia/moby", "containerd/runc/k8s.io"],
)
@pytest.mark.parametrize("name", [ID, ID[:4]])
def test_state_of_runc(tmp_path: Path, place: str, name: str) -> None:
    bundle = _bundle(tmp_path / "bundle", "A=b")
    _runc(tmp_path / place / ID, bundle, pid=os.getpid(), start=_start(os.getpid()))
    (tmp_path / place / "no-container").mkdir()
    found = locate.find(name, run=str(tmp_path))
    assert (found.id, found.bundle, found.pid, found.image) == (ID, str(bundle), os.getpid(), None)
    assert found.described is not None
    assert found.described.env == {"A": "b"}


def test_state_of_crun(tmp_path: Path) -> None:
    bundle = _bundle(tmp_path / "bundle")
    (tmp_path / "crun/web").mkdir(parents=True)
    status = {"pid": os.getpid(), "process-start-time": _start(os.getpid()), "bundle": str(bundle), "rootfs": "/x"}
    (tmp_path / "crun/web/status").write_text(json.dumps(status))
    (tmp_path / "crun/web/config.json").write_text("{}")
    found = locate.find("web", run=str(tmp_path))
    assert (found.bundle, found.pid) == (str(bundle), os.getpid())


def test_number_of_another_process(tmp_path: Path) -> None:
    _runc(tmp_path / "runc/web", _bundle(tmp_path / "bundle"), pid=os.getpid(), start=_start(os.getpid()) - 1)
    assert locate.find("web", run=str(tmp_path)).pid == 0


def test_whole_id_before_the_beginning_of_another(tmp_path: Path) -> None:
    for name in ("web", "web2"):
        _runc(tmp_path / "runc" / name, _bundle(tmp_path / name))
    assert locate.find("web", run=str(tmp_path)).id == "web"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("3f2", f"`3f2` is the beginning of 2 containers: {ID}, {OTHER}; write more", id="ambiguous"),
        pytest.param("web", "no container `web`: neither Docker nor Podman knows it", id="none"),
        pytest.param("", "no container ``", id="empty"),
        pytest.param("../runc", "no container `../runc`", id="path"),
        pytest.param("a\nb\x1b[31m", r"no container `a\nb\x1b[31m`", id="control-characters"),
    ],
)
def test_fault(tmp_path: Path, name: str, message: str) -> None:
    for known in (ID, OTHER):
        _runc(tmp_path / "runc" / known, _bundle(tmp_path / known))
    with pytest.raises(ContainerError) as caught:
        locate.find(name, run=str(tmp_path))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[]", '{"init_process_pid": 1}', '{"init_process_pid": {}, "init_process_start": 1, "config": 1}'],
)
def test_damaged_state(tmp_path: Path, content: str) -> None:
    (tmp_path / "runc/web").mkdir(parents=True)
    (tmp_path / "runc/web/state.json").write_text(content)
    with pytest.raises(ContainerError, match=r"read `.*/state.json`|does not run"):
        locate.find("web", run=str(tmp_path))


IMAGE = {"Config": {"Env": ["NVIDIA_VISIBLE_DEVICES=all", "PATH=/bin"]}}
CONTAINER = {
    "Id": ID,
    "Name": "/web",
    "Image": "sha256:00",
    "Config": {"Image": "cuda:12", "Env": ["PATH=/bin", "NVIDIA_VISIBLE_DEVICES=0"]},
    "HostConfig": {"Privileged": False, "CapAdd": ["CAP_SYS_ADMIN"], "DeviceRequests": [{"Capabilities": [["gpu"]]}]},
    "Mounts": [{"Source": "/dev/null", "Destination": "/var/run/nvidia-container-devices/1"}],
}
ANSWERS = {"/containers/web/json": CONTAINER, "/images/sha256:00/json": IMAGE}


def test_docker_by_name(tmp_path: Path, socket_path: Path) -> None:
    bundle = _bundle(tmp_path / "bundle", "NVIDIA_VISIBLE_DEVICES=0")
    _runc(tmp_path / "docker/runtime-runc/moby" / ID, bundle)
    with engine(socket_path, ANSWERS):
        found = locate.find("web", run=str(tmp_path))
    assert (found.engine, found.name, found.image_name, found.gpus) == ("docker", "web", "cuda:12", True)
    assert (found.bundle, found.image) == (str(bundle), {"NVIDIA_VISIBLE_DEVICES": "all", "PATH": "/bin"})


def test_docker_container_that_does_not_run(tmp_path: Path, socket_path: Path) -> None:
    """What it would be started with."""
    with engine(socket_path, ANSWERS):
        found = locate.find("web", run=str(tmp_path))
    assert (found.pid, found.bundle) == (0, "")
    assert found.described is not None
    assert found.described.env["NVIDIA_VISIBLE_DEVICES"] == "0"
    assert found.described.privileged
    assert found.described.mounts == [("/dev/null", "/var/run/nvidia-container-devices/1")]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        pytest.param(b"<html>", "no JSON: ", id="no-json"),
        pytest.param([1], "not a JSON object", id="no-object"),
        pytest.param(b"[" * 100_000, "no JSON: ", id="deep"),
        pytest.param(b" " * (dockerapi._MAX_ANSWER + 1), "status 200, 8388609 bytes", id="long"),
    ],
)
def test_engine_that_answers_oddly(tmp_path: Path, socket_path: Path, answer: object, message: str) -> None:
    with engine(socket_path, {"/containers/web/json": answer}), pytest.raises(ContainerError) as caught:
        locate.find("web", run=str(tmp_path))
    assert f"container error: ask the engine at `{socket_path}`: {message}" in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "message"),
    [(b"hello\r\n", "not HTTP: hello"), (b"", "remote end closed connection without response")],
    ids=["text", "nothing"],
)
def test_engine_that_does_not_speak_http(tmp_path: Path, socket_path: Path, answer: bytes, message: str) -> None:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline().strip():
                pass
            self.wfile.write(answer)

    with socketserver.UnixStreamServer(str(socket_path), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with pytest.raises(ContainerError) as caught:
            locate.find("web", run=str(tmp_path))
        thread.join()
    expected = f"container error: ask the engine at `{socket_path}`: {message}; is it in good health?"
    assert str(caught.value) == expected


def test_engine_that_nobody_serves() -> None:
    assert dockerapi.docker().container("web") is None


@pytest.mark.parametrize("odd", [None, 1, [], {"Config": 1}, {"Config": {"Env": [1, "A", "B=c"]}}], ids=repr)
def test_variables_of_an_odd_answer(odd: Any) -> None:
    assert dockerapi.variables(odd, "Config", "Env") == (
        {"B": "c"} if isinstance(odd, dict) and odd["Config"] != 1 else {}
    )


def _as_nobody(do: Callable[[], object]) -> str:
    """What it raises in a child that is not root."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            do()
        except Exception as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with open(reading, encoding="utf-8") as file:
        return file.read()


@pytest.mark.root
def test_user_who_may_not_look() -> None:
    assert "; run nvhook as root: " in _as_nobody(lambda: locate.find("web", run="/nowhere"))


@pytest.mark.root
def test_socket_that_is_not_ours(socket_path: Path) -> None:
    with engine(socket_path, ANSWERS):
        socket_path.chmod(0o600)
        said = _as_nobody(lambda: locate.find("web", run="/nowhere"))
    assert said == (
        f"container error: ask the engine at `{socket_path}`: permission denied; "
        "run nvhook as root, or as a user who may use the engine"
    )
