# SPDX-License-Identifier: Apache-2.0
"""What is kept about a container: one directory for each, STATE/containers/<id>/, for root alone.

    container.json   the bundle, the root filesystem (path and identity) and the first process
    traces.json      what edits left in the root filesystem (cleanup.py)
    ld.so.cache      the linker cache that the image had there

A directory per container, because an id may be any name: were its files told apart by a suffix, the container
`web.cache` would own a file of the container `web`. The directory is made before anything is done to the container, so
that another one over the same root filesystem knows of it; both take a lock first, one for each root filesystem.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time

from . import quickjson, state_dir
from .errors import ContainerError, SpecError, reason
from .linux import files, identity, proc
from .linux.root import DIRECTORY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any  # noqa: TID251 - never at run time

    from .container import Container
    from .linux.identity import Identity
    from .linux.root import Root
    from .spec import State

    Json = dict[str, Any]

CONTAINERS = "containers"
_CONTAINER, _TRACES, _CACHE = "container.json", "traces.json", "ld.so.cache"
_MAX_FILE = 4 << 20
_MAX_ID = 255  # NAME_MAX; engines use 64 and containerd allows 76
_SWEEP_EVERY, _SWEPT = 8, 32  # one start of eight looks at so many directories: a start is not held up
_END_SECONDS = 1
_LOCK_SECONDS = 10  # what is done under it takes milliseconds, or ldconfig's time
_IN_DOUBT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO)
_ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+-.")


class Containers:
    """STATE/containers, open.

    proc   a descriptor of the host's /proc, for when another mount namespace has been entered; -1 where that is not so
    """

    __slots__ = ("fd", "proc")

    def __init__(self, path: str, proc: int = -1, *, make: bool = True) -> None:
        """`path` is STATE. OSError as state_dir.open_directory has it; FileNotFoundError only unless `make`."""
        self.fd = state_dir.open_directory(path, CONTAINERS, make=make)
        self.proc = proc

    def ids(self) -> list[str]:
        """Of all containers, in no order."""
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            return [name for name in os.listdir(fd) if is_id(name)]
        finally:
            os.close(fd)

    def read(self, id: str) -> ContainerDirectory | None:  # noqa: A002 - OCI's name
        """The directory of the container `id`; None where there is none, or it is not as we write it.

        OSError where that cannot be said: a container that is not seen would lose its GPUs.
        """
        try:
            fd = os.open(id, DIRECTORY | os.O_NOFOLLOW, dir_fd=self.fd)
        except OSError as error:
            if error.errno in _IN_DOUBT:
                raise
            return None
        try:
            status = os.fstat(fd)
            if status.st_mode & 0o077 or not state_dir.is_owner(status):
                raise ValueError("a directory that others may use")
            return ContainerDirectory(self, id, fd, _read_json(fd, _CONTAINER))
        except (OSError, ValueError, KeyError, TypeError) as error:
            os.close(fd)
            if isinstance(error, OSError) and error.errno in _IN_DOUBT:
                raise
            return None

    def over(self, root: Identity, *, but: str = "") -> Iterator[ContainerDirectory]:
        """The containers over this root filesystem, but for that of the id `but`."""
        for name in self.ids():
            other = self.read(name) if name != but else None
            if other is None:
                continue
            if other.root.is_same_object(root):
                yield other
            else:
                other.close()  # there may be more of them than this process may have open files

    def close(self) -> None:
        os.close(self.fd)

    def start_of(self, pid: int) -> int:
        """As process_start has it."""
        if self.proc < 0:
            return process_start(proc.open_below(f"{pid}/stat", os.O_RDONLY))
        return process_start(os.open(f"{pid}/stat", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.proc))


class ContainerDirectory:
    """STATE/containers/<id>/, open; made and used in the host's namespace, and by descriptor in the container's.

    root     the identity of the root filesystem, as the host reaches it
    rootfs   its path there
    process  (pid, start time in clock ticks since boot) of the container's first process
    since    when the directory was made, in ns since boot
    """

    __slots__ = ("_containers", "_fd", "bundle", "id", "process", "root", "rootfs", "since")

    def __init__(self, containers: Containers, id: str, fd: int, document: Json) -> None:  # noqa: A002 - OCI's name
        """ValueError, KeyError or TypeError for a container.json that is not as `register` writes it."""
        self._containers = containers
        self._fd = fd
        self.id = id
        self.bundle = _text(document["bundle"])
        self.rootfs = _text(document["rootfs"])
        self.root = identity.parse(document["root"])
        pid, start = document["process"]
        self.process = _number(pid, 1, (1 << 31) - 1), _number(start, -1)
        self.since = _number(document["since"])

    def is_over(self) -> bool:
        """Whether the container's first process has ended. In doubt it lives: that costs empty files, and no GPU."""
        pid, start = self.process
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        try:
            return self._containers.start_of(pid) != start
        except ProcessLookupError:
            return True  # it has ended since the kill above
        except FileNotFoundError:
            return False  # hidepid of /proc, and we have given up CAP_SYS_PTRACE

    def has_ended(self) -> bool:
        """The same for a container that is being deleted: its process may need a moment to end."""
        end = time.monotonic() + _END_SECONDS
        while not self.is_over():
            if time.monotonic() > end:
                return False
            time.sleep(0.005)
        return True

    def has_root(self) -> bool:
        """Whether the root filesystem is still what the host reaches by its path."""
        try:
            fd = os.open(self.rootfs, DIRECTORY | os.O_NOFOLLOW)
        except (OSError, ValueError):  # a NUL in the path
            return False
        try:
            return identity.of(fd) == self.root
        finally:
            os.close(fd)

    def traces(self) -> list[Json]:
        """In the order in which they were made. OSError or ValueError where they are not as we wrote them."""
        try:
            found = _read_json(self._fd, _TRACES)
        except FileNotFoundError:
            return []  # nothing was made yet
        if not isinstance(found, list):
            raise ValueError(f"`{_TRACES}` is not a list")
        return found

    def write_traces(self, traces: list[Json]) -> None:
        _replace(self._fd, _TRACES, quickjson.dumps(traces))

    def save_cache(self, source: int) -> None:
        """A copy of the file `source`, without its owner and mode: a set-uid bit of an image's is none of root's."""
        self._unlink(_CACHE)
        fd = os.open(_CACHE, files.NEW, 0o600, dir_fd=self._fd)
        try:
            files.copy(source, fd)
        finally:
            os.close(fd)

    def saved_cache(self) -> int:
        """A descriptor of the copy; OSError where there is none, or it is another file than we wrote."""
        return _open_file(self._fd, _CACHE)

    def adopt_cache(self, other: ContainerDirectory) -> None:
        """Take the copy of another container's in the place of ours, if there is one."""
        self._unlink(_CACHE)
        try:
            os.rename(_CACHE, _CACHE, src_dir_fd=other._fd, dst_dir_fd=self._fd)
        except FileNotFoundError:
            return

    def is_there(self) -> bool:
        """Whether nobody has removed it since it was read."""
        return bool(os.fstat(self._fd).st_nlink)

    def remove(self) -> None:
        """The directory and all that is in it. Whatever else somebody put there stays, and the directory with it."""
        beside = [files.beside_of(name) for name in (_TRACES, _CONTAINER)]  # of a process that was killed
        for name in (_TRACES, *beside, _CACHE, _CONTAINER):  # the last one makes it a container's
            self._unlink(name)
        os.rmdir(self.id, dir_fd=self._containers.fd)

    def close(self) -> None:
        os.close(self._fd)

    def _unlink(self, name: str) -> None:
        try:
            os.unlink(name, dir_fd=self._fd)
        except FileNotFoundError:
            return


