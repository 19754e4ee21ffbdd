"""The comparison of two arms' answers: its configuration, and the result of one."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from msgspec import structs

from laguna_serve.bench.arms.arms import ARMS, CANDIDATE, check_specs
from laguna_serve.bench.arms.options import ENGINE_FLAGS, ArmsConfig, find_dtype, make_spec
from laguna_serve.evals.codegen.grading import Limits
from laguna_serve.evals.equivalence.comparison import Case
from laguna_serve.evals.equivalence.report import render_markdown
from laguna_serve.evals.equivalence.result import ComparedArm, ComparedProblem, InvarianceResult, Workload
from laguna_serve.evals.equivalence.runner import Job, Outcome, run
from laguna_serve.evals.equivalence.verdict import COULD_NOT_TELL, judge
from laguna_serve.evals.problems import SHIPPED, Problem, ProblemsError, load_problems
from laguna_serve.evals.problems.problem import Form
from laguna_serve.evals.sandbox import NO_WALLS_WARNING, Wanted, choose_walls
from laguna_serve.evals.sandbox.choice import HELP
from laguna_serve.serving.kit.environment import Environment, current_argv, read_environment
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.flags import Flag, FlagError
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import write_result
from laguna_serve.serving.kit.run_dir import check_out, claim_folder, fingerprint, hold_out, is_begun

# Beyond this many repeats the labellings are too many to count one by one.
MOST_REPEATS = 6


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
        Form,
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


@hold_out
def compare_answers(config: InvarianceConfig) -> InvarianceResult:
    """Ask both arms for what `config.out` lacks, judge, and write invariance.json and invariance.md there.

    Raises:
        ProblemsError, CheckpointError, RunDirError: an input cannot be used, or the folder holds other answers.
        EngineError, EndpointError: an arm cannot be had, or died. A request that fails is no error: the result says it.
        JailError: there is no sandbox on this system, and the configuration does not say to do without.
    """
    environment = read_environment(current_argv())
    job = make_job(config, environment)
    outcome = run(job, Progress())
    result = assemble(config, job, environment, outcome)
    write_result(config.out / "invariance.json", result)
    write_text(config.out / "invariance.md", render_markdown(result))
    return result


def assemble(config: InvarianceConfig, job: Job, environment: Environment, outcome: Outcome) -> InvarianceResult:
    """Assemble the result; without figures where requests failed."""
    without = InvarianceResult(
        verdict=COULD_NOT_TELL,
        reasons=[f"{len(outcome.failures)} requests failed; the same command asks for them again"],
        environment=environment,
        workload=Workload(
            problems_file=os.path.relpath(config.problems),
            problems=len(job.problems),
            form=job.form,
            max_tokens=job.max_tokens,
            repeats=job.repeats,
            concurrency=job.concurrency,
            dtype=job.dtype,
            seed=job.seed,
            walls=job.limits.walls,
            interleaved=outcome.interleaved,
        ),
        arms={
            name: ComparedArm(label=job.specs[name].label, acceptance=outcome.drafts.acceptance(name)) for name in ARMS
        },
        problems=[],
    )
    if outcome.first is None:
        return structs.replace(without, failures=dict(outcome.failures))
    judgement = judge(outcome.first, outcome.fresh, job.seed)
    if outcome.drafts.drafts(CANDIDATE) == 0 and config.draft is not None:
        reason = "the candidate was given a drafter that never drafted: nothing but plain decoding was compared"
        judgement = structs.replace(judgement, verdict=COULD_NOT_TELL, reasons=[reason])
    return structs.replace(without, **structs.asdict(judgement), problems=list_problems(outcome.first.cases))


def list_problems(cases: Sequence[Case]) -> list[ComparedProblem]:
    """Every problem with its grades, the baseline's first."""
    return [
        ComparedProblem(
            task_id=case.task_id,
            tokens=[len(answer.token_ids) for answer in case.answers],
            grades=list(case.grades),
        )
        for case in cases
    ]


def make_job(config: InvarianceConfig, environment: Environment) -> Job:
    """Everything that can be refused before an engine starts.

    Raises:
        ProblemsError, CheckpointError: an input cannot be used, or the folder holds other answers.
        EngineError: an engine could not be started.
        JailError: there is no sandbox on this system, and nobody said to do without.
    """
    check_out(config.out)
    problems = load_problems(config.problems)
    if config.num_problems is not None and config.num_problems > len(problems):
        expected = f"expected at most {len(problems)}, got {config.num_problems}"
        raise ProblemsError(f"--num-problems: {expected}; the file has no more problems")
    problems = problems[: config.num_problems]
    specs = {name: make_spec(config, name) for name in ARMS}
    folder = config.out / "answers"
    if not is_begun(folder):
        check_specs(specs.values(), config.max_tokens)
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
    """Choose the sandbox's limits.

    Raises:
        JailError: there is no sandbox on this system, and nobody said to do without.
    """
    if walls == "none":
        print(f"invariance.py: {NO_WALLS_WARNING}", file=sys.stderr)
    return Limits(walls=choose_walls(walls))


def list_settings(config: InvarianceConfig, problems: Sequence[Problem], environment: Environment) -> dict[str, object]:
    """List what decides about the answers. The repeats too: adding some after a look would bend the tests."""
    work = ("prefix_caching", "baseline_url", "candidate_url", "form", "max_tokens", "repeats", "concurrency", "seed")
    checkpoints = [fingerprint(path) for name in ENGINE_FLAGS[:3] if (path := getattr(config, name))]
    return {name: getattr(config, name) for name in (*ENGINE_FLAGS, *work)} | {
        "problems": [asdict(problem) for problem in problems],
        "checkpoints": checkpoints,
        "versions": environment.versions,
        "device": None if environment.device is None else environment.device.name,
    }
