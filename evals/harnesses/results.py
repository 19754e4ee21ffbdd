"""Reads what the suites left: result files of lm-evaluation-harness and of evalplus, and this project's own.

Every number becomes a Score with the settings under which it was measured, so that the table can say where two of them
were not measured alike. Files of runs made by hand, without suites.py, are read as well.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec

from laguna_serve.evals.codegen.pass_at_k import average_pass_at_k
from laguna_serve.evals.codegen.result import CodeTasksResult
from laguna_serve.evals.harnesses.code_suites import SamplesResult
from laguna_serve.evals.harnesses.logged_samples import Outcomes, read_logged
from laguna_serve.evals.harnesses.settings import Suite, SuiteError
from laguna_serve.evals.problems.mbpp_splits import describe_split
from laguna_serve.serving.kit.results import JsonObject

NOTE = "suite.json"
Z95 = 1.959964
# evalplus names its files after model, backend and temperature; the model's name is in them alone.
EVALPLUS_NAME = re.compile(r"_[a-z]+_temp_[\d.]+_eval_results$")
EVALPLUS_SETS = {"HumanEval": "HumanEval", "Mbpp": "MBPP"}
# As JSON has it; what a harness was given to generate with is an object.
Setting = str | int | float | bool | JsonObject | None


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One number of one model.

    Attributes:
        value: a share, 0 to 1; `ci95` its 95% interval over questions: Wilson's of the harness's numbers, exact or by
            bootstrap of code.
        n: questions asked.
        settings: what else decides about the number.
        task_versions: of lm-evaluation-harness's tasks that are in the number, the group's own among them.
    """

    value: float
    ci95: tuple[float, float] | None
    n: int
    settings: dict[str, Setting]
    task_versions: dict[str, int | float | str] = {}
    file: str


@dataclass(frozen=True, slots=True)
class Score:
    """A number and where it belongs.

    Attributes:
        suite: a name in suites.toml where task and shots are one's; else the harness's task and its shots.
        metric: with the filter, as "exact_match,strict-match".
        date: seconds since 1970 of its file.
        read_outcomes: what became of single questions; nothing where no file says so.
    """

    model: str
    suite: str
    metric: str
    cell: Cell
    date: float
    read_outcomes: Callable[[], Outcomes] = dict


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """What suites.py notes beside a harness's results. `cut_prompts`: those that did not fit the context."""

    suite: str | None = None
    model: str | None = None
    root: str | None = None
    cut_prompts: int | None = None


class _LmEvalConfig(msgspec.Struct, frozen=True):
    model: str
    fewshot_seed: int | None
    limit: int | float | None
    gen_kwargs: JsonObject | str | None


class _LmEvalCount(msgspec.Struct, frozen=True):
    effective: int


class _LmEval(msgspec.Struct, frozen=True, kw_only=True):
    """results_*.json of lm-evaluation-harness; of a task's `results` the metrics are "name,filter"."""

    config: _LmEvalConfig
    results: dict[str, JsonObject]
    group_subtasks: dict[str, list[str]] = {}
    versions: dict[str, int | float | str | None]
    higher_is_better: dict[str, dict[str, bool | None]] = {}
    shots: dict[str, int] = msgspec.field(name="n-shot")
    samples: dict[str, _LmEvalCount] = msgspec.field(name="n-samples")
    lm_eval_version: str
    model_name: str
    date: float


class _EvalplusSample(msgspec.Struct, frozen=True):
    base_status: str
    plus_status: str | None


class _Evalplus(msgspec.Struct, frozen=True):
    """*_eval_results.json of evalplus: task id → its samples."""

    hash: str
    eval: dict[str, list[_EvalplusSample]]


def read_scores(folder: Path, suites: Sequence[Suite]) -> list[Score]:
    """Every score under a folder, oldest first.

    Raises:
        SuiteError: no result file, or one that is none of the kinds.
    """
    if not folder.is_dir():
        raise SuiteError(f"{folder}: expected a folder of results, got none; check the name")
    scores: list[Score] = []
    for pattern, read in READERS.items():
        for path in sorted(folder.rglob(pattern)):
            try:
                scores += read(path.read_bytes(), path, suites)
            except (msgspec.MsgspecError, LookupError, TypeError, ValueError, ZeroDivisionError) as error:
                expected = f"expected results as {pattern} holds them, got {type(error).__name__}: {error}"
                raise SuiteError(f"{path}: {expected}; remove the file or run its suite again") from None
    if not scores:
        raise SuiteError(f"{folder}: expected result files ({', '.join(READERS)}), got none; run a suite into it")
    return sorted(scores, key=lambda score: score.date)


