"""Problems in the forms in which their authors publish them: read, split, graded; refused with the line."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from walls_here import make_limits, needs_walls

from laguna_serve.evals.codegen import weak_tests
from laguna_serve.evals.codegen.grading import find_baseline, grade, grade_answer
from laguna_serve.evals.codegen.weak_tests import find_weakness
from laguna_serve.evals.problems import ProblemsError, find_form, load_problems, read_rows
from laguna_serve.evals.problems.evalplus_rows import SHAPES, read_evalplus
from laguna_serve.evals.problems.mbpp_splits import SPLITS
from laguna_serve.evals.sandbox import run_trial

FILES = Path(__file__).resolve().parents[1] / "published"
FORMS = {
    "humaneval/HumanEval.jsonl": ("humaneval", 2),
    "humaneval_plus/HumanEvalPlus.jsonl": ("evalplus", 3),
    "humaneval_plus/hub.jsonl": ("humaneval", 1),
    "mbpp/mbpp.jsonl": ("mbpp", 6),
    "mbpp/sanitized-mbpp.json": ("mbpp", 3),
    "mbpp_plus/MbppPlus.jsonl": ("evalplus", 3),
    "mbpp_plus/hub.jsonl": ("mbpp-plus", 1),
    "cruxeval/cruxeval.jsonl": ("cruxeval", 3),
}
LIMITS = make_limits(cpu_s=20, wall_s=60)


@pytest.mark.parametrize("name", FORMS)
def test_form_is_read_from_the_fields(name: str) -> None:
    form, count = FORMS[name]
    assert {find_form(row) for _, row in read_rows(FILES / name)} == {form}
    assert len(load_problems(FILES / name)) == count


@needs_walls
@pytest.mark.parametrize("name", FORMS)
def test_canonical_solutions_pass(name: str) -> None:
    for problem in load_problems(FILES / name):
        graded = grade(problem, problem.prompt + str(problem.canonical_solution), LIMITS)
        assert (graded.passed, graded.detail) == (True, ""), problem.task_id


def test_every_file_may_be_gzipped(tmp_path: Path) -> None:
    for name in FORMS:
        path = tmp_path / f"{Path(name).name}.gz"
        path.write_bytes(gzip.compress((FILES / name).read_bytes()))
        assert load_problems(path) == load_problems(FILES / name)


@pytest.mark.parametrize(
    ("split", "numbers"),
    [
        ("test", [11, 12, 510]),
        ("prompt", [3]),
        ("validation", [511]),
        ("train", [601]),
        ("all", [3, 11, 12, 510, 511, 601]),
        ("", [3, 11, 12, 510, 511, 601]),
    ],
)
def test_splits_of_mbpp_are_ranges_of_task_ids(split: str, numbers: list[int]) -> None:
    found = load_problems(FILES / "mbpp" / "mbpp.jsonl", split=split)
    assert [problem.task_id for problem in found] == [f"Mbpp/{number}" for number in numbers]


def test_splits_have_the_published_sizes_and_do_not_overlap() -> None:
    sizes = {name: last - first + 1 for name, (first, last) in SPLITS.items()}
    assert sizes == {"prompt": 10, "test": 500, "validation": 90, "train": 374, "all": 974}
    parts = [set(range(first, last + 1)) for name, (first, last) in SPLITS.items() if name != "all"]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 974


def test_sanitized_rows_bring_their_imports() -> None:
    found = load_problems(FILES / "mbpp" / "sanitized-mbpp.json", split="test")
    assert [problem.task_id for problem in found] == ["Mbpp/11", "Mbpp/510"]
    assert found[1].test.startswith("import math\n")


def read_mbpp_row(protocol: str, number: int = 11) -> Any:
    found = load_problems(FILES / "mbpp" / "mbpp.jsonl", protocol)
    return next(problem for problem in found if problem.task_id == f"Mbpp/{number}")


def test_mbpp_of_the_project_shows_all_tests_and_the_first_line() -> None:
    assert read_mbpp_row("project").prompt == (
        '"""\nWrite a python function to drop the first and the last letter of a string.\n'
        'assert drop_ends("hello") == "ell"\nassert drop_ends("ab") == "" \nassert drop_ends("") == ""\n'
        '"""\ndef drop_ends(text):\n'
    )


@needs_walls
def test_names_of_the_solution_are_there_for_the_tests() -> None:
    problem = read_mbpp_row("bigcode", 12)  # the tests make objects of the program's own class
    graded = grade(problem, f"{problem.prompt}{problem.canonical_solution}", LIMITS)
    assert (graded.passed, graded.tests_passed) == (True, 3)
    wrong = problem.canonical_solution.replace("pair.a + pair.b", "pair.a - pair.b")
    assert not grade(problem, problem.prompt + wrong, LIMITS).published


PLUS = FILES / "humaneval_plus" / "HumanEvalPlus.jsonl"
GAP, VOWELS, ZERO = load_problems(PLUS)
SHARED, ENDS, COMPLEX = load_problems(FILES / "mbpp_plus" / "MbppPlus.jsonl")


