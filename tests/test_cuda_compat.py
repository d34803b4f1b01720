# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nvhook import cli
from nvhook.container import cuda_compat
from nvhook.linux import kernel
from nvhook.linux.root import DIRECTORY, Root
from nvhook.request import config

COMPAT = "usr/local/cuda/compat"
HOST = "550.163.01"


def _never() -> set[str]:
    raise AssertionError("brands are asked for where they do not matter")


def _find(
    rootfs: Path,
    *,
    capabilities: str = "compute",
    brands: Callable[[], set[str]] = lambda: {"tesla"},
    warnings: list[str] | None = None,
    settings: Path = Path("/nonexistent"),
    driver: str = HOST,
) -> str:
    root = Root(os.open(rootfs, DIRECTORY))
    said: list[str] = []
    try:
        return cuda_compat.find(config.load(str(settings)), tuple(capabilities.split()), root, driver, brands, said)
    finally:
        os.close(root.fd)
        assert said == (warnings or [])


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    (tmp_path / "root" / COMPAT).mkdir(parents=True)
    return tmp_path / "root"


def _fill(rootfs: Path, names: str) -> None:
    for name in ("libcuda.so.1", *names.split()):
        (rootfs / COMPAT / name).touch()


@pytest.mark.parametrize(
    "names",
    [
        pytest.param("libcuda.so libcuda.so.560.35.05 libnvidia-nvvm.so.4", id="a-real-one"),
        pytest.param("libcuda.so.551.0", id="next-major"),
        pytest.param("libcuda.so.1000.1", id="by-number-not-by-text"),
        pytest.param("libcuda.so.560.35.05 libcuda.so.570.1.2", id="several"),
        pytest.param("libcuda.so.560.35.05 libcuda.so.540.1.2.old", id="another-file"),
        pytest.param(f"libcuda.so.{'9' * 200}.1", id="huge-number"),
    ],
)
def test_find_newer(rootfs: Path, names: str) -> None:
    _fill(rootfs, names)
    assert _find(rootfs) == f"/{COMPAT}"


@pytest.mark.parametrize(
    "names",
    [
        pytest.param("", id="empty"),
        pytest.param("libcuda.so.550.999.99", id="same-major"),
        pytest.param("libcuda.so.99.1", id="by-number-not-by-text"),
        pytest.param("libcuda.so.560.35.05 libcuda.so.535.1.2", id="one-of-several-is-older"),
        pytest.param("libcuda.so libcuda.so.999", id="no-version"),
        pytest.param("libcuda.so.x.y libcuda.so.-9.1 libcuda.so.+9.1 libcuda.so..9 libcuda.so.1e9.1", id="no-number"),
        pytest.param("libcuda.so.560.35.05x libnvidia-ml.so.560.35.05", id="other-libraries"),
    ],
)
def test_find_not_newer(rootfs: Path, names: str) -> None:
    _fill(rootfs, names)
    assert _find(rootfs, brands=_never) == ""


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ("compute", f"/{COMPAT}"),
        ("video", f"/{COMPAT}"),
        ("compute utility", f"/{COMPAT}"),
        ("utility", ""),
        ("display graphics ngx compat32", ""),
        ("", ""),
    ],
)
def test_find_for_who_computes(rootfs: Path, capabilities: str, expected: str) -> None:
    _fill(rootfs, "libcuda.so.560.35.05")
    assert _find(rootfs, capabilities=capabilities) == expected


@pytest.mark.parametrize(
    ("brands", "unable"),
    [
        pytest.param({"tesla"}, "", id="data-centre"),
        pytest.param({"nvidia", "a100-sxm4-40gb", "grid", "quadrortx"}, "", id="others"),
        pytest.param(set(), "", id="no-gpu"),
        pytest.param({"", "unknown"}, "", id="unknown-is-tried"),
        pytest.param({"geforce"}, "geforce", id="geforce"),
        pytest.param({"geforcertx"}, "geforcertx", id="geforce-rtx"),
        pytest.param({"titanrtx"}, "titanrtx", id="titan"),
        pytest.param({"tesla", "geforce"}, "geforce", id="one-of-two"),
    ],
)
def test_find_by_brand(rootfs: Path, brands: set[str], unable: str) -> None:
    _fill(rootfs, "libcuda.so.560.35.05")
    said = f"`/{COMPAT}` of the image is not used: {unable} GPUs do not support CUDA forward compatibility"
    found = _find(rootfs, brands=lambda: brands, warnings=[said] if unable else [])
    assert found == ("" if unable else f"/{COMPAT}")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param('[nvidia-container-runtime.modes.legacy]\ncuda-compat-mode = "disabled"', id="mode"),
        pytest.param("[features]\ndisable-cuda-compat-lib-hook = true", id="feature"),
    ],
)
def test_find_disabled(rootfs: Path, tmp_path: Path, text: str) -> None:
    _fill(rootfs, "libcuda.so.560.35.05")
    settings = tmp_path / "config.toml"
    settings.write_text(text)
    assert _find(rootfs, settings=settings, brands=_never) == ""


def _absent(*_: object, **__: object) -> int:
    raise OSError(38, "Function not implemented")


