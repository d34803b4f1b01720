# SPDX-License-Identifier: Apache-2.0
"""scripts/install: what it puts where, that it works for any caller, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from elftools.elf.elffile import ELFFile

from containers import COMPILE, REPOSITORY

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
