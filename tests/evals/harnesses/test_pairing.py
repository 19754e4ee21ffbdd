"""Two models on the same questions: McNemar's exact test, on the harnesses' files and on numbers done by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from laguna_serve.evals import suites
from laguna_serve.evals.harnesses.pairing import Pair, find_p, pair
from laguna_serve.evals.harnesses.results import Cell, Score

RESULTS = Path(__file__).resolve().parent / "suite_results"
KEY = ("humaneval", "pass@1")


def score(outcomes: dict[str, float]) -> Score:
    cell = Cell(value=0.5, ci95=None, n=len(outcomes), settings={}, file="f")
    return Score("m", *KEY, cell, 0.0, lambda: outcomes)


def pair_two(baseline: dict[str, float], candidate: dict[str, float]) -> list[Pair]:
    return pair({KEY: {"one": score(baseline), "two": score(candidate)}})


@pytest.mark.parametrize(
    ("better", "worse", "p"), [(0, 0, 1.0), (0, 1, 1.0), (0, 5, 0.0625), (6, 0, 0.03125), (1, 7, 18 / 256)]
)
def test_p_is_that_of_fair_coins(better: int, worse: int, p: float) -> None:
    """Twice the tail: 1 of 8 or fewer, 9 of 256, doubled."""
    assert find_p(better, worse) == pytest.approx(p)


def test_only_shared_questions_that_differ_count() -> None:
    baseline = {"a": 1.0, "b": 1.0, "c": 0.0, "d": 1.0, "lone": 1.0}
    candidate = {"a": 1.0, "b": 0.0, "c": 1.0, "d": 0.5, "other": 0.0}
    (found,) = pair_two(baseline, candidate)
    assert (found.questions, found.better, found.worse) == (4, 1, 2)
    assert (found.baseline, found.candidate, found.p) == ("one", "two", 1.0)


@pytest.mark.parametrize("candidate", [{}, {"b": 1.0}])
def test_nothing_shared_is_no_pair(candidate: dict[str, float]) -> None:
    assert pair_two({"a": 1.0}, candidate) == []


def test_every_other_column_is_held_against_the_first_and_p_is_adjusted() -> None:
    questions = [f"q{number}" for number in range(12)]
    first = score(dict.fromkeys(questions, 1.0))
    worse = {question: float(place >= 8) for place, question in enumerate(questions)}
    row = {"one": first, "two": score(worse), "three": first}
    two, three = pair({KEY: row})
    assert two.worse == 8
    assert (two.p, two.p_holm) == pytest.approx((2 / 256, 4 / 256))
    assert (three.candidate, three.p, three.p_holm) == ("three", 1.0, 1.0)


def log(folder: Path, right: str, *, name: str = "none", extra: str = "") -> Path:
    """A run of ARC-Challenge with its samples: a digit for each question, whether it is right."""
    folder.mkdir()
    shutil.copy(RESULTS / "results_arc.json", folder / "results_2026.json")
    lines = [
        {"doc_id": place, "doc": {}, "doc_hash": f"h{place}", "filter": name, "metrics": ["acc", "acc_norm"]}
        | {"acc": float(digit), "acc_norm": 1.0}
        for place, digit in enumerate(right)
    ]
    (folder / "samples_arc_challenge_2026.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + extra)
    return folder


def merge(tmp_path: Path, *folders: Path) -> tuple[int, dict[str, Any], str]:
    status = suites.main(["--merge", *map(str, folders), "--out", str(tmp_path / "m"), "--json"])
    page = tmp_path / "m" / "suites.md"
    result = json.loads((tmp_path / "m" / "suites.json").read_text()) if status == 0 else {}
    return status, result, page.read_text() if status == 0 else ""


def test_logged_samples_of_the_harness_are_paired(tmp_path: Path) -> None:
    one, two = log(tmp_path / "a", "11111110"), log(tmp_path / "b", "10000001")
    _, result, page = merge(tmp_path, one, two)
    assert "† against" not in page
    found = {(each["suite"], each["metric"]): each for each in result["pairs"]}
    acc = found["arc-challenge", "acc"]
    assert (acc["questions"], acc["better"], acc["worse"], acc["p"]) == (8, 1, 6, pytest.approx(16 / 128))
    assert (found["arc-challenge", "acc_norm"]["p"], acc["p_holm"]) == (1.0, pytest.approx(32 / 128))
    assert f"teacher ({two}) against teacher ({one}), 8 questions of both: 1 better, 6 worse, p 0.12 (0.25 with" in page


def test_separators_of_lines_may_stand_in_a_question(tmp_path: Path) -> None:
    """The harness writes texts as they are: not only a line break ends a line of Unicode."""
    folders = log(tmp_path / "a", "1011"), log(tmp_path / "b", "0101")
    path = folders[1] / "samples_arc_challenge_2026.jsonl"
    path.write_text(path.read_text().replace('"doc": {}', '"doc": {"question": "a\u2028b\x85c"}'), encoding="utf-8")
    status, result, _ = merge(tmp_path, *folders)
    assert (status, len(result["pairs"])) == (0, 2)


def test_samples_of_another_filter_are_not_the_metrics(tmp_path: Path) -> None:
    folders = log(tmp_path / "a", "10", name="strict"), log(tmp_path / "b", "01", name="strict")
    status, result, page = merge(tmp_path, *folders)
    assert (status, result["pairs"]) == (0, [])
    assert "McNemar" not in page


@pytest.mark.parametrize(("value", "pairs"), [("NaN", 1), ("null", 1), ("true", 2)])
def test_question_without_a_number_takes_the_metric_out(tmp_path: Path, value: str, pairs: int) -> None:
    folders = log(tmp_path / "a", "1011"), log(tmp_path / "b", "0101")
    path = folders[1] / "samples_arc_challenge_2026.jsonl"
    path.write_text(path.read_text().replace('"acc": 1.0', f'"acc": {value}'))
    status, result, _ = merge(tmp_path, *folders)
    assert (status, len(result["pairs"])) == (0, pairs)


def test_less_may_be_better(tmp_path: Path) -> None:
    folders = log(tmp_path / "a", "1111"), log(tmp_path / "b", "0001")
    for folder in folders:
        body = json.loads((folder / "results_2026.json").read_text())
        body["higher_is_better"] = {"arc_challenge": {"acc": False, "acc_norm": None}}
        (folder / "results_2026.json").write_text(json.dumps(body))
    (acc,) = merge(tmp_path, *folders)[1]["pairs"]
    assert (acc["metric"], acc["better"], acc["worse"]) == ("acc", 3, 0)


def test_rows_measured_otherwise_are_marked(tmp_path: Path) -> None:
    folders = log(tmp_path / "a", "10"), log(tmp_path / "b", "01")
    body = json.loads((folders[1] / "results_2026.json").read_text())
    body["config"]["limit"] = 2
    (folders[1] / "results_2026.json").write_text(json.dumps(body))
    assert "- arc-challenge, acc †: teacher" in merge(tmp_path, *folders)[2]


def test_first_column_without_samples_is_nobodys_baseline(tmp_path: Path) -> None:
    folders = [log(tmp_path / name, "10") for name in "abc"]
    (folders[0] / "samples_arc_challenge_2026.jsonl").unlink()
    found = merge(tmp_path, *folders)[1]["pairs"]
    assert {(each["baseline"], each["candidate"]) for each in found} == {
        (f"teacher ({folders[1]})", f"teacher ({folders[2]})")
    }


def test_samples_cut_off_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = log(tmp_path / "a", "10"), log(tmp_path / "b", "01", extra='{"doc_id": 2, "do')
    assert merge(tmp_path, *folders)[0] == 2
    assert "samples_arc_challenge_2026.jsonl: expected a sample a line, got JSONDecodeError" in capsys.readouterr().err


def test_questions_of_code_are_known_by_their_task(tmp_path: Path) -> None:
    """evalplus's files name them; ours do, too (code_tasks.json)."""
    for folder, spoilt in (("a", 0), ("b", 3)):
        (tmp_path / folder).mkdir()
        body = json.loads((RESULTS / "good_openai_temp_0.0_eval_results.json").read_text())
        for samples in list(body["eval"].values())[:spoilt]:
            samples[0]["base_status"] = "fail"
        (tmp_path / folder / "good_openai_temp_0.0_eval_results.json").write_text(json.dumps(body))
    _, result, _ = merge(tmp_path, tmp_path / "a", tmp_path / "b")
    found = {each["suite"]: (each["questions"], each["better"], each["worse"]) for each in result["pairs"]}
    assert found["HumanEval (evalplus)"][0] == 4
    assert found["HumanEval (evalplus)"][1] == 0
    assert found["HumanEval (evalplus)"][2] >= 2
