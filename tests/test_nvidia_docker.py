# SPDX-License-Identifier: Apache-2.0
"""scripts/nvidia-docker: where it adds what, and that docker gets everything else as it was written.

A script stands in for docker and prints its words. Docker's own option lists are compared with ours where it is there.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from containers import REPOSITORY

SHIM = REPOSITORY / "scripts/nvidia-docker"
RUNTIME = "--runtime=nvidia"
FAKE = "#!/bin/sh\nfor word; do printf '%s\\0' \"$word\"; done\n"


class Place:
    """A directory with a fake docker, which is all that there is on PATH."""

    def __init__(self, directory: Path) -> None:
        self.bin = directory / "bin"
        self.bin.mkdir()
        self.program("docker", FAKE)

    def program(self, name: str, text: str) -> Path:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def run(
        self, *words: str, env: dict[str, str] | None = None, shim: Path = SHIM
    ) -> subprocess.CompletedProcess[str]:
        env = {"PATH": str(self.bin), **(env or {})}
        return subprocess.run([str(shim), *words], env=env, capture_output=True, text=True, check=False)

    def words(self, *words: str, **env: str) -> list[str]:
        """What docker is given."""
        done = self.run(*words, env=env)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.split("\0")[:-1]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize(
    "before",
    [
        "run",
        "create",
        "container run",
        "container create",
        "-D run",
        "--debug run",
        "-H unix:///x run",
        "-Hunix:///x run",
        "-H=unix:///x run",
        "--host=unix:///x run",
        "--host unix:///x run",
        "-H run run",
        "--context create run",
        "-c run create",
        "--config /etc/run container run",
        "-l debug run",
        "-Dl debug run",
        "-Dldebug run",
        "--tls --tlsverify --tlscacert run --tlscert=x --tlskey run create",
        "-D --tls=false container create",
        "-- run",
    ],
)
def test_run_gets_the_runtime(place: Place, before: str) -> None:
    words = ["--rm", "image", "run", "create"]
    assert [*before.split(), RUNTIME, *words] == place.words(*before.split(), *words)
    expected = [*before.split(), RUNTIME, "-e", "NVIDIA_VISIBLE_DEVICES=0,1", *words]
    assert expected == place.words(*before.split(), *words, NV_GPU="0,1")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--help",
        "-v",
        "-D",
        "-H",
        "-H run",
        "--context create",
        "ps",
        "ps run",
        "build -t run .",
        "exec container run",
        "network create net",
        "volume create",
        "service create image",
        "compose run web",
        "buildx create",
        "help run",
        "images create",
        "container",
        "container ls run",
        "container --help run",
        "container exec x run",
        "-H x ps create",
        "plugin container run",
        "running",
        "-",
    ],
)
def test_other_command_is_left_alone(place: Place, line: str) -> None:
    assert line.split() == place.words(*line.split(), NV_GPU="0")


@pytest.mark.parametrize(
    "options",
    [
        "--runtime=nvidia image",
        "--runtime runc image",
        "-it --runtime=io.example.v2 image",
        "--name x --runtime=x image",
        "--rm -dv /a:/b --runtime x image",
        "-v=/a:/b -it=true --quiet --runtime=x image",
        "--tty=false -p80:80 -qd --runtime x image",
    ],
)
def test_own_runtime_is_the_only_one(place: Place, options: str) -> None:
    """NV_GPU still counts: who names our runtime as well means its GPUs."""
    assert ["run", *options.split()] == place.words("run", *options.split())
    assert ["run", "-e", "NVIDIA_VISIBLE_DEVICES=1", *options.split()] == place.words(
        "run", *options.split(), NV_GPU="1"
    )


@pytest.mark.parametrize(
    "options",
    ["--gpus all image", "--gpus=2 image", "-it --rm --gpus device=0 image", "--runtime=nvidia --gpus=all image"],
)
def test_gpus_is_dockers_own_business(place: Place, options: str) -> None:
    assert ["create", *options.split()] == place.words("create", *options.split(), NV_GPU="0")


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["image", "--gpus", "--runtime=x"], id="words-of-the-container"),
        pytest.param(["-it", "image", "--gpus=1"], id="cluster-without-value"),
        pytest.param(["-itv", "/a:/b", "image", "--gpus=1"], id="cluster-with-value"),
        pytest.param(["-itv/a:/b", "image", "--gpus=1"], id="cluster-with-attached-value"),
        pytest.param(["--rm", "--", "image", "--gpus"], id="dashes"),
        pytest.param(["--", "--gpus"], id="image-behind-dashes"),
        pytest.param(["--name", "--gpus", "image"], id="value-that-looks-like-an-option"),
        pytest.param(["-e", "--runtime=x", "image"], id="value-of-a-short-option"),
        pytest.param(["--label=a", "image", "--runtime", "x"], id="value-attached"),
        pytest.param(["-", "--gpus=1"], id="dash-is-an-image"),
        pytest.param(["", "--gpus=1"], id="empty-image"),
        pytest.param(["--gpus-of-mine", "x", "image"], id="longer-name"),
        pytest.param(["--init", "--read-only", "--privileged", "image", "--runtime=x"], id="options-that-stand-alone"),
        pytest.param([], id="nothing"),
    ],
)
def test_options_end_where_dockers_do(place: Place, words: list[str]) -> None:
    assert ["run", RUNTIME, *words] == place.words("run", *words)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0", "0"),
        ("0,1", "0,1"),
        ("0 1", "0,1"),
        (" 0,  1\t,,2\n", "0,1,2"),
        ("GPU-45cb 1", "GPU-45cb,1"),
        ("all", "all"),
        ("none", "none"),
        ("*", "*"),
        ("$(id)", "$(id)"),
        ("", None),
        (" , ", None),
    ],
)
def test_gpus_of_the_environment(place: Place, value: str, expected: str | None) -> None:
    added = [] if expected is None else ["-e", f"NVIDIA_VISIBLE_DEVICES={expected}"]
    assert ["run", RUNTIME, *added, "image"] == place.words("run", "image", NV_GPU=value)


ODD_WORDS = [
    "two words",
    "",
    "line\nbreak\n",
    "'\"`",
    "*",
    "?[a-z]",
    "$HOME",
    "$(id)",
    "\\n\\",
    " ",
    "-",
    "ä€",
    "--",
    "%s",
    "!",
]


@pytest.mark.parametrize("before", [[], ["run"], ["-H", "a b*", "container", "create", "-v", "*: \n"]], ids=str)
def test_odd_words_arrive_unchanged(place: Place, before: list[str]) -> None:
    given = [*before, *ODD_WORDS]
    assert given == [word for word in place.words(*given) if word != RUNTIME]


def test_many_words(place: Place) -> None:
    words = [str(number) for number in range(2000)]
    assert ["run", RUNTIME, *words] == place.words("run", *words)


@pytest.mark.parametrize("command", ["mydocker", "mydocker -H *", " mydocker  \t--debug\n"])
def test_command_of_the_environment(place: Place, command: str) -> None:
    place.program("mydocker", FAKE)
    (place.bin / "docker").unlink()
    assert [*command.split()[1:], "run", RUNTIME, "image"] == place.words("run", "image", NV_DOCKER=command)


@pytest.mark.parametrize("command", ["", " ", "\n"])
def test_command_of_the_environment_empty(place: Place, command: str) -> None:
    assert place.words("ps", NV_DOCKER=command) == ["ps"]


def test_command_is_a_path_and_the_environment_otherwise_empty(place: Place) -> None:
    env = {"NV_DOCKER": str(place.bin / "docker")}
    done = subprocess.run([str(SHIM), "run", "image"], env=env, cwd="/", capture_output=True, text=True, check=False)
    assert (0, f"run\0{RUNTIME}\0image\0", "") == (done.returncode, done.stdout, done.stderr)


def test_empty_environment() -> None:
    """The shell's own PATH then: docker answers if it is installed there."""
    done = subprocess.run([str(SHIM), "--version"], env={}, cwd="/", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout[:6]) in ((0, "Docker"), (127, ""))


