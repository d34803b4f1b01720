# SPDX-License-Identifier: Apache-2.0
"""`nvhook configure`: what engines are told, and that everything else in their files survives, and comes back."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvhook import cli
from nvhook.commands.configure.documents import Document, Json, Toml
from nvhook.errors import ConfigError
from nvhook.request import config, request, spec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LAUNCHER = Path(__file__).parent.parent / "scripts/nvhook"
CRI_2 = "io.containerd.grpc.v1.cri"
CRI_3 = "io.containerd.cri.v1.runtime"

DAEMON_JSON = """\
{
\t"debug": true, "dns": ["1.1.1.1", "8.8.8.8"],
\t"features": { "buildkit": true },
\t"default-runtime": "crun",
\t"runtimes": {
\t\t"crun": { "path": "/usr/bin/crun" },
\t\t"nvidia": { "path": "nvidia-container-runtime", "runtimeArgs": ["--debug"] }
\t},
\t"log-opts": {"max-size": "10m", "größe": 1E2, "max-file": 1.0}
}
"""
DOCKER_FILES = {
    "none": None,
    "empty": "",
    "blank": " \n",
    "empty-object": "{}",
    "object-of-two-lines": "{\n}\n",
    "one-line": '{"debug": true, "dns": ["1.1.1.1"]}\n',
    "one-line-no-blanks": '{"debug":true,"runtimes":{}}',
    "two-blanks": '{\n  "debug": true,\n  "runtimes": {}\n}\n',
    "four-blanks-no-newline": '{\n    "debug": true\n}',
    "tabs": DAEMON_JSON,
    "crlf": DAEMON_JSON.replace("\n", "\r\n"),
    "odd": '{ "debug" :true\n, "features":\n{"a": false}}\n\n\n',
}

CONTAINERD_2 = """\
# written by hand
version = 2   # the format
root = "/data/containerd"

[grpc]
\taddress = "/run/x.sock"

# Kubernetes
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "registry/pause:3" # ours
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "native"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    pod_annotations = [
      "a.example/*", # one
      "b.example/*",
    ]
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = true
      BinaryName = "/usr/bin/runc"

[plugins."io.containerd.internal.v1.opt"]
  path = '''/opt'''
