# SPDX-License-Identifier: Apache-2.0
"""What a container can open after its start: the numbers of the plan, and no others; and never more in between.

tests/test_cgroups.py has what each way of changing a cgroup does; this is about the moments between, and the whole.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
from pathlib import Path

import pytest

import containers
from containers import HOOK, TRY, Workshop
from nvhook.linux import cgroups, kernel
from nvhook.linux.cgroups import Rule
from nvhook.request import spec
from security import hostile
from test_cgroups import MAJOR, ONLY_NULL, Place, with_v1, with_v2

pytestmark = pytest.mark.root

_COMMANDS = {
    "query": cgroups.BPF_PROG_QUERY,
    "get": cgroups.BPF_PROG_GET_FD_BY_ID,
    "read": cgroups.BPF_OBJ_GET_INFO_BY_FD,
    "load": cgroups.BPF_PROG_LOAD,
    "attach": cgroups.BPF_PROG_ATTACH,
}


@pytest.mark.parametrize("command", _COMMANDS)
@pytest.mark.parametrize("flags", [0, 1, 2], ids=["single", "override", "multi"])
def test_failure_of_every_command_leaves_the_old_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: int, command: str
) -> None:
    real = kernel.bpf

    def failing(number: int, attr: bytearray) -> int:
        if number == _COMMANDS[command]:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        return real(number, attr)

    def work(place: Place) -> None:
        cgroups.attach(place.fd, cgroups.load(ONLY_NULL), flags)
        before = cgroups.attached(place.fd)
        monkeypatch.setattr(cgroups, "bpf", failing)
        with pytest.raises(OSError, match="operation not permitted"):
            place.allow(Rule("c", MAJOR, 0, "rw"))
        monkeypatch.setattr(cgroups, "bpf", real)
        assert before == cgroups.attached(place.fd)
        assert (place.open(0), place.null()) == (errno.EPERM, 0)

    with_v2(tmp_path, work)


def _watched(place: Place) -> None:
    """A process in the cgroup tries, all the time, a node that nobody allows and one that everybody may open."""
    seen = mmap.mmap(-1, 3)  # tries (any), what was denied was open, what was allowed was denied
    child = os.fork()
    if child == 0:
        (place.cgroup / "cgroup.procs").write_text(str(os.getpid()))
        while True:
            seen[1] |= _errno(place.directory / "1") != errno.EPERM
            seen[2] |= _errno(Path("/dev/null")) != 0
            seen[0] = 1
    try:
        while not seen[0]:
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
        for _ in range(200):
            place.allow(Rule("c", MAJOR, 0, "rw"))()
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert bytes(seen) == b"\1\0\0"


def _errno(path: Path) -> int:
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError as error:
        return error.errno or 0
    return 0


@pytest.mark.parametrize("flags", [0, 1, 2], ids=["single", "override", "multi"])
def test_no_moment_without_a_program(tmp_path: Path, flags: int) -> None:
    def work(place: Place) -> None:
        cgroups.attach(place.fd, cgroups.load(ONLY_NULL), flags)
        _watched(place)

    with_v2(tmp_path, work)


def test_no_moment_without_rules(tmp_path: Path) -> None:
    with_v1(tmp_path, _watched)


# major -> minors that are tried
_TRIED = {195: range(256), 508: range(4), 226: (0, 1, 2, 128, 129, 130), 8: (0, 1), 10: (200, 232)}
_GRANTED = {"195:0", "195:254", "195:255", "508:0", "508:1", "226:1", "226:129"}
_DEFAULT = {"10:200"}  # /dev/net/tun, which runc allows of itself


@pytest.mark.parametrize("form", ["wrapper", "hook-alone"])
@pytest.mark.parametrize("version", [1, 2], ids=["v1", "v2"])
def test_only_the_numbers_of_the_plan_open(shop: Workshop, settings: Path, version: int, form: str) -> None:
    """Asked with nodes of the container's own: what they are called, and who made them, makes no difference."""
    try:
        through = containers.cgroups(version)
    except LookupError as error:
        pytest.skip(str(error))
    bundle = shop.bundle()
    bundle.through = through
    if form == "hook-alone":
        args = ["nvidia-container-runtime-hook", "--config", str(settings), "prestart"]
        bundle.config["hooks"] = {"prestart": [{"path": str(HOOK), "args": args, "env": spec.HOOK_ENV}]}
    numbers = " ".join(f"{major}:{minor}" for major, minors in _TRIED.items() for minor in minors)
    script = f"""{TRY}
        for number in {numbers}; do mknod /dev/n$number c ${{number%:*}} ${{number#*:}}; try /dev/n$number; done"""
    wrapper = containers.WRAPPER if form == "wrapper" else Path("runc")
    result = bundle.write(["/bin/sh", "-uc", script], hostile.EVERYTHING).run(settings, wrapper=wrapper)
    assert result.returncode == 0, result.stderr
    answers = dict(line.removeprefix("/dev/n").split(" ", 1) for line in result.stdout.splitlines())
    assert len(answers) == sum(map(len, _TRIED.values()))
    assert {number for number, answer in answers.items() if answer != "denied"} - _DEFAULT == _GRANTED


def test_rules_that_we_write_make_no_nodes(shop: Workshop, settings: Path) -> None:
    """Of the spec's rules, ours are those after the first; runc adds `m` for every number by itself."""
    bundle = shop.bundle().write(["/bin/true"], hostile.EVERYTHING)
    assert bundle.run(settings).returncode == 0
    rules = json.loads(bundle.path.read_text())["linux"]["resources"]["devices"]
    assert rules[0] == {"allow": False, "access": "rwm"}
    assert {f"{rule['major']}:{rule['minor']}" for rule in rules[1:]} == _GRANTED
    assert {(rule["type"], rule["access"], rule["allow"]) for rule in rules[1:]} == {("c", "rw", True)}
