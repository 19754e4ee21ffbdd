"""Wrong programs that compute nothing (cheats.txt), under tests of every form (cheat_forms.txt).

Run as a script it tries every program under every form, some 4,300 pairs, and prints those that pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from laguna_serve.evals.codegen.grading import Grade, find_baseline, grade
from laguna_serve.evals.problems import Problem
from laguna_serve.evals.sandbox import Limits, choose_walls

HERE = Path(__file__).parent
PROMPT = "def f(x):\n    '''x'''\n"
# What is right under that form, whoever says it: the tests name no more than that.
RIGHT = {
    ("not any", "a named tuple that compares"),
    ("not any", "an answer at its second look"),
    ("asked for", "one of few constants"),
}
# Pairs that are always among those that the tests try.
ALWAYS = (
    ("not any", "an empty iterator"),
    ("not any", "an empty generator"),
    ("not any", "a callable object with every answer"),
    ("functions of functions", "a metaclass that lies"),
    ("two answers, then their oracles", "earlier arguments changed later"),
    ("an oracle in the check", "arguments changed while the answer is read"),
)
Pair = tuple[str, str]


def read_sections(name: str) -> dict[str, str]:
    """A file's parts, by their names; each begins with a line "=== name"."""
    parts = ("\n" + (HERE / name).read_text()).split("\n=== ")[1:]
    found = dict(part.split("\n", 1) for part in parts)
    assert len(found) == len(parts), "names twice"
    return {name: text.rstrip("\n") + "\n" for name, text in found.items()}


def split_fields(text: str) -> dict[str, str]:
    """A part's fields; each begins with a line "--- name"."""
    return {name: body + "\n" for name, body in (part.split("\n", 1) for part in ("\n" + text).split("\n--- ")[1:])}


def make_problem(test: str, canonical: str | None) -> Problem:
    body = "".join(f"    {line}\n" for line in test.rstrip().split("\n"))
    return Problem("T/f", PROMPT, "f", f"def check(candidate):\n{body}", canonical)


def read_forms() -> dict[str, Problem]:
    fields = {name: split_fields(text) for name, text in read_sections("cheat_forms.txt").items()}
    return {name: make_problem(parts["test"], parts["canonical"]) for name, parts in fields.items()}


def read_cheats() -> dict[str, str]:
    return read_sections("cheats.txt")


def list_pairs(every: int) -> list[Pair]:
    """Each `every`th pair of a form and a program; every form and every program is among them."""
    forms, cheats = list(read_forms()), list(read_cheats())
    chosen = [(f, c) for i, f in enumerate(forms) for j, c in enumerate(cheats) if (i + j) % every == 0]
    return [pair for pair in dict.fromkeys([*ALWAYS, *chosen]) if pair not in RIGHT]


def grade_pairs(pairs: Iterable[Pair], workers: int = 2) -> dict[Pair, Grade]:
    forms, cheats = read_forms(), read_cheats()
    pairs, limits = list(pairs), Limits(cpu_s=2, wall_s=20, walls=choose_walls())
    with ThreadPoolExecutor(workers) as pool:
        faults = dict(zip(forms, pool.map(lambda p: find_baseline(p, limits).fault, forms.values()), strict=True))
        assert not any(faults.values()), faults
        return dict(zip(pairs, pool.map(lambda p: grade(forms[p[0]], cheats[p[1]], limits), pairs), strict=True))


def main() -> None:
    grades = grade_pairs(list_pairs(1))
    for (form, cheat), found in grades.items():
        if found.passed or found.reward == 1 or found.status == "fault":
            print(f"{form} | {cheat} | {found}")
    print(len(grades), "pairs")


if __name__ == "__main__":
    main()