def _read_lm_eval(data: bytes, path: Path, suites: Sequence[Suite]) -> Iterator[Score]:
    body = msgspec.json.decode(data, type=_LmEval)
    inner = {name for names in body.group_subtasks.values() for name in names}
    note = _read_note(path)
    for task, results in body.results.items():
        if task in inner:
            continue
        leaves = _find_leaves(task, body.group_subtasks)
        shots = body.shots[leaves[0]]
        suite = next((s for s in suites if s.run != "code" and (s.task, s.shots) == (task, shots)), None)
        names = dict.fromkeys([task, *body.group_subtasks.get(task, ()), *leaves])
        versions = {name: version for name in names if (version := body.versions.get(name)) is not None}
        settings: dict[str, Setting] = {
            "harness": f"lm-eval {body.lm_eval_version}",
            "task_version": _join_versions(task, leaves, versions),
            "shots": shots,
            "seed": body.config.fewshot_seed,
            "chat": body.config.model.endswith("chat-completions"),
            "limit": body.config.limit,
            "generation": body.config.gen_kwargs or None,
            "cut_prompts": note.cut_prompts,
        }
        n = sum(body.samples[leaf].effective for leaf in leaves)
        for key in suite.scores if suite else [key for key, value in results.items() if _is_metric(key, value)]:
            metric, _, name = key.partition(",")
            stderr = results.get(f"{metric}_stderr,{name}")
            cell = Cell(
                value=float(results[key]),
                ci95=_find_interval(results[key], stderr, n, counted=suite is not None),
                n=n,
                settings=settings,
                task_versions=versions,
                file=str(path),
            )
            title = suite.name if suite else f"{task}, {shots}-shot"
            up = body.higher_is_better.get(leaves[0], {}).get(metric, True)
            outcomes = dict if up is None else partial(read_logged, path, leaves, metric, name, sign=1 if up else -1)
            yield Score(body.model_name, title, key.removesuffix(",none"), cell, body.date, outcomes)


def _join_versions(task: str, leaves: Sequence[str], versions: dict[str, int | float | str]) -> str:
    """Join versions as "1", or for a group "2, its 14 tasks 3.1"."""
    if list(leaves) == [task]:
        return str(versions.get(task, "unknown"))
    counts = Counter(str(versions.get(leaf, "unknown")) for leaf in leaves)
    own = [f"{versions[task]}"] if task in versions else []
    return ", ".join(own + [f"its {count} tasks {version}" for version, count in counts.items()])


def _find_leaves(task: str, parts: dict[str, list[str]]) -> list[str]:
    """Find the tasks that were asked under a group's name; the task itself if it is no group."""
    if not parts.get(task):
        return [task]
    return [leaf for part in parts[task] for leaf in _find_leaves(part, parts)]


def _is_metric(key: str, value: object) -> bool:
    return "," in key and "_stderr," not in key and isinstance(value, float)


def _read_note(path: Path) -> Note:
    """Read what suites.py noted beside the harness's results; nothing for a run made by hand."""
    # A harness puts a folder of its own between.
    for folder in list(path.parents)[:2]:
        if (folder / NOTE).is_file():
            return msgspec.json.decode((folder / NOTE).read_bytes(), type=Note)
    return Note()


