# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from nvhook.linux import cgroups, kernel
from nvhook.linux.cgroups import Rule

MAJOR = 60  # kept for experiments: whoever may open such a node meets ENXIO, because there is no driver

# Text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("0::/system.slice/docker-1f.scope\n", (2, "/system.slice/docker-1f.scope"), id="v2"),
        pytest.param("5:devices:/docker/1f\n4:memory:/docker/1f\n", (1, "/docker/1f"), id="v1"),
        pytest.param("7:cpu,devices:/x\n", (1, "/x"), id="v1-mounted-together"),
        pytest.param("0::/y\n5:devices:/x\n", (1, "/x"), id="hybrid"),
        pytest.param("5:memory:/x\n1:name=systemd:/z\n0::/y\n", (2, "/y"), id="hybrid-devices-in-v2"),
        pytest.param("5:devices:/\n", (1, "/"), id="root"),
        pytest.param("0::/a:b/..c d\n", (2, "/a:b/..c d"), id="odd-name"),
    ],
)
def test_devices_cgroup_found(text: str, expected: tuple[int, str]) -> None:
    assert expected == cgroups.devices_cgroup(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "neither a `devices` controller nor a unified hierarchy", id="empty"),
        pytest.param("4:memory:/x\n1:name=devices:/x\n", "neither", id="other-controllers"),
        pytest.param("0::/../other\n", "`/../other` is outside of our cgroup namespace", id="outside"),
        pytest.param("5:devices:/..\n", "`/..` is outside of our cgroup namespace", id="parent"),
    ],
)
def test_devices_cgroup_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cgroups.devices_cgroup(text)


V1 = "30 29 0:26 / /sys/fs/cgroup/devices rw,relatime shared:9 - cgroup cgroup rw,devices\n"
V2 = "42 29 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n"
OTHER = "31 29 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n25 1 8:1 / / rw - ext4 /dev/sda rw\n"


@pytest.mark.parametrize(
    ("mountinfo", "version", "path", "expected"),
    [
        pytest.param(OTHER + V1 + V2, 1, "/x", [(30, "/sys/fs/cgroup/devices/x")], id="v1"),
        pytest.param(OTHER + V1 + V2, 2, "/x", [(42, "/sys/fs/cgroup/unified/x")], id="v2"),
        pytest.param(V2, 2, "/", [(42, "/sys/fs/cgroup/unified")], id="root"),
        pytest.param(OTHER + V2, 1, "/x", [], id="controller-not-mounted"),
        pytest.param(OTHER, 2, "/x", [], id="not-mounted"),
        pytest.param(V1.replace("rw,devices", "rw,cpu,devices"), 1, "/", [(30, "/sys/fs/cgroup/devices")], id="two"),
        pytest.param(V2.replace("/sys/fs", r"/a\040b\134c"), 2, "/x", [(42, r"/a b\c/cgroup/unified/x")], id="escape"),
        pytest.param(V2.replace(" / ", r" /a\040b "), 2, "/a b/c", [(42, "/sys/fs/cgroup/unified/c")], id="below-root"),
        pytest.param(V2.replace(" / ", " /a "), 2, "/a", [(42, "/sys/fs/cgroup/unified")], id="the-root"),
        pytest.param(V2.replace(" / ", " /a "), 2, "/ab", [], id="beside-the-root"),
        pytest.param(V2.replace(" / ", " /../a "), 2, "/a", [], id="root-outside-our-namespace"),
        pytest.param(V2.replace(" / ", " /a ") + V2, 2, "/b", [(42, "/sys/fs/cgroup/unified/b")], id="second-mount"),
    ],
)
def test_mounted_at_finds(mountinfo: str, version: int, path: str, expected: list[tuple[int, str]]) -> None:
    assert expected == cgroups.mounted_at(mountinfo, version, path)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        pytest.param("/", ["/"], id="root"),
        pytest.param("/docker/1f", ["/docker/1f"], id="no-scope"),
        pytest.param("/system.slice/docker-1f.scope", ["/system.slice/docker-1f.scope"], id="scope"),
        pytest.param("/m.slice/c.scope/container", ["/m.slice/c.scope", "/m.slice/c.scope/container"], id="crun"),
        pytest.param(
            "/outer.scope/inner.scope/x", ["/outer.scope/inner.scope", "/outer.scope/inner.scope/x"], id="two"
        ),
    ],
)
def test_up_to_scope_paths(path: str, expected: list[str]) -> None:
    assert expected == cgroups.up_to_scope(path)


