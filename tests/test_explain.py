# SPDX-License-Identifier: Apache-2.0
"""`nvhook explain`: bundles on simulated hosts, lines of docker, and containers that really run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import docpages
from conftest import cannot
from containers import REPOSITORY, TRIPLET, Bundle, any_cgroups, cgroups, make_image
from nvhook import cli
from nvhook.commands.explain import reasons
from nvhook.request import config as configuration
from nvhook.request.spec import Spec
from simhost import elfwriter
from simhost.compiler import native_machine
from test_locate import ANSWERS, engine

LIB = f"/usr/lib/{TRIPLET}"
OPENCL = "libnvidia-opencl.so.580.159.04"


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine of this machine is asked."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")
    monkeypatch.setenv("CONTAINER_HOST", f"unix://{tmp_path}/podman.sock")


@pytest.fixture
def call(
    simhost: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`call("h200", WORD, …)`: (status, stdout, stderr) of `nvhook explain` on that host."""

    def run(host: str, *words: str, config: Path | None = None) -> tuple[int, str, str]:
        monkeypatch.setenv("NVHOOK_CONFIG", str(config or simhost(host) / "config.toml"))
        status = cli.main(["explain", *words], "/nowhere")
        told = capsys.readouterr()
        return status, told.out, told.err

    return run


def _bundle(directory: Path, env: dict[str, str], image: Path | None = None, **more: Any) -> Path:
    image = image or make_image("debian", directory / "image")
    made = Bundle(directory / "bundle", image)
    made.config.update(more)
    made.write(["/bin/true"], env)
    return made.directory


def _json(told: tuple[int, str, str]) -> dict[str, Any]:
    assert told[0] == 0, told
    document: dict[str, Any] = json.loads(told[1])
    return document


def _why(document: dict[str, Any]) -> dict[str, str]:
    return {row.get("destination") or row.get("path") or "cache": row["why"] for row in document["plan"]}


# What is asked for


def _spec(
    env: str = "",
    *,
    mounts: str = "",
    annotations: dict[str, str] | None = None,
    privileged: bool = False,
    cdi_injected: bool = False,
) -> Spec:
    pairs = (item.partition("=")[::2] for item in env.split())
    return Spec(
        env=dict(pairs),
        mounts=[("/dev/null", f"/var/run/nvidia-container-devices/{name}") for name in mounts.split()],
        annotations=annotations or {},
        privileged=privileged,
        rootfs="/",
        device_rules=[],
        cdi_injected=cdi_injected,
    )


ENV = "accept-nvidia-visible-devices-envvar-when-unprivileged"
VOLUMES = "accept-nvidia-visible-devices-as-volume-mounts"


