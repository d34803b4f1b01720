# SPDX-License-Identifier: Apache-2.0
"""The troubles that users of GPU containers report most, made on a simulated host: is the cause named, and the remedy?

The numbers are those of docs/troubleshooting.md. What `doctor` sees is in the first table, what the start of the
container says by itself in the second.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from patients import Patient

pytestmark = pytest.mark.root

H200, WORKSTATION, WSL2 = "h200", "workstation", "wsl2"
SPECIFICATION = """\
cdiVersion: 0.6.0
kind: nvidia.com/gpu
devices:
- name: "0"
  containerEdits:
    deviceNodes:
    - {{path: /dev/nvidia0, major: 195, minor: 0}}
containerEdits:
  deviceNodes:
  - {{path: /dev/nvidia-uvm, major: {major}, minor: 0}}
  mounts:
  - hostPath: /usr/local/nvidia/lib64/libcuda.so.{version}
    containerPath: /usr/lib64/libcuda.so.{version}
"""


def no_hook(patient: Patient) -> None:
    patient.docker(path="/opt/docker/bin:/sbin")


def dockerd_older_than_hook(patient: Patient) -> None:
    patient.docker()
    patient.write("proc/stat", "btime 1000\n")


def dockerd_of_a_snap(patient: Patient) -> None:
    patient.docker()
    exe = patient.host / "proc/4711/exe"
    exe.unlink()
    exe.symlink_to("/snap/docker/2932/bin/dockerd")


def no_char_links(patient: Patient) -> None:
    (patient.root / "run/systemd/system").mkdir(parents=True)


def stale_specification(patient: Patient) -> None:
    patient.write("driver/etc/cdi/nvidia.yaml", SPECIFICATION.format(major=238, version="570.86.10"))


def specification_of_files_that_are_gone(patient: Patient) -> None:
    patient.write("driver/var/run/cdi/nvidia.yaml", SPECIFICATION.format(major=238, version="580.159.04"))
    (patient.root / "usr/local/nvidia/lib64/libcuda.so.580.159.04").rename(patient.root / "elsewhere")


def specification_with_another_major(patient: Patient) -> None:
    patient.write("driver/etc/cdi/nvidia.yaml", SPECIFICATION.format(major=510, version="580.159.04"))


def node_with_another_major(patient: Patient) -> None:
    node = patient.host / "dev/nvidia-uvm"
    node.unlink()
    os.mknod(node, 0o20666, os.makedev(510, 0))


def no_uvm(patient: Patient) -> None:
    devices = patient.host / "proc/devices"
    devices.write_text(devices.read_text().replace("238 nvidia-uvm\n", ""))


def no_nodes(patient: Patient) -> None:
    for node in (patient.host / "dev").glob("nvidia*"):
        node.unlink() if not node.is_dir() else shutil.rmtree(node)


def no_module(patient: Patient) -> None:
    shutil.rmtree(patient.host / "proc/driver")
    place = "sys/bus/pci/devices/0000:00:06.0"
    patient.write(f"{place}/vendor", "0x10de\n")
    patient.write(f"{place}/class", "0x030200\n")


def nouveau(patient: Patient) -> None:
    no_module(patient)
    patient.write("proc/modules", "nouveau 2400256 1 - Live 0x0\n")


def secure_boot(patient: Patient) -> None:
    no_module(patient)
    name = "SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
    patient.write(f"sys/firmware/efi/efivars/{name}", "\6\0\0\0\1")
    patient.write("driver/var/lib/shim-signed/mok/MOK.der", "")


def new_kernel(patient: Patient) -> None:
    no_module(patient)
    patient.write("proc/sys/kernel/osrelease", "6.8.0-50-generic\n")
    patient.write("driver/lib/modules/6.8.0-50-generic/modules.dep", "kernel/drivers/net/tun.ko.zst:\n")
    patient.program("usr/sbin/dkms", "#!/bin/sh\n")


def no_libraries(patient: Patient) -> None:
    (patient.root / "usr/local/nvidia").rename(patient.root / "elsewhere")


def upgrade_without_reboot(patient: Patient) -> None:
    version = patient.host / "proc/driver/nvidia/version"
    version.write_text(version.read_text().replace("580.159.04", "580.95.05"))


def damaged_linker_cache(patient: Patient) -> None:
    (patient.root / "etc/ld.so.cache").write_text("nothing\n")


def mode_cdi(patient: Patient) -> None:
    text = patient.config.read_text()
    patient.config.write_text(text.replace("runtimes = ", 'mode = "cdi"\nruntimes = '))


def not_registered(patient: Patient) -> None:
    patient.docker("{}")


def default_runtime_unknown(patient: Patient) -> None:
    patient.docker('{"default-runtime": "nvidia"}')


def damaged_icd(patient: Patient) -> None:
    (path,) = patient.root.rglob("nvidia_icd.json")
    path.write_text("{")


def selinux(patient: Patient) -> None:
    patient.write("sys/fs/selinux/enforce", "1")
    patient.write("sys/fs/selinux/booleans/container_use_devices", "0 0")


def no_windows_driver(patient: Patient) -> None:
    shutil.rmtree(patient.root / "usr/lib/wsl/drivers")


def their_hook(patient: Patient) -> None:
    program = patient.theirs("usr/bin/nvidia-container-toolkit")
    text = f'{{"hook": {{"path": "/{program.relative_to(patient.root)}"}}, "stages": ["prestart"]}}'
    patient.write("driver/usr/share/containers/oci/hooks.d/oci-nvidia-hook.json", text)


# number, host, what is done to it, check, status, words of the reason, words of the remedy
SEEN = [
    (
        1,
        H200,
        no_hook,
        "dockerd",
        "failure",
        "`docker run --gpus` fails",
        "ln -s /usr/bin/nvidia-container-runtime-hook",
    ),
    (
        1,
        H200,
        dockerd_older_than_hook,
        "dockerd",
        "failure",
        "installed after dockerd was started",
        "systemctl restart docker",
    ),
    (1, H200, dockerd_of_a_snap, "dockerd", "failure", "comes from a snap", "snap remove docker"),
    (
        2,
        H200,
        no_char_links,
        "char-links",
        "warning",
        "`systemctl daemon-reload` takes them",
        "nvhook create-dev-char-symlinks",
    ),
    (3, H200, stale_specification, "cdi", "failure", "is for driver 570.86.10, and 580.159.04", "nvhook cdi generate"),
    (
        3,
        H200,
        specification_of_files_that_are_gone,
        "cdi",
        "failure",
        "names 1 path where nothing is",
        "nvhook cdi generate",
    ),
    (
        4,
        H200,
        specification_with_another_major,
        "cdi",
        "failure",
        "/dev/nvidia-uvm is 510:0, and it is 238:0",
        "nvhook cdi",
    ),
    (
        4,
        H200,
        node_with_another_major,
        "nodes",
        "failure",
        "is 510:0, and the module that is loaded has 238:0",
        "mknod -m 666",
    ),
    (5, H200, no_uvm, "uvm", "warning", "CUDA does not work before it is", "modprobe nvidia-uvm"),
    (6, H200, no_nodes, "nodes", "warning", "rootless engines", "mknod -m 666"),
    (6, H200, selinux, "selinux", "warning", "cannot open /dev/nvidia*", "setsebool -P container_use_devices on"),
    (7, H200, no_module, "module", "failure", "nvidia is not loaded", "modprobe nvidia"),
    (7, H200, nouveau, "module", "failure", "nouveau has the GPU", "blacklist nouveau"),
    (
        7,
        H200,
        secure_boot,
        "module",
        "failure",
        "Secure Boot is on",
        "mokutil --import /var/lib/shim-signed/mok/MOK.der",
    ),
    (7, H200, new_kernel, "module", "failure", "no nvidia module for the kernel 6.8.0-50-generic", "dkms autoinstall"),
    (
        7,
        H200,
        no_libraries,
        "libraries",
        "failure",
        "no libraries of driver 580.159.04",
        "install the driver's libraries",
    ),
    (7, H200, upgrade_without_reboot, "libraries", "failure", "version 580.95.05 and the libraries below", "reboot"),
    (
        8,
        H200,
        damaged_linker_cache,
        "libraries",
        "failure",
        "read the linker cache `/etc/ld.so.cache`",
        "run `ldconfig`",
    ),
    (9, H200, mode_cdi, "config", "warning", "`cdi` is not honoured", "take it out"),
    (10, H200, not_registered, "engines", "warning", "does not know our runtime", "nvhook configure docker --restart"),
    (10, H200, default_runtime_unknown, "engines", "failure", "default runtime is nvidia", "nvhook configure docker"),
    (10, H200, their_hook, "hooks", "warning", "runs NVIDIA's hook", "rm /usr/share/containers/oci/hooks.d/oci-nvidia"),
    (11, WORKSTATION, damaged_icd, "libraries", "warning", "nvidia_icd.json`: not JSON", "reinstall the driver"),
    (
        15,
        WSL2,
        no_windows_driver,
        "module",
        "failure",
        "no directory below `/usr/lib/wsl/drivers`",
        "driver in Windows",
    ),
]


@pytest.mark.parametrize(
    ("host", "harm", "check", "status", "reason", "remedy"),
    [pytest.param(*row[1:], id=f"{row[0]}-{row[2].__name__.replace('_', '-')}") for row in SEEN],
)
def test_doctor_names_cause_and_remedy(
    simhost: Callable[[str], Path],
    tmp_path: Path,
    host: str,
    harm: Callable[[Patient], None],
    check: str,
    status: str,
    reason: str,
    remedy: str,
) -> None:
    patient = Patient(simhost(host), tmp_path / "host")
    assert [item for item in patient.doctor()[1] if item["check"] == check and item["status"] != "ok"] == []
    harm(patient)
    result, found = patient.doctor()
    worst = next(item for item in found if item["check"] == check and item["status"] == status)
    assert reason in worst["reason"]
    assert remedy in worst["remedy"]
    assert result == 1 if status == "failure" else result in (1, 3)


def nothing(_: Patient) -> None:
    """The host is in order, and the image or the user asks for what it has not."""


# number, host, what is done to it, what the container asks for, what the error says
REFUSED = [
    (3, H200, upgrade_without_reboot, [], "the driver was changed without loading the new module: reboot"),
    (5, H200, no_uvm, [], "nvidia-uvm"),
    (7, H200, no_module, [], "the nvidia kernel module is not loaded"),
    (8, H200, damaged_linker_cache, [], "read the linker cache `/etc/ld.so.cache`"),
    (12, H200, nothing, ["NVIDIA_REQUIRE_CUDA=cuda>=99.0"], "NVIDIA_DISABLE_REQUIRE=1"),
    (15, WSL2, nothing, ["NVIDIA_VISIBLE_DEVICES=0"], "ask for `all`"),
    (15, WSL2, no_windows_driver, [], "install NVIDIA's driver in Windows"),
]


@pytest.mark.parametrize(
    ("host", "harm", "asked", "error"),
    [pytest.param(*row[1:], id=f"{row[0]}-{row[2].__name__.replace('_', '-')}") for row in REFUSED],
)
def test_start_names_cause_and_remedy(
    simhost: Callable[[str], Path],
    tmp_path: Path,
    host: str,
    harm: Callable[[Patient], None],
    asked: list[str],
    error: str,
) -> None:
    patient = Patient(simhost(host), tmp_path / "host")
    harm(patient)
    rootfs = tmp_path / "rootfs"
    (rootfs / "usr/lib").mkdir(parents=True)
    variables = ["NVIDIA_VISIBLE_DEVICES=all", *asked]
    words = [word for variable in variables for word in ("--env", variable)]
    status, output, errors = patient.run("plan", "--rootfs", str(rootfs), *words)
    assert (status, output) == (1, "")
    assert error in errors.splitlines()[-1] or error in errors.splitlines()[0]


def test_image_that_asks_by_itself_is_not_heard_if_config_toml_says_so(
    simhost: Callable[[str], Path], tmp_path: Path
) -> None:
    """13: it starts without a GPU, and the runtime's log says why."""
    patient = Patient(simhost(H200), tmp_path / "host")
    text = patient.config.read_text()
    patient.config.write_text(
        "accept-nvidia-visible-devices-envvar-when-unprivileged = false\n"
        f"accept-nvidia-visible-devices-as-volume-mounts = true\n{text}"
    )
    status, output, errors = patient.run("plan", "--rootfs", "/", "--env", "NVIDIA_VISIBLE_DEVICES=all")
    assert (status, output) == (0, "This container asks for no GPU: nothing is done to it.\n")
    assert errors == (
        "nvhook: warning: NVIDIA_VISIBLE_DEVICES of an unprivileged container is ignored, as config.toml says\n"
    )


def test_image_that_brings_driver_files_is_no_trouble(simhost: Callable[[str], Path], tmp_path: Path) -> None:
    """14: they are mounted over, and the host's driver is what the container gets."""
    patient = Patient(simhost(H200), tmp_path / "host")
    rootfs = tmp_path / "rootfs"
    (rootfs / "usr/lib64").mkdir(parents=True)
    for name in ("libcuda.so.1", "libcuda.so.580.159.04", "libnvidia-ml.so.1"):
        (rootfs / "usr/lib64" / name).touch()
    status, output, _ = patient.run("plan", "--rootfs", str(rootfs), "--env", "NVIDIA_VISIBLE_DEVICES=all")
    assert status == 0
    assert f"libcuda.so.580.159.04  from {patient.root}" in output


def test_page_has_every_trouble_and_each_is_made_here() -> None:
    text = (Path(__file__).parent.parent / "docs/troubleshooting.md").read_text()
    numbers = [int(number) for number in re.findall(r"^## (\d+)\. ", text, re.MULTILINE)]
    assert list(range(1, 16)) == numbers
    made = {row[0] for row in [*SEEN, *REFUSED]} | {13, 14}  # these two have tests of their own
    assert set(numbers) == made
