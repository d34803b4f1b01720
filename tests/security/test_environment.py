# SPDX-License-Identifier: Apache-2.0
"""An environment and a working directory that the image chose: none of its files is opened by a process of ours.

Seen with strace, in every process from the engine's call to the container's first program. What may be opened of the
root filesystem is what the plan looks at there, by a path that begins at a descriptor.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

import containers
from conftest import cannot
from containers import HOOK, REPOSITORY, Bundle, Workshop, gpu_lines
from nvhook.request import spec

pytestmark = pytest.mark.root

A100 = "a100x2"
_CALLS = "trace=open,openat,openat2,execve,execveat,setns,chroot,pivot_root,clone,clone3,fork,vfork"

# A Python that looked beside itself would find these; a dynamic linker, a shell and iconv the others.
_MODULES = ("os.py", "json.py", "sitecustomize.py", "usercustomize.py", "_ctypes.py", "ctypes/__init__.py")
_PACKAGES = ("encodings/__init__.py", "nvhook/__init__.py", "nvruntime/__init__.py", "pynvml.py")
_OTHERS = (
    "bin/python3",
    "evil.so",
    "gconv/UTF-16.so",
    "locale/evil/LC_CTYPE",
    "pyvenv.cfg",
    "python311._pth",
    "grep",
)

PYTHON = {
    "PYTHONPATH": "{traps}",
    "PYTHONHOME": "{traps}",
    "PYTHONSTARTUP": "{traps}/os.py",
    "PYTHONINSPECT": "1",
    "PYTHONUSERBASE": "{traps}",
    "PYTHONPLATLIBDIR": "{traps}",
    "PYTHONPYCACHEPREFIX": "{traps}",
    "PYTHONBREAKPOINT": "os.system",
    "PYTHONWARNINGS": "error::evil.Evil",
    "BASH_ENV": "{traps}/profile.sh",
    "ENV": "{traps}/profile.sh",
    "CDPATH": "{traps}",
    "IFS": "/",
}
# These act before a program can do anything about it: what counts is that they do not arrive. The first two move
# Python's own library, in spite of -I (getpath.py of Python 3.11).
LOADER = {
    "PYTHONEXECUTABLE": "/proc/self/cwd/bin/python3",
    "__PYVENV_LAUNCHER__": "/proc/self/cwd/bin/python3",
    "LD_PRELOAD": "/proc/self/cwd/evil.so",
    "LD_AUDIT": "/proc/self/cwd/evil.so",
    "LD_LIBRARY_PATH": "{traps}",
    "GCONV_PATH": "{traps}/gconv",
    "LOCPATH": "{traps}/locale",
    "LC_ALL": "evil",
    "PATH": "{traps}",
}


def _set_traps(top: Path, marker: Path) -> None:
    for name in (*_MODULES, *_PACKAGES):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(f"open({str(marker)!r}, 'w')\nopen('/sprung', 'w')\nraise SystemExit(3)\n")
    for name in _OTHERS:
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text("home = /traps\n")
    (top / "profile.sh").write_text(f"echo >{marker}\n")
    (top / "grep").chmod(0o755)


def _at(traps: Path, *groups: dict[str, str]) -> dict[str, str]:
    return {name: value.format(traps=traps) for group in groups for name, value in group.items()}


class Trace:
    """What strace saw of our processes: `opened` everything, `programs` what they became, `late` what was opened by a
    path from `/` in the container's mount namespace, before the tree was all there is to see. `searched` are
    directories below a root that names were looked up in (LD_LIBRARY_PATH, image_check.py), and nothing was read of."""

    def __init__(self, directory: Path) -> None:
        self.opened: list[str] = []
        self.searched: list[str] = []
        self.programs: list[str] = []
        self.late: list[str] = []
        self._lines = {path.suffix[1:]: path.read_text(errors="replace") for path in directory.glob("trace.*")}
        children = re.findall(r"^(?:clone3?|v?fork)\(.* = (\d+)$", "\n".join(self._lines.values()), re.MULTILINE)
        for process in self._lines.keys() - set(children):
            self._follow(process, is_ours=False, is_inside=False)

    def _follow(self, process: str, *, is_ours: bool, is_inside: bool) -> None:
        for line in self._lines.get(process, "").splitlines():  # a number of another pid namespace is not there
            call, _, result = line.rpartition(" = ")
            program = re.match(r'execve\("(.*?)"', call)
            if re.match(r"clone3?\(|v?fork\(", call):
                self._follow(result.split()[0], is_ours=is_ours, is_inside=is_inside)
            elif program and result.startswith("0"):
                is_ours = "nvidia-container-runtime" in program[1] or "/python3" in program[1]
                self.programs += [program[1]] if is_ours else []
            elif is_ours and call.startswith("setns("):
                is_inside = True
            elif call.startswith(("pivot_root(", "chroot(")):
                is_inside = False  # ldconfig's world, which is the image's
                is_ours = False
            found = re.match(r'open(?:at2?)?\((?:(AT_FDCWD|\d+), )?"(.*?)"', call)
            if found and is_ours:
                (self.searched if _is_search(call) else self.opened).append(found[2])
                if is_inside and found[1] == "AT_FDCWD" and "ENOENT" not in result:
                    self.late.append(found[2])


def _is_search(call: str) -> bool:
    return call.startswith("openat2(") and "O_PATH|O_DIRECTORY" in call and "RESOLVE_IN_ROOT" in call


def _traced(shop: Workshop) -> tuple[Bundle, Path, Path]:
    """(a bundle all of whose processes are traced, the directory of traps in it, what a sprung trap makes).

    The engine's current directory, and so the wrapper's and the hook's, is the directory of traps.
    """
    if not shutil.which("strace"):
        cannot("strace is not installed")
    bundle = shop.bundle()
    traps, marker = bundle.rootfs / "traps", bundle.directory / "sprung"
    for top in (traps, bundle.rootfs, bundle.rootfs / "usr/lib/python3", bundle.rootfs / str(REPOSITORY / "hook")[1:]):
        _set_traps(top, marker)
    strace = ("strace", "-ff", "-s", "512", "-e", _CALLS, "-o", str(bundle.directory / "trace"))
    bundle.through += (*containers.own_mounts(f"cd {traps}"), *strace)
    return bundle, traps, marker


def _check(bundle: Bundle, marker: Path) -> Trace:
    trace = Trace(bundle.directory)
    assert not marker.exists()
    assert not (bundle.rootfs / "sprung").exists()
    assert any("nvhook/" in path and "/prestart." in path for path in trace.opened)
    looked_at = [*trace.opened, *trace.searched]
    assert [str(bundle.rootfs)] == sorted({path for path in looked_at if path.startswith(str(bundle.rootfs))})
    assert [path for path in trace.opened if "traps" in path or "evil" in path] == []
    assert {path for path in trace.searched if "traps" in path or "evil" in path} <= {"/traps"}
    names = {Path(name).name for name in (*_MODULES, *_OTHERS)}
    assert [path for path in trace.opened if not path.startswith("/") and Path(path).name in names] == []
    assert set(trace.late) <= {"proc", "sys", "dev"}  # which the child that becomes ldconfig covers up before that
    assert set(trace.programs) <= {str(containers.WRAPPER), str(HOOK), "/usr/bin/python3"}
    return trace


LISTED = ["/usr/bin/nvidia-smi", "-L"]
ALL = {"NVIDIA_VISIBLE_DEVICES": "all"}


@pytest.mark.parametrize("leaking", [False, True], ids=["image", "image-and-engine"])
def test_through_the_wrapper(shop: Workshop, leaking: bool) -> None:
    """With `leaking`, the engine has the image's variables for Python and the shell in its own environment too."""
    bundle, traps, marker = _traced(shop)
    _, config = shop.copy_of(A100)  # no inventory yet: all of the dear work is in the trace too
    image = {**_at(Path("/traps"), PYTHON, LOADER), "PATH": "/usr/bin:/traps"}
    if leaking:
        bundle.through += ("env", *(f"{name}={value}" for name, value in _at(traps, PYTHON).items()))
    bundle.config["process"]["cwd"] = "/traps"
    result = bundle.write(LISTED, {**ALL, **image}).run(config)
    assert (0, gpu_lines(A100, 0, 1)) == (result.returncode, result.stdout), result.stderr
    trace = _check(bundle, marker)
    assert any("nvruntime/" in path and "/create." in path for path in trace.opened)


