# SPDX-License-Identifier: Apache-2.0
"""What edits leave in a container's root filesystem, and its removal when the container is deleted.

A mount needs something to be mounted on: empty files, links and directories that stay in the container's writable layer
when its mounts are gone, and would end up in an image that is committed from it. The prestart hook notes them in the
container's directory (container_dir.py); the poststop hook takes away what is still as it was made, and nothing else.

Nothing is done to a path: the root filesystem is opened once, and has to be the one that the note was made for. While
another container over the same one lives, it inherits the note: to remove a mount point takes the mount away
from every namespace that has one there.

A note that cannot be written, or is lost in a reboot, costs empty files in a layer, and no container. There is one
exception: beside a noted container over the same root filesystem, whose end would harm the one without a note, that one
is not started.
"""

from __future__ import annotations

import os
import stat

from nvhook.errors import SpecError, reason
from nvhook.linux import files, identity
from nvhook.linux.root import DIRECTORY, OutOfTimeError, Root

from . import container_dir, root_lock

_MAX_CACHE = 1 << 20  # of 40,000 libraries; /run, where it is kept for as long as the container is there, is memory
_SECONDS = 5  # for all look-ups in the root filesystem
# What comes of a trace that is damaged, whose object is gone or another one by now, or that takes too long to find.
_NOT_OURS = (OSError, ValueError, KeyError, TypeError, OverflowError, OutOfTimeError)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any  # noqa: TID251 - never at run time

    from nvhook.request.spec import State

    from .container import Container
    from .container_dir import ContainerDirectory
    from .root_lock import Lock

    # {"kind": "file" | "directory" | "node" | "link" | "cache" | "time", "path": in the container, …}
    #   link    target, former: what the name linked to before, or null
    #   node    major, minor
    #   cache   made: `version` of what took its place, former: `former` of what was there, or null
    #   time    of the directory `path`: its mtime in ns, before and after we put something there
    Trace = dict[str, Any]


def note(directory: ContainerDirectory, traces: list[Trace], former_cache: int) -> None:
    """Keep `traces` for `poststop`; `former_cache` is a descriptor of the image's linker cache, or -1. OSError.

    The lock of the root filesystem is held.
    """
    if former_cache >= 0 and os.fstat(former_cache).st_size > _MAX_CACHE:
        traces = [trace for trace in traces if trace["kind"] != "cache"]  # ours stays in the layer
        former_cache = -1
    # Those of the start before, if there was no poststop, or inherited from a container that has ended since.
    before = _traces_of(directory)
    joined, is_former_of_first = _join(before, traces)
    if former_cache >= 0 and not is_former_of_first:
        directory.save_cache(former_cache)
    directory.write_traces(joined)


def poststop(path: str, state: State, warnings: list[str]) -> None:
    """Clean up after the container of `state`; `path` is STATE. SpecError for a state that names no container.

    A container of which nothing is known is no error: its hook was another, or had no directory to write to.
    """
    container_dir.check_id(state.id)
    try:
        containers = container_dir.Containers(path, make=False)
    except FileNotFoundError:
        return
    except OSError as error:
        raise SpecError(f"clean up after container `{state.id}`: {reason(error)}") from None
    try:
        known = containers.read(state.id)
        # Two engines may give the same name to containers of their own.
        if not known or known.bundle != state.bundle:
            return
        if not known.has_ended():
            # With `runc --root` one id and bundle can be those of two containers, and this is the other one's end.
            warnings.append(f"container `{state.id}` runs: nothing of it is removed")
        else:
            with root_lock.Lock(containers, known.root) as lock:
                if known.is_there():  # or else another one's poststop has done this for us
                    _end(lock, known, warnings)
    except OSError as error:
        raise SpecError(f"clean up after container `{state.id}`: {reason(error)}") from None
    finally:
        containers.close()


def undo(container: Container, take_back: Callable[[], None], traces: list[Trace]) -> None:
    """A start has failed, and its mounts are gone: `take_back` what it made in the tree, unless another container may
    have mounted on that. Then the `traces` are noted, and whichever of them ends last removes it."""
    directory, lock = container.directory, container.lock
    container.be_host()
    try:
        is_shared = any(not other.is_over() for other in lock.others(directory.id if directory else ""))
        if is_shared and directory:
            note(directory, traces, -1)
    except OSError:
        is_shared = True  # in doubt empty files stay; the fault that brought us here is the one to report
    if not is_shared:
        container.be_container()
        take_back()


def forget(container: Container) -> None:
    """A start has failed: remove the container's directory, unless there is something to clean up."""
    directory = container.directory
    if directory is None:
        return
    container.be_host()
    try:
        if not directory.traces():
            directory.remove()
    except (OSError, ValueError):
        return  # as above; the poststop hook looks again


def _end(lock: Lock, directory: ContainerDirectory, warnings: list[str]) -> None:
    """The container is over.

    Who inherits is the next in the order of the starts, so that what each found and made stays one chain.
    """
    # The poststop of another one that is over was lost, or is about to be called and finds nothing left to do.
    others = [other for other in lock.others(directory.id) if not other.is_over() or other.root == directory.root]
    chain = sorted([directory, *others], key=lambda item: item.since)
    over = [item for item in chain if item is directory or item.is_over()]
    for ended in over:
        place = chain.index(ended)
        if len(chain) == 1:
            _carry_out(ended, warnings)
        elif place + 1 < len(chain):
            _hand_over(ended, chain[place + 1], is_first=True)
        else:
            _hand_over(ended, chain[place - 1], is_first=False)
        chain.remove(ended)
        ended.remove()


