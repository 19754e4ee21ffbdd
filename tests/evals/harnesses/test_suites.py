"""suites.py: settings, refusals, resume and local data on a stub harness; the table on files of the real harnesses."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mock_engine import MockEngine, Settings
from stub_harness import StubHarness

from laguna_serve.evals import suites
from laguna_serve.evals.harnesses import lm_eval
from laguna_serve.evals.harnesses.lm_eval import AGAIN, CUT, count_cut, run_logged
from laguna_serve.evals.harnesses.settings import SuiteError, load_suites
from laguna_serve.serving.kit.progress import Progress

# Left by lm-eval 0.4.13 and evalplus 0.3.1 against the toy teacher and on made-up samples; without the long fields.
RESULTS = Path(__file__).resolve().parent / "suite_results"
PUBLISHED = Path(__file__).resolve().parents[1] / "published"
ARC = json.loads((RESULTS / "results_arc.json").read_text())
ADD = {
    "task_id": "T/add",
    "prompt": 'def add(a, b):\n    """Add."""\n',
    "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(0, 0) == 0\n",
}


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StubHarness:
    stub = StubHarness(tmp_path / "venv", ARC)
    monkeypatch.setattr(lm_eval, "ENVIRONMENT", stub.folder)
    monkeypatch.setenv("STUB", "ok")
    return stub


@pytest.fixture
def endpoint() -> Iterator[MockEngine]:
    with MockEngine(Settings(counted=False)) as engine:
        yield engine


@pytest.fixture
def run(tmp_path: Path, endpoint: MockEngine, capsys: pytest.CaptureFixture[str]) -> Any:
    def run_suites(*more: str) -> tuple[int, dict[str, Any], str]:
        asked = ["--base-url", endpoint.url + "/v1", "--max-length", "64", "--tokenizer", "T", "--suites"]
        status = suites.main([*asked, *more, "--out", str(tmp_path / "out")])
        captured = capsys.readouterr()
        lines = captured.out.strip().splitlines()
        return status, json.loads(lines[-1]) if lines else {}, captured.out + captured.err

    return run_suites


def write_jsonl(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("name", "task", "shots", "first"),
    [
        ("gsm8k", "gsm8k", 8, "exact_match,strict-match"),
        ("gsm8k-cot", "gsm8k_cot", 8, "exact_match,strict-match"),
        ("mmlu-0", "mmlu", 0, "acc,none"),
        ("mmlu-5", "mmlu", 5, "acc,none"),
        ("mmlu-stem-5", "mmlu_stem", 5, "acc,none"),
        ("mmlu-pro-5", "mmlu_pro", 5, "exact_match,custom-extract"),
        ("humaneval", "project", 0, "pass@1"),
        ("humaneval-bigcode", "bigcode", 0, "pass@1"),
        ("humaneval-plus", "evalplus", 0, "pass@1 plus"),
        ("mbpp-bigcode", "bigcode", 0, "pass@1"),
        ("mbpp-signature", "project", 0, "pass@1"),
        ("mbpp-sanitized", "project", 0, "pass@1"),
        ("mbpp-plus", "evalplus", 0, "pass@1 plus"),
        ("cruxeval-o", "cot", 1, "pass@1"),
        ("cruxeval-o-direct", "direct", 2, "pass@1"),
        ("arc-challenge", "arc_challenge", 25, "acc_norm,none"),
        ("hellaswag", "hellaswag", 10, "acc_norm,none"),
    ],
)
def test_settings_are_those_of_the_pages(name: str, task: str, shots: int, first: str) -> None:
    suite = load_suites()[name]
    assert (suite.task, suite.shots, suite.scores[0]) == (task, shots, first)
    assert suite.source


def test_list_names_every_suite(capsys: pytest.CaptureFixture[str]) -> None:
    assert suites.main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{shown}" for name in load_suites())
    assert "8-shot, strict-match, n 1319" in shown
    for suite in load_suites().values():
        assert suite.rows in shown
        assert suite.dataset in shown
    assert "split test (task ids 11 to 510)" in shown
    assert "DIR/mbpp/mbpp.jsonl or mbpp.jsonl.gz or test.jsonl" in shown
    assert "DIR/mmlu_pro/validation.jsonl or .parquet and DIR/mmlu_pro/test.jsonl or .parquet" in shown


def test_only_the_suite_of_bigcodes_prompt_says_that_it_is_bigcodes() -> None:
    """42.60% of the source document was asked by bigcode-evaluation-harness: which figure compares is said plainly."""
    found = load_suites()
    named = {name for name, suite in found.items() if suite.run == "code" and "bigcode-eval" in suite.title}
    assert named == {name for name, suite in found.items() if suite.task == "bigcode"}
    assert all(name.endswith("-bigcode") for name in named)
    assert "is the one to compare with that" in found["mbpp-bigcode"].source
    assert "do not compare with the 42.60% of DANTE-Mosaic-3.5B's card" in found["mbpp-signature"].source
    # What the source says of n cannot be so.
    assert round(100 * 213 / 500, 2) == 42.60
    assert 42.60 not in {round(100 * passed / 374, 2) for passed in range(375)}
    assert 39.74 in {round(100 * right / 12032, 2) for right in range(12033)}
    assert 39.74 not in {round(100 * right / 4500, 2) for right in range(4501)}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'run = "code"',
            'run = "guess"',
            "[humaneval]: expected the settings of a suite, got some where Invalid enum value 'guess'",
        ),
        ("shots = 25", "shot = 25", "unknown field `shot`"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "suites.toml"
    path.write_text(Path(suites.__file__).with_name("suites.toml").read_text().replace(old, new))
    with pytest.raises(SuiteError) as error:
        load_suites(path)
    assert message in str(error.value)


def test_harness_is_asked_with_the_pinned_settings_once(harness: StubHarness, run: Any, endpoint: MockEngine) -> None:
    status, result, output = run("arc-challenge", "--limit", "6", "--concurrency", "3")
    assert status == 0
    (call,) = harness.calls
    said = dict(zip(call["arguments"], call["arguments"][1:], strict=False))
    assert call["offline"] is None
    assert (said["--model"], said["--tasks"], said["--num_fewshot"]) == ("local-completions", "arc_challenge", "25")
    assert (said["--seed"], said["--limit"]) == ("0,1234,1234,42", "6")
    # Without max_length the harness would cut every prompt to 2048 tokens.
    assert json.loads(said["--model_args"]) == {
        "model": "fake",
        "base_url": f"{endpoint.url}/v1/completions",
        "num_concurrent": 3,
        "max_length": 64,
        "timeout": 3600,
        "tokenizer": "T",
        "tokenizer_backend": "huggingface",
    }
    assert [(row["suite"], row["metric"]) for row in result["rows"]] == [
        ("arc-challenge", "acc_norm"),
        ("arc-challenge", "acc"),
    ]
    assert run("arc-challenge", "--limit", "6")[:2][0] == 0
    assert len(harness.calls) == 1  # the result was there
    status, _, output = run("arc-challenge", "--limit", "7")
    assert status == 2
    assert "expected the parts of this measurement, got another one's" in output


@pytest.mark.parametrize(
    ("more", "model", "extra"),
    [
        ([], "local-completions", ["--gen_kwargs", '{"add_special_tokens": false}']),
        (["--chat"], "local-chat-completions", ["--apply_chat_template"]),
        (
            ["--chat", "--thinking", "off"],
            "local-chat-completions",
            ["--gen_kwargs", '{"chat_template_kwargs": {"enable_thinking": false}}'],
        ),
        (
            ["--chat", "--chat-template-kwargs", '{"effort": 2}', "--thinking", "on", "--max-tokens", "9"],
            "local-chat-completions",
            [
                "--gen_kwargs",
                '{"chat_template_kwargs": {"effort": 2, "enable_thinking": true}, "max_gen_toks": 9}',
            ],
        ),
        (
            ["--chat", "--thinking", "on"],  # half of the context of 64 tokens
            "local-chat-completions",
            ["--gen_kwargs", '{"chat_template_kwargs": {"enable_thinking": true}, "max_gen_toks": 32}'],
        ),
    ],
)
def test_prompts_to_be_answered_are_sent_as_text(
    harness: StubHarness, run: Any, more: list[str], model: str, extra: list[str]
) -> None:
    assert run("gsm8k", *more)[0] == 0
    arguments = harness.calls[0]["arguments"]
    assert arguments[arguments.index("--model") + 1] == model
    told = json.loads(arguments[arguments.index("--model_args") + 1])
    assert told["tokenizer_backend"] is None
    assert told.get("think_end_token") == ("</think>" if "on" in more else None)
    assert arguments[-len(extra) :] == extra


def test_cut_prompts_are_told(harness: StubHarness, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB", "cut")
    assert "cut prompts 1" in run("arc-challenge")[2]
    assert "cut prompts 1" in (tmp_path / "out" / "suites.md").read_text()


@pytest.mark.parametrize(("concurrency", "cut"), [(1, 3), (16, 2)])
def test_prompts_cut_before_an_interruption_count(tmp_path: Path, concurrency: int, cut: int) -> None:
    """Several at once are all looked at before the first is asked, and the second run looks at what was left."""
    log, said = tmp_path / "log", f"Context length (90) … > max_length (64). {CUT}."
    log.write_text(f"{said}\n{said}\nKeyboardInterrupt\n{AGAIN}\n{said}\n")
    assert count_cut(log, concurrency) == cut
    run_logged("a", [sys.executable, "-c", f"print('{said}')"], os.environ, log, Progress())
    assert log.read_text().count(AGAIN) == 2
    assert count_cut(log, concurrency) == max(cut, 2) + (concurrency == 1)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("fail", "arc-challenge: expected it to succeed, got exit status 1: ValueError: out of luck; see "),
        ("unreached", "lm_eval.log; without a network --data DIR has the questions; --list says which files"),
        ("nothing", "arc-challenge: expected lm-eval to leave results, got none; see "),
    ],
)
def test_harness_that_fails_is_told_and_asked_again(
    harness: StubHarness, run: Any, monkeypatch: pytest.MonkeyPatch, how: str, message: str
) -> None:
    monkeypatch.setenv("STUB", how)
    status, _, output = run("arc-challenge")
    assert status == 2
    assert message in output
    monkeypatch.setenv("STUB", "ok")
    assert run("arc-challenge")[0] == 0
    assert len(harness.calls) == 2


def test_local_data_take_the_place_of_the_hubs(harness: StubHarness, run: Any, tmp_path: Path) -> None:
    data = tmp_path / "data"
    files = {split: str(write_jsonl(data / "arc_challenge" / f"{split}.jsonl", {})) for split in ("train", "test")}
    assert run("arc-challenge", "--data", str(data))[0] == 0
    assert harness.calls[0]["offline"] == "1"
    folder = Path(harness.calls[0]["arguments"][-1])
    assert json.loads((folder / "arc_challenge.yaml").read_text()) == {
        "include": str(harness.tasks / "arc" / "arc_challenge.yaml"),
        "task": "arc_challenge",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        "validation_split": None,
    }
    write_jsonl(data / "arc_challenge" / "test.jsonl", {"other": 1})
    assert "got another one's" in run("arc-challenge", "--data", str(data))[2]


def test_local_mmlu_pro_is_one_file_for_all_subjects(harness: StubHarness, run: Any, tmp_path: Path) -> None:
    assert run("mmlu-pro-5", "--data", str(PUBLISHED))[0] == 0
    arguments = harness.calls[0]["arguments"]
    assert arguments[arguments.index("--tasks") + 1] == "mmlu_pro"
    assert arguments[arguments.index("--num_fewshot") + 1] == "5"
    folder = Path(arguments[arguments.index("--include_path") + 1])
    files = {split: str(PUBLISHED / "mmlu_pro" / f"{split}.jsonl") for split in ("validation", "test")}
    assert sorted(path.stem for path in folder.iterdir()) == ["mmlu_pro_biology", "mmlu_pro_law"]
    assert json.loads((folder / "mmlu_pro_law.yaml").read_text()) == {
        "include": str(harness.tasks / "mmlu_pro" / "mmlu_pro_law.yaml"),
        "task": "mmlu_pro_law",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        "validation_split": None,
    }


def test_local_mmlu_wants_every_subject_of_its_part(harness: StubHarness, run: Any, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for split in ("dev", "test"):
        write_jsonl(data / "mmlu" / "anatomy" / f"{split}.jsonl", {})
    assert run("mmlu-stem-5", "--data", str(data))[0] == 0
    status, _, output = run("mmlu-5", "--data", str(data))
    assert status == 2
    assert "mmlu/world_religions/dev.jsonl or .parquet, got neither" in output


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["gsm8k,gsm9k"], "--suites: expected some of gsm8k, gsm8k-cot,"),
        (["gsm8k,mmlu-5", "--chat"], "--chat: expected suites that generate, got mmlu-5"),
        (["gsm8k", "--model", "other"], "--model: expected one of fake, got other"),
        (["gsm8k", "--data", "nowhere"], "expected gsm8k/gsm8k.yaml in "),
        (["arc-challenge", "--data", "nowhere"], "--data: expected nowhere/arc_challenge/train.jsonl or .parquet"),
        (["humaneval"], "humaneval: expected --data with humaneval/HumanEval.jsonl.gz or "),
        (["cruxeval-o"], "or test.jsonl.gz, got none; it is in facebookresearch/cruxeval, data/cruxeval.jsonl, 800"),
        (["mbpp-bigcode", "--data", "nowhere"], "--data: expected nowhere/mbpp/mbpp.jsonl or mbpp.jsonl.gz or test."),
        (["mbpp-bigcode:train", "--data", "nowhere"], "or mbpp.jsonl.gz or train.jsonl or train.jsonl.gz, got none"),
        (["mbpp-bigcode", "--chat"], "mbpp-bigcode: --form: expected completion for the protocol bigcode, got chat"),
        (["mbpp"], "--suites: expected some of gsm8k,"),
        (["mbpp-bigcode:dev"], "mbpp-bigcode: expected one of the splits prompt, test, validation, train, all, got"),
        (["humaneval:test"], "humaneval: expected no split (only MBPP's suites have some), got 'test'"),
        (["gsm8k", "--thinking", "on"], "--thinking: expected --chat with it, got none"),
    ],
)
def test_bad_input_is_refused_before_a_harness_starts(
    harness: StubHarness, run: Any, more: list[str], message: str
) -> None:
    status, _, output = run(*more)
    assert status == 2
    assert message in output
    assert harness.calls == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--suites", "gsm8k", "--out", "o"], "--suites: expected --base-url with it"),
        (["--samples", "f", "--problems", "p", "--out", "o"], "--samples: expected --model with it"),
        (["--merge", "d"], "--merge: expected --out with it"),
        (["--list", "--limit", "0"], "--limit: expected at least 1, got 0"),
    ],
)
def test_half_a_command_is_refused(more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        suites.main(more)
    assert message in capsys.readouterr().err


def test_missing_environment_and_endpoint(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], harness: StubHarness
) -> None:
    (harness.folder / ".stamp").unlink()
    assert "got none; run bash scripts/client_env.sh evals" in run("gsm8k")[2]
    monkeypatch.setattr(lm_eval, "ENVIRONMENT", tmp_path / "none")
    assert "got none; run bash scripts/client_env.sh evals" in run("gsm8k")[2]
    dead = ["--base-url", "http://127.0.0.1:9", "--suites", "humaneval", "--out", str(tmp_path / "o")]
    assert suites.main(dead) == 2
    assert "is the engine up?" in capsys.readouterr().err


def test_evalplus_samples_are_graded_in_the_sandbox(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = ADD | {"task_id": "T/two"}
    problems = write_jsonl(tmp_path / "p.jsonl", ADD, two)
    good, bad = "def add(a, b):\n    return a + b\n", "import sys\n\n\ndef add(a, b):\n    sys.exit(0)\n"
    rows = [("T/add", good), ("T/add", bad), ("T/two", good)]
    samples = write_jsonl(tmp_path / "s.jsonl", *({"task_id": name, "solution": text} for name, text in rows))
    command = ["--samples", str(samples), "--problems", str(problems), "--model", "M", "--out", str(tmp_path / "out")]
    assert suites.main(command) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert (row["suite"], row["cells"]["M"]["value"], row["cells"]["M"]["n"]) == ("humaneval-plus", 0.75, 2)
    assert row["metric"] == "pass@1"
    graded = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [sample["passed"] for sample in graded] == [True, False, True]
    write_jsonl(samples, {"task_id": "T/add", "completion": "    return a + b\n"})
    assert suites.main(command) == 2
    assert "expected a sample of each of the 2 problems, got none of 1, T/two the first" in capsys.readouterr().err
    write_jsonl(samples, {"task_id": "T/add", "solution": None})
    assert suites.main(command) == 2
    assert "got TypeError: a solution that is NoneType" in capsys.readouterr().err
    write_jsonl(samples, {"task_id": "T/other", "solution": good})
    assert suites.main(command) == 2
    assert 's.jsonl:1: expected {"task_id": of the problems' in capsys.readouterr().err


@pytest.fixture
def two_runs(tmp_path: Path) -> list[str]:
    """The toy's results, and the same with one other, newer number by another release."""
    for name in ("a", "b"):
        shutil.copytree(RESULTS, tmp_path / name)
    newer = json.loads(json.dumps(ARC))
    newer |= {"date": ARC["date"] + 1, "lm_eval_version": "0.4.5"}
    newer["results"]["arc_challenge"]["acc,none"] = 0.75
    (tmp_path / "b" / "results_again.json").write_text(json.dumps(newer))
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_merge_makes_a_column_per_model_and_tells_what_differs(
    two_runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert suites.main(["--merge", *two_runs, "--out", str(tmp_path / "m")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {(row["suite"], row["metric"]): row for row in result["rows"]}
    toy = [f"teacher ({folder})" for folder in two_runs]
    arc = rows["arc-challenge", "acc"]
    assert [arc["cells"][column]["value"] for column in toy] == [ARC["results"]["arc_challenge"]["acc,none"], 0.75]
    assert arc["differ"] == ["harness"]
    # The group's questions are those of its tasks, and its tasks have no rows of their own.
    mmlu = rows["mmlu-5", "acc"]["cells"][toy[0]]
    assert (mmlu["n"], round(58 * mmlu["value"], 9)) == (58, 6)
    # The version of the group and those of its tasks, also where they differ.
    body = json.loads((RESULTS / "results_mmlu.json").read_text())
    assert mmlu["task_versions"] == body["versions"]
    assert mmlu["settings"]["task_version"].endswith("tasks 1.0")
    # Wilson's bounds are the shares that lie 1.96 of their own standard errors from what was seen.
    for bound in mmlu["ci95"]:
        assert abs(bound - 6 / 58) == pytest.approx(1.959964 * (bound * (1 - bound) / 58) ** 0.5, abs=1e-6)
    # Of 0 of 4, where the harness's own error is 0.
    assert rows["gsm8k", "exact_match,strict-match"]["cells"][toy[0]]["ci95"] == pytest.approx([0, 0.489891], abs=1e-6)
    assert rows["mmlu-5", "acc"]["differ"] == []
    assert {"gsm8k", "mmlu-5", "arc-challenge"} <= {suite for suite, _ in rows}
    plus = rows["HumanEval+ (evalplus)", "pass@1"]["cells"][f"good ({two_runs[0]})"]
    assert (plus["value"], plus["n"]) == (0.75, 4)
    page = (tmp_path / "m" / "suites.md").read_text()
    assert "| arc-challenge | acc † |" in page
    assert "† harness differs" in page
    assert result["rows"][0]["suite"] == "gsm8k"  # in the order of the settings


def test_merge_of_one_folder_needs_no_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert suites.main(["--merge", str(RESULTS), "--out", str(tmp_path / "m")]) == 0
    assert sorted(json.loads(capsys.readouterr().out.splitlines()[-1])["columns"]) == ["good", "teacher"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("results_1.json", "{", "results_1.json: expected results as results_*.json holds them, got DecodeError"),
        ("results_1.json", "{}", "missing required field `config`; remove the file or run its suite again"),
        ("samples.json", '{"schema": "other"}', "got ValidationError: Invalid value 'other' - at `$.schema`"),
        ("x_eval_results.json", '{"hash": "", "eval": {}}', "got ValueError: no task in it"),
        ("notes.txt", "", "expected result files (results_*.json, *_eval_results.json"),
    ],
)
def test_unreadable_results_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, message: str
) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / name).write_text(text)
    assert suites.main(["--merge", str(tmp_path / "r"), "--out", str(tmp_path / "m")]) == 2
    assert message in capsys.readouterr().err
