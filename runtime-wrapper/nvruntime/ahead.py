# SPDX-License-Identifier: Apache-2.0
"""Prepare a container's start while the low-level runtime makes it, in the child of the server that has edited its
config.json.

That process has read everything. It makes the plan and opens its sources; then it waits for the hook, or for the end
of the low-level runtime. Without it the hook's work is done from the beginning.
"""

from __future__ import annotations

import os
import sys

from nvhook import audit
from nvhook.errors import NvhookError, SpecError, one_line
from nvhook.request import spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nvhook.start import Start

_LOOKUP_SECONDS = 2  # for look-ups in the image: what takes longer is left to the hook, which has its own time


class Ahead:
    """What is known of `start` before its container is there: the plan with its sources open, or the fault that the
    hook is to report."""

    __slots__ = ("_audit", "_fault", "_start")

    def __init__(self, start: Start) -> None:
        """Do what can be done for the root filesystem as it is now. The audit log is open from here on."""
        self._start = start
        self._fault: NvhookError | None = None
        start.warnings = []  # those of the wrapper are in its log
        self._prepare()
        self._audit = audit.Audit(start.config, spec.HOOK, start.id, silent=True)
        self._audit.begin(start.request)

    def _prepare(self) -> None:
        from nvhook import prestart
        from nvhook.linux.root import DIRECTORY, Root

        try:
            root = Root(os.open(self._start.spec.rootfs, DIRECTORY), _LOOKUP_SECONDS)
        except OSError:
            return  # the low-level runtime says what is wrong with it
        try:
            prestart.prepare(self._start, root)
        except OSError:
            self._start.edits = []  # an image that changes; the container is examined again when it is there
        except NvhookError as error:
            self._start.edits = []
            self._fault = error if root.left > 0 else None
        finally:
            os.close(root.fd)  # an engine that gives up unmounts it

    def serve(self) -> int:
        """The hook, with the container's state on stdin; its exit status. SpecError if it is for another container."""
        from nvhook import prestart

        start, state = self._start, spec.read_state(0)
        bundle = start.spec.bundle
        if state.id != start.id or os.path.realpath(state.bundle) != os.path.realpath(bundle):
            raise SpecError(f"container `{state.id}` in `{state.bundle}` is not `{start.id}` in `{bundle}`")
        try:
            if self._fault:
                raise self._fault
            prestart.prestart_prepared(start, state, self._audit)
            return 0
        except NvhookError as error:
            self.give_up()
            self._audit.refuse(str(error))
            print(f"{spec.HOOK}: {error}", file=sys.stderr)
            return 1
        finally:
            for warning in start.warnings:
                print(one_line(f"{spec.HOOK}: warning: {warning}"), file=sys.stderr)

    def give_up(self) -> None:
        """The container is not started: take back what was made on the host for it, by descriptors, because the
        container's mount namespace may have been entered."""
        self._start.take_back()
