# SPDX-License-Identifier: Apache-2.0
"""The command nvidia-container-runtime-hook: which stage of a container's life it is called for, and what for.

    prestart    the main job (prestart.py)
    cdi         what an engine cannot do that injects by CDI (cdihook.py)
    poststart   keep what was made on the host for it (modules.py)
    poststop    take away what it left in the root filesystem (cleanup.py), and on the host if it never ran

Each stage imports what it needs: an interpreter at the end of a container costs its user nothing but time.
"""

from __future__ import annotations

import sys

from .errors import NvhookError, one_line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .host.modules import Made
    from .request.config import Config

_USAGE = """\
usage: nvidia-container-runtime-hook [--config FILE] [--no-audit] prestart
       nvidia-container-runtime-hook [--config FILE | --state-dir DIR] [--made] poststop
       nvidia-container-runtime-hook [--config FILE] [--made] poststart
       nvidia-container-runtime-hook cdi ARGUMENTS    (as `nvhook cdi generate` writes them)
       nvidia-container-runtime-hook --version
"""


class _Usage(Exception):  # noqa: N818 - not an error of the run
    pass


def main(arguments: list[str], default_config: str) -> int:
    """0 done or nothing to do, 1 an error on stderr, 2 usage."""
    try:
        command, options = ("cdi", {}) if arguments[:1] == ["cdi"] else _parse(arguments)
    except _Usage:
        sys.stderr.write(_USAGE)
        return 2
    if command == "version":
        from .version import VERSION

        print(f"NVIDIA Container Runtime Hook version {VERSION} (nvhook)")
        return 0
    warnings: list[str] = []
    try:
        if command == "prestart":
            _prestart(options, default_config, warnings)
        elif command == "cdi":
            from . import cdihook

            cdihook.run(arguments[1:], default_config, warnings)
        elif command == "poststart" and "made" in options:
            _poststart(options, default_config, warnings)
        elif command == "poststop":
            _poststop(options, default_config, warnings)
        return 0
    except NvhookError as error:
        print(f"nvidia-container-runtime-hook: {error}", file=sys.stderr)
        return 1
    finally:
        for warning in warnings:
            print(one_line(f"nvidia-container-runtime-hook: warning: {warning}"), file=sys.stderr)


def _parse(arguments: list[str]) -> tuple[str, dict[str, str]]:
    """(command, option -> value). NVIDIA's hook takes one dash as well as two."""
    command = ""
    options: dict[str, str] = {}
    words = iter(arguments)
    for word in words:
        name, equals, value = word.lstrip("-").partition("=")
        if not word.startswith("-"):
            command = command or word
        elif name in ("config", "state-dir"):
            options[name] = value if equals else next(words, "")
            if not options[name]:
                raise _Usage
        elif name in ("no-audit", "made"):  # the wrapper has written who got what, has made nodes on the host
            options[name] = ""
        elif name == "version":
            command = "version"
        elif name != "debug":
            raise _Usage
    if command not in ("prestart", "poststart", "poststop", "version"):
        raise _Usage
    return command, options


def _prestart(options: dict[str, str], default_config: str, warnings: list[str]) -> None:
    from . import audit, prestart
    from .request import config

    settings = config.load(options.get("config", default_config), must_exist="config" in options)
    warnings += settings.warnings
    trail = audit.Audit(settings, "nvidia-container-runtime-hook", silent="no-audit" in options)
    try:
        prestart.prestart(settings, warnings, trail)
    except NvhookError as error:
        trail.refuse(str(error))
        raise


def _poststart(options: dict[str, str], default_config: str, warnings: list[str]) -> None:
    """The container runs, and a fault of ours is no reason to end it."""
    from .request import config, spec

    try:
        settings = config.load(options.get("config", default_config), must_exist="config" in options)
        made = _made(settings, spec.read_stdin(sys.stdin.fileno()))
        if made:
            made.keep()
    except NvhookError as error:
        warnings.append(str(error))


def _made(settings: Config, state: bytes) -> Made | None:
    """What the start of the container of `state` has made on the host that is still provisional."""
    from .host import modules
    from .request import spec

    return modules.made_by(settings, spec.parse_state(state, is_alive=False).id)


def _poststop(options: dict[str, str], default_config: str, warnings: list[str]) -> None:
    from .request import spec

    directory = options.get("state-dir", "")
    try:
        state = spec.read_stdin(sys.stdin.fileno())
        if not directory:
            from .request import config  # only where no wrapper has said it

            settings = config.load(options.get("config", default_config), must_exist="config" in options)
            directory = settings.state_dir
            made = _made(settings, state) if "made" in options else None
            if made:
                made.take_back()
        poststop(directory, state, warnings)
    except NvhookError as error:
        warnings.append(str(error))


def poststop(state_dir: str, state: bytes, warnings: list[str]) -> None:
    """Clean up after the container of `state`, JSON; this process loses all but a few of its capabilities.

    A fault here is told and changes nothing: the container is over, and NVIDIA's hook does nothing at all.
    """
    from .container import cleanup
    from .linux import kernel
    from .request import spec

    kernel.keep_capabilities(kernel.CAP_CHOWN, kernel.CAP_DAC_OVERRIDE, kernel.CAP_FOWNER)
    try:
        cleanup.poststop(state_dir, spec.parse_state(state, is_alive=False), warnings)
    except NvhookError as error:
        warnings.append(str(error))
