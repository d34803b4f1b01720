# SPDX-License-Identifier: Apache-2.0
"""The process that stands by: it serves, it goes with the runtime, and without it the hook does the work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

import containers
from containers import WRAPPER, Workshop, gpu_lines
from nvruntime import standby

HOOK = WRAPPER.parent / "standby/nvidia-container-runtime-hook"
HOST = "a100x2"
ALL = {"NVIDIA_VISIBLE_DEVICES": "all"}
BOTH = gpu_lines(HOST, 0, 1)
LIST = ["/bin/sh", "-c", "nvidia-smi -L"]

# In the place of runc: something happens to the process that stands by, and then it is runc.
MEANWHILE = """\
#!/bin/sh
for id; do :; done
place={state}/standby/$id
case $1 in run | create) {what} ;; esac
exec {runc} "$@"
"""
FIND = "pid=$(pgrep -f '^/usr/bin/python3 -IS -c .* '$id'$') || exit 9;"


def _config(shop: Workshop, what: str) -> Path:
    state, runtime = shop.new("state"), shop.new("runtime")
    text = MEANWHILE.format(state=state, what=what, runc=shutil.which("runc"))
    runtime.write_text(text)
    runtime.chmod(0o755)
    return containers.configure(shop.simhost(HOST), shop.new("config.toml"), state, runtime=str(runtime))


def _state(config: Path) -> Path:
    return Path(config.read_text().rpartition('state-dir = "')[2].partition('"')[0])


# With runc


@pytest.mark.root
@pytest.mark.parametrize(
    ("what", "left"),
    [
        pytest.param(":", [], id="nothing"),
        pytest.param("sleep 0.3", [], id="long-ready"),
        pytest.param(f"{FIND} sleep 0.2; kill -9 $pid; sleep 0.1", ["ID"], id="killed"),
        pytest.param("rm -r $place", [], id="its-directory-removed"),
        pytest.param("rm $place/ask", [], id="its-pipe-removed"),
    ],
)
def test_container_gets_its_gpus_whatever_happens(shop: Workshop, what: str, left: list[str]) -> None:
    config = _config(shop, what)
    bundle = shop.bundle().write(LIST, ALL)
    result = bundle.run(config)
    assert (result.returncode, result.stdout, result.stderr) == (0, BOTH, "")
    assert os.listdir(_state(config) / "standby") == [bundle.id if name == "ID" else name for name in left]


@pytest.mark.root
def test_only_the_hook_of_sh_is_run(shop: Workshop) -> None:
    """The one process of ours that the runtime starts is no interpreter."""
    config = _config(shop, ":")
    log = shop.new("log")
    bundle = shop.bundle().write(LIST, ALL)
    bundle.through += ("strace", "-A", "-f", "-qq", "-e", "trace=execve", "-o", str(log))
    assert bundle.run(config).stdout == BOTH
    lines = [line for line in log.read_text().splitlines() if 'execve("' in line and " = -1 " not in line]
    started = [line.partition('execve("')[2].partition('"')[0] for line in lines]
    hook = started.index(str(HOOK))
    assert started[hook : hook + 2] == [str(HOOK), "/bin/sh"]  # the container
    assert started.count("/usr/bin/python3") == 1  # the wrapper
    assert started.count(str(containers.HOOK)) == 1  # when the container is over


@pytest.mark.root
def test_what_a_killed_one_left_is_taken_away_by_the_next(shop: Workshop) -> None:
    config = _config(shop, f"{FIND} sleep 0.2; kill -9 $pid; sleep 0.1")
    bundles = [shop.bundle().write(LIST, ALL) for _ in range(2)]
    directory = _state(config) / "standby"
    for bundle in bundles:
        assert bundle.run(config).stdout == BOTH
        assert os.listdir(directory) == [bundle.id]
    standby.sweep(str(directory))
    assert os.listdir(directory) == []


@pytest.mark.root
def test_error_is_the_hooks(shop: Workshop) -> None:
    """One that only shows when the container is there, told through the pipe."""
    config = _config(shop, ":")
    bundle = shop.bundle()
    (bundle.rootfs / "usr/bin/nvidia-smi").mkdir()
    result = bundle.write(LIST, ALL).run(config)
    assert (result.returncode, result.stdout) == (1, "")
    assert "nvidia-container-runtime-hook: mount error: mount `" in result.stderr
    assert "the image has a directory there" in result.stderr


@pytest.mark.root
def test_container_that_is_not_as_it_looked(shop: Workshop) -> None:
    """A volume makes a Debian of it: where libraries go is found out again."""
    config = _config(shop, "sleep 0.3")
    bundle = shop.bundle("fedora")
    etc = shop.new("etc")
    shutil.copytree(bundle.rootfs / "etc", etc)
    (etc / "debian_version").write_text("12\n")
    bundle.config["mounts"].append(
        {"destination": "/etc", "type": "bind", "source": str(etc), "options": ["bind", "private"]}
    )
    bundle.write(["/bin/sh", "-c", f"ls /usr/lib/{containers.TRIPLET}/libcuda.so.1; nvidia-smi -L"], ALL)
    result = bundle.run(config)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"/usr/lib/{containers.TRIPLET}/libcuda.so.1\n{BOTH}"


@pytest.mark.root
def test_runtime_that_makes_no_container(shop: Workshop) -> None:
    """It goes with the runtime, and leaves nothing."""
    state, config = shop.new("state"), shop.new("config.toml")
    containers.configure(shop.simhost(HOST), config, state, runtime="/bin/true")
    bundle = shop.bundle().write(LIST, ALL)
    assert bundle.call(config, "create", "--bundle", str(bundle.directory), bundle.id).returncode == 0
    end = time.monotonic() + 10
    while os.listdir(state / "standby") and time.monotonic() < end:
        time.sleep(0.02)
    assert os.listdir(state / "standby") == []


# The hook of sh, beside a process that is played here


class Played:
    """Its directory, and what it is asked. What it holds is closed by `answer`, or by `die`."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir()
        for name in ("ask", "answer"):
            os.mkfifo(place / name)
        self.asked = os.open(place / "ask", os.O_RDWR)
        self.answers = os.open(place / "answer", os.O_RDWR)

    def answer(self, text: str) -> None:
        os.write(self.answers, text.encode())
        self.die()

    def die(self) -> None:
        os.close(self.answers)


