# SPDX-License-Identifier: Apache-2.0
"""What `doctor` asks of the rest of the host: cgroups, SELinux, AppArmor, and what nvhook itself stands on."""

from __future__ import annotations

import os
import stat

from nvhook.commands.config import check as configcheck
from nvhook.commands.doctor.checks_driver import driver
from nvhook.commands.doctor.findings import failure, ok, skipped, warning
from nvhook.commands.kernelfiles import kernel_text
from nvhook.commands.snapshot.command import cgroup_version
from nvhook.driver import inventory
from nvhook.request import spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from nvhook.commands.hostview import HostView
    from nvhook.errors import Finding

# Where the wrapper looks after PATH.
PLACES = spec.USUAL_PATH.split(":")


def check_config(host: HostView) -> Iterator[Finding]:
    if not os.path.lexists(host.config_path):
        yield ok(host.config_path, "is not there: NVIDIA's defaults are in force")
        return
    found = configcheck.findings(host.config_path)
    for is_error, line in found:
        place, _, what = line.partition(": ")
        why, _, remedy = what.rpartition("; ")
        yield (failure if is_error else warning)(place, why or what, remedy if why else "nvhook config check")
    if not found:
        yield ok(host.config_path, "every key is one that nvhook honours")


def check_cgroups(host: HostView) -> Iterator[Finding]:
    version = cgroup_version(host)
    manager = "systemd" if host.files.exists("/run/systemd/system") else "no systemd"
    if version:
        yield ok("cgroups", f"version {version}, {manager}")
    else:
        yield skipped("cgroups", f"`{host.sys}/fs/cgroup` does not show its version")


def check_selinux(host: HostView) -> Iterator[Finding]:
    """Podman and Docker label their processes container_t, which may open no device but its own."""
    place = f"{host.sys}/fs/selinux"
    enforcing = kernel_text(f"{place}/enforce").strip()
    allowed = kernel_text(f"{place}/booleans/container_use_devices").split()
    if enforcing != "1":
        yield ok("SELinux", "is permissive" if enforcing else "is off")
    elif allowed[:1] == ["0"]:
        why = "is enforcing, and container_use_devices is off: a labelled container cannot open /dev/nvidia*"
        yield warning("SELinux", why, "setsebool -P container_use_devices on")
    else:
        yield ok("SELinux", "is enforcing, and lets containers use devices" if allowed else "is enforcing")


def check_apparmor(host: HostView) -> Iterator[Finding]:
    is_on = kernel_text(f"{host.sys}/module/apparmor/parameters/enabled").startswith("Y")
    yield ok("AppArmor", "is on; the engines' own profiles do not keep a GPU out" if is_on else "is off")


def check_runtime(host: HostView) -> Iterator[Finding]:
    names = host.config.runtimes
    path = find_runtime(host)
    if not path:
        why = f"none of {', '.join(names)} is there"
        yield failure("low-level runtime", why, "install runc, or name another in `runtimes` of config.toml")
        return
    version = _version(path) if host.is_here else ""
    yield ok("low-level runtime", f"{path}{', ' if version else ''}{version}")


def find_runtime(host: HostView) -> str:
    for name in host.config.runtimes:
        candidates = [name] if "/" in name else [f"{place}/{name}" for place in search_path(host)]
        for path in candidates:
            if host.is_program(path):
                return path
    return ""


def search_path(host: HostView) -> list[str]:
    own = os.environ.get("PATH", "").split(":") if host.is_here else []
    return list(dict.fromkeys([*(place for place in own if place.startswith("/")), *PLACES]))


def _version(program: str) -> str:
    import subprocess

    try:
        done = subprocess.run(  # noqa: S603 - the host's own runtime, which the engines run too
            [program, "--version"], capture_output=True, text=True, errors="replace", check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.partition("\n")[0].replace(" version ", " ", 1)


def check_state_directory(host: HostView) -> Iterator[Finding]:
    path = host.config.state_dir
    try:
        status = os.stat(path)
    except FileNotFoundError:
        yield ok(path, "is not there yet; the first start makes it")
        return
    except OSError:
        yield skipped(path, "cannot be read by this user", "sudo nvhook doctor")
        return
    if not stat.S_ISDIR(status.st_mode):
        yield failure(path, "is no directory", f"rm {path}")
    elif status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
        why = f"others may write to it (owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o})"
        yield failure(path, f"{why}: what it keeps is not believed", f"chown root: {path} && chmod 755 {path}")
    elif os.geteuid() == 0 and os.statvfs(path).f_flag & os.ST_RDONLY:
        yield warning(
            path, "cannot be written: every start searches for the driver again", f"mount -o remount,rw {path}"
        )
    else:
        yield _inventory(host)


def _inventory(host: HostView) -> Finding:
    found = driver(host)
    path = host.config.state_dir
    if found is None or not os.path.exists(os.path.join(path, inventory.NAME)):
        return ok(path, "keeps no inventory yet; the first start makes it")
    if inventory.is_kept(host.config, found.driver_version):
        return ok(path, f"keeps a good inventory of {found.driver_version}")
    return ok(path, "keeps an inventory of what was here before; the next start makes it again")
