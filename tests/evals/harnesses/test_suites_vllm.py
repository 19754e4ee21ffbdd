"""suites.py with the real harnesses against a real engine, on made-up data in the formats of the real sets."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from walls_here import needs_walls

from laguna_serve.evals import suites
from laguna_serve.evals.harnesses import lm_eval
from laguna_serve.evals.harnesses.results import read_scores
from laguna_serve.evals.harnesses.settings import load_suites
from laguna_serve.serving.client.completions import open_session
from laguna_serve.serving.engine import Engine

pytestmark = pytest.mark.vllm

MADE = (lm_eval.ENVIRONMENT / ".stamp").is_file()
QUESTIONS = [
    ("What do bees make?", ("honey", "stone", "glass", "paper"), 0),
    ("Which of these is a planet?", ("a spoon", "Mars", "an oak", "a river"), 1),
    ("Ice is frozen", ("oil", "sand", "water", "smoke"), 2),
    ("How many legs has a spider?", ("two", "four", "eight"), 2),
    ("Which animal barks?", ("a cat", "a dog", "a fish", "a bird"), 1),
    ("What falls from clouds?", ("coins", "books", "chairs", "rain"), 3),
]
SUMS = [(1, 2), (3, 4), (5, 6), (7, 8), (2, 2), (9, 1), (4, 4), (6, 3), (8, 2), (5, 5), (1, 1), (2, 3)]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_arc(question: str, answers: tuple[str, ...], right: int) -> dict[str, Any]:
    labels = list("ABCD")[: len(answers)]
    choices = {"text": list(answers), "label": labels}
    return {"id": question, "question": question, "choices": choices, "answerKey": labels[right]}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    write_jsonl(folder / "arc_challenge" / "test.jsonl", [make_arc(*question) for question in QUESTIONS])
    examples = [make_arc(f"Which word has number {i}?", (f"w{i}", f"v{i}", f"u{i}"), i % 3) for i in range(26)]
    write_jsonl(folder / "arc_challenge" / "train.jsonl", examples)
    sums = [
        {"question": f"Ann has {a} pens and buys {b}. How many?", "answer": f"{a} + {b} = {a + b}.\n#### {a + b}"}
        for a, b in SUMS
    ]
    write_jsonl(folder / "gsm8k" / "train.jsonl", sums[:8])
    write_jsonl(folder / "gsm8k" / "test.jsonl", sums[8:])
    return folder


async def ask_scores(engine: Engine, pairs: list[tuple[str, str]]) -> list[float]:
    """The log-likelihood of every continuation, from the engine's own tokenizer and prompt log-probabilities."""
    plain = {"model": engine.model_name, "add_special_tokens": False}
    scores = []
    async with open_session() as session:
        for context, continuation in pairs:
            async with session.post(f"{engine.base_url}/tokenize", json={**plain, "prompt": context}) as response:
                start = (await response.json())["count"]
            body = {**plain, "prompt": context + continuation, "max_tokens": 1, "prompt_logprobs": 0}
            async with session.post(f"{engine.base_url}/v1/completions", json=body) as response:
                steps = (await response.json())["choices"][0]["prompt_logprobs"]
            scores.append(sum(float(next(iter(step.values()))["logprob"]) for step in steps[start:]))
    return scores


PUBLISHED = Path(__file__).resolve().parents[1] / "published"


