"""Do two endpoints give the same answers, programs and rewards on the same problems? Greedy, with the noise measured.

Every problem is answered several times by each arm, all requests in one mixed order. Tokens, text, extracted program
and reward are compared per problem, between the arms and of each arm with itself; tokens that part are examined with
the log-probabilities of both sides. What counts as the engine's own noise and what as a difference:
equivalence/verdict.py. DIR gets invariance.json, invariance.md and answers/answers.jsonl, which grows as answers come
in, so that the same command continues; the last stdout line is one JSON object (schema laguna_serve.invariance/1).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from laguna_serve.bench.harness.arm_options import ENGINE_FLAGS, ArmsConfig, find_dtype, make_spec
from laguna_serve.bench.harness.arms import check_specs
from laguna_serve.bench.harness.schedule import ARMS, CANDIDATE
from laguna_serve.evals.codegen.grading import JailError, Limits
from laguna_serve.evals.equivalence.report import render_markdown, render_text
from laguna_serve.evals.equivalence.runner import Job, Outcome, run
from laguna_serve.evals.equivalence.verdict import EXPLAINED, INVARIANT, NOISE, UNTOLD, judge
from laguna_serve.evals.problems import SHIPPED, Problem, ProblemsError, load_problems
from laguna_serve.evals.sandbox import UNWALLED, Wanted, choose_walls
from laguna_serve.evals.sandbox.choice import HELP
from laguna_serve.serving.kit.cli import (
    CONTINUES,
    COULD_NOT_RUN,
    FELL_SHORT,
    HELD,
    print_result,
    run_command,
)
from laguna_serve.serving.kit.environment import current_argv, describe_environment
from laguna_serve.serving.kit.files import write_json, write_text
from laguna_serve.serving.kit.flags import Flag, FlagError, read_flags_and_json
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


@dataclass(frozen=True, kw_only=True)
class InvarianceConfig(ArmsConfig):
    """Which answers to compare; the files go to `out`."""

    problems: Annotated[
        Path,
        Flag(
            "JSONL in HumanEval's schema, .gz too (default: the problems shipped here)",
            metavar="FILE",
            group="what to compare",
        ),
    ] = SHIPPED
    num_problems: Annotated[int | None, Flag("the first N (default: all)", metavar="N", at_least=1)] = None
    form: Annotated[
        Literal["chat", "completion"],
        Flag("how problems are asked: as a user's message, or the bare prompt to go on with (default: chat)"),
    ] = "chat"
    max_tokens: Annotated[int, Flag("of an answer, at most (default: 512)", metavar="N", at_least=1)] = 512
    repeats: Annotated[
        int,
        Flag(
            f"answers of each arm to each problem, 2 to {MOST_REPEATS} (default: 2); with more, less goes unnoticed",
            metavar="K",
        ),
    ] = 2
    concurrency: Annotated[
        int, Flag("requests in flight, both arms together (default: 4)", metavar="N", at_least=1)
    ] = 4
    walls: Annotated[Wanted, Flag(HELP, old_switches=(("--without-namespaces", "none"),))] = "auto"
    out: Annotated[Path, Flag("folder for the result files", metavar="DIR")]

    def __post_init__(self) -> None:
        """Refuse what would show nothing."""
        super().__post_init__()
        if not 2 <= self.repeats <= MOST_REPEATS:
            expected = f"expected 2 to {MOST_REPEATS}, got {self.repeats}"
            raise FlagError(f"--repeats: {expected}; one answer shows no noise")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    config, always_json = read_flags_and_json(
        InvarianceConfig, argv, prog="evals/invariance.py", description=__doc__, epilog=EXAMPLES
    )

    def body() -> int:
        result = measure(config)
        print_result(render_text(result), shorten(result), config.out, always_json=always_json)
        if result["verdict"] == UNTOLD:
            return COULD_NOT_RUN
        return HELD if result["verdict"] in (INVARIANT, EXPLAINED, NOISE) else FELL_SHORT

    return run_command("invariance.py", body, others=(JailError,), interrupted=CONTINUES)


def measure(config: InvarianceConfig) -> dict[str, Any]:
    """Ask both arms, judge, write the result to `config.out` and return it."""
    environment = describe_environment(current_argv())
    job = make_job(config, environment)
    outcome = run(job, Progress())
    result = assemble(config, job, environment, outcome)
    write_json(config.out / "invariance.json", result)
    write_text(config.out / "invariance.md", render_markdown(result))
    return result


def assemble(config: InvarianceConfig, job: Job, environment: Mapping[str, Any], outcome: Outcome) -> dict[str, Any]:
    """The result object."""
    if outcome.first is None:
        reasons = [f"{len(outcome.failures)} requests failed; the same command asks for them again"]
        found: dict[str, Any] = {"verdict": UNTOLD, "reasons": reasons, "failures": dict(outcome.failures)}
    else:
        found = judge(outcome.first, outcome.fresh, job.seed)
        if outcome.drafts.drafts(CANDIDATE) == 0 and config.draft is not None:
            reasons = ["the candidate was given a drafter that never drafted: nothing but plain decoding was compared"]
            found |= {"verdict": UNTOLD, "reasons": reasons}
    verdict, reasons = found.pop("verdict"), found.pop("reasons")
    return {
        "schema": SCHEMA,
        "verdict": verdict,
        "reasons": reasons,
        "environment": dict(environment),
        "workload": {
            "problems_file": os.path.relpath(config.problems),
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


def make_job(config: InvarianceConfig, environment: Mapping[str, Any]) -> Job:
    """Everything that can be refused before an engine starts.

    Raises:
        ProblemsError, CheckpointError: an input cannot be used, or the folder holds other answers.
        EngineError: an engine could not be started.
        JailError: there is no sandbox on this system, and nobody said to do without.
    """
    problems = load_problems(config.problems)
    if config.num_problems is not None and config.num_problems > len(problems):
        expected = f"expected at most {len(problems)}, got {config.num_problems}"
        raise ProblemsError(f"--num-problems: {expected}; the file has no more problems")
    problems = problems[: config.num_problems]
    specs = {name: make_spec(config, name) for name in ARMS}
    folder = config.out / "answers"
    if not is_begun(folder):
        check_specs(specs.values())
    limits = choose_limits(config.walls)
    claim_folder(folder, list_settings(config, problems, environment))
    return Job(
        specs=specs,
        problems=problems,
        form=config.form,
        max_tokens=config.max_tokens,
        repeats=config.repeats,
        concurrency=config.concurrency,
        dtype=find_dtype(config),
        limits=limits,
        seed=config.seed,
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
    config: InvarianceConfig, problems: Sequence[Problem], environment: Mapping[str, Any]
) -> dict[str, Any]:
    """What decides about the answers. The repeats too: adding some after a look would bend the tests."""
    work = ("prefix_caching", "baseline_url", "candidate_url", "form", "max_tokens", "repeats", "concurrency", "seed")
    checkpoints = [fingerprint(path) for name in ENGINE_FLAGS[:3] if (path := getattr(config, name))]
    return {name: getattr(config, name) for name in (*ENGINE_FLAGS, *work)} | {
        "problems": [asdict(problem) for problem in problems],
        "checkpoints": checkpoints,
        "versions": environment["versions"],
        "device": (environment["device"] or {}).get("name"),
    }


if __name__ == "__main__":
    raise SystemExit(main())
