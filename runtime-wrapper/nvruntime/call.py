# SPDX-License-Identifier: Apache-2.0
"""What the launcher (../launcher.c) asks of Python, in its own words:

    edit CONFIG HOOK SERVER CANDIDATES RUNTIME ARGUMENT ...    edit the container's config.json, then become the runtime
    pass CONFIG HOOK SERVER CANDIDATES RUNTIME ARGUMENT ...    become the runtime: the launcher cannot read config.toml
    leave SERVER                                               leave a server, as `create` could not, and end
    hook CONFIG ARGUMENT ...                                   nvidia-container-runtime-hook

CANDIDATES and RUNTIME are empty where Python is to read config.toml for them; RUNTIME alone is where none was found.
work.py does it, in a Python of its own (main.py) and in a child of the server (worker.py) alike.
"""

from __future__ import annotations

import os

from nvhook.formats.record import Record


class Call(Record):
    """One call of the wrapper.

    hook          absolute path of nvidia-container-runtime-hook
    config_path   config.toml, which need not be there unless it `must_exist`
    server        directory of the server (server.py); empty for none
    candidates    names and paths of low-level runtimes, separated by colons; empty: those of config.toml
    runtime       the first of them that is there; empty if none is, or if `candidates` is
    arguments     runc's command line
    """

    hook: str
    config_path: str
    must_exist: bool
    server: str
    candidates: str
    runtime: str
    arguments: list[str]


def parse(words: list[str]) -> Call | None:
    """None for the hook, which has no runtime to become."""
    if words[0] == "hook":
        return None
    _, config_path, hook, server, candidates, runtime, *arguments = words
    chosen = os.environ.get("NVHOOK_CONFIG")
    return Call(hook, chosen or config_path, bool(chosen), server, candidates, runtime, arguments)
