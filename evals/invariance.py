"""Do two endpoints give the same answers, programs and rewards on the same problems? Greedy, with the noise measured.

Every problem is answered several times by each arm, all requests in one mixed order. Tokens, text, extracted program
and reward are compared per problem, between the arms and of each arm with itself; tokens that part are examined with
the log-probabilities of both sides. What counts as the engine's own noise and what as a difference:
invariance_verdict.py. DIR gets invariance.json, invariance.md and answers/answers.jsonl, which grows as answers come
in, so that the same command continues; the last stdout line is one JSON object (schema laguna_serve.invariance/1).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from laguna_serve.bench.harness.arm_options import ENGINE_FLAGS, add_arm_flags, check_arm_flags, find_dtype, make_spec
from laguna_serve.bench.harness.arms import check_specs
from laguna_serve.bench.harness.schedule import ARMS, CANDIDATE
from laguna_serve.evals.grading import JailError, Limits
from laguna_serve.evals.invariance_report import render_markdown, render_text
from laguna_serve.evals.invariance_run import Job, Outcome, run
from laguna_serve.evals.invariance_verdict import EXPLAINED, INVARIANT, NOISE, UNTOLD, judge
from laguna_serve.evals.problems import SHIPPED, Problem, ProblemsError, load_problems
from laguna_serve.evals.sandbox import UNWALLED, WANTED, Wanted, choose_walls
from laguna_serve.evals.sandbox.choice import HELP
from laguna_serve.serving.kit.cli import (
    CONTINUES,
    COULD_NOT_RUN,
    FELL_SHORT,
    HELD,
    Parser,
    add_json_flag,
    print_result,
    run_command,
)
from laguna_serve.serving.kit.environment import current_argv, describe_environment
from laguna_serve.serving.kit.files import write_json, write_text
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.run_dir import claim_folder, fingerprint, is_begun

SCHEMA = "laguna_serve.invariance/1"
# Beyond this many repeats the labellings are too many to count one by one.
MOST_REPEATS = 6
LINE_DIVERGENCES = 3
EXAMPLES = """
examples:
  speculation against plain decoding, engines started and stopped here:
    python evals/invariance.py --model tests/toy/teacher --draft tests/toy/dflash --gamma 7 \\
        --form completion --max-tokens 128 --out out/invariance
  two servers that already run (vLLM, started without prefix caching), a HumanEval file:
    python evals/invariance.py --baseline-url http://127.0.0.1:8000 --candidate-url http://127.0.0.1:8001 \\
        --problems HumanEval.jsonl.gz --repeats 3 --out out/invariance

