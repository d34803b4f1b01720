# SPDX-License-Identifier: Apache-2.0
"""The hook's command: what each stage may do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from containers import REPOSITORY
from nvhook.linux import kernel

_STATE = '{"ociVersion": "1.0.2", "id": "name", "pid": 0, "bundle": "/bundle"}'
_LISTENING_HOOK = """
import sys
sys.path[:0] = [sys.argv[1]]
from nvhook.container import cleanup
from nvhook import hook
cleanup.poststop = lambda *_: print(open("/proc/self/status").read())
sys.exit(hook.main(["--state-dir", sys.argv[2], "poststop"], "/nowhere"))
"""


@pytest.mark.root
def test_poststop_keeps_three_capabilities(tmp_path: Path) -> None:
    """It removes files and puts some back, as root of the host would; it mounts nothing and makes no node."""
    command = [sys.executable, "-IS", "-c", _LISTENING_HOOK, str(REPOSITORY / "hook"), str(tmp_path)]
    done = subprocess.run(command, input=_STATE, check=True, capture_output=True, text=True)
    fields = dict(line.split(":\t", 1) for line in done.stdout.splitlines() if line)
    kept = 1 << kernel.CAP_CHOWN | 1 << kernel.CAP_DAC_OVERRIDE | 1 << kernel.CAP_FOWNER
    assert [int(fields[name], 16) for name in ("CapPrm", "CapEff", "CapInh")] == [kept, kept, 0]
