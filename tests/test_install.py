# SPDX-License-Identifier: Apache-2.0
"""scripts/install: what it puts where, that it works for any caller, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from elftools.elf.elffile import ELFFile

from containers import COMPILE, REPOSITORY, Bundle, Workshop, configure, server_of, tree

INSTALL = REPOSITORY / "scripts/install"


def install(*words: str | Path) -> None:
    subprocess.run([str(INSTALL), *map(str, words)], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("prefix")
    install("install", place, place / "etc")
    return place


@pytest.mark.parametrize(
    ("command", "version"),
    [
        ("nvidia-container-runtime", "NVIDIA Container Runtime version 0.1.0 (nvhook)\n"),
        ("nvidia-container-runtime-hook", "NVIDIA Container Runtime Hook version 0.1.0 (nvhook)\n"),
        ("nvhook", "nvhook 0.1.0\n"),
        ("nvidia-container-cli", "cli-version: 1."),
    ],
)
def test_command_from_anywhere_with_an_empty_environment(prefix: Path, command: str, version: str) -> None:
    result = subprocess.run(
        [str(prefix / "bin" / command), "--version"], env={}, cwd="/", capture_output=True, text=True, check=False
    )
    assert result.stdout.startswith(version), result.stderr


def test_installed_modules_have_bytecode_that_is_used(prefix: Path) -> None:
    library = prefix / "lib/nvhook"
    sources = [path for path in library.rglob("*.py") if "packages" not in path.parts]
    compiled = {path.name.partition(".")[0] for path in library.rglob("__pycache__/*.pyc")}
    assert {path.stem for path in sources} <= compiled
    before = sorted(library.rglob("*"))
    subprocess.run([str(prefix / "bin/nvhook"), "--version"], env={}, check=True, capture_output=True)
    assert before == sorted(library.rglob("*"))


def test_config_check_of_what_is_installed(prefix: Path) -> None:
    """With the schema and jsonschema that the installation carries."""
    result = subprocess.run(
        [str(prefix / "bin/nvhook"), "config", "check"], env={}, cwd="/", capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "ok\n", "")


def test_hooks_for_podman_name_the_hook_that_is_installed(prefix: Path) -> None:
    """One file for each stage: Podman gives a hook the same words in all of its stages."""
    stages = []
    for path in sorted((prefix / "share/containers/oci/hooks.d").iterdir()):
        described = json.loads(path.read_text())
        (stage,) = described["stages"]
        stages.append(stage)
        hook = described["hook"]
        assert path.name == f"oci-nvhook-{stage}.json"
        assert path.stat().st_mode & 0o777 == 0o644
        assert hook["path"] == str(prefix / "bin/nvidia-container-runtime-hook")
        assert hook["args"] == [os.path.basename(hook["path"]), stage]
        assert described["when"] == {"always": True}
    assert stages == ["poststop", "prestart"]


def test_hook_does_nothing_after_the_start(prefix: Path) -> None:
    for command in ("poststart", "poststop"):
        program = str(prefix / "bin/nvidia-container-runtime-hook")
        subprocess.run([program, command], env={}, stdin=subprocess.DEVNULL, check=True)


@pytest.mark.parametrize("words", [[], ["sing"], ["--config"], ["--nonsense", "prestart"]], ids=str)
def test_hook_usage_exits_2(prefix: Path, words: list[str]) -> None:
    result = subprocess.run(
        [str(prefix / "bin/nvidia-container-runtime-hook"), *words], env={}, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr[:6]) == (2, "usage:")


def test_uninstall_leaves_nothing(tmp_path: Path) -> None:
    place = tmp_path / "deep/prefix"
    install("install", place, place / "etc")
    install("install", place, place / "etc")  # an upgrade remembers what the first one made
    install("uninstall", place, place / "etc")
    assert list(tmp_path.iterdir()) == []


def test_uninstall_keeps_what_others_made(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    install("install", tmp_path, tmp_path / "etc")
    (tmp_path / "etc/nvidia-container-runtime/config.toml").write_text("disable-require = true\n")
    install("install", tmp_path, tmp_path / "etc")
    install("uninstall", tmp_path, tmp_path / "etc")
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == ["bin", "etc", "etc/nvidia-container-runtime", "etc/nvidia-container-runtime/config.toml"]
    assert (tmp_path / "etc/nvidia-container-runtime/config.toml").read_text() == "disable-require = true\n"


def test_destdir_is_not_in_the_launchers(tmp_path: Path) -> None:
    install("install", "/opt/nvhook", "/etc", tmp_path)
    for launcher in (tmp_path / "opt/nvhook/bin").iterdir():
        text = launcher.read_bytes()
        assert str(tmp_path).encode() not in text
        assert b"/opt/nvhook/lib/nvhook" in text
        if launcher.name != "nvidia-docker":  # has nothing to configure
            assert b"/etc/nvidia-container-runtime/config.toml" in text
        assert os.access(launcher, os.X_OK)


@pytest.mark.parametrize("prefix_path", ["relative/path", "/with space", '/with"quote'], ids=str)
def test_install_refuses_a_path_it_cannot_write_into_a_launcher(tmp_path: Path, prefix_path: str) -> None:
    result = subprocess.run(
        [str(INSTALL), "install", prefix_path, "/etc", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert f"`{prefix_path}`" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_uninstall_while_an_engine_is_configured(tmp_path: Path) -> None:
    install("install", tmp_path, tmp_path / "etc")
    notes = tmp_path / "etc/nvidia-container-runtime/configured"
    notes.mkdir()
    (notes / "daemon.json.0123456789ab").touch()
    before = sorted(tmp_path.rglob("*"))
    result = subprocess.run(
        [str(INSTALL), "uninstall", str(tmp_path), str(tmp_path / "etc")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "`nvhook configure ENGINE --remove`" in result.stderr
    assert before == sorted(tmp_path.rglob("*"))


# A host that is not as it should be


def _refused(*words: str, **more: str) -> str:
    """The one line that the script ends with."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, **more})
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.root
def test_prefix_where_nothing_can_be_executed(tmp_path: Path) -> None:
    place = tmp_path / "prefix"
    place.mkdir()
    script = f'mount -t tmpfs -o noexec tmpfs {place}; exec "$@"'
    words = ("unshare", "--mount", "sh", "-euc", script, "sh", str(INSTALL), "install", str(place), f"{tmp_path}/etc")
    assert "(noexec): choose another PREFIX\n" in _refused(*words)


