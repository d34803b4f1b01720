# SPDX-License-Identifier: Apache-2.0
"""Changes to configuration files of others: read, changed as text, shown as a diff, written at once, undone exactly.

For each file that is changed there is a note beside our own config.toml, which holds what the file was and what was set
in it. A file that is still as we left it gets its former bytes back; in one that somebody has edited since, each value
that is still ours goes back to what it was. The engines' own directories are no place for notes: CRI-O reads every file
in its crio.conf.d, whatever its name.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import stat

from nvhook.commands.configure.documents import Document, lookup, same
from nvhook.errors import ConfigError, reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from nvhook.commands.configure.documents import Path, Table

    Settings = list[tuple[Path, object]]
    # path, before: the text or null, written: digest of what we wrote, settings, directories: made for the file
    Note = dict[str, Any]
    # path, text or None for none, mode, owner
    Output = tuple[str, str | None, int, tuple[int, int] | None]

_AS_ROOT = "run it as root"
_MAX_FILE = 4 << 20


class ChangedFile:
    """A configuration file, its note if there is one, and what is to become of it.

    name       as the user and the engine know it; path is where it really is, links followed
    before     its text, None where there is no such file; after is the text it gets, None for none
    document   what `before` says
    """

    def __init__(self, name: str, kind: type[Document], notes: str, *, make_directory: bool = False) -> None:
        """ConfigError for what cannot be read, does not parse, or is not a file; nothing is touched.

        `make_directory` where a missing directory is a usual thing, and the name is not one that a user has typed.
        """
        self.name = os.path.abspath(name)
        self.path = os.path.realpath(name)
        self._kind = kind
        self._notes = notes
        digest = hashlib.sha256(os.fsencode(self.path)).hexdigest()[:12]
        self._note_path = os.path.join(notes, f"{os.path.basename(self.path)}.{digest}")
        self.before = _read(self.path, self.name)
        directory = os.path.dirname(self.path)
        if self.before is None and not make_directory and not os.path.isdir(directory):
            raise ConfigError(f"write `{self.name}`: no directory `{directory}`", "create it, or name another file")
        self.after = self.before
        self.document = kind(self.before or "", self.name)
        self._note = self._read_note()
        self._note_after = self._note

    @property
    def is_changed(self) -> bool:
        return self.after != self.before

    @property
    def is_due(self) -> bool:
        """It or its note has to be written."""
        return self.is_changed or self._note_after is not self._note

    def apply(self, settings: Settings, header: str = "") -> None:
        """What is not set yet; `header` begins a file that is not there yet."""
        document = self._kind(self.before if self.before is not None else header, self.name)
        pending = [(path, value) for path, value in settings if not same(document.get(path), value)]
        if not pending:
            return
        for path, value in pending:
            document.put(path, value)
        self.after = document.text
        recorded = [(path, value) for path, value in self._recorded() if path not in dict(pending)]
        self._note_after = {
            "path": self.path,
            "before": self._restored(),
            "written": _digest(self.after),
            "settings": [*recorded, *pending],
            "directories": self._note["directories"] if self._note else _missing(os.path.dirname(self.path)),
        }

    def undo(self) -> bool:
        """What the note remembers; False where there is no note of us, and nothing is done."""
        if not self._note:
            return False
        self.after = self._restored()
        self._note_after = None
        return True

    def drop(self, paths: Iterable[Path], header: str) -> None:
        """For a file without a note: takes `paths` away, and the file if it is one that we have begun."""
        document = self._kind(self.before or "", self.name)
        for path in paths:
            _drop(document, path, {})
        if not same(document.table, self.document.table):
            self.after = document.text
            if header and document.text.startswith(header) and document.table.keys() <= {"version"}:
                self.after = None

    def diff(self) -> list[str]:
        """Unified, one line each, with the line ends it has in the file."""
        before, after = (self.name if text is not None else "/dev/null" for text in (self.before, self.after))
        return list(difflib.unified_diff(_lines(self.before), _lines(self.after), before, after))

    # Notes

    def _recorded(self) -> Settings:
        return [(tuple(path), value) for path, value in self._note["settings"]] if self._note else []

    def _restored(self) -> str | None:
        """The text without what the note says is ours."""
        note = self._note
        if not note or self.before is None:
            return self.before
        former: str | None = note["before"]
        if note["written"] == _digest(self.before):
            return former
        document = self._kind(self.before, self.name)
        then = self._kind(former or "", self.name).table
        for path, value in reversed(self._recorded()):
            if not same(document.get(path), value):
                continue  # somebody has changed it since: theirs now
            old = lookup(then, path)
            if old is None:
                _drop(document, path, then)
            else:
                document.put(path, old)
        return None if former is None and not document.table else document.text

    def _read_note(self) -> Note | None:
        text = _read(self._note_path, self._note_path)
        if text is None:
            return None
        try:
            note = json.loads(text)
            is_ours = note["path"] == self.path and {"before", "written", "settings", "directories"} <= note.keys()
        except (ValueError, TypeError, KeyError, AttributeError):
            is_ours = False
        if not is_ours:
            raise ConfigError(f"parse `{self._note_path}`: not a note of nvhook", "remove it, and try again")
        # Written before the file itself: a run that died in between has changed nothing.
        return note if note["before"] != self.before else None

    def outputs(self) -> list[Output]:
        """The file and its note as they are to be: the note is first to come and last to go."""
        mode, owner = 0o644, None
        if self.before is not None:
            status = os.stat(self.path)
            mode, owner = stat.S_IMODE(status.st_mode), (status.st_uid, status.st_gid)
        file = (self.path, self.after, mode, owner)
        note = self._note_after
        text = json.dumps(note, indent=1) + "\n" if note else None
        # It repeats what is in the file: for the same eyes only.
        entry = (self._note_path, text, mode & 0o600, None)
        return [output for output in ([entry, file] if note else [file, entry]) if self.is_changed or output is entry]

    def directories(self) -> list[str]:
        """Those that were made for the file and its note and are of no more use, the innermost first."""
        made = self._note["directories"] if self._note and not self._note_after else []
        return [*made, self._notes] if not self._note_after else []


def save(files: list[ChangedFile]) -> None:
    """Writes what has changed: all of it beside its place first, then each is renamed."""
    changed = [file for file in files if file.is_due]
    outputs = [output for file in changed for output in file.outputs()]
    staged = []
    try:
        for path, text, mode, owner in outputs:
            if text is not None:
                _make_directory(os.path.dirname(path))
                staged.append(_stage(path, text, mode, owner))
        for path, text, _, _ in outputs:
            if text is None:
                _remove(path)
            else:
                os.rename(staged[0], path)
                staged.pop(0)
                _flush_directory(os.path.dirname(path))
    except OSError as error:
        raise ConfigError(f"write `{path}`: {reason(error)}", _remedy(error)) from None
    finally:
        for beside in staged:
            _remove(beside)
    for directory in [directory for file in changed for directory in file.directories()]:
        try:
            os.rmdir(directory)
        except OSError:
            continue  # somebody else has put something there


def write(path: str, text: str) -> None:
    """A file of our own, for all to read, in the place of what is there; its directory is made. ConfigError."""
    path = os.path.abspath(path)
    try:
        _make_directory(os.path.dirname(path))
        beside = _stage(path, text, 0o644, None)
        try:
            os.rename(beside, path)
        except OSError:
            _remove(beside)
            raise
        _flush_directory(os.path.dirname(path))
    except OSError as error:
        raise ConfigError(f"write `{path}`: {reason(error)}", _remedy(error)) from None


def _read(path: str, name: str) -> str | None:
    """None where there is nothing."""
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise ConfigError(f"read `{name}`: is a directory", "name the file itself with --config-file")
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_FILE:
            raise ConfigError(f"read `{name}`: not a configuration file", "name the file with --config-file")
        with open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"read `{name}`: {reason(error)}", _remedy(error)) from None
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        lines = content[: error.start].split(b"\n")
        raise ConfigError(
            f"parse `{name}`: not UTF-8 at line {len(lines)}, column {len(lines[-1]) + 1}; it is left as it is"
        ) from None


def _stage(path: str, text: str, mode: int, owner: tuple[int, int] | None) -> str:
    beside = f"{path}.{os.getpid()}.new"
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(text.encode())
            file.flush()
            if owner:
                os.fchown(file.fileno(), *owner)
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
    except BaseException:
        os.unlink(beside)
        raise
    return beside


def _make_directory(path: str) -> None:
    for directory in reversed(_missing(path)):
        os.mkdir(directory, 0o755)


def _missing(directory: str) -> list[str]:
    """The innermost first."""
    missing = []
    while not os.path.isdir(directory):
        missing.append(directory)
        directory = os.path.dirname(directory)
    return missing


def _flush_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


def _drop(document: Document, path: Path, then: Table) -> None:
    """The value, and the tables around it that were not there `then` and are empty now."""
    document.drop(path)
    for depth in range(len(path) - 1, 0, -1):
        outer = path[:depth]
        if document.get(outer) != {} or lookup(then, outer) is not None:
            return
        document.drop(outer)


def _lines(text: str | None) -> list[str]:
    """Split at line feeds alone: what else str.splitlines takes for the end of a line may stand in a string."""
    lines = [line + "\n" for line in (text or "").split("\n")]
    lines[-1] = lines[-1][:-1]
    return lines if lines[-1] else lines[:-1]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _remedy(error: OSError) -> str:
    return _AS_ROOT if isinstance(error, PermissionError) and os.geteuid() else ""