def _hand_over(ended: ContainerDirectory, heir: ContainerDirectory, *, is_first: bool) -> None:
    """Let `heir`, which started after it or before, clean up what `ended` left."""
    first, second = (ended, heir) if is_first else (heir, ended)
    joined, is_former_of_first = _join(_traces_of(first), _traces_of(second))
    if is_former_of_first == is_first and _cache_of(joined):
        heir.adopt_cache(ended)
    heir.write_traces(joined)


def _traces_of(directory: ContainerDirectory) -> list[Trace]:
    try:
        return [trace for trace in directory.traces() if isinstance(trace, dict)]
    except (OSError, ValueError):
        return []


def _join(first: list[Trace], second: list[Trace]) -> tuple[list[Trace], bool]:
    """The traces of both, in the order in which they were made, and whether the linker cache to be put back is the one
    that the `first` found. There is one trace of the cache: where one container replaced what the other had made, what
    that one had found is what the image had."""
    one, other = _cache_of(first), _cache_of(second)
    if one is None or other is None:
        return first + second, one is not None
    rest = [trace for trace in first + second if trace is not one and trace is not other]
    if _found(other) == one.get("made"):
        return [*rest, {**other, "former": one.get("former")}], True
    if _found(one) == other.get("made"):
        return [*rest, {**one, "former": other.get("former")}], False
    return [*rest, other], False  # somebody has made another in between, which the second found


def _found(cache: Trace) -> list[int] | None:
    """The `version` of the cache that was there before."""
    former = cache.get("former")
    return former[:3] if isinstance(former, list) else None


def _cache_of(traces: list[Trace]) -> Trace | None:
    return next((trace for trace in traces if trace.get("kind") == "cache"), None)


def _carry_out(directory: ContainerDirectory, warnings: list[str]) -> None:
    try:
        root = Root(os.open(directory.rootfs, DIRECTORY | os.O_NOFOLLOW), _SECONDS)
    except FileNotFoundError:
        return  # the engine has already taken the root filesystem away
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else error  # a NUL in the path
        warnings.append(f"clean up `{directory.rootfs}`: {why}; what the container left stays there")
        return
    try:
        if identity.of(root.fd) != directory.root:
            warnings.append(
                f"`{directory.rootfs}` is not the root filesystem that container `{directory.id}` was started with; "
                "nothing is removed there"
            )
            return
        _remove_all(root, directory)
    finally:
        os.close(root.fd)


def _remove_all(root: Root, directory: ContainerDirectory) -> None:
    traces = _traces_of(directory)
    times = _times_before(root, traces)
    parents = _Parent(root)
    # Newest first, and the directories when everything is gone from them, the deepest first.
    directories = [trace for trace in traces if trace.get("kind") == "directory"]
    others = [trace for trace in traces if trace.get("kind") != "directory"]
    for trace in (*others[::-1], *sorted(directories, key=_depth, reverse=True)):
        try:
            _remove(parents, trace, directory)
        except _NOT_OURS:
            continue
    parents.close()
    for path, then in times.items():
        _set_time(root, path, then)


def _depth(trace: Trace) -> int:
    return str(trace.get("path")).count("/")


def _remove(parents: _Parent, trace: Trace, directory: ContainerDirectory) -> None:
    kind = trace["kind"]
    if kind == "time":
        return  # when everything is gone
    above, name = os.path.split(trace["path"])
    parent = parents.open(above)
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
    elif kind == "cache" and trace["made"] == version(status):
        _put_cache_back(parent, name, trace["former"], directory)


def _put_cache_back(parent: int, name: str, former: list[int] | None, directory: ContainerDirectory) -> None:
    if former is None:
        os.unlink(name, dir_fd=parent)
        return
    _inode, _size, mtime, uid, gid, mode = former
    saved = directory.saved_cache()
    try:
        files.restore(saved, parent, name, (uid, gid), stat.S_IMODE(mode), mtime)
    finally:
        os.close(saved)


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


def times(root: Root, before: dict[str, int]) -> list[Trace]:
    """Traces for directories that had the mtime `before` when we came: whoever compares it finds nothing changed."""
    found: list[Trace] = []
    for path, then in before.items():
        try:
            found.append({"kind": "time", "path": path, "before": then, "after": _time(root, path)})
        except _NOT_OURS:
            continue  # it keeps the time of our change
    return found


def _times_before(root: Root, traces: list[Trace]) -> dict[str, int]:
    """Directory -> the mtime that it had before the first of us came, where nobody but us has changed it since."""
    found: dict[str, int] = {}
    for trace in reversed(traces):
        try:
            if trace["kind"] == "time":
                path = trace["path"]
                now = found[path] if path in found else _time(root, path)
                if now == trace["after"]:
                    found[path] = trace["before"]
        except _NOT_OURS:
            continue
    return found


def _time(root: Root, path: str) -> int:
    fd = root.open(path, DIRECTORY)
    try:
        return os.fstat(fd).st_mtime_ns
    finally:
        os.close(fd)


def _set_time(root: Root, path: str, then: int) -> None:
    try:
        fd = root.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except _NOT_OURS:
        return  # it was ours alone
    try:
        os.utime(fd, ns=(os.fstat(fd).st_atime_ns, then))
    except _NOT_OURS:
        return  # in a file system that is read-only by now
    finally:
        os.close(fd)


def version(status: os.stat_result) -> list[int]:
    """What tells whether a file is still the one that we put there."""
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def former(status: os.stat_result) -> list[int]:
    """What the trace of a file keeps of the one that was there before."""
    return [*version(status), status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)]
