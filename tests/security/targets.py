# SPDX-License-Identifier: Apache-2.0
"""What is fuzzed: every reader of something that an image, an engine, a kernel or a damaged disk may have written.

A target takes a value of its strategy and returns whatever the reader makes of it. The exceptions that the reader
documents are let pass here, and no others; fuzzing.py holds time and memory against their limits.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from conftest import DEVICES, HOSTS, VERSION_LINE
from nvhook import audit, errors, plan
from nvhook.commands.cdi import files as cdifiles
from nvhook.commands.config import check as configcheck
from nvhook.commands.configure import documents
from nvhook.container import cleanup, cuda_compat
from nvhook.container.container import Layout
from nvhook.driver import inventory, nvml
from nvhook.errors import NvhookError
from nvhook.formats import plaintoml, quickjson
from nvhook.host import gpus, host, procfs, selection
from nvhook.host.gpus import Gpu, Gpus
from nvhook.host.offers import Offers
from nvhook.host.report import GpuReport, InstanceReport, Report
from nvhook.host.selection import Selection
from nvhook.linux import cgroups, devprog, elf, identity, ldcache, ldmerge, mountinfo, symver
from nvhook.linux.root import DIRECTORY, Root
from nvhook.request import config as configuration
from nvhook.request import request, requirements, spec
from nvhook.request.requirements import Facts
from nvruntime import bundle, caller
from security import mutations
from simhost import cachewriter, elfwriter
from simhost.description import SimhostError, load

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Target:
    __slots__ = ("call", "strategy")

    def __init__(self, strategy: st.SearchStrategy[Any], call: Callable[[Any], object]) -> None:
        self.strategy = strategy
        self.call = call


TARGETS: dict[str, Target] = {}


def _target(strategy: st.SearchStrategy[Any]) -> Callable[[Callable[[Any], object]], Callable[[Any], object]]:
    def add(call: Callable[[Any], object]) -> Callable[[Any], object]:
        TARGETS[call.__name__] = Target(strategy, call)
        return call

    return add


# One place for all that has to be files; each worker is a process of its own and makes its own.
_places: dict[int, Path] = {}


def _place() -> Path:
    if os.getpid() not in _places:
        _places[os.getpid()] = Path(tempfile.mkdtemp(prefix="nvhook-fuzz-"))
    return _places[os.getpid()]


def forget_place() -> None:
    shutil.rmtree(_places.pop(os.getpid(), Path("/nonexistent")), ignore_errors=True)


def _file(name: str, content: bytes) -> Path:
    path = _place() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# Messages


@_target(
    st.tuples(
        mutations.text(
            ["`x` is none", '\\x1b \\u2028 \\U000e0001 "\\'], ["\U000e0001", "\x1b", '"', "\\", "\udcff", "é"]
        ),
        st.integers(200, errors.MAX_LINE),
        st.sampled_from((1, 7, 3000)),
    )
)
def lines(value: tuple[str, int, int]) -> None:
    text, most, times = value
    text = text[: (1 << 20) // times] * times
    line = errors.one_line(text, most)
    assert line.isprintable()
    assert len(quickjson.dumps(line)) <= most + 2
    assert errors.one_line(line, most) == line
    error = errors.RequestError(text, "the remedy")
    assert str(error).endswith("; the remedy")
    for entry in (audit.entry("error", str(error)), audit.entry("error", text, as_json=True)):
        assert len(entry) <= 8192
        assert entry.count(b"\n") == 1


# The linker cache and libraries

_ENTRIES = [
    {"name": name, "flags": "libc6,x86-64", "path": f"/usr/lib/{name}"}
    for name in ("libcuda.so.1", "libcuda.so", "libc.so.6", "libnvidia-ml.so.1", "libz.so.10", "libz.so.9")
]
_CACHE = cachewriter.cache(_ENTRIES)
_OLD_PART = b"ld.so-1.7.0\0" + (2).to_bytes(4, "little") + bytes(24)
_EXTENSION = (
    b"\x74\x21\xa4\xea\x02\0\0\0"
    + b"\0\0\0\0\0\0\0\0\x28\x01\0\0\x10\0\0\0"
    + b"\x01\0\0\0\0\0\0\0\x38\x01\0\0\x04\0\0\0"
)
_WITH_EXTENSION = (
    _CACHE[:28] + b"\x02\0\0\0" + len(_CACHE).to_bytes(4, "little") + _CACHE[36:] + _EXTENSION + b"ldconfig (glibc)"
)
_CACHES = [_CACHE, _OLD_PART + _CACHE, _WITH_EXTENSION]
_NAMES = [
    ldmerge.Name("/usr/lib/x86_64-linux-gnu", name, "x86-64")
    for name in ("libcuda.so.1", "libcuda.so", "libnvidia-ml.so.1", "libnvidia-ptxjitcompiler.so.1")
]
_REAL_CACHE = Path("/etc/ld.so.cache")
if _REAL_CACHE.exists():
    _CACHES.append(_REAL_CACHE.read_bytes())


@_target(mutations.damaged(_CACHES, [b"glibc-ld.so.cache1.1", b"/usr/lib/libcuda.so.1\0", b"9" * 300]))
def linker_cache(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        entries = ldcache.parse(data)
        ldcache.entries_for(entries, "x86-64")


@_target(mutations.damaged(_CACHES, [b"glibc-ld.so.cache1.1", b"/usr/lib/libcuda.so.1\0", b"9" * 300, b"\xff" * 4]))
def linker_cache_with_names(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        ldmerge.directories(data)
    with contextlib.suppress(ValueError):
        merged = ldmerge.merge(data, _NAMES)
        assert len(merged) <= len(data) + 4096
        ldmerge.merge(merged, _NAMES)


# `to/` leads on to the next link; what is long makes a walk slow.
_STEPS = ["to/", "to", "../", "./", "/", "usr/", "usr", "file", "gone/", "./" * 2000, "usr/../" * 500, "/" * 3000]
_TARGETS = st.lists(st.sampled_from(_STEPS), min_size=1, max_size=6).map("".join)


@_target(st.tuples(st.lists(_TARGETS.map(lambda text: text[:4090]), min_size=1, max_size=39), _TARGETS))
def path_through_links(tree: tuple[list[str], str]) -> None:
    """Each directory of a chain has a link `to`; what comes of a path is below the root, or an error."""
    links, path = tree
    top = Path(tempfile.mkdtemp(dir=_place()))
    (top / "root/usr").mkdir(parents=True)
    (top / "file").touch()
    for number, target in enumerate(links):
        here = top / "root" / ("usr" if number % 2 else "")
        with contextlib.suppress(FileExistsError):
            (here / f"to{number // 2 or ''}").symlink_to(target.replace("to", f"to{number // 2 + 1}", 1))
    root = Root(os.open(top / "root", DIRECTORY), 1)
    try:
        for root._openat2 in (True, False):
            with contextlib.suppress(OSError):
                fd = root.open(path)
                assert os.readlink(f"/proc/self/fd/{fd}").startswith(f"{top}/root")
                os.close(fd)
    finally:
        os.close(root.fd)
        shutil.rmtree(top)


_ELFS = [
    elfwriter.shared_object("libcuda.so.1", ["libc.so.6", "libm.so.6"], abi=[2, 3, 99], symbols=("cuInit",)),
    elfwriter.shared_object(None, [], machine="i386"),
    elfwriter.shared_object("libx.so", ["libc.so.6"], machine="aarch64"),
    elfwriter.program(["libc.so.6"]),
    Path("/bin/true").read_bytes(),
]


@_target(mutations.damaged(_ELFS, [b"\x7fELF", b"GNU\0", b"\xff" * 8, b"\0" * 64]))
def elf_file(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        elf.read(io.BytesIO(data))


_VERSIONED = [
    elfwriter.shared_object(
        "libx.so.1", ["libc.so.6"], needs={"libc.so.6": ["GLIBC_2.2.5"]}, defines=("libx.so.1", "X")
    ),
    elfwriter.shared_object("libx.so.1", [], machine="i386", defines=("libx.so.1", "GLIBC_2.36")),
    Path("/bin/true").read_bytes(),
]


@_target(mutations.damaged(_VERSIONED, [b"\x7fELF", b"GLIBC_", b"\xff" * 8, b"\0" * 64]))
def symbol_versions(data: bytes) -> None:
    fd = os.open(_file("versions", data), os.O_RDONLY)
    try:
        versions = symver.read(fd)
        if versions:
            symver.newest(versions.defined() + versions.needed(), "GLIBC_")
    except ValueError:
        return
    finally:
        os.close(fd)


_RULES = [cgroups.Rule("c", 195, minor, "rw") for minor in range(3)]


@_target(
    mutations.damaged([cgroups.allow_block(_RULES)], [b"\x95" + bytes(7), b"\x05" + bytes(7), b"\x61", b"\xff" * 4])
)
def device_answer(data: bytes) -> None:
    program = data[: len(data) // 8 * 8]  # the kernel gives whole instructions
    with contextlib.suppress(ValueError):
        devprog.allows(program, "c", 195, 0, "rw")


# What an engine writes

_CONFIG_JSON = {
    "ociVersion": "1.0.2",
    "process": {
        "env": ["PATH=/bin", "NVIDIA_VISIBLE_DEVICES=0,1", "NVIDIA_DRIVER_CAPABILITIES=all", "CUDA_VERSION=12.4.1"],
        "user": {"uid": 0, "additionalGids": [1]},
        "capabilities": {"bounding": ["CAP_SYS_ADMIN", "CAP_CHOWN"]},
    },
    "root": {"path": "rootfs"},
    "mounts": [{"source": "/dev/null", "destination": "/var/run/nvidia-container-devices/0"}, {"destination": "/proc"}],
    "annotations": {"cdi.k8s.io/a": "nvidia.com/gpu=0,nvidia.com/gpu=1"},
    "hooks": {"prestart": [{"path": "/usr/bin/nvidia-container-runtime-hook", "args": ["x", "prestart"]}]},
    "linux": {
        "namespaces": [{"type": "mount"}],
        "resources": {"devices": [{"allow": False, "access": "rwm"}, {"allow": True, "type": "c", "major": 195}]},
    },
}
_ENV_WORDS = [
    *("NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_VISIBLE_DEVICES=none", "NVIDIA_VISIBLE_DEVICES=void", "CUDA_VERSION=8.0"),
    *("NVIDIA_IMEX_CHANNELS=0,1", "NVIDIA_IMEX_CHANNELS=" + ",".join(map(str, range(9000))), "NVIDIA_GDS=enabled"),
    *("NVIDIA_MIG_CONFIG_DEVICES=all", "NVIDIA_MIG_MONITOR_DEVICES=1", "NVIDIA_REQUIRE_CUDA=cuda>=12 brand=tesla"),
    *("NVIDIA_REQUIRE_X=" + "cuda>=1," * 9000, "NVIDIA_DISABLE_REQUIRE=1", "CUDA_VERSION=" + "9" * 5000),
    *("NVIDIA_VISIBLE_DEVICES=" + ",".join(map(str, range(9000))), "NVIDIA_DRIVER_CAPABILITIES=compute,x"),
    *("/var/run/nvidia-container-devices/imex/7", "/var/run/nvidia-container-devices/cdi/nvidia.com/gpu/0"),
    *("nvidia.com/gpu=all", "nvidia.com/mig=0", "NVIDIA_VISIBLE_DEVICES=nvidia.com/gpu=0,0", "nvidia-cdi-hook"),
]
_DOCUMENTS = mutations.documents([_CONFIG_JSON], _ENV_WORDS)
_TEXTS = [json.dumps(_CONFIG_JSON).encode(), json.dumps(_CONFIG_JSON, indent=1).encode(), b'{"a":[1,-2.5e3,null]}']
_JSON_WORDS = [b"[", b"{", b'"', b"\\u", b"\\ud800", b":", b",", b"1e999", b"9" * 5000, b"NaN", b"\xef\xbb\xbf", b"nul"]
_POLICIES = st.sampled_from(
    [
        b"",
        b"accept-nvidia-visible-devices-as-volume-mounts = true\n",
        b'accept-nvidia-visible-devices-envvar-when-unprivileged = false\nswarm-resource = "CUDA_VERSION,PATH"\n',
        b'supported-driver-capabilities = "compute"\n[features]\nignore-imex-channel-requests = true\n',
    ]
)


@_target(mutations.damaged(_TEXTS, _JSON_WORDS))
def json_text(data: bytes) -> None:
    with contextlib.suppress(ValueError, RecursionError):
        quickjson.loads(data)


@_target(st.tuples(_DOCUMENTS, _POLICIES))
def config_json(value: tuple[Any, bytes]) -> None:
    document, policy = value
    config = configuration.load(str(_file("policy.toml", policy)))
    _file("bundle/config.json", json.dumps(document).encode())
    with contextlib.suppress(NvhookError):
        content, status = spec.read_config(str(_place() / "bundle"))
        described = spec.parse(content, "/bundle")
        described.allows(195, 0)
        asked = request.read(described, config)
        if asked is None:
            return
        quickjson.dumps(asked.describe())
        rule = {"allow": True, "type": "c", "major": 195, "minor": 0, "access": "rw"}
        bundle.add_device_rules(content, [dict(rule)])
        bundle.add_groups(content, [44, 109])
        bundle.add_hook(content, "prestart", "/hook", [], ["PATH=/bin"])
        bundle.write(str(_place() / "bundle"), content, status)
    assert os.listdir(_place() / "bundle") == ["config.json"]


_STATE = {"ociVersion": "1.0.2", "id": "name", "pid": 7, "bundle": "/bundle", "status": "created", "annotations": {}}


@_target(
    st.one_of(
        mutations.documents([_STATE]).map(lambda value: json.dumps(value).encode()),
        mutations.damaged([json.dumps(_STATE).encode()], _JSON_WORDS),
    )
)
def state(data: bytes) -> None:
    fd = os.memfd_create("state")
    try:
        os.pwrite(fd, data, 0)
        with contextlib.suppress(NvhookError):
            read = spec.read_state(fd)
            spec.read_config(read.bundle)
    finally:
        os.close(fd)


@_target(st.lists(mutations.text(["create", "--bundle", "-b", "--bundle=/x", "name", "--log"], ["=", "-"]), max_size=5))
def command_line(words: list[str]) -> None:
    with contextlib.suppress(NvhookError):
        bundle.directory(words)


# What an image asks for

_EXPRESSIONS = ["cuda>=12.2 brand=tesla,driver>=535,driver<536 brand=nvidia,arch>=8.0", "cuda>=8.0", "brand!=geforce"]
_FACTS = [
    Facts(cuda="12.4", driver="550.54.14", arch="9.0", brand="tesla", gpu="0"),
    Facts(driver="nv_dispi.inf_amd64"),
    Facts(),
]


@_target(
    st.lists(mutations.text(_EXPRESSIONS, ["cuda", "driver", ">=", "!", "!=", "=", " ", ",", "9" * 5000, "٣", "."]))
)
def requirement(expressions: list[str]) -> None:
    for facts in _FACTS:
        with contextlib.suppress(NvhookError):
            requirements.are_sure(expressions, facts)
            requirements.check(expressions, facts)
    requirements.facts_of("".join(expressions))


_HOST = Gpus(
    "580.1.2",
    [Gpu(0, 2, "GPU-aa-1", "0000:07:00.0", ""), Gpu(1, 0, "GPU-aa-2", "0000:0F:00.0", ""), Gpu(2, 1, "GPU-??", "", "")],
    {},
    (0, 0, 0o666),
    instances={2: [(7, 0), (1, 0), (1, 1)]},
)
_REPORT = Report(
    "12.4",
    (
        GpuReport(
            "0000:07:00.0",
            "GPU-aa-1",
            "nvidia",
            "8.0",
            mig_enabled=True,
            instances=(InstanceReport(0, 7, 0, "MIG-7a"), InstanceReport(1, 1, 0, "MIG-7b")),
        ),
    ),
)
_DEVICES = [
    *("0", "1", "GPU-aa-1", "gpu-aa", "0000:07:00.0", "07:00", "MIG-7a", "MIG-GPU-aa-1/7/0", "0:1", "all", "none"),
    *("nvidia.com/gpu=0", "runtime.nvidia.com/gpu=all", "nvidia.com/mig=0:1", "void"),
]


@_target(st.lists(mutations.text(_DEVICES, ["GPU-", "MIG-", ":", "/", ".", "0", "9" * 5000, "٣", "f" * 5000, "-"])))
def device_names(devices: list[str]) -> None:
    with contextlib.suppress(NvhookError):
        selection.select(tuple(devices), _HOST, lambda _again: _REPORT)
    for device in devices:
        with contextlib.suppress(NvhookError):
            selection.select((device,), _HOST, lambda _again: _REPORT)


_VARIABLES = [
    *("NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES", "NVIDIA_IMEX_CHANNELS", "NVIDIA_MIG_CONFIG_DEVICES"),
    *("NVIDIA_REQUIRE_CUDA", "CUDA_VERSION", "NVIDIA_DISABLE_REQUIRE", "NVIDIA_GDS", "NVIDIA_NVSWITCH"),
]
_CONTENTS = mutations.text(
    ["0,1,GPU-aa", "compute,utility", "0,1,2", "all", "12.4.1", "cuda>=12.2 brand=tesla", "enabled"],
    [",", " ", "all", "none", "void", "9" * 30, "\n", "٣", "compute"],
)


@_target(st.tuples(st.dictionaries(st.sampled_from(_VARIABLES), _CONTENTS), st.booleans(), _POLICIES))
def environment(value: tuple[dict[str, str], bool, bytes]) -> None:
    env, privileged, policy = value
    config = configuration.load(str(_file("policy.toml", policy)))
    described = spec.Spec(env=env, mounts=[], annotations={}, privileged=privileged, rootfs="/rootfs", device_rules=[])
    with contextlib.suppress(NvhookError):
        asked = request.read(described, config)
        if asked:
            quickjson.dumps(asked.describe())
            requirements.check(asked.requirements, _FACTS[0])


# Annotations and process.env as they stand in a config.json.
_NAMES_OF_CDI = [
    *("nvidia.com/gpu=0,nvidia.com/gpu=GPU-aa", "nvidia.com/gpu=all", "nvidia.com/mig=0:1,nvidia.com/mig=MIG-7a"),
    *("k8s.device-plugin.nvidia.com/gpu=0", "management.nvidia.com/gpu=all", "vendor.com/net=1,nvidia.com/gpu=0"),
]
_LISTS = mutations.text(_NAMES_OF_CDI, [",", "=", "/", " ", "nvidia.com", "all", "none", "void", "\0", "٣", "9" * 5000])
_KEYS = mutations.text(
    ["cdi.k8s.io/x", "nvidia.cdi.k8s.io/container.a", "example.com/x"], ["/", ".", "cdi.k8s.io", "N"]
)
_MARKS = st.sampled_from([{}, {"io.container.manager": "libpod"}, {"io.kubernetes.cri.container-name": "a"}])
_ANNOTATION_POLICIES = st.sampled_from(
    [
        b"",
        b"accept-device-annotations = false\n",
        b"accept-device-annotations = true\naccept-nvidia-visible-devices-envvar-when-unprivileged = false\n",
        b"accept-nvidia-visible-devices-envvar-when-unprivileged = false\n",
        b"nvidia-container-runtime.modes.cdi.annotation-prefixes = ['example.com/']\n",
    ]
)


@_target(st.tuples(st.dictionaries(_KEYS, _LISTS, max_size=3), _MARKS, _ANNOTATION_POLICIES))
def device_annotations(value: tuple[dict[str, str], dict[str, str], bytes]) -> None:
    """Whatever they say, a container gets what they name or nothing: never the `8` of its image beside them."""
    written, marks, policy = value
    config = configuration.load(str(_file("policy.toml", policy)))
    document = {
        "process": {"env": ["NVIDIA_VISIBLE_DEVICES=8"]},
        "root": {"path": "r"},
        "annotations": {**written, **marks},
    }
    with contextlib.suppress(NvhookError):
        described = spec.parse(document, "/bundle")
        source = request.origin(described, config)
        asked = request.read(described, config, [])
        assert asked is None or asked.origin == source
        if asked and source.startswith(request.ANNOTATIONS):
            assert asked.devices in (("all",), ("none",)) or all(
                any(f"={name}" in text for text in written.values()) for name in asked.devices
            )


_ENTRIES_OF_ENV = mutations.text(
    ["NVIDIA_VISIBLE_DEVICES=0,1", "NVIDIA_VISIBLE_DEVICES", "NVIDIA_*", "CUDA_VERSION=8.0", "NVIDIA_REQUIRE_CUDA="],
    ["=", "*", "\0", ",", "NVIDIA_VISIBLE_DEVICES", "all", "nvidia.com/gpu=", "\n"],
)


@_target(st.tuples(st.lists(_ENTRIES_OF_ENV, max_size=6), _POLICIES))
def process_env(value: tuple[list[str], bytes]) -> None:
    """The last entry of a name counts, and one without `=` is none, as for the program that is started."""
    entries, policy = value
    config = configuration.load(str(_file("policy.toml", policy)))
    with contextlib.suppress(NvhookError):
        described = spec.parse({"process": {"env": entries}, "root": {"path": "r"}}, "/bundle")
        pairs = [entry.split("=", 1) for entry in entries if "=" in entry]
        assert described.env == {pair[0]: pair[1] for pair in pairs}
        asked = request.read(described, config)
        if asked:
            assert pairs
            quickjson.dumps(asked.describe())


_COMPAT = ["libcuda.so.1", "libcuda.so.580.65.06", "libcuda.so", "libnvidia-ptxjitcompiler.so.1", "libcuda.so.999"]


@_target(st.sets(mutations.text(_COMPAT, [".", "libcuda.so.", "9" * 240, "٣", "²", "\n", "\udcff"]), max_size=8))
def compat_directory(names: set[str]) -> None:
    directory = _place() / "image/usr/local/cuda/compat"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for name in ("libcuda.so.1", *names):
        with contextlib.suppress(OSError, ValueError):
            (directory / name.replace("/", "-")).touch()
    root = Root(os.open(_place() / "image", DIRECTORY))
    try:
        cuda_compat.find(configuration.load("/nonexistent"), ("compute",), root, "550.54.14", set, [])
    finally:
        os.close(root.fd)


# What the kernel and the driver tell

_INFORMATION = (
    "Model: \t\t NVIDIA A100\nIRQ:   \t\t 64\nGPU UUID: \t GPU-aa\nBus Location: \t 0000:07:00.0\n"
    "Device Minor: \t 0\nGPU Excluded:\t No\n"
)
_CAPABILITY = "DeviceFileMinor: 3\nDeviceFileMode: 256\nDeviceFileModify: 1\n"
_PROC_FILES = {
    "proc/driver/nvidia/version": VERSION_LINE,
    "proc/driver/nvidia/params": "DeviceFileUID: 0\nDeviceFileGID: 0\nDeviceFileMode: 438\nModifyDeviceFiles: 1\n"
    "ImexChannelCount: 2048\n",
    "proc/driver/nvidia/registry": 'Binary: ""\n',
    "proc/driver/nvidia/gpus/0000:07:00.0/information": _INFORMATION,
    "proc/driver/nvidia/capabilities/gpu0/mig/gi7/access": _CAPABILITY,
    "proc/driver/nvidia/capabilities/gpu0/mig/gi7/ci0/access": _CAPABILITY,
    "sys/bus/pci/devices/0000:07:00.0/drm/card0/dev": "226:0\n",
    "sys/bus/pci/devices/0000:07:00.0/drm/renderD128/dev": "226:128\n",
}
_PROC_FILES["proc/devices"] = DEVICES.replace(
    "511 nvidia-uvm", "510 nvidia-caps\n509 nvidia-caps-imex-channels\n511 nvidia-uvm"
)
_PROC_NAMES = {
    "gpu": ["0000:07:00.0", "0000:0f:00.0"],
    "mig": ["gpu0", "gi7", "ci0", "gpu1"],
}
_PROC_WORDS = [":", "\n", "9" * 5000, "99999999", "-1", "Device Minor: 5\n", "GPU Excluded: Yes\n", "Block", "\r", "٣"]


@_target(
    st.tuples(
        st.dictionaries(
            st.sampled_from(sorted(_PROC_FILES)), mutations.text(list(_PROC_FILES.values()), _PROC_WORDS), min_size=1
        ),
        st.lists(mutations.text(_PROC_NAMES["gpu"], [":", ".", "f" * 200]), max_size=2),
        st.lists(mutations.text(_PROC_NAMES["mig"], ["gpu", "gi", "ci", "9" * 200]), max_size=2),
    )
)
def proc_files(value: tuple[dict[str, str], list[str], list[str]]) -> None:
    files, addresses, instances = value
    top = _place() / "host"
    shutil.rmtree(top, ignore_errors=True)
    for name, content in {**_PROC_FILES, **files}.items():
        _file(f"host/{name}", content.encode("utf-8", "surrogateescape"))
    for address in addresses:
        with contextlib.suppress(OSError, ValueError):
            _file(f"host/proc/driver/nvidia/gpus/{address.replace('/', '-')}/information", _INFORMATION.encode())
    for name in instances:
        with contextlib.suppress(OSError, ValueError):
            place = name.replace("/", "-")
            _file(f"host/proc/driver/nvidia/capabilities/gpu0/mig/{place}/{place}/access", _CAPABILITY.encode())
    config = configuration.load(
        str(_file("host.toml", f"[nvhook]\nproc-root = '{top}'\ndev-root = '{top}'\n".encode()))
    )
    asked = request.Request(("all",), configuration.CAPABILITIES, (), "", imex_channels=(0,), mig_rights=("config",))
    assert 0 <= gpus.imex_channel_count(str(top)) < 1 << 20
    with contextlib.suppress(NvhookError):
        gpus.instances(str(top / "proc"))
        procfs.read(str(top))
        found = gpus.read(str(top))
        chosen = selection.select(("all",), found, lambda _again: _REPORT)
        requirements.facts_of(found.driver_version)
        offers = host.now(config, asked, chosen, found, [])
        nodes = plan.devices(asked.capabilities, chosen.gpus, offers)
        for node in nodes:
            os.makedev(node.major, node.minor)
        root = Root(os.open(_place() / "host", DIRECTORY))
        try:
            cuda_compat.find(config, asked.capabilities, root, found.driver_version, chosen.brands, [])
        finally:
            os.close(root.fd)


_MOUNTS = Path("/proc/self/mountinfo").read_text().splitlines(keepends=True)[:8]
_MOUNTINFO = [
    "".join(_MOUNTS),
    "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 shared:7 - ext3 /dev/root rw,errors=continue\n",
    "40 35 0:29 / /sys/fs/cgroup/devices rw - cgroup cgroup rw,devices\n"
    "41 35 0:30 /../x /sys/fs/cgroup rw - cgroup2 a rw\n",
]
_CGROUPS = ["12:devices:/docker/abc\n0::/system.slice/a.scope\n", "0::/../x\n", "0::/\n"]


@_target(mutations.text(_MOUNTINFO, [" - ", "\\040", "\\", "\\777", "shared:1", " ", "\n", "cgroup2", "\u2028", "٣"]))
def mounts(text: str) -> None:
    mountinfo.mount_points(text)
    mountinfo.shared(text)
    mountinfo.mounts(text)
    mountinfo.unescape(text)
    for version in (1, 2):
        with contextlib.suppress(ValueError):
            cgroups.mounted_at(text, version, "/docker/abc")


@_target(mutations.text([*_CGROUPS, "c 195:* rwm\na *:* rwm\n", "c 1:3 r\n"], [":", "devices", "/..", "*", " ", "\n"]))
def cgroup_files(text: str) -> None:
    with contextlib.suppress(ValueError):
        _, path = cgroups.devices_cgroup(text)
        cgroups.up_to_scope(path)
        cgroups.devices_cgroup(text, v1=False)
    cgroups.uncovered(text, cgroups.Rule("c", 195, 0, "rw"))


@_target(mutations.damaged([bytes(64), cgroups.allow_block([cgroups.Rule("c", 195, 0, "rw")])], [b"\x85", b"\x18"]))
def device_program(data: bytes) -> None:
    with contextlib.suppress(OSError):
        cgroups.reloadable(data[: len(data) // 8 * 8])


# Files of the host's administrator, and what is kept

_SHIPPED = (HOSTS.parent.parent / "etc/config.toml").read_text()
_TOMLS = [
    _SHIPPED,
    _SHIPPED.replace("\n#", "\n"),
    "[nvhook]\nstate-dir = '/x'\n",
    'a = 1\nb = [1, [2]]\n[c.d]\ne = {f = "g", "h.i" = 1979-05-27}\n[[j]]\nk = """l"""\n',
]
_TOML_WORDS = [
    *("[", "]", "[[", "]]", "=", ".", '"', "'", '"""', "#", "\n", "\r\n", "{", "}", ",", "\\u0000", "\\", "true"),
    *("a." * 2000, "[" * 3000, "9" * 5000, "1979-05-27", "é", "\x00", '"\\u0000"', "inf", "0x", "nvhook"),
]


