# SPDX-License-Identifier: Apache-2.0
"""`nvhook explain`: what a container asks for and why, what it gets and why, and whether its programs can use that.

Of a running container it says what is there now beside what a start would give it. Nothing is touched, and nothing of
a container is executed.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator

from nvhook.commands import load, plan, preview
from nvhook.commands.explain import dockerline, reasons
from nvhook.commands.explain import target as subjects
from nvhook.container import image_check
from nvhook.errors import FAILURE, SLOW_TREE, WARNING, ContainerError, Finding, NvhookError, SpecError, one_line
from nvhook.linux import elf
from nvhook.linux.root import OutOfTimeError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nvhook.commands import Subparsers
    from nvhook.commands.explain.target import Subject
    from nvhook.linux.root import Root
    from nvhook.request.config import Config
    from nvhook.start import Start

_EPILOG = """\
examples:
  nvhook explain web                                a container of Docker, Podman, containerd or CRI-O
  nvhook explain --bundle /run/containerd/…/web     an OCI bundle
  nvhook explain -- docker run --gpus all cuda      a container that is not there yet

exit status: 0 explained, 1 not found or a start would be refused, 2 usage
"""
_COLOURS = {"present": "green", "missing": "red", "stale": "red", "differs": "red"}
_MAX_PATH = 64  # directories that a program is looked for in


def add(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "explain",
        help="why a container gets what it gets, and whether it can use it",
        description="Explain what a container asks for, what it gets and why, and whether its programs can use that.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundle", metavar="DIR", help="an OCI bundle, with its config.json")
    parser.add_argument("--rootfs", metavar="DIR", help="where the image of a `docker run` line is unpacked")
    parser.add_argument("--json", action="store_true", help="one JSON object, for programs")
    parser.add_argument(
        "words", metavar="CONTAINER", nargs="*", help="id, beginning of an id, or name; or `--` and a `docker run` line"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, warnings: list[str]) -> int:
    config = load(options, warnings)
    with tempfile.TemporaryDirectory(prefix="nvhook-") as empty:
        subject = _subject(options, empty)
        asked = reasons.sources(subject.described, config, subject.origin_of)
        fault: NvhookError | None = None
        made: Start | None = None
        if subject.is_served:
            try:
                made = preview.make(subject.described, config, warnings)
            except NvhookError as error:
                fault = error
        try:
            told = _document(subject, asked, made, fault, config)
        except OutOfTimeError as error:
            raise ContainerError(str(error), SLOW_TREE) from None
    if options.json:
        print(json.dumps(told, indent=2))
    else:
        _show(told)
    if fault and not options.json:
        raise fault
    return 1 if fault else 0


def _subject(options: argparse.Namespace, empty: str) -> Subject:
    """SpecError for a command line that names none, or two."""
    words: list[str] = options.words
    given = bool(options.bundle) + bool(words)
    if given != 1:
        raise SpecError("name one container: CONTAINER, --bundle DIR, or -- docker run …", "see nvhook explain --help")
    if options.rootfs and len(words) < 2:
        raise SpecError("--rootfs goes with a `docker run` line; others bring their own", "leave it out")
    if options.bundle:
        return subjects.of_bundle(options.bundle)
    if len(words) == 1:
        return subjects.of_container(words[0], empty)
    return subjects.of_line(dockerline.parse(words), options.rootfs or "", empty)


# What is told, as one object


def _document(
    subject: Subject, asked: list[reasons.RequestSource], made: Start | None, fault: NvhookError | None, config: Config
) -> dict[str, object]:
    base = plan.document(made)
    told: dict[str, object] = {
        "container": subject.container,
        "asked": [item.describe() for item in asked],
        "origin": made.request.origin if made else "",
        "request": base["request"],
        "driver": base["driver"],
        "gpus": base["gpus"],
        **({"mig_devices": base["mig_devices"]} if "mig_devices" in base else {}),
        "plan": [],
        "additional": [],
        "findings": None,
        "notes": subject.notes,
        "error": str(fault) if fault else None,
    }
    if made is None:
        return told
    why = reasons.Reasons(made)
    rows = []
    for edit in made.edits:
        state = subject.running.state(edit) if subject.running else None
        now = {"state": state.word, "detail": state.detail} if state else {}
        rows.append({**edit.describe(), "why": why.of(edit), **now})
    told["plan"] = rows
    if subject.running:
        told["additional"] = [item.describe() for item in subject.running.extras(made.edits, made.driver.version)]
    if subject.is_whole:
        told["findings"] = [
            {"grave": item.status == FAILURE, "what": item.reason, "hint": item.remedy}
            for item in _findings(subject, made, config)
        ]
    return told


def _findings(subject: Subject, made: Start, config: Config) -> list[Finding]:
    found = image_check.examine(made.request, made.driver, made.root, made.layout, thorough=True)
    return found + _built_in(subject, made) + _cache_alone(config)


def _cache_alone(config: Config) -> list[Finding]:
    if config.ldconfig:
        return []
    what = "no linker cache is made, as `nvidia-container-cli.ldconfig` in config.toml is empty"
    return [Finding(what, "programs find the libraries only where their linker looks by itself", status=WARNING)]


def _built_in(subject: Subject, made: Start) -> list[Finding]:
    """Directories in the container's own program (DT_RUNPATH) with a library that the driver has too."""
    path, header = _program(made.root, subject.arguments, subject.described.env.get("PATH", ""))
    if header is None:
        return []
    names = {item.soname for item in made.driver.libraries if item.soname} & {"libcuda.so.1", "libnvidia-ml.so.1"}
    found = []
    for directory in header.search[:_MAX_PATH]:
        place = directory.replace("$ORIGIN", os.path.dirname(path)).replace("${ORIGIN}", os.path.dirname(path))
        for name in sorted(names):
            if place.startswith("/") and place != made.layout.libraries and made.root.exists(f"{place}/{name}"):
                what = f"`{path}` is built to look in `{place}` first, where the image has a {name}"
                found.append(Finding(what, f"take `{place}/{name}` out of the image"))
    return found


