# SPDX-License-Identifier: Apache-2.0
"""`nvhook cdi`: what is generated, and what is said about specifications of any kind."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import docpages
from containers import HOOK, REPOSITORY, configure
from nvhook.cli import main
from nvhook.commands.cdi import files as cdifiles
from nvhook.commands.cdi import specification as cdispec
from nvhook.request import config

pytestmark = pytest.mark.root  # simulated hosts have device nodes

A100, MIG, WORKSTATION, NIXOS, WSL = "a100x2", "a100x8", "workstation", "nixos", "wsl2"
GENERATE = ("generate", "--hook-path", str(HOOK))


@pytest.fixture
def cdi(simhost: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`nvhook cdi …` on a simulated host, with a state directory of its own."""

    def call(host: str | Path, *words: str) -> int:
        place = host if isinstance(host, Path) else simhost(host)
        monkeypatch.setenv("NVHOOK_CONFIG", str(configure(place, tmp_path / "config.toml", tmp_path / "state")))
        return main(["cdi", *words], "/nonexistent")

    return call


Cdi = Callable[..., int]
Capture = pytest.CaptureFixture[str]


def generated(cdi: Cdi, capsys: Capture, host: str | Path, *words: str) -> Any:
    assert cdi(host, *GENERATE, *words) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return yaml.safe_load(shown.out)


def refused(cdi: Cdi, capsys: Capture, *words: str, host: str | Path = A100) -> str:
    assert cdi(host, *words) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    return line.removeprefix("nvhook: ")


