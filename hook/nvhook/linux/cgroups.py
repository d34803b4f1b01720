# SPDX-License-Identifier: Apache-2.0
"""Let the container of a running process open more device nodes: the devices cgroup, version 1 or 2.

For a prestart hook, when nothing could be written into the container's spec any more. What the low-level
runtime has set up stays in force and is only widened. Not for finding out which devices, and not for anything
else that a cgroup limits. Only the container's own cgroup is changed: what one above it refuses stays refused.

Version 1 has files for this. Version 2 has BPF programs, all of which must say yes: each is read back from
the kernel, gets our rules in front of its own instructions, and is replaced by the result in one step. So
there is no moment without a program, and whatever fails leaves the old ones where they are.

Names and numbers: include/uapi/linux/bpf.h and kernel/cgroup/cgroup.c, security/device_cgroup.c.
"""

from __future__ import annotations

import errno
import os
import struct

from . import proc
from .kernel import CGROUP2_SUPER_MAGIC, CGROUP_SUPER_MAGIC, address_of, bpf, fstatfs
from .mountinfo import unescape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    # What was done, as the calls that take it back, oldest first.
    Steps = list[tuple[Callable[..., object], tuple[object, ...]]]

# bpf(2), commands
BPF_PROG_LOAD = 5
BPF_PROG_ATTACH = 8
BPF_PROG_GET_FD_BY_ID = 13
BPF_OBJ_GET_INFO_BY_FD = 15
BPF_PROG_QUERY = 16

BPF_PROG_TYPE_CGROUP_DEVICE = 15
BPF_CGROUP_DEVICE = 6
BPF_F_ALLOW_MULTI = 2
BPF_F_REPLACE = 4
BPF_F_QUERY_EFFECTIVE = 1
_MAX_PROGS = 64  # per cgroup and attach type: BPF_CGROUP_MAX_PROGS

# struct bpf_cgroup_dev_ctx { u32 access_type, major, minor }; access_type: the type in the low half, the access
# in the high one
_DEV_TYPE = {"b": 1, "c": 2}
_DEV_ACCESS = {"m": 1, "r": 2, "w": 4}

# Instructions: code, registers (source << 4 | destination), jump offset, constant
_INSTRUCTION = "=BBhi"
_LDX_W, _MOV_X, _MOV_K, _XOR_X, _AND_K, _RSH_K, _JNE_K, _EXIT = 0x61, 0xBF, 0xB7, 0xAF, 0x57, 0x77, 0x55, 0x95
_LD_IMM64, _CALL = 0x18, 0x85
_REG_AX = 11  # the kernel's own scratch register: a program that comes from outside cannot name it


class Rule:
    """One device: `type` is "c" or "b", `access` one or more of the letters r, w and m (mknod)."""

    __slots__ = ("access", "major", "minor", "type")

    def __init__(self, type: str, major: int, minor: int, access: str) -> None:  # noqa: A002 - OCI's name
        self.type = type
        self.major = major
        self.minor = minor
        self.access = access
        known = type in _DEV_TYPE and access and all(letter in _DEV_ACCESS for letter in access)
        if not known or not 0 <= major < 1 << 12 or not 0 <= minor < 1 << 20:  # MINORBITS of the kernel
            raise ValueError(f"no device rule: `{self}`")

    def __str__(self) -> str:
        return f"{self.type} {self.major}:{self.minor} {self.access}"


