# SPDX-License-Identifier: Apache-2.0
"""How long a container takes to start, beside the low-level runtime alone: `make bench`, as root.

    python3 tests/bench.py [--runs N] [--rows a,b] [--real] [--peer DIR] [--low NAME] [--json FILE]

Every row is measured in one go, its sides in turn; what is printed is the ratio of their medians, or with --real their
difference, beside its target. A start is `create`, `start` and `delete` of a container that only exits, on a root
filesystem of its own (an overlay, as engines make it). nvhook is installed as users install it; the host is a simulated
one, or with --real this machine.

--peer DIR adds another runtime's nvidia-container-runtime, with what it needs of this machine, to the row `gpu`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
import platform
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from containers import (
    COMPILE,
    REPOSITORY,
    TRIPLET,
    Bundle,
    any_cgroups,
    configure,
    make_image,
    server_of,
    way_of_crun,
)
from simhost import elfwriter
from simhost.build import build

HOSTS = REPOSITORY / "tests/hosts"
ALL_CAPABILITIES = {"NVIDIA_DRIVER_CAPABILITIES": "all"}
GPUS = {"NVIDIA_VISIBLE_DEVICES": "all"}


def be_where_run_is_memory() -> None:
    """As systemd has it on every host: begin again with a tmpfs there, unless there is one. Others do not see it."""
    kind = subprocess.run(["stat", "-f", "-c", "%T", "/run"], check=True, capture_output=True, text=True).stdout
    if kind != "tmpfs\n":
        script = 'mount -t tmpfs -o mode=755 tmpfs /run; exec "$@"'
        os.execvp("unshare", ["unshare", "--mount", "sh", "-euc", script, "sh", sys.executable, *sys.argv])


def be_where_it_starts(low_level: str) -> tuple[str, ...]:
    """Begin again in a mount namespace with the control groups that `low_level` can use; the options that it takes.

    One for each command would not do: the server answers nobody who lives in another one. It also ends where it cannot
    leave its caller's control groups, and from there those of version 1 cannot be seen. So we leave them before.
    """
    through, options = way_of_crun() if Path(low_level).name == "crun" else (any_cgroups(), ())
    if through:
        for processes in Path("/sys/fs/cgroup").glob("*/cgroup.procs"):
            processes.write_text(f"{os.getpid()}\n")
        os.execvp(through[0], [*through, sys.executable, *sys.argv])
    return options


class ControlGroup:
    """A control group of version 2: the processor time of everything that is started in it, and we are in it as well.

    The kernel charges a process's time to its group while it runs, to the microsecond, and keeps the sum when the
    process is gone. Nothing else has all of it: the server's children are not ours to wait for; the server does not
    wait for them either (it ignores SIGCHLD), so their times are added up nowhere; and /proc/PID/stat counts in ticks
    of 10 ms, longer than most of these processes live. It takes no controller, so it is there beside version 1 as well.
    What kernel threads do afterwards, such as the end of a namespace, is left out; it is the same with us and without.
    """

    def __init__(self, place: Path) -> None:
        self.name = f"nvhook-bench-{os.getpid()}"
        self._place = place
        self._top = place / self.name
        self._programs = self._top / "programs"  # containers get groups beside it: only leaves may hold processes
        (own,) = (line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        place.mkdir()
        subprocess.run(["mount", "-t", "cgroup2", "cgroup2", place], check=True)
        self._former = place / own.removeprefix("0::/")
        self._programs.mkdir(parents=True)
        self.take(os.getpid())

    def take(self, pid: int) -> None:
        """With everything that it starts from now on."""
        (self._programs / "cgroup.procs").write_text(f"{pid}\n")

    def spent(self) -> float:
        """Seconds, without our own."""
        time.sleep(0.001)  # the kernel charges what we have had of a processor when we give it up
        usage, own = (self._top / "cpu.stat").read_text(), time.process_time()
        return int(usage.partition("usage_usec ")[2].split()[0]) / 1e6 - own

    def close(self) -> None:
        """Nobody but us is in it by now. The low-level runtime has made one of the same name in other hierarchies."""
        (self._former / "cgroup.procs").write_text(f"{os.getpid()}\n")
        self._programs.rmdir()
        for group in (self._top, *Path("/sys/fs/cgroup").glob(f"*/{self.name}")):
            if group.exists():
                group.rmdir()
        subprocess.run(["umount", self._place], check=True)


class Side:
    """One way to start a container: the runtime's path, its config.toml, the container's environment, the image."""

    def __init__(self, runtime: str, config: Path | None, env: dict[str, str], image: Path) -> None:
        self.runtime = runtime
        self.config = config
        self.env = env
        self.image = image


class Bench:
    """`place` is a directory that is thrown away afterwards. Root filesystems are overlays in a tmpfs there, and so are
    our state directories: the usual one is below /run. `options` are the low-level runtime's. With `is_real` the
    targets are differences: what we add takes the same time whether the low-level runtime takes 15 ms or 50."""

    def __init__(
        self, place: Path, runs: int, low_level: str = "runc", options: tuple[str, ...] = (), *, is_real: bool = False
    ) -> None:
        self.place = place
        self.runs = runs
        self.options = options
        self.is_real = is_real
        self.prefix = place / "prefix"
        self.wrapper = str(self.prefix / "bin/nvidia-container-runtime")
        self.low_level = shutil.which(low_level) or low_level
        (place / "upper").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place / "upper"], check=True)
        command = [str(path) for path in (REPOSITORY / "scripts/install", "install", self.prefix, self.prefix / "etc")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        self.image = make_image("debian", place / "image")

    def server(self) -> int:
        """Its process number; 0 if there is none."""
        try:
            pid = int((server_of(self.prefix) / "pid").read_text())
        except (OSError, ValueError):
            return 0
        return pid if Path(f"/proc/{pid}").exists() else 0

    def server_at_rest(self) -> list[int]:
        """The server and the one child that waits for a caller, once all others are over; empty if there is none."""
        server, end = self.server(), time.monotonic() + 10
        looks = 0  # a child that is about to end looks like one that waits, for a moment
        while server and looks < 2:
            family = [server, *_children(server)]
            looks = looks + 1 if len(family) == 2 and all(_sleeps(pid) for pid in family) else 0
            if time.monotonic() > end:
                raise SystemExit("the server's children do not end")
            time.sleep(0.002)
        return family if server else []

    def end_server(self) -> None:
        server = self.server()
        if server:
            os.kill(server, signal.SIGKILL)
            shutil.rmtree(server_of(self.prefix))

    def alone(self) -> Side:
        """Ours with launchers that know of no server; its configuration is to be set."""
        made = self.place / "alone"
        made.mkdir(exist_ok=True)
        env = {**os.environ, "LIBRARY": str(self.prefix / "lib/nvhook")}
        subprocess.run([COMPILE, made], check=True, env=env)
        return Side(str(made / "nvidia-container-runtime"), None, GPUS, self.image)

    def close(self) -> None:
        self.end_server()
        subprocess.run(["umount", "--lazy", self.place / "upper"], check=True)

    def host(self, name: str) -> Path:
        """config.toml of a simulated host."""
        config = self.place / f"{name}.toml"
        if not config.exists():
            build(HOSTS / f"{name}.json", self.place / name)
            configure(self.place / name, config, self.place / "upper" / f"{name}-state", runtime=self.low_level)
        return config

    def plain(self, image: Path | None = None) -> Side:
        return Side(self.low_level, None, {}, image or self.image)

    def ours(self, config: Path, env: dict[str, str], image: Path | None = None) -> Side:
        return Side(self.wrapper, config, env, image or self.image)

    @contextlib.contextmanager
    def bundle(self, side: Side) -> Iterator[Bundle]:
        name = uuid.uuid4().hex
        upper = self.place / "upper" / name
        for part in ("upper", "work", "root"):
            (upper / part).mkdir(parents=True)
        layers = f"lowerdir={side.image},upperdir={upper}/upper,workdir={upper}/work"
        subprocess.run(["mount", "-t", "overlay", "-o", layers, "overlay", upper / "root"], check=True)
        bundle = Bundle(upper / "bundle", upper / "root")
        bundle.write(["/bin/true"], side.env)
        try:
            yield bundle
        finally:
            # Lazily, as engines do: a process of ours may be on its way out.
            subprocess.run(["umount", "--lazy", upper / "root"], check=True)
            shutil.rmtree(upper)

    def start(self, side: Side) -> float:
        """Seconds of a whole start."""
        with self.bundle(side) as bundle:
            begin = time.perf_counter()
            self.whole(side, bundle)
            return time.perf_counter() - begin

    def spent(self, side: Side, group: ControlGroup) -> float:
        """Seconds of processor time of a whole start. That the server makes its next child ready is part of it."""
        with self.bundle(side) as bundle:
            bundle.config["linux"]["cgroupsPath"] = f"/{group.name}/{bundle.id}"
            bundle.write()
            for pid in self.server_at_rest():
                group.take(pid)
            begin = group.spent()
            self.whole(side, bundle)
            self.server_at_rest()
            return group.spent() - begin

    def whole(self, side: Side, bundle: Bundle) -> None:
        """Until the container is deleted."""
        self.run_to_the_end(side, bundle)
        self.call(side, bundle, "delete", "--force", bundle.id)

    def run_to_the_end(self, side: Side, bundle: Bundle) -> None:
        """Of a container that runs still, runc's `delete --force` waits 100 ms for the end."""
        number = bundle.directory / "pid"
        self.call(side, bundle, "create", "--pid-file", str(number), "--bundle", str(bundle.directory), bundle.id)
        process = os.pidfd_open(int(number.read_text()))
        self.call(side, bundle, "start", bundle.id)
        select.select([process], [], [], 10)
        os.close(process)

    def call(self, side: Side, bundle: Bundle, *words: str, before: tuple[str, ...] = ()) -> None:
        env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        env |= {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        if side.config:
            env["NVHOOK_CONFIG"] = str(side.config)
        with (bundle.directory / "said").open("wb") as said:
            command = [*before, side.runtime, *self.options, *words]
            done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, stdout=said, stderr=said, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}: {(bundle.directory / 'said').read_text()}")

    def in_turn(self, *ways: Callable[[], float], runs: int = 0) -> list[float]:
        """The medians of the ways, each tried once before it counts."""
        found: list[list[float]] = [[] for _ in ways]
        for count in range((runs or self.runs) + 1):
            for way, times in zip(ways, found, strict=True):
                spent = way()
                if count:
                    times.append(spent)
        return [statistics.median(times) for times in found]


