# SPDX-License-Identifier: Apache-2.0
"""STATE, the directory in which root keeps what it must be able to believe later (`nvhook.state-dir`).

Whoever can write to one of its directories, or to one above, can put another in its place, and root would then act on
what is in there. So every level is made here, one by one and with an explicit mode, because os.makedirs leaves the
parents to the umask, which engines set to 0; and each level is checked on its descriptor.
"""

from __future__ import annotations

import errno
import os
import stat

from .linux import userns
from .linux.root import DIRECTORY

_OVERFLOW = 65534  # who owns a file whose owner has no number in our user namespace


def open_directory(path: str, *private: str, make: bool = True) -> int:
    """An O_PATH descriptor of the directory `path`, or of the one that the names `private` lead to below it.

    Missing ones are made if `make` says so: `path` and those above it with mode 0755, the `private` ones with 0700.
    PermissionError for a level that others own or may write, and OSError as mkdir(2) and open(2) have it.
    """
    fd = os.open("/", DIRECTORY)
    try:
        above = os.path.realpath(path).split("/")[1:]
        for index, name in enumerate((*above, *private)):
            if not name:
                continue  # STATE is the root directory itself
            fd, parent = _enter(fd, name, 0o755 if index < len(above) else 0o700, make=make), fd
            os.close(parent)
            _check(fd, "/" + "/".join((*above, *private)[: index + 1]), is_ours=index >= len(above) - 1)
    except BaseException:
        os.close(fd)
        raise
    return fd


def enter(parent: int, name: str) -> int:
    """An O_PATH descriptor of the private directory `name` in the directory `parent`, made where it is missing."""
    fd = _enter(parent, name, 0o700, make=True)
    try:
        _check(fd, name, is_ours=True)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _enter(parent: int, name: str, mode: int, *, make: bool) -> int:
    try:
        return os.open(name, DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    except FileNotFoundError:
        if not make:
            raise
    try:
        os.mkdir(name, mode, dir_fd=parent)
    except FileExistsError:
        return os.open(name, DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)  # another start was faster
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        os.fchmod(fd, mode)  # the umask may have taken bits away
    finally:
        os.close(fd)
    return os.open(name, DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)


def _check(fd: int, path: str, *, is_ours: bool) -> None:
    """Above STATE a directory like /tmp will do, in which everybody may write and nobody can rename what is ours."""
    status = os.fstat(fd)
    may_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not is_ours and status.st_mode & stat.S_ISVTX:
        may_write = 0
    if is_owner(status) and not may_write:
        return
    why = f"others may write to `{path}` (owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o})"
    raise PermissionError(errno.EPERM, f"{why}; `chown root: {path} && chmod go-w {path}`")


def is_owner(status: os.stat_result) -> bool:
    """Whether the file is root's, or ours. In a user namespace the machine's root has no number."""
    if status.st_uid in (0, os.geteuid()):
        return True
    return status.st_uid == _OVERFLOW and not userns.is_first()
