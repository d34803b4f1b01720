# SPDX-License-Identifier: Apache-2.0
"""Prove nvhook on a machine with a real NVIDIA GPU: `python3 tests/gpu/prove.py`, as root.

Real containers are started with runc and crun (whichever are there), their images made of this machine's own files.
What each sees is compared with what the host sees, a CUDA program compiled on the spot computes in a container, and
the host's mount table and files are compared before and after. One line a check; exit 1 if one fails.

Needs busybox (static), what scripts/setup puts into build/packages (or NVHOOK_PACKAGES), and nvcc for the CUDA program.
With --loaders DIR, where the loaders of Vulkan and EGL are unpacked (libvulkan1, libegl1, libglvnd0, libx11-6, libxext6
and what they need, of Debian or Ubuntu), a program looks for the GPU through them, in an image that has them.
With --torch PYTHON, an interpreter with PyTorch, the script of docs/tutorial.md trains in a container.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from containers import REPOSITORY, TRIPLET, Bundle, add_program, make_image
from simhost.build import build

PACKAGES = os.environ.get("NVHOOK_PACKAGES") or str(REPOSITORY / "build/packages")
sys.path.append(PACKAGES)
import cdi_engine  # noqa: E402 - it takes PyYAML

# What a start could leave behind, or change by mistake: every place that edits are aimed at, as the host has it.
_WATCHED = ("/dev", "/etc", "/usr/bin", "/usr/sbin", "/usr/lib", "/lib64", "/usr/local/nvidia", "/var/lib", "/opt")

# Docker's own, made by every dockerd that starts.
_OF_THE_ENGINE = ("/etc/docker", "/opt/containerd")


class Proof:
    def __init__(self, installed: Path, config: Path, runtimes: list[str], place: Path) -> None:
        self.wrapper = installed / "bin/nvidia-container-runtime"
        self.hook = installed / "bin/nvidia-container-runtime-hook"
        self.config = config
        self.runtimes = runtimes
        self.place = place
        self.failures = 0
        self.count = 0

    def check(self, what: str, *, holds: bool, shown: str = "") -> None:
        self.failures += not holds
        print(f"{'ok  ' if holds else 'FAIL'}  {what}")
        if shown.strip() and not holds:
            print("      " + shown.strip().replace("\n", "\n      "))

    def bundle(self, image: Path) -> Bundle:
        """A bundle over a copy of `image`, so that every container begins with the same files."""
        self.count += 1
        rootfs = self.place / f"root{self.count}"
        shutil.copytree(image, rootfs, symlinks=True)
        return Bundle(self.place / f"bundle{self.count}", rootfs)

    def config_for(self, runtime: str) -> Path:
        path = self.config.with_name(f"config-{Path(runtime).name}.toml")
        lines = [line for line in self.config.read_text().splitlines() if not line.startswith("runtimes")]
        place = lines.index("[nvidia-container-runtime]") + 1
        lines.insert(place, f"runtimes = [{json.dumps(runtime)}]")
        path.write_text("\n".join(lines) + "\n")
        return path

    def start(
        self, image: Path, runtime: str, script: str, devices: str | None, **env: str
    ) -> subprocess.CompletedProcess[str]:
        if devices is not None:
            env["NVIDIA_VISIBLE_DEVICES"] = devices
        bundle = self.bundle(image).write(["/bin/sh", "-c", script], env)
        return bundle.run(self.config_for(runtime), runtime=runtime, wrapper=self.wrapper)


def prove_runtime(proof: Proof, runtime: str, images: dict[str, Path], host_list: str, cuda: bool) -> None:
    name = Path(runtime).name
    debian = images["debian"]
    for family, image in images.items():
        result = proof.start(image, runtime, "nvidia-smi -L", "all")
        what = f"{name}: nvidia-smi -L in the {family} image equals the host's"
        proof.check(what, holds=result.stdout == host_list, shown=result.stdout + result.stderr)
    result = proof.start(debian, runtime, "ldconfig -p", "all")
    names = [line.split()[0] for line in result.stdout.splitlines()[1:] if line.strip()]
    holds = "libcuda.so.1" in names and "libc.so.6" in names
    proof.check(f"{name}: ldconfig -p names libcuda.so.1 and keeps libc.so.6", holds=holds, shown=result.stdout)
    if cuda:
        result = proof.start(debian, runtime, "sums", "all")
        print("      " + result.stdout.strip())
        proof.check(f"{name}: the CUDA program's sums are right", holds=result.returncode == 0, shown=result.stderr)
    result = proof.start(debian, runtime, "ls /dev; nvidia-smi -L", "none")
    holds = "No devices found" in result.stdout and "nvidia0" not in result.stdout
    proof.check(f"{name}: with `none` no device is listed", holds=holds, shown=result.stdout + result.stderr)
    result = proof.start(debian, runtime, "ls /dev /usr/bin", None)
    holds = result.returncode == 0 and "nvidia" not in result.stdout
    proof.check(
        f"{name}: without a request nothing of the driver is there", holds=holds, shown=result.stdout + result.stderr
    )
    script = "mknod /dev/other c 195 100 && cat </dev/other"
    result = proof.start(debian, runtime, script, "all")
    holds = "not permitted" in result.stderr
    proof.check(
        f"{name}: another GPU's node made by hand is denied (EPERM)", holds=holds, shown=result.stdout + result.stderr
    )
    result = proof.start(debian, runtime, "true", "4711")
    holds = result.returncode == 1 and "unknown device `4711`" in result.stderr
    proof.check(f"{name}: an unknown device is refused with a line that says so", holds=holds, shown=result.stderr)


def prove_proc(proof: Proof, runtime: str, image: Path, host_list: str) -> None:
    """Below /proc/driver/nvidia a container sees its own GPUs, is told to make no nodes, and can write nothing."""
    name = Path(runtime).name
    directory = Path("/proc/driver/nvidia")
    if not directory.exists():
        print(f"skip  {name}: no {directory} on this machine")
        return
    addresses = sorted(os.listdir(directory / "gpus"))
    for devices, expected in (("all", addresses), ("0", addresses[:1]), ("none", [])):
        script = f"grep ModifyDeviceFiles {directory}/params; ls {directory}/gpus 2>/dev/null"
        result = proof.start(image, runtime, script, devices)
        holds = result.stdout.splitlines() == ["ModifyDeviceFiles: 0", *expected]
        what = f"{name}: with `{devices}` {directory} says ModifyDeviceFiles: 0 and lists the chosen GPUs alone"
        proof.check(what, holds=holds, shown=result.stdout + result.stderr)
    script = (
        f"cd {directory}; for name in new params gpus/*/information gpus/new; do echo x >$name; done; nvidia-smi -L"
    )
    result = proof.start(image, runtime, script, "all")
    holds = result.stderr.count("Read-only file system") == 3 + len(addresses) and result.stdout == host_list
    proof.check(f"{name}: nothing can be written there", holds=holds, shown=result.stdout + result.stderr)
    script = f"cat {directory}/version; cat {directory}/gpus/*/information"
    result = proof.start(image, runtime, script, "all")
    sources = [directory / "version", *(directory / "gpus" / address / "information" for address in addresses)]
    holds = result.stdout == "".join(path.read_text() for path in sources)
    proof.check(f"{name}: what it reads there is the host's", holds=holds, shown=result.stdout + result.stderr)


def prove_drawing(proof: Proof, runtime: str, image: Path) -> None:
    """With `graphics` the loaders in the image find the driver: JSON, libraries and nodes. Without it they do not."""
    name = Path(runtime).name
    result = proof.start(image, runtime, "draw", "all", NVIDIA_DRIVER_CAPABILITIES="graphics")
    print("      " + result.stdout.strip().replace("\n", "\n      "))
    proof.check(f"{name}: Vulkan and EGL find the GPU", holds=result.returncode == 0, shown=result.stderr)
    result = proof.start(image, runtime, "draw", "all", NVIDIA_DRIVER_CAPABILITIES="utility")
    proof.check(f"{name}: without `graphics` they do not", holds=result.returncode == 1, shown=result.stdout)


def prove_requirements(proof: Proof, runtime: str, image: Path) -> None:
    """What an image requires is held against the real GPU: by the driver's version, and by what NVML tells."""
    name = Path(runtime).name
    result = proof.start(image, runtime, "true", "all", NVIDIA_REQUIRE_X="cuda>=9.0 arch>=3.0,brand=x")
    proof.check(f"{name}: a requirement that holds", holds=result.returncode == 0, shown=result.stderr)
    for expression in ("arch>=99.0", "brand=nosuchbrand", "cuda>=99.0", "driver<1"):
        result = proof.start(image, runtime, "true", "all", NVIDIA_REQUIRE_X=expression)
        holds = result.returncode == 1 and f"image needs `{expression}`" in result.stderr
        proof.check(f"{name}: `{expression}` is refused", holds=holds, shown=result.stdout + result.stderr)
        print(f"      {result.stderr.strip().partition('requirement error: ')[2]}")


