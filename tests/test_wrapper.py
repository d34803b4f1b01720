# SPDX-License-Identifier: Apache-2.0
"""nvidia-container-runtime, the launcher and what it starts, with a low-level runtime of a few lines."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from containers import COMPILE, HOOK, WRAPPER
from nvhook.errors import SpecError
from nvhook.request import config as configuration
from nvhook.request import spec
from nvhook.version import VERSION
from nvruntime import bundle

# Leaves its arguments and environment beside itself.
RUNTIME = """\
#!/bin/sh
printf '%s\\0' "$@" >"${0%/*}/arguments"; exec /usr/bin/env -0 >"${0%/*}/environment"
"""
# In the place of the interpreter: tells that it was asked.
NO_PYTHON = "#!/bin/sh\necho 'python was started'; exit 42\n"

HOOK_ENTRY = {
    "path": str(HOOK),
    "args": ["nvidia-container-runtime-hook", "--no-audit", "--config", "{config}", "prestart"],
    "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
}
RULES = [
    {"allow": True, "type": "c", "major": 195, "minor": 1, "access": "rw"},
    {"allow": True, "type": "c", "major": 195, "minor": 0, "access": "rw"},
    {"allow": True, "type": "c", "major": 195, "minor": 255, "access": "rw"},
    {"allow": True, "type": "c", "major": 511, "minor": 0, "access": "rw"},
    {"allow": True, "type": "c", "major": 511, "minor": 1, "access": "rw"},
]
DENY_ALL = {"allow": False, "access": "rwm"}


def _program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Place:
    """A fake runc first on PATH, a config.toml of a host made by hand, a bundle."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.runtime = _program(directory / "bin/runc", RUNTIME)
        self.config = directory / "config.toml"
        self.configure("")
        self.bundle = directory / "bundle"
        self.bundle.mkdir()
        self.spec = self.bundle / "config.json"

    def configure(self, text: str) -> None:
        self.config.write_text(
            f"{text}\n[nvhook]\nproc-root = '{self.directory}'\nstate-dir = '{self.directory}/state'\n"
        )

    def write(self, document: object | None = None, *, env: dict[str, str] | None = None, **more: object) -> None:
        """config.json: `document`, or a small one with this environment."""
        if document is None:
            words = [f"{name}={value}" for name, value in (env or {}).items()]
            document = {"ociVersion": "1.0.2", "process": {"env": words}, "root": {"path": "rootfs"}, **more}
        self.spec.write_text(document if isinstance(document, str) else json.dumps(document, indent=4))

    def run(
        self, *arguments: str, launcher: Path = WRAPPER, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        if env is None:
            env = {"PATH": f"{self.directory}/bin:/usr/bin:/bin", "NVHOOK_CONFIG": str(self.config)}
        return subprocess.run(
            [launcher, *arguments], env=env, cwd=self.bundle, capture_output=True, text=True, check=False
        )

    def create(self, *arguments: str) -> dict[str, Any]:
        """`create` has to work; the config.json that the runtime then finds."""
        words = [*arguments, "create", "--bundle", str(self.bundle), "name"]
        done = self.run(*words)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert words == self.arguments()
        assert os.listdir(self.bundle) == ["config.json"]
        document: dict[str, Any] = json.loads(self.spec.read_bytes())
        return document

    def fail(self, *arguments: str) -> str:
        """It must not work; the line on stderr."""
        there = sorted(os.listdir(self.bundle))
        before = self.spec.read_bytes() if self.spec.exists() else b""
        done = self.run(*arguments)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.count("\n") == 1
        assert self.arguments() is None, "the low-level runtime was started"
        assert there == sorted(os.listdir(self.bundle))
        assert before == (self.spec.read_bytes() if self.spec.exists() else b"")
        return done.stderr

    def arguments(self, runtime: Path | None = None) -> list[str] | None:
        """What the low-level runtime was called with; None if it was not."""
        path = (runtime or self.runtime).parent / "arguments"
        return path.read_bytes().decode().split("\0")[:-1] if path.exists() else None

    def environment(self) -> dict[str, str]:
        words = (self.runtime.parent / "environment").read_bytes().decode().split("\0")[:-1]
        return dict(word.split("=", 1) for word in words)

    def hook(self) -> dict[str, Any]:
        return {**HOOK_ENTRY, "args": [word.format(config=self.config) for word in HOOK_ENTRY["args"]]}

    def hooks(self) -> dict[str, Any]:
        after = ["nvidia-container-runtime-hook", "--state-dir", f"{self.directory}/state", "poststop"]
        return {"prestart": [self.hook()], "poststop": [{**HOOK_ENTRY, "args": after}]}


def _compile(directory: Path, **paths: str | Path) -> Path:
    """A launcher of one's own."""
    directory.mkdir()
    env = {**os.environ, **{name: str(path) for name, path in paths.items()}}
    subprocess.run([COMPILE, directory], env=env, check=True)
    return directory / "nvidia-container-runtime"


@pytest.fixture
def place(proc: Path) -> Place:
    return Place(proc)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The launcher with something else in the place of the interpreter."""
    place = tmp_path_factory.mktemp("poisoned")
    return _compile(place / "bin", PYTHON=_program(place / "no-python", NO_PYTHON))


# Which command lines go through Python; what the toolkit's own tests pin down is marked so.


@pytest.mark.parametrize(
    ("arguments", "edits"),
    [
        pytest.param([], False, id="nothing"),  # toolkit
        pytest.param(["create"], True, id="create"),  # toolkit
        pytest.param(["--bundle=create"], False, id="bundle-called-create"),  # toolkit
        pytest.param(["--bundle", "create"], False, id="bundle-create"),  # toolkit
        pytest.param(["-b", "create", "create"], True, id="create-of-bundle-create"),  # toolkit
        pytest.param(["run", "name"], True, id="run"),
        pytest.param(["create", "--bundle", "b", "name"], True, id="create-bundle"),
        pytest.param(["start", "create"], False, id="start-of-one-called-create"),
        pytest.param(["delete", "--force", "run"], False, id="delete-of-one-called-run"),
        pytest.param(["exec", "name", "create"], False, id="exec-of-create"),
        *(
            pytest.param([command, "name"], False, id=command)
            for command in (
                "start", "state", "kill", "delete", "exec", "ps", "list", "pause", "resume", "events", "update",
                "checkpoint", "restore", "spec", "features", "unheard-of",
            )
        ),
        pytest.param(["--help"], False, id="help"),
        pytest.param(["--root", "create", "start"], False, id="root-called-create"),
        pytest.param(["--log", "run", "--log-format", "create", "kill"], False, id="log-called-run"),
        pytest.param(["--criu", "create", "--rootless", "run", "state"], False, id="criu-rootless"),
        pytest.param(["--log-level", "create", "--cgroup-manager", "run", "list"], False, id="options-of-crun"),
        pytest.param(["--root", "/r", "--debug", "--systemd-cgroup", "create"], True, id="options-before-create"),
        pytest.param(["--root=/r", "--log=/l", "create"], True, id="options-with-equals"),
        pytest.param(["--log", "create", "create"], True, id="log-create-create"),
    ],
)  # fmt: skip
def test_launcher_asks_python_for_create_and_run_alone(
    place: Place, poisoned: Path, arguments: list[str], edits: bool
) -> None:
    done = place.run(*arguments, launcher=poisoned)
    if edits:
        assert (done.returncode, done.stdout, place.arguments()) == (42, "python was started\n", None)
    else:
        assert (0, "", "", arguments or [""]) == (done.returncode, done.stdout, done.stderr, place.arguments())


@pytest.mark.parametrize("option", ["--version", "-v", "-version", "--version=true"])
def test_launcher_version(place: Place, poisoned: Path, option: str) -> None:
    """Ours, then the low-level runtime's own."""
    done = place.run(option, launcher=poisoned)
    assert f"NVIDIA Container Runtime version {VERSION} (nvhook)\n\n" == done.stdout
    assert [option] == place.arguments()


ODD = [
    "a b",
    "",
    "*",
    "/*",
    "?",
    "a\nb",
    "\n",
    "'",
    '"',
    "\\",
    "$HOME",
    "`id`",
    "$(id)",
    "ä",
    "\x1b[2J",
    "-n",
    "\t",
    ":",
]


def test_launcher_arguments_arrive_unchanged(place: Place, poisoned: Path) -> None:
    assert place.run("state", *ODD, launcher=poisoned).returncode == 0
    assert ["state", *ODD] == place.arguments()


def test_create_arguments_arrive_unchanged(place: Place) -> None:
    place.write()
    assert place.run("create", *ODD, "--bundle", str(place.bundle)).returncode == 0
    assert ["create", *ODD, "--bundle", str(place.bundle)] == place.arguments()


@pytest.mark.parametrize("command", ["state", "create"])
def test_environment_arrives_unchanged(place: Place, command: str) -> None:
    place.write()
    env = {
        "PATH": f"{place.directory}/bin",
        "NVHOOK_CONFIG": str(place.config),
        "ODD": "a\n*b",
        "PYTHONPATH": "/nonexistent",
        "LD_LIBRARY_PATH": "",
    }
    assert place.run(command, env=env).returncode == 0
    arrived = place.environment()
    for own in ("PWD", "OLDPWD", "SHLVL", "_"):  # of the runtime's sh; LC_CTYPE is what Python sets in the C locale
        arrived.pop(own, None)
    assert {**env, "LC_CTYPE": ""} == {**arrived, "LC_CTYPE": ""}


@pytest.mark.parametrize("command", ["state", "create"])
def test_environment_empty(place: Place, command: str) -> None:
    """As from a shim that clears it: neither PATH nor NVHOOK_CONFIG is there."""
    place.write()
    launcher = _compile(place.directory / "copy", CONFIG=place.config)
    place.configure(f"[nvidia-container-runtime]\nruntimes = ['{place.runtime}']")
    done = place.run(command, launcher=launcher, env={})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [command] == place.arguments()


# The low-level runtime


@pytest.mark.parametrize("command", ["state", "create"])
@pytest.mark.parametrize(
    ("runtimes", "shown"),
    [
        pytest.param('["nvhook-none"]', "nvhook-none", id="name"),
        pytest.param('["nvhook-none", "/nonexistent/runc"]', "nvhook-none:/nonexistent/runc", id="name-and-path"),
        pytest.param('["/"]', "/", id="directory"),
        pytest.param('["/etc/passwd"]', "/etc/passwd", id="not-executable"),
    ],
)
def test_runtime_not_found(place: Place, command: str, runtimes: str, shown: str) -> None:
    place.write()
    place.configure(f"[nvidia-container-runtime]\nruntimes = {runtimes}")
    assert place.fail(command).startswith(
        f"nvidia-container-runtime: runtime error: no runtime binary found from candidate list: [{shown}]"
    )


def test_runtime_first_that_is_there(place: Place) -> None:
    other = _program(place.directory / "elsewhere/crun", RUNTIME)
    place.configure(f"[nvidia-container-runtime]\nruntimes = ['nvhook-none', '{other}', 'runc']")
    assert place.run("state").returncode == 0
    assert (place.arguments(other), place.arguments()) == (["state"], None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("", "runc:crun", id="nothing"),
        pytest.param("[nvidia-container-runtime]\n", "runc:crun", id="empty-table"),
        pytest.param('[nvidia-container-runtime]\nruntimes = ["a"]', "a", id="one"),
        pytest.param('[nvidia-container-runtime]\nruntimes = ["a", "/b/c"]', "a:/b/c", id="two"),
        pytest.param('[nvidia-container-runtime]\nruntimes=["a","b"]', "a:b", id="no-blanks"),
        pytest.param('[nvidia-container-runtime]\n  runtimes  =  [ "a" , "b" ]  ', "a:b", id="many-blanks"),
        pytest.param('[nvidia-container-runtime]\n\truntimes\t=\t["a"]\t', "a", id="tabs"),
        pytest.param('[nvidia-container-runtime]\nruntimes = ["a",]', "a", id="comma-at-the-end"),
        pytest.param("[nvidia-container-runtime]\nruntimes = ['a', 'b']", "a:b", id="single-quotes"),
        pytest.param("[nvidia-container-runtime]\nruntimes = ['a', \"b\"]", "a:b", id="both-quotes"),
        pytest.param('[nvidia-container-runtime]\nruntimes = [\n  "a",\n  "b",\n]', "a:b", id="several-lines"),
        pytest.param('[nvidia-container-runtime]\nruntimes = ["a"] # or ["b"]', "a", id="comment"),
        pytest.param('[nvidia-container-runtime]\n#runtimes = ["b"]\nruntimes = ["a"]', "a", id="commented-out"),
        pytest.param('[nvidia-container-runtime]\nruntimes = ["a#b"]', "a#b", id="hash-in-a-name"),
        pytest.param('[nvidia-container-runtime]\nruntimes = ["a\\u0062"]', "ab", id="escape"),
        pytest.param('[nvidia-container-runtime]\nruntimes = ["a b"]', "a b", id="blank-in-a-name"),
        pytest.param('[nvidia-container-runtime]\nruntimes = ["*"]', "*", id="glob"),
        pytest.param('[nvidia-container-runtime]\r\nruntimes = ["a"]\r\n', "a", id="line-ends-of-windows"),
        pytest.param('[nvidia-container-runtime] # x\nruntimes = ["a"]', "a", id="comment-behind-the-table"),
        pytest.param('[ nvidia-container-runtime ]\nruntimes = ["a"]', "a", id="blanks-in-the-table"),
        pytest.param('["nvidia-container-runtime"]\nruntimes = ["a"]', "a", id="quoted-table"),
        pytest.param("['nvidia-container-runtime']\nruntimes = ['a']", "a", id="quoted-table-singly"),
        pytest.param('[nvidia-container-runtime]\n"runtimes" = ["a"]', "a", id="quoted-key"),
        pytest.param('nvidia-container-runtime.runtimes = ["a"]', "a", id="dotted-key"),
        pytest.param('nvidia-container-runtime . "runtimes" = ["a"]', "a", id="dotted-key-with-blanks"),
        pytest.param('"nvidia-container-runtime".runtimes = ["a"]', "a", id="quoted-dotted-key"),
        pytest.param('nvidia-container-runtime = {runtimes = ["a"]}', "a", id="inline-table"),
        pytest.param('[nvidia-container-cli]\nruntimes = ["b"]', "runc:crun", id="of-another-table"),
        pytest.param('runtimes = ["b"]\n[nvidia-container-runtime]', "runc:crun", id="of-no-table"),
        pytest.param(
            '[nvidia-container-runtime]\n[nvidia-container-runtime.modes.cdi]\nruntimes = ["b"]',
            "runc:crun",
            id="of-a-table-below",
        ),
        pytest.param('[nvidia-container-runtime]\nruntimes-extra = ["b"]', "runc:crun", id="longer-key"),
        pytest.param('[nvidia-container-runtime]\nlog-level = "info"\nruntimes = ["a"]', "a", id="no-newline-at-end"),
    ],
)
def test_runtimes_read_as_python_reads_them(place: Place, text: str, expected: str) -> None:
    """Whether the launcher understands the line itself or asks Python."""
    place.config.write_bytes(text.encode())
    assert expected == ":".join(configuration.load(str(place.config)).runtimes)
    done = place.run("state")
    if expected == "runc:crun":
        assert (done.returncode, done.stderr, place.arguments()) == (0, "", ["state"])
    else:
        said = f"nvidia-container-runtime: runtime error: no runtime binary found from candidate list: [{expected}]"
        assert (done.returncode, done.stderr.partition("; ")[0].strip()) == (1, said)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("[nvidia-container-runtime]\nruntimes = []", "names no low-level runtime", id="empty-list"),
        pytest.param("[nvidia-container-runtime]\nruntimes = 'runc'", "must be a list of strings", id="text"),
        pytest.param("[nvidia-container-runtime]\nruntimes = ['a'", "config error: parse `", id="does-not-parse"),
    ],
)
@pytest.mark.parametrize("command", ["state", "create"])
def test_runtimes_wrong(place: Place, command: str, text: str, message: str) -> None:
    place.write()
    place.config.write_text(text)
    line = place.fail(command)
    assert line.startswith("nvidia-container-runtime: config error: ")
    assert message in line


