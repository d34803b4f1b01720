# SPDX-License-Identifier: Apache-2.0
"""The packages: installed, upgraded, removed and purged in a fresh system, and a container started from each.

The system is made once by debootstrap; every test has its own layer over it, and is in it with a mount and a process
namespace of its own, so that nothing stays.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

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
place=$1 lower=$2 shared=$3 without=$4
shift 4
mount --make-rprivate /
mkdir -p "$place/upper" "$place/work" "$place/root"
[ -z "$without" ] || [ -e "$place/upper/$without" ] || mknod "$place/upper/$without" c 0 0
mount -t overlay -o "lowerdir=$lower,upperdir=$place/upper,workdir=$place/work" overlay "$place/root"
cd "$place/root"
for name in sys dev; do mount --rbind "/$name" "$name"; done
mount -t proc proc proc
[ ! -d run ] || mount -t tmpfs -o mode=755 tmpfs run
mkdir -p "./$shared"
mount --rbind "$shared" "./$shared"
pivot_root . mnt
cd /
umount --lazy /mnt
exec "$@"
"""


class System:
    """A fresh Debian; the shop's place is seen there under its own path. The directory `without` is not there."""

    def __init__(self, shop: Workshop, debian: Path, without: str = "") -> None:
        place = shop.new("system")
        unshare = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-euc", _ENTER, "sh")
        self.enter = (*unshare, str(place), str(debian), str(shop.place), without)
        self.shop = shop
        self.layer = place / "upper"

    def run(self, *command: str, config: str = "") -> str:
        """What it prints, on both streams; it has to succeed. `config`: another config.toml."""
        words = ["env", "-i", f"PATH={_PATH}", "DEBIAN_FRONTEND=noninteractive"]
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


_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
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
def debian() -> Iterator[Callable[[str], Path]]:
    """A release's root directory, by its name. NVHOOK_ROOT: that of another distribution, with what ours depends on."""
    depends = next(line for line in _control().splitlines() if line.startswith("Depends:"))
    names = [item.split()[0] for item in depends.removeprefix("Depends:").split(", ")]

    @functools.cache
    def made(release: str) -> Path:
        if chosen := os.environ.get("NVHOOK_ROOT"):
            return Path(chosen)
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"nvhook-{release}-")))
        place.chmod(0o755)
        include = ",".join(dict.fromkeys([*names, *_MORE[release]]))
        command = ["debootstrap", "--variant=minbase", f"--include={include}", release, str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            cannot(f"debootstrap: {done.stdout.strip().splitlines()[-1]}")
        return place

    with contextlib.ExitStack() as stack:
        yield made


_MORE = {"bookworm": ["dnf"], "trixie": []}


def _control() -> str:
    return (REPOSITORY / "packaging/deb/control").read_text()


def _build(kind: str, place: Path, version: str = "", architecture: str = "") -> Path:
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **({"NVHOOK_VERSION": version} if version else {})}
    env |= {"NVHOOK_ARCH": architecture} if architecture else {}
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
def system(request: pytest.FixtureRequest, shop: Workshop, debian: Callable[[str], Path]) -> System:
    return System(shop, debian(getattr(request, "param", "bookworm")))


# Its Python is two versions newer, and so are the packages of Python's.
BOTH_RELEASES = pytest.mark.parametrize("system", ["bookworm", "trixie"], indirect=True)


# The packages themselves


@pytest.mark.parametrize("kind", ["deb", "rpm"])
def test_same_bytes_twice(request: pytest.FixtureRequest, shop: Workshop, kind: str) -> None:
    first = request.getfixturevalue(kind)
    assert _build(kind, shop.new("again")).read_bytes() == first.read_bytes()


@pytest.mark.parametrize(("architecture", "machine"), [("amd64", "x64"), ("arm64", "AArch64")])
def test_launchers_of_each_architecture(shop: Workshop, architecture: str, machine: str) -> None:
    """Static, position-independent programs."""
    made = _build("deb", shop.new("dist"), architecture=architecture)
    assert made.name.endswith(f"_{architecture}.deb")
    field = subprocess.run(["dpkg-deb", "--field", made, "Architecture"], check=True, capture_output=True, text=True)
    assert field.stdout == f"{architecture}\n"
    place = shop.new("unpacked")
    subprocess.run(["dpkg-deb", "--extract", made, place], check=True)
    for name in ("nvidia-container-runtime", "nvidia-container-runtime-hook"):
        with (place / "usr/bin" / name).open("rb") as file:
            elf = ELFFile(file)
            assert (elf.get_machine_arch(), elf["e_type"]) == (machine, "ET_DYN")
            assert "PT_INTERP" not in {segment["p_type"] for segment in elf.iter_segments()}
            assert b"/usr/lib/nvhook" in (place / "usr/bin" / name).read_bytes()


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