@_target(mutations.text(_TOMLS, _TOML_WORDS))
def config_toml(text: str) -> None:
    path = _file("config.toml", text.encode("utf-8", "surrogateescape"))
    with contextlib.suppress(NvhookError):
        configuration.load(str(path))
    with contextlib.redirect_stdout(io.StringIO()):
        configcheck.check(str(path), must_exist=True)


@_target(mutations.text(_TOMLS, _TOML_WORDS))
def plain_toml(text: str) -> None:
    """tomllib says the same, or nothing is said."""
    found = plaintoml.parse(text)
    if found is not None:
        with contextlib.suppress(RecursionError):  # to compare what dots have nested
            assert found == tomllib.loads(text)


_PATHS = st.sampled_from([("a",), ("nvhook", "state-dir"), ("c", "d", "e"), ("runtimes", "nvidia", "path"), ("j", "k")])
_VALUES = st.sampled_from(["text", True, ["a", "b"], {"path": "x", "args": []}])


@_target(st.tuples(mutations.text(_TOMLS, _TOML_WORDS), _PATHS, _VALUES))
def toml_document(value: tuple[str, tuple[str, ...], object]) -> None:
    _edit(documents.Toml, *value)


_DAEMON_JSON = [
    '{\n    "runtimes": {\n        "nvidia": {"path": "x", "runtimeArgs": []}\n    },\n    "a": 1\n}\n',
    '{"c":{"d":{"e":[1,2]}},"a":null}',
]