# create: who asks for nothing


@pytest.mark.parametrize(
    "env",
    [
        pytest.param({}, id="no-variable"),
        pytest.param({"NVIDIA_VISIBLE_DEVICES": "void"}, id="void"),
        pytest.param({"NVIDIA_DRIVER_CAPABILITIES": "all"}, id="capabilities-alone"),
    ],
)
def test_create_nothing_asked_nothing_changed(place: Place, env: dict[str, str]) -> None:
    place.write(env=env)
    before, status = place.spec.read_bytes(), place.spec.stat()
    place.create()
    assert (before, status.st_ino) == (place.spec.read_bytes(), place.spec.stat().st_ino)


def test_create_nothing_asked_on_a_host_without_driver(place: Place) -> None:
    shutil.rmtree(place.directory / "proc")
    place.write()
    place.create()


# create: who asks


ALL = {"NVIDIA_VISIBLE_DEVICES": "all"}


def test_create_edits(place: Place) -> None:
    place.write(env=ALL, linux={"resources": {"devices": [DENY_ALL]}})
    former = json.loads(place.spec.read_text())
    linux = {"resources": {"devices": [DENY_ALL, *RULES]}}
    assert {**former, "linux": linux, "hooks": place.hooks()} == place.create()


def test_create_keeps_what_it_does_not_know(place: Place) -> None:
    place.write(
        env=ALL, zebra=[None, 2**70, "ä\ud800", {"b": 1, "a": 2}], annotations={"x": "y"}, hooks={"poststop": []}
    )
    former = json.loads(place.spec.read_text())
    document = place.create()
    assert list(former) == list(document)[: len(former)]
    assert list(document["zebra"][3]) == ["b", "a"]
    assert {**former, "hooks": place.hooks()} == {key: value for key, value in document.items() if key != "linux"}


