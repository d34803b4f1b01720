# SPDX-License-Identifier: Apache-2.0
"""Docker engines as the nodes of a swarm, each with a network namespace, an installation and a simulated host.

The nodes' only interfaces are the two ends of a veth pair, so nothing of this is on the machine's network. Services
need no network: a task sits on its node's `host` network, that of the namespace, and nobody uses the overlay network
that swarm makes, or cannot make.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import tarfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from containers import make_image

from .machine import OWN_PLACES, PLACES, install, program, wait

KIND = "NVIDIA-GPU"
VARIABLE = f"DOCKER_RESOURCE_{KIND}"  # Docker writes the kind in capitals; no shell can expand a name with a dash
IMAGE = "nvhook-swarm:1"
PROGRAMS = ("dockerd", "docker", "containerd", "runc", "ip", "nsenter", "unshare")


class Task:
    """A running container of a service. `given`: the GPUs that swarm's variable names, `output`: what it printed."""

    def __init__(self, given: list[str], output: str, runtime: str) -> None:
        self.given = given
        self.output = output
        self.runtime = runtime

    @property
    def listed(self) -> list[str]:
        """The GPUs that its nvidia-smi has found."""
        return re.findall(r"\(UUID: (\S+)\)", self.output)


class Node:
    """One engine. `directory` holds all that it keeps; its cgroups are below `/<name>` in every hierarchy."""

    def __init__(self, name: str, directory: Path, host: Path, address: str) -> None:
        self.name = name
        self.directory = directory
        self.address = address
        self.gpus = _uuids(host)
        self.id = ""  # in the swarm
        self._engine: subprocess.Popen[bytes] | None = None
        for path in (directory, directory / "etc", directory / "work"):
            path.mkdir()
        install(directory / "prefix", host, directory / "state")
        self._write_configuration()
        command = [str(directory / "prefix/bin/nvhook"), "configure", "docker", "--swarm-resource", "--set-as-default"]
        _run(*command, "--config-file", str(directory / "daemon.json"))

    def _write_configuration(self) -> None:
        configuration = {
            "data-root": str(self.directory / "data"),
            "exec-root": str(self.directory / "exec"),
            "pidfile": str(self.directory / "pid"),
            "hosts": [self._socket],
            "storage-driver": "vfs",  # works wherever the directory is
            "exec-opts": ["native.cgroupdriver=cgroupfs"],
            "cgroup-parent": f"/{self.name}",
            "oom-score-adjust": 0,  # a better score than our own needs CAP_SYS_RESOURCE
            "bridge": "none",
            "iptables": False,
            "ip-masq": False,
            "ip-forward": False,
        }
        (self.directory / "daemon.json").write_text(json.dumps(configuration, indent=4))

    @property
    def _socket(self) -> str:
        return f"unix://{self.directory}/socket"

    @property
    def _environment(self) -> dict[str, str]:
        return {"PATH": PLACES, "HOME": str(self.directory), "DOCKER_HOST": self._socket}

    def start(self) -> None:
        """nsenter, not `ip netns exec`, which puts a /sys without cgroups in the place of the machine's."""
        places = f'place=$1\nshift\n{OWN_PLACES}\nexec "$@"'
        unshare = [program("unshare"), "--mount", "sh", "-euc", places, "-", str(self.directory)]
        command = [program("nsenter"), f"--net=/run/netns/{self.name}", *unshare, program("dockerd")]
        with (self.directory / "log").open("ab") as log:
            self._engine = subprocess.Popen(
                [*command, "--config-file", str(self.directory / "daemon.json")],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        engine = self._engine
        wait(f"{self.name} answers", lambda: engine.poll() is not None or self.answers(), 30)
        if engine.poll() is not None:
            raise RuntimeError(f"dockerd ended with {engine.returncode}:\n{self.log()}")

    def answers(self) -> bool:
        done = subprocess.run([program("docker"), "version"], env=self._environment, capture_output=True, check=False)
        return done.returncode == 0

    def stop(self) -> None:
        """The engine ends and takes its containers along; what did not end is killed, by its process id."""
        if self._engine:
            self._engine.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._engine.wait(20)
            self._engine.kill()
            self._engine.wait()
        for pid in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait(f"{self.name}'s processes are gone", lambda: not self._processes(), 10)

    def docker(self, *words: str, given: bytes | None = None) -> str:
        """docker's output; RuntimeError with what it says when it fails."""
        return _run("docker", *words, env=self._environment, given=given)

    def log(self) -> str:
        lines = (self.directory / "log").read_text(errors="replace").splitlines()
        return "\n".join(lines[-20:])

    def containers(self, service: str, *options: str) -> list[str]:
        label = f"label=com.docker.swarm.service.name={service}"
        return self.docker("ps", "--all", "--quiet", "--no-trunc", "--filter", label, *options).split()

    def running(self, service: str) -> list[str]:
        return self.containers(service, "--filter", "status=running")

    def tasks(self, service: str) -> list[Task]:
        """Those that run here, each as soon as it has listed its GPUs."""
        names = self.running(service)
        if not names:
            return []
        tasks = []
        for container in json.loads(self.docker("inspect", *names)):
            output = _complete_output(self, container["Id"])
            env = dict(word.split("=", 1) for word in container["Config"]["Env"] or ())
            given = [gpu for gpu in env.get(VARIABLE, "").split(",") if gpu]
            tasks.append(Task(given, output, container["HostConfig"]["Runtime"]))
        return tasks

    def _processes(self) -> list[int]:
        """Of engine, containerd and shims, by our directory among their arguments; of containers, by their cgroup."""
        found = []
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (directory / "cmdline").read_bytes()
                is_engine = os.path.basename(words.split(b"\0")[0]).startswith((b"dockerd", b"containerd"))
                groups = (directory / "cgroup").read_text()
                if (is_engine and f"{self.directory}/".encode() in words) or f"/{self.name}/" in groups:
                    found.append(int(directory.name))
        return found

    def clear(self) -> None:
        """What an engine that has ended leaves: empty cgroups. Its mounts have gone with their namespace."""
        for path in self.cgroups():
            with contextlib.suppress(OSError):
                os.rmdir(path)

    def mounts(self) -> list[str]:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return [path for path in (line.split()[4] for line in lines) if path.startswith(f"{self.directory}/")]

    def cgroups(self) -> list[str]:
        """Innermost first."""
        tops = [top for depth in ("*", "*/*") for top in Path("/sys/fs/cgroup").glob(depth) if top.name == self.name]
        return [place for top in tops for place, _, _ in os.walk(top, topdown=False)]

    def leftovers(self) -> list[str]:
        return [*(f"process {pid}" for pid in self._processes()), *self.mounts(), *self.cgroups()]


@contextlib.contextmanager
def namespaces(names: list[str]) -> Iterator[None]:
    """Two network namespaces with a veth pair between them; RuntimeError, with what `ip` said, where there can be none.

    The addresses are 10.77.0.1 and 10.77.0.2, and nobody outside sees them.
    """
    first, second = names
    made = []
    try:
        for name in names:
            _run("ip", "netns", "add", name)
            made.append(name)
        _run("ip", "link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
        for number, name in enumerate(names, 1):
            _run("ip", "-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _run("ip", "-n", name, "link", "set", link, "up")
        yield
    finally:
        for name in made:
            _run("ip", "netns", "delete", name)


class Swarm:
    """`manager` and `worker`, joined."""

    def __init__(self, manager: Node, worker: Node) -> None:
        self.manager = manager
        self.worker = worker

    @property
    def nodes(self) -> tuple[Node, Node]:
        return self.manager, self.worker

    def join(self) -> None:
        port = f"{self.manager.address}:2377"
        self.manager.docker("swarm", "init", "--advertise-addr", self.manager.address, "--listen-addr", port)
        token = self.manager.docker("swarm", "join-token", "--quiet", "worker").strip()
        self.worker.docker("swarm", "join", "--advertise-addr", self.worker.address, "--token", token, port)
        for node in self.nodes:
            node.id = node.docker("info", "--format", "{{.Swarm.NodeID}}").strip()
        wait("both nodes are ready", lambda: self._count_ready() == 2, 20)

    def _count_ready(self) -> int:
        return self.manager.docker("node", "ls", "--format", "{{.Status}}").split().count("Ready")

    def announced(self, node: Node) -> list[str]:
        """The GPUs that the swarm knows of a node."""
        form = "{{json .Description.Resources.GenericResources}}"
        resources: list[dict[str, dict[str, Any]]] = json.loads(
            self.manager.docker("node", "inspect", node.id, "--format", form)
        )
        specs = [resource["NamedResourceSpec"] for resource in resources]
        return [spec["Value"] for spec in specs if spec["Kind"] == KIND]

    @contextlib.contextmanager
    def service(self, name: str, *options: str, replicas: int, script: str = "nvidia-smi -L") -> Iterator[None]:
        """A service that runs `script` once per task and then sleeps, until the block ends."""
        # A first process that ignores SIGTERM would be waited for.
        common = ["--detach", "--no-resolve-image", "--network", "host", "--stop-signal", "KILL"]
        command = ["sh", "-c", f"{script}; echo end; exec sleep 600"]
        self.manager.docker(
            "service", "create", *common, "--name", name, "--replicas", str(replicas), *options, IMAGE, *command
        )
        try:
            self.wait_for(name, replicas, replicas)
            yield
        finally:
            self.manager.docker("service", "rm", name)
            wait(f"the tasks of {name} are gone", lambda: not any(node.containers(name) for node in self.nodes), 30)

    def wait_for(self, service: str, running: int, wanted: int) -> None:
        """Until so many tasks run of those that there should be."""
        form = ("service", "ls", "--filter", f"name={service}", "--format", "{{.Replicas}}")
        try:
            wait(f"{running} of {wanted}", lambda: self.manager.docker(*form).strip() == f"{running}/{wanted}", 40)
        except TimeoutError as error:
            raise TimeoutError(f"{error}:\n{self.manager.docker('service', 'ps', '--no-trunc', service)}") from None

    def errors(self, service: str) -> list[str]:
        """What keeps those of a service's tasks that do not run."""
        lines = self.manager.docker("service", "ps", "--no-trunc", "--format", "{{.Error}}", service).splitlines()
        return [line for line in lines if line]

    def tasks(self, service: str) -> dict[str, list[Task]]:
        """Node name -> its running tasks."""
        return {node.name: node.tasks(service) for node in self.nodes}

    def set_availability(self, node: Node, availability: str) -> None:
        self.manager.docker("node", "update", "--availability", availability, node.id)


@contextlib.contextmanager
def swarm(directory: Path, hosts: tuple[Path, Path]) -> Iterator[Swarm]:
    """A swarm of two whose second node has joined; at the end nothing of it is left, or AssertionError."""
    names = [f"nvhook-{uuid.uuid4().hex[:8]}" for _ in hosts]
    nodes = [
        Node(name, directory / str(number), host, f"10.77.0.{number}")
        for number, (name, host) in enumerate(zip(names, hosts, strict=True), 1)
    ]
    image = _image(directory)
    with namespaces(names):
        try:
            for node in nodes:
                node.start()
                node.docker("import", "-", IMAGE, given=image)
            both = Swarm(*nodes)
            both.join()
            yield both
        finally:
            for node in reversed(nodes):
                node.stop()
                node.clear()
    assert [line for node in nodes for line in node.leftovers()] == []
    assert not [name for name in names if os.path.exists(f"/run/netns/{name}")]


def _complete_output(node: Node, container: str) -> str:
    output = ""

    def is_complete() -> bool:
        nonlocal output
        output = node.docker("logs", container)
        return output.endswith("end\n")

    wait(f"{container} has printed its last line", is_complete, 20)
    return output


def _uuids(host: Path) -> list[str]:
    files = sorted((host / "proc/driver/nvidia/gpus").glob("*/information"))
    return [match[1] for file in files if (match := re.search(r"GPU UUID:\s*(\S+)", file.read_text()))]


def _image(directory: Path) -> bytes:
    root = make_image("debian", directory / "image")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.add(root, arcname=".")
    return packed.getvalue()


def _run(*command: str, env: dict[str, str] | None = None, given: bytes | None = None) -> str:
    command = (program(command[0]), *command[1:])
    done = subprocess.run(command, env=env, input=given or b"", capture_output=True, timeout=120, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:6])}: {(done.stderr or done.stdout).decode(errors='replace').strip()}")
    return done.stdout.decode(errors="replace")
