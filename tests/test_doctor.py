# SPDX-License-Identifier: Apache-2.0
"""`nvhook doctor`: a host in order, one without a GPU, what is read of engines and of CDI, and bad input.

The troubles that users report are in test_troubles.py.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import containers
import docpages
from nvhook.commands.configure.engines import ENGINES
from nvhook.commands.doctor import checks_engines, findings
from nvhook.commands.doctor import command as doctor
from nvhook.commands.hostview import HostView
from nvhook.driver import inventory
from nvhook.request import config as configuration
from patients import Patient
from simhost import description

pytestmark = pytest.mark.root

SCRIPT = containers.REPOSITORY / "scripts/nvhook"
OURS = "/usr/bin/nvidia-container-runtime"


@pytest.fixture
def patient(simhost: Callable[[str], Path], tmp_path: Path) -> Patient:
    return Patient(simhost("h200"), tmp_path / "host")


def not_ok(found: list[dict[str, str]]) -> list[tuple[str, str]]:
    return [(item["check"], item["status"]) for item in found if item["status"] != "ok"]


# The whole of it


def test_host_in_order(patient: Patient) -> None:
    patient.docker()
    with patient.answering({"CgroupDriver": "systemd", "CgroupVersion": "2", "Runtimes": {"nvidia": {}, "runc": {}}}):
        status, found = patient.doctor()
    assert (status, not_ok(found)) == (0, [])
    assert {item["check"] for item in found} == {name for name, _ in doctor.CHECKS} - {"char-links", "hooks", "cdi"}
    assert all(set(item) == {"check", "status", "object", "reason", "remedy"} for item in found)
    assert [item["remedy"] for item in found if item["remedy"]] == []


def test_every_check_has_a_name_of_its_own() -> None:
    names = [name for name, _ in doctor.CHECKS]
    assert len(set(names)) == len(names)
    assert len({check for _, check in doctor.CHECKS}) == len(names)


def test_exit_status_of_warnings_alone(patient: Patient) -> None:
    patient.config.write_text(f"no-such-key = 1\n{patient.config.read_text()}")
    status, found = patient.doctor()
    assert (status, not_ok(found)) == (3, [("config", "warning")])


def test_for_people_each_finding_is_a_line_and_each_remedy_too(patient: Patient) -> None:
    patient.config.write_text(f"no-such-key = 1\n{patient.config.read_text()}")
    status, output, errors = patient.run("doctor", "--no-container", "--root", str(patient.root))
    assert (status, errors) == (3, "")
    lines = output.splitlines()
    place = next(index for index, line in enumerate(lines) if line.startswith(f"warning  {patient.config}:1: "))
    assert lines[place + 1] == "         remedy: check its spelling, or take it out"
    assert lines[0] == "ok       kernel module: nvidia 580.159.04 is loaded"
    assert lines[-1].startswith("0 failed, 1 warning, ")
    assert "\033" not in output


@pytest.mark.parametrize(
    ("terminal", "no_colour", "coloured"), [(True, "", True), (True, "1", False), (False, "", False)]
)
def test_colours_are_for_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    terminal: bool,
    no_colour: str,
    coloured: bool,
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("NO_COLOR", no_colour)
    findings.show([findings.failure("x", "a\033[31mb", "rm x")])
    output = capsys.readouterr().out
    assert ("\033[31mfailure \033[0m x: " in output) == coloured
    assert ("\033" in output) == coloured
    assert "a\\x1b[31mb" in output


def test_host_without_a_gpu_is_one_finding(simhost: Callable[[str], Path], tmp_path: Path) -> None:
    patient = Patient(simhost("no-driver"), tmp_path / "host")
    patient.docker("{}")
    status, found = patient.doctor()
    assert status == 0
    assert [item["reason"] for item in found] == [
        "this host has no GPU of NVIDIA's: none on the PCI bus, and no driver"
    ]


def test_host_without_a_gpu_and_with_a_fault(simhost: Callable[[str], Path], tmp_path: Path) -> None:
    patient = Patient(simhost("no-driver"), tmp_path / "host")
    patient.docker("{")
    status, found = patient.doctor()
    assert (status, not_ok(found)) == (1, [("engines", "failure")])


def test_report_holds_the_findings_and_the_host(patient: Patient, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    patient.write("proc/sys/kernel/hostname", "gpu-server-7\n")
    patient.write("driver/etc/cdi/gpu-server-7.json", "{")
    status, found = patient.doctor("--mask", "--report", str(report))
    document = json.loads(report.read_text())
    assert status == 1
    assert document["findings"] == found
    assert [item["object"] for item in found if item["check"] == "cdi"] == ["/etc/cdi/host.json"]
    description.check(document["host"], "host")
    assert document["host"]["gpus"][0]["uuid"] == "GPU-00000000-0000-0000-0000-000000000001"
    assert patient.run("doctor", "--no-container", "--report", str(report))[2].endswith("it exists; name a new file\n")


# The host's own


@pytest.mark.parametrize(
    ("mode", "status"), [pytest.param(0o755, "ok", id="root-alone"), pytest.param(0o777, "failure", id="anybody")]
)
def test_state_directory_is_for_root_alone(patient: Patient, mode: int, status: str) -> None:
    (patient.host / "run").mkdir()
    (patient.host / "run").chmod(mode)
    (found,) = [item for item in patient.doctor()[1] if item["check"] == "state-dir"]
    assert found["status"] == status


def test_inventory_is_held_against_the_host(patient: Patient) -> None:
    config = configuration.load(str(patient.config))
    time.sleep(0.05)  # what was changed a moment ago is looked into again
    inventory.load(config, "580.159.04", [])

    def reason() -> str:
        return next(item["reason"] for item in patient.doctor()[1] if item["check"] == "state-dir")

    assert reason() == "keeps a good inventory of 580.159.04"
    patient.write("proc/sys/kernel/random/boot_id", "another\n")
    assert reason() == "keeps an inventory of what was here before; the next start makes it again"


def test_low_level_runtime_is_missing(patient: Patient) -> None:
    (patient.root / "usr/bin/runc").unlink()
    assert patient.finding("runtime")["reason"] == "none of runc is there"


def test_programs_of_nvidia_come_first(patient: Patient) -> None:
    patient.theirs("usr/local/bin/nvidia-container-runtime")
    patient.write("driver/var/lib/dpkg/status", "")
    found = patient.finding("programs")
    assert found["reason"] == f"/usr/local/bin/nvidia-container-runtime is NVIDIA's, and comes before ours, {OURS}"
    assert found["remedy"] == "apt-get remove nvidia-container-toolkit nvidia-container-toolkit-base"


def test_hook_whose_program_is_gone(patient: Patient) -> None:
    text = '{"hook": {"path": "/usr/local/bin/nvidia-container-runtime-hook"}, "stages": ["prestart"]}'
    patient.write("driver/usr/share/containers/oci/hooks.d/nvhook.json", text)
    assert "no container starts" in patient.finding("hooks")["reason"]


def test_hook_that_is_there_twice(patient: Patient) -> None:
    text = '{"hook": {"path": "/usr/bin/nvidia-container-runtime-hook"}, "stages": ["prestart"]}'
    for place in ("usr/share", "etc"):
        patient.write(f"driver/{place}/containers/oci/hooks.d/nvhook.json", text)
    assert patient.finding("hooks")["remedy"] == "rm /etc/containers/oci/hooks.d/nvhook.json"


def test_gpu_that_nvml_does_not_see(patient: Patient) -> None:
    (patient.host / "dev/nvidia0").unlink()
    assert "fallen off the bus" in patient.finding("nvml")["reason"]


def on_the_bus(patient: Patient, address: str, driver: str) -> None:
    place = f"sys/bus/pci/devices/{address}"
    patient.write(f"{place}/vendor", "0x10de\n")
    patient.write(f"{place}/class", "0x030200\n")
    if driver:
        (patient.host / place / "driver").symlink_to(f"../../../bus/pci/drivers/{driver}")


@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        pytest.param("", ["GPU 0000:00:07.0"], id="no-driver"),
        pytest.param("nvidia", ["GPU 0000:00:07.0"], id="nvidia"),
        pytest.param("vfio-pci", [], id="given-to-a-virtual-machine"),
    ],
)
def test_gpu_on_the_bus_that_the_driver_does_not_use(patient: Patient, driver: str, expected: list[str]) -> None:
    on_the_bus(patient, "0000:00:06.0", "nvidia")
    on_the_bus(patient, "0000:00:07.0", driver)
    found = [item["object"] for item in patient.doctor()[1] if item["check"] == "gpus" and item["status"] == "warning"]
    assert found == expected


def test_every_gpu_is_given_to_virtual_machines(patient: Patient) -> None:
    shutil.rmtree(patient.host / "proc/driver")
    on_the_bus(patient, "0000:00:06.0", "vfio-pci")
    assert patient.finding("module")["reason"] == "vfio-pci has every GPU, for virtual machines"


# Engines


CONTAINERD = """\
version = 2
imports = ["/etc/containerd/conf.d/*.toml"]
[plugins."io.containerd.grpc.v1.cri".containerd]
default_runtime_name = "runc"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
SystemdCgroup = true
"""
DROP_IN = """\
version = 2
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.nvidia.options]
BinaryName = "/usr/bin/nvidia-container-runtime"
SystemdCgroup = {systemd}
"""
FILES = [
    pytest.param("etc/docker/daemon.json", '{"runtimes": {"nvidia": {"path": "%s"}}}', id="docker"),
    pytest.param(
        "etc/crio/crio.conf.d/99-nvhook.conf", '[crio.runtime.runtimes.nvidia]\nruntime_path = "%s"\n', id="crio"
    ),
    pytest.param(
        "etc/containers/containers.conf.d/99-nvhook.conf", '[engine.runtimes]\nnvidia = ["%s"]\n', id="podman"
    ),
]


@pytest.mark.parametrize(("name", "text"), FILES)
def test_engine_that_is_registered(patient: Patient, name: str, text: str) -> None:
    for sign in ("etc/crio", "etc/docker"):
        (patient.root / sign).mkdir(parents=True)
    patient.program("usr/bin/podman", "#!/bin/sh\n")
    patient.write(f"driver/{name}", text % OURS)
    found = [item["reason"] for item in patient.doctor()[1] if item["check"] == "engines" and item["status"] == "ok"]
    assert found == [f"has the runtime nvidia, {OURS}"]


@pytest.mark.parametrize(("name", "text"), FILES)
def test_engine_whose_runtime_is_gone(patient: Patient, name: str, text: str) -> None:
    (patient.root / "etc/crio").mkdir(parents=True)
    patient.program("usr/bin/podman", "#!/bin/sh\n")
    patient.write(f"driver/{name}", text % "/usr/local/bin/nvidia-container-runtime")
    failures = [item for item in patient.doctor()[1] if item["status"] == "failure"]
    assert [item["reason"] for item in failures] == [
        "has the runtime nvidia, and `/usr/local/bin/nvidia-container-runtime` is not there"
    ]


@pytest.mark.parametrize(("systemd", "status"), [("true", 0), ("false", 1)])
def test_containerd_has_one_cgroup_driver(patient: Patient, systemd: str, status: int) -> None:
    patient.write("driver/etc/containerd/config.toml", CONTAINERD)
    patient.write("driver/etc/containerd/conf.d/nvhook.toml", DROP_IN.format(systemd=systemd))
    assert patient.doctor()[0] == status
    if status:
        assert patient.finding("engines")["reason"] == "SystemdCgroup is False for nvidia and True for runc"


def test_files_of_engines_are_those_that_configure_writes(patient: Patient) -> None:
    """What `configure` has written, `doctor` reads."""
    for name, engine in ENGINES.items():
        host = HostView(configuration.load(str(patient.config)), str(patient.config), str(patient.root))
        place = patient.root / engine.default_file.lstrip("/")
        words = ["--config-file", str(place), "--runtime-path", str(containers.WRAPPER)]
        place.parent.mkdir(parents=True, exist_ok=True)
        assert patient.run("configure", name, *words)[0] == 0
        if name == "containerd" and (place.parent / "conf.d").exists():
            text = place.read_text()
            place.write_text(text.replace(str(patient.root), ""))
        assert checks_engines.read(host, engine).ours() == {"nvidia": str(containers.WRAPPER)}, name


def test_dockerd_that_has_not_read_its_file(patient: Patient) -> None:
    patient.docker()
    with patient.answering({"Runtimes": {"runc": {}}}):
        found = patient.finding("dockerd")
    assert (found["reason"], found["remedy"]) == (
        "does not know the runtime nvidia yet, which its file names",
        "systemctl restart docker",
    )


@pytest.mark.parametrize(
    "answer", [b"", b"[]", b"{", b"[" * 100_000, b"\xff\0", b"HTTP", b'{"Runtimes": 1, "CgroupDriver": []}']
)
def test_answer_of_dockerd_that_is_none(patient: Patient, answer: bytes) -> None:
    patient.docker()
    with patient.answering(answer):
        assert len(patient.finding("dockerd")["reason"]) < 700


def test_process_that_only_calls_itself_dockerd_is_not_asked(patient: Patient) -> None:
    """A container's processes are in /proc too, and a remedy is copied into root's shell."""
    patient.docker()
    patient.write("proc/815/comm", "dockerd\n")
    patient.write("proc/815/environ", "PATH=/;reboot\0")
    with patient.answering({"Runtimes": {"nvidia": {}}}):
        assert patient.doctor()[0] == 0
        patient.write("driver/run/docker.pid", "../815")
        assert [item["reason"] for item in patient.doctor()[1] if item["check"] == "dockerd"] == ["does not run"]


def test_remedy_quotes_what_it_names(patient: Patient) -> None:
    patient.write("driver/etc/cdi/a;reboot.json", "{")
    assert patient.finding("cdi")["remedy"] == "nvhook cdi generate --output '/etc/cdi/a;reboot.json'"


def test_config_that_is_named_and_not_there(patient: Patient) -> None:
    patient.config.unlink()
    status, output, errors = patient.run("doctor", "--root", str(patient.root))
    assert (status, output) == (1, "")
    assert errors == f"nvhook: config error: read `{patient.config}`: no such file\n"


@pytest.mark.parametrize("sign", ["driver/etc/nv_tegra_release", "sys/devices/soc0/family"])
def test_tegra(patient: Patient, sign: str) -> None:
    """By the signs for which a start is refused."""
    shutil.rmtree(patient.host / "proc/driver")
    patient.write(sign, "tegra234\n")
    found = patient.finding("module")
    assert found["status"] == "failure"
    assert found["reason"] == "this is a Tegra, whose integrated GPU has another driver"


def test_socket_where_nobody_listens(patient: Patient) -> None:
    patient.docker()
    (patient.root / "run").mkdir(exist_ok=True)
    held = os.open(patient.root / "run", os.O_PATH)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{held}/docker.sock")
    os.close(held)
    assert patient.finding("dockerd")["reason"] == "does not answer: connection refused"


# Bad input


BAD = [
    pytest.param("driver/etc/docker/daemon.json", "engines", id="daemon.json"),
    pytest.param("driver/etc/containerd/config.toml", "engines", id="containerd"),
    pytest.param("driver/etc/crio/crio.conf", "engines", id="crio"),
    pytest.param("driver/etc/cdi/nvidia.yaml", "cdi", id="cdi"),
    pytest.param("driver/etc/cdi/nvidia.json", "cdi", id="cdi-json"),
    pytest.param("config.toml", "config", id="config.toml"),
]
_LEVELS = [f"{new}: &{new} [*{old}, *{old}]\n" for old, new in itertools.pairwise("abcdefghijklmnopqrstuvwx")]
BOMB = "a: &a [x, x]\n" + "".join(_LEVELS)


@pytest.mark.parametrize(("name", "check"), BAD)
def test_file_that_is_a_pipe(patient: Patient, name: str, check: str) -> None:
    path = patient.write(name, "")
    path.unlink()
    os.mkfifo(path)
    found = patient.finding(check) if name != "config.toml" else _defaults(patient, check)
    assert found["status"] == "failure"
    assert "not a file" in found["reason"] or "not a regular file" in found["reason"]


def _defaults(patient: Patient, check: str) -> dict[str, str]:
    """With a config.toml that does not load, the host is this machine."""
    _, output, errors = patient.run("doctor", "--json", "--no-container", "--root", str(patient.root))
    assert errors == ""
    return next(item for item in json.loads(output)["findings"] if item["check"] == check)


@pytest.mark.parametrize(("name", "check"), BAD)
@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"\xff\xfe\0{", id="no-text"),
        pytest.param(b"[" * 50_000, id="deep"),
        pytest.param(b"a" * (2 << 20), id="large"),
        pytest.param(b"\033[31m\n: {", id="escapes"),
    ],
)
def test_file_that_is_none(patient: Patient, name: str, check: str, content: bytes) -> None:
    patient.write(name, "").write_bytes(content)
    found = patient.finding(check) if name != "config.toml" else _defaults(patient, check)
    assert found["status"] == "failure"
    assert found["reason"].isprintable()
    assert len(found["reason"]) < 700


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(f"{BOMB}kind: nvidia.com/gpu\ncontainerEdits: {{mounts: *x}}\n", id="bomb"),
        pytest.param("kind: nvidia.com/gpu\ncontainerEdits: 1\ndevices: {a: 1}\n", id="other-types"),
        pytest.param(
            "kind: nvidia.com/gpu\ncontainerEdits: {mounts: 1, deviceNodes: [1, x, [], {path: 1}]}\n", id="items"
        ),
        pytest.param("kind: [1]\n", id="kind"),
        pytest.param("!!python/object/apply:os.system ['touch /nvhook-was-here']\n", id="python"),
        pytest.param("", id="empty"),
    ],
)
def test_specification_of_odd_content(patient: Patient, text: str) -> None:
    patient.write("driver/etc/cdi/nvidia.yaml", text)
    patient.doctor()
    assert not Path("/nvhook-was-here").exists()


def test_config_of_an_engine_with_odd_types(patient: Patient) -> None:
    for text in ('{"runtimes": []}', '{"runtimes": {"nvidia": 1}}', '{"default-runtime": {}}', "[]", "1"):
        patient.docker(text) if not (patient.host / "proc/4711").exists() else patient.write(
            "driver/etc/docker/daemon.json", text
        )
        assert patient.finding("engines")["status"] in ("warning", "failure")


# As somebody else, and in a container


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory that every user can come through."""
    with tempfile.TemporaryDirectory(prefix="nvhook-doctor-test-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_unprivileged_user_is_told_what_was_not_looked_at(simhost: Callable[[str], Path], open_place: Path) -> None:
    patient = Patient(simhost("h200"), open_place / "host")
    patient.host.chmod(0o755)
    patient.docker()
    (patient.host / "proc/4711/environ").chmod(0o400)
    with patient.answering({}):
        (patient.root / "run/docker.sock").chmod(0o600)
        command = [str(SCRIPT), "doctor", "--json", "--root", str(patient.root)]
        environment = {"PATH": "/usr/bin:/bin", "NVHOOK_CONFIG": str(patient.config)}
        done = subprocess.run(
            command,
            env=environment,
            user=65534,
            group=65534,
            extra_groups=[],
            capture_output=True,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, "")
    found = [item for item in json.loads(done.stdout)["findings"] if item["status"] == "skipped"]
    assert [item["object"] for item in found] == ["NVML", "PATH of dockerd", "/run/docker.sock", "test container"]
    assert {item["remedy"] for item in found} == {"sudo nvhook doctor"}


def contained(patient: Patient, place: Path) -> dict[str, str]:
    """The finding of the test container, and that nothing of it stays."""
    place.mkdir()
    command = [*containers.any_cgroups(), str(SCRIPT), "doctor", "--json", "--root", str(patient.root)]
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "NVHOOK_CONFIG": str(patient.config), "TMPDIR": str(place)}
    words = ["--runtime-path", str(containers.WRAPPER)]
    done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert done.stderr == ""
    assert list(place.iterdir()) == []
    document: dict[str, Any] = json.loads(done.stdout)
    (found,) = [item for item in document["findings"] if item["check"] == "container"]
    return dict(found)


