# SPDX-License-Identifier: Apache-2.0
"""The host's ldconfig over a foreign tree: what it makes, and what it could do if it were not ldconfig at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from containers import make_image
from nvhook.linux import kernel, ldcache, ldconfig, seccomp
from nvhook.linux.root import DIRECTORY, Root

pytestmark = pytest.mark.root

PROGRAM = "/sbin/ldconfig.real" if os.path.exists("/sbin/ldconfig.real") else "/sbin/ldconfig"

# Stands in the place of ldconfig and tells, as its last line, what it finds itself allowed. It ends with status 1, so
# that run() raises with that line.
SPY = r"""
#include <fcntl.h>
#include <linux/capability.h>
#include <net/if.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

extern char **environ;

int main(int argc, char **argv)
{
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct sets[2];
    struct rlimit memory;
    struct stat status;
    struct if_nameindex *interface = if_nameindex();
    int bounding = 0, variables = 0, descriptors = 0, others = 0;
    if (argc > 1 && strcmp(argv[1], "-X"))
        return 2;
    syscall(SYS_capget, &header, sets);
    for (int i = 0; i < 41; i++)
        bounding += prctl(PR_CAPBSET_READ, i, 0, 0, 0) == 1;
    while (environ[variables])
        variables++;
    for (int i = 3; i < 4096; i++)
        descriptors += fcntl(i, F_GETFD) != -1;
    while (interface && interface->if_index)
        others += strcmp((interface++)->if_name, "lo") != 0;
    getrlimit(RLIMIT_AS, &memory);
    printf("uid=%d gid=%d groups=%d caps=%x/%x/%x bounding=%d nnp=%d env=%d fds=%d pid=%d interfaces=%d"
           " memory=%d canary=%d proc=%d stdin=%zd self=%d\n",
           getuid(), getgid(), getgroups(0, 0), sets[0].effective | sets[1].effective,
           sets[0].permitted | sets[1].permitted, sets[0].inheritable | sets[1].inheritable, bounding,
           prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0), variables, descriptors, getpid(), others,
           memory.rlim_cur != RLIM_INFINITY, stat(CANARY, &status), stat("/proc/1", &status),
           read(0, &status, 1), open("/proc/self/exe", O_RDWR) >= 0);
    return 1;
}
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image("debian", tmp_path_factory.mktemp("image") / "rootfs")


@pytest.fixture
def rootfs(tmp_path: Path, image: Path) -> Path:
    return Path(shutil.copytree(image, tmp_path / "rootfs", symlinks=True))


def _sealed(program: str) -> int:
    fd = os.open(program, os.O_RDONLY)
    try:
        return ldconfig.seal(fd)
    finally:
        os.close(fd)