@_target(st.tuples(mutations.text(_DAEMON_JSON, [item.decode("latin-1") for item in _JSON_WORDS]), _PATHS, _VALUES))
def json_document(value: tuple[str, tuple[str, ...], object]) -> None:
    _edit(documents.Json, *value)


_MAX_FILE = 1 << 15  # a file that its administrator wrote: tomlkit takes seconds for ten times that


_CDI_YAML = [
    "cdiVersion: 0.5.0\nkind: a.b/c\ndevices:\n- name: '0'\n  containerEdits:\n    deviceNodes:\n"
    "    - path: /dev/x\n      major: 1\n      permissions: rw\ncontainerEdits:\n  env: [A=B]\n  mounts:\n"
    "  - {hostPath: /a, containerPath: /b, options: [ro]}\n",
    "a: &a [1, 0x2, 1.5e3, 2001-01-01, !!binary x]\nb: *a\n<<: {c: ~}\n? [d]\n: |\n  text\n",
]
_CDI_JSON = [
    '{"cdiVersion": "1.1.0", "kind": "a/b", "devices": [{"name": "x", "containerEdits": {"additionalGids": [1]}}]}'
]
_YAML_WORDS = [
    *("- ", ": ", "&x ", "*x", "!!int ", "!!timestamp ", "<<: ", "=", "? ", "|\n ", "---\n", "...\n", "%TAG", "1:1:1"),
    *(
        "[" * 3000,
        "- " * 3000,
        "9" * 5000,
        "0b",
        "0x_",
        "2001-99-99",
        ".inf",
        "name",
        "type",
        "'",
        '"\\x1b"',
        "\t",
        "\ufeff",
    ),
]


