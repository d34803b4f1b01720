# SPDX-License-Identifier: Apache-2.0
"""The main job seen from inside: what it may not do once it is in the container's namespace."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from containers import REPOSITORY, Bundle, make_image

# The hook with an ear: every import, and every path that is opened, between the entry and the end.
_LISTENING_HOOK = """\
#!/usr/bin/python3 -IS
import sys

sys.path[:0] = [{hook!r}]
sys.path.append({packages!r})
from nvhook.container import container
from nvhook import hook

entered = []


def listen(event, arguments):
    if not entered:
        return
    if event == "import":
        sys.stderr.write(f"IMPORT {{arguments[0]}}\\n")
    elif event == "open" and isinstance(arguments[0], str) and arguments[0].startswith("/"):
        sys.stderr.write(f"OPEN {{arguments[0]}}\\n")
    elif event in ("os.system", "subprocess.Popen", "os.exec"):
        sys.stderr.write(f"{{event}} {{arguments[0]}}\\n")


def enter(self, real=container.Container.enter):
    real(self)
    entered.append(self)


container.Container.enter = enter
sys.addaudithook(listen)
sys.exit(hook.main(sys.argv[1:], "/nowhere") or bool(sys.stderr.write("DONE\\n")) * 3)
"""


@pytest.mark.root
@pytest.mark.parametrize("inventory", ["none-yet", "good"])
def test_nothing_is_imported_or_looked_up_after_the_entry(
    tmp_path: Path, simhost: Callable[[str], Path], inventory: str
) -> None:
    """The hook ends with status 3, so that the runtime shows what it said; the line DONE is from its end."""
    image = make_image("debian", tmp_path / "rootfs")
    config = tmp_path / "config.toml"
    state = tmp_path / "state"
    host = simhost("a100x2")
    config.write_text((host / "config.toml").read_text().replace(f"{host}/run", str(state)))
    if inventory == "good":
        result = Bundle(tmp_path / "first", image).write(["/bin/true"], {"NVIDIA_VISIBLE_DEVICES": "all"}).run(config)
        assert result.returncode == 0, result.stderr
        assert (state / "inventory.json").exists()
    hook = tmp_path / "hook"
    hook.write_text(_LISTENING_HOOK.format(hook=str(REPOSITORY / "hook"), packages=str(REPOSITORY / "hook/packages")))
    hook.chmod(0o755)
    bundle = Bundle(tmp_path / "bundle", image).write(["/bin/true"], {"NVIDIA_VISIBLE_DEVICES": "all"})
    words = ["hook", "--config", str(config), "prestart"]
    bundle.config["hooks"] = {"prestart": [{"path": str(hook), "args": words, "env": ["PATH=/usr/bin:/bin"]}]}
    bundle.write()
    runc = shutil.which("runc")
    assert runc is not None
    result = bundle.run(None, wrapper=Path(runc))
    assert "DONE" in result.stderr, result.stderr
    assert "IMPORT" not in result.stderr
    assert "OPEN" not in result.stderr
    assert "os.system" not in result.stderr
    assert "subprocess" not in result.stderr
