# SPDX-License-Identifier: Apache-2.0
"""Why a container gets what it gets: for each thing that it asks for where that came from and which key of config.toml
decided, for each edit of the plan what it is there for. The plan itself is plan.py's; here nothing is decided."""

from __future__ import annotations

import os
import posixpath

from nvhook.container.edits import Device, Edit, Mount, Symlink, Tmpfs, WrittenFile
from nvhook.container.linkercache import Ldcache
from nvhook.driver import discovery
from nvhook.formats.record import Record
from nvhook.request import device_list, request

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from nvhook.driver.records import Library
    from nvhook.request.config import Config
    from nvhook.request.spec import Spec
    from nvhook.start import Start

_ACCEPT_ENV = "accept-nvidia-visible-devices-envvar-when-unprivileged"
_ACCEPT_MOUNTS = "accept-nvidia-visible-devices-as-volume-mounts"
_ACCEPT_ANNOTATIONS = "accept-device-annotations"
_VISIBLE = "NVIDIA_VISIBLE_DEVICES"
_PROC = "/proc/driver/nvidia"
_INJECTED = "the engine has injected the container's devices by CDI"


class RequestSource(Record):
    """One thing that is asked for: `name` and `value` as written, `origin`, and the `rule` that let it count or not."""

    name: str
    value: str
    origin: str
    rule: str

    def describe(self) -> dict[str, object]:
        return {"name": self.name, "value": self.value, "from": self.origin, "rule": self.rule}


def sources(described: Spec, config: Config, origin_of: Callable[[str], str]) -> list[RequestSource]:
    """Everything in `described` that nvhook looks at. `origin_of`: who has set a variable."""
    winner = request.origin(described, config)
    asking = device_list.annotated(described.annotations, config.annotation_prefixes)
    found = [
        RequestSource(key, value, "annotation", _annotation_rule(key, key in asking, described, config))
        for key, value in sorted(described.annotations.items())
        if device_list.is_key(key, config.annotation_prefixes)
    ]
    for source, destination in described.mounts:
        place = posixpath.normpath(destination)
        if posixpath.normpath(source) == "/dev/null" and place.startswith(request.VOLUME_ROOT):
            rule = _device_rule(request.MOUNTS, winner, described, config)
            if place.startswith(f"{request.VOLUME_ROOT}imex/"):
                rule = f"{_ACCEPT_MOUNTS} = {_toml(config.accept_volume_mounts)}; {_imex_rule(config)}"
            found.append(RequestSource(place, source, "volume mount", rule))
    for name, value in sorted(described.env.items()):
        rule = _variable_rule(name, winner, described, config)
        if rule:
            found.append(RequestSource(name, value, origin_of(name), rule))
    return found


def _variable_rule(name: str, winner: str, described: Spec, config: Config) -> str:
    """Empty for a variable that is none of ours."""
    legacy = bool(described.env.get("CUDA_VERSION")) and not described.env.get("NVIDIA_REQUIRE_CUDA")
    if name in (_VISIBLE, *config.swarm_resources):
        return _device_rule(name, winner, described, config)
    if name == "CUDA_VERSION" and legacy:
        return "image from before NVIDIA_REQUIRE_CUDA: a requirement, and a request for all where there is no other"
    if name.startswith("NVIDIA_REQUIRE_"):
        is_off = described.env.get("NVIDIA_DISABLE_REQUIRE") in ("1", "t", "T", "TRUE", "true", "True")
        return "not checked: NVIDIA_DISABLE_REQUIRE" if is_off else f"disable-require = {_toml(config.disable_require)}"
    mig, supported = "for privileged containers alone", _toml(",".join(config.supported_capabilities))
    rules = {
        "LD_LIBRARY_PATH": "where programs look before the linker cache",
        "NVIDIA_DISABLE_REQUIRE": "an image may do without its own requirements",
        "NVIDIA_DRIVER_CAPABILITIES": f"supported-driver-capabilities = {supported}",
        "NVIDIA_IMEX_CHANNELS": _imex_rule(config),
        "NVIDIA_MIG_CONFIG_DEVICES": mig,
        "NVIDIA_MIG_MONITOR_DEVICES": mig,
        **{f"NVIDIA_{feature.upper()}": "counts if it is `enabled`" for feature in request.FEATURES},
    }
    return rules.get(name, "")