@pytest.mark.parametrize(
    ("devices_list", "expected"),
    [
        pytest.param("", "rw", id="nothing"),
        pytest.param("a *:* rwm\n", "", id="everything"),
        pytest.param("c 1:3 rwm\nc 195:* rwm\n", "", id="wildcard"),
        pytest.param("c *:* m\nb *:* m\n", "rw", id="only-mknod"),
        pytest.param("c 195:7 r\n", "w", id="half"),
        pytest.param("c 195:7 r\nc 195:* wm\n", "", id="two-halves"),
        pytest.param("b 195:7 rwm\nc 195:70 rwm\nc 19:7 rwm\n", "rw", id="others"),
    ],
)
def test_uncovered_access(devices_list: str, expected: str) -> None:
    assert expected == cgroups.uncovered(devices_list, Rule("c", 195, 7, "rw"))


@pytest.mark.parametrize(
    ("kind", "major", "minor", "access"),
    [
        ("a", 1, 1, "rw"),
        ("", 1, 1, "rw"),
        ("c", -1, 1, "rw"),
        ("c", 1, 1 << 20, "rw"),
        ("c", 1, 1, ""),
        ("c", 1, 1, "rx"),
    ],
)
def test_rule_refused(kind: str, major: int, minor: int, access: str) -> None:
    with pytest.raises(ValueError, match="no device rule"):
        Rule(kind, major, minor, access)


# Programs, in the kernel's own encoding


def insn(code: int, to: int = 0, source: int = 0, offset: int = 0, constant: int = 0) -> bytes:
    return struct.pack("=BBhi", code, source << 4 | to, offset, constant)


EXIT = insn(0x95)
REFUSE = insn(0xB7, 0) + EXIT
# As runtimes write it: split the request, compare, answer. Here for /dev/null alone.
ONLY_NULL = (
    insn(0x61, 2, 1, 0)  # r2 = access_type
    + insn(0x54, 2, constant=0xFFFF)
    + insn(0x61, 4, 1, 4)
    + insn(0x61, 5, 1, 8)
    + insn(0x55, 2, offset=4, constant=2)
    + insn(0x55, 4, offset=3, constant=1)
    + insn(0x55, 5, offset=2, constant=3)
    + insn(0xB7, 0, constant=1)
    + EXIT
    + REFUSE
)
# The same with a load of half a word, a constant of two slots, the stack, code that is never reached, a backward jump.
ONLY_NULL_ODD = (
    insn(0x69, 2, 1, 0)  # r2 = the low half of access_type
    + insn(0x18, 6, constant=3) + insn(0)  # r6 = 3
    + insn(0x63, 10, 6, -4)  # stack = r6
    + insn(0x55, 6, offset=2, constant=99)  # always jumps: the kernel drops the next two
    + insn(0xB7, 0, constant=1)
    + EXIT
    + insn(0xB7, 7, constant=3)
    + insn(0x17, 7, constant=1)  # r7 -= 1
    + insn(0x55, 7, offset=-2, constant=0)
    + insn(0x61, 3, 10, -4)
    + insn(0x61, 4, 1, 4)
    + insn(0x61, 5, 1, 8)
    + insn(0x55, 2, offset=4, constant=2)
    + insn(0x55, 4, offset=3, constant=1)
    + insn(0x5D, 5, 3, offset=2)
    + insn(0xB7, 0, constant=1)
    + EXIT
    + REFUSE
)  # fmt: skip
CALLS = insn(0x85, constant=15) + REFUSE  # bpf_get_current_uid_gid()


