# SPDX-License-Identifier: Apache-2.0
"""`docker run …` and `podman run …` as a person types them: what of it decides about GPUs. Nothing is run.

Every other option is only known by whether it takes a value, because the image's name comes after the last of them.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator

from nvhook.errors import SpecError, reason

_WITHOUT_VALUE = """
    --detach --interactive --tty --rm --init --privileged --publish-all --read-only --no-healthcheck --oom-kill-disable
    --sig-proxy --disable-content-trust --quiet --replace --rmi --http-proxy --no-hosts --no-hostname --read-only-tmpfs
    --tls-verify --env-host --passwd --latest --use-api-socket -d -i -t -P -q -l
"""
_FLAGS = frozenset(_WITHOUT_VALUE.split())
_LONG = {"-e": "--env", "-v": "--volume"}
_MAX_FILE = 1 << 20


class Line:
    """`env`: name -> (value, where it was written); `mounts` as (source, destination); `cdi` names of `--device`."""

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self.image = ""
        self.runtime = ""
        self.gpus: dict[str, str] = {}  # the variables that `--gpus` makes
        self.env: dict[str, tuple[str, str]] = {}
        self.mounts: list[tuple[str, str]] = []
        self.annotations: dict[str, str] = {}
        self.cdi: list[str] = []
        self.privileged = False


def parse(words: list[str]) -> Line:
    """SpecError, which names the word, for what is no such line."""
    engine = os.path.basename(words[0]) if words else ""
    verbs = (["run"], ["create"], ["container", "run"], ["container", "create"])
    verb = next((verb for verb in verbs if words[1 : 1 + len(verb)] == verb), None)
    if engine not in ("docker", "podman", "nerdctl") or verb is None:
        raise SpecError(f"`{' '.join(words[:3])}` is not understood", "write `-- docker run OPTIONS IMAGE`")
    line = Line(engine)
    rest = iter(words[1 + len(verb) :])
    for name, value in _options(rest, line):
        _take(name, value, line)
    if not line.image:
        raise SpecError(f"`{engine} {' '.join(verb)}` names no image", "write the image after the options")
    return line


def _options(words: Iterator[str], line: Line) -> Iterator[tuple[str, str]]:
    """(long name, value) of each; ends with the image, which goes into `line`."""
    for word in words:
        if word == "--":
            line.image = next(words, "")
            return
        if not word.startswith("-") or word == "-":
            line.image = word
            return
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            yield name, value if equals else ("true" if name in _FLAGS else _value(name, words))
        else:
            yield from _short(word, words)


def _short(word: str, words: Iterator[str]) -> Iterator[tuple[str, str]]:
    """`-it`, `-eNAME=VALUE`, `-ite NAME=VALUE`."""
    for place, letter in enumerate(word[1:], 1):
        name = f"-{letter}"
        if name in _FLAGS:
            yield name, "true"
            continue
        attached = word[place + 1 :].removeprefix("=")
        yield _LONG.get(name, name), attached or _value(name, words)
        return


def _value(name: str, words: Iterator[str]) -> str:
    value = next(words, None)
    if value is None:
        raise SpecError(f"the option `{name}` has no value", "write it behind the option")
    return value


def _take(name: str, value: str, line: Line) -> None:
    if name == "--env":
        _add(line, value, "command line")
    elif name == "--env-file":
        for item in _lines(value):
            _add(line, item, f"env file {value}")
    elif name == "--gpus" and line.engine == "podman":  # which makes CDI devices of them
        line.cdi += [f"nvidia.com/gpu={device}" for device in value.split(",")]
    elif name == "--gpus":
        line.gpus = gpus(value)
    elif name == "--runtime":
        line.runtime = value
    elif name == "--privileged":
        line.privileged = value in ("true", "1", "t")
    elif name == "--cap-add":
        line.privileged |= value.upper().removeprefix("CAP_") in ("SYS_ADMIN", "ALL")
    elif name == "--volume":
        source, _, rest = value.partition(":")
        line.mounts.append((source, rest.partition(":")[0]))
    elif name == "--mount":
        line.mounts.append(_mount(value))
    elif name == "--annotation":
        key, _, text = value.partition("=")
        line.annotations[key] = text
    elif name == "--device" and not value.startswith("/"):
        line.cdi.append(value)


def _add(line: Line, item: str, where: str) -> None:
    """NAME alone takes the value that it has here; where it has none it is not set."""
    name, equals, value = item.partition("=")
    if not equals and name not in os.environ:
        return
    line.env[name] = (value if equals else os.environ[name], where)


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            text = file.read(_MAX_FILE)
    except OSError as error:
        raise SpecError(f"read the env file `{path}`: {reason(error)}") from None
    lines = (line.strip() for line in text.split("\n"))
    return [line for line in lines if line and not line.startswith("#")]


def gpus(value: str) -> dict[str, str]:
    """The variables that dockerd makes of `--gpus`: fields with commas, in quotes where one holds a comma itself."""
    fields = next(csv.reader([value]), [])
    count, devices, capabilities = "", "", ""
    for field in fields:
        key, equals, text = field.partition("=")
        if not equals:
            count = key
        elif key == "count":
            count = text
        elif key == "device":
            devices = text
        elif key == "capabilities":
            names = [name for name in text.split(",") if name not in ("gpu", "nvidia")]
            capabilities = ",".join(names)
        elif key not in ("driver", "options"):
            raise SpecError(f"`{key}` in --gpus `{value}` is not known", "known are count, device and capabilities")
    if count not in ("", "all", "-1") and not (count.isdecimal() and len(count) < 6):
        raise SpecError(f"`{count}` in --gpus `{value}` is no number", "write `all`, a number, or device=…")
    chosen = devices or ("all" if count in ("", "all", "-1") else ",".join(map(str, range(min(int(count), 1024)))))
    return {"NVIDIA_VISIBLE_DEVICES": chosen, **({"NVIDIA_DRIVER_CAPABILITIES": capabilities} if capabilities else {})}


def _mount(value: str) -> tuple[str, str]:
    found = {key: text for key, _, text in (field.partition("=") for field in next(csv.reader([value]), []))}
    source = found.get("source") or found.get("src") or ""
    return source, found.get("target") or found.get("destination") or found.get("dst") or ""
