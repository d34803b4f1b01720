# SPDX-License-Identifier: Apache-2.0
"""Users and groups of this host."""

from __future__ import annotations

import grp
import pwd

_NO_ID = (1 << 32) - 1  # means "leave it as it is" to chown(2) and setresuid(2)


def ids(text: str) -> tuple[int, int]:
    """The numbers of `USER[:GROUP]`, each a number or a name; without a group, the user's own.

    KeyError or ValueError where this host has no such user or group.
    """
    user, colon, group = text.partition(":")
    uid = _number(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
    if not colon:
        return uid, pwd.getpwuid(uid).pw_gid
    return uid, _number(group) if group.isdecimal() else grp.getgrnam(group).gr_gid


def _number(text: str) -> int:
    number = int(text) if text.isascii() and len(text) < 11 else _NO_ID
    if number >= _NO_ID:
        raise ValueError(text)
    return number
