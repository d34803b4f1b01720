# SPDX-License-Identifier: Apache-2.0
"""What people see: tables, and a line while they wait. Names in them are others', so nothing in a text is markup."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from nvhook.errors import one_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_WIDE = 400  # columns: without a window, lines are as long as they are
_PATIENCE = 1.0  # seconds


def console(*, stderr: bool = False) -> Console:
    """Colours on a terminal alone, and none with NO_COLOR: that is rich's own doing."""
    from rich.console import Console

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a container's process may have any name
    made = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = _WIDE
    return made


def is_interactive(shown: Console) -> bool:
    """Whether what is shown there can be taken back."""
    return shown.is_terminal and not shown.is_dumb_terminal


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Columns whose name begins with `>` stand to the right."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        right = name.startswith(">")
        made.add_column(name.lstrip(">"), justify="right" if right else "left", overflow="fold")
    for row in rows:
        made.add_row(*map(one_line, row))
    return made


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """`what` on stderr when the block takes more than a second, and gone after it; on a terminal alone.

    By an alarm, because what is waited for forks, and a process with threads should not.
    """
    shown = console(stderr=True)
    if not is_interactive(shown):
        yield
        return
    from rich.live import Live
    from rich.text import Text

    line = Live(
        Text(what),
        console=shown,
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    before = signal.signal(signal.SIGALRM, lambda *_: line.start(refresh=True))
    signal.setitimer(signal.ITIMER_REAL, _PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        line.stop()
