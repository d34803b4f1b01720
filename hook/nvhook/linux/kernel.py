# SPDX-License-Identifier: Apache-2.0
"""System calls that Python's os module lacks, one small function each.

Every function encodes its arguments, makes the call and raises OSError with errno and the path it was about.
Constants keep the kernel's names (include/uapi/linux). Nothing else in the project imports ctypes, and this imports
the C module below it alone: the package, with its tables of types for other platforms, costs 3 ms.

Numbers: arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h (aarch64); calls added
after 2019 have the same number everywhere.
"""

from __future__ import annotations

import _ctypes
import os
import struct

_X86_64 = os.uname().machine == "x86_64"
_NR_MADVISE = 28 if _X86_64 else 233
_NR_PRCTL = 157 if _X86_64 else 167
_NR_PIVOT_ROOT = 155 if _X86_64 else 41
_NR_SETFSUID = 122 if _X86_64 else 151
_NR_SETFSGID = 123 if _X86_64 else 152
_NR_CAPGET = 125 if _X86_64 else 90
_NR_CAPSET = 126 if _X86_64 else 91
_NR_MOUNT = 165 if _X86_64 else 40
_NR_UMOUNT2 = 166 if _X86_64 else 39
_NR_UNSHARE = 272 if _X86_64 else 97
_NR_NAME_TO_HANDLE_AT = 303 if _X86_64 else 264
_NR_SETNS = 308 if _X86_64 else 268
_NR_SECCOMP = 317 if _X86_64 else 277
_NR_STATX = 332 if _X86_64 else 291
_NR_BPF = 321 if _X86_64 else 280
_NR_OPEN_TREE = 428
_NR_MOVE_MOUNT = 429
_NR_FSOPEN = 430
_NR_FSCONFIG = 431
_NR_FSMOUNT = 432
_NR_OPENAT2 = 437
_NR_MOUNT_SETATTR = 442

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000

# statx(2): Linux 5.8 and 6.8
STATX_MNT_ID = 0x1000
STATX_MNT_ID_UNIQUE = 0x4000

# openat2(2)
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_IN_ROOT = 0x10

# open_tree(2), move_mount(2), mount_setattr(2)
OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 0x04
MOVE_MOUNT_T_EMPTY_PATH = 0x40
MOUNT_ATTR_RDONLY = 0x01
MOUNT_ATTR_NOSUID = 0x02
MOUNT_ATTR_NODEV = 0x04
MOUNT_ATTR_NOEXEC = 0x08

# fsopen(2), fsconfig(2), fsmount(2)
FSOPEN_CLOEXEC = 0x01
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6
FSMOUNT_CLOEXEC = 0x01

# mount(2), umount2(2)
MS_RDONLY = 0x01
MS_NOSUID = 0x02
MS_NODEV = 0x04
MS_NOEXEC = 0x08
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 1 << 18
MNT_DETACH = 0x02

# setns(2), unshare(2)
CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

# madvise(2)
MADV_POPULATE_WRITE = 23

# fstatfs(2), include/uapi/linux/magic.h
PROC_SUPER_MAGIC = 0x9FA0
CGROUP_SUPER_MAGIC = 0x27E0EB
CGROUP2_SUPER_MAGIC = 0x63677270

# prctl(2)
PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38

# seccomp(2)
SECCOMP_SET_MODE_FILTER = 1

# fcntl(2): seals of a memfd
F_ADD_SEALS = 1033
F_GET_SEALS = 1034
F_SEAL_SEAL = 0x01
F_SEAL_SHRINK = 0x02
F_SEAL_GROW = 0x04
F_SEAL_WRITE = 0x08

# capabilities(7)
CAP_CHOWN = 0
CAP_DAC_OVERRIDE = 1
CAP_FOWNER = 3
CAP_SETGID = 6
CAP_SETUID = 7
CAP_SETPCAP = 8
CAP_NET_ADMIN = 12
CAP_SYS_CHROOT = 18
CAP_SYS_ADMIN = 21
CAP_MKNOD = 27
_LINUX_CAPABILITY_VERSION_3 = 0x20080522