@BOTH_RELEASES
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


@BOTH_RELEASES
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


def _package(shop: Workshop, name: str, files: dict[str, str]) -> Path:
    """Another deb."""
    control = f"Package: {name}\nVersion: 1.17.8-1\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: x\n"
    tree = shop.new("tree")
    for path, text in {"DEBIAN/control": control, **files}.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(text)
    made = shop.new("deb")
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", str(tree), str(made)], check=True, capture_output=True)
    return made


@pytest.fixture
def theirs(shop: Workshop) -> Path:
    """NVIDIA's package, as far as it concerns ours."""
    files = {
        "DEBIAN/conffiles": f"{CONFIG}\n",
        CONFIG[1:]: "disable-require = true\n",
        "usr/bin/nvidia-container-runtime": "#!/bin/sh\n",
        "usr/bin/nvidia-container-runtime-hook": "#!/bin/sh\n",
    }
    return _package(shop, "nvidia-container-toolkit", files)


_WAYS = {
    "apt": ["apt-get install --yes --no-install-recommends {deb}"],
    "dpkg": ["dpkg --install {deb}"],
    "in-two-steps": ["dpkg --unpack {deb}", "dpkg --configure nvhook"],
    "broken-off": ["dpkg --unpack {deb}", "dpkg --install {deb}"],
    "removed-before": ["dpkg --remove nvidia-container-toolkit", "dpkg --install {deb}"],
}


@pytest.mark.parametrize("is_edited", [True, False], ids=["edited", "as-shipped"])
@pytest.mark.parametrize("way", _WAYS)
def test_takes_the_place_of_nvidia_s(system: System, theirs: Path, deb: Path, way: str, is_edited: bool) -> None:
    """Nobody is there to answer a question; their configuration stays, also when the rest of theirs is purged."""
    system.run("dpkg", "--install", str(theirs))
    path = system.layer / CONFIG[1:]
    text = "disable-require = true\n# mine\n" if is_edited else path.read_text()
    path.write_text(text)
    for command in _WAYS[way]:
        system.run(*command.format(deb=deb).split())
        aside = path.with_name(path.name + ".before-nvhook")
        assert (aside if aside.exists() else path).read_text() == text
    assert path.read_text() == text
    assert system.starts_a_container()
    system.run("dpkg", "--purge", "nvidia-container-toolkit")
    assert path.read_text() == text
    system.run("dpkg", "--purge", "nvhook")
    assert not path.exists()


def test_installation_that_goes_no_further_than_preinst(
    system: System, shop: Workshop, theirs: Path, deb: Path
) -> None:
    """One of our files is another package's, which dpkg finds while it unpacks."""
    system.run("dpkg", "--install", str(theirs))
    system.run("dpkg", "--remove", "nvidia-container-toolkit")
    system.run("dpkg", "--install", str(_package(shop, "other", {"usr/bin/nvhook": "#!/bin/sh\n"})))
    assert "which is also in package other" in system.run("sh", "-c", f"! dpkg --install {deb}")
    assert (system.layer / CONFIG[1:]).read_text() == "disable-require = true\n"
    assert [path.name for path in (system.layer / CONFIG[1:]).parent.iterdir()] == ["config.toml"]


def test_removal_takes_the_runtime_out_of_the_engine(system: System, deb: Path) -> None:
    system.run("dpkg", "--install", str(deb))
    daemon = "/etc/docker/daemon.json"
    system.run("sh", "-c", f"mkdir /etc/docker; echo '{{}}' >{daemon}; nvhook configure docker --config-file {daemon}")
    assert "nvidia-container-runtime" in (system.layer / daemon[1:]).read_text()
    system.run("dpkg", "--remove", "nvhook")
    assert (system.layer / daemon[1:]).read_text() == "{}\n"


def test_removal_names_what_it_cannot_take_out(system: System, deb: Path) -> None:
    system.run("dpkg", "--install", str(deb))
    system.run("sh", "-c", "echo '{}' >/etc/elsewhere.json")
    system.run("nvhook", "configure", "docker", "--config-file", "/etc/elsewhere.json")
    assert "a file of an engine still names this runtime: see `/etc/" in system.run("dpkg", "--remove", "nvhook")


