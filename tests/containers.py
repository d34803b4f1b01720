# SPDX-License-Identifier: Apache-2.0
"""Images made of this machine's own files, bundles, and real containers started from them with runc or crun.

No image is pulled. The glibc families hold the shell tools (busybox, static), ls, ldconfig and the C library, in the
places where the distribution keeps them, so that a dynamically linked program of the driver can run in them.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import stat
import subprocess
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
COMPILE = REPOSITORY / "runtime-wrapper/compile"


def _launchers() -> Path:
    """The directory of those of this source tree, which ask no server; compiled if they are older than their source."""
    made = REPOSITORY / "build/bin"
    made.mkdir(parents=True, exist_ok=True)
    sources = (COMPILE, COMPILE.parent / "launcher.c", REPOSITORY / "hook/nvhook/version.py")
    newest = max(path.stat().st_mtime for path in sources)
    programs = [made / name for name in ("nvidia-container-runtime", "nvidia-container-runtime-hook")]
    if any(not path.exists() or path.stat().st_mtime < newest for path in programs):
        subprocess.run([COMPILE, made], check=True)
    return made


WRAPPER = _launchers() / "nvidia-container-runtime"
HOOK = WRAPPER.with_name("nvidia-container-runtime-hook")
TRIPLET = f"{os.uname().machine}-linux-gnu"

# The C library's parts that the driver's programs are linked against, and those of the tools.
_LIBRARIES = (
    "libc.so.6",
    "libm.so.6",
    "libdl.so.2",
    "libpthread.so.0",
    "librt.so.1",
    "libselinux.so.1",
    "libpcre2-8.so.0",
)

FAMILIES = ("debian", "fedora", "busybox", "no-etc")


def make_image(family: str, directory: Path) -> Path:
    """A root filesystem of one of FAMILIES in `directory`, which must not exist yet."""
    for name in ("usr/bin", "usr/sbin", "usr/lib", "dev", "proc", "sys", "tmp", "etc", "root"):
        (directory / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib"):
        (directory / name).symlink_to(f"usr/{name}")
    shutil.copy(shutil.which("busybox") or "/bin/busybox", directory / "usr/bin/busybox")
    for applet in ("sh", "cat", "stat", "mknod", "ls", "id", "grep", "mount", "true", "sleep", "readlink", "find"):
        (directory / "usr/bin" / applet).symlink_to("busybox")
    if family in ("debian", "no-etc"):
        _add_glibc(directory, f"usr/lib/{TRIPLET}")
        (directory / "etc/debian_version").write_text("12.0\n")
    elif family == "fedora":
        _add_glibc(directory, "usr/lib64")
    elif family != "busybox":
        raise ValueError(f"no such family: {family}")
    if family == "no-etc":
        shutil.rmtree(directory / "etc")
    return directory


def _add_glibc(root: Path, libraries: str) -> None:
    (root / libraries).mkdir(parents=True, exist_ok=True)
    (root / "usr/lib64").mkdir(exist_ok=True)
    (root / "lib64").symlink_to("usr/lib64")
    for name in _LIBRARIES:
        for place in (f"/lib/{TRIPLET}", f"/usr/lib/{TRIPLET}", "/lib64", "/usr/lib64"):
            if os.path.exists(f"{place}/{name}"):
                shutil.copy(f"{place}/{name}", root / libraries / name)
                break
    loader = "ld-linux-x86-64.so.2" if TRIPLET.startswith("x86_64") else "ld-linux-aarch64.so.1"
    source = f"/lib64/{loader}" if os.path.exists(f"/lib64/{loader}") else f"/lib/{loader}"
    shutil.copy(source, root / ("lib64" if TRIPLET.startswith("x86_64") else "lib") / loader)
    shutil.copy(_ldconfig(), root / "usr/sbin/ldconfig")
    (root / "etc/ld.so.conf.d").mkdir()
    (root / "etc/ld.so.conf").write_text("include /etc/ld.so.conf.d/*.conf\n")
    (root / "etc/ld.so.conf.d/here.conf").write_text(f"/{libraries}\n")
    subprocess.run([_ldconfig(), "-r", str(root)], check=True, capture_output=True)


def add_program(root: Path, program: Path) -> None:
    """`program` into /usr/bin of an image with a C library, and what it is linked against beside that library."""
    shutil.copy(program, root / "usr/bin" / program.name)
    listing = subprocess.run(["ldd", str(program)], check=True, capture_output=True, text=True).stdout
    libraries = next(root.glob("usr/lib*/**/libc.so.6")).parent
    for line in listing.splitlines():
        name, arrow, path = line.strip().partition(" => ")
        if arrow and not (libraries / name).exists():
            shutil.copy(path.split(" ")[0], libraries / name)
    subprocess.run([_ldconfig(), "-r", str(root)], check=True, capture_output=True)


def _ldconfig() -> str:
    return "/sbin/ldconfig.real" if os.path.exists("/sbin/ldconfig.real") else "/sbin/ldconfig"


class Bundle:
    """An OCI bundle with a container of its own name; `config` is written to config.json by `write`.

    `through` is a command that starts the one given to it: in another cgroup hierarchy, with mounts of its own, traced.
    """

    def __init__(self, directory: Path, rootfs: Path) -> None:
        self.directory = directory
        self.rootfs = rootfs
        self.id = f"nvhook-test-{uuid.uuid4().hex[:12]}"
        self.through: tuple[str, ...] = ()
        directory.mkdir(parents=True, exist_ok=True)
        self.config: dict[str, Any] = _config(rootfs, self.id)

    @property
    def path(self) -> Path:
        return self.directory / "config.json"

    def write(self, args: list[str] | None = None, env: dict[str, str] | None = None) -> Bundle:
        if args is not None:
            self.config["process"]["args"] = args
        if env is not None:
            base = ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]
            self.config["process"]["env"] = base + [f"{name}={value}" for name, value in env.items()]
        self.path.write_text(json.dumps(self.config, indent=4))
        return self

    def run(
        self, config: Path | None, *, runtime: str = "runc", wrapper: Path = WRAPPER, options: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        """`run` through the wrapper, which finds `runtime` in `config`; a minute at most."""
        words = (*options, "run", "--bundle", str(self.directory), self.id)
        try:
            return self.call(config, *words, wrapper=wrapper)
        finally:
            self.delete(runtime)

    def call(
        self, config: Path | None, *words: str, wrapper: Path = WRAPPER, output: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """The wrapper with these arguments. A container that lives on holds its streams: they go to `output`."""
        command = [*self.through, str(wrapper), *words]
        env = _environment(config)
        if output is None:
            return subprocess.run(command, env=env, input="", capture_output=True, text=True, timeout=60, check=False)
        with output.open("w") as file:
            return subprocess.run(
                command, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file, text=True, timeout=60, check=False
            )

    def delete(self, runtime: str = "runc") -> None:
        subprocess.run([*self.through, runtime, "delete", "--force", self.id], capture_output=True, check=False)


def _environment(config: Path | None) -> dict[str, str]:
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "XDG_RUNTIME_DIR": "/run"}
    if "LD_LIBRARY_PATH" in os.environ:  # a crun unpacked from a package, beside its libraries
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    if config:
        environment["NVHOOK_CONFIG"] = str(config)
    return environment


def _config(rootfs: Path, name: str) -> dict[str, Any]:
    capabilities = ["CAP_CHOWN", "CAP_MKNOD", "CAP_SETUID", "CAP_SETGID", "CAP_DAC_OVERRIDE", "CAP_KILL"]
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": ["/bin/true"],
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
            "cwd": "/",
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
            "noNewPrivileges": True,
        },
        "root": {"path": str(rootfs)},
        "hostname": "container",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {
                "destination": "/dev",
                "type": "tmpfs",
                "source": "tmpfs",
                "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
            },
            {
                "destination": "/sys",
                "type": "sysfs",
                "source": "sysfs",
                "options": ["nosuid", "noexec", "nodev", "ro"],
            },
        ],
        "annotations": {"org.example.kept": "as it is"},
        "linux": {
            "cgroupsPath": f"/{name}",
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")],
        },
    }


def own_mounts(script: str) -> tuple[str, ...]:
    """For `Bundle.through`: a mount namespace of its own, and `script` run in it first."""
    return ("unshare", "--mount", "--propagation", "private", "sh", "-euc", f'{script}\nexec "$@"', "-")


@functools.cache
def cgroups(version: int) -> tuple[str, ...]:
    """For `Bundle.through`: the cgroup hierarchy of that version. LookupError, with the reason, where there is none.

    A machine of version 1 can show an empty hierarchy of version 2 in a mount namespace, and runc then lives in it.
    """
    is_unified = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    if version == 1 and (is_unified or not Path("/sys/fs/cgroup/devices/devices.list").exists()):
        raise LookupError("cgroup v1 is not on this machine: no devices controller in /sys/fs/cgroup/devices")
    through: tuple[str, ...] = ()
    if version == 2 and not is_unified:
        through = own_mounts("umount -R /sys/fs/cgroup 2>/dev/null || :\nmount -t cgroup2 none /sys/fs/cgroup")
    reason = why_not(shutil.which("runc") or "runc", through)
    if reason:
        raise LookupError(f"cgroup v{version} cannot be used on this machine: {reason}")
    return through


def any_cgroups() -> tuple[str, ...]:
    """For `Bundle.through` where the version makes no difference."""
    try:
        return cgroups(1)
    except LookupError:
        return cgroups(2)


def why_not(runtime: str, through: tuple[str, ...], options: tuple[str, ...] = ()) -> str:
    """Empty when `runtime` by itself starts a container on this machine, else what it says."""
    if not shutil.which(runtime):
        return f"{runtime} is not installed"
    with tempfile.TemporaryDirectory(prefix="nvhook-probe-") as name:
        bundle = Bundle(Path(name) / "bundle", make_image("busybox", Path(name) / "rootfs")).write()
        bundle.through = through
        result = bundle.run(None, runtime=runtime, wrapper=Path(runtime), options=options)
        # crun leaves the cgroup of a container that it could not start.
        left = ("find", "/sys/fs/cgroup", "-depth", "-type", "d", "-name", bundle.id, "-exec", "rmdir", "{}", "+")
        subprocess.run([*through, *left], capture_output=True, check=False)
    lines = result.stderr.strip().splitlines() or [f"status {result.returncode}"]
    return lines[-1] if result.returncode else ""


@functools.cache
def way_of_crun() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(hierarchy, options) under which crun starts a container on this machine. LookupError, with the reason."""
    said = ""
    for version in (1, 2):
        try:
            through = cgroups(version)
        except LookupError as error:
            said = str(error)
            continue
        for options in ((), ("--cgroup-manager=disabled",)):
            said = why_not("crun", through, options)
            if not said:
                return through, options
    raise LookupError(f"crun starts no container on this machine: {said}")