class _Long(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "l"


class _Char(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "c"


class _Function(_ctypes.CFuncPtr):
    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
    _restype_ = _Long


_LIBC = _ctypes.dlopen(None, 0)  # type: ignore[arg-type]
_libc_syscall = _Function(_ctypes.dlsym(_LIBC, "syscall"))
_libc_fstatfs = _Function(_ctypes.dlsym(_LIBC, "fstatfs"))


def _syscall(number: int, *args: int | bytes | _ctypes.Array[_Char] | None, path: str | None = None) -> int:
    """Numbers go as wide as a register: the upper half of a shorter one would be undefined."""
    result: int = _libc_syscall(_Long(number), *[_Long(arg) if isinstance(arg, int) else arg for arg in args])
    if result >= 0:
        return result
    errno = _ctypes.get_errno()
    raise OSError(errno, os.strerror(errno), path)


def fstatfs(fd: int) -> int:
    """What kind of file system `fd` is on, as one of the *_SUPER_MAGIC. An O_PATH descriptor will do."""
    buffer = (_Char * 256)()  # struct statfs, whose first member is f_type
    # The C library's function: the number of the call differs between machines, and `plan` is tested for others.
    if _libc_fstatfs(_Long(fd), buffer) < 0:
        errno = _ctypes.get_errno()
        raise OSError(errno, os.strerror(errno))
    (magic,) = struct.unpack_from("=q", bytes(buffer))
    return int(magic)


def openat2(dir_fd: int, path: str, flags: int, *, resolve: int, mode: int = 0) -> int:
    """A descriptor for `path` below `dir_fd`. ENOSYS before Linux 5.6; some seccomp filters answer EPERM."""
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, mode, resolve)
    return _syscall(_NR_OPENAT2, dir_fd, os.fsencode(path), how, len(how), path=path)


def statx_mount(fd: int, mask: int) -> int:
    """The id of the mount that `fd` was reached through, as `mask` (STATX_MNT_ID or STATX_MNT_ID_UNIQUE) wants it; 0
    where this kernel has no such id. ENOSYS before Linux 4.11."""
    answer = (_Char * 256)()  # struct statx
    _syscall(_NR_STATX, fd, b"", AT_EMPTY_PATH, mask, answer)
    content = bytes(answer)
    (known,) = struct.unpack_from("=I", content, 0)
    (mount,) = struct.unpack_from("=Q", content, 144)
    return int(mount) if known & mask else 0


def name_to_handle(fd: int) -> bytes:
    """The file handle of what `fd` is of: type and bytes. EOPNOTSUPP from a file system that has none."""
    room = 128  # MAX_HANDLE_SZ
    handle = (_Char * (8 + room)).from_buffer(bytearray(struct.pack("=Ii", room, 0)) + bytearray(room))
    mount_id = (_Char * 4)()
    _syscall(_NR_NAME_TO_HANDLE_AT, fd, b"", handle, mount_id, AT_EMPTY_PATH)
    (size,) = struct.unpack_from("=I", bytes(handle))
    return bytes(handle)[4 : 8 + size]


def open_tree(dir_fd: int, path: str, flags: int) -> int:
    """With OPEN_TREE_CLONE: a descriptor for a new, unattached mount of what `path` names. Linux 5.2."""
    return _syscall(_NR_OPEN_TREE, dir_fd, os.fsencode(path), flags, path=path)


def move_mount(from_fd: int, to_fd: int) -> None:
    """Attach the unattached mount `from_fd` on top of the file or directory `to_fd`. Linux 5.2."""
    flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
    _syscall(_NR_MOVE_MOUNT, from_fd, b"", to_fd, b"", flags)


def mount_setattr(mount_fd: int, *, attr_set: int, propagation: int, recursive: bool = False) -> None:
    """Set MOUNT_ATTR_* flags and the propagation (MS_PRIVATE) of the mount that `mount_fd` is, with `recursive` of
    those below it too. Linux 5.12."""
    attr = struct.pack("=QQQQ", attr_set, 0, propagation, 0)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    _syscall(_NR_MOUNT_SETATTR, mount_fd, b"", flags, attr, len(attr))


def fsopen(fstype: str) -> int:
    """A descriptor for a file system that is being made. Linux 5.2, as the two below."""
    return _syscall(_NR_FSOPEN, fstype.encode(), FSOPEN_CLOEXEC, path=fstype)


def fsconfig(fs_fd: int, command: int, key: str = "", value: str = "") -> None:
    """FSCONFIG_SET_STRING sets an option, FSCONFIG_CMD_CREATE ends that and makes the file system."""
    words = (key.encode(), value.encode()) if key else (None, None)
    _syscall(_NR_FSCONFIG, fs_fd, command, *words, 0, path=key or None)


def fsmount(fs_fd: int, attr_set: int) -> int:
    """A descriptor for a new, unattached mount of the file system, with MOUNT_ATTR_* flags."""
    return _syscall(_NR_FSMOUNT, fs_fd, FSMOUNT_CLOEXEC, attr_set)


def mount(source: str, target: str, fstype: str | None, flags: int, data: str = "") -> None:
    kind = os.fsencode(fstype) if fstype else None
    _syscall(_NR_MOUNT, os.fsencode(source), os.fsencode(target), kind, flags, os.fsencode(data), path=target)


def umount2(target: str, flags: int) -> None:
    _syscall(_NR_UMOUNT2, os.fsencode(target), flags, path=target)


def pivot_root(new_root: str, put_old: str) -> None:
    _syscall(_NR_PIVOT_ROOT, os.fsencode(new_root), os.fsencode(put_old), path=new_root)


def setns(fd: int, nstype: int) -> None:
    _syscall(_NR_SETNS, fd, nstype)


def unshare(flags: int) -> None:
    _syscall(_NR_UNSHARE, flags)


def setfsuid(uid: int) -> int:
    """The previous file system uid. The call reports no failure: ask again to see whether it took."""
    return _syscall(_NR_SETFSUID, uid)


def setfsgid(gid: int) -> int:
    """The previous file system gid. The call reports no failure: ask again to see whether it took."""
    return _syscall(_NR_SETFSGID, gid)


def clearenv() -> None:
    """Empty the C library's environment, in which there can be more than in os.environ."""
    _Function(_ctypes.dlsym(_LIBC, "clearenv"))()
    # That leaves no list at all, and not every program expects it.
    _Function(_ctypes.dlsym(_LIBC, "setenv"))(b"_", b"", _Long(1))
    _Function(_ctypes.dlsym(_LIBC, "unsetenv"))(b"_")


def madvise(address: int, length: int, advice: int) -> None:
    _syscall(_NR_MADVISE, address, length, advice)


def prctl(option: int, arg: int | bytes = 0) -> None:
    _syscall(_NR_PRCTL, option, arg, 0, 0, 0)


def drop_bounding_set() -> None:
    """Empty the capability bounding set; EINVAL marks the first number the kernel does not know."""
    for capability in range(64):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError as error:
            if error.errno != 22:  # EINVAL; errno's import is not worth one number
                raise
            return


def drop_capabilities() -> None:
    """Empty this thread's effective, permitted and inheritable sets (and with them the ambient one)."""
    header = struct.pack("=Ii", _LINUX_CAPABILITY_VERSION_3, 0)
    _syscall(_NR_CAPSET, header, struct.pack("=6I", 0, 0, 0, 0, 0, 0))


def keep_capabilities(*numbers: int) -> None:
    """Of this thread's effective and permitted sets leave these, where they are there; empty the inheritable set."""
    header = struct.pack("=Ii", _LINUX_CAPABILITY_VERSION_3, 0)
    had = (_Char * 24)()
    _syscall(_NR_CAPGET, header, had)
    wanted = sum(1 << number for number in numbers)
    masks = (wanted & 0xFFFFFFFF, wanted & 0xFFFFFFFF, 0, wanted >> 32, wanted >> 32, 0)
    left = (old & mask for old, mask in zip(struct.unpack("=6I", bytes(had)), masks, strict=True))
    _syscall(_NR_CAPSET, header, struct.pack("=6I", *left))


def seccomp(instructions: bytes) -> None:
    """Filter this thread's system calls from now on, for good and for its children. It must have no_new_privs."""
    code = bytearray(instructions)
    program = struct.pack("=H6xQ", len(code) // 8, address_of(code))  # struct sock_fprog
    _syscall(_NR_SECCOMP, SECCOMP_SET_MODE_FILTER, 0, program)


def bpf(command: int, attr: bytearray) -> int:
    """bpf(2): `attr` is the encoded union bpf_attr; the kernel may write answers into it."""
    buffer = (_Char * len(attr)).from_buffer(attr)
    return _syscall(_NR_BPF, command, buffer, len(attr))


def address_of(buffer: bytearray) -> int:
    """Where `buffer` lies in memory, for the pointers inside other arguments; valid while the caller keeps it."""
    return _ctypes.addressof((_Char * len(buffer)).from_buffer(buffer))
