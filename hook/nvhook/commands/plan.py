# SPDX-License-Identifier: Apache-2.0
"""`nvhook plan`: what a container would get, for people or, as docs/contracts.md promises, as JSON."""

from __future__ import annotations

import json

from nvhook.commands import load, preview
from nvhook.errors import SpecError, one_line
from nvhook.request import spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from nvhook.commands import Subparsers
    from nvhook.start import Start


def add(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "plan",
        help="what a container would get; nothing is touched",
        description="Print what a container would get. Nothing is touched, neither in the container nor on the host.",
        epilog="nvhook plan --env NVIDIA_VISIBLE_DEVICES=all --rootfs /var/lib/machines/debian",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--bundle", metavar="DIR", help="an OCI bundle, with its config.json")
    which.add_argument("--rootfs", metavar="DIR", help="a root filesystem; with --env for the request")
    parser.add_argument(
        "--env", metavar="K=V", action="append", default=[], help="an environment variable of the container; repeatable"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object, for programs")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, warnings: list[str]) -> int:
    config = load(options, warnings)
    made = preview.make(_described(options), config, warnings)
    if options.json:
        print(json.dumps(document(made), indent=2))
    elif made is None:
        print("This container asks for no GPU: nothing is done to it.")
    else:
        for edit in made.edits:
            print(one_line(sentence(edit.describe())))  # a directory of the linker cache is named by the image
    return 0


def _described(options: argparse.Namespace) -> spec.Spec:
    if not options.bundle:
        return preview.imagined(options.env, options.rootfs)
    if options.env:
        raise SpecError("--env goes with --rootfs; a bundle brings its own environment")
    return spec.parse(spec.read_config(options.bundle)[0], options.bundle)


def document(made: Start | None) -> dict[str, object]:
    """The object of `--json`, the same bytes for the same container on the same host."""
    if made is None:
        return {"request": None, "driver": None, "gpus": [], "edits": []}
    migs = made.chosen.migs
    return {
        "request": made.request.describe(),
        "driver": {"version": made.driver.version},
        "gpus": [gpu.describe() for gpu in made.chosen.gpus],
        **({"mig_devices": [item.describe() for item in migs]} if migs else {}),
        "edits": [edit.describe() for edit in made.edits],
    }


def sentence(edit: dict[str, object]) -> str:
    """One line for people: the kind, the place in the container, and what comes there."""
    kind = edit["kind"]
    if kind == "mount":
        return f"mount    {edit['destination']}  from {edit['source']}"
    if kind == "device":
        return f"device   {edit['path']}  {edit['type']} {edit['major']}:{edit['minor']} {edit['access']}"
    if kind == "symlink":
        return f"symlink  {edit['path']}  to {edit['target']}"
    if kind == "file":
        return f"file     {edit['path']}"
    return f"ldcache  {' '.join(map(str, edit['directories']))}"  # type: ignore[call-overload]
