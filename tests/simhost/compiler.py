# SPDX-License-Identifier: Apache-2.0
"""Compiles the three parts of a simulated host that do something: NVML, CUDA and nvidia-smi.

They must run in containers with any glibc, older than the build machine's too, and need exactly the libraries that
the description says. So they are not linked against the C library of the build machine but against empty libraries
(made by elfwriter) that carry the names of the needed ones. References then have no symbol version, and the dynamic
linker binds them to the oldest version that the container's C library has.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from typing import Any

from simhost import elfwriter
from simhost.description import Description, SimhostError

_HERE = os.path.dirname(os.path.abspath(__file__))
_LIBC = "libc.so.6"
_LIBC_SYMBOLS = (
    "__errno_location", "access", "close", "dlopen", "dlsym", "exit", "getenv", "memcpy", "memset", "open",
    "printf", "putchar", "puts", "snprintf", "strcmp", "strlen", "strstr",
)  # fmt: skip
_FLAGS = (
    "-O1", "-std=gnu11", "-fPIC", "-fno-stack-protector", "-U_FORTIFY_SOURCE", "-nostdlib", "-s",
    "-Wl,--no-as-needed", "-Wl,--build-id=none", "-Wl,--hash-style=both", "-Wl,-z,noexecstack",
)  # fmt: skip

# nvmlBrandType_t, by what the product's name begins with
_BRANDS = (("Quadro", 1), ("Tesla", 2), ("NVIDIA GeForce", 5), ("NVIDIA TITAN", 6), ("NVIDIA RTX", 13))
_BRAND_NVIDIA = 14

# What NVML tells of a GPU at this moment, where the description does not: MiB, percent, degrees Celsius.
_NOW = {"memory_total": 16384, "memory_used": 512, "load": 7, "temperature": 35}
_MIB = 1 << 20

_MIG_STATES = {"not supported": -1, "disabled": 0, "enabled": 1}


class Compiler:
    """Compiles for one host. Leave it with `close`, or use it in a `with` statement."""

    def __init__(self, description: Description) -> None:
        self._description = description
        self._directory = tempfile.mkdtemp(prefix="simhost-")

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        shutil.rmtree(self._directory)

    def library(self, source: str, elf: dict[str, Any], path: str, *, version: str | None) -> None:
        """A shared object at `path` from nvml.c or cuda.c, of the driver `version`; None: of the host's."""
        version = version or self._description["driver_version"]
        self._compile(source, path, elf, version, "-shared", f"-Wl,-soname,{elf['soname']}")

    def program(self, source: str, elf: dict[str, Any], path: str, *flags: str) -> None:
        self._compile(source, path, elf, self._description["driver_version"], "-pie", *flags)

    def _compile(self, source: str, path: str, elf: dict[str, Any], version: str, *flags: str) -> None:
        with open(os.path.join(self._directory, "host.h"), "w", encoding="utf-8") as file:
            file.write(host_header(self._description, version))
        command = ["cc", *_FLAGS, *flags, f"-I{self._directory}", "-o", path, os.path.join(_HERE, source)]
        command += [self._empty_library(name) for name in elf["needed"]]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise SimhostError("compile the stubs: there is no `cc` on PATH; install gcc") from error
        if done.returncode != 0:
            raise SimhostError(f"compile `{source}`: {' '.join(done.stderr.split())}")

    def _empty_library(self, name: str) -> str:
        path = os.path.join(self._directory, name)
        if not os.path.exists(path):
            symbols = _LIBC_SYMBOLS if name == _LIBC else ()
            with open(path, "wb") as file:
                file.write(elfwriter.shared_object(name, [], machine=native_machine(), symbols=symbols))
        return path


def native_machine() -> str:
    """The name in elfwriter.MACHINES of the machine that this runs on."""
    machine = os.uname().machine
    return {"x86_64": "x86-64"}.get(machine, machine)


def host_header(description: Description, version: str) -> str:
    """host.h: the host's GPUs as C data, in NVML's order, which is the order of the index."""
    gpus = sorted(description["gpus"], key=lambda gpu: int(gpu["index"]))
    cuda_major, cuda_minor = (description["cuda_driver_version"] or "0.0").split(".")
    migs = [_mig_entry(description, position, gpu, mig) for position, gpu in enumerate(gpus) for mig in _migs(gpu)]
    lines = [
        f"#define DRIVER_VERSION {json.dumps(version)}",
        f"#define CUDA_VERSION {int(cuda_major) * 1000 + int(cuda_minor) * 10}",
        f"#define IS_WSL {int(any(node['path'] == '/dev/dxg' for node in description['device_nodes']))}",
        f"#define GPU_COUNT {len(gpus)}",
        f"#define MIG_COUNT {len(migs)}",
        "static const struct gpu gpus[GPU_COUNT + 1] = {",
        *[_gpu_entry(gpu) for gpu in gpus],
        "};",
        "static const struct mig migs[MIG_COUNT + 1] __attribute__((unused)) = {",
        *migs,
        "};",
    ]
    return "\n".join(lines) + "\n"


def _gpu_entry(gpu: dict[str, Any]) -> str:
    domain, bus, device = gpu["pci_bus_id"].removesuffix(".0").split(":")
    major, minor = gpu["compute_capability"].split(".")
    brand = next((number for start, number in _BRANDS if gpu["name"].startswith(start)), _BRAND_NVIDIA)
    mig = gpu.get("mig", "not supported")
    values = [
        gpu["minor"], json.dumps(gpu["name"]), json.dumps(gpu["uuid"]),
        f"0x{domain}", f"0x{bus}", f"0x{device}", gpu.get("pci_device_id", "0x000010DE"),
        major, minor, brand, 1 if isinstance(mig, list) else _MIG_STATES[mig],
        *_memory(gpu), *(_now(gpu, key) for key in ("load", "temperature")),
    ]  # fmt: skip
    return "    {" + ", ".join(map(str, values)) + "},"


def _now(item: dict[str, Any], key: str) -> int:
    return int(item.get("now", {}).get(key, _NOW[key]))


def _memory(item: dict[str, Any]) -> list[int]:
    return [_now(item, key) * _MIB for key in ("memory_total", "memory_used")]


def _migs(gpu: dict[str, Any]) -> list[dict[str, Any]]:
    """The MIG devices: a description gives a list of them in the place of the state."""
    return gpu["mig"] if isinstance(gpu.get("mig"), list) else []


def _mig_entry(description: Description, position: int, gpu: dict[str, Any], mig: dict[str, Any]) -> str:
    instance = f"gpu{gpu['minor']}/gi{mig['gi']}"
    values = [
        f"gpus + {position}", mig["gi"], mig["ci"], json.dumps(mig["profile"]), json.dumps(mig["uuid"]),
        *_memory(mig),
        _cap(description, f"{instance}/access"), _cap(description, f"{instance}/ci{mig['ci']}/access"),
    ]  # fmt: skip
    return "    {" + ", ".join(map(str, values)) + "},"


def _cap(description: Description, name: str) -> int:
    minors = description["proc"].get("/proc/driver/nvidia-caps/mig-minors", "")
    match = re.search(rf"^{re.escape(name)} (\d+)$", minors, re.MULTILINE)
    return int(match[1]) if match else -1
