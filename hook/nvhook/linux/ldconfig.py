# SPDX-License-Identifier: Apache-2.0
"""The host's ldconfig over a root filesystem that somebody else filled.

The program runs from a sealed copy in memory, so that nothing in that tree can reach the file on the host through
/proc/<pid>/exe (CVE-2019-5736 and its family). It runs as the owner of the tree, without capabilities, without
environment, with the tree as its whole world: namespaces of its own (confine.py), nothing below /proc, /sys and /dev,
and limits on time, memory, file size and system calls (seccomp.py).

`seal` is called in the host's mount namespace, `run` in the container's.
"""

from __future__ import annotations

import errno
import fcntl
import os

from . import confine, kernel, seccomp
from .root import DIRECTORY, Root

_SECONDS = 10
_MEMORY = 2 << 30  # every library is mapped whole
_DATA = 256 << 20  # for the lists of 100,000 of them, and no line of gigabytes in /etc/ld.so.conf
_FILE_SIZE = 64 << 20
_FILES = 64
_OUTPUT = 4096
_HIDDEN = ("proc", "sys", "dev")

# Where a dynamic linker looks without being told. The host's ldconfig knows its own distribution's alone.
_SYSTEM_DIRECTORIES = ("/lib64", "/usr/lib64", "/lib", "/usr/lib")


def seal(program: int) -> int:
    """A sealed memfd with the content of the file `program`; OSError if it cannot be read."""
    fd = os.memfd_create("ldconfig", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        size = os.fstat(program).st_size
        offset = 0
        while offset < size and (count := os.sendfile(fd, program, offset, size - offset)):
            offset += count
        seals = kernel.F_SEAL_SEAL | kernel.F_SEAL_SHRINK | kernel.F_SEAL_GROW | kernel.F_SEAL_WRITE
        fcntl.fcntl(fd, kernel.F_ADD_SEALS, seals)
    except OSError:
        os.close(fd)
        raise
    return fd


def run(program: int, rootfs: str, root: Root, directories: tuple[str, ...], owner: tuple[int, int]) -> None:
    """Rebuild etc/ld.so.cache in `root`, with `directories` before all others.

    `rootfs` is the path of `root`'s directory, a mount point in this mount namespace; `owner` the (uid, gid) that the
    program runs as. OSError when a step fails; its text is what ldconfig printed, or the step's name. What it takes
    counts as `root`'s time, and ends with that.
    """
    known = [path for path in (*directories, *_SYSTEM_DIRECTORIES) if root.exists(path)]
    known = list(dict.fromkeys(known))
    seconds = max(1, int(min(_SECONDS, root.left)))
    arguments = ["ldconfig", "-X", "-f", "/etc/ld.so.conf", "-C", "/etc/ld.so.cache", *known]
    bounds = confine.Bounds(
        seconds=seconds, memory=_MEMORY, data=_DATA, file_size=_FILE_SIZE, files=_FILES, output=_OUTPUT
    )
    ended = root.timed(
        "/etc/ld.so.conf",
        lambda: confine.run(
            # The one way to be in the root filesystem in the new namespace without a path from `/`, which is not where
            # an engine in a chroot has it.
            root.fd,
            (f"make `{rootfs}` the root directory", lambda: _pivot(os.path.basename(rootfs), root)),
            ("execute", lambda: os.execve(3, arguments, {})),
            owner,
            bounds,
            program=program,
            # The child of a user who is not root, and may mount in a user namespace, has one of its own, without other
            # ids.
            or_nobody=os.geteuid() != 0,
            calls=seccomp.LDCONFIG,
        ),
    )
    if ended.status is None:
        raise OSError(errno.ECHILD, f"not finished after {seconds} s")
    if ended.status != 0:
        raise OSError(errno.ECHILD, ended.last_line() or f"ended with status {ended.status}")


def _pivot(name: str, root: Root) -> None:
    """The current directory, `name`, becomes `/`; nothing of the host is left, and /proc, /sys and /dev are empty."""
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    # A mount that came from a user namespace's mount namespace is locked; one that we make is ours to pivot into.
    kernel.mount(".", ".", None, kernel.MS_BIND | kernel.MS_REC)
    os.chdir(f"../{name}")  # out of what the new mount covers, and into it
    if not os.path.samestat(os.stat("."), os.fstat(root.fd)):
        raise OSError(errno.ESTALE, "another directory than the container's")
    kernel.pivot_root(".", ".")
    kernel.umount2(".", kernel.MNT_DETACH)
    os.chroot(".")
    for hidden in _HIDDEN:
        try:
            fd = os.open(hidden, DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue  # not there, or no directory: nothing to hide
        os.fchdir(fd)
        os.close(fd)
        kernel.mount("none", ".", "tmpfs", kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    os.chdir("/")
