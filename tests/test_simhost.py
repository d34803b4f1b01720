# SPDX-License-Identifier: Apache-2.0
"""The simulated hosts themselves: other tests rely on them, so what they build is checked against other readers."""

from __future__ import annotations

import copy
import ctypes
import glob
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from elftools.elf.dynamic import DynamicSection, DynamicSegment
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import NoteSection

from containers import gpu_lines
from simhost import cachewriter, compiler, description, elfwriter
from simhost.build import build
from simhost.description import SimhostError

TESTS = Path(__file__).parent
HOSTS = sorted((TESTS / "hosts").glob("*.json"))
IDS = [path.stem for path in HOSTS]
NATIVE = compiler.native_machine()

EMPTY: dict[str, Any] = {
    "about": "a host for one test",
    "driver_version": "580.1",
    "cuda_driver_version": "13.0",
    "gpus": [],
    "device_nodes": [],
    "files": [],
    "proc": {},
}


def _needs_root() -> None:
    if os.geteuid() != 0 and "CI" not in os.environ:
        pytest.skip("needs root, to make device nodes")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each host, built once, by the name of its file."""
    _needs_root()
    top = tmp_path_factory.mktemp("hosts")
    for path in HOSTS:
        build(path, top / path.stem)
    return {path.stem: top / path.stem for path in HOSTS}


def _run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def _tool(name: str) -> str:
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if found is None and "CI" not in os.environ:
        pytest.skip(f"{name} is not installed")
    assert found is not None, f"{name} is not installed"
    return found


def _host(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((TESTS / "hosts" / f"{name}.json").read_text())
    return loaded


def _nvidia_smi(host: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = next(path for path in (host / "driver").rglob("nvidia-smi") if not path.is_symlink())
    # The dynamic linker passes over libraries of another class, so the 32-bit ones may come along.
    libraries = {str(path.parent) for path in (host / "driver").rglob("libnvidia-ml.so.1")}
    settings = {"NVHOOK_SIM_DEV": str(host / "dev"), "LD_LIBRARY_PATH": ":".join(sorted(libraries))}
    return _run(program, *arguments, **{**settings, **environment})


# Descriptions


@pytest.mark.parametrize("path", HOSTS, ids=IDS)
def test_description_follows_schema(path: Path) -> None:
    schema = json.loads((TESTS / "simhost" / "schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.Draft7Validator(schema).validate(json.loads(path.read_text()))
    description.load(path)


@pytest.mark.parametrize("path", HOSTS, ids=IDS)
def test_description_agrees_with_itself(path: Path) -> None:
    """The kernel's view in /proc, the nodes, the files and the linker cache must be those of one host."""
    host = json.loads(path.read_text())
    if any(node["path"] == "/dev/dxg" for node in host["device_nodes"]):
        assert not [name for name in host["proc"] if "nvidia" in name], "on WSL 2 the kernel knows nothing of NVIDIA"
        return
    information = [text for name, text in host["proc"].items() if name.endswith("/information")]
    shown = {
        (re.search(r"GPU UUID: \t (\S+)", text)[1], int(re.search(r"Device Minor: \t (\d+)", text)[1]))  # type: ignore[index]
        for text in information
    }
    assert {(gpu["uuid"], gpu["minor"]) for gpu in host["gpus"]} == shown
    nodes = {node["path"] for node in host["device_nodes"]}
    assert {f"/dev/nvidia{gpu['minor']}" for gpu in host["gpus"]} <= nodes
    buses = [gpu["pci_bus_id"] for gpu in sorted(host["gpus"], key=lambda gpu: int(gpu["index"]))]
    assert sorted(buses) == buses
    lines = re.findall(r"^ *\d+ (?:.*nvidia.*|drm|misc|infiniband_verbs|gdrdrv)$", host["proc"]["/proc/devices"], re.M)
    majors = {int(line.split()[0]) for line in lines}
    assert {node["major"] for node in host["device_nodes"]} <= majors
    assert bool(host["driver_version"]) == any("libcuda.so" in entry["path"] for entry in host["files"])


