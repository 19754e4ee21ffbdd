"""The arms: four starts, stage 2 from stores of several K and beside the teacher, on text and on chats, and rates.

Every part is kept in the work folder when it is measured, so that the same command goes on with what is missing.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from transformers import AutoTokenizer, LagunaForCausalLM

from laguna_serve.scripts.training.dense import stages, student
from laguna_serve.scripts.training.dense.config import DistillConfig
from laguna_serve.scripts.training.dense.experiments.behaviour import Behaviour, ask
from laguna_serve.scripts.training.dense.experiments.config import ExperimentsConfig
from laguna_serve.scripts.training.dense.experiments.result import Arm, DenseExperiments, Rate, Start
from laguna_serve.scripts.training.dense.initial import Init, start_blocks
from laguna_serve.scripts.training.dense.run import Teacher, make_store
from laguna_serve.scripts.training.dense.store.format import LogitStore
from laguna_serve.scripts.training.dense.targets import Beside, Drawn, Targets
from laguna_serve.scripts.training.dense.text import Corpus, read_corpus
from laguna_serve.scripts.training.ranks import ALONE
from laguna_serve.serving.kit.environment import current_argv, read_environment
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.signals import check_signals

INITS: tuple[Init, ...] = ("usage", "weight", "concat", "random")
BESIDE = "beside"
ROUNDS, ROUND_STEPS = 7, 4
T = TypeVar("T")


@dataclass(slots=True)
class Laboratory:
    """What all arms share."""

    config: ExperimentsConfig
    given: DistillConfig
    teacher: Teacher
    tokenizer: Any
    corpus: Corpus
    widths: list[int]
    progress: Progress

    def once(self, name: str, kind: type[T], make: Callable[[], T]) -> T:
        """Return a part from the work folder, or make it and keep it there."""
        path = self.config.work / f"{name}.json"
        if path.exists():
            return msgspec.json.decode(path.read_bytes(), type=kind)
        check_signals()
        self.progress.say(f"experiments: {name}")
        made = make()
        write_text(path, msgspec.json.encode(made).decode())
        return made

    def measure(self, model: LagunaForCausalLM) -> dict[str, float]:
        """Held-out figures against the teacher's whole distribution."""
        return stages.measure(model, Beside(self.teacher.model, self.corpus.drawn), self.corpus.rows, None)

    def ask(self, model: LagunaForCausalLM) -> Behaviour:
        """Answer held-out requests, and describe the answers."""
        return ask(model, self.tokenizer, "toy:held-out", self.config.requests, self.config.budget)

    def start(self, init: Init) -> tuple[Start, torch.nn.ModuleDict]:
        """Stage 1 from a start; its blocks lie in the work folder, too."""
        recipe = replace(self.given.recipe, init=init)
        model, training = self.teacher.model, self.corpus.training
        sparse = [layer for layer, kind in enumerate(model.config.mlp_layer_types) if kind == "sparse"]
        usage = stages.count_usage(model, sparse, training, recipe)
        blocks = start_blocks(model, self.widths, usage, init)
        untrained = self.once(f"untrained-{init}", dict[str, float], lambda: self.measure(self.assemble(blocks)))
        state = self.config.work / f"stage1-{init}.state"
        log = stages.train_blocks(model, blocks, training, recipe, state, self.config.threads)
        trained = self.once(f"trained-{init}", dict[str, float], lambda: self.measure(self.assemble(blocks)))
        return Start(init=init, nmse=log[-1]["mean"], untrained=untrained, trained=trained), blocks

    def assemble(self, blocks: torch.nn.ModuleDict) -> LagunaForCausalLM:
        """Make a student that shares nothing with the blocks."""
        frame = self.teacher.frame()
        return student.assemble_student(frame, copy.deepcopy(blocks), self.widths, self.teacher.device).eval()

    def train(self, name: str, blocks: torch.nn.ModuleDict, targets: Targets) -> LagunaForCausalLM:
        """Train a student from the blocks in stage 2, on these targets."""
        model = self.assemble(blocks)
        state = self.config.work / f"stage2-{name}.state"
        stages.train_student(model, targets, self.given.recipe, state, self.config.threads)
        return model

    def store(self, k: int) -> LogitStore:
        """Write a store, or open the one that is there."""
        given = replace(self.given, store=self.config.work / f"store-{k or 'full'}", top_k=k)
        store = make_store(given, self.teacher, self.tokenizer, self.corpus, self.config.work, ALONE)
        assert store is not None
        return store


