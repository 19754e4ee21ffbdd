"""The models of a pruning curve: which there are, their checkpoints, and the losses of one on an engine of its own.

Checkpoints are made by the project's tools, as commands, one at a time; each is removed once its losses are on disk.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from laguna_serve.bench.arms.arms import Arm, ArmSpec, open_arm
from laguna_serve.evals.perplexity.endpoint import open_endpoint, score_rows
from laguna_serve.evals.perplexity.rows import Row, RowsError, choose_evenly, cut_rows
from laguna_serve.evals.perplexity.scored import ScoredRows
from laguna_serve.serving.client.completions import open_session
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.engine import EngineConfig
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.run_dir import claim_folder, fingerprint

INDICES, SCORES = "group_indices_importance_sorted.npy", "group_scores_importance_sorted.npy"
# A document's last row may be short; with less context than this its loss tells little about the model.
SHORTEST = 16
CONCURRENCY = 8


class ToolError(CommandError, RuntimeError):
    """One of the project's tools failed; one line, its own."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One model: `share` of the groups pruned, by rank or by the draw of a seed."""

    kind: Literal["unpruned", "ranked", "random"]
    share: float = 0.0
    seed: int | None = None

    @property
    def name(self) -> str:
        """The name of the model's folder and of its losses."""
        if self.kind == "unpruned":
            return self.kind
        return f"{self.kind}-{self.share * 100:g}pct" + ("" if self.seed is None else f"-seed{self.seed}")


@dataclass(frozen=True, slots=True)
class Setting:
    """What all models of a curve share. `rows`: how many rows, of at most `length` tokens."""

    model: Path
    masks: Path
    documents: tuple[str, ...]
    length: int
    rows: int
    dtype: str
    folder: Path


def list_plans(shares: Sequence[float], seeds: int) -> list[Plan]:
    """Every model, those first that a curve needs most."""
    ranked = [Plan("ranked", share) for share in shares]
    return [Plan("unpruned"), *ranked, *(Plan("random", share, seed) for seed in range(seeds) for share in shares)]


def run_script(module: str, *arguments: str | Path) -> dict[str, object]:
    """Run one of the project's tools; the JSON object on its last line.

    Raises:
        ToolError: it failed.
    """
    command = [sys.executable, "-m", f"laguna_serve.{module}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise ToolError(f"{module}: expected success, got: {lines[-1]}")
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


def find_mask(setting: Setting, share: float) -> Path:
    """Find the published mask of a share, or make one from the groups' scores."""
    published = setting.masks / f"group_keep_mask_{share * 100:g}pct.npy"
    if published.is_file():
        return published
    made = setting.folder / published.name
    if not made.is_file():
        run_script("scripts.pruning_mask", setting.masks / SCORES, "--share", str(share), "--out", made)
    return made


def measure_plan(setting: Setting, plan: Plan, progress: Progress) -> tuple[list[Row], dict[int, float]]:
    """Measure the rows and the summed loss of each; what is on disk is not measured again.

    Raises:
        CheckpointError: the folder holds another measurement.
        ToolError, EngineError, EndpointError: the model could not be made, started or asked.
    """
    folder = setting.folder / plan.name
    mask = find_mask(setting, plan.share) if plan.kind == "ranked" else None
    claim_folder(folder, {"plan": plan.name, "mask": None if mask is None else fingerprint(str(mask))})
    scored = ScoredRows(folder / "rows.jsonl")
    rows = read_rows(setting.folder)
    if rows is None or len(scored.nats) < len(rows):
        model = setting.model
        if plan.kind != "unpruned":
            model = folder / "checkpoint"
            run_script("serving.cli", "compact", setting.model, *choose_flags(setting, plan, mask), "--out", model)
        with open_arm(make_spec(setting, plan, model), folder, progress.say) as arm:
            rows = asyncio.run(_score(setting, arm, scored, progress))
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    return rows, scored.nats


def list_settings(setting: Setting) -> dict[str, object]:
    """List what decides about the losses of all models."""
    return {
        "model": fingerprint(str(setting.model)),
        "masks": [fingerprint(str(setting.masks / name)) for name in (INDICES, SCORES)],
        "text": [setting.documents, setting.length, setting.rows],
        "dtype": setting.dtype,
    }


def choose_flags(setting: Setting, plan: Plan, mask: Path | None) -> list[str | Path]:
    """`laguna compact`'s flags: a draw takes the same groups as the ranking."""
    chosen: list[str | Path] = ["--random-mask", str(plan.share), "--seed", str(plan.seed)]
    if mask is not None:
        chosen = ["--keep-mask", mask]
    return [*chosen, "--group-indices", setting.masks / INDICES]


def make_spec(setting: Setting, plan: Plan, model: Path) -> ArmSpec:
    """Make the engine: without compilation, as it runs for seconds."""
    config = EngineConfig(
        model=str(model),
        dtype=setting.dtype,
        enforce_eager=True,
        prefix_caching=False,
        max_num_seqs=CONCURRENCY,
        max_model_len=setting.length + 1,
    )
    return ArmSpec(plan.name, model.name, config=config)


async def _score(setting: Setting, arm: Arm, scored: ScoredRows, progress: Progress) -> list[Row]:
    async with open_session() as session:
        try:
            endpoint = await open_endpoint(session, arm.base_url, arm.model_name)
            rows = read_rows(setting.folder)
            if rows is None:
                documents = [await endpoint.tokenize(document) for document in setting.documents]
                rows = choose_rows(documents, setting.length, setting.rows)
                write_text(setting.folder / "rows.json", json.dumps([[row.document, row.tokens] for row in rows]))
            missing = len(rows) - len(scored.nats)
            progress.begin()
            await score_rows(endpoint, rows, scored, CONCURRENCY, lambda done: progress.step("rows", done, missing))
        except EndpointError:
            arm.check()
            raise
    return rows


def choose_rows(documents: Sequence[Sequence[int]], length: int, wanted: int) -> list[Row]:
    """Evenly spaced rows of the documents' tokens. Raises RowsError when there is none."""
    rows = [row for number, ids in enumerate(documents) for row in cut_rows(number, ids, length, length)]
    rows = [row for row in rows if len(row.tokens) >= SHORTEST]
    if not rows:
        raise RowsError(f"--text: expected at least {SHORTEST} tokens, got fewer; pass more text")
    return choose_evenly(rows, wanted)


def read_rows(folder: Path) -> list[Row] | None:
    """Read the rows that the first engine cut; None before."""
    path = folder / "rows.json"
    if not path.exists():
        return None
    return [Row(document, tuple(tokens)) for document, tokens in json.loads(path.read_text(encoding="utf-8"))]
