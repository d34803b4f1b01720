# SPDX-License-Identifier: Apache-2.0
"""Whose root we are: the machine's, or that of a user namespace, to whom modules, nodes and cgroups do not belong."""

from __future__ import annotations

from . import proc

_FULL_MAP = "0 0 4294967295"


def is_first() -> bool:
    """Whether this process is in the first user namespace, where ids are the machine's; no where procfs cannot tell."""
    try:
        return " ".join(proc.read("self/uid_map").split()) == _FULL_MAP
    except OSError:
        return False
