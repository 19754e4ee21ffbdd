"""Learn what a LLaDA commits next, for exact speculation: graphs of sets of ranks, and an order model.

The prompts are decoded by the reference, step by step; what is learnt serves other prompts, and nothing of it can
change a text. DIR gets order.safetensors, graph.json, with --draft the draft's graphs, and calibration.json.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import torch

from laguna_serve.plugins.diffusion.calibration import calibrate, measure_next_commits, name_prompt
from laguna_serve.plugins.diffusion.decoding.canvas import Canvas
from laguna_serve.plugins.diffusion.decoding.reference import read_reference
from laguna_serve.plugins.diffusion.errors import DiffusionError
from laguna_serve.plugins.diffusion.model import Llada, load_model
from laguna_serve.plugins.diffusion.predictor import Predictor
from laguna_serve.plugins.diffusion.proposing.order import OrderModel
from laguna_serve.plugins.diffusion.proposing.prepared import GRAPHS, ORDER, find_cost
from laguna_serve.plugins.diffusion.proposing.sources import Corrected, Drafted, Source, Stale
from laguna_serve.plugins.diffusion.server.loading import choose_dtype
from laguna_serve.plugins.diffusion.speculation import Decoder
from laguna_serve.scripts.training.diffusion.order import SCHEDULE, record, train_order
from laguna_serve.scripts.training.drafter.data.prompts import read_prompts
from laguna_serve.scripts.training.drafter.data.records import Prompt
from laguna_serve.scripts.training.loop import Schedule
from laguna_serve.serving.kit.command import Brief, Command
from laguna_serve.serving.kit.files import write_file
from laguna_serve.serving.kit.flags import MOST_SEED, MOST_THREADS, BoundedConfig, Flag
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import write_indented
from laguna_serve.serving.kit.run_dir import RunDirError, check_out

EXAMPLES = """examples:
  python scripts/training/diffusion/calibrate.py tests/toy/llada --prompts tests/toy/prompts.jsonl --out out/proposals
  python scripts/training/diffusion/calibrate.py LLADA-8B --draft DRAFT --device cuda --prompts p.jsonl --out DIR