# What the kernel makes of "r0 = 5; if r2 != 7 goto +1" where constants are hidden, with `scratch` as its R11
def blinded(scratch: int) -> bytes:
    return (
        insn(0xB7, scratch, constant=0x1234 ^ 5)
        + insn(0xA7, scratch, constant=0x1234)
        + insn(0xBF, 0, scratch)
        + insn(0xB7, scratch, constant=0x4321 ^ 7)
        + insn(0xA7, scratch, constant=0x4321)
        + insn(0x5D, 2, scratch, offset=1)
    )


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        pytest.param(ONLY_NULL, ONLY_NULL, id="plain"),
        pytest.param(ONLY_NULL_ODD, ONLY_NULL_ODD, id="odd"),
        pytest.param(blinded(11), blinded(9), id="blinded"),
        pytest.param(insn(0xAF, 0, 0) + EXIT, REFUSE, id="blinded-zero"),
        pytest.param(blinded(11) + insn(0xBF, 9, 3), blinded(8) + insn(0xBF, 9, 3), id="blinded-r9-in-use"),
    ],
)
def test_reloadable_form(program: bytes, expected: bytes) -> None:
    assert expected == cgroups.reloadable(program)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        pytest.param(insn(0x18, 1, 1, constant=7) + insn(0), "it refers to a BPF map", id="map"),
        pytest.param(CALLS, "it calls functions", id="call"),
        pytest.param(b"".join(insn(0xBF, n, n) for n in range(12)), "it uses every register", id="no-register"),
    ],
)
def test_reloadable_refused(program: bytes, message: str) -> None:
    with pytest.raises(OSError, match=message):
        cgroups.reloadable(program)


# In the kernel


def require(condition: object, reason: str) -> None:
    if condition:
        return
    if "CI" in os.environ:
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def root() -> None:
    require(os.geteuid() == 0, "needs root")


