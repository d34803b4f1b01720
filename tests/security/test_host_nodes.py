# SPDX-License-Identifier: Apache-2.0
"""What an image can have root make in the host's /dev: no channel that the driver lacks, and nothing for a start that
fails. Real containers on a simulated GB200-like host, whose /dev has /dev/char and none of the nodes."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from containers import HOOK, Workshop
from installed import Installed
from nvhook import prestart
from nvhook.container import image_check
from nvhook.container.container import Layout
from nvhook.container.edits import Device
from nvhook.driver.records import Driver
from nvhook.errors import ContainerError
from nvhook.host import modules
from nvhook.linux.root import DIRECTORY, Root
from nvhook.request import config as configuration
from nvhook.request.config import Config
from nvhook.request.request import Request
from nvhook.request.spec import Spec
from nvhook.start import Start

pytestmark = pytest.mark.root
CHANNELS = "NVIDIA_IMEX_CHANNELS"
PARAMS = "proc/driver/nvidia/params"


class Host:
    """A simulated host of one's own, and what is in its /dev beyond what was there."""

    def __init__(self, shop: Workshop) -> None:
        self.shop = shop
        self.place, self.config = shop.copy_of("a100x2")
        devices = self.place / "proc/devices"
        devices.write_text(devices.read_text().replace("236 nvidia-caps\n", "236 nvidia-caps-imex-channels\n"))
        (self.place / "dev/char").mkdir(parents=True, exist_ok=True)
        (self.place / "dev/nvidia-uvm").unlink(missing_ok=True)
        self._before = self._names()

    def _names(self) -> set[str]:
        top = self.place / "dev"
        tree = os.walk(top)  # which passes over a directory that is taken back at this moment
        return {os.path.relpath(f"{place}/{name}", top) for place, *names in tree for name in (*names[0], *names[1])}

    def added(self) -> set[str]:
        return self._names() - self._before

    def left(self) -> set[str]:
        """What stays. The process that prepares a start may end after the runtime, and takes its own back then."""
        end = time.monotonic() + 30
        while self.added() and time.monotonic() < end:
            time.sleep(0.02)
        return self.added()

    def run(self, channels: str, *words: str, damage: Callable[[Path], object] | None = None) -> tuple[int, str]:
        bundle = self.shop.bundle()
        env = {"NVIDIA_VISIBLE_DEVICES": "all", CHANNELS: channels}
        bundle.write(list(words) or ["/bin/true"], env)
        if damage:
            damage(bundle.rootfs)
        result = bundle.run(self.config)
        return result.returncode, result.stderr


@pytest.fixture
def host(shop: Workshop) -> Host:
    return Host(shop)


def _channels(count: int, first: int = 0) -> str:
    return ",".join(str(first + number) for number in range(count))


# The driver's number of channels


@pytest.mark.parametrize(
    ("line", "count"),
    [
        pytest.param("ImexChannelCount: 2048\n", 2048, id="default"),
        pytest.param("", 2048, id="driver-that-does-not-say"),
        pytest.param("ImexChannelCount: many\n", 2048, id="no-number"),
        pytest.param("ImexChannelCount: -1\n", 2048, id="negative"),
        pytest.param("ImexChannelCount: 4294967295\n", 2048, id="more-than-minors"),
        pytest.param("ImexChannelCount: 4\n", 4, id="few"),
        pytest.param("ImexChannelCount: 0\n", 0, id="none"),
        pytest.param("ImexChannelCount: 4096\n", 4096, id="many"),
    ],
)
def test_channels_beyond_those_of_the_driver(host: Host, line: str, count: int) -> None:
    params = host.place / PARAMS
    kept = [text for text in params.read_text().splitlines(keepends=True) if not text.startswith("ImexChannelCount")]
    params.write_text("".join(kept) + line)
    status, said = host.run(f"{count}")
    assert status == 1
    assert f"IMEX channel {count} is asked for and the driver has {count}, numbered from 0" in said
    assert host.added() == set()
    if count:
        assert host.run(f"{count - 1}") == (0, "")


def test_channels_where_the_driver_has_no_params(host: Host) -> None:
    (host.place / PARAMS).unlink()
    assert host.run("2047") == (0, "")
    status, said = host.run("5,2048,1048575")
    assert (status, "IMEX channel 2048 is asked for" in said) == (1, True)