@pytest.fixture
def copy(simhost: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    def make(host: str) -> Path:
        shutil.copytree(simhost(host), tmp_path / "host", symlinks=True, copy_function=_copy)
        return tmp_path / "host"

    return make


def _copy(source: str, target: str) -> None:
    status = os.lstat(source)
    if os.path.isfile(source):
        shutil.copy2(source, target)
    else:
        os.mknod(target, status.st_mode, status.st_rdev)
        os.chmod(target, status.st_mode)


# generate


@pytest.mark.parametrize(
    ("host", "words", "names"),
    [
        pytest.param(
            A100,
            (),
            "0 GPU-c41d7b52-93e6-4f0a-8d15-2b7e60a9f3c8 1 GPU-08e5f9a3-1c6b-42d7-b0f4-e95d3187ac26 all",
            id="index-and-uuid",
        ),
        pytest.param(A100, ("--device-name-strategy", "index"), "0 1 all", id="index"),
        pytest.param(A100, ("--device-name-strategy", "type-index"), "gpu0 gpu1 all", id="type-index"),
        pytest.param(
            MIG,
            ("--device-name-strategy", "index"),
            "4 5 6 7 0:0 0:1 0:2 0:3 0:4 0:5 0:6 1:0 1:1 1:2 1:3 2:0 3:0 3:1 3:2 all",
            id="divided-gpu-has-no-name",
        ),
        pytest.param(
            MIG,
            ("--device-name-strategy", "type-index"),
            "gpu4 gpu5 gpu6 gpu7 mig0:0 mig0:1 mig0:2 mig0:3 mig0:4 mig0:5 mig0:6 mig1:0 mig1:1 mig1:2 mig1:3 mig2:0 "
            "mig3:0 mig3:1 mig3:2 all",
            id="mig-type-index",
        ),
        pytest.param(WSL, (), "all", id="wsl"),
    ],
)
def test_names_of_devices(cdi: Cdi, capsys: Capture, host: str, words: tuple[str, ...], names: str) -> None:
    document = generated(cdi, capsys, host, *words)
    assert names.split(" ") == [device["name"] for device in document["devices"]]


@pytest.mark.parametrize("host", [A100, MIG, WORKSTATION, "fedora42", "h200", NIXOS, WSL])
@pytest.mark.parametrize("format_", ["yaml", "json"])
def test_every_host_gives_a_valid_specification_of_files_that_are_there(
    cdi: Cdi, capsys: Capture, tmp_path: Path, host: str, format_: str
) -> None:
    path = tmp_path / f"cdi/nvidia.{format_}"
    assert cdi(host, *GENERATE, "--output", str(path)) == 0
    assert cdi(host, "check", "--spec-dir", str(path.parent)) == 0
    assert capsys.readouterr().out.endswith("\nok\n")


@pytest.mark.parametrize("format_", ["yaml", "json"])
def test_twice_gives_the_same_bytes(cdi: Cdi, capsys: Capture, format_: str) -> None:
    texts = []
    for _ in range(2):
        assert cdi(MIG, *GENERATE, "--format", format_) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert "&id" not in texts[0]


def test_edits_of_a_device_and_of_all(cdi: Cdi, capsys: Capture, simhost: Callable[[str], Path]) -> None:
    document = generated(cdi, capsys, MIG)
    devices = {device["name"]: device["containerEdits"] for device in document["devices"]}
    dev = f"{simhost(MIG)}/dev"
    caps = [
        {
            "path": f"/dev/nvidia-caps/nvidia-cap{number}",
            "hostPath": f"{dev}/nvidia-caps/nvidia-cap{number}",
            "permissions": "rw",
            "fileMode": 0o444,
        }
        for number in (147, 149)
    ]
    gpu = {"path": "/dev/nvidia1", "hostPath": f"{dev}/nvidia1", "permissions": "rw"}
    assert devices["3:1"] == devices["MIG-eefa183d-6954-5226-8fe3-2e6550da3d1e"] == {"deviceNodes": [gpu, *caps]}
    common = document["containerEdits"]
    assert list(common) == ["env", "deviceNodes", "mounts", "hooks"]
    assert common["env"] == ["NVIDIA_VISIBLE_DEVICES=void"]
    names = ["nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset"]
    assert common["deviceNodes"] == [
        {"path": f"/dev/{name}", "hostPath": f"{dev}/{name}", "permissions": "rw"} for name in names
    ]
    everything = {node["path"] for node in devices["all"]["deviceNodes"]}
    assert everything == {node["path"] for edits in devices.values() for node in edits["deviceNodes"]}


def test_mounts_are_those_of_a_container_start(cdi: Cdi, capsys: Capture, simhost: Callable[[str], Path]) -> None:
    """For a container of the host's own family."""
    document = generated(cdi, capsys, A100)
    env = ("--env", "NVIDIA_VISIBLE_DEVICES=all", "--env", "NVIDIA_DRIVER_CAPABILITIES=all")
    assert main(["plan", "--rootfs", str(simhost(A100) / "driver"), *env, "--json"], "/nonexistent") == 0
    edits = json.loads(capsys.readouterr().out)["edits"]
    planned = [
        {
            "hostPath": edit["source"],
            "containerPath": edit["destination"],
            "options": [*edit["options"], "rbind", "rprivate"],
        }
        for edit in edits
        if edit["kind"] == "mount" and edit["source"] != "tmpfs" and not edit["destination"].startswith("/proc/")
    ]
    assert document["containerEdits"]["mounts"] == planned
    (hook,) = document["containerEdits"]["hooks"]
    links = [f"{edit['target']}::{edit['path']}" for edit in edits if edit["kind"] == "symlink"]
    assert [after for word, after in zip(hook["args"], hook["args"][1:], strict=False) if word == "--link"] == links
    assert hook["hookName"] == "createRuntime"
    assert hook["path"] == str(HOOK)
    assert hook["env"] == ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]


def test_kind_and_capabilities(cdi: Cdi, capsys: Capture) -> None:
    words = ("--vendor", "example.org", "--class", "compute", "--capabilities", "utility")
    document = generated(cdi, capsys, A100, *words)
    assert document["kind"] == "example.org/compute"
    assert [node["path"] for node in document["containerEdits"]["deviceNodes"]] == ["/dev/nvidiactl"]
    assert not [item for item in document["containerEdits"]["mounts"] if "libcuda" in item["hostPath"]]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        pytest.param(
            ("--capabilities", "compute,cuda"),
            "request error: unknown capability `cuda`; known are compat32, compute, display, graphics, ngx, utility, "
            "video",
            id="capability",
        ),
        pytest.param(
            ("--vendor", "9x"),
            "cdi error: `9x` is no name of a vendor; letters, digits, `_`, `.` and `-`; a letter is the first",
            id="vendor",
        ),
        pytest.param(
            ("--class", "gpu/x"),
            "cdi error: `gpu/x` is no name of a class; letters, digits, `_`, `.` and `-`; a letter is the first",
            id="class",
        ),
        pytest.param(
            ("--output", "/x/nvidia.yml"),
            "cdi error: `/x/nvidia.yml` is no name for a specification; engines read .yaml and .json alone",
            id="ending",
        ),
        pytest.param(
            ("--output", "/x/nvidia.json", "--format", "yaml"),
            "cdi error: `/x/nvidia.json` is not to be written as yaml; engines go by the ending: leave out --format",
            id="format",
        ),
        pytest.param(
            ("--cdi-version", "0.4.0"),
            "request error: CDI 0.4.0 has no device name that begins with a digit (`0`), which this specification "
            "needs; --device-name-strategy uuid, or --cdi-version 0.5.0",
            id="version",
        ),
        pytest.param(
            ("--hook-path", "/nonexistent"),
            "config error: find the hook `/nonexistent`: no such program; install nvhook, or name the program with "
            "--hook-path",
            id="hook",
        ),
    ],
)
def test_what_cannot_be_generated(cdi: Cdi, capsys: Capture, words: tuple[str, ...], line: str) -> None:
    assert line == refused(cdi, capsys, *GENERATE, *words)


