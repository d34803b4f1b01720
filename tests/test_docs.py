# SPDX-License-Identifier: Apache-2.0
"""The pages: what they show is what is printed, what they link to is there, and the site is built of all of them."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import bench
import docpages
import screenshot
from containers import REPOSITORY, WRAPPER, Workshop, make_image
from nvhook import cli

DOCS = REPOSITORY / "docs"
# Pages with ```console blocks -> the test that runs them.
RUN_BY = {
    "cdi.md": "tests/test_cdi.py",
    "configure.md": "tests/test_docs.py",
    "doctor.md": "tests/test_doctor.py",
    "engines.md": "tests/test_docs.py",
    "explain.md": "tests/test_explain.py",
    "info.md": "tests/test_info.py",
    "list.md": "tests/test_list.py",
    "migration.md": "tests/test_docs.py",
    "nvidia-container-cli.md": "tests/test_containercli.py",
    "plan.md": "tests/test_docs.py",
    "shared-machines.md": "tests/test_docs.py",
    "tutorial-simulated.md": "tests/test_docs.py",
    "upgrades.md": "tests/test_docs.py",
}
# Commands of ```sh blocks -> the test that runs such a command, with its own image and places.
TESTED = {
    "ctr run --rm --gpus 0 IMAGE NAME nvidia-smi -L": "tests/engines/test_containerd.py::test_gpus",
    "ctr run --rm --runc-binary /usr/local/bin/nvidia-container-runtime --env NVIDIA_VISIBLE_DEVICES=all IMAGE NAME "
    "nvidia-smi -L": "tests/engines/test_containerd.py::test_runtime_gives_the_devices_of_the_variable",
    "docker run --rm --gpus all IMAGE nvidia-smi -L": "tests/engines/test_docker.py::test_gpus_option",
    "docker run --rm --gpus device=0 IMAGE nvidia-smi -L": "tests/engines/test_docker.py::test_gpus_option",
    "docker run --rm --gpus '\"device=0,1\"' IMAGE nvidia-smi -L": "tests/engines/test_docker.py::test_gpus_option",
    "docker run --rm --gpus all debian nvidia-smi -L": "tests/engines/test_docker.py::test_gpus_option",
    "docker run --rm --runtime=nvidia -e NVIDIA_VISIBLE_DEVICES=all IMAGE nvidia-smi -L": (
        "tests/engines/test_docker.py::test_runtime_gives_the_devices_of_the_variable"
    ),
    "docker run --rm --runtime=nvidia -e NVIDIA_VISIBLE_DEVICES=all debian nvidia-smi": (
        "tests/engines/test_docker.py::test_runtime_gives_the_devices_of_the_variable"
    ),
    "docker run --runtime=nvidia -v /dev/null:/var/run/nvidia-container-devices/0 IMAGE": (
        "tests/engines/test_docker.py::test_who_may_ask"
    ),
    "docker service create --generic-resource NVIDIA-GPU=1 IMAGE": (
        "tests/engines/test_swarm.py::test_every_gpu_goes_to_one_task"
    ),
    "dpkg --remove nvhook": "tests/packaging/test_packages.py::test_install_remove_purge",
    "make install": "tests/test_install.py::test_command_from_anywhere_with_an_empty_environment",
    "make deb && sudo apt install ./build/dist/nvhook_*.deb": (
        "tests/packaging/test_packages.py::test_takes_the_place_of_nvidia_s"
    ),
    "make rpm && sudo dnf install ./build/dist/nvhook-*.rpm": (
        "tests/packaging/test_packages.py::test_rpm_takes_the_place_of_nvidia_s_and_goes"
    ),
    "make install PREFIX=/usr": "tests/test_install.py::test_hooks_for_podman_name_the_hook_that_is_installed",
    "make uninstall": "tests/test_install.py::test_uninstall_leaves_nothing",
    "nvhook configure crio --restart": "tests/test_configure.py::test_crio_drop_in",
    "nvhook configure docker --restart": "tests/test_configure.py::test_restart",
    "nvhook configure docker --swarm-resource --set-as-default --restart": (
        "tests/engines/test_swarm.py::test_nodes_announce_their_gpus"
    ),
    "nvhook doctor": "tests/test_doctor.py::test_page_shows_what_is_printed",
    "nvhook explain CONTAINER": "tests/test_explain.py::test_page",
    "nvhook info": "tests/test_info.py::test_page_is_true",
    "NVHOOK_CONFIG=/tmp/host/config.toml scripts/nvhook plan --env NVIDIA_VISIBLE_DEVICES=all --rootfs /": (
        "tests/test_plan.py::test_plan_follows_the_contract"
    ),
    "podman --runtime nvidia run --rm -e NVIDIA_VISIBLE_DEVICES=all IMAGE nvidia-smi -L": (
        "tests/engines/test_podman.py::test_all_gpus"
    ),
    "podman run --rm --device nvidia.com/gpu=all debian nvidia-smi -L": "tests/engines/test_podman.py::test_cdi",
    "podman run --rm -e NVIDIA_VISIBLE_DEVICES=all IMAGE nvidia-smi -L": "tests/engines/test_podman.py::test_all_gpus",
    "python3 tests/simhost tests/hosts/a100x2-debian12.json /tmp/host": (
        "tests/test_simhost.py::test_build_takes_an_empty_directory"
    ),
    "scripts/demo": "tests/test_docs.py::test_demo_is_as_the_readme_shows_it",
}
# Those that no test runs, and why.
NOT_RUN = {
    "docker run --gpus all -e NVIDIA_DRIVER_CAPABILITIES=graphics,display,utility -e DISPLAY "
    "-v /tmp/.X11-unix:/tmp/.X11-unix IMAGE glxinfo": "a simulated host has no screen",
    "docker run --rm --device nvidia.com/gpu=0 debian nvidia-smi -L": "the Docker of Debian 12 knows no CDI",
    'docker run --rm --gpus all -v "$PWD:/work" pytorch/pytorch python /work/train.py': (
        "needs a GPU and a large image; `tests/gpu/prove.py --torch PYTHON` trains its script"
    ),
    'docker run --rm --gpus device=0 -v "$PWD:/work" pytorch/pytorch python /work/train.py': (
        "needs a GPU and a large image; `tests/gpu/prove.py --torch PYTHON` trains its script"
    ),
    "journalctl SYSLOG_FACILITY=10 | grep 'GPUs '": "test machines have no journal; tests/test_audit.py reads the line",
    "make bench": "measures for minutes",
    "make bench REAL=1": "needs a GPU, and measures for minutes",
    "make bench ROWS=gpu LOW=crun": "measures for minutes",
    "make bench ROWS=gpu PEER=/usr/bin": "needs another runtime",
    "make bench RUNS=40 ROWS=gpu,no-request JSON=result.json": "measures for minutes",
    "nvidia-smi -L": "needs a GPU, and is not ours",
    "pip install .": "pip asks for packages of the network",
    "scripts/test": "runs this test",
}
# Pages whose ```sh block the test of the page runs as a whole
SHELL_RUN_BY_PAGE = ("nvidia-container-cli.md",)
LANGUAGES = ("console", "ini", "json", "python", "sh", "text", "toml", "yaml")
AT_THE_ROOT = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")  # pages of the site too, by scripts/sitepages.py
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
SHOWN = sorted(page.name for page in DOCS.glob("*.md") if "```console" in page.read_text())


def _nav(items: list[object]) -> list[str]:
    found = []
    for item in items:
        for value in item.values() if isinstance(item, dict) else [item]:
            found += _nav(value) if isinstance(value, list) else [str(value)]
    return found


def test_every_page_that_shows_output_is_run() -> None:
    assert sorted(RUN_BY) == SHOWN
    for page, test in RUN_BY.items():
        assert page in (REPOSITORY / test).read_text()


def test_every_command_is_run_or_says_why_not() -> None:
    pages = [page for page in PAGES if page.name not in SHELL_RUN_BY_PAGE]
    commands = {line.removeprefix("sudo ") for page in pages for line in docpages.shell_commands(page)}
    assert commands - TESTED.keys() - NOT_RUN.keys() == set()
    assert TESTED.keys() | NOT_RUN.keys() == commands


@pytest.mark.parametrize("name", sorted(set(TESTED.values())))
def test_command_is_run_by_a_test_that_is_there(name: str) -> None:
    _assert_is_a_test(name)


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_page_says_what_its_blocks_are(page: Path) -> None:
    """Commands in a block without a name would be run by nobody; the map of the code has none."""
    assert page.name == "architecture.md" or docpages.bare_blocks(page) == []
    assert set(re.findall("^```(.*)", page.read_text(), re.MULTILINE)) <= {"", *LANGUAGES}


def _options(parser: argparse.ArgumentParser) -> dict[str, set[str]]:
    """Of each command below this parser, with those of its own commands."""
    found = {}
    for action in parser._actions:
        for name, child in action.choices.items() if isinstance(action, argparse._SubParsersAction) else ():
            own = {option for each in child._actions for option in each.option_strings}
            found[name] = own.union(*_options(child).values())
    return found


def _unknown_commands(text: str) -> list[str]:
    """Words in backquotes that begin as a command of ours does, and are none."""
    options = _options(cli.make_parser())
    wrong = []
    prose = re.sub("^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for command in re.findall(r"`((?:sudo )?nvhook\s[^`]+)`", prose):
        names, *words = command.partition(" -- ")[0].removeprefix("sudo ").split()[1:]
        known = [options.get(name, set()) for name in names.split("|")]
        asked = {word.partition("=")[0] for word in words if word.startswith("--")}
        if not options.keys() >= set(names.split("|")) or not all(asked <= each for each in known):
            wrong.append(command)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_page_names_commands_that_there_are(page: Path) -> None:
    """In a sentence, too, where nothing runs them."""
    assert _unknown_commands(page.read_text()) == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        pytest.param("`nvhook explain -- docker run --rm x`", [], id="of-another-program"),
        pytest.param("`nvhook cdi generate --output=x`", [], id="of-a-command-s-command"),
        pytest.param("`sudo nvhook configure\ndocker --restart`", [], id="over-two-lines"),
        pytest.param("`nvhook mend`", ["nvhook mend"], id="no-command"),
        pytest.param("`nvhook doctor --mend`", ["nvhook doctor --mend"], id="no-option"),
    ],
)
def test_unknown_commands(text: str, wrong: list[str]) -> None:
    assert _unknown_commands(text) == wrong


def test_every_page_is_in_the_site() -> None:
    nav = _nav(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"])
    assert sorted(nav) == sorted([*(page.name for page in DOCS.glob("*.md")), *AT_THE_ROOT])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built strictly: a link that leads nowhere is an error."""
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(place)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    return place


