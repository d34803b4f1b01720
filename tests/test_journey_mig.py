# SPDX-License-Identifier: Apache-2.0
"""Containers under runc on a host with MIG: what nvidia-smi lists there, and what stays closed."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import containers
from containers import HOOK, TRY, Bundle, Workshop, gpu_lines, tree

pytestmark = pytest.mark.root

MIG = "a100x8"
GPU3 = "GPU-b8ea0b71-ce42-5a07-96ba-14bf6ece0cfc"  # /dev/nvidia1; GPU instance 1 is divided, 2 is whole
(DESCRIPTION,) = (containers.REPOSITORY / "tests/hosts").glob(f"{MIG}*.json")
UUIDS = [
    [mig["uuid"] for mig in gpu["mig"] if "uuid" in mig] for gpu in json.loads(DESCRIPTION.read_text())["gpus"][:4]
]

# A container's /proc shows what the driver puts there; on a machine without the driver that is mounted.
SHOW_PROC = """\
#!/bin/sh
pid=$(sed 's/.*"pid": *\\([0-9]*\\).*/\\1/')
exec nsenter --mount=/proc/$pid/ns/mnt mount --bind -o ro {host}/proc/driver {rootfs}/proc/driver
"""


@pytest.fixture(scope="module")
def shop(simhost: Callable[[str], Path]) -> Iterator[Workshop]:
    before = tree(simhost(MIG))
    with tempfile.TemporaryDirectory(prefix="nvhook-mig-") as name:
        yield Workshop(Path(name), simhost)
    assert before == tree(simhost(MIG))


@pytest.fixture(params=[1, 2], ids=["v1", "v2"])
def hierarchy(request: pytest.FixtureRequest) -> tuple[str, ...]:
    try:
        return containers.cgroups(request.param)
    except LookupError as error:
        pytest.skip(str(error))


def new_bundle(shop: Workshop, through: tuple[str, ...]) -> Bundle:
    bundle = shop.bundle()
    bundle.through = through
    program = bundle.directory.with_suffix(".hook")
    program.write_text(SHOW_PROC.format(host=shop.simhost(MIG), rootfs=bundle.rootfs))
    program.chmod(0o755)
    env = ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]
    bundle.config["hooks"] = {"prestart": [{"path": str(program), "args": ["show-proc"], "env": env}]}
    return bundle


def start(bundle: Bundle, config: Path, script: str, devices: str, **env: str) -> str:
    bundle.write(["/bin/sh", "-euc", script], {"NVIDIA_VISIBLE_DEVICES": devices, **env})
    result = bundle.run(config)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def privileged(bundle: Bundle) -> Bundle:
    bundle.config["process"]["capabilities"]["bounding"] += ["CAP_SYS_ADMIN"]
    return bundle


@pytest.mark.parametrize(
    ("devices", "gpus", "migs"),
    [
        pytest.param(f"MIG-{GPU3}/1/1", (3,), [UUIDS[3][1]], id="one-of-two-in-an-instance"),
        pytest.param(f"MIG-{GPU3}/2/0,MIG-{GPU3}/1/0", (3,), [UUIDS[3][0], UUIDS[3][2]], id="two-of-one-gpu"),
        pytest.param(f"5,MIG-{GPU3}/2/0", (3, 5), [UUIDS[3][2]], id="beside-a-whole-gpu"),
        pytest.param("3", (3,), [], id="gpu-without-its-instances"),
        pytest.param("all", (0, 1, 2, 3, 4, 5, 6, 7), [uuid for gpu in UUIDS for uuid in gpu], id="all"),
        pytest.param("0:2,2:0", (0, 2), [UUIDS[0][2], UUIDS[2][0]], id="indices"),
        pytest.param(f"{UUIDS[1][3]},{UUIDS[0][0][:12]}", (0, 1), [UUIDS[0][0], UUIDS[1][3]], id="uuids"),
    ],
)
def test_listed_mig_devices_are_those_asked_for(
    shop: Workshop, hierarchy: tuple[str, ...], devices: str, gpus: tuple[int, ...], migs: list[str]
) -> None:
    shown = start(new_bundle(shop, hierarchy), shop.config(MIG), "nvidia-smi -L", devices)
    assert gpu_lines(MIG, *gpus, migs=tuple(migs)) == shown


def test_other_mig_device_stays_closed(shop: Workshop, hierarchy: tuple[str, ...]) -> None:
    """With a node that the container makes itself: capability 148 is the other half of the same GPU instance."""
    script = f"""{TRY}
        cd /dev/nvidia-caps; mknod -m 666 nvidia-cap148 c 234 148; mknod -m 666 nvidia-cap1 c 234 1
        nvidia-smi -L; try nvidia-cap148; try nvidia-cap1
    """
    shown = start(new_bundle(shop, hierarchy), shop.config(MIG), script, f"MIG-{GPU3}/1/1")
    assert gpu_lines(MIG, 3, migs=(UUIDS[3][1],)) + "nvidia-cap148 denied\nnvidia-cap1 denied\n" == shown


def test_files_below_proc_are_those_of_the_mig_device(shop: Workshop) -> None:
    script = """
        cd /proc/driver/nvidia/capabilities/gpu1/mig
        cat gi1/access gi1/ci1/access | grep Minor
        grep -o ' /proc/driver/nvidia/capabilities/.* ro,[^ ]*' /proc/self/mountinfo
        stat -c '%a %u %n' /dev/nvidia-caps/*
    """
    shown = start(new_bundle(shop, containers.any_cgroups()), shop.config(MIG), script, f"MIG-{GPU3}/1/1")
    options = "ro,nosuid,nodev,noexec,relatime"
    assert shown.splitlines() == [
        "DeviceFileMinor: 147",
        "DeviceFileMinor: 149",
        f" /proc/driver/nvidia/capabilities/gpu1/mig/gi1/access {options}",
        f" /proc/driver/nvidia/capabilities/gpu1/mig/gi1/ci1/access {options}",
        "444 0 /dev/nvidia-caps/nvidia-cap147",
        "444 0 /dev/nvidia-caps/nvidia-cap149",
    ]


def test_mig_device_in_a_user_namespace(shop: Workshop, hierarchy: tuple[str, ...]) -> None:
    bundle = new_bundle(shop, hierarchy)
    for path in (bundle.rootfs, *bundle.rootfs.rglob("*")):
        os.chown(path, 100000, 100000, follow_symlinks=False)
    linux = bundle.config["linux"]
    linux["namespaces"].append({"type": "user"})
    linux["uidMappings"] = linux["gidMappings"] = [{"containerID": 0, "hostID": 100000, "size": 65536}]
    script = "nvidia-smi -L; grep -c ' /dev/nvidia-caps/nvidia-cap' /proc/self/mountinfo"
    shown = start(bundle, shop.config(MIG), script, f"MIG-{GPU3}/1/1")
    assert gpu_lines(MIG, 3, migs=(UUIDS[3][1],)) + "2\n" == shown


def test_mig_device_with_the_hook_alone(shop: Workshop, hierarchy: tuple[str, ...]) -> None:
    """`docker run --gpus` without a wrapper: the hook opens the cgroup for the capabilities as well."""
    bundle = new_bundle(shop, hierarchy)
    words = ["nvidia-container-runtime-hook", "--config", str(shop.config(MIG)), "prestart"]
    env = ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]
    bundle.config["hooks"]["prestart"].append({"path": str(HOOK), "args": words, "env": env})
    bundle.write(["/usr/bin/nvidia-smi", "-L"], {"NVIDIA_VISIBLE_DEVICES": f"MIG-{GPU3}/1/1"})
    result = bundle.run(None, wrapper=Path("runc"))
    assert (result.returncode, result.stderr) == (0, "")
    assert gpu_lines(MIG, 3, migs=(UUIDS[3][1],)) == result.stdout


@pytest.mark.parametrize(("right", "node"), [("config", "400 nvidia-cap1"), ("monitor", "444 nvidia-cap2")])
def test_right_to_mig(shop: Workshop, hierarchy: tuple[str, ...], right: str, node: str) -> None:
    bundle = privileged(new_bundle(shop, hierarchy))
    script = f"""nvidia-smi -L; cd /dev/nvidia-caps; stat -c '%a %n' nvidia-cap[12]
        cat /proc/driver/nvidia/capabilities/mig/{right} | grep Minor
    """
    shown = start(bundle, shop.config(MIG), script, "3,5", **{f"NVIDIA_MIG_{right.upper()}_DEVICES": "all"})
    assert gpu_lines(MIG, 3, 5) + f"{node}\nDeviceFileMinor: {node[-1]}\n" == shown
    rules = json.loads(bundle.path.read_text())["linux"]["resources"]["devices"]
    minors = [rule["minor"] for rule in rules if rule.get("major") == 234]
    assert minors == [int(node[-1]), 147, 148, 149, 156, 157]


def test_right_to_mig_is_not_for_everybody(shop: Workshop) -> None:
    env = {"NVIDIA_VISIBLE_DEVICES": "all", "NVIDIA_MIG_CONFIG_DEVICES": "all"}
    result = shop.bundle().write(["/bin/true"], env).run(shop.config(MIG))
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "NVIDIA_MIG_CONFIG_DEVICES is set for a container that is not privileged" in result.stderr


def test_features(shop: Workshop) -> None:
    script = """
        cd /dev; stat -c '%n %t:%T' nvidia-fs* infiniband/* gdrdrv nvidia-nvswitch*
        cat /etc/cufile.json; ls /run/udev/data; (: >/run/udev/x) 2>/dev/null || echo read-only
    """
    env = {f"NVIDIA_{name}": "enabled" for name in ("GDS", "MOFED", "GDRCOPY", "NVSWITCH")}
    shown = start(shop.bundle(), shop.config(MIG), script, "5", **env)
    assert shown.splitlines() == [
        *(f"nvidia-fs{minor} 1ff:{minor}" for minor in range(3)),
        "infiniband/rdma_cm a:7a",
        "infiniband/uverbs0 f3:c0",
        "infiniband/uverbs1 f3:c1",
        "gdrdrv 1fe:0",
        *(f"nvidia-nvswitch{minor} f1:{minor}" for minor in range(6)),
        "nvidia-nvswitchctl f1:ff",
        '{"logging": {"level": "ERROR"}}',
        "+pci:0000:07:00.0",
        "read-only",
    ]


def test_feature_that_is_not_there(shop: Workshop) -> None:
    log = shop.new("log")
    bundle = shop.bundle().write(["/bin/true"], {"NVIDIA_VISIBLE_DEVICES": "all", "NVIDIA_GDS": "enabled"})
    result = bundle.run(shop.config("a100x2"), options=("--log", str(log)))
    assert (result.returncode, result.stderr) == (0, "")
    assert "NVIDIA_GDS=enabled gives nothing: this host has no `/dev/nvidia-fs*`" in log.read_text()


def test_imex_channels(shop: Workshop, hierarchy: tuple[str, ...]) -> None:
    host, config = shop.copy_of("a100x2")
    devices = host / "proc/devices"
    devices.write_text(devices.read_text().replace("236 nvidia-caps\n", "236 nvidia-caps-imex-channels\n"))
    bundle = shop.bundle()
    bundle.through = hierarchy
    script = f"""{TRY}
        cd /dev/nvidia-caps-imex-channels; stat -c '%n %t:%T %a' *; mknod channel5 c 236 5; try channel5
    """
    shown = start(bundle, config, script, "0", NVIDIA_IMEX_CHANNELS="3,2047")
    assert shown == "channel2047 ec:7ff 666\nchannel3 ec:3 666\nchannel5 denied\n"
