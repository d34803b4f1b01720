# SPDX-License-Identifier: Apache-2.0
"""What each engine wants to be told, and in which file: `configure` says it, here is only what it says.

docker      daemon.json, edited in place.
containerd  Version 2: in place, for containerd 1.x lets an imported file *replace* a plugin's whole table, so that a
            drop-in would have to repeat the table, and what the administrator changes in the original later would have
            no effect. It goes into the file whose table counts: the last one that has it. Version 3: a drop-in, for
            containerd 2.0 and later, the only ones to read it, merge tables key by key.
crio        a drop-in in crio.conf.d, merged key by key.
podman      a drop-in in containers.conf.d, merged key by key.
"""

from __future__ import annotations

import copy
import os
import re
import shutil

from nvhook.commands import containerdfiles
from nvhook.commands.configure.changes import ChangedFile
from nvhook.commands.configure.documents import Json, Toml, dotted, lookup, merged, same
from nvhook.errors import ConfigError, DeviceError
from nvhook.host import gpus
from nvhook.linux.root import DIRECTORY, Root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from nvhook.commands.configure.changes import Settings
    from nvhook.commands.configure.documents import Document, Path, Table
    from nvhook.request.config import Config

SWARM_KIND = "NVIDIA-GPU"
# What dockerd makes of the kind, in capitals, with the ids of the GPUs that a task was given behind it.
SWARM_VARIABLE = f"DOCKER_RESOURCE_{SWARM_KIND}"