"""
CONTAINERD_FILES = {
    "none": None,
    "empty": "",
    "comment": "# nothing yet\n",
    "version-alone": "version = 2",
    "by-hand": CONTAINERD_2,
    "no-newline": CONTAINERD_2.rstrip("\n"),
    "crlf": CONTAINERD_2.replace("\n", "\r\n"),
    "inline": 'version = 2\n[plugins."io.containerd.grpc.v1.cri"]\ncontainerd = {snapshotter = "native"}\n',
    "dotted": 'version = 2\nplugins."io.containerd.grpc.v1.cri".sandbox_image = "x"\n',
    "version-3": 'version = 3\n[plugins."io.containerd.cri.v1.runtime"]\nenable_selinux = true\n',
    "version-3-imports": 'version = 3\nimports = [\n  "other/*.toml", # theirs\n]\n',
    "version-3-conf-d": 'imports = ["conf.d/*.toml"]\nversion = 3\n',
}

MODES = {"set": [], "all": ["--set-as-default", "--cdi"]}


class Host:
    """A place with a runtime, a config.toml of ours, and the engine's file, on which the command is run."""

    def __init__(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.place = place
        self._capsys = capsys
        self.runtime = self.program("bin/nvidia-container-runtime")
        self.settings = place / "nvhook/config.toml"
        self.settings.parent.mkdir()
        self.settings.write_text(f"# ours\n[nvhook]\nproc-root = '{place}' # simulated\n")
        (place / "etc").mkdir()

    def program(self, name: str, text: str = "#!/bin/sh\n") -> Path:
        path = self.place / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def run(self, engine: str, *words: str | Path, file: str | Path | None = None) -> tuple[int, str, str]:
        named = ["--config-file", str(file)] if file else []
        chosen = [] if "--remove" in words else ["--runtime-path", str(self.runtime)]
        self._capsys.readouterr()
        code = cli.main(["configure", engine, *chosen, *named, *map(str, words)], "/nonexistent")
        out, err = self._capsys.readouterr()
        return code, out, err

    def done(self, engine: str, *words: str | Path, file: str | Path | None = None) -> str:
        code, out, err = self.run(engine, *words, file=file)
        assert (code, err) == (0, "")
        return out

    def error(self, engine: str, *words: str | Path, file: str | Path | None = None) -> str:
        before = self.tree()
        code, out, err = self.run(engine, *words, file=file)
        assert (code, out) == (1, "")
        assert err.startswith("nvhook: ")
        assert err.count("\n") == 1
        assert before == self.tree()
        return err

    def tree(self) -> dict[str, tuple[int, int, bytes]]:
        """Every file and link: its inode, time and content."""
        found = {}
        for path in sorted(self.place.rglob("*")):
            status = path.lstat()
            content = path.read_bytes() if path.is_file() else b""
            found[str(path)] = (status.st_ino, status.st_mtime_ns * path.is_file(), content)
        return found

    def contents(self) -> dict[str, bytes]:
        return {path: content for path, (_, _, content) in self.tree().items()}


@pytest.fixture
def host(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host(tmp_path, capsys)
    monkeypatch.setenv("NVHOOK_CONFIG", str(made.settings))
    return made


def _write(path: Path, text: str | None) -> Path:
    if text is not None:
        path.write_bytes(text.encode())
    return path


# Every engine: there and back


def _situations() -> list[Any]:
    files = [("docker", "daemon.json", name, text) for name, text in DOCKER_FILES.items()]
    files += [("containerd", "config.toml", name, text) for name, text in CONTAINERD_FILES.items()]
    files += [(engine, "99-nvhook.conf", "none", None) for engine in ("crio", "podman")]
    files += [
        ("crio", "crio.conf", "by-hand", "[crio.runtime]\n# x\nselinux = true\n[crio.image]\npause_image = 'y'\n"),
        ("podman", "containers.conf", "by-hand", '[engine]\nruntime = "crun" # fast\n[containers]\nlog_size_max = 1\n'),
    ]
    return [
        pytest.param(engine, file, text, words, id=f"{engine}-{name}-{mode}")
        for engine, file, name, text in files
        for mode, words in MODES.items()
    ]


@pytest.mark.parametrize(("engine", "name", "text", "words"), _situations())
def test_there_and_back(host: Host, engine: str, name: str, text: str | None, words: list[str]) -> None:
    file = _write(host.place / "etc" / name, text)
    before = host.contents()

    code, shown, warned = host.run(engine, *words, "--dry-run", file=file)
    assert code == 0
    assert host.contents() == before

    code, out, err = host.run(engine, *words, file=file)
    assert (code, err) == (0, warned)
    assert out.startswith(shown)
    assert out.startswith("--- ")
    after = host.tree()
    assert host.contents() != before

    code, out, err = host.run(engine, *words, file=file)
    assert (code, err) == (0, warned)
    assert out.endswith(": nothing to change\n")
    assert host.tree() == after

    assert "+++ " in host.done(engine, "--remove", file=file)
    assert host.contents() == before
    assert host.done(engine, "--remove", file=file).endswith(": nothing to change\n")
    assert host.contents() == before


@pytest.mark.parametrize(("engine", "name", "text", "words"), _situations())
def test_words_one_after_the_other_and_back(
    host: Host, engine: str, name: str, text: str | None, words: list[str]
) -> None:
    """A second call adds to the first, and --remove goes back to what was before both."""
    file = _write(host.place / "etc" / name, text)
    before = host.contents()
    assert host.run(engine, file=file)[0] == 0
    assert host.run(engine, *words, file=file)[0] == 0
    after = host.tree()
    assert host.run(engine, file=file)[0] == 0
    assert host.tree() == after
    host.done(engine, "--remove", file=file)
    assert host.contents() == before


@pytest.mark.parametrize(("engine", "name", "text", "words"), _situations())
def test_diff_is_what_changed(host: Host, engine: str, name: str, text: str | None, words: list[str]) -> None:
    """`patch` makes the same of the old file."""
    patch = shutil.which("patch")
    if not patch or (text and "\r" in text):
        pytest.skip("no `patch`, or lines that it does not take as they are")
    file = _write(host.place / "etc" / name, text)
    shown = host.run(engine, *words, file=file)[1]
    files = [path for path in (host.place).rglob("*") if path.is_file() and "nvhook" not in path.parts]
    after = {path: path.read_bytes() for path in files}
    host.done(engine, "--remove", file=file)
    (host.place / "etc/conf.d").mkdir(exist_ok=True)
    subprocess.run([patch, "-p1", "-s", "-u", "-d", "/"], input=shown, text=True, check=True)
    assert {path: path.read_bytes() for path in files} == after


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o664])
def test_mode_and_owner_survive(host: Host, mode: int) -> None:
    file = _write(host.place / "daemon.json", DAEMON_JSON)
    file.chmod(mode)
    if os.geteuid() == 0:
        os.chown(file, 1, 2)
    owner = file.stat().st_uid, file.stat().st_gid
    for words in ([], ["--remove"]):
        host.done("docker", *words, file=file)
        status = file.stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (mode, *owner)
        notes = host.settings.parent / "configured"
        assert all(note.stat().st_mode & 0o077 == 0 for note in notes.glob("*"))


def test_new_file_is_readable_by_all(host: Host) -> None:
    file = host.place / "daemon.json"
    host.done("docker", file=file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


def test_link_stays(host: Host) -> None:
    real = _write(host.place / "etc/real.json", DAEMON_JSON)
    link = host.place / "daemon.json"
    link.symlink_to("etc/real.json")
    host.done("docker", file=link)
    assert os.readlink(link) == "etc/real.json"
    assert json.loads(real.read_text())["runtimes"]["nvidia"]["path"] == str(host.runtime)
    host.done("docker", "--remove", file=link)
    assert os.readlink(link) == "etc/real.json"
    assert real.read_text() == DAEMON_JSON


def test_remove_keeps_what_others_did_since(host: Host) -> None:
    file = _write(host.place / "daemon.json", DAEMON_JSON)
    host.done("docker", "--set-as-default", "--cdi", file=file)
    file.write_text(file.read_text().replace('"debug": true', '"debug": false').replace('"cdi": true', '"cdi": false'))
    host.done("docker", "--remove", file=file)
    expected = json.loads(DAEMON_JSON)
    expected["debug"] = False
    expected["features"]["cdi"] = False  # theirs by now
    assert json.loads(file.read_text()) == expected


def test_remove_keeps_what_others_did_since_in_toml(host: Host) -> None:
    file = _write(host.place / "config.toml", CONTAINERD_2)
    host.done("containerd", "--set-as-default", "--cdi", file=file)
    file.write_text("oom_score = 1 # new\n" + file.read_text())
    host.done("containerd", "--remove", file=file)
    assert tomllib.loads(file.read_text()) == {"oom_score": 1, **tomllib.loads(CONTAINERD_2)}
    assert "# ours" in file.read_text()


def test_remove_of_a_file_of_ours_that_others_wrote_in(host: Host) -> None:
    file = host.place / "99.conf"
    host.done("podman", "--set-as-default", file=file)
    file.write_text(file.read_text() + "\n[containers]\nlog_size_max = 1\n")
    host.done("podman", "--remove", file=file)
    assert tomllib.loads(file.read_text()) == {"containers": {"log_size_max": 1}}


def test_configure_after_others_edited_then_remove(host: Host) -> None:
    """What they did in between belongs to what comes back."""
    file = _write(host.place / "daemon.json", '{\n  "debug": true\n}\n')
    host.done("docker", "--set-as-default", file=file)
    file.write_text(file.read_text().replace('"debug": true', '"debug": false'))
    host.done("docker", "--cdi", file=file)
    host.done("docker", "--remove", file=file)
    assert file.read_text() == '{\n  "debug": false\n}\n'


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        pytest.param("{runtime}", {"debug": True}, id="ours"),
        pytest.param("/usr/bin/nvidia-container-runtime", None, id="of-others"),
    ],
)
def test_remove_without_a_note(host: Host, path: str, expected: object) -> None:
    """Only what names this very program; NVIDIA's own registration is not ours to take away."""
    before = {
        "debug": True,
        "default-runtime": "nvidia",
        "runtimes": {"nvidia": {"path": path.format(runtime=host.runtime)}},
    }
    file = _write(host.place / "daemon.json", json.dumps(before, indent=2))
    host.done("docker", "--remove", "--runtime-path", host.runtime, file=file)
    assert json.loads(file.read_text()) == (expected or before)