def _children(pid: int) -> list[int]:
    return [int(number) for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _sleeps(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"
    except OSError:
        return False


def _peak(pid: int) -> float:
    """MB of memory that it has had at most."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024


class Result:
    """One line of the table: `value` in `unit` is met when it is at most `target`."""

    def __init__(self, row: str, what: str, value: float, unit: str, target: float, detail: str) -> None:
        self.row = row
        self.what = what
        self.value = value
        self.unit = unit
        self.target = target
        self.detail = detail

    def describe(self) -> dict[str, object]:
        return {
            "row": self.row,
            "what": self.what,
            "value": round(self.value, 3),
            "unit": self.unit,
            "target": self.target,
            "met": self.value <= self.target,
            "detail": self.detail,
        }

    def line(self) -> str:
        number = f"{self.value:.2f}{self.unit}"
        verdict = "met" if self.value <= self.target else "MISSED"
        return f"{self.what:<58} {number:>10}  {f'<= {self.target:g}{self.unit}':>10}  {verdict:<6}  {self.detail}"


def _result(
    bench: Bench, row: str, what: str, base: float, value: float, target: float, added: float | None = None
) -> Result:
    """Of two times in seconds: the ratio, or where `added` is given, on a real host, the ms between them."""
    more, ratio = (value - base) * 1000, value / base
    detail = f"{base * 1000:.1f} ms, {value * 1000:.1f} ms: {more:+.1f} ms, ratio {ratio:.2f}"
    if bench.is_real and added is not None:
        return Result(row, what, more, " ms", added, detail)
    return Result(row, what, ratio, "", target, detail)


def _ratio(bench: Bench, row: str, what: str, sides: list[Side], target: float, added: float | None = None) -> Result:
    base, value = bench.in_turn(*[lambda side=side: bench.start(side) for side in sides])
    return _result(bench, row, what, base, value, target, added)


def no_request(bench: Bench, config: Path, _peer: str) -> list[Result]:
    what = "a container that asks for no GPU, through our runtime"
    return [_ratio(bench, "no-request", what, [bench.plain(), bench.ours(config, {})], 1.05, 1)]


def gpu(bench: Bench, config: Path, peer: str) -> list[Result]:
    sides = [bench.plain(), bench.ours(config, GPUS)]
    results = [_ratio(bench, "gpu", "a GPU container (compute, utility), warm cache", sides, 1.35, 8)]
    if peer:
        theirs = Side(f"{peer}/nvidia-container-runtime", None, GPUS, bench.image)
        results.append(_ratio(bench, "peer", "the same through the other runtime", [bench.plain(), theirs], 1.35, 8))
    return results


def capabilities(bench: Bench, config: Path, _peer: str) -> list[Result]:
    sides = [bench.plain(), bench.ours(config, {**GPUS, **ALL_CAPABILITIES})]
    return [_ratio(bench, "capabilities", "the same with all capabilities", sides, 1.45, 10)]


def processor(bench: Bench, config: Path, _peer: str) -> list[Result]:
    """User and system time of all that a start causes: low-level runtime, launcher, hook, server and its children."""
    sides = [bench.plain(), bench.ours(config, GPUS)]
    group = ControlGroup(bench.place / "groups")
    try:
        base, value = bench.in_turn(*[lambda side=side: bench.spent(side, group) for side in sides])
    finally:
        bench.end_server()
        group.close()
    what = "processor time of a GPU container's start"
    return [_result(bench, "processor", what, base, value, 1.6, 18)]


def eight(bench: Bench, _config: Path, _peer: str) -> list[Result]:
    config = bench.host("h100x8-fedora")
    sides = [bench.ours(config, {"NVIDIA_VISIBLE_DEVICES": "0"}), bench.ours(config, GPUS)]
    return [_ratio(bench, "eight", "eight GPUs instead of one", sides, 1.03)]


def libraries(bench: Bench, config: Path, _peer: str) -> list[Result]:
    images = [_image_with_libraries(bench, count) for count in (30, 3000)]
    sides = [bench.ours(config, GPUS, image) for image in images]
    return [_ratio(bench, "libraries", "an image with 3,000 libraries in its cache, not 30", sides, 1.05)]


def _image_with_libraries(bench: Bench, count: int) -> Path:
    image = make_image("debian", bench.place / f"image-{count}")
    for number in range(count):
        name = f"libnumber{number}.so.1"
        (image / "usr/lib" / TRIPLET / name).write_bytes(elfwriter.shared_object(name, ["libc.so.6"]))
    ldconfig = "/sbin/ldconfig.real" if os.path.exists("/sbin/ldconfig.real") else "/sbin/ldconfig"
    subprocess.run([ldconfig, "-r", image], check=True)
    return image


def commands(bench: Bench, config: Path, _peer: str) -> list[Result]:
    """Each on a container of its own that runs, or for `delete` has ended."""
    results = []
    for command, words in {
        "start": ("start", "{}"),
        "kill": ("kill", "{}", "KILL"),
        "delete": ("delete", "--force", "{}"),
        "state": ("state", "{}"),
        "exec": ("exec", "{}", "/bin/true"),
    }.items():
        sides = [bench.plain(), bench.ours(config, {})]
        ways = [lambda side=side, words=words: _one_command(bench, side, words) for side in sides]
        alone, through = bench.in_turn(*ways)
        detail = f"{alone * 1000:.1f} ms, {through * 1000:.1f} ms"
        what = f"`{command}` over the low-level runtime"
        results.append(Result(command, what, (through - alone) * 1000, " ms", 0.8, detail))
    return results


def _one_command(bench: Bench, side: Side, words: tuple[str, ...]) -> float:
    with bench.bundle(side) as bundle:
        plain = bench.plain()
        try:
            if words[0] == "delete":
                bench.run_to_the_end(plain, bundle)
            else:
                bundle.write(["/bin/sleep", "60"])
                bench.call(plain, bundle, "create", "--bundle", str(bundle.directory), bundle.id)
                if words[0] != "start":
                    bench.call(plain, bundle, "start", bundle.id)
            begin = time.perf_counter()
            bench.call(side, bundle, *(word.format(bundle.id) for word in words))
            return time.perf_counter() - begin
        finally:
            bundle.delete(plain.runtime)


def first(bench: Bench, config: Path, _peer: str) -> list[Result]:
    """The whole of it, as the user waits for it: nothing has looked at the driver's files yet."""
    state = _state_of(config)
    times = []
    for _ in range(max(3, bench.runs // 8)):
        bench.end_server()
        shutil.rmtree(state, ignore_errors=True)
        times.append(bench.start(bench.ours(config, GPUS)))
    what = "the first start on a host, no inventory"
    return [Result("first", what, statistics.median(times), " s", 0.3, f"of {len(times)}")]


def _state_of(config: Path) -> Path:
    line = next(line for line in config.read_text().splitlines() if "state-dir" in line)
    return Path(line.split('"')[1])


def at_once(bench: Bench, config: Path, _peer: str) -> list[Result]:
    plain, ours = bench.in_turn(
        lambda: _many(bench, bench.plain()),
        lambda: _many(bench, bench.ours(config, GPUS)),
        runs=max(3, bench.runs // 8),
    )
    what = "32 containers started at once, wall time"
    return [_result(bench, "at-once", what, plain, ours, 1.5 if bench.is_real else 1.4)]


def _many(bench: Bench, side: Side) -> float:
    with contextlib.ExitStack() as stack, concurrent.futures.ThreadPoolExecutor(32) as pool:
        bundles = [stack.enter_context(bench.bundle(side)) for _ in range(32)]

        begin = time.perf_counter()
        list(pool.map(lambda bundle: bench.whole(side, bundle), bundles))
        return time.perf_counter() - begin


def memory(bench: Bench, config: Path, _peer: str) -> list[Result]:
    bench.end_server()
    bench.start(bench.ours(config, GPUS))
    family = [_peak(pid) for pid in bench.server_at_rest()]
    wrapper, hook = _peaks_of_python(bench, config)
    detail = f"wrapper {wrapper:.1f} MB, hook {hook:.1f} MB"
    rows = {"memory-server": "peak memory of the server", "memory-child": "peak memory of its child that waits"}
    results = [Result(*row, peak, " MB", 20, "after a start") for row, peak in zip(rows.items(), family, strict=False)]
    what = "peak memory of Python without a server"
    return [*results, Result("memory-python", what, max(wrapper, hook), " MB", 20, detail)]


def _peaks_of_python(bench: Bench, config: Path) -> tuple[float, float]:
    """(the wrapper, the hook). The wrapper becomes runc, so a runtime that only exits stands in for that."""
    program = bench.place / "memory-runtime"
    program.write_text("#!/bin/sh\nexit 0\n")
    program.chmod(0o755)
    settings = bench.place / "memory.toml"
    settings.write_text(config.read_text().replace(f'runtimes = ["{bench.low_level}"]', f'runtimes = ["{program}"]'))
    side = bench.alone()
    side.config = settings
    with bench.bundle(side) as bundle:
        log = bench.place / "wrapper.log"
        words = ("create", "--bundle", str(bundle.directory), bundle.id)
        bench.call(side, bundle, *words, before=("/usr/bin/time", "-o", str(log), "-f", "%M"))
        wrapper = int(log.read_text().split()[-1]) / 1024
    side.config = config
    log = bench.place / "hook.log"
    hook = Path(side.runtime).with_name("nvidia-container-runtime-hook")
    kept = hook.with_suffix(".kept")
    hook.rename(kept)
    hook.write_text(f'#!/bin/sh\nexec /usr/bin/time -a -o {log} -f %M {kept} "$@"\n')
    hook.chmod(0o755)
    try:
        bench.start(side)
    finally:
        kept.rename(hook)
    return wrapper, max(int(line) for line in log.read_text().split()) / 1024


ROWS = {
    "no-request": no_request,
    "gpu": gpu,
    "capabilities": capabilities,
    "processor": processor,
    "eight": eight,
    "libraries": libraries,
    "commands": commands,
    "first": first,
    "at-once": at_once,
    "memory": memory,
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure container starts beside the low-level runtime alone.")
    parser.add_argument("--runs", type=int, default=40, help="counted runs of each side (40)")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--real", action="store_true", help="this machine's GPUs, and no simulated ones")
    parser.add_argument("--peer", default="", metavar="DIR", help="another runtime's binaries")
    parser.add_argument("--low", default="runc", metavar="NAME", help="the low-level runtime (runc)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the results for programs")
    options = parser.parse_args()
    be_where_run_is_memory()
    low_level_options = be_where_it_starts(options.low)
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="nvhook-bench-") as name:
        place = Path(name)
        place.chmod(0o755)
        bench = Bench(place, options.runs, options.low, low_level_options, is_real=options.real)
        try:
            config = real_config(bench) if options.real else bench.host("h200-ubuntu24")
            print(f"{platform.release()}, {os.cpu_count()} CPUs, medians of {options.runs}, sides in turn", flush=True)
            for row in options.rows.split(","):
                if options.real and row == "eight":
                    print("eight: not run, this is one machine's real GPUs")
                    continue
                for result in ROWS[row](bench, config, options.peer):
                    print(result.line(), flush=True)
                    results.append(result)
        finally:
            bench.close()
    if options.json:
        options.json.write_text(json.dumps([result.describe() for result in results], indent=2) + "\n")
    return 0


def real_config(bench: Bench) -> Path:
    config = bench.place / "real.toml"
    config.write_text(
        f'[nvidia-container-runtime]\nruntimes = ["{bench.low_level}"]\n'
        f'[nvhook]\nstate-dir = "{bench.place}/upper/real-state"\n'
    )
    return config


if __name__ == "__main__":
    sys.exit(main())
