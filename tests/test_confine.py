# SPDX-License-Identifier: Apache-2.0
"""The confined child's end; what it may do is told by those who use it (test_ldconfig.py, test_nvml.py)."""

from __future__ import annotations

import os
import time

import pytest

from nvhook.linux import confine
from nvhook.linux.root import DIRECTORY

BOUNDS = confine.Bounds(seconds=1, memory=1 << 30, file_size=0, files=64, output=4096)


def _sleep() -> None:
    time.sleep(60)


@pytest.mark.root
def test_child_that_the_kernel_holds_up_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL does not reach it, as if it were waiting for a disk."""
    kill, spared = os.kill, []
    monkeypatch.setattr(os, "kill", lambda process, _: spared.append(process))
    directory = os.open("/", DIRECTORY)
    begin = time.monotonic()
    try:
        ended = confine.run(directory, ("enter", lambda: None), ("sleep", _sleep), (0, 0), BOUNDS)
        assert ended.status is None, ended.output
        assert time.monotonic() - begin < 5
    finally:
        os.close(directory)
        for process in spared:
            kill(process, 9)
            os.waitpid(process, 0)
    assert len(spared) == 1
