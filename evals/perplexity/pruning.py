"""What pruning adds to a loss: configuration, measurement on engines of its own, result."""

from __future__ import annotations

import statistics
from argparse import ArgumentTypeError
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from laguna_serve.evals.perplexity.mean import average, subtract
from laguna_serve.evals.perplexity.pruning_arms import (
    INDICES,
    SCORES,
    Plan,
    Setting,
    find_mask,
    list_plans,
    list_settings,
    measure_plan,
    run_script,
)
from laguna_serve.evals.perplexity.pruning_report import Data, Point, PruningResult, render_markdown
from laguna_serve.evals.perplexity.rows import Row, read_documents
from laguna_serve.serving.checkpoint import CheckpointError, require_folder
from laguna_serve.serving.kit.environment import current_argv, read_environment
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.flags import Flag, FlagError, check_bounds
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import write_result
from laguna_serve.serving.kit.run_dir import check_out, claim_folder, hold_out

SHARES = (0.10, 0.20, 0.25, 0.40)
TOY_TEXT = "toy:held-out"
Losses = Mapping[str, Mapping[int, float]]


def parse_shares(text: str) -> tuple[float, ...]:
    """ "0.1,0.2": shares of the groups, each once, smallest first."""
    try:
        shares = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        shares = ()
    if not shares or not 0 < shares[0] <= shares[-1] < 1:
        raise ArgumentTypeError(f"expected shares between 0 and 1 like 0.1,0.2, got {text!r}")
    return shares


@dataclass(frozen=True, kw_only=True)
class PruningConfig:
    """Which checkpoint is pruned, by how much, and on which text its loss is measured. `text` may be TOY_TEXT."""

    model: Annotated[str, Flag("Laguna checkpoint, unpruned: folder or hub id", metavar="M")]
    masks: Annotated[
        Path | None,
        Flag("what scripts/score_experts.py wrote (default: the folder masks beside the model's)", metavar="DIR"),
    ] = None
    text: Annotated[
        str,
        Flag(f'UTF-8 text, or .jsonl with a "text" per line (default: {TOY_TEXT}, the toy family\'s)', metavar="FILE"),
    ] = TOY_TEXT
    shares: Annotated[tuple[float, ...], Flag("default: 0.1,0.2,0.25,0.4", metavar="S,…", parse=parse_shares)] = SHARES
    seeds: Annotated[int, Flag("random masks per share (default: 5)", metavar="N", at_least=1)] = 5
    length: Annotated[int, Flag("tokens in a row (default: 384)", metavar="N", at_least=16)] = 384
    rows: Annotated[int, Flag("evenly spaced rows (default: 171)", metavar="N", at_least=1)] = 171
    dtype: Annotated[str, Flag("vLLM's --dtype (default: float32)")] = "float32"
    out: Annotated[Path, Flag("folder for the result files", metavar="DIR")]

    def __post_init__(self) -> None:
        """Refuse what means nothing. Raises FlagError."""
        check_bounds(self)
        if not self.shares or not all(0 < share < 1 for share in self.shares):
            got = ",".join(map(str, self.shares))
            raise FlagError(f"--shares: expected shares between 0 and 1 like 0.1,0.2, got {got!r}")


@hold_out
def measure_pruning(config: PruningConfig) -> PruningResult:
    """Measure what `config.out` lacks, model by model, and write pruning_loss.json, .md and .png there.

    Raises:
        CheckpointError, RowsError, RunDirError: a file is missing or of another kind. ToolError: no checkpoint made.
        EngineError, EndpointError: an engine did not start, or died; what was measured is kept.
    """
    progress, environment = Progress(), read_environment(current_argv())
    setting = prepare(config)
    plans = list_plans(config.shares, config.seeds)
    losses: dict[str, dict[int, float]] = {}
    for done, plan in enumerate(plans, start=1):
        rows, losses[plan.name] = measure_plan(setting, plan, progress)
        nats = average(rows, losses[plan.name]).nats_per_token
        progress.say(f"{done}/{len(plans)} {plan.name}: {nats:.4f} nats per token")
    result = PruningResult(
        environment=environment,
        model=config.model,
        dtype=config.dtype,
        seeds=config.seeds,
        data=Data(
            source=config.text if config.text == TOY_TEXT else Path(config.text).name,
            documents=len(setting.documents),
            rows=len(rows),
            length=config.length,
            scored_tokens=sum(row.scored for row in rows),
        ),
        unpruned=average(rows, losses[Plan("unpruned").name]),
        points=[make_point(rows, share, config.seeds, losses) for share in config.shares],
    )
    write_result(config.out / "pruning_loss.json", result)
    write_text(config.out / "pruning_loss.md", render_markdown(result))
    from laguna_serve.evals.perplexity.pruning_plot import draw_curves  # takes a second to import

    draw_curves(result, config.out / "pruning_loss.png")
    return result


def prepare(config: PruningConfig) -> Setting:
    """Check the files, before anything is started.

    Raises:
        CheckpointError, RowsError, ToolError: one is missing or of another kind.
    """
    check_out(config.out)
    model, folder = require_folder(config.model), config.out / "models"
    masks = config.masks if config.masks is not None else model.resolve().parent / "masks"
    for name in (INDICES, SCORES):
        if not (masks / name).is_file():
            remedy = "name the folder that scripts/score_experts.py wrote by --masks"
            raise CheckpointError(f"{masks}: expected {name} in it, got none; {remedy}")
    text = Path(config.text)
    if config.text == TOY_TEXT:
        folder.mkdir(parents=True, exist_ok=True)
        text = folder / "held-out.jsonl"
        run_script("scripts.toy_text", "--out", text)
    setting = Setting(model, masks, tuple(read_documents(text)), config.length, config.rows, config.dtype, folder)
    claim_folder(folder, list_settings(setting))
    for share in config.shares:
        find_mask(setting, share)
    return setting


def make_point(rows: list[Row], share: float, seeds: int, losses: Losses) -> Point:
    """Make the figures of one share of pruned groups."""
    base, ranked = losses[Plan("unpruned").name], losses[Plan("ranked", share).name]
    random = [average(rows, losses[Plan("random", share, seed).name]).nats_per_token for seed in range(seeds)]
    loss = average(rows, ranked).nats_per_token
    return Point(
        share=share,
        ranked=loss,
        ranked_delta=subtract(rows, ranked, base),
        random=random,
        random_delta=statistics.mean(random) - average(rows, base).nats_per_token,
        ranked_is_better=loss < statistics.mean(random),
    )