@_target(mutations.text(_CDI_YAML, _YAML_WORDS))
def cdi_yaml(text: str) -> None:
    _specification(text, "x.yaml")


@_target(mutations.text(_CDI_JSON, [item.decode("latin-1") for item in _JSON_WORDS]))
def cdi_json(text: str) -> None:
    _specification(text, "x.json")


def _specification(text: str, name: str) -> None:
    with contextlib.suppress(cdifiles.Fault):
        cdifiles.parse(text[:_MAX_FILE].encode("utf-8", "surrogateescape"), name)


def _edit(kind: type[documents.Document], text: str, path: tuple[str, ...], value: object) -> None:
    with contextlib.suppress(NvhookError):
        document = kind(text[:_MAX_FILE], "name")
        document.put(path, value)
        document.drop(path)


_DESCRIPTION = {
    "about": "x",
    "driver_version": "550.1.2",
    "cuda_driver_version": "12.4",
    "gpus": [
        {
            "index": 0,
            "minor": 0,
            "name": "A",
            "uuid": "GPU-c41d7b52-93e6-4f0a-8d15-2b7e60a9f3c8",
            "pci_bus_id": "00000000:07:00.0",
            "compute_capability": "8.0",
        }
    ],
    "device_nodes": [{"path": "/dev/nvidia0", "major": 195, "minor": 0, "type": "c", "mode": "0666"}],
    "files": [{"path": "/a", "type": "file", "content": "x"}, {"path": "/b", "type": "symlink", "target": "a"}],
    "proc": {"/proc/devices": "x"},
}


