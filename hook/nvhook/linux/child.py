# SPDX-License-Identifier: Apache-2.0
"""Waiting, but not for ever: for descriptors, and for a child process's end and what it said last."""

from __future__ import annotations

import os
import select
import time

_OUTPUT = 4096


def readable(fds: list[int], seconds: float | None = None) -> list[int]:
    """Those of `fds` that can be read, or are at their end, after `seconds` at most; None: however long it takes.

    select(2) would refuse numbers above 1023.
    """
    waiting = select.poll()
    for fd in fds:
        waiting.register(fd, select.POLLIN)
    return [fd for fd, _ in waiting.poll(None if seconds is None else max(0.0, seconds) * 1000)]


def run(words: list[str], environment: dict[str, str], seconds: int) -> tuple[int, str]:
    """Run a program, whose path is the first of `words`, and `watch` it; OSError if it cannot be run."""
    output, theirs = os.pipe2(os.O_CLOEXEC)
    streams = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, theirs, 1),
        (os.POSIX_SPAWN_DUP2, theirs, 2),
    ]
    try:
        try:
            started = os.posix_spawn(words[0], words, environment, file_actions=streams)
        finally:
            os.close(theirs)
        return watch(started, output, seconds)
    finally:
        os.close(output)


def watch(child: int, output: int, seconds: int) -> tuple[int, str]:
    """The exit status of `child` and the last line that came through `output`; it is killed when its time is over.

    Its death is not waited for then: a process that the kernel holds up does not die, and nor may we.
    """
    pidfd = os.pidfd_open(child)
    try:
        text, is_over = _listen(pidfd, output, seconds)
    finally:
        os.close(pidfd)
    if not is_over:
        os.kill(child, 9)
        os.waitpid(child, os.WNOHANG)
        return -1, f"not finished after {seconds} s"
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    lines = text.decode(errors="replace").split("\n")
    return status, next((line for line in reversed(lines) if line), "")


def _listen(pidfd: int, output: int, seconds: int) -> tuple[bytes, bool]:
    """(the end of what was said, whether the child is over).

    What it left in the pipe is read; what others may still write there is not waited for.
    """
    text = b""
    is_over = False
    waiting = [pidfd, output]
    end = time.monotonic() + seconds
    while waiting and (left := end - time.monotonic()) > 0:
        ready = readable(waiting, 0 if is_over else left)
        if pidfd in ready:
            is_over = True
            waiting.remove(pidfd)
        elif output not in ready:
            break
        if output in ready:
            chunk = os.read(output, _OUTPUT)
            text = (text + chunk)[-_OUTPUT:]
            if not chunk:
                waiting.remove(output)
    return text, is_over
