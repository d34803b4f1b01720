# SPDX-License-Identifier: Apache-2.0
"""`create` and `run`: give the container's config.json our hook and its device rules; then comes the low-level runtime.

The launcher has found the low-level runtime and passes everything else through. A container that asks for
nothing keeps its config.json byte for byte.
"""

from __future__ import annotations

import os
import sys

from nvhook import audit, spec
from nvhook import config as configuration
from nvhook.errors import NvhookError, RuntimeLookupError

from . import bundle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from nvhook.audit import Audit
    from nvhook.config import Config
    from nvhook.edits import Device
    from nvhook.gpus import Gpus, Selection
    from nvhook.request import Request
    from nvhook.spec import Json

_PROGRAM = "nvidia-container-runtime"
_USUAL_PLACES = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# The environment of our hooks: nothing of the image's, and not empty, because an empty list means to some runtimes that
# the hook inherits theirs (CVE-2025-23266).
HOOK_ENV = [f"PATH={_USUAL_PLACES}"]


class Call:
    """One call of the wrapper.

    hook          absolute path of nvidia-container-runtime-hook
    config_path   config.toml, which need not be there unless it `must_exist`
    server        directory of the server (server.py); empty for none
    candidates    names and paths of low-level runtimes, separated by colons; empty: those of config.toml
    runtime       the first of them that is there; empty if none is, or if `candidates` is
    arguments     runc's command line
    """

    __slots__ = ("arguments", "candidates", "config_path", "hook", "must_exist", "runtime", "server")

    def __init__(
        self,
        hook: str,
        config_path: str,
        must_exist: bool,
        server: str,
        candidates: str,
        runtime: str,
        arguments: list[str],
    ) -> None:
        self.hook = hook
        self.config_path = config_path
        self.must_exist = must_exist
        self.server = server
        self.candidates = candidates
        self.runtime = runtime
        self.arguments = arguments


class Task:
    """What `edit` has found out about a container, for a process that prepares its start (ahead.py)."""

    __slots__ = ("asked", "bundle", "chosen", "config", "described", "gpus", "id")

    def __init__(
        self,
        config: Config,
        described: spec.Spec,
        asked: Request,
        gpus: Gpus,
        chosen: Selection,
        *,
        bundle: str,
        id: str,  # noqa: A002 - OCI's name
    ) -> None:
        self.config = config
        self.described = described
        self.asked = asked
        self.gpus = gpus
        self.chosen = chosen
        self.bundle = bundle
        self.id = id


def main(call: Call, stay: Callable[[Task], str] | None = None) -> int:
    """Edit the container's config.json: 0, or 1 with the error on stderr and in the runtime's log. `stay`: see edit."""
    warnings: list[str] = []
    log = Log(call.arguments)
    trail = None
    try:
        config = configuration.load(call.config_path, must_exist=call.must_exist)
        log.also(config.log_file, config.log_level)
        warnings += config.warnings
        _look_up(call, config)
        # The container's id is the last word of runc's command line.
        trail = audit.Audit(config, _PROGRAM, call.arguments[-1], log.write)
        edit(call, config, warnings, trail, stay)
        log.warn(warnings)
        trail.grant()
        return 0
    except NvhookError as error:
        if trail and trail.chosen:
            take_back(config, call.arguments[-1])
        log.warn(warnings)
        if trail:
            trail.refuse(str(error))
        log.write("error", str(error))  # the last one: engines show it
        print(f"{_PROGRAM}: {error}", file=sys.stderr)
        return 1


def take_back(config: Config, start: str) -> None:
    """What was made on the host for a container that is not started."""
    from nvhook import kmods

    made = kmods.made_by(config, start)
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
        places = [*os.environ.get("PATH", "").split(":"), *_USUAL_PLACES.split(":")]
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
    call: Call, config: Config, warnings: list[str], trail: Audit, stay: Callable[[Task], str] | None = None
) -> None:
    """Change the config.json of the bundle that `call` names, if its container asks for GPUs.

    `stay` is given by a process that can prepare the start while the low-level runtime makes the container. It returns
    the number by which the hook finds that process, or nothing.
    """
    place = bundle.directory(call.arguments)
    document, status = spec.read_config(place)
    described = spec.parse(document, place)
    asked = trail.read(described, warnings)
    if asked is None:
        return
    from nvhook import caps, dri, features, host, kmods, plan, selection  # only for a container that asks

    gpus = host.read(config, asked, warnings)
    chosen = trail.chosen = selection.choose(config, asked, gpus, warnings)
    extras = [caps.find(config, asked, chosen, gpus), features.find(config, asked, warnings)]
    nodes = plan.devices(asked, chosen.gpus, gpus, dri.find(config, asked, chosen.gpus), extras)
    made = kmods.make_nodes(config, nodes, warnings, call.arguments[-1])
    child = stay(Task(config, described, asked, gpus, chosen, bundle=place, id=call.arguments[-1])) if stay else ""
    _complete(call, config, document, nodes, child, is_provisional=made is not None)
    bundle.write(place, document, status)


def _complete(
    call: Call, config: Config, document: Json, nodes: list[Device], child: str, *, is_provisional: bool
) -> None:
    """Rules, groups and hooks. What was made on the host and `is_provisional` stays when the container's program runs
    (poststart), and goes when the container is deleted before that (poststop)."""
    if not config.no_cgroups:
        bundle.add_device_rules(document, [node.rule() for node in nodes])
    if not config.no_additional_gids:
        bundle.add_groups(document, [node.gid for node in nodes if node.needs_group()])
    first = ["--child", child] if child else []
    which = ["--config", os.path.abspath(config.path)] if config.path else []
    bundle.add_hook(document, "prestart", call.hook, [*first, "--no-audit", *which], HOOK_ENV)
    if is_provisional:
        bundle.add_hook(document, "poststart", call.hook, ["--made", *which], HOOK_ENV)
        bundle.add_hook(document, "poststop", call.hook, ["--made", *which], HOOK_ENV)
    else:
        bundle.add_hook(document, "poststop", call.hook, ["--state-dir", config.state_dir], HOOK_ENV)


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
