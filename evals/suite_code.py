"""HumanEval, HumanEval+ and MBPP: model-written code, which runs in this project's sandbox and nowhere else.

lm-evaluation-harness runs such code in its own process (--confirm_run_unsafe_code) and evalplus in a fork of its own:
neither grades here. HumanEval and MBPP are asked and graded by code_tasks.py. HumanEval+ is asked by evalplus, with its
prompt and its way of cutting the code out, and graded by grading.py; so are samples that evalplus wrote elsewhere.
"""

from __future__ import annotations

import ast
import gzip
import json
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from laguna_serve.evals.grading import Grade, Limits, grade
from laguna_serve.evals.problems import Problem, load_problems
from laguna_serve.evals.sandbox import choose_walls
from laguna_serve.evals.suite_harness import Target, find_harness, run_logged
from laguna_serve.evals.suite_settings import Suite, SuiteError
from laguna_serve.serving.kit.files import write_json, write_text
from laguna_serve.serving.kit.progress import Progress

SAMPLES_SCHEMA = "laguna_serve.suite_samples/1"
# evalplus refuses a file without these, but reads only the prompt and the function's name when it asks a model.
UNREAD_BY_CODEGEN = {"contract": "", "base_input": [], "plus_input": [], "atol": 0}


def run_code_suite(suite: Suite, target: Target, data: Path | None, folder: Path, progress: Progress) -> None:
    """One suite of code problems, into `folder`.

    Raises:
        SuiteError: no problems, or a command failed.
        ProblemsError: a problem is not of HumanEval's schema.
    """
    if suite.name == "humaneval-plus" and not target.chat:
        raise SuiteError("humaneval-plus: expected --chat, as evalplus asks chat endpoints only, got none; add it")
    problems = read_problems(suite, data, folder)[: target.limit]
    file = write_problems(problems, folder / "problems.jsonl")
    if suite.name == "humaneval-plus":
        samples = ask_by_evalplus(target, file, folder, progress)
        grade_samples(samples, problems, target.model, suite.name, folder, progress)
        return
    command = [sys.executable, str(Path(__file__).resolve().parent / "code_tasks.py"), "--base-url", target.base_url]
    command += ["--model", target.model, "--problems", str(file), "--form", "chat" if target.chat else "completion"]
    command += ["--concurrency", str(target.concurrency), "--out", str(folder / "code_tasks")]
    if os.environ.get("OPENAI_API_KEY"):
        command += ["--api-key-env", "OPENAI_API_KEY"]
    run_logged(suite.name, command, os.environ, folder / "code_tasks.log", progress)


def read_problems(suite: Suite, data: Path | None, folder: Path) -> list[Problem]:
    """The suite's problems from the folder of local data sets; MBPP's own fields are brought into HumanEval's."""
    if data is None:
        raise SuiteError(
            f"{suite.name}: expected --data with {suite.data}/test.jsonl, got none; code suites read files"
        )
    names = ("test.jsonl", "test.jsonl.gz")
    found = [path for name in names if (path := data / suite.data / name).is_file()]
    if not found:
        expected = f"expected {data / suite.data}/{' or '.join(names)}, got neither"
        raise SuiteError(f"--data: {expected}; put the data set's file there")
    if suite.name != "mbpp":
        return load_problems(found[0])
    return read_mbpp(found[0])


