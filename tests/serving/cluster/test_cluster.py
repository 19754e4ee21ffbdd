"""Models on Ray Serve: the configuration, and in Ray's own environment the keeper of weights and a live replica."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from laguna_serve.serving.cluster.config import list_waiting, load_cluster, parse_cluster
from laguna_serve.serving.cluster.messages import NewWeights, Version, read_prompt
from laguna_serve.serving.gateway.config import ConfigError

ROOT = Path(__file__).resolve().parents[3]
PYTHON = ROOT / ".venv-ray" / "bin" / "python"
HERE = Path(__file__).parent
needs_ray = pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-ray: bash scripts/client_env.sh ray makes it")
PATIENCE_S = 900


def tables(**engine: Any) -> dict[str, Any]:
    return {"models": [{"name": "teacher", "engine": {"model": "tests/toy/teacher", **engine}}]}


def run_inside(names: list[str], folder: Path) -> None:
    """Run files of tests in .venv-ray, whose Ray this environment does not have."""
    command = [
        str(PYTHON),
        "-m",
        "pytest",
        *(str(HERE / name) for name in names),
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    # Where it hangs is shown before it is given up.
    command += ["-o", f"faulthandler_timeout={PATIENCE_S * 2 // 3}"]
    command += ["--basetemp", str(folder / "run"), "-o", "filterwarnings=", "--disable-warnings", "--tb=short"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_example_has_every_key_of_replicas() -> None:
    config = load_cluster(ROOT / "serving/cluster/cluster.example.toml")
    given = config.models[0].replicas
    assert given.model_fields_set == set(type(given).model_fields)
    assert given == type(given)()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weight_updates": True}, "expected weights.file beside weight_updates"),
        ({"sleep_level": 1}, "Ray decides how many replicas there are"),
        ({"idle_timeout_s": 60.0}, "Ray decides how many replicas there are"),
        ({"modell": "x"}, "did you mean model or max_model_len?; see serving/cluster/cluster.example.toml"),
    ],
)
def test_what_cannot_be_served_is_refused_in_words(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_cluster(tables(**changes), "here")
    assert words in str(refused.value)


def test_fewer_than_the_fewest_replicas_is_refused() -> None:
    given = tables()
    given["models"][0]["replicas"] = {"min_replicas": 3, "max_replicas": 2}
    with pytest.raises(ConfigError, match=r"max_replicas of at least min_replicas, 3, got 2"):
        parse_cluster(given, "here")


def test_replicas_that_fit_no_machine_are_named() -> None:
    given = tables()
    given["models"][0]["replicas"] = {"num_cpus": 4.0, "num_gpus": 1.0}
    config = parse_cluster(given, "here")
    machines = [{"CPU": 2.0, "GPU": 1.0, "memory": 1e9}, {"CPU": 8.0}]
    (line,) = list_waiting(config, machines)
    assert line.startswith(
        "model teacher: expected a machine with CPU 4 and GPU 1, got CPU 2 and GPU 1, CPU 8 and GPU 0; "
    )
    assert list_waiting(config, [*machines, {"CPU": 4.0, "GPU": 2.0}]) == []
    assert "got none; " in list_waiting(config, [])[0]


def test_an_update_of_the_drafter_leaves_the_models_weights() -> None:
    first = Version().follow(NewWeights(update=[{"folder": "/w/1"}], weight_version="v1"))
    second = first.follow(NewWeights(draft_update=[{"folder": "/d/1"}], draft_version="d1"))
    assert (first.epoch, first.weight_version, first.draft_version) == (1, "v1", "default")
    assert (second.epoch, second.weight_version, list(second.update)) == (2, "v1", [{"folder": "/w/1"}])
    assert (second.draft_version, list(second.draft_update)) == ("d1", [{"folder": "/d/1"}])


@pytest.mark.parametrize("body", [{}, {"prompt": ""}, {"prompt": []}, {"prompt": [1, 2]}, {"messages": [{"a": 1}]}])
def test_the_router_never_sees_an_empty_prompt(body: dict[str, Any]) -> None:
    """Ray 2.60's prefix router divides by the prompt's length."""
    assert read_prompt(body, "/v1/completions")


@needs_ray
@pytest.mark.slow
def test_keeper_in_rays_environment(tmp_path: Path) -> None:
    run_inside(["keeper_cases.py", "digest_cases.py"], tmp_path)


@needs_ray
@pytest.mark.vllm
def test_live_replica_in_rays_environment(tmp_path: Path) -> None:
    run_inside(["live_cases.py"], tmp_path)
