# SPDX-License-Identifier: Apache-2.0
"""`nvhook refresh`: rebuild the inventory of the driver, so that no start has to.

For packages after their installation, and for the units that watch for another driver.
"""

from __future__ import annotations

from nvhook.driver import inventory
from nvhook.errors import DeviceError
from nvhook.host import host

from . import load

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from . import Subparsers


def add(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "refresh",
        help="rebuild the inventory of the driver",
        description="Read the driver's files and keep what was found, as the first start of a container does.",
        epilog="exit status: 0, also on a host without a driver; 1 if its libraries are not those of its kernel module",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, warnings: list[str]) -> int:
    config = load(options, warnings)
    try:
        gpus = host.read(config, (), warnings, modprobe="")
    except DeviceError as error:
        print(f"No driver yet: {error.message}. The first start after its installation makes the inventory.")
        return 0
    driver = inventory.load(config, gpus.driver_version, warnings, again=True)
    print(f"Driver {driver.version}: {len(driver.libraries)} libraries and {len(driver.binaries)} programs are known.")
    return 0
