# SPDX-License-Identifier: Apache-2.0
"""The benchmark's own instruments; what it measures is for `make bench`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import bench

_SCRIPT = """
import os, signal, sys, time
from pathlib import Path

import bench

def work():
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass

group = bench.ControlGroup(Path(sys.argv[1]))
begin = group.spent()
work()
middle = group.spent()
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # as the server: nobody gets the times of its children
if not os.fork():
    work()
    os._exit(0)
try:
    os.wait()
except ChildProcessError:
    end = group.spent()
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
group.close()
print(middle - begin, end - middle)
"""


@pytest.mark.root
def test_control_group_has_the_time_of_processes_that_nobody_waits_for(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _SCRIPT, str(tmp_path / "groups")]
    env = {**os.environ, "PYTHONPATH": str(Path(bench.__file__).parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    own, child = map(float, done.stdout.split())
    assert own < 0.05 < 0.1 <= child
