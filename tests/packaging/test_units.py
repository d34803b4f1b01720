# SPDX-License-Identifier: Apache-2.0
"""The systemd units: systemd takes them, and what they start does its work with what they leave it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import booted
from conftest import cannot
from containers import REPOSITORY, configure

UNITS = sorted((REPOSITORY / "packaging/systemd").iterdir())


def _commands() -> list[str]:
    text = (REPOSITORY / "packaging/systemd/nvhook-refresh.service").read_text()
    return [line.partition("=")[2] for line in text.splitlines() if line.startswith("ExecStart=")]


def test_systemd_takes_them(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        cannot("systemd-analyze is not installed")
    for unit in UNITS:
        text = unit.read_text().replace("Documentation=man:nvhook(1)\n", "")
        (tmp_path / unit.name).write_text(text.replace("/usr/bin/nvhook", str(REPOSITORY / "scripts/nvhook")))
    command = ["systemd-analyze", "verify", *(str(tmp_path / unit.name) for unit in UNITS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    ours = [line for line in done.stderr.splitlines() if "nvhook" in line]
    assert (done.returncode, ours) == (0, [])


def test_service_has_few_rights() -> None:
    """By systemd's own measure: 9.6 for a service that may do everything."""
    if not shutil.which("systemd-analyze"):
        cannot("systemd-analyze is not installed")
    service = str(REPOSITORY / "packaging/systemd/nvhook-refresh.service")
    command = ["systemd-analyze", "security", "--offline=yes", "--threshold=20", service]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout.splitlines()[-1:] + done.stderr.splitlines()


@pytest.mark.root
def test_what_they_start(simhost: Callable[[str], Path], tmp_path: Path) -> None:
    """With the capabilities of the unit and no other, and without new privileges."""
    settings = configure(simhost("a100x2"), tmp_path / "config.toml", tmp_path / "state")
    (tmp_path / "state").mkdir()
    assert _commands() == ["/usr/bin/nvhook create-dev-char-symlinks --create-all", "/usr/bin/nvhook refresh"]
    for command in _commands():
        words = ["setpriv", "--bounding-set=-all,+dac_read_search", "--inh-caps=-all", "--no-new-privs"]
        words += [str(REPOSITORY / "scripts/nvhook"), *command.split()[1:]]
        words += ["--dev-char-path", str(tmp_path / "char")] if "dev-char" in command else []
        env = {"PATH": "/usr/bin:/bin", "NVHOOK_CONFIG": str(settings)}
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "state/inventory.json").exists()
    assert (tmp_path / "char/195:0").is_symlink()


def test_rule_names_the_unit() -> None:
    text = (REPOSITORY / "packaging/udev/60-nvhook.rules").read_text()
    rules = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert rules
    command = 'RUN+="/bin/systemctl --no-block restart nvhook-refresh.service"'
    assert all(rule.endswith(f", {command}") for rule in rules)


@pytest.mark.root
def test_package_on_a_machine_with_systemd(simhost: Callable[[str], Path], tmp_path: Path) -> None:
    """The unit watches from the first installation on, stays disabled if it was, and goes with the package."""
    if reason := booted.missing():
        cannot(reason)
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    command = [str(REPOSITORY / "packaging/build"), "deb", str(tmp_path / "dist")]
    deb = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.strip()
    (tmp_path / "machine").mkdir()
    machine = booted.Booted(tmp_path / "machine", simhost("a100x2"), tmp_path)
    try:
        machine.here("rm", "-r", "/usr/lib/nvhook", "/etc/nvidia-container-runtime")
        machine.here("dpkg", "--force-depends", "--install", deb)
        assert _state(machine) == "enabled active"
        machine.here("systemctl", "start", "nvhook-refresh.service")
        assert machine.here("ls", "/run/nvhook") == ""  # there is no driver in what the service sees
        machine.here("systemctl", "disable", "--now", "nvhook-refresh.path")
        machine.here("dpkg", "--force-depends", "--install", deb)
        assert _state(machine) == "disabled inactive"
        machine.here("systemctl", "enable", "--now", "nvhook-refresh.path")
        machine.here("dpkg", "--purge", "nvhook")
        assert _state(machine) == "inactive"
        left = "/run/nvhook /etc/nvidia-container-runtime /etc/systemd/system/paths.target.wants/nvhook-refresh.path"
        assert machine.shell(f"for path in {left}; do [ ! -e $path ] || echo $path; done") == ""
    finally:
        machine.end()


def _state(machine: booted.Booted) -> str:
    words = [machine.call("systemctl", verb, "nvhook-refresh.path").stdout for verb in ("is-enabled", "is-active")]
    return " ".join("".join(words).split())