def test_site_has_every_page(site: Path) -> None:
    titles = [page.read_text().count("<h1") for page in sorted(site.glob("*/index.html"))]
    assert titles == [1] * len(_nav(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"])[1:])


def test_site_loads_nothing_from_elsewhere(site: Path) -> None:
    """Who reads it asks no other host, and it can be read without a network."""
    loaded = []
    for page in site.rglob("*.html"):
        tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text())
        loaded += [tag for tag in tags if re.search(r"(?:src|href)=[\"']?(?:https?:)?//", tag)]
    assert loaded == []
    assert not [sheet for sheet in site.rglob("*.css") if re.search(r"url\([\"']?(?:https?:)?//", sheet.read_text())]


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (REPOSITORY / "README.md").read_text())
    assert len(links) > 10
    assert [link for link in links if "://" not in link and not (REPOSITORY / link).exists()] == []


TABLE = (REPOSITORY / "README.md").read_text().partition("| | shown by |")[2].partition("\n\n")[0]
CLAIMS = [line.strip("| ").split(" | ") for line in TABLE.splitlines() if line.startswith("| ")]


def test_readme_has_claims() -> None:
    assert len(CLAIMS) > 10
    assert {len(claim) for claim in CLAIMS} == {2}


@pytest.mark.parametrize("claim", CLAIMS, ids=[claim[0][:40] for claim in CLAIMS])
def test_readme_claims_what_is_shown(claim: list[str]) -> None:
    """By tests that are there, or by a row of the benchmark, whose ratios are those of the page that explains them."""
    said, shown_by = claim
    names = re.findall("`([^`]+)`", shown_by)
    assert names
    for name in names:
        if name.startswith("make bench ROWS="):
            assert name.partition("=")[2] in bench.ROWS
            measured = (DOCS / "performance.md").read_text()
            assert [ratio for ratio in re.findall(r"\d\.\d\d", said) if ratio not in measured] == []
        else:
            _assert_is_a_test(name)


