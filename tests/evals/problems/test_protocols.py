"""What is sent and where answers are cut, by each protocol; and whole runs of code_tasks.py on a fake endpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from mock_engine import answering
from walls_here import needs_walls

from laguna_serve.evals import code_tasks
from laguna_serve.evals.codegen.runner import Workload
from laguna_serve.evals.extraction.extract import cut_at_stops, read_program
from laguna_serve.evals.problems import find_form, load_problems, read_rows
from laguna_serve.evals.problems.problem import Problem
from laguna_serve.evals.problems.protocols import ALLOWED, PROTOCOLS, make_prompt

FILES = Path(__file__).resolve().parents[1] / "published"
MBPP, GAP_PROMPT = FILES / "mbpp" / "mbpp.jsonl", load_problems(FILES / "humaneval" / "HumanEval.jsonl")[0].prompt


def load(name: str, protocol: str, at: int = 0) -> Problem:
    return load_problems(FILES / name, protocol)[at]


def test_every_form_has_its_protocols() -> None:
    assert {name for allowed in ALLOWED.values() for name in allowed} == set(PROTOCOLS)


def test_bigcode_asks_mbpp_by_the_first_test_alone() -> None:
    problem = load("mbpp/mbpp.jsonl", "bigcode", 1)
    text = (
        'Write a python function to drop the first and the last letter of a string.\nassert drop_ends("hello") == "ell"'
    )
    assert make_prompt(problem, "completion") == f'"""\n{text}\n"""\n'
    assert set(problem.stops) == {"\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```"}


def test_bigcode_strips_humanevals_prompt() -> None:
    problem = load("humaneval/HumanEval.jsonl", "bigcode")
    assert make_prompt(problem, "completion") == GAP_PROMPT.strip()
    assert set(problem.stops) == {
        *("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```", "<file_sep>"),
    }
    # What the prompt lost comes with the answer, so the canonical solution is whole again.
    program = read_program("\n" + str(problem.canonical_solution), problem, "completion")[0]
    assert program == GAP_PROMPT.strip() + "\n" + str(problem.canonical_solution)


@pytest.mark.parametrize("protocol", ["project", "evalplus"])
@pytest.mark.parametrize("name", ["humaneval/HumanEval.jsonl", "humaneval_plus/HumanEvalPlus.jsonl"])
def test_raw_humaneval_is_its_prompt(protocol: str, name: str) -> None:
    assert make_prompt(load(name, protocol), "completion") == GAP_PROMPT


def test_evalplus_asks_a_chat_by_its_own_sentence() -> None:
    message = make_prompt(load("humaneval_plus/HumanEvalPlus.jsonl", ""), "chat")
    sentence = (
        "Please provide a self-contained Python script that solves the following problem in a markdown code block:"
    )
    assert message == f"{sentence}\n```python\n{GAP_PROMPT.strip()}\n```"


def test_mbpp_plus_of_the_hub_is_asked_as_of_evalplus_file() -> None:
    hub, file = load("mbpp_plus/hub.jsonl", "evalplus"), load("mbpp_plus/MbppPlus.jsonl", "evalplus", 1)
    for form in ("chat", "completion"):
        assert make_prompt(hub, form) == make_prompt(file, form)  # type: ignore[arg-type]
    assert hub.stops == file.stops
    assert {'\n"""', "\nassert", "\nprint("} <= set(file.stops)


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("def f():\n    return 1\n\nprint(f())\nassert f()", "def f():\n    return 1\n"),
        ("def f():\n    return 1\n```\nassert f()", "def f():\n    return 1"),
        (
            "def f():\n    return 1\n\n\ndef g():\n    return 2\n",
            "def f():\n    return 1\n\n\ndef g():\n    return 2\n",
        ),
        ('def f():\n    """Doc.\n"""\n    return 1\n', 'def f():\n    """Doc.'),  # also where that is a pity
        ("class A:\n    pass", "class A:\n    pass"),  # no new line before it
        ("x\nclassic = 1", "x"),
        ("x\n    if y:\n        pass\nif z", "x\n    if y:\n        pass"),
        ("", ""),
    ],
)
def test_completions_are_cut_at_the_first_stop_word(answer: str, kept: str) -> None:
    problem = load("mbpp/mbpp.jsonl", "bigcode")
    assert cut_at_stops(answer, problem.stops) == kept
    assert read_program(answer, problem, "completion")[0] == problem.asked + kept