@_target(
    st.one_of(
        mutations.documents([_DESCRIPTION]).map(lambda value: json.dumps(value).encode()),
        mutations.damaged([json.dumps(_DESCRIPTION).encode()], _JSON_WORDS),
    )
)
def host_description(data: bytes) -> None:
    with contextlib.suppress(SimhostError):
        load(_file("host.json", data))


_INVENTORY = {
    "libraries": [
        {
            "path": f"/usr/lib/{soname}",
            "soname": soname,
            "bits": 64,
            "needed": ["libc.so.6"],
            "capabilities": ["compute", "utility"],
            "directory": "",
        }
        for soname in ("libcuda.so.1", "libnvidia-ml.so.1")
    ],
    "binaries": [
        {"path": "/usr/bin/nvidia-smi", "name": "nvidia-smi", "capability": "utility", "directories": [["/a", "/b"]]}
    ],
    "files": [{"path": "/f.bin", "destination": "/lib/f.bin", "capabilities": ["compute"], "bits": 64}],
}


def _kept_config() -> configuration.Config:
    top = _place() / "kept"
    (top / "state").mkdir(parents=True, exist_ok=True)
    (top / "driver").mkdir(exist_ok=True)
    text = f"[nvidia-container-cli]\nroot = '{top}/driver'\n[nvhook]\nproc-root = '{top}'\nstate-dir = '{top}/state'\n"
    if not (top / "config.toml").exists():
        (top / "config.toml").write_text(text)
    return configuration.load(str(top / "config.toml"))