def test_create_twice_is_create_once(place: Place) -> None:
    place.write(env=ALL, linux={"resources": {"devices": [DENY_ALL]}})
    place.create()
    once = place.spec.read_bytes()
    place.create()
    assert once == place.spec.read_bytes()


@pytest.mark.parametrize(
    "name", ["/usr/bin/nvidia-container-runtime-hook", "/opt/nvidia-container-toolkit", "nvidia-container-runtime-hook"]
)
def test_create_takes_the_place_of_dockers_hook(place: Place, name: str) -> None:
    theirs = {"path": name, "args": ["x", "prestart"]}
    first, last = {"path": "/first"}, {"path": "/last/nvidia-container-runtime-hook-not"}
    place.write(env=ALL, hooks={"prestart": [first, theirs, last, theirs], "createRuntime": [first]})
    expected = {**place.hooks(), "prestart": [first, place.hook(), last], "createRuntime": [first]}
    assert expected == place.create()["hooks"]


@pytest.mark.parametrize("hooks", [None, {}, {"prestart": None}, {"prestart": []}])
def test_create_with_hooks_of_nothing(place: Place, hooks: object) -> None:
    place.write(env=ALL, hooks=hooks)
    assert [place.hook()] == place.create()["hooks"]["prestart"]


@pytest.mark.parametrize("linux", [None, {}, {"resources": None}, {"resources": {}}, {"resources": {"devices": None}}])
def test_create_with_rules_of_nothing(place: Place, linux: object) -> None:
    place.write(env=ALL, linux=linux)
    assert place.create()["linux"]["resources"]["devices"] == RULES


