# SPDX-License-Identifier: Apache-2.0
"""The host's ldconfig over a root filesystem that somebody else filled.

The program runs from a sealed copy in memory, so that nothing in that tree can reach the file on the host through
/proc/<pid>/exe (CVE-2019-5736 and its family). It runs as the owner of the tree, without capabilities, without
environment, with the tree as its whole world: mount, pid, network, IPC and host name namespaces of its own, nothing
below /proc, /sys and /dev, and limits on time, memory and file size.

`seal` is called in the host's mount namespace, `run` in the container's.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource

from . import child as children
from . import kernel
from .root import DIRECTORY, Root

_SECONDS = 10
_MEMORY = 2 << 30
_FILE_SIZE = 64 << 20
_FILES = 64
_HIDDEN = ("proc", "sys", "dev")

# Where a dynamic linker looks without being told. The host's ldconfig knows its own distribution's alone.
_SYSTEM_DIRECTORIES = ("/lib64", "/usr/lib64", "/lib", "/usr/lib")


def seal(program: str) -> int:
    """A sealed memfd with the content of `program`; OSError if it cannot be read."""
    fd = os.memfd_create("ldconfig", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(program, "rb") as source:
            size = os.fstat(source.fileno()).st_size
            while size > 0 and (count := os.sendfile(fd, source.fileno(), None, size)):
                size -= count
        seals = kernel.F_SEAL_SEAL | kernel.F_SEAL_SHRINK | kernel.F_SEAL_GROW | kernel.F_SEAL_WRITE
        fcntl.fcntl(fd, kernel.F_ADD_SEALS, seals)
    except OSError:
        os.close(fd)
        raise
    return fd


def run(program: int, rootfs: str, root: Root, directories: tuple[str, ...], owner: tuple[int, int]) -> None:
    """Build etc/ld.so.cache in `root` anew, with `directories` before all others.

    `rootfs` is the path of `root`'s directory, a mount point in this mount namespace; `owner` the (uid, gid) that the
    program runs as. OSError when a step fails; its text is what ldconfig printed, or the step's name.
    """
    known = [path for path in (*directories, *_SYSTEM_DIRECTORIES) if root.exists(path)]
    known = list(dict.fromkeys(known))
    arguments = ["ldconfig", "-X", "-f", "/etc/ld.so.conf", "-C", "/etc/ld.so.cache", *known]
    output, child_output = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        _confine(program, rootfs, root, owner, arguments, child_output)  # does not return
    os.close(child_output)
    try:
        status, text = children.watch(child, output, _SECONDS)
    finally:
        os.close(output)
    if status != 0:
        raise OSError(errno.ECHILD, text or f"ended with status {status}")


def _confine(program: int, rootfs: str, root: Root, owner: tuple[int, int], arguments: list[str], output: int) -> None:
    """In the child: give everything up, then become ldconfig. Whatever fails here is told through `output`."""
    step = "start"
    try:
        # The one way to be in the root filesystem in the new namespace without a path from `/`, which is not where
        # an engine in a chroot has it: unshare takes the current directory along.
        step = "unshare"
        os.fchdir(root.fd)
        # Files were made as the container's root; the directories above its tree are for the host's.
        kernel.setfsuid(os.geteuid())
        kernel.setfsgid(os.getegid())
        kernel.prctl(kernel.PR_SET_PDEATHSIG, 9)
        kernel.unshare(
            kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS | kernel.CLONE_NEWNET
        )
        step = "fork"
        worker = os.fork()  # the pid namespace begins with a child
        if worker:
            # Whoever waits for us kills us, not the worker: it dies with us through PDEATHSIG.
            os._exit(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) & 0xFF)
        step = f"make `{rootfs}` the root directory"
        _pivot(os.path.basename(rootfs), root)
        step = "set up its streams"
        _only_standard_streams(program, output)
        output = 2
        step = "give up privileges"
        _limit()
        kernel.drop_bounding_set()
        _drop_groups()
        os.setresgid(owner[1], owner[1], owner[1])
        os.setresuid(owner[0], owner[0], owner[0])
        kernel.drop_capabilities()
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        kernel.prctl(kernel.PR_SET_PDEATHSIG, 9)  # the change of identity cleared it
        step = "execute"
        os.execve(3, arguments, {})
    except OSError as error:
        os.write(output, f"{step}: {error.strerror}\n".encode(errors="replace"))
    except BaseException as error:  # the child must end here, and say why
        os.write(output, f"{step}: {error!r}\n".encode(errors="replace"))
    finally:
        os._exit(127)


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


def _drop_groups() -> None:
    try:
        os.setgroups([])
    except PermissionError:
        return  # a user namespace that was made without newgidmap denies it to everybody


def _limit() -> None:
    for what, limit in (
        (resource.RLIMIT_CPU, _SECONDS),
        (resource.RLIMIT_AS, _MEMORY),
        (resource.RLIMIT_FSIZE, _FILE_SIZE),
        (resource.RLIMIT_NOFILE, _FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        value = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (value, value))


def _only_standard_streams(program: int, output: int) -> None:
    """0 is empty, 1 and 2 are `output`, 3 is the program; everything else is closed."""
    program = fcntl.fcntl(program, fcntl.F_DUPFD_CLOEXEC, 10)
    output = fcntl.fcntl(output, fcntl.F_DUPFD_CLOEXEC, 10)
    reading, _writing = os.pipe()
    reading = fcntl.fcntl(reading, fcntl.F_DUPFD_CLOEXEC, 10)
    for target, fd in ((0, reading), (1, output), (2, output)):
        os.dup2(fd, target)
    os.dup2(program, 3, inheritable=False)
    os.closerange(4, 1 << 16)  # `writing` among them: 0 is at its end
