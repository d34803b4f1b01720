# SPDX-License-Identifier: Apache-2.0
"""What `doctor` finds, one record for each thing that was examined, and how it is shown."""

from __future__ import annotations

import os
import sys

from nvhook.errors import FAILURE, OK, SKIPPED, WARNING, Finding, one_line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_COLOURS = {OK: "\033[32m", WARNING: "\033[33m", FAILURE: "\033[31m", SKIPPED: "\033[2m"}
_EXIT = {OK: 0, FAILURE: 1, WARNING: 3}
_LONGEST = 600  # characters; a message of an engine or of a container may have any number


def ok(object: str, reason: str) -> Finding:  # noqa: A002
    return _finding(OK, object, reason, "")


def warning(object: str, reason: str, remedy: str) -> Finding:  # noqa: A002
    return _finding(WARNING, object, reason, remedy)


def failure(object: str, reason: str, remedy: str) -> Finding:  # noqa: A002
    return _finding(FAILURE, object, reason, remedy)


def skipped(object: str, reason: str, remedy: str = "") -> Finding:  # noqa: A002
    """What could not be inspected says nothing about the host."""
    return _finding(SKIPPED, object, reason, remedy)


def _finding(status: str, object: str, reason: str, remedy: str) -> Finding:  # noqa: A002
    """The remedy is a command or words, and is never cut."""
    return Finding(_bounded(reason), one_line(remedy), object=_bounded(object), status=status)


def describe(finding: Finding) -> dict[str, str]:
    """As `doctor --json` has it."""
    return {name: getattr(finding, name) for name in ("check", "status", "object", "reason", "remedy")}


def several(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def worst(found: Iterable[Finding]) -> str:
    statuses = {finding.status for finding in found}
    return next((status for status in (FAILURE, WARNING) if status in statuses), OK)


def exit_status(found: Iterable[Finding]) -> int:
    return _EXIT[worst(found)]


def show(found: list[Finding]) -> None:
    """A line for each, so that it can be searched, and a remedy in one piece, so that it can be copied."""
    is_coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for finding in found:
        word = f"{finding.status:8}"
        if is_coloured:
            word = f"{_COLOURS[finding.status]}{word}\033[0m"
        print(f"{word} {finding.object}: {finding.reason}")
        if finding.remedy:
            print(f"         remedy: {finding.remedy}")
    counts = {status: sum(item.status == status for item in found) for status in (FAILURE, WARNING, OK, SKIPPED)}
    warnings = f"{counts[WARNING]} warning{'s' * (counts[WARNING] != 1)}"
    print(f"\n{counts[FAILURE]} failed, {warnings}, {counts[OK]} ok, {counts[SKIPPED]} skipped")


def _bounded(text: str) -> str:
    line = one_line(text)
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"