def allow(proc_dir_fd: int, rules: list[Rule]) -> Callable[[], None]:
    """Apply all `rules`, or none, to the cgroup of the process whose /proc directory `proc_dir_fd` is.

    A container that was made without a cgroup of its own (Podman's --cgroups=disabled) is in ours, which nothing may be
    changed for: what its engine may open, it may.

    Returns the undo, which keeps the descriptors that it needs and so works from any mount namespace. To be
    called in the host's namespaces: the mounts come from /proc/self/mountinfo.
    """
    steps: Steps = []
    if not rules:
        return lambda: None
    try:
        v1 = any(_is_hierarchy(line, 1) for line in _own("mountinfo").split("\n"))
        version, path = devices_cgroup(_read("cgroup", dir_fd=proc_dir_fd), v1=v1)
        if (version, path) == devices_cgroup(_own("cgroup"), v1=v1):
            return lambda: None
        if version == 1:
            _allow_v1(*_open_cgroup(1, path, steps), rules, steps)
        else:
            _allow_v2([_open_cgroup(2, part, steps) for part in up_to_scope(path)], rules, steps)
    except BaseException:
        _take_back(steps)  # a fault in here would hide the one to tell
        raise

    def undo() -> None:
        faults = _take_back(steps)
        if faults:
            raise _fault("take device rules back", faults[0])

    return undo


def _take_back(steps: Steps) -> list[OSError]:
    """Run every step, newest first, whatever fails. A second call finds nothing to do."""
    faults: list[OSError] = []
    while steps:
        function, arguments = steps.pop()
        try:
            function(*arguments)
        except OSError as error:
            faults.append(error)
    return faults


def _fault(did: str, error: OSError) -> OSError:
    why = error.strerror or str(error)
    return OSError(error.errno, f"{did}: {why[:1].lower()}{why[1:]}")


# Where the cgroup is


def devices_cgroup(text: str, *, v1: bool = True) -> tuple[int, str]:
    """The version and the path of the cgroup that limits devices, from the text of a /proc/<pid>/cgroup.

    A hybrid machine has both versions; there the device rules are with version 1, if that has the controller. `v1` is
    whether that is mounted here: the kernel lists it even when nothing is, and then no runtime can have used it.
    """
    paths: dict[int, str] = {}
    for line in text.split("\n"):
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if v1 and "devices" in controllers.split(","):
            paths[1] = path
        elif hierarchy == "0" and not controllers:
            paths[2] = path
    if not paths:
        raise ValueError("find the container's cgroup: neither a `devices` controller nor a unified hierarchy")
    version = min(paths)
    if f"{paths[version]}/".startswith("/../"):
        raise ValueError(f"find the container's cgroup: `{paths[version]}` is outside of our cgroup namespace")
    return version, paths[version]


def mounted_at(mountinfo: str, version: int, path: str) -> list[tuple[int, str]]:
    """Where a cgroup can be reached: mount id and directory, from the text of a /proc/<pid>/mountinfo.

    A mount that shows only a part of the hierarchy (a bind mount, one made in a cgroup namespace) counts when
    the cgroup is in that part.
    """
    places: list[tuple[int, str]] = []
    for line in mountinfo.split("\n"):
        if not _is_hierarchy(line, version):
            continue
        mount_id, _, _, root, directory = line.split(" ")[:5]
        root = unescape(root).rstrip("/")
        if f"{path}/".startswith(f"{root}/"):
            places.append((int(mount_id), unescape(directory).rstrip("/") + path[len(root) :].rstrip("/")))
    return places


def _is_hierarchy(line: str, version: int) -> bool:
    """Whether a line of mountinfo is a mount of this version; of version 1, of the one with the devices controller."""
    fstype, _, options = line.partition(" - ")[2].partition(" ")
    if version == 2:
        return fstype == "cgroup2"
    return fstype == "cgroup" and "devices" in options.split(" ")[-1].split(",")


def up_to_scope(path: str) -> list[str]:
    """A cgroup and those above it up to the systemd scope it is in, if it is in one.

    crun with the systemd manager has systemd attach the device program to the container's scope, and puts the
    processes into a cgroup `container` below that, which has none.
    """
    parts = path.split("/")
    top = max((depth for depth, part in enumerate(parts) if part.endswith(".scope")), default=len(parts) - 1)
    return ["/".join(parts[: depth + 1]) for depth in range(top, len(parts))]


def _open_cgroup(version: int, path: str, steps: Steps) -> tuple[int, str]:
    for mount_id, directory in mounted_at(_own("mountinfo"), version, path):
        try:
            fd = _open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue
        steps.append((os.close, (fd,)))
        # Another mount may lie on top of this one, and the same name below it may be another cgroup.
        if f"mnt_id:\t{mount_id}\n" in _own(f"fdinfo/{fd}"):
            _prove(fd, version, directory)
            return fd, directory
    raise FileNotFoundError(errno.ENOENT, f"open the container's cgroup `{path}`: no mount of it can be reached")