# Starts that fail


def _no_library_directory(rootfs: Path) -> None:
    """What the hook meets when it mounts."""
    subprocess.run(["rm", "-rf", str(rootfs / "usr/lib/x86_64-linux-gnu")], check=True)
    (rootfs / "usr/lib/x86_64-linux-gnu").write_text("")


def _no_root(rootfs: Path) -> None:
    """What the low-level runtime meets before any hook."""
    subprocess.run(["rm", "-rf", str(rootfs)], check=True)


@pytest.mark.parametrize(
    ("words", "damage"),
    [
        pytest.param(("/nowhere",), None, id="no-program"),
        pytest.param(("/etc",), None, id="program-that-is-a-directory"),
        pytest.param(("/bin/true",), lambda rootfs: (rootfs / "proc").rmdir() or (rootfs / "proc").touch(), id="mount"),
        pytest.param(("/bin/true",), _no_library_directory, id="hook"),
    ],
)
def test_start_that_fails_leaves_nothing(host: Host, words: tuple[str, ...], damage: Callable[[Path], object]) -> None:
    status, _ = host.run(_channels(64), *words, damage=damage)
    assert status != 0
    assert host.left() == set()


def test_runtime_that_calls_no_hook_leaves_nothing(host: Host, installed: Installed) -> None:
    """Then the process that prepares the start does it, when the low-level runtime has ended."""
    bundle = host.shop.bundle()
    bundle.write(["/bin/true"], {"NVIDIA_VISIBLE_DEVICES": "all", CHANNELS: _channels(64)})
    _no_root(bundle.rootfs)
    assert bundle.run(host.config, wrapper=installed.wrapper).returncode != 0
    assert host.left() == set()


@pytest.mark.parametrize("words", [("run",), ("create",)], ids=" ".join)
def test_runtime_that_calls_no_hook_where_there_is_no_server(
    host: Host, installation: Installed, words: tuple[str, ...]
) -> None:
    """A process that has become the low-level runtime cannot, and nobody has prepared the start."""
    installation.end()
    bundle = host.shop.bundle()
    bundle.write(["/bin/true"], {"NVIDIA_VISIBLE_DEVICES": "all", CHANNELS: _channels(64)})
    _no_root(bundle.rootfs)
    command = (*words, "--bundle", str(bundle.directory), bundle.id)
    assert bundle.call(host.config, *command, wrapper=installation.wrapper).returncode != 0
    assert host.left() == set()


def test_start_that_succeeds_where_there_is_no_server(host: Host, installation: Installed) -> None:
    installation.end()
    bundle = host.shop.bundle()
    bundle.write(["/bin/sleep", "60"], {"NVIDIA_VISIBLE_DEVICES": "all", CHANNELS: "3"})
    words = ("run", "-d", "--bundle", str(bundle.directory), bundle.id)
    try:
        done = bundle.call(host.config, *words, wrapper=installation.wrapper, output=host.place / "output")
        assert done.returncode == 0
        time.sleep(2)
        assert {"nvidia-uvm", "nvidia-caps-imex-channels/channel3", "char/236:3"} <= host.added()
    finally:
        bundle.delete()


@pytest.mark.parametrize("damage", [None, _no_library_directory], ids=["good", "bad"])
def test_hook_without_the_wrapper(host: Host, damage: Callable[[Path], object] | None) -> None:
    """As with dockerd's --gpus: the hook alone makes nodes, and knows whether it has succeeded."""
    bundle = host.shop.bundle()
    hook = {"path": str(HOOK), "args": [HOOK.name, "--config", str(host.config), "prestart"], "env": ["PATH=/bin"]}
    bundle.config["hooks"] = {"prestart": [hook]}
    bundle.write(["/bin/true"], {"NVIDIA_VISIBLE_DEVICES": "all", CHANNELS: "3"})
    if damage:
        damage(bundle.rootfs)
    result = bundle.run(None, wrapper=Path(shutil.which("runc") or "runc"))
    assert (result.returncode == 0) == (damage is None)
    assert ("nvidia-caps-imex-channels/channel3" in host.added()) == (damage is None)
    if damage:
        assert host.added() == set()
    assert modules.made_by(configuration.load(str(host.config)), bundle.id) is None


