# SPDX-License-Identifier: Apache-2.0
"""The host's driver as files: its libraries, its programs, what goes with them, and which capabilities each belongs to.

The records alone. discovery.py and datafiles.py make them from the files of the host, inventory.py keeps them.
"""

from __future__ import annotations

import os

from nvhook.formats.record import Record


class Library:
    """`path` on the host, without links; `name` its last component; `soname` of the ELF file or empty; `bits` 64 or 32.

    needed         SONAMEs of the driver's own libraries that it is linked against
    capabilities   those it belongs to, by NVIDIA's lists and what their members need
    directory      where it is in the container; empty: where the container's family has its libraries
    foreign        SONAMEs of the libraries of others that it is linked against
    glibc          the oldest C library that it can be loaded with, such as (2, 27); empty: not known
    """

    __slots__ = ("bits", "capabilities", "directory", "foreign", "glibc", "name", "needed", "path", "soname")

    def __init__(
        self,
        path: str,
        soname: str,
        bits: int,
        needed: tuple[str, ...],
        capabilities: tuple[str, ...] = (),
        directory: str = "",
        *,
        foreign: tuple[str, ...] = (),
        glibc: tuple[int, ...] = (),
    ) -> None:
        self.path = path
        self.directory = directory
        self.name = os.path.basename(path)
        self.soname = soname
        self.bits = bits
        self.needed = needed
        self.capabilities = capabilities
        self.foreign = foreign
        self.glibc = glibc


class Binary(Record):
    """`path` on the host, without links; `name` as it is called in the container.

    directories   what it names by absolute paths that no distribution has, as (on the host without links, as named)
    """

    path: str
    name: str
    capability: str
    directories: tuple[tuple[str, str], ...] = ()


class DriverFile(Record):
    """`path` on the host, without links; `destination` in the container, whatever its family.

    bits       32 for what 32-bit programs alone read
    content    what the container gets in the place of the file's own content, which names places of the host;
               empty: the file as it is. inventory.py keeps it as a file, and `path` is then that one.
    """

    path: str
    destination: str
    capabilities: tuple[str, ...]
    bits: int = 64
    content: str = ""


class Driver(Record):
    """Libraries, programs and other files of one driver version, each list in a fixed order."""

    version: str
    libraries: list[Library]
    binaries: list[Binary]
    files: list[DriverFile]
