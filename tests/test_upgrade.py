# SPDX-License-Identifier: Apache-2.0
"""A driver that is replaced under a loop of starts: each gets the right one or a clear error, never half of each."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from containers import REPOSITORY, WRAPPER, Bundle, Workshop, configure, server_of
from simhost.build import build

pytestmark = pytest.mark.root

OLD, NEW = "550.163.01", "560.35.03"
DESCRIPTION = REPOSITORY / "tests/hosts/a100x2-debian12.json"
ALL = {"NVIDIA_VISIBLE_DEVICES": "all"}
# What is mounted of a driver, and what its own programs make of it.
LOOK = [
    "/bin/sh",
    "-c",
    "cat /proc/self/mountinfo; ls -l /usr/lib/*/libcuda.so* /usr/lib/*/libnvidia-ml.so*; nvidia-smi -L",
]
ERRORS = (
    "driver error: the kernel module is version ",
    "driver error: no libraries of driver ",
    "disappeared while the container was prepared",
    "driver error: libcuda.so.1",
)


class Host:
    """A simulated host whose driver can be exchanged, as a package does it: new files, the old ones gone, the cache.

    The module is another one when it is loaded, last of all.
    """

    def __init__(self, place: Path) -> None:
        self.place = place / "host"
        self.trees = {}
        for version in (OLD, NEW):
            text = DESCRIPTION.read_text().replace(OLD, version)
            (place / f"{version}.json").write_text(text)
            self.trees[version] = place / version
            build(place / f"{version}.json", self.trees[version])
        subprocess.run(["cp", "-a", str(self.trees[OLD]), str(self.place)], check=True)

    def files(self, version: str) -> dict[str, Path]:
        top = self.trees[version] / "driver"
        return {str(path.relative_to(top)): path for path in top.rglob("*") if path.is_symlink() or path.is_file()}

    def install(self, version: str, pause: float) -> None:
        old, new = self.files(OLD if version == NEW else NEW), self.files(version)
        cache = "etc/ld.so.cache"
        for name in sorted(new.keys() - {cache}):
            self._put(name, new[name])
        time.sleep(pause)
        for name in sorted(old.keys() - new.keys()):
            (self.place / "driver" / name).unlink()
        time.sleep(pause)
        self._put(cache, new[cache])
        time.sleep(pause)

    def load(self, version: str) -> None:
        source = self.trees[version] / "proc/driver/nvidia/version"
        self._replace(source, self.place / "proc/driver/nvidia/version")

    def _put(self, name: str, source: Path) -> None:
        target = self.place / "driver" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        self._replace(source, target)

    def _replace(self, source: Path, target: Path) -> None:
        beside = target.with_name(f".{target.name}.new")
        beside.unlink(missing_ok=True)
        shutil.copy2(source, beside, follow_symlinks=False)
        os.rename(beside, target)


class Starts:
    """Containers, one after the other, in a thread of their own; what became of each is in `said`."""

    def __init__(self, shop: Workshop, config: Path, wrapper: Path) -> None:
        self.said: list[subprocess.CompletedProcess[str]] = []
        self._over = threading.Event()
        self._shop = shop
        self._config = config
        self._wrapper = wrapper
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._over.is_set():
            bundle = self._shop.bundle()
            self.said.append(bundle.write(LOOK, ALL).run(self._config, wrapper=self._wrapper))
            shutil.rmtree(bundle.rootfs)

    def __enter__(self) -> Starts:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def wait(self, count: int) -> None:
        """For so many more."""
        wanted = len(self.said) + count
        end = time.monotonic() + 60
        while len(self.said) < wanted and time.monotonic() < end:
            time.sleep(0.02)


@pytest.fixture
def shop() -> Iterator[Workshop]:
    with tempfile.TemporaryDirectory(prefix="nvhook-upgrade-") as name:
        yield Workshop(Path(name), lambda _: Path(name) / "host")


@pytest.fixture
def host(shop: Workshop) -> Host:
    return Host(shop.place)


@pytest.fixture(params=["source", "installed"])
def wrapper(request: pytest.FixtureRequest, shop: Workshop) -> Iterator[Path]:
    """The installed one has a server, through the whole upgrade."""
    if request.param == "source":
        yield WRAPPER
        return
    prefix = shop.place / "prefix"
    script = str(REPOSITORY / "scripts/install")
    subprocess.run([script, "install", str(prefix), f"{prefix}/etc"], check=True)
    yield prefix / "bin/nvidia-container-runtime"
    subprocess.run([script, "uninstall", str(prefix), f"{prefix}/etc"], check=True)


def _version(result: subprocess.CompletedProcess[str]) -> str:
    """The one whose files a container has; it is whole, and its programs work."""
    versions = set(re.findall(r"\.so\.(\d{3}\.[\d.]+)", result.stdout))
    assert len(versions) == 1, result.stdout
    assert result.stdout.count("\nGPU ") == 2, result.stdout + result.stderr
    return str(versions.pop())


def _hold(results: list[subprocess.CompletedProcess[str]]) -> list[str]:
    """The version that each got, or `refused` with a line that says why."""
    found = []
    for result in results:
        if result.returncode == 0:
            found.append(_version(result))
        else:
            assert any(error in result.stderr for error in ERRORS), result.stderr
            assert "Traceback" not in result.stderr
            found.append("refused")
    return found


def _server(wrapper: Path) -> int:
    """The server's process, which the installation alone has; 0 for none."""
    try:
        pid = int((server_of(wrapper.parent.parent) / "pid").read_text())
        return pid if Path(f"/proc/{pid}/comm").read_text() == "nvhook-server\n" else 0
    except OSError:
        return 0