def run(rootfs: Path, program: str, *directories: str, owner: tuple[int, int] = (0, 0)) -> str:
    """As the hook does it: in the container's mount namespace, where the tree is a mount. The error's text, if any."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        said = "the child failed"
        try:
            kernel.unshare(kernel.CLONE_NEWNS)
            kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
            kernel.mount(str(rootfs), str(rootfs), None, kernel.MS_BIND)
            os.makedirs(rootfs / "proc", exist_ok=True)
            kernel.mount("none", f"{rootfs}/proc", "proc", 0)
            ldconfig.run(_sealed(program), str(rootfs), Root(os.open(rootfs, DIRECTORY)), directories, owner)
            said = ""
        except OSError as error:
            said = str(error.strerror)
        finally:
            os.write(writing, said.encode() or b"\0")
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read().strip("\0")
    os.waitpid(child, 0)
    return said


def cached(rootfs: Path) -> dict[str, str]:
    """Name -> the path that the linker takes: the first of several."""
    entries = ldcache.parse((rootfs / "etc/ld.so.cache").read_bytes())
    return {entry.name: entry.path for entry in reversed(entries)}


def test_seal_is_a_copy_that_nobody_can_change() -> None:
    fd = _sealed(PROGRAM)
    assert Path(PROGRAM).read_bytes() == os.pread(fd, 1 << 26, 0)
    seals = kernel.F_SEAL_SEAL | kernel.F_SEAL_SHRINK | kernel.F_SEAL_GROW | kernel.F_SEAL_WRITE
    assert fcntl.fcntl(fd, kernel.F_GET_SEALS) == seals
    with pytest.raises(OSError, match="not permitted"):
        os.pwrite(fd, b"x", 0)


def test_cache_keeps_what_was_there_and_begins_with_ours(rootfs: Path) -> None:
    before = cached(rootfs)
    (rootfs / "opt/ours").mkdir(parents=True)
    shutil.copy(rootfs / "usr/lib" / f"{os.uname().machine}-linux-gnu" / "libm.so.6", rootfs / "opt/ours/libm.so.6")
    assert run(rootfs, PROGRAM, "/opt/ours") == ""
    after = cached(rootfs)
    assert after["libm.so.6"] == "/opt/ours/libm.so.6"
    assert before.keys() <= after.keys()


def test_links_of_the_image_are_left_alone(rootfs: Path) -> None:
    """Without -X ldconfig would make libm.so.6 a link to the newest library with that SONAME."""
    library = rootfs / "opt/ours"
    library.mkdir(parents=True)
    shutil.copy(rootfs / "usr/lib" / f"{os.uname().machine}-linux-gnu" / "libm.so.6", library / "libm.so.9.9")
    assert run(rootfs, PROGRAM, "/opt/ours") == ""
    assert os.listdir(library) == ["libm.so.9.9"]


@pytest.mark.parametrize("missing", ["etc/ld.so.conf", "etc/ld.so.conf.d", "etc/ld.so.cache", "usr/sbin/ldconfig"])
def test_tree_without(rootfs: Path, missing: str) -> None:
    path = rootfs / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run(rootfs, PROGRAM, f"/usr/lib/{os.uname().machine}-linux-gnu") == ""
    assert "libc.so.6" in cached(rootfs)


def test_cache_belongs_to_the_owner(rootfs: Path) -> None:
    for path in (rootfs, *rootfs.rglob("*")):
        os.chown(path, 100000, 100001, follow_symlinks=False)
    assert run(rootfs, PROGRAM, owner=(100000, 100001)) == ""
    status = (rootfs / "etc/ld.so.cache").stat()
    assert (status.st_uid, status.st_gid) == (100000, 100001)


@pytest.mark.parametrize("link", ["etc", "etc/ld.so.cache", "etc/ld.so.conf", "etc/ld.so.conf.d"])
def test_links_out_of_the_tree_lead_nowhere(rootfs: Path, tmp_path: Path, link: str) -> None:
    canary = tmp_path / "canary"
    canary.mkdir()
    (canary / "file").write_text("untouched")
    path = rootfs / link
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(canary if link.endswith(("etc", ".d")) else canary / "file")
    run(rootfs, PROGRAM, f"/usr/lib/{os.uname().machine}-linux-gnu")
    assert os.listdir(canary) == ["file"]
    assert (canary / "file").read_text() == "untouched"


@pytest.mark.parametrize("conf", ["include /proc/*/*/*/*", "include /dev/**", "/proc/self/fd", "include /pipe"])
def test_configuration_that_is_a_trap(rootfs: Path, monkeypatch: pytest.MonkeyPatch, conf: str) -> None:
    """It ends in time, with a cache or with an error."""
    monkeypatch.setattr(ldconfig, "_SECONDS", 2)
    os.mkfifo(rootfs / "pipe")
    (rootfs / "etc/ld.so.conf").write_text(conf + "\n")
    begin = time.monotonic()
    run(rootfs, PROGRAM, f"/usr/lib/{os.uname().machine}-linux-gnu")
    assert time.monotonic() - begin < 4


def test_configuration_that_is_a_fifo(rootfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ldconfig, "_SECONDS", 2)
    (rootfs / "etc/ld.so.conf").unlink()
    os.mkfifo(rootfs / "etc/ld.so.conf")
    begin = time.monotonic()
    assert run(rootfs, PROGRAM) == "not finished after 2 s"
    assert time.monotonic() - begin < 4


def test_directory_that_leads_out_of_the_tree(rootfs: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    triplet = f"{os.uname().machine}-linux-gnu"
    shutil.copy(rootfs / "usr/lib" / triplet / "libm.so.6", outside / "libm.so.6")
    (rootfs / "ours").symlink_to(outside)
    (rootfs / "up").symlink_to(f"../../../../../../../..{outside}")
    assert run(rootfs, PROGRAM, "/ours", "/up") == ""
    assert cached(rootfs)["libm.so.6"].startswith((f"/usr/lib/{triplet}/", f"/lib/{triplet}/"))
    assert os.listdir(outside) == ["libm.so.6"]


def test_directories_in_the_order_given(rootfs: Path) -> None:
    """As ldconfig itself lists them: the linker takes the first."""
    triplet = f"{os.uname().machine}-linux-gnu"
    for name in ("opt/b", "opt/a"):
        (rootfs / name).mkdir(parents=True)
        shutil.copy(rootfs / "usr/lib" / triplet / "libm.so.6", rootfs / name / "libm.so.6")
    assert run(rootfs, PROGRAM, "/opt/b", "/opt/a") == ""
    command = [PROGRAM, "-p", "-C", str(rootfs / "etc/ld.so.cache")]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    paths = [line.partition(" => ")[2] for line in lines if line.strip().startswith("libm.so.6 ")]
    assert paths[:2] == ["/opt/b/libm.so.6", "/opt/a/libm.so.6"]
    assert len(paths) == 3


@pytest.fixture(scope="module")
def spy(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(the program, a file of the host's that it looks for)."""
    place = tmp_path_factory.mktemp("spy")
    canary = place / "canary"
    canary.touch()
    (place / "spy.c").write_text(SPY)
    command = ["cc", "-static", f'-DCANARY="{canary}"', "-o", str(place / "spy"), str(place / "spy.c")]
    subprocess.run(command, check=True, capture_output=True)
    return str(place / "spy"), canary