@pytest.mark.parametrize(("name", "count"), [("h200", "1 GPU"), ("a100x2", "2 GPUs"), ("wsl2", "1 GPU")])
def test_container_starts(simhost: Callable[[str], Path], tmp_path: Path, name: str, count: str) -> None:
    patient = Patient(simhost(name), tmp_path / "host")
    found = contained(patient, tmp_path / "place")
    assert found["reason"] == f"starts, and nvidia-smi sees {count} in it"


def test_container_that_does_not_start(patient: Patient, tmp_path: Path) -> None:
    patient.config.write_text(patient.config.read_text().replace('["runc"]', '["nothing"]'))
    found = contained(patient, tmp_path / "place")
    assert found["status"] == "failure"
    assert "no runtime binary found from candidate list: [nothing]" in found["reason"]


# The page


SPECIFICATION = """\
kind: nvidia.com/gpu
containerEdits:
  mounts:
  - hostPath: /usr/local/nvidia/lib64/libcuda.so.570.86.10
"""


def test_page_shows_what_is_printed(patient: Patient, tmp_path: Path) -> None:
    patient.docker()
    patient.write("driver/etc/cdi/nvidia.yaml", SPECIFICATION)
    # runc needs the cgroups of one version, which this machine may have to be given first.
    start = f"{shlex.join(containers.any_cgroups())} nvhook"
    host = f"--root {patient.root}"
    places = {
        f"{patient.config}": "/etc/nvidia-container-runtime/config.toml",
        f"{patient.host}/run": "/run/nvhook",
        f"{patient.root}": "/",
    }
    commands = {
        "sudo nvhook doctor --no-container": f"nvhook doctor --no-container {host}",
        "sudo nvhook doctor": f"{start} doctor {host} --runtime-path {containers.WRAPPER}",
        "nvhook doctor --no-container --json": f"nvhook doctor --no-container --json {host}",
        "sudo nvhook snapshot": f"nvhook snapshot {host}",
        "bug.json": f"{tmp_path}/bug.json",
    }
    with patient.answering({"CgroupDriver": "systemd", "CgroupVersion": "2", "Runtimes": {"nvidia": {}}}):
        docpages.check("doctor.md", patient.host, places, commands)
    description.check(json.loads((tmp_path / "bug.json").read_text())["host"], "host")


def test_page_names_every_check() -> None:
    text = (containers.REPOSITORY / "docs/doctor.md").read_text()
    first = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    named = [word for cell in first for word in re.findall("`([a-z-]+)`", cell)]
    assert [name for name, _ in doctor.CHECKS if name not in named] == []
    assert set(named) - {"check"} == {*(name for name, _ in doctor.CHECKS), "container"}
