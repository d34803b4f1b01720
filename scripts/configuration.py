# SPDX-License-Identifier: Apache-2.0
"""configuration.py: print docs/configuration.md, which is made from the schema that `nvhook config check` uses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / "hook")]

from nvhook.commands.configure import configcheck  # noqa: E402

_HEAD = """\
# Configuration

`/etc/nvidia-container-runtime/config.toml` holds NVIDIA's keys, with NVIDIA's defaults, and the table `[nvhook]`. A dot
is a table: `nvidia-container-cli.root` is `root` in `[nvidia-container-cli]`. A key that is not honoured, set to
something that would matter, is named in a warning. `nvhook config check` says what is wrong in a file.

This page is made from the schema: `.venv/bin/python scripts/configuration.py`.

"""


def page() -> str:
    keys = configcheck.keys(json.loads(Path(configcheck.SCHEMA).read_text()))
    return _HEAD + "\n".join(f"`{key}`\n:   {about['description']}\n" for key, (_, about) in keys.items())


if __name__ == "__main__":
    sys.stdout.write(page())
