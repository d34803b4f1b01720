# SPDX-License-Identifier: Apache-2.0
"""The bundle: which one the command line means, and its config.json, changed and put back in one step.

The document is kept as it is parsed, so that what we do not know survives (order included).
"""

from __future__ import annotations

import os

from nvhook.errors import SpecError, reason
from nvhook.formats import quickjson
from nvhook.request.spec import HOOK_NAMES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nvhook.request.spec import Json


def directory(arguments: list[str]) -> str:
    """The absolute path that the last `--bundle`/`-b` of runc's command line names; without one, here.

    SpecError when the option is the last word.
    """
    bundle = ""
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if not name.startswith("-") or name.lstrip("-") not in ("b", "bundle"):
            continue
        bundle = value if equals else next(words, "")
        if not bundle and not equals:
            raise SpecError(f"`{word}` is the last word of the command line: bundle option requires an argument")
    return os.path.abspath(bundle or ".")


def add_hook(config: Json, stage: str, path: str, arguments: list[str], env: list[str]) -> None:
    """Make `path` the one NVIDIA hook of a `stage` (prestart, poststop), in the place of those that are there."""
    hooks = config.get("hooks") or {}
    present = hooks.get(stage) or [] if isinstance(hooks, dict) else None
    if not isinstance(present, list) or not all(isinstance(hook, dict) for hook in present):
        raise SpecError(f"config.json: `hooks.{stage}` is not a list of objects")
    config["hooks"] = hooks
    ours = {"path": path, "args": [os.path.basename(path), *arguments, stage], "env": env}
    others: list[Json] = []
    place = None
    for hook in present:
        if os.path.basename(str(hook.get("path"))) in HOOK_NAMES:
            place = len(others) if place is None else place
        else:
            others.append(hook)
    others.insert(len(others) if place is None else place, ours)
    hooks[stage] = others


def add_device_rules(config: Json, rules: list[dict[str, object]]) -> None:
    """Append to linux.resources.devices, where the last rule that matches decides; none that is there twice."""
    linux = config["linux"] = config.get("linux") or {}
    resources = linux["resources"] = linux.get("resources") or {}
    present = resources.get("devices") or []
    resources["devices"] = [rule for rule in present if rule not in rules] + rules


def add_groups(config: Json, gids: list[int]) -> None:
    """Supplementary groups for the container's process; not in a user namespace, where they are other groups."""
    from nvhook.linux import userns  # only for a container that asks

    namespaces = _list(config.get("linux") or {}, "namespaces", "linux")
    in_userns = any(isinstance(item, dict) and item.get("type") == "user" for item in namespaces)
    if not gids or in_userns or not userns.is_first():
        return
    user = config["process"]["user"] = config["process"].get("user") or {}
    if not isinstance(user, dict):
        raise SpecError("config.json: `process.user` is not an object")
    present = _list(user, "additionalGids", "process.user")
    user["additionalGids"] = present + [gid for gid in sorted(set(gids)) if gid not in present]


def _list(parent: Json, key: str, where: str) -> list[object]:
    value = parent.get(key) or []
    if not isinstance(value, list):
        raise SpecError(f"config.json: `{where}.{key}` is not a list")
    return value


def write(bundle: str, config: Json, former: os.stat_result) -> None:
    """Replace config.json, with the former one's owner and mode; SpecError, and nothing changed, if that fails."""
    path = os.path.join(bundle, "config.json")
    beside = f"{path}.nvhook.{os.getpid()}"
    try:
        content = quickjson.dumps(config)
    except (ValueError, RecursionError) as error:  # a number that is infinite, or objects in objects in objects
        raise SpecError(f"write `{path}`: {error}") from None
    try:
        fd = os.open(beside, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as file:
                file.write(content)
                os.fchown(fd, former.st_uid, former.st_gid)
                os.fchmod(fd, former.st_mode & 0o7777)
            os.rename(beside, path)
        except OSError:
            os.unlink(beside)
            raise
    except OSError as error:
        raise SpecError(f"write `{path}`: {reason(error)}") from None