class Lock:
    """One process at a time looks at a root filesystem, makes something in it or removes something from it.

    Containers over the same one would make the same files at once, and one that cleans up would remove what another is
    about to mount on. The lock's file is there only as long as somebody has or wants it: a process that got the lock
    of a file which the former holder has removed by then has nothing, and tries again.
    """

    __slots__ = ("_containers", "_fd", "_name", "_root")

    def __init__(self, containers: Containers, root: Identity, tree: Root | None = None) -> None:
        """Take it; the end of a `with` block gives it back. What is waited counts as time of the look-ups in `tree`, so
        that both together are bounded. ContainerError where another process keeps it for too long, OSError where there
        can be none."""
        self._containers = containers
        self._root = root
        self._name = f".{root.device}-{root.inode}.lock"  # no id begins with a dot
        self._fd = -1
        begin = time.monotonic()
        while not self._try():
            if time.monotonic() - begin > _LOCK_SECONDS:
                raise ContainerError(
                    f"lock the container's root filesystem: another container over it has `{CONTAINERS}/{self._name}` "
                    f"for more than {_LOCK_SECONDS} s",
                    "start it again, or give it a root filesystem of its own",
                )
            time.sleep(0.001)
        if tree is not None:
            tree.spend(time.monotonic() - begin)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            os.unlink(self._name, dir_fd=self._containers.fd)
        except OSError:
            return  # read-only by now: the file stays, and the next one takes it
        finally:
            os.close(self._fd)

    def _try(self) -> bool:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(self._name, flags, 0o600, dir_fd=self._containers.fd)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.fstat(self._fd).st_nlink > 0
        except BlockingIOError:
            is_ours = False
        if not is_ours:
            os.close(self._fd)
        return is_ours

    def others(self, but: str) -> Iterator[ContainerDirectory]:
        """The containers over this root filesystem, but for that of this id."""
        return self._containers.over(self._root, but=but)

    def register(self, state: State, container: Container, warnings: list[str]) -> ContainerDirectory:
        """Make the directory of a container that is being created. The lock is held.

        SpecError for an id that cannot be a directory's name; OSError where the directory cannot be made, or is that of
        a container of another bundle that lives.
        """
        check_id(state.id)
        since = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        start = process_start(os.open("stat", os.O_RDONLY | os.O_CLOEXEC, dir_fd=container.proc))
        pid_and_start = (state.pid, start)
        document = {
            "bundle": state.bundle,
            "rootfs": container.rootfs,
            "root": self._root.describe(),
            "process": pid_and_start,
            "since": since,
        }
        self._clear_former(state, pid_and_start, warnings)
        if since % _SWEEP_EVERY == 0:
            self._sweep(state.id)
        fd = state_dir.make_private(self._containers.fd, state.id)
        directory = ContainerDirectory(self._containers, state.id, fd, document)
        try:
            _replace(fd, _CONTAINER, quickjson.dumps(document))
        except OSError:
            directory.remove()  # what says nothing of a container is never swept
            raise
        return directory

    def _sweep(self, but: str) -> None:
        """Remove directories of containers that are over and whose root filesystem is gone, if there are such: with
        `docker run --gpus` nobody calls a poststop hook, and STATE is in memory. More of them go than come."""
        names = [name for name in self._containers.ids() if name != but]
        for _ in range(min(_SWEPT, len(names))):
            other = self._containers.read(names.pop(time.monotonic_ns() % len(names)))
            if other is None:
                continue
            try:
                if other.is_over() and not other.has_root():
                    other.remove()
            except OSError:
                continue  # its own poststop hook is at it
            finally:
                other.close()

    def _clear_former(self, state: State, process: tuple[int, int], warnings: list[str]) -> None:
        """Remove what is there under this id, unless it is of the same bundle and root filesystem: such a container was
        started again without a poststop in between, and what it left is this one's to clean up."""
        former = self._containers.read(state.id)
        if former and former.process != process and not former.is_over():
            # Of two engines, or of one with two directories of its own (`runc --root`).
            raise FileExistsError(errno.EEXIST, f"a container of this id runs from the bundle `{former.bundle}`")
        if former and former.bundle == state.bundle and former.root == self._root:
            return
        if not _clear(self._containers.fd, state.id):
            return
        if former:
            why = f"was of another root filesystem or bundle; what that container left in `{former.rootfs}` stays there"
        else:
            why = "was not as nvhook writes it"
        warnings.append(f"what was kept about a container `{state.id}` {why}")


