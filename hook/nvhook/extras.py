# SPDX-License-Identifier: Apache-2.0
"""What a container gets of the host beside the driver and its GPUs, as records.

caps.py and features.py look for them at every start, because they come and go; plan.py makes edits of them.
"""

from __future__ import annotations


class Node:
    """A character device, by the same `path` on the host and in the container; `owner` is (uid, gid, mode)."""

    __slots__ = ("major", "minor", "owner", "path")

    def __init__(self, path: str, major: int, minor: int, owner: tuple[int, int, int]) -> None:
        self.path = path
        self.major = major
        self.minor = minor
        self.owner = owner


class Data:
    """To be read: a file or directory (`what`), `path` on the host, without links, and `destination`."""

    __slots__ = ("destination", "path", "what")

    def __init__(self, path: str, destination: str, what: str = "file") -> None:
        self.path = path
        self.destination = destination
        self.what = what


class Extras:
    __slots__ = ("data", "nodes")

    def __init__(self) -> None:
        self.data: list[Data] = []
        self.nodes: list[Node] = []
