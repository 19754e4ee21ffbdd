"""Run as a script: how many canonical solutions of a problems file are graded per second, with how many workers.

    python grading_speed.py PROBLEMS.jsonl --workers 1 2 --problems 20

The canonical solution's own run, which is made once for each problem, is not timed. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from laguna_serve.evals import grading
from laguna_serve.evals.problems import load_problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--problems", type=int, default=20)
    args = parser.parse_args()
    problems = load_problems(args.file)[: args.problems]
    programs = [problem.prompt + str(problem.canonical_solution) for problem in problems]
    for problem, program in zip(problems, programs, strict=True):
        grading.grade(problem, program)
    rates = {}
    for workers in args.workers:
        with ThreadPoolExecutor(workers) as pool:
            begun = time.monotonic()
            passed = [grade.passed for grade in pool.map(grading.grade, problems, programs)]
            rates[workers] = len(passed) / (time.monotonic() - begun)
        assert all(passed)
    print(json.dumps({"problems": len(problems), "per_second": rates}))


if __name__ == "__main__":
    main()
