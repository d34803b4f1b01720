# SPDX-License-Identifier: Apache-2.0
"""A process that has loaded everything already, and forks for each container: no start waits for an interpreter.

The first start of a GPU container leaves it. For a while after the last one it waits for the next, whose wrapper asks
it (../ask.sh) instead of starting Python; so does the poststop hook. What connects them is a directory for root alone:

    pid             whose it is; the asking side looks whether that process lives as it does itself
    lock            held for as long as it lives: there is one
    0 to 15         slots. `taken` is made by the one who asks, `ask` and `answer` are FIFOs

Nothing of one container is left for the next: what was asked is read by a child of its own, which is also the process
that stands by for that container (standby.py). The child that will read the next question in slot 0 is there already,
so that nobody waits for a fork and its pages. It fails safely: an asker whose answer does not come starts Python.
"""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import time

from nvhook import state_dir
from nvhook.linux import memory, userns
from nvhook.linux.child import readable

from . import standby

_SECONDS = 300  # without a request
_PAUSE = 0.005  # without one, before a child is forked ahead for the next
_PATIENCE = 60  # for one request, and for a slot that was taken by who never asked
_SLOTS = 16
_MAX_TEXT = 1 << 16  # ask.sh writes less
_FIFOS = ("ask", "answer")
# Who inherits processes and waits for none of them. Podman's and CRI-O's conmon ends after its last child.
_REAPERS = ("systemd", "init", "containerd-shim")
_CODE = os.path.dirname(os.path.abspath(__file__))


class Slot:
    """One who asks at a time. `ask` and `answer` are descriptors, open both ways: no open waits, and no read ends.

    child    of a slot that has been given to a child ahead, in place of these two: the end of a pipe that is readable
             once the child has answered or is gone, and the end of another with which the child ends
    """

    __slots__ = ("answer", "ask", "child", "path")

    def __init__(self, path: str) -> None:
        self.path = path
        self.child: tuple[int, int] | None = None
        os.mkdir(path, 0o700)
        self._open()

    def watched(self) -> int:
        return self.child[0] if self.child else self.ask

    def _open(self) -> None:
        for name in _FIFOS:
            os.mkfifo(f"{self.path}/{name}", 0o600)
        self.ask, self.answer = [os.open(f"{self.path}/{name}", os.O_RDWR | os.O_CLOEXEC) for name in _FIFOS]

    def close(self) -> None:
        for fd in self.child or (self.ask, self.answer):
            os.close(fd)

    def give(self, child: tuple[int, int]) -> None:
        self.close()
        self.child = child

    def renew(self) -> None:
        """For the next one; a child has what belongs to the one before. It is free when `taken` is gone."""
        self.close()
        self.child = None
        for name in _FIFOS:
            os.unlink(f"{self.path}/{name}")
        self._open()
        _unlink(f"{self.path}/taken")

    def is_taken(self) -> bool:
        return os.path.exists(f"{self.path}/taken")

    def is_forgotten(self) -> bool:
        """Whether it was taken long ago, by who has not asked since."""
        try:
            return time.time() - os.stat(f"{self.path}/taken").st_mtime > _PATIENCE
        except FileNotFoundError:
            return False