exit status:
  0    held: invariant, explained by rounding with equal rewards, or no more than the engine's own noise
  1    fell short: the arms differ, or it is unclear; the reasons are printed
  2    could not run: bad input, an engine did not start or died, or a request failed (then the verdict is "could not
       tell"); the same command continues
  130  interrupted: the same command continues
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    args = parse_args(argv)
    return run_command("invariance.py", lambda: measure(args), others=(JailError,), interrupted=CONTINUES)


def measure(args: argparse.Namespace) -> int:
    """Ask both arms, judge, write the result and print it. Returns the exit status."""
    out = Path(args.out)
    environment = describe_environment(current_argv())
    job = make_job(args, environment)
    outcome = run(job, Progress())
    result = assemble(args, job, environment, outcome)
    write_json(out / "invariance.json", result)
    write_text(out / "invariance.md", render_markdown(result))
    print_result(render_text(result), shorten(result), out, always_json=args.json)
    if result["verdict"] == UNTOLD:
        return COULD_NOT_RUN
    return HELD if result["verdict"] in (INVARIANT, EXPLAINED, NOISE) else FELL_SHORT


def assemble(args: argparse.Namespace, job: Job, environment: Mapping[str, Any], outcome: Outcome) -> dict[str, Any]:
    """The result object."""
    if outcome.first is None:
        reasons = [f"{len(outcome.failures)} requests failed; the same command asks for them again"]
        found: dict[str, Any] = {"verdict": UNTOLD, "reasons": reasons, "failures": dict(outcome.failures)}
    else:
        found = judge(outcome.first, outcome.fresh, job.seed)
        if outcome.drafts.drafts(CANDIDATE) == 0 and args.draft is not None:
            reasons = ["the candidate was given a drafter that never drafted: nothing but plain decoding was compared"]
            found |= {"verdict": UNTOLD, "reasons": reasons}
    verdict, reasons = found.pop("verdict"), found.pop("reasons")
    return {
        "schema": SCHEMA,
        "verdict": verdict,
        "reasons": reasons,
        "environment": dict(environment),
        "workload": {
            "problems_file": os.path.relpath(args.problems),
            "problems": len(job.problems),
            "form": job.form,
            "max_tokens": job.max_tokens,
            "repeats": job.repeats,
            "concurrency": job.concurrency,
            "dtype": job.dtype,
            "temperature": 0,
            "seed": job.seed,
            "walls": job.limits.walls,
            "interleaved": outcome.interleaved,
        },
        "arms": {
            name: {"label": job.specs[name].label, "acceptance": outcome.drafts.acceptance(name)} for name in ARMS
        },
        **found,
        "problems": [] if outcome.first is None else list_problems(outcome.first.cases),
    }


def list_problems(cases: Sequence[Any]) -> list[dict[str, Any]]:
    """Every problem with its grades, the baseline's first."""
    return [
        {
            "task_id": case.task_id,
            "tokens": [len(answer.token_ids) for answer in case.answers],
            "grades": [asdict(grade) for grade in case.grades],
        }
        for case in cases
    ]


def shorten(result: Mapping[str, Any]) -> dict[str, Any]:
    """The result without the long lists, for one line; `levels` counts what they hold."""
    short = {name: value for name, value in result.items() if name != "problems"}
    if "divergences" in short:
        short["divergences"] = [
            {name: value for name, value in item.items() if name != "programs"}
            for item in short["divergences"][:LINE_DIVERGENCES]
        ]
    if "failures" in short:
        short["failures"] = dict(list(short["failures"].items())[:LINE_DIVERGENCES])
    return short


def make_job(args: argparse.Namespace, environment: Mapping[str, Any]) -> Job:
    """Everything that can be refused before an engine starts.

    Raises:
        ProblemsError, CheckpointError: an input cannot be used, or the folder holds other answers.
        EngineError: an engine could not be started.
        JailError: there is no sandbox on this system, and nobody said to do without.
    """
    problems = load_problems(Path(args.problems))
    if args.num_problems is not None and args.num_problems > len(problems):
        expected = f"expected at most {len(problems)}, got {args.num_problems}"
        raise ProblemsError(f"--num-problems: {expected}; the file has no more problems")
    problems = problems[: args.num_problems]
    specs = {name: make_spec(args, name) for name in ARMS}
    folder = Path(args.out) / "answers"
    if not is_begun(folder):
        check_specs(specs.values())
    limits = choose_limits(args.walls)
    claim_folder(folder, list_settings(args, problems, environment))
    return Job(
        specs=specs,
        problems=problems,
        form=args.form,
        max_tokens=args.max_tokens,
        repeats=args.repeats,
        concurrency=args.concurrency,
        dtype=find_dtype(args),
        limits=limits,
        seed=args.seed,
        folder=folder,
    )


def choose_limits(walls: Wanted) -> Limits:
    """The sandbox's limits.

    Raises:
        JailError: there is no sandbox on this system, and nobody said to do without.
    """
    if walls == "none":
        print(f"invariance.py: {UNWALLED}", file=sys.stderr)
    return Limits(walls=choose_walls(walls))


def list_settings(
    args: argparse.Namespace, problems: Sequence[Problem], environment: Mapping[str, Any]
) -> dict[str, Any]:
    """What decides about the answers. The repeats too: adding some after a look would bend the tests."""
    work = ("prefix_caching", "baseline_url", "candidate_url", "form", "max_tokens", "repeats", "concurrency", "seed")
    checkpoints = [fingerprint(path) for name in ENGINE_FLAGS[:3] if (path := vars(args)[name])]
    return {name: vars(args)[name] for name in (*ENGINE_FLAGS, *work)} | {
        "problems": [asdict(problem) for problem in problems],
        "checkpoints": checkpoints,
        "versions": environment["versions"],
        "device": (environment["device"] or {}).get("name"),
    }


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; argparse exits with status 2 on a bad one."""
    parser = Parser(
        prog="evals/invariance.py",
        description=__doc__,
        epilog=EXAMPLES,
    )
    add_arm_flags(parser)
    work = parser.add_argument_group("what to compare")
    problems = "JSONL in HumanEval's schema, .gz too (default: the problems shipped here)"
    work.add_argument("--problems", metavar="FILE", default=str(SHIPPED), help=problems)
    work.add_argument("--num-problems", metavar="N", type=int, help="the first N (default: all)")
    form = "how problems are asked: as a user's message, or the bare prompt to go on with (default: chat)"
    work.add_argument("--form", choices=("chat", "completion"), default="chat", help=form)
    work.add_argument("--max-tokens", metavar="N", type=int, default=512, help="of an answer, at most (default: 512)")
    repeats = f"answers of each arm to each problem, 2 to {MOST_REPEATS} (default: 2); with more, less goes unnoticed"
    work.add_argument("--repeats", metavar="K", type=int, default=2, help=repeats)
    concurrency = "requests in flight, both arms together (default: 4)"
    work.add_argument("--concurrency", metavar="N", type=int, default=4, help=concurrency)
    work.add_argument("--seed", type=int, default=0, help="order of the requests, bootstrap, engines (default: 0)")
    work.add_argument("--walls", choices=WANTED, default="auto", help=HELP)
    work.add_argument("--out", metavar="DIR", required=True, help="folder for the result files")
    add_json_flag(work)
    args = parser.parse_args(argv)
    check_arm_flags(parser, args)
    for name in ("num_problems", "max_tokens", "concurrency"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    if not 2 <= args.repeats <= MOST_REPEATS:
        expected = f"expected 2 to {MOST_REPEATS}, got {args.repeats}"
        parser.error(f"--repeats: {expected}; one answer shows no noise")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
