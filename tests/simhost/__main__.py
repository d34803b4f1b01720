# SPDX-License-Identifier: Apache-2.0
"""`python3 tests/simhost HOST.json DIR`: build the host that HOST.json describes below DIR."""

from __future__ import annotations

import os
import sys

# Python puts this directory first when it is run by name; the package's parent is what the imports need.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from simhost.build import build  # noqa: E402
from simhost.description import SimhostError  # noqa: E402


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: python3 tests/simhost HOST.json DIR", file=sys.stderr)
        return 2
    try:
        build(*arguments)
    except SimhostError as error:
        print(f"simhost: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        print(f"simhost: `{error.filename or arguments[1]}`: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
