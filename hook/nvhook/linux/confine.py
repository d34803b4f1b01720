# SPDX-License-Identifier: Apache-2.0
"""A child process that is trusted with nothing: namespaces of its own, no privileges, limits, and a deadline.

Three processes, so that nothing in there can outlive its time:

    the first     makes the namespaces; whoever called `run` waits for it, and kills it at the deadline
    the keeper    is the first process of the pid namespace and privileged, so the last cannot touch it; it dies with
                  the first, and everything in the namespace dies with it
    the last      prepares its place, gives up everything, and acts

What the last one prints is the answer. What it does is the caller's: ldconfig.py makes it a program, nvml.py loads a
library of the driver into it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import time

from . import kernel
from .child import readable

_CHUNK = 1 << 16
_DYING = 1.0  # seconds
_NAMESPACES = kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS | kernel.CLONE_NEWNET

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Step = tuple[str, Callable[[], object]]  # what is tried, as a verb with its object, and the trying


class Bounds:
    """What the last process may use.

    seconds    of time, and of processor time
    memory     bytes of address space; `data` of these that are its own, mapped files not counted in, None for no
               limit of their own; `file_size` bytes of each file that it writes
    files      open descriptors
    processes  of its user, threads and those outside counted in; None for no limit
    output     bytes of what it prints that are kept, from the end
    """

    __slots__ = ("data", "file_size", "files", "memory", "output", "processes", "seconds")

    def __init__(
        self,
        *,
        seconds: int,
        memory: int,
        file_size: int,
        files: int,
        output: int,
        data: int | None = None,
        processes: int | None = None,
    ) -> None:
        self.data = data
        self.seconds = seconds
        self.memory = memory
        self.file_size = file_size
        self.files = files
        self.output = output
        self.processes = processes


class Ended:
    """`status`: 0 to 255 as a shell has it (128 and the signal's number), or None for one that was killed at the
    deadline; `output`: the end of what was printed, of `printed` bytes in all."""

    __slots__ = ("output", "printed", "status")

    def __init__(self, status: int | None, output: bytes, printed: int) -> None:
        self.status = status
        self.output = output
        self.printed = printed

    def last_line(self) -> str:
        lines = self.output.decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line), "")


def run(
    directory: int,
    enter: Step,
    act: Step,
    owner: tuple[int, int],
    bounds: Bounds,
    *,
    program: int | None = None,
    or_nobody: bool = False,
    calls: bytes = b"",
) -> Ended:
    """`act` in a child without privileges. A step that fails ends it with status 127, and is its last line.

    directory   descriptor of the current directory, which is taken along into the new mount namespace
    enter       before anything is given up: the child's mounts, which are private once it has made them so
    owner       (uid, gid) that it acts as; with `or_nobody`, whoever it is, in a user namespace that has no such ids
    program     a descriptor that it keeps, as number 3
    calls       a filter of seccomp.py on the system calls that `act` makes
    """
    output, writing = os.pipe2(os.O_CLOEXEC)
    first = os.fork()
    if first == 0:
        _begin(directory, enter, act, owner, bounds, program, writing, or_nobody, calls)  # does not return
    os.close(writing)
    try:
        return _watch(first, output, bounds)
    finally:
        os.close(output)


def _watch(first: int, output: int, bounds: Bounds) -> Ended:
    """The first process and the keeper hold the pipe open too, so it is at its end when they are."""
    text, printed = bytearray(), 0
    end = time.monotonic() + bounds.seconds
    while readable([output], end - time.monotonic()):
        chunk = os.read(output, _CHUNK)
        if not chunk:
            status = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) & 0xFF
            return Ended(status, bytes(text[-bounds.output :]), printed)
        text += chunk
        printed += len(chunk)
        if len(text) > 2 * bounds.output:
            del text[: -bounds.output]
        if time.monotonic() > end:
            break
    _end(first)
    return Ended(None, bytes(text[-bounds.output :]), printed)


def _end(first: int) -> None:
    """Kill it, and wait for that: but a process that the kernel holds up does not die, and nor may we."""
    over = os.pidfd_open(first)
    try:
        os.kill(first, 9)
        readable([over], _DYING)
        os.waitpid(first, os.WNOHANG)
    finally:
        os.close(over)


def _begin(
    directory: int,
    enter: Step,
    act: Step,
    owner: tuple[int, int],
    bounds: Bounds,
    program: int | None,
    output: int,
    or_nobody: bool,
    calls: bytes,
) -> None:
    """In the child. Whatever fails here is told through `output`."""
    step = "start"
    try:
        os.fchdir(directory)
        # Whoever called may have taken the file system ids of a container's root; what is above is for the host's.
        kernel.setfsuid(os.geteuid())
        kernel.setfsgid(os.getegid())
        step = "unshare"
        # An ordinary user may have these in a user namespace of his own, if at all.
        kernel.unshare(_NAMESPACES | (kernel.CLONE_NEWUSER if os.geteuid() else 0))
        kernel.prctl(kernel.PR_SET_PDEATHSIG, 9)
        step = "fork"
        _keep(os.fork())  # the pid namespace begins with a child
        kernel.prctl(kernel.PR_SET_PDEATHSIG, 9)
        _keep(os.fork())
        step = enter[0]
        enter[1]()
        step = "set up its streams"
        _only_standard_streams(program, output)
        output = 2
        step = "give up privileges"
        kernel.clearenv()
        _limit(bounds)
        _drop(owner, or_nobody)
        if calls:
            step = "filter its system calls"
            kernel.seccomp(calls)
        step = act[0]
        act[1]()
        os._exit(0)
    except OSError as error:
        os.write(output, f"{step}: {error.strerror or error}\n".encode(errors="replace"))
    except BaseException as error:  # the child must end here, and say why
        os.write(output, f"{step}: {error!r}\n".encode(errors="replace"))
    finally:
        os._exit(127)


def _keep(child: int) -> None:
    """Returns in the child alone; its parent waits, and ends as it does."""
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(status if status >= 0 else 128 - status)


def _only_standard_streams(program: int | None, output: int) -> None:
    """0 is empty, 1 and 2 are `output`, 3 is the program if there is one; everything else is closed."""
    if program is not None:
        program = fcntl.fcntl(program, fcntl.F_DUPFD_CLOEXEC, 10)
    output = fcntl.fcntl(output, fcntl.F_DUPFD_CLOEXEC, 10)
    reading, _writing = os.pipe()
    reading = fcntl.fcntl(reading, fcntl.F_DUPFD_CLOEXEC, 10)
    for target, fd in ((0, reading), (1, output), (2, output)):
        os.dup2(fd, target)
    if program is not None:
        os.dup2(program, 3, inheritable=False)
    os.closerange(3 if program is None else 4, 1 << 16)  # `_writing` among them: 0 is at its end


def _limit(bounds: Bounds) -> None:
    limits = [
        (resource.RLIMIT_CPU, bounds.seconds),
        (resource.RLIMIT_AS, bounds.memory),
        (resource.RLIMIT_FSIZE, bounds.file_size),
        (resource.RLIMIT_NOFILE, bounds.files),
        (resource.RLIMIT_CORE, 0),
    ]
    if bounds.data is not None:
        limits.append((resource.RLIMIT_DATA, bounds.data))
    if bounds.processes is not None:
        limits.append((resource.RLIMIT_NPROC, bounds.processes))
    for what, limit in limits:
        hard = resource.getrlimit(what)[1]
        value = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (value, value))


def _drop(owner: tuple[int, int], or_nobody: bool) -> None:
    """Every privilege, for good."""
    kernel.drop_bounding_set()
    _drop_groups()
    try:
        os.setresgid(owner[1], owner[1], owner[1])
        os.setresuid(owner[0], owner[0], owner[0])
    except OSError as error:
        # Only where a user namespace has no such id; its root is an ordinary user outside, and soon inside too.
        if not or_nobody or error.errno != errno.EINVAL:
            raise
    kernel.drop_capabilities()
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    kernel.prctl(kernel.PR_SET_PDEATHSIG, 9)  # the change of identity cleared it


def _drop_groups() -> None:
    try:
        os.setgroups([])
    except PermissionError:
        return  # a user namespace that was made without newgidmap denies it to everybody
