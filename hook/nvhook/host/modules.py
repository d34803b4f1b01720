# SPDX-License-Identifier: Apache-2.0
"""What a host makes on demand: the driver's kernel modules, and the device nodes that go with them.

After a boot nvidia-uvm is not there until somebody has used CUDA, and the driver's nodes are not made by the kernel or
udev but by whoever comes first as root. A container does not need the host's nodes, it has its own; one in a user
namespace does, because a node made for it could not be opened, and so does the next program on the host. So the nodes
that a container gets and the host lacks are made on the host as well.

The driver's have no link below /dev/char either, which udev makes for others. A runtime that has systemd manage the
container's control group names each device by it, and leaves out what has none; the next `systemctl daemon-reload`
then takes that from the container.

The host is changed here, so only what `load-kmods` allows is done, and nothing where we are root of a user namespace. A
host that `dev-root` or `proc-root` put elsewhere is not the one whose kernel we could ask for a module.

Which nodes are made is an image's choice where it lists IMEX channels, and each takes memory of the kernel's. So what a
start makes is provisional until that start has succeeded: its modification time, some minutes after 1970, is the mark
of the start. Any process of that start finds by it what the start has made, and takes it away when the start fails. A
start that relies on what another one has made sets the time to now, and it stays, whatever becomes of the two.
"""

from __future__ import annotations

import fcntl
import os
import stat

from nvhook.errors import DeviceError, reason
from nvhook.linux import proc, trusted_dir, userns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol  # noqa: TID251 - never at run time

    from nvhook.request.config import Config

    class Node(Protocol):
        """A character device, like Device of container/edits.py."""

        path: str
        major: int
        minor: int
        mode: int
        uid: int
        gid: int

    # (path, what it is or leads to, what makes it with a mark and says whether it was not there)
    Place = tuple[str, Node, Callable[[str, Node, int], bool]]

_USUAL = "/sbin/modprobe"
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}  # for the commands that modprobe.d may name
_SECONDS = 60  # eight GPUs take the module ten
_LOCK = "nodes.lock"  # in the state directory
_MARKS = (1 << 40) - 87  # nanoseconds, 18 minutes; a prime


def modprobe(config: Config) -> str:
    """The program that loads modules into this machine's kernel; empty where we may not."""
    if not _is_allowed(config) or (config.proc_root, config.dev_root) != ("/", "/"):
        return ""
    try:
        # A program that runs as root: only procfs itself may name it.
        return proc.read("sys/kernel/modprobe").strip() or _USUAL
    except OSError:
        return _USUAL


def load(module: str, program: str) -> None:
    """Run `program` for `module`, and wait; DeviceError with the last line that it printed."""
    from nvhook.linux import child  # hardly ever: once after a boot

    try:
        status, text = child.run([program, module], _ENVIRONMENT, _SECONDS)
    except OSError as error:
        status, text = -1, f"run `{program}`: {reason(error)}"
    if status != 0:
        raise DeviceError(
            f"the {module} kernel module is not loaded, and cannot be: {text or f'status {status}'}",
            f"`modprobe {module}` has to work on the host: see `dmesg`, or install the driver",
        )


class Made:
    """What one start has made on the host and no other start relies on, by descriptors: they can be used when the mount
    namespace of the host has been left."""

    __slots__ = ("_lock", "_mark", "_places")

    def __init__(self, lock: int, mark: int, places: list[tuple[int, str]]) -> None:
        """`places`: the descriptor of a directory and a name in it, in the order in which they can be removed."""
        self._lock = lock
        self._mark = mark
        self._places = places

    def take_back(self) -> None:
        """The start has failed: take away what still has its mark. A fault leaves a node, which does no harm."""
        with _Locked(self._lock):
            ours = self._ours()  # before a directory gets another time from what is removed in it
            for directory, name, is_directory in ours:
                try:
                    (os.rmdir if is_directory else os.unlink)(name, dir_fd=directory)
                except OSError:
                    continue  # a directory with another start's nodes

    def keep(self) -> None:
        """The start has succeeded."""
        with _Locked(self._lock):
            for directory, name, _ in self._ours():
                os.utime(name, dir_fd=directory, follow_symlinks=False)

    def _ours(self) -> list[tuple[int, str, bool]]:
        """What still has the mark: descriptor, name in it, whether it is a directory."""
        found = []
        for directory, name in self._places:
            try:
                status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            except FileNotFoundError:
                continue
            if status.st_mtime_ns == self._mark:
                found.append((directory, name, stat.S_ISDIR(status.st_mode)))
        return found


