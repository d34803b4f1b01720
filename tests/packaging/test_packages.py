# SPDX-License-Identifier: Apache-2.0
"""The packages: installed, upgraded, removed and purged in a fresh Debian, and a container started from each.

The system is made once by debootstrap; every test has its own layer over it, and is in it with a mount and a process
namespace of its own, so that nothing stays.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import containers
from conftest import cannot
from containers import REPOSITORY, Workshop, gpu_lines
from simhost.build import build

pytestmark = pytest.mark.root

HOST = "a100x2"
HOSTS = REPOSITORY / "tests/hosts"
BOTH = gpu_lines(HOST, 0, 1)
CONFIG = "/etc/nvidia-container-runtime/config.toml"
TOOLS = ("debootstrap", "dpkg-deb", "lintian", "rpmbuild", "rpm")

_ENTER = """
place=$1 lower=$2 shared=$3
shift 3
mount --make-rprivate /
mkdir -p "$place/upper" "$place/work" "$place/root"
mount -t overlay -o "lowerdir=$lower,upperdir=$place/upper,workdir=$place/work" overlay "$place/root"
cd "$place/root"
for name in sys dev; do mount --rbind "/$name" "$name"; done
mount -t proc proc proc
mount -t tmpfs -o mode=755 tmpfs run
mkdir -p "./$shared"
mount --rbind "$shared" "./$shared"
pivot_root . mnt
cd /
umount --lazy /mnt
exec "$@"
"""


class System:
    """A fresh Debian; what is in `shared` is seen there under its own path."""

    def __init__(self, shop: Workshop, debian: Path) -> None:
        place = shop.new("system")
        unshare = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-euc", _ENTER, "sh")
        self.enter = (*unshare, str(place), str(debian), str(shop.place))
        self.shop = shop
        self.layer = place / "upper"

    def run(self, *command: str, config: str = "") -> str:
        """What it prints, on both streams; it has to succeed. `config`: another config.toml."""
        words = ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND=noninteractive"]
        words += [f"NVHOOK_CONFIG={config}"] if config else []
        done = subprocess.run(
            [*self.enter, *words, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def starts_a_container(self) -> bool:
        bundle = self.shop.bundle().write(["/bin/sh", "-c", "nvidia-smi -L"], {"NVIDIA_VISIBLE_DEVICES": "all"})
        bundle.through = (*containers.any_cgroups(), *self.enter)
        config = self.shop.config(HOST)
        result = bundle.call(config, "run", "--bundle", str(bundle.directory), bundle.id, wrapper=_WRAPPER)
        assert (result.returncode, result.stdout, result.stderr) == (0, BOTH, "")
        return True

    def files(self) -> list[str]:
        """Of ours, below /usr, /etc and /run."""
        listing = self.run(
            "find", "/usr", "/etc", "-name", "*nvhook*", "-o", "-name", "nvidia-*", "-o", "-name", "nvidia"
        )
        return [line for line in listing.splitlines() if not line.startswith(str(self.shop.place))]


_WRAPPER = Path("/usr/bin/nvidia-container-runtime")


@pytest.fixture(scope="module")
def shop() -> Iterator[Workshop]:
    """With its simulated host inside, because it is all that a system sees of this machine."""
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        cannot(f"{', '.join(missing)}: not installed")
    with tempfile.TemporaryDirectory(prefix="nvhook-packages-") as name:
        host = Path(name) / "host"
        (description,) = HOSTS.glob(f"{HOST}*.json")
        build(description, host)
        yield Workshop(Path(name), lambda _: host)


@pytest.fixture(scope="module")
def debian(shop: Workshop) -> Path:
    place = shop.place.with_name(shop.place.name + "-debian")
    depends = next(line for line in _control().splitlines() if line.startswith("Depends:"))
    names = [item.split()[0] for item in depends.removeprefix("Depends:").split(", ")]
    include = ",".join(dict.fromkeys(names))
    command = ["debootstrap", "--variant=minbase", f"--include={include}", "bookworm", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        cannot(f"debootstrap: {done.stdout.strip().splitlines()[-1]}")
    return place


def _control() -> str:
    return (REPOSITORY / "packaging/deb/control").read_text()


def _build(kind: str, place: Path, version: str = "") -> Path:
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **({"NVHOOK_VERSION": version} if version else {})}
    command = [str(REPOSITORY / "packaging/build"), kind, str(place)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return Path(done.stdout.strip())


@pytest.fixture(scope="module")
def deb(shop: Workshop) -> Path:
    return _build("deb", shop.place / "dist")


@pytest.fixture(scope="module")
def rpm(shop: Workshop) -> Path:
    return _build("rpm", shop.place / "dist")


@pytest.fixture
def system(shop: Workshop, debian: Path) -> System:
    return System(shop, debian)


# The packages themselves


@pytest.mark.parametrize("kind", ["deb", "rpm"])
def test_same_bytes_twice(request: pytest.FixtureRequest, shop: Workshop, kind: str) -> None:
    first = request.getfixturevalue(kind)
    assert _build(kind, shop.new("again")).read_bytes() == first.read_bytes()


def test_lintian_finds_no_error(deb: Path) -> None:
    done = subprocess.run(["lintian", "--allow-root", str(deb)], capture_output=True, text=True, check=False)
    assert [line for line in done.stdout.splitlines() if line.startswith("E:")] == []


def test_readme_of_debian_names_what_is_bundled(deb: Path) -> None:
    listing = subprocess.run(["dpkg-deb", "--contents", str(deb)], capture_output=True, text=True, check=True).stdout
    paths = [line.split()[5] for line in listing.splitlines() if not line.startswith("l")]
    names = {path.split("/")[5] for path in paths if path.startswith("./usr/lib/nvhook/packages/")} - {""}
    assert {name for name in names if not name.endswith(".dist-info")} == {"pynvml.py", "tomlkit", "shtab"}
    text = (REPOSITORY / "packaging/deb/README.Debian").read_text()
    assert all(name in text for name in ("nvidia-ml-py", "tomlkit", "shtab"))


# Its life on a machine


def test_install_remove_purge(system: System, deb: Path) -> None:
    before = system.files()
    said = system.run("dpkg", "--install", str(deb))
    assert "No driver yet: " in said
    assert "nvhook configure docker" in said
    assert system.run("nvhook", "--version").startswith("nvhook ")
    for name in ("nvhook/__pycache__/prestart", "packages/__pycache__/pynvml", "packages/tomlkit/__pycache__/items"):
        assert list((system.layer / "usr/lib/nvhook").glob(f"{name}.*.pyc"))
    assert system.starts_a_container()
    system.run("dpkg", "--remove", "nvhook")
    assert (system.layer / CONFIG[1:]).exists()
    assert not (system.layer / "usr/lib/nvhook").exists()
    system.run("dpkg", "--purge", "nvhook")
    assert system.files() == before


def test_people_s_commands_with_debian_s_python_packages(system: System, deb: Path) -> None:
    system.run("dpkg", "--install", str(deb))
    config = str(system.shop.config(HOST))
    assert "NVIDIA A100-SXM4-40GB" in system.run("nvhook", "info", config=config)
    assert "libcuda.so" in system.run("nvhook", "list", "compute", config=config)
    assert "cdiVersion" in system.run("nvhook", "cdi", "generate", config=config)
    assert system.run("nvhook", "config", "check") == "ok\n"
    assert "Driver 550.163.01: " in system.run("nvhook", "refresh", config=config)
    assert "_shtab_nvhook" in system.run("nvhook", "completion", "bash")
    plan = system.run("nvhook", "plan", "--rootfs", "/", "--env", "NVIDIA_VISIBLE_DEVICES=all", config=config)
    assert "/dev/nvidia0" in plan
    assert "no GPU of NVIDIA's" in system.run("nvhook", "doctor", "--no-container")


def test_upgrade_keeps_the_configuration(system: System, shop: Workshop, deb: Path) -> None:
    older = _build("deb", shop.new("older"), "0.0.9")
    system.run("dpkg", "--install", str(older))
    assert system.run("nvhook", "--version") == "nvhook 0.0.9\n"
    path = system.layer / CONFIG[1:]
    path.write_text(path.read_text().replace('log-level = "info"', 'log-level = "debug"'))
    said = system.run("dpkg", "--install", str(deb))
    assert "nvhook configure docker" not in said  # he has done that
    assert system.run("nvhook", "--version") != "nvhook 0.0.9\n"
    assert 'log-level = "debug"' in path.read_text()
    assert system.starts_a_container()


# NVIDIA's package, as far as it concerns ours.
_THEIRS = """\
Package: nvidia-container-toolkit
Version: 1.17.8-1
Architecture: all
Maintainer: x <x@example.org>
Description: x
"""


@pytest.mark.parametrize("is_edited", [True, False])
def test_takes_the_place_of_nvidia_s(system: System, shop: Workshop, deb: Path, is_edited: bool) -> None:
    """Nobody is there to answer a question."""
    tree = shop.new("theirs")
    for name, text in {
        "DEBIAN/control": _THEIRS,
        "DEBIAN/conffiles": f"{CONFIG}\n",
        CONFIG[1:]: "disable-require = true\n",
        "usr/bin/nvidia-container-runtime": "#!/bin/sh\n",
        "usr/bin/nvidia-container-runtime-hook": "#!/bin/sh\n",
    }.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    theirs = shop.new("theirs.deb")
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "--build", str(tree), str(theirs)], check=True, capture_output=True
    )
    system.run("dpkg", "--install", str(theirs))
    path = system.layer / CONFIG[1:]
    text = "disable-require = true\n# mine\n" if is_edited else path.read_text()
    path.write_text(text)
    system.run("dpkg", "--install", str(deb))
    assert path.read_text() == text
    assert system.starts_a_container()


def test_removal_takes_the_runtime_out_of_the_engine(system: System, deb: Path) -> None:
    system.run("dpkg", "--install", str(deb))
    daemon = "/etc/docker/daemon.json"
    system.run("sh", "-c", f"mkdir /etc/docker; echo '{{}}' >{daemon}; nvhook configure docker --config-file {daemon}")
    assert "nvidia-container-runtime" in (system.layer / daemon[1:]).read_text()
    system.run("dpkg", "--remove", "nvhook")
    assert (system.layer / daemon[1:]).read_text() == "{}\n"


def test_rpm(system: System, rpm: Path) -> None:
    """Without dnf, and over Debian's files: what it needs is there under other names."""
    root = system.layer.with_name("rpm")
    root.mkdir(parents=True)
    command = ["rpm", "--root", str(root), "--nodeps", "--noscripts", "--install", str(rpm)]
    subprocess.run(command, check=True, capture_output=True)
    for name in ("usr", "etc"):
        shutil.copytree(root / name, system.layer / name, symlinks=True, dirs_exist_ok=True)
    script = subprocess.run(["rpm", "-qp", "--scripts", str(rpm)], check=True, capture_output=True, text=True).stdout
    post = script.partition("postinstall scriptlet")[2].partition("\n")[2].partition("preuninstall")[0]
    assert "No driver yet: " in system.run("sh", "-euc", post, "sh", "1")
    assert system.starts_a_container()
    pre = script.partition("preuninstall scriptlet")[2].partition("\n")[2]
    system.run("sh", "-euc", pre, "sh", "0")
    listed = subprocess.run(["rpm", "-qp", "--configfiles", str(rpm)], check=True, capture_output=True, text=True)
    assert listed.stdout == f"{CONFIG}\n"