@pytest.mark.root
def test_sysconfdir_that_is_read_only(tmp_path: Path) -> None:
    place = tmp_path / "etc"
    place.mkdir()
    script = f'mount -t tmpfs -o ro tmpfs {place}; exec "$@"'
    words = ("unshare", "--mount", "sh", "-euc", script, "sh", str(INSTALL), "install", str(tmp_path / "p"), str(place))
    said = f"`{place}/nvidia-container-runtime` cannot be written: `{place}` is read-only, or not yours"
    assert _refused(*words) == f"install: {said}\n"
    assert not (tmp_path / "p").exists()


def test_python_that_is_too_old(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    line = _refused(str(INSTALL), "install", str(tmp_path / "p"), str(tmp_path / "etc"), PYTHON=str(old))
    assert line == f"install: {old} is not Python 3.10 or later\n"


def test_no_c_compiler(tmp_path: Path) -> None:
    """Nothing has been made by then."""
    line = _refused(str(INSTALL), "install", str(tmp_path / "p"), str(tmp_path / "etc"), CC="no-such-compiler")
    assert line.startswith("compile: no C compiler: install gcc and libc6-dev")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["nvidia-container-runtime", "nvidia-container-runtime-hook"])
@pytest.mark.parametrize("compiler", ["", "gcc"], ids=["default", "gcc"])
def test_launchers_are_hardened(tmp_path: Path, name: str, compiler: str) -> None:
    """PIE, its relocations read-only from the start, no executable stack, stack protector; and nothing is loaded."""
    env = {**os.environ, **({"CC": compiler} if compiler else {})}
    subprocess.run([COMPILE, tmp_path], env=env, check=True)
    with (tmp_path / name).open("rb") as file:
        elf = ELFFile(file)
        assert elf["e_type"] == "ET_DYN"
        segments = {segment["p_type"]: segment for segment in elf.iter_segments()}
        assert "PT_GNU_RELRO" in segments
        assert not segments["PT_GNU_STACK"]["p_flags"] & 1
        assert "PT_INTERP" not in segments
        flags = {tag["d_val"] for tag in _dynamic(segments["PT_DYNAMIC"]) if tag.entry.d_tag == "DT_FLAGS_1"}
        assert flags
        assert all(flag & 1 for flag in flags)  # DF_1_NOW
    assert b"nvhook" in (tmp_path / name).read_bytes()[: 16 << 10]  # by which doctor knows it


