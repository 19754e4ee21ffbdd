"""The result of an evaluation on code problems: figures from samples, and a table and a page of them. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from laguna_serve.evals.codegen.pass_at_k import average, average_pass_at_k
from laguna_serve.evals.codegen.runner import Sample

DETAIL_CHARS = 60
# Statuses that say nothing of the program (grading.py).
NOT_JUDGED = ("unjudged", "fault")


def summarise(samples: Sequence[Sample], ks: Sequence[int]) -> dict[str, Any]:
    """pass@k (strict, as the published tests say, and of the base tests where there are such), mean reward, endings,
    weight versions and a row per problem.

    Figures are withheld (None, with the reason in `refused`) while an answer is missing: a request that failed is
    neither passed nor failed.
    """
    groups = [(task_id, list(group)) for task_id, group in groupby(samples, key=lambda sample: sample.task_id)]
    graded = [sample.grade for sample in samples if sample.grade is not None]
    errors = [sample.answer["error"] for sample in samples if sample.grade is None]
    result: dict[str, Any] = {"pass_at_k": None, "published_pass_at_k": None, "reward": None, "refused": []}
    has_base = any(sample.base is not None for sample in samples)
    if errors:
        reason = f"{len(errors)} of {len(samples)} requests failed, one with {errors[0]}; the same command asks again"
        figures = ("pass_at_k", "published_pass_at_k", "reward")
        result["refused"] = [{"figure": figure, "reason": reason} for figure in figures]
    else:
        counts = [(len(group), sum(_passed(sample) for sample in group)) for _, group in groups]
        rewards = [sum(_reward(sample) for sample in group) / len(group) for _, group in groups]
        published = [(len(group), sum(_passed_as_published(sample) for sample in group)) for _, group in groups]
        result["pass_at_k"] = {str(k): average_pass_at_k(counts, k).to_json() for k in ks}
        result["published_pass_at_k"] = {str(k): average_pass_at_k(published, k).to_json() for k in ks}
        result["reward"] = average(rewards).to_json()
        if has_base:
            base = [(len(group), sum(bool(sample.base) for sample in group)) for _, group in groups]
            result["base_pass_at_k"] = {str(k): average_pass_at_k(base, k).to_json() for k in ks}
    versions = Counter(tuple(sample.answer["versions"].items()) for sample in samples if sample.grade)
    return result | {
        "statuses": dict(Counter(grade.status for grade in graded)),
        "not_judged": sum(grade.status in NOT_JUDGED for grade in graded),
        "walls": dict(Counter(grade.walls for grade in graded if grade.walls)),
        "failed_requests": len(errors),
        "truncated": sum(sample.answer.get("finish_reason") == "length" for sample in samples),
        "versions": [{**dict(named), "samples": count} for named, count in versions.items() if named],
        "problems": [_describe(task_id, group) for task_id, group in groups],
    }


def _describe(task_id: str, group: Sequence[Sample]) -> dict[str, Any]:
    graded = [sample.grade for sample in group if sample.grade is not None]
    worst = next((grade for grade in graded if not grade.passed), None)
    base = {"base": sum(bool(sample.base) for sample in group)} if group[0].base is not None else {}
    return {
        "task_id": task_id,
        "samples": len(group),
        **base,
        "graded": len(graded),
        "passed": sum(grade.passed for grade in graded),
        "published": sum(grade.published for grade in graded),
        "reward": sum(grade.reward for grade in graded) / len(graded) if graded else None,
        "statuses": dict(Counter(grade.status for grade in graded)),
        "detail": worst.detail if worst else "",
    }


def _passed(sample: Sample) -> bool:
    return sample.grade is not None and sample.grade.passed


def _passed_as_published(sample: Sample) -> bool:
    return sample.grade is not None and sample.grade.published


def _reward(sample: Sample) -> float:
    return sample.grade.reward if sample.grade is not None else 0.0


def render_text(result: Mapping[str, Any]) -> str:
    """A row per problem, then the figures."""
    rows = result["problems"]
    width = max(len("problem"), *(len(row["task_id"]) for row in rows))
    lines = [f"{'problem':<{width}}  passed  reward  first failure"]
    for row in rows:
        reward = "–" if row["reward"] is None else f"{row['reward']:.2f}"
        passed = f"{row['passed']}/{row['samples']}"
        lines.append(f"{row['task_id']:<{width}}  {passed:>6}  {reward:>6}  {row['detail'][:DETAIL_CHARS]}".rstrip())
    return "\n".join([*lines, "", *tell_figures(result)])


def _tell_template(template: Mapping[str, Any]) -> str:
    return "".join(f", {name} {value}" for name, value in template.items())


def tell_figures(result: Mapping[str, Any]) -> list[str]:
    """pass@k and reward in sentences, or why there are none."""
    if result["refused"]:
        return [f"No figures: {result['refused'][0]['reason']}."]
    figures = {f"pass@{k}": value for k, value in result["pass_at_k"].items()}
    figures |= {f"pass@{k} as published": value for k, value in result["published_pass_at_k"].items()}
    figures |= {f"pass@{k} of the base tests": value for k, value in result.get("base_pass_at_k", {}).items()}
    figures |= {"reward": result["reward"]}
    lines = [
        f"{name} {value['point']:.3f}, 95% interval {value['ci95'][0]:.3f}–{value['ci95'][1]:.3f} ({value['method']})"
        for name, value in figures.items()
    ]
    endings = ", ".join(f"{count} {status}" for status, count in sorted(result["statuses"].items()))
    lines.append(f"Samples: {endings}; {result['truncated']} cut off at max_tokens")
    lines += [f"Programs ran behind: {walls} ({count} of them)" for walls, count in sorted(result["walls"].items())]
    if result["not_judged"]:
        lines.append(
            f"{result['not_judged']} could not be judged (unjudged, fault): counted as not passed, not as wrong"
        )
    return lines


def render_markdown(result: Mapping[str, Any]) -> str:
    """The same as a page."""
    work, environment = result["workload"], result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    kind = "greedy" if not work["temperature"] else f"temperature {work['temperature']:g}, seed {work['seed']}"
    scope = f"{work['samples']} samples of each, {kind}, {work['form']} form,"
    scope += f" protocol {work['protocol']}{_tell_template(work['template'])}, at most {work['max_tokens']} tokens."
    lines = [
        "# Code problems",
        "",
        f"{result['model']} on {len(result['problems'])} problems of {result['problems_file']}; {scope}",
        "",
        *(f"- {line}" for line in tell_figures(result)),
        "",
        "| problem | passed | reward | first failure |",
        "|--|--|--|--|",
    ]
    for row in result["problems"]:
        reward = "–" if row["reward"] is None else f"{row['reward']:.2f}"
        detail = " ".join(row["detail"].replace("|", "\\|").split())
        lines.append(f"| {row['task_id']} | {row['passed']}/{row['samples']} | {reward} | {detail} |")
    where = f"{environment['cpu']}, {environment['cores']} cores, {environment['date']}"
    return "\n".join([*lines, "", f"`{environment['command']}` on {where}; {versions}."]) + "\n"