@_target(mutations.documents([_INVENTORY]))
def kept_inventory(document: Any) -> None:
    """A driver that can be planned with, or none at all: this host has no libraries to make another of."""
    config = _kept_config()
    if isinstance(document, dict):
        document = {"origin": inventory._origin(config, "580.1.2"), **document}
    (_place() / "kept/state/inventory.json").write_text(json.dumps(document))
    (_place() / "kept/state/inventory.json").chmod(0o644)
    with contextlib.suppress(NvhookError):
        driver = inventory.load(config, "580.1.2", [], keep=False)
        asked = request.Request(("all",), configuration.CAPABILITIES, (), "")
        offers = Offers(Gpus("580.1.2", _HOST.gpus, {"nvidia-uvm": 511}, (0, 0, 0o666)))
        edits = plan.make(asked, Selection(_HOST.gpus, []), offers, driver, Layout("/usr/lib64", "/usr/lib32"))
        quickjson.dumps([edit.describe() for edit in edits])


_ANSWERS = [
    {"time": 1.5, "report": _REPORT.describe()},
    {"time": 99999999999, "failure": "it is broken", "hint": "mend it"},
]


@_target(mutations.documents(_ANSWERS))
def kept_report(document: Any) -> None:
    config = _kept_config()
    if isinstance(document, dict):
        document = {"origin": inventory._nvml_origin(config, _HOST), **document}
    (_place() / "kept/state/nvml.json").write_text(json.dumps(document))
    (_place() / "kept/state/nvml.json").chmod(0o644)
    with contextlib.suppress(NvhookError):
        inventory.report(config, _HOST, None, [], keep=False)