def _dynamic(segment: Any) -> Iterator[Any]:
    yield from segment.iter_tags()


def test_others_of_the_same_name_are_told(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "nvidia-container-runtime").write_text("#!/bin/sh\n")
    (theirs / "nvidia-container-runtime").chmod(0o755)
    env = {**os.environ, "PATH": f"{theirs}:/usr/bin:/bin"}
    words = [str(INSTALL), "install", str(tmp_path / "p"), str(tmp_path / "etc")]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=env)
    ours = tmp_path / "p/bin/nvidia-container-runtime"
    line = f"nvhook: `{theirs}/nvidia-container-runtime` is found before `{ours}`: remove it, or see `nvhook doctor`"
    assert line in done.stderr.splitlines()


# In the place of a command: the installation ends, by SIGKILL, when it is called for the `$AT`th time.
_LAST = """\
#!/bin/sh
echo >>"$COUNT"
[ "$(wc -l <"$COUNT")" -ne "$AT" ] || kill -9 0
exec /bin/{name} "$@"
"""


@pytest.fixture
def break_off(tmp_path: Path) -> Callable[[int], bool]:
    """An installation into `tmp_path`/p that ends before its nth `mv` or `rm`; whether it had so many."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name in ("mv", "rm"):
        (commands / name).write_text(_LAST.format(name=name))
        (commands / name).chmod(0o755)

    def install_until(step: int) -> bool:
        (tmp_path / "count").write_text("")
        env = {"PATH": f"{commands}:{os.environ['PATH']}", "COUNT": str(tmp_path / "count"), "AT": str(step)}
        words = [str(INSTALL), "install", str(tmp_path / "p"), str(tmp_path / "p/etc")]
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=False, start_new_session=True)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode != 0

    return install_until


def test_installation_over_another_that_is_broken_off(tmp_path: Path, break_off: Callable[[int], bool]) -> None:
    """At each of its steps, one after the other: what is there works, and so does the next installation."""
    words = (tmp_path / "p", tmp_path / "p/etc")
    install("install", *words)
    (tmp_path / "p/etc/nvidia-container-runtime/config.toml").unlink()
    step = 1
    while break_off(step):
        assert _works(tmp_path), step
        step += 1
    assert step > 12
    assert _works(tmp_path)
    assert sorted(path.name for path in (tmp_path / "p/lib").iterdir()) == ["nvhook"]
    install("uninstall", *words)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("step", [1, 4, 6, 12])
def test_first_installation_that_is_broken_off(tmp_path: Path, break_off: Callable[[int], bool], step: int) -> None:
    """It can be taken away as it is."""
    assert break_off(step)
    install("uninstall", tmp_path / "p", tmp_path / "p/etc")
    assert not (tmp_path / "p").exists()


def test_file_system_that_cannot_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with an old kernel: Python, asked for that alone, fails."""
    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\ncase $* in *renameat2*) exit 1 ;; esac\nexec /usr/bin/python3 "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("PYTHON", str(python))
    for _ in range(2):
        install("install", tmp_path / "p", tmp_path / "etc")
        assert _works(tmp_path)
        assert sorted(path.name for path in (tmp_path / "p/lib").iterdir()) == ["nvhook"]


def _works(place: Path) -> bool:
    commands = [[str(place / "p/bin" / name), "--version"] for name in ("nvhook", "nvidia-container-runtime-hook")]
    return all(subprocess.run(words, capture_output=True, check=False).returncode == 0 for words in commands)


# Another installation beside it


