"""Reads what the suites left: result files of lm-evaluation-harness and of evalplus, and this project's own.

Every number becomes a Score with the settings under which it was measured, so that the table can say where two of them
were not measured alike. Files of runs made by hand, without suites.py, are read as well.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from laguna_serve.evals.codegen.pass_at_k import average_pass_at_k
from laguna_serve.evals.harnesses.code_suites import SAMPLES_SCHEMA
from laguna_serve.evals.harnesses.settings import Suite, SuiteError
from laguna_serve.evals.problems.mbpp_splits import describe_split

CODE_SCHEMA = "laguna_serve.code_tasks/1"
NOTE = "suite.json"
Z95 = 1.959964
# evalplus names its files after model, backend and temperature; the model's name is in them alone.
EVALPLUS_NAME = re.compile(r"_[a-z]+_temp_[\d.]+_eval_results$")
EVALPLUS_SETS = {"HumanEval": "HumanEval", "Mbpp": "MBPP"}


@dataclass(frozen=True, slots=True)
class Score:
    """One number of one model.

    Attributes:
        suite: a name in suites.toml where task and shots are one's; else the harness's task and its shots.
        metric: with the filter, as "exact_match,strict-match".
        value: a share, 0 to 1; `ci95` its 95% interval over questions: Wilson's of the harness's numbers, exact or by
            bootstrap of code.
        n: questions asked.
        settings: what else decides about the number.
        date: seconds since 1970 of its file.
        versions: of lm-evaluation-harness's tasks that are in the number, the group's own among them.
    """

    model: str
    suite: str
    metric: str
    value: float
    ci95: tuple[float, float] | None
    n: int
    settings: dict[str, Any]
    file: str
    date: float
    versions: dict[str, Any] = field(default_factory=dict)


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
                scores += read(json.loads(path.read_text(encoding="utf-8")), path, suites)
            except (KeyError, TypeError, ValueError, IndexError, AttributeError, ZeroDivisionError) as error:
                expected = f"expected results as {pattern} holds them, got {type(error).__name__}: {error}"
                raise SuiteError(f"{path}: {expected}; remove the file or run its suite again") from None
    if not scores:
        raise SuiteError(f"{folder}: expected result files ({', '.join(READERS)}), got none; run a suite into it")
    return sorted(scores, key=lambda score: score.date)


def _read_lm_eval(body: dict[str, Any], path: Path, suites: Sequence[Suite]) -> Iterator[Score]:
    parts = body.get("group_subtasks", {})
    inner = {name for names in parts.values() for name in names}
    chat = body["config"]["model"].endswith("chat-completions")
    note = _read_note(path)
    for task, results in body["results"].items():
        if task in inner:
            continue
        leaves = _find_leaves(task, parts)
        shots = body["n-shot"][leaves[0]]
        suite = next((s for s in suites if s.run != "code" and (s.task, s.shots) == (task, shots)), None)
        names = dict.fromkeys([task, *parts.get(task, ()), *leaves])
        versions = {name: body["versions"][name] for name in names if body["versions"].get(name) is not None}
        settings = {
            "harness": f"lm-eval {body['lm_eval_version']}",
            "task_version": _tell_versions(task, leaves, versions),
            "shots": shots,
            "seed": body["config"]["fewshot_seed"],
            "chat": chat,
            "limit": body["config"]["limit"],
            "generation": body["config"]["gen_kwargs"] or None,
            "cut_prompts": note.get("cut_prompts"),
        }
        n = sum(body["n-samples"][leaf]["effective"] for leaf in leaves)
        for key in suite.scores if suite else [key for key, value in results.items() if _is_metric(key, value)]:
            metric, _, name = key.partition(",")
            stderr = results.get(f"{metric}_stderr,{name}")
            yield Score(
                model=body["model_name"],
                suite=suite.name if suite else f"{task}, {shots}-shot",
                metric=key.removesuffix(",none"),
                value=results[key],
                ci95=_find_interval(results[key], stderr, n, counted=suite is not None),
                n=n,
                settings=settings,
                file=str(path),
                date=body["date"],
                versions=versions,
            )


def _tell_versions(task: str, leaves: Sequence[str], versions: dict[str, Any]) -> str:
    """As "1", or of a group "2, its 14 tasks 3.1"."""
    if list(leaves) == [task]:
        return str(versions.get(task, "unknown"))
    counts = Counter(str(versions.get(leaf, "unknown")) for leaf in leaves)
    own = [f"{versions[task]}"] if task in versions else []
    return ", ".join(own + [f"its {count} tasks {version}" for version, count in counts.items()])


def _find_leaves(task: str, parts: dict[str, list[str]]) -> list[str]:
    """The tasks that were asked under a group's name; the task itself if it is no group."""
    if not parts.get(task):
        return [task]
    return [leaf for part in parts[task] for leaf in _find_leaves(part, parts)]


def _is_metric(key: str, value: Any) -> bool:
    return "," in key and "_stderr," not in key and isinstance(value, float)