def test_another_python_gets_bytecode_of_its_own(system: System, deb: Path) -> None:
    system.run("dpkg", "--install", str(deb))
    shutil.rmtree(system.layer / "usr/lib/nvhook/nvhook/__pycache__")
    system.run("dpkg-trigger", "--no-await", "--by-package=python3-minimal", "/usr/bin/python3")
    system.run("dpkg", "--configure", "--pending")
    assert list((system.layer / "usr/lib/nvhook/nvhook/__pycache__").glob("prestart.*.pyc"))


def test_half_of_nvidia_s_toolkit_is_named(system: System, deb: Path) -> None:
    other = system.layer / "usr/local/bin/nvidia-container-runtime"
    other.parent.mkdir(parents=True)
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    line = (
        f"nvhook: `/{other.relative_to(system.layer)}` is found before `{_WRAPPER}`: remove it, or see `nvhook doctor`"
    )
    assert line in system.run("dpkg", "--install", str(deb)).splitlines()


def test_host_without_run(shop: Workshop, debian: Callable[[str], Path], deb: Path) -> None:
    system = System(shop, debian("bookworm"), without="run")
    system.run("dpkg", "--install", str(deb))
    assert system.starts_a_container()
    system.run("dpkg", "--purge", "nvhook")


# The rpm, by dnf over Debian's files: what it needs is there under other names

_SPEC = """\
Name: {name}
Version: 1.17.8
Release: 1
Summary: x
License: x
BuildArch: noarch
AutoReqProv: no
{more}
%description
x
%install
cp -a {tree}/. %{{buildroot}}
%files
{files}
"""


def _rpm(shop: Workshop, name: str, more: str, files: dict[str, str]) -> Path:
    """Another rpm; those of its files below /etc are configuration."""
    tree, top = shop.new("tree"), shop.new("top")
    for path, text in files.items():
        (tree / path[1:]).parent.mkdir(parents=True, exist_ok=True)
        (tree / path[1:]).write_text(text)
    tree.mkdir(exist_ok=True)
    top.mkdir()
    listed = "\n".join(f"%config {path}" if path.startswith("/etc/") else path for path in files)
    (top / "spec").write_text(_SPEC.format(name=name, more=more, tree=tree, files=listed))
    defined = {"_topdir": top, "_rpmdir": top, "_rpmfilename": f"{name}.rpm"}
    options = [word for key, value in defined.items() for word in ("--define", f"{key} {value}")]
    subprocess.run(["rpmbuild", "-bb", "--quiet", *options, str(top / "spec")], check=True, capture_output=True)
    return top / f"{name}.rpm"


def test_rpm_takes_the_place_of_nvidia_s_and_goes(system: System, shop: Workshop, rpm: Path) -> None:
    if not (Path(system.enter[-3]) / "usr/bin/dnf").exists():
        cannot("no dnf in NVHOOK_ROOT")
    fedora = _rpm(shop, "fedora", "Provides: python3 = 3.11, runc = 1.1, /bin/sh", {})
    binaries = {f"/usr/bin/nvidia-container-runtime{more}": "#!/bin/sh\n" for more in ("", "-hook")}
    theirs = _rpm(shop, "nvidia-container-toolkit", "", {CONFIG: "disable-require = true\n", **binaries})
    older = _build("rpm", shop.new("older"), "0.0.9")

    def dnf(*words: str | Path) -> str:
        return system.run("dnf", "--assumeyes", "--disablerepo=*", *map(str, words))

    dnf("install", fedora, theirs)
    path = system.layer / CONFIG[1:]
    path.write_text("disable-require = true\n# mine\n")
    said = dnf("install", "--allowerasing", older)
    assert "No driver yet: " in said
    assert "nvhook configure docker" in said
    assert system.run("nvhook", "--version") == "nvhook 0.0.9\n"
    assert system.starts_a_container()
    assert "nvhook configure docker" not in dnf("install", rpm)
    assert system.run("nvhook", "--version") != "nvhook 0.0.9\n"
    assert list((system.layer / "usr/lib/nvhook/nvhook/__pycache__").glob("prestart.*.pyc"))
    assert system.starts_a_container()
    assert path.read_text() == "disable-require = true\n# mine\n"
    dnf("remove", "nvhook")
    assert sorted(file.name for file in path.parent.iterdir()) == ["config.toml.rpmnew", "config.toml.rpmsave"]
    assert not (system.layer / "usr/lib/nvhook").exists()