@needs_walls
def test_base_and_plus_verdicts_are_two() -> None:
    # Right on the base inputs, wrong on a plus input ("queue": each vowel once).
    program = 'def count_vowels(text):\n    return {"Audio": 4}.get(text, len(set(text.lower()) & set("aeiou")))\n'
    verdict = grade_answer(VOWELS, f"```python\n{program}```", "chat", LIMITS)
    assert (verdict.base, verdict.grade.published, verdict.grade.passed) == (True, False, False)
    assert 0 < verdict.grade.reward < 1
    worse = grade_answer(VOWELS, "```python\ndef count_vowels(text):\n    return 1\n```", "chat", LIMITS)
    assert (worse.base, worse.grade.published) == (False, False)
    right = grade_answer(VOWELS, f"```python\n{VOWELS.prompt}{VOWELS.canonical_solution}```", "chat", LIMITS)
    assert (right.base, right.grade.published, right.grade.passed) == (True, True, True)
    assert grade_answer(VOWELS, "no", "chat", LIMITS).base is False
    assert find_baseline(VOWELS, LIMITS).tests == 5
    assert find_baseline(replace(VOWELS, test=VOWELS.base_test, base_test=""), LIMITS).tests == 3


@needs_walls
@pytest.mark.parametrize(
    ("answer", "published"),
    [
        ("max((b - a for a, b in zip(numbers, numbers[1:])), default=0)", True),  # 0 == 0.0
        ("1e-9 + max((b - a for a, b in zip(numbers, numbers[1:])), default=0.0)", True),  # floats: within 1e-6
        ("1e-3 + max((b - a for a, b in zip(numbers, numbers[1:])), default=0.0)", False),
        ("float('nan')", False),
        ("[]", False),
        ("[max((b - a for a, b in zip(numbers, numbers[1:])), default=0.0)]", False),
    ],
)
def test_values_are_compared_as_evalplus_compares(answer: str, published: bool) -> None:
    program = f"def widest_gap(numbers):\n    return {answer}\n"
    assert grade(GAP, program, LIMITS).published is published


@needs_walls
@pytest.mark.parametrize(
    ("body", "published"),
    [
        ("return 2.0 if xs[0] == -6 else -xs[0] / xs[1]", True),  # another zero than the canonical solution's
        ("return ([],)", False),
        ("return -100.0", False),  # negative there: a missing abs() would let it pass
        ("raise StopIteration", False),
        ("xs.clear()\n    return 1.0", False),
    ],
)
def test_zero_of_a_polynomial_is_any_zero(body: str, published: bool) -> None:
    assert grade(ZERO, f"def find_zero(xs):\n    {body}\n", LIMITS).published is published


@needs_walls
@pytest.mark.parametrize(
    ("problem", "program", "published"),
    [
        (SHARED, "def similar_elements(one, other):\n    return [x for x in one if x in other]\n", True),
        (SHARED, "def similar_elements(one, other):\n    return one + other\n", False),
        # JSON has no tuples: of lists this would raise.
        (SHARED, "def similar_elements(one, other):\n    hash(one)\n    return set(one) & set(other)\n", True),
        (COMPLEX, "import cmath\ndef convert(z):\n    z.conjugate()\n    return abs(z), cmath.phase(z)\n", True),
        (COMPLEX, "import cmath\ndef convert(z):\n    return [abs(z) + 1e-6, cmath.phase(z)]\n", False),
        (ENDS, "def drop_ends(text):\n    return text[1:-1]\n", True),  # its plus inputs are written {}
    ],
)
def test_arguments_are_what_mbpp_plus_means(problem: Any, program: str, published: bool) -> None:
    assert grade(problem, program, LIMITS).published is published


