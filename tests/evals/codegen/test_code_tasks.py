"""code_tasks.py on a fake endpoint and on the engine: figures, records, resuming, refusals."""

from __future__ import annotations

import gzip
import json
import os
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from humaneval_like import ADD, DECODE, PLUS
from mock_engine import MockEngine, Settings, answering
from walls_here import needs_walls

from laguna_serve.evals import code_tasks
from laguna_serve.evals.codegen import grading
from laguna_serve.evals.problems import Problem
from laguna_serve.evals.sandbox import JailError, choice
from laguna_serve.serving.engine import Engine

pytestmark = needs_walls

PROBLEMS = (ADD, DECODE, PLUS)
Run = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def problems_file(tmp_path: Path) -> Path:
    path = tmp_path / "HumanEval.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(asdict(problem)) + "\n" for problem in PROBLEMS).encode()))
    return path


@pytest.fixture
def run(problems_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run_code_tasks(url: str, *more: str) -> tuple[int, dict[str, Any], str]:
        flags = ["--base-url", url, "--problems", str(problems_file), "--out", str(tmp_path / "out")]
        status = code_tasks.main([*flags, *more])
        captured = capsys.readouterr()
        lines = captured.out.strip().splitlines()
        return status, json.loads(lines[-1]) if lines else {}, captured.out + captured.err

    return run_code_tasks


def find_problem(body: Mapping[str, Any]) -> Problem:
    text = body["messages"][0]["content"] if "messages" in body else body["prompt"]
    return next(problem for problem in PROBLEMS if problem.prompt.strip() in text)


def solve(body: Mapping[str, Any]) -> str:
    problem = find_problem(body)
    if "prompt" in body:
        return f"{problem.canonical_solution}\n\ndef more():\n    pass"
    return f"Here you are:\n```python\n{problem.prompt}{problem.canonical_solution}```\nEnjoy!"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["chat", "completion"])
def test_canonical_answers_pass_all(run: Run, tmp_path: Path, form: str) -> None:
    with answering(solve, {"X-Weight-Version": "4"}) as server:
        status, result, output = run(server.url, "--form", form)
    assert status == 0
    assert result["schema"] == "laguna_serve.code_tasks/1"
    assert result["pass_at_k"]["1"]["point"] == 1.0
    assert result["pass_at_k"]["1"]["ci95"] == pytest.approx([0.025 ** (1 / 3), 1.0])
    assert result["reward"]["point"] == 1.0
    assert result["versions"] == [{"X-Weight-Version": "4", "samples": 3}]
    assert "T/decode     1/1    1.00" in output
    page = (tmp_path / "out" / "code_tasks.md").read_text()
    assert "| T/plus | 1/1 | 1.00 |" in page
    assert "pass@1 1.000" in page
    assert all(body["temperature"] == 0 and "seed" not in body for body in server.bodies)
    assert {row["task_id"] for row in read(tmp_path / "out" / "answers.jsonl")} == {"T/add", "T/decode", "T/plus"}