def prove_hook_alone(proof: Proof, runtime: str, image: Path, host_list: str) -> None:
    """As dockerd's --gpus does it: the hook is in the spec, no wrapper has seen it, the cgroup is not yet open."""
    bundle = proof.bundle(image).write(["/bin/sh", "-c", "nvidia-smi -L"], {"NVIDIA_VISIBLE_DEVICES": "all"})
    bundle.config["hooks"] = {
        "prestart": [
            {
                "path": str(proof.hook),
                "args": ["nvidia-container-runtime-hook", "--config", str(proof.config), "prestart"],
                "env": ["PATH=/usr/bin:/bin"],
            }
        ]
    }
    bundle.write()
    result = bundle.run(proof.config, runtime=runtime, wrapper=Path(runtime))
    what = f"{Path(runtime).name}: the hook alone, without the wrapper (docker run --gpus)"
    proof.check(what, holds=result.stdout == host_list, shown=result.stdout + result.stderr)


def prove_user_namespace(proof: Proof, runtime: str, image: Path, host_list: str) -> None:
    bundle = proof.bundle(image)
    for path in (bundle.rootfs, *bundle.rootfs.rglob("*")):
        os.chown(path, 100000, 100000, follow_symlinks=False)
    linux = bundle.config["linux"]
    linux["namespaces"].append({"type": "user"})
    linux["uidMappings"] = linux["gidMappings"] = [{"containerID": 0, "hostID": 100000, "size": 65536}]
    # Where the machine has the driver's directory in /proc, the container has it with our params.
    params = "/proc/driver/nvidia/params"
    script = f"nvidia-smi -L; [ ! -e {params} ] || grep -qx 'ModifyDeviceFiles: 0' {params} || echo seen"
    script += "; stat -c '%u %n' /etc/ld.so.cache /usr/lib*/*/libcuda.so.1 | sort -u"
    bundle.write(["/bin/sh", "-c", script], {"NVIDIA_VISIBLE_DEVICES": "all"})
    result = bundle.run(proof.config_for(runtime), runtime=runtime, wrapper=proof.wrapper)
    holds = result.stdout.startswith(host_list) and " /etc" in result.stdout and "\n65534 " not in result.stdout
    holds = holds and "seen" not in result.stdout
    proof.check(f"{Path(runtime).name}: in a user namespace", holds=holds, shown=result.stdout + result.stderr)


