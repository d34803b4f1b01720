# SPDX-License-Identifier: Apache-2.0
"""The lock of a container's root filesystem, under which edits are applied and taken away again.

Under it a container is registered (container_dir.py), before anything is made in its root filesystem: whoever cleans up
after another container over the same one finds it there.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time

from nvhook.errors import ContainerError, reason
from nvhook.formats import quickjson
from nvhook.linux import trusted_dir

from .container_dir import (
    CONTAINER,
    CONTAINERS,
    ContainerDirectory,
    Containers,
    check_id,
    clear,
    process_start,
    replace,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from nvhook.linux.identity import Identity
    from nvhook.linux.root import Root
    from nvhook.request.spec import State

_SWEEP_EVERY, _SWEPT = 8, 32  # one start of eight looks at so many directories: a start is not held up
_LOCK_SECONDS = 10  # what is done under it takes milliseconds, or ldconfig's time


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

    def register(self, state: State, proc: int, rootfs: str, warnings: list[str]) -> ContainerDirectory:
        """Make the directory of a container that is being created: `proc` is /proc/<pid> of its first process, `rootfs`
        the path of its root filesystem. The lock is held.

        SpecError for an id that cannot be a directory's name; OSError where the directory cannot be made, or is that of
        a container of another bundle that lives.
        """
        check_id(state.id)
        since = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        start = process_start(os.open("stat", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc))
        pid_and_start = (state.pid, start)
        document = {
            "bundle": state.bundle,
            "rootfs": rootfs,
            "root": self._root.describe(),
            "process": pid_and_start,
            "since": since,
        }
        self._clear_former(state, pid_and_start, warnings)
        if since % _SWEEP_EVERY == 0:
            self._sweep(state.id)
        fd = trusted_dir.make_private(self._containers.fd, state.id)
        directory = ContainerDirectory(self._containers, state.id, fd, document)
        try:
            replace(fd, CONTAINER, quickjson.dumps(document))
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
        if not clear(self._containers.fd, state.id):
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

    def others(self, but: str) -> Iterator[ContainerDirectory]:  # noqa: ARG002 - the same form as Lock's
        return iter(())

    def register(self, state: State, proc: int, rootfs: str, warnings: list[str]) -> None:  # noqa: ARG002 - likewise
        return None


def take(path: str, proc: int, root: Identity | None, tree: Root, rootfs: str) -> Lock:
    """The lock of a container's root filesystem; `path` is STATE, and `proc` a descriptor of the host's /proc. OSError
    where nothing can be kept about the container.

    ContainerError as well where something is kept about another container over it, whose end would harm this one.
    """
    if root is None:
        raise OSError(errno.ENOENT, f"the host has no `{rootfs}`, or another directory there")
    containers = Containers(path, proc)
    try:
        return Lock(containers, root, tree)
    except OSError as error:
        expect_none(containers.over(root), rootfs, reason(error))
        raise


def expect_none(others: Iterator[ContainerDirectory], rootfs: str, why: str) -> None:
    """Nothing can be kept about the container: ContainerError where that is not its affair alone. The last of the
    `others` over its root filesystem would take away what it has mounted on, and with that its GPUs."""
    other = next((other for other in others if not other.is_over()), None)
    if other:
        raise ContainerError(
            f"keep a note of a container over `{rootfs}`, over which container `{other.id}` is: {why}",
            "remove the cause, or give it a root filesystem of its own",
        )