def _prove(fd: int, version: int, path: str) -> None:
    """What is written to is a control group, whatever mountinfo says: CVE-2025-52881 led such writes elsewhere."""
    if fstatfs(fd) != (CGROUP_SUPER_MAGIC if version == 1 else CGROUP2_SUPER_MAGIC):
        raise OSError(errno.ENOTSUP, f"open `{path}`: not in a cgroup file system of version {version}")


def _own(name: str) -> str:
    """The text of a file about this process, from a proved procfs."""
    try:
        return proc.read(f"self/{name}")
    except OSError as error:
        raise _fault(f"read `/proc/self/{name}`", error) from error


def _open(path: str, flags: int, dir_fd: int | None = None) -> int:
    try:
        return os.open(path, flags, dir_fd=dir_fd)
    except OSError as error:
        raise _fault(f"open `{path}`", error) from error


def _read(path: str, dir_fd: int | None = None) -> str:
    with open(_open(path, os.O_RDONLY, dir_fd), "rb") as file:
        try:
            return os.fsdecode(file.read())
        except OSError as error:  # ESRCH: the process has gone
            raise _fault(f"read `{path}`", error) from error


# Version 1


def uncovered(devices_list: str, rule: Rule) -> str:
    """The letters of the rule's access that the text of a devices.list does not allow."""
    left = rule.access
    for line in devices_list.split("\n"):
        kind, _, rest = line.partition(" ")
        numbers, _, access = rest.partition(" ")
        major, _, minor = numbers.partition(":")
        if kind not in ("a", rule.type) or major not in ("*", str(rule.major)):
            continue
        if minor in ("*", str(rule.minor)):
            left = "".join(letter for letter in left if letter not in access)
    return left


def _allow_v1(cgroup: int, name: str, rules: list[Rule], steps: Steps) -> None:
    before = _read("devices.list", dir_fd=cgroup)
    # Opened now: the undo may run in a user namespace, or as a user, that may not open it.
    files: list[int] = []
    for file in ("devices.allow", "devices.deny"):
        files.append(_open(file, os.O_WRONLY, cgroup))
        steps.append((os.close, (files[-1],)))
        _prove(files[-1], 1, f"{name}/{file}")
    for rule in rules:
        try:
            os.write(files[0], str(rule).encode())
        except OSError as error:  # EPERM: the parent cgroup does not allow it
            raise _fault(f"allow `{rule}` in cgroup `{name}`", error) from error
        added = uncovered(before, rule)
        if added:
            steps.append((os.write, (files[1], str(Rule(rule.type, rule.major, rule.minor, added)).encode())))


# Version 2


def _allow_v2(cgroups: list[tuple[int, str]], rules: list[Rule], steps: Steps) -> None:
    block = allow_block(rules)
    replacements: list[tuple[str, int, int, int, int]] = []
    for cgroup, name in cgroups:
        flags, programs = attached(cgroup)
        for program in programs:  # none: this cgroup allows everything already
            what = f"device program {program} of cgroup `{name}`"
            try:
                old = _bpf(BPF_PROG_GET_FD_BY_ID, "=III", program, 0, 0)
                steps.append((os.close, (old,)))
                new = load(block + _instructions(old))
                steps.append((os.close, (new,)))
            except OSError as error:
                raise _fault(f"extend {what}", error) from error
            replacements.append((what, cgroup, old, new, flags))
    for what, cgroup, old, new, flags in replacements:
        try:
            _replace(cgroup, old, new, flags)
        except OSError as error:  # EINVAL: Linux before 5.6
            raise _fault(f"replace {what}", error) from error
        steps.append((_replace, (cgroup, new, old, flags)))


