"""What serving/deploy says of this project: flags that exist, files that are there, patience that fits together.

The files' own forms are checked by scripts/deployment.sh.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from laguna_serve.serving.engine.engine import STOP_GRACE_S
from laguna_serve.serving.gateway.config import parse_config
from laguna_serve.serving.gateway.config.listening import Server

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "serving" / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
CLUSTER = [
    document
    for name in ("engines", "gateway")
    for document in yaml.safe_load_all((DEPLOY / "kubernetes" / f"{name}.yaml").read_text())
]
RELEASES = ROOT / "tests" / "fixtures" / "releases"
CACHE = "/home/laguna/.cache"
# What production-stack's chart gives vLLM by itself, or what is vLLM's own default.
CHART_OWN = {"--served-model-name", "--dtype", "--seed", "--gpu-memory-utilization"}
# The services of compose.yaml that are engines.
ENGINES = ("speculative", "plain")


def list_commands() -> Iterator[list[str]]:
    """What containers run, after `laguna`."""
    for service in COMPOSE["services"].values():
        if service["image"].startswith("laguna-serve:"):
            yield service["command"]
    for container in list_containers():
        yield container["args"]


def list_containers() -> list[dict[str, Any]]:
    return [
        container
        for document in CLUSTER
        if document["kind"] == "Deployment"
        for container in document["spec"]["template"]["spec"]["containers"]
    ]


@pytest.mark.parametrize("command", list_commands(), ids=" ".join)
def test_commands_are_laguna_s(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from laguna_serve.serving.cli import main

    name, *flags = command
    known = help_of(main, name, capsys)
    for flag in flags:
        if flag.startswith("--"):
            assert re.search(rf"{flag}\b", known), f"laguna {name} has no {flag}"


def help_of(main: Any, name: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_mounted_files_are_there() -> None:
    mounted = [
        volume.split(":")[0]
        for service in COMPOSE["services"].values()
        for volume in service.get("volumes", ())
        if volume.startswith("./")
    ]
    assert len(mounted) >= 6
    assert [path for path in mounted if not path.endswith("/") and not (DEPLOY / path).is_file()] == []
    kustomization = yaml.safe_load((DEPLOY / "kubernetes" / "kustomization.yaml").read_text())
    names = [*kustomization["resources"], *(f for g in kustomization["configMapGenerator"] for f in g["files"])]
    assert [name for name in names if not (DEPLOY / "kubernetes" / name).is_file()] == []
    rules = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())["rule_files"]
    assert [name for name in rules if not (DEPLOY / name).is_file()] == []


def test_gateway_reads_a_configuration_that_was_put_in_the_place_of_another() -> None:
    """A mounted file is the one that was there at the start, whatever has its name since: its folder is mounted."""
    gateway = COMPOSE["services"]["gateway"]
    config = Path(gateway["command"][gateway["command"].index("--config") + 1])
    mounts = {target: source for source, target, _ in (volume.split(":") for volume in gateway["volumes"])}
    assert mounts[str(config.parent)].endswith("/")
    assert (DEPLOY / mounts[str(config.parent)] / config.name).is_file()


def list_writable_mounts(service: dict[str, Any]) -> dict[str, str]:
    """Volumes of a service by where they are mounted, but those that are read-only."""
    mounted = [volume.split(":") for volume in service.get("volumes", ()) if not volume.endswith(":ro")]
    return {path: name for name, path in mounted}


def test_engines_have_a_volume_each_for_caches_and_logs() -> None:
    """Both listen on one port, each in a container of its own: in one folder they would write one log."""
    volumes = [list_writable_mounts(COMPOSE["services"][name])[CACHE] for name in ENGINES]
    assert len(set(volumes)) == 2
    assert set(volumes) <= COMPOSE["volumes"].keys()


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("Containerfile.*")), ids=lambda path: path.suffix[1:])
def test_images_have_the_folders_that_are_written_to(path: Path) -> None:
    """A volume on a folder that an image has not is root's under Docker, and engines end with their log refused."""
    before, _, _ = path.read_text().partition("\nUSER ")
    made = re.findall(r"install --directory --owner laguna --group laguna (\S+)", before)
    wanted = {m for service in COMPOSE["services"].values() for m in list_writable_mounts(service)}
    wanted |= {m["mountPath"] for c in list_containers() for m in c["volumeMounts"] if not m.get("readOnly")}
    assert made == [mount for mount in sorted(wanted) if mount.startswith("/home/")] == [CACHE]


