# SPDX-License-Identifier: Apache-2.0
"""What an engine with Docker's API says of a container or an image (Docker Engine API, /containers/…/json). It is only
ever asked; nothing is changed."""

from __future__ import annotations

import errno
import http.client
import json
import os
import socket
from typing import Any
from urllib.parse import quote

from nvhook.errors import ContainerError, reason

Json = dict[str, Any]

DOCKER = "/run/docker.sock"
_PODMAN = "/run/podman/podman.sock"
_SECONDS = 5
_MAX_ANSWER = 8 << 20  # bytes; an image's environment is in it


class Api:
    """The engine that listens on `path`; None of everything where none does."""

    def __init__(self, path: str) -> None:
        self.path = path

    def container(self, name: str) -> Json | None:
        """By id, a unique beginning of one, or name."""
        return self._get(f"/containers/{quote(name, safe='')}/json")

    def image(self, name: str) -> Json | None:
        return self._get(f"/images/{quote(name, safe='/:@')}/json")

    def info(self) -> Json | None:
        return self._get("/info")

    def _get(self, resource: str) -> Json | None:
        """None where nobody listens, or the engine has no such object; ContainerError for every other fault."""
        try:
            return get(self.path, resource)
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        except PermissionError:
            remedy = "run nvhook as root, or as a user who may use the engine"
            raise ContainerError(f"ask the engine at `{self.path}`: permission denied", remedy) from None
        except OSError as error:
            raise ContainerError(f"ask the engine at `{self.path}`: {reason(error)}", "is it in good health?") from None
        except ValueError as error:
            raise ContainerError(f"ask the engine at `{self.path}`: {error}") from None


def get(path: str, resource: str) -> Json | None:
    """The engine's answer, None where it has no such object. OSError where it does not answer; ValueError, with the
    reason, for an answer of another kind."""
    connection = _Connection(path)
    try:
        connection.request("GET", resource)
        answer = connection.getresponse()
        content = answer.read(_MAX_ANSWER + 1)
    except http.client.HTTPException as error:
        if isinstance(error, OSError):  # the connection has ended without an answer
            raise
        raise OSError(errno.EPROTO, f"not HTTP: {str(error).strip()}") from None
    finally:
        connection.close()
    if answer.status == 404:
        return None
    if answer.status != 200 or len(content) > _MAX_ANSWER:
        raise ValueError(f"status {answer.status}, {len(content)} bytes")
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from None
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")
    return document


def docker() -> Api:
    """DOCKER_HOST is where the user's own docker command asks; one elsewhere than on this machine is of no use."""
    host = os.environ.get("DOCKER_HOST", "")
    return Api(host.removeprefix("unix://") if host.startswith("unix://") else DOCKER)


def podman() -> Api:
    host = os.environ.get("CONTAINER_HOST", "")
    return Api(host.removeprefix("unix://") if host.startswith("unix://") else _PODMAN)


def member(document: Json | None, *keys: str) -> Any:
    """What is under `keys`, one below the other; None where one is missing. An API leaves out what is empty."""
    value: Any = document
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def variables(document: Json | None, *keys: str) -> dict[str, str]:
    """A list of NAME=VALUE there."""
    listed = member(document, *keys)
    items = [item.partition("=") for item in listed if isinstance(item, str)] if isinstance(listed, list) else []
    return {name: value for name, equals, value in items if equals}


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_SECONDS)
        self.sock.connect(self._path)
