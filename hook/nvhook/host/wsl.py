# SPDX-License-Identifier: Apache-2.0
"""WSL 2: Linux in a virtual machine of Windows, whose driver it uses through one node, /dev/dxg.

    /usr/lib/wsl/drivers/<store>/      Windows' driver store: the driver's libraries and nvidia-smi for Linux
    /usr/lib/wsl/lib/libdxcore.so      Microsoft's way through /dev/dxg, which finds the store by this very path

There is no kernel module of NVIDIA's, no /proc/driver/nvidia, no MIG and no node for one GPU alone. Which store belongs
to an adapter is known to libdxcore.so; no library of a driver is loaded here, so of several with NVIDIA's libraries the
newest counts. wsl_driver.py finds what is in it.
"""

from __future__ import annotations

import os
import stat

from nvhook.errors import DriverError
from nvhook.linux.root import DIRECTORY, Root

from .gpus import Gpus

STORES = "/usr/lib/wsl/drivers"
_CUDA = "libcuda.so.1.1"  # the file name is Windows' choice, and no version


def node(dev_root: str) -> os.stat_result | None:
    """/dev/dxg, or None on another kind of host."""
    try:
        status = os.stat(os.path.join(dev_root, "dev/dxg"))
    except OSError:
        return None
    return status if stat.S_ISCHR(status.st_mode) else None


def find(driver_root: str, dev_root: str) -> Gpus | None:
    """None on another kind of host. DriverError where Windows has no driver of NVIDIA's."""
    status = node(dev_root)
    if status is None:
        return None
    stores = _stores(driver_root)
    if not stores:
        raise DriverError(
            f"this is WSL 2, as `/dev/dxg` says, and no directory below `{STORES}` has {_CUDA}",
            "install NVIDIA's driver in Windows, and none in WSL; then `wsl --shutdown`",
        )
    owner = (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode))
    return Gpus(stores[-1], [], {}, owner, (os.major(status.st_rdev), os.minor(status.st_rdev)))


def is_store(version: str) -> bool:
    """Whether Gpus.driver_version is a store's name, such as nv_dispi.inf_amd64_2e6a2c1f6d8b3e4a."""
    return not version.replace(".", "").isdecimal()


def _stores(driver_root: str) -> list[str]:
    """Names of those with NVIDIA's libraries, the newest last."""
    try:
        root = Root(os.open(driver_root, DIRECTORY))
    except OSError:
        return []
    found = []
    for name in root.names(STORES):
        try:
            fd = root.open(f"{STORES}/{name}/{_CUDA}")
        except OSError:
            continue
        found.append((os.fstat(fd).st_mtime_ns, name))
        os.close(fd)
    os.close(root.fd)
    return [name for _, name in sorted(found)]