@pytest.mark.parametrize(("env", "name"), [({}, "docker"), ({"NV_DOCKER": "nothing here"}, "nothing")])
def test_no_docker(place: Place, env: dict[str, str], name: str) -> None:
    (place.bin / "docker").unlink()
    done = place.run("run", "image", env=env)
    message = f"nvidia-docker: no `{name}` on PATH: install Docker, or name its command in NV_DOCKER\n"
    assert (127, "", message) == (done.returncode, done.stdout, done.stderr)


def test_version(place: Place) -> None:
    done = place.run("-D", "version", "--format", "x")
    assert done.stdout == "NVIDIA Docker: 0.1.0\n\n-D\0version\0--format\0x\0"


@pytest.mark.parametrize("words", [["run", "-e", "version", "image"], ["version"], ["ps"]], ids=str)
def test_environment_arrives_unchanged(place: Place, words: list[str]) -> None:
    """`-e NAME` takes docker's own environment into the container: no variable of the script may shadow one there."""
    place.program("docker", "#!/bin/sh\nexec /usr/bin/env -0\n")
    names = set(re.findall(r"\b([a-z]+)\b", SHIM.read_text()))
    env = {**dict.fromkeys(names, "mine"), "NV_GPU": "0", "HOME": "/x y", "ODD": "line\nbreak"}
    done = place.run(*words, env=env)
    arrived = dict(word.split("=", 1) for word in done.stdout.removeprefix("NVIDIA Docker: 0.1.0\n\n").split("\0")[:-1])
    assert {**env, "PATH": str(place.bin)}.items() <= arrived.items()
    assert {name for name in arrived if name.startswith("nv_")} == set()


