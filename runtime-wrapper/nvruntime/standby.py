# SPDX-License-Identifier: Apache-2.0
"""A process of the wrapper's that stands by while the low-level runtime makes the container.

The wrapper has read everything already, and the runtime takes its time: so a child of the wrapper makes the plan and
opens its sources meanwhile, and the hook, a few lines of sh, wakes it when the container is there. That saves an
interpreter, and reading everything again.

What connects the two is a directory below the state directory, for root alone:

    ask      FIFO: the hook writes the container's state, one line
    answer   FIFO: the exit status, then what is to be said, a line each
    lock     held by this process until it has answered, or is gone

It fails safely: the kernel closes `answer` with the process, and a hook that gets no answer does the work by itself.
"""

from __future__ import annotations

import fcntl
import os
import signal
import time

from nvhook import audit, container_dir, spec, state_dir
from nvhook.errors import NvhookError, SpecError, one_line
from nvhook.linux import kernel, userns
from nvhook.linux.child import readable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from nvhook.config import Config
    from nvhook.gpus import Gpus, Selection
    from nvhook.prestart import Preparation
    from nvhook.request import Request

_DIRECTORY = "standby"
_NAMES = ("ask", "answer", "lock")
NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_LOOKUP_SECONDS = 2  # for all look-ups in the image; the hook has more, should they not do
_SECONDS = 60  # for everything: then SIGALRM ends it, and the hook begins anew
_MAX_STATE = 1 << 20
_MAX_ANSWER = 32 << 10  # bytes; a pipe takes 64 KiB without a reader


class Task:
    """One container: what the wrapper has found out about it. `bundle` is the directory of its config.json."""

    __slots__ = ("asked", "bundle", "chosen", "config", "described", "gpus", "id")

    def __init__(
        self,
        config: Config,
        described: spec.Spec,
        asked: Request,
        gpus: Gpus,
        chosen: Selection,
        *,
        bundle: str,
        id: str,  # noqa: A002 - OCI's name
    ) -> None:
        self.config = config
        self.described = described
        self.asked = asked
        self.gpus = gpus
        self.chosen = chosen
        self.bundle = bundle
        self.id = id


class Waiting:
    """A container's directory, made, and its descriptors: what the process that stands by has."""

    __slots__ = ("ends", "place", "task")

    def __init__(self, task: Task, place: str, ends: list[int]) -> None:
        self.task = task
        self.place = place
        self.ends = ends  # of ask, answer and lock

    def close(self) -> None:
        for fd in self.ends:
            os.close(fd)

    def stand_by(self, runtime: int) -> None:
        """Prepare, wait, serve, answer. Unasked it ends with the process `runtime`, the low-level one."""
        os.setsid()
        be_called("nvhook-standby")
        signal.alarm(_SECONDS)
        only(self.ends)
        _stand_by(self.task, self.place, self.ends, runtime)


def leave(waiting: Waiting) -> None:
    """Start it, for a process that becomes the low-level runtime."""
    runtime = os.getpid()
    fork_twice(lambda: waiting.stand_by(runtime))
    waiting.close()


def make(task: Task) -> Waiting | None:
    """None where there can be none and the hook works alone.

    Not in a user namespace: root there may not write where the state is.
    """
    if os.geteuid() != 0 or not userns.is_first() or not container_dir.is_id(task.id):
        return None
    parent = os.path.join(task.config.state_dir, _DIRECTORY)
    place = os.path.join(parent, task.id)
    try:
        if os.path.lexists(place) and _is_over(place):
            _remove(place)  # of a process that was killed
        return Waiting(task, place, _make(parent, place))
    except OSError:
        return None


def fork_twice(work: Callable[[], None]) -> None:
    """Let a process do it that is no child of this one: the low-level runtime shall have none that it does not know."""
    first = os.fork()
    if first:
        os.waitpid(first, 0)
        return
    try:
        if not os.fork():
            work()
    finally:
        os._exit(0)


def _make(parent: str, place: str) -> list[int]:
    """Descriptors of ask, answer and lock."""
    os.close(state_dir.open_directory(parent))
    os.mkdir(place, 0o700)
    for name in _NAMES[:2]:
        os.mkfifo(f"{place}/{name}", 0o600)
    ends = [os.open(f"{place}/{name}", os.O_RDWR | os.O_CLOEXEC) for name in _NAMES[:2]]
    ends.append(os.open(f"{place}/{_NAMES[2]}", NEW_FILE, 0o600))
    fcntl.flock(ends[2], fcntl.LOCK_EX)
    return ends


