"""The environment `spec_rl` under verifiers' own command, as released: rewards, splits, token ids, nothing sent out."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from spec_rl_world import (
    ANSWER_IDS,
    ANSWERS,
    BIN,
    LOGPROB,
    MEAN,
    PROMPT_IDS,
    ROOT,
    MockVllm,
    gateway,
    make_env,
    make_problem,
    needs_verifiers,
    world,
    write_problems,
)
from walls_here import needs_walls

from laguna_serve.evals.problems import SHIPPED, load_problems
from laguna_serve.evals.problems.splits import is_held_out, split_problems
from laguna_serve.serving.engine import Engine


def run_eval(out: Path, url: str, *flags: str, proxy: str = "http://127.0.0.1:9") -> tuple[str, list[dict[str, Any]]]:
    """`vf-eval` with the shipped configuration: what it reported, and the saved traces."""
    command = [str(BIN / "vf-eval"), "@", str(ROOT / "evals" / "spec_rl" / "eval.toml")]
    command += ["--client.base-url", f"{url}/v1", "--output-dir", str(out), "--run.name", "run", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=make_env(out, proxy), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (out / "run" / "traces.jsonl").read_text().splitlines()
    return done.stdout, [trace for line in lines for trace in json.loads(line)["traces"]]


def read_tokens(trace: dict[str, Any]) -> tuple[list[int], list[int], list[float]]:
    """The ids before a trace's answer, those of the answer, and their log-probabilities, as a trainer reads them."""
    pairs = [pair for node in trace["nodes"] for pair in zip(node["token_ids"], node["mask"], strict=True)]
    sampled = [token for token, drawn in pairs if drawn]
    assert [drawn for _, drawn in pairs] == [False] * (len(pairs) - len(sampled)) + [True] * len(sampled)
    return [token for token, drawn in pairs if not drawn], sampled, trace["nodes"][-1]["logprobs"]


def test_side_of_a_problem_is_its_ids_alone() -> None:
    problems = [make_problem(i) for i in range(40)]
    train, held_out = split_problems(problems)
    assert {p.task_id for p in train}.isdisjoint(p.task_id for p in held_out)
    assert len(train) + len(held_out) == 40
    more = [make_problem(i) for i in reversed(range(90))]
    assert [p for p in split_problems(more)[1] if p in problems] == held_out[::-1]


def test_share_and_seed_choose_the_side() -> None:
    ids = [f"T/{i}" for i in range(2000)]
    few, many = ({i for i in ids if is_held_out(i, share)} for share in (0.1, 0.4))
    assert few < many, "a larger share keeps what a smaller one held out"
    assert 150 < len(few) < 250
    assert 720 < len(many) < 880
    assert {i for i in ids if is_held_out(i, 0.1, seed=1)} != few


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5])
def test_share_that_empties_a_side_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="expected above 0 and below 1"):
        is_held_out("T/0", share)


def test_side_without_a_problem_is_refused() -> None:
    with pytest.raises(ValueError, match="expected problems on both sides"):
        split_problems([make_problem(0)])


def test_shipped_problems_are_on_both_sides() -> None:
    train, held_out = split_problems(load_problems(SHIPPED))
    assert len(held_out) >= 5
    assert len(train) > 2 * len(held_out)


