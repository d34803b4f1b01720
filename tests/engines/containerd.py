# SPDX-License-Identifier: Apache-2.0
"""containerd on a machine of its own, registered with `nvhook configure containerd`, on a simulated host."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import subprocess
import tarfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomlkit

from containers import Bundle

from .cri import Cri
from .machine import PLACES, Machine, install, program, remove_cgroups, wait

PROGRAMS = ("containerd", "containerd-shim-runc-v2", "ctr", "curl", "runc", "nsenter", "unshare")

IMAGE = "localhost/debian:1"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_KUBERNETES = "k8s.io"  # containerd's namespace for what comes through CRI

# As an administrator has it before us: pods need an image that is there, and a score that we may give them.
_CONFIGURATION = """\
version = 2
root = "{place}/data"

[plugins."io.containerd.internal.v1.opt"]
  path = "{place}/opt"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{image}"
  restrict_oom_score_adj = true
"""


class Containerd:
    """`place`, an existing directory, holds all that it keeps; `host` is the simulated host. `start` comes first.

    words       further ones for `nvhook configure containerd`
    runtime     the low-level runtime
    unified     everything in there sees cgroups of version 2 alone
    """

    def __init__(
        self, place: Path, host: Path, *, words: tuple[str, ...] = (), runtime: str = "runc", unified: bool = False
    ) -> None:
        self.place = place
        self.host = host
        self.machine = Machine(place)
        self.wrapper = place / "prefix/bin/nvidia-container-runtime"
        self.namespace = f"nvhook-containerd-{uuid.uuid4().hex[:8]}"  # and the cgroup above those of its containers
        self.cri = Cri(self.machine, self.namespace, IMAGE)
        self._words = words
        self._runtime = runtime
        self._unified = unified
        self.image = Path()  # the root filesystem of IMAGE
        self._mounts: list[str] = []
        self._count = 0

    def start(self) -> None:
        install(self.place / "prefix", self.host, self.place / "state", runtime=self._runtime)
        for name, content in (("hosts", "127.0.0.1 localhost\n"), ("resolv.conf", "")):  # which pods get a copy of
            (self.machine.etc / name).write_text(content)
        config = self.machine.etc / "containerd/config.toml"
        config.parent.mkdir()
        config.write_text(_CONFIGURATION.format(place=self.place, image=IMAGE))
        command = [str(self.place / "prefix/bin/nvhook"), "configure", "containerd", "--config-file", str(config)]
        subprocess.run([*command, *self._words], check=True, capture_output=True)
        self.machine.start("containerd", unified=self._unified)
        self.machine.wait_for_daemon(lambda: self.ctr("version").returncode == 0)
        self._mounts = self.mounts()

    def stop(self) -> list[str]:
        """End everything; the answer is what containerd and its containers had left at that time."""
        left = []
        if self._mounts:
            for namespace in (self.namespace, _KUBERNETES):
                names = self.do("container", "ls", "--quiet", namespace=namespace).split()
                left += [f"container: {name}" for name in names]
            left += [f"noted: {path}" for path in self.notes()]
            left += [f"mount: {line}" for line in self.mounts() if line not in self._mounts]
        left += self.machine.end()
        return left + [f"cgroup: {path}" for path in remove_cgroups(self.namespace)]

    def ctr(self, *words: str, namespace: str = "") -> subprocess.CompletedProcess[str]:
        """Its PATH has the installed commands first: `--gpus` looks one up."""
        return subprocess.run(
            [*self.machine.enter(), program("ctr"), *words],
            env={"PATH": f"{self.wrapper.parent}:{PLACES}", "CONTAINERD_NAMESPACE": namespace or self.namespace},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def do(self, *words: str, namespace: str = "") -> str:
        """The output of a ctr command that has to succeed."""
        done = self.ctr(*words, namespace=namespace)
        assert done.returncode == 0, f"ctr {' '.join(words)}: {done.stderr}{done.stdout}"
        return done.stdout

    def load(self, name: str, root: Path, *env: str) -> None:
        """The directory `root` as an image, for `ctr` and for pods."""
        archive = self.place / "image.tar"
        _pack(archive, name, root, env)
        for namespace in (self.namespace, _KUBERNETES):
            self.do("image", "import", str(archive), namespace=namespace)
        archive.unlink()
        if name == IMAGE:
            self.image = root
            wait("pods can have the image", self.cri.knows_image, 10)

    def new_name(self) -> str:
        self._count += 1
        return f"container-{self._count}"

    def run(self, *options: str, image: str = IMAGE, script: str = "nvidia-smi -L", plain: bool = False) -> str:
        """What `script` prints in a container that ends well; `plain`: without nvhook."""
        runtime = () if plain else ("--runc-binary", str(self.wrapper))
        said = ""
        for _ in range(3):  # ctr of containerd 1.6 may delete a task that has ended before it has copied its output
            said = said or self.do("run", "--rm", *runtime, *options, image, self.new_name(), "sh", "-euc", script)
        return said

    def run_bundle(self, bundle: Bundle) -> str:
        """What the process of a config.json made by hand prints."""
        return self.do("run", "--rm", "--runc-binary", str(self.wrapper), "--config", str(bundle.path), bundle.id)

    def refused(self, *options: str, image: str = IMAGE) -> str:
        """What ctr says about a container that cannot be started."""
        done = self.ctr("run", "--rm", "--runc-binary", str(self.wrapper), *options, image, self.new_name(), "true")
        assert (done.returncode, done.stdout) == (1, ""), f"it was started: {done}"
        return done.stderr

    @contextlib.contextmanager
    def container(self, *options: str) -> Iterator[str]:
        """The name of a container that runs, until the block ends."""
        name = self.new_name()
        runtime = ("--runc-binary", str(self.wrapper))
        self.do("run", "--detach", "--null-io", *runtime, *options, IMAGE, name, "sleep", "600")
        try:
            yield name
        finally:
            if self._status(name):
                self.end_task(name)
            self.do("container", "rm", name)

    def end_task(self, name: str) -> None:
        self.do("task", "kill", "--signal", "KILL", name)
        wait("the task has ended", lambda: self._status(name) == "STOPPED", 10)
        self.do("task", "rm", name)

    def _status(self, name: str) -> str:
        lines = [line.split() for line in self.do("task", "ls").splitlines()]
        return next((words[-1] for words in lines if words[0] == name), "")

    def execute(self, name: str, *command: str) -> str:
        return self.do("task", "exec", "--exec-id", self.new_name(), name, *command)

    def configuration(self) -> dict[str, Any]:
        """Of the CRI plugin, as it is in force."""
        text = self.machine.here("containerd", "config", "dump")
        plugins: dict[str, dict[str, Any]] = tomlkit.parse(text).unwrap()["plugins"]
        return plugins["io.containerd.grpc.v1.cri"]

    def layers(self, name: str) -> tuple[Path, Path]:
        """The directories of the image and of what the container has written."""
        (options,) = [word for word in self.do("snapshot", "mounts", "/nowhere", name).split() if "upperdir=" in word]
        found = dict(option.partition("=")[::2] for option in options.split(","))
        return Path(found["lowerdir"]), Path(found["upperdir"])

    def notes(self) -> list[Path]:
        """What nvhook has to clean up after."""
        return list(self.place.glob("state/containers/*"))

    def mounts(self) -> list[str]:
        """Mounts on what is the host for containerd: root, place and options."""
        lines = self.machine.here("cat", "/proc/self/mountinfo").splitlines()
        return [" ".join(line.split()[2:6]) for line in lines]


def _pack(archive: Path, name: str, root: Path, env: tuple[str, ...]) -> None:
    """An image as `docker save` writes it, of one layer."""
    layer = subprocess.run(["tar", "-C", str(root), "-c", "."], check=True, capture_output=True).stdout
    config = {
        "architecture": _ARCHITECTURES[os.uname().machine],
        "os": "linux",
        "config": {"Env": [f"PATH={PLACES}", *env], "Cmd": ["sleep", "600"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    files = {
        "layer.tar": layer,
        "config.json": json.dumps(config).encode(),
        "manifest.json": json.dumps(manifest).encode(),
    }
    with tarfile.open(archive, "w") as tar:
        for path, content in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
