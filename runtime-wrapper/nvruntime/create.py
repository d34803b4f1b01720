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
    from collections.abc import Callable

    from nvhook.audit import Audit
    from nvhook.config import Config
    from nvhook.edits import Device
    from nvhook.spec import Json

    from . import standby

_PROGRAM = "nvidia-container-runtime"

# The hook of a few lines that wakes the process which stands by (standby.py), beside this package.
_STANDBY_HOOK = os.path.join(
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "standby/nvidia-container-runtime-hook"
)
# What the hook's process finds in its environment: nothing of the image's, and never nothing at all, because an
# empty list means to some runtimes that the hook inherits theirs (CVE-2025-23266).
HOOK_ENV = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]


class Call:
    """One call of the wrapper.

    hook          absolute path of nvidia-container-runtime-hook
    config_path   config.toml, which need not be there unless it `must_exist`
    reserve       directory of the process that serves the next container (reserve.py); empty for none
    candidates    what was looked for as the low-level runtime, separated by colons; `runtime` is empty if none is there
    arguments     runc's command line
    """

    __slots__ = ("arguments", "candidates", "config_path", "hook", "must_exist", "reserve", "runtime")

    def __init__(
        self,
        hook: str,
        config_path: str,
        must_exist: bool,
        reserve: str,
        candidates: str,
        runtime: str,
        arguments: list[str],
    ) -> None:
        self.hook = hook
        self.config_path = config_path
        self.must_exist = must_exist
        self.reserve = reserve
        self.candidates = candidates
        self.runtime = runtime
        self.arguments = arguments


def main(hook: str, config_path: str, reserve: str, candidates: str, runtime: str, arguments: list[str]) -> int:
    """Does not return when all is well: the process is then the low-level `runtime`. The words are those of Call."""
    chosen = os.environ.get("NVHOOK_CONFIG")
    call = Call(hook, chosen or config_path, bool(chosen), reserve, candidates, runtime, arguments)
    said: list[str] = []
    if reserve:
        from . import reserve as reserves

        reserves.leave(reserve)  # before anything of this container is in memory
    ready(call, said, become)
    for line in said:
        print(line, file=sys.stderr)
    return 1


def ready(
    call: Call, said: list[str], then: Callable[[Call], None], stay: Callable[[standby.Waiting], None] | None = None
) -> bool:
    """Edit the container's config.json and do what comes `then`; False, and an error in `said`, if that is not to be.

    A process that stands by for the container is left; one that can itself is told what that takes, by `stay`.
    """
    warnings: list[str] = []
    log = Log(call.arguments)
    trail = None
    try:
        config = configuration.load(call.config_path, must_exist=call.must_exist)
        log.also(config.log_file, config.log_level)
        warnings += config.warnings
        if not call.runtime:
            raise RuntimeLookupError(
                f"no runtime binary found from candidate list: [{call.candidates}]",
                "install runc, or set `nvidia-container-runtime.runtimes` in config.toml",
            )
        # The container's id is the last word of runc's command line.
        trail = audit.Audit(config, _PROGRAM, call.arguments[-1], log.write)
        edit(call, config, warnings, trail, stay)
        log.warn(warnings)
        trail.grant()
        then(call)
        return True
    except NvhookError as error:
        if trail and trail.chosen:
            _take_back(config, call.arguments[-1])
        log.warn(warnings)
        if trail:
            trail.refuse(str(error))
        log.write("error", str(error))  # the last one: engines show it
        said.append(f"{_PROGRAM}: {error}")
    return False


def _take_back(config: Config, start: str) -> None:
    """What was made on the host, where the low-level runtime is not executed."""
    from nvhook import kmods

    made = kmods.made_by(config, start)
    if made:
        made.take_back()


def become(call: Call) -> None:
    """Replace this process, its environment unchanged; RuntimeLookupError where that does not work."""
    try:
        os.execv(call.runtime, [call.runtime, *call.arguments])
    except OSError as error:
        raise RuntimeLookupError(f"execute `{call.runtime}`: {reason(error)}") from None


def candidates(config_path: str) -> int:
    """Print `nvidia-container-runtime.runtimes`, separated by colons, for the launcher."""
    try:
        chosen = os.environ.get("NVHOOK_CONFIG")
        print(":".join(configuration.load(chosen or config_path, must_exist=bool(chosen)).runtimes))
    except NvhookError as error:
        print(f"nvidia-container-runtime: {error}", file=sys.stderr)
        return 1
    return 0


def edit(
    call: Call,
    config: Config,
    warnings: list[str],
    trail: Audit,
    stay: Callable[[standby.Waiting], None] | None = None,
) -> None:
    """Change the config.json of the bundle that `call` names, if its container asks for GPUs."""
    place = bundle.directory(call.arguments)
    document, status = spec.read_config(place)
    described = spec.parse(document, place)
    asked = trail.read(described, warnings)
    if asked is None:
        return
    from nvhook import caps, dri, features, host, kmods, plan, selection  # only for a container that asks

    from . import standby

    gpus = host.read(config, asked, warnings)
    chosen = trail.chosen = selection.choose(config, asked, gpus, warnings)
    task = standby.Task(config, described, asked, gpus, chosen, bundle=place, id=call.arguments[-1])
    waiting = standby.make(task)
    if waiting:
        (stay or standby.leave)(waiting)  # a process of its own works while we do the rest
    extras = [caps.find(config, asked, chosen, gpus), features.find(config, asked, warnings)]
    nodes = plan.devices(asked, chosen.gpus, gpus, dri.find(config, asked, chosen.gpus), extras)
    made = kmods.make_nodes(config, nodes, warnings, call.arguments[-1])
    _complete(call, config, document, nodes, waiting, is_provisional=made is not None)
    bundle.write(place, document, status)


def _complete(
    call: Call,
    config: Config,
    document: Json,
    nodes: list[Device],
    waiting: standby.Waiting | None,
    *,
    is_provisional: bool,
) -> None:
    """Rules, groups and hooks. What was made on the host and `is_provisional` stays when the container's program runs
    (poststart), and goes when the container is deleted before that (poststop)."""
    if not config.no_cgroups:
        bundle.add_device_rules(document, [node.rule() for node in nodes])
    if not config.no_additional_gids:
        bundle.add_groups(document, [node.gid for node in nodes if node.needs_group()])
    which = ["--no-audit", *(["--config", os.path.abspath(config.path)] if config.path else [])]
    if waiting:
        bundle.add_hook(document, "prestart", _STANDBY_HOOK, ["--standby", waiting.place, *which], HOOK_ENV)
    else:
        bundle.add_hook(document, "prestart", call.hook, which, HOOK_ENV)
    if is_provisional:
        bundle.add_hook(document, "poststart", call.hook, ["--made", *which], HOOK_ENV)
        bundle.add_hook(document, "poststop", call.hook, ["--made", *which], HOOK_ENV)
    elif call.reserve:
        clean = ["--reserve", call.reserve, "--state-dir", config.state_dir]
        bundle.add_hook(document, "poststop", _STANDBY_HOOK, clean, HOOK_ENV)
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