@pytest.mark.parametrize("owner", [(0, 0), (100000, 100001)], ids=["root", "of-a-user-namespace"])
def test_program_is_confined(
    rootfs: Path, spy: tuple[str, Path], owner: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No capability, no way to one, nothing of the host: one descriptor (its own program), no network, no /proc.

    Without the filter, which would not let it look, and must not be what all of that hangs on.
    """
    monkeypatch.setattr(seccomp, "LDCONFIG", b"")
    said = run(rootfs, spy[0], owner=owner)
    facts = dict(word.split("=") for word in said.split())
    assert facts == {
        "uid": str(owner[0]),
        "gid": str(owner[1]),
        "groups": "0",
        "caps": "0/0/0",
        "bounding": "0",
        "nnp": "1",
        "env": "0",
        "fds": "0",
        "pid": "2",  # 1 is its keeper, which it cannot touch
        "interfaces": "0",
        "memory": "1",
        "canary": "-1",
        "proc": "-1",
        "stdin": "0",
        "self": "0",
    }


def test_program_that_does_not_end(rootfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ldconfig, "_SECONDS", 1)
    source = tmp_path / "forever.c"
    source.write_text(
        "#include <sys/prctl.h>\n#include <unistd.h>\n"
        "int main(void) { prctl(PR_SET_PDEATHSIG, 0); fork(); setsid();\n"
        'for (;;) { write(1, "x\\n", 2); usleep(1000); } }\n'
    )
    subprocess.run(["cc", "-static", "-o", str(tmp_path / "forever"), str(source)], check=True, capture_output=True)
    assert run(rootfs, str(tmp_path / "forever")) == "not finished after 1 s"
    end = time.monotonic() + 2  # the kernel takes a moment to end a namespace
    while _running(b"ldconfig\0-X"):
        assert time.monotonic() < end
        time.sleep(0.01)


def _running(beginning: bytes) -> list[Path]:
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended since
            if process.read_bytes().startswith(beginning):
                found.append(process)
    return found


def test_program_that_is_none(rootfs: Path, tmp_path: Path) -> None:
    program = tmp_path / "script"
    program.write_text("not a program")
    assert run(rootfs, str(program)) == "execute: Exec format error"