@pytest.mark.parametrize("openat2", [True, False], ids=["openat2", "by-hand"])
@pytest.mark.parametrize("target", ["/etc/alternatives/cuda", "../../etc/alternatives/cuda", "../../../../etc/cuda"])
def test_find_through_links(rootfs: Path, monkeypatch: pytest.MonkeyPatch, target: str, openat2: bool) -> None:
    """As Debian's alternatives have it; what comes back has no link in it, and is below the root."""
    if not openat2:
        monkeypatch.setattr(kernel, "openat2", _absent)
    _fill(rootfs, "libcuda.so.560.35.05")
    (rootfs / "usr/local/cuda").rename(rootfs / "usr/local/cuda-12.6")
    (rootfs / "etc/alternatives").mkdir(parents=True)
    (rootfs / "usr/local/cuda").symlink_to(target)
    (rootfs / "etc/alternatives/cuda").symlink_to("/usr/local/cuda-12.6")
    (rootfs / "etc/cuda").symlink_to("alternatives/cuda")
    assert _find(rootfs) == "/usr/local/cuda-12.6/compat"


@pytest.mark.parametrize("target", ["{outside}", "../../../../../../../../../..{outside}", "/proc/self/root{outside}"])
def test_find_nothing_outside(rootfs: Path, tmp_path: Path, target: str) -> None:
    outside = tmp_path / "outside"
    (outside / "compat").mkdir(parents=True)
    for name in ("libcuda.so.1", "libcuda.so.999.1"):
        (outside / "compat" / name).touch()
    (rootfs / COMPAT).rmdir()
    (rootfs / "usr/local/cuda").rmdir()
    (rootfs / "usr/local/cuda").symlink_to(target.format(outside=outside))
    assert _find(rootfs) == ""


@pytest.mark.parametrize("what", ["nothing", "file", "fifo", "loop"])
def test_find_no_directory(rootfs: Path, what: str) -> None:
    path = rootfs / COMPAT
    path.rmdir()
    if what == "file":
        path.touch()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "loop":
        path.symlink_to("compat")
    assert _find(rootfs) == ""


@pytest.mark.parametrize("what", ["fifo", "link-out", "dangling", "directory"])
def test_find_opens_nothing_in_it(rootfs: Path, what: str) -> None:
    """A name is all that is looked at; ldconfig takes files alone, in the container's own tree."""
    _fill(rootfs, "")
    path = rootfs / COMPAT / "libcuda.so.999.1"
    if what == "fifo":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if what == "link-out" else "nowhere")
    assert _find(rootfs) == f"/{COMPAT}"


def test_find_without_the_link(rootfs: Path) -> None:
    (rootfs / COMPAT / "libcuda.so.560.35.05").touch()
    assert _find(rootfs, brands=_never) == ""


def test_find_reads_so_many_names_and_no_more(rootfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fill(rootfs, "libcuda.so.560.35.05")
    monkeypatch.setattr(cuda_compat, "_MAX_NAMES", 2)
    assert _find(rootfs) == f"/{COMPAT}"
    monkeypatch.setattr(cuda_compat, "_MAX_NAMES", 1)
    assert _find(rootfs) == ""


@pytest.mark.root
@pytest.mark.parametrize("name", [b"cuda\n\x1b[31m", b"cuda-\xff"], ids=["escapes", "no-utf-8"])
def test_find_name_that_would_play_with_a_terminal(
    rootfs: Path, simhost: Callable[[str], Path], capfd: pytest.CaptureFixture[str], name: bytes
) -> None:
    _fill(rootfs, "libcuda.so.560.35.05")
    (rootfs / "usr/local/cuda").rename(os.fsdecode(os.fsencode(rootfs / "usr/local/") + b"/" + name))
    os.symlink(name, os.fsencode(rootfs / "usr/local/cuda"))
    assert _find(rootfs) == os.fsdecode(b"/usr/local/" + name + b"/compat")
    words = ["plan", "--env", "NVIDIA_VISIBLE_DEVICES=all", "--rootfs", str(rootfs)]
    for form in ([], ["--json"]):
        assert cli.main([*words, *form], str(simhost("a100x2") / "config.toml")) == 0
        shown = capfd.readouterr()
        assert shown.err == ""
        assert shown.out.isascii()
        assert "\x1b" not in shown.out
        assert shown.out.count("compat") == 1


def test_find_names_of_the_root_itself(tmp_path: Path) -> None:
    """`nvhook plan --rootfs /`: the paths begin alike, and one of them is all of it."""
    root = Root(os.open("/", DIRECTORY))
    here = os.open(tmp_path, os.O_RDONLY)
    assert cuda_compat._path(root, here) == str(tmp_path)
    os.close(here)
    os.close(root.fd)


def test_find_for_a_driver_without_a_number(rootfs: Path) -> None:
    """On WSL 2 it has the name of its store."""
    for name in ("libcuda.so.560.35.05", "libcuda.so.1"):
        (rootfs / COMPAT / name).touch()
    assert _find(rootfs) == f"/{COMPAT}"
    assert _find(rootfs, driver="nv_dispi.inf_amd64", brands=_never) == ""
