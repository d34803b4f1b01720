# SPDX-License-Identifier: Apache-2.0
"""The driver's files on WSL 2: those of one of Windows' driver stores (wsl.py), and Microsoft's libdxcore.so.

All of it stays in its place, because the libraries look for each other there.
"""

from __future__ import annotations

import os

from nvhook.host.wsl import STORES
from nvhook.linux.root import DIRECTORY, Root
from nvhook.request.config import CAPABILITIES

from . import discovery
from .records import Binary, Driver, DriverFile, Library

_DXCORE = "/usr/lib/wsl/lib/libdxcore.so"
_SMI = "nvidia-smi"


def discover(driver_root: str, store: str, *, opened: type[Root] = Root) -> Driver:
    """The driver of that store. Every capability has all of it: Windows' driver has no parts."""
    root = opened(os.open(driver_root, DIRECTORY))
    directory = f"{STORES}/{store}"
    libraries, binaries, files = [], [], []
    for path in [*(f"{directory}/{name}" for name in root.names(directory)), _DXCORE]:
        name = os.path.basename(path)
        real, header = discovery.examine(root, path)
        if header is not None and header.kind == "shared":
            # libcuda_loader.so, which Windows copies to lib/libcuda.so.1, may go by that name here too.
            soname = header.soname if header.soname and name.startswith(header.soname.partition("so")[0]) else ""
            libraries.append(Library(real, soname, header.bits, (), CAPABILITIES, os.path.dirname(path)))
        elif header is not None and name == _SMI:
            binaries.append(Binary(real, name, "utility"))
        elif real and name.endswith((".bin", ".dll")):
            files.append(DriverFile(real, path, CAPABILITIES))
    os.close(root.fd)
    return Driver(store, libraries, binaries, files)
