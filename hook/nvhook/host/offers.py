# SPDX-License-Identifier: Apache-2.0
"""What the host has for one container at this moment, beside the driver's files: host.now() finds it.

Nodes, sockets and the contents of /proc come and go, so they are read at every start and never kept.
"""

from __future__ import annotations

from nvhook.formats.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .dri import DriNode
    from .gpus import Gpus
    from .procfs import DriverProc
    from .sockets import Socket


class HostNode(Record):
    """A character device, by the same `path` on the host and in the container; `owner` is (uid, gid, mode)."""

    path: str
    major: int
    minor: int
    owner: tuple[int, int, int]


class HostFile(Record):
    """To be read: a file or directory (`what`), `path` on the host, without links, and `destination`."""

    path: str
    destination: str
    what: str = "file"


class Offers:
    """gpus      the GPUs, and the majors and owners of their nodes
    dri       DRI nodes of the chosen GPUs, for a container that draws
    nodes     of capabilities (cap_nodes.py) and of features (features.py); `files` go with them
    sockets   of the driver's daemons
    proc      what of /proc/driver/nvidia the container reads; None leaves the container's /proc as it is

    The last two are no nodes: host.now() leaves them to Start.draw, which the low-level runtime does not wait for.
    """

    __slots__ = ("dri", "files", "gpus", "nodes", "proc", "sockets")

    def __init__(
        self,
        gpus: Gpus,
        *,
        dri: list[DriNode] | None = None,
        nodes: list[HostNode] | None = None,
        files: list[HostFile] | None = None,
        sockets: list[Socket] | None = None,
        proc: DriverProc | None = None,
    ) -> None:
        self.gpus = gpus
        self.dri = dri or []
        self.nodes = nodes or []
        self.files = files or []
        self.sockets = sockets or []
        self.proc = proc
