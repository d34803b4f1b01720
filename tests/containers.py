# SPDX-License-Identifier: Apache-2.0
"""Images made of this machine's own files, bundles, and real containers started from them with runc or crun.

No image is pulled. The glibc families hold the shell tools (busybox, static), ls, ldconfig and the C library, in the
places where the distribution keeps them, so that a dynamically linked program of the driver can run in them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import uuid
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
WRAPPER = REPOSITORY / "runtime-wrapper/nvidia-container-runtime"
HOOK = REPOSITORY / "hook/nvidia-container-runtime-hook"
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
    """An OCI bundle with a container of its own name; `config` is written to config.json by `write`."""

    def __init__(self, directory: Path, rootfs: Path) -> None:
        self.directory = directory
        self.rootfs = rootfs
        self.id = f"nvhook-test-{uuid.uuid4().hex[:12]}"
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
        self, config: Path | None, *, runtime: str = "runc", wrapper: Path = WRAPPER
    ) -> subprocess.CompletedProcess[str]:
        """`run` through the wrapper, with `runtime` first on the PATH that it looks on; a minute at most."""
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "XDG_RUNTIME_DIR": "/run"}
        if "LD_LIBRARY_PATH" in os.environ:  # a crun unpacked from a package, beside its libraries
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        if config:
            environment["NVHOOK_CONFIG"] = str(config)
        command = [str(wrapper), "run", "--bundle", str(self.directory), self.id]
        try:
            return subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=60, input="", check=False
            )
        finally:
            subprocess.run([runtime, "delete", "--force", self.id], capture_output=True, check=False)


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