def test_create_rules_come_last_and_once(place: Place) -> None:
    place.write(env=ALL, linux={"resources": {"devices": [RULES[2], DENY_ALL, RULES[0]]}})
    assert [DENY_ALL, *RULES] == place.create()["linux"]["resources"]["devices"]


def test_create_without_cgroups(place: Place) -> None:
    place.configure("nvidia-container-cli.no-cgroups = true")
    place.write(env=ALL)
    assert "linux" not in place.create()


@pytest.mark.parametrize(
    ("params", "user", "expected"),
    [
        pytest.param("DeviceFileGID: 44\nDeviceFileMode: 432", None, [44], id="0660"),
        pytest.param("DeviceFileGID: 44\nDeviceFileMode: 436", None, [44], id="0664-cannot-be-written"),
        pytest.param("DeviceFileGID: 44\nDeviceFileMode: 434", None, [44], id="0662-cannot-be-read"),
        pytest.param("DeviceFileGID: 44\nDeviceFileMode: 438", None, None, id="0666-is-for-all"),
        pytest.param("DeviceFileGID: 0\nDeviceFileMode: 432", None, None, id="of-root"),
        pytest.param(
            "DeviceFileGID: 44\nDeviceFileMode: 432", {"uid": 5, "additionalGids": [7]}, [7, 44], id="behind-others"
        ),
        pytest.param("DeviceFileGID: 44\nDeviceFileMode: 432", {"additionalGids": [44, 1]}, [44, 1], id="once"),
        pytest.param("DeviceFileGID: 44\nDeviceFileMode: 432", {"additionalGids": None}, [44], id="of-nothing"),
    ],
)
@pytest.mark.root
def test_create_groups_of_nodes(
    place: Place, params: str, user: dict[str, Any] | None, expected: list[int] | None
) -> None:
    (place.directory / "proc/driver/nvidia/params").write_text(f"{params}\n")
    place.write(env=ALL)
    if user is not None:
        document = json.loads(place.spec.read_text())
        document["process"]["user"] = user
        place.write(document)
    found = place.create()["process"].get("user")
    assert found == ({**(user or {}), "additionalGids": expected} if expected else user)