@pytest.fixture
def played(tmp_path: Path) -> Played:
    return Played(tmp_path / "place")


def _hook(tmp_path: Path, place: Path, state: str) -> subprocess.Popen[str]:
    """The launcher, with a hook behind it that only tells what it is given."""
    text = HOOK.read_text()
    line = next(line for line in text.splitlines() if line.startswith("nv_hook="))
    plain = tmp_path / "plain"
    plain.write_text('#!/bin/sh\necho "plain: $*"; cat\n')
    launcher = tmp_path / "launcher"
    ask = next(line for line in text.splitlines() if line.startswith("nv_ask="))
    text = text.replace(line, f"nv_hook={plain}").replace(ask, f"nv_ask={WRAPPER.parent}/ask.sh")
    launcher.write_text(text)
    for path in (plain, launcher):
        path.chmod(0o755)
    (tmp_path / "state").write_text(state)
    with (tmp_path / "state").open() as file:
        command = [str(launcher), "--standby", str(place), "--config", "/c", "prestart"]
        return subprocess.Popen(command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


STATE = json.dumps({"pid": 1, "bundle": "/b", "annotations": {"a": "\\ %s $(id) `id`"}})


@pytest.mark.parametrize(
    ("answer", "status", "said"),
    [
        pytest.param("0\n", 0, "", id="done"),
        pytest.param("0\na warning\nand another\n", 0, "a warning\nand another\n", id="warnings"),
        pytest.param("1\nan answer that was cut", 1, "an answer that was cut\n", id="cut"),
        pytest.param("1\nmount error: `\\n %s $(id)`\n", 1, "mount error: `\\n %s $(id)`\n", id="error"),
    ],
)
def test_hook_says_what_is_answered(tmp_path: Path, played: Played, answer: str, status: int, said: str) -> None:
    hook = _hook(tmp_path, played.place, STATE)
    assert os.read(played.asked, 1 << 16).decode() == f"{STATE}\n"
    played.answer(answer)
    assert hook.communicate(timeout=10) == ("", said)
    assert hook.returncode == status


def test_hook_waits_for_an_answer(tmp_path: Path, played: Played) -> None:
    hook = _hook(tmp_path, played.place, STATE)
    with pytest.raises(subprocess.TimeoutExpired):
        hook.wait(0.3)
    played.answer("0\n")
    assert hook.wait(10) == 0
    hook.communicate()


@pytest.mark.parametrize("when", ["before", "after"])
def test_hook_works_alone_when_it_is_dead(tmp_path: Path, played: Played, when: str) -> None:
    if when == "before":
        played.die()
    hook = _hook(tmp_path, played.place, STATE)
    if when == "after":
        os.read(played.asked, 1 << 16)
        played.die()
    assert hook.communicate(timeout=10) == (f"plain: --config /c prestart\n{STATE}", "")
    assert hook.returncode == 0


@pytest.mark.parametrize("missing", ["ask", "answer", "place"])
def test_hook_works_alone_when_it_is_not_there(tmp_path: Path, played: Played, missing: str) -> None:
    if missing == "place":
        shutil.rmtree(played.place)
    else:
        (played.place / missing).unlink()
    shown, _ = _hook(tmp_path, played.place, STATE).communicate(timeout=10)
    assert shown == f"plain: --config /c prestart\n{STATE}"


def test_hook_works_alone_with_a_long_state(tmp_path: Path, played: Played) -> None:
    """It would fill the pipe, and wait for who may be gone."""
    state = json.dumps({"annotations": {"a": "x" * 70_000}})
    shown, _ = _hook(tmp_path, played.place, state).communicate(timeout=10)
    assert shown == f"plain: --config /c prestart\n{state}"


def test_hook_takes_a_state_of_many_lines(tmp_path: Path, played: Played) -> None:
    hook = _hook(tmp_path, played.place, json.dumps({"pid": 1, "bundle": "/b"}, indent=2) + "\n")
    assert json.loads(os.read(played.asked, 1 << 16)) == {"pid": 1, "bundle": "/b"}
    played.answer("0\n")
    assert hook.communicate(timeout=10) == ("", "")