@_target(mutations.documents([_REPORT.describe()]))
def nvml_answer(document: Any) -> None:
    with contextlib.suppress(ValueError):
        nvml.parse(document)


_TRACES = [
    {"kind": "time", "path": "/usr/lib", "before": 5, "after": 6},
    {"kind": "file", "path": "/usr/lib/a"},
    {"kind": "link", "path": "/usr/lib/l", "target": "a", "former": "b"},
    {"kind": "node", "path": "/dev/n", "major": 195, "minor": 0},
    {"kind": "directory", "path": "/usr/lib/d"},
    {"kind": "cache", "path": "/etc/ld.so.cache", "made": [1, 2, 3], "former": [4, 5, 6, 0, 0, 420]},
]
_KEPT_ABOUT_A_CONTAINER = {"bundle": "/bundle", "rootfs": "ROOTFS", "root": "ROOT", "process": [1, 2], "since": 3}
_PLACES_OUTSIDE = ["/usr/lib/../../../canary", "../../canary", "/out", "/out/canary"]


@_target(mutations.documents([[_KEPT_ABOUT_A_CONTAINER, _TRACES]], _PLACES_OUTSIDE))
def kept_about_a_container(document: Any) -> None:
    """container.json and traces.json; a second container over the same root filesystem is over as well."""
    rootfs = _place() / "rootfs"
    for name in ("usr/lib/d", "dev", "etc"):
        (rootfs / name).mkdir(parents=True, exist_ok=True)
    (rootfs / "usr/lib/a").touch()
    with contextlib.suppress(OSError):
        (rootfs / "usr/lib/l").symlink_to("a")
        (rootfs / "out").symlink_to("..")
    _file("canary", b"")
    about, traces = document if isinstance(document, list) and len(document) == 2 else (document, _TRACES)
    fd = os.open(rootfs, os.O_PATH)
    root = json.dumps(identity.of(fd).describe())
    os.close(fd)
    for name, kept in (("name", about), ("other", _KEPT_ABOUT_A_CONTAINER)):
        text = json.dumps(kept).replace('"ROOTFS"', json.dumps(str(rootfs))).replace('"ROOT"', root)
        _file(f"state/containers/{name}/container.json", text.encode())
        _file(f"state/containers/{name}/traces.json", json.dumps(traces).encode())
        os.chmod(_place() / f"state/containers/{name}", 0o700)
        for file in ("container.json", "traces.json"):
            os.chmod(_place() / f"state/containers/{name}/{file}", 0o600)
    for name in ("name", "other"):
        with contextlib.suppress(NvhookError):
            cleanup.poststop(str(_place() / "state"), spec.State(0, "/bundle", name), [])
    assert (_place() / "canary").exists()


# The server


_REQUEST = (
    (3).to_bytes(4, "little") + (2).to_bytes(4, "little") + (18).to_bytes(4, "little") + b"hook\0/c\0prestart\0A=b\0C\0"
)


@_target(mutations.damaged([_REQUEST], [b"\0", b"\xff" * 4, b"=", b"edit\0"]))
def server_request(data: bytes) -> None:
    with contextlib.suppress(caller.Refused):
        words, variables, umask = caller.parse(data)
        assert words
        assert umask <= 0o777
        assert len(words) + len(variables) <= data.count(b"\0")