def test_remove_drop_in_without_a_note(host: Host) -> None:
    file = host.place / "99.conf"
    host.done("podman", "--set-as-default", file=file)
    shutil.rmtree(host.settings.parent / "configured")
    host.done("podman", "--remove", "--runtime-path", host.runtime, file=file)
    assert not file.exists()


def test_note_of_a_run_that_died_is_void(host: Host) -> None:
    """The note is written first: the file is still as it was."""
    file = _write(host.place / "daemon.json", "{}\n")
    host.done("docker", file=file)
    file.write_text("{}\n")
    host.done("docker", "--remove", file=file)
    assert file.read_text() == "{}\n"
    host.done("docker", file=file)
    host.done("docker", "--remove", file=file)
    assert file.read_text() == "{}\n"


def test_note_that_is_none(host: Host) -> None:
    file = _write(host.place / "daemon.json", "{}\n")
    host.done("docker", file=file)
    (note,) = (host.settings.parent / "configured").iterdir()
    note.write_text("[]")
    assert f"`{note}`: not a note of nvhook; remove it" in host.error("docker", "--remove", file=file)


# Docker


@pytest.mark.parametrize(
    ("before", "words", "expected"),
    [
        pytest.param({}, [], {"runtimes": {"nvidia": {"path": "R", "runtimeArgs": []}}}, id="register"),
        pytest.param(
            {"default-runtime": "x"},
            [],
            {"default-runtime": "x", "runtimes": {"nvidia": {"path": "R", "runtimeArgs": []}}},
            id="default-stays",
        ),
        pytest.param(
            {"default-runtime": "x"},
            ["--set-as-default"],
            {"default-runtime": "nvidia", "runtimes": {"nvidia": {"path": "R", "runtimeArgs": []}}},
            id="default-set",
        ),
        pytest.param(
            {"features": {"containerd-snapshotter": True}},
            ["--cdi"],
            {
                "features": {"containerd-snapshotter": True, "cdi": True},
                "runtimes": {"nvidia": {"path": "R", "runtimeArgs": []}},
            },
            id="features-stay",
        ),
        pytest.param(
            {"runtimes": {"nvidia": {"path": "other", "runtimeArgs": ["-x"]}, "kata": {"path": "k"}}},
            [],
            {"runtimes": {"nvidia": {"path": "R", "runtimeArgs": ["-x"]}, "kata": {"path": "k"}}},
            id="registered-by-others",
        ),
        pytest.param(
            {"runtimes": {"nvidia": {"runtimeType": "t", "options": {"a": 1}}}},
            [],
            {"runtimes": {"nvidia": {"path": "R", "runtimeArgs": []}}},
            id="runtime-type-goes",
        ),
        pytest.param(
            {},
            ["--runtime-name", "gpu", "--set-as-default"],
            {"runtimes": {"gpu": {"path": "R", "runtimeArgs": []}}, "default-runtime": "gpu"},
            id="another-name",
        ),
    ],
)
def test_docker_keys(host: Host, before: object, words: list[str], expected: object) -> None:
    file = _write(host.place / "daemon.json", json.dumps(before, indent=2))
    host.done("docker", *words, file=file)
    found = json.loads(file.read_text().replace(str(host.runtime), "R"))
    assert found == expected
    assert [*found][: len(before)] == [*before]  # type: ignore[arg-type, misc]


def test_docker_diff_touches_no_other_line(host: Host) -> None:
    file = _write(host.place / "daemon.json", DAEMON_JSON)
    host.done("docker", "--set-as-default", file=file)
    old, new = DAEMON_JSON.splitlines(), file.read_text().splitlines()
    changed = [line.strip() for line in old if line not in new]
    assert changed == [
        '"default-runtime": "crun",',
        '"nvidia": { "path": "nvidia-container-runtime", "runtimeArgs": ["--debug"] }',
    ]


def test_docker_says_what_to_restart(host: Host) -> None:
    assert "systemctl restart docker\n" in host.done("docker", file=host.place / "daemon.json")
    assert "systemctl" not in host.done("docker", file=host.place / "daemon.json")


@pytest.mark.parametrize("name", sorted(DOCKER_FILES))
def test_docker_accepts_it(host: Host, name: str) -> None:
    dockerd = shutil.which("dockerd")
    options = subprocess.run([dockerd, "--help"], capture_output=True, text=True, check=False).stdout if dockerd else ""
    if "--validate" not in options:
        pytest.skip("no dockerd that has --validate")
    file = _write(host.place / "daemon.json", DOCKER_FILES[name])
    host.done("docker", file=file)
    subprocess.run([str(dockerd), "--validate", "--config-file", str(file)], check=True)