@pytest.mark.root
@pytest.mark.parametrize(
    ("text", "linux"),
    [
        pytest.param("features.no-additional-gids-for-device-nodes = true", {}, id="not-wanted"),
        pytest.param("", {"namespaces": [{"type": "pid"}, {"type": "user"}]}, id="other-groups-in-a-user-namespace"),
    ],
)
def test_create_no_groups(place: Place, text: str, linux: dict[str, Any]) -> None:
    (place.directory / "proc/driver/nvidia/params").write_text("DeviceFileGID: 44\nDeviceFileMode: 432\n")
    place.configure(text)
    place.write(env=ALL, linux=linux)
    assert "user" not in place.create()["process"]


def test_hook_without_configuration() -> None:
    """Nothing is named to the hook, which then takes its own default."""
    document: dict[str, Any] = {}
    bundle.add_hook(document, "prestart", "/h/nvidia-container-runtime-hook", [], spec.HOOK_ENV)
    hook = {**HOOK_ENTRY, "path": "/h/nvidia-container-runtime-hook"}
    assert {"hooks": {"prestart": [{**hook, "args": ["nvidia-container-runtime-hook", "prestart"]}]}} == document


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o440])
def test_create_keeps_mode(place: Place, mode: int) -> None:
    place.write(env=ALL)
    place.spec.chmod(mode)
    place.create()
    assert place.spec.stat().st_mode & 0o7777 == mode


@pytest.mark.root
def test_create_keeps_owner(place: Place) -> None:
    place.write(env=ALL)
    os.chown(place.spec, 1234, 4321)
    place.create()
    assert (place.spec.stat().st_uid, place.spec.stat().st_gid) == (1234, 4321)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param(["create"], ".", id="none"),
        pytest.param(["create", "--bundle", "/b"], "/b", id="bundle"),
        pytest.param(["create", "--bundle=/b"], "/b", id="bundle-equals"),
        pytest.param(["create", "-b", "/b"], "/b", id="b"),
        pytest.param(["create", "-b=/foo/=bar"], "/foo/=bar", id="equals-in-the-value"),
        pytest.param(["create", "-bundle", "/b"], "/b", id="one-dash"),
        pytest.param(["create", "-b", "/a", "--bundle", "/b"], "/b", id="last-wins"),
        pytest.param(["-b", "create", "create"], "create", id="called-create"),
        pytest.param(["create", "--not-bundle", "/b"], ".", id="another-option"),
        pytest.param(["create", "--"], ".", id="dashes"),
        pytest.param(["create", "--bundle="], ".", id="empty"),
    ],
)
def test_bundle_of_command_line(arguments: list[str], expected: str) -> None:
    assert os.path.abspath(expected) == bundle.directory(arguments)


