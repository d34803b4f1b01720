# SPDX-License-Identifier: Apache-2.0
"""Draws one start of a GPU container, stage by stage, from a real trace: `tests/picture.py FILE.svg [--real]`, as root.

strace stops the traced processes at a few system calls alone (a seccomp filter), which makes a start a little slower
than `make bench` measures it. Of several starts, the one in the middle is drawn.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench import GPUS, Bench, Side, be_where_it_starts, be_where_run_is_memory, real_config
from containers import Bundle

_CALLS = "execve,exit_group,clone,clone3,vfork,fork,rename,renameat,renameat2,setns,open_tree,move_mount,alarm"
_STRACE = ("strace", "-f", "--seccomp-bpf", "-q", "-ttt", "-s", "200", "-e", f"trace={_CALLS}", "-o")
_LINE = re.compile(r"(\d+) +([\d.]+) (?:\+\+\+ )?(\w+)[( ](.*)")
_ENDS = ("exited", "killed")  # of a whole process: any thread of runc may call exit_group
_RUNS = 11

Event = tuple[float, int, str, str]  # seconds, process, system call, arguments
Span = tuple[str, str, float, float]  # row, what, begin and end in ms


def _events(log: Path) -> list[Event]:
    found = (_LINE.match(line) for line in log.read_text().splitlines())
    return [(float(hit[2]), int(hit[1]), hit[3], hit[4]) for hit in found if hit]


def _until_over(log: Path) -> list[Event]:
    """What the command did, once it is over."""
    for _ in range(1000):
        events = _events(log) if log.exists() else []
        ends = [place for place, event in enumerate(events) if event[1] == events[0][1] and event[2] in _ENDS]
        if ends:
            return events[: ends[-1] + 1]
        time.sleep(0.02)
    raise SystemExit(f"{log} shows no end")


class Tracer:
    """`side` started under strace; the server is traced from its birth, so that its children are."""

    def __init__(self, bench: Bench, side: Side) -> None:
        self.bench = bench
        self.side = side
        self.of_server = bench.place / "server.trace"
        with bench.bundle(side) as bundle:
            words = ("create", "--bundle", str(bundle.directory), bundle.id)
            self.first = self._trace(side, self.of_server, *words)
            end = time.monotonic() + 20
            while not self._is_created(bundle) and time.monotonic() < end:
                time.sleep(0.1)
            bundle.delete(bench.low_level)

    def _is_created(self, bundle: Bundle) -> bool:
        command = [self.bench.low_level, "state", bundle.id]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return '"created"' in done.stdout

    def start(self) -> tuple[float, list[Span]]:
        """The milliseconds of `create`, `start` and `delete`, and their spans."""
        spans: list[Span] = []
        end = 0.0
        with self.bench.bundle(self.side) as bundle:
            for command, here in self._commands(bundle, self.side):
                there = [event for event in _events(self.of_server) if here[0][0] <= event[0] <= here[-1][0]]
                spans += _spans(command, here, there, here[0][0] - end)
                end += here[-1][0] - here[0][0]
        return end * 1000, spans

    def plain(self) -> float:
        """The milliseconds of the low-level runtime alone, traced as well."""
        side = self.bench.plain()
        with self.bench.bundle(side) as bundle:
            return sum(here[-1][0] - here[0][0] for _, here in self._commands(bundle, side)) * 1000

    def _commands(self, bundle: Bundle, side: Side) -> Iterator[tuple[str, list[Event]]]:
        tracing: list[subprocess.Popen[bytes]] = []
        for number, words in enumerate(
            (
                ("create", "--bundle", str(bundle.directory), bundle.id),
                ("start", bundle.id),
                ("delete", "--force", bundle.id),
            )
        ):
            log = self.bench.place / f"trace{number}"
            if words[0] == "delete":  # of a container that runs still, runc waits 100 ms for the end
                tracing[0].wait(20)
            tracing.append(self._trace(side, log, *words))
            yield words[0], _until_over(log)
        for process in tracing:
            process.wait(20)

    def _trace(self, side: Side, log: Path, *words: str) -> subprocess.Popen[bytes]:
        """It ends with the last process that the command has started: after `create`, with the container."""
        command = [*_STRACE, str(log), side.runtime, *words]
        env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        env |= {"NVHOOK_CONFIG": str(side.config)} if side.config else {}
        log.unlink(missing_ok=True)
        null = subprocess.DEVNULL
        return subprocess.Popen(command, env=env, stdin=null, stdout=null, stderr=null)

    def close(self) -> None:
        self.bench.end_server()
        self.first.send_signal(signal.SIGTERM)
        self.first.wait(10)


def _spans(command: str, here: list[Event], there: list[Event], shift: float) -> list[Span]:
    """What each process did, in the order of the rows."""

    def at(event: Event) -> float:
        return (event[0] - shift) * 1000

    def first(call: str, text: str = "", events: list[Event] = here) -> Event | None:
        return next((event for event in events if event[2] == call and text in event[3]), None)

    outer = here[0][1]
    runtime = next(event for event in here if event[2] == "execve" and event[1] == outer and event is not here[0])
    over = next(event for event in reversed(here) if event[1] == outer and event[2] in _ENDS)
    spans: list[Span] = [
        ("wrapper", f"{command}: launcher", at(here[0]), at(runtime)),
        ("runc", f"runc {command}", at(runtime), at(over)),
    ]
    hook = first("execve", "bin/nvidia-container-runtime-hook")
    if hook:
        ended = next(event for event in here if event[1] == hook[1] and event[2] in _ENDS)
        spans.append(("hook", "hook: launcher", at(hook), at(ended)))
    asked = first("alarm", events=there)  # the first that a child of the server does with a question
    mine = [event for event in there if asked and event[1] == asked[1]]
    written = first("rename", "config.json", mine)
    entered = first("setns", events=mine)
    if asked and command == "create" and written and entered:
        opened = [event for event in mine if event[2] == "open_tree" and event[0] < entered[0]]
        spans += [
            ("server", "edit config.json", at(asked), at(written)),
            ("server", "plan, open the sources", at(written), at(opened[-1]) if opened else at(entered)),
            ("server", "mounts, nodes, links", at(hook) if hook else at(entered), at(mine[-1])),
        ]
    elif asked:
        spans.append(("server", "clean up", at(asked), at(mine[-1])))
    return spans


_ROWS = {"wrapper": "our wrapper", "runc": "runc", "hook": "our hook", "server": "our server's child"}
_COLOURS = {"wrapper": "#76b900", "runc": "#b0b7bf", "hook": "#76b900", "server": "#3f7d00"}
_LEFT, _HEIGHT, _WIDTH = 170, 46, 1000


def draw(spans: list[Span], plain: float, total: float) -> str:
    """An SVG document; `plain` are the milliseconds that runc alone took, drawn beside `total`."""
    scale = (_WIDTH - _LEFT - 30) / max(total, plain)
    bottom = _HEIGHT * (len(_ROWS) + 1) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {bottom + 30}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{_WIDTH}" height="{bottom + 30}" fill="#ffffff"/>',
    ]
    for tick in range(0, int(total) + 10, 10):
        x = _LEFT + tick * scale
        parts.append(f'<line x1="{x:.1f}" y1="10" x2="{x:.1f}" y2="{bottom}" stroke="#e4e7ea"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle" fill="#5b6670">{tick} ms</text>')
    rows = [*_ROWS, "plain"]
    for row in rows:
        title = _ROWS.get(row, "runc alone")
        parts.append(f'<text x="8" y="{_y(rows, row) + 20}" fill="#22272b">{escape(title)}</text>')
    for row, what, begin, end in [*spans, ("plain", "create, start, delete", 0.0, plain)]:
        parts.append(
            _box(_y(rows, row), what, begin * scale, max((end - begin) * scale, 1.5), _COLOURS.get(row, "#d5dade"))
        )
    return "\n".join([*parts, "</svg>", ""])


def _y(rows: list[str], row: str) -> int:
    return 14 + rows.index(row) * _HEIGHT


def _box(y: int, what: str, x: float, width: float, colour: str) -> str:
    tip = f"<title>{escape(what)}</title>"
    box = f'<rect x="{_LEFT + x:.1f}" y="{y}" width="{width:.1f}" height="20" fill="{colour}">{tip}</rect>'
    return box + f'<text x="{_LEFT + x:.1f}" y="{y + 33}" font-size="10" fill="#5b6670">{escape(what)}</text>'


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw one start of a GPU container from a real trace.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--real", action="store_true", help="this machine's own driver, not a simulated host")
    options = parser.parse_args()
    be_where_run_is_memory()
    be_where_it_starts("runc")
    with tempfile.TemporaryDirectory(prefix="nvhook-picture-") as name:
        bench = Bench(Path(name), _RUNS)
        try:
            config = real_config(bench) if options.real else bench.host("h200-ubuntu24")
            tracer = Tracer(bench, bench.ours(config, GPUS))
            runs = sorted(tracer.start() for _ in range(_RUNS))
            total, spans = runs[len(runs) // 2]
            plain = sorted(tracer.plain() for _ in range(_RUNS))[_RUNS // 2]
            tracer.close()
        finally:
            bench.close()
    options.file.write_text(draw(spans, plain, total))
    for row, what, begin, end in spans:
        print(f"{begin:7.1f} {end:7.1f}  {row:<8} {what}")
    print(f"{total:.1f} ms, runc alone {plain:.1f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