def test_models_that_compose_serves_by_itself_are_there() -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    defaults = dict(re.findall(r"\$\{(\w+):-([^}]+)\}", text))
    for name in (defaults["MODEL"], defaults["DRAFT"]):
        assert (DEPLOY / defaults["MODELS"] / name / "config.json").is_file(), name


def test_images_leave_out_checkpoints_and_what_was_built_here() -> None:
    """What git does not keep, and the folder that the files' own commands keep checkpoints in."""
    left_out = set((ROOT / ".dockerignore").read_text().splitlines())
    assert ".*" in left_out
    unkept = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    commands = "".join(path.read_text() for path in (*DEPLOY.glob("Containerfile.*"), DEPLOY / "compose.yaml"))
    beside = set(re.findall(r"\$PWD/(\w+)", commands))
    assert "models" in beside
    for name in unkept | beside:
        assert name.startswith(".") or {name, f"**/{name}"} & left_out, name


def test_cpu_image_says_where_its_torch_is(tmp_path: Path) -> None:
    """`torch==…+cpu` is not on pip's own index: a build without another one ends in a line that names the argument."""
    assert re.search(r"^torch==\S+\+cpu$", (ROOT / "scripts/requirements/cpu.lock").read_text(), re.MULTILINE)
    text = (DEPLOY / "Containerfile.cpu").read_text()
    # An argument of a build is in the environment of its commands, where pip looks.
    assert "--build-arg PIP_EXTRA_INDEX_URL=URL" in text
    assert re.search(r"^ARG PIP_EXTRA_INDEX_URL$", text, re.MULTILINE)
    command = re.search(r"^RUN (pip install .*cpu\.lock \\\n.*)$", text, re.MULTILINE)
    assert command is not None
    pip = tmp_path / "pip"
    for status in (1, 0):
        pip.write_text(f"#!/bin/sh\nexit {status}\n")
        pip.chmod(0o755)
        ran = subprocess.run(
            ["sh", "-c", command[1]],
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == status
        assert ("--build-arg PIP_EXTRA_INDEX_URL=URL" in ran.stderr) == bool(status)


@pytest.mark.slow
def test_gpu_image_holds_a_vllm_that_came_as_a_file(tmp_path: Path) -> None:
    """In vLLM's image it did; the file's own command is run beside such a distribution."""
    for name, version in (("torch", "9.8"), ("vllm", "9.7")):
        about = tmp_path / f"{name}-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (about / "RECORD").touch()
    origin = {"url": "file:///dist/vllm-9.7-py3-none-any.whl", "archive_info": {}}
    (tmp_path / "vllm-9.7.dist-info" / "direct_url.json").write_text(json.dumps(origin))
    command = re.search(
        r"^RUN python3 (-m pip .*) > /tmp/held.txt", (DEPLOY / "Containerfile.gpu").read_text(), re.MULTILINE
    )
    assert command is not None
    held = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{sys.executable} {command[1]}"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    ).stdout.splitlines()
    assert {"torch==9.8", "vllm==9.7"} <= set(held)


@pytest.mark.parametrize("folder", [DEPLOY, DEPLOY / "kubernetes"], ids=["compose", "kubernetes"])
def test_gateway_finds_its_engines_and_is_given_time_to_end(folder: Path) -> None:
    config = parse_config(tomllib.loads((folder / "gateway.toml").read_text()), "gateway.toml")
    hosts = {re.sub(r"^http://|:8000$", "", upstream.url) for upstream in config.models[0].upstreams}
    patience = config.server.shutdown_timeout_s
    if folder is DEPLOY:
        services = COMPOSE["services"]
        assert hosts <= services.keys()
        assert float(services["gateway"]["stop_grace_period"].removesuffix("s")) > patience
        return
    assert hosts <= {d["metadata"]["name"] for d in CLUSTER if d["kind"] == "Service"}
    pod = next(d for d in CLUSTER if d["kind"] == "Deployment" and d["metadata"]["name"] == "gateway")["spec"][
        "template"
    ]
    assert config.server.lame_duck_s >= 5
    assert pod["spec"]["terminationGracePeriodSeconds"] > patience + config.server.lame_duck_s


def test_engines_are_given_the_time_that_vllm_is_given() -> None:
    waits = [float(COMPOSE["services"][name]["stop_grace_period"].removesuffix("s")) for name in ENGINES]
    pods = [
        d["spec"]["template"]["spec"] for d in CLUSTER if d["kind"] == "Deployment" and d["metadata"]["name"] in ENGINES
    ]
    waits += [float(pod["terminationGracePeriodSeconds"]) for pod in pods]
    assert len(waits) == 4
    assert min(waits) > STOP_GRACE_S


def test_unit_waits_longer_than_the_gateway() -> None:
    unit = (DEPLOY / "laguna-gateway.service").read_text()
    waits = int(re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[1])  # type: ignore[index]
    assert waits > Server().shutdown_timeout_s
    assert "\nType=notify\n" in unit


def test_services_select_pods_that_are_there() -> None:
    pods = [d["spec"]["template"]["metadata"]["labels"] for d in CLUSTER if d["kind"] == "Deployment"]
    for service in (d for d in CLUSTER if d["kind"] == "Service"):
        chosen = [labels for labels in pods if service["spec"]["selector"].items() <= labels.items()]
        assert len(chosen) == 1, service["metadata"]["name"]
    for container in list_containers():
        ports = {port["name"] for port in container["ports"]}
        assert {container[p]["httpGet"]["port"] for p in container if p.endswith("Probe")} <= ports


def test_images_are_those_that_are_built_with_the_locked_vllm() -> None:
    tags = {f"laguna-serve:{path.suffix[1:]}" for path in DEPLOY.glob("Containerfile.*")}
    named = {service["image"] for service in COMPOSE["services"].values()} | {c["image"] for c in list_containers()}
    assert {image for image in named if image.startswith("laguna-serve")} <= tags
    locked = re.search(r"^vllm==(\S+)$", (ROOT / "scripts/requirements/gpu.lock").read_text(), re.MULTILINE)
    assert locked is not None
    assert f"FROM vllm/vllm-openai:v{locked[1]}\n" in (DEPLOY / "Containerfile.gpu").read_text()


def test_production_stack_starts_vllm_as_laguna_would(capsys: pytest.CaptureFixture[str]) -> None:
    """The chart's flags are those of the plan for the release, on the card that the comment names."""
    from laguna_serve.serving.cli import main

    release, drafter = "Laguna-XS.2", "Laguna-XS.2-speculator.dflash"
    draft = ["--draft", str(RELEASES / drafter)]
    main(["doctor", str(RELEASES / release), *draft, "--as-device", "h100-80gb", "--json"])
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    values = yaml.safe_load((DEPLOY / "kubernetes" / "production-stack.yaml").read_text())
    (spec,) = values["servingEngineSpec"]["modelSpec"]
    planned = " ".join(plan["command"]).replace(str(RELEASES), "poolside")
    assert f"--model {spec['modelURL']} " in planned
    assert [argument for argument in spec["vllmConfig"]["extraArgs"] if argument not in planned] == []
    assert f"--max-num-seqs {spec['vllmConfig']['maxNumSeqs']}" in planned
    for variable in spec["env"]:
        assert plan["environment"][variable["name"]] == variable["value"]
    # And all of the plan's are there: the chart knows those of the model, the network and the cache itself.
    given = {
        *spec["vllmConfig"]["extraArgs"],
        "--model",
        "--host",
        "--port",
        "--max-num-seqs",
        "--enable-prefix-caching",
    }
    left_out = {argument for argument in plan["command"] if argument.startswith("--")} - given
    assert left_out <= CHART_OWN, left_out
    assert values["servingEngineSpec"]["securityContext"]["fsGroup"] == 10001  # the image's user