def prove_commands(proof: Proof, installed: Path, image: Path, host_list: str) -> None:
    """What `nvhook` and nvidia-container-cli say of the host is what nvidia-smi says; a CDI specification serves."""

    def run(*words: str) -> str:
        env = {**os.environ, "NVHOOK_CONFIG": str(proof.config_for(proof.runtimes[0]))}
        command = [str(installed / "bin" / words[0]), *words[1:]]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        said.append(done.stderr)
        return done.stdout

    said: list[str] = []
    info = json.loads(run("nvhook", "info", "--json"))
    lines = [f"GPU {gpu['index']}: {gpu['name']} (UUID: {gpu['uuid']})" for gpu in info["gpus"]]
    proof.check("nvhook info lists nvidia-smi's GPUs", holds="".join(f"{line}\n" for line in lines) == host_list)
    holds = all(gpu["memory_total"] > 1 << 30 for gpu in info["gpus"])
    proof.check("nvhook info knows how much memory each has", holds=holds, shown=json.dumps(info["gpus"]))
    listed = run("nvhook", "list", "compute")
    proof.check("nvhook list has libcuda", holds="libcuda.so" in listed and "/dev/nvidia-uvm" in listed, shown=listed)
    shown = run("nvidia-container-cli", "--config", str(proof.config_for(proof.runtimes[0])), "info")
    holds = all(f"GPU UUID: {gpu['uuid']}" in " ".join(shown.split()) for gpu in info["gpus"])
    proof.check("nvidia-container-cli info has their UUIDs", holds=holds, shown=shown)
    findings = json.loads(run("nvhook", "doctor", "--json"))
    bad = [item for item in findings["findings"] if item["status"] == "failure"]
    proof.check("nvhook doctor finds no failure", holds=not bad, shown=json.dumps(bad, indent=1))
    containers = [item for item in findings["findings"] if item["check"] == "container"]
    proof.check("nvhook doctor's own container sees the GPUs", holds=[item["status"] for item in containers] == ["ok"])
    _prove_description(proof, run("nvhook", "snapshot", "--mask"))
    _prove_cdi(proof, run("nvhook", "cdi", "generate", "--format", "json"), image, host_list)
    print("".join(f"      {line}\n" for text in said for line in text.splitlines()), end="")


