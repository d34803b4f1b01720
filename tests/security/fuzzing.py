# SPDX-License-Identifier: Apache-2.0
"""Runs fuzz targets in processes of their own, with limits on what one execution may take."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Iterator

import hypothesis
from hypothesis import HealthCheck, Phase, Verbosity, given, settings

from security import targets
from security.targets import Target

_SECONDS = 1.0  # of processor time for one execution
_HANG = 10  # of any time
_MEMORY = 100 << 20  # bytes beyond what the worker has when it begins
_WORKER = 4 << 30  # bytes: making the inputs may not take the machine either
_BATCH = 2000


def run(name: str, *, examples: int = _BATCH, seed: int = 0) -> tuple[int, str]:
    """(executions, what went wrong or nothing). Which inputs they are, `seed` says."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            said = _work(targets.TARGETS[name], examples, seed)
            targets.forget_place()
        except BaseException:
            said = f"0 {traceback.format_exc()}"
        with os.fdopen(writing, "w", errors="backslashreplace") as pipe:
            pipe.write(said)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        count, _, fault = pipe.read().partition(" ")
    _, status = os.waitpid(child, 0)
    if status or not count:
        return 0, f"the worker ended with status {status:#x}"
    return int(count), fault


def _work(target: Target, examples: int, seed: int) -> str:
    count = 0

    @hypothesis.seed(seed)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        verbosity=Verbosity.quiet,
    )
    @given(target.strategy)
    def fuzz(value: object) -> None:
        nonlocal count
        count += 1
        with _limited():
            target.call(value)

    signal.signal(signal.SIGALRM, _hang)
    resource.setrlimit(resource.RLIMIT_AS, (_WORKER, resource.RLIM_INFINITY))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fuzz()
    except BaseException as error:
        notes = "\n".join(getattr(error, "__notes__", []))[:4000]
        return f"{count} {traceback.format_exc()[-6000:]}\n{notes}"
    return f"{count} "


def _hang(_signal: int, _frame: object) -> None:
    # No exception: to find the smallest input that hangs would hang too.
    faulthandler.dump_traceback(2)
    os._exit(1)


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """What hypothesis keeps counts as being there before."""
    with open("/proc/self/statm", encoding="ascii") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    signal.alarm(_HANG)
    begin = time.process_time()
    resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (_WORKER, resource.RLIM_INFINITY))
        signal.alarm(0)
    spent = time.process_time() - begin
    assert spent < _SECONDS, f"{spent:.1f} s"
