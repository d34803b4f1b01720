# SPDX-License-Identifier: Apache-2.0
"""`create` and `run`: give the container's config.json our hook and its device rules, then become the runtime.

The launcher (POSIX sh) has found the low-level runtime and passes everything else through. A container that asks for
nothing keeps its config.json byte for byte.
"""

from __future__ import annotations

import os
import sys

from nvhook import audit, spec
from nvhook import config as configuration
from nvhook.errors import NvhookError, RuntimeLookupError, reason

from . import bundle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nvhook.audit import Audit
    from nvhook.config import Config

_PROGRAM = "nvidia-container-runtime"

# The hook of a few lines that wakes the process which stands by (standby.py), beside this package.
_STANDBY_HOOK = os.path.join(
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "standby/nvidia-container-runtime-hook"
)
# What the hook's process finds in its environment: nothing of the image's, and never nothing at all, because an
# empty list means to some runtimes that the hook inherits theirs (CVE-2025-23266).
HOOK_ENV = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]


def main(hook: str, config_path: str, candidates: str, runtime: str, arguments: list[str]) -> int:
    """Does not return when all is well: the process is then the low-level `runtime` with `arguments`.

    hook          absolute path of nvidia-container-runtime-hook
    config_path   config.toml; that of NVHOOK_CONFIG, if set, must exist
    candidates    what was looked for as the low-level runtime, separated by colons; `runtime` is empty if none is there
    """
    warnings: list[str] = []
    log = Log(arguments)
    trail = None
    try:
        config = _load(config_path)
        log.also(config.log_file, config.log_level)
        warnings += config.warnings
        if not runtime:
            raise RuntimeLookupError(
                f"no runtime binary found from candidate list: [{candidates}]",
                "install runc, or set `nvidia-container-runtime.runtimes` in config.toml",
            )
        # The container's id is the last word of runc's command line.
        trail = audit.Audit(config, _PROGRAM, arguments[-1], log.write)
        edit(arguments, hook, config, warnings, trail)
        log.warn(warnings)
        trail.grant()
        become(runtime, arguments)
    except NvhookError as error:
        log.warn(warnings)
        if trail:
            trail.refuse(str(error))
        log.write("error", str(error))  # the last one: engines show it
        print(f"nvidia-container-runtime: {error}", file=sys.stderr)
    return 1


def become(runtime: str, arguments: list[str]) -> None:
    """Replace this process, its environment unchanged; RuntimeLookupError where that does not work."""
    try:
        os.execv(runtime, [runtime, *arguments])
    except OSError as error:
        raise RuntimeLookupError(f"execute `{runtime}`: {reason(error)}") from None


def candidates(config_path: str) -> int:
    """Print `nvidia-container-runtime.runtimes`, separated by colons, for the launcher."""
    try:
        print(":".join(_load(config_path).runtimes))
    except NvhookError as error:
        print(f"nvidia-container-runtime: {error}", file=sys.stderr)
        return 1
    return 0


def _load(config_path: str) -> Config:
    chosen = os.environ.get("NVHOOK_CONFIG")
    return configuration.load(chosen or config_path, must_exist=bool(chosen))


def edit(arguments: list[str], hook: str, config: Config, warnings: list[str], trail: Audit) -> None:
    """Change the config.json of the bundle that `arguments` name, if its container asks for GPUs."""
    place = bundle.directory(arguments)
    document, status = spec.read_config(place)
    described = spec.parse(document, place)
    asked = trail.read(described, warnings)
    if asked is None:
        return
    from nvhook import caps, dri, features, host, kmods, plan, selection  # only for a container that asks

    from . import standby

    gpus = host.read(config, asked, warnings)
    chosen = trail.chosen = selection.choose(config, asked, gpus, warnings)
    task = standby.Task(config, described, asked, gpus, chosen, bundle=place, id=arguments[-1])
    standby_place = standby.leave(task)  # it works while we do the rest
    extras = [caps.find(config, asked, chosen, gpus), features.find(config, asked, warnings)]
    nodes = plan.devices(asked, chosen.gpus, gpus, dri.find(config, asked, chosen.gpus), extras)
    kmods.make_nodes(config, nodes, warnings)
    if not config.no_cgroups:
        bundle.add_device_rules(document, [node.rule() for node in nodes])
    if not config.no_additional_gids:
        bundle.add_groups(document, [node.gid for node in nodes if node.needs_group()])
    which = ["--no-audit", *(["--config", os.path.abspath(config.path)] if config.path else [])]
    if standby_place:
        bundle.add_hook(document, "prestart", _STANDBY_HOOK, ["--standby", standby_place, *which], HOOK_ENV)
    else:
        bundle.add_hook(document, "prestart", hook, which, HOOK_ENV)
    bundle.add_hook(document, "poststop", hook, ["--state-dir", config.state_dir], HOOK_ENV)
    bundle.write(place, document, status)


class Log:
    """The files that the engine reads to tell its user why a container did not start: runc's `--log`, in its format.

    A log that cannot be written is no reason not to start a container, and there is nowhere to say so.
    """

    __slots__ = ("_is_json", "_is_quiet", "_paths")

    def __init__(self, arguments: list[str]) -> None:
        self._paths = [path for path in [_option(arguments, "log")] if path]
        self._is_json = _option(arguments, "log-format") == "json"
        self._is_quiet = False

    def also(self, path: str, level: str) -> None:
        """`nvidia-container-runtime.debug` and `log-level` of config.toml; some levels want no warnings."""
        self._is_quiet = level in ("error", "fatal", "panic")
        if path and path != "/dev/null":
            self._paths.append(path)

    def warn(self, warnings: list[str]) -> None:
        for warning in warnings:
            if not self._is_quiet:
                self.write("warning", warning)
        warnings.clear()

    def write(self, level: str, message: str) -> None:
        line = audit.entry(level, f"{_PROGRAM}: {message}", as_json=self._is_json)
        for path in self._paths:
            fd = audit.open_log(path)
            if fd >= 0:
                audit.append(fd, line)
                os.close(fd)


def _option(arguments: list[str], name: str) -> str:
    """The value of `--name value` or `--name=value` among runc's options; the last one, or empty."""
    found = ""
    for index, word in enumerate(arguments):
        option, equals, value = word.partition("=")
        if option in (f"-{name}", f"--{name}"):
            found = value if equals else "".join(arguments[index + 1 : index + 2])
    return found