def _prove_description(proof: Proof, text: str) -> None:
    """Another host is built from it, and would give the same."""
    place = proof.place / "rebuilt"
    description = place.with_suffix(".json")
    description.write_text(text)
    build(description, place)
    words = ["plan", "--env", "NVIDIA_VISIBLE_DEVICES=all", "--rootfs", str(proof.place / "image-debian"), "--json"]
    plans = []
    for config in (proof.config_for(proof.runtimes[0]), place / "config.toml"):
        command = [str(proof.wrapper.with_name("nvhook")), *words]
        env = {**os.environ, "NVHOOK_CONFIG": str(config)}
        plans.append(json.loads(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout))
    paths = [[edit.get("destination") or edit.get("path") for edit in plan["edits"]] for plan in plans]
    paths = [[path for path in found if path and not path.startswith("/proc/")] for found in paths]
    lost = sorted(set(paths[0]) ^ set(paths[1]))
    proof.check("a host built from nvhook snapshot has the same plan", holds=not lost, shown="\n".join(lost))


def _prove_cdi(proof: Proof, text: str, image: Path, host_list: str) -> None:
    """Merged into config.json as an engine would, and started by the low-level runtime alone."""
    path = proof.place / "cdi.json"
    path.write_text(text)
    kind = json.loads(text)["kind"]
    for runtime in proof.runtimes:
        for name in ("all", "0"):
            bundle = proof.bundle(image).write(["/bin/sh", "-c", "nvidia-smi -L"], {})
            cdi_engine.inject(bundle.config, path, f"{kind}={name}")
            result = bundle.write().run(None, runtime=runtime, wrapper=Path(runtime))
            expected = host_list if name == "all" else host_list.splitlines(keepends=True)[0]
            what = f"{Path(runtime).name}: nvidia-smi -L by CDI device `{name}` equals the host's"
            proof.check(what, holds=result.stdout == expected, shown=result.stdout + result.stderr)


