# SPDX-License-Identifier: Apache-2.0
"""The start of a container up to its plan, without effect: nothing is changed, not even the inventory."""

from __future__ import annotations

import os

from nvhook.container import container
from nvhook.errors import SpecError, reason
from nvhook.linux.root import DIRECTORY, Root
from nvhook.request import request, spec
from nvhook.start import Start

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nvhook.request.config import Config


def make(described: spec.Spec, config: Config, warnings: list[str]) -> Start | None:
    """The start of a container that is `described`, up to its plan. None if the container asks for nothing; the error
    that would stop its start, if one would."""
    asked = request.read(described, config, warnings)
    if asked is None:
        return None
    start = Start(config, described, asked, "", warnings, is_preview=True)
    start.choose()
    start.draw(_root(described.rootfs))
    return start


def imagined(env: list[str], rootfs: str) -> spec.Spec:
    """A container with the variables `env` (NAME=VALUE) over the directory `rootfs`; SpecError."""
    variables = {}
    for item in env:
        name, equals, value = item.partition("=")
        if not name or not equals:
            raise SpecError(f"--env `{item}` is not of the form NAME=VALUE")
        variables[name] = value
    return spec.Spec(env=variables, rootfs=os.path.abspath(rootfs))


def _root(rootfs: str) -> Root:
    try:
        return Root(os.open(rootfs, DIRECTORY), container.SECONDS)
    except OSError as error:
        raise SpecError(f"open the root filesystem `{rootfs}`: {reason(error)}") from None
