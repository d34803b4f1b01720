# SPDX-License-Identifier: Apache-2.0
"""sbom.py DIRECTORY: a software bill of materials (CycloneDX 1.5, JSON) of what an installation carries.

What is bundled is read from the packages themselves, not from what was asked for. The same source gives the same bytes.
"""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent


def component(package: Distribution) -> dict[str, Any]:
    name = re.sub(r"[-_.]+", "-", package.metadata["Name"]).lower()
    found: dict[str, Any] = {
        "type": "library",
        "name": name,
        "version": package.version,
        "purl": f"pkg:pypi/{name}@{package.version}",
    }
    licence = _first(package, "License-Expression") or _by_classifier(package)
    return found | ({"licenses": [{"license": {"name": licence}}]} if licence else {})


def _by_classifier(package: Distribution) -> str:
    classifiers = package.metadata.get_all("Classifier") or []
    names = [item.rpartition(" :: ")[2] for item in classifiers if item.startswith("License ::")]
    return names[-1] if names else _first(package, "License").strip().partition("\n")[0]


def _first(package: Distribution, key: str) -> str:
    values = package.metadata.get_all(key)
    return str(values[0]) if values else ""


def document(packages: Path) -> dict[str, Any]:
    version = re.search(r'^VERSION = "(.*)"$', (REPOSITORY / "hook/nvhook/version.py").read_text(), re.MULTILINE)
    assert version
    components = [component(package) for package in distributions(path=[str(packages)])]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "name": "nvhook",
                "version": version[1],
                "licenses": [{"license": {"id": "Apache-2.0"}}],
            }
        },
        "components": sorted(components, key=lambda item: str(item["name"])),
    }


def main() -> None:
    place = Path(sys.argv[1])
    place.mkdir(parents=True, exist_ok=True)
    made = document(REPOSITORY / "build/packages")
    path = place / f"nvhook-{made['metadata']['component']['version']}.cdx.json"
    path.write_text(json.dumps(made, indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    main()
