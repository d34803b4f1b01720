# SPDX-License-Identifier: Apache-2.0
"""Device programs worked through by hand, against what the kernel does with the same ones."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from nvhook.linux import cgroups, devprog
from nvhook.linux.cgroups import Rule
from test_cgroups import EXIT, MAJOR, ONLY_NULL, ONLY_NULL_ODD, REFUSE, Place, blinded, insn, with_v2

ALLOW = insn(0xB7, 0, constant=1) + EXIT
UPPER_HALF = insn(0x77, 0, constant=32) + EXIT
RULES = cgroups.allow_block([Rule("c", MAJOR, 1, "rw"), Rule("b", 7, 0, "r"), Rule("c", MAJOR, 2, "rwm")])


@pytest.mark.parametrize(
    ("program", "kind", "major", "minor", "access", "is_allowed"),
    [
        pytest.param(ALLOW, "c", 1, 3, "rwm", True, id="all"),
        pytest.param(REFUSE, "c", 1, 3, "r", False, id="none"),
        pytest.param(ONLY_NULL, "c", 1, 3, "rwm", True, id="null"),
        pytest.param(ONLY_NULL, "b", 1, 3, "r", False, id="another-type"),
        pytest.param(ONLY_NULL, "c", 1, 5, "r", False, id="another-minor"),
        pytest.param(RULES + ONLY_NULL, "c", MAJOR, 1, "rw", True, id="rule-before"),
        pytest.param(RULES + ONLY_NULL, "c", MAJOR, 1, "m", False, id="rule-without-mknod"),
        pytest.param(RULES + ONLY_NULL, "c", MAJOR, 1, "rm", False, id="more-than-the-rule"),
        pytest.param(RULES + ONLY_NULL, "b", 7, 0, "r", True, id="block"),
        pytest.param(RULES + ONLY_NULL, "c", 1, 3, "r", True, id="what-follows"),
        pytest.param(insn(0xB7, 2, constant=7) + blinded(11) + EXIT + REFUSE, "c", 1, 3, "r", True, id="blinded"),
        pytest.param(insn(0x69, 0, 1, 2) + insn(0x57, 0, constant=4) + EXIT, "c", 1, 3, "w", True, id="half-word"),
        pytest.param(insn(0xB7, 0, constant=-1) + UPPER_HALF, "c", 1, 3, "r", True, id="64-bits"),
        pytest.param(insn(0xB4, 0, constant=-1) + UPPER_HALF, "c", 1, 3, "r", False, id="32-bits"),
    ],
)
def test_answer(program: bytes, kind: str, major: int, minor: int, access: str, is_allowed: bool) -> None:
    assert devprog.allows(program, kind, major, minor, access) == is_allowed


@pytest.mark.parametrize(
    ("program", "message"),
    [
        pytest.param(b"", "jumps out of itself", id="empty"),
        pytest.param(insn(0x05, offset=-5) + EXIT, "jumps out of itself", id="before-its-start"),
        pytest.param(insn(0x05, offset=-1) + EXIT, "more than 100000 steps", id="endless"),
        pytest.param(insn(0x85, constant=15) + EXIT, "the jump 0x80 is none", id="call"),
        pytest.param(insn(0x18, 1, 1, constant=7) + insn(0) + EXIT, "instruction 0x18", id="map"),
        pytest.param(insn(0x63, 10, 6, -4) + EXIT, "instruction 0x63", id="store"),
        pytest.param(insn(0x06, constant=5) + EXIT, "instruction 0x06", id="far-jump"),
        pytest.param(insn(0x61, 0, 10, -4) + EXIT, "reads something else", id="stack"),
        pytest.param(insn(0x61, 0, 1, 10) + EXIT, "reads something else", id="behind-the-request"),
        pytest.param(insn(0x37, 0, constant=0) + EXIT, "the operation 0x30 is none", id="division"),
        pytest.param(insn(0xB7, 15) + EXIT, "a register that does not exist", id="register"),
    ],
)
def test_refused(program: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        devprog.allows(program, "c", 1, 3, "r")


@pytest.mark.root
@pytest.mark.parametrize("program", [ONLY_NULL, REFUSE, RULES + ONLY_NULL, RULES + REFUSE, ALLOW])
def test_kernel_does_the_same(tmp_path: Path, program: bytes) -> None:
    def work(place: Place) -> None:
        cgroups.attach(place.fd, cgroups.load(program), 0)
        (read,) = cgroups.programs(place.fd)
        for minor in range(3):
            for access, flags in (("r", os.O_RDONLY), ("w", os.O_WRONLY), ("rw", os.O_RDWR)):
                is_refused = place.open(minor, flags) == errno.EPERM
                assert devprog.allows(read, "c", MAJOR, minor, access) != is_refused, (minor, access)
        assert devprog.allows(read, "c", 1, 3, "rw") == (place.null() == 0)

    with_v2(tmp_path, work)


@pytest.mark.root
def test_programs_of_cgroups_above(tmp_path: Path) -> None:
    def work(place: Place) -> None:
        cgroups.attach(place.fd, cgroups.load(ONLY_NULL), 0)
        below = place.cgroup / "below"
        below.mkdir()
        fd = os.open(below, os.O_RDONLY)
        try:
            assert cgroups.attached(fd)[1] == []
            assert [devprog.allows(item, "c", 1, 3, "rw") for item in cgroups.programs(fd)] == [True]
            assert [devprog.allows(item, "c", 1, 5, "rw") for item in cgroups.programs(fd)] == [False]
        finally:
            os.close(fd)
            below.rmdir()

    with_v2(tmp_path, work)


@pytest.mark.root
def test_program_that_does_more_than_to_compute(tmp_path: Path) -> None:
    def work(place: Place) -> None:
        cgroups.attach(place.fd, cgroups.load(ONLY_NULL_ODD), 0)
        (read,) = cgroups.programs(place.fd)
        with pytest.raises(ValueError, match="instruction 0x"):
            devprog.allows(read, "c", 1, 3, "rw")

    with_v2(tmp_path, work)
