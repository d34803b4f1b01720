# SPDX-License-Identifier: Apache-2.0
"""Filters on the system calls of a child that runs code of somebody else (seccomp(2), bpf of old in linux/filter.h).

    LDCONFIG   these alone: what ldconfig of glibc 2.28 to 2.42 takes to read a tree and write a cache
    LIBRARY    all but these: a library of the driver changes with every version, and must not reach the parts of
               the kernel that it has no business with

What is not allowed fails with EPERM, which programs cope with. Calls by the number of another architecture (i386, x32)
end the process: the same number is another call there.
"""

from __future__ import annotations

import os
import struct

# Call -> its number on x86-64 and on aarch64; -1 where there is none.
_TREE = {
    "read": (0, 63),
    "write": (1, 64),
    "open": (2, -1),
    "close": (3, 57),
    "stat": (4, -1),
    "fstat": (5, 80),
    "lstat": (6, -1),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "readv": (19, 65),
    "writev": (20, 66),
    "access": (21, -1),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "getpid": (39, 172),
    "exit": (60, 93),
    "uname": (63, 160),
    "fcntl": (72, 25),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "ftruncate": (77, 46),
    "getdents": (78, -1),
    "getcwd": (79, 17),
    "chdir": (80, 49),
    "rename": (82, -1),
    "mkdir": (83, -1),
    "unlink": (87, -1),
    "readlink": (89, -1),
    "chmod": (90, -1),
    "fchmod": (91, 52),
    "umask": (95, 166),
    "gettimeofday": (96, 169),
    "sysinfo": (99, 179),
    "getuid": (102, 174),
    "getgid": (104, 176),
    "geteuid": (107, 175),
    "getegid": (108, 177),
    "arch_prctl": (158, -1),
    "gettid": (186, 178),
    "futex": (202, 98),
    "getdents64": (217, 61),
    "set_tid_address": (218, 96),
    "fadvise64": (221, 223),
    "clock_gettime": (228, 113),
    "exit_group": (231, 94),
    "tgkill": (234, 131),
    "openat": (257, 56),
    "mkdirat": (258, 34),
    "newfstatat": (262, 79),
    "unlinkat": (263, 35),
    "renameat": (264, 38),
    "readlinkat": (267, 78),
    "fchmodat": (268, 53),
    "faccessat": (269, 48),
    "set_robust_list": (273, 99),
    "prlimit64": (302, 261),
    "renameat2": (316, 276),
    "getrandom": (318, 278),
    "execveat": (322, 281),  # the program itself, by its descriptor
    "statx": (332, 291),
    "rseq": (334, 293),
    "faccessat2": (439, 439),
    "fchmodat2": (452, 452),
}

_SYSTEM = {
    "ptrace": (101, 117),
    "personality": (135, 92),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "acct": (163, 89),
    "mount": (165, 40),
    "umount2": (166, 39),
    "swapon": (167, 224),
    "reboot": (169, 142),
    "iopl": (172, -1),
    "ioperm": (173, -1),
    "init_module": (175, 105),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "unshare": (272, 97),
    "perf_event_open": (298, 241),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "setns": (308, 268),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "finit_module": (313, 273),
    "kexec_file_load": (320, 294),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "pidfd_getfd": (438, 438),
    "mount_setattr": (442, 442),
}
_CLONE = (56, 220)
_CLONE3 = 435  # its flags lie in memory, where no filter can look; without it glibc takes clone
_NAMESPACES = 0x7E020000  # CLONE_NEW* among the flags of clone

# struct sock_filter: code, jump if true, jump if false, constant
_INSTRUCTION = "=HBBI"
_LOAD, _JEQ, _JGE, _JSET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NR, _ARCH, _FIRST_ARGUMENT = 0, 4, 16  # where they are in struct seccomp_data
_KILL, _ALLOW, _ERRNO = 0x80000000, 0x7FFF0000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_X32 = 0x40000000

_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # AUDIT_ARCH_*, column above


def _filter(calls: dict[str, tuple[int, int]], matching: int, otherwise: int, *, machine: str) -> bytes:
    """Instructions for seccomp(2); none for a machine whose numbers are not known here."""
    if machine not in _ARCHITECTURES:
        return b""
    arch, column = _ARCHITECTURES[machine]
    numbers = [call[column] for call in calls.values() if call[column] >= 0]
    code = [(_LOAD, 0, 0, _ARCH), (_JEQ, 1, 0, arch), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NR)]
    code += [(_JGE, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
    code += [
        (_JEQ, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _ERRNO | _ENOSYS),
        (_JEQ, 0, 4, _CLONE[column]),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_JSET, 0, 1, _NAMESPACES),
        (_RETURN, 0, 0, _ERRNO | _EPERM),
        (_LOAD, 0, 0, _NR),
    ]
    code += [(_JEQ, len(numbers) - place, 0, number) for place, number in enumerate(numbers)]
    code += [(_RETURN, 0, 0, otherwise), (_RETURN, 0, 0, matching)]
    return b"".join(struct.pack(_INSTRUCTION, *instruction) for instruction in code)


_MACHINE = os.uname().machine
LDCONFIG = _filter(_TREE, _ALLOW, _ERRNO | _EPERM, machine=_MACHINE)
LIBRARY = _filter(_SYSTEM, _ERRNO | _EPERM, _ALLOW, machine=_MACHINE)