@pytest.mark.slow
@needs_verifiers
def test_environment_loads_by_name(tmp_path: Path) -> None:
    small, large = (str(write_problems(tmp_path / f"{count}.jsonl", count)) for count in (12, 30))
    sides = [{"split": side, "problems": small} for side in ("train", "held_out", "all")]
    bad: list[tuple[dict[str, Any], str]] = [
        ({"split": "test"}, "'train', 'held_out' or 'all'"),
        ({"held_out_share": 1.0}, "less than 1"),
        ({"problems": "nowhere.jsonl"}, "nowhere.jsonl: expected a problems file"),
        ({"problem": small}, "Extra inputs are not permitted"),
        ({"task": {"cpu_s": 0}}, "greater than or equal to 1"),
        ({"problems": str(write_problems(tmp_path / "1.jsonl", 1))}, "expected problems on both sides"),
    ]
    cruxeval = str(Path(__file__).resolve().parents[1] / "published" / "cruxeval" / "cruxeval.jsonl")
    settings = [*sides, {"split": "held_out", "problems": large}, {}]
    settings += [{"split": "all", "problems": cruxeval}, {"split": "all"}, *(item for item, _ in bad)]
    command = [str(BIN / "python"), str(Path(__file__).with_name("spec_rl_probe.py"))]
    done = subprocess.run(
        command,
        input=json.dumps(settings),
        capture_output=True,
        text=True,
        timeout=120,
        env=make_env(tmp_path),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    train, held_out, every, grown, shipped, values, functions, *refused = map(json.loads, done.stdout.splitlines())
    keys = [[task["key"] for task in found["tasks"]] for found in (train, held_out, every, grown)]
    assert keys[0]
    assert keys[1]
    assert sorted(keys[0] + keys[1]) == sorted(keys[2]) == sorted(f"T/{i}" for i in range(12))
    assert [key for key in keys[3] if key in keys[2]] == keys[1], "added problems move none"
    assert train["runtime"] == "subprocess", "not verifiers' default, a sandbox in the cloud"
    assert len(shipped["tasks"]) == len(split_problems(load_problems(SHIPPED))[0])
    kinds = [{task["kind"] for task in found["tasks"]} for found in (values, functions)]
    assert kinds == [{"value"}, {"function"}], "problems that ask for a value stay such"
    for found, (item, message) in zip(refused, bad, strict=True):
        assert message in found["error"], item


@pytest.mark.slow
@needs_verifiers
@needs_walls
def test_command_reports_the_rewards(tmp_path: Path) -> None:
    asked = len(ANSWERS) + 1  # the last one is refused
    problems = write_problems(tmp_path / "problems.jsonl", asked)
    flags = ["--env.taskset.problems", str(problems), "--env.taskset.split", "all", "--model", "fake"]
    flags += ["--sampling.return-token-ids", "true", "--sampling.logprobs", "true"]
    with MockVllm() as fake, world() as proxy:
        report, traces = run_eval(tmp_path, fake.url, *flags, proxy=proxy)
    assert f"{asked}/{asked}" in report
    assert f"reward {MEAN:.2f}" in report, "over what was answered"
    assert "passed 0.50" in report
    assert f"err {1 / asked:.2f}" in report
    found = {trace["task"]["key"]: trace for trace in traces}
    for number, (_, share) in enumerate(ANSWERS):
        trace = found[f"T/{number}"]
        assert trace["rewards"]["tests_passed"] == {"score": share, "weight": 1.0}, number
        passed = float(share == 1)
        metrics = {"passed": passed, "published": passed, "extracted": float(number != 7), "judged": float(number != 6)}
        assert trace["metrics"] == metrics
    assert found["T/4"]["info"]["grade"]["tests_passed"] == 2
    assert "class Any" in found["T/6"]["nodes"][-1]["message"]["content"], "the trace keeps the answer"
    assert read_tokens(found["T/0"]) == (PROMPT_IDS, ANSWER_IDS, [LOGPROB] * len(ANSWER_IDS))
    assert {body["temperature"] for body in fake.bodies} == {1.0}, "the run's sampling reaches the endpoint"
    refused = found[f"T/{asked - 1}"]
    assert (refused["ok"], refused["rewards"], refused["errors"][0]["type"]) == (False, {}, "ProviderError")
    assert set(fake.sessions) == {trace["id"] for trace in traces}
    assert set(fake.keys) == {"Bearer EMPTY"}, "no key of another service"


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        found: dict[str, Any] = json.load(reply)
    return found


@pytest.mark.slow
@needs_verifiers
def test_no_walls_no_rewards(tmp_path: Path) -> None:
    with MockVllm() as server:
        config = str(ROOT / "evals" / "spec_rl" / "eval.toml")
        command = [str(BIN / "vf-eval"), "@", config, "--client.base-url", f"{server.url}/v1", "--output-dir"]
        command += [str(tmp_path), "--env.taskset.task.walls", "bubblewrap"]
        environment = make_env(tmp_path) | {"PATH": str(BIN)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
        assert server.seen == []
    said = " ".join((done.stdout + done.stderr).split())
    assert "bubblewrap: sandbox: expected bubblewrap to be installed, got no bwrap; allow unprivileged user" in said


@pytest.mark.vllm
@needs_verifiers
@needs_walls
def test_rollouts_through_the_gateway_have_token_ids(fp32_engine: Engine, tmp_path: Path) -> None:
    """The ids are those of the engine's own template, and the model gives them the noted log-probabilities."""
    flags = ["--model", fp32_engine.model_name, "--select.limit", "2", "--num-rollouts", "2"]
    flags += ["--sampling.max-tokens", "24", "--sampling.return-token-ids", "true", "--sampling.logprobs", "true"]
    with gateway(fp32_engine) as url:
        report, traces = run_eval(tmp_path, url, *flags)
        assert "err 0.00" in report
        assert len(traces) == 4
        for trace in traces:
            prompt, answer, logprobs = read_tokens(trace)
            messages = [node["message"] for node in trace["nodes"][:-1]]
            model = {"model": fp32_engine.model_name}
            assert post(f"{url}/tokenize", {**model, "messages": messages})["tokens"] == prompt
            assert 0 < len(answer) <= 24
            body = {**model, "prompt": prompt + answer, "max_tokens": 1, "prompt_logprobs": 0}
            steps = post(f"{url}/v1/completions", body)["choices"][0]["prompt_logprobs"][len(prompt) :]
            scores = [steps[i][str(token)]["logprob"] for i, token in enumerate(answer)]
            assert logprobs == pytest.approx(scores, abs=1e-3)
            assert 0 <= trace["rewards"]["tests_passed"]["score"] <= 1


@pytest.mark.vllm
@needs_verifiers
@needs_walls
def test_training_client_cannot_read_vllms_log_probabilities(fp32_engine: Engine, tmp_path: Path) -> None:
    """Its requests reach the engine, whose answer names tokens in another field, as docs/rl.md says."""
    name = fp32_engine.model_name
    flags = ["--model", name, "--select.limit", "1", "--num-rollouts", "1", "--sampling.max-tokens", "24"]
    flags += ["--client.type", "train", "--client.renderer-model-name", fp32_engine.config.model]
    with gateway(fp32_engine) as url:
        _, (trace,) = run_eval(tmp_path, url, *flags)
        body = {"model": name, "token_ids": [10, 20], "sampling_params": {"max_tokens": 1, "logprobs": 1}}
        step = post(f"{url}/inference/v1/generate", body)["choices"][0]["logprobs"]["content"][0]
    (error,) = trace["errors"]
    assert re.search(r"logprobs\.content\[0\]\.token must be 'token_id:\d+'", error["message"])
    assert "token" not in step
    assert type(step["token_id"]) is int
