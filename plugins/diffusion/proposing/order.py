"""The order model: which position the target commits next, from its last logits and what was committed since.

A chain by the last logits alone takes the positions by falling confidence. What it misses is what a commit does to the
others: a token's neighbours become certain, those that competed with it do not. A small convolution over the block's
positions learns that from the target's own decodes in minutes, and tells two chances for each open position: that it
is next, and that the token that the last logits choose there is still the right one. Proposals are then searched best
first, so that the likeliest states are found whether they lie behind one another or beside.

Source: the idea of a trained order over the target's last logits is that of arXiv:2610.22543 (SPOT); features, network
and search are ours. A convolution in place of its transformer, as it takes blocks of any length.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from laguna_serve.plugins.diffusion.decoding.canvas import State
from laguna_serve.plugins.diffusion.decoding.reference import Ranking, Reference, rank
from laguna_serve.plugins.diffusion.errors import DiffusionError
from laguna_serve.plugins.diffusion.proposing.interface import Proposal, Run
from laguna_serve.plugins.diffusion.proposing.shapes import pace

LIKELIEST = 8
# Of a position: its likeliest tokens' log-probabilities, the entropy, the chosen token's, is it masked, and was it
# committed since.
FEATURES = LIKELIEST + 4
WIDTH, LAYERS, REACH = 64, 3, 5
BRANCHES = 3


class OrderModel(nn.Module):
    """Some 80,000 parameters on the target's own embedding, which is not among them."""

    embedding: torch.Tensor

    def __init__(self, embedding: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("embedding", embedding.detach().float(), persistent=False)
        self.features = nn.Linear(FEATURES, WIDTH)
        self.tokens = nn.Linear(embedding.shape[1], WIDTH, bias=False)
        self.layers = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, REACH, padding=REACH // 2) for _ in range(LAYERS))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS))
        self.out = nn.Linear(WIDTH, 2)

    def forward(self, features: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Score blocks: features [N, L, FEATURES], tokens [N, L] int64.

        Returns:
            Logits [N, L] of being next, not yet confined to the open positions, and of the token's being right.
        """
        x = self.features(features) + self.tokens(self.embedding[tokens])
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + torch.relu(layer(norm(x).transpose(1, 2)).transpose(1, 2))
        scores = self.out(x)
        return scores[..., 0], scores[..., 1]

    def save(self, path: Path) -> None:
        """Write the weights, without the target's embedding."""
        save_file(self.state_dict(), path)

    @classmethod
    def load(cls, path: Path, embedding: torch.Tensor) -> OrderModel:
        """Read what `save` wrote.

        Raises:
            DiffusionError: it is no order model, or one of another target.
        """
        model = cls(embedding)
        try:
            model.load_state_dict(load_file(path))
        except (OSError, SafetensorError, RuntimeError) as error:
            first = str(error).splitlines()[0]
            raise DiffusionError(f"{path}: expected an order model of this target, got {first}; train it") from None
        return model.to(embedding.device).eval().requires_grad_(False)


class Outlook:
    """What a run's last logits say of its open block, and of the states behind the current one."""

    def __init__(self, run: Run, reference: Reference) -> None:
        stale = run.find_stale()
        assert stale is not None
        assert run.last is not None
        self.run = run
        self.reference = reference
        self.logits = stale
        log_probabilities = torch.log_softmax(stale, -1)
        likeliest = log_probabilities.topk(LIKELIEST, -1).values
        entropies = -(log_probabilities.exp() * log_probabilities).sum(-1, keepdim=True)
        self._constant = torch.cat([likeliest, entropies], -1)
        self._before = run.last[0]
        block = run.canvas.find_block(self._before)
        assert block is not None
        self.block = block
        # Without noise the choice at a position does not depend on how many are left.
        self._ranking = None if reference.temperature else rank(run.canvas, reference, self._before, stale)

    def rank_open(self, state: State) -> Ranking:
        """Rank the state's open positions by the last logits."""
        if self._ranking is None:
            return rank(self.run.canvas, self.reference, state, self.logits)
        mask, ranking = self.run.canvas.mask_id, self._ranking
        kept = [place for place, at in enumerate(ranking.positions) if state[at] == mask]
        return Ranking(
            tuple(ranking.positions[place] for place in kept),
            tuple(ranking.tokens[place] for place in kept),
            ranking.confidences[kept],
        )

    def describe(self, state: State, ranking: Ranking) -> tuple[torch.Tensor, torch.Tensor]:
        """Describe a state of the block for the model: features [L, FEATURES] and tokens [L]."""
        block = self.block
        tokens = list(state[block.start : block.stop])
        changing = [[0.0, 0.0, float(self._before[at] != state[at])] for at in block]
        for at, token, confidence in zip(ranking.positions, ranking.tokens, ranking.confidences.tolist(), strict=True):
            place = at - block.start
            tokens[place] = token
            changing[place][:2] = confidence, 1.0
        device = self.logits.device
        return torch.cat([self._constant, torch.tensor(changing, device=device)], -1), torch.tensor(
            tokens, device=device
        )


@dataclass(slots=True)
class _Search:
    """The search behind one run's state."""

    outlook: Outlook
    frontier: list[tuple[float, int, State]]
    found: dict[State, float] = field(default_factory=dict)

    def is_over(self, most: int) -> bool:
        """Say whether nothing that is still to be looked at can be among the `most` likeliest."""
        if not self.frontier:
            return True
        if len(self.found) < most:
            return False
        return -self.frontier[0][0] <= heapq.nlargest(most, self.found.values())[-1]


class Ordered:
    """Proposes the states that an order model holds for the likeliest, from the target's last logits."""

    def __init__(self, model: OrderModel) -> None:
        self.model = model
        self._number = count()

    @torch.inference_mode()
    def propose(self, runs: Sequence[Run], most: int) -> list[list[Proposal]]:
        """Propose up to `most` states for each run; every round of the search is one pass of the model for all."""
        searches = {run: self._begin(run) for run in runs if run.find_stale() is not None}
        for _ in range(most):
            going = [search for search in searches.values() if not search.is_over(most)]
            if not going:
                break
            self._expand(going)
        return [self._choose(searches.get(run), most) for run in runs]

    def _begin(self, run: Run) -> _Search:
        return _Search(Outlook(run, pace(run.reference)), [(-1.0, next(self._number), run.state)])

    def _choose(self, search: _Search | None, most: int) -> list[Proposal]:
        if search is None:
            return []
        found = [Proposal(state, chance) for state, chance in search.found.items()]
        return sorted(found, key=lambda proposal: -proposal.chance)[:most]

    def _expand(self, going: Sequence[_Search]) -> None:
        """Take the likeliest state of every search and find its successors; blocks of one length share a pass."""
        taken = [(search, *heapq.heappop(search.frontier)) for search in going]
        rankings = [search.outlook.rank_open(state) for search, _, _, state in taken]
        described = [
            search.outlook.describe(state, ranking)
            for (search, _, _, state), ranking in zip(taken, rankings, strict=True)
        ]
        for length in {len(tokens) for _, tokens in described}:
            places = [place for place, (_, tokens) in enumerate(described) if len(tokens) == length]
            features, tokens = (torch.stack([described[place][part] for place in places]) for part in (0, 1))
            for place, is_next, is_right in zip(places, *self.model(features, tokens), strict=True):
                search, chance, _, state = taken[place]
                self._follow(search, -chance, state, rankings[place], is_next, is_right)

    def _follow(
        self,
        search: _Search,
        chance: float,
        state: State,
        ranking: Ranking,
        is_next: torch.Tensor,
        is_right: torch.Tensor,
    ) -> None:
        canvas = search.outlook.run.canvas
        block = canvas.find_block(state)
        assert block is not None
        wanted = search.outlook.reference.schedule.count(ranking.confidences, canvas.block_length)
        if wanted >= len(ranking.positions):  # the next state is of another block
            return
        places = torch.tensor([at - block.start for at in ranking.positions])
        first, order = is_next[places].softmax(-1).sort(descending=True)
        right = is_right[places].sigmoid()
        for start in range(min(BRANCHES if wanted == 1 else 1, len(order))):
            chosen = order[start : start + wanted].tolist()
            likely = chance * _draw_together(first[start : start + wanted]) * float(right[chosen].prod())
            after = canvas.commit(state, {ranking.positions[at]: ranking.tokens[at] for at in chosen})
            if likely > search.found.get(after, 0.0):
                search.found[after] = likely
                heapq.heappush(search.frontier, (-likely, next(self._number), after))


def _draw_together(chances: torch.Tensor) -> float:
    """Estimate the chance that these k positions are drawn first, in any order: k! times that of the order given."""
    left, together = 1.0, float(math.factorial(len(chances)))
    for chance in chances.tolist():
        together *= chance / max(left, 1e-9)
        left -= chance
    return min(together, 1.0)
