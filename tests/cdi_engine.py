# SPDX-License-Identifier: Apache-2.0
"""An engine that injects by CDI: a specification's edits, merged into a config.json as the CDI library does it.

For the engines that this machine does not have, or has in versions from before CDI.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import yaml

Json = dict[str, Any]


def inject(config: Json, path: Path, *names: str) -> None:
    """Give a container the devices of these names, from the specification at `path`."""
    document = yaml.safe_load(path.read_text())
    devices = {f"{document['kind']}={device['name']}": device for device in document["devices"]}
    _merge(config, document.get("containerEdits", {}))
    for name in names:
        _merge(config, devices[name]["containerEdits"])


def _merge(config: Json, edits: Json) -> None:
    process, linux = config["process"], config["linux"]
    for item in edits.get("env", []):
        name = item.partition("=")[0]
        process["env"] = [other for other in process["env"] if other.partition("=")[0] != name] + [item]
    for node in edits.get("deviceNodes", []):
        _add_node(process["user"], linux, node)
    for mount in edits.get("mounts", []):
        entry = {"source": mount["hostPath"], "destination": mount["containerPath"]}
        entry |= {key: mount[key] for key in ("options", "type") if key in mount}
        config["mounts"] = [item for item in config["mounts"] if item["destination"] != entry["destination"]] + [entry]
    config["mounts"].sort(key=lambda item: item["destination"].rstrip("/").count("/"))
    for hook in edits.get("hooks", []):
        entry = {key: hook[key] for key in ("path", "args", "env", "timeout") if key in hook}
        config.setdefault("hooks", {}).setdefault(hook["hookName"], []).append(entry)
    if edits.get("additionalGids"):
        process["user"].setdefault("additionalGids", []).extend(edits["additionalGids"])


def _add_node(user: Json, linux: Json, node: Json) -> None:
    """What the specification leaves open is the host's node's at this moment; its owner is the container's user."""
    status = os.stat(node.get("hostPath") or node["path"])
    assert stat.S_ISCHR(status.st_mode)
    entry = {
        "path": node["path"],
        "type": "c",
        "major": node.get("major", os.major(status.st_rdev)),
        "minor": node.get("minor", os.minor(status.st_rdev)),
        "fileMode": node.get("fileMode", stat.S_IMODE(status.st_mode)),
    }
    entry |= {key: node.get(key, user[key]) for key in ("uid", "gid") if node.get(key, user[key])}
    linux["devices"] = [item for item in linux.get("devices", []) if item["path"] != entry["path"]] + [entry]
    rule = {"allow": True, "access": node.get("permissions", "rwm")}
    linux["resources"]["devices"].append(rule | {key: entry[key] for key in ("type", "major", "minor")})
