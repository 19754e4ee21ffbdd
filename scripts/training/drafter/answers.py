"""The answers of a run: read, split by prompt, and asked of the target where they are not recorded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from laguna_serve.scripts.training.drafter.config import DrafterTrainConfig
from laguna_serve.scripts.training.drafter.data.generation import (
    Ask,
    Asking,
    collect,
    find_missing,
    generate,
    generate_with_engine,
    list_asks,
    open_journal,
)
from laguna_serve.scripts.training.drafter.data.prompts import read_prompts
from laguna_serve.scripts.training.drafter.data.records import (
    Prompt,
    Rows,
    choose_held_out,
    make_rows,
    split_rows,
)
from laguna_serve.serving.checkpoint import CheckpointError, Target
from laguna_serve.serving.client.traffic import TrafficRecord, read_traffic
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.run_dir import claim_folder, fingerprint

# An answer shorter than this teaches next to nothing: prompts that leave less room are not asked.
LEAST_ROOM = 16


@dataclass(frozen=True, slots=True)
class Answers:
    """What is learned from and measured on, recorded; and what the target is still to be asked, on either side."""

    learned: Rows
    measured: Rows
    asks_learned: list[Ask] = field(default_factory=list)
    asks_measured: list[Ask] = field(default_factory=list)
    prompts: int = 0
    held_out: int = 0


@dataclass(frozen=True)
class AnswerSource:
    """Where a run's answers come from: prompts that its target is asked, or recorded traffic."""

    config: DrafterTrainConfig
    folder: Path
    target: Target
    tokenizer: Any
    progress: Progress

    @cached_property
    def known(self) -> Answers:
        """Read prompts or recorded traffic, and split them."""
        config = self.config
        if config.prompts is not None:
            most = min(config.max_length, self.target.max_model_len) - LEAST_ROOM
            prompts = read_prompts(config.prompts, self.tokenizer, self.target.vocab_size)
            fitting = [prompt for prompt in prompts if len(prompt) <= most]
            held = choose_held_out(fitting, config.held_out, str(config.prompts))
            learned = [prompt for prompt in fitting if prompt not in held]
            return Answers(
                learned=Rows([], len(prompts) - len(fitting)),
                measured=Rows([], 0),
                asks_learned=list_asks(learned, config.temperature, config.samples, config.seed),
                asks_measured=self._ask_held_out(held),
                prompts=len(fitting),
                held_out=len(held),
            )
        files = ", ".join(map(str, config.tokens))
        recorded = self._make_rows(chain.from_iterable(map(read_traffic, config.tokens)), files)
        different = {row.prompt for row in recorded.rows}
        held = choose_held_out(different, config.held_out, files)
        learned_rows, measured = split_rows(recorded.rows, held)
        return Answers(
            learned=Rows(learned_rows, recorded.skipped),
            measured=Rows(measured if config.recorded_only else [], 0),
            asks_measured=[] if config.recorded_only else self._ask_held_out(held),
            prompts=len(different),
            held_out=len(held),
        )

    def _ask_held_out(self, held: set[Prompt]) -> list[Ask]:
        return list_asks(sorted(held), self.config.measure, 1, self.config.seed + 1)

    def _make_rows(self, records: Iterable[TrafficRecord], source: str) -> Rows:
        vocabulary, most = self.target.vocab_size, self.config.max_length
        return make_rows(records, source=source, vocabulary=vocabulary, max_length=most)

    @property
    def _journal_path(self) -> Path:
        return self.config.work_folder / "answers" / "answers.jsonl"

    def count_missing(self) -> int:
        """Count the answers that the target is still to be asked for."""
        return len(find_missing(self._asks, open_journal(self._journal_path, self.progress)))

    @property
    def _asks(self) -> list[Ask]:
        return [*self.known.asks_learned, *self.known.asks_measured]

    def gather(self) -> tuple[Rows, Rows]:
        """Gather the recorded answers and those that the target is asked for."""
        answers, config, asks = self.known, self.config, self._asks
        if not asks:
            return self._check_rows(answers.learned, answers.measured)
        how = {"target": fingerprint(str(self.folder)), "max_tokens": config.max_tokens, "eos": config.ignore_eos}
        claim_folder(self._journal_path.parent, how, alone=True)
        asking = Asking(config.max_tokens, config.ignore_eos, config.concurrency)
        if config.endpoint is not None:
            journal = open_journal(self._journal_path, self.progress)
            generate(asks, asking, journal, config.endpoint, config.model, self.progress)
        else:
            limit = self.target.max_model_len
            generate_with_engine(asks, asking, self._journal_path, self.folder, eager=config.eager, longest=limit)
            journal = open_journal(self._journal_path, self.progress)
        source = str(self._journal_path)
        learned = self._make_rows(collect(answers.asks_learned, journal), source)
        measured = self._make_rows(collect(answers.asks_measured, journal), source)
        skipped = answers.learned.skipped + learned.skipped
        rows = Rows([*answers.learned.rows, *learned.rows], skipped)
        return self._check_rows(rows, Rows([*answers.measured.rows, *measured.rows], measured.skipped))

    def _check_rows(self, learned: Rows, measured: Rows) -> tuple[Rows, Rows]:
        for rows, what in ((learned, "learn from"), (measured, "measure on")):
            if not rows.rows:
                got = (
                    f"none of two tokens or more ({rows.skipped} shorter, or with prompts of {self.config.max_length})"
                )
                raise CheckpointError(f"answers: expected some to {what}, got {got}; pass more, or raise --max-length")
        return learned, measured
