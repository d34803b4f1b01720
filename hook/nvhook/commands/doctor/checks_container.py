# SPDX-License-Identifier: Apache-2.0
"""The last question of `doctor`: does a container start with all GPUs, and does nvidia-smi see them in it?

Its root filesystem is made of the host's dynamic linker and C library and nothing else, and its program is the driver's
own nvidia-smi, which our runtime brings. It is a start like any other: the inventory is kept, modules are loaded.
Nothing of the container stays.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile

from nvhook.commands.configure.command import runtime_path
from nvhook.commands.doctor.checks_driver import driver
from nvhook.commands.doctor.findings import failure, ok, several, skipped
from nvhook.driver import inventory
from nvhook.errors import DriverError, Finding, NvhookError, reason
from nvhook.linux import elf, ldcache, userns
from nvhook.linux.root import DIRECTORY, Root

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

    from nvhook.commands.hostview import HostView

_SMI = "nvidia-smi"
_LIBRARIES = (
    "libc.so.6",
    "libm.so.6",
    "libdl.so.2",
    "libpthread.so.0",
    "librt.so.1",
    "libgcc_s.so.1",
    "libstdc++.so.6",
)
_MACHINE = {"x86_64": "x86-64"}.get(os.uname().machine, os.uname().machine)
_SECONDS = 120
_MAX_CACHE = 64 << 20
_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "XDG_RUNTIME_DIR": "/run"}


def check_container(host: HostView, chosen_runtime: str) -> Iterator[Finding]:
    name = "test container"
    if os.geteuid() != 0 or not userns.is_first():
        yield skipped(name, "only root can start it", "sudo nvhook doctor")
        return
    found = driver(host)
    if found is None:
        yield skipped(name, "there is no driver")
        return
    try:
        runtime = runtime_path(chosen_runtime, must_exist=True)
        program = _program(host, found.driver_version)
        with tempfile.TemporaryDirectory(prefix="nvhook-doctor-", dir=_place()) as directory:
            _make_bundle(directory, program)
            done = _run(host, runtime, directory)
    except NvhookError as error:
        yield skipped(name, error.message, error.remedy)
        return
    except OSError as error:
        yield skipped(name, f"cannot be made: {error.filename or ''}: {reason(error)}")
        return
    yield _judge(name, done, len(found.gpus))


def _judge(name: str, done: subprocess.CompletedProcess[str] | None, expected: int) -> Finding:
    if done is None:
        return failure(name, f"did not end within {_SECONDS} s", "see `nvidia-container-runtime.debug` in config.toml")
    said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()] or [f"status {done.returncode}"]
    if done.returncode:
        return failure(name, said[-1], "nvhook doctor --no-container, and what it says above")
    seen = sum(line.startswith("GPU ") for line in done.stdout.splitlines())
    if seen < expected:
        return failure(name, f"sees {seen} of {expected} GPUs", "see `nvidia-smi -L` on the host")
    return ok(name, f"starts, and nvidia-smi sees {several(seen, 'GPU')} in it")


def _program(host: HostView, version: str) -> str:
    """The host's path of nvidia-smi; DriverError where the driver has none."""
    files = inventory.load(host.config, version, [], keep=False)
    for item in files.binaries:
        if item.name == _SMI:
            return item.path
    raise DriverError(f"the driver has no {_SMI}, which would be its program")


def _place() -> str:
    """A directory whose files may be run."""
    for path in (tempfile.gettempdir(), "/var/tmp", "/root"):  # noqa: S108 - only for mkdtemp
        if os.path.isdir(path) and not os.statvfs(path).f_flag & os.ST_NOEXEC:
            return path
    return tempfile.gettempdir()


def _make_bundle(directory: str, program: str) -> None:
    rootfs = f"{directory}/rootfs"
    for name in ("usr/bin", "usr/lib", "etc", "dev", "proc", "sys", "tmp"):
        os.makedirs(f"{rootfs}/{name}", 0o755)
    linker = _linker(program)
    os.makedirs(rootfs + os.path.dirname(linker), 0o755, exist_ok=True)
    shutil.copy(linker, rootfs + linker)
    for name, path in _libraries(linker).items():
        shutil.copy(path, f"{rootfs}/usr/lib/{name}")
    with open(f"{rootfs}/etc/ld.so.conf", "x", encoding="ascii") as file:
        file.write("/usr/lib\n")
    with open(f"{directory}/config.json", "x", encoding="ascii") as file:
        json.dump(_specification(os.path.basename(directory)), file)


def _linker(program: str) -> str:
    """The dynamic linker that the program names, whose libraries are this machine's."""
    fd = os.open(program, os.O_RDONLY | os.O_CLOEXEC)
    try:
        header = elf.read(fd)
    except ValueError as error:
        raise DriverError(f"read `{program}`: {error}", "reinstall the driver") from None
    finally:
        os.close(fd)
    named = header.interpreter if header else ""
    if not os.path.isabs(named) or not os.path.isfile(named):
        raise DriverError(f"`{program}` names no dynamic linker of this host")
    return named


def _libraries(linker: str) -> dict[str, str]:
    """Where this machine has the C library's parts: beside its linker, or as the linker cache says."""
    cached: dict[str, str] = {}
    root = Root(os.open("/", DIRECTORY))
    try:
        for entry in ldcache.entries_for(ldcache.parse(root.read("/etc/ld.so.cache", _MAX_CACHE)), _MACHINE):
            cached.setdefault(entry.name, entry.path)
    except (OSError, ValueError, KeyError):
        pass  # NixOS has none, and all of it beside the linker
    finally:
        os.close(root.fd)
    beside = os.path.dirname(os.path.realpath(linker))
    places = {name: cached.get(name) or f"{beside}/{name}" for name in _LIBRARIES}
    return {name: path for name, path in places.items() if os.path.isfile(path)}


def _specification(name: str) -> dict[str, object]:
    capabilities = ["CAP_CHOWN", "CAP_DAC_OVERRIDE"]
    dev = {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64k"]}
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": [_SMI, "-L"],
            "env": [
                "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
                "NVIDIA_VISIBLE_DEVICES=all",
                "NVIDIA_DRIVER_CAPABILITIES=compute,utility",
            ],
            "cwd": "/",
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs"},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}, dev],
        "linux": {
            "cgroupsPath": f"/{name}",
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")],
        },
    }


def _run(host: HostView, runtime: str, directory: str) -> subprocess.CompletedProcess[str] | None:
    """None where it does not end."""
    import subprocess

    name = os.path.basename(directory)
    environment = dict(_ENVIRONMENT)
    if host.config.path:
        environment["NVHOOK_CONFIG"] = os.path.abspath(host.config.path)
    command = [runtime, "--root", f"{directory}/state"]
    try:
        return subprocess.run(  # noqa: S603 - our own runtime
            [*command, "run", "--bundle", directory, name],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            delete = [*command, "delete", "--force", name]
            subprocess.run(delete, env=environment, capture_output=True, timeout=_SECONDS, check=False)  # noqa: S603
