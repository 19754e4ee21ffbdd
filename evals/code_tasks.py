"""How many code problems does a model behind an OpenAI-compatible endpoint solve? Its programs are run, in a sandbox.

Problems are in HumanEval's JSONL schema. First, universal wrong answers (constants, empty values, NaN, exceptions, …)
are tried on every problem, and those that they pass are named. Reported: pass@k (unbiased; strict, and as the published
tests say) and the mean share of tests passed, each with a 95% interval over problems. DIR gets code_tasks.json and
code_tasks.md, and keeps every answer and grade (answers.jsonl, grades.jsonl), so that the same command continues; the
last stdout line is one JSON object (schema laguna_serve.code_tasks/1).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from laguna_serve.bench.harness.arm_options import parse_numbers
from laguna_serve.evals.code_report import render_markdown, render_text, summarise
from laguna_serve.evals.code_run import Sample, Workload, run_samples
from laguna_serve.evals.grading import Grade, JailError, Limits, grade
from laguna_serve.evals.problems import SHIPPED, Problem, ProblemsError, load_problems
from laguna_serve.evals.sandbox import UNWALLED, WANTED, choose_walls
from laguna_serve.evals.sandbox.choice import HELP
from laguna_serve.evals.text import make_printable
from laguna_serve.evals.weak_tests import Weakness, find_weaknesses, tell_weaknesses
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.client.openai_endpoint import Endpoint
from laguna_serve.serving.kit.cli import COULD_NOT_RUN, FELL_SHORT, HELD, INTERRUPTED
from laguna_serve.serving.kit.environment import current_argv, describe_environment
from laguna_serve.serving.kit.files import write_json, write_text
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.run_dir import claim_folder, fingerprint
from laguna_serve.serving.kit.signals import interrupt_on_signals

SCHEMA, CANONICAL_SCHEMA = "laguna_serve.code_tasks/1", "laguna_serve.code_canonical/1"
# Of the wall limit to the limit of CPU seconds: grading shares the machine with the engine.
WALL_PER_CPU = 2.5
EXAMPLES = """
examples:
  python evals/code_tasks.py --base-url http://127.0.0.1:8000 --out out/code
  python evals/code_tasks.py --base-url URL --problems HumanEval.jsonl.gz --form completion \\
      --samples 20 --temperature 0.8 --k 1,10 --out DIR
  python evals/code_tasks.py --check-canonical --problems HumanEvalPlus.jsonl

