# SPDX-License-Identifier: Apache-2.0
"""The directories in which root keeps what it believes later: how they are made, and which are refused."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvhook.linux import trusted_dir

pytestmark = pytest.mark.root


@pytest.fixture(params=[0, 0o077, 0o777], ids=lambda mask: f"umask-{mask:03o}")
def umask(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    tmp_path.mkdir(exist_ok=True)  # before the umask changes
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("umask")
def test_every_level_has_the_mode_that_was_meant(tmp_path: Path) -> None:
    """An engine's umask may be anything. os.makedirs makes parents with 0777 less the umask and ignores its `mode`."""
    state = tmp_path / "a/b/nvhook"
    os.close(trusted_dir.open_directory(str(state), "containers", "name"))
    levels = [state.parent.parent, state.parent, state, state / "containers", state / "containers/name"]
    assert [_mode(path) for path in levels] == [0o755, 0o755, 0o755, 0o700, 0o700]


def test_what_is_there_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "nvhook/containers").mkdir(parents=True, mode=0o750)
    fd = trusted_dir.open_directory(str(tmp_path / "nvhook"), "containers")
    assert os.path.samestat(os.fstat(fd), (tmp_path / "nvhook/containers").stat())
    os.close(fd)


def test_nothing_is_made_where_that_is_not_wanted(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        trusted_dir.open_directory(str(tmp_path / "nvhook"), "containers", make=False)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("level", ["above", "above/nvhook", "above/nvhook/containers", "above/nvhook/containers/name"])
@pytest.mark.parametrize(
    ("owner", "mode"),
    [
        pytest.param(1000, 0o700, id="another-owner"),
        pytest.param(0, 0o777, id="everybody"),
        pytest.param(0, 0o772, id="others"),
        pytest.param(0, 0o770, id="group"),
    ],
)
def test_level_that_others_may_write_is_refused(tmp_path: Path, level: str, owner: int, mode: int) -> None:
    """Whoever can write there puts another directory in the place of the next one."""
    (tmp_path / "above/nvhook/containers/name").mkdir(parents=True)
    os.chown(tmp_path / level, owner, owner)
    (tmp_path / level).chmod(mode)
    path = tmp_path / level
    wanted = (
        rf"others may write to `{path}` \(owner {owner}, mode {mode:04o}\); `chown root: {path} && chmod go-w {path}`"
    )
    with pytest.raises(PermissionError, match=wanted):
        trusted_dir.open_directory(str(tmp_path / "above/nvhook"), "containers", "name")


@pytest.mark.parametrize("level", ["above", "above/nvhook", "above/nvhook/containers"])
def test_sticky_directory_will_do_above_alone(tmp_path: Path, level: str) -> None:
    """In /tmp nobody renames what is ours, but anybody makes what is not there yet."""
    (tmp_path / "above/nvhook/containers").mkdir(parents=True)
    (tmp_path / level).chmod(0o1777)
    if level == "above":
        os.close(trusted_dir.open_directory(str(tmp_path / "above/nvhook"), "containers"))
        return
    with pytest.raises(PermissionError, match="others may write to"):
        trusted_dir.open_directory(str(tmp_path / "above/nvhook"), "containers")


def test_link_to_a_directory(tmp_path: Path) -> None:
    """/var/run is one."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    os.close(trusted_dir.open_directory(str(tmp_path / "link/nvhook")))
    assert (tmp_path / "real/nvhook").is_dir()


def test_link_leads_to_a_directory_of_another_user(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", 1000, 1000)
    (tmp_path / "nvhook").symlink_to("theirs")
    with pytest.raises(PermissionError, match=f"others may write to `{tmp_path}/theirs`"):
        trusted_dir.open_directory(str(tmp_path / "nvhook"))


@pytest.mark.parametrize("name", ["containers", "name"])
@pytest.mark.parametrize("kind", ["link", "dangling", "file", "fifo"])
def test_something_else_in_the_place(tmp_path: Path, name: str, kind: str) -> None:
    """A link there is nobody's configuration."""
    place = tmp_path / "nvhook" / ("containers" if name == "containers" else "containers/name")
    place.parent.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    if kind == "file":
        place.touch()
    elif kind == "fifo":
        os.mkfifo(place)
    else:
        place.symlink_to(tmp_path / ("elsewhere" if kind == "link" else "nowhere"))
    with pytest.raises(NotADirectoryError):
        trusted_dir.open_directory(str(tmp_path / "nvhook"), "containers", "name")
    assert os.listdir(tmp_path / "elsewhere") == []
