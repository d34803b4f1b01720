# SPDX-License-Identifier: Apache-2.0
"""`nvhook doctor`: looks at everything between the kernel module and the engine, and says what is wrong and what to do.

The checks are functions of a host that return what they found, in the rooms checks_*.py; here is their order, and what
the user sees. Only the test container changes anything, and no more than any other start does.
"""

from __future__ import annotations

import argparse
import os

from nvhook.commands import load
from nvhook.commands.config import check as configcheck
from nvhook.commands.doctor import (
    checks_container,
    checks_driver,
    checks_engines,
    checks_nvidia,
    checks_system,
    findings,
)
from nvhook.commands.hostview import HostView
from nvhook.commands.snapshot import command as snapshot
from nvhook.errors import FAILURE, Finding, NvhookError, reason
from nvhook.request import config as configuration
from nvhook.version import VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nvhook.commands import Subparsers
    from nvhook.request.config import Config

    Check = Callable[[HostView], Iterator[Finding]]

# In the order in which one rests on the other; the names are for programs, and stay.
CHECKS: tuple[tuple[str, Check], ...] = (
    ("module", checks_driver.check_module),
    ("gpus", checks_driver.check_gpus),
    ("libraries", checks_driver.check_libraries),
    ("uvm", checks_driver.check_uvm),
    ("nodes", checks_driver.check_nodes),
    ("char-links", checks_driver.check_char_links),
    ("nvml", checks_driver.check_nvml),
    ("persistence", checks_driver.check_persistence),
    ("cgroups", checks_system.check_cgroups),
    ("selinux", checks_system.check_selinux),
    ("apparmor", checks_system.check_apparmor),
    ("config", checks_system.check_config),
    ("state-dir", checks_system.check_state_directory),
    ("runtime", checks_system.check_runtime),
    ("programs", checks_nvidia.check_programs),
    ("hooks", checks_nvidia.check_hooks),
    ("cdi", checks_nvidia.check_cdi),
    ("engines", checks_engines.check_engines),
    ("dockerd", checks_engines.check_dockerd),
)

_EPILOG = """\
exit status: 0 all is well, 1 something failed, 2 usage, 3 there are warnings and no failures

examples:
  sudo nvhook doctor
  nvhook doctor --no-container --json | jq '.findings[] | select(.status == "failure")'
  sudo nvhook doctor --mask --report bug.json
"""


def add(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "doctor",
        help="what is wrong with this host, and what to do",
        description="Look at everything from the kernel module to the engine, and say what is wrong and what to do.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="one JSON object, for programs")
    parser.add_argument("--no-container", action="store_true", help="start no container, and change nothing at all")
    parser.add_argument("--report", metavar="FILE", default="", help="a new file with all of it, for a bug report")
    parser.add_argument("--runtime-path", metavar="PATH", default="", help="our runtime, if it is not beside nvhook")
    snapshot.add_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, warnings: list[str]) -> int:
    host = HostView(_config(options), options.config_path, options.root)
    found = examine(host, container=not options.no_container, runtime=options.runtime_path)
    if options.report:
        document = {"nvhook": VERSION, **_document(found), "host": snapshot.describe(host, warnings)}
        snapshot.write(options.report, snapshot.render(document, host, mask=options.mask))
        warnings.clear()  # the findings say it
    if options.json:
        print(snapshot.render(_document(found), host, mask=options.mask), end="")
    else:
        findings.show(found)
    return findings.exit_status(found)


def _config(options: argparse.Namespace) -> Config:
    """NVIDIA's defaults where the file is not right: the check of that name says why, and the others go on."""
    path = options.config_path
    if not os.path.lexists(path):
        return load(options, [])
    is_right = not any(is_error for is_error, _ in configcheck.findings(path))
    return load(options, []) if is_right else configuration.load("")


def _document(found: list[Finding]) -> dict[str, object]:
    return {"status": findings.worst(found), "findings": [findings.describe(item) for item in found]}


def examine(host: HostView, *, container: bool, runtime: str = "") -> list[Finding]:
    """All findings. Where there is no GPU, that is one, and the others count only if something has failed."""
    found = [item for name, check in CHECKS for item in _made(name, check, host)]
    if not checks_driver.has_gpu(host):
        none = findings.ok("GPUs", "this host has no GPU of NVIDIA's: none on the PCI bus, and no driver")
        none.check = "gpus"
        return [none, *(item for item in found if item.status == FAILURE and item.check != "module")]
    if container:
        found += _made("container", lambda place: checks_container.check_container(place, runtime), host)
    return found


def _made(name: str, check: Check, host: HostView) -> list[Finding]:
    """What the check says, or why it could not say anything."""
    found: list[Finding] = []
    try:
        found.extend(check(host))
    except NvhookError as error:
        found.append(findings.failure(name, error.message, error.remedy))
    except OSError as error:
        found.append(findings.skipped(name, f"{error.filename or 'the host'}: {reason(error)}"))
    for item in found:
        item.check = name
    return found