def make_nodes(config: Config, nodes: Sequence[Node], warnings: list[str], start: str = "") -> Made | None:
    """Make those of the driver's `nodes` that the host lacks, and the links by which systemd knows them.

    What is made stays, or is provisional where `start`, the container's id, says whose it is; that is the answer.
    What cannot be made costs a warning: most containers work without it.
    """
    root = config.dev_root.rstrip("/")
    ours = [node for node in nodes if node.path.startswith("/dev/nvidia")]
    places: list[Place] = [(root + node.path, node, _make_node) for node in ours]
    places += [(f"{root}/dev/char/{node.major}:{node.minor}", node, _make_link) for node in ours]
    unsettled = [place for place in places if not _is_settled(place[0])]
    # The numbers are those of the /proc that was read: a /dev that goes with another one is left alone.
    is_one_host = config.dev_root != "/" or config.proc_root == "/"
    if not unsettled or not is_one_host or not _is_allowed(config):
        return None
    if not _may_modify(config.proc_root):
        unsettled = [place for place in unsettled if place[2] is not _make_node]
    if not os.path.isdir(f"{root}/dev/char"):  # then nobody keeps the links, and there is no systemd
        unsettled = [place for place in unsettled if place[2] is not _make_link]
    if not unsettled:
        return None
    umask = os.umask(0)
    try:
        lock = _lock(config)
        with _Locked(lock):
            paths = _settle(unsettled, _mark(start), warnings)
        return _made(lock, _mark(start), paths)
    except OSError as error:
        warnings.append(f"make {len(unsettled)} nodes and links on the host: {reason(error)}")
        return None
    finally:
        os.umask(umask)


def made_by(config: Config, start: str) -> Made | None:
    """What a start has made that is still provisional; None if that is nothing."""
    if not _is_allowed(config):
        return None
    dev, mark = config.dev_root.rstrip("/") + "/dev", _mark(start)
    try:
        ours = _listed(dev, "nvidia")
        directories = [path for path in ours if stat.S_ISDIR(os.lstat(path).st_mode)]
        paths = [path for directory in (f"{dev}/char", *directories) for path in _listed(directory)] + ours
        return _made(_lock(config), mark, paths) if any(_mtime(path) == mark for path in paths) else None
    except OSError:
        return None  # another start takes nodes away at this moment, or there is no lock: then none was made


def _listed(directory: str, prefix: str = "") -> list[str]:
    """The paths in a directory; none where there is no such directory."""
    try:
        return [f"{directory}/{name}" for name in os.listdir(directory) if name.startswith(prefix)]
    except FileNotFoundError:
        return []


def _made(lock: int, mark: int, paths: list[str]) -> Made | None:
    paths = [path for path in paths if mark and _mtime(path) == mark]
    if not paths:
        os.close(lock)
        return None
    parents: dict[str, int] = {}
    for parent in map(os.path.dirname, paths):
        if parent not in parents:
            parents[parent] = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    return Made(lock, mark, [(parents[os.path.dirname(path)], os.path.basename(path)) for path in paths])