def leave(place: str) -> None:
    """Start it, unless there is one; `place` is its directory. Where it cannot be, every start works alone."""
    if os.geteuid() != 0 or not userns.is_first():
        return
    try:
        os.close(state_dir.open_directory(os.path.dirname(place)))
        if not os.path.isdir(place):
            os.mkdir(place, 0o700)
        lock = os.open(f"{place}/lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            standby.fork_twice(lambda: _serve(place, lock))
        finally:
            os.close(lock)
    except OSError:
        return  # there is one, or this file system takes none


def _serve(place: str, lock: int) -> None:
    os.setsid()
    os.environ.clear()  # of whoever was the first
    standby.only([lock])
    code = _version_of_code()
    _load()
    if not _is_nobodys_child():
        return
    standby.be_called("nvhook-reserve")
    gc.disable()  # a child is soon over, and a collection would copy all that it shares with this process
    _clear(place)
    slots = [Slot(f"{place}/{number}") for number in range(_SLOTS)]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries its children
    with open(os.open(f"{place}/pid.new", standby.NEW_FILE, 0o600), "w") as file:
        file.write(f"{os.getpid()}\n")
    os.rename(f"{place}/pid.new", f"{place}/pid")
    first = slots[0]
    wants_child = True
    while True:
        is_settled = first.child or not wants_child
        asked = readable([slot.watched() for slot in slots], _SECONDS if is_settled else _PAUSE)
        if not asked:
            if is_settled:
                break  # nobody has asked for so long
            _fork_ahead(first, slots, lock, code)  # not in a burst, where it would take what the others need
        if _version_of_code() != code:
            break  # another version has been installed
        for slot in slots:
            if slot.watched() in asked:
                if not slot.child:
                    _fork(slot, slots, lock)
                elif not slot.is_taken():
                    wants_child = False  # it has ended and nobody had asked: the next would do the same
                slot.renew()
            elif slot.is_forgotten():
                slot.renew()
    _clear(place)


def _is_nobodys_child() -> bool:
    """Whether the process that has inherited us does not wait for us: else it would be there for as long as we are."""
    own = _name_of(os.getpid())
    end = time.monotonic() + 1
    while (name := _name_of(os.getppid())) == own and time.monotonic() < end:
        time.sleep(0.001)  # whoever forked us is about to end
    return os.getppid() == 1 or name.startswith(_REAPERS)


def _name_of(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read().strip()
    except OSError:
        return ""


def _version_of_code() -> list[tuple[int, int]]:
    """Of the directories with our modules: an upgrade makes them anew, or puts other files there."""
    found = []
    library = os.path.dirname(_CODE)
    for path in (_CODE, f"{library}/nvhook", f"{library}/nvhook/linux"):
        try:
            status = os.stat(path)
        except OSError:
            return []
        found.append((status.st_ino, status.st_mtime_ns))
    return found


def _load() -> None:
    """What any container may take, so that no child has to."""
    from nvhook import cleanup, hook, prestart  # noqa: F401
    from nvhook.linux import kernel  # noqa: F401

    from . import create  # noqa: F401


def _clear(place: str) -> None:
    for name in ("pid", "pid.new"):
        _unlink(f"{place}/{name}")
    for number in range(_SLOTS):
        slot = f"{place}/{number}"
        for name in (*_FIFOS, "taken"):
            _unlink(f"{slot}/{name}")
        if os.path.isdir(slot):
            os.rmdir(slot)


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except (FileNotFoundError, NotADirectoryError):
        return


def _fork(slot: Slot, slots: list[Slot], lock: int) -> None:
    """A child that answers who has asked."""
    if os.fork():
        return
    try:
        _be_child_for(slot, slots, lock)
        _answer(slot)
    finally:
        os._exit(0)


def _fork_ahead(slot: Slot, slots: list[Slot], lock: int, code: list[tuple[int, int]]) -> None:
    """A child that answers the next who asks in this slot, and has no page to copy then."""
    done, theirs = os.pipe2(os.O_CLOEXEC)
    end, ours = os.pipe2(os.O_CLOEXEC)
    if os.fork():
        os.close(theirs)
        os.close(end)
        slot.give((done, ours))
        return
    try:
        os.close(done)
        os.close(ours)
        _be_child_for(slot, slots, lock)
        standby.be_called("nvhook-next")
        memory.populate()
        if slot.ask in readable([slot.ask, end]) and _version_of_code() == code:
            _answer(slot)
    finally:
        os._exit(0)


def _be_child_for(slot: Slot, slots: list[Slot], lock: int) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.close(lock)
    for other in slots:
        if other is not slot:
            other.close()


def _answer(slot: Slot) -> None:
    """Do what is asked. An answer that does not come, for whatever reason, is one as well."""
    signal.alarm(_PATIENCE)
    words = _read(slot.ask)
    if words[0] == "create":
        _create(slot, words)
    elif words[0] == "poststop":
        _poststop(slot, words)


def _read(ask: int) -> list[str]:
    """Words on a line each, after the line that says how many there are."""
    content = b""
    while len(content) < _MAX_TEXT:
        content += os.read(ask, _MAX_TEXT)
        lines = content.split(b"\n")
        if len(lines) > 1 and len(lines) > int(lines[0]) + 1:
            return [os.fsdecode(line) for line in lines[1:-1]]
    raise ValueError("a text without an end")


def _say(slot: Slot, status: int, said: list[str]) -> None:
    standby.say(slot.answer, status, said)
    slot.close()


def _create(slot: Slot, words: list[str]) -> None:
    """create PID DIRECTORY HOOK CONFIG MUST-EXIST RESERVE CANDIDATES RUNTIME ARGUMENT ...: as create.main has them.

    PID is the process that asks, and becomes the low-level runtime; DIRECTORY its current one.
    """
    from . import create

    _, pid, directory, hook, config_path, must_exist, place, candidates, runtime, *arguments = words
    os.chdir(directory)
    call = create.Call(hook, config_path, bool(must_exist), place, candidates, runtime, arguments)
    said: list[str] = []
    waiting: list[standby.Waiting] = []
    is_ready = create.ready(call, said, lambda _: None, waiting.append)
    _say(slot, 0 if is_ready else 1, said)
    if is_ready and waiting:
        waiting[0].stand_by(int(pid))


def _poststop(slot: Slot, words: list[str]) -> None:
    """poststop STATE-DIR STATE: as the hook has them."""
    from nvhook import hook

    _, directory, state = words
    warnings: list[str] = []
    hook.poststop(directory, os.fsencode(state), warnings)
    _say(slot, 0, [f"nvidia-container-runtime-hook: warning: {warning}" for warning in warnings])