def allow_block(rules: list[Rule]) -> bytes:
    """Instructions that return 1 if one of the rules fits the request, and else run on into what follows.

    At the start of a program only R1, the context, and R10, the stack, hold values. Both are kept; what
    follows cannot depend on any other register. It only jumps relative to itself, so it can be moved.
    """
    block = [
        _instruction(_LDX_W, 2, 1, 0),  # access_type
        _instruction(_MOV_X, 3, 2),
        _instruction(_AND_K, 2, constant=0xFFFF),  # R2: type
        _instruction(_RSH_K, 3, constant=16),  # R3: access
        _instruction(_LDX_W, 4, 1, 4),  # R4: major
        _instruction(_LDX_W, 5, 1, 8),  # R5: minor
    ]
    for rule in rules:
        access = sum(_DEV_ACCESS[letter] for letter in set(rule.access))
        block += [  # the offsets jump to the end of these eight
            _instruction(_JNE_K, 2, offset=7, constant=_DEV_TYPE[rule.type]),
            _instruction(_JNE_K, 4, offset=6, constant=rule.major),
            _instruction(_JNE_K, 5, offset=5, constant=rule.minor),
            _instruction(_MOV_X, 0, 3),
            _instruction(_AND_K, 0, constant=~access),  # what the request wants beyond the rule
            _instruction(_JNE_K, 0, offset=2, constant=0),
            _instruction(_MOV_K, 0, constant=1),
            _instruction(_EXIT),
        ]
    return b"".join(block)


def _instruction(code: int, to: int = 0, source: int = 0, offset: int = 0, constant: int = 0) -> bytes:
    return struct.pack(_INSTRUCTION, code, source << 4 | to, offset, constant)


def reloadable(instructions: bytes) -> bytes:
    """A program as read back from the kernel, in a form that can be loaded; OSError if there is none.

    What only computes and compares comes back as it went in. References to maps come back as ids where the kernel
    expects descriptors, and a descriptor of ours could by chance have that number; calls come back as addresses.
    """
    code = list(struct.iter_unpack(_INSTRUCTION, instructions))
    if any(op == _LD_IMM64 and registers >> 4 for op, registers, _, _ in code):
        raise OSError(errno.EOPNOTSUPP, "it refers to a BPF map or another object of the kernel")
    if any(op == _CALL for op, _, _, _ in code):
        raise OSError(errno.EOPNOTSUPP, "it calls functions of the kernel")

    # With sysctl net.core.bpf_jit_harden=2 the kernel hides the constants: it mixes each with a random number in R11,
    # which nobody else may name, and writes `r0 ^= r0` for `r0 = 0`, which reads an R0 that nobody has set. A
    # register that the program does not use serves as well as R11.
    used = {number for _, registers, _, _ in code for number in (registers & 0xF, registers >> 4)}
    spare = max(set(range(2, 10)) - used, default=0)
    if _REG_AX in used and not spare:
        raise OSError(errno.EOPNOTSUPP, "it uses every register, and sysctl net.core.bpf_jit_harden one more")
    result: list[bytes] = []
    for op, registers, offset, constant in code:
        to, source = (spare if number == _REG_AX else number for number in (registers & 0xF, registers >> 4))
        if op == _XOR_X and to == source:
            result.append(_instruction(_MOV_K, to, constant=0))
        else:
            result.append(_instruction(op, to, source, offset, constant))
    return b"".join(result)


def _bpf(command: int, layout: str, *values: int | bytes) -> int:
    return bpf(command, _attr(layout, *values))


def _attr(layout: str, *values: int | bytes) -> bytearray:
    # Always of one size, longer than any answer: some kernels write fields that a shorter attr does not have.
    return bytearray(struct.pack(layout, *values).ljust(128, b"\0"))


def programs(cgroup: int) -> list[bytes]:
    """The instructions of each program that a device access in this cgroup has to pass, those of cgroups above it too.

    OSError, among others where the kernel hides them, or one does more than to compute.
    """
    found = []
    for program in attached(cgroup, effective=True)[1]:
        fd = _bpf(BPF_PROG_GET_FD_BY_ID, "=III", program, 0, 0)
        try:
            found.append(_instructions(fd))
        finally:
            os.close(fd)
    return found


