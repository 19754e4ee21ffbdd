"""What a distillation leaves behind besides the student: figures, logs, pictures, digests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType, structs

from laguna_serve.serving.kit.environment import Environment
from laguna_serve.serving.kit.files import hash_file
from laguna_serve.serving.kit.results import to_json

SCHEMA = "laguna_serve.distillation/1"
MANIFEST = "MANIFEST.json"


class StoreFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The logit store that stage 2 learned from.

    Attributes:
        top_k: tokens of the teacher's distribution at each place.
        places: tokens of the assistant that were predicted.
        bytes: of the shards.
        tail_mass: mean mass of the tokens that are not kept.
        source: "forward" or the endpoint that was asked.
    """

    top_k: int
    places: int
    bytes: int
    tail_mass: float
    source: str


class DistillResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag=SCHEMA):
    """A student, as it was made: the report with the training's logs, the manifest beside the checkpoint with digests.

    Attributes:
        widths: of its layers.
        parameters: of the "teacher", of the student's "true" widths, and as "stored" with padding.
        minutes: of each stage, earlier runs that were stopped included.
        measured: held-out figures after each stage (training/dense/stages.py).
        logs: records of each stage's steps.
        sha256: of every file of the checkpoint.
        store: where stage 2 learned from one.
        curve: held-out figures at some of stage 2's steps, where they were asked for.
    """

    environment: Environment
    teacher: str
    recipe: dict[str, bool | int | float | str]
    widths: tuple[int, ...]
    parameters: dict[str, int]
    minutes: dict[str, float]
    measured: dict[str, dict[str, float]]
    logs: dict[str, list[dict[str, int | float]]] | UnsetType = UNSET
    sha256: dict[str, str] | UnsetType = UNSET
    store: StoreFigures | UnsetType = UNSET
    curve: list[dict[str, float]] | UnsetType = UNSET


def format_measured(result: DistillResult) -> str:
    """Format the held-out figures, a line for each stage."""
    stages = result.measured.items()
    return "\n".join(f"{stage}: {', '.join(f'{n} {v:.4g}' for n, v in figures.items())}" for stage, figures in stages)


def write_report(result: DistillResult, report: Path) -> None:
    """Write distillation.json and the pictures."""
    from laguna_serve.scripts.training.dense.report.plot import draw_blocks, draw_curve, draw_student

    report.mkdir(parents=True, exist_ok=True)
    environment = result.environment
    parts = [f"teacher {result.teacher}", f"{environment.cpu}, {environment.cores} cores", environment.date[:10]]
    source = "  ·  ".join(parts)
    assert not isinstance(result.logs, UnsetType)
    draw_blocks(result.logs["stage1"], report / "stage1_nmse.png", source)
    draw_student(result.logs["stage2"], report / "stage2_kl.png", source)
    if not isinstance(result.curve, UnsetType):
        draw_curve(result.curve, report / "stage2_held_out.png", source)
    (report / "distillation.json").write_text(json.dumps(to_json(result)) + "\n", encoding="utf-8")


def write_manifest(result: DistillResult, out: Path) -> None:
    """Write what was made, how and from what, with a SHA-256 of every file; beside the checkpoint."""
    files = sorted(path for path in out.iterdir() if path.is_file() and path.suffix != ".md")
    digests = {path.name: hash_file(path) for path in files if path.name != MANIFEST}
    text = json.dumps(to_json(structs.replace(result, logs=UNSET, sha256=digests)), indent=1)
    (out / MANIFEST).write_text(text + "\n", encoding="utf-8")


def round_floats(value: Any, digits: int = 5) -> Any:
    """Round every float to so many significant digits: logs are read by people."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: round_floats(item, digits) for key, item in value.items()}
    return [round_floats(item, digits) for item in value] if isinstance(value, list) else value