class Unlocked:
    """In the place of a Lock, where nothing can be kept about a container: it counts as the only one."""

    __slots__ = ()

    def __enter__(self) -> Unlocked:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def others(self, but: str) -> Iterator[ContainerDirectory]:  # noqa: ARG002 - as a Lock has it
        return iter(())

    def register(self, state: State, container: Container, warnings: list[str]) -> None:  # noqa: ARG002 - likewise
        return None


def lock_without_note(path: str, container: Container) -> Lock | Unlocked:
    """For a container that nothing is kept about. Where there can be no lock, it does without."""
    try:
        return lock(path, container)
    except OSError:
        return Unlocked()


def lock(path: str, container: Container) -> Lock:
    """The lock of the container's root filesystem; `path` is STATE. OSError where nothing can be kept about it.

    ContainerError as well where something is kept about another container over it, whose end would harm this one.
    """
    if container.host_identity is None:
        raise OSError(errno.ENOENT, f"the host has no `{container.rootfs}`, or another directory there")
    containers = Containers(path, container.names.top)
    try:
        return Lock(containers, container.host_identity, container.root)
    except OSError as error:
        expect_none(containers.over(container.host_identity), container, reason(error))
        raise


def expect_none(others: Iterator[ContainerDirectory], container: Container, why: str) -> None:
    """Nothing can be kept about the container: ContainerError where that is not its affair alone. The last of the
    `others` over its root filesystem would take away what it has mounted on, and with that its GPUs."""
    other = next((other for other in others if not other.is_over()), None)
    if other:
        raise ContainerError(
            f"keep a note of a container over `{container.rootfs}`, over which container `{other.id}` is: {why}",
            "remove the cause, or give it a root filesystem of its own",
        )


