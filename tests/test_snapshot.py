# SPDX-License-Identifier: Apache-2.0
"""`nvhook snapshot`: a host described, and built again from that."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from containers import configure
from nvhook.cli import main
from nvhook.commands.snapshot import command as snapshot
from simhost import description
from simhost.build import build

SimHost = Callable[[str], Path]
UUID = "5f3c1e0a-7d24-4b1e-9a36-0c8e2f4d6b71"  # of the GPU of h200


def take(host: Path, *options: str, root: Path | None = None) -> int:
    os.environ["NVHOOK_CONFIG"] = str(host / "config.toml")
    try:
        return main(["snapshot", "--root", str(root or host / "driver"), *options], "/nonexistent")
    finally:
        del os.environ["NVHOOK_CONFIG"]


def taken(host: Path, place: Path, *options: str) -> dict[str, Any]:
    assert take(host, str(place), *options) == 0
    found = description.load(place)  # the schema has been held against it
    place.unlink()
    return found


def plan(host: Path, rootfs: Path, capsys: pytest.CaptureFixture[str]) -> str:
    os.environ["NVHOOK_CONFIG"] = str(host / "config.toml")
    words = ["--env", "NVIDIA_VISIBLE_DEVICES=all", "--env", "NVIDIA_DRIVER_CAPABILITIES=all"]
    try:
        assert main(["plan", "--json", "--rootfs", str(rootfs), *words], "/nonexistent") == 0
    finally:
        del os.environ["NVHOOK_CONFIG"]
    return capsys.readouterr().out.replace(str(host), "HOST")


@pytest.mark.root
# Not gb200: another machine's libraries are no driver of this one.
@pytest.mark.parametrize("name", ["h200", "a100x2", "a100x8-mig", "workstation", "fedora42", "nixos", "wsl2"])
def test_host_built_from_its_description_gives_the_same_plan(
    name: str, simhost: SimHost, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host = simhost(name)
    rootfs = tmp_path / "rootfs"
    (rootfs / "usr/lib").mkdir(parents=True)
    build(taken(host, tmp_path / "host.json"), tmp_path / "again")
    expected = plan(host, rootfs, capsys)
    assert json.loads(expected)["edits"]
    assert expected == plan(tmp_path / "again", rootfs, capsys)


@pytest.mark.root
def test_description_of_a_description_is_the_same(simhost: SimHost, tmp_path: Path) -> None:
    first = taken(simhost("workstation"), tmp_path / "host.json")
    build(first, tmp_path / "again")
    assert first == taken(tmp_path / "again", tmp_path / "host.json")


@pytest.mark.root
def test_gpus_are_those_of_the_host(simhost: SimHost, tmp_path: Path) -> None:
    (source,) = (Path(__file__).parent / "hosts").glob("a100x8-mig*.json")
    gpus = json.loads(source.read_text())["gpus"]
    found = taken(simhost("a100x8-mig"), tmp_path / "host.json")["gpus"]
    keys = ("index", "minor", "name", "uuid", "pci_bus_id", "compute_capability")
    assert [[gpu[key] for key in keys] for gpu in gpus] == [[gpu[key] for key in keys] for gpu in found]
    assert [_migs(gpu) for gpu in gpus] == [_migs(gpu) for gpu in found]


def _migs(gpu: dict[str, Any]) -> list[tuple[int, int, str]]:
    there = gpu["mig"] if isinstance(gpu["mig"], list) else []
    return [(mig["gi"], mig["ci"], mig["uuid"]) for mig in there]


@pytest.mark.root
def test_host_without_a_driver(simhost: SimHost, tmp_path: Path) -> None:
    found = taken(simhost("no-driver"), tmp_path / "host.json")
    assert (found["driver_version"], found["gpus"], found["device_nodes"], found["files"]) == ("", [], [], [])


@pytest.mark.root
def test_other_driver_version_is_described_and_named(
    simhost: SimHost, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The host that a maintainer wants most: the one where the driver was changed without a reboot."""
    host = tmp_path / "host"
    shutil.copytree(simhost("h200"), host, symlinks=True, ignore=shutil.ignore_patterns("dev"))
    configure(host, host / "config.toml", host / "run")
    version = host / "proc/driver/nvidia/version"
    version.write_text(version.read_text().replace("580.159.04", "580.200.01"))
    found = taken(host, tmp_path / "host.json")
    names = {entry["path"] for entry in found["files"]}
    assert found["driver_version"] == "580.200.01"
    assert "/usr/local/nvidia/lib64/libcuda.so.580.159.04" in names
    assert "kernel module is version 580.200.01" in capsys.readouterr().err


