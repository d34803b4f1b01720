# SPDX-License-Identifier: Apache-2.0
"""What `doctor` asks of the container engines: what their files say of our runtime, and what a running dockerd knows.

engines.py says which files those are and where in them a runtime is named; here they are only read.
"""

from __future__ import annotations

import os
import shlex

from nvhook.commands import containerdfiles
from nvhook.commands.configure.documents import Json, Toml, lookup, merged
from nvhook.commands.configure.engines import ENGINES
from nvhook.commands.doctor import dockerd
from nvhook.commands.doctor.checks_system import PLACES
from nvhook.commands.doctor.findings import failure, ok, skipped, warning
from nvhook.commands.doctor.programs import NVIDIA, OURS, RUNTIME, whose
from nvhook.errors import ConfigError, Finding, reason
from nvhook.request.spec import HOOK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from nvhook.commands.configure.documents import Document, Path, Table
    from nvhook.commands.configure.engines import Engine
    from nvhook.commands.hostview import HostView

_NAME = "*"  # stands for the name of a runtime in the paths of engines.py
# The files of an engine, in the order in which it reads them; a later one counts.
_FILES = {
    "docker": ("/etc/docker/daemon.json",),
    "containerd": ("/etc/containerd/config.toml",),
    "crio": ("/etc/crio/crio.conf", "/etc/crio/crio.conf.d/*"),
    "podman": (
        "/usr/share/containers/containers.conf",
        "/etc/containers/containers.conf",
        "/etc/containers/containers.conf.d/*.conf",
    ),
}
_MAX_FILES = 100


class Registered:
    """What an engine's files say together: runtime -> program, the default runtime, and the whole table."""

    __slots__ = ("default", "programs", "table")

    def __init__(self, engine: Engine, table: Table) -> None:
        programs, defaults = engine.registration(_NAME)
        self.table = table
        self.programs: dict[str, str] = {}
        for path in programs:
            for name in _names(lookup(table, path[: path.index(_NAME)])):
                value = lookup(table, tuple(name if part == _NAME else part for part in path))
                first = value[0] if isinstance(value, list) and value else value
                if isinstance(first, str):
                    self.programs[name] = first
        named = [lookup(table, path) for path in defaults]
        self.default = next((name for name in named if isinstance(name, str)), "")

    def ours(self) -> dict[str, str]:
        """Those that are NVIDIA's by the name of their program."""
        return {name: path for name, path in self.programs.items() if os.path.basename(path).startswith(RUNTIME)}


def _names(table: object) -> list[str]:
    return list(table) if isinstance(table, dict) else []


def installed(host: HostView) -> list[Engine]:
    return [
        engine
        for engine in ENGINES.values()
        if any(
            host.files.exists(sign) if "/" in sign else any(host.is_program(f"{place}/{sign}") for place in PLACES)
            for sign in engine.signs
        )
    ]


def read(host: HostView, engine: Engine) -> Registered:
    """ConfigError, with the file, for one that cannot be read or does not parse."""
    names = [name for pattern in _FILES[engine.name] for name in containerdfiles.matching(host.files, pattern)]
    documents = [_parse(host, name) for name in names[:_MAX_FILES]]
    if engine.name == "containerd":
        documents = [
            document
            for main in documents
            for document in containerdfiles.in_order(host.files, main, lambda name: _parse(host, name))
        ]
    return Registered(engine, merged(documents))


def _parse(host: HostView, name: str) -> Document:
    try:
        text = host.read(name).decode()
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else str(error)
        raise ConfigError(f"read `{name}`: {why}", "look at the file") from None
    return (Json if name.endswith(".json") else Toml)(text if text.strip() else "", name)


def check_engines(host: HostView) -> Iterator[Finding]:
    engines = installed(host)
    for engine in engines:
        try:
            yield from _check_registration(host, engine, read(host, engine))
        except ConfigError as error:
            yield failure(engine.title, error.message, error.remedy or "correct the file")
    if not engines:
        names = ", ".join(engine.title for engine in ENGINES.values())
        yield ok("engines", f"none of {names} is installed")