def server_of(prefix: Path) -> Path:
    """The directory of an installation's server."""
    script = f". {REPOSITORY}/packaging/steps.sh; server_of {prefix}"
    return Path(subprocess.run(["sh", "-euc", script], check=True, capture_output=True, text=True).stdout.strip())


reserve_of = server_of  # what the scripts of the security review call it


def configure(host: Path, path: Path, state: Path, *, runtime: str = "runc", more: str = "") -> Path:
    """A config.toml at `path` for the simulated host `host`, with a state directory and a runtime of one's own."""
    path.write_text(
        f"{more}\n"
        f'[nvidia-container-cli]\nroot = "{host}/driver"\nldconfig = "@/sbin/ldconfig"\n'
        f'[nvidia-container-runtime]\nruntimes = ["{runtime}"]\n'
        f'[nvhook]\ndev-root = "{host}"\nproc-root = "{host}"\nstate-dir = "{state}"\n'
    )
    return path


def tree(top: Path) -> dict[str, str]:
    """Path below `top` -> mode, owner, device, size, time of change and link target; of a directory no time."""
    found = {}
    for directory, directories, files in os.walk(top):
        for name in (*directories, *files):
            path = os.path.join(directory, name)
            status = os.lstat(path)
            target = os.readlink(path) if stat.S_ISLNK(status.st_mode) else ""
            is_file = stat.S_ISREG(status.st_mode)
            content = f"{status.st_size} {status.st_mtime_ns}" if is_file else f"{status.st_rdev}"
            found[path] = f"{status.st_mode:o} {status.st_uid}:{status.st_gid} {content} {target}".rstrip()
    return found