exit status: 0 done, 2 it could not run, 130 interrupted
"""
NODES = 24


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig(BoundedConfig):
    """A model, perhaps its draft, the reference that decodes, and prompts.

    Attributes:
        first: prompts to leave out at the beginning of the file, those that are measured.
    """

    model: Annotated[Path, Flag("LLaDA checkpoint: a folder", positional=True)]
    draft: Annotated[Path | None, Flag("a smaller LLaDA with the same vocabulary")] = None
    prompts: Annotated[Path, Flag('JSONL, one {"prompt": "…"} per line', metavar="FILE")]
    first: Annotated[int, Flag("where in the file to begin", at_least=0)] = 0
    num_prompts: Annotated[int, Flag("prompts", at_least=1)] = 64
    canvas: Annotated[int, Flag("tokens of an answer's canvas", at_least=1)] = 64
    block: Annotated[int, Flag("tokens of a block", at_least=2)] = 32
    schedule: Annotated[str, Flag("tokens a step (1), or a threshold (0.9)")] = "1"
    cache: Annotated[str, Flag("none, prefix or dual")] = "dual"
    steps: Annotated[int, Flag("of the order model's training", at_least=1)] = SCHEDULE.steps
    seed: Annotated[int, Flag("of the order model", at_least=0, at_most=MOST_SEED)] = 0
    device: Annotated[Literal["cpu", "cuda"], Flag("where the models compute")] = "cpu"
    threads: Annotated[int, Flag("of the processor", at_least=1, at_most=MOST_THREADS)] = 1
    out: Annotated[Path, Flag("folder for what is learnt", metavar="DIR")]


class Calibration(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.diffusion_calibration/1"
):
    """What was learnt, on what.

    Attributes:
        nodes: of each graph, and the share of decodes that come by its first.
        learnt: the prompts, by `name_prompt`.
        next_commits: along the target's decodes, how often the draft would commit at the same position next, and how
            often it would come to the same state; `cost`: its pass in passes of the target.
    """

    model: str
    draft: str | None
    schedule: str
    cache: str
    canvas: int
    block: int
    first: int
    prompts: int
    learnt: list[str]
    examples: int
    order: dict[str, float]
    nodes: dict[str, tuple[int, float]]
    next_commits: tuple[float, float] | None
    cost: float | None
    minutes: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command = Command(
        "scripts/training/diffusion/calibrate.py",
        CalibrateConfig,
        __doc__,
        EXAMPLES,
        others=(DiffusionError,),
        interrupted="it starts anew",
    )
    return command.run(argv, learn, line=Brief(counted=("learnt",)))


def learn(config: CalibrateConfig) -> Calibration:
    """Decode the prompts, learn from them, and write the folder.

    Raises:
        DiffusionError: a checkpoint cannot be used, or the prompts are too few.
        WriteError: a file cannot be written.
    """
    check_out(config.out)
    read = [folder for folder in (config.model, config.draft) if folder is not None]
    if config.out.resolve() in [folder.resolve() for folder in read]:
        raise RunDirError(f"--out {config.out}: expected a folder of its own, got a model's; choose another")
    began, progress = time.monotonic(), Progress()
    torch.set_num_threads(config.threads)
    reference = read_reference(config.schedule, config.cache)
    dtype = choose_dtype("auto", config.model, config.device)
    target = load_model(config.model, dtype, config.device)
    draft = None if config.draft is None else load_model(config.draft, dtype, config.device)
    prompts = _choose_prompts(config, target)
    room = target.config.max_sequence_length - config.canvas
    mask = target.config.mask_token_id
    canvases = [Canvas(ids[-room:], config.canvas, config.block, mask) for ids in prompts]
    decoder = Decoder(Predictor(target), reference)
    progress.say(f"decoding {len(canvases)} prompts for the order model")
    examples = record(decoder, progress.track("decoded", canvases))
    torch.manual_seed(config.seed)
    order = OrderModel(target.embedding.weight).to(config.device)
    config.out.mkdir(parents=True, exist_ok=True)
    schedule = Schedule(config.steps, SCHEDULE.peak_lr)
    with tempfile.TemporaryDirectory() as folder:
        log = train_order(order, examples, schedule, config.seed, Path(folder) / "order.state")
    write_file(config.out / ORDER, order.save)
    sources: dict[str, Source] = {"target": Stale()}
    next_commits = None
    if draft is not None:
        drafted = Drafted(Predictor(draft, reference.cache, reference.guidance))
        sources |= {"draft": drafted, "corrected": Corrected(drafted)}
        progress.say("comparing the draft's next commits with the target's")
        next_commits = measure_next_commits(target, draft, progress.track("compared", canvases), reference)
    nodes = {}
    for name, source in sources.items():
        progress.say(f"counting sets of ranks by the logits of the {name}")
        graph = calibrate(decoder, source, progress.track("counted", canvases), NODES)
        write_file(config.out / GRAPHS[name], graph.save)
        nodes[name] = (len(graph.nodes), round(max(graph.chances, default=0.0), 4))
    result = Calibration(
        model=str(config.model),
        draft=None if config.draft is None else str(config.draft),
        schedule=config.schedule,
        cache=config.cache,
        canvas=config.canvas,
        block=config.block,
        first=config.first,
        prompts=len(canvases),
        learnt=[name_prompt(ids) for ids in prompts],
        examples=len(examples),
        order={key: round(value, 4) for key, value in log[-1].items()},
        nodes=nodes,
        next_commits=next_commits,
        cost=None if draft is None else round(find_cost(target, draft), 4),
        minutes=round((time.monotonic() - began) / 60, 2),
    )
    write_indented(config.out / "calibration.json", result)
    return result


def _choose_prompts(config: CalibrateConfig, target: Llada) -> list[Prompt]:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(config.model)
    if config.canvas >= target.config.max_sequence_length:
        raise DiffusionError(f"--canvas: expected fewer than {target.config.max_sequence_length}, got {config.canvas}")
    prompts = read_prompts(config.prompts, tokenizer, target.config.vocab_size)
    if not prompts:
        raise DiffusionError(f"{config.prompts}: expected prompts, got an empty file; add some")
    chosen = prompts[config.first : config.first + config.num_prompts]
    if not chosen:
        expected = f"more than {config.first} prompts"
        raise DiffusionError(f"{config.prompts}: expected {expected}, got {len(prompts)}; lower --first")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