@pytest.mark.slow
def test_samples_give_pass_at_k_and_a_dense_reward(run: Run, tmp_path: Path) -> None:
    def reply(body: Mapping[str, Any]) -> str:
        problem = find_problem(body)
        if problem is ADD and body["seed"] % 2:
            return "```python\ndef add(a, b):\n    return a * b\n```"
        return solve(body) if problem is not PLUS else "I do not know."

    with answering(reply) as server:
        status, result, _ = run(
            server.url, "--samples", "4", "--temperature", "0.8", "--k", "1,2", "--concurrency", "3"
        )
    assert status == 0
    assert result["pass_at_k"]["1"]["point"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert result["pass_at_k"]["2"]["point"] == pytest.approx((5 / 6 + 1 + 0) / 3)
    assert result["reward"]["point"] == pytest.approx(((1 + 2 / 6) / 2 + 1 + 0) / 3)
    assert result["statuses"] == {"passed": 6, "failed": 2, "broken": 4}
    rows = json.loads((tmp_path / "out" / "code_tasks.json").read_text())["problems"]
    assert [(row["task_id"], row["passed"]) for row in rows] == [("T/add", 2), ("T/decode", 4), ("T/plus", 0)]
    assert sorted(body["seed"] for body in server.bodies) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


@pytest.mark.slow
def test_failed_request_is_no_zero_and_is_asked_again(run: Run, tmp_path: Path) -> None:
    with answering(lambda body: 400 if find_problem(body) is DECODE else solve(body)) as server:
        status, result, output = run(server.url)
    assert status == 1
    assert (result["pass_at_k"], result["reward"], result["failed_requests"]) == (None, None, 1)
    assert "1 of 3 requests failed, one with" in result["refused"][0]["reason"]
    assert "HTTP 400" in output
    with (tmp_path / "out" / "grades.jsonl").open("a") as file:
        file.write('{"task_id": "T/dec')  # cut off in writing
    with answering(solve) as server:
        status, result, _ = run(server.url)
    assert (status, len(server.bodies), result["pass_at_k"]["1"]["point"]) == (0, 1, 1.0)


@pytest.mark.slow
def test_answers_of_another_checkpoint_are_not_continued(run: Run, tmp_path: Path) -> None:
    """One pass@1 would be of two: the server was started again, with other weights under the same name."""
    checkpoint = tmp_path / "model"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"one")
    settings = Settings(says=lambda _, body: solve(body), requires=(), listed_length=True, root=str(checkpoint))
    with MockEngine(settings) as server:
        assert run(server.url)[1]["root"] == str(checkpoint)
        (checkpoint / "model.safetensors").write_bytes(b"another")
        status, _, output = run(server.url)
    assert (status, len(server.bodies)) == (2, 3)
    assert "got another one's; choose another --out or remove it" in output


@pytest.mark.slow
def test_interrupted_run_goes_on_where_it_was(run: Run, tmp_path: Path) -> None:
    main = threading.main_thread().ident
    asked = []

    def reply(body: Mapping[str, Any]) -> str:
        asked.append(body)
        if len(asked) == 3:
            assert main is not None
            signal.pthread_kill(main, signal.SIGINT)
        return solve(body)

    old = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        with answering(reply) as server:
            status, _, output = run(server.url, "--concurrency", "1")
            assert status == 130
            assert "the same command continues" in output
            kept = len(read(tmp_path / "out" / "answers.jsonl"))
            assert kept in (2, 3)
            status, result, _ = run(server.url, "--concurrency", "2")
    finally:
        signal.signal(signal.SIGINT, old[0])
        signal.signal(signal.SIGTERM, old[1])
    assert (status, result["pass_at_k"]["1"]["point"]) == (0, 1.0)
    assert len(asked) == 3 + 3 - kept


@pytest.mark.slow
def test_answers_that_are_gone_are_asked_for_again(run: Run, tmp_path: Path) -> None:
    with answering(solve) as server:
        assert run(server.url)[0] == 0
        (tmp_path / "out" / "answers.jsonl").unlink()
        status, result, _ = run(server.url)
    assert (status, result["pass_at_k"]["1"]["point"], len(server.bodies)) == (0, 1.0, 6)