def prove_docker(proof: Proof, installed: Path, image: Path, host_list: str, cuda: bool) -> None:
    """Both ways to ask Docker: the registered runtime, and --gpus, for which dockerd finds the hook on its PATH."""
    place = proof.place / "docker"
    place.mkdir()
    shutil.copy(
        proof.config_for(shutil.which("runc") or "runc"), installed.parent / "etc/nvidia-container-runtime/config.toml"
    )
    (place / "daemon.json").write_text(json.dumps({"runtimes": {"nvidia": {"path": str(proof.wrapper)}}}))
    host = f"unix://{place}/socket"
    command = [
        "dockerd",
        f"--config-file={place}/daemon.json",
        f"--data-root={place}/data",
        f"--exec-root={place}/exec",
    ]
    command += [f"--host={host}", f"--pidfile={place}/pid", "--bridge=none", "--iptables=false", "--ip6tables=false"]
    environment = {**os.environ, "PATH": f"{installed}/bin:{os.environ['PATH']}", "DOCKER_HOST": host}

    def docker(*words: str, **more: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["docker", *words], env=environment, capture_output=True, text=True, timeout=60, check=False, **more
        )

    with (
        (place / "log").open("w") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as dockerd,
    ):
        try:
            end = time.monotonic() + 30
            while docker("version").returncode and time.monotonic() < end:
                time.sleep(0.2)
            with subprocess.Popen(["tar", "-C", str(image), "-c", "."], stdout=subprocess.PIPE) as tar:
                imported = docker("import", "-", "image", stdin=tar.stdout)
            said = imported.stderr + "".join((place / "log").read_text().splitlines(keepends=True)[-5:])
            proof.check("docker: the engine is up and has the image", holds=imported.returncode == 0, shown=said)
            run = ("run", "--rm", "--network=none")
            ways = {
                "--runtime=nvidia": ("--runtime=nvidia", "--env=NVIDIA_VISIBLE_DEVICES=all"),
                "--gpus all": ("--gpus=all",),
                "--runtime=nvidia --gpus all": ("--runtime=nvidia", "--gpus=all"),
            }
            for label, words in ways.items():
                result = docker(*run, *words, "image", "nvidia-smi", "-L")
                what = f"docker run {label}: nvidia-smi -L equals the host's"
                proof.check(what, holds=result.stdout == host_list, shown=result.stdout + result.stderr)
                if cuda:
                    result = docker(*run, *words, "image", "sums")
                    what = f"docker run {label}: the CUDA program's sums are right"
                    proof.check(what, holds=result.returncode == 0, shown=result.stdout + result.stderr)
            result = docker(*run, "--runtime=nvidia", "--env=NVIDIA_VISIBLE_DEVICES=4711", "image", "true")
            holds = result.returncode != 0 and "unknown device `4711`" in result.stderr
            proof.check(
                "docker: an unknown device is refused in Docker's own message", holds=holds, shown=result.stderr
            )
        finally:
            dockerd.terminate()
            dockerd.wait(30)


_WHERE = """
import json, os, sys, sysconfig, torch
print(json.dumps([sys.base_prefix, os.path.realpath(sys.executable), sysconfig.get_path("stdlib"),
    os.path.dirname(os.path.dirname(torch.__file__))]))
"""