def _stand_by(task: Task, place: str, ends: list[int], runtime: int) -> None:
    ask, answer, _lock = ends
    over = os.pidfd_open(runtime)
    said: list[str] = []
    ahead, fault = _prepare(task, said)
    trail = audit.Audit(task.config, "nvidia-container-runtime-hook", task.id, silent=True)
    trail.expect(task.asked)  # opens its files, before another mount namespace is entered
    sweep(os.path.dirname(place), but=os.path.basename(place))
    asked = ask in readable([ask, over])
    # The hook has opened what it needs. From here on there is no name of ours, whatever becomes of us.
    _remove(place)
    if not asked:
        _take_back(task)
        return
    status = 0
    try:
        _serve(task, ask, ahead, fault, said)
    except SpecError:
        return  # another container than was thought: the hook reads all of it itself
    except NvhookError as error:
        status = 1
        trail.refuse(str(error))
        said.append(str(error))
    say(answer, status, [f"nvidia-container-runtime-hook: {line}" for line in said])


def say(answer: int, status: int, said: list[str]) -> None:
    """Write the answer: the last lines, and never more than a pipe takes, for nobody may be there to read it."""
    lines: list[bytes] = []
    room = _MAX_ANSWER - len(f"{status}\n")
    for line in reversed(said):
        text = f"{one_line(line)}\n".encode()
        room -= len(text)
        if room < 0:
            break
        lines.append(text)
    os.write(answer, b"".join([f"{status}\n".encode(), *reversed(lines)]))


def be_called(name: str) -> None:
    """What `ps` and `top` show; 15 characters at most."""
    kernel.prctl(kernel.PR_SET_NAME, name.encode())


def only(kept: list[int]) -> None:
    """Nothing of the wrapper's stays open: its engine waits for the end of its streams."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    begin = 3
    for fd in sorted(kept):
        os.closerange(begin, fd)
        begin = fd + 1
    os.closerange(begin, 1 << 16)
    os.chdir("/")


def _prepare(task: Task, said: list[str]) -> tuple[Preparation | None, NvhookError | None]:
    """What can be done ahead, for the root filesystem as it is now; or the fault, to be told when somebody asks."""
    from nvhook import container, prestart
    from nvhook.linux.root import DIRECTORY, Root

    warnings: list[str] = []
    try:
        root = Root(os.open(task.described.rootfs, DIRECTORY), _LOOKUP_SECONDS)
        try:
            found = task.gpus, task.chosen
            layout = container.layout(root)
            ahead = prestart.prepare(task.config, task.asked, root, layout, warnings, found=found, start=task.id)
            return ahead, None
        finally:
            os.close(root.fd)  # an engine that gives up takes its file system away
    except OSError:
        return None, None  # the runtime says what is wrong with it
    except NvhookError as error:
        return None, error if root.left > 0 else None
    finally:
        said += [f"warning: {warning}" for warning in warnings]


def _serve(task: Task, ask: int, ahead: Preparation | None, fault: NvhookError | None, said: list[str]) -> None:
    from nvhook import prestart

    content = b""
    while b"\n" not in content and len(content) < _MAX_STATE:
        content += os.read(ask, _MAX_STATE)
    state = spec.parse_state(content)
    if os.path.realpath(state.bundle) != os.path.realpath(task.bundle):
        raise SpecError(f"`{state.bundle}` is not `{task.bundle}`")
    if fault:
        _take_back(task)
        raise fault
    warnings: list[str] = []
    try:
        prestart.serve(task.config, task.described, task.asked, state, ahead, warnings)
    except NvhookError:
        if ahead:
            ahead.take_back()
        raise
    finally:
        said += [f"warning: {warning}" for warning in warnings]


def _take_back(task: Task) -> None:
    """What the wrapper has made on the host for this start, which has failed."""
    from nvhook import kmods

    made = kmods.made_by(task.config, task.id)
    if made:
        made.take_back()


def sweep(parent: str, *, but: str = "") -> None:
    """Remove the directories in `parent` whose process was killed: nobody holds their lock."""
    for name in os.listdir(parent):
        place = os.path.join(parent, name)
        try:
            if name != but and _is_over(place):
                _remove(place)
        except OSError:
            continue  # removed by its own process, or by another start


def _is_over(place: str) -> bool:
    try:
        fd = os.open(f"{place}/{_NAMES[2]}", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        # It is being made, or removed, or its maker was killed in between.
        return time.time() - os.stat(place).st_mtime > _SECONDS
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def _remove(place: str) -> None:
    for name in _NAMES:
        try:
            os.unlink(f"{place}/{name}")
        except FileNotFoundError:
            continue
    os.rmdir(place)