@pytest.mark.slow
def test_folder_of_another_measurement_is_refused(run: Run) -> None:
    with answering(solve) as server:
        assert run(server.url)[0] == 0
        status, _, output = run(server.url, "--max-tokens", "5")
    assert status == 2
    assert "got another one's; choose another --out" in output
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "expected --base-url and --out"),
        (["--base-url", "localhost:1", "--out", "o"], "--base-url: expected http://… or https://…, got localhost:1"),
        (["--base-url", "http://x", "--out", "o", "--samples", "2"], "--samples: expected 1 at temperature 0, got 2"),
        (["--base-url", "http://x", "--out", "o", "--k", "1,10"], "--k: expected 1 to --samples (1), got 1,10"),
        (["--base-url", "http://x", "--out", "o", "--temperature", "nan"], "--temperature: expected a finite number"),
        (
            ["--base-url", "http://x", "--out", "o", "--api-key-env", "NO_KEY"],
            "expected the key in $NO_KEY, got nothing",
        ),
        (["--check-canonical", "--timeout-s", "0"], "--timeout-s: expected at least 1, got 0"),
        (["--check-canonical", "--timeout-s", f"{1 << 63}"], "--timeout-s: expected at most 2147483647"),
        (["--check-canonical", "--memory-mib", f"{1 << 44}"], "--memory-mib: expected at most 2147483647"),
        (["--check-canonical", "--problems", "/no/file"], "/no/file: expected a problems file"),
    ],
)
def test_bad_input_is_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = code_tasks.main(flags)
    except SystemExit as error:
        status = int(str(error.code))
    assert status == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_endpoint_that_is_down_is_told(run: Run, tmp_path: Path) -> None:
    with answering(solve) as server:
        pass
    status, _, output = run(server.url)
    assert status == 2
    assert "is the server up?" in output
    assert not (tmp_path / "out").exists()


def test_canonical_solutions_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Run) -> None:
    path = tmp_path / "p.jsonl"
    wrong = asdict(PLUS) | {"task_id": "T/wrong", "canonical_solution": "    return 0.0\n"}
    path.write_text("".join(json.dumps(item) + "\n" for item in (asdict(ADD), wrong)))
    assert code_tasks.main(["--check-canonical", "--problems", str(path)]) == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["problems"], [row["task_id"] for row in result["failing"]]) == (2, ["T/wrong"])
    path.write_text(json.dumps(asdict(ADD)) + "\n")
    assert code_tasks.main(["--check-canonical", "--problems", str(path)]) == 0


@pytest.mark.slow
def test_system_without_walls_is_refused_or_warned_about(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(choice, "find_obstacle", lambda _: "Operation not permitted")
    with answering(solve) as server:
        status, _, output = run(server.url)
        assert (status, server.bodies) == (2, [])
        assert "landlock: Operation not permitted; allow unprivileged user namespaces, install bubblewrap or" in output
        status, result, output = run(server.url, "--walls", "none")
    assert (status, result["pass_at_k"]["1"]["point"]) == (0, 1.0)
    assert "warning: without walls" in output
    assert set(result["walls"]) <= {"filter", "own-user filter"}
    assert sum(result["walls"].values()) == len(read(tmp_path / "out" / "grades.jsonl"))


def test_sandbox_that_breaks_is_no_zero(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise JailError("sandbox: expected its processes to start, got nothing")

    monkeypatch.setattr(grading, "grade", fail)
    with answering(solve) as server:
        status, _, output = run(server.url, "--skip-probes")
    assert status == 2
    assert "expected its processes to start" in output
    assert not (tmp_path / "out" / "grades.jsonl").exists()


@pytest.mark.vllm
def test_engine_is_evaluated_and_the_run_continued(run: Run, fp32_engine: Engine, tmp_path: Path) -> None:
    flags = ("--form", "completion", "--max-tokens", "24", "--samples", "2", "--temperature", "0.7", "--k", "1,2")
    status, result, _ = run(fp32_engine.base_url, *flags)
    assert status == 0
    assert (result["model"], sum(result["statuses"].values())) == (fp32_engine.model_name, 6)
    assert 0 <= result["pass_at_k"]["2"]["point"] <= 1
    grades = tmp_path / "out" / "grades.jsonl"
    before, size = read(grades), os.path.getsize(tmp_path / "out" / "answers.jsonl")
    assert all(row["program"].startswith(problem_of(row).prompt) for row in before)
    grades.write_text("".join(grades.read_text().splitlines(keepends=True)[:4]))
    again = run(fp32_engine.base_url, *flags)
    assert (again[0], again[1]["reward"], again[1]["pass_at_k"]) == (0, result["reward"], result["pass_at_k"])
    assert os.path.getsize(tmp_path / "out" / "answers.jsonl") == size  # nothing was asked again


def problem_of(row: Mapping[str, Any]) -> Problem:
    return next(problem for problem in PROBLEMS if problem.task_id == row["task_id"])