@pytest.mark.parametrize("env", ["explicit", "leaked"])
def test_hook_alone(shop: Workshop, env: str) -> None:
    """As dockerd puts it into a spec; and as an engine would that leaks the image's variables to it."""
    bundle, traps, marker = _traced(shop)
    _, config = shop.copy_of(A100)
    words = spec.HOOK_ENV if env == "explicit" else [f"{name}={value}" for name, value in _at(traps, PYTHON).items()]
    args = ["nvidia-container-runtime-hook", "--config", str(config), "prestart"]
    bundle.config["hooks"] = {"prestart": [{"path": str(HOOK), "args": args, "env": words}]}
    image = _at(Path("/traps"), PYTHON)
    result = bundle.write(LISTED, {**ALL, **image}).run(None, wrapper=Path("runc"))
    assert (0, gpu_lines(A100, 0, 1)) == (result.returncode, result.stdout), result.stderr
    _check(bundle, marker)


def test_every_hook_that_we_write_has_an_environment() -> None:
    """With an empty list it has, under some runtimes, theirs (CVE-2025-23266), and the loader's variables arrive."""
    written = sorted((REPOSITORY / "etc/hooks.d").glob("*.json"))
    assert len(written) == 2
    for path in written:
        assert re.search(r'"env": \["PATH=[^"]+"\]', path.read_text())
    assert [word.partition("=")[0] for word in spec.HOOK_ENV] == ["PATH"]
    assert all(os.path.isabs(part) for part in spec.HOOK_ENV[0].partition("=")[2].split(":"))
