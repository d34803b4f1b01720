# SPDX-License-Identifier: Apache-2.0
"""What mkdocs.yml has besides docs/: the pages that a repository has at its root, as pages of the site."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")


def on_files(files: Files, config: MkDocsConfig) -> None:
    """mkdocs calls it when it has found what is in docs/."""
    for name in PAGES:
        text = (REPOSITORY / name).read_text()
        # docs/ is the site's root, and theirs is one above it.
        files.append(File.generated(config, name, content=text.replace("](docs/", "](")))
