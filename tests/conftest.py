# SPDX-License-Identifier: Apache-2.0
"""What several test files share: the mark `root`, simulated hosts, and a /proc made by hand."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from containers import Workshop
from installed import BOTH, Installed, start
from simhost.build import build

HOSTS = Path(__file__).parent / "hosts"
_CAP_SYS_ADMIN = 21

# A shell that starts this in the background lets it ignore Ctrl-C, and every program that is started from here.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("root") and not _is_root():
        cannot("needs real root: device nodes, mounts and namespaces")


def cannot(reason: str) -> NoReturn:
    """Skip a test on a machine that lacks something; a CI machine has to have it."""
    if "CI" in os.environ:
        pytest.fail(f"{reason}, and CI has to run it", pytrace=False)
    pytest.skip(reason)


def _is_root() -> bool:
    """Root of the first user namespace, with the capability to mount: root in an ordinary container has it not."""
    status = Path("/proc/self/status").read_text()
    capabilities = int(status.partition("CapEff:")[2].split()[0], 16)
    is_first = Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"]
    return os.geteuid() == 0 and is_first and bool(capabilities >> _CAP_SYS_ADMIN & 1)


@pytest.fixture(scope="session")
def simhost(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`simhost("h200")`: the simulated host whose description's name begins so, built when first asked for.

    All tests share it. One that keeps an inventory takes a state directory of its own.
    """
    built: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in built:
            (description,) = HOSTS.glob(f"{name}*.json")
            directory = tmp_path_factory.mktemp(name)
            build(description, directory)
            time.sleep(0.05)  # what was changed a moment ago, inventory.py would look into again
            built[name] = directory
        return built[name]

    return get


@pytest.fixture(scope="module")
def shop(simhost: Callable[[str], Path]) -> Iterator[Workshop]:
    """In /tmp itself: root of a user namespace comes through there."""
    with tempfile.TemporaryDirectory(prefix="nvhook-shop-") as name:
        yield Workshop(Path(name), simhost)


@pytest.fixture
def closed_descriptors() -> Iterator[None]:
    """What a test opens and leaves, as a short-lived hook does, is closed: one process runs thousands of tests."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    for name in set(os.listdir("/proc/self/fd")) - before:
        with contextlib.suppress(OSError):  # that of the listing itself
            os.close(int(name))


@pytest.fixture(scope="session")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    made = Installed(tmp_path_factory.mktemp("installed"))
    yield made
    made.end()


@pytest.fixture
def installed(installation: Installed, shop: Workshop) -> Iterator[Installed]:
    """An installation with its server there, left by a first container."""
    if not installation.pid():
        assert start(shop, installation, {}).stdout == BOTH
        assert installation.wait()
    yield installation
    for pid in (installation.pid(), *installation.children("nvhook-ready"), *installation.children("nvhook-busy")):
        if pid:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, signal.SIGCONT)


VERSION_LINE = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.1.2  Release Build  (u@h)  Thu Jan  1 2026\n"
)
DEVICES = """\
Character devices:
  1 mem
195 nvidia
195 nvidia-modeset
195 nvidiactl
511 nvidia-uvm

Block devices:
  7 loop
"""


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A directory with a `proc` as the driver shows it: two GPUs, whose minors run against the order of the bus."""
    for minor, (address, uuid) in enumerate([("0000:41:00.0", "GPU-bb"), ("0000:07:00.0", "GPU-aa")]):
        information = tmp_path / "proc/driver/nvidia/gpus" / address / "information"
        information.parent.mkdir(parents=True)
        information.write_text(
            f"Model: \t\t NVIDIA Test\nIRQ:   \t\t 64\nGPU UUID: \t {uuid}\nBus Location: \t {address}\n"
            f"Device Minor: \t {minor}\nGPU Excluded:\t No\n"
        )
    (tmp_path / "proc/driver/nvidia/version").write_text(VERSION_LINE)
    (tmp_path / "proc/driver/nvidia/params").write_text("DeviceFileUID: 0\nDeviceFileGID: 0\nDeviceFileMode: 438\n")
    (tmp_path / "proc/devices").write_text(DEVICES)
    return tmp_path