# Swarm


def test_swarm_announces_gpus_and_names_the_variable(host: Host, proc: Path) -> None:
    assert proc == host.place
    file = _write(host.place / "daemon.json", '{"node-generic-resources": ["FPGA=2", "NVIDIA-GPU=4"]}')
    before = host.contents()
    out = host.done("docker", "--swarm-resource", "--set-as-default", file=file)
    assert "DOCKER_RESOURCE_NVIDIA-GPU" in out
    resources = ["FPGA=2", "NVIDIA-GPU=GPU-aa", "NVIDIA-GPU=GPU-bb"]
    assert json.loads(file.read_text())["node-generic-resources"] == resources
    assert config.load(str(host.settings)).swarm_resources == ("DOCKER_RESOURCE_NVIDIA-GPU",)
    assert "# simulated" in host.settings.read_text()
    assert host.done("docker", "--swarm-resource", "--set-as-default", file=file).endswith("nothing to change\n")
    host.done("docker", "--remove", file=file)
    assert host.contents() == before


def test_swarm_variable_is_the_one_the_request_reads(host: Host, proc: Path) -> None:
    host.done("docker", "--swarm-resource", "--set-as-default", file=proc / "daemon.json")
    env = {"DOCKER_RESOURCE_NVIDIA-GPU": "GPU-aa", "NVIDIA_VISIBLE_DEVICES": "all"}
    described = spec.Spec(env=env, mounts=[], annotations={}, privileged=False, rootfs="/", device_rules=[])
    asked = request.read(described, config.load(str(host.settings)))
    assert asked is not None
    assert asked.devices == ("GPU-aa",)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        pytest.param("", ("DOCKER_RESOURCE_NVIDIA-GPU",), id="none"),
        pytest.param("swarm-resource = ''", ("DOCKER_RESOURCE_NVIDIA-GPU",), id="empty"),
        pytest.param("swarm-resource = 'A, B'", ("A", "B", "DOCKER_RESOURCE_NVIDIA-GPU"), id="others"),
        pytest.param("swarm-resource = ['A']", ("A", "DOCKER_RESOURCE_NVIDIA-GPU"), id="list"),
        pytest.param("swarm-resource = 'DOCKER_RESOURCE_NVIDIA-GPU'", ("DOCKER_RESOURCE_NVIDIA-GPU",), id="there"),
    ],
)
def test_swarm_variable_beside_others(host: Host, proc: Path, line: str, expected: tuple[str, ...]) -> None:
    text = f"{line}\n{host.settings.read_text()}"
    host.settings.write_text(text)
    host.done("docker", "--swarm-resource", "--set-as-default", file=proc / "daemon.json")
    assert config.load(str(host.settings)).swarm_resources == expected
    host.done("docker", "--remove", file=proc / "daemon.json")
    assert host.settings.read_text() == text


def test_swarm_without_the_default_runtime_warns(host: Host, proc: Path) -> None:
    code, _, err = host.run("docker", "--swarm-resource", file=proc / "daemon.json")
    assert code == 0
    assert err == "nvhook: warning: a Swarm service cannot choose a runtime: use --set-as-default as well\n"


def test_swarm_uuid_not_known_yet(host: Host, proc: Path) -> None:
    for information in proc.glob("proc/driver/nvidia/gpus/*/information"):
        information.write_text(information.read_text().replace("GPU-aa", "GPU-????????"))
    assert "run `nvidia-smi -L`" in host.error("docker", "--swarm-resource", file=proc / "daemon.json")


def test_swarm_without_a_driver(host: Host) -> None:
    assert "kernel module" in host.error("docker", "--swarm-resource", file=host.place / "daemon.json")


def test_swarm_is_docker_s_alone(host: Host) -> None:
    with pytest.raises(SystemExit) as raised:
        host.run("podman", "--swarm-resource", file=host.place / "x")
    assert raised.value.code == 2


# containerd


def _cri(file: Path, plugin: str) -> Any:
    return tomllib.loads(file.read_bytes().decode())["plugins"][plugin]


def test_containerd_2_copies_the_default_runtime(host: Host) -> None:
    file = _write(host.place / "config.toml", CONTAINERD_2)
    host.done("containerd", "--set-as-default", "--cdi", file=file)
    table = _cri(file, CRI_2)
    assert table["containerd"]["runtimes"]["nvidia"] == {
        "runtime_type": "io.containerd.runc.v2",
        "pod_annotations": ["a.example/*", "b.example/*"],
        "options": {"BinaryName": str(host.runtime), "SystemdCgroup": True},
    }
    assert table["containerd"]["default_runtime_name"] == "nvidia"
    assert table["enable_cdi"] is True
    assert table["sandbox_image"] == "registry/pause:3"


@pytest.mark.parametrize(
    ("default", "copied"),
    [
        pytest.param("crun", "crun", id="default"),
        pytest.param("kata", "runc", id="default-is-a-sandbox"),
        pytest.param("nvidia", "runc", id="default-is-ours"),
        pytest.param("gone", "runc", id="default-is-not-there"),
    ],
)
def test_containerd_which_runtime_is_copied(host: Host, default: str, copied: str) -> None:
    place = f'plugins."{CRI_2}".containerd'
    text = f'version = 2\n[{place}]\ndefault_runtime_name = "{default}"\n'
    for name, shim in {"kata": "io.containerd.kata.v2", "crun": "io.containerd.runc.v2", "runc": ""}.items():
        text += f'[{place}.runtimes.{name}]\nruntime_type = "{shim}"\nruntime_root = "/{name}"\n'
    file = _write(host.place / "config.toml", text)
    host.done("containerd", file=file)
    assert _cri(file, CRI_2)["containerd"]["runtimes"]["nvidia"] == {
        "runtime_type": "io.containerd.runc.v2",
        "runtime_root": f"/{copied}",
        "options": {"BinaryName": str(host.runtime)},
    }


