# SPDX-License-Identifier: Apache-2.0
"""`nvhook list` on simulated hosts: that it says of each capability what a plan would bring."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import docpages
from conftest import HOSTS
from nvhook import cli
from nvhook.request.config import CAPABILITIES
from simhost.build import build

KINDS = ("libraries", "programs", "files", "firmware", "sockets", "nodes")
Run = Callable[..., str]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def run(host: Path, *words: str) -> str:
        assert cli.main([*words], str(host / "config.toml")) == 0
        printed = capfd.readouterr()
        assert printed.err == ""
        return printed.out

    return run


def _paths(document: Any, *kinds: str) -> list[str]:
    return [item["path"] for kind in kinds for item in document[kind]]


@pytest.mark.root
def test_page_is_true(simhost: Callable[[str], Path]) -> None:
    host = simhost("a100x2")
    docpages.check("list.md", host, {f"{host}/driver": ""})


@pytest.mark.root
@pytest.mark.parametrize("name", ["a100x2", "workstation-debian12", "fedora42", "h200", "wsl2", "nixos"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_list_is_what_a_plan_brings(
    simhost: Callable[[str], Path], tmp_path: Path, run: Run, name: str, capability: str
) -> None:
    """Of each capability with compat32: the sources of mounts and the nodes, and nothing else. compat32 alone brings no
    library, and shows those of the others."""
    host = simhost(name)
    asked = sorted({capability, "compat32"})
    listed = json.loads(run(host, "list", "--json", *asked))
    env = ["NVIDIA_VISIBLE_DEVICES=all", f"NVIDIA_DRIVER_CAPABILITIES={','.join(asked)}"]
    words = ["plan", "--json", "--rootfs", str(tmp_path), *(f"--env={item}" for item in env)]
    edits = json.loads(run(host, *words))["edits"]
    # What is in /proc, and the places that NixOS' programs name, are no files of the driver's.
    mounts = {
        edit["source"]
        for edit in edits
        if edit["kind"] == "mount"
        and edit["source"] != "tmpfs"
        and not edit["destination"].startswith(("/proc/", "/nix/"))
    }
    nodes = {edit["path"] for edit in edits if edit["kind"] == "device"}
    files = set(_paths(listed, *KINDS[:-1]))
    assert files >= mounts if capability == "compat32" else files == mounts
    assert set(_paths(listed, "nodes")) == nodes
    assert listed["missing"] == []


@pytest.mark.root
def test_list_all_capabilities_at_once(simhost: Callable[[str], Path], run: Run) -> None:
    host = simhost("workstation-debian12")
    everything = json.loads(run(host, "list", "--json"))
    assert everything == json.loads(run(host, "list", "--json", *CAPABILITIES))
    assert list(everything) == ["driver", *KINDS, "missing"]
    assert everything["driver"] == {"version": "535.247.01"}
    assert all(everything[kind] for kind in KINDS)


@pytest.mark.root
def test_list_compat32_is_32_bit(simhost: Callable[[str], Path], run: Run) -> None:
    document = json.loads(run(simhost("fedora42"), "list", "--json", "compat32"))
    assert {item["bits"] for kind in ("libraries", "files") for item in document[kind]} == {32}


@pytest.mark.root
def test_list_features_and_mig_devices(simhost: Callable[[str], Path], run: Run) -> None:
    host = simhost("a100x8")
    assert _paths(json.loads(run(host, "list", "--json", "gdrcopy")), *KINDS) == ["/dev/gdrdrv"]
    document = json.loads(run(host, "list", "--json", "mig", "mofed"))
    paths = _paths(document, "nodes")
    assert {"/dev/infiniband/uverbs0", "/dev/infiniband/rdma_cm", "/dev/nvidia-caps/nvidia-cap147"} <= set(paths)
    assert {tuple(item["features"]) for item in document["nodes"]} == {("mig",), ("mofed",)}
    assert [item for item in document["nodes"] if item["capabilities"]] == []


@pytest.mark.root
def test_list_nothing_of_that(simhost: Callable[[str], Path], run: Run) -> None:
    assert run(simhost("h200"), "list", "gdrcopy") == "This host has nothing of that.\n"


@pytest.mark.root
def test_list_without_a_driver(simhost: Callable[[str], Path], run: Run) -> None:
    host = simhost("no-driver")
    shown = run(host, "list")
    assert shown.startswith("No NVIDIA GPU on the PCI bus, and no driver")
    assert shown.count("\n") == 1
    document = json.loads(run(host, "list", "--json"))
    assert (document["driver"], len(document["missing"])) == (None, 1)
    assert _paths(document, *KINDS) == []


@pytest.mark.root
@pytest.mark.parametrize("damaged", ["uvm", "libraries", "capability"])
def test_list_what_is_there_beside_what_is_missing(tmp_path: Path, run: Run, damaged: str) -> None:
    (path,) = HOSTS.glob("a100x8-mig*.json")
    description = json.loads(path.read_text())
    if damaged == "uvm":
        description["proc"]["/proc/devices"] = description["proc"]["/proc/devices"].replace("nvidia-uvm\n", "other\n")
    elif damaged == "libraries":
        description["files"] = [item for item in description["files"] if ".so" not in item["path"]]
    else:
        for name in description["proc"]:
            if name.endswith("ci0/access"):
                description["proc"][name] = "nothing\n"
    build(description, tmp_path)
    document = json.loads(run(tmp_path, "list", "--json"))
    missing = {
        "uvm": "the nvidia-uvm kernel module is not loaded",
        "libraries": "550.90.07",
        "capability": "no `DeviceFileMinor`",
    }[damaged]
    assert any(missing in text for text in document["missing"])
    assert len(set(document["missing"])) == len(document["missing"])
    assert "/dev/nvidiactl" in _paths(document, "nodes")


@pytest.mark.root
def test_list_leaves_out_what_config_toml_does_not_support(
    simhost: Callable[[str], Path], tmp_path: Path, run: Run
) -> None:
    settings = (simhost("a100x2") / "config.toml").read_text()
    (tmp_path / "config.toml").write_text(f'supported-driver-capabilities = "utility,compute"\n{settings}')
    document = json.loads(run(tmp_path, "list", "--json"))
    items = [item for kind in KINDS for item in document[kind]]
    assert {name for item in items for name in item["capabilities"]} == {"compute", "utility"}
    assert not [item for item in items if item.get("bits") == 32 or not item["capabilities"]]
    (missing,) = document["missing"]
    assert missing == f"`supported-driver-capabilities` in `{tmp_path}/config.toml` is compute, utility and no more"


@pytest.mark.root
def test_list_touches_nothing(tmp_path: Path, run: Run) -> None:
    build(HOSTS / "nixos.json", tmp_path)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    run(tmp_path, "list")
    assert before == sorted(str(path) for path in tmp_path.rglob("*"))


def test_list_refuses_an_unknown_capability(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(["list", "vidoe"], os.devnull)
    assert raised.value.code == 2
    assert "unknown capability `vidoe`; there are compat32, compute, " in capsys.readouterr().err