@pytest.fixture(scope="module")
def few_packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment for an installation with the packages that it looks for alone: a second one is made soon."""
    place = tmp_path_factory.mktemp("packages")
    for name in ("pynvml.py", "shtab"):
        (source,) = [path for path in (REPOSITORY / "build/packages").iterdir() if path.name in (name, f"{name}.py")]
        shutil.copytree(source, place / name) if source.is_dir() else shutil.copy(source, place)
    return {**os.environ, "NVHOOK_PACKAGES": str(place)}


class Pair:
    """Two installations that read one config.toml, `ours` and `theirs`; whether a run said anything is in `said`."""

    def __init__(self, place: Path, env: dict[str, str]) -> None:
        self.place = place
        self.ours = place / "ours"
        self.theirs = place / "theirs"
        self.etc = place / "etc"
        self.config = self.etc / "nvidia-container-runtime/config.toml"
        self.env = env
        self.said = ""

    def run(self, action: str, prefix: Path | str, *, status: int = 0) -> None:
        words = [str(INSTALL), action, str(prefix), str(self.etc)]
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, check=False)
        self.said = done.stderr
        assert done.returncode == status, done.stderr

    def both(self) -> Pair:
        for prefix in (self.ours, self.theirs):
            self.run("install", prefix)
        return self

    def works(self, prefix: Path) -> bool:
        done = subprocess.run([str(prefix / "bin/nvhook"), "--version"], capture_output=True, check=False)
        return done.returncode == 0


@pytest.fixture
def pair(tmp_path: Path, few_packages: dict[str, str]) -> Pair:
    return Pair(tmp_path, few_packages)


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_uninstall_leaves_another_installation_as_it_is(pair: Pair, first: str) -> None:
    """Whichever made the directories and the configuration that they share; the last one takes those away."""
    pair.both()
    gone, kept = (pair.ours, pair.theirs) if first == "ours" else (pair.theirs, pair.ours)
    before = tree(kept)
    pair.run("uninstall", gone)
    assert not gone.exists()
    after = tree(kept)
    note = f"{kept}/lib/nvhook/made-directories"  # has the directories that are left to it
    assert {**before, note: after[note]} == after
    assert pair.config.exists()
    assert pair.works(kept)
    pair.run("uninstall", kept)
    assert list(pair.place.iterdir()) == []


def test_uninstall_keeps_what_the_administrator_changed(pair: Pair) -> None:
    pair.both()
    pair.config.write_text("disable-require = true\n")
    (pair.ours / "bin/nvhook").unlink()
    (pair.ours / "bin/nvhook").symlink_to(pair.theirs / "bin/nvhook")
    (pair.ours / "bin/nvidia-docker").write_text("#!/bin/sh\n# of our own\n")
    hook = next((pair.ours / "share/containers/oci/hooks.d").iterdir())
    hook.write_text(hook.read_text().replace(str(pair.ours), str(pair.theirs)))
    pair.run("uninstall", pair.ours)
    left = sorted(str(path.relative_to(pair.ours)) for path in pair.ours.rglob("*") if not path.is_dir())
    assert left == ["bin/nvhook", "bin/nvidia-docker", f"share/containers/oci/hooks.d/{hook.name}"]
    assert pair.works(pair.ours)
    pair.run("uninstall", pair.theirs)
    assert pair.config.read_text() == "disable-require = true\n"


@pytest.mark.parametrize("state", ["nothing-of-ours", "through-a-link", "library-is-a-link", "package", "other-name"])
def test_uninstall_of_what_is_not_installed_there(pair: Pair, state: str) -> None:
    """Commands of the same names, or the files of another prefix that a link leads to, are not ours."""
    pair.run("install", pair.theirs)
    prefix = pair.ours
    if state == "nothing-of-ours":
        for path in ("bin/nvidia-container-runtime", "share/man/man1/nvhook.1", "share/containers/oci/hooks.d/a.json"):
            (prefix / path).parent.mkdir(parents=True, exist_ok=True)
            (prefix / path).write_text("NVIDIA's\n")
    elif state == "through-a-link":
        prefix.symlink_to(pair.theirs)
    elif state == "library-is-a-link":
        (prefix / "lib").mkdir(parents=True)
        (prefix / "lib/nvhook").symlink_to(pair.theirs / "lib/nvhook")
    elif state == "package":
        prefix = pair.theirs
        (prefix / "lib/nvhook/steps.sh").touch()
    elif state == "other-name":
        prefix = pair.place / "their"
    before = tree(pair.place)
    pair.run("uninstall", prefix, status=1 if state == "package" else 0)
    assert before == tree(pair.place)
    assert ("is a package's" in pair.said) == (state == "package")


def test_uninstall_of_a_prefix_that_is_written_otherwise(pair: Pair) -> None:
    pair.run("install", pair.ours)
    pair.run("uninstall", f"{pair.place}//ours/")
    assert list(pair.place.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "status"), [(["theirs"], 0), (["ours"], 1), (["theirs", "ours"], 1), ([], 1)], ids=str
)
def test_uninstall_while_an_engine_names_another_installation(pair: Pair, names: list[str], status: int) -> None:
    """`theirs` begins like `their`, whose notes these are not."""
    pair.both()
    notes = pair.config.parent / "configured"
    notes.mkdir()
    programs = [str(pair.place / name / "bin/nvidia-container-runtime") for name in names]
    note = notes / "daemon.json.0123456789ab"
    note.write_text(json.dumps({"path": "/etc/docker/daemon.json", "before": None, "settings": [[["x"], programs]]}))
    pair.run("uninstall", pair.ours, status=status)
    assert note.exists()
    assert ("`nvhook configure ENGINE --remove`" in pair.said) == (status == 1)
    assert pair.ours.exists() == (status == 1)


def test_uninstall_tells_of_cdi_files_that_name_the_hook(tmp_path: Path, few_packages: dict[str, str]) -> None:
    for action in ("install", "uninstall"):
        (tmp_path / "etc/cdi").mkdir(parents=True, exist_ok=True)
        for name in ("/opt/x", "/opt/y", "/srv/opt/x"):
            text = json.dumps({"path": f"{name}/bin/nvidia-container-runtime-hook"})
            (tmp_path / f"etc/cdi/{name.replace('/', '_')}.json").write_text(text)
        words = [str(INSTALL), action, "/opt/x", "/etc", str(tmp_path)]
        said = subprocess.run(words, env=few_packages, capture_output=True, text=True, check=True).stderr
    (line,) = said.splitlines()
    assert line.startswith(f"install: `{tmp_path}/etc/cdi/_opt_x.json` names the hook that is gone: ")
    assert len(list((tmp_path / "etc/cdi").iterdir())) == 3


# What is below /run/nvhook


@pytest.fixture
def state() -> Iterator[Path]:
    """A state directory there, which only a test has."""
    Path("/run/nvhook").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="test-", dir="/run/nvhook") as name:
        yield Path(name)


def _start(pair: Pair, prefix: Path, shop: Workshop, config: Path) -> Bundle:
    """A container that runs until it is deleted, started by the installation at `prefix`."""
    bundle = shop.bundle().write(["/bin/sleep", "600"], {"NVIDIA_VISIBLE_DEVICES": "all"})
    done = bundle.call(
        config,
        *("run", "--detach", "--bundle", str(bundle.directory), bundle.id),
        wrapper=prefix / "bin/nvidia-container-runtime",
        output=pair.place / f"output-{bundle.id}",
    )
    assert done.returncode == 0, (pair.place / f"output-{bundle.id}").read_text()
    return bundle


@pytest.mark.root
def test_containers_of_another_installation(pair: Pair, shop: Workshop, state: Path) -> None:
    """What is noted of one is there when it ends, and the process that waits for the next one goes on."""
    pair.both()
    config = configure(shop.simhost("a100x2"), pair.place / "config.toml", state)
    bundle = _start(pair, pair.theirs, shop, config)
    ours = _start(pair, pair.ours, shop, config)
    try:
        waiting = {prefix: _server(prefix) for prefix in (pair.ours, pair.theirs)}
        before = tree(state)
        pair.run("uninstall", pair.ours)
        assert before == tree(state)
        assert _ended(waiting[pair.ours])
        assert not server_of(pair.ours).exists()
        assert _server(pair.theirs) == waiting[pair.theirs]
        assert not _ended(waiting[pair.theirs], seconds=0)
        assert (bundle.rootfs / "usr/bin/nvidia-smi").exists()
        bundle.delete()
        assert not (bundle.rootfs / "usr/bin/nvidia-smi").exists()
        result = (
            shop.bundle()
            .write(["/usr/bin/nvidia-smi", "-L"], {"NVIDIA_VISIBLE_DEVICES": "0"})
            .run(config, wrapper=pair.theirs / "bin/nvidia-container-runtime")
        )
        assert result.stdout.count("GPU ") == 1, result.stderr
    finally:
        for each in (bundle, ours):
            each.delete()
        pair.run("uninstall", pair.theirs)


def _server(prefix: Path) -> int:
    """That installation's server; it needs a moment to load its modules."""
    path = server_of(prefix) / "pid"
    for _ in range(600):
        if path.exists() and path.read_text():
            return int(path.read_text())
        time.sleep(0.1)
    raise AssertionError("there is none")


