"""The environment `spec_rl` as prime-rl's evaluation command runs it: by an env server, as it is configured."""

from __future__ import annotations

import json
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from spec_rl_world import (
    ANSWERS,
    BIN,
    ROOT,
    MockVllm,
    gateway,
    make_env,
    needs_verifiers,
    world,
    write_problems,
)
from walls_here import needs_walls

from laguna_serve.evals.problems import SHIPPED, load_problems
from laguna_serve.evals.problems.splits import split_problems
from laguna_serve.serving.engine import Engine

CONFIG = ROOT / "evals" / "spec_rl" / "prime_rl.toml"
PROBE = Path(__file__).with_name("env_server_probe.py")


def run(home: Path, proxy: str, *arguments: str, config: Path = CONFIG) -> list[dict[str, Any]]:
    """The traces of all episodes, one for each."""
    command = [str(BIN / "python"), str(PROBE), str(config), *arguments]
    env = make_env(home, proxy)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=False)
    assert done.returncode == 0, done.stderr
    episodes = [json.loads(line) for line in done.stdout.splitlines()]
    assert {len(episode["traces"]) for episode in episodes} == {1}
    return [episode["traces"][0] for episode in episodes]


@pytest.mark.slow
@needs_verifiers
@needs_walls
def test_env_server_gives_the_rewards_of_the_command(tmp_path: Path) -> None:
    asked = len(ANSWERS) + 1  # the last one is refused
    problems = write_problems(tmp_path / "problems.jsonl", asked)
    fields = [f"problems={json.dumps(str(problems))}", 'split="all"']
    with MockVllm() as fake, world() as proxy:
        traces = run(tmp_path, proxy, f"{fake.url}/v1", "fake", "1", *fields)
    assert [trace["task"]["key"] for trace in traces] == [f"T/{number}" for number in range(asked)]
    for number, (_, share) in enumerate(ANSWERS):
        trace = traces[number]
        assert trace["rewards"]["tests_passed"] == {"score": share, "weight": 1.0}, number
        passed = float(share == 1)
        metrics = {"passed": passed, "published": passed, "extracted": float(number != 7), "judged": float(number != 6)}
        assert trace["metrics"] == metrics
        assert trace["info"]["grade"]["tests_total"] == 4
    refused = traces[-1]
    assert (refused["ok"], refused["rewards"], refused["errors"][0]["type"]) == (False, {}, "ProviderError")
    assert {(body["temperature"], body["max_tokens"]) for body in fake.bodies} == {(1.0, 512)}
    assert set(fake.keys) == {"Bearer EMPTY"}, "no key of another service"


def test_configuration_asks_the_held_out_problems_alone() -> None:
    config = tomllib.loads(CONFIG.read_text())
    (source,) = config["source"]
    assert source["env"] == {"taskset": {"id": "spec_rl", "split": "held_out"}}
    assert config["concurrency"]["min_inflight"] == config["concurrency"]["max_inflight"]
    assert config["client"]["api_key_var"] != "PRIME_API_KEY"


@pytest.mark.vllm
@needs_verifiers
@needs_walls
def test_toy_is_evaluated_by_an_env_server(fp32_engine: Engine, tmp_path: Path) -> None:
    short = tmp_path / "short.toml"
    short.write_text(CONFIG.read_text().replace("max_completion_tokens = 512", "max_completion_tokens = 24"))
    with gateway(fp32_engine) as url, world() as proxy:
        traces = run(tmp_path, proxy, f"{url}/v1", fp32_engine.model_name, "1", config=short)
    held_out = split_problems(load_problems(SHIPPED))[1]
    assert [trace["task"]["key"] for trace in traces] == [problem.task_id for problem in held_out]
    for trace in traces:
        assert trace["ok"], trace["errors"]
        assert 0 <= trace["rewards"]["tests_passed"]["score"] <= 1
        assert set(trace["metrics"]) == {"passed", "published", "extracted", "judged"}