def test_endpoint_is_told_four_stops_of_the_protocol_and_the_template() -> None:
    problem = load("mbpp/mbpp.jsonl", "bigcode")
    raw = Workload("completion", protocol="bigcode").make_sampling(problem, 0)
    assert raw["stop"] == list(problem.stops[:4])
    chat = Workload("chat", template={"enable_thinking": False}).make_sampling(problem, 0)
    assert (chat["chat_template_kwargs"], "stop" in chat) == ({"enable_thinking": False}, False)


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run_code_tasks(name: str, reply: Any, *more: str) -> tuple[int, dict[str, Any], list[dict[str, Any]], str]:
        with answering(reply) as server:
            flags = ["--base-url", server.url, "--problems", str(FILES / name), "--out", str(tmp_path / "out")]
            status = code_tasks.main([*flags, *more])
        captured = capsys.readouterr()
        lines = captured.out.strip().splitlines()
        return status, json.loads(lines[-1]) if lines else {}, server.bodies, captured.out + captured.err

    return run_code_tasks


def find_asked(body: Mapping[str, Any]) -> str:
    return str(body["messages"][0]["content"] if "messages" in body else body["prompt"])


CANONICAL = {
    (name, protocol): load_problems(FILES / name, protocol)
    for name in ("mbpp/mbpp.jsonl", "mbpp_plus/MbppPlus.jsonl", "humaneval_plus/HumanEvalPlus.jsonl")
    for protocol in ALLOWED[find_form(next(read_rows(FILES / name))[1])]
}


@needs_walls
@pytest.mark.parametrize("form", ["chat", "completion"])
@pytest.mark.parametrize(("name", "protocol"), CANONICAL)
def test_whole_runs_pass_with_canonical_answers(run: Any, name: str, protocol: str, form: str) -> None:
    problems = CANONICAL[name, protocol]

    def reply(body: Mapping[str, Any]) -> str:
        problem = next(each for each in problems if make_prompt(each, form) == find_asked(body))  # type: ignore[arg-type]
        solution = str(problem.canonical_solution)
        if form == "chat":
            return f"So:\n```python\n{problem.prompt}{solution}```\n"
        return ("\n" if protocol == "bigcode" and "HumanEval" in problem.task_id else "") + solution + "\nprint(1)"

    flags = ["--protocol", protocol, "--form", form, "--skip-probes"]
    if form not in PROTOCOLS[protocol].forms:
        status, _, seen, output = run(name, reply, *flags)
        assert (status, seen) == (2, [])
        assert "--form: expected completion for the protocol bigcode, got chat" in output
        return
    if (protocol, form) == ("project", "completion") and "mbpp" in name:
        return  # the first line is in the prompt: a whole program is no answer to it
    status, result, seen, _ = run(name, reply, *flags)
    assert (status, result["statuses"]) == (0, {"passed": len(problems)})
    assert ("base_pass_at_k" in result) == ("plus" in name)
    assert all(body["max_tokens"] == PROTOCOLS[protocol].max_tokens for body in seen)
    assert (result["workload"]["protocol"], result["file"]["name"]) == (protocol, Path(name).name)