def _ended(pid: int, *, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while True:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.05)


def test_each_prefix_has_a_server_of_its_own() -> None:
    """/opt/a-b and /opt/a/b, and long ones: who ends one ends no other's."""
    prefixes = ["/opt/a/b", "/opt/a-b", "/opt/a_b", "/opt/a", "/opt/" + "x" * 90, "/opt/" + "x" * 91]
    directories = {server_of(Path(prefix)) for prefix in prefixes}
    assert len(directories) == len(prefixes)
    assert all(len(str(directory / "child-4194304")) <= 107 for directory in directories)  # of a socket's path


def test_notes_of_containers_are_never_taken_away(tmp_path: Path) -> None:
    """Not by a server's end, whoever they are of, nor an inventory that another installation reads."""
    for path in ("containers/abc", "server~opt~b"):
        (tmp_path / "run" / path).mkdir(parents=True)
    (tmp_path / "run/inventory.json").touch()
    (tmp_path / "run/server~opt~a").mkdir()
    before = tree(tmp_path / "run")
    _steps(f"forget_server {tmp_path}/run/server~opt~a")
    del before[f"{tmp_path}/run/server~opt~a"]
    assert before == tree(tmp_path / "run")


def _steps(command: str) -> str:
    """A function of packaging/steps.sh, as a package's script calls it."""
    script = f". {REPOSITORY}/packaging/steps.sh; {command}"
    return subprocess.run(["sh", "-euc", script], check=True, capture_output=True, text=True).stdout


