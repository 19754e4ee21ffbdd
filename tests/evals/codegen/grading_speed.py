"""Run as a script: how many canonical solutions of a problems file several checkouts grade per second, interleaved.

    python grading_speed.py HumanEval.jsonl --arm before=OLD/.venv/bin/python --arm after=.venv/bin/python --out FILE

Each arm is a process of its own, by the Python of a checkout's environment, and stays for all rounds. In every round
each arm grades the problems once with each number of workers; the arms' order alternates, so that a busy moment of the
machine meets them alike. The canonical solution's own run, made once for each problem, and the start of what serves
many gradings are not timed. `answers`: the program is taken out of a Markdown answer first. Ratios are those of one
round, to the first arm. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

KINDS = ("programs", "answers")


def serve(file: Path, count: int) -> None:
    """An arm: kind of work and number of workers a line on stdin, seconds on stdout. Runs in older checkouts, too."""
    from laguna_serve.evals.codegen.grading import Limits, grade
    from laguna_serve.evals.problems import load_problems

    problems = load_problems(file)[:count]
    programs = [problem.prompt + str(problem.canonical_solution) for problem in problems]

    def grade_program(index: int) -> bool:
        return grade(problems[index], programs[index]).passed

    def grade_text(index: int) -> bool:
        answer = f"Here it is.\n\n```python\n{programs[index]}```\n"
        try:
            from laguna_serve.evals.codegen.grading import grade_answer
        except ImportError:  # as it was before
            from laguna_serve.evals.extraction.extract import extract_program

            return grade(problems[index], extract_program(answer, problems[index], "chat")).passed
        return grade_answer(problems[index], answer, "chat", Limits()).grade.passed

    works = dict(zip(KINDS, (grade_program, grade_text), strict=True))
    for work in works.values():
        with ThreadPoolExecutor(2) as pool:
            assert all(pool.map(work, range(len(problems))))
    print("ready", flush=True)
    for line in sys.stdin:
        kind, workers = line.split()
        with ThreadPoolExecutor(int(workers)) as pool:
            begun = time.monotonic()
            passed = list(pool.map(works[kind], range(len(problems))))
            seconds = time.monotonic() - begun
        assert all(passed)
        print(seconds, flush=True)


def read_processor() -> dict[str, str]:
    """Family, model and name as Linux gives them."""
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    pairs = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return {name: pairs[name] for name in ("vendor_id", "cpu family", "model", "model name") if name in pairs}


def summarise(rates: list[float]) -> dict[str, float]:
    return {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}


def measure(arms: dict[str, subprocess.Popen[str]], args: argparse.Namespace) -> dict[str, Any]:
    """Problems per second: kind, workers, arm, and one number for each round."""
    rates: dict[str, dict[int, dict[str, list[float]]]] = {
        kind: {workers: {arm: [] for arm in arms} for workers in args.workers} for kind in KINDS
    }
    for number in range(args.rounds):
        order = list(arms) if number % 2 == 0 else list(reversed(arms))
        for kind in KINDS:
            for workers in args.workers:
                for name in order:
                    arm = arms[name]
                    assert arm.stdin is not None
                    assert arm.stdout is not None
                    arm.stdin.write(f"{kind} {workers}\n")
                    arm.stdin.flush()
                    rates[kind][workers][name].append(args.problems / float(arm.stdout.readline()))
    return rates


def compare(rates: dict[str, dict[int, dict[str, list[float]]]]) -> dict[str, Any]:
    """Medians and spreads, and every arm's ratio to the first one, round by round."""
    found: dict[str, Any] = {}
    for kind, by_workers in rates.items():
        for workers, by_arm in by_workers.items():
            first, *others = by_arm
            place = found.setdefault(kind, {})[str(workers)] = {arm: summarise(each) for arm, each in by_arm.items()}
            for arm in others:
                pairs = zip(by_arm[arm], by_arm[first], strict=True)
                place[f"{arm} / {first}"] = summarise([mine / theirs for mine, theirs in pairs])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--arm", action="append", metavar="NAME=PYTHON", help="as often as there are arms")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--problems", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.file, args.problems)
    pythons = dict(arm.split("=", 1) for arm in args.arm or [f"here={sys.executable}"])
    arms = {}
    for name, python in pythons.items():
        command = [python, __file__, str(args.file), "--problems", str(args.problems), "--serve"]
        arms[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for arm in arms.values():
        assert arm.stdout is not None
        assert arm.stdout.readline() == "ready\n", "the arm does not start"
    load = Path("/proc/loadavg").read_text().split()[:3]
    rates = measure(arms, args)
    for arm in arms.values():
        arm.communicate()
    found = {
        "schema": "laguna_serve.grading_speed/1",
        "processor": read_processor(),
        "load_average_at_start": [float(number) for number in load],
        "problems": args.problems,
        "rounds": args.rounds,
        "problems_per_second": compare(rates),
    }
    if args.out:
        args.out.write_text(json.dumps({**found, "rates": rates}, indent=1) + "\n")
    print(json.dumps(found))
    return None


if __name__ == "__main__":
    main()