def test_host_without_a_driver(cdi: Cdi, capsys: Capture) -> None:
    assert "the nvidia kernel module is not loaded" in refused(cdi, capsys, *GENERATE, host="no-driver")


def test_nodes_that_not_everybody_may_use(cdi: Cdi, capsys: Capture, copy: Callable[[str], Path]) -> None:
    """The user in the container needs their group, and CDI has a word for that since 0.7.0."""
    host = copy(WORKSTATION)
    for name in ("card1", "renderD129"):
        os.chown(host / f"dev/dri/{name}", 0, 44)
    document = generated(cdi, capsys, host)
    assert document["cdiVersion"] == "0.7.0"
    (edits,) = [device["containerEdits"] for device in document["devices"] if device["name"] == "0"]
    assert edits["additionalGids"] == [44]
    nodes = {node["path"]: (node.get("fileMode"), node.get("gid")) for node in edits["deviceNodes"]}
    assert nodes == {"/dev/nvidia0": (None, None), "/dev/dri/card1": (0o660, 44), "/dev/dri/renderD129": (0o660, 44)}
    assert refused(cdi, capsys, *GENERATE, "--cdi-version", "0.5.0", host=host).endswith(
        "CDI 0.5.0 has no `additionalGids` for nodes that not everybody may use, which this specification needs; "
        "`features.no-additional-gids-for-device-nodes` in config.toml, or --cdi-version 0.7.0"
    )
    assert generated(cdi, capsys, host, "--capabilities", "compute")["cdiVersion"] == "0.5.0"
    assert generated(cdi, capsys, host, "--cdi-version", "1.0.0")["cdiVersion"] == "1.0.0"