@pytest.mark.parametrize(
    ("spec", "settings", "rules"),
    [
        pytest.param(_spec(), "", [], id="nothing"),
        pytest.param(_spec("NVIDIA_VISIBLE_DEVICES=0 PATH=/bin"), "", [f"{ENV} = true"], id="variable"),
        pytest.param(_spec("NVIDIA_VISIBLE_DEVICES=0"), f"{ENV} = false", [f"not used: {ENV} = false"], id="refused"),
        pytest.param(
            _spec("NVIDIA_VISIBLE_DEVICES=0", privileged=True),
            f"{ENV} = false",
            ["privileged container: no key decides"],
            id="privileged",
        ),
        pytest.param(_spec("NVIDIA_VISIBLE_DEVICES="), "", ["names no device"], id="empty"),
        pytest.param(
            _spec("NVIDIA_VISIBLE_DEVICES=0", mounts="1"),
            f"{VOLUMES} = true",
            [f"{VOLUMES} = true", "not used: volume mounts come first"],
            id="mounts",
        ),
        pytest.param(
            _spec("NVIDIA_VISIBLE_DEVICES=0", mounts="1"),
            "",
            [f"not used: {VOLUMES} = false", f"{ENV} = true"],
            id="mounts-not-accepted",
        ),
        pytest.param(
            _spec("DOCKER_RESOURCE_GPU=0 NVIDIA_VISIBLE_DEVICES=1"),
            "swarm-resource = 'DOCKER_RESOURCE_GPU'",
            [f"{ENV} = true", 'not used: swarm-resource = "DOCKER_RESOURCE_GPU"'],
            id="swarm",
        ),
        pytest.param(
            _spec("NVIDIA_VISIBLE_DEVICES=1", annotations={"cdi.k8s.io/x": "nvidia.com/gpu=0"}),
            "",
            ["an annotation is the engine's, and comes first", "not used: annotations come first"],
            id="annotation",
        ),
        pytest.param(
            _spec(annotations={"cdi.k8s.io/x": "nvidia.com/gpu=0", "io.container.manager": "libpod"}),
            f"{ENV} = false",
            [f"not used: {ENV} = false"],
            id="annotation-of-podman",
        ),
        pytest.param(
            _spec("NVIDIA_VISIBLE_DEVICES=1", annotations={"nvidia.cdi.k8s.io/x": "nvidia.com/gpu=0"}),
            "accept-device-annotations = false",
            ["not used: accept-device-annotations = false", "not used: annotations come first"],
            id="annotation-off",
        ),
        pytest.param(
            _spec(annotations={"cdi.k8s.io/x": "nvidia.com/gpu=0", "io.kubernetes.cri.container-name": "a"}),
            f"accept-device-annotations = true\n{ENV} = false",
            ["accept-device-annotations = true"],
            id="annotation-on",
        ),
        pytest.param(
            _spec(annotations={"x.cdi.k8s.io/x": "nvidia.com/gpu=0", "cdi.k8s.io/y": "vendor.com/net=0"}),
            "",
            [
                "names no device of NVIDIA's for this container",
                'refused: annotation-prefixes = ["cdi.k8s.io/", "nvidia.cdi.k8s.io/"]',
            ],
            id="annotation-not-read",
        ),
        pytest.param(
            _spec("NVIDIA_VISIBLE_DEVICES=all", cdi_injected=True),
            "",
            ["not used: the engine has injected the container's devices by CDI"],
            id="injected",
        ),
        pytest.param(
            _spec("NVIDIA_VISIBLE_DEVICES=all", annotations={"cdi.k8s.io/x": "nvidia.com/gpu=0"}, cdi_injected=True),
            "",
            ["the engine has injected the container's devices by CDI", "not used: annotations come first"],
            id="annotation-injected",
        ),
        pytest.param(
            _spec("NVIDIA_DRIVER_CAPABILITIES=all NVIDIA_REQUIRE_CUDA=cuda>=12.0"),
            "supported-driver-capabilities = 'utility'",
            ['supported-driver-capabilities = "utility"', "disable-require = false"],
            id="capabilities-and-requirements",
        ),
        pytest.param(
            _spec("NVIDIA_DISABLE_REQUIRE=1 NVIDIA_REQUIRE_CUDA=cuda>=12.0"),
            "",
            ["an image may do without its own requirements", "not checked: NVIDIA_DISABLE_REQUIRE"],
            id="requirements-disabled",
        ),
        pytest.param(
            _spec("CUDA_VERSION=8.0"),
            "",
            ["image from before NVIDIA_REQUIRE_CUDA: a requirement, and a request for all where there is no other"],
            id="legacy",
        ),
        pytest.param(_spec("CUDA_VERSION=12.0 NVIDIA_REQUIRE_CUDA="), "", [
            "image from before NVIDIA_REQUIRE_CUDA: a requirement, and a request for all where there is no other",
            "disable-require = false"], id="legacy-by-an-empty-requirement"),
        pytest.param(
            _spec("NVIDIA_GDS=enabled NVIDIA_IMEX_CHANNELS=0 NVIDIA_MIG_CONFIG_DEVICES=all LD_LIBRARY_PATH=/x"),
            "features.ignore-imex-channel-requests = true",
            [
                "where programs look before the linker cache",
                "counts if it is `enabled`",
                "features.ignore-imex-channel-requests = true",
                "for privileged containers alone",
            ],
            id="features",
        ),
        pytest.param(
            _spec(mounts="imex/0"),
            f"{VOLUMES} = true",
            [f"{VOLUMES} = true; features.ignore-imex-channel-requests = false"],
            id="imex-mount",
        ),
    ],
)  # fmt: skip
def test_rules(tmp_path: Path, spec: Spec, settings: str, rules: list[str]) -> None:
    path = tmp_path / "config.toml"
    path.write_text(settings)
    config = configuration.load(str(path))
    assert [item.rule for item in reasons.sources(spec, config, lambda _: "image")] == rules


# What it gets