@needs_walls
def test_code_suites_on_the_engine(fp32_engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Raw and through the toy's own chat template, with thinking on and off: a row each, and other answers."""

    def run(names: str, *more: str) -> dict[tuple[str, str], dict[str, Any]]:
        asked = ["--base-url", fp32_engine.base_url, "--data", str(PUBLISHED), "--out", str(tmp_path / "out")]
        assert suites.main([*asked, "--suites", names, "--limit", "1", "--max-tokens", "24", *more]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        return {(row["suite"], row["metric"]): next(iter(row["cells"].values())) for row in result["rows"]}

    run("humaneval-plus", "--chat", "--thinking", "on")
    run("humaneval-plus", "--chat", "--thinking", "off")
    rows = run("humaneval-plus,mbpp-bigcode:train,cruxeval-o")
    assert set(rows) == {
        *((f"humaneval-plus, {how}", f"pass@1 {part}") for how in HOWS for part in ("plus", "base")),
        ("mbpp-bigcode:train, raw", "pass@1"),
        ("cruxeval-o, raw", "pass@1"),
    }
    assert all((cell["n"], cell["value"]) == (1, 0.0) for cell in rows.values())  # five million parameters solve none
    texts = {}
    for how in HOWS:
        folder = tmp_path / "out" / f"humaneval-plus-{how.replace(', ', '-').replace(' ', '-')}" / "code_tasks"
        (answer,) = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
        assert answer["tokens"] == 24 or answer["finish_reason"] == "stop"
        texts[how] = answer["text"]
    assert len(set(texts.values())) == 3, texts


def check_outcomes(out: Path) -> None:
    """What became of single questions is what the harness's numbers are of."""
    for score in read_scores(out, [*load_suites().values()]):
        outcomes = score.read_outcomes()
        assert len(outcomes) == score.cell.n
        assert sum(outcomes.values()) / len(outcomes) == pytest.approx(score.cell.value)


HOWS = ("raw", "chat, thinking", "chat, no thinking")


@pytest.mark.skipif(not MADE, reason="no .venv-evals: bash scripts/client_env.sh evals makes it")
def test_real_harness_on_local_mmlu_pro(
    fp32_engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--base-url", fp32_engine.base_url, "--data", str(PUBLISHED), "--out", str(tmp_path / "out")]
    assert suites.main([*asked, "--suites", "mmlu-pro-5", "--max-tokens", "8"]) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    (cell,) = row["cells"].values()
    assert (row["suite"], row["metric"], cell["n"]) == ("mmlu-pro-5", "exact_match,custom-extract", 14)
    # The group's version, and its tasks' own.
    assert cell["settings"]["task_version"] == f"{cell['task_versions']['mmlu_pro']}, its 14 tasks 3.1"
    assert len(cell["task_versions"]) == 15
    check_outcomes(tmp_path / "out")
    (log,) = (tmp_path / "out").rglob("samples_mmlu_pro_law_*.jsonl")
    (sample,) = [json.loads(line) for line in log.read_text().splitlines()]
    prompt = sample["arguments"]["gen_args_0"]["arg_0"]
    assert prompt.count("Question:\nIn law, which word has the number") == 5  # the examples of its own category
    assert prompt.count("Answer: Let's think step by step.") == 6


@pytest.mark.skipif(not MADE, reason="no .venv-evals: bash scripts/client_env.sh evals makes it")
def test_real_harness_on_local_data(
    fp32_engine: Engine, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    asked = ["--base-url", fp32_engine.base_url, "--data", str(data), "--out", str(out)]
    assert suites.main([*asked, "--suites", "arc-challenge,gsm8k"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {(row["suite"], row["metric"]): next(iter(row["cells"].values())) for row in result["rows"]}
    assert [key for key in rows if key[0] == "gsm8k"] == [
        ("gsm8k", "exact_match,strict-match"),
        ("gsm8k", "exact_match,flexible-extract"),
    ]
    assert rows["arc-challenge", "acc"]["n"] == len(QUESTIONS)
    assert rows["gsm8k", "exact_match,strict-match"]["n"] == 4
    assert rows["arc-challenge", "acc"]["settings"]["cut_prompts"] == 0

    (log,) = (out / "arc-challenge").rglob("samples_arc_challenge_*.jsonl")
    samples = [json.loads(line) for line in log.read_text().splitlines()]
    pairs = [(pair["arg_0"], pair["arg_1"]) for sample in samples for pair in sample["arguments"].values()]
    theirs = [float(score) for sample in samples for ((score, _),) in sample["resps"]]
    assert len(pairs) == sum(len(answers) for _, answers, _ in QUESTIONS)
    assert all(context.count("Question: ") == 26 for context, _ in pairs)  # 25 examples and the question
    assert theirs == pytest.approx(asyncio.run(ask_scores(fp32_engine, pairs)), abs=1e-3)
    # What the scores say is what the table says.
    ours = [max(range(len(sample["resps"])), key=lambda i: float(sample["resps"][i][0][0])) for sample in samples]
    right = sum(best == int(sample["target"]) for best, sample in zip(ours, samples, strict=True))
    assert rows["arc-challenge", "acc"]["value"] == pytest.approx(right / len(QUESTIONS))

    check_outcomes(out)
    (log,) = (out / "gsm8k").rglob("samples_gsm8k_*.jsonl")
    sample = json.loads(log.read_text().splitlines()[0])
    assert sample["arguments"]["gen_args_0"]["arg_0"].count("Question: ") == 9
    assert sample["resps"][0][0].strip()