def open_laboratory(config: ExperimentsConfig) -> Laboratory:
    """Read teacher and text. Raises CommandError where they cannot be used."""
    given = config.distil
    teacher = Teacher(Path(config.teacher), config.threads)
    tokenizer = AutoTokenizer.from_pretrained(teacher.folder)
    corpus = read_corpus(given, tokenizer, config.work, ALONE)
    widths = student.choose_widths(teacher.model.config, {})
    torch.manual_seed(config.seed)
    return Laboratory(config, given, teacher, tokenizer, corpus, widths, Progress())


def run_arms(config: ExperimentsConfig) -> DenseExperiments:
    """Measure everything, or what is missing of it."""
    lab = open_laboratory(config)
    started = [lab.start(init) for init in INITS]
    blocks = started[0][1]
    beside = Beside(lab.teacher.model, lab.corpus.drawn)

    seconds: dict[str, float] = {}
    stores: dict[str, LogitStore] = {}
    for k in config.top_k:
        name = f"K={k or 'full'}"
        begun = time.monotonic()
        stores[name] = lab.store(k)
        taken = time.monotonic() - begun
        seconds[name] = lab.once(f"seconds-{name}", float, lambda: round(taken, 1))  # noqa: B023

    arms = []
    sources: dict[str, Targets] = {BESIDE: beside, **stores}
    for name, targets in sources.items():

        def make(name: str = name, targets: Targets = targets) -> Arm:
            model = lab.train(name, blocks, targets)
            places, tail = targets.describe_tail() if isinstance(targets, LogitStore) else (0, 0.0)
            size = targets.num_bytes / places if isinstance(targets, LogitStore) else 0.0
            figures, answers = lab.measure(model), lab.ask(model)
            return Arm(name=name, place_bytes=size, tail_mass=tail, measured=figures, behaviour=answers)

        arms.append(lab.once(f"arm-{name}", Arm, make))

    def train_on_text() -> tuple[dict[str, float], Behaviour]:
        drawn = Drawn(lab.corpus.training, lab.corpus.drawn.held_out_source, lab.given.recipe)
        model = lab.train("text", blocks, Beside(lab.teacher.model, drawn))
        return lab.measure(model), lab.ask(model)

    on_text, answers_on_text = lab.once("arm-text", tuple[dict[str, float], Behaviour], train_on_text)
    rates = lab.once("rates", tuple[Rate, ...], lambda: time_arms(lab, blocks, sources))
    answers = {
        "teacher": lab.once("answers-teacher", Behaviour, lambda: lab.ask(lab.teacher.model)),
        "student, stage 1": lab.once("answers-stage1", Behaviour, lambda: lab.ask(lab.assemble(blocks))),
        "student, text": answers_on_text,
        "student, chats": arms[0].behaviour,
    }
    return DenseExperiments(
        environment=read_environment(current_argv()),
        teacher=config.teacher,
        settings=config.settings,
        starts=tuple(start for start, _ in started),
        arms=tuple(arms),
        store_seconds=seconds,
        rates=rates,
        answers=answers,
        on_text=on_text,
    )


def time_arms(lab: Laboratory, blocks: torch.nn.ModuleDict, arms: dict[str, Targets]) -> tuple[Rate, ...]:
    """Time forward and backward passes of stage 2, arms in turn; the first round is not counted."""
    model, recipe = lab.assemble(blocks).train(), lab.given.recipe
    tokens = ROUND_STEPS * recipe.rows * recipe.length
    rates: dict[str, list[float]] = {name: [] for name in arms}
    everything = slice(0, recipe.rows)
    for number in range(ROUNDS + 1):
        for name, targets in arms.items():
            check_signals()
            begun = time.perf_counter()
            for step in range(ROUND_STEPS):
                batch = targets.batch(number * ROUND_STEPS + step)
                stages.sum_kl(stages.Taught(model), targets, batch, everything).backward()
                model.zero_grad()
            if number:
                rates[name].append(tokens / (time.perf_counter() - begun))
    return tuple(Rate(name=name, median=statistics.median(found), rounds=tuple(found)) for name, found in rates.items())