def _assert_is_a_test(name: str) -> None:
    path, _, function = name.partition("::")
    assert f"\ndef {function}(" in (REPOSITORY / path).read_text()


def test_configuration_page_is_the_schema_s() -> None:
    command = [sys.executable, str(REPOSITORY / "scripts/configuration.py")]
    made = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert (DOCS / "configuration.md").read_text() == made


@pytest.mark.root
def test_plan_page(simhost: Callable[[str], Path], tmp_path: Path) -> None:
    host = simhost("a100x2")
    rootfs = make_image("fedora", tmp_path / "rootfs")
    docpages.check("plan.md", host, {f"{host}/driver": ""}, {"/srv/rootfs": str(rootfs)})


@pytest.mark.root
def test_configure_page(simhost: Callable[[str], Path], tmp_path: Path) -> None:
    runtime = tmp_path / "nvidia-container-runtime"
    runtime.write_text("#!/bin/sh\n")
    runtime.chmod(0o755)
    config = tmp_path / "config.toml"
    config.write_bytes((REPOSITORY / "etc/config.toml").read_bytes())
    places = {
        "/etc/docker/daemon.json": f"{tmp_path}/daemon.json",
        "/usr/local/bin/nvidia-container-runtime": str(runtime),
        "/etc/nvidia-container-runtime/config.toml": str(config),
    }
    docpages.check("configure.md", simhost("a100x2"), {ours: page for page, ours in places.items()}, places)


