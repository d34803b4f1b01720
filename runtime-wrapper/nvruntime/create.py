# SPDX-License-Identifier: Apache-2.0
"""`create` and `run`: give the container's config.json our hook and its device rules; then comes the low-level runtime.

The launcher has found the low-level runtime and passes everything else through. A container that asks for
nothing keeps its config.json byte for byte.
"""

from __future__ import annotations

import os
import sys

from nvhook import audit
from nvhook.errors import NvhookError, RuntimeLookupError
from nvhook.request import config as configuration
from nvhook.request import request, spec

from . import bundle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from nvhook.audit import Audit
    from nvhook.container.edits import Device
    from nvhook.request.config import Config
    from nvhook.request.spec import Json
    from nvhook.start import Start

    from .call import Call

_PROGRAM = "nvidia-container-runtime"


def main(call: Call, stay: Callable[[Start], str] | None = None) -> int:
    """Edit the container's config.json: 0, or 1 with the error on stderr and in the runtime's log. `stay`: see edit."""
    warnings: list[str] = []
    log = EngineLog(call.arguments)
    trail = None
    try:
        config = configuration.load(call.config_path, must_exist=call.must_exist)
        log.also(config.log_file, config.log_level)
        warnings += config.warnings
        _look_up(call, config)
        # The container's id is the last word of runc's command line.
        trail = audit.Audit(config, _PROGRAM, call.arguments[-1], log.write)
        start = edit(call, config, warnings, trail, stay)
        log.warn(warnings)
        if start:
            trail.grant(start.chosen)
        return 0
    except NvhookError as error:
        log.warn(warnings)
        if trail:
            trail.refuse(str(error))
        log.write("error", str(error))  # the last one: engines show it
        print(f"{_PROGRAM}: {error}", file=sys.stderr)
        return 1


def take_back(config: Config, start: str) -> None:
    """What was made on the host for a container that is not started."""
    from nvhook.host import modules

    made = modules.made_by(config, start)
    if made:
        made.take_back()


def find_runtime(call: Call) -> int:
    """Find the low-level runtime that config.toml names: 0, or 1 with the error on stderr."""
    try:
        _look_up(call, configuration.load(call.config_path, must_exist=call.must_exist))
        return 0
    except NvhookError as error:
        print(f"{_PROGRAM}: {error}", file=sys.stderr)
        return 1


def _look_up(call: Call, config: Config) -> None:
    """Set `runtime`, as the launcher does; RuntimeLookupError where none is there."""
    if not call.candidates:
        call.candidates = ":".join(config.runtimes)
        places = [*os.environ.get("PATH", "").split(":"), *spec.USUAL_PATH.split(":")]
        for name in config.runtimes:
            paths = [name] if "/" in name else [f"{place}/{name}" for place in places]
            found = [path for path in paths if os.path.isfile(path) and os.access(path, os.X_OK)]
            if found:
                call.runtime = found[0]
                return
    if not call.runtime:
        raise RuntimeLookupError(
            f"no runtime binary found from candidate list: [{call.candidates}]",
            "install runc, or set `nvidia-container-runtime.runtimes` in config.toml",
        )


def edit(
    call: Call, config: Config, warnings: list[str], trail: Audit, stay: Callable[[Start], str] | None = None
) -> Start | None:
    """Change the config.json of the bundle that `call` names; None, and nothing changed, if its container asks for no
    GPUs.

    `stay` is given by a process that can prepare the start while the low-level runtime makes the container. It returns
    the number by which the hook finds that process, or nothing.
    """
    directory = bundle.directory(call.arguments)
    document, status = spec.read_config(directory)
    described = trail.spec = spec.parse(document, directory)
    known = len(warnings)
    asked = request.read(described, config, warnings)
    trail.begin(asked, warnings[known:])
    if asked is None:
        return None
    from nvhook import plan  # these three only for a container that asks
    from nvhook.host import modules
    from nvhook.start import Start

    start = Start(config, described, asked, call.arguments[-1], warnings)
    start.choose()
    nodes = plan.devices(asked.capabilities, start.chosen.gpus, start.offers)
    start.made = modules.make_nodes(config, nodes, warnings, start.id)
    try:
        _add_rules(document, start, nodes)
        _add_hooks(document, start, call.hook, stay(start) if stay else "")
        bundle.write(directory, document, status)
    except BaseException:
        start.take_back()
        raise
    return start


def _add_rules(document: Json, start: Start, nodes: list[Device]) -> None:
    """The device cgroup's rules, also to the record that the hook goes by, and the groups of nodes."""
    if not start.config.no_cgroups:
        rules = [node.rule() for node in nodes]
        bundle.add_device_rules(document, rules)
        start.spec.device_rules = start.spec.device_rules + rules
    if not start.config.no_additional_gids:
        bundle.add_groups(document, [node.gid for node in nodes if node.needs_group()])


def _add_hooks(document: Json, start: Start, hook: str, child: str) -> None:
    """What was made on the host, and is provisional, stays when the container's program runs (poststart), and goes when
    the container is deleted before that (poststop)."""
    config = start.config
    first = ["--child", child] if child else []
    which = ["--config", os.path.abspath(config.path)] if config.path else []
    bundle.add_hook(document, "prestart", hook, [*first, "--no-audit", *which], spec.HOOK_ENV)
    if start.made:
        bundle.add_hook(document, "poststart", hook, ["--made", *which], spec.HOOK_ENV)
        bundle.add_hook(document, "poststop", hook, ["--made", *which], spec.HOOK_ENV)
    else:
        bundle.add_hook(document, "poststop", hook, ["--state-dir", config.state_dir], spec.HOOK_ENV)


class EngineLog:
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