# create: who never meets an interpreter


# As nvidia-ctk writes it, in a table that comes after that of `runtimes`.
_PREFIXES = """[nvidia-container-runtime]
runtimes = ["runc", "crun"]
[nvidia-container-runtime.modes.cdi]
annotation-prefixes = {}"""
WORDS = {
    "nothing": ({"process": {"env": ["A=b"]}, "root": {"path": "r"}}, "", False),
    "not-even-json": ("{", "", False),
    "visible-devices": ({"process": {"env": ["NVIDIA_VISIBLE_DEVICES=void"]}}, "", True),
    "legacy-image": ({"process": {"env": ["CUDA_VERSION=8.0.61"]}}, "", True),
    "annotation": ({"annotations": {"cdi.k8s.io/x": "nvidia.com/gpu=0"}}, "", True),
    "annotation-of-the-operator": ({"annotations": {"nvidia.cdi.k8s.io/x": "nvidia.com/gpu=0"}}, "", True),
    "annotation-without-a-name": ({"annotations": {"nvidia.cdi.k8s.io": "nvidia.com/gpu=0"}}, "", True),
    "annotation-that-is-no-list": ({"annotations": {"cdi.k8s.io/x": "0"}}, "", True),
    "escaped-annotation": (r'{"annotations": {"cd\u0069.k8s.io/x": "nvidia.com/gpu=0"}}', "", True),
    "escaped-dot": (r'{"annotations": {"cdi\u002ek8s.io/x": "nvidia.com/gpu=0"}}', "", True),
    "escaped-digit": (r'{"annotations": {"cdi.k\u0038s.io/x": "nvidia.com/gpu=0"}}', "", True),
    "escaped-variable": (r'{"process": {"env": ["\u004eVIDIA_VISIBLE_DEVICES=0"]}}', "", True),
    "escaped-underscore": (r'{"process": {"env": ["CUDA\u005FVERSION=8.0"]}}', "", True),
    "escaped-hyphen": (r'{"mounts": [{"destination": "/var/run/nvidia\u002Dcontainer\u002Ddevices/0"}]}', "", True),
    "what-go-escapes": (r'{"process": {"env": ["A=\u003c\u003e\u0026\u2028\u0001"]}}', "", False),
    "prefix-of-the-administrator": ({"annotations": {"a.b/x": "0"}}, _PREFIXES.format('["a.b/"]'), True),
    "prefix-of-the-administrator-inline": (
        {"annotations": {"a.b/x": "0"}},
        "[nvidia-container-runtime]\nmodes.cdi = { annotation-prefixes = ['a.b/'] }",
        True,
    ),
    "prefix-of-nvidia-s-own-file": ({"annotations": {"a.b/x": "0"}}, _PREFIXES.format('["cdi.k8s.io/"]'), False),
    "prefix-of-the-operator": ({"annotations": {"a.b/x": "0"}}, _PREFIXES.format('["nvidia.cdi.k8s.io/"]'), False),
    "commented-prefix": ({"annotations": {"a.b/x": "0"}}, '# annotation-prefixes = ["a.b/"]', False),
    "mount": ({"mounts": [{"destination": "/var/run/nvidia-container-devices/0"}]}, "", True),
    "swarm-resource": ({"process": {"env": ["DOCKER_RESOURCE_GPU=0"]}}, 'swarm-resource = "DOCKER_RESOURCE_GPU"', True),
    "escaped": ('{"process": {"env": ["\\u004eVIDI\\u0041\\u005fVISIBLE_DEVICES=all"]}}', "", True),
    "escaped-solidus": ('{"annotations": {"cdi.k8s.io\\/x": "nvidia.com\\/gpu=0"}}', "", True),
    "escaped-backslash": ('{"process": {"env": ["\\\\u004eVIDIA_VISIBLE_DEVICES=all"]}}', "", False),
    "other-escapes": ('{"process": {"env": ["A=\\u003cb\\u00e9\\n\\"NVIDIA\\u005"]}}', "", False),
    "annotation-key-of-ones-own": (
        {"annotations": {"example.com/gpus": "all"}},
        '[nvidia-container-runtime.modes.cdi]\nannotation-prefixes = ["example.com/"]',
        True,
    ),
    "annotation-key-behind-runtimes": (
        {"annotations": {"example.com/gpus": "all"}},
        '[nvidia-container-runtime]\nruntimes = ["runc"]\n[x]\n  annotation-prefixes=["example.com/"]',
        True,
    ),
    "usual-annotation-key": (
        {"annotations": {"example.com/gpus": "all"}},
        '[nvidia-container-runtime.modes.cdi]\nannotation-prefixes = ["cdi.k8s.io/"]',
        False,
    ),
    "commented-swarm": ({"process": {"env": ["A=b"]}}, '#swarm-resource = "DOCKER_RESOURCE_GPU"', False),
}


