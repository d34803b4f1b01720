# SPDX-License-Identifier: Apache-2.0
"""The CUDA compatibility libraries of an image: a libcuda that is newer than the host's driver and yet works with it.

Their directory goes first in the container's linker cache; a file of an image is never mounted. Nothing in it is opened
here: what a directory of somebody else holds is a list of names.
"""

from __future__ import annotations

import os

from nvhook.errors import SLOW_TREE, ContainerError
from nvhook.linux.root import OutOfTimeError, first_names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from nvhook.linux.root import Root
    from nvhook.request.config import Config

_DIRECTORY = "/usr/local/cuda/compat"
_LIBRARY = "libcuda.so."
_SONAME = "libcuda.so.1"
_MAX_NAMES = 1000  # NVIDIA's packages have about ten

# cuInit fails with 804 on these, while the host's libcuda works. Of an unknown brand NVIDIA's rule holds: it is tried.
_UNABLE = ("geforce", "titan")


def find(
    config: Config,
    capabilities: tuple[str, ...],
    root: Root,
    version: str,
    brands: Callable[[], set[str]],
    warnings: list[str],
) -> str:
    """The directory, as a path in the container without links, or empty where its libraries are of no use.

    ContainerError where looking for them takes too long: without them programs that need them would fail.
    `version` is the host's driver; `brands`, words in lower case, are asked for only where there are such libraries.
    """
    if not config.cuda_compat or not {"compute", "video"} & set(capabilities):
        return ""
    try:
        majors, path = _look(root)
    except OSError:
        return ""
    except OutOfTimeError as error:
        raise ContainerError(str(error), SLOW_TREE) from None
    driver = version.partition(".")[0]
    # Of several versions the linker may take any: the oldest decides. On WSL 2 the driver has a name for a version.
    if not majors or not driver.isdecimal() or min(majors) <= int(driver):
        return ""
    unable = sorted(brand for brand in brands() if brand.startswith(_UNABLE))
    if unable:
        warnings.append(
            f"`{_DIRECTORY}` of the image is not used: {unable[0]} GPUs do not support CUDA forward compatibility"
        )
        return ""
    return path


def _look(root: Root) -> tuple[set[int], str]:
    """(major versions, path of the directory); OSError where there is none."""
    directory = root.open(_DIRECTORY, os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK)
    try:
        names = root.timed(_DIRECTORY, lambda: first_names(directory, _MAX_NAMES))
        return _majors(set(names)), _path(root, directory)
    finally:
        os.close(directory)


def _majors(names: set[str]) -> set[int]:
    """Of the versions in names like libcuda.so.580.65.06; none without the link to one of them that programs ask for.

    ldconfig makes no link, and the cache would lead to what is not there.
    """
    if _SONAME not in names:
        return set()
    versions = (name.removeprefix(_LIBRARY).split(".") for name in names if name.startswith(_LIBRARY))
    return {int(numbers[0]) for numbers in versions if len(numbers) > 1 and all(map(str.isdecimal, numbers))}


def _path(root: Root, directory: int) -> str:
    """Both descriptors' paths begin alike, in whatever mount namespace they are."""
    top, path = (os.readlink(f"/proc/self/fd/{fd}") for fd in (root.fd, directory))
    top = top.rstrip("/")
    return path[len(top) :] if path.startswith(f"{top}/") else _DIRECTORY
