"""Run as a script: mutated canonical solutions, by both verdicts of the grader and by plain execution in one process.

    python mutated_verdicts.py PROBLEMS.jsonl OUT.jsonl --per-problem 4

One JSON line for each mutant (mutation_probe.py) of which OUT has none yet; then, on stdout, how many each passes.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mutation_probe import list_mutants

from laguna_serve.evals.codegen.grading import Limits, grade
from laguna_serve.evals.problems import Problem, load_problems

LIMITS = Limits()
BOUNDED = "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (8, 8))\n"
BOUNDED += "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"


def execute(problem: Problem, program: str) -> bool:
    """Whether plain execution of the program and its tests in one process ends well."""
    code = f"{BOUNDED}{program}\n{problem.test}\ncheck({problem.entry_point})\n"
    command = [sys.executable, "-c", code]
    try:
        return subprocess.run(command, capture_output=True, timeout=60, stdin=subprocess.DEVNULL).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def choose(problems: list[Problem], per_problem: int) -> list[tuple[Problem, int, str]]:
    """Some mutants of each problem, the same ones each time."""
    generator, chosen = random.Random(0), []
    for problem in problems:
        try:
            mutants = list(list_mutants(problem.prompt + str(problem.canonical_solution), problem.entry_point))
        except KeyError:  # an operator that mutation_probe.py does not change
            continue
        numbers = generator.sample(range(len(mutants)), min(per_problem, len(mutants)))
        chosen += [(problem, number, mutants[number]) for number in sorted(numbers)]
    generator.shuffle(chosen)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("problems", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--per-problem", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no mutant is begun after that")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    known, begun = {(row["task_id"], row["mutant"]) for row in rows}, time.monotonic()

    def work(item: tuple[Problem, int, str]) -> dict[str, Any] | None:
        problem, number, program = item
        if time.monotonic() - begun > args.seconds:
            return None
        found, plain = grade(problem, program, LIMITS), execute(problem, program)
        verdicts = {"plain": plain, "published": found.published, "strict": found.passed}
        return {
            "task_id": problem.task_id,
            "mutant": number,
            **verdicts,
            "status": found.status,
            "detail": found.detail,
        }

    todo = [
        item
        for item in choose(load_problems(args.problems), args.per_problem)
        if (item[0].task_id, item[1]) not in known
    ]
    with ThreadPoolExecutor(2) as pool, args.out.open("a") as file:
        for row in pool.map(work, todo):
            if row is not None:
                rows.append(row)
                file.write(json.dumps(row) + "\n")
                file.flush()
    counts = {name: sum(row[name] for row in rows) for name in ("plain", "published", "strict")}
    print(json.dumps({"mutants": len(rows), "passed": counts}))


if __name__ == "__main__":
    main()
