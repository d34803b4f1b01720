# SPDX-License-Identifier: Apache-2.0
"""What the driver's daemons listen on. They come and go with their daemons, so they are looked for at every start.

A path here becomes writable in a container, so none is taken from the container: the directory of the
multi-process service is the usual one, or that of CUDA_MPS_PIPE_DIRECTORY in the environment of the hook, and it has
to be root's or ours. Anybody on the host may make /tmp/nvidia-mps.
"""

from __future__ import annotations

import os
import stat

from nvhook.formats.record import Record
from nvhook.linux.root import DIRECTORY, Root

_MPS = "/tmp/nvidia-mps"  # noqa: S108 - where the daemon puts it; its owner is checked

# Below /run, or a /var/run that is a directory of its own -> the capabilities whose programs talk to it
_DAEMONS = (
    ("nvidia-persistenced/socket", ("utility",)),
    ("nvidia-fabricmanager/socket", ("compute", "utility")),
)


class Socket(Record):
    """`path` on the host, without links; `what` is `socket`, or `directory` for one full of them."""

    path: str
    destination: str
    what: str
    capabilities: tuple[str, ...]


def find(driver_root: str) -> list[Socket]:
    """Those that are there now, below `driver_root`; a daemon that does not run is no error."""
    try:
        root = Root(os.open(driver_root, DIRECTORY))
    except OSError:
        return []
    try:
        found = []
        for name, capabilities in _DAEMONS:
            for run in ("/run", "/var/run"):
                path = root.real_path(f"{run}/{name}", stat.S_IFSOCK)
                if path:
                    found.append(Socket(path, f"/run/{name}", "socket", capabilities))
                    break
        mps = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "").rstrip("/") or _MPS
        path = _mps_directory(root, mps)
        if path:
            found.append(Socket(path, mps, "directory", ("compute",)))
        return found
    finally:
        os.close(root.fd)


def _mps_directory(root: Root, path: str) -> str:
    """Empty unless a daemon's pipe is in it, and nobody but root and us could have put it there."""
    try:
        fd = root.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return ""
    try:
        pipe = os.stat("control", dir_fd=fd, follow_symlinks=False)
        is_pipe = stat.S_ISFIFO(pipe.st_mode) or stat.S_ISSOCK(pipe.st_mode)
        is_ours = os.fstat(fd).st_uid in (0, os.geteuid()) and pipe.st_uid in (0, os.geteuid())
        return os.readlink(f"/proc/self/fd/{fd}") if is_pipe and is_ours else ""
    except OSError:
        return ""
    finally:
        os.close(fd)
