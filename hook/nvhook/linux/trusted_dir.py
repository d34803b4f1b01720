# SPDX-License-Identifier: Apache-2.0
"""Directories in which root keeps what it must be able to believe later, such as STATE (`nvhook.state-dir`).

Whoever can write to one of them, or to one above, can put another in its place, and root would then act on what is in
there. So every level is made here, one by one and with an explicit mode, because os.makedirs leaves the parents to the
umask, which engines set to 0; and each level is checked on its descriptor.
"""

from __future__ import annotations

import errno
import os
import stat

from . import userns
from .root import DIRECTORY

_OVERFLOW = 65534  # who owns a file whose owner has no number in our user namespace


def open_directory(path: str, *private: str, make: bool = True) -> int:
    """An O_PATH descriptor of the directory `path`, or of the one that the names `private` lead to below it.

    Missing ones are made if `make` says so: `path` and those above it with mode 0755, the `private` ones with 0700.
    PermissionError for a level that others own or may write, and OSError as mkdir(2) and open(2) have it.

    The levels are checked by their names, from `/` on: in a directory that root alone may write, nobody else can give a
    name to another object, so what was checked is what is opened.
    """
    state = os.path.realpath(path)
    directory = "/"
    names = [name for name in state.split("/") if name]
    for index, name in enumerate((*names, *private)):
        directory = f"{directory.rstrip('/')}/{name}"
        mode = 0o755 if index < len(names) else 0o700
        _check(_status(directory, mode, make=make), directory, is_ours=index >= len(names) - 1)
    return os.open(directory, DIRECTORY | os.O_NOFOLLOW)


def make_private(parent: int, name: str) -> int:
    """A descriptor of the private directory `name` in the directory `parent`, made where it is missing."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(name, flags, dir_fd=parent)
    except FileNotFoundError:
        os.mkdir(name, 0o700, dir_fd=parent)
        fd = os.open(name, flags, dir_fd=parent)
    try:
        status = os.fstat(fd)
        _check(status, name, is_ours=True)
        if stat.S_IMODE(status.st_mode) != 0o700:
            os.fchmod(fd, 0o700)  # the umask may have taken bits away
    except BaseException:
        os.close(fd)
        raise
    return fd


def _status(path: str, mode: int, *, make: bool) -> os.stat_result:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        if not make:
            raise
    try:
        os.mkdir(path, mode)
    except FileExistsError:
        return os.lstat(path)  # another start was faster
    os.chmod(path, mode)  # the umask may have taken bits away
    return os.lstat(path)


def _check(status: os.stat_result, path: str, *, is_ours: bool) -> None:
    """Above STATE a directory like /tmp will do, in which everybody may write and nobody can rename what is ours."""
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
    may_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not is_ours and status.st_mode & stat.S_ISVTX:
        may_write = 0
    if is_owner(status) and not may_write:
        return
    why = f"others may write to `{path}` (owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o})"
    raise PermissionError(errno.EPERM, f"{why}; `chown root: {path} && chmod go-w {path}`")


def is_owner(status: os.stat_result) -> bool:
    """Whether the file is root's, or ours. In a user namespace the machine's root has no number."""
    if status.st_uid == 0 or status.st_uid == os.geteuid():
        return True
    return status.st_uid == _OVERFLOW and not userns.is_first()
