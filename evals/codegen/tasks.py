"""An evaluation on code problems: asking and grading, and the check of the problems' own solutions."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from msgspec import to_builtins

from laguna_serve.evals.codegen.canonical import CanonicalResult, check_solutions, count_tests, list_failing
from laguna_serve.evals.codegen.config import CodeTasksConfig
from laguna_serve.evals.codegen.grading import Limits
from laguna_serve.evals.codegen.report import render_markdown
from laguna_serve.evals.codegen.result import Asked, CodeTasksResult, FileDigest, ProblemsFile, summarise
from laguna_serve.evals.codegen.runner import Sample, Workload, run_samples
from laguna_serve.evals.codegen.weak_tests import Weakness, find_weaknesses, tell_weaknesses
from laguna_serve.evals.problems import Problem, ProblemsError, find_form, load_problems, read_rows
from laguna_serve.evals.problems.cruxeval_rows import fill_asked
from laguna_serve.evals.problems.protocols import (
    CPU_S,
    PROTOCOLS,
    SLOW,
    SLOW_CPU_S,
    check_asking,
    choose_protocol,
)
from laguna_serve.evals.sandbox import NO_WALLS_WARNING, choose_walls
from laguna_serve.serving.client.openai_endpoint import Endpoint
from laguna_serve.serving.kit.environment import current_argv, read_environment
from laguna_serve.serving.kit.files import hash_file, write_text
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import write_result
from laguna_serve.serving.kit.run_dir import claim_folder, fingerprint, hold_out

# Of the wall limit to the limit of CPU seconds: grading shares the machine with the engine.
WALL_PER_CPU = 2.5


@dataclass(frozen=True, slots=True)
class Work:
    """What a configuration asks for, with what it leaves open filled in."""

    problems: list[Problem]
    file: ProblemsFile
    workload: Workload
    limits: Limits


@hold_out
def evaluate_code(config: CodeTasksConfig) -> CodeTasksResult:
    """Ask for every sample that `config.out` lacks, grade it, and write code_tasks.json and code_tasks.md there.

    Raises:
        ProblemsError: the file cannot be used, or not in this way.
        JailError: there is no sandbox on this system, and the configuration does not say to do without.
        EndpointError: no endpoint. A request that fails is no error: the result counts it.
        RunDirError, JournalError: the folder holds another measurement, or lines that cannot be read.
    """
    assert config.base_url is not None
    assert config.out is not None
    work = prepare(config)
    environment = read_environment(current_argv())
    weaknesses = None if config.skip_probes else probe(work.problems, work.limits)
    model, root, samples = asyncio.run(_run(config, work))
    asked = Asked(
        environment=environment,
        base_url=config.base_url,
        model=model,
        root=root,
        problems_file=os.path.relpath(config.problems),
        file=work.file,
        prompt_file=None if config.prompt_file is None else digest_file(config.prompt_file),
        workload=work.workload,
        limits=work.limits,
        weak_problems=None if weaknesses is None else list_weak(weaknesses),
    )
    result = summarise(asked, samples, sorted(set(config.k)))
    write_result(config.out / "code_tasks.json", result)
    write_text(config.out / "code_tasks.md", render_markdown(result))
    return result


@hold_out
def check_canonical(config: CodeTasksConfig) -> CanonicalResult:
    """Grade the problems' own solutions, with `config.out` only those that it lacks, and write canonical.json there.

    Raises:
        ProblemsError, JailError, RunDirError, JournalError: see `evaluate_code`.
    """
    work, environment, progress = prepare(config), read_environment(current_argv()), Progress()
    settings = {
        "file": to_builtins(work.file),
        "protocol": work.workload.protocol,
        "limits": asdict(work.limits),
    }
    if config.out is not None:
        claim_folder(config.out, settings)
    progress.begin()
    checked = check_solutions(
        work.problems, work.limits, config.out, lambda done, total: progress.step("solutions", done, total)
    )
    weaknesses = None if config.skip_probes else probe(work.problems, work.limits)
    tests = count_tests(checked)
    result = CanonicalResult(
        walls=work.limits.walls,
        file=work.file,
        protocol=work.workload.protocol,
        limits=work.limits,
        problems=len(checked),
        passing=sum(one.passes for one in checked),
        tests=sum(tests.values()),
        failing=list_failing(checked),
        tests_of=tests,
        weak=list_weak(weaknesses or []),
        environment=environment,
    )
    if config.out is not None:
        write_result(config.out / "canonical.json", result)
    return result


def prepare(config: CodeTasksConfig) -> Work:
    """Prepare the problems that are asked and the limits of programs.

    Protocol, tokens and time are as the file's form has them.

    Raises:
        ProblemsError: the file cannot be used, or not in this way.
        JailError: there is no sandbox on this system, and the configuration does not say to do without.
    """
    problems = choose_problems(config)
    form = find_form(next(read_rows(config.problems))[1])
    protocol = choose_protocol(form, config.protocol or "")
    if not config.check_canonical:
        check_asking(protocol, config.form)
    if config.prompt_file is not None:
        problems = fill_asked(problems, config.prompt_file)
    workload = Workload(
        form=config.form,
        samples=config.samples,
        temperature=config.temperature,
        max_tokens=config.max_tokens or PROTOCOLS[protocol].max_tokens,
        seed=config.seed,
        concurrency=config.concurrency,
        protocol=protocol,
        template=config.template,
    )
    digest = digest_file(config.problems)
    file = ProblemsFile(digest.name, digest.sha256, config.split, config.limit, list(config.only) or None)
    return Work(problems, file, workload, make_limits(config, SLOW_CPU_S if form in SLOW else CPU_S))


def choose_problems(config: CodeTasksConfig) -> list[Problem]:
    """Choose the problems of the file that are asked.

    Raises:
        ProblemsError: the file cannot be used, or lacks one that was asked for.
    """
    problems = load_problems(config.problems, config.protocol or "", config.split or "")[: config.limit]
    if unknown := set(config.only) - {problem.task_id for problem in problems}:
        expected = f"expected task ids of {config.problems.name}, such as {problems[0].task_id}"
        raise ProblemsError(f"--only: {expected}, got {', '.join(sorted(unknown))}")
    return [problem for problem in problems if not config.only or problem.task_id in config.only]


def make_limits(config: CodeTasksConfig, usual_s: int) -> Limits:
    """Make the sandbox's limits.

    Raises:
        JailError: there is no sandbox on this system, and the configuration does not say to do without.
    """
    if config.walls == "none":
        print(f"code_tasks.py: {NO_WALLS_WARNING}", file=sys.stderr)
    cpu_s = config.timeout_s or usual_s
    return Limits(
        cpu_s=cpu_s,
        wall_s=cpu_s * WALL_PER_CPU,
        memory_bytes=config.memory_mib << 20,
        packages=config.packages,
        walls=choose_walls(config.walls),
    )


def digest_file(path: Path) -> FileDigest:
    """Identify a file by its name and what is in it."""
    return FileDigest(path.name, hash_file(path))


def probe(problems: Sequence[Problem], limits: Limits) -> list[Weakness] | None:
    """Find out, and say, which problems universal wrong answers pass; None where no problem asks for a function."""
    # A constant may well be the right value.
    problems = [problem for problem in problems if problem.kind == "function"]
    if not problems:
        return None
    progress = Progress()
    progress.begin()
    weaknesses = find_weaknesses(
        problems, limits, lambda done, total: progress.step("universal wrong answers", done, total)
    )
    for line in tell_weaknesses(weaknesses):
        progress.say(line)
    return weaknesses


def list_weak(weaknesses: Sequence[Weakness]) -> list[Weakness]:
    """List the problems that a universal wrong answer passes, or that are at fault themselves."""
    return [weakness for weakness in weaknesses if weakness.published or weakness.strict or weakness.fault]


async def _run(config: CodeTasksConfig, work: Work) -> tuple[str, str | None, list[Sample]]:
    assert config.base_url is not None
    assert config.out is not None
    progress = Progress()
    key = os.environ.get(config.api_key_env) if config.api_key_env else None
    async with Endpoint(config.base_url, model=config.model, api_key=key) as endpoint:
        settings = {name: value for name, value in asdict(work.workload).items() if name != "concurrency"}
        settings |= {"limits": asdict(work.limits), "problems": fingerprint(str(config.problems))}
        if (root := await endpoint.find_checkpoint()) is not None:
            settings |= {"checkpoint": [root, fingerprint(root)]}
        settings |= {"model": endpoint.model, "split": config.split or "", "limit": config.limit}
        settings |= {
            "only": list(config.only) or None,
            "prompt_file": None if config.prompt_file is None else fingerprint(str(config.prompt_file)),
        }
        claim_folder(config.out, settings)
        progress.say(f"{endpoint.model}: {len(work.problems)} problems × {work.workload.samples} samples")
        progress.begin()
        samples = await run_samples(
            endpoint,
            work.problems,
            work.workload,
            work.limits,
            config.out,
            lambda done, total: progress.step("samples", done, total),
        )
        return endpoint.model, root, samples
