# SPDX-License-Identifier: Apache-2.0
"""The memory of this process."""

from __future__ import annotations

from . import kernel


def populate() -> None:
    """Let every page that can be written to be there: after a fork each costs a fault, and a copy, at its first use.

    A kernel before 5.14 cannot do that, and nothing is lost.
    """
    with open("/proc/self/maps") as file:
        lines = file.read().splitlines()
    for line in lines:
        span, rights, _ = line.split(" ", 2)
        if rights.startswith("rw"):
            begin, end = (int(number, 16) for number in span.split("-"))
            try:
                kernel.madvise(begin, end - begin, kernel.MADV_POPULATE_WRITE)
            except OSError:
                continue
