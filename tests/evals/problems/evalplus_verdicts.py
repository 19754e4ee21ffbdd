"""Run as a script: mutated canonical solutions of evalplus's problems, by evalplus itself and by the grader.

    python evalplus_verdicts.py MbppPlus.jsonl.gz OUT --every 4

Of every N-th problem of the file the canonical solution and one mutant of it (mutation_probe.py) are judged by
evalplus (.venv-evals, scripts/client_env.sh evals) and by grading.py, base and plus. OUT gets the samples, evalplus's
own results and verdicts.json; the last line on stdout is a summary. evalplus runs programs in a fork of its own,
without a jail: the mutants are small changes of solutions that its authors wrote.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mutation_probe import list_mutants

from laguna_serve.evals.codegen.grading import Limits, grade, grade_base
from laguna_serve.evals.harnesses.lm_eval import find_harness
from laguna_serve.evals.problems import Problem, load_problems, read_rows

LIMITS = Limits(cpu_s=30, wall_s=75)


def choose_programs(problems: list[Problem]) -> list[tuple[Problem, str]]:
    """Each problem's canonical solution, and one mutant of it where there is one; the same ones each time."""
    generator, chosen = random.Random(0), []
    for problem in problems:
        program = problem.prompt + str(problem.canonical_solution)
        chosen.append((problem, program))
        try:
            mutants = list(list_mutants(program, problem.entry_point))
        except KeyError:  # an operator that mutation_probe.py does not change
            continue
        if mutants:
            chosen.append((problem, generator.choice(mutants)))
    return chosen


def ask_evalplus(file: Path, chosen: list[tuple[Problem, str]], folder: Path) -> list[tuple[bool, bool]]:
    """(base, plus) of every program, in order."""
    wanted = {problem.task_id for problem, _ in chosen}
    subset, samples = folder / "problems.jsonl", folder / "samples.jsonl"
    for old in folder.glob("samples*eval_results.json"):  # evalplus would not judge again
        old.unlink()
    rows = [row for _, row in read_rows(file) if row["task_id"] in wanted]
    subset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [json.dumps({"task_id": problem.task_id, "solution": program}) for problem, program in chosen]
    samples.write_text("\n".join(lines) + "\n")
    data_set = "mbpp" if rows[0]["task_id"].startswith("Mbpp/") else "humaneval"
    command = [str(find_harness().python), "-m", "evalplus.evaluate", "--dataset", data_set, "--parallel", "1"]
    command += ["--samples", str(samples)]
    environment = os.environ | {
        f"{data_set.upper()}_OVERRIDE_PATH": str(subset),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    (results,) = folder.glob("samples*eval_results.json")
    found: dict[str, list[Any]] = json.loads(results.read_text())["eval"]
    at: dict[str, int] = defaultdict(int)
    verdicts = []
    for problem, program in chosen:
        entry = found[problem.task_id][at[problem.task_id]]
        assert entry["solution"] == program
        at[problem.task_id] += 1
        base = entry["base_status"] == "pass"
        verdicts.append((base, base and entry["plus_status"] == "pass"))
    return verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--every", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = choose_programs(load_problems(args.file)[:: args.every])
    theirs = ask_evalplus(args.file, chosen, args.out.resolve())

    def judge(item: tuple[Problem, str]) -> tuple[bool, bool, bool, str]:
        graded = grade(*item, LIMITS)
        return bool(grade_base(*item, graded, LIMITS)), graded.published, graded.passed, graded.detail

    with ThreadPoolExecutor(2) as pool:
        ours = list(pool.map(judge, chosen))
    rows = [
        {"task_id": problem.task_id, "mutant": program != problem.prompt + str(problem.canonical_solution)}
        | {"evalplus": their, "published": our[:2], "strict": our[2], "detail": our[3][:200]}
        for (problem, program), their, our in zip(chosen, theirs, ours, strict=True)
    ]
    (args.out / "verdicts.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    differ = [row["task_id"] for row in rows if tuple(row["evalplus"]) != tuple(row["published"])]
    counts = {"programs": len(rows), "mutants": sum(bool(row["mutant"]) for row in rows)}
    passed = {"evalplus": [sum(each[at] for each in theirs) for at in (0, 1)]}
    passed |= {"published": [sum(each[at] for each in ours) for at in (0, 1)], "strict": sum(each[2] for each in ours)}
    print(json.dumps(counts | {"passed": passed, "differ": differ}))


if __name__ == "__main__":
    main()