class Workshop:
    """A directory in which bundles over copies of images are made, for containers on simulated hosts.

    Root of a user namespace has to come through, so its mode is 0755 all the way; whoever made it removes it.
    """

    def __init__(self, place: Path, simhost: Callable[[str], Path]) -> None:
        place.chmod(0o755)
        self.place = place
        self.simhost = simhost
        self._count = 0

    def new(self, what: str) -> Path:
        """A path that nothing has yet."""
        self._count += 1
        return self.place / f"{what}{self._count}"

    def bundle(self, family: str = "debian") -> Bundle:
        image = self.place / f"image-{family}"
        if not image.exists():
            make_image(family, image)
        rootfs = self.new("rootfs")
        subprocess.run(["cp", "-a", str(image), str(rootfs)], check=True)
        bundle = Bundle(self.new("bundle"), rootfs)
        bundle.through = any_cgroups()
        return bundle

    def config(self, host: str) -> Path:
        """config.toml for the simulated host of that name; one inventory for all who ask."""
        path = self.place / f"{host}.toml"
        if not path.exists():
            configure(self.simhost(host), path, self.place / f"state-{host}")
        return path

    def copy_of(self, host: str) -> tuple[Path, Path]:
        """(a simulated host of one's own, its config.toml with a state directory of its own)."""
        copy = self.new(host)
        subprocess.run(["cp", "-a", str(self.simhost(host)), str(copy)], check=True)
        return copy, configure(copy, copy / "config.toml", copy / "run")


