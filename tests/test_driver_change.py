# SPDX-License-Identifier: Apache-2.0
"""A start in each of the states that a driver upgrade goes through, and with an upgrade in the middle of it.

A simulated host goes from driver OLD to driver NEW in the steps of a package manager. What a container has got, its own
mounts tell: one driver, that of the loaded kernel module, or an error. test_upgrade.py has the loop of starts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import containers
from conftest import HOSTS
from containers import HOOK, WRAPPER, Bundle, Workshop
from installed import Installed
from simhost.build import build

pytestmark = pytest.mark.root

NAME = "a100x2"
OLD, NEW = "550.163.01", "570.86.15"
ALL = {"NVIDIA_VISIBLE_DEVICES": "all", "NVIDIA_DRIVER_CAPABILITIES": "all"}
LOOK = ["/bin/sh", "-c", "cat /proc/self/mountinfo; nvidia-smi"]
CACHE = "etc/ld.so.cache"
# What a start may say in the middle of it. `VERSION` is the module's.
MIXED = f"the kernel module is version {OLD} and the libraries below `HOST/driver` are version {NEW}"
REMEDY = "the driver was changed without loading the new module: reboot, or reinstall the driver"


class Host:
    """A simulated host with driver OLD, whose inventory is kept already; the acts are those of an upgrade."""

    def __init__(self, place: Path, config: Path, newer: Path) -> None:
        self.place = place
        self.config = config
        self.driver = place / "driver"
        self.newer = newer

    def unpack(self) -> None:
        """The new files beside the old ones: links lead to them, and what has no version in its name is theirs."""
        for path in sorted((self.newer / "driver").rglob("*")):
            name = path.relative_to(self.newer / "driver")
            if str(name) != CACHE and (path.is_symlink() or path.is_file()):
                _replace(path, self.driver / name)

    def remove(self, name: str = "") -> None:
        """The old files, or those of that name."""
        for path in list(self.driver.rglob(f"{name}*{OLD}*")):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def run_ldconfig(self) -> None:
        _replace(self.newer / "driver" / CACHE, self.driver / CACHE)

    def unload(self) -> None:
        (self.place / "proc/driver/nvidia/version").unlink()

    def reload(self) -> None:
        """The new module, whose nvidia-uvm has another major."""
        _replace(self.newer / "proc/devices", self.place / "proc/devices")
        _replace(self.newer / "proc/driver/nvidia/version", self.place / "proc/driver/nvidia/version")
        for path in (self.newer / "dev").glob("nvidia-uvm*"):
            (self.place / "dev" / path.name).unlink()
            os.mknod(self.place / "dev" / path.name, path.lstat().st_mode, path.lstat().st_rdev)

    def upgrade(self) -> None:
        for act in (self.unpack, self.remove, self.run_ldconfig, self.unload, self.reload):
            act()


def _replace(source: Path, target: Path) -> None:
    """In one step, as package managers do it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f"{target.name}.new")
    subprocess.run(["cp", "-a", str(source), str(beside)], check=True)
    beside.rename(target)


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same host, with driver NEW."""
    (description,) = HOSTS.glob(f"{NAME}*.json")
    text = description.read_text().replace(OLD, NEW).replace("511 nvidia-uvm", "510 nvidia-uvm")
    document = json.loads(text)
    for node in document["device_nodes"]:
        if "uvm" in node["path"]:
            node["major"] = 510
    place = tmp_path_factory.mktemp("newer")
    build(document, place)
    return place


@pytest.fixture
def host(shop: Workshop, newer: Path) -> Host:
    copy, config = shop.copy_of(NAME)
    made = Host(copy, config, newer)
    assert _driver(_start(shop.bundle(), made)) == OLD
    return made


def _start(
    bundle: Bundle, host: Host, wrapper: Path = WRAPPER, *, config: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return bundle.write(LOOK, ALL).run(config or host.config, wrapper=wrapper)


def _driver(result: subprocess.CompletedProcess[str]) -> str:
    """The one version of everything that the container has got; a start that failed is none."""
    assert (result.returncode, result.stderr) == (0, "")
    mounted = [line.split()[3] for line in result.stdout.splitlines() if "/driver/" in line]
    libraries = [path for path in mounted if ".so." in path]
    assert len(libraries) > 20
    found: set[str] = {
        match for path in mounted for match in re.findall(r"\d{3}\.\d+\.\d+", path.rpartition("/driver/")[2])
    }
    found |= set(re.findall(r"Driver Version: (\S+)", result.stdout))
    assert len(found) == 1, found
    return found.pop()


# The states that an upgrade goes through


@pytest.mark.parametrize(
    ("acts", "expected"),
    [
        pytest.param("unpack", OLD, id="new-files-beside-the-old-ones"),
        pytest.param("unpack run_ldconfig", OLD, id="both-and-a-new-cache"),
        pytest.param("unpack remove", f"{MIXED}; {REMEDY}", id="old-ones-removed-cache-not-rebuilt"),
        pytest.param("unpack remove run_ldconfig", f"{MIXED}; {REMEDY}", id="old-ones-removed"),
        pytest.param("remove", f"no libraries of driver {OLD} below `HOST/driver`", id="libraries-removed"),
        pytest.param("unpack remove run_ldconfig unload", "the nvidia kernel module is not loaded", id="unloaded"),
        pytest.param("reload", f"the kernel module is version {NEW} and the libraries below", id="module-first"),
        pytest.param("unpack reload", NEW, id="new-module-old-files-and-cache-there"),
        pytest.param("unpack run_ldconfig reload", NEW, id="new-module-old-files-there"),
        pytest.param("upgrade", NEW, id="done"),
    ],
)
def test_state(shop: Workshop, host: Host, acts: str, expected: str) -> None:
    for act in acts.split():
        getattr(host, act)()
    result = _start(shop.bundle(), host)
    if expected in (OLD, NEW):
        assert _driver(result) == expected
        return
    assert result.returncode == 1
    assert expected.replace("HOST", str(host.place)) in result.stderr


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param("libcuda.so", "libcuda", id="libcuda"),
        pytest.param("libnvidia-ml.so", "libnvidia-ml", id="nvml"),
    ],
)
def test_library_that_is_the_new_one_already(shop: Workshop, host: Host, name: str, expected: str) -> None:
    """Package by package: the one that counts is not there in the module's version any more."""
    host.unpack()
    host.remove(name)
    result = _start(shop.bundle(), host)
    assert result.returncode == 1
    assert expected in result.stderr


