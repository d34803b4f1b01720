# SPDX-License-Identifier: Apache-2.0
"""Draws the README's picture: `.venv/bin/python tests/screenshot.py docs/doctor.svg`, as root.

It renders what `nvhook doctor` prints on a terminal, on a simulated host that has a CDI file for an older driver.
"""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "hook"))

from containers import REPOSITORY, WRAPPER, any_cgroups
from patients import Patient
from simhost.build import build

COLUMNS = 118
# As it was made for Podman before the driver was upgraded
SPECIFICATION = """\
cdiVersion: 0.6.0
kind: nvidia.com/gpu
devices:
- name: "0"
  containerEdits:
    deviceNodes:
    - path: /dev/nvidia0
containerEdits:
  mounts:
  - hostPath: /usr/local/nvidia/lib64/libcuda.so.570.86.10
    containerPath: /usr/lib64/libcuda.so.570.86.10
"""
_DARK, _LIGHT = (22, 27, 34), (214, 220, 227)
_RED, _GREEN, _YELLOW = (255, 123, 114), (126, 231, 135), (242, 204, 96)
_BLUE, _MAGENTA, _CYAN = (121, 192, 255), (210, 168, 255), (86, 212, 221)
_THEME = TerminalTheme(_DARK, _LIGHT, [_DARK, _RED, _GREEN, _YELLOW, _BLUE, _MAGENTA, _CYAN, _LIGHT])
# Rich's own template loads a font from the network; this one takes what the reader has.
_TEMPLATE = """\
<svg xmlns="http://www.w3.org/2000/svg" class="rich-terminal" viewBox="0 0 {width} {height}">
<title>nvhook doctor on a host whose CDI file belongs to an older driver</title>
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, monospace; font-size: {char_height}px; \
line-height: {line_height}px; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def printed(host: Path, place: Path) -> str:
    """What `nvhook doctor` prints on a terminal; `host` is a simulated H200, of which a copy is made at `place`."""
    patient = Patient(host, place)
    patient.docker()
    patient.write("driver/etc/cdi/nvidia.yaml", SPECIFICATION)
    command = [*any_cgroups(), str(REPOSITORY / "scripts/nvhook"), "doctor"]
    command += ["--root", str(patient.root), "--runtime-path", str(WRAPPER)]
    with patient.answering({"CgroupDriver": "systemd", "CgroupVersion": "2", "Runtimes": {"nvidia": {}}}):
        text = _on_a_terminal(command, {"PATH": os.environ["PATH"], "NVHOOK_CONFIG": str(patient.config)})
    text = text.replace(str(patient.config), "/etc/nvidia-container-runtime/config.toml")
    return text.replace(f"{patient.host}/run", "/run/nvhook").replace(str(patient.root), "/")


def _on_a_terminal(command: list[str], env: dict[str, str]) -> str:
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=theirs, stderr=subprocess.STDOUT):
        os.close(theirs)
        parts = []
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # EIO: the last process that had the terminal open is gone
                break
            parts.append(part)
    os.close(ours)
    return b"".join(parts).decode().replace("\r\n", "\n")


def draw(text: str) -> str:
    """An SVG document."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text("$ sudo nvhook doctor", style="bold"))
    console.print(Text.from_ansi(text.rstrip()))
    svg = console.export_svg(title="", theme=_THEME, code_format=_TEMPLATE, unique_id="doctor")
    return "\n".join(line.rstrip() for line in svg.splitlines() if line.strip()) + "\n"


def main() -> int:
    (file,) = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="nvhook-screenshot-") as name:
        host = Path(name, "h200")
        build(REPOSITORY / "tests/hosts/h200-ubuntu24.json", host)
        Path(file).write_text(draw(printed(host, Path(name, "host"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
