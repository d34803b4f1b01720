# SPDX-License-Identifier: Apache-2.0
"""Every reader on damaged input: a value or the exceptions that it documents, within a second and 100 MB.

The same short run each time; `make fuzz SECONDS=3600` (NVHOOK_FUZZ_SECONDS) goes on with other inputs for that long
and prints how many each target has had.
"""

from __future__ import annotations

import os
import random
import time

import pytest

from security import fuzzing
from security.targets import TARGETS

_EXAMPLES = 120
_SECONDS = float(os.environ.get("NVHOOK_FUZZ_SECONDS", "0"))


@pytest.mark.parametrize("name", TARGETS)
def test_target(name: str) -> None:
    count, fault = fuzzing.run(name, examples=_EXAMPLES)
    assert not fault, f"{name}: {fault}"
    assert count >= _EXAMPLES // 4


@pytest.mark.skipif(not _SECONDS, reason="NVHOOK_FUZZ_SECONDS says for how long")
def test_all_targets_for_long(capsys: pytest.CaptureFixture[str]) -> None:
    counts = dict.fromkeys(TARGETS, 0)
    faults = []
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end:
        for name in TARGETS:
            count, fault = fuzzing.run(name, seed=random.getrandbits(64))
            counts[name] += count
            if fault:
                faults.append(f"{name}: {fault}")
            if time.monotonic() > end:
                break
    with capsys.disabled():
        print(f"\n{sum(counts.values())} executions: {counts}")
    assert not faults, "\n".join(faults)