BROKEN = {
    "missing-key": ({"gpus": None}, "'gpus' is a required property"),
    "wrong-type": ({"files": "none"}, "files: "),
    "wrong-nested-type": ({"files": [{"path": 7, "type": "file"}]}, "files/0/path: "),
    "path-with-dots": ({"files": [{"path": "/usr/../../x", "type": "file"}]}, "not a plain absolute path"),
    "path-twice": ({"files": [{"path": "/x", "type": "file"}] * 2}, "`/x` is named twice"),
    "proc-elsewhere": ({"proc": {"/etc/passwd": ""}}, "not a plain path below /proc"),
    "sys-elsewhere": ({"sys": {"/sys/../etc/passwd": ""}}, "not a plain path below /sys"),
}


@pytest.mark.parametrize("with_jsonschema", [True, False], ids=["jsonschema", "by-hand"])
@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_description_broken_is_refused(
    change: dict[str, Any], message: str, with_jsonschema: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_jsonschema:
        monkeypatch.setitem(sys.modules, "jsonschema", None)
    broken = {key: value for key, value in {**EMPTY, **change}.items() if value is not None}
    with pytest.raises(SimhostError) as error:
        description.load(broken)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# ELF files

ELF_FILES = {
    "library": ("libone.so.1", ["libtwo.so.2", "libc.so.6"], "x86-64", None),
    "library-with-abi": ("libone.so.1", ["libc.so.6"], "x86-64", [2, 3, 99]),
    "library-without-soname": (None, [], "x86-64", None),
    "library-i386": ("libone.so.1", ["libc.so.6"], "i386", [2, 3, 99]),
    "library-aarch64": ("libone.so.1", ["libc.so.6"], "aarch64", None),
}
ELF_PARAMETERS = pytest.mark.parametrize(("soname", "needed", "machine", "abi"), ELF_FILES.values(), ids=ELF_FILES)
NUMBERS = {"x86-64": (64, "EM_X86_64"), "i386": (32, "EM_386"), "aarch64": (64, "EM_AARCH64")}


def _dynamic_tags(elf: ELFFile) -> list[Any]:
    section = elf.get_section_by_name(".dynamic")
    assert isinstance(section, DynamicSection)
    return list(section.iter_tags())


@ELF_PARAMETERS
def test_elf_pyelftools_agrees(
    soname: str | None, needed: list[str], machine: str, abi: list[int] | None, tmp_path: Path
) -> None:
    path = tmp_path / "library"
    path.write_bytes(elfwriter.shared_object(soname, needed, machine=machine, abi=abi))
    with path.open("rb") as file:
        elf = ELFFile(file)
        assert NUMBERS[machine] == (elf.elfclass, elf["e_machine"])
        tags = _dynamic_tags(elf)
        assert needed == [tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"]
        assert [soname] * (soname is not None) == [tag.soname for tag in tags if tag.entry.d_tag == "DT_SONAME"]
        segment = next(segment for segment in elf.iter_segments() if isinstance(segment, DynamicSegment))
        assert [tag.entry for tag in tags] == [tag.entry for tag in segment.iter_tags()]
        note = elf.get_section_by_name(".note.ABI-tag")
        assert (abi is not None) == isinstance(note, NoteSection)
        if isinstance(note, NoteSection):
            described = next(note.iter_notes())["n_desc"]
            assert abi == [described["abi_major"], described["abi_minor"], described["abi_tiny"]]


@ELF_PARAMETERS
def test_elf_readelf_agrees(
    soname: str | None, needed: list[str], machine: str, abi: list[int] | None, tmp_path: Path
) -> None:
    path = tmp_path / "library"
    path.write_bytes(elfwriter.shared_object(soname, needed, machine=machine, abi=abi))
    done = _run(_tool("readelf"), "-Wdnl", path, LC_ALL="C")
    assert done.stderr == ""
    assert needed == re.findall(r"\(NEEDED\).*\[(.*)\]", done.stdout)
    assert [soname] * (soname is not None) == re.findall(r"\(SONAME\).*\[(.*)\]", done.stdout)
    assert re.search(r"GNU_STACK .* RW ", done.stdout)
    assert ("ABI: 2.3.99" in done.stdout) == (abi is not None)


def test_elf_dlopen_finds_needed(tmp_path: Path) -> None:
    second = elfwriter.shared_object("libtwo.so.2", ["libc.so.6"], machine=NATIVE, symbols=("second",))
    first = elfwriter.shared_object("libone.so.1", ["libtwo.so.2"], machine=NATIVE, abi=[2, 3, 99])
    (tmp_path / "libone.so.1").write_bytes(first)
    script = "import ctypes; library = ctypes.CDLL('libone.so.1'); library.second"
    lonely = _run(sys.executable, "-c", script, LD_LIBRARY_PATH=str(tmp_path))
    assert "libtwo.so.2: cannot open shared object file" in lonely.stderr
    (tmp_path / "libtwo.so.2").write_bytes(second)
    assert _run(sys.executable, "-c", script, LD_LIBRARY_PATH=str(tmp_path)).returncode == 0


def test_elf_program_runs(tmp_path: Path) -> None:
    path = tmp_path / "program"
    path.write_bytes(elfwriter.program(["libc.so.6"], machine=NATIVE))
    path.chmod(0o755)
    assert _run(path).returncode == 0


def test_elf_ldconfig_agrees(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/ld.so.conf").write_text("/libraries\n")
    (tmp_path / "libraries").mkdir()
    for machine in ("x86-64", "i386"):
        content = elfwriter.shared_object(f"lib{machine}.so.1", ["libc.so.6"], machine=machine)
        (tmp_path / "libraries" / f"lib{machine}.so.1.5").write_bytes(content)
    assert _run(_tool("ldconfig"), "-r", tmp_path).stderr == ""
    listed = _run(_tool("ldconfig"), "-p", "-C", tmp_path / "etc/ld.so.cache").stdout
    assert "libx86-64.so.1 (libc6,x86-64) => /libraries/libx86-64.so.1\n" in listed
    assert "libi386.so.1 (libc6) => /libraries/libi386.so.1\n" in listed


# The linker's cache


@pytest.mark.parametrize("path", HOSTS, ids=IDS)
def test_cache_ldconfig_agrees(path: Path, tmp_path: Path) -> None:
    entries = json.loads(path.read_text()).get("linker_cache", [])  # NixOS has none
    (tmp_path / "cache").write_bytes(cachewriter.cache(entries))
    count, *lines = _run(_tool("ldconfig"), "-p", "-C", tmp_path / "cache", LC_ALL="C").stdout.splitlines()
    expected = [f"\t{entry['name']} ({entry['flags']}) => {entry['path']}" for entry in entries]
    assert expected == [line for line in lines if line.startswith("\t")]
    assert count.startswith(f"{len(entries)} libs found")


def test_cache_is_in_the_linkers_order() -> None:
    names = ["liba.so.9", "liba.so.10", "liba.so", "libab.so", "liba1.so", "liba-b.so", "liba.so.1.2"]
    entries = [{"name": name, "flags": "libc6,x86-64", "path": f"/lib/{name}"} for name in names]
    text = cachewriter.cache(entries)[48 + 24 * len(names) :].split(b"\0")
    # For the linker 1 comes after b, and 10 after 9.
    expected = ["liba1.so", "libab.so", "liba.so.10", "liba.so.9", "liba.so.1.2", "liba.so", "liba-b.so"]
    assert expected == [name.decode() for name in text[:-1:2]]


# Whole hosts


@pytest.mark.root
@pytest.mark.parametrize("name", IDS)
def test_build_files_are_as_described(name: str, built: dict[str, Path]) -> None:
    for entry in _host(name)["files"]:
        path = str(built[name]) + "/driver" + entry["path"]
        mode = os.lstat(path).st_mode
        if entry["type"] == "symlink":
            assert entry["target"] == os.readlink(path)
        elif entry["type"] == "file":
            assert stat.S_ISREG(mode)
            assert max(entry["size"], 1) <= max(os.path.getsize(path), 1)
            assert entry["executable"] == bool(mode & 0o111)
        else:
            assert (stat.S_ISDIR if entry["type"] == "directory" else stat.S_ISSOCK)(mode)


@pytest.mark.root
@pytest.mark.parametrize("name", IDS)
def test_build_libraries_are_as_described(name: str, built: dict[str, Path]) -> None:
    """The compiled ones too: no library more or less than described, whatever the compiler would add."""
    for entry in _host(name)["files"]:
        if "elf" not in entry:
            continue
        with open(f"{built[name]}/driver{entry['path']}", "rb") as file:
            elf = ELFFile(file)
            tags = _dynamic_tags(elf)
            assert entry["elf"].get("class", 64) == elf.elfclass
            assert entry["elf"]["needed"] == [tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"]
            assert (entry["elf"]["soname"] or []) in (
                [],
                *[tag.soname for tag in tags if tag.entry.d_tag == "DT_SONAME"],
            )


@pytest.mark.root
def test_build_is_sparse(built: dict[str, Path]) -> None:
    blocks = sum(
        os.lstat(path).st_blocks for host in built.values() for path in glob.glob(f"{host}/**", recursive=True)
    )
    assert blocks * 512 < len(built) << 20


@pytest.mark.root
@pytest.mark.parametrize("name", IDS)
def test_build_nodes_are_as_described(name: str, built: dict[str, Path]) -> None:
    found = set()
    for directory, _, names in os.walk(built[name] / "dev"):
        for node in names:
            status = os.lstat(os.path.join(directory, node))
            assert stat.S_ISCHR(status.st_mode)
            path = os.path.join(directory, node).removeprefix(str(built[name]))
            mode = f"{stat.S_IMODE(status.st_mode):04o}"
            found.add((path, os.major(status.st_rdev), os.minor(status.st_rdev), mode))
    described = _host(name)["device_nodes"]
    assert {(node["path"], node["major"], node["minor"], node["mode"]) for node in described} == found


@pytest.mark.root
@pytest.mark.parametrize("name", IDS)
def test_build_proc_is_as_described(name: str, built: dict[str, Path]) -> None:
    for path, text in {**_host(name)["proc"], **_host(name).get("sys", {})}.items():
        assert text.encode() == Path(f"{built[name]}{path}").read_bytes()
    boot_ids = {(host / "proc/sys/kernel/random/boot_id").read_text() for host in built.values()}
    assert len(built) == len(boot_ids)
    assert all(re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\n", boot_id) for boot_id in boot_ids)


@pytest.mark.root
def test_build_config_points_at_host(tmp_path: Path) -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    _needs_root()
    directory = tmp_path / 'with "quotes" and \\ and é'
    build(EMPTY, directory)
    config = tomllib.loads((directory / "config.toml").read_text())
    assert f"{directory}/driver" == config["nvidia-container-cli"]["root"]
    assert (str(directory), f"{directory}/run") == (config["nvhook"]["dev-root"], config["nvhook"]["state-dir"])


@pytest.mark.root
@pytest.mark.parametrize("name", [name for name in IDS if name != "no-driver"])
def test_nvidia_smi_lists_gpus(name: str, built: dict[str, Path]) -> None:
    if _machine(name) != NATIVE:
        pytest.skip(f"of {_machine(name)}, and this machine is {NATIVE}")
    done = _nvidia_smi(built[name], "-L")
    assert (0, gpu_lines(name, *range(len(_host(name)["gpus"])))) == (done.returncode, done.stdout)


def _machine(name: str) -> str:
    entry = next(entry for entry in _host(name)["files"] if entry["path"].endswith("/nvidia-smi") and "elf" in entry)
    return str(entry["elf"].get("machine", "x86-64"))


@pytest.mark.root
def test_nvidia_smi_table_has_versions(built: dict[str, Path]) -> None:
    done = _nvidia_smi(built["h100x8-fedora"])
    assert done.returncode == 0
    assert re.search(r"Driver Version: 570\.133\.20 +CUDA Version: 12\.8 ", done.stdout)
    assert len({len(line) for line in done.stdout.splitlines()}) == 1


@pytest.mark.root
def test_nvidia_smi_lists_only_reachable_gpus(built: dict[str, Path], tmp_path: Path) -> None:
    """The second GPU on the bus has minor 0: with that node alone it is GPU 0."""
    host = built["a100x2-debian12"]
    os.mknod(tmp_path / "nvidiactl", stat.S_IFCHR | 0o666, os.makedev(195, 255))
    assert _nvidia_smi(host, "-L", NVHOOK_SIM_DEV=str(tmp_path)).stdout == "No devices found.\n"
    assert _nvidia_smi(host, NVHOOK_SIM_DEV=str(tmp_path)).returncode == 6
    os.mknod(tmp_path / "nvidia0", stat.S_IFCHR | 0o666, os.makedev(195, 0))
    uuid = _host("a100x2-debian12")["gpus"][1]["uuid"]
    expected = f"GPU 0: NVIDIA A100-SXM4-40GB (UUID: {uuid})\n"
    assert expected == _nvidia_smi(host, "-L", NVHOOK_SIM_DEV=str(tmp_path)).stdout


@pytest.mark.root
def test_nvidia_smi_says_what_is_missing(built: dict[str, Path], tmp_path: Path) -> None:
    host = built["h200-ubuntu24"]
    without_nodes = _nvidia_smi(host, "-L", NVHOOK_SIM_DEV=str(tmp_path))
    assert without_nodes.returncode == 9
    without_library = _nvidia_smi(host, "-L", LD_LIBRARY_PATH="")
    if without_library.returncode != 0:  # it is 0 where this machine has a driver of its own
        assert without_library.stdout.startswith("NVIDIA-SMI couldn't find libnvidia-ml.so library in your system.")
        assert without_library.returncode == 12


MIG = [
    {"gi": 1, "ci": 0, "profile": "3g.20gb", "uuid": "MIG-3f2a9c10-58d7-5e4b-9b06-71c4e8d2a5f3"},
    {"gi": 2, "ci": 0, "profile": "3g.20gb", "uuid": "MIG-a60d4e87-1b92-5c3f-8e75-0f9b6d21c4a8"},
]


@pytest.mark.root
def test_nvidia_smi_lists_migs_with_their_nodes(tmp_path: Path) -> None:
    """Of two MIG devices the first has both its nodes, the second only that of its GPU instance."""
    _needs_root()
    host = copy.deepcopy(_host("a100x2-debian12"))
    host["gpus"][1]["mig"] = MIG  # minor 0: capabilities 12 and 13, 21 and 22
    for minor in (12, 13, 21):
        path = f"/dev/nvidia-caps/nvidia-cap{minor}"
        host["device_nodes"].append({"path": path, "major": 236, "minor": minor, "mode": "0444"})
    build(host, tmp_path / "host")
    lines = _nvidia_smi(tmp_path / "host", "-L").stdout.splitlines()
    assert lines[2:] == [f"  MIG 3g.20gb     Device  0: (UUID: {MIG[0]['uuid']})"]


PYNVML_SCRIPT = """
import pynvml as n
n.nvmlInit()
for index in range(n.nvmlDeviceGetCount()):
    gpu = n.nvmlDeviceGetHandleByIndex(index)
    pci = n.nvmlDeviceGetPciInfo(gpu)
    assert n.nvmlDeviceGetHandleByUUID(n.nvmlDeviceGetUUID(gpu)).contents is not None
    print(n.nvmlDeviceGetIndex(gpu), n.nvmlDeviceGetMinorNumber(gpu), n.nvmlDeviceGetUUID(gpu), pci.busId,
        "%08X:%02X:%02X.0" % (pci.domain, pci.bus, pci.device), hex(pci.pciDeviceId), n.nvmlDeviceGetBrand(gpu),
        "%d.%d" % n.nvmlDeviceGetCudaComputeCapability(gpu), n.nvmlDeviceGetMigMode(gpu),
        n.nvmlDeviceGetMaxMigDeviceCount(gpu))
print(n.nvmlSystemGetDriverVersion(), n.nvmlSystemGetCudaDriverVersion())
n.nvmlShutdown()
"""


@pytest.mark.root
def test_nvml_pynvml_reads_it(built: dict[str, Path]) -> None:
    host = built["a100x2-debian12"]
    libraries = f"{host}/driver/usr/lib/x86_64-linux-gnu"
    done = _run(sys.executable, "-c", PYNVML_SCRIPT, NVHOOK_SIM_DEV=str(host / "dev"), LD_LIBRARY_PATH=libraries)
    gpus = _host("a100x2-debian12")["gpus"]
    expected = [
        f"{gpu['index']} {gpu['minor']} {gpu['uuid']} {gpu['pci_bus_id']} {gpu['pci_bus_id']}"
        " 0x20b010de 14 8.0 [0, 0] 7"
        for gpu in gpus
    ]
    assert [*expected, "550.163.01 12040"] == done.stdout.splitlines(), done.stderr


NOW_SCRIPT = """
import pynvml as n
n.nvmlInit()
for i in range(n.nvmlDeviceGetCount()):
    h = n.nvmlDeviceGetHandleByIndex(i)
    memory = n.nvmlDeviceGetMemoryInfo(h, n.nvmlMemory_v2)
    load = n.nvmlDeviceGetUtilizationRates(h).gpu
    print(memory.used >> 20, memory.total >> 20, load, n.nvmlDeviceGetTemperature(h, n.NVML_TEMPERATURE_GPU))
"""


@pytest.mark.root
@pytest.mark.parametrize(
    ("name", "libraries", "expected"),
    [
        pytest.param(
            "a100x2-debian12",
            "usr/lib/x86_64-linux-gnu",
            ["31207 40960 97 64", "4 40960 0 31"],
            id="as-described",
        ),
        pytest.param("h200-ubuntu24", "usr/local/nvidia/lib64", ["512 16384 7 35"], id="not-described"),
    ],
)
def test_nvml_tells_of_the_moment(built: dict[str, Path], name: str, libraries: str, expected: list[str]) -> None:
    host = built[name]
    environment = {"NVHOOK_SIM_DEV": str(host / "dev"), "LD_LIBRARY_PATH": f"{host}/driver/{libraries}"}
    done = _run(sys.executable, "-c", NOW_SCRIPT, **environment)
    assert expected == done.stdout.splitlines(), done.stderr


@pytest.mark.root
def test_build_processes_are_as_described(built: dict[str, Path]) -> None:
    host = built["a100x2-debian12"]
    assert sorted(path.name for path in (host / "proc").iterdir() if path.name.isdecimal()) == ["20417", "20533", "871"]
    process = host / "proc/871"
    assert (process / "comm").read_text() == "nvidia-persiste\n"
    assert (process / "cgroup").read_text() == "0::/system.slice/nvidia-persistenced.service\n"
    assert [os.readlink(process / f"fd/{number}") for number in range(3)] == [
        "/dev/nvidiactl",
        "/dev/nvidia0",
        "/dev/nvidia1",
    ]


@pytest.mark.root
def test_cuda_needs_uvm(built: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = built["h200-ubuntu24"]
    cuda = ctypes.CDLL(str(host / "driver/usr/local/nvidia/lib64/libcuda.so.1"))
    os.mknod(tmp_path / "nvidiactl", stat.S_IFCHR | 0o666, os.makedev(195, 255))
    os.mknod(tmp_path / "nvidia0", stat.S_IFCHR | 0o666, os.makedev(195, 0))
    monkeypatch.setenv("NVHOOK_SIM_DEV", str(tmp_path))
    assert cuda.cuInit(0) == 999
    monkeypatch.setenv("NVHOOK_SIM_DEV", str(host / "dev"))
    count = ctypes.c_int()
    assert cuda.cuInit(0) == 0
    assert cuda.cuDeviceGetCount(ctypes.byref(count)) == 0
    assert count.value == 1


# The builder


def _snapshot(directory: Path) -> dict[str, tuple[int, int, bytes]]:
    """Mode, device number and content of everything below `directory`; of a file its data, not its holes."""
    seen = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        content = os.readlink(path).encode() if path.is_symlink() else b""
        if stat.S_ISREG(status.st_mode):
            with path.open("rb") as file:
                content = b"%d " % status.st_size + file.read(1 << 16)
        seen[str(path.relative_to(directory))] = (status.st_mode, status.st_rdev, content)
    return seen


@pytest.mark.root
def test_build_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    _needs_root()
    host = _host("a100x2-debian12")
    build(host, tmp_path / "host")
    first = _snapshot(tmp_path / "host")
    (tmp_path / "host/driver/left-over").touch()
    (tmp_path / "host/run").mkdir()
    build(host, tmp_path / "host")
    assert first == _snapshot(tmp_path / "host")


def test_build_refuses_a_foreign_directory(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(SimhostError, match="was not made by simhost"):
        build(EMPTY, tmp_path)
    assert [tmp_path / "precious"] == list(tmp_path.iterdir())


def test_build_takes_an_empty_directory(tmp_path: Path) -> None:
    build(EMPTY, tmp_path)
    assert (tmp_path / "config.toml").exists()
    assert not (tmp_path / "driver/etc/ld.so.cache").exists()


def test_build_refuses_a_link_that_leads_out(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    files = [
        {"path": "/usr/lib", "type": "symlink", "target": str(outside)},
        {"path": "/usr/lib/x", "type": "file"},
    ]
    with pytest.raises(SimhostError, match="a symbolic link leads out"):
        build({**EMPTY, "files": files}, tmp_path / "host")
    assert list(outside.iterdir()) == []


def test_build_writes_content_and_other_machines(tmp_path: Path) -> None:
    elf = {"soname": "libcuda.so.1", "needed": ["libc.so.6"], "machine": "aarch64"}
    files = [
        {"path": "/version", "type": "file", "content": "580.1\n", "size": 6},
        {"path": "/libcuda.so.580.1", "type": "file", "elf": elf} if NATIVE != "aarch64" else None,
    ]
    build({**EMPTY, "files": [entry for entry in files if entry]}, tmp_path)
    assert (tmp_path / "driver/version").read_text() == "580.1\n"
    if NATIVE != "aarch64":
        with (tmp_path / "driver/libcuda.so.580.1").open("rb") as file:
            assert ELFFile(file)["e_machine"] == "EM_AARCH64"


def test_command_builds_and_reports_faults(tmp_path: Path) -> None:
    command = [sys.executable, "-I", str(TESTS / "simhost")]
    (tmp_path / "host.json").write_text(json.dumps(EMPTY))
    (tmp_path / "bad.json").write_text("{}")
    good = _run(*command, tmp_path / "host.json", tmp_path / "host")
    assert (good.returncode, good.stdout, good.stderr) == (0, "", "")
    for arguments in ((tmp_path / "bad.json", tmp_path / "other"), (tmp_path / "none.json", tmp_path / "other")):
        bad = _run(*command, *arguments)
        assert bad.returncode == 1
        assert re.fullmatch(r"simhost: [^\n]+\n", bad.stderr)
    assert not (tmp_path / "other").exists()
