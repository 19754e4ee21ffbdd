"""A distillation from its flags to the student: text, teacher, the two stages, what is measured and written.

With a store and --layerwise the teacher is never whole in memory; otherwise it is read once and stays.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import asdict
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import AutoTokenizer, LagunaForCausalLM
from transformers.utils.logging import disable_progress_bar

from laguna_serve.scripts.checkpoints.output import check_own, save_checkpoint
from laguna_serve.scripts.training.dense import stages, student, text
from laguna_serve.scripts.training.dense.config import DistillConfig
from laguna_serve.scripts.training.dense.curve import REQUESTS, Curve, share_that_stops
from laguna_serve.scripts.training.dense.initial import start_blocks
from laguna_serve.scripts.training.dense.layerwise.blocks import train_layerwise
from laguna_serve.scripts.training.dense.report.result import (
    MANIFEST,
    SCHEMA,
    DistillResult,
    StoreFigures,
    round_floats,
)
from laguna_serve.scripts.training.dense.store.endpoint import EndpointTeacher
from laguna_serve.scripts.training.dense.store.format import LogitStore, StoreHeader, open_header
from laguna_serve.scripts.training.dense.store.writer import is_made, write_by, write_by_layers, write_by_model
from laguna_serve.scripts.training.dense.targets import Beside, Targets
from laguna_serve.scripts.training.dense.text import Corpus, read_corpus
from laguna_serve.scripts.training.dense.work import Clock, open_work
from laguna_serve.scripts.training.pruning.streaming.layers import Layers, read_laguna
from laguna_serve.scripts.training.pruning.streaming.weights import Weights
from laguna_serve.scripts.training.pruning.teacher import join_layers
from laguna_serve.scripts.training.ranks import Ranks
from laguna_serve.serving.checkpoint import require_folder
from laguna_serve.serving.checkpoint.digest import digest_checkpoint
from laguna_serve.serving.checkpoint.folder import read_config
from laguna_serve.serving.kit.environment import current_argv, read_environment
from laguna_serve.serving.kit.run_dir import check_out, hold_folder, hold_folders

REMEDY = "distil from the bf16 or FP8 release"
# In the work folder: where the student was written to.
SAVED = "saved.txt"


class Teacher:
    """The teacher: whole in memory when something asks for it, or a layer at a time."""

    def __init__(self, folder: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        self.folder = folder
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @cached_property
    def layers(self) -> Layers:
        """Its layers, FP8 ones dequantised. Raises CheckpointError when they cannot be read."""
        config = read_config(self.folder)
        return Layers(self.folder, Weights(self.folder, config, REMEDY), self.dtype, self.device)

    @cached_property
    def model(self) -> LagunaForCausalLM:
        """The whole model, FP8 dequantised."""
        if "quantization_config" in read_config(self.folder):
            joined: LagunaForCausalLM = join_layers(self.layers)
            return joined.requires_grad_(False)
        model = LagunaForCausalLM.from_pretrained(self.folder, config=read_laguna(self.folder), dtype=self.dtype)
        return model.to(self.device).eval().requires_grad_(False)

    @property
    def loaded(self) -> LagunaForCausalLM | None:
        """The whole model, if it is in memory."""
        return self.__dict__.get("model")

    def frame(self) -> student.Frame:
        """Return what the student has of it besides blocks."""
        if self.loaded is not None:
            return student.frame_model(self.loaded)
        head = self.layers.load_head()
        outer = (self.layers.load_embedding(), head.norm.weight, head.weight)
        return student.Frame(self.layers.config, self.layers.load, dict(zip(student.OUTER, outer, strict=True)))


def distil(config: DistillConfig, ranks: Ranks) -> DistillResult | None:
    """Both stages, or what is missing of them; the first process writes the checkpoint.

    Returns None from the other processes, and with --only-store.

    Raises:
        CommandError: teacher, text, widths, store or folders cannot be used.
    """
    folder = require_folder(config.teacher)
    config.check_processes(ranks.size)
    work = open_work(config, config.recipe, folder, ranks)
    saved = work / SAVED
    if not config.only_store:
        check_out(config.out)
        here = saved.exists() and saved.read_text() == str(config.out.resolve())
        check_own(config.out, [folder], own=here or (config.out / MANIFEST).exists())
    held = [work] if config.only_store else [work, config.out]
    with hold_folders(*(held if ranks.first else ())):
        return _distil(config, ranks, folder, work)


def _distil(config: DistillConfig, ranks: Ranks, folder: Path, work: Path) -> DistillResult | None:
    """Do what is missing of both stages, alone in the folders."""
    recipe = config.recipe
    disable_progress_bar()  # of loading and saving
    # Refused before the text is read and the weights are.
    widths = student.choose_widths(read_laguna(folder), dict(config.width))
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.manual_seed(recipe.seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    corpus = read_corpus(config, tokenizer, work, ranks)
    teacher = Teacher(folder, config.threads)
    clock = Clock(work, ranks)
    if config.only_store:
        clock.time("store", lambda: make_store(config, teacher, tokenizer, corpus, work, ranks))
        return None

    blocks, stage1 = clock.time("stage1", lambda: run_stage1(config, teacher, widths, corpus.training, work, ranks))
    model = student.assemble_student(teacher.frame(), blocks, widths, teacher.device)
    store = clock.time("store", lambda: make_store(config, teacher, tokenizer, corpus, work, ranks))
    targets: Targets = Beside(teacher.model, corpus.drawn) if store is None else store
    measured = {"after_stage1": stages.measure(model, targets, corpus.rows, teacher.loaded)}
    _say(ranks, f"after stage 1: {_show(measured['after_stage1'])}")

    state, curve = work / "stage2.state", open_curve(config, targets, corpus, tokenizer, work, ranks)
    stage2 = clock.time(
        "stage2", lambda: stages.train_student(model, targets, recipe, state, config.threads, ranks, curve)
    )
    if curve is not None:
        curve(model, recipe.stage2_steps)
    measured["after_stage2"] = stages.measure(model, targets, corpus.rows, teacher.loaded)
    _say(ranks, f"after stage 2: {_show(measured['after_stage2'])}")
    if not ranks.first:
        return None

    (work / SAVED).write_text(str(config.out.resolve()))
    save_checkpoint(
        config.out, partial(student.save_padded, model, tokenizer, widths, getattr(torch, config.dtype), folder)
    )
    true = sum(p.numel() for p in model.parameters())
    padded = true + sum(3 * (max(widths) - width) * model.config.hidden_size for width in widths)
    parameters = {"teacher": student.count_teacher(folder), "true": true, "stored": padded}
    logs = {"stage1": stage1, "stage2": stage2}
    fields = {"widths": widths, "parameters": parameters, "minutes": clock.minutes, "measured": measured, "logs": logs}
    if curve is not None:
        fields["curve"] = curve.points
    if store is not None:
        fields["store"] = msgspec.to_builtins(describe_store(store))
    described = {"environment": msgspec.to_builtins(read_environment(current_argv())), "teacher": config.teacher}
    sources = {"text": config.text, "chats": config.chats} | corpus.describe_held_out()
    described |= {"recipe": asdict(recipe) | sources}
    return msgspec.convert({"schema": SCHEMA, **round_floats(described | fields)}, DistillResult)


def run_stage1(
    config: DistillConfig, teacher: Teacher, widths: list[int], training: text.Text, work: Path, ranks: Ranks
) -> tuple[torch.nn.ModuleDict, list[dict[str, float]]]:
    """Train every block on its own: a layer at a time, or all beside the whole teacher."""
    recipe = config.recipe
    if config.layerwise:
        return train_layerwise(teacher.layers, widths, training, recipe, work, config.threads, ranks)
    sparse = [layer for layer, kind in enumerate(teacher.model.config.mlp_layer_types) if kind == "sparse"]
    usage = stages.count_usage(teacher.model, sparse, training, recipe)
    blocks = start_blocks(teacher.model, widths, usage, recipe.init).to(teacher.device)
    log = stages.train_blocks(teacher.model, blocks, training, recipe, work / "stage1.state", config.threads)
    return blocks, log


def make_store(
    config: DistillConfig, teacher: Teacher, tokenizer: Any, corpus: Corpus, work: Path, ranks: Ranks
) -> LogitStore | None:
    """Write the store where it is not whole, and open it; None without --store.

    Raises:
        StoreError: the folder's is another one's. EndpointError: the server does not answer as it should.
    """
    if config.store is None:
        return None
    recipe, folder = config.recipe, config.store
    vocabulary = int(read_laguna(teacher.folder).vocab_size)
    drawn = corpus.drawn
    k = min(config.top_k or vocabulary, vocabulary)
    header = StoreHeader(
        top_k=k,
        vocab_size=vocabulary,
        batches=min(recipe.stage2_steps, recipe.stage2_batches or recipe.stage2_steps),
        rows=recipe.rows,
        length=recipe.length,
        seed=recipe.seed,
        on=recipe.stage2_on,
        teacher=digest_checkpoint(teacher.folder),
        tokenizer=text.digest_tokenizer(tokenizer),
        text=drawn.training.tokens.digest(),
        held_out=drawn.held_out_source.tokens.digest(),
        source="forward",
    )
    if is_made(folder, header):  # by whichever source: no server need be up any more
        return LogitStore(folder)
    server = EndpointTeacher(config.endpoint, config.model, k) if config.endpoint and ranks.first else None
    with hold_folder(folder) if ranks.first else nullcontext(), server or nullcontext():
        if server is not None:
            header = msgspec.structs.replace(header, source=f"endpoint {server.name}")
        if ranks.first:
            open_header(folder, header)
        ranks.wait()
        if server is not None:
            write_by(folder, header, drawn, server.answer)
        elif not config.endpoint and config.layerwise:
            write_by_layers(folder, header, drawn, teacher.layers, work, ranks)
        elif not config.endpoint and ranks.first:
            write_by_model(folder, header, drawn, teacher.model)
    ranks.wait()
    return LogitStore(folder)


def open_curve(
    config: DistillConfig, targets: Targets, corpus: Corpus, tokenizer: Any, work: Path, ranks: Ranks
) -> Curve | None:
    """Open the curve of stage 2 where one is asked for; the first process measures, the others wait for it."""
    if not config.curve_every or not ranks.first:
        return None
    source = corpus.held_out_chats
    questions = list(islice(text.stream_conversations(source.source, source.aside), REQUESTS))

    def look(model: LagunaForCausalLM) -> dict[str, float]:
        return stages.measure(model, targets, corpus.rows) | share_that_stops(model, tokenizer, questions)

    return Curve(work / "curve.jsonl", config.curve_every, look)


def describe_store(store: LogitStore) -> StoreFigures:
    """Return what there is to say of a store."""
    places, tail = store.describe_tail()
    header = store.header
    return StoreFigures(top_k=header.top_k, places=places, bytes=store.num_bytes, tail_mass=tail, source=header.source)


def _show(figures: dict[str, float]) -> str:
    return "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in figures.items())


def _say(ranks: Ranks, line: str) -> None:
    if ranks.first:
        print(f"distill_dense: {line}", file=sys.stderr)