def _annotation_rule(key: str, is_asking: bool, described: Spec, config: Config) -> str:
    """Why a list in an annotation counts, or why not."""
    if not is_asking:
        return "names no device of NVIDIA's for this container"
    if described.cdi_injected:
        return _INJECTED
    if config.accept_device_annotations is False:
        return f"not used: {_ACCEPT_ANNOTATIONS} = false"
    if not device_list.is_read(key, config.annotation_prefixes):
        return f"refused: annotation-prefixes = [{', '.join(map(_toml, config.annotation_prefixes))}]"
    if not request.trusts_annotations(described, config):
        return _variable_policy(described, config)
    is_set = config.accept_device_annotations is not None
    return f"{_ACCEPT_ANNOTATIONS} = true" if is_set else "an annotation is the engine's, and comes first"


def _device_rule(kind: str, winner: str, described: Spec, config: Config) -> str:
    """Why the mounts or the variable of this name count, or why not."""
    if kind == request.MOUNTS and not config.accept_volume_mounts:
        return f"not used: {_ACCEPT_MOUNTS} = false"
    if kind not in winner.split(", ") and kind != winner:
        return _passed_over(kind, winner, config)
    if described.cdi_injected:
        return f"not used: {_INJECTED}"
    if kind == request.MOUNTS:
        return f"{_ACCEPT_MOUNTS} = true"
    return _variable_policy(described, config)


def _variable_policy(described: Spec, config: Config) -> str:
    if described.privileged:
        return "privileged container: no key decides"
    rule = f"{_ACCEPT_ENV} = {_toml(config.accept_env_when_unprivileged)}"
    return rule if config.accept_env_when_unprivileged else f"not used: {rule}"


def _passed_over(kind: str, winner: str, config: Config) -> str:
    if kind == _VISIBLE and winner and set(winner.split(", ")) <= set(config.swarm_resources):
        return f"not used: swarm-resource = {_toml(','.join(config.swarm_resources))}"
    first = request.ANNOTATIONS if winner.startswith(f"{request.ANNOTATIONS} ") else winner
    return f"not used: {first} come first" if winner else "names no device"


def _imex_rule(config: Config) -> str:
    return f"features.ignore-imex-channel-requests = {_toml(config.ignore_imex_channels)}"


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"'


