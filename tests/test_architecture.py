# SPDX-License-Identifier: Apache-2.0
"""The rules of docs/architecture.md and docs/rules.md that a machine can check: imports, and what each start loads."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pynvml
import pytest

from nvhook.driver import inventory
from nvhook.request import config

REPOSITORY = Path(__file__).parent.parent
HOOK = REPOSITORY / "hook/nvhook"
WRAPPER = REPOSITORY / "runtime-wrapper/nvruntime"
OURS = ("nvhook", "nvruntime")
ROOMS = (".ci", "hook", "runtime-wrapper", "scripts", "tests")
SKIPPED = ("packages", "__pycache__")


def _sources(*directories: Path) -> list[Path]:
    found = (path for directory in directories for path in sorted(directory.rglob("*.py")))
    return [path for path in found if not set(SKIPPED) & set(path.parts)]


def _imports(path: Path, *, types: bool = False) -> Iterator[str]:
    """Full names of the modules that a file imports anywhere in it; with `types` those for the type checker too."""
    room = HOOK.parent if path.is_relative_to(HOOK) else WRAPPER.parent
    package = list(path.parent.relative_to(room).parts)
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if types else _walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _walk(child)


def _ids(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(REPOSITORY)) for path in paths]


PROGRAM = _sources(HOOK, WRAPPER)
CORE = _sources(HOOK)


# Arrows


@pytest.mark.parametrize("path", CORE, ids=_ids(CORE))
def test_core_does_not_import_the_wrapper(path: Path) -> None:
    assert not [name for name in _imports(path) if name.split(".")[0] == "nvruntime"]


# Each imports those before it, and nothing of those after it (docs/architecture.md). Types for the checker count too.
ORDER = (
    *("linux", "formats", "version", "errors", "request", "host", "audit", "driver", "container"),
    *("plan", "start", "prestart", "cdihook", "hook", "commands", "cli"),
)


def _room(module: str) -> str:
    """`host` for nvhook.host.gpus; empty for what is not ours."""
    return f"{module}..".split(".")[1] if module.startswith("nvhook.") else ""


@pytest.mark.parametrize("path", CORE, ids=_ids(CORE))
def test_imports_go_one_way(path: Path) -> None:
    own = _room(".".join(path.relative_to(HOOK.parent).with_suffix("").parts))
    if own not in ORDER:
        assert path == HOOK / "__init__.py"
        return
    rooms = {_room(name) for name in _imports(path, types=True)} - {""}
    assert {room for room in rooms if ORDER.index(room) > ORDER.index(own)} == set()
    assert own not in ("linux", "formats") or rooms <= {own}


def test_every_class_has_a_name_of_its_own() -> None:
    """Who reads `Device` knows which one; private ones are known in their own module alone."""
    nodes = (node for path in PROGRAM for node in ast.walk(ast.parse(path.read_text())))
    names = [node.name for node in nodes if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []


def test_no_circle() -> None:
    names = {".".join(path.relative_to(HOOK.parent).with_suffix("").parts): path for path in CORE}
    names |= {".".join(path.relative_to(WRAPPER.parent).with_suffix("").parts): path for path in _sources(WRAPPER)}
    arrows = {name: set(_imports(path, types=True)) & names.keys() - {name} for name, path in names.items()}
    while arrows:
        free = {name for name, targets in arrows.items() if not targets & arrows.keys()}
        assert free, sorted(arrows)
        arrows = {name: targets for name, targets in arrows.items() if name not in free}


def test_plan_is_pure() -> None:
    """Neither the system nor what wraps it; edits.py, which it makes, is another matter."""
    names = set(_imports(HOOK / "plan.py"))
    assert not {name for name in names if name.split(".")[0] in ("os", "io", "sys", "stat", "fcntl", "subprocess")}
    assert not {name for name in names if f"{name}.".startswith("nvhook.linux.")}
    tree = ast.parse((HOOK / "plan.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in ("open", "print")]


@pytest.mark.parametrize("path", PROGRAM, ids=_ids(PROGRAM))
def test_kernel_alone_imports_ctypes(path: Path) -> None:
    names = {name.split(".")[0] for name in _imports(path)}
    assert "ctypes" not in names
    assert ("_ctypes" in names) == (path == HOOK / "linux/kernel.py")


def test_every_module_is_looked_at() -> None:
    """The tests above pass over what they do not find."""
    assert {"nvhook", "commands", "doctor", "linux", "nvruntime"} <= {path.parent.name for path in PROGRAM}
    assert "nvhook.linux.kernel" in set(_imports(HOOK / "linux/root.py"))
    assert "nvhook.request.spec" in set(_imports(WRAPPER / "create.py"))


# Files


def _is_code(path: Path) -> bool:
    if not path.is_file() or set(SKIPPED) & set(path.parts):
        return False
    return path.suffix in (".py", ".c", ".h", ".sh") or (not path.suffix and path.read_bytes().startswith(b"#!"))


CODE = sorted(path for room in ROOMS for path in (REPOSITORY / room).rglob("*") if _is_code(path))


@pytest.mark.parametrize("path", CODE, ids=_ids(CODE))
def test_licence_comes_first(path: Path) -> None:
    lines = path.read_text().splitlines()
    line = lines[1] if lines[0].startswith("#!") else lines[0]
    assert line.strip("/*# ") == "SPDX-License-Identifier: Apache-2.0"


@pytest.mark.parametrize("path", PROGRAM, ids=_ids(PROGRAM))
def test_module_says_what_it_is_for(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) if tree.body else path.name == "__init__.py"


# SECURITY.md

NAMED = sorted(set(re.findall(r"`(tests/[^`]+)`", (REPOSITORY / "SECURITY.md").read_text())))


@pytest.mark.parametrize("name", NAMED)
def test_security_page_names_tests_that_are_there(name: str) -> None:
    path, _, function = name.partition("::")
    assert f"\ndef {function}" in (REPOSITORY / path).read_text()


def test_security_page_says_what_holds_each_promise() -> None:
    """Every row of its tables has three or four cells, of which the last names a test."""
    rows = [line for line in (REPOSITORY / "SECURITY.md").read_text().split("\n") if line.startswith("| ")]
    rows = [row for row in rows if not row.endswith("| Tested by |")]
    assert len(rows) > 20
    assert [row for row in rows if "`tests/" not in row.split(" | ")[-1]] == []


# Roads: what a container start loads

HEAVY = {
    "argparse",
    "ctypes",
    "json",
    "re",
    "dataclasses",
    "email",
    "importlib.metadata",
    "inspect",
    "jsonschema",
    "logging",
    "pathlib",
    "pynvml",
    "subprocess",
    "tempfile",
    "tomllib",
    "typing",
}

_START = """
import os, sys
sys.path[:0] = sys.argv[1].split(":")
names = lambda: print(*sorted(sys.modules), sep="\\n")
"""


def _loaded(script: str, *arguments: str) -> set[str]:
    """Modules in an interpreter that is started as ours are, when `script` says names()."""
    command = [sys.executable, "-IS", "-c", _START + script, f"{HOOK.parent}:{WRAPPER.parent}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return set(done.stdout.split())


_WRAPPER_ROAD = """
from nvruntime import main
os.execv = lambda *_: (names(), sys.stdout.flush(), os._exit(0))
main.main(["edit", sys.argv[2], "/hook", "", "runc", "/bin/true", "create", "--bundle", sys.argv[3], "name"])
"""


def _bundle(directory: Path, *env: str) -> str:
    document = {"process": {"env": list(env)}, "root": {"path": "rootfs"}}
    (directory / "config.json").write_text(json.dumps(document))
    return str(directory)


def test_road_of_the_wrapper_without_a_request(tmp_path: Path) -> None:
    loaded = _loaded(_WRAPPER_ROAD, "/nonexistent/config.toml", _bundle(tmp_path))
    assert {
        "nvhook.formats.quickjson",
        "nvhook.request.config",
        "nvhook.request.request",
        "nvhook.request.spec",
    } <= loaded
    assert not loaded & HEAVY
    assert not {name for name in loaded if name.startswith("nvhook.linux")}
    assert not loaded & {"nvhook.host.gpus", "nvhook.plan", "nvhook.container.edits", "nvhook.driver.records"}


def test_road_of_the_wrapper_costs_little_else_than_ours(tmp_path: Path) -> None:
    """Against the modules of a bare interpreter."""
    settings = tmp_path / "config.toml"
    settings.write_bytes((REPOSITORY / "etc/config.toml").read_bytes())
    loaded = _loaded(_WRAPPER_ROAD, str(settings), _bundle(tmp_path))
    ours = {name for name in loaded if name.split(".")[0] in OURS}
    assert loaded - _loaded("names()") - ours == {"__future__", "_json"}


def test_road_of_the_wrapper_with_a_request(proc: Path) -> None:
    settings = proc / "config.toml"
    settings.write_text(f"[nvhook]\nproc-root = '{proc}'\n")
    loaded = _loaded(_WRAPPER_ROAD, str(settings), _bundle(proc, "NVIDIA_VISIBLE_DEVICES=all"))
    assert {"nvhook.host.gpus", "nvhook.plan"} <= loaded
    assert not loaded & {*HEAVY, "nvhook.driver.records", "nvhook.driver.nvml", "nvhook.driver.inventory"}


_HOOK_ROAD = """
from nvhook import audit, prestart
from nvhook.request import config, spec
from nvhook.request import request
from nvhook.linux.root import DIRECTORY, Root
from nvhook.start import Start
described = spec.parse(spec.read_config(sys.argv[3])[0], sys.argv[3])
settings = config.load(sys.argv[2])
trail = audit.Audit(settings, "hook")
warnings = []
asked = request.read(described, settings, warnings)
trail.begin(asked)
if asked:
    start = Start(settings, described, asked, "name", warnings)
    start.choose()
    prestart.prepare(start, Root(os.open(sys.argv[3], DIRECTORY)))
    trail.grant(start.chosen)