@pytest.mark.parametrize("which", ["the-one-that-fails-first", "the-one-that-succeeds-first"])
def test_two_starts_at_once(host: Host, which: str) -> None:
    """Both need /dev/nvidia-uvm: one of them makes it and fails, the other runs with it."""
    bundles = [host.shop.bundle(), host.shop.bundle()]
    for bundle, words in zip(bundles, (["/nowhere"], ["/bin/sleep", "60"]), strict=True):
        bundle.write(words, {"NVIDIA_VISIBLE_DEVICES": "all"})
    fails, runs = bundles
    settings = configuration.load(str(host.config))
    # The first has made its nodes and has not yet failed when the second one starts.
    warnings: list[str] = []
    if which == "the-one-that-fails-first":
        assert modules.make_nodes(settings, [UVM], warnings, fails.id)
    output = host.place / "output"
    try:
        assert (
            runs.call(host.config, "run", "-d", "--bundle", str(runs.directory), runs.id, output=output).returncode == 0
        )
        assert fails.run(host.config).returncode != 0
        assert {"nvidia-uvm", "char/511:0"} <= host.added()
    finally:
        runs.delete()
    assert warnings == []


def test_start_that_succeeds_keeps_its_nodes(host: Host) -> None:
    """As the next program on the host and systemd want them, and the next failure takes none of them."""
    assert host.run("3") == (0, "")
    kept = host.added()
    assert {"nvidia-uvm", "nvidia-caps-imex-channels", "nvidia-caps-imex-channels/channel3", "char/236:3"} <= kept
    assert host.run("3,4", "/nowhere")[0] != 0
    assert host.added() == kept


def test_low_level_runtime_that_cannot_be_executed(host: Host) -> None:
    """It was there when it was looked up: a file that no kernel executes."""
    broken = host.place / "runc"
    broken.write_bytes(b"\x7fELF")
    broken.chmod(0o755)
    text = host.config.read_text()
    host.config.write_text(text.replace('runtimes = ["runc"]', f'runtimes = ["{broken}"]'))
    status, _ = host.run(_channels(64))
    assert status != 0
    assert host.left() == set()


def test_bundle_that_cannot_be_written(host: Host) -> None:
    bundle = host.shop.bundle()
    bundle.write(["/bin/true"], {"NVIDIA_VISIBLE_DEVICES": "all", CHANNELS: "1"})
    bundle.config["hooks"] = {"prestart": 5}
    bundle.write()
    assert bundle.run(host.config).returncode == 1
    assert host.added() == set()


class _Made:
    def __init__(self) -> None:
        self.is_taken_back = False

    def take_back(self) -> None:
        self.is_taken_back = True