def test_why_each_part_is_there(tmp_path: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    env = {"NVIDIA_VISIBLE_DEVICES": "0", "NVIDIA_DRIVER_CAPABILITIES": "graphics,display,compute,utility"}
    why = _why(_json(call("workstation", "--json", "--bundle", str(_bundle(tmp_path, env)))))
    assert {text for text in why.values() if not text} == set()
    version = "535.247.01"
    expected = {
        f"{LIB}/libcuda.so.{version}": "compute",
        f"{LIB}/libnvidia-tls.so.{version}": "display, graphics",
        f"{LIB}/libcuda.so.1": f"SONAME of libcuda.so.{version}",
        f"{LIB}/libcuda.so": f"another name of libcuda.so.{version}",
        f"{LIB}/gbm/nvidia-drm_gbm.so": f"libgbm opens libnvidia-allocator.so.{version} by this name",
        "/usr/bin/nvidia-smi": "utility: program",
        "/proc/driver/nvidia/gpus/0000:01:00.0": "GPU 0",
        "/dev/nvidia0": "GPU 0",
        "/dev/nvidiactl": "every GPU: the driver's control node",
        "/dev/nvidia-uvm": "compute or video: unified memory",
        "/dev/nvidia-modeset": "display: mode setting",
        "/dev/dri/card1": "graphics or display: DRI node of a GPU",
        "/dev/dri/by-path/pci-0000:01:00.0-card": "GPU 0: its node by its place on the bus",
        "/etc/nvidia/nvidia-application-profiles-rc.d": "tells EGL which GPUs to look at",
        "cache": "so that programs find the libraries",
    }
    assert {place: why.get(place) for place in expected} == expected


def test_chain_of_needed(tmp_path: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    """What no capability begins with has come for another library's sake; asked for `compute`, it is one of its own."""
    image, name = make_image("debian", tmp_path / "image"), "libnvidia-gpucomp.so.580.159.04"
    for capabilities, why in (
        ("graphics", f"graphics: libnvidia-eglcore.so.580.159.04 -> {name}"),
        ("graphics,compute", "compute"),
    ):
        env = {"NVIDIA_VISIBLE_DEVICES": "0", "NVIDIA_DRIVER_CAPABILITIES": capabilities}
        document = _json(call("h200", "--json", "--bundle", str(_bundle(tmp_path, env, image))))
        assert _why(document)[f"{LIB}/{name}"] == why


@pytest.mark.parametrize("host", ["a100x8", "nixos", "wsl2", "h100x8"])
def test_every_host_has_a_reason_for_everything(
    tmp_path: Path, call: Callable[..., tuple[int, str, str]], host: str
) -> None:
    env = {"NVIDIA_VISIBLE_DEVICES": "all", "NVIDIA_DRIVER_CAPABILITIES": "all", "NVIDIA_GDS": "enabled"}
    document = _json(
        call(host, "--json", "--bundle", str(_bundle(tmp_path, env, make_image("fedora", tmp_path / "i"))))
    )
    assert document["plan"]
    assert [row for row in document["plan"] if not row["why"]] == []
    assert [item for item in document["findings"] if item["grave"]] == []


def test_keys_of_json(tmp_path: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    document = _json(call("h200", "--json", "--bundle", str(_bundle(tmp_path, {"NVIDIA_VISIBLE_DEVICES": "0"}))))
    assert set(document) == {
        "additional", "asked", "container", "driver", "error", "findings", "gpus", "notes", "origin", "plan", "request",
    }  # fmt: skip
    assert document["asked"] == [
        {
            "name": "NVIDIA_VISIBLE_DEVICES",
            "value": "0",
            "from": "image or command line",
            "rule": f"{ENV} = true",
        }
    ]
    assert (document["origin"], document["error"]) == ("NVIDIA_VISIBLE_DEVICES", None)
    assert [gpu["index"] for gpu in document["gpus"]] == [0]


def test_container_that_asks_for_nothing(tmp_path: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    bundle = str(_bundle(tmp_path, {}))
    status, out, _ = call("h200", "--bundle", bundle)
    assert (status, out.splitlines()[-1]) == (0, "It gets no GPU: nothing is done to it.")
    assert _json(call("h200", "--json", "--bundle", bundle))["request"] is None


def test_request_that_the_policy_drops(
    tmp_path: Path, simhost: Callable[[str], Path], call: Callable[..., tuple[int, str, str]]
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f"{ENV} = false\n{VOLUMES} = true\n{(simhost('h200') / 'config.toml').read_text()}")
    bundle = str(_bundle(tmp_path, {"NVIDIA_VISIBLE_DEVICES": "0"}))
    status, out, err = call("h200", "--bundle", bundle, config=config)
    assert status == 0
    assert f"not used: {ENV} = false" in out
    assert "It gets no GPU" in out
    assert "of an unprivileged container is ignored, as config.toml says" in err


@pytest.mark.parametrize("json_too", [False, True])
def test_start_that_would_be_refused(tmp_path: Path, call: Callable[..., tuple[int, str, str]], json_too: bool) -> None:
    """What it asks for is told all the same."""
    bundle = str(_bundle(tmp_path, {"NVIDIA_VISIBLE_DEVICES": "7"}))
    status, out, err = call("h200", "--bundle", bundle, *(["--json"] if json_too else []))
    assert status == 1
    assert "NVIDIA_VISIBLE_DEVICES" in out
    assert "It gets" not in out
    assert "device error: unknown device `7`" in (json.loads(out)["error"] if json_too else err)
    assert bool(err) != json_too


def test_hostile_words_stay_on_their_line(tmp_path: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    env = {"NVIDIA_VISIBLE_DEVICES": "none", "NVIDIA_REQUIRE_X": "", "LD_LIBRARY_PATH": "/\n[red]NO\x1b[31m"}
    _, out, _ = call("h200", "--bundle", str(_bundle(tmp_path, env)))
    assert r"LD_LIBRARY_PATH=/\n[red]NO\x1b[31m" in out
    assert "\x1b" not in out


# Whether it runs


def test_image_with_musl(tmp_path: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    image = make_image("busybox", tmp_path / "musl")
    (image / f"usr/lib/ld-musl-{os.uname().machine}.so.1").touch()
    status, out, err = call("h200", "--bundle", str(_bundle(tmp_path, {"NVIDIA_VISIBLE_DEVICES": "0"}, image)))
    assert (status, err) == (0, "")
    assert "  NO    the image's C library is musl" in out
    assert "speaks against it" not in out


def test_program_that_is_built_to_look_elsewhere_first(
    tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    """DT_RUNPATH, as the compiler of this machine writes it."""
    image = make_image("debian", tmp_path / "image")
    (image / "opt/lib").mkdir(parents=True)
    (image / "opt/lib/libcuda.so.1").touch()
    (image / "opt/bin").mkdir()
    source = tmp_path / "x.c"
    source.write_text("int main(void) { return 0; }\n")
    compiler = shutil.which("cc")
    assert compiler
    assert (
        os.spawnl(os.P_WAIT, compiler, "cc", "-o", f"{image}/opt/bin/app", str(source), "-Wl,-rpath,$ORIGIN/../lib")
        == 0
    )
    made = Bundle(tmp_path / "bundle", image).write(
        ["app"], {"NVIDIA_VISIBLE_DEVICES": "0", "PATH": "/nowhere:/opt/bin"}
    )
    document = _json(call("h200", "--json", "--bundle", str(made.directory)))
    assert [item["what"] for item in document["findings"] if item["grave"]] == [
        "`/opt/bin/app` is built to look in `/opt/bin/../lib` first, where the image has a libcuda.so.1"
    ]


# Lines of docker


def test_line_without_an_engine(call: Callable[..., tuple[int, str, str]]) -> None:
    status, out, _ = call("h200", "--", "docker", "run", "-e", "A=b", "--gpus", "device=0", "cuda", "--gpus", "x")
    assert status == 0
    assert out.startswith("Container cuda (docker)\n")
    assert f"  NVIDIA_VISIBLE_DEVICES=0  --gpus  {ENV} = true" in out
    assert "note: docker has no image cuda: its environment variables are unknown" in out
    assert "  Unknown: the image is not available here to inspect.\n" in out


def test_line_with_a_root_filesystem(tmp_path: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    image = make_image("debian", tmp_path / "image")
    words = [
        "--json",
        "--rootfs",
        str(image),
        "--",
        *["docker", "run", "--runtime=nvidia", "-e", "NVIDIA_VISIBLE_DEVICES=0", "x"],
    ]
    document = _json(call("h200", *words))
    assert f"{LIB}/libcuda.so.1" in _why(document)
    assert document["notes"] == ["docker has no image x: its environment variables are unknown"]


@pytest.mark.parametrize(
    ("words", "default", "is_served"),
    [
        ("--runtime=runc", "nvidia", False),
        ("--runtime=nvidia", "runc", True),
        ("--gpus=all", "runc", True),
        ("", "runc", False),
        ("", "nvidia", True),
    ],
)
def test_line_and_the_image_that_the_engine_knows(
    tmp_path: Path, call: Callable[..., tuple[int, str, str]], words: str, default: str, is_served: bool
) -> None:
    layer = make_image("debian", tmp_path / "layer")
    image = {
        "Config": {"Env": ["NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=utility"]},
        "GraphDriver": {"Data": {"UpperDir": str(layer)}},
    }
    answers = {"/images/nvidia/cuda:12/json": image, "/info": {"DefaultRuntime": default}}
    with engine(tmp_path / "docker.sock", answers):
        line = ["docker", "run", *words.split(), "-e", "NVIDIA_DRIVER_CAPABILITIES=compute", "nvidia/cuda:12"]
        document = _json(call("h200", "--json", "--", *line))
    assert (document["request"] is not None) == is_served
    assert {item["name"]: item["from"] for item in document["asked"]} == {
        "NVIDIA_DRIVER_CAPABILITIES": "command line",
        "NVIDIA_VISIBLE_DEVICES": "--gpus" if "gpus" in words else "image nvidia/cuda:12",
    }
    if is_served:
        assert document["request"]["capabilities"] == ["compute"]
        assert f"{LIB}/libcuda.so.1" in _why(document)


def test_line_with_a_cdi_device(call: Callable[..., tuple[int, str, str]]) -> None:
    words = ["docker", "run", "--runtime=runc", "--device", "nvidia.com/gpu=0", "x"]
    notes = _json(call("h200", "--json", "--", *words))["notes"]
    assert any(note.startswith("--device nvidia.com/gpu=0 is a CDI device") for note in notes)


@pytest.mark.parametrize(
    ("words", "is_given"),
    [
        ("docker run --runtime=nvidia -e NVIDIA_VISIBLE_DEVICES=0", True),
        ("docker run --runtime=nvidia -e NVIDIA_VISIBLE_DEVICES=0 --device nvidia.com/gpu=0", False),
        ("docker run --runtime=nvidia -e NVIDIA_VISIBLE_DEVICES=0 --device vendor.com/net=0", True),
        ("docker run --runtime=nvidia --annotation cdi.k8s.io/x=nvidia.com/gpu=0", True),
        ("podman run --runtime=nvidia --annotation cdi.k8s.io/x=nvidia.com/gpu=0", False),
        ("nerdctl run --runtime=nvidia --annotation cdi.k8s.io/x=nvidia.com/gpu=0", False),
    ],
)
def test_line_gets_what_the_runtime_would_give(
    tmp_path: Path,
    simhost: Callable[[str], Path],
    call: Callable[..., tuple[int, str, str]],
    words: str,
    is_given: bool,
) -> None:
    """Devices by CDI are not given twice, and annotations of an engine that passes others on are variables."""
    config = tmp_path / "config.toml"
    policy = f"{ENV} = false\n" if "annotation" in words else ""
    config.write_text(policy + (simhost("h200") / "config.toml").read_text())
    document = _json(call("h200", "--json", "--", *words.split(), "x", config=config))
    assert (document["request"] is not None) == is_given


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param([], "spec error: name one container: ", id="none"),
        pytest.param(["--bundle", "/x", "web"], "spec error: name one container: ", id="two"),
        pytest.param(["--bundle", "/x", "--rootfs", "/y"], "spec error: --rootfs goes with a `docker", id="rootfs"),
        pytest.param(["--", "kubectl", "run"], "spec error: `kubectl run` is not understood", id="no-docker"),
        pytest.param(["--bundle", "/nowhere"], "spec error: read `/nowhere/config.json`: no such file", id="no-bundle"),
        pytest.param(["nobody-calls-it-so"], "container error: no container `nobody-calls-it-so`", id="no-container"),
    ],
)
def test_fault(call: Callable[..., tuple[int, str, str]], words: list[str], message: str) -> None:
    status, out, err = call("h200", *words)
    assert (status, out) == (1, "")
    assert err.startswith(f"nvhook: {message}")
    assert err.count("\n") == 1


# Containers


@pytest.fixture
def running(tmp_path: Path, simhost: Callable[[str], Path]) -> Iterator[Bundle]:
    try:
        bundle = _start(tmp_path, simhost("h200"), any_cgroups())
    except LookupError as missing:
        cannot(str(missing))
    yield bundle
    bundle.delete()


def _start(tmp_path: Path, original: Path, through: tuple[str, ...], more: str = "") -> Bundle:
    """A container that runs, on a copy of a simulated host, whose files a test may take away."""
    host = shutil.copytree(original, tmp_path / "host", symlinks=True, ignore=_nodes)
    shutil.copytree(original / "dev", host / "dev", copy_function=_copy_node)
    text = (host / "config.toml").read_text().replace(str(original), str(host))
    (host / "config.toml").write_text(text.replace("load-kmods = false", f"load-kmods = false\n{more}"))
    image = make_image("debian", tmp_path / "image")
    bundle = Bundle(tmp_path / "bundle", image).write(["/bin/sleep", "300"], {"NVIDIA_VISIBLE_DEVICES": "0"})
    bundle.through = through
    words = ("run", "--detach", "--bundle", str(bundle.directory), bundle.id)
    done = bundle.call(host / "config.toml", *words, output=tmp_path / "output")
    assert done.returncode == 0, (tmp_path / "output").read_text()
    return bundle


def _nodes(_: str, names: list[str]) -> list[str]:
    return ["dev"] if {"dev", "proc", "driver"} <= set(names) else []


def _copy_node(source: str, target: str) -> None:
    status = os.stat(source)
    os.mknod(target, status.st_mode, status.st_rdev)


def _states(document: dict[str, Any]) -> dict[str, str]:
    places = {row.get("destination") or row.get("path") or "cache": row["state"] for row in document["plan"]}
    # The kernel of this machine has no driver, and so no directory to cover.
    return {place: state for place, state in places.items() if not place.startswith("/proc/driver/nvidia")}


@pytest.mark.root
def test_running_container_has_all_of_its_plan(
    tmp_path: Path, running: Bundle, call: Callable[..., tuple[int, str, str]]
) -> None:
    document = _json(call("", "--json", running.id, config=tmp_path / "host/config.toml"))
    assert set(_states(document).values()) == {"present"}
    assert document["additional"] == []
    assert document["container"]["bundle"] == str(running.directory)
    details = {row["path"]: row["detail"] for row in document["plan"] if row["kind"] == "device"}
    assert set(details.values()) == {"allowed"}
    _, out, _ = call("", running.id[:-1], config=tmp_path / "host/config.toml")
    assert out.startswith(f"Container {running.id} (runc), running as process ")


@pytest.mark.root
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("more", "detail"), [("", "allowed"), ("no-cgroups = true", "the device cgroup refuses `rw`")])
def test_device_cgroup(tmp_path: Path, simhost: Callable[[str], Path], version: int, more: str, detail: str) -> None:
    """Read where it is, in the namespace that has it mounted."""
    try:
        through = cgroups(version)
    except LookupError as missing:
        pytest.skip(str(missing))  # there is one of the two on every machine
    bundle = _start(tmp_path, simhost("h200"), through, more)
    try:
        env = {
            "PATH": os.environ["PATH"],
            "NVHOOK_CONFIG": f"{tmp_path}/host/config.toml",
            "DOCKER_HOST": "unix:///nowhere",
        }
        command = [*through, f"{REPOSITORY}/scripts/nvhook", "explain", "--json", bundle.id]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    finally:
        bundle.delete()
    rows = [row for row in json.loads(done.stdout)["plan"] if row["kind"] == "device"]
    assert {row["detail"] for row in rows} == {detail}
    assert {row["state"] for row in rows} == {"differs" if more else "present"}


@pytest.mark.root
def test_container_that_nvhook_was_not_asked_for(tmp_path: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    """With runc alone."""
    bundle = Bundle(tmp_path / "bundle", make_image("debian", tmp_path / "image"))
    bundle.write(["/bin/sleep", "300"], {"NVIDIA_VISIBLE_DEVICES": "0"})
    try:
        bundle.through = any_cgroups()
    except LookupError as missing:
        cannot(str(missing))
    words = ("run", "--detach", "--bundle", str(bundle.directory), bundle.id)
    try:
        done = bundle.call(None, *words, wrapper=Path(shutil.which("runc") or ""), output=tmp_path / "output")
        assert done.returncode == 0
        document = _json(call("h200", "--json", bundle.id))
    finally:
        bundle.delete()
    assert document["notes"] == [
        "its config.json has no hook of nvhook's, which was not asked when it started; "
        "start it with --runtime=nvidia or --gpus"
    ]
    assert set(_states(document).values()) == {"missing", "differs"}  # the linker cache is the image's own


@pytest.mark.root
def test_running_container_and_files_that_have_changed_since(
    tmp_path: Path, running: Bundle, call: Callable[..., tuple[int, str, str]]
) -> None:
    """On the host a library was installed anew; in the container a link, a node and a mount are not what they were."""
    host = tmp_path / "host"
    (library,) = (host / "driver").glob(f"usr/**/{OPENCL}")
    shutil.copy(library, f"{library}.new")
    os.rename(f"{library}.new", library)
    pid = _json(call("", "--json", running.id, config=host / "config.toml"))["container"]["pid"]
    inside = f"""
        umount {LIB}/libnvidia-ml.so.580.159.04
        rm {LIB}/libcuda.so.1
        ln -s /etc/passwd {LIB}/libcuda.so.1
        rm /dev/nvidia-uvm
        rm /dev/nvidiactl
        mknod /dev/nvidiactl c 1 3
        mknod /dev/nvidia7 c 195 7
        mount -o bind /bin/busybox /usr/bin/nvidia-smi"""
    os.system(f"nsenter -t {pid} -m sh -euc '{inside}'")
    document = _json(call("", "--json", running.id, config=host / "config.toml"))
    changed = {place: state for place, state in _states(document).items() if state != "present"}
    assert changed == {
        f"{LIB}/{OPENCL}": "stale",
        f"{LIB}/libnvidia-ml.so.580.159.04": "missing",
        f"{LIB}/libcuda.so.1": "differs",
        "/dev/nvidia-uvm": "missing",
        "/dev/nvidiactl": "differs",
        "/usr/bin/nvidia-smi": "stale",
    }
    assert document["additional"] == [{"kind": "device", "path": "/dev/nvidia7", "detail": ""}]
    details = {row.get("destination") or row.get("path"): row.get("detail") for row in document["plan"]}
    assert details[f"{LIB}/{OPENCL}"] == f"`{library}` was deleted on the host since"
    assert details[f"{LIB}/libcuda.so.1"] == "it leads to `/etc/passwd`"


@pytest.mark.root
def test_running_container_after_another_driver_was_installed(
    running: Bundle, call: Callable[..., tuple[int, str, str]]
) -> None:
    """It has the libraries of the old one still."""
    document = _json(call("a100x2", "--json", running.id))
    assert _states(document)[f"{LIB}/libcuda.so.550.163.01"] == "missing"
    old = {item["path"]: item["detail"] for item in document["additional"]}
    assert ", of version 580.159.04, and the driver is 550.163.01" in old[f"{LIB}/libcuda.so.580.159.04"]


def test_container_of_docker_that_does_not_run(tmp_path: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    with engine(tmp_path / "docker.sock", ANSWERS):
        document = _json(call("h200", "--json", "web"))
    assert {item["name"]: item["from"] for item in document["asked"] if item["from"] != "volume mount"} == {
        "NVIDIA_VISIBLE_DEVICES": "--gpus"
    }
    assert document["notes"] == [
        "the image's files are not inspected, and paths are those of an empty image: it does not run"
    ]


# The page


def test_page(tmp_path: Path, simhost: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    image = make_image("debian", tmp_path / "image")
    (image / "opt/cuda").mkdir(parents=True)
    (image / "opt/cuda/libcuda.so.1").write_bytes(
        elfwriter.shared_object("libcuda.so.1", ["libc.so.6"], machine=native_machine())
    )
    env = {"NVIDIA_VISIBLE_DEVICES": "0", "LD_LIBRARY_PATH": "/opt/cuda"}
    Bundle(tmp_path / "web", image).write(["/bin/true"], env)
    monkeypatch.chdir(tmp_path)
    docpages.check("explain.md", simhost("h200"), {str(tmp_path): "/run/bundles", TRIPLET: "x86_64-linux-gnu"})
