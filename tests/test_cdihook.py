# SPDX-License-Identifier: Apache-2.0
"""The hook of a CDI specification, in real containers to which tests/cdi_engine.py gives what an engine would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from containers import HOOK
from nvhook import cdihook, config, gpus
from nvhook.errors import SpecError
from nvhook.request import Request

A100, MIG, WORKSTATION = "a100x2", "a100x8", "workstation"
SECOND = "GPU-08e5f9a3-1c6b-42d7-b0f4-e95d3187ac26"
GPU3_MIG = "MIG-eefa183d-6954-5226-8fe3-2e6550da3d1e"  # GPU instance 1, compute instance 1 of GPU 3
ALL = config.CAPABILITIES


# Arguments


def test_arguments_are_those_that_generate_writes() -> None:
    links = ["libcuda.so.9::/usr/lib64/libcuda.so.1", "../card1::/dev/dri/by-path/pci-0000:01:00.0-card"]
    words = ["--capabilities", "compute,utility", "--config", "/etc/x.toml"]
    words += [word for link in links for word in ("--link", link)]
    words += ["--library", "/usr/lib64/libcuda.so.1", "--library32", "/usr/lib/libcuda.so.1"]
    found = cdihook.parse(words)
    assert found.capabilities == ("compute", "utility")
    assert found.config == "/etc/x.toml"
    assert found.links == [
        ("libcuda.so.9", "/usr/lib64/libcuda.so.1"),
        ("../card1", "/dev/dri/by-path/pci-0000:01:00.0-card"),
    ]
    assert found.libraries == [("/usr/lib64", "libcuda.so.1", 64), ("/usr/lib", "libcuda.so.1", 32)]


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["--folder", "/usr/lib64"], id="unknown"),
        pytest.param(["--link", "libcuda.so.1"], id="link-without-place"),
        pytest.param(["--link", "x::usr/lib/x"], id="link-below-nothing"),
        pytest.param(["--library", "libcuda.so.1"], id="library-without-directory"),
        pytest.param(["--library", "/usr/lib64/"], id="library-without-name"),
        pytest.param(["--config"], id="config-without-value"),
        pytest.param(["prestart"], id="word"),
    ],
)
def test_unknown_argument_is_refused(words: list[str]) -> None:
    with pytest.raises(
        SpecError, match=r"not known to this version of nvhook; make it anew with `nvhook cdi generate`"
    ):
        cdihook.parse(words)


def test_program_says_what_is_wrong_in_one_line() -> None:
    done = subprocess.run([str(HOOK), "cdi", "--x", "y\nz"], input="", capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "nvidia-container-runtime-hook: spec error: `--x y\\nz` of the CDI specification's hook is not known to this "
        "version of nvhook; make it anew with `nvhook cdi generate`\n"
    )


# What is chosen


@pytest.mark.parametrize(
    ("linux", "paths"),
    [
        pytest.param({"devices": [{"path": "/dev/nvidia0"}, {"path": "/dev/x"}]}, {"/dev/nvidia0", "/dev/x"}, id="two"),
        pytest.param({}, set(), id="none"),
        pytest.param(None, set(), id="no-linux"),
        pytest.param({"devices": {"path": "/dev/nvidia0"}}, set(), id="odd-list"),
        pytest.param({"devices": ["/dev/nvidia0"]}, set(), id="odd-entry"),
    ],
)
def test_nodes_of_a_config_json(linux: object, paths: set[str]) -> None:
    assert paths == cdihook.node_paths({"linux": linux})


@pytest.mark.root
@pytest.mark.parametrize(
    ("nodes", "chosen", "migs"),
    [
        pytest.param({"/dev/nvidia1"}, [3], [], id="gpu-without-rights"),
        pytest.param({"/dev/nvidia1", "/dev/nvidia-caps/nvidia-cap147"}, [3], [], id="half-of-the-rights"),
        pytest.param(
            {"/dev/nvidia1", "/dev/nvidia-caps/nvidia-cap147", "/dev/nvidia-caps/nvidia-cap149"},
            [3],
            [(1, 1)],
            id="mig-device",
        ),
        pytest.param(
            {"/dev/nvidia-caps/nvidia-cap147", "/dev/nvidia-caps/nvidia-cap149"}, [], [], id="rights-without-gpu"
        ),
        pytest.param({"/dev/nvidiactl", "/dev/nvidia"}, [], [], id="none"),
    ],
)
def test_chosen_are_those_that_can_be_opened(
    simhost: Callable[[str], Path], nodes: set[str], chosen: list[int], migs: list[tuple[int, int]]
) -> None:
    settings = config.load(str(simhost(MIG) / "config.toml"))
    found = cdihook.chosen(nodes, settings, Request((), ("compute",), (), ""), gpus.read(settings.proc_root))
    assert chosen == [gpu.index for gpu in found.gpus]
    assert migs == [(item.gi, item.ci) for item in found.migs]


# The road


_ROAD = """
import os, sys
sys.path[:0] = sys.argv[1:2]
from nvhook import hook
status = hook.main(["cdi", *sys.argv[2:]], "/nonexistent/config.toml")
print(*sorted(sys.modules), sep="\\n")
"""


def test_road_loads_nothing_dear(tmp_path: Path) -> None:
    """Up to the container, which is none here; what comes after is imported with the rest."""
    (tmp_path / "config.json").write_text(json.dumps({"process": {}, "root": {"path": "rootfs"}}))
    state: dict[str, Any] = {"id": "name", "pid": os.getpid(), "bundle": str(tmp_path)}
    command = [sys.executable, "-IS", "-c", _ROAD, str(HOOK.parent), "--capabilities", "compute"]
    done = subprocess.run(command, input=json.dumps(state), capture_output=True, text=True, check=False)
    assert "has no mount namespace of its own" in done.stderr
    loaded = set(done.stdout.split())
    assert {"nvhook.cdihook", "nvhook.edits"} <= loaded
    assert not loaded & {"argparse", "json", "re", "pathlib", "subprocess", "nvhook.discovery", "nvhook.nvml"}
