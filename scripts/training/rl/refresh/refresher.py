"""The drafter beside a moving policy: what became of the last one, what the next one learns, whether it is pushed.

It is asked once a step, between sampling and the policy's own gradient step, so that the trainer's policy is the one
that sampled: text and target distribution belong together, and the count of drafter/held_out.py is exact.

1. A drafter that was pushed is held against its live acceptance (live.py), and taken back where it falls short: to the
   last one that stood this test, or, where it was that one itself, to the first.
2. Every few steps the drafter learns from replayed rollouts, with the hidden states and distributions of the present
   policy; prompts of the newest rollouts are left out.
3. What it has become, as it would be served, is held against the serving drafter on the newest rollouts (gate.py).
4. They become part of the replay.

Nothing here speaks to the engine: `pending` goes there together with the policy's next version, all or nothing.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import LagunaForCausalLM

from laguna_serve.scripts.checkpoints.drafters.dflash import LagunaDrafter
from laguna_serve.scripts.training.drafter.blocks import Blocks
from laguna_serve.scripts.training.drafter.data.records import Rows, make_rows
from laguna_serve.scripts.training.drafter.held_out import count_row
from laguna_serve.scripts.training.drafter.models import list_taps, read_warm
from laguna_serve.scripts.training.drafter.objective import Drafts
from laguna_serve.scripts.training.rl.refresh.buffer import ReplayBuffer
from laguna_serve.scripts.training.rl.refresh.gate import Counts, find_accepted, judge
from laguna_serve.scripts.training.rl.refresh.learner import Learner, load_drafter
from laguna_serve.scripts.training.rl.refresh.live import Steps, falls_short, find_p_below
from laguna_serve.scripts.training.rl.refresh.notes import DrafterNote, GateNote, LiveNote, RefreshRun
from laguna_serve.scripts.training.rl.refresh.policy_states import open_blocks
from laguna_serve.scripts.training.rl.refresh.pushed import Pushed
from laguna_serve.serving.checkpoint import read_target
from laguna_serve.serving.client.traffic import TrafficRecord

FIRST = "d-0"
# Answers whose states are computed for one refresh.
LESSON = 96
# Refusals in a row after which the drafter that learns starts over from the serving one.
PATIENCE = 3


@dataclass(frozen=True, slots=True)
class Drafting:
    """How the engine drafts: `gamma` tokens (None: the drafter's most), or, `adaptive`, at most so many."""

    gamma: int | None
    adaptive: bool
    drafts: Drafts


class Refresher:
    """`serving` is what the engine has; `pending` what it is to get with the policy's next version, or None."""

    def __init__(self, run: RefreshRun, drafting: Drafting, policy: Path, draft: Path, out: Path, seed: int) -> None:
        """Begin with a drafter's checkpoint for the policy's; new ones are written below `out`.

        Raises:
            CheckpointError: the drafter does not fit, or has parts that cannot be trained here.
        """
        self.run, self._drafting, self._policy, self._out, self._seed = run, drafting, policy, out, seed
        self._target = read_target(policy)
        self._taps = list_taps(read_warm(draft, self._target))
        self._first = Pushed.of(FIRST, draft)
        self._frozen = self._load(self._first)
        made = load_drafter(draft, self._target, drafting.gamma)
        self.learner = Learner(made, "dspark" if drafting.drafts == "probabilistic" else "ce", run.lr)
        self.replay = ReplayBuffer(run.replay)
        self.serving = self.proven = self._first
        self.pending: Pushed | None = None
        self._made = self._refusals = 0

    def follow(
        self, model: LagunaForCausalLM, version: str, step: int, records: Sequence[TrafficRecord], live: Steps
    ) -> DrafterNote:
        """Take in a step's answers, which `model` gave as `version`; `live` is what the engine counted meanwhile."""
        rows = self._make_rows(records)
        newest = open_blocks(model, rows.rows, self._taps)
        note = DrafterNote(version=self.serving.version)
        checked = self._check(newest, live)
        if checked is not None and checked.rolled_back_to is not None:
            note = DrafterNote(version=note.version, live=checked, pushed=checked.rolled_back_to)
        else:
            gate = self._refresh(model, version, step, newest) if (step + 1) % self.run.every == 0 else None
            pushed = gate.candidate if gate is not None and gate.pushed else None
            note = DrafterNote(version=note.version, live=checked, gate=gate, pushed=pushed)
        self.replay.add(records)
        return note

    def arrived(self) -> None:
        """Note that the engine has what was pending."""
        if self.pending is not None:
            self.serving, self.pending = self.pending, None

    def dump(self) -> dict[str, Any]:
        """Return what a run continues from; between two steps, when nothing is pending."""
        assert self.pending is None
        names = {"serving": self.serving.version, "proven": self.proven.version}
        counts = {"made": self._made, "refusals": self._refusals}
        return names | counts | {"replay": self.replay.dump(), "learner": self.learner.dump()}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from what `dump` gave."""
        self.serving, self.proven = (self._find(state[name]) for name in ("serving", "proven"))
        self._made, self._refusals = state["made"], state["refusals"]
        self.replay.load(state["replay"])
        self.learner.load(state["learner"])

    def tidy(self) -> None:
        """Remove checkpoints that nothing can go back to: called when the state that names others is on disk."""
        kept = {self._folder(pushed.version) for pushed in (self.serving, self.proven)}
        for folder in self._out.glob("d-*") if self._out.exists() else ():
            if folder not in kept:
                shutil.rmtree(folder)

    def _check(self, newest: Blocks, live: Steps) -> LiveNote | None:
        """Hold the serving drafter to what the first one would have had on the same answers."""
        if self.serving == self._first:
            return None
        counts = self._count(self._frozen, newest).sum(axis=0)
        frozen = Steps(float(counts[0]), counts[1:].tolist())
        places = 1 if self._drafting.adaptive else len(frozen.accepted)
        live, frozen = live.cut(places), frozen.cut(places)
        p_below = find_p_below(live, frozen)
        if falls_short(p_below):
            self.pending = self._first if self.serving == self.proven else self.proven
            self.proven = self.pending
            self.learner.start_over(self._load(self.pending))
        elif p_below is not None:
            self.proven = self.serving
        return LiveNote(
            places=places,
            live=1 + live.mean,
            frozen=1 + frozen.mean,
            p_below=p_below,
            rolled_back_to=None if self.pending is None else self.pending.version,
        )

    def _refresh(self, model: LagunaForCausalLM, version: str, step: int, newest: Blocks) -> GateNote | None:
        """Learn, and hold what came of it against the serving drafter; None while there is nothing to learn from."""
        rng = random.Random(f"{self._seed}/refresh/{step}")
        held_out = {row.prompt for row in newest.rows}
        lesson = self._make_rows(self.replay.draw(LESSON, self.run.greedy_share, rng, held_out)).rows
        if not lesson:
            return None
        loss = self.learner.learn(open_blocks(model, lesson, self._taps), self.run.steps, rng)
        self._made += 1
        name = f"d-{self._made}:{version}"
        candidate = self.learner.write(name, self._policy, self._folder(name))
        old, new = self._load(self.serving), self._load(candidate)
        sampled = [row.prompt for row in newest.rows if row.temperature > 0]
        verdict = judge(self._count(old, newest), self._count(new, newest), sampled)
        if verdict.passes:
            self.pending, self._refusals = candidate, 0
        else:
            shutil.rmtree(candidate.folder)
            self._refusals += 1
            if self._refusals == PATIENCE:
                self.learner.start_over(old)
                self._refusals = 0
        greedy = [find_accepted(self._count(drafter, newest, greedy=True)) for drafter in (old, new)]
        taus = [None if accepted is None else 1 + accepted for accepted in greedy]
        return GateNote(
            candidate=name,
            pushed=verdict.passes,
            reason=verdict.reason,
            serving_tau=verdict.serving_tau,
            candidate_tau=verdict.candidate_tau,
            p_worse=verdict.p_worse,
            prompts=verdict.prompts,
            serving_greedy_tau=taus[0],
            candidate_greedy_tau=taus[1],
            rollouts=len(lesson),
            greedy=sum(row.temperature == 0 for row in lesson),
            loss=loss,
        )

    def _count(self, drafter: LagunaDrafter, blocks: Blocks, *, greedy: bool = False) -> Counts:
        """Count steps and accepted drafts [answers, 1 + γ] of the sampled answers, or of the greedy ones."""
        chosen = [number for number, row in enumerate(blocks.rows) if (row.temperature == 0) == greedy]
        drafts: Drafts = "greedy" if greedy else self._drafting.drafts
        counts = [count_row(drafter, blocks, row, [drafts])[0] for row in chosen]
        return np.array(counts).reshape(-1, 1 + drafter.shape.gamma)

    def _make_rows(self, records: Sequence[TrafficRecord]) -> Rows:
        target = self._target
        return make_rows(records, source="rollouts", vocabulary=target.vocab_size, max_length=target.max_model_len)

    def _load(self, pushed: Pushed) -> LagunaDrafter:
        return load_drafter(pushed.folder, self._target, self._drafting.gamma).module.eval()

    def _folder(self, version: str) -> Path:
        return self._out / version.replace(":", "-")

    def _find(self, version: str) -> Pushed:
        return self._first if version == FIRST else Pushed.of(version, self._folder(version))