def test_nodes_of_the_wrapper_where_the_hook_cannot_look(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the lock cannot be opened a second time: what was made before is taken back with the start."""

    def fail(*_: object) -> None:
        raise ContainerError("no good")

    start = Start(configuration.load(str(host.config)), Spec(rootfs="/x"), Request((), (), (), ""), "first", [])
    made = _Made()
    start.made = made  # type: ignore[assignment]
    start.driver, start.layout = Driver("9.1", [], [], []), Layout("/usr/lib64", "/usr/lib32")
    monkeypatch.setattr(Start, "draw", lambda *_, **__: None)
    monkeypatch.setattr(modules, "make_nodes", lambda *_: None)
    monkeypatch.setattr(image_check, "check", fail)
    root = Root(os.open(tmp_path, DIRECTORY))
    with pytest.raises(ContainerError):
        prestart.prepare(start, root)
    assert made.is_taken_back


# Two starts at once: modules.py by itself


def _settings(place: Path) -> Config:
    path = place / "settings.toml"
    path.write_text(f'nvhook.dev-root = "{place}"\nnvhook.proc-root = "{place}"\nnvhook.state-dir = "{place}/state"\n')
    return configuration.load(str(path))


@pytest.fixture
def settings(tmp_path: Path) -> Config:
    (tmp_path / "dev/char").mkdir(parents=True)
    return _settings(tmp_path)


UVM = Device("/dev/nvidia-uvm", 511, 0, "rw", mode=0o666, uid=0, gid=0)
CHANNEL = Device("/dev/nvidia-caps-imex-channels/channel1", 237, 1, "rw", mode=0o666, uid=0, gid=0)
OTHER = Device("/dev/nvidia-caps-imex-channels/channel2", 237, 2, "rw", mode=0o666, uid=0, gid=0)


def _there(config: Config) -> set[str]:
    dev = Path(config.dev_root, "dev")
    return {str(path.relative_to(dev)) for path in dev.rglob("*")} - {"char"}


def _make(config: Config, start: str, *nodes: Device) -> modules.Made | None:
    warnings: list[str] = []
    made = modules.make_nodes(config, nodes, warnings, start)
    assert warnings == []
    return made


BOTH = {"nvidia-uvm", "char/511:0", "nvidia-caps-imex-channels", "nvidia-caps-imex-channels/channel1", "char/237:1"}


@pytest.mark.parametrize("by", ["descriptors", "mark"])
def test_taken_back(settings: Config, by: str) -> None:
    made = _make(settings, "first", UVM, CHANNEL)
    assert _there(settings) == BOTH
    if by == "mark":  # another process of the same start
        made = modules.made_by(settings, "first")
    assert made
    assert modules.made_by(settings, "second") is None
    made.take_back()
    assert _there(settings) == set()


def test_node_that_another_start_relies_on_stays(settings: Config) -> None:
    first = _make(settings, "first", UVM, CHANNEL)
    assert first
    assert _make(settings, "second", UVM) is None  # made nothing
    first.take_back()
    assert _there(settings) == {"nvidia-uvm", "char/511:0"}
    assert modules.made_by(settings, "second") is None


def test_directory_with_the_node_of_another_start_stays(settings: Config) -> None:
    first, second = _make(settings, "first", CHANNEL), _make(settings, "second", OTHER)
    assert first
    assert second
    first.take_back()
    assert _there(settings) == {
        "nvidia-caps-imex-channels",
        "nvidia-caps-imex-channels/channel2",
        "char/237:2",
    }
    second.take_back()
    assert not Path(settings.dev_root, "dev/char/237:2").is_symlink()


def test_directory_that_was_there_stays(settings: Config) -> None:
    directory = Path(settings.dev_root, "dev/nvidia-caps-imex-channels")
    directory.mkdir()
    made = _make(settings, "first", CHANNEL)
    assert made
    made.take_back()
    assert _there(settings) == {directory.name}


def test_kept_nodes_are_nobodys_to_take_back(settings: Config) -> None:
    made = _make(settings, "first", UVM)
    assert made
    made.keep()
    made.take_back()
    assert _there(settings) == {"nvidia-uvm", "char/511:0"}
    assert modules.made_by(settings, "first") is None


def test_nodes_of_an_administrator_are_not_taken_back(settings: Config) -> None:
    """Neither those that were there, nor what has taken the place of ours."""
    dev = Path(settings.dev_root, "dev")
    os.mknod(dev / "nvidia-uvm", stat.S_IFCHR | 0o600, os.makedev(511, 0))
    made = _make(settings, "first", UVM, CHANNEL)
    assert made
    (dev / "char/237:1").unlink()
    (dev / "char/237:1").symlink_to("/dev/nvidia-caps-imex-channels/channel1")
    made.take_back()
    assert _there(settings) == {"nvidia-uvm", "char/237:1"}


def test_nodes_made_for_nobody_stay(settings: Config) -> None:
    """`nvhook cdi generate` makes them for whoever comes."""
    made = _make(settings, "first", UVM)
    assert made
    assert _make(settings, "", UVM, CHANNEL) is None
    made.take_back()
    assert _there(settings) == BOTH


def test_half_made_node_of_a_process_that_was_killed(settings: Config) -> None:
    beside = Path(settings.dev_root, "dev/.nvidia-uvm.new")
    beside.touch()
    assert _make(settings, "first", UVM)
    assert _there(settings) == {"nvidia-uvm", "char/511:0"}


def test_one_warning_for_all_that_cannot_be_made(settings: Config) -> None:
    Path(settings.dev_root, "dev/nvidia-caps-imex-channels").touch()
    warnings: list[str] = []
    assert modules.make_nodes(settings, [CHANNEL, OTHER], warnings, "first")  # the links
    assert len(warnings) == 1
    assert warnings[0].endswith("channel1` on the host: file exists; the same for 1 more")