def _read_evalplus(data: bytes, path: Path, _: Sequence[Suite]) -> Iterator[Score]:
    """Graded by evalplus itself: beside, not in place of, what this project's sandbox says."""
    body = msgspec.json.decode(data, type=_Evalplus)
    if not body.eval:
        raise ValueError("no task in it")
    name = EVALPLUS_SETS[next(iter(body.eval)).partition("/")[0]]
    checks: dict[str, Callable[[_EvalplusSample], bool]] = {
        name: lambda sample: sample.base_status == "pass",
        f"{name}+": lambda sample: sample.base_status == sample.plus_status == "pass",
    }
    # evalplus asks for the extra tests unless --base-only was given.
    if next(iter(body.eval.values()))[0].plus_status is None:
        del checks[f"{name}+"]
    for suite, passed in checks.items():
        counts = {task: (len(samples), sum(map(passed, samples))) for task, samples in body.eval.items()}
        settings: dict[str, Setting] = {"harness": "evalplus, graded by itself", "task_version": body.hash}
        yield _make_pass_score(EVALPLUS_NAME.sub("", path.stem), f"{suite} (evalplus)", counts, settings, path)


def _read_samples(data: bytes, path: Path, _: Sequence[Suite]) -> Iterator[Score]:
    body = msgspec.json.decode(data, type=SamplesResult)
    settings: dict[str, Setting] = {"harness": "evalplus's samples, graded in our sandbox"}
    counts = {"plus": body.counts, "base": body.base_counts} if body.base_counts else {"": body.counts}
    for part, found in counts.items():  # whose, the file does not say
        yield replace(
            _make_pass_score(
                body.model, body.suite, {str(place): count for place, count in enumerate(found)}, settings, path, part
            ),
            read_outcomes=dict,
        )


def _read_code_tasks(data: bytes, path: Path, _: Sequence[Suite]) -> Iterator[Score]:
    body = msgspec.json.decode(data, type=CodeTasksResult)
    if body.refused:
        raise ValueError(body.refused[0].reason)
    name = Path(body.problems_file).name if body.file is None else body.file.name
    split = None if body.file is None else body.file.split
    suite = _read_note(path).suite or f"code, {name}"
    work = body.workload
    settings: dict[str, Setting] = {
        "harness": "code_tasks.py",
        "protocol": work.protocol,
        "form": work.form,
        "temperature": work.temperature,
        "max_tokens": work.max_tokens,
        "samples": work.samples,
        **work.template,
        "split": describe_split(split) if split else None,
        "data": name if body.file is None else f"{name} ({body.file.sha256[:12]})",
        "prompt_file": None if body.prompt_file is None else body.prompt_file.sha256,
    }
    rows = body.problems
    # What compares with others' figures is the verdict of the tests as published; results before it had one only.
    plus = {row.task_id: (row.samples, row.passed if row.published is msgspec.UNSET else row.published) for row in rows}
    base = {row.task_id: (row.samples, row.base) for row in rows if row.base is not msgspec.UNSET}
    yield _make_pass_score(body.model, suite, plus, settings, path, "plus" if base else "")
    if base:
        yield _make_pass_score(body.model, suite, base, settings, path, "base")


def _make_pass_score(
    model: str,
    suite: str,
    counts: Mapping[str, tuple[int, int]],
    settings: dict[str, Setting],
    path: Path,
    part: str = "",
) -> Score:
    """pass@1 over problems, from (samples, passed) of each; `part`: of evalplus's two, "base" or "plus"."""
    estimate = average_pass_at_k([*counts.values()], 1)
    cell = Cell(value=estimate.point, ci95=estimate.ci95, n=len(counts), settings=settings, file=str(path))
    shares = {task: passed / samples for task, (samples, passed) in counts.items() if samples}
    return Score(model, suite, f"pass@1 {part}".rstrip(), cell, path.stat().st_mtime, lambda: shares)


def _find_interval(value: float, stderr: object, n: int, counted: bool) -> tuple[float, float] | None:
    """Find the 95% interval of a score.

    Wilson's of questions that are right or wrong, as all pinned metrics count them; else from the harness's standard
    error, which is 0 where all are right or all wrong.

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.
    """
    if not counted:
        return (value - Z95 * stderr, value + Z95 * stderr) if isinstance(stderr, float) else None
    spread = Z95**2 / n
    middle = (value + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * math.sqrt(value * (1 - value) / n + spread / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


READERS: dict[str, Callable[[bytes, Path, Sequence[Suite]], Iterator[Score]]] = {
    "results_*.json": _read_lm_eval,
    "*_eval_results.json": _read_evalplus,
    "samples.json": _read_samples,
    "code_tasks.json": _read_code_tasks,
}
