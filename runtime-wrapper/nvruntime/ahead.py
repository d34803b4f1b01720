# SPDX-License-Identifier: Apache-2.0
"""Prepare a container's start while the low-level runtime makes it, in the process that has edited its config.json.

That process, a child of the server (server.py), has read everything. It makes the plan and opens its sources; then it
waits for the hook, or for the end of the low-level runtime. Without it the hook's work is done from the beginning.
"""

from __future__ import annotations

import os
import sys

from nvhook import audit, spec
from nvhook.errors import NvhookError, SpecError, one_line

from . import create

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nvhook.prestart import Preparation

    from .create import Task

_PROGRAM = "nvidia-container-runtime-hook"
_LOOKUP_SECONDS = 2  # for look-ups in the image: what takes longer is left to the hook, which has its own time


class Ahead:
    """What is known of `task` before its container is there: a Preparation, or the fault that the hook is to report."""

    __slots__ = ("_fault", "_preparation", "_task", "_trail", "_warnings")

    def __init__(self, task: Task) -> None:
        """Do what can be done for the root filesystem as it is now. The audit log is open from here on."""
        self._task = task
        self._fault: NvhookError | None = None
        self._warnings: list[str] = []
        self._preparation: Preparation | None = None
        self._prepare()
        self._trail = audit.Audit(task.config, _PROGRAM, task.id, silent=True)
        self._trail.expect(task.asked)  # opens its files, before another mount namespace is entered

    def _prepare(self) -> None:
        from nvhook import container, prestart
        from nvhook.linux.root import DIRECTORY, Root

        task = self._task
        try:
            root = Root(os.open(task.described.rootfs, DIRECTORY), _LOOKUP_SECONDS)
        except OSError:
            return  # the low-level runtime says what is wrong with it
        try:
            found = task.gpus, task.chosen
            layout = container.layout(root)
            self._preparation = prestart.prepare(
                task.config, task.asked, root, layout, self._warnings, found=found, start=task.id
            )
        except OSError:
            return  # an image that changes; the container is examined again when it is there
        except NvhookError as error:
            self._fault = error if root.left > 0 else None
        finally:
            os.close(root.fd)  # an engine that gives up unmounts it

    def serve(self) -> int:
        """The hook, with the container's state on stdin; its exit status. SpecError if it is for another container."""
        from nvhook import prestart

        task = self._task
        state = spec.read_state(0)
        if state.id != task.id or os.path.realpath(state.bundle) != os.path.realpath(task.bundle):
            raise SpecError(f"container `{state.id}` in `{state.bundle}` is not `{task.id}` in `{task.bundle}`")
        warnings = self._warnings
        try:
            if self._fault:
                raise self._fault
            prestart.serve(task.config, task.described, task.asked, state, self._preparation, warnings)
            return 0
        except NvhookError as error:
            self.give_up()
            self._trail.refuse(str(error))
            print(f"{_PROGRAM}: {error}", file=sys.stderr)
            return 1
        finally:
            for warning in warnings:
                print(one_line(f"{_PROGRAM}: warning: {warning}"), file=sys.stderr)

    def give_up(self) -> None:
        """The container is not started: take back what was made on the host for it."""
        if self._preparation:
            self._preparation.take_back()  # by descriptors: the container's mount namespace may have been entered
        else:
            create.take_back(self._task.config, self._task.id)