def test_containerd_2_edits_the_file_whose_table_counts(host: Host) -> None:
    """containerd 1.x takes the whole table of the plugin from the last file that has one."""
    main = _write(host.place / "config.toml", 'imports = ["conf.d/*.toml"]\n' + CONTAINERD_2)
    directory = host.place / "conf.d"
    directory.mkdir()
    _write(directory / "10-debug.toml", '[debug]\nlevel = "debug"\n')
    counts = _write(directory / "20-cri.toml", f'[plugins."{CRI_2}"]\nsandbox_image = "x"\n')
    before = host.contents()
    host.done("containerd", file=main)
    assert main.read_bytes() == before[str(main)]
    assert _cri(counts, CRI_2)["containerd"]["runtimes"]["nvidia"]["options"]["SystemdCgroup"] is True
    host.done("containerd", "--remove", file=main)
    assert host.contents() == before


def test_containerd_3_has_a_drop_in(host: Host) -> None:
    file = _write(host.place / "config.toml", CONTAINERD_FILES["version-3"])
    other = host.place / "conf.d/50-other.toml"
    other.parent.mkdir()
    other.write_text("not read so far")
    host.done("containerd", "--set-as-default", "--cdi", file=file)
    drop_in = host.place / "conf.d/99-nvhook.toml"
    assert tomllib.loads(file.read_text())["imports"] == [f"{host.place}/conf.d/99-nvhook*.toml"]
    table = _cri(drop_in, CRI_3)
    assert table["enable_cdi"] is True
    assert table["containerd"]["default_runtime_name"] == "nvidia"
    assert table["containerd"]["runtimes"]["nvidia"]["options"]["BinaryName"] == str(host.runtime)
    assert tomllib.loads(drop_in.read_text())["version"] == 3


def test_containerd_3_imports_another_directory(host: Host) -> None:
    """A star of containerd's stands within one name, so that `*.toml` does not mean a file in conf.d."""
    file = _write(host.place / "config.toml", "imports = ['*.toml']\nversion = 3\n")
    host.done("containerd", file=file)
    assert tomllib.loads(file.read_text())["imports"] == ["*.toml", f"{host.place}/conf.d/99-nvhook*.toml"]


def test_containerd_3_imports_our_directory_already(host: Host) -> None:
    text = CONTAINERD_FILES["version-3-conf-d"]
    file = _write(host.place / "config.toml", text)
    host.done("containerd", file=file)
    assert file.read_text() == text
    assert (host.place / "conf.d/99-nvhook.toml").exists()


def test_containerd_3_copies_from_all_files_together(host: Host) -> None:
    file = _write(host.place / "config.toml", 'version = 3\nimports = ["a.toml"]\n')
    place = f'plugins."{CRI_3}".containerd.runtimes.runc'
    _write(host.place / "a.toml", f'version = 3\n[{place}]\nruntime_type = ""\noptions = {{SystemdCgroup = true}}\n')
    host.done("containerd", file=file)
    runtime = _cri(host.place / "conf.d/99-nvhook.toml", CRI_3)["containerd"]["runtimes"]["nvidia"]
    assert runtime["options"] == {"SystemdCgroup": True, "BinaryName": str(host.runtime)}


def test_containerd_3_file_that_is_read_later(host: Host) -> None:
    file = _write(host.place / "config.toml", CONTAINERD_FILES["version-3-conf-d"])
    later = host.place / "conf.d/99-nvidia.toml"
    later.parent.mkdir()
    later.write_text(f'[plugins."{CRI_3}".containerd.runtimes.nvidia.options]\nBinaryName = "/other"\n')
    error = host.error("containerd", file=file)
    assert f"`{later}` is read after" in error
    assert "`options.BinaryName`" in error


@pytest.mark.parametrize(
    ("version", "expected"),
    [("containerd github.com/containerd/containerd v1.7.2 abc", 2), ("containerd containerd.io v2.1.0 abc", 3)],
    ids=["1.7", "2.1"],
)
def test_containerd_new_file_is_of_the_version_that_is_installed(
    host: Host, monkeypatch: pytest.MonkeyPatch, version: str, expected: int
) -> None:
    host.program("fake/containerd", f"#!/bin/sh\n[ $1 = --version ] && echo '{version}' || echo SystemdCgroup = true\n")
    monkeypatch.setenv("PATH", f"{host.place}/fake:/usr/bin:/bin")
    file = host.place / "config.toml"
    host.done("containerd", file=file)
    assert tomllib.loads(file.read_text())["version"] == expected
    where, plugin = (file, CRI_2) if expected == 2 else (host.place / "conf.d/99-nvhook.toml", CRI_3)
    assert _cri(where, plugin)["containerd"]["runtimes"]["nvidia"]["options"]["SystemdCgroup"] is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param('disabled_plugins = ["cri"]\n', "is of version 1", id="no-version"),
        pytest.param("version = 1\n", "is of version 1", id="version-1"),
        pytest.param("version = 5\n", "unknown version `5`", id="version-5"),
        pytest.param("version = 'x'\n", "unknown version `x`", id="version-word"),
        pytest.param("version = 3\nimports = 'x'\n", "`imports` must be a list, not `x`", id="imports-word"),
        pytest.param("version = 2\nplugins = 1\n", "`plugins` must be a table, not `1`", id="plugins-number"),
        pytest.param("version = 2\n[[plugins]]\n", "`plugins` must be a table", id="plugins-list"),
    ],
)
def test_containerd_refuses(host: Host, text: str, message: str) -> None:
    assert message in host.error("containerd", file=_write(host.place / "config.toml", text))


