# SPDX-License-Identifier: Apache-2.0
"""scripts/test says by its status whether every test passed: CI looks at nothing else."""

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"

PYTHON = """#!/bin/sh
for argument; do case $argument in
--ignore=*) echo the others; exit {others} ;;
tests/engines) echo the engines; exit {engines} ;;
esac; done
"""


@pytest.mark.parametrize(
    ("others", "engines", "status"), [(0, 0, 0), (1, 0, 1), (0, 1, 1), (2, 1, 1), (5, 0, 5)], ids=str
)
def test_status(tmp_path: Path, others: int, engines: int, status: int) -> None:
    for name, text in [
        ("scripts/setup", "#!/bin/sh\n"),
        (".venv/bin/python", PYTHON.format(others=others, engines=engines)),
    ]:
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
        path.chmod(0o755)
    shutil.copy(SCRIPTS / "test", tmp_path / "scripts/test")
    done = subprocess.run([tmp_path / "scripts/test"], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (status, "the others\nthe engines\n", "")
