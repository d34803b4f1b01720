# SPDX-License-Identifier: Apache-2.0
"""What edits leave in a container's root filesystem, and its removal when the container is deleted.

A mount needs something to be mounted on: empty files, links and directories that stay in the container's writable layer
when its mounts are gone, and would end up in an image that is committed from it. The prestart hook notes them below the
state directory; the poststop hook takes away what is still as it was made, and nothing else.

A note that cannot be written, or is lost in a reboot, costs empty files in a layer, and no container.
"""

from __future__ import annotations

import os
import stat

from . import quickjson
from .errors import SpecError, reason
from .linux.root import DIRECTORY, Root

_DIRECTORY = "containers"
_FLAGS = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY | os.O_CLOEXEC
_MAX_NOTE = 4 << 20
_MAX_CACHE = 1 << 20  # of 40,000 libraries; /run, where it is kept for as long as the container is there, is memory
# What comes of a trace that is damaged, or whose object is gone or another one by now.
_NOT_OURS = (OSError, ValueError, KeyError, TypeError, OverflowError)
_ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+-.")

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any  # noqa: TID251 - never at run time

    from .spec import State

    # {"kind": "file" | "directory" | "node" | "link" | "cache", "path": in the container, …}
    #   link    target, former: what the name linked to before, or null
    #   node    major, minor
    #   cache   made: [inode, size, mtime in ns] of what took its place, former: whether there was one before
    #   time    of the directory `path`: its mtime in ns, before and after we put something there
    Trace = dict[str, Any]


