# SPDX-License-Identifier: Apache-2.0
"""The filters, run by hand for both machines and by the kernel for this one."""

from __future__ import annotations

import errno
import os
import re
import struct
import subprocess
from pathlib import Path

import pytest

from conftest import cannot
from nvhook.linux import kernel, seccomp

X86_64, AARCH64 = 0xC000003E, 0xC00000B7
I386, ARM = 0x40000003, 0x40000028
ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026

# Stands in the place of what is filtered: tries what its arguments name and prints what came of it.
PROBE = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static long attempt(const char *name)
{
    char handle[128] = {8};
    if (!strcmp(name, "socket")) return syscall(SYS_socket, 2, 1, 0);
    if (!strcmp(name, "ptrace")) return syscall(SYS_ptrace, 0, 0, 0, 0);
    if (!strcmp(name, "mount")) return syscall(SYS_mount, "none", "/", "tmpfs", 0, 0);
    if (!strcmp(name, "unshare")) return syscall(SYS_unshare, CLONE_NEWUSER);
    if (!strcmp(name, "bpf")) return syscall(SYS_bpf, 0, handle, sizeof(handle));
    if (!strcmp(name, "keyctl")) return syscall(SYS_keyctl, 0, -3, 0);
    if (!strcmp(name, "handle")) return syscall(SYS_open_by_handle_at, AT_FDCWD, handle, 0);
    if (!strcmp(name, "io_uring")) return syscall(SYS_io_uring_setup, 1, handle);
    if (!strcmp(name, "userfaultfd")) return syscall(SYS_userfaultfd, 1);
    if (!strcmp(name, "mknod")) return syscall(SYS_mknodat, AT_FDCWD, "/node", 0666 | 0020000, 259);
    if (!strcmp(name, "clone")) return syscall(SYS_clone, CLONE_NEWUSER | 17, 0, 0, 0, 0);
    if (!strcmp(name, "clone3")) return syscall(SYS_clone3, handle, 64);
    if (!strcmp(name, "open")) return open("/", O_RDONLY | O_DIRECTORY);
#ifdef __x86_64__
    if (!strcmp(name, "i386")) {
        long result;
        __asm__ volatile("int $0x80" : "=a"(result) : "a"(20L) : "memory");
        return result;
    }
    if (!strcmp(name, "x32")) return syscall(0x40000000 | SYS_getpid);
#endif
    exit(3);
}