def test_groups_are_left_out_where_config_says_so(
    cdi: Cdi, capsys: Capture, copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    host = copy(WORKSTATION)
    os.chown(host / "dev/dri/card1", 0, 44)
    generated(cdi, capsys, host)
    path = Path(os.environ["NVHOOK_CONFIG"])
    path.write_text(f"features.no-additional-gids-for-device-nodes = true\n{path.read_text()}")
    monkeypatch.setenv("NVHOOK_CONFIG", str(path))
    assert main(["cdi", *GENERATE, "--cdi-version", "0.5.0"], "/nonexistent") == 0
    assert "additionalGids" not in capsys.readouterr().out


EDITS: dict[str, Any] = {"env": ["A=B"]}


@pytest.mark.parametrize(
    ("document", "version"),
    [
        pytest.param({"devices": [{"name": "gpu0", "containerEdits": EDITS}]}, "0.3.0", id="base"),
        pytest.param({"devices": [{"name": "0", "containerEdits": EDITS}]}, "0.5.0", id="digit"),
        pytest.param({"containerEdits": {"mounts": [{"type": "tmpfs"}]}}, "0.4.0", id="mount-type"),
        pytest.param({"containerEdits": {"deviceNodes": [{"hostPath": "/x"}]}}, "0.5.0", id="host-path"),
        pytest.param({"annotations": {"a": "b"}}, "0.6.0", id="annotations"),
        pytest.param(
            {"devices": [{"name": "a", "annotations": {}, "containerEdits": EDITS}]}, "0.6.0", id="device-annotations"
        ),
        pytest.param({"kind": "a/b.c"}, "0.6.0", id="dot-in-class"),
        pytest.param({"kind": "a.b/c"}, "0.3.0", id="dot-in-vendor"),
        pytest.param({"containerEdits": {"additionalGids": [1]}}, "0.7.0", id="groups"),
        pytest.param({"containerEdits": {"intelRdt": {}}}, "0.7.0", id="rdt"),
        pytest.param({"devices": [{"name": "0", "containerEdits": {"netDevices": []}}]}, "1.1.0", id="net-devices"),
    ],
)
def test_version_that_is_needed(document: dict[str, Any], version: str) -> None:
    assert version == cdispec.needs({"kind": "a/b", "devices": [], **document})[0]


def test_output_is_for_all_to_read_and_replaced_at_once(cdi: Cdi, capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "new/cdi/nvidia.yaml"
    assert cdi(A100, *GENERATE, "--output", str(path)) == 0
    assert capsys.readouterr().out == f"{path}: 5 devices nvidia.com/gpu, CDI 0.5.0\n"
    assert path.stat().st_mode & 0o777 == 0o644
    assert path.parent.stat().st_mode & 0o777 == 0o755
    with path.open() as before:
        assert cdi(MIG, *GENERATE, "--output", str(path)) == 0
        assert "MIG-" not in before.read()
    assert "MIG-" in path.read_text()
    assert list(path.parent.iterdir()) == [path]


def test_output_that_cannot_be_written(cdi: Cdi, capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "cdi/nvidia.yaml"
    path.mkdir(parents=True)
    assert refused(cdi, capsys, *GENERATE, "--output", str(path)) == f"config error: write `{path}`: is a directory"
    assert list(path.parent.iterdir()) == [path]


def test_files_with_a_content_of_their_own_are_there(cdi: Cdi, capsys: Capture) -> None:
    """NixOS: what a container gets in the place of a file that names the store has to exist for the engine."""
    document = generated(cdi, capsys, NIXOS)
    ours = [item["hostPath"] for item in document["containerEdits"]["mounts"] if "/state/files/" in item["hostPath"]]
    assert ours
    assert all(map(os.path.isfile, ours))


def test_file_that_has_gone_since_the_inventory_was_made(
    cdi: Cdi, capsys: Capture, copy: Callable[[str], Path]
) -> None:
    host = copy(A100)
    before = generated(cdi, capsys, host)["containerEdits"]["mounts"]
    gone = host / "driver/usr/bin/nvidia-debugdump"
    gone.unlink()
    assert main(["cdi", *GENERATE], "/nonexistent") == 0  # with the same config.toml, which the inventory goes by
    after = yaml.safe_load(capsys.readouterr().out)["containerEdits"]["mounts"]
    assert after == [mount for mount in before if mount["hostPath"] != str(gone)] != before


# list


def write(path: Path, *names: str, kind: str = "nvidia.com/gpu") -> Path:
    path.parent.mkdir(exist_ok=True)
    devices = [{"name": name, "containerEdits": EDITS} for name in names]
    path.write_text(json.dumps({"cdiVersion": "0.5.0", "kind": kind, "devices": devices}))
    return path


def test_list_by_file_with_conflicts(cdi: Cdi, capsys: Capture, tmp_path: Path) -> None:
    static, dynamic = tmp_path / "static", tmp_path / "dynamic"
    write(static / "a.json", "0", "1", "all")
    write(static / "b.yaml", "all")
    write(static / "ignored.txt", "2")
    write(dynamic / "a.json", "1")
    write(dynamic / "other.json", "all", kind="example.org/gpu")
    (dynamic / "broken.json").write_text("{")
    words = ("list", "--spec-dir", str(static), "--spec-dir", str(dynamic))
    assert cdi(A100, *words) == 0
    shown = capsys.readouterr()
    assert shown.out.replace(str(tmp_path), "").splitlines() == [
        "/static/a.json",
        "  nvidia.com/gpu=0",
        "  nvidia.com/gpu=1    overridden by /dynamic/a.json",
        "  nvidia.com/gpu=all  conflicts with /static/b.yaml",
        "/static/b.yaml",
        "  nvidia.com/gpu=all  conflicts with /static/a.json",
        "/dynamic/a.json",
        "  nvidia.com/gpu=1",
        "/dynamic/other.json",
        "  example.org/gpu=all",
    ]
    assert shown.err.startswith(f"nvhook: warning: `{dynamic}/broken.json`: is not JSON: ")
    assert cdi(A100, *words, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert {"name": "nvidia.com/gpu=0", "file": f"{static}/a.json", "state": "usable"} == document["devices"][0]
    assert document["devices"][1]["other_file"] == f"{dynamic}/a.json"
    assert [item["state"] for item in document["devices"]] == [
        *("usable", "overridden", "conflict", "conflict", "usable", "usable")
    ]
    assert [item["file"] for item in document["faults"]] == [f"{dynamic}/broken.json"]


def test_list_of_nothing(cdi: Cdi, capsys: Capture, tmp_path: Path) -> None:
    assert cdi(A100, "list", "--spec-dir", str(tmp_path / "nowhere")) == 0
    assert capsys.readouterr().out == f"No CDI device in {tmp_path}/nowhere.\n"


def test_list_of_a_file(cdi: Cdi, capsys: Capture, tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", "0")
    line = refused(cdi, capsys, "list", "--spec-dir", str(path))
    assert line == f"cdi error: read `{path}`: not a directory; check what it is and who may read it"


def test_later_file_of_a_conflict_is_of_no_use_either() -> None:
    """As engines have it: what is twice in one directory is gone, also where another one overrides it."""
    files = []
    for path, rank in (("/etc/a", 0), ("/etc/b", 0), ("/run/a", 1)):
        file = cdifiles.SpecFile.__new__(cdifiles.SpecFile)
        file.path, file.rank, file.document = path, rank, {"kind": "v/c", "devices": [{"name": "0"}]}
        files.append(file)
    assert [(item.state, item.other) for item in cdifiles.devices(files)] == [
        ("conflict", "/etc/b"),
        ("conflict", "/etc/a"),
        ("conflict", "/etc/b"),
    ]


# check


Checked = Callable[[], list[str]]


@pytest.fixture
def checked(cdi: Cdi, capsys: Capture, copy: Callable[[str], Path], tmp_path: Path) -> Checked:
    """The lines of `check` for what is in tmp_path/cdi, which begins with a good nvidia.yaml of tmp_path/host."""
    host = copy(A100)
    assert cdi(host, *GENERATE, "--output", f"{tmp_path}/cdi/nvidia.yaml") == 0
    capsys.readouterr()
    check = checker(cdi, capsys, host, tmp_path)
    assert check() == ["ok"]
    return check


@pytest.fixture
def checked_files(cdi: Cdi, capsys: Capture, tmp_path: Path) -> Checked:
    """The same where the host makes no difference."""
    write(tmp_path / "cdi/good.json", "0")
    return checker(cdi, capsys, A100, tmp_path)


def checker(cdi: Cdi, capsys: Capture, host: str | Path, place: Path) -> Checked:
    def check() -> list[str]:
        before = time.monotonic()
        status = cdi(host, "check", "--spec-dir", f"{place}/cdi")
        assert time.monotonic() - before < 30
        shown = capsys.readouterr()
        assert shown.err == ""
        lines = shown.out.replace(str(place), "").splitlines()
        assert status == (0 if lines == ["ok"] else 1)
        assert all(line.isprintable() for line in lines)
        return lines

    return check


AGAIN = "generate it again with `nvhook cdi generate --output /cdi/nvidia.yaml`"


def change(path: Path, edit: Callable[[Any], object]) -> None:
    document = yaml.safe_load(path.read_text())
    edit(document)
    path.write_text(yaml.safe_dump(document, sort_keys=False))


def test_check_finds_what_is_gone(checked: Checked, tmp_path: Path) -> None:
    host = tmp_path / "host"
    (host / "dev/nvidia-uvm").unlink()
    (host / "dev/nvidia0").unlink()
    (host / "dev/nvidia0").write_text("")
    (host / "driver/usr/bin/nvidia-smi").unlink()
    change(tmp_path / "cdi/nvidia.yaml", lambda document: document["containerEdits"]["hooks"][0].update(path="/gone"))
    assert checked() == [
        f"/cdi/nvidia.yaml: device node `/host/dev/nvidia-uvm`: no such file or directory; {AGAIN}",
        f"/cdi/nvidia.yaml: mounts `/host/driver/usr/bin/nvidia-smi`: no such file or directory; {AGAIN}",
        f"/cdi/nvidia.yaml: runs the hook `/gone`: no such file or directory; {AGAIN}",
        f"/cdi/nvidia.yaml: device node `/host/dev/nvidia0`: is another kind of file; {AGAIN}",
    ]


def test_check_finds_a_driver_that_has_changed(checked: Checked, tmp_path: Path) -> None:
    version = tmp_path / "host/proc/driver/nvidia/version"
    version.write_text(version.read_text().replace("550.163.01", "575.57.08"))
    what = "is of driver 550.163.01, and the loaded kernel module is of 575.57.08"
    assert checked() == [f"/cdi/nvidia.yaml: {what}; {AGAIN}"]


def test_check_finds_gpus_that_were_changed(checked: Checked, tmp_path: Path) -> None:
    information = next((tmp_path / "host/proc/driver/nvidia/gpus").glob("*/information"))
    text = information.read_text()
    uuid = text.partition("GPU UUID:")[2].split()[0]
    information.write_text(text.replace(uuid, "GPU-11111111-1111-1111-1111-111111111111"))
    assert checked() == [
        f"/cdi/nvidia.yaml: has a device `{uuid}`, and this host has none; {AGAIN}",
        f"/cdi/nvidia.yaml: has no device `GPU-11111111-1111-1111-1111-111111111111`, and this host has one; {AGAIN}",
    ]


def test_check_finds_another_mig_layout(cdi: Cdi, capsys: Capture, copy: Callable[[str], Path], tmp_path: Path) -> None:
    """The nodes of capabilities that are gone may still be in /dev."""
    host = copy(MIG)
    assert cdi(host, *GENERATE, "--output", f"{tmp_path}/cdi/nvidia.yaml") == 0
    capsys.readouterr()
    check = checker(cdi, capsys, host, tmp_path)
    assert check() == ["ok"]
    change(tmp_path / "cdi/nvidia.yaml", lambda document: document["devices"][-2].update(name="MIG-1"))
    assert check() == [
        f"/cdi/nvidia.yaml: has a device `MIG-1`, and this host has none; {AGAIN}",
        f"/cdi/nvidia.yaml: has no device `MIG-804a9e0f-fd06-506a-a63a-6a10a87f3733`, and this host has one; {AGAIN}",
    ]


def test_check_finds_many_faults_in_few_lines(checked: Checked, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "host/driver/usr/lib/x86_64-linux-gnu")
    lines = checked()
    assert len(lines) == 21
    assert lines[-1].endswith(f" more faults; {AGAIN}")


def test_check_finds_numbers_of_another_boot(checked: Checked, tmp_path: Path) -> None:
    def record(document: Any) -> None:
        node = document["containerEdits"]["deviceNodes"][1]
        assert node["path"] == "/dev/nvidia-uvm"
        node["major"] = 236
        node["type"] = "c"

    change(tmp_path / "cdi/nvidia.yaml", record)
    major = os.major((tmp_path / "host/dev/nvidia-uvm").stat().st_rdev)
    what = f"device node `/host/dev/nvidia-uvm`: its major is {major} now, and 236 in the file"
    assert checked() == [f"/cdi/nvidia.yaml: {what}; {AGAIN}"]


def test_check_finds_names_that_are_there_twice(checked: Checked, tmp_path: Path) -> None:
    write(tmp_path / "cdi/a.json", "0", "all")
    what = "`/cdi/nvidia.yaml` has `nvidia.com/gpu=0` and 1 more as well, and engines take neither"
    assert checked() == [f"/cdi/a.json: {what}; remove one of the two"]


def test_check_finds_what_is_overridden(cdi: Cdi, capsys: Capture, tmp_path: Path) -> None:
    one, other = write(tmp_path / "one/a.json", "0"), write(tmp_path / "other/a.json", "0")
    assert cdi(A100, "check", "--spec-dir", str(one.parent), "--spec-dir", str(other.parent)) == 1
    assert capsys.readouterr().out == (
        f"{one}: `{other}` overrides `nvidia.com/gpu=0`; remove the one that is not up to date\n"
    )


def test_check_of_nothing_and_json(cdi: Cdi, capsys: Capture, tmp_path: Path) -> None:
    assert cdi(A100, "check", "--spec-dir", str(tmp_path / "cdi"), "--json") == 1
    assert json.loads(capsys.readouterr().out) == {
        "findings": [
            {
                "file": f"{tmp_path}/cdi",
                "fault": f"no CDI specification: no `{tmp_path}/cdi/*.yaml`",
                "remedy": f"make one with `nvhook cdi generate --output {tmp_path}/cdi/nvidia.yaml`",
            }
        ]
    }


@pytest.mark.parametrize(
    ("act", "line"),
    [
        pytest.param(
            lambda cdi: (cdi / "good.json").chmod(0o646),
            "/cdi/good.json: others than root can write it, and say what is mounted into containers; run "
            "`chown root: /cdi/good.json` and `chmod 644 /cdi/good.json`",
            id="file",
        ),
        pytest.param(
            lambda cdi: os.chown(cdi / "good.json", 1000, 0),
            "/cdi/good.json: others than root can write it, and say what is mounted into containers; run "
            "`chown root: /cdi/good.json` and `chmod 644 /cdi/good.json`",
            id="owner",
        ),
        pytest.param(
            lambda cdi: (cdi / "good.json").chmod(0o600),
            "/cdi/good.json: rootless engines cannot read it; run `chmod 644 /cdi/good.json`",
            id="root-alone",
        ),
        pytest.param(
            lambda cdi: cdi.chmod(0o777),
            "/cdi: others than root can write there, and say what is mounted into containers; run `chown root: /cdi` "
            "and `chmod 755 /cdi`",
            id="directory",
        ),
        pytest.param(
            lambda cdi: (cdi / "amd.yml").write_text(""),
            "/cdi/amd.yml: engines read .yaml and .json alone; rename it to `/cdi/amd.yaml`",
            id="ending",
        ),
    ],
)
def test_check_finds_permissions_and_names(
    checked_files: Checked, tmp_path: Path, act: Callable[[Path], object], line: str
) -> None:
    act(tmp_path / "cdi")
    assert checked_files() == [line]


CORRECT = "correct it, or generate the file again"
HEAD = "cdiVersion: 0.5.0\nkind: a.b/c\n"
DEVICE = "devices: [{name: x, containerEdits: {env: [A=B]}}]\n"
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(12)
)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        pytest.param("x.yaml", BOMB, "has a YAML alias at line 2; write out what it stands for", id="bomb"),
        pytest.param(
            "x.yaml",
            HEAD + "devices: " + "[" * 200,
            "is nested too deeply at line 3; generate it again",
            id="deep-yaml",
        ),
        pytest.param("x.json", "[" * 200000, "is nested too deeply; generate it again", id="deep-json"),
        pytest.param(
            "x.yaml", HEAD + "devices: !!python/name:os.system ''\n", "has a YAML tag at line 3; take it out", id="tag"
        ),
        pytest.param(
            "x.yaml", HEAD + "devices: !!timestamp x\n", "has a YAML tag at line 3; take it out", id="timestamp"
        ),
        pytest.param(
            "x.yaml",
            f"a: {'9' * 3000}\n",
            "has a value of more than 2048 characters at line 1; take it out",
            id="number-without-end",
        ),
        pytest.param(
            "x.yaml",
            "x" * (1 << 19) + "y",
            "is larger than 512 KiB; this is no CDI specification; take it away",
            id="huge",
        ),
        pytest.param("x.yaml", b"\xff", "is not UTF-8 at byte 0; generate it again", id="not-utf-8"),
        pytest.param("x.yaml", "", "the file: None is not of type 'object'; " + CORRECT, id="empty"),
        pytest.param(
            "x.yaml",
            "a: b: c\n",
            "is not YAML: mapping values are not allowed in this context at line 1; generate it again",
            id="no-yaml",
        ),
        pytest.param(
            "x.yaml",
            "~: 1\na: 2\n",
            "has the key `None`, which is no string; write it in quotes, or take it out",
            id="no-key",
        ),
        pytest.param(
            "x.yaml", "a: 2001-99-99\n", "is not YAML: month must be in 1..12; generate it again", id="no-date"
        ),
        pytest.param(
            "x.yaml",
            HEAD + "device: []\n" + DEVICE,
            "the file: Additional properties are not allowed ('device' was unexpected); " + CORRECT,
            id="unknown-field",
        ),
        pytest.param(
            "x.yaml",
            HEAD + "devices: []\n",
            "`devices`: [] is too short; " + CORRECT,
            id="no-device",
        ),
        pytest.param(
            "x.yaml",
            HEAD + "devices: [{name: x, containerEdits: {}}]\n",
            "`devices[0].containerEdits`: {} does not have enough properties; " + CORRECT,
            id="empty-device",
        ),
        pytest.param(
            "x.yaml",
            HEAD + 'devices: [{name: "\\e[31m", containerEdits: {env: [A=B]}}]\n',
            "`devices[0].name`: '\\x1b[31m' does not match '^[A-Za-z0-9]([A-Za-z0-9_.:-]*[A-Za-z0-9])?$'; " + CORRECT,
            id="terminal",
        ),
        pytest.param(
            "x.yaml",
            HEAD + DEVICE.replace("}}]", "}}, {name: x, containerEdits: {env: [A=B]}}]"),
            "device `x` is there 2 times; leave one of them",
            id="same-name",
        ),
        pytest.param(
            "x.yaml",
            HEAD + DEVICE + "containerEdits: {additionalGids: [1]}\n",
            "cdiVersion 0.5.0 has no `additionalGids` for nodes that not everybody may use; write 0.7.0 there, if the "
            "engine knows it",
            id="version",
        ),
    ],
)
def test_check_says_why_a_file_is_none(
    checked_files: Checked, tmp_path: Path, name: str, content: str | bytes, what: str
) -> None:
    path = tmp_path / "cdi" / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert checked_files() == [f"/cdi/{name}: {what}"]


@pytest.mark.parametrize(
    ("make", "what"),
    [
        pytest.param(os.mkfifo, "is not a regular file; take it away", id="fifo"),
        pytest.param(
            lambda path: os.symlink("/nowhere", path), "is a link that leads nowhere; take it away", id="dangling"
        ),
        pytest.param(lambda path: os.symlink("/dev/zero", path), "is not a regular file; take it away", id="device"),
        pytest.param(
            os.mkdir, "is a directory, and engines do not look into it; take it away, or rename it", id="directory"
        ),
    ],
)
def test_check_says_what_is_no_file(
    checked_files: Checked, tmp_path: Path, make: Callable[[Path], object], what: str
) -> None:
    make(tmp_path / "cdi/x.yaml")
    assert checked_files() == [f"/cdi/x.yaml: {what}"]


def test_many_devices_take_no_time(checked_files: Checked, tmp_path: Path) -> None:
    """As many as a file may hold."""
    devices = [f"{{name: x{number}, containerEdits: {{env: [A=]}}}}" for number in range(9000)]
    (tmp_path / "cdi/x.yaml").write_text(f"{HEAD}devices: [{', '.join(devices)}]\n")
    assert checked_files() == ["ok"]


def test_capabilities_of_config(cdi: Cdi, capsys: Capture) -> None:
    assert set(config.CAPABILITIES) == set(
        generated(cdi, capsys, A100)["containerEdits"]["hooks"][0]["args"][3].split(",")
    )


# docs/cdi.md


def test_page(simhost: Callable[[str], Path], tmp_path: Path) -> None:
    place = simhost(A100)
    settings = configure(place, tmp_path / "config.toml", tmp_path / "state")
    own_dev = tmp_path / "own-dev.toml"  # as on a host whose nodes are in /dev
    own_dev.write_text(settings.read_text().replace(f'dev-root = "{place}"', 'dev-root = "/"'))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvidia-container-runtime-hook").symlink_to(HOOK)
    (tmp_path / "bin/nvhook").write_text(
        f"#!/bin/sh\n"
        f'case $2 in list | check) set -- "$@" --spec-dir {tmp_path}/etc --spec-dir {tmp_path}/run ;; esac\n'
        f'exec {REPOSITORY}/scripts/nvhook "$@"\n'
    )
    (tmp_path / "bin/nvhook").chmod(0o755)
    env = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "NVHOOK_CONFIG": str(settings)}
    substitutions = [
        ("/var/run/cdi", f"{tmp_path}/run"),
        ("/etc/cdi", f"{tmp_path}/etc"),
        ("/usr/local/bin", f"{tmp_path}/bin"),
        ("/etc/nvidia-container-runtime", str(tmp_path)),
        ("", f"{place}/driver"),
    ]
    first, text, faults = docpages.blocks(REPOSITORY / "docs/cdi.md")
    assert first == docpages.play(first, substitutions, env)
    assert text == docpages.play(text, substitutions, {**env, "NVHOOK_CONFIG": str(own_dev)})
    old = write(tmp_path / "etc/nvidia.json", "0", "all")
    mount = {"hostPath": "/usr/lib64/libcuda.so.535.247.01", "containerPath": "/usr/lib64/libcuda.so.535.247.01"}
    change(old, lambda document: document.update(containerEdits={"mounts": [mount]}))
    old.write_text(json.dumps(yaml.safe_load(old.read_text())))
    assert faults == docpages.play(faults, substitutions, env)