def test_package_tells_the_notes_of_another_installation_from_its_own(tmp_path: Path) -> None:
    directory = tmp_path / "etc/nvidia-container-runtime"
    (directory / "installations").mkdir(parents=True)
    (directory / "installations/~usr~local").write_text("/usr/local\n")
    (tmp_path / "usr/local/lib/nvhook").mkdir(parents=True)
    for program, is_of_others in (("/usr/local/bin", "yes"), ("/usr/bin", "no"), ("/opt/gone/bin", "no")):
        note = tmp_path / "note"
        note.write_text(json.dumps({"settings": [[["path"], f"{program}/nvidia-container-runtime"]]}))
        words = f"is_note_of_others {note} {directory} /usr {tmp_path} && echo yes || echo no"
        assert _steps(words) == f"{is_of_others}\n"


# An uninstallation that is broken off


def test_uninstallation_that_is_broken_off(pair: Pair, tmp_path: Path) -> None:
    """Before each of its steps; done again, it leaves nothing, and the other installation as it was."""
    pair.both()
    saved = tmp_path / "saved"
    saved.mkdir()
    names = [path.name for path in tmp_path.iterdir() if path != saved]
    for name in names:
        subprocess.run(["cp", "-a", str(tmp_path / name), str(saved)], check=True)
    commands = tmp_path / "commands"
    commands.mkdir()
    for name in ("mv", "rm", "rmdir", "find"):
        where = shutil.which(name)
        (commands / name).write_text(_LAST.format(name=name).replace(f"/bin/{name}", str(where)))
        (commands / name).chmod(0o755)
    expected = tree(pair.theirs)
    step, is_broken_off = 1, True
    while is_broken_off:
        for name in names:
            shutil.rmtree(tmp_path / name, ignore_errors=True)
            subprocess.run(["cp", "-a", str(saved / name), str(tmp_path)], check=True)
        (tmp_path / "count").write_text("")
        env = {"PATH": f"{commands}:{os.environ['PATH']}", "COUNT": str(tmp_path / "count"), "AT": str(step)}
        words = [str(INSTALL), "uninstall", str(pair.ours), str(pair.etc)]
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=False, start_new_session=True)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        is_broken_off = done.returncode != 0
        pair.run("uninstall", pair.ours)
        left = [path for path in pair.ours.rglob("*") if not path.is_dir()]
        assert left == [], step
        after = tree(pair.theirs)
        note = f"{pair.theirs}/lib/nvhook/made-directories"
        assert {**expected, note: after[note]} == after, step
        step += 1
    assert step > 20
    pair.run("uninstall", pair.theirs)
