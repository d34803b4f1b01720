# SPDX-License-Identifier: Apache-2.0
"""Who got which GPUs, and who was refused them and why: a line for each, for whoever has to say so later.

To syslog (authpriv, the host's /dev/log) and to `nvidia-container-runtime.debug`; what the wrapper grants, to the
engine's log too. That has level info, and `log-level` decides as ever; a refusal has warning or error. A place that
cannot be written is no reason not to start a container, and none is waited for.
"""

from __future__ import annotations

import os

from .errors import MAX_LINE, one_line
from .formats import quickjson
from .request.request import origin as origin_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from .host.selection import Selection
    from .request.config import Config
    from .request.request import Request
    from .request.spec import Spec

_AUTHPRIV = 10 << 3
_SEVERITIES = {"error": 3, "warning": 4, "info": 6}
_SILENT = {  # log-level -> what is not written
    "warning": ("info",),
    "warn": ("info",),
    "error": ("info", "warning"),
    "fatal": ("info", "warning"),
    "panic": ("info", "warning"),
}
# Bytes of all values in a line, which is a string in an entry once more: that can double them.
_MAX_VALUES = MAX_LINE // 2 - 400


class Audit:
    """Lines about one container. `container` is its id, `spec` its config.json, once they are known.

    log      writes a line with its level to more files than that of config.toml, in its place
    silent   somebody else has written who gets what, and only an error that stops the start is left to write
    """

    __slots__ = (
        "_config",
        "_file",
        "_is_open",
        "_log",
        "_program",
        "_request",
        "_socket",
        "container",
        "silent",
        "spec",
    )

    def __init__(
        self,
        config: Config,
        program: str,
        container: str = "",
        log: Callable[[str, str], None] | None = None,
        *,
        silent: bool = False,
    ) -> None:
        self._config = config
        self._program = program
        self._log = log
        self.silent = silent
        self._file = -1
        self._socket = -1
        self._is_open = False
        self._request: Request | None = None
        self.container = container
        self.spec: Spec | None = None

    def begin(self, request: Request | None, dropped: Sequence[str] = ()) -> None:
        """What the container asks for, and a line for each request that the policy has `dropped`. The files are open
        from then on, for when another mount namespace has been entered."""
        self._request = request
        if request or dropped:
            self._open()
        for why in dropped:
            self.refuse(why, "warning")

    def grant(self, chosen: Selection) -> None:
        """The container of the request has got these."""
        request = self._request
        assert request is not None, "begin() comes first"
        gpus = [f"{gpu.index} ({gpu.uuid})" for gpu in chosen.gpus]
        facts: dict[str, Iterable[object]] = {
            "asked_by": [request.origin],
            "gpus": gpus or request.devices,  # WSL 2 shows none, and has all; `none` is the driver alone
            "migs": chosen.migs,
            "capabilities": request.capabilities,
            "imex_channels": request.imex_channels,
            "features": request.features,
            "mig_rights": request.mig_rights,
        }
        self._write("info", "granted", {name: ", ".join(map(str, values)) for name, values in facts.items()})

    def refuse(self, why: str, level: str = "error") -> None:
        """Nothing is written of a container that asks for nothing."""
        if self._request:
            origin = self._request.origin
        elif self.spec:
            origin = origin_of(self.spec, self._config)
        else:
            return
        self._open()
        self._write(level, "refused", {"asked_by": origin, "why": why})

    def _open(self) -> None:
        if self._is_open:  # and what could not be opened is not looked for again: we may be in another namespace
            return
        self._is_open = True
        self._socket = _syslog(os.path.join(self._config.dev_root, "dev/log"))
        self._file = open_log(self._config.log_file)

    def _write(self, level: str, what: str, facts: dict[str, str]) -> None:
        if (self.silent and level != "error") or level in _SILENT.get(self._config.log_level, ()):
            return
        # In quotes, and on one line: no name that an image chose can pass for a fact.
        values = _shared_out({"container": self.container, **facts})
        message = f"GPUs {what}: {' '.join(f'{name}={_quoted(value)}' for name, value in values.items() if value)}"
        if self._log and level == "info":  # of a refusal the engine's log has the error itself
            self._log(level, message)
        elif self._file >= 0:
            append(self._file, entry(level, f"{self._program}: {message}"))
        if self._socket >= 0:
            from time import localtime, strftime

            time = strftime("%b %e %H:%M:%S", localtime())
            line = f"<{_AUTHPRIV | _SEVERITIES[level]}>{time} {self._program}[{os.getpid()}]: {message}"
            append(self._socket, line.encode("utf-8", "backslashreplace"))


def warn(config: Config, message: str) -> None:
    """A line in the log file alone, of what a hook finds: a runtime does not show what a hook says that succeeds."""
    if "warning" not in _SILENT.get(config.log_level, ()):
        fd = open_log(config.log_file)
        if fd >= 0:
            append(fd, entry("warning", message))
            os.close(fd)


def open_log(path: str) -> int:
    """A descriptor to append with, or -1. A pipe that nobody reads would hold us up."""
    if not path or path == "/dev/null":
        return -1
    try:
        return os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError:
        return -1


def entry(level: str, message: str, *, as_json: bool = False) -> bytes:
    """A line as runc writes it to its `--log`."""
    from time import gmtime, strftime

    time = strftime("%Y-%m-%dT%H:%M:%SZ", gmtime())
    if as_json:
        return quickjson.dumps({"level": level, "msg": one_line(message), "time": time}) + b"\n"
    return f'time="{time}" level={level} msg={_quoted(message)}\n'.encode()


def _shared_out(values: dict[str, str]) -> dict[str, str]:
    """Each on one line, within _MAX_VALUES together: what the short ones leave is for the long ones."""
    room = _MAX_VALUES
    lines = dict.fromkeys(values, "")
    for count, name in enumerate(sorted(values, key=lambda name: len(values[name]))):
        lines[name] = one_line(values[name], room // (len(values) - count))
        room -= len(quickjson.dumps(lines[name]))
    return lines


def _quoted(text: str) -> str:
    return quickjson.dumps(one_line(text)).decode()


def _syslog(path: str) -> int:
    if not os.path.exists(path):
        return -1
    import _socket  # the package around it costs 6 ms

    try:
        logger = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM | _socket.SOCK_NONBLOCK | _socket.SOCK_CLOEXEC)
        logger.connect(path)
    except OSError:
        return -1
    return logger.detach()


def append(fd: int, line: bytes) -> None:
    try:
        os.write(fd, line)
    except OSError:
        return  # a full disk, a logger that is behind