# For the shell in a container: `try NODE` says whether the device cgroup lets it open the node. That there is no driver
# behind the node of a simulated GPU is known only after that was decided.
TRY = """
try() {
    case $( (exec 3<>"$1") 2>&1) in
    *"not permitted"*) echo "$1 denied" ;;
    "" | *"No such device"*) echo "$1 open" ;;
    *) (exec 3<>"$1") 2>&1 ;;
    esac
}
"""


def gpu_lines(host: str, *indices: int, migs: tuple[str, ...] | None = None) -> str:
    """What `nvidia-smi -L` prints in a container that has these GPUs of a simulated host, which it numbers anew.

    With all their MIG devices, or those of these UUIDs, which it numbers anew as well.
    """
    (path,) = (REPOSITORY / "tests/hosts").glob(f"{host}*.json")
    gpus = json.loads(path.read_text())["gpus"]
    lines = []
    for number, index in enumerate(indices):
        gpu = gpus[index]
        lines.append(f"GPU {number}: {gpu['name']} (UUID: {gpu['uuid']})\n")
        there = gpu["mig"] if isinstance(gpu.get("mig"), list) else []
        chosen = [mig for mig in there if migs is None or mig["uuid"] in migs]
        lines += [
            f"  MIG {mig['profile']:11} Device {position:2}: (UUID: {mig['uuid']})\n"
            for position, mig in enumerate(chosen)
        ]
    return "".join(lines)
