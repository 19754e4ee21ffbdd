"""Small random LLaDAs, canvases and proposers for tests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from laguna_serve.plugins.diffusion.checkpoint import LladaConfig
from laguna_serve.plugins.diffusion.decoding.canvas import Canvas, State
from laguna_serve.plugins.diffusion.model import Llada
from laguna_serve.plugins.diffusion.proposing.interface import Proposal, Run

MASK, VOCABULARY = 3, 100


def make_config(n_layers: int = 2) -> LladaConfig:
    """Grouped keys, and an embedding with more rows than there are tokens."""
    return LladaConfig(
        d_model=32,
        n_heads=4,
        n_kv_heads=2,
        n_layers=n_layers,
        mlp_hidden_size=48,
        vocab_size=VOCABULARY,
        embedding_size=VOCABULARY + 4,
        mask_token_id=MASK,
        eos_token_id=4,
        max_sequence_length=160,
    )


def make_model(seed: int = 0, n_layers: int = 2, spread: float = 0.25) -> Llada:
    """Random weights, wide enough that confidences differ."""
    generator = torch.Generator().manual_seed(seed)
    model = Llada(make_config(n_layers))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=spread, generator=generator)
    return model.eval().requires_grad_(False)


def make_draft(target: Llada, error: float = 0.03) -> Llada:
    """The target with noise on its weights: it often agrees."""
    generator = torch.Generator().manual_seed(1)
    draft = Llada(target.config)
    draft.load_state_dict(
        {name: t + error * torch.randn(t.shape, generator=generator) for name, t in target.state_dict().items()}
    )
    return draft.eval().requires_grad_(False)


def make_canvases(count: int, length: int = 16, block_length: int = 8, seed: int = 0) -> list[Canvas]:
    """Prompts of 2 to 40 tokens."""
    rng = random.Random(seed)
    prompts = [tuple(rng.randrange(5, VOCABULARY) for _ in range(rng.randrange(2, 40))) for _ in range(count)]
    return [Canvas(prompt, length, block_length, MASK) for prompt in prompts]


@dataclass
class Adversary:
    """Proposes anything: wrong tokens, other blocks, finished answers, states of another length, all as certain."""

    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def propose(self, runs: Sequence[Run], most: int) -> list[list[Proposal]]:
        return [[Proposal(self._invent(run), self.rng.random()) for _ in range(most)] for run in runs]

    def _invent(self, run: Run) -> State:
        kind = self.rng.randrange(6)
        if kind == 0:
            return run.state
        if kind == 1:
            return tuple(self.rng.randrange(5, VOCABULARY) for _ in run.state)
        if kind == 2:
            return run.state[:-1]
        share = self.rng.random()
        positions = range(len(run.state)) if kind == 3 else run.canvas.list_open(run.state)
        chosen = {at for at in positions if self.rng.random() < share}
        return tuple(self.rng.randrange(5, VOCABULARY) if at in chosen else token for at, token in enumerate(run.state))


@dataclass
class Oracle:
    """Proposes the reference's own next states, from a table: canvas → its states in order."""

    paths: dict[Canvas, list[State]]

    def propose(self, runs: Sequence[Run], most: int) -> list[list[Proposal]]:
        proposals = []
        for run in runs:
            path = self.paths[run.canvas]
            at = path.index(run.state)
            proposals.append([Proposal(state, 1.0) for state in path[at + 1 : at + 1 + most]])
        return proposals