def test_containerd_without_cri_warns(host: Host) -> None:
    file = _write(host.place / "config.toml", f'version = 2\ndisabled_plugins = ["{CRI_2}"]\n')
    code, _, err = host.run("containerd", file=file)
    assert code == 0
    assert "`disabled_plugins`" in err


@pytest.mark.parametrize("name", [name for name in CONTAINERD_FILES if "version-3" not in name])
def test_containerd_reads_it(host: Host, name: str) -> None:
    containerd = shutil.which("containerd")
    if not containerd:
        pytest.skip("no containerd")
    file = _write(host.place / "config.toml", CONTAINERD_FILES[name])
    host.done("containerd", "--set-as-default", "--cdi", file=file)
    command = [containerd, "--config", str(file), "config", "dump"]
    dump = tomllib.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    (table,) = (table for plugin, table in dump["plugins"].items() if plugin in (CRI_2, CRI_3))
    assert table["containerd"]["default_runtime_name"] == "nvidia"
    assert {"nvidia", "runc"} <= table["containerd"]["runtimes"].keys()
    runtime = table["containerd"]["runtimes"]["nvidia"]
    assert runtime["runtime_type"] == "io.containerd.runc.v2"
    assert runtime["options"]["BinaryName"] == str(host.runtime)


# CRI-O and Podman


def test_crio_drop_in(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    conmon = host.program("fake/conmon")
    monkeypatch.setenv("PATH", str(conmon.parent))
    file = host.place / "99-nvhook.toml"
    host.done("crio", "--set-as-default", file=file)
    runtime = {"runtime_path": str(host.runtime), "runtime_type": "oci", "monitor_path": str(conmon)}
    expected = {"crio": {"runtime": {"default_runtime": "nvidia", "runtimes": {"nvidia": runtime}}}}
    assert tomllib.loads(file.read_text()) == expected


def test_crio_drop_in_without_a_monitor(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(host.place))
    file = host.place / "99-nvhook.toml"
    host.done("crio", file=file)
    runtime = {"runtime_path": str(host.runtime), "runtime_type": "oci"}
    assert tomllib.loads(file.read_text()) == {"crio": {"runtime": {"runtimes": {"nvidia": runtime}}}}


@pytest.mark.parametrize("engine", ["crio", "podman"])
def test_cdi_without_being_told_is_said(host: Host, engine: str) -> None:
    assert "--cdi changes nothing" in host.run(engine, "--cdi", file=host.place / "x.conf")[2]


def test_podman_drop_in(host: Host) -> None:
    file = host.place / "99-nvhook.conf"
    out = host.done("podman", "--set-as-default", file=file)
    assert "systemctl" not in out
    expected = {"engine": {"runtime": "nvidia", "runtimes": {"nvidia": [str(host.runtime)]}}}
    assert tomllib.loads(file.read_text()) == expected


def test_podman_reads_it(host: Host) -> None:
    podman = shutil.which("podman")
    if not podman:
        pytest.skip("no podman")
    file = host.place / "99-nvhook.conf"
    host.runtime = Path(shutil.which("crun") or shutil.which("runc") or host.runtime)
    host.done("podman", "--set-as-default", file=file)
    env = {**os.environ, "CONTAINERS_CONF": str(file)}
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # Podman takes no runroot of more than 50 characters
        places = ["--root", f"{short}/root", "--runroot", f"{short}/run", "--tmpdir", f"{short}/tmp"]
        places += ["--network-config-dir", f"{short}/net", "--storage-driver", "vfs"]
        command = [podman, *places, "info", "--format", "{{.Host.OCIRuntime.Name}} {{.Host.OCIRuntime.Path}}"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.stdout == f"nvidia {host.runtime}\n", done.stderr


# Bad input


@pytest.mark.parametrize(
    ("engine", "text", "message"),
    [
        pytest.param("docker", b'{"a": 1,\n "b": }', "line 2, column 7", id="json"),
        pytest.param("docker", b'{"a": 1} x', "extra data at line 1, column 10", id="json-more"),
        pytest.param("docker", b'{"a": 1,}', "line 1, column 9", id="json-comma"),
        pytest.param("docker", b'{"a": "\xff"}', "not UTF-8 at line 1, column 8", id="json-bytes"),
        pytest.param("docker", b"[]", "not an object at line 1, column 1", id="json-list"),
        pytest.param("docker", b"[" * 100000, "at line 1, column", id="json-deep"),
        pytest.param("docker", b'{"a": %s}' % (b"9" * 5000), "4300 digits", id="json-endless-number"),
        pytest.param("docker", b'{"runtimes": []}', "`runtimes` must be a table, not `[]`", id="runtimes-list"),
        pytest.param("docker", b'{"runtimes": null}', "`runtimes` must be a table, not `None`", id="runtimes-null"),
        pytest.param("containerd", b"version = 2\nx = \n", "line 2, column 5", id="toml"),
        pytest.param("containerd", b'x = """\n', "Unterminated string at line 2, column 1", id="toml-end"),
        pytest.param("containerd", b"[a]\n[a]\n", "at line 2, column 3", id="toml-twice"),
        pytest.param("containerd", b"a = 1\nb = '\xff'", "not UTF-8 at line 2, column 6", id="toml-bytes"),
        pytest.param("containerd", b"a = " + b"9" * 5000, "4300 digits", id="toml-endless-number"),
        pytest.param("containerd", b"[%s]" % b".".join([b"a"] * 5000), "too deeply nested", id="toml-deep"),
        pytest.param("crio", b"[crio\n", "line 1, column 6", id="crio"),
        pytest.param("podman", b"= 1\n", "line 1, column 1", id="podman"),
    ],
)
def test_file_that_does_not_parse_is_left_alone(host: Host, engine: str, text: bytes, message: str) -> None:
    file = host.place / "file"
    file.write_bytes(text)
    for words in ([], ["--dry-run"]):
        error = host.error(engine, *words, file=file)
        assert message in error
        assert f"`{file}`" in error


def test_file_is_a_directory(host: Host) -> None:
    expected = f"config error: read `{host.place}`: is a directory; name the file itself with --config-file\n"
    assert host.error("docker", file=host.place) == f"nvhook: {expected}"


def test_file_is_a_pipe(host: Host) -> None:
    os.mkfifo(host.place / "pipe")
    code, _, err = host.run("docker", file=host.place / "pipe")
    assert (code, "not a configuration file" in err) == (1, True)


def test_file_is_a_link_to_itself(host: Host) -> None:
    (host.place / "loop").symlink_to("loop")
    code, _, err = host.run("docker", file=host.place / "loop")
    assert (code, "too many levels of symbolic links" in err) == (1, True)


def test_no_parent_directory(host: Host) -> None:
    assert "no directory `/nonexistent/etc`; create it" in host.error("docker", file="/nonexistent/etc/daemon.json")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        pytest.param("/nonexistent/r", "`/nonexistent/r`: no such program; install nvhook, or name", id="gone"),
        pytest.param("/etc/passwd", "`/etc/passwd`: is not executable", id="not-executable"),
        pytest.param("/usr", "`/usr`: no such program", id="directory"),
    ],
)
def test_runtime_that_is_not_there(host: Host, path: str, message: str) -> None:
    assert message in host.error("docker", "--runtime-path", path, file=host.place / "daemon.json")