def test_upgrade_under_a_loop_of_starts(shop: Workshop, host: Host, wrapper: Path) -> None:
    config = configure(host.place, shop.new("config.toml"), shop.new("state"))
    with Starts(shop, config, wrapper) as starts:
        starts.wait(3)
        before = len(starts.said)
        server = _server(wrapper)
        host.install(NEW, 0.3)
        starts.wait(2)
        between = len(starts.said)
        host.load(NEW)
        starts.wait(1)  # which may have begun before
        after = len(starts.said)
        starts.wait(3)
    assert _server(wrapper) == server
    assert bool(server) == (wrapper != WRAPPER)
    assert set(_hold(starts.said[:before])) == {OLD}
    # The module is the old one still: its libraries as long as they are there, and no others.
    assert NEW not in _hold(starts.said[:between])
    assert "refused" in _hold(starts.said[before:between])
    assert set(_hold(starts.said[after:])) == {NEW}


def test_container_that_is_there_is_restarted_afterwards(shop: Workshop, host: Host, wrapper: Path) -> None:
    """It keeps the files that it has, and gets the new ones with the next start of the same bundle."""
    config = configure(host.place, shop.new("config.toml"), shop.new("state"))
    bundle = shop.bundle().write(["/bin/sleep", "60"], ALL)
    output = shop.new("output")
    words = ("run", "--detach", "--bundle", str(bundle.directory), bundle.id)
    assert bundle.call(config, *words, wrapper=wrapper, output=output).returncode == 0
    try:
        host.install(NEW, 0)
        host.load(NEW)
        assert _version(_exec(bundle, config, wrapper)) == OLD
    finally:
        bundle.delete("runc")
    assert _version(bundle.write(LOOK, ALL).run(config, wrapper=wrapper)) == NEW


def _exec(bundle: Bundle, config: Path, wrapper: Path) -> subprocess.CompletedProcess[str]:
    return bundle.call(config, "exec", bundle.id, *LOOK, wrapper=wrapper)


def test_error_between_the_two_names_both(shop: Workshop, host: Host) -> None:
    config = configure(host.place, shop.new("config.toml"), shop.new("state"))
    host.install(NEW, 0)
    result = shop.bundle().write(LOOK, ALL).run(config)
    assert result.returncode == 1
    assert f"the kernel module is version {OLD} and the libraries" in result.stderr
    assert NEW in result.stderr
    assert "reboot" in result.stderr


@pytest.mark.parametrize("name", ["inventory.json", "nvml.json"])
@pytest.mark.parametrize("content", [b"", b'{"format": 4, "dri', b"\xff\xfe\x00", b"[" * 100_000])
def test_kept_file_that_a_reboot_broke_off(shop: Workshop, host: Host, name: str, content: bytes) -> None:
    """And one beside it that was never renamed."""
    state = shop.new("state")
    config = configure(host.place, shop.new("config.toml"), state)
    state.mkdir()
    (state / name).write_bytes(content)
    (state / f"{name}.4194305").write_bytes(content)  # the number of no process
    assert _version(shop.bundle().write(LOOK, ALL).run(config)) == OLD


def test_state_directory_that_is_full(shop: Workshop, host: Host) -> None:
    """Nothing can be kept, and the container starts."""
    state = shop.new("state")
    config = configure(host.place, shop.new("config.toml"), state)
    state.mkdir()
    bundle = shop.bundle().write(LOOK, ALL)
    fill = 'mount -t tmpfs -o size=4k,mode=755 tmpfs "$0"; cat /dev/zero >"$0/x" 2>/dev/null || :; exec "$@"'
    full = ("unshare", "--mount", "sh", "-euc", fill, str(state))
    bundle.through = (*bundle.through, *full)
    assert _version(bundle.run(config)) == OLD