def attached(cgroup: int, *, effective: bool = False) -> tuple[int, list[int]]:
    """The attach flags of the cgroup's device programs, and their ids; `effective`: of cgroups above it too."""
    ids = bytearray(4 * _MAX_PROGS)
    flags = BPF_F_QUERY_EFFECTIVE if effective else 0
    attr = _attr("=IIIIQI", cgroup, BPF_CGROUP_DEVICE, flags, 0, address_of(ids), _MAX_PROGS)
    try:
        bpf(BPF_PROG_QUERY, attr)
    except OSError as error:
        raise _fault("list the device programs of the container's cgroup", error) from error
    _, _, _, flags, _, count = struct.unpack_from("=IIIIQI", attr)
    return flags, list(struct.unpack_from(f"={count}I", ids))


def _instructions(program: int) -> bytes:
    """Instructions that do what a loaded program does."""
    info = bytearray(128)  # struct bpf_prog_info; xlated_prog_len at 20, xlated_prog_insns at 32
    _bpf(BPF_OBJ_GET_INFO_BY_FD, "=IIQ", program, len(info), address_of(info))
    (length,) = struct.unpack_from("=I", info, 20)
    instructions = bytearray(length)
    address = address_of(instructions) if length else 0
    info[:] = bytes(len(info))  # the answer counted other things; asking for those needs buffers
    struct.pack_into("=I", info, 20, length)
    struct.pack_into("=Q", info, 32, address)
    _bpf(BPF_OBJ_GET_INFO_BY_FD, "=IIQ", program, len(info), address_of(info))
    (given,) = struct.unpack_from("=Q", info, 32)
    if not address or not given:
        reason = "the kernel hides it (no CAP_BPF, or sysctl net.core.bpf_jit_harden with kernel.kptr_restrict)"
        raise PermissionError(errno.EPERM, reason)
    return reloadable(bytes(instructions))


def load(instructions: bytes) -> int:
    """A descriptor for a new device program."""
    try:
        return _load(instructions, bytearray())
    except OSError:
        pass  # once more, with more memory and with the verifier's words
    log = bytearray(1 << 20)
    try:
        return _with_memlock(instructions, log)
    except OSError as error:
        words = bytes(log).rstrip(b"\0").decode(errors="replace").strip().split("\n")
        said = [line for line in words if line and not line.startswith("processed ")]
        raise _fault(f"load ({said[-1]})" if said else "load", error) from error


def _with_memlock(instructions: bytes, log: bytearray) -> int:
    """Before Linux 5.11 a program counts as locked memory, of which there may be 64 KiB."""
    import resource

    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (OSError, ValueError):
        return _load(instructions, log)  # without CAP_SYS_RESOURCE; newer kernels do not ask for it
    try:
        return _load(instructions, log)
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, limit)


def _load(instructions: bytes, log: bytearray) -> int:
    code = bytearray(instructions)
    licence = bytearray(b"Apache\0")
    level, log_address = (1, address_of(log)) if log else (0, 0)
    return _bpf(
        BPF_PROG_LOAD,
        "=IIQQIIQII16s",
        BPF_PROG_TYPE_CGROUP_DEVICE,
        len(code) // struct.calcsize(_INSTRUCTION),
        address_of(code),
        address_of(licence),
        level,
        len(log),
        log_address,
        0,
        0,
        b"nvhook_devices",
    )


def attach(cgroup: int, program: int, flags: int, replace: int = 0) -> None:
    _bpf(BPF_PROG_ATTACH, "=IIIII", cgroup, program, BPF_CGROUP_DEVICE, flags, replace)


def _replace(cgroup: int, old: int, new: int, flags: int) -> None:
    """Put `new` where `old` is, in one step. Without BPF_F_ALLOW_MULTI a cgroup has only the one."""
    if flags & BPF_F_ALLOW_MULTI:
        attach(cgroup, new, flags | BPF_F_REPLACE, old)
    else:
        attach(cgroup, new, flags)