def _check_registration(host: HostView, engine: Engine, found: Registered) -> Iterator[Finding]:
    again = f"nvhook configure {engine.name}{' --restart' if engine.unit else ''}"
    ours = found.ours()
    for name, path in ours.items():
        owner = whose(host, path) if "/" in path else OURS
        if owner == OURS:
            default = ", the default runtime" if found.default == name else ""
            yield ok(engine.title, f"has the runtime {name}, {path}{default}")
        elif owner == NVIDIA:
            yield warning(engine.title, f"has the runtime {name}, {path}, which is NVIDIA's", again)
        else:
            yield failure(engine.title, f"has the runtime {name}, and `{path}` is not there", again)
    if not ours:
        yield warning(engine.title, "is installed, and does not know our runtime", again)
    if found.default and found.default not in found.programs and found.default not in ("runc", "crun"):
        why = f"its default runtime is {found.default}, and no file of it says what that is"
        yield failure(engine.title, why, f"{again} --runtime-name {found.default}")
    if engine.name == "containerd":
        yield from _check_systemd_cgroup(engine, found, ours)


def _check_systemd_cgroup(engine: Engine, found: Registered, ours: dict[str, str]) -> Iterator[Finding]:
    """A runtime class with the other cgroup driver than runc's: the kubelet loses sight of its containers."""
    programs, _ = engine.registration(_NAME)
    for path in programs:
        told = {name: _systemd_cgroup(found.table, path, name) for name in (*ours, found.default or "runc")}
        model = told.pop(found.default or "runc")
        for name, value in told.items():
            if model is not None and value is not None and value != model:
                why = f"SystemdCgroup is {value} for {name} and {model} for {found.default or 'runc'}"
                yield failure(engine.title, why, "make them the same in its configuration, and restart it")


def _systemd_cgroup(table: Table, path: Path, name: str) -> object:
    """None where no file names such a runtime; what is not said is false."""
    options = lookup(table, tuple(name if part == _NAME else part for part in path[:-1]))
    runtime = lookup(table, tuple(name if part == _NAME else part for part in path[:-2]))
    if not isinstance(runtime, dict):
        return None
    return bool(options.get("SystemdCgroup")) if isinstance(options, dict) else False


def check_dockerd(host: HostView) -> Iterator[Finding]:
    """The daemon that runs: it looked for the hook when it was started, and says then what it has."""
    if not any(engine.name == "docker" for engine in installed(host)):
        return
    process = dockerd.process(host)
    if process:
        yield from _check_process(host, process)
        yield from _check_answer(host)
    else:
        yield ok("dockerd", "does not run")


def _check_process(host: HostView, process: str) -> Iterator[Finding]:
    if dockerd.program(process).startswith("/snap/"):
        why = "comes from a snap, which sees neither our programs nor the driver"
        yield failure("dockerd", why, "snap remove docker, and install Docker's own package")
        return
    try:
        places = dockerd.search_path(process)
    except OSError as error:
        yield skipped("PATH of dockerd", f"{process}/environ: {reason(error)}", "sudo nvhook doctor")
        return
    found = next((f"{place}/{HOOK}" for place in places if host.is_program(f"{place}/{HOOK}")), "")
    if not found:
        ours = next((f"{place}/{HOOK}" for place in PLACES if host.is_program(f"{place}/{HOOK}")), "")
        why = f"{HOOK} is not on it ({':'.join(places)}): `docker run --gpus` fails"
        link = f"ln -s {ours} {shlex.quote(places[-1] if places else '/usr/bin')}/" if ours else "make install"
        yield failure("PATH of dockerd", why, f"{link} && systemctl restart docker")
    elif whose(host, found) == NVIDIA:
        why = f"{found} comes first, and is NVIDIA's: `docker run --gpus` uses that one"
        yield warning("PATH of dockerd", why, f"rm {shlex.quote(found)} && systemctl restart docker")
    elif 0 < dockerd.started(host, process) < _changed(host, found):
        why = f"{found} was installed after dockerd was started, which looks for it only then"
        yield failure("dockerd", why, "systemctl restart docker")
    else:
        yield ok("PATH of dockerd", f"{found} is ours")


def _changed(host: HostView, path: str) -> float:
    fd = host.files.open(path)
    try:
        return os.fstat(fd).st_ctime
    finally:
        os.close(fd)


def _check_answer(host: HostView) -> Iterator[Finding]:
    try:
        info = dockerd.info(host)
    except PermissionError:
        yield skipped(dockerd.SOCKET, "is not open to this user", "sudo nvhook doctor")
        return
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else str(error)
        yield warning(dockerd.SOCKET, f"does not answer: {why}", "systemctl restart docker")
        return
    yield ok("dockerd", f"uses {info.get('CgroupDriver')} for cgroups, version {info.get('CgroupVersion')}")
    try:
        ours = read(host, ENGINES["docker"]).ours()
    except ConfigError:
        return  # check_engines has said so
    for name in ours:
        if name not in info["Runtimes"]:
            why = f"does not know the runtime {name} yet, which its file names"
            yield failure("dockerd", why, "systemctl restart docker")