# In the middle of one start


MEANWHILE = """\
#!/bin/sh
case " $* " in *" run "*) ;; *) exec {runc} "$@" ;; esac
for word; do
    [ "${{last-}}" != --bundle ] || bundle=$word
    last=$word
done
pid=$(sed -n 's/.*"--child","\\([0-9]*\\)".*/\\1/p' "$bundle/config.json")
[ "$pid" ] || exit {nobody}
{what}
touch {place}/is-made
until [ -e {place}/go-on ]; do sleep 0.02; done
exec {runc} "$@"
"""
KILL = "sleep 0.3; kill -9 $pid"
NOBODY = 99  # the server did not answer within 200 ms, and no process prepares for this container


@pytest.fixture
def between(shop: Workshop, host: Host, installed: Installed) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A start in which `acts` are done between the wrapper and the hook."""

    def start(acts: str, what: str) -> subprocess.CompletedProcess[str]:
        place = shop.new("between")
        place.mkdir()
        runtime = place / "runtime"
        runc = shutil.which("runc")
        runtime.write_text(MEANWHILE.format(what=what, place=place, runc=runc, nobody=NOBODY))
        runtime.chmod(0o755)
        config = containers.configure(host.place, place / "config.toml", host.place / "run", runtime=str(runtime))
        is_over = threading.Event()

        def meanwhile() -> None:
            while not (place / "is-made").exists():
                if is_over.wait(0.02):
                    return
            for act in acts.split():
                getattr(host, act)()
            (place / "go-on").touch()

        thread = threading.Thread(target=meanwhile)
        thread.start()
        try:
            return _start(shop.bundle(), host, installed.wrapper, config=config)
        finally:
            is_over.set()
            thread.join()

    def start_until_prepared(acts: str, what: str) -> subprocess.CompletedProcess[str]:
        results = (start(acts, what) for _ in range(20))
        return next(result for result in results if result.returncode != NOBODY)

    return start_until_prepared


@pytest.mark.parametrize(
    ("what", "acts", "expected"),
    [
        pytest.param("sleep 0.3", "unpack run_ldconfig", OLD, id="prepared-new-ones-beside"),
        pytest.param("sleep 0.3", "unpack remove", MIXED, id="prepared-has-opened-what-is-removed"),
        pytest.param(KILL, "unpack remove", MIXED, id="hook-finds-it-removed"),
        pytest.param("sleep 0.3", "upgrade", f"driver {OLD} was replaced by {NEW}", id="prepared-of-the-old-driver"),
        pytest.param(KILL, "upgrade", NEW, id="hook-of-the-new-driver"),
        pytest.param("sleep 0.3", "unload", "the nvidia kernel module is not loaded", id="prepared-module-unloaded"),
        pytest.param(KILL, "unload", "the nvidia kernel module is not loaded", id="hook-module-unloaded"),
    ],
)
def test_between_wrapper_and_hook(
    between: Callable[..., subprocess.CompletedProcess[str]], host: Host, what: str, acts: str, expected: str
) -> None:
    result = between(acts, what)
    if expected in (OLD, NEW):
        assert _driver(result) == expected
        return
    assert result.returncode == 1
    assert expected.replace("HOST", str(host.place)) in result.stderr


def test_container_that_the_hook_alone_has_started(shop: Workshop, host: Host) -> None:
    """As for `docker run --gpus`: nobody cleans up when it ends, so its layer has the empty files of the old driver."""
    bundle = shop.bundle()
    words = ["hook", "--config", str(host.config), "prestart"]
    bundle.config["hooks"] = {"prestart": [{"path": str(HOOK), "args": words, "env": ["PATH=/usr/bin:/bin"]}]}
    runc = Path(shutil.which("runc") or "runc")
    bundle.write(LOOK, ALL)
    assert _driver(bundle.run(None, wrapper=runc)) == OLD
    assert list(bundle.rootfs.rglob(f"libcuda.so.{OLD}"))
    host.upgrade()
    assert _driver(bundle.run(None, wrapper=runc)) == NEW