class Reasons:
    """What each edit of one plan is for."""

    def __init__(self, made: Start) -> None:
        self._made = made
        self._asked = made.request.capabilities
        self._libraries = {item.path: item for item in made.driver.libraries}
        self._chains = {bits: _chains(made, bits) for bits in (64, 32)}
        self._places = self._of_files()
        self._gpus = {gpu.pci: gpu for gpu in made.chosen.gpus}
        self._minors = {gpu.minor: gpu for gpu in made.chosen.gpus}

    def of(self, edit: Edit) -> str:
        if isinstance(edit, Mount):
            return self._mount(edit)
        if isinstance(edit, Tmpfs):
            return self._tmpfs(edit.destination)
        if isinstance(edit, WrittenFile):
            return self._tmpfs(os.path.dirname(str(edit.describe()["path"])))
        if isinstance(edit, Symlink):
            return self._link(edit)
        if isinstance(edit, Device):
            return self._device(edit)
        assert isinstance(edit, Ldcache)
        what = "so that programs find the libraries"
        return what if edit.names else f"{what}, and {edit.directories[0]} of the image before them"

    def _of_files(self) -> dict[str, str]:
        """Of what is a file of the driver and no library: destination -> why."""
        found = {
            place: f"{item.name} names its libraries there"
            for item in self._made.driver.binaries
            for _, place in item.directories
        }
        for item in self._made.driver.binaries:
            found[f"{self._made.layout.binaries}/{item.name}"] = f"{item.capability}: program"
        for file in self._made.driver.files:
            found[file.destination] = f"{self._of_those(file.capabilities)}: goes with the libraries"
        return found

    def _mount(self, edit: Mount) -> str:
        if edit.source in self._libraries:
            return self._library(self._libraries[edit.source])
        if edit.destination in self._places:
            return self._places[edit.destination]
        if edit.destination.startswith(_PROC):
            gpu = self._gpus.get(edit.destination.rpartition("/")[2])
            return f"GPU {gpu.index}" if gpu else "tells the minor of a capability's device node"
        if "ro" not in edit.options:
            return "a daemon of the driver's that runs on the host"
        return "asked for by a feature (NVIDIA_GDS)"

    def _library(self, library: Library) -> str:
        """The capabilities that begin with it, or else the chain of NEEDED that leads to it."""
        chains = self._chains[library.bits].get(library.soname or library.name, {})
        first = [capability for capability, chain in chains.items() if len(chain) == 1]
        if first:
            return ", ".join(first)
        for capability, chain in chains.items():
            return f"{capability}: {' -> '.join(chain)}"
        return self._of_those(library.capabilities)

    def _of_those(self, capabilities: tuple[str, ...]) -> str:
        return ", ".join(name for name in capabilities if name in self._asked)

    def _tmpfs(self, destination: str) -> str:
        if destination.startswith(_PROC):
            return "shows this container's GPUs alone, and keeps programs from making device nodes"
        return "tells EGL which GPUs to look at"

    def _link(self, edit: Symlink) -> str:
        name, target = os.path.basename(edit.path), os.path.basename(edit.target)
        if edit.path.startswith("/dev/dri/"):
            return f"GPU {self._gpu_at(name)}: its node by its place on the bus"
        if "/gbm/" in edit.path:
            return f"libgbm opens {target} by this name"
        for library in self._libraries.values():
            if target in (library.name, library.soname):
                how = "SONAME" if name == library.soname else "another name"
                return f"{how} of {library.name}"
        return f"the X server opens {target} by this name"

    def _gpu_at(self, name: str) -> str:
        return next((str(gpu.index) for pci, gpu in self._gpus.items() if f"-{pci}-" in name), "")

    def _device(self, edit: Device) -> str:
        name = edit.path.removeprefix("/dev/")
        if name.removeprefix("nvidia").isdecimal() and edit.minor in self._minors:
            return f"GPU {self._minors[edit.minor].index}"
        for start, why in _NODES:
            if name.startswith(start):
                return why
        return "asked for by a feature (NVIDIA_GDS, NVIDIA_MOFED, NVIDIA_GDRCOPY, NVIDIA_NVSWITCH)"


_NODES = (
    ("nvidiactl", "every GPU: the driver's control node"),
    ("nvidia-uvm", "compute or video: unified memory"),
    ("nvidia-modeset", "display: mode setting"),
    ("nvidia-caps-imex-channels/", "an IMEX channel that is asked for"),
    ("nvidia-caps/", "a MIG device, or a right to MIG, that is asked for"),
    ("dri/", "graphics or display: DRI node of a GPU"),
    ("dxg", "WSL 2: the one node of all GPUs"),
)


def _chains(made: Start, bits: int) -> dict[str, dict[str, list[str]]]:
    """SONAME -> capability that is asked for -> the shortest chain of NEEDED that leads there, itself at the end."""
    by_name = {item.soname or item.name: item for item in made.driver.libraries if item.bits == bits}
    found: dict[str, dict[str, list[str]]] = {}
    for capability in made.request.capabilities:
        seeds = discovery.SEEDS.get(capability, ())
        row = [[name] for name in by_name if discovery.stem_of(name) in seeds]
        while row:
            following = []
            for chain in row:
                chains = found.setdefault(chain[-1], {})
                if capability not in chains:
                    chains[capability] = chain
                    following += [[*chain, name] for name in by_name[chain[-1]].needed if name in by_name]
            row = following
    return found
