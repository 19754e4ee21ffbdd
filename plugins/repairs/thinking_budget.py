"""`thinking_token_budget` whatever else the step computes: drafts, parts of prompts, other requests.

vLLM's holder changes its state while it masks a step's logits, as if what it forces were always taken. A step that
computes a part of a prompt drops its token, and so does one whose drafts are rejected earlier: the marker that ends the
thinking then comes a token late. Where a drafter proposes the marker itself, it comes twice. A step of a drafter's
engine in which nobody has drafts masks the first request's row for everyone. And a request that moves into the row of
one that has ended takes its budget over: the marker stands in the middle of an answer that asked for no budget.

What the budget asks of the next token follows from the tokens before it alone. `Section` says where a sequence stands
after any prefix, so a row of logits is masked by its own prefix: the committed tokens, and the drafts before it.

Checked against vLLM 0.32.0. It can go when
`tests/plugins/test_thinking_budget.py::test_stock_holder_is_late_after_a_part_of_a_prompt` and
`::test_stock_holder_leaves_a_budget_in_its_row` fail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from vllm.v1.sample import thinking_budget_state
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

FORCED_LOGIT = 1e9


@dataclass(frozen=True, slots=True)
class Section:
    """Where a sequence stands: in its thinking or not, and after how many tokens."""

    thinking: bool = False
    spent: int = 0
    """Tokens since the marker that began the thinking."""
    closing: int = 0
    """Tokens of the end marker that the budget has forced so far."""
    tail: tuple[int, ...] = ()
    """The last tokens, as many as the longer marker has."""


class Rules(NamedTuple):
    """The two markers, as token ids, and how many tokens may stand between them."""

    start: tuple[int, ...]
    end: tuple[int, ...]
    budget: int

    def read_prompt(self, prompt: Sequence[int]) -> Section:
        """Return the section after a prompt, in thinking if its last start marker comes after its last end marker."""
        begun, ended = _find_last(prompt, self.start), _find_last(prompt, self.end)
        tail = tuple(prompt[-max(len(self.start), len(self.end)) :])
        if begun <= ended:
            return Section(tail=tail)
        return Section(thinking=True, spent=len(prompt) - begun - len(self.start), tail=tail)

    def take(self, section: Section, token: int) -> Section:
        """Return the section after one more token."""
        tail = (*section.tail, token)[-max(len(self.start), len(self.end)) :]
        if tail[-len(self.end) :] == self.end:
            return Section(tail=tail)
        if section.thinking:
            closing = section.closing + 1 if token == self.force(section) else 0
            return Section(thinking=True, spent=section.spent + 1, closing=closing, tail=tail)
        if tail[-len(self.start) :] == self.start:
            return Section(thinking=True, tail=tail)
        return replace(section, tail=tail)

    def force(self, section: Section) -> int | None:
        """Return the only token that may come next, or None where any may."""
        return self.end[section.closing] if section.thinking and section.spent >= self.budget else None


def _find_last(tokens: Sequence[int], marker: tuple[int, ...]) -> int:
    """Where the last `marker` begins, or -1; a prompt may have a hundred thousand tokens."""
    backwards, wanted, at = list(reversed(tokens)), list(reversed(marker)), 0
    try:
        while True:
            at = backwards.index(wanted[0], at)
            if backwards[at : at + len(wanted)] == wanted:
                return len(backwards) - at - len(wanted)
            at += 1
    except ValueError:
        return -1


class BudgetHolder(ThinkingBudgetStateHolder):  # type: ignore[misc]
    """vLLM's holder, whose rows are masked by their own prefixes, and whose budgets go where their requests go."""

    def sync_batch(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests from row to row; a row that another one moves into is not among those `removed`."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._state.pop(row, None)
        for row, params, prompt, _ in batch_update.added:
            self._state.pop(row, None)
            if params.thinking_token_budget is not None:
                self._state[row] = self._init_state_entry(prompt, params.thinking_token_budget)
        for source, target, direction in batch_update.moved:
            moving, there = self._state.pop(source, None), self._state.pop(target, None)
            if moving is not None:
                self._state[target] = moving
            if there is not None and direction == MoveDirectionality.SWAP:
                self._state[source] = there

    def _init_state_entry(self, prompt_tok_ids: list[int] | None, thinking_token_budget: int) -> dict[str, Any]:
        rules = Rules(tuple(self.think_start_token_ids), tuple(self.think_end_token_ids), thinking_token_budget)
        return {
            "rules": rules if rules.start and rules.end and thinking_token_budget >= 0 else None,
            "prompt": prompt_tok_ids or [],
            "section": None,
            "read": 0,
        }

    def update_state(
        self,
        output_token_ids: list[list[int]],
        spec_token_ids: list[list[int]] | None,
        repeat_indices: torch.Tensor | None = None,
    ) -> None:
        """Read the tokens that were committed since the last step."""
        for index, state in self._state.items():
            if state["rules"] is not None and index < len(output_token_ids):
                _read(state, output_token_ids[index])

    def apply_to_logits(
        self, logits: torch.Tensor, predict_bonus_token: bool, spec_token_ids: list[list[int]] | None
    ) -> torch.Tensor:
        """Mask `logits`, in place.

        They are float [rows, vocabulary]: a row for every draft where a target verifies some, else one for every
        request, which stands after its drafts.
        """
        drafts = spec_token_ids or []
        of_drafts = not predict_bonus_token and any(drafts)
        first = [0, *accumulate(len(row) for row in drafts)]
        rows, tokens = [], []
        for index, state in self._state.items():
            if state["section"] is None:
                continue
            rules, section = state["rules"], state["section"]
            own = drafts[index] if index < len(drafts) else []
            for position, token in enumerate(own):
                if of_drafts and (forced := rules.force(section)) is not None:
                    rows.append(first[index] + position)
                    tokens.append(forced)
                section = rules.take(section, token)
            if not of_drafts and (forced := rules.force(section)) is not None:
                rows.append(index)
                tokens.append(forced)
        if rows:
            logits[torch.tensor(rows, device=logits.device), torch.tensor(tokens, device=logits.device)] = FORCED_LOGIT
        return logits


def _read(state: dict[str, Any], output: list[int]) -> None:
    rules: Rules = state["rules"]
    if state["section"] is None or len(output) < state["read"]:
        state.update(section=rules.read_prompt(state["prompt"]), read=0)
    section = state["section"]
    for token in output[state["read"] :]:
        section = rules.take(section, token)
    state.update(section=section, read=len(output))


def apply() -> None:
    """Put `BudgetHolder` where a batch looks for the class of its holder."""
    thinking_budget_state.ThinkingBudgetStateHolder = BudgetHolder