class Notes:
    """The directory of notes, opened in the host's namespace and used after it has been left."""

    __slots__ = ("_directory", "_name")

    def __init__(self, state_dir: str, state: State) -> None:
        """OSError where there is no such directory and none can be made."""
        self._name = _file_name(state)
        path = os.path.join(state_dir, _DIRECTORY)
        os.makedirs(path, mode=0o700, exist_ok=True)
        self._directory = os.open(path, DIRECTORY)

    def write(self, state: State, rootfs: str, traces: list[Trace], former_cache: int) -> None:
        """Note `traces` for `clean`; `former_cache` is a descriptor of the image's linker cache, or -1. OSError."""
        before = self._read(state)
        if before:
            # Started again without a poststop in between: what the first start made is there already.
            traces = before["traces"] + traces
        elif former_cache >= 0:
            if os.fstat(former_cache).st_size <= _MAX_CACHE:
                self._save(f"{self._name}.cache", former_cache)
            else:
                traces = [trace for trace in traces if trace["kind"] != "cache"]  # ours stays in the layer
        note = {"bundle": state.bundle, "rootfs": rootfs, "traces": traces}
        beside = f"{self._name}.new"
        self._unlink(beside)
        fd = os.open(beside, _FLAGS, 0o600, dir_fd=self._directory)
        with open(fd, "wb") as file:
            file.write(quickjson.dumps(note))
        os.rename(beside, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)

    def clean(self, state: State) -> None:
        """Take away what the note of this container says, newest first, and the note."""
        note = self._read(state)
        if not note:
            return
        try:
            root = Root(os.open(note["rootfs"], DIRECTORY))
        except (OSError, ValueError):
            self._forget()  # the engine has already taken the root filesystem away
            return
        traces = note["traces"]
        untouched = [trace for trace in traces if _is_untouched(root, trace)]
        parent = _Parent(root)
        for trace in reversed(traces):
            try:
                self._remove(parent, trace)
            except _NOT_OURS:
                continue
        parent.close()
        for trace in untouched:
            _set_time(root, trace)
        self._forget()

    def _forget(self) -> None:
        self._unlink(f"{self._name}.cache")
        self._unlink(self._name)

    def _read(self, state: State) -> Trace | None:
        try:
            fd = os.open(self._name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
        except OSError:
            return None
        with open(fd, "rb") as file:
            content = file.read(_MAX_NOTE)
        try:
            note: Trace = quickjson.loads(content)
            is_whole = isinstance(note["rootfs"], str) and isinstance(note["traces"], list)
            # Two engines may give the same name to containers of their own.
            return note if is_whole and note["bundle"] == state.bundle else None
        except (ValueError, KeyError, TypeError, RecursionError):
            return None

    def _remove(self, parents: _Parent, trace: Trace) -> None:
        kind = trace["kind"]
        if kind == "time":
            return  # when everything is gone
        directory, name = os.path.split(trace["path"])
        parent = parents.open(directory)
        status = os.stat(name, dir_fd=parent, follow_symlinks=False)
        if kind == "directory":
            os.rmdir(name, dir_fd=parent)  # fails, as it should, when somebody has put something there
        elif (kind == "file" and stat.S_ISREG(status.st_mode) and status.st_size == 0) or (
            kind == "node" and status.st_rdev == os.makedev(trace["major"], trace["minor"])
        ):
            os.unlink(name, dir_fd=parent)
        elif kind == "link" and os.readlink(name, dir_fd=parent) == trace["target"]:
            os.unlink(name, dir_fd=parent)
            if trace["former"] is not None:
                os.symlink(trace["former"], name, dir_fd=parent)
                # In a user namespace the container's root is not ours.
                os.chown(name, status.st_uid, status.st_gid, dir_fd=parent, follow_symlinks=False)
        elif kind == "cache" and trace["made"] == identity(status):
            self._restore_cache(parent, name, had_one=trace["former"])

    def _restore_cache(self, parent: int, name: str, *, had_one: bool) -> None:
        if not had_one:
            os.unlink(name, dir_fd=parent)
            return
        saved = os.open(f"{self._name}.cache", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
        try:
            restore(saved, parent, name)
        finally:
            os.close(saved)

    def _save(self, name: str, source: int) -> None:
        self._unlink(name)
        _copy(source, self._directory, name)

    def _unlink(self, name: str) -> None:
        try:
            os.unlink(name, dir_fd=self._directory)
        except FileNotFoundError:
            return


class _Parent:
    """The directory of a trace, open for the next, which is mostly in the same one."""

    __slots__ = ("_fd", "_path", "_root")

    def __init__(self, root: Root) -> None:
        self._root = root
        self._path = ""
        self._fd = -1

    def open(self, path: str) -> int:
        if self._fd < 0 or path != self._path:
            self.close()
            self._fd = self._root.open(path, DIRECTORY)
            self._path = path
        return self._fd

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def clean(state_dir: str, state: State) -> None:
    """The poststop hook: SpecError for a state that names no container; nothing to do is no error."""
    if not os.path.isdir(os.path.join(state_dir, _DIRECTORY)):
        return
    try:
        Notes(state_dir, state).clean(state)
    except OSError as error:
        raise SpecError(f"clean up after container `{state.id}`: {reason(error)}") from None


def times(root: Root, before: dict[str, int]) -> list[Trace]:
    """Traces for directories that had the mtime `before` when we came: whoever compares it finds nothing changed."""
    return [{"kind": "time", "path": path, "before": then, "after": _time(root, path)} for path, then in before.items()]


def _is_untouched(root: Root, trace: Trace) -> bool:
    """Whether nobody has put anything into the directory since; False for another kind of trace."""
    try:
        return bool(trace["kind"] == "time" and _time(root, trace["path"]) == trace["after"])
    except _NOT_OURS:
        return False


def _time(root: Root, path: str) -> int:
    fd = root.open(path, DIRECTORY)
    try:
        return os.fstat(fd).st_mtime_ns
    finally:
        os.close(fd)


def _set_time(root: Root, trace: Trace) -> None:
    try:
        fd = root.open(trace["path"], os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return  # it was ours alone
    try:
        os.utime(fd, ns=(os.fstat(fd).st_atime_ns, trace["before"]))
    except _NOT_OURS:
        return  # in a file system that is read-only by now
    finally:
        os.close(fd)


def identity(status: os.stat_result) -> list[int]:
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def is_name(text: str) -> bool:
    """Whether a container can be called so, and a file as well."""
    return bool(text) and not text.startswith((".", "-")) and _ID_CHARACTERS.issuperset(text)


def _file_name(state: State) -> str:
    if not is_name(state.id):
        raise SpecError(f"`{state.id}` is not a container's name")
    return state.id


def restore(former: int, directory: int, name: str) -> None:
    """Put a copy of the file `former` in the place of `name`, with its mode, owner and time."""
    beside = f".{name}.nvhook"
    clear(beside, directory)
    try:
        _copy(former, directory, beside)
        os.rename(beside, name, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError:
        clear(beside, directory)
        raise


def replace(content: bytes, directory: int, name: str) -> None:
    """Put a file with `content` in the place of `name`, readable for everybody, its owner that of the directory."""
    beside = f".{name}.nvhook"
    clear(beside, directory)
    fd = os.open(beside, _FLAGS, 0o644, dir_fd=directory)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
        status = os.fstat(directory)
        os.fchmod(fd, 0o644)  # whatever the umask
        if os.fstat(fd).st_uid != status.st_uid:
            os.fchown(fd, status.st_uid, status.st_gid)
        os.rename(beside, name, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError:
        os.unlink(beside, dir_fd=directory)
        raise
    finally:
        os.close(fd)


def clear(beside: str, directory: int) -> None:
    """Take away what a hook that was killed left under a name that is ours for a moment; an image may have it too."""
    try:
        os.unlink(beside, dir_fd=directory)
    except FileNotFoundError:
        return
    except OSError as error:
        raise OSError(error.errno, f"`{beside}` is in the way: {reason(error)}") from None


def _copy(source: int, directory: int, name: str) -> None:
    status = os.fstat(source)
    fd = os.open(name, _FLAGS, 0o600, dir_fd=directory)
    try:
        os.lseek(source, 0, os.SEEK_SET)
        while os.sendfile(fd, source, None, 1 << 20):
            pass
        os.fchown(fd, status.st_uid, status.st_gid)
        os.fchmod(fd, stat.S_IMODE(status.st_mode))
        os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns))
    finally:
        os.close(fd)