assert not warnings, warnings
names()
"""


def _with_an_inventory(host: Path, directory: Path) -> Path:
    """A config.toml for the simulated host, whose state is in `directory` and has the inventory already."""
    settings = directory / "config.toml"
    settings.write_text((host / "config.toml").read_text().replace(f"{host}/run", f"{directory}/run"))
    inventory.load(config.load(str(settings)), "580.159.04", [])
    return settings


_POSTSTOP_ROAD = """
import io
from nvhook import hook
read, write = os.pipe()
os.write(write, b'{"id": "name", "pid": 0, "bundle": "/bundle"}')
os.close(write)
os.dup2(read, 0)
assert hook.main(["poststop"], sys.argv[2]) == 0
names()
"""


def test_road_of_the_hook_without_a_request(tmp_path: Path) -> None:
    loaded = _loaded(_HOOK_ROAD, "/nonexistent/config.toml", _bundle(tmp_path))
    assert not loaded & HEAVY


@pytest.mark.root
def test_road_of_the_hook_with_an_inventory(simhost: Callable[[str], Path], tmp_path: Path) -> None:
    """All that happens in the host's namespace, the sources of the mounts included, and no ELF file is read."""
    settings = _with_an_inventory(simhost("h200"), tmp_path)
    loaded = _loaded(_HOOK_ROAD, str(settings), _bundle(tmp_path, "NVIDIA_VISIBLE_DEVICES=all"))
    assert {"nvhook.driver.records", "nvhook.plan", "nvhook.linux.kernel"} <= loaded
    assert not loaded & HEAVY
    assert not loaded & {"nvhook.driver.discovery", "nvhook.driver.nvml"}


