"""The frontier's work: scores of every draw, masks, their losses in each format, and what follows from them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoTokenizer

from laguna_serve.plugins.formats.experts import FP8
from laguna_serve.plugins.pruning import ExpertShape, PruningError, read_shape
from laguna_serve.scripts.checkpoints.compaction.base import Base, read_base
from laguna_serve.scripts.checkpoints.compaction.savings import measure_savings
from laguna_serve.scripts.checkpoints.compaction.shards import Compaction
from laguna_serve.scripts.frontier import masks as names
from laguna_serve.scripts.frontier.estimates import (
    Contest,
    Floats,
    Interval,
    compare,
    correlate,
    correlate_draws,
    estimate,
)
from laguna_serve.scripts.frontier.losses import Meter
from laguna_serve.scripts.frontier.masks import Mask, keep_whole, list_masks, weigh_mask
from laguna_serve.scripts.frontier.options import FrontierConfig
from laguna_serve.scripts.frontier.published import CURVES
from laguna_serve.scripts.frontier.result import (
    FrontierCalibration,
    FrontierFormat,
    FrontierPoint,
    FrontierResult,
    FrontierText,
    Repacking,
)
from laguna_serve.scripts.text.rows import TextRows, read_rows
from laguna_serve.scripts.training.pruning.artefacts import choose_block_size
from laguna_serve.scripts.training.pruning.changes import round_experts
from laguna_serve.scripts.training.pruning.measurement import Measurement, open_measurement
from laguna_serve.scripts.training.pruning.scores import SCORES
from laguna_serve.scripts.training.pruning.streaming.layers import Layers
from laguna_serve.scripts.training.pruning.streaming.weights import Weights
from laguna_serve.scripts.training.pruning.teacher import join_layers
from laguna_serve.serving.checkpoint import Target, read_config, read_target, require_folder
from laguna_serve.serving.kit.environment import current_argv, read_environment
from laguna_serve.serving.kit.run_dir import claim_folder, fingerprint

CANDIDATES = (*names.GROUPS, names.WHOLE, names.CONSTANTS)


@dataclass(frozen=True, slots=True)
class Subject:
    """The model that is pruned, and the text that its losses are measured on."""

    folder: Path
    shape: ExpertShape
    base: Base
    target: Target
    block_size: int
    text: TextRows

    @property
    def formats(self) -> dict[str, str]:
        """Name → format of the experts: the model's own, and FP8 where that is another."""
        own = FP8 if self.base.format == FP8 else self.base.dtype.lower()
        return {own: self.base.format, FP8: FP8}


def measure(config: FrontierConfig) -> FrontierResult:
    """Do what the folder lacks, and put the result together. Raises as `measure_frontier`."""
    environment = read_environment(current_argv())
    subject = open_subject(config)
    opened = [open_draw(config, subject, seed) for seed in range(config.seeds)]
    work = config.out / "work"
    claim_folder(work, list_settings(config, subject))  # nothing is refused any more
    draws = [measurement.run(work / f"draw-{seed}") for seed, measurement in enumerate(opened)]
    top_k = subject.target.experts_per_token
    masks = [
        mask
        for seed, draw in enumerate(draws)
        for mask in list_masks(draw, subject.shape, subject.block_size, seed, top_k)
    ]
    meter = Meter(subject.text, subject.shape, work / "losses.jsonl")
    measure_losses(config, subject, meter, masks)
    first = next(iter(subject.formats))
    readings = Readings(meter, masks, first)
    scores = [{name: draw.scores(name) for name in SCORES} for draw in draws]
    return FrontierResult(
        environment=environment,
        model=config.model,
        block_size=subject.block_size,
        text=FrontierText(source=subject.text.source, rows=len(subject.text.rows), targets=int(meter.targets.sum())),
        calibration=FrontierCalibration(
            source=config.calibration,
            draws=len(draws),
            rows=len(draws[0].text.rows),
            available=draws[0].text.available,
            tokens=tuple(draw.text.tokens for draw in draws),
        ),
        formats=tuple(describe_format(subject, meter, name) for name in subject.formats),
        points=tuple(point for name in subject.formats for point in readings.list_points(name, subject)),
        contests=tuple(contest for name in subject.formats for contest in readings.list_contests(name)),
        atoms={f"{name}-atoms": readings.pair(first, f"{name}-atoms", name) for name in names.ATOMS},
        repacking=tuple(
            Repacking(ratio=int(share) / 100, delta=gap.delta, low=gap.low, high=gap.high)
            for share, gap in readings.pair(first, names.REPACKED, names.PARENT).items()
        ),
        correlations=correlate(scores),
        repeatability=correlate_draws(scores),
        published=CURVES,
    )


def open_subject(config: FrontierConfig) -> Subject:
    """Read headers and text; nothing is computed yet."""
    folder = require_folder(config.model)
    shape = read_shape(read_config(folder), config.model)
    base = read_base(folder, config.model)
    source, count = (str(config.tokens), None) if isinstance(config.tokens, Path) else (config.text, config.tokens)
    text = read_rows(source, AutoTokenizer.from_pretrained(folder), config.length, count)
    return Subject(folder, shape, base, read_target(folder), choose_block_size(config.block_size, shape), text)


