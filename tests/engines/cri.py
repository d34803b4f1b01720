# SPDX-License-Identifier: Apache-2.0
"""What a kubelet says to containerd: calls of the Container Runtime Interface, by curl, with messages written by hand.

Just what it takes to start a pod of a runtime class and to look into its container. The numbers are those of the
fields of `runtime.v1` in Kubernetes' k8s.io/cri-api. gRPC is a frame around each message in HTTP/2, and protobuf is one
field after the other.
"""

from __future__ import annotations

import contextlib
import subprocess
import urllib.parse
from collections.abc import Iterator
from typing import TypeAlias

from .machine import Machine, program

_SOCKET = "/run/containerd/containerd.sock"
_COMMAND = ("--silent", "--http2-prior-knowledge", "--unix-socket", _SOCKET, "--data-binary", "@-")
_HEADERS = ("--header", "content-type: application/grpc", "--header", "te: trailers", "--dump-header", "/dev/stderr")

Message: TypeAlias = "list[tuple[int, str | int | Message]]"
_NUMBER, _BYTES = 0, 2  # kinds of field

_HOST = 2  # NamespaceMode.NODE: the host's network, for which there has to be no plugin


class CriError(Exception):
    """What containerd says to a call that failed."""


class Cri:
    """`cgroup` is the parent of all pods' cgroups; `image` is what their containers are made from."""

    def __init__(self, machine: Machine, cgroup: str, image: str) -> None:
        self._machine = machine
        self._cgroup = cgroup
        self._image = image
        self._count = 0

    def knows_image(self) -> bool:
        """containerd tells its CRI plugin of an image some time after it has been imported."""
        return 1 in self._call("ImageService", "ImageStatus", [(1, [(1, self._image)])])

    @contextlib.contextmanager
    def container(self, runtime_class: str, env: dict[str, str]) -> Iterator[str]:
        """The id of a container that runs in a pod of its own, until the block ends; CriError where it cannot."""
        pod_config = self._pod_config()
        pod = self._id("RunPodSandbox", [(1, pod_config), (2, runtime_class)])
        try:
            config: Message = [(1, [(1, "main")]), (2, [(1, self._image)]), (3, "sleep"), (4, "600")]
            config += [(6, [(1, name), (2, value)]) for name, value in env.items()]
            name = self._id("CreateContainer", [(1, pod), (2, config), (3, pod_config)])
            self._call("RuntimeService", "StartContainer", [(1, name)])
            yield name
        finally:
            self._call("RuntimeService", "StopPodSandbox", [(1, pod)])
            self._call("RuntimeService", "RemovePodSandbox", [(1, pod)])

    def execute(self, container: str, *command: str) -> str:
        """What a command in the container prints."""
        words: Message = [(2, word) for word in command]
        answer = self._call("RuntimeService", "ExecSync", [(1, container), *words, (3, 30)])
        return (answer.get(1, b"") + answer.get(2, b"")).decode()

    def _pod_config(self) -> Message:
        self._count += 1
        name = f"pod-{self._count}"
        security: Message = [(1, [(1, _HOST)])]
        return [(1, [(1, name), (2, f"uid-{name}"), (3, "default")]), (8, [(1, f"/{self._cgroup}"), (2, security)])]

    def _id(self, method: str, message: Message) -> str:
        return self._call("RuntimeService", method, message)[1].decode()

    def _call(self, service: str, method: str, message: Message) -> dict[int, bytes]:
        content = _encode(message)
        done = subprocess.run(
            [
                *self._machine.enter(),
                program("curl"),
                *_COMMAND,
                *_HEADERS,
                f"http://cri/runtime.v1.{service}/{method}",
            ],
            input=b"\0" + len(content).to_bytes(4, "big") + content,
            capture_output=True,
            timeout=60,
            check=False,
        )
        lines = done.stderr.decode().splitlines()
        said = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if said.get("grpc-status") != "0":
            raise CriError(urllib.parse.unquote(said.get("grpc-message", f"curl: status {done.returncode}, {lines}")))
        return _decode(done.stdout[5:])


def _encode(message: Message) -> bytes:
    encoded = b""
    for number, value in message:
        if isinstance(value, int):
            encoded += _varint(number << 3 | _NUMBER) + _varint(value)
        else:
            content = value.encode() if isinstance(value, str) else _encode(value)
            encoded += _varint(number << 3 | _BYTES) + _varint(len(content)) + content
    return encoded


def _decode(content: bytes) -> dict[int, bytes]:
    """The fields that are not numbers, the last of each."""
    fields: dict[int, bytes] = {}
    while content:
        key, content = _take_varint(content)
        length, content = _take_varint(content)  # or the number itself
        if key & 7 == _BYTES:
            fields[key >> 3], content = content[:length], content[length:]
    return fields


def _varint(number: int) -> bytes:
    encoded = b""
    while number > 0x7F:
        encoded += bytes([number & 0x7F | 0x80])
        number >>= 7
    return encoded + bytes([number])


def _take_varint(content: bytes) -> tuple[int, bytes]:
    number = 0
    for index, byte in enumerate(content):
        number |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return number, content[index + 1 :]
    raise ValueError(f"a number without an end: {content!r}")