@needs_walls
def test_base_and_plus_are_counted_apart(run: Any) -> None:
    half = 'def count_vowels(text):\n    return {"Audio": 4, "AEIOU": 5}.get(text, 0)\n'
    status, result, _, output = run(
        "humaneval_plus/HumanEvalPlus.jsonl", lambda _: f"```\n{half}```", "--skip-probes", "--thinking", "on"
    )
    assert status == 0
    assert result["base_pass_at_k"]["1"]["point"] == pytest.approx(1 / 3)
    assert result["published_pass_at_k"]["1"]["point"] == 0
    assert "pass@1 of the base tests 0.333" in output


@needs_walls
def test_thinking_reaches_the_template_and_another_folder_is_wanted(run: Any) -> None:
    def reply(body: Mapping[str, Any]) -> str:
        return "<think>```python\nreturn 1\n```</think>```python\ndef is_odd(n):\n    return n % 2 == 1\n```"

    flags = ["--skip-probes", "--split", "prompt", "--limit", "1"]
    status, result, seen, _ = run("mbpp/mbpp.jsonl", reply, *flags, "--thinking", "on", "--max-tokens", "77")
    assert (status, result["statuses"]) == (0, {"passed": 1})
    assert (seen[0]["chat_template_kwargs"], seen[0]["max_tokens"]) == ({"enable_thinking": True}, 77)
    assert result["workload"]["template"] == {"enable_thinking": True}
    assert "got another one's" in run("mbpp/mbpp.jsonl", reply, *flags, "--thinking", "off", "--max-tokens", "77")[3]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--thinking", "on", "--form", "completion"], "--thinking: expected --form chat with it, got completion"),
        (["--chat-template-kwargs", "[1]"], "--chat-template-kwargs: expected a JSON object, got list"),
        (["--chat-template-kwargs", '{"a": NaN}'], "--chat-template-kwargs: expected a JSON object, got NaN"),
        (["--chat-template-kwargs", "{"], "--chat-template-kwargs: expected a JSON object, got Expecting"),
        (["--limit", "0"], "--limit: expected at least 1, got 0"),
        (["--split", "test"], "--split: expected a file of MBPP with it"),
        (
            ["--only", "HumanEval/9"],
            "--only: expected task ids of HumanEval.jsonl, such as HumanEval/0, got HumanEval/9",
        ),
        (["--prompt-file", "/no/file"], "/no/file: expected a prompt, got"),
    ],
)
def test_bad_flags_are_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--base-url", "http://127.0.0.1:9", "--out", "o", "--problems", str(FILES / "humaneval/HumanEval.jsonl")]
    try:
        status = code_tasks.main([*asked, *flags])
    except SystemExit as error:
        status = int(str(error.code))
    assert status == 2
    assert message in capsys.readouterr().err


@needs_walls
def test_canonical_run_is_kept_and_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["--check-canonical", "--skip-probes", "--problems", str(MBPP), "--split", "test", "--out", str(out)]
    assert code_tasks.main(command) == 0
    result = json.loads((out / "canonical.json").read_text())
    assert (result["problems"], result["passing"], result["tests"]) == (3, 3, 9)
    assert result["tests_of"] == {"Mbpp/11": 3, "Mbpp/12": 3, "Mbpp/510": 3}
    assert (result["file"]["split"], len(result["file"]["sha256"])) == ("test", 64)
    log = out / "solutions.jsonl"
    kept = [json.loads(line) for line in log.read_text().splitlines()]
    kept[0] |= {"tests_total": 7}  # what is there is not graded again
    log.write_text("".join(json.dumps(entry) + "\n" for entry in kept[:2]))
    assert code_tasks.main(command) == 0
    assert json.loads((out / "canonical.json").read_text())["tests"] == 13
    assert code_tasks.main([*command[:-2], "--only", "Mbpp/12", "--out", str(tmp_path / "one")]) == 0
    assert json.loads((tmp_path / "one" / "canonical.json").read_text())["tests_of"] == {"Mbpp/12": 3}
    assert code_tasks.main([*command[:-4], "--split", "train", "--out", str(out)]) == 2
    assert "got another one's" in capsys.readouterr().err