int main(int argc, char **argv)
{
    const char *name = argc > 1 && argv[1][0] != '-' ? argv[1] : NAME;
    errno = 0;
    long result = attempt(name);
    printf("%s: %s\n", name, result < 0 ? strerrorname_np(errno) : "done");
    fflush(stdout);
    return 1;
}
"""


def _verdict(program: bytes, arch: int, number: int, argument: int = 0) -> int:
    """What the kernel would return: the six instructions that are used."""
    data = struct.pack("=IIQQ", number, arch, 0, argument)
    code = list(struct.iter_unpack("=HBBI", program))
    place, value = 0, 0
    while True:
        op, yes, no, constant = code[place]
        place += 1
        if op == 0x20:
            (value,) = struct.unpack_from("=I", data, constant)
        elif op == 0x06:
            return int(constant)
        else:
            holds = {0x15: value == constant, 0x35: value >= constant, 0x45: bool(value & constant)}[op]
            place += yes if holds else no


def _filters(machine: str) -> tuple[bytes, bytes]:
    """As at import on that machine: (LDCONFIG, LIBRARY)."""
    return (
        seccomp._filter(seccomp._TREE, seccomp._ALLOW, EPERM, machine=machine),
        seccomp._filter(seccomp._SYSTEM, EPERM, seccomp._ALLOW, machine=machine),
    )


MACHINES = [pytest.param("x86_64", X86_64, 0, id="x86-64"), pytest.param("aarch64", AARCH64, 1, id="aarch64")]


@pytest.mark.parametrize(("machine", "arch", "column"), MACHINES)
def test_filter_by_hand(machine: str, arch: int, column: int) -> None:
    tree, library = _filters(machine)
    listed = {call[column] for call in seccomp._TREE.values()} - {-1}
    refused = {call[column] for call in seccomp._SYSTEM.values()} - {-1}
    for number in range(500):
        if number not in (seccomp._CLONE[column], seccomp._CLONE3):
            assert _verdict(tree, arch, number) == (ALLOW if number in listed else EPERM), number
            assert _verdict(library, arch, number) == (EPERM if number in refused else ALLOW), number


@pytest.mark.parametrize(("machine", "arch", "column"), MACHINES)
def test_filter_of_new_processes(machine: str, arch: int, column: int) -> None:
    """A library may have threads; neither may have namespaces."""
    tree, library = _filters(machine)
    clone, thread, namespace = seccomp._CLONE[column], 0x003D0F00, 0x10000000
    assert _verdict(library, arch, clone, thread) == ALLOW
    assert _verdict(library, arch, clone, thread | namespace) == EPERM
    assert _verdict(tree, arch, clone, thread) == EPERM
    assert [_verdict(program, arch, 435) for program in (tree, library)] == [ENOSYS, ENOSYS]


@pytest.mark.parametrize(("machine", "arch", "column"), MACHINES)
@pytest.mark.parametrize("other", [I386, ARM, 0], ids=["i386", "arm", "none"])
def test_filter_of_another_architecture(machine: str, arch: int, column: int, other: int) -> None:
    for program in _filters(machine):
        assert _verdict(program, other, seccomp._TREE["read"][column]) == KILL
        assert _verdict(program, arch, 0x40000000 | seccomp._TREE["read"][column]) == KILL


def test_filter_of_an_unknown_machine() -> None:
    assert _filters("riscv64") == (b"", b"")


HEADERS = ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm-generic/unistd.h")


@pytest.mark.parametrize("column", [0, 1], ids=["x86-64", "aarch64"])
def test_numbers_are_the_kernel_s(column: int) -> None:
    """As far as this machine's headers know them."""
    if not os.path.exists(HEADERS[column]):
        cannot(f"needs {HEADERS[column]}")
    found = re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(HEADERS[column]).read_text(), re.MULTILINE)
    known = {name.replace("fstatat", "newfstatat") if column else name: int(number) for name, number in found}
    calls = {**seccomp._TREE, **seccomp._SYSTEM, "clone": seccomp._CLONE, "clone3": (435, 435)}
    ours = {name: call[column] for name, call in calls.items() if call[column] >= 0}
    newest = {"fchmodat2"}  # Linux 6.6
    assert {name: number for name, number in ours.items() if known.get(name) != number and name not in newest} == {}
    assert not {name for name, call in calls.items() if call[column] < 0} & known.keys()


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("probe")
    return build_probe(place)


def build_probe(place: Path, name: str = "open") -> str:
    """The program, which tries `name` unless its first argument says otherwise."""
    (place / f"{name}.c").write_text(PROBE)
    command = ["cc", "-static", f'-DNAME="{name}"', "-o", str(place / name), str(place / f"{name}.c")]
    subprocess.run(command, check=True, capture_output=True)
    return str(place / name)


def _try(program: bytes, probe: str, name: str) -> tuple[int, str]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            fd = os.open(probe, os.O_RDONLY)
            os.dup2(writing, 1)
            kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
            kernel.seccomp(program)
            os.execve(fd, ["probe", name], {})
        finally:
            os._exit(9)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read().strip()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


CALLS = ("socket", "ptrace", "mount", "unshare", "bpf", "keyctl", "handle", "io_uring", "userfaultfd", "mknod", "clone")


@pytest.mark.parametrize("name", CALLS)
def test_ldconfig_may_not(probe: str, name: str) -> None:
    assert _try(seccomp.LDCONFIG, probe, name) == (1, f"{name}: EPERM")


@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("socket", "mknod")])
def test_library_may_not(probe: str, name: str) -> None:
    assert _try(seccomp.LIBRARY, probe, name) == (1, f"{name}: EPERM")


@pytest.mark.parametrize("program", [seccomp.LDCONFIG, seccomp.LIBRARY], ids=["ldconfig", "library"])
@pytest.mark.parametrize("name", ["i386", "x32"])
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86-64 alone has others")
def test_another_architecture_is_the_end(probe: str, program: bytes, name: str) -> None:
    assert _try(program, probe, name) == (-31, "")  # SIGSYS


@pytest.mark.parametrize("program", [seccomp.LDCONFIG, seccomp.LIBRARY], ids=["ldconfig", "library"])
def test_what_is_needed_is_allowed(probe: str, program: bytes) -> None:
    assert _try(program, probe, "open") == (1, "open: done")
    assert _try(program, probe, "clone3") == (1, f"clone3: {errno.errorcode[errno.ENOSYS]}")
