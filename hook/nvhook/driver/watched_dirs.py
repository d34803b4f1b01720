# SPDX-License-Identifier: Apache-2.0
"""Where discovery.py has looked, found or not: a change there may bring a file of the driver, or take one away.

The linker cache tells of libraries alone, and only once ldconfig has run; a driver of its own directory has none. How
a directory is known again is the time of its last change: a name has come or gone.
"""

from __future__ import annotations

import os
import time

from nvhook.linux.root import Root

_TICK = 20_000_000  # nanoseconds: a second change that soon after the first may have the same time
# Others change these all the time; what a driver has there is in directories of its own, which are looked into.
_RESTLESS = ("/etc", "/run")


def noting(changed: dict[str, int]) -> type[Root]:
    """A Root that puts into `changed` when each directory that is looked into was changed last.

    For one that is not there it is the nearest above it.
    """
    seen: set[str] = set()

    class Noting(Root):
        __slots__ = ()

        def open(self, path: str, flags: int = os.O_PATH) -> int:
            self._note(path)
            return super().open(path, flags)

        def _note(self, path: str) -> None:
            path = "/" + path.strip("/")
            while path not in seen:
                seen.add(path)
                if path in _RESTLESS:
                    return
                try:
                    fd = super().open(path, os.O_PATH | os.O_DIRECTORY)
                except OSError:
                    path = os.path.dirname(path)
                    continue
                changed.setdefault(os.readlink(f"/proc/self/fd/{fd}"), _time(os.fstat(fd).st_mtime_ns))
                os.close(fd)

    return Noting


def _time(changed: int) -> int:
    """None that a directory will have again, if it has been changed just now."""
    return changed if abs(time.time_ns() - changed) > _TICK else -1