def read_mbpp(path: Path) -> list[Problem]:
    """MBPP's file, .jsonl or .jsonl.gz, as problems in HumanEval's form.

    Raises:
        SuiteError: a line is no row of it.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    problems = []
    with opened(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                problems.append(convert_mbpp(line, f"{path}:{number}"))
    return problems


def convert_mbpp(line: str, where: str) -> Problem:
    """A line of MBPP (text or prompt, code, test_list) as a problem in HumanEval's form.

    The prompt is bigcode-evaluation-harness's, task and tests in a docstring, followed by the function's first line
    from the reference solution: problems of this form end in an unfinished function.

    Raises:
        SuiteError: the row has other fields, or its tests call no function of its solution.
    """
    try:
        row = json.loads(line)
        text, code, tests = row.get("text") or row["prompt"], row["code"], row["test_list"]
        code = code.replace("\r\n", "\n").replace("\r", "\n")
        functions = {node.name: node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)}
        called = {node.id for node in ast.walk(ast.parse("\n".join(tests))) if isinstance(node, ast.Name)}
        function = next(functions[name] for name in functions if name in called)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, SyntaxError, StopIteration) as error:
        expected = "expected MBPP's text, code and test_list, the tests calling the code's function"
        raise SuiteError(f"{where}: {expected}, got {type(error).__name__}: {error}; export the set again") from None
    setup = "\n".join([*(row.get("test_imports") or []), row.get("test_setup_code") or ""])
    checks = "\n".join(f"    {line}" for line in [f"{function.name} = candidate", *map(str.strip, tests)])
    listed = "\n".join(tests)
    return Problem(
        task_id=f"Mbpp/{row['task_id']}",
        prompt=f'"""\n{text}\n{listed}\n"""\ndef {function.name}({ast.unparse(function.args)}):\n',
        entry_point=function.name,
        test=f"{setup}\n\ndef check(candidate):\n{checks}\n".lstrip(),
        # The prompt ends in the function's first line; the reference solution is a whole program of its own.
        canonical_solution=f"    pass\n\n\n{code.rstrip()}\n",
    )


def write_problems(problems: Sequence[Problem], path: Path) -> Path:
    """As JSON Lines."""
    write_text(path, "".join(json.dumps(asdict(problem)) + "\n" for problem in problems))
    return path


def ask_by_evalplus(target: Target, problems: Path, folder: Path, progress: Progress) -> Path:
    """Greedy answers to the problems by evalplus.codegen; it goes on where it was cut off. Returns its samples."""
    harness = find_harness()
    rows = [json.loads(line) for line in problems.read_text(encoding="utf-8").splitlines()]
    override = folder / "evalplus.jsonl"
    write_text(override, "".join(json.dumps(row | UNREAD_BY_CODEGEN) + "\n" for row in rows))
    command = [str(harness.python), "-m", "evalplus.codegen", "--model", target.model]
    command += ["--dataset", "humaneval", "--backend", "openai", "--base-url", f"{target.base_url}/v1", "--greedy"]
    command += ["--root", str(folder)]
    environment = {"OPENAI_API_KEY": "none", **os.environ, "HUMANEVAL_OVERRIDE_PATH": str(override)}
    run_logged("humaneval-plus", command, environment, folder / "evalplus.log", progress)
    written = [path for path in (folder / "humaneval").glob("*.jsonl") if not path.name.endswith(".raw.jsonl")]
    if len(written) != 1:
        raise SuiteError(f"humaneval-plus: expected one file of samples by evalplus, got {len(written)} in {folder}")
    return written[0]


def load_samples(path: Path, problems: Sequence[Problem]) -> list[tuple[Problem, str]]:
    """evalplus's samples: lines of task_id and solution (a program) or completion (what follows the prompt).

    Raises:
        SuiteError: a line is none, names an unknown problem, or a problem has no sample.
    """
    by_id = {problem.task_id: problem for problem in problems}
    samples = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SuiteError(f"{path}: expected evalplus's samples, got {error}; check --samples") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            problem = by_id[row["task_id"]]
            program = row["solution"] if "solution" in row else problem.prompt + row["completion"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            expected = 'expected {"task_id": of the problems, "solution": …}'
            raise SuiteError(f"{path}:{number}: {expected}, got {type(error).__name__}: {error}") from None
        samples.append((problem, str(program)))
    missing = sorted(by_id.keys() - {problem.task_id for problem, _ in samples})
    if missing:
        expected = f"expected a sample of each of the {len(by_id)} problems, got none of {len(missing)}"
        raise SuiteError(f"{path}: {expected}, {missing[0]} the first; give the problems that were asked")
    return samples


def grade_samples(
    file: Path, problems: Sequence[Problem], model: str, suite: str, folder: Path, progress: Progress
) -> Path:
    """Grade every sample in the sandbox; writes samples.jsonl and samples.json into `folder`, returns the latter.

    Raises:
        SuiteError: a line is no sample, or a problem has none.
        JailError: no walls can be had on this system.
    """
    samples = load_samples(file, problems)
    limits = Limits(walls=choose_walls())
    progress.begin()
    grades: dict[str, list[Grade]] = defaultdict(list)
    lines = []
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        for done, (sample, verdict) in enumerate(
            zip(samples, pool.map(lambda sample: grade(sample[0], sample[1], limits), samples), strict=True), start=1
        ):
            grades[sample[0].task_id].append(verdict)
            lines.append(json.dumps({"task_id": sample[0].task_id, "solution": sample[1], **asdict(verdict)}) + "\n")
            progress.step("graded", done, len(samples))
    write_text(folder / "samples.jsonl", "".join(lines))
    # As published: a suite's figure is there to be compared with others'.
    counts = [(len(verdicts), sum(verdict.published for verdict in verdicts)) for verdicts in grades.values()]
    path = folder / "samples.json"
    write_json(
        path, {"schema": SAMPLES_SCHEMA, "suite": suite, "model": model, "walls": limits.walls, "counts": counts}
    )
    return path