@pytest.mark.parametrize("name", ["runc", "crun", "", "a b", "-x", "a/b", 'a"b'])
def test_runtime_name_that_is_none(host: Host, name: str) -> None:
    assert f"`{name}` is no name" in host.error("docker", f"--runtime-name={name}", file=host.place / "daemon.json")


def test_remove_needs_no_runtime(host: Host) -> None:
    file = _write(host.place / "daemon.json", "{}")
    host.done("docker", file=file)
    host.runtime.unlink()
    host.done("docker", "--remove", file=file)
    assert file.read_text() == "{}"


@pytest.mark.parametrize(
    ("beside", "on_path"), [(True, False), (True, True), (False, True), (False, False)], ids=["0", "1", "2", "3"]
)
def test_runtime_is_the_one_beside_the_command(
    host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], beside: bool, on_path: bool
) -> None:
    program = host.program("prefix/nvhook")
    link = host.place / "nvhook-link"
    link.symlink_to(program)
    first, second = host.place / "prefix/nvidia-container-runtime", host.place / "path/nvidia-container-runtime"
    for path, exists in ((first, beside), (second, on_path)):
        if exists:
            host.program(str(path.relative_to(host.place)))
    monkeypatch.setattr(sys, "argv", [str(link)])
    monkeypatch.setenv("PATH", str(second.parent))
    file = host.place / "daemon.json"
    code = cli.main(["configure", "docker", "--config-file", str(file)], "/nonexistent")
    err = capsys.readouterr().err
    if beside or on_path:
        assert json.loads(file.read_text())["runtimes"]["nvidia"]["path"] == str(first if beside else second)
    else:
        assert (code, "install nvhook, or name the program with --runtime-path" in err) == (1, True)


def test_engine_that_is_not_installed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.path.exists("/etc/crio"):
        pytest.skip("CRI-O is installed")
    monkeypatch.setenv("PATH", str(host.place))
    assert "CRI-O is not installed: no `crio` on the PATH" in host.error("crio")


@pytest.mark.root
def test_file_that_cannot_be_written(host: Host) -> None:
    """By the real command, as a user who may read the file."""
    file = _write(host.place / "daemon.json", "{}")
    modules = str(Path(cli.__file__).parent.parent)
    # Imported first: the user may not come to where the modules are.
    early = (
        "import difflib, hashlib, os, sys, tomlkit; from nvhook import cli; "
        "from nvhook.commands.configure import changes, command, documents, engines"
    )
    code = f"{early}; os.setuid(65534); sys.exit(cli.main(sys.argv[1:], '/nonexistent'))"
    words = ["configure", "docker", "--config-file", str(file), "--runtime-path", "/bin/true"]
    for directory in [host.place, *host.place.parents]:
        if directory.stat().st_uid == os.geteuid() and directory != Path("/") and "pytest" in str(directory):
            directory.chmod(0o755)
    paths = os.pathsep.join([modules, *(path for path in sys.path if path)])
    env = {"PYTHONPATH": paths, "PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code, *words], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "permission denied; run it as root" in done.stderr
    assert file.read_text() == "{}"


def test_command_as_it_is_installed(host: Host) -> None:
    """With its own libraries, and an environment that has nothing else."""
    command = [str(LAUNCHER), "configure", "podman", "--runtime-path", str(host.runtime)]
    file = host.place / "99.conf"
    env = {"NVHOOK_CONFIG": str(host.settings)}
    subprocess.run([*command, "--config-file", str(file)], env=env, check=True, capture_output=True)
    assert tomllib.loads(file.read_text()) == {"engine": {"runtimes": {"nvidia": [str(host.runtime)]}}}


# Restart


def _systemctl(host: Host, monkeypatch: pytest.MonkeyPatch, text: str) -> Path:
    log = host.place / "log"
    host.program("fake/systemctl", f"#!/bin/sh\necho $* >>{log}\n{text}\n")
    monkeypatch.setenv("PATH", f"{host.place}/fake:{os.environ['PATH']}")
    return log


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        pytest.param([], None, id="unasked"),
        pytest.param(["--restart"], "restart docker\n", id="asked"),
        pytest.param(["--restart", "--dry-run"], None, id="dry"),
        pytest.param(["--restart", "--remove"], "restart docker\n", id="remove"),
    ],
)
def test_restart(host: Host, monkeypatch: pytest.MonkeyPatch, words: list[str], expected: str | None) -> None:
    log = _systemctl(host, monkeypatch, "")
    host.done("docker", *words, file=host.place / "daemon.json")
    assert (log.read_text() if log.exists() else None) == expected