exit status:
  0    held: every sample was answered and graded (with --check-canonical: every solution passes)
  1    fell short: requests failed, and the same command asks them again (or: a solution fails)
  2    could not run: bad input, no endpoint, or no sandbox
  130  interrupted: the same command continues
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    args = parse_args(argv)
    interrupt_on_signals()
    progress = Progress()
    try:
        problems = load_problems(Path(args.problems))
        limits = make_limits(args)
        return (
            check_canonical(args, problems, limits, progress)
            if args.check_canonical
            else evaluate(args, problems, limits)
        )
    except KeyboardInterrupt:
        print("code_tasks.py: interrupted; the same command continues with what is missing", file=sys.stderr)
        return INTERRUPTED
    except (ProblemsError, EndpointError, JailError, CheckpointError, OSError) as error:
        print(f"code_tasks.py: {error}", file=sys.stderr)
        return COULD_NOT_RUN


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
    workload = Workload(args.form, args.samples, args.temperature, args.max_tokens, args.seed, args.concurrency)
    weaknesses = probe(args, problems, limits)
    model, samples = asyncio.run(_run(args, problems, workload, limits, out))
    result = {
        "schema": SCHEMA,
        "environment": environment,
        "base_url": args.base_url,
        "model": model,
        "problems_file": os.path.relpath(args.problems),
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
    if args.skip_probes:
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
        claim_folder(out, settings | walls)
        progress.say(f"{endpoint.model}: {len(problems)} problems × {workload.samples} samples")
        progress.begin()

        def report(done: int, total: int) -> None:
            progress.step("samples", done, total)

        return endpoint.model, await run_samples(endpoint, problems, workload, limits, out, report)


def check_canonical(args: argparse.Namespace, problems: list[Problem], limits: Limits, progress: Progress) -> int:
    """Grade the problems' own solutions. Returns the exit status."""
    progress.begin()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        grades: list[Grade | None] = []
        for verdict in pool.map(lambda problem: _grade_canonical(problem, limits), problems):
            grades.append(verdict)
            progress.step("solutions", len(grades), len(problems))
    rows = list(zip(problems, grades, strict=True))
    failing = [_describe_canonical(problem, verdict) for problem, verdict in rows if not (verdict and verdict.passed)]
    weaknesses = [] if args.skip_probes else probe(args, problems, limits) or []
    for row in failing:
        print(f"{make_printable(row['task_id'])}: {row['status']}: {row['detail']}")
    tests = [verdict.tests_total for verdict in grades if verdict]
    print(f"{len(problems) - len(failing)} of {len(problems)} canonical solutions pass; {sum(tests)} tests")
    counts = {"problems": len(problems), "tests": sum(tests), "failing": failing, "weak": list_weak(weaknesses)}
    print(json.dumps({"schema": CANONICAL_SCHEMA, "walls": limits.walls, **counts}))
    return FELL_SHORT if failing else HELD


def _grade_canonical(problem: Problem, limits: Limits) -> Grade | None:
    solution = problem.canonical_solution
    return None if solution is None else grade(problem, problem.prompt + solution, limits)


def _describe_canonical(problem: Problem, verdict: Grade | None) -> dict[str, Any]:
    if verdict is None:
        return {"task_id": problem.task_id, "status": "missing", "detail": "no canonical_solution"}
    return {"task_id": problem.task_id, "status": verdict.status, "detail": verdict.detail}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line; argparse exits with status 2 on a bad one."""
    parser = argparse.ArgumentParser(
        prog="evals/code_tasks.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--base-url", metavar="URL", help="OpenAI-compatible endpoint, with or without /v1")
    problems = "HumanEval's schema, .jsonl or .jsonl.gz (default: the problems that ship with the project)"
    parser.add_argument("--problems", metavar="FILE", default=str(SHIPPED), help=problems)
    parser.add_argument("--model", metavar="NAME", help="model to ask for (default: the first that is served)")
    parser.add_argument("--form", choices=("chat", "completion"), default="chat", help="default: chat")
    parser.add_argument("--samples", metavar="N", type=int, default=1, help="per problem (default: 1)")
    parser.add_argument("--temperature", metavar="T", type=float, default=0.0, help="default: 0, greedy")
    parser.add_argument("--k", metavar="K,…", type=parse_numbers, default=[1], help="for pass@k (default: 1)")
    parser.add_argument("--max-tokens", metavar="N", type=int, default=1024, help="of an answer (default: 1024)")
    parser.add_argument("--seed", type=int, default=0, help="of the first sample; the next has the next (default: 0)")
    parser.add_argument("--concurrency", metavar="N", type=int, default=8, help="requests in flight (default: 8)")
    parser.add_argument("--api-key-env", metavar="NAME", help="environment variable that holds the endpoint's key")
    timeout = "CPU seconds that a program gets (default: 8)"
    parser.add_argument("--timeout-s", metavar="S", type=int, default=8, help=timeout)
    memory = "MiB of address space that a program gets (default: 512)"
    parser.add_argument("--memory-mib", metavar="N", type=int, default=512, help=memory)
    packages = "installed packages that programs may import, as numpy (with --memory-mib 1024 or more)"
    parser.add_argument("--packages", metavar="NAME", nargs="+", default=[], help=packages)
    skip = "do not try universal wrong answers on the problems first"
    parser.add_argument("--skip-probes", action="store_true", help=skip)
    parser.add_argument("--walls", choices=WANTED, default="auto", help=HELP)
    canonical = "grade the problems' own solutions instead of a model's; asks nobody"
    parser.add_argument("--check-canonical", action="store_true", help=canonical)
    parser.add_argument("--out", metavar="DIR", help="folder for answers, grades and the result files")
    args = parser.parse_args(argv)
    for name in ("samples", "max_tokens", "concurrency", "timeout_s", "memory_mib"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    if not args.check_canonical:
        _check_asking(parser, args)
    return args


def _check_asking(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if not args.base_url or not args.out:
        parser.error("expected --base-url and --out, got none; give both, or --check-canonical")
    if not args.base_url.startswith(("http://", "https://")):
        parser.error(f"--base-url: expected http://… or https://…, got {args.base_url}")
    if not 0 <= args.temperature < float("inf"):
        parser.error(f"--temperature: expected 0 or more, got {args.temperature}")
    if args.samples > 1 and args.temperature == 0:
        parser.error(f"--samples: expected 1 at temperature 0, got {args.samples} of the same; give --temperature")
    if not 1 <= min(args.k) <= max(args.k) <= args.samples:
        parser.error(f"--k: expected 1 to --samples ({args.samples}), got {','.join(map(str, args.k))}")
    if args.api_key_env and not os.environ.get(args.api_key_env):
        parser.error(f"--api-key-env: expected the key in ${args.api_key_env}, got nothing; set it")


if __name__ == "__main__":
    raise SystemExit(main())
