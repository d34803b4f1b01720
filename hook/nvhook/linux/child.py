# SPDX-License-Identifier: Apache-2.0
"""A child process that may not take for ever: its end, and what it said last."""

from __future__ import annotations

import os
import select
import time

_OUTPUT = 4096


def watch(child: int, output: int, seconds: int) -> tuple[int, str]:
    """The exit status of `child` and the last line that came through `output`; it is killed when its time is over.

    Its death is not waited for then: a process that the kernel holds up does not die, and nor may we.
    """
    pidfd = os.pidfd_open(child)
    try:
        text = b""
        end = time.monotonic() + seconds
        waiting = [pidfd, output]
        while pidfd in waiting:
            ready, _, _ = select.select(waiting, [], [], max(0.0, end - time.monotonic()))
            if not ready or time.monotonic() > end:  # one that never stops talking is always ready
                os.kill(child, 9)
                os.waitpid(child, os.WNOHANG)
                return -1, f"not finished after {seconds} s"
            if output in ready:
                chunk = os.read(output, _OUTPUT)
                text = (text + chunk)[-_OUTPUT:]
                if not chunk:
                    waiting.remove(output)
            if pidfd in ready:
                waiting.remove(pidfd)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        os.close(pidfd)
    lines = text.decode(errors="replace").split("\n")
    return status, next((line for line in reversed(lines) if line), "")