def _settle(places: list[Place], mark: int, warnings: list[str]) -> list[str]:
    """Make what is not there, and keep what another start has made. Returns the paths that may have the `mark`, in the
    order in which they can be removed: directories last."""
    paths: list[str] = []
    directories: dict[str, bool] = {}  # path -> whether it is this start's
    faults: list[str] = []
    for path, node, make in places:
        directory = os.path.dirname(path)
        try:
            if directory not in directories:
                directories[directory] = _make_directory(directory) or _mtime(directory) == mark
            if not make(path, node, mark) and _mtime(path) != mark and not _is_settled(path):
                os.utime(path, follow_symlinks=False)
            paths.append(path)
        except OSError as error:
            faults.append(f"make `{path}` on the host: {reason(error)}")
    for directory in [directory for directory, is_ours in directories.items() if is_ours and mark]:
        _set_mark(directory, mark)
        paths.append(directory)
    if faults:
        warnings.append(faults[0] + (f"; the same for {len(faults) - 1} more" if faults[1:] else ""))
    return paths


def _make_directory(path: str) -> bool:
    """Whether there was none."""
    if os.path.isdir(path):
        return False
    _make_directory(os.path.dirname(path))
    os.mkdir(path, 0o755)  # os.makedirs() would let everybody write the ones above it
    return True


def _make_node(path: str, node: Node, mark: int) -> bool:
    """Whether there was none. It is there with all that it has, or not at all."""
    return not os.path.lexists(path) and _publish(path, mark, lambda beside: _new_node(beside, node))


def _make_link(path: str, node: Node, mark: int) -> bool:
    target = "../" + node.path.removeprefix("/dev/")
    return not os.path.lexists(path) and _publish(path, mark, lambda beside: os.symlink(target, beside))


def _new_node(path: str, node: Node) -> None:
    os.mknod(path, stat.S_IFCHR | node.mode, os.makedev(node.major, node.minor))
    if (node.uid, node.gid) != (0, 0):
        os.chown(path, node.uid, node.gid)


def _publish(path: str, mark: int, make: Callable[[str], None]) -> bool:
    directory, name = os.path.split(path)
    beside = f"{directory}/.{name}.new"  # which nobody takes for a GPU
    try:
        make(beside)
    except FileExistsError:
        os.unlink(beside)  # of a process that was killed: one makes nodes at a time
        make(beside)
    try:
        if mark:
            _set_mark(beside, mark)
        os.link(beside, path, follow_symlinks=False)
        return True
    except FileExistsError:
        return False  # udev was faster
    finally:
        os.unlink(beside)


# Marks


def _mark(start: str) -> int:
    """Nanoseconds after 1970 for the id of a container; 0 without one."""
    mark = 0
    for byte in os.fsencode(start):
        mark = (mark * 257 + byte) % _MARKS
    return mark + 1 if start else 0


def _set_mark(path: str, mark: int) -> None:
    os.utime(path, ns=(mark, mark), follow_symlinks=False)


def _mtime(path: str) -> int:
    """In nanoseconds; -1 where nothing is."""
    try:
        return os.lstat(path).st_mtime_ns
    except OSError:
        return -1


def _is_settled(path: str) -> bool:
    """Whether it is there to stay."""
    mtime = _mtime(path)
    return mtime == 0 or mtime > _MARKS


# The lock: without it a start could rely on a node in the moment in which another one takes it away.


class _Locked:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_UN)


def _lock(config: Config) -> int:
    directory = trusted_dir.open_directory(config.state_dir)
    try:
        flags = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(_LOCK, flags, 0o600, dir_fd=directory)
    finally:
        os.close(directory)


def _is_allowed(config: Config) -> bool:
    return config.load_kmods and os.geteuid() == 0 and userns.is_first()


def _may_modify(proc_root: str) -> bool:
    """An administrator who makes the nodes tells the module so (NVreg_ModifyDeviceFiles)."""
    try:
        with open(os.path.join(proc_root, "proc/driver/nvidia/params"), encoding="utf-8", errors="replace") as file:
            values = dict(line.rstrip().split(": ", 1) for line in file if ": " in line)
    except OSError:
        return True  # what nvidia-modprobe takes it for
    return values.get("ModifyDeviceFiles", "1") == "1"
