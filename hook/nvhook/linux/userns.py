# SPDX-License-Identifier: Apache-2.0
"""Whose root we are: the machine's, or that of a user namespace, to whom modules, nodes and cgroups do not belong."""

from __future__ import annotations

_FULL_MAP = "0 0 4294967295"


def is_first() -> bool:
    """Whether this process is in the first user namespace, where ids are the machine's."""
    with open("/proc/self/uid_map", encoding="ascii") as file:
        return " ".join(file.read().split()) == _FULL_MAP