def _read_note(path: Path) -> dict[str, Any]:
    """What suites.py noted beside the harness's results; nothing for a run made by hand."""
    # A harness puts a folder of its own between.
    for folder in list(path.parents)[:2]:
        if (folder / NOTE).is_file():
            note: dict[str, Any] = json.loads((folder / NOTE).read_text(encoding="utf-8"))
            return note
    return {}


def _read_evalplus(body: dict[str, Any], path: Path, _: Sequence[Suite]) -> Iterator[Score]:
    """Graded by evalplus itself: beside, not in place of, what this project's sandbox says."""
    tasks = body["eval"]
    if not tasks:
        raise ValueError("no task in it")
    name = EVALPLUS_SETS[next(iter(tasks)).partition("/")[0]]
    checks: dict[str, Callable[[dict[str, Any]], bool]] = {
        name: lambda sample: sample["base_status"] == "pass",
        f"{name}+": lambda sample: sample["base_status"] == sample["plus_status"] == "pass",
    }
    # evalplus asks for the extra tests unless it was told --base-only.
    if next(iter(tasks.values()))[0]["plus_status"] is None:
        del checks[f"{name}+"]
    for suite, passed in checks.items():
        counts = [(len(samples), sum(map(passed, samples))) for samples in tasks.values()]
        settings = {"harness": "evalplus, graded by itself", "task_version": body["hash"]}
        yield _make_pass_score(EVALPLUS_NAME.sub("", path.stem), f"{suite} (evalplus)", counts, settings, path)


def _read_samples(body: dict[str, Any], path: Path, _: Sequence[Suite]) -> Iterator[Score]:
    if body["schema"] != SAMPLES_SCHEMA:
        raise ValueError(f"schema {body['schema']!r}")
    settings = {"harness": "evalplus's samples, graded in our sandbox"}
    counts = {"plus": body["counts"], "base": body["base_counts"]} if "base_counts" in body else {"": body["counts"]}
    for part, found in counts.items():
        yield _make_pass_score(body["model"], body["suite"], found, settings, path, part)


def _read_code_tasks(body: dict[str, Any], path: Path, _: Sequence[Suite]) -> Iterator[Score]:
    if body["schema"] != CODE_SCHEMA:
        raise ValueError(f"schema {body['schema']!r}")
    if body["refused"]:
        raise ValueError(body["refused"][0]["reason"])
    file = body.get("file") or {"name": Path(body["problems_file"]).name, "split": None}
    suite = _read_note(path).get("suite") or f"code, {file['name']}"
    work = body["workload"]
    asked = {name: work[name] for name in ("protocol", "form", "temperature", "max_tokens", "samples") if name in work}
    settings = {
        "harness": "code_tasks.py",
        **asked,
        **work.get("template", {}),
        "split": describe_split(file["split"]) if file["split"] else None,
        "data": f"{file['name']} ({file['sha256'][:12]})" if "sha256" in file else file["name"],
        "prompt_file": (body.get("prompt_file") or {}).get("sha256"),
    }
    rows = body["problems"]
    # What compares with others' figures is the verdict of the tests as published; results before it had one only.
    plus = [(row["samples"], row.get("published", row["passed"])) for row in rows]
    has_base = bool(rows) and "base" in rows[0]
    yield _make_pass_score(body["model"], suite, plus, settings, path, "plus" if has_base else "")
    if has_base:
        base = [(row["samples"], row["base"]) for row in rows]
        yield _make_pass_score(body["model"], suite, base, settings, path, "base")


def _make_pass_score(
    model: str, suite: str, counts: Sequence[Sequence[int]], settings: dict[str, Any], path: Path, part: str = ""
) -> Score:
    """pass@1 over problems, from (samples, passed) of each; `part`: of evalplus's two, "base" or "plus"."""
    estimate = average_pass_at_k([(samples, passed) for samples, passed in counts], 1)
    date = path.stat().st_mtime
    metric = f"pass@1 {part}".rstrip()
    return Score(model, suite, metric, estimate.point, estimate.ci95, len(counts), settings, str(path), date)


def _find_interval(value: float, stderr: Any, n: int, counted: bool) -> tuple[float, float] | None:
    """95%: Wilson's of questions that are right or wrong, as all pinned metrics count them; else from the harness's
    standard error, which is 0 where all are right or all wrong.

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.
    """
    if not counted:
        return (value - Z95 * stderr, value + Z95 * stderr) if isinstance(stderr, float) else None
    spread = Z95**2 / n
    middle = (value + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * math.sqrt(value * (1 - value) / n + spread / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


READERS: dict[str, Callable[[dict[str, Any], Path, Sequence[Suite]], Iterator[Score]]] = {
    "results_*.json": _read_lm_eval,
    "*_eval_results.json": _read_evalplus,
    "samples.json": _read_samples,
    "code_tasks.json": _read_code_tasks,
}