_CRI = {2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.runtime", 4: "io.containerd.cri.v1.runtime"}
_RUNC_SHIM = "io.containerd.runc.v2"


class EngineOptions:
    """The user's words. `runtime_path` is checked already; it is empty where nothing is to be registered."""

    __slots__ = (
        "cdi",
        "config",
        "config_file",
        "notes",
        "nvhook_config",
        "runtime_name",
        "runtime_path",
        "set_as_default",
        "swarm_resource",
        "warnings",
    )

    def __init__(
        self,
        *,
        config: Config,
        nvhook_config: str,
        runtime_name: str,
        runtime_path: str,
        config_file: str = "",
        set_as_default: bool = False,
        cdi: bool = False,
        swarm_resource: bool = False,
    ) -> None:
        self.config = config
        self.nvhook_config = os.path.realpath(nvhook_config)
        self.notes = os.path.join(os.path.dirname(self.nvhook_config), "configured")
        self.runtime_name = runtime_name
        self.runtime_path = runtime_path
        self.config_file = config_file
        self.set_as_default = set_as_default
        self.cdi = cdi
        self.swarm_resource = swarm_resource
        self.warnings: list[str] = []


class Engine:
    """One that can be configured: what belongs to it on a host, and what a file of it says of a runtime.

    unit      what systemd calls its daemon; empty where there is none
    signs     a command on the PATH or a file, any of which shows that it is installed
    """

    name = title = unit = default_file = ""
    signs: tuple[str, ...] = ()

    def set(self, wanted: EngineOptions) -> list[ChangedFile]:
        """The files that have to say something, changed; nothing is written."""
        raise NotImplementedError

    def places(self, wanted: EngineOptions) -> list[ChangedFile]:
        """Those that may have something of ours in them."""
        return [self._file(wanted)]

    def registration(self, name: str) -> tuple[list[Path], list[Path]]:
        """Where a file names the program of the runtime `name`, and where the default runtime."""
        raise NotImplementedError

    def unset(self, wanted: EngineOptions) -> list[ChangedFile]:
        files = self.places(wanted)
        for file in files:
            if not file.undo():
                file.drop(self._leftovers(file, wanted), _header(self.name))
        return files

    def is_installed(self) -> bool:
        return any(os.path.exists(sign) if "/" in sign else shutil.which(sign) for sign in self.signs)

    def _leftovers(self, file: ChangedFile, wanted: EngineOptions) -> list[Path]:
        """Without a note: what names the very program that we would register, and nothing of anybody else's."""
        programs, defaults = self.registration(wanted.runtime_name)
        table = file.document.table
        ours = [path for path in programs if _is_program(lookup(table, path), wanted.runtime_path)]
        if not ours:
            return []
        return [path[: path.index(wanted.runtime_name) + 1] for path in ours] + [
            path for path in defaults if lookup(table, path) == wanted.runtime_name
        ]

    def _file(self, wanted: EngineOptions) -> ChangedFile:
        kind = Json if self.name == "docker" else Toml
        name = wanted.config_file or self.default_file
        return ChangedFile(name, kind, wanted.notes, make_directory=not wanted.config_file)


class Docker(Engine):
    name, title, unit = "docker", "Docker", "docker"
    default_file = "/etc/docker/daemon.json"
    signs = ("dockerd", default_file)

    def set(self, wanted: EngineOptions) -> list[ChangedFile]:
        file = self._file(wanted)
        settings = self._settings(wanted, file.document.table)
        files = [file]
        if wanted.swarm_resource:
            settings += [(("node-generic-resources",), _generic_resources(wanted.config, file))]
            ours = ChangedFile(wanted.nvhook_config, Toml, wanted.notes, make_directory=True)
            ours.apply([(("swarm-resource",), _swarm_variables(ours.document.get(("swarm-resource",))))])
            files.append(ours)
            default = lookup(file.document.table, ("default-runtime",))
            if not wanted.set_as_default and default != wanted.runtime_name:
                wanted.warnings.append("a Swarm service cannot choose a runtime: use --set-as-default as well")
        file.apply(settings)
        return files

    def _settings(self, wanted: EngineOptions, table: Table) -> Settings:
        place = ("runtimes", wanted.runtime_name)
        former = lookup(table, place)
        settings: Settings = [((*place, "path"), wanted.runtime_path)]
        if not isinstance(former, dict) or "runtimeArgs" not in former:
            settings.append(((*place, "runtimeArgs"), []))
        if isinstance(former, dict) and former.keys() - {"path", "runtimeArgs"}:
            # runtimeType and options, which dockerd refuses beside a path.
            settings = [(place, {"path": wanted.runtime_path, "runtimeArgs": []})]
        if wanted.set_as_default:
            settings.append((("default-runtime",), wanted.runtime_name))
        if wanted.cdi:
            settings.append((("features", "cdi"), True))
        return settings

    def places(self, wanted: EngineOptions) -> list[ChangedFile]:
        return [self._file(wanted), ChangedFile(wanted.nvhook_config, Toml, wanted.notes, make_directory=True)]

    def registration(self, name: str) -> tuple[list[Path], list[Path]]:
        return [("runtimes", name, "path")], [("default-runtime",)]


class Containerd(Engine):
    name, title, unit = "containerd", "containerd", "containerd"
    default_file = "/etc/containerd/config.toml"
    signs = ("containerd", default_file)

    def set(self, wanted: EngineOptions) -> list[ChangedFile]:
        main = self._file(wanted)
        version = _containerd_version(main)
        start: Settings = [] if main.document.table else [(("version",), version)]
        plugin = ("plugins", _CRI[version])
        if _is_disabled(main, _CRI[version]):
            wanted.warnings.append(
                f"`{main.name}` has the plugin cri in `disabled_plugins`: Kubernetes needs it, take it out of there"
            )
        if version > 2:
            return self._set_in_drop_in(wanted, main, start, plugin, version)
        files = _load_order(main, wanted)
        target = [file for file in files if lookup(file.document.table, plugin) is not None or file is main][-1]
        own = lookup(target.document.table, (*plugin, "containerd"))
        together = lookup(merged(file.document for file in files), (*plugin, "containerd"))
        target.apply([*start, *_cri_settings(wanted, plugin, own, together, target.document.table)])
        return [target]

    def _set_in_drop_in(
        self, wanted: EngineOptions, main: ChangedFile, start: Settings, plugin: Path, version: int
    ) -> list[ChangedFile]:
        drop_in = self._drop_in(main, wanted)
        imports = lookup(main.document.table, ("imports",)) or []
        if not isinstance(imports, list):
            raise ConfigError(f"`{main.name}`: `imports` must be a list, not `{imports}`")
        if not any(_matches(main, pattern, drop_in.name) for pattern in imports):
            # With a star, for then it may be missing; and for our file alone, for there may be others in its
            # directory that are not read so far.
            imports = [*imports, drop_in.name.replace(".toml", "*.toml")]
            main.apply([*start, (("imports",), imports)])
        others = [file for file in _load_order(main, wanted) if file.path != drop_in.path]
        together = lookup(merged(file.document for file in others), (*plugin, "containerd"))
        settings: Settings = [(("version",), version)]
        settings += _cri_settings(wanted, plugin, None, together, drop_in.document.table)
        drop_in.apply(settings, _header(self.name))
        _refuse_overridden(drop_in, _later(main, drop_in, others, imports), settings)
        return [drop_in, main]

    def places(self, wanted: EngineOptions) -> list[ChangedFile]:
        main = self._file(wanted)
        files = {file.path: file for file in [main, self._drop_in(main, wanted), *_load_order(main, wanted)]}
        return list(files.values())

    def registration(self, name: str) -> tuple[list[Path], list[Path]]:
        tables: list[Path] = [("plugins", plugin, "containerd") for plugin in sorted(set(_CRI.values()))]
        return (
            [(*table, "runtimes", name, "options", "BinaryName") for table in tables],
            [(*table, "default_runtime_name") for table in tables],
        )

    def _drop_in(self, main: ChangedFile, wanted: EngineOptions) -> ChangedFile:
        name = os.path.join(os.path.dirname(main.name), "conf.d/99-nvhook.toml")
        return ChangedFile(name, Toml, wanted.notes, make_directory=True)


class Crio(Engine):
    name, title, unit = "crio", "CRI-O", "crio"
    default_file = "/etc/crio/crio.conf.d/99-nvhook.toml"
    signs = ("crio", "/etc/crio")

    def set(self, wanted: EngineOptions) -> list[ChangedFile]:
        file = self._file(wanted)
        runtime = ("crio", "runtime")
        place = (*runtime, "runtimes", wanted.runtime_name)
        settings: Settings = [((*place, "runtime_path"), wanted.runtime_path), ((*place, "runtime_type"), "oci")]
        monitor = shutil.which("conmon")
        if monitor and not lookup(file.document.table, (*place, "monitor_path")):
            settings.append(((*place, "monitor_path"), monitor))
        if wanted.set_as_default:
            settings.insert(0, ((*runtime, "default_runtime"), wanted.runtime_name))
        file.apply(settings, _header(self.name))
        if wanted.cdi:
            wanted.warnings.append("CRI-O takes CDI devices without being told: --cdi changes nothing")
        return [file]

    def registration(self, name: str) -> tuple[list[Path], list[Path]]:
        runtime = ("crio", "runtime")
        return [(*runtime, "runtimes", name, "runtime_path")], [(*runtime, "default_runtime")]


class Podman(Engine):
    name, title = "podman", "Podman"
    default_file = "/etc/containers/containers.conf.d/99-nvhook.conf"
    signs = ("podman", "/etc/containers/containers.conf")

    def set(self, wanted: EngineOptions) -> list[ChangedFile]:
        file = self._file(wanted)
        settings: Settings = [(("engine", "runtimes", wanted.runtime_name), [wanted.runtime_path])]
        if wanted.set_as_default:
            settings.insert(0, (("engine", "runtime"), wanted.runtime_name))
        file.apply(settings, _header(self.name))
        if wanted.cdi:
            wanted.warnings.append("Podman takes CDI devices without being told: --cdi changes nothing")
        return [file]

    def registration(self, name: str) -> tuple[list[Path], list[Path]]:
        return [("engine", "runtimes", name)], [("engine", "runtime")]


ENGINES: dict[str, Engine] = {engine.name: engine for engine in (Docker(), Containerd(), Crio(), Podman())}


def _header(engine: str) -> str:
    return f"# Written by `nvhook configure {engine}`, and taken away by `nvhook configure {engine} --remove`.\n"


def _is_program(value: object, path: str) -> bool:
    program = value[0] if isinstance(value, list) and value else value
    return bool(path) and isinstance(program, str) and os.path.realpath(program) == os.path.realpath(path)


# Docker


def _generic_resources(config: Config, file: ChangedFile) -> list[object]:
    """The node's GPUs in place of those it announced before; what it announces of other kinds stays."""
    found = gpus.read(config.proc_root).gpus
    if not found:
        raise DeviceError("the driver has no GPU to announce to Swarm", "see `dmesg | grep -i nvrm`")
    for gpu in found:
        if "?" in gpu.uuid:
            raise DeviceError(
                f"the UUID of GPU {gpu.index} is not known before the GPU is initialised",
                "run `nvidia-smi -L`, or start nvidia-persistenced, and try again",
            )
    before = file.document.get(("node-generic-resources",)) or []
    if not isinstance(before, list):
        raise ConfigError(f"`{file.name}`: `node-generic-resources` must be a list, not `{before}`")
    others = [item for item in before if not str(item).startswith(f"{SWARM_KIND}=")]
    return [*others, *(f"{SWARM_KIND}={gpu.uuid}" for gpu in found)]


def _swarm_variables(before: object) -> object:
    if isinstance(before, list):
        return before if SWARM_VARIABLE in before else [*before, SWARM_VARIABLE]
    names = [name.strip() for name in str(before or "").split(",") if name.strip()]
    return before if SWARM_VARIABLE in names else ",".join([*names, SWARM_VARIABLE])


# containerd


def _containerd_version(main: ChangedFile) -> int:
    table = main.document.table
    if not table:
        # No file, or an empty one: as new as the containerd that is to read it allows.
        return 3 if _containerd_major() >= 2 else 2
    version = table.get("version", 1)
    if version == 1:
        raise ConfigError(
            f"`{main.name}` is of version 1, which has no place for a runtime class",
            "write `version = 2` in it and the plugins by their full names, or take the file away",
        )
    if version not in _CRI or isinstance(version, bool):
        raise ConfigError(f"`{main.name}`: unknown version `{version}`", "known are 2, 3 and 4")
    return int(version)


def _containerd_major() -> int:
    match = re.search(r"\bv?(\d+)\.\d+", _output("containerd", "--version"))
    return int(match[1]) if match else 1


def _output(*command: str) -> str:
    import subprocess

    try:
        done = subprocess.run(  # noqa: S603 - the engine's own program
            command, capture_output=True, text=True, check=False, timeout=20
        )
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _is_disabled(main: ChangedFile, plugin: str) -> bool:
    disabled = main.document.get(("disabled_plugins",))
    return isinstance(disabled, list) and bool({"cri", plugin, _CRI[2]} & {str(item) for item in disabled})


def _cri_settings(wanted: EngineOptions, plugin: Path, own: object, merged: object, target: Table) -> Settings:
    """`own` is the table `containerd` of the file that is edited, `merged` that of all files together."""
    place = (*plugin, "containerd")
    runtimes = (*place, "runtimes")
    settings: Settings = []
    default, runtime = _runtime_to_copy(wanted.runtime_name, own, merged)
    if plugin[-1] == _CRI[2] and not _runtimes(own) and default == "runc" and not lookup(target, (*runtimes, default)):
        # containerd 1.x forgets its built-in runc as soon as a file names any runtime.
        settings.append(((*runtimes, default, "runtime_type"), _RUNC_SHIM))
    options = runtime.setdefault("options", {})
    options["BinaryName"] = wanted.runtime_path
    runtime["runtime_type"] = _RUNC_SHIM
    for path, value in _leaves((*runtimes, wanted.runtime_name), runtime):
        is_ours = path[-1] in ("BinaryName", "runtime_type")
        if is_ours or lookup(target, (*runtimes, wanted.runtime_name)) is None:
            settings.append((path, value))
    if wanted.set_as_default:
        settings.append(((*place, "default_runtime_name"), wanted.runtime_name))
    if wanted.cdi:
        # The directories of CDI are right as they are built in: /etc/cdi and /var/run/cdi.
        settings.append(((*plugin, "enable_cdi"), True))
    return settings


def _runtime_to_copy(name: str, own: object, merged: object) -> tuple[str, Table]:
    """The default runtime's name, and a copy of its table: nvhook wraps runc, so what runc is told holds for it too.

    A default that is not runc (a sandbox, say) is no model; then it is the runtime called runc, or crun.
    """
    default = "runc"
    for table in (own, merged):
        named = lookup(table, ("default_runtime_name",)) if isinstance(table, dict) else None
        if isinstance(named, str) and named and named != name:
            default = named
            break
    for candidate in (default, "runc", "crun"):
        for table in (own, merged):
            found = _runtimes(table).get(candidate)
            if isinstance(found, dict) and found.get("runtime_type") in ("", None, _RUNC_SHIM):
                found = copy.deepcopy(found)
                if not isinstance(found.get("options", {}), dict):
                    del found["options"]
                return default, found
    return default, {"options": {"SystemdCgroup": True}} if _has_systemd_cgroup() else {}


def _runtimes(table: object) -> Table:
    found = lookup(table, ("runtimes",)) if isinstance(table, dict) else None
    return found if isinstance(found, dict) else {}


def _has_systemd_cgroup() -> bool:
    """Whether this containerd's built-in runc uses systemd's cgroups: newer ones do."""
    found = re.search(r"^\s*SystemdCgroup\s*=\s*(\w+)", _output("containerd", "config", "default"), re.MULTILINE)
    return bool(found) and found[1] == "true"  # type: ignore[index]


def _leaves(path: Path, table: Table) -> Iterator[tuple[Path, object]]:
    """Values before tables, as TOML has them."""
    for key, value in sorted(table.items(), key=lambda item: isinstance(item[1], dict)):
        if isinstance(value, dict):
            yield from _leaves((*path, key), value)
        else:
            yield (*path, key), value


def _matches(main: ChangedFile, pattern: object, name: str) -> bool:
    return containerdfiles.matches(name, containerdfiles.absolute(main.name, pattern))


def _load_order(main: ChangedFile, wanted: EngineOptions) -> list[ChangedFile]:
    """The files that containerd reads, one after the other: what an import says counts over what imports it."""
    files = {main.name: main}

    def read(name: str) -> Document:
        files[name] = ChangedFile(name, Toml, wanted.notes)
        return files[name].document

    root = Root(os.open("/", DIRECTORY))
    try:
        return [files[document.name] for document in containerdfiles.in_order(root, main.document, read)]
    finally:
        os.close(root.fd)


def _later(
    main: ChangedFile, drop_in: ChangedFile, others: list[ChangedFile], imports: list[object]
) -> list[ChangedFile]:
    """Those read after our drop-in: in the same pattern by their names, or in a later one, or imported by others."""
    ours = min(index for index, pattern in enumerate(imports) if _matches(main, pattern, drop_in.name))
    later = []
    for file in others:
        indexes = [index for index, pattern in enumerate(imports) if _matches(main, pattern, file.name)]
        place = min(indexes, default=len(imports))
        if file is not main and (place > ours or (place == ours and file.name > drop_in.name)):
            later.append(file)
    return later


def _refuse_overridden(drop_in: ChangedFile, later: list[ChangedFile], settings: Settings) -> None:
    for file in later:
        for path, value in settings:
            found = file.document.get(path)
            if path != ("version",) and found is not None and not same(found, value):
                raise ConfigError(
                    f"`{file.name}` is read after `{drop_in.name}` and sets `{dotted(path[-2:])}` otherwise",
                    "take that out of it",
                )