@pytest.mark.root
def test_server_has_loaded_what_a_start_needs(simhost: Callable[[str], Path], tmp_path: Path) -> None:
    """Else each of its children would import it: 6 ms of a start of 28."""
    settings = _with_an_inventory(simhost("h200"), tmp_path)
    bundle = _bundle(tmp_path, "NVIDIA_VISIBLE_DEVICES=all")
    needed = _loaded(_WRAPPER_ROAD, str(settings), bundle) | _loaded(_HOOK_ROAD, str(settings), bundle)
    (tmp_path / "config.json").write_text('{"process": {}, "root": {"path": "rootfs"}}')
    needed |= _loaded(_POSTSTOP_ROAD, str(settings))
    assert needed - _loaded("from nvruntime import server\nserver._load()\nnames()") <= {"nvruntime.main"}


@pytest.mark.root
def test_road_of_the_hook_that_asks_nvml(simhost: Callable[[str], Path], tmp_path: Path) -> None:
    """pynvml and the library are loaded in another process, on the first road and not at all on the second."""
    settings = _with_an_inventory(simhost("h200"), tmp_path)
    bundle = _bundle(tmp_path, "NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_REQUIRE_X=brand=nvidia")
    packages = f"sys.path.append({str(Path(str(pynvml.__file__)).parent)!r})\n"
    road = packages + _HOOK_ROAD.replace("names()", "print(open('/proc/self/maps').read()); names()")
    for _ in range(2):
        loaded = _loaded(road, str(settings), bundle)
        assert {"nvhook.driver.nvml", "nvhook.linux.confine"} <= loaded
        assert not loaded & {"pynvml", "jsonschema", "argparse", "subprocess", "logging", "pathlib"}
        assert not [name for name in loaded if "libnvidia-ml" in name]
        assert (tmp_path / "run/nvml.json").exists()
