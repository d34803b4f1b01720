# SPDX-License-Identifier: Apache-2.0
"""What is kept about a container: one directory for each, STATE/containers/<id>/, for root alone.

    container.json   the bundle, the root filesystem (path and identity) and the first process
    traces.json      what edits left in the root filesystem (cleanup.py)
    ld.so.cache      the linker cache that the image had there

A directory per container, because an id may be any name: were its files told apart by a suffix, the container
`web.cache` would own a file of the container `web`. The directory is made before anything is done to the container, so
that another one over the same root filesystem knows of it; both take its lock first (root_lock.py).
"""

from __future__ import annotations

import errno
import os
import stat
import time

from nvhook.errors import SpecError
from nvhook.formats import quickjson
from nvhook.linux import files, identity, proc, trusted_dir
from nvhook.linux.root import DIRECTORY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any  # noqa: TID251 - never at run time

    from nvhook.linux.identity import Identity

    Json = dict[str, Any]

CONTAINERS = "containers"
CONTAINER, _TRACES, _CACHE = "container.json", "traces.json", "ld.so.cache"
_MAX_FILE = 4 << 20
_MAX_ID = 255  # NAME_MAX; engines use 64 and containerd allows 76
_END_SECONDS = 1
_IN_DOUBT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO)
_ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+-.")


class Containers:
    """STATE/containers, open.

    proc   a descriptor of the host's /proc, for when another mount namespace has been entered; -1 where that is not so
    """

    __slots__ = ("fd", "proc")

    def __init__(self, path: str, proc: int = -1, *, make: bool = True) -> None:
        """`path` is STATE. OSError as in trusted_dir.open_directory; FileNotFoundError only unless `make`."""
        self.fd = trusted_dir.open_directory(path, CONTAINERS, make=make)
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
            if status.st_mode & 0o077 or not trusted_dir.is_owner(status):
                raise ValueError("a directory that others may use")
            return ContainerDirectory(self, id, fd, _read_json(fd, CONTAINER))
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
        replace(self._fd, _TRACES, quickjson.dumps(traces))

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
        beside = [files.beside_of(name) for name in (_TRACES, CONTAINER)]  # of a process that was killed
        for name in (_TRACES, *beside, _CACHE, CONTAINER):  # the last one makes it a container's
            self._unlink(name)
        os.rmdir(self.id, dir_fd=self._containers.fd)

    def close(self) -> None:
        os.close(self._fd)

    def _unlink(self, name: str) -> None:
        try:
            os.unlink(name, dir_fd=self._fd)
        except FileNotFoundError:
            return


def clear(containers: int, id: str) -> bool:  # noqa: A002 - OCI's name
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
    if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o7177 or not trusted_dir.is_owner(status):
        os.close(fd)
        raise PermissionError(errno.EPERM, f"`{name}` is not as nvhook writes it", name)
    return fd


def replace(directory: int, name: str, content: bytes) -> None:
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