def test_restart_that_fails(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    _systemctl(host, monkeypatch, "echo 'Unit not found.' >&2; exit 5")
    code, _, err = host.run("containerd", "--restart", file=host.place / "config.toml")
    assert code == 1
    assert "`systemctl restart containerd`: Unit not found.; see `journalctl -u containerd`" in err


def test_restart_without_systemd(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(host.place))
    code, _, err = host.run("docker", "--restart", file=host.place / "daemon.json")
    assert (code, "run `systemctl`: not found" in err) == (1, True)


def test_restart_of_podman_is_nothing(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    log = _systemctl(host, monkeypatch, "")
    assert "no daemon" in host.done("podman", "--restart", file=host.place / "x.conf")
    assert not log.exists()


# Documents


def _document(kind: Callable[[str, str], Document], text: str) -> Document:
    return kind(text, "file")


@pytest.mark.parametrize(
    ("text", "path", "value", "expected"),
    [
        pytest.param("{}", ("a",), 1, '{\n    "a": 1\n}', id="empty"),
        pytest.param('{"a":1}', ("b", "c"), [], '{"a":1,"b":{"c": []}}', id="one-line"),
        pytest.param('{"a": {}}', ("a", "b"), 1, '{"a": {"b": 1}}', id="one-line-empty-inside"),
        pytest.param('{\n  "a": {}\n}', ("a", "b"), 1, '{\n  "a": {\n    "b": 1\n  }\n}', id="lines-empty-inside"),
        pytest.param('{"a": "}, {", "b": 2}', ("b",), 3, '{"a": "}, {", "b": 3}', id="braces-in-a-string"),
        pytest.param('{"a\\"": 1}', ('a"',), 2, '{"a\\"": 2}', id="quote-in-a-key"),
        pytest.param('{\n\t"a": [\n\t\t1\n\t]\n}\n', ("b",), 1, '{\n\t"a": [\n\t\t1\n\t],\n\t"b": 1\n}\n', id="tabs"),
    ],
)
def test_json_put(text: str, path: tuple[str, ...], value: object, expected: str) -> None:
    document = _document(Json, text)
    document.put(path, value)
    assert document.text == expected


@pytest.mark.parametrize(
    ("text", "path", "expected"),
    [
        pytest.param('{"a": 1}', ("a",), "{}", id="only"),
        pytest.param('{"a": 1, "b": 2}', ("a",), '{"b": 2}', id="first"),
        pytest.param('{"a": 1, "b": 2, "c": 3}', ("b",), '{"a": 1, "c": 3}', id="middle"),
        pytest.param('{\n  "a": 1,\n  "b": 2\n}\n', ("b",), '{\n  "a": 1\n}\n', id="last"),
        pytest.param('{"a": {"b": 1}}', ("a", "b"), '{"a": {}}', id="inside"),
        pytest.param('{"a": 1}', ("x", "y"), '{"a": 1}', id="not-there"),
    ],
)
def test_json_drop(text: str, path: tuple[str, ...], expected: str) -> None:
    document = _document(Json, text)
    document.drop(path)
    assert document.text == expected


def test_json_key_that_is_there_twice() -> None:
    """The last one counts, for us as for dockerd."""
    document = _document(Json, '{"a": 1, "a": 2}')
    document.put(("a",), 3)
    assert document.text == '{"a": 1, "a": 3}'


class Clumsy(Json):
    def _with(self, path: tuple[str, ...], value: object) -> str:
        return super()._with(path, value).replace("2", "3")


@pytest.mark.parametrize("text", ['{"b": 2}', '{"b": 1, "": 2}'])
def test_change_that_would_change_more_is_refused(text: str) -> None:
    document = _document(Clumsy, text)
    with pytest.raises(ConfigError, match="`a` cannot be changed without harm to the rest of the file"):
        document.put(("a",), 1)
    assert document.text == text


@pytest.mark.parametrize(
    ("text", "path", "value", "expected"),
    [
        pytest.param("", ("a",), True, "a = true\n", id="empty"),
        pytest.param("x = 1", ("a", "b"), "c", 'x = 1\n\n[a]\nb = "c"\n', id="new-table"),
        pytest.param("[a]\n  x = 1 # one\n[b]\n", ("a", "y"), 2, "[a]\n  x = 1 # one\n  y = 2\n[b]\n", id="indented"),
        pytest.param("a = [\n  1, # one\n]\n", ("a",), [1, 2], "a = [\n  1, # one\n  2,\n]\n", id="longer-list"),
        pytest.param("a = {b = 1}\n", ("a", "c"), 2, "a = {b = 1,c = 2}\n", id="inline"),
        pytest.param("a.b = 1\n", ("a", "c"), 2, "a.b = 1\na.c = 2\n", id="dotted"),
        pytest.param("a = 'x' # y\n", ("a",), "z", 'a = "z" # y\n', id="comment-behind"),
    ],
)
def test_toml_put(text: str, path: tuple[str, ...], value: object, expected: str) -> None:
    document = _document(Toml, text)
    document.put(path, value)
    assert document.text == expected
