# SPDX-License-Identifier: Apache-2.0
"""The work that the launcher asks for (call.py): the same wherever it is done."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from nvhook.start import Start

    from .call import Call


def run(words: list[str], call: Call | None, stay: Callable[[Start], str] | None = None) -> int:
    """All but becoming the runtime; the exit status. `stay`: see create.edit."""
    if not call:
        from nvhook import hook

        return hook.main(words[2:], words[1])
    from . import create

    if words[0] == "edit":
        return create.main(call, stay)
    return create.find_runtime(call)
