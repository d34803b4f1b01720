# SPDX-License-Identifier: Apache-2.0
"""linux/child.py: how a child ended and what it said last, within its time."""

from __future__ import annotations

import fcntl
import os
import time

import pytest

from nvhook.linux import child


def _run(script: str, seconds: int = 10) -> tuple[int, str]:
    output, theirs = os.pipe2(os.O_CLOEXEC)
    streams = [(os.POSIX_SPAWN_DUP2, theirs, 1), (os.POSIX_SPAWN_DUP2, theirs, 2)]
    started = os.posix_spawn("/bin/sh", ["sh", "-c", script], {"PATH": "/usr/bin:/bin"}, file_actions=streams)
    os.close(theirs)
    try:
        return child.watch(started, output, seconds)
    finally:
        os.close(output)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        pytest.param("exit 0", (0, ""), id="silent"),
        pytest.param("echo one; echo two >&2", (0, "two"), id="last-line"),
        pytest.param("echo one; echo; echo", (0, "one"), id="last-that-says-something"),
        pytest.param("printf cut; exit 7", (7, "cut"), id="without-newline"),
        pytest.param("kill -9 $$", (-9, ""), id="killed"),
        pytest.param("head -c 100000 /dev/zero | tr '\\0' x; echo; echo end; exit 1", (1, "end"), id="much"),
        pytest.param("echo first; (sleep 5; echo late) & exit 2", (2, "first"), id="leaves-one-behind"),
        pytest.param("exec >&- 2>&-; sleep 0.2; exit 5", (5, ""), id="closes-its-output-first"),
        pytest.param("printf '\\377\\n'", (0, "\ufffd"), id="not-utf-8"),
    ],
)
def test_watch(script: str, expected: tuple[int, str]) -> None:
    assert _run(script) == expected


@pytest.mark.parametrize("script", ["exec sleep 60", "trap '' TERM; exec >&- 2>&-; exec sleep 60", "exec yes"])
def test_watch_ends_in_time(script: str) -> None:
    begin = time.monotonic()
    assert _run(script, seconds=1) == (-1, "not finished after 1 s")
    assert time.monotonic() - begin < 3


def test_readable_beyond_a_thousand_descriptors() -> None:
    """A container that gets many nodes has many sources open; select(2) ends at 1023."""
    reading, writing = os.pipe()
    high = fcntl.fcntl(reading, fcntl.F_DUPFD_CLOEXEC, 1500)
    try:
        assert child.readable([high], 0) == []
        os.write(writing, b"x")
        assert child.readable([high], 10) == [high]
        os.close(writing)
        os.read(high, 1)
        assert child.readable([high]) == [high]  # its end
    finally:
        os.close(reading)
        os.close(high)
