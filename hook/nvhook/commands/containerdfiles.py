# SPDX-License-Identifier: Apache-2.0
"""The files that containerd reads: its config.toml, and what that imports.

An import is a path or a pattern, relative to the file that names it. A star stands for any characters within one name,
as in Go's filepath.Match; without a star the other characters of patterns stand for themselves.
"""

from __future__ import annotations

import fnmatch
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nvhook.commands.configure.documents import Document
    from nvhook.linux.root import Root

_MAX_FILES = 1000


def in_order(root: Root, main: Document, read: Callable[[str], Document]) -> Iterator[Document]:
    """`main` and what it imports, in the order in which containerd reads them: of two values the later counts."""
    yield main
    waiting = _imported(root, main)
    seen = {main.name}
    while waiting and len(seen) < _MAX_FILES:
        name = waiting.pop(0)
        if name not in seen:
            seen.add(name)
            document = read(name)
            yield document
            waiting += _imported(root, document)


def _imported(root: Root, document: Document) -> list[str]:
    imports = document.get(("imports",))
    patterns = [str(pattern) for pattern in imports] if isinstance(imports, list) else []
    # No file has a NUL in its name, and the kernel cannot be asked for one.
    paths = [absolute(document.name, pattern) for pattern in patterns if "\0" not in pattern]
    return [name for path in paths for name in matching(root, path)]


def absolute(name: str, pattern: object) -> str:
    """The path or pattern that the import `pattern` of the file `name` means."""
    return os.path.normpath(os.path.join(os.path.dirname(name), str(pattern)))


def matching(root: Root, pattern: str) -> list[str]:
    """The files below `root` that an absolute path or pattern means, sorted."""
    if "*" not in pattern:
        return [pattern] if root.exists(pattern) else []
    found = [""]
    for part in pattern.split("/")[1:]:
        if set(part) & set("*?["):
            found = [f"{place}/{name}" for place in found for name in fnmatch.filter(root.names(place or "/"), part)]
        else:
            found = [f"{place}/{part}" for place in found if root.exists(f"{place}/{part}")]
    return found


def matches(name: str, pattern: str) -> bool:
    """Whether an absolute path or pattern means the file `name`."""
    if "*" not in pattern:
        return name == pattern
    names, parts = name.split("/"), pattern.split("/")
    return len(names) == len(parts) and all(map(fnmatch.fnmatchcase, names, parts))