def _clear(containers: int, id: str) -> bool:  # noqa: A002 - OCI's name
    """Remove what is there under the name `id`; False if there is nothing. An earlier version kept a file for each."""
    try:
        status = os.stat(id, dir_fd=containers, follow_symlinks=False)
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(status.st_mode):
        os.unlink(id, dir_fd=containers)
        return True
    fd = os.open(id, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=containers)
    try:
        for name in os.listdir(fd):
            os.unlink(name, dir_fd=fd)
    finally:
        os.close(fd)
    os.rmdir(id, dir_fd=containers)
    return True


def is_id(text: str) -> bool:
    """Whether a container can have this id: the grammar of runc and containerd, and a name that is no other file's."""
    return 0 < len(text) <= _MAX_ID and not text.startswith((".", "-")) and _ID_CHARACTERS.issuperset(text)


def check_id(text: str) -> None:
    if not is_id(text):
        shown = text if len(text) <= _MAX_ID else f"{text[:_MAX_ID]}…"
        raise SpecError(f"`{shown}` is not a container's id", "use letters, digits, `_`, `+`, `-` and `.`, at most 255")


def process_start(fd: int) -> int:
    """When the process of this /proc/<pid>/stat started, in clock ticks since boot; -1 for one that is a zombie.

    A pid is used again, the pair of pid and start is not. ProcessLookupError if it is gone. Closes `fd`.
    """
    try:
        # The name of the program may hold anything, a parenthesis included: fields count from the last one.
        fields = os.read(fd, 4096).rpartition(b")")[2].split()
    finally:
        os.close(fd)
    # The first thread of a process may end before the others, and is a zombie until they have ended.
    is_over = fields[0] in (b"Z", b"X") and int(fields[17]) <= 1
    return -1 if is_over else int(fields[19])


def _number(value: object, least: int = 0, most: int = (1 << 63) - 1) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError("not a number that we write")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.startswith("/"):
        raise ValueError("not an absolute path")
    return value


def _read_json(directory: int, name: str) -> Any:
    fd = _open_file(directory, name)
    try:
        size = os.fstat(fd).st_size
        if size > _MAX_FILE:
            raise ValueError(f"`{name}` is larger than {_MAX_FILE} bytes")
        content = os.read(fd, size)
    finally:
        os.close(fd)
    try:
        return quickjson.loads(content)
    except RecursionError:
        raise ValueError(f"`{name}` is too deeply nested") from None


def _open_file(directory: int, name: str) -> int:
    """For reading, if it is as we write it: a regular file of our own that nobody else may read or write."""
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o7177 or not state_dir.is_owner(status):
        os.close(fd)
        raise PermissionError(errno.EPERM, f"`{name}` is not as nvhook writes it", name)
    return fd


def _replace(directory: int, name: str, content: bytes) -> None:
    try:
        _write(directory, name, content)
        return
    except FileExistsError:
        beside = files.beside_of(name)
    files.clear(beside, directory)
    _write(directory, beside, content)
    os.rename(beside, name, src_dir_fd=directory, dst_dir_fd=directory)


def _write(directory: int, name: str, content: bytes) -> None:
    fd = os.open(name, files.NEW, 0o600, dir_fd=directory)
    try:
        files.write(fd, content)
    finally:
        os.close(fd)