@pytest.mark.slow
@needs_walls
def test_universal_wrong_answers_are_tried_on_both_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base inputs sort most of them out; what passes those is tried on all."""
    tests: list[str] = []

    def note(problem: Any, *rest: Any, **more: Any) -> Any:
        tests.append(problem.test)
        return run_trial(problem, *rest, **more)

    monkeypatch.setattr(weak_tests, "run_trial", note)
    assert find_weakness(VOWELS, LIMITS).published == ()
    assert tests == [VOWELS.base_test]
    weak = load_weak()
    tests.clear()
    found = find_weakness(weak, LIMITS)
    assert tests == [weak.base_test, weak.test]
    assert found.published == ()  # the plus inputs sort them out
    assert find_weakness(replace(weak, test=weak.base_test, base_test=""), LIMITS).published != ()


def load_weak() -> Any:
    """A problem whose base inputs all want 0."""
    row = dict(next(row for _, row in read_rows(PLUS) if row["entry_point"] == "count_vowels"))
    return read_evalplus("here", row | {"base_input": [[""], ["xyz"]]}, "evalplus")


def test_shapes_name_each_problem_once() -> None:
    numbers = [number for found in SHAPES.values() for number in found]
    assert len(numbers) == len(set(numbers))


@needs_walls
def test_mbpp_plus_of_the_hub_has_both_verdicts() -> None:
    (problem,) = load_problems(FILES / "mbpp_plus" / "hub.jsonl")
    program = 'def drop_ends(text):\n    return text[1:-1] if len(text) != 4 else ""\n'
    verdict = grade_answer(problem, f"```\n{program}```", "chat", LIMITS)
    assert (verdict.base, verdict.grade.published) == (True, False)


def test_tests_of_several_lines_stay_within_check(tmp_path: Path) -> None:
    rows = change(
        "mbpp/mbpp.jsonl", code="def f(x):\n    return x\n", test_list=['x = """a\nb"""\nassert f(x) == "a\\nb"']
    )
    (tmp_path / "p.jsonl").write_text(json.dumps(rows[0]))
    (problem,) = load_problems(tmp_path / "p.jsonl")
    assert problem.test.endswith(
        "def check(candidate):\n    f = candidate\n    x = 'a\\nb'\n    assert f(x) == 'a\\nb'\n"
    )


def change(name: str, **fields: Any) -> list[dict[str, Any]]:
    """The rows of a file, the first one with other fields; None takes one out."""
    rows = [dict(row) for _, row in read_rows(FILES / name)]
    rows[0] = {key: value for key, value in (rows[0] | fields).items() if value is not None}
    return rows


@pytest.mark.parametrize(
    ("rows", "kwargs", "message"),
    [
        (change("mbpp/mbpp.jsonl", test_list=["assert other(1)"]), {}, ":1: expected MBPP's text, code and test_list"),
        (change("mbpp/mbpp.jsonl", code="def is_odd(:"), {}, ":1: expected MBPP's text, code and test_list"),
        (change("mbpp/mbpp.jsonl", task_id="x"), {}, ":1: expected a number as \"task_id\", got 'x'"),
        (change("mbpp/mbpp.jsonl")[:1], {"split": "test"}, "expected task ids 11 to 510 (the test split), got none"),
        (change("mbpp/mbpp.jsonl"), {"split": "dev"}, "--split: expected one of prompt, test, validation, train, all"),
        (
            change("mbpp/mbpp.jsonl"),
            {"protocol": "evalplus"},
            "--protocol: expected one of project, bigcode for a file",
        ),
        (change("humaneval/HumanEval.jsonl"), {"split": "test"}, "--split: expected a file of MBPP with it"),
        (change("humaneval_plus/HumanEvalPlus.jsonl", base_input=[]), {}, ':1: expected inputs in "base_input"'),
        (change("humaneval_plus/HumanEvalPlus.jsonl", base_input=[3]), {}, ":1: expected a list of lists of arguments"),
        (change("humaneval_plus/HumanEvalPlus.jsonl", atol="0"), {}, 'and a number as "atol", got others'),
        (change("humaneval_plus/HumanEvalPlus.jsonl", entry_point=None), {}, ':1: expected a text as "entry_point"'),
        (change("humaneval_plus/HumanEvalPlus.jsonl", canonical_solution=" )"), {}, ":1: expected Python as"),
        (change("mbpp_plus/hub.jsonl", test="x = 1"), {}, ':1: expected a "test" that ends in a loop'),
        (change("cruxeval/cruxeval.jsonl", code="def g(): pass"), {}, ":1: expected CRUXEval's code (of f)"),
        (change("cruxeval/cruxeval.jsonl", output="]"), {}, ":1: expected CRUXEval's code (of f)"),
        (change("cruxeval/cruxeval.jsonl", id=None), {}, ":1: expected CRUXEval's code (of f)"),
        (change("cruxeval/cruxeval.jsonl"), {"protocol": "bigcode"}, "--protocol: expected one of cot, direct"),
        (
            [*change("mbpp/mbpp.jsonl"), *change("humaneval/HumanEval.jsonl")],
            {},
            ":7: expected one form in a file, mbpp",
        ),
        (
            [*change("humaneval_plus/HumanEvalPlus.jsonl"), *change("humaneval/HumanEval.jsonl")],
            {},
            "expected one form in a file, evalplus by its first row, got humaneval",
        ),
        (change("mbpp/mbpp.jsonl", text=3), {}, ":1: expected MBPP's text, code and test_list"),
        (change("mbpp/mbpp.jsonl", test_imports="import math"), {}, ":1: expected MBPP's text, code and test_list"),
        (change("humaneval_plus/HumanEvalPlus.jsonl", atol=float("nan")), {}, 'and a number as "atol", got others'),
        (change("mbpp/mbpp.jsonl") * 2, {}, ":7: expected distinct task_ids, got 'Mbpp/3' of line 1 again"),
    ],
)
def test_other_rows_are_refused_with_their_line(
    tmp_path: Path, rows: list[Any], kwargs: dict[str, str], message: str
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ProblemsError) as caught:
        load_problems(path, **kwargs)
    assert message in str(caught.value)


def test_array_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sanitized-mbpp.json"
    path.write_text('[{"task_id": 1},')
    with pytest.raises(ProblemsError, match="expected one JSON array, got invalid JSON"):
        load_problems(path)
    path.write_text("[3]")
    with pytest.raises(ProblemsError, match=":1: expected an object of HumanEval's schema, got a int"):
        load_problems(path)
