"""CRUXEval-O: prompts, values out of answers, and the assertion that is run in the jail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mock_engine import answering
from walls_here import make_limits, needs_walls

from laguna_serve.evals import code_tasks
from laguna_serve.evals.codegen.grading import grade_answer
from laguna_serve.evals.extraction.extract import ExtractionError, read_program
from laguna_serve.evals.problems import load_problems
from laguna_serve.evals.problems.cruxeval_rows import find_value, is_literal
from laguna_serve.evals.problems.protocols import make_prompt

FILE = Path(__file__).resolve().parents[1] / "published" / "cruxeval" / "cruxeval.jsonl"
COUNTS, GCD, TEXT = load_problems(FILE)
LIMITS = make_limits(cpu_s=5, wall_s=30)


@pytest.mark.parametrize(("protocol", "examples"), [("cot", 1), ("direct", 2)])
def test_prompt_has_the_code_the_call_and_worked_examples(protocol: str, examples: int) -> None:
    problem = load_problems(FILE, protocol)[1]
    for form in ("chat", "completion"):
        prompt = make_prompt(problem, form)  # type: ignore[arg-type]
        assert "import math\n\n\ndef f(a, b=2):\n    return {a: math.gcd(a, b)}\nassert f(6, b=4) == ??\n" in prompt
        assert prompt.count("== ??") == examples + 1
        assert prompt.endswith("[THOUGHT]\n" if protocol == "cot" else "[ANSWER]\n")
        assert "{6: 2}" not in prompt
    assert problem.stops == ("[/ANSWER]",)


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("[ANSWER]\nassert f(6, b=4) == {6: 2}\n[/ANSWER]", "{6: 2}"),
        ("steps == here\n[/THOUGHT]\n[ANSWER]\nassert f(6, b=4) == {6: 2}\n[/ANSWER]\n[PYTHON]\nmore", "{6: 2}"),
        ("assert f(6, b=4) == {6: 2}\n", "{6: 2}"),  # a completion of the direct prompt, up to its stop
        ("== {6: 2}", "{6: 2}"),
        ("{6: 2}", "{6: 2}"),
        ("[ANSWER]{6: 2}[/ANSWER]", "{6: 2}"),
        ("f(6, b=4) == {6: 2}", "{6: 2}"),
        ("[ANSWER]\n```python\nassert f(6, b=4) == {6: 2}\n```\n[/ANSWER]", "{6: 2}"),
        ("[ANSWER]\nassert f('banana') == 'b==n==n=='\n[/ANSWER]", "'b==n==n=='"),
        ("[ANSWER] assert f(1) == 1 [/ANSWER] No: [ANSWER] assert f(1) == 2 [/ANSWER]", "2"),
        ("assert f(1) == 2\nSo it is 2.", "2"),
        ("assert f(1) == [\n  1,\n  2,\n]", "[1, 2]"),
        ("It is hard to say.", None),
        ("[ANSWER]\nassert f(1) ==\n[/ANSWER]", None),
        ("[ANSWER]\nassert f(1) == 1; import os\n[/ANSWER]", None),
        ("[ANSWER]\nassert f(1) == (1\n[/ANSWER]", None),
        ("", None),
    ],
)
def test_value_is_what_the_last_assertion_says(answer: str, value: str | None) -> None:
    assert find_value(answer) == value


@pytest.mark.parametrize(
    ("value", "literal"),
    [
        ("[(1, -2.5), {'a': None}]", True),
        ("set()", True),
        ("1 + 1", False),
        ("f(1)", False),
        ("[x for x in 'a']", False),
    ],
)
def test_literals_are_told(value: str, literal: bool) -> None:
    assert is_literal(value) is literal


@needs_walls
@pytest.mark.parametrize(
    ("answer", "published", "strict"),
    [
        ("[ANSWER]\nassert f([1, 3, 1]) == [(1, 3), (2, 1), (2, 1)]\n[/ANSWER]", True, True),
        ("[ANSWER]\nassert f([1, 3, 1]) == [(1, 3), (2, 1)]\n[/ANSWER]", False, False),
        ("[(1, 3)] + [(2, 1)] * 2", True, False),  # right, but not a value that is written out
        ("sorted(((1, 3), (2, 1), (2, 1)))", True, False),
        ("f([1, 3, 1])", False, False),  # f is not at hand where answers are evaluated
        ("assert f([1, 3, 1]) == f( [1, 3, 1] )", False, False),
        ("type('A', (), {'__eq__': lambda *_: True})()", False, False),
        ("float('nan')", False, False),
        ("__import__('os')._exit(0)", False, False),
        ("no idea", False, False),
    ],
)
def test_answers_are_executed_in_the_jail(answer: str, published: bool, strict: bool) -> None:
    verdict = grade_answer(COUNTS, answer, "chat", LIMITS)
    assert (verdict.grade.published, verdict.grade.passed) == (published, strict)
    assert verdict.grade.reward == (1.0 if strict else 0.0)


@needs_walls
@pytest.mark.parametrize(("problem", "value"), [(GCD, "{6: 2}"), (TEXT, "'b==n==n=='")])
def test_helpers_and_keywords_of_the_call_are_the_rows_own(problem: Any, value: str) -> None:
    assert grade_answer(problem, f"[ANSWER]\nassert f(?) == 1\n[/ANSWER] [ANSWER]{value}", "chat", LIMITS).grade.passed


def test_answer_without_a_value_is_refused() -> None:
    with pytest.raises(ExtractionError, match="expected an assertion or a value, got neither"):
        read_program("no idea at all", COUNTS, "chat")


@needs_walls
@pytest.mark.parametrize("form", ["chat", "completion"])
def test_whole_run(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = tmp_path / "prompt.txt"
    template.write_text("What does this give?\n{code}\nf({input})\n")
    with answering(lambda body: "[ANSWER] {6: 2} [/ANSWER]") as server:
        flags = ["--base-url", server.url, "--problems", str(FILE), "--form", form, "--out", str(tmp_path / "out")]
        assert code_tasks.main([*flags, "--prompt-file", str(template)]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        template.write_text("What is this?\n{code}\nf({input})\n")
        assert code_tasks.main([*flags, "--prompt-file", str(template)]) == 2  # what is there answers another prompt
    assert "got another one's; choose another --out" in capsys.readouterr().err
    assert result["pass_at_k"]["1"]["point"] == pytest.approx(1 / 3)
    assert result["weak_problems"] is None  # a constant may be the right value: no universal wrong answers
    assert result["prompt_file"]["name"] == "prompt.txt"
    body = next(body for body in server.bodies if "gcd" in json.dumps(body))
    asked = body["messages"][0]["content"] if form == "chat" else body["prompt"]
    wanted = "What does this give?\nimport math\n\n\ndef f(a, b=2):\n    return {a: math.gcd(a, b)}\nf(6, b=4)\n"
    assert asked == wanted
    assert body.get("stop") == (["[/ANSWER]"] if form == "completion" else None)


def test_prompt_file_must_have_both_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = tmp_path / "prompt.txt"
    template.write_text("{code}")
    flags = ["--check-canonical", "--problems", str(FILE), "--prompt-file", str(template)]
    assert code_tasks.main(flags) == 2
    assert "expected a prompt with {code} and {input} in it, got one without" in capsys.readouterr().err
    template.write_text("{code}{input}")
    assert code_tasks.main(["--check-canonical", "--limit", "1", "--prompt-file", str(template)]) == 2
    assert "--prompt-file: expected CRUXEval's problems with it, got others" in capsys.readouterr().err
