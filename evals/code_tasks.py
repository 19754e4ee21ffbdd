"""How many code problems does a model behind an OpenAI-compatible endpoint solve? Its programs are run, in a sandbox.

Problems come from the files that their authors publish (--help lists them). First, universal wrong answers (constants,
empty values, NaN, exceptions, …) are tried on every problem, and those that they pass are named. Reported: pass@k
(unbiased; strict, as the published tests say, and of evalplus's sets on the base tests) and the mean share of tests
passed, each with a 95% interval over problems. DIR gets code_tasks.json and code_tasks.md, and keeps every answer and
grade (answers.jsonl, grades.jsonl), so that the same command continues; the last stdout line is one JSON object (schema
laguna_serve.code_tasks/1).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from laguna_serve.evals.codegen.canonical import check_solutions, describe_file, summarise_solutions
from laguna_serve.evals.codegen.flags import parse_args
from laguna_serve.evals.codegen.grading import JailError, Limits
from laguna_serve.evals.codegen.printable import make_printable
from laguna_serve.evals.codegen.report import render_markdown, render_text, summarise
from laguna_serve.evals.codegen.runner import Sample, Workload, run_samples
from laguna_serve.evals.codegen.weak_tests import Weakness, find_weaknesses, tell_weaknesses
from laguna_serve.evals.problems import Problem, ProblemsError, find_form, load_problems, read_rows
from laguna_serve.evals.problems.cruxeval_rows import fill_asked
from laguna_serve.evals.problems.protocols import CPU_S, PROTOCOLS, SLOW, SLOW_CPU_S, check_asking, choose_protocol
from laguna_serve.evals.sandbox import UNWALLED, choose_walls
from laguna_serve.serving.client.openai_endpoint import Endpoint
from laguna_serve.serving.kit.cli import CONTINUES, FELL_SHORT, HELD, run_command
from laguna_serve.serving.kit.environment import current_argv, describe_environment
from laguna_serve.serving.kit.files import write_json, write_text
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.run_dir import claim_folder, fingerprint

SCHEMA, CANONICAL_SCHEMA = "laguna_serve.code_tasks/1", "laguna_serve.code_canonical/1"
# Of the wall limit to the limit of CPU seconds: grading shares the machine with the engine.
WALL_PER_CPU = 2.5


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    args = parse_args(argv, __doc__)
    return run_command("code_tasks.py", lambda: run(args), others=(JailError,), interrupted=CONTINUES)


def run(args: argparse.Namespace) -> int:
    """Grade a model's answers, or the problems' own solutions. Returns the exit status."""
    problems = choose_problems(args)
    limits = make_limits(args)
    return (check_canonical if args.check_canonical else evaluate)(args, problems, limits)


def choose_problems(args: argparse.Namespace) -> list[Problem]:
    """The problems that are asked. What was left open of `args` is filled in: protocol, max_tokens and timeout_s.

    Raises:
        ProblemsError: the file cannot be used, or not in this way.
    """
    path = Path(args.problems)
    problems = load_problems(path, args.protocol, args.split)[: args.limit]
    if unknown := set(args.only or ()) - {problem.task_id for problem in problems}:
        expected = f"expected task ids of {path.name}, such as {problems[0].task_id}"
        raise ProblemsError(f"--only: {expected}, got {', '.join(sorted(unknown))}")
    problems = [problem for problem in problems if not args.only or problem.task_id in args.only]
    form = find_form(next(read_rows(path))[1])
    args.protocol = choose_protocol(form, args.protocol)
    args.timeout_s = args.timeout_s or (SLOW_CPU_S if form in SLOW else CPU_S)
    args.max_tokens = args.max_tokens or PROTOCOLS[args.protocol].max_tokens
    if not args.check_canonical:
        check_asking(args.protocol, args.form)
    return fill_asked(problems, Path(args.prompt_file)) if args.prompt_file else problems


def make_limits(args: argparse.Namespace) -> Limits:
    """The sandbox's limits.

    Raises:
        JailError: there is no sandbox on this system, and nobody said to do without.
    """
    if args.walls == "none":
        print(f"code_tasks.py: {UNWALLED}", file=sys.stderr)
    return Limits(
        cpu_s=args.timeout_s,
        wall_s=args.timeout_s * WALL_PER_CPU,
        memory_bytes=args.memory_mib << 20,
        packages=tuple(args.packages),
        walls=choose_walls(args.walls),
    )


def evaluate(args: argparse.Namespace, problems: list[Problem], limits: Limits) -> int:
    """Ask, grade, report. Returns the exit status."""
    out = Path(args.out)
    environment = describe_environment(current_argv())
    workload = Workload(
        *(args.form, args.samples, args.temperature, args.max_tokens, args.seed, args.concurrency),
        *(args.protocol, args.template),
    )
    weaknesses = probe(args, problems, limits)
    model, samples = asyncio.run(_run(args, problems, workload, limits, out))
    result = {
        "schema": SCHEMA,
        "environment": environment,
        "base_url": args.base_url,
        "model": model,
        "problems_file": os.path.relpath(args.problems),
        "file": describe_file(Path(args.problems))
        | {"split": args.split or None, "limit": args.limit, "only": args.only},
        "prompt_file": describe_file(Path(args.prompt_file)) if args.prompt_file else None,
        "workload": asdict(workload),
        "limits": asdict(limits),
        "weak_problems": None if weaknesses is None else list_weak(weaknesses),
        **summarise(samples, args.k),
    }
    write_json(out / "code_tasks.json", result)
    write_text(out / "code_tasks.md", render_markdown(result))
    print(render_text(result))
    print(json.dumps({key: value for key, value in result.items() if key != "problems"}))
    return FELL_SHORT if result["failed_requests"] else HELD


def probe(args: argparse.Namespace, problems: list[Problem], limits: Limits) -> list[Weakness] | None:
    """Say which problems universal wrong answers pass; None where nobody wants to know."""
    # A constant may well be the right value.
    problems = [problem for problem in problems if problem.kind == "function"]
    if args.skip_probes or not problems:
        return None
    progress = Progress()
    progress.begin()

    def report(done: int, total: int) -> None:
        progress.step("universal wrong answers", done, total)

    found = find_weaknesses(problems, limits, report)
    for line in tell_weaknesses(found):
        progress.say(line)
    return found


def list_weak(weaknesses: Sequence[Weakness]) -> list[dict[str, Any]]:
    """The problems that a universal wrong answer passes, or that are at fault themselves."""
    return [asdict(weakness) for weakness in weaknesses if weakness.published or weakness.strict or weakness.fault]


async def _run(
    args: argparse.Namespace, problems: list[Problem], workload: Workload, limits: Limits, out: Path
) -> tuple[str, list[Sample]]:
    progress = Progress()
    key = os.environ.get(args.api_key_env) if args.api_key_env else None
    async with Endpoint(args.base_url, model=args.model, api_key=key) as endpoint:
        settings = {name: value for name, value in asdict(workload).items() if name != "concurrency"}
        walls = {"limits": asdict(limits), "problems": fingerprint(args.problems), "model": endpoint.model}
        chosen = {name: getattr(args, name) for name in ("split", "limit", "only", "prompt_file")}
        claim_folder(out, settings | walls | chosen)
        progress.say(f"{endpoint.model}: {len(problems)} problems × {workload.samples} samples")
        progress.begin()

        def report(done: int, total: int) -> None:
            progress.step("samples", done, total)

        return endpoint.model, await run_samples(endpoint, problems, workload, limits, out, report)


def check_canonical(args: argparse.Namespace, problems: list[Problem], limits: Limits) -> int:
    """Grade the problems' own solutions. Returns the exit status."""
    environment, progress = describe_environment(current_argv()), Progress()
    progress.begin()

    def report(done: int, total: int) -> None:
        progress.step("solutions", done, total)

    folder = Path(args.out) if args.out else None
    file = describe_file(Path(args.problems)) | {"split": args.split or None, "limit": args.limit, "only": args.only}
    settings = {"file": file, "protocol": args.protocol, "limits": asdict(limits)}
    if folder is not None:
        claim_folder(folder, settings)
    result = summarise_solutions(check_solutions(problems, limits, folder, report))
    weaknesses = [] if args.skip_probes else probe(args, problems, limits) or []
    for row in result["failing"]:
        print(f"{make_printable(row['task_id'])}: {row['status']}: {row['detail']}")
    print(f"{result['passing']} of {len(problems)} canonical solutions pass; {result['tests']} tests")
    result = {"schema": CANONICAL_SCHEMA, "walls": limits.walls, **settings, **result, "weak": list_weak(weaknesses)}
    if folder is not None:
        write_json(folder / "canonical.json", result | {"environment": environment})
    print(json.dumps({key: value for key, value in result.items() if key != "tests_of"}))
    return FELL_SHORT if result["failing"] else HELD


if __name__ == "__main__":
    raise SystemExit(main())