@pytest.mark.root
def test_mask_is_the_same_for_the_same_uuid(simhost: SimHost, tmp_path: Path) -> None:
    host = simhost("h200")
    plain, masked = taken(host, tmp_path / "host.json"), taken(host, tmp_path / "host.json", "--mask")
    assert UUID in json.dumps(plain)
    assert UUID not in json.dumps(masked)
    mask = masked["gpus"][0]["uuid"]
    information = masked["proc"]["/proc/driver/nvidia/gpus/0000:00:06.0/information"]
    assert f"GPU UUID: \t {mask}\n" in information
    assert json.dumps(plain).count(UUID) == json.dumps(masked).count(mask.removeprefix("GPU-"))


def test_mask_tells_uuids_apart_and_leaves_paths_alone() -> None:
    one, other = UUID, UUID.replace("5f", "6f")
    document = {
        "gpus": [{"uuid": f"GPU-{one}"}, {"uuid": f"GPU-{other}"}],
        "findings": [{"reason": f"nvidia has GPU-{one.upper()}"}],
        "files": [{"path": "/usr/lib/nvidia/x", "content": "on nvidia, not nvidia2"}],
    }
    first, second = "00000000-0000-0000-0000-000000000001", "00000000-0000-0000-0000-000000000002"
    assert {
        "gpus": [{"uuid": f"GPU-{first}"}, {"uuid": f"GPU-{second}"}],
        "findings": [{"reason": f"host has GPU-{first}"}],
        "files": [{"path": "/usr/lib/nvidia/x", "content": "on host, not nvidia2"}],
    } == snapshot._Mask("nvidia").of(document)


# Bad input


def test_file_that_exists_is_not_written_over(proc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (proc / "config.toml").write_text(f"[nvhook]\nproc-root = '{proc}'\ndev-root = '{proc}'\n")
    precious = tmp_path / "precious"
    precious.write_text("precious\n")
    (tmp_path / "link").symlink_to(precious)
    for name in ("precious", "link"):
        assert take(proc, str(tmp_path / name), root=proc) == 1
        assert f"write `{tmp_path / name}`: it exists; name a new file" in capsys.readouterr().err
    assert precious.read_text() == "precious\n"


@pytest.mark.root
@pytest.mark.parametrize("reader", ["true", "head -c 1 >/dev/null"])
def test_reader_who_has_seen_enough(simhost: SimHost, reader: str) -> None:
    script = Path(__file__).parent.parent / "scripts/nvhook"
    environment = {"PATH": "/usr/bin:/bin", "NVHOOK_CONFIG": str(simhost("h100x8") / "config.toml")}
    command = f"{script} snapshot | {reader}"
    done = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("", "")


def test_root_that_is_not_there(proc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (proc / "config.toml").write_text(f"[nvhook]\nproc-root = '{proc}'\n")
    assert take(proc, root=proc / "nothing") == 1
    assert capsys.readouterr().err == (
        f"nvhook: config error: open `{proc}/nothing`: no such file or directory; name the host's root directory\n"
    )


def test_pipes_in_proc_and_in_the_driver_hold_nobody_up(proc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (proc / "proc/driver/nvidia/warnings").mkdir()
    os.mkfifo(proc / "proc/driver/nvidia/warnings/pipe")
    os.makedirs(proc / "usr/lib64")
    os.mkfifo(proc / "usr/lib64/libcuda.so.580.1.2")
    config = f"[nvidia-container-cli]\nroot = '{proc}'\n[nvhook]\nproc-root = '{proc}'\ndev-root = '{proc}'\n"
    (proc / "config.toml").write_text(config)
    assert take(proc, root=proc) == 0
    found = json.loads(capsys.readouterr().out)
    description.check(found, "found")
    assert not [path for path in found["proc"] if path.endswith("pipe")]