CONTAINERD = """\
version = 2
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
    SystemdCgroup = true
"""


@pytest.mark.root
def test_engines_page(tmp_path: Path) -> None:
    runtime = tmp_path / "nvidia-container-runtime"
    runtime.write_text("#!/bin/sh\n")
    runtime.chmod(0o755)
    (tmp_path / "config.toml").write_text("")  # nvhook's own
    (tmp_path / "containerd").mkdir()
    (tmp_path / "containerd/config.toml").write_text(CONTAINERD)
    places = {
        "/etc/containerd/config.toml": f"{tmp_path}/containerd/config.toml",
        "/etc/containers/containers.conf.d/99-nvhook.conf": f"{tmp_path}/99-nvhook.conf",
        "/usr/local/bin/nvidia-container-runtime": str(runtime),
    }
    back = {ours: page for page, ours in places.items()}
    docpages.check("engines.md", tmp_path, back, {**places, "sudo ": ""})


@pytest.mark.root
def test_shared_machines_page(simhost: Callable[[str], Path], tmp_path: Path) -> None:
    """On a host with the policy that the page has."""
    page = (DOCS / "shared-machines.md").read_text()
    policy = page.partition("```toml\n")[2].partition("```")[0]
    (tmp_path / "config.toml").write_text(policy + (simhost("a100x2") / "config.toml").read_text())
    docpages.check("shared-machines.md", tmp_path, {})


def test_migration_page(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(
        '# as it was\n[nvidia-container-cli]\nenvironment = ["NVIDIA_X=1"]\nload-kmods = true\n\n'
        '[nvidia-container-runtime]\nlog-level = "info"\nmode = "cdi"\n'
    )
    page = "/etc/nvidia-container-runtime/config.toml"
    docpages.check("migration.md", tmp_path, {str(config): page}, {page: str(config)})


@pytest.mark.root
def test_demo_is_as_the_readme_shows_it(simhost: Callable[[str], Path], tmp_path: Path) -> None:
    host, _ = Workshop(tmp_path, simhost).copy_of("a100x2")  # its containers leave something in the state directory
    demo = [sys.executable, str(REPOSITORY / "tests/demo.py"), str(WRAPPER), "--config", f"{host}/config.toml"]
    done = subprocess.run(demo, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    (shown,) = re.findall(r"^```text\n(This machine .*?)^```$", (REPOSITORY / "README.md").read_text(), re.M | re.S)
    assert done.stdout.replace(str(host), "…/build/demo-host").startswith(shown)


@pytest.mark.root
def test_picture_of_the_readme_is_what_doctor_prints(simhost: Callable[[str], Path], tmp_path: Path) -> None:
    """If it is not: `.venv/bin/python tests/screenshot.py docs/doctor.svg`."""
    assert (DOCS / "doctor.svg").read_text() == screenshot.draw(screenshot.printed(simhost("h200"), tmp_path / "host"))


def test_tutorial_s_script_is_python() -> None:
    (script,) = re.findall(r"^```python\n(.*?)^```$", (DOCS / "tutorial.md").read_text(), re.M | re.S)
    compile(script, "train.py", "exec")


@pytest.mark.root
def test_tutorial_without_a_gpu(simhost: Callable[[str], Path], tmp_path: Path) -> None:
    host, _ = Workshop(tmp_path, simhost).copy_of("a100x2")
    script = (DOCS / "tutorial-simulated.md").read_text().partition("```text\n")[2].partition("```")[0]
    (tmp_path / "train.sh").write_text(script)
    demo = [sys.executable, str(REPOSITORY / "tests/demo.py"), str(WRAPPER), "--config", f"{host}/config.toml"]
    commands = {
        "scripts/demo train.sh": f"{shlex.join(demo)} --script {tmp_path}/train.sh",
        "build/demo-host": str(host),
    }
    docpages.check("tutorial-simulated.md", host, {str(host): "…/build/demo-host"}, commands)


@pytest.mark.root
def test_upgrades_page(simhost: Callable[[str], Path], tmp_path: Path) -> None:
    host, _ = Workshop(tmp_path, simhost).copy_of("a100x2")
    docpages.check("upgrades.md", host, {str(host): ""})