def list_settings(config: FrontierConfig, subject: Subject) -> dict[str, object]:
    """List what decides about scores and losses; not how many draws, as more of them can be added."""
    return {
        "model": fingerprint(str(subject.folder)),
        "text": subject.text.digest,
        "calibration": [config.calibration, config.calibration_tokens, config.length],
        "block_size": subject.block_size,
        "device": config.device,
        "dtype": config.dtype,
    }


def open_draw(config: FrontierConfig, subject: Subject, seed: int) -> Measurement:
    """Open one draw of the calibration text, to measure what every score needs; nothing is computed yet.

    Raises:
        PruningError: the text cannot be used, or is too short for several draws. CommandError: no such device.
    """
    measurement = open_measurement(
        subject.folder,
        subject.shape,
        score="loss",  # what it needs, all others need too
        text=config.calibration,
        length=config.length,
        tokens=config.calibration_tokens,
        device=config.device,
        dtype=config.dtype,
        threads=1,
        seed=seed,
    )
    rows = measurement.text
    if config.seeds > 1 and len(rows.rows) == rows.available:
        expected = f"more than {rows.available} rows, so that {config.seeds} draws differ"
        remedy = "lower --calibration-tokens, or pass --seeds 1"
        raise PruningError(f"{config.calibration}: expected {expected}, got as many as a draw takes; {remedy}")
    return measurement


def measure_losses(config: FrontierConfig, subject: Subject, meter: Meter, masks: list[Mask]) -> None:
    """Measure what the journal lacks, format by format; the model is read if there is anything."""
    own = next(iter(subject.formats))
    missing = {
        name: meter.list_missing(name, [mask for mask in masks if name == own or mask.name != names.REPACKED])
        for name in subject.formats
    }
    meter.begin(sum(map(len, missing.values())))
    if not any(missing.values()):
        return
    weights = Weights(subject.folder, read_config(subject.folder))
    layers = Layers(subject.folder, weights, getattr(torch, config.dtype), torch.device(config.device))
    model = join_layers(layers)
    for name, stored in subject.formats.items():
        if stored != subject.base.format:
            round_experts(model, subject.shape)
        meter.measure(model, name, missing[name])


def describe_format(subject: Subject, meter: Meter, name: str) -> FrontierFormat:
    """Describe the unpruned model: its compact form's bytes, its loss, and what the format adds to that."""
    shape = subject.shape
    indices = np.arange(shape.intermediate_size).reshape(-1, subject.block_size)
    every = np.ones((len(shape.layers), shape.num_experts), dtype=bool)
    pruning = keep_whole(every, np.broadcast_to(indices, (*every.shape, *indices.shape)))
    job = Compaction(subject.base, pruning, zeroed=False, format=subject.formats[name])
    size = measure_savings(job, subject.target).bytes_after
    nats, targets = meter.read(name, None), meter.targets
    added = nats - meter.read(next(iter(subject.formats)), None)
    return FrontierFormat(
        format=name, bytes=size, loss=float(nats.sum() / targets.sum()), rounding=estimate(added[None], targets)
    )


class Readings:
    """Measured losses by mask and share: [S, R], draws by rows."""

    def __init__(self, meter: Meter, masks: list[Mask], own: str) -> None:
        """Sort the masks. own: the model's format, in which alone repacked routing is measured: nothing stores it."""
        self._meter, self._own = meter, own
        self._masks: dict[tuple[str, float], list[Mask]] = defaultdict(list)
        for mask in masks:
            self._masks[mask.name, mask.ratio].append(mask)

    def list_points(self, stored: str, subject: Subject) -> list[FrontierPoint]:
        """List what every mask costs in a format."""
        base, targets = self._meter.read(stored, None), self._meter.targets
        points = []
        for (name, ratio), masks in self._masks.items():
            if name == names.REPACKED and stored != self._own:
                continue
            added = self._read(stored, name, ratio) - base
            found = estimate(added, targets)
            points.append(
                FrontierPoint(
                    mask=name,
                    format=stored,
                    ratio=ratio,
                    bytes=weigh_mask(masks[0], subject.base, subject.target, subject.formats[stored]),
                    delta=found.delta,
                    low=found.low,
                    high=found.high,
                    draws=tuple((added.sum(1) / targets.sum()).tolist()),
                )
            )
        return points

    def list_contests(self, stored: str) -> list[Contest]:
        """List which mask is best at each share."""
        ratios = dict.fromkeys(ratio for _, ratio in self._masks)
        return [
            compare(
                stored,
                ratio,
                {name: self._read(stored, name, ratio) for name in CANDIDATES},
                self._meter.targets,
            )
            for ratio in ratios
        ]

    def pair(self, stored: str, mask: str, other: str) -> dict[str, Interval]:
        """Share in percent → how much more `mask` costs than the other."""
        return {
            f"{ratio * 100:.0f}": estimate(
                self._read(stored, mask, ratio) - self._read(stored, other, ratio), self._meter.targets
            )
            for name, ratio in self._masks
            if name == mask
        }

    def _read(self, stored: str, name: str, ratio: float) -> Floats:
        rows: npt.NDArray[np.float64] = np.stack([self._meter.read(stored, m) for m in self._masks[name, ratio]])
        return rows