def in_own_mounts(work: Callable[[], None]) -> None:
    """Run `work` in a child with mounts of its own, which vanish with it."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            kernel.unshare(kernel.CLONE_NEWNS)
            kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
            work()
            status = 0
        except BaseException:
            os.write(writer, traceback.format_exc().encode()[-60000:])
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, errors="replace") as file:
        said = file.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, said


def errno_in(cgroup: Path, action: Callable[[], object]) -> int:
    """What a process in the cgroup gets for `action`: 0 or an errno."""
    pid = os.fork()
    if pid == 0:
        status = 255
        try:
            (cgroup / "cgroup.procs").write_text(str(os.getpid()))
            action()
            status = 0
        except OSError as error:
            status = error.errno or 255
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def remove(cgroup: Path) -> None:
    for _ in range(100):  # the last process leaves a moment after it was waited for
        try:
            cgroup.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.01)


class Place:
    """A cgroup, nodes to try it with, and a stand-in for the /proc directory of a process in the cgroup."""

    def __init__(self, cgroup: Path, directory: Path, line: str) -> None:
        self.cgroup = cgroup
        self.directory = directory
        self.fd = os.open(cgroup, os.O_RDONLY)
        kernel.mount("tmpfs", str(directory), "tmpfs", 0)  # /tmp may be nodev
        for minor in range(3):
            os.mknod(directory / str(minor), stat.S_IFCHR | 0o666, os.makedev(MAJOR, minor))
        (directory / "cgroup").write_text(line)
        self.proc = os.open(directory, os.O_RDONLY)

    def allow(self, *rules: Rule) -> Callable[[], None]:
        return cgroups.allow(self.proc, list(rules))

    def open(self, minor: int, flags: int = os.O_RDWR) -> int:
        return errno_in(self.cgroup, lambda: os.open(self.directory / str(minor), flags))

    def mknod(self, minor: int) -> int:
        node = self.directory / "new"
        mode = stat.S_IFCHR | 0o600
        result = errno_in(self.cgroup, lambda: os.mknod(node, mode, os.makedev(MAJOR, minor)))
        node.unlink(missing_ok=True)
        return result

    def null(self) -> int:
        return errno_in(self.cgroup, lambda: os.open("/dev/null", os.O_RDWR))


def with_v2(tmp_path: Path, work: Callable[[Place], None]) -> None:
    """`work` with a new cgroup of version 2, whatever else the machine has mounted."""

    def run() -> None:
        mount = tmp_path / "cgroup 2"
        nodes = tmp_path / "nodes"
        mount.mkdir()
        nodes.mkdir()
        for _, directory in cgroups.mounted_at(Path("/proc/self/mountinfo").read_text(), 2, "/"):
            kernel.umount2(directory, kernel.MNT_DETACH)
        kernel.mount("cgroup2", str(mount), "cgroup2", 0)
        cgroup = mount / f"nvhook-test-{os.getpid()}"
        cgroup.mkdir()
        try:
            work(Place(cgroup, nodes, f"0::/{cgroup.name}\n"))
        finally:
            remove(cgroup)

    require("\tcgroup2\n" in Path("/proc/filesystems").read_text(), "this kernel has no cgroup version 2")
    in_own_mounts(run)


def with_v1(tmp_path: Path, work: Callable[[Place], None]) -> None:
    """`work` with a new cgroup of version 1, which any kernel that has the controller still can mount."""

    def run() -> None:
        mount = tmp_path / "devices"
        nodes = tmp_path / "nodes"
        mount.mkdir()
        nodes.mkdir()
        kernel.mount("cgroup", str(mount), "cgroup", 0, "devices")
        cgroup = mount / f"nvhook-test-{os.getpid()}"
        cgroup.mkdir()
        try:
            (cgroup / "devices.deny").write_text("a")
            (cgroup / "devices.allow").write_text("c 1:3 rwm")
            work(Place(cgroup, nodes, f"5:devices:/{cgroup.name}\n0::/nowhere\n"))
        finally:
            remove(cgroup)

    require("\ndevices\t" in Path("/proc/cgroups").read_text(), "this kernel has no devices cgroup of version 1")
    in_own_mounts(run)


@pytest.mark.root
@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("program", [ONLY_NULL, ONLY_NULL_ODD, REFUSE], ids=["plain", "odd", "refuse-all"])
@pytest.mark.parametrize("flags", [0, 1, 2], ids=["single", "override", "multi"])
def test_allow_v2_opens_and_undo_closes(tmp_path: Path, flags: int, program: bytes) -> None:
    def work(place: Place) -> None:
        cgroups.attach(place.fd, cgroups.load(program), flags)
        before = cgroups.attached(place.fd)
        null = place.null()
        assert (flags, errno.EPERM) == (before[0], place.open(0))

        undo = place.allow(Rule("c", MAJOR, 0, "rw"), Rule("c", MAJOR, 2, "rm"), Rule("b", MAJOR, 1, "rwm"))
        assert null == place.null()
        assert [place.open(minor) for minor in range(3)] == [errno.ENXIO, errno.EPERM, errno.EPERM]
        assert place.open(2, os.O_RDONLY) == errno.ENXIO
        assert [place.mknod(minor) for minor in range(3)] == [errno.EPERM, errno.EPERM, 0]

        undo()
        assert before == cgroups.attached(place.fd)
        assert place.open(0) == errno.EPERM
        undo()
        assert before == cgroups.attached(place.fd)

    with_v2(tmp_path, work)


@pytest.mark.root
@pytest.mark.usefixtures("root")
def test_allow_v2_twice_undone_in_reverse(tmp_path: Path) -> None:
    def work(place: Place) -> None:
        cgroups.attach(place.fd, cgroups.load(ONLY_NULL), cgroups.BPF_F_ALLOW_MULTI)
        first = place.allow(Rule("c", MAJOR, 0, "rw"))
        second = place.allow(Rule("c", MAJOR, 1, "rw"))
        assert [place.open(minor) for minor in range(3)] == [errno.ENXIO, errno.ENXIO, errno.EPERM]
        second()
        assert [place.open(0), place.open(1)] == [errno.ENXIO, errno.EPERM]
        first()
        assert place.open(0) == errno.EPERM

    with_v2(tmp_path, work)


@pytest.mark.root
@pytest.mark.usefixtures("root")
def test_allow_v2_undo_after_another_replaced_ours(tmp_path: Path) -> None:
    def work(place: Place) -> None:
        cgroups.attach(place.fd, cgroups.load(ONLY_NULL), cgroups.BPF_F_ALLOW_MULTI)
        undo = place.allow(Rule("c", MAJOR, 0, "rw"))
        # bpf(2) by hand: what a manager does that sets its own program again
        (ours,) = cgroups.attached(place.fd)[1]
        fd = kernel.bpf(cgroups.BPF_PROG_GET_FD_BY_ID, bytearray(struct.pack("=III", ours, 0, 0)))
        flags = cgroups.BPF_F_ALLOW_MULTI | cgroups.BPF_F_REPLACE
        cgroups.attach(place.fd, cgroups.load(REFUSE), flags, fd)
        theirs = cgroups.attached(place.fd)
        with pytest.raises(OSError, match="take device rules back: no such file"):
            undo()
        assert theirs == cgroups.attached(place.fd)

    with_v2(tmp_path, work)


@pytest.mark.root
@pytest.mark.usefixtures("root")
def test_allow_v2_many_rules_one_program(tmp_path: Path) -> None:
    def work(place: Place) -> None:
        cgroups.attach(place.fd, cgroups.load(ONLY_NULL), cgroups.BPF_F_ALLOW_MULTI)
        place.allow(*(Rule("c", MAJOR, minor, "rw") for minor in range(1, 200)))
        assert len(cgroups.attached(place.fd)[1]) == 1
        assert [place.open(minor) for minor in range(3)] == [errno.EPERM, errno.ENXIO, errno.ENXIO]

    with_v2(tmp_path, work)


@pytest.mark.root
@pytest.mark.usefixtures("root")
def test_allow_v2_without_program_changes_nothing(tmp_path: Path) -> None:
    def work(place: Place) -> None:
        undo = place.allow(Rule("c", MAJOR, 0, "rw"))
        assert cgroups.attached(place.fd) == (0, [])
        assert place.open(0) == errno.ENXIO
        undo()
        assert place.open(0) == errno.ENXIO

    with_v2(tmp_path, work)


@pytest.mark.root
@pytest.mark.usefixtures("root")
def test_allow_v2_extends_every_program(tmp_path: Path) -> None:
    def work(place: Place) -> None:
        for program in (ONLY_NULL, ONLY_NULL_ODD):
            cgroups.attach(place.fd, cgroups.load(program), cgroups.BPF_F_ALLOW_MULTI)
        before = cgroups.attached(place.fd)
        undo = place.allow(Rule("c", MAJOR, 0, "rw"))
        assert [place.open(0), place.open(1), place.null()] == [errno.ENXIO, errno.EPERM, 0]
        undo()
        assert before == cgroups.attached(place.fd)

    with_v2(tmp_path, work)


@pytest.mark.root
@pytest.mark.usefixtures("root")
def test_allow_v2_program_of_the_scope(tmp_path: Path) -> None:
    def work(place: Place) -> None:
        scope = place.cgroup / "libpod-1f.scope"
        place.cgroup = scope / "container"
        place.cgroup.mkdir(parents=True)
        try:
            (place.directory / "cgroup").write_text(f"0::/{scope.parent.name}/{scope.name}/container\n")
            fd = os.open(scope, os.O_RDONLY)
            cgroups.attach(fd, cgroups.load(ONLY_NULL), cgroups.BPF_F_ALLOW_MULTI)
            before = cgroups.attached(fd)
            assert place.open(0) == errno.EPERM
            undo = place.allow(Rule("c", MAJOR, 0, "rw"))
            assert [place.open(0), place.open(1)] == [errno.ENXIO, errno.EPERM]
            undo()
            assert before == cgroups.attached(fd)
        finally:
            remove(place.cgroup)
            remove(scope)

    with_v2(tmp_path, work)


def map_program() -> bytes:
    """A program whose answer is in a BPF map."""
    bpf_map = kernel.bpf(0, bytearray(struct.pack("=IIII", 2, 4, 4, 1)))  # BPF_MAP_CREATE, an array of one word
    return insn(0x18, 1, 2, constant=bpf_map) + insn(0) + insn(0x61, 0, 1) + insn(0x57, 0, constant=1) + EXIT


@pytest.mark.root
@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(
    ("program", "message"),
    [
        pytest.param(lambda: CALLS, "it calls functions of the kernel", id="call"),
        # With net.core.bpf_jit_harden=2 it is the verifier that refuses: there the reference is a hidden constant.
        pytest.param(map_program, "(it refers to a BPF map|load .R1 invalid mem access)", id="map"),
    ],
)
def test_allow_v2_foreign_program_left_alone(tmp_path: Path, program: Callable[[], bytes], message: str) -> None:
    def work(place: Place) -> None:
        for code in (ONLY_NULL, program()):  # the first could be extended: it must not be
            cgroups.attach(place.fd, cgroups.load(code), cgroups.BPF_F_ALLOW_MULTI)
        before = cgroups.attached(place.fd)
        wanted = f"extend device program {before[1][1]} of cgroup `.*nvhook-test-.*`: {message}"
        with pytest.raises(OSError, match=wanted):
            place.allow(Rule("c", MAJOR, 0, "rw"))
        assert before == cgroups.attached(place.fd)

    with_v2(tmp_path, work)


@pytest.mark.root
@pytest.mark.usefixtures("root")
def test_allow_v2_refused_by_the_verifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(place: Place) -> None:
        cgroups.attach(place.fd, cgroups.load(ONLY_NULL), cgroups.BPF_F_ALLOW_MULTI)
        before = cgroups.attached(place.fd)
        descriptors = os.listdir("/proc/self/fd")
        with pytest.raises(OSError, match=r"extend device program .*: load \(R9 !read_ok\): permission denied"):
            place.allow(Rule("c", MAJOR, 0, "rw"))
        assert before == cgroups.attached(place.fd)
        assert descriptors == os.listdir("/proc/self/fd")

    monkeypatch.setattr(cgroups, "allow_block", lambda _: insn(0xBF, 0, 9))  # r0 = r9, which nobody has set
    with_v2(tmp_path, work)


@pytest.mark.root
@pytest.mark.usefixtures("root")
def test_allow_v2_second_replacement_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attach = cgroups.attach
    calls: list[int] = []

    def failing(cgroup: int, program: int, flags: int, replace: int = 0) -> None:
        calls.append(program)
        attach(cgroup, program, flags, 0x7FFFFFFF if len(calls) == 2 else replace)  # no such descriptor

    def work(place: Place) -> None:
        for _ in range(2):
            attach(place.fd, cgroups.load(ONLY_NULL), cgroups.BPF_F_ALLOW_MULTI)
        before = cgroups.attached(place.fd)
        monkeypatch.setattr(cgroups, "attach", failing)
        with pytest.raises(OSError, match=f"replace device program {before[1][1]} of cgroup .*: bad file"):
            place.allow(Rule("c", MAJOR, 0, "rw"))
        assert len(calls) == 3
        assert before == cgroups.attached(place.fd)

    with_v2(tmp_path, work)


@pytest.mark.root
@pytest.mark.usefixtures("root")
def test_allow_v2_hidden_mount_is_passed_over(tmp_path: Path) -> None:
    def work(place: Place) -> None:
        # A second mount of the hierarchy; then something lies on the first and has a directory of the same name.
        other = place.directory / "other"
        other.mkdir()
        kernel.mount("cgroup2", str(other), "cgroup2", 0)
        cgroups.attach(place.fd, cgroups.load(ONLY_NULL), cgroups.BPF_F_ALLOW_MULTI)
        kernel.mount("tmpfs", str(place.cgroup.parent), "tmpfs", 0)
        place.cgroup.mkdir()
        try:
            place.allow(Rule("c", MAJOR, 0, "rw"))
        finally:
            kernel.umount2(str(place.cgroup.parent), kernel.MNT_DETACH)
        assert place.open(0) == errno.ENXIO

    with_v2(tmp_path, work)


@pytest.mark.root
@pytest.mark.usefixtures("root")
def test_allow_v2_cgroup_is_gone(tmp_path: Path) -> None:
    def work(place: Place) -> None:
        place.cgroup.rmdir()
        with pytest.raises(FileNotFoundError, match="open the container's cgroup `/nvhook-test-"):
            place.allow(Rule("c", MAJOR, 0, "rw"))

    with_v2(tmp_path, work)


def test_allow_nothing_reads_nothing() -> None:
    cgroups.allow(-1, [])()


def test_allow_process_is_gone() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    proc = os.open(f"/proc/{pid}", os.O_RDONLY)
    os.waitpid(pid, 0)
    with pytest.raises(OSError, match="`cgroup`: no such"):
        cgroups.allow(proc, [Rule("c", MAJOR, 0, "rw")])
    os.close(proc)


@pytest.mark.root
@pytest.mark.usefixtures("root")
def test_allow_v1_opens_and_undo_closes(tmp_path: Path) -> None:
    def work(place: Place) -> None:
        (place.cgroup / "devices.allow").write_text(f"c {MAJOR}:1 r")
        before = (place.cgroup / "devices.list").read_text()
        assert place.open(0) == errno.EPERM

        undo = place.allow(*(Rule("c", MAJOR, minor, "rw") for minor in (0, 1)), Rule("c", 1, 3, "rw"))
        assert [place.open(minor) for minor in range(3)] == [errno.ENXIO, errno.ENXIO, errno.EPERM]
        assert place.mknod(0) == errno.EPERM

        undo()
        assert before == (place.cgroup / "devices.list").read_text()
        assert [place.open(0), place.open(1), place.null()] == [errno.EPERM, errno.EPERM, 0]
        undo()
        assert before == (place.cgroup / "devices.list").read_text()

    with_v1(tmp_path, work)


@pytest.mark.root
@pytest.mark.usefixtures("root")
def test_allow_v1_unlimited_stays_unlimited(tmp_path: Path) -> None:
    def work(place: Place) -> None:
        (place.cgroup / "devices.allow").write_text("a")
        place.allow(Rule("c", MAJOR, 0, "rw"))()
        assert (place.cgroup / "devices.list").read_text() == "a *:* rwm\n"
        assert place.open(0) == errno.ENXIO

    with_v1(tmp_path, work)


@pytest.mark.root
@pytest.mark.usefixtures("root")
def test_allow_v1_refused_by_the_parent(tmp_path: Path) -> None:
    def work(place: Place) -> None:
        (place.cgroup / "devices.allow").write_text(f"c {MAJOR}:0 rw")
        child = place.cgroup / "child"
        child.mkdir()
        try:
            (child / "devices.deny").write_text("a")
            (place.directory / "cgroup").write_text(f"5:devices:/{place.cgroup.name}/child\n")
            descriptors = os.listdir("/proc/self/fd")
            with pytest.raises(PermissionError, match=f"allow `c {MAJOR}:1 rw` in cgroup `.*/child`: operation not"):
                place.allow(Rule("c", MAJOR, 0, "rw"), Rule("c", MAJOR, 1, "rw"))
            assert descriptors == os.listdir("/proc/self/fd")
            assert (child / "devices.list").read_text() == ""
        finally:
            remove(child)

    with_v1(tmp_path, work)


@pytest.mark.root
@pytest.mark.usefixtures("root")
def test_allow_v1_of_a_real_process(tmp_path: Path) -> None:
    def work(place: Place) -> None:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        try:
            (place.cgroup / "cgroup.procs").write_text(str(pid))
            proc = os.open(f"/proc/{pid}", os.O_RDONLY)
            undo = cgroups.allow(proc, [Rule("c", MAJOR, 0, "rw")])
            assert place.open(0) == errno.ENXIO
            undo()
        finally:
            os.close(writer)
            os.waitpid(pid, 0)

    with_v1(tmp_path, work)


# A container of a real runtime

HOOK = f"""
import json, os, sys
sys.path.insert(0, {str(Path(cgroups.__file__).parents[2])!r})
from nvhook.linux import cgroups
state = json.load(sys.stdin)
# Where version 1 is mounted too, the kernel lists its cgroups also: this container is in the unified one.
lines = open(f"/proc/{{state['pid']}}/cgroup").read().split("\\n")
directory = os.path.dirname(os.path.abspath(__file__))
with open(directory + "/cgroup", "w") as file:
    file.write(next(line for line in lines if line.startswith("0::")) + "\\n")