@pytest.mark.parametrize(("document", "configuration", "asks"), WORDS.values(), ids=WORDS)
@pytest.mark.parametrize("how", [["--bundle", "{}"], ["-b={}"], ["--bundle", "/elsewhere", "-b", "{}"], []])
def test_interpreter_only_for_who_may_ask(
    place: Place, poisoned: Path, document: object, configuration: str, asks: bool, how: list[str]
) -> None:
    place.write(document)
    place.configure(configuration)
    before = place.spec.read_bytes()
    words = ["create", *(word.format(place.bundle) for word in how), "name"]
    done = place.run(*words, launcher=poisoned)
    assert ("python was started" in done.stdout + done.stderr) == asks
    assert place.arguments() == (None if asks else words)
    assert place.spec.read_bytes() == before


@pytest.mark.parametrize("command", ["restore", "checkpoint"])
def test_checkpoint_is_the_low_level_runtime_s(place: Place, poisoned: Path, command: str) -> None:
    """What a checkpoint image has smuggled into a config.json (CVE-2026-53492) gets nothing of ours."""
    place.write(env=ALL, annotations={"cdi.k8s.io/x": "nvidia.com/gpu=all", "io.kubernetes.cri.container-type": "c"})
    before = place.spec.read_bytes()
    place.run(command, "--bundle", str(place.bundle), "name", launcher=poisoned)
    assert place.arguments() == [command, "--bundle", str(place.bundle), "name"]
    assert place.spec.read_bytes() == before


# create: what goes wrong. What holds no word of a request is the low-level runtime's to refuse.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "spec error: read `{}/config.json`: no such file or directory", id="missing"),
        pytest.param("{NVIDIA_", "spec error: parse `{}/config.json`: ", id="not-json"),
        pytest.param("[" * 100_000 + "NVIDIA_", "spec error: parse `{}/config.json`: ", id="deeply-nested"),
        pytest.param('["NVIDIA_"]', "spec error: parse `{}/config.json`: not a JSON object", id="list"),
        pytest.param(
            {"root": {"path": "NVIDIA_"}}, "spec error: `{}/config.json`: `process` is missing", id="no-process"
        ),
        pytest.param({"process": {"cwd": "NVIDIA_"}}, "spec error: `{}/config.json`: `root` is missing", id="no-root"),
        pytest.param(
            {"process": {"env": ["NVIDIA_VISIBLE_DEVICES=7"]}, "root": {"path": "r"}},
            "device error: unknown device `7`; this host has 0 (GPU-aa, 0000:07:00.0), 1 (GPU-bb, 0000:41:00.0)",
            id="unknown-gpu",
        ),
        pytest.param(
            {
                "process": {"env": ["NVIDIA_VISIBLE_DEVICES=all"]},
                "root": {"path": "r"},
                "annotations": {"cdi.k8s.io/x": "nvidia.com/unknown=0"},
            },
            "request error: `nvidia.com/unknown=0` in the annotation `cdi.k8s.io/x`=`nvidia.com/unknown=0` is of an "
            "unknown kind `nvidia.com/unknown`; known are nvidia.com/gpu, ",
            id="annotation",
        ),
        pytest.param(
            {
                "process": {"env": ["NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=a\nb"]},
                "root": {"path": "r"},
            },
            "request error: unknown capability `a\\nb`",
            id="capability",
        ),
        pytest.param(
            {"process": {"env": ["NVIDIA_VISIBLE_DEVICES=0", "NVIDIA_REQUIRE_X=driver>=999"]}, "root": {"path": "r"}},
            "requirement error: image needs `driver>=999`",
            id="requirement",
        ),
    ],
)
def test_create_refused(place: Place, content: object, message: str) -> None:
    if content is not None:
        place.write(content)
    line = place.fail("create", "--bundle", str(place.bundle), "name")
    assert line.startswith(f"nvidia-container-runtime: {message.format(place.bundle)}")


@pytest.mark.parametrize("option", ["--bundle", "-b", "-bundle"])
def test_create_bundle_is_the_last_word(place: Place, option: str) -> None:
    place.write(env=ALL)
    line = place.fail("create", "name", option)
    assert "bundle option requires an argument" in line


def test_create_no_bundle_directory(place: Place) -> None:
    line = place.fail("create", "--bundle", "/nonexistent", "name")
    assert line.startswith("nvidia-container-runtime: spec error: read `/nonexistent/config.json`: no such file")