def prove_training(proof: Proof, runtime: str, image: Path, python: Path) -> None:
    """The script of docs/tutorial.md, with the machine's PyTorch mounted into the container."""
    done = subprocess.run([str(python), "-c", _WHERE], check=True, capture_output=True, text=True)
    prefix, executable, library, packages = json.loads(done.stdout)
    (script,) = re.findall(r"^```python\n(.*?)^```$", (REPOSITORY / "docs/tutorial.md").read_text(), re.M | re.S)
    bundle = proof.bundle(image)
    add_program(bundle.rootfs, Path(executable))
    extensions = [*Path(library, "lib-dynload").glob("*.so"), *Path(packages, "torch/lib").glob("*.so*")]
    _add_libraries(bundle.rootfs, extensions, without=packages)
    (bundle.rootfs / "train.py").write_text(script)
    (bundle.rootfs / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")  # PyTorch asks for its user's name
    if prefix == "/usr":  # what else is there is the image's
        places, program = [library, packages], f"/usr/bin/{Path(executable).name}"
    else:
        places, program = [prefix, packages], executable
    bundle.config["mounts"] += [
        {"destination": place, "type": "bind", "source": place, "options": ["rbind", "ro"]} for place in places
    ]
    bundle.write([program, "/train.py"], {"NVIDIA_VISIBLE_DEVICES": "all", "PYTHONPATH": packages, "HOME": "/tmp"})
    result = bundle.run(proof.config_for(runtime), runtime=runtime, wrapper=proof.wrapper)
    print("      " + result.stdout.strip().replace("\n", "\n      "))
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", result.stdout)]
    holds = result.returncode == 0 and len(losses) == 6 and losses[-1] < losses[0] / 10
    proof.check(f"{Path(runtime).name}: the tutorial's script trains", holds=holds, shown=result.stderr)


def _add_libraries(root: Path, programs: list[Path], *, without: str) -> None:
    """What `programs` are linked against, beside the C library; none of the driver's, and none below `without`."""
    libraries = next(root.glob("usr/lib*/**/libc.so.6")).parent
    for program in programs:
        listing = subprocess.run(["ldd", str(program)], check=False, capture_output=True, text=True).stdout
        for name, path in re.findall(r"(\S+) => (/\S+)", listing):
            is_other = path.startswith(without) or "nvidia" in path or name.startswith("libcuda.")
            if not is_other and not (libraries / name).exists():
                shutil.copy(path, libraries / name)
    subprocess.run(["ldconfig", "-r", str(root)], check=True, capture_output=True)


def time_starts(proof: Proof, runtime: str, image: Path, rounds: int) -> None:
    """Whole `run`s of /bin/true, in turn: the runtime itself, ours without a request, ours with all GPUs."""
    bundle = proof.bundle(image)
    config = proof.config_for(runtime)
    variants: list[tuple[str, Path, dict[str, str]]] = [
        ("the runtime itself", Path(runtime), {}),
        ("nvhook, no request", proof.wrapper, {}),
        ("nvhook, all GPUs", proof.wrapper, {"NVIDIA_VISIBLE_DEVICES": "all"}),
    ]
    times: dict[str, list[float]] = {label: [] for label, _, _ in variants}
    for _ in range(rounds):
        for label, wrapper, env in variants:
            bundle.config.pop("hooks", None)
            bundle.config["linux"]["resources"]["devices"] = [{"allow": False, "access": "rwm"}]
            bundle.write(["/bin/true"], env)
            begin = time.monotonic()
            bundle.run(config, runtime=runtime, wrapper=wrapper)
            times[label].append(time.monotonic() - begin)
    plain = statistics.median(times["the runtime itself"])
    print(f"\n{Path(runtime).name}, run + delete of /bin/true, medians of {rounds}, in turn:")
    for label, values in times.items():
        median = statistics.median(values)
        print(f"  {label:20} {median * 1000:7.1f} ms   {median / plain:.2f}")


def snapshot() -> dict[str, str]:
    """Path -> type, mode, owner, size, time of change, link target; and the mount table under `mounts`."""
    found = {"mounts": Path("/proc/self/mountinfo").read_text()}
    for top in _WATCHED:
        for directory, directories, files in os.walk(top):
            for name in directories + files:
                path = os.path.join(directory, name)
                if path.startswith(_OF_THE_ENGINE):
                    continue
                status = os.lstat(path)
                target = os.readlink(path) if os.path.islink(path) else ""
                changed = "" if directory.startswith("/dev") else status.st_mtime_ns
                found[path] = f"{status.st_mode:o} {status.st_uid} {status.st_gid} {status.st_size} {changed} {target}"
    return found


def compile_cuda(place: Path) -> Path | None:
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not os.path.exists(nvcc):
        print("skip  no nvcc on this machine: the CUDA program is not run")
        return None
    program = place / "sums"
    source = Path(__file__).with_name("sums.cu")
    subprocess.run([nvcc, "-arch=native", "-o", str(program), str(source)], check=True)
    return program


def make_image_with_loaders(image: Path, loaders: Path, place: Path) -> Path:
    program = place / "draw"
    subprocess.run(["cc", "-O2", "-o", str(program), str(Path(__file__).with_name("draw.c")), "-ldl"], check=True)
    made = place / "image-loaders"
    shutil.copytree(image, made, symlinks=True)
    for path in sorted(loaders.rglob("*.so*")):
        target = made / "usr/lib" / TRIPLET / path.name
        if not target.exists() and not target.is_symlink():
            shutil.copy(path, target, follow_symlinks=False)
    add_program(made, program)
    return made


def make_config(place: Path) -> Path:
    path = place / "config.toml"
    path.write_text(f'[nvidia-container-runtime]\nruntimes = ["runc"]\n[nvhook]\nstate-dir = "{place}/state"\n')
    return path


def install(place: Path) -> Path:
    prefix = place / "prefix"
    subprocess.run([str(REPOSITORY / "scripts/install"), "install", str(prefix), str(place / "etc")], check=True)
    return prefix


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", type=Path, help="config.toml; by default one for this host as it is")
    parser.add_argument("--host-list", default="nvidia-smi -L", help="the command that lists the host's GPUs")
    parser.add_argument("--runtime", action="append", help="runc and crun, if they are there; repeatable")
    parser.add_argument("--rounds", type=int, default=20, help="starts of each kind that are timed")
    parser.add_argument("--loaders", type=Path, help="a directory with Vulkan's and EGL's loaders, unpacked")
    parser.add_argument("--torch", type=Path, metavar="PYTHON", help="an interpreter with PyTorch, for the tutorial")
    parser.add_argument("--no-cuda", action="store_true", help="leave the CUDA program out, on a simulated host")
    options = parser.parse_args()
    runtimes = options.runtime or [path for path in map(shutil.which, ("runc", "crun")) if path]
    if os.geteuid() != 0 or not runtimes:
        sys.exit("prove: needs root and runc or crun")
    host_list = subprocess.run(shlex.split(options.host_list), check=True, capture_output=True, text=True).stdout
    print(
        f"host: {' '.join(os.uname()[1:3])}, cgroup v{2 if Path('/sys/fs/cgroup/cgroup.controllers').exists() else 1}"
    )
    print(host_list, end="")
    with tempfile.TemporaryDirectory(prefix="nvhook-gpu-") as name:
        place = Path(name)
        place.chmod(0o755)  # root of a user namespace has to come through
        before = snapshot()
        proof = Proof(install(place), options.config or make_config(place), runtimes, place)
        images = {family: make_image(family, place / f"image-{family}") for family in ("debian", "fedora", "no-etc")}
        program = None if options.no_cuda else compile_cuda(place)
        if program:
            add_program(images["debian"], program)
        if options.loaders:
            images["loaders"] = make_image_with_loaders(images["debian"], options.loaders, place)
        for runtime in runtimes:
            steps: list[Callable[[], None]] = [
                lambda r=runtime: prove_runtime(proof, r, images, host_list, program is not None),  # type: ignore[misc]
                lambda r=runtime: prove_proc(proof, r, images["debian"], host_list),  # type: ignore[misc]
                lambda r=runtime: prove_hook_alone(proof, r, images["debian"], host_list),  # type: ignore[misc]
                lambda r=runtime: prove_user_namespace(proof, r, images["debian"], host_list),  # type: ignore[misc]
            ]
            if "loaders" in images:
                steps.append(lambda r=runtime: prove_drawing(proof, r, images["loaders"]))  # type: ignore[misc]
            if options.torch:
                steps.append(lambda r=runtime: prove_training(proof, r, images["debian"], options.torch))  # type: ignore[misc]
            if not options.no_cuda:
                steps.append(lambda r=runtime: prove_requirements(proof, r, images["debian"]))  # type: ignore[misc]
            for step in steps:
                step()
        prove_commands(proof, place / "prefix", images["debian"], host_list)
        if shutil.which("dockerd"):
            prove_docker(proof, place / "prefix", images["debian"], host_list, program is not None)
        else:
            print("skip  no dockerd on this machine: Docker is not tried")
        after = snapshot()
        changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
        proof.check("the host's mount table and files are as before", holds=not changed, shown="\n".join(changed[:20]))
        for runtime in runtimes:
            time_starts(proof, runtime, images["debian"], options.rounds)
    print(f"\n{proof.failures} failed" if proof.failures else "\nall passed")
    return 1 if proof.failures else 0


if __name__ == "__main__":
    sys.exit(main())
