"""The code suites of suites.py, whole, on a fake endpoint: names, prompts, data, splits, thinking, the table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from mock_engine import answering
from walls_here import needs_walls

from laguna_serve.evals import suites
from laguna_serve.evals.harnesses import code_suites as code_suites
from laguna_serve.evals.harnesses import lm_eval
from laguna_serve.evals.harnesses.code_suites import PACKAGED, choose_max_tokens, name_run
from laguna_serve.evals.harnesses.lm_eval import Target
from laguna_serve.evals.harnesses.settings import choose_suites, load_suites
from laguna_serve.evals.problems.protocols import PROTOCOLS
from laguna_serve.serving.kit.run_dir import hold_folder

FILES = Path(__file__).resolve().parents[1] / "published"
SUITES = load_suites()
VOWELS = "def count_vowels(text):\n    return sum(letter in 'aeiou' for letter in text.lower())\n"
pytestmark = needs_walls


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run_suites(names: str, reply: Any, *more: str) -> tuple[int, dict[str, Any], list[dict[str, Any]], str]:
        with answering(reply) as server:
            asked = ["--base-url", server.url, "--max-length", "4096", "--suites", names, "--data", str(FILES)]
            status = suites.main([*asked, "--out", str(tmp_path / "out"), *more])
        captured = capsys.readouterr()
        lines = captured.out.strip().splitlines()
        return status, json.loads(lines[-1]) if lines else {}, server.bodies, captured.out + captured.err

    return run_suites


def list_rows(result: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["suite"], row["metric"]): next(iter(row["cells"].values())) for row in result["rows"]}


@pytest.mark.slow
def test_suites_name_their_prompt_form_and_thinking(run: Any, tmp_path: Path) -> None:
    reply = f"```python\n{VOWELS}```"
    status, result, seen, _ = run("humaneval,humaneval-plus", lambda _: reply, "--chat", "--thinking", "off")
    assert status == 0
    rows = list_rows(result)
    assert list(rows) == [
        ("humaneval, chat, no thinking", "pass@1"),
        ("humaneval-plus, chat, no thinking", "pass@1 plus"),
        ("humaneval-plus, chat, no thinking", "pass@1 base"),
    ]
    cell = rows["humaneval-plus, chat, no thinking", "pass@1 plus"]
    assert (cell["value"], cell["n"]) == (pytest.approx(1 / 3), 3)
    settings = cell["settings"]
    assert (settings["protocol"], settings["form"], settings["enable_thinking"]) == ("evalplus", "chat", False)
    assert settings["data"].startswith("HumanEvalPlus.jsonl (")
    assert [body["chat_template_kwargs"] for body in seen] == [{"enable_thinking": False}] * 5
    assert {body["max_tokens"] for body in seen} == {1024, 768}
    assert (tmp_path / "out" / "humaneval-plus-chat-no-thinking" / "code_tasks" / "code_tasks.json").is_file()
    # Raw, and with thoughts: other rows of the same table.
    run("humaneval-plus", lambda _: "    return 1\n")
    status, result, seen, _ = run("humaneval-plus", lambda _: f"<think>x</think>{reply}", "--chat", "--thinking", "on")
    assert status == 0
    assert {suite for suite, _ in list_rows(result)} >= {"humaneval-plus, raw", "humaneval-plus, chat, thinking"}
    assert seen[0]["max_tokens"] == 2048  # half of the context


def test_a_second_run_of_a_suite_is_kept_out(run: Any, tmp_path: Path) -> None:
    """Another suite of the same folder may run beside it."""
    with hold_folder(tmp_path / "out" / "humaneval-plus-raw"):
        status, _, seen, output = run("humaneval-plus", lambda _: "    return 1\n")
    assert (status, seen) == (2, [])
    assert "humaneval-plus-raw: expected to write alone, got another run at it" in output


@pytest.mark.slow
def test_mbpp_is_asked_in_the_split_and_by_the_prompt_that_the_name_says(run: Any) -> None:
    bodies: list[Mapping[str, Any]] = []

    def reply(body: Mapping[str, Any]) -> str:
        bodies.append(body)
        return "def drop_ends(text):\n    return text[1:-1]\nassert True"

    status, result, seen, output = run("mbpp-bigcode,mbpp-bigcode:train,mbpp-signature", reply)
    assert status == 0, output
    rows = list_rows(result)
    assert [suite for suite, _ in rows] == ["mbpp-bigcode, raw", "mbpp-bigcode:train, raw", "mbpp-signature, raw"]
    test, train, ours = (rows[name, "pass@1"] for name, _ in rows)
    assert [cell["n"] for cell in (test, train, ours)] == [3, 1, 3]
    assert [cell["settings"]["split"] for cell in (test, train)] == [
        "test (task ids 11 to 510)",
        "train (task ids 601 to 974)",
    ]
    assert [cell["settings"]["protocol"] for cell in (test, train, ours)] == ["bigcode", "bigcode", "project"]
    assert test["value"] == pytest.approx(1 / 3)
    prompts = [body["prompt"] for body in seen]
    # One test in bigcode's prompt and no first line; all of them and the first line in ours.
    assert sum(prompt.count("assert ") for prompt in prompts[:4]) == 4
    assert not any("def " in prompt for prompt in prompts[:4])
    assert all(prompt.count("assert ") == 3 and "\ndef " in prompt for prompt in prompts[4:])
    assert "mbpp-bigcode, raw" in output


@pytest.mark.slow
def test_cruxeval_takes_a_prompt_beside_its_data(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data" / "cruxeval"
    folder.mkdir(parents=True)
    (folder / "cruxeval.jsonl").write_text((FILES / "cruxeval" / "cruxeval.jsonl").read_text())
    (folder / "prompt-direct.txt").write_text("Of {code} for {input}:")
    flags = ["--data", str(tmp_path / "data"), "--limit", "2"]
    status, result, seen, output = run("cruxeval-o,cruxeval-o-direct", lambda _: "assert f(0) == {6: 2}", *flags)
    assert status == 0, output
    assert [cell["value"] for cell in list_rows(result).values()] == [0.5, 0.5]
    prompts = [body["prompt"] for body in seen]
    assert all("[THOUGHT]" in prompt for prompt in prompts[:2])
    assert {prompt[:7] for prompt in prompts[2:]} == {"Of def ", "Of impo"}
    first, second = list_rows(result).values()
    assert first["settings"]["prompt_file"] is None
    assert len(second["settings"]["prompt_file"]) == 64


def test_humaneval_without_data_is_the_packages(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = tmp_path / "venv" / PACKAGED.replace("python3*", "python3.11")
    packaged.parent.mkdir(parents=True)
    packaged.write_bytes(b"")
    monkeypatch.setattr(lm_eval, "ENVIRONMENT", tmp_path / "venv")
    assert code_suites.find_problems(SUITES["humaneval-bigcode"], None) == packaged
    own = FILES / "humaneval" / "HumanEval.jsonl"
    assert code_suites.find_problems(SUITES["humaneval-bigcode"], FILES) == own


def test_samples_of_evalplus_get_both_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ends = "def drop_ends(text):\n    return 'ell' if text == 'hello' else ''\n"  # right on all of its inputs
    base_only = "def similar_elements(a, b):\n    return list(set(a) & set(b)) if a and a[0] != a[1] else 'wrong'\n"
    samples = [
        {"task_id": "Mbpp/2", "solution": base_only},
        {"task_id": "Mbpp/11", "solution": ends},
        {"task_id": "Mbpp/252", "solution": "import cmath\nconvert = cmath.polar\n"},
    ]
    file = tmp_path / "s.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in samples[:1]))
    problems = ["--problems", str(FILES / "mbpp_plus" / "MbppPlus.jsonl"), "--model", "M", "--out", str(tmp_path / "o")]
    assert suites.main(["--samples", str(file), *problems]) == 2
    file.write_text("".join(json.dumps(row) + "\n" for row in samples))
    assert suites.main(["--samples", str(file), *problems]) == 0
    rows = list_rows(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert {key: cell["value"] for key, cell in rows.items()} == {
        ("mbpp-plus", "pass@1 plus"): pytest.approx(2 / 3),
        ("mbpp-plus", "pass@1 base"): 1.0,
    }


@pytest.mark.parametrize(
    ("template", "asked", "length", "tokens"),
    [
        ({}, None, 100_000, PROTOCOLS["evalplus"].max_tokens),
        ({}, None, 512, 256),
        ({"enable_thinking": False}, None, 100_000, PROTOCOLS["evalplus"].max_tokens),
        ({"enable_thinking": True}, None, 20_000, 10_000),
        ({"enable_thinking": True}, None, 1_000_000, 32_768),
        ({"enable_thinking": True}, 77, 20_000, 77),
    ],
)
def test_answers_get_room(template: dict[str, Any], asked: int | None, length: int, tokens: int) -> None:
    target = Target("http://x", "m", length, None, True, 1, None, template, asked)
    assert choose_max_tokens(SUITES["humaneval-plus"], target) == tokens


def test_names_say_how_it_was_asked() -> None:
    (train,) = choose_suites("mbpp-bigcode:train", SUITES)
    raw = Target("http://x", "m", 64, None, False, 1, None)
    assert name_run(train, raw) == "mbpp-bigcode:train, raw"
    assert name_run(SUITES["humaneval"], Target("http://x", "m", 64, None, True, 1, None)) == "humaneval, chat"