proc = os.open(directory, os.O_RDONLY)
rules = [cgroups.Rule("c", {MAJOR}, 0, "rw")]
cgroups.allow(proc, rules)()
if "undo" not in sys.argv:
    cgroups.allow(proc, rules)
"""


@pytest.mark.root
@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        pytest.param([], "No such device or address", id="allow"),
        pytest.param(["undo"], "Operation not permitted", id="undo"),
    ],
)
def test_allow_v2_under_runc(tmp_path: Path, arguments: list[str], allowed: str) -> None:
    busybox = shutil.which("busybox")
    runc = shutil.which("runc")
    require(busybox and runc, "needs runc and a static busybox")

    def run() -> None:
        kernel.umount2("/sys/fs/cgroup", kernel.MNT_DETACH)
        kernel.mount("cgroup2", "/sys/fs/cgroup", "cgroup2", 0)
        kernel.mount("tmpfs", str(tmp_path), "tmpfs", 0)
        rootfs = tmp_path / "rootfs"
        for name in ("bin", "proc"):
            (rootfs / name).mkdir(parents=True)
        shutil.copy(str(busybox), rootfs / "bin/busybox")
        for minor in range(2):
            os.mknod(rootfs / f"gpu{minor}", stat.S_IFCHR | 0o666, os.makedev(MAJOR, minor))
        (tmp_path / "hook.py").write_text(HOOK)
        name = f"nvhook-test-{os.getpid()}"
        commands = "cd /bin; ./busybox cat /gpu0; ./busybox cat /gpu1; ./busybox cat /null && echo null"
        os.mknod(rootfs / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        config = {
            "ociVersion": "1.0.2",
            "process": {"args": ["/bin/busybox", "sh", "-c", commands], "cwd": "/", "user": {"uid": 0, "gid": 0}},
            "root": {"path": "rootfs"},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
            "hooks": {
                "prestart": [
                    {"path": sys.executable, "args": ["python3", "-IS", str(tmp_path / "hook.py"), *arguments]}
                ]
            },
            "linux": {
                "cgroupsPath": f"/{name}",
                "resources": {"devices": [{"allow": False, "access": "rwm"}]},
                "namespaces": [{"type": "pid"}, {"type": "mount"}],
            },
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        command = [str(runc), "--root", str(tmp_path / "state")]
        try:
            done = subprocess.run(
                [*command, "run", "--bundle", str(tmp_path), name], capture_output=True, text=True, check=False
            )
        finally:
            subprocess.run([*command, "delete", "--force", name], capture_output=True, check=False)
            remove(Path("/sys/fs/cgroup") / name)
        answers = [line.partition("open ")[2] for line in done.stderr.split("\n") if "gpu" in line]
        assert [f"'/gpu0': {allowed}", "'/gpu1': Operation not permitted"] == answers, done.stderr
        assert done.stdout == "null\n"

    in_own_mounts(run)


# What is written to is a control group


@pytest.mark.root
@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("name", ["devices.allow", "devices.deny"])
def test_allow_v1_writes_into_no_other_file(tmp_path: Path, name: str) -> None:
    """Something else is mounted on the file of the control group."""
    other = tmp_path / "other"
    other.touch()

    def work(place: Place) -> None:
        before = (place.cgroup / "devices.list").read_text()
        mounts = cgroups.mounted_at(Path("/proc/self/mountinfo").read_text(), 1, f"/{place.cgroup.name}")
        for _, directory in mounts:
            kernel.mount(str(other), f"{directory}/{name}", None, kernel.MS_BIND)
        try:
            with pytest.raises(OSError, match=f"{name}`: not in a cgroup file system of version 1"):
                place.allow(Rule("c", MAJOR, 0, "rw"))
        finally:
            for _, directory in mounts:
                kernel.umount2(f"{directory}/{name}", kernel.MNT_DETACH)
        assert other.read_text() == ""
        assert before == (place.cgroup / "devices.list").read_text()

    with_v1(tmp_path, work)


@pytest.mark.root
@pytest.mark.parametrize("version", [1, 2])
def test_directory_that_is_no_cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    """A mountinfo that is made up names one."""
    held = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(OSError, match=f"`name`: not in a cgroup file system of version {version}"):
            cgroups._prove(held, version, "name")
    finally:
        os.close(held)
    made_up = f"1 1 0:1 / {tmp_path} rw - " + ("cgroup none rw,devices" if version == 1 else "cgroup2 none rw")
    own = cgroups._own
    read = {"mountinfo": made_up, "cgroup": "5:devices:/own\n0::/own\n"}
    monkeypatch.setattr(cgroups, "_own", lambda name: read.get(name) or f"mnt_id:\t1\n{own(name)}")
    (tmp_path / "x").mkdir()
    with pytest.raises(OSError, match=f"`{tmp_path}/x`: not in a cgroup file system of version {version}"):
        cgroups._open_cgroup(version, "/x", [])