def test_create_configuration_that_must_exist(place: Place) -> None:
    place.write(env=ALL)
    place.config.unlink()
    assert f"config error: read `{place.config}`: no such file" in place.fail("create", "name")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"linux": {"namespaces": 7}}, "`linux.namespaces` is not a list"),
        ({"process": {"user": 7}}, "`process.user` is not an object"),
        ({"process": {"user": {"additionalGids": 7}}}, "`process.user.additionalGids` is not a list"),
    ],
    ids=["namespaces", "user", "groups"],
)
def test_add_groups_refuses(more: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        bundle.add_groups({"process": {}, **more}, [44])


def test_add_groups_beside_what_are_no_groups() -> None:
    document: dict[str, Any] = {"process": {"user": {"additionalGids": [44, []]}}}
    bundle.add_groups(document, [44, 109])
    assert document["process"]["user"]["additionalGids"] == [44, [], 109]


def test_create_number_that_cannot_be_written(place: Place) -> None:
    place.write(env=ALL, x=0)
    place.spec.write_text(place.spec.read_text().replace('"x": 0', '"x": 1e999'))
    assert "spec error: write " in place.fail("create", "name")


def test_create_write_fails(place: Place) -> None:
    """A file of the name that is written beside is not ours to overwrite."""
    place.write(env=ALL)
    document, status = json.loads(place.spec.read_text()), place.spec.stat()
    beside = place.bundle / f"config.json.nvhook.{os.getpid()}"
    beside.symlink_to("elsewhere")
    before = place.spec.read_bytes()
    with pytest.raises(SpecError, match=r"write `.*config\.json`: file exists"):
        bundle.write(str(place.bundle), document, status)
    assert before == place.spec.read_bytes()
    assert beside.is_symlink()


# The log that the engine reads


@pytest.mark.parametrize("form", ["separate", "equals", "one-dash"])
@pytest.mark.parametrize("layout", ["json", "text"])
def test_log_says_why(place: Place, form: str, layout: str) -> None:
    place.write(env={"NVIDIA_VISIBLE_DEVICES": '7"\n'})
    log = place.directory / "log"
    log.write_text("before\n")
    words = {
        "separate": ["--log", str(log), "--log-format", layout],
        "equals": [f"--log={log}", f"--log-format={layout}"],
        "one-dash": ["-log", str(log), "-log-format", layout],
    }[form]
    line = place.fail(*words, "create", "name").removesuffix("\n")
    first, entry, *more = log.read_text().splitlines()
    assert (first, more) == ("before", [])
    if layout == "json":
        parsed = json.loads(entry)
        assert sorted(parsed) == ["level", "msg", "time"]
        assert ("error", line) == (parsed["level"], parsed["msg"])
    else:
        assert entry.startswith('time="20')
        assert entry.endswith(f" level=error msg={json.dumps(line)}")


def test_log_of_the_configuration_and_of_the_command_line(place: Place) -> None:
    logs = [place.directory / "one", place.directory / "two"]
    place.configure(f"nvidia-container-runtime.debug = '{logs[0]}'\nfeatures.allow-ldconfig-from-container = true")
    place.write(env=ALL)
    place.create("--log", str(logs[1]))
    for log in logs:
        line, granted = log.read_text().splitlines()
        assert ' level=info msg="nvidia-container-runtime: GPUs granted: container=' in granted
        assert " level=warning " in line
        assert "`features.allow-ldconfig-from-container` is not honoured by nvhook" in line


@pytest.mark.parametrize(("level", "wanted"), [("debug", True), ("warning", True), ("error", False), ("panic", False)])
def test_log_level_of_the_configuration(place: Place, level: str, wanted: bool) -> None:
    log = place.directory / "log"
    place.configure(f"nvidia-container-runtime.log-level = '{level}'\nfeatures.allow-ldconfig-from-container = true")
    place.write(env=ALL)
    place.create("--log", str(log))
    assert log.exists() == wanted


@pytest.mark.parametrize("log", ["/nonexistent/log", "/"])
def test_log_that_cannot_be_written(place: Place, log: str) -> None:
    place.write(env={"NVIDIA_VISIBLE_DEVICES": "7"})
    assert "device error: unknown device `7`" in place.fail("--log", log, "create", "name")


def test_environment_reaches_the_runtime_unchanged(place: Place) -> None:
    """Also those that a launcher in sh once had for itself."""
    names = (
        "python",
        "config",
        "name",
        "names",
        "command",
        "skip",
        "runtime",
        "table",
        "line",
        "list",
        "file",
        "place",
    )
    env = dict.fromkeys(names, "the caller's")
    place.configure(f"[nvidia-container-runtime]\nruntimes = ['{place.runtime}']")
    done = place.run("state", "x", env={**env, "PATH": "/usr/bin:/bin", "NVHOOK_CONFIG": str(place.config)})
    assert done.returncode == 0, done.stderr
    assert env.items() <= place.environment().items()