def _program(root: Root, arguments: list[str], search: str) -> tuple[str, elf.Elf | None]:
    """(path, header) of the container's first program; no header if it is not found, or no ELF file."""
    name = arguments[0] if arguments else ""
    places = [name] if "/" in name else [f"{directory}/{name}" for directory in search.split(":")[:_MAX_PATH]]
    for place in places if name else ():
        try:
            fd = root.open_file(place)
        except (OSError, ValueError):
            continue
        try:
            return place, elf.read(fd)
        except (OSError, ValueError):
            return place, None
        finally:
            os.close(fd)
    return "", None


# What people see


def _show(told: dict[str, object]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)

    def line(text: str, style: str = "") -> None:
        console.print(Text(one_line(text), style=style))

    for text, style in _lines(told):
        line(text, style)


def _lines(told: dict[str, object]) -> Iterator[tuple[str, str]]:
    """(text, style) of each line."""
    yield from _head(told)
    request = told["request"]
    if isinstance(request, dict):
        yield from _what(told, request)
    elif not told["error"]:
        yield "", ""
        yield "It gets no GPU: nothing is done to it.", "bold"
    notes = told["notes"]
    if isinstance(notes, list) and notes:
        yield "", ""
        for note in notes:
            yield f"note: {note}", "yellow"


def _head(told: dict[str, object]) -> Iterator[tuple[str, str]]:
    container = told["container"]
    assert isinstance(container, dict)
    name = container.get("name") or container.get("id") or container.get("bundle") or container.get("image")
    pid = container.get("pid")
    now = f", running as process {pid}" if pid else ""
    engine = f" ({container['engine']})" if container.get("engine") else ""
    yield f"Container {name}{engine}{now}", "bold"
    asked = told["asked"]
    assert isinstance(asked, list)
    rows = [(f"{item['name']}={item['value']}", item["from"], item["rule"]) for item in asked]
    if rows:
        yield "", ""
        yield "What it asks for, who says so, and what decides", "bold"
        yield from _columns(rows)


def _what(told: dict[str, object], request: dict[str, object]) -> Iterator[tuple[str, str]]:
    gpus, driver, rows = told["gpus"], told["driver"], told["plan"]
    assert isinstance(gpus, list)
    assert isinstance(driver, dict)
    assert isinstance(rows, list)
    capabilities = request["capabilities"]
    assert isinstance(capabilities, list)
    yield "", ""
    yield f"What it gets, of driver {driver['version']}", "bold"
    asked = told["asked"]
    assert isinstance(asked, list)
    by_default = "" if any(item["name"] == "NVIDIA_DRIVER_CAPABILITIES" for item in asked) else ", as none are named"
    yield f"  devices by {told['origin']}; capabilities {', '.join(capabilities) or 'none'}{by_default}", ""
    yield from _columns([(f"GPU {gpu['index']}", gpu["uuid"], gpu["pci"]) for gpu in gpus])
    migs = told.get("mig_devices", [])
    assert isinstance(migs, list)
    yield from _columns([("MIG device", str(mig.get("uuid") or mig), "") for mig in migs])
    yield "", ""
    yield "Each part of it, and why", "bold"
    yield from _parts(rows)
    yield from _further(told)


def _parts(rows: list[dict[str, object]]) -> Iterator[tuple[str, str]]:
    places = [str(row.get("destination") or row.get("path") or "/etc/ld.so.cache") for row in rows]
    wide = max(map(len, map(one_line, places)), default=0)
    state_wide = max((len(str(row.get("state", ""))) for row in rows), default=0)
    for row, place in zip(rows, places, strict=True):
        state = str(row.get("state", ""))
        now = f"{state:<{state_wide}}  " if state_wide else ""
        detail = f" [{row['detail']}]" if row.get("detail") else ""
        yield f"  {now}{row['kind']:<7}  {one_line(place):<{wide}}  {row['why']}{detail}", _COLOURS.get(state, "")


def _further(told: dict[str, object]) -> Iterator[tuple[str, str]]:
    additional, findings = told["additional"], told["findings"]
    assert isinstance(additional, list)
    if additional:
        yield "", ""
        yield "What is there and a start now would not give it", "bold"
        yield from _columns([(item["kind"], item["path"], item["detail"]) for item in additional])
    yield "", ""
    yield "Will it run?", "bold"
    if not isinstance(findings, list):
        yield "  Unknown: the image is not available here to inspect.", ""
        return
    for item in sorted(findings, key=lambda item: not item["grave"]):
        mark, style = ("NO  ", "red") if item["grave"] else ("note", "yellow")
        yield f"  {mark}  {item['what']}; {item['hint']}", style
    if not any(item["grave"] for item in findings):
        yield "  Nothing in its files speaks against it.", ""


def _columns(rows: list[tuple[str, str, str]]) -> Iterator[tuple[str, str]]:
    cells = [[one_line(str(cell)) for cell in row] for row in rows]
    wide = [max(len(row[column]) for row in cells) for column in range(2)] if cells else []
    for row in cells:
        yield f"  {row[0]:<{wide[0]}}  {row[1]:<{wide[1]}}  {row[2]}".rstrip(), ""