@pytest.mark.parametrize("status", [0, 1, 125, 126, 127, 255])
def test_exit_status(place: Place, status: int) -> None:
    place.program("docker", f"#!/bin/sh\nexit {status}\n")
    assert status == place.run("run", "image").returncode


def test_streams_are_dockers(place: Place) -> None:
    place.program("docker", "#!/bin/sh\nread -r line\necho out $line\necho err $line >&2\n")
    done = subprocess.run(
        [str(SHIM), "run", "-i", "image"],
        env={"PATH": str(place.bin)},
        input="in\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("out in\n", "err in\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGWINCH])
def test_signal_reaches_docker(place: Place, number: int) -> None:
    """docker is the process that the caller knows, not a child of it."""
    traps = f"trap 'echo got; exit 7' {int(number)}\necho $$\nwhile :; do sleep 0.05; done\n"
    place.program("docker", "#!/bin/sh\nPATH=/usr/bin:/bin\n" + traps)
    process = subprocess.Popen(
        [str(SHIM), "run", "image"], env={"PATH": str(place.bin)}, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout
        assert process.pid == int(process.stdout.readline())
        process.send_signal(number)
        assert (process.communicate(timeout=10)[0], process.returncode) == ("got\n", 7)
    finally:
        process.kill()
        process.wait()


def test_terminal_is_dockers(place: Place) -> None:
    place.program("docker", "#!/bin/sh\nif [ -t 0 ] && [ -t 1 ]; then exit 9; fi\n")
    ours, theirs = os.openpty()
    done = subprocess.run(
        [str(SHIM), "run", "-it", "image"], env={"PATH": str(place.bin)}, stdin=theirs, stdout=theirs, check=False
    )
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 9


def _help(docker: str, *words: str) -> set[tuple[str, str]]:
    """(letter, name) of the options without a value; the letter may be empty."""
    text = subprocess.run([docker, *words], capture_output=True, text=True, check=False, timeout=20).stdout
    lines = re.findall(r"^ +(?:-(\w), +|)--([\w-]+)( [\w-]+)?  ", text, re.MULTILINE)
    return {(letter, name) for letter, name, value in lines if not value}


def _ours(variable: str) -> list[str]:
    match = re.search(rf"^nv_{variable}=(?:'([^']*)'|(\w+))$", SHIM.read_text(), re.MULTILINE)
    assert match
    return (match[1] or " ".join(match[2])).split()


@pytest.mark.parametrize("docker", ["/usr/bin/docker", "/usr/local/bin/docker"])
def test_options_that_stand_alone_are_dockers(docker: str) -> None:
    """Both ways round: an option that docker knows stands alone here exactly if it does there."""
    if not os.access(docker, os.X_OK):
        pytest.skip(f"no {docker} to compare with")
    everything = subprocess.run([docker, "run", "--help"], capture_output=True, text=True, check=True).stdout
    for prefix, options in (
        ("global", _help(docker, "--help")),
        ("run", _help(docker, "run", "--help") | _help(docker, "create", "--help")),
    ):
        letters, names = _ours(f"{prefix}_letters"), _ours(f"{prefix}_names")
        assert {name for _, name in options} <= set(names)
        assert {letter for letter, _ in options if letter} <= set(letters)
        if prefix == "run":
            known = {name for name in names if f"--{name} " in everything}
            assert known <= {name for _, name in options}
            assert len(known) > 10


def test_installed(tmp_path: Path) -> None:
    """The installed command needs nothing of the source tree, the version included."""
    packages = REPOSITORY / "build/packages"
    if not packages.is_dir():
        pytest.skip("no build/packages: scripts/setup has not run")
    install = [str(REPOSITORY / "scripts/install")]
    subprocess.run([*install, "install", str(tmp_path), str(tmp_path / "etc")], check=True, capture_output=True)
    place = Place(tmp_path / "lib")
    shim = tmp_path / "bin/nvidia-docker"
    assert str(REPOSITORY) not in shim.read_text()
    assert place.run("version", shim=shim).stdout == "NVIDIA Docker: 0.1.0\n\nversion\0"
    assert place.run("run", "x", shim=shim).stdout == f"run\0{RUNTIME}\0x\0"
    shutil.rmtree(place.bin)
    subprocess.run([*install, "uninstall", str(tmp_path), str(tmp_path / "etc")], check=True, capture_output=True)
    assert not shim.exists()
