"""The sequential head of a DFlash drafter: what has been drafted in a block changes the places behind it.

A block's places are drafted in one pass and know nothing of each other's tokens: under temperature the second place is
drafted for all first tokens at once. With e the table of tokens, h_k the drafter's last hidden state at place k and
x_{k−1} the token before it (at k = 1 the anchor, which the target has committed),

    [z, c] = M [e(x_{k−1}); s_{k−1}] + P h_k + b        s_k = s_{k−1} + σ(z) ⊙ (tanh(c) − s_{k−1}),  s_0 = 0
    logits_k = the block's own logits + O s_k

of rank r: e [V, r], M [2r, 2r], P [2r, H], O [V, r]. P h is one product for the whole block; what is left per place
reads O, r/H of what the target's head is. With O = 0 the drafter is what it was without a head.

Semi-autoregressive drafting is DSpark's (arXiv:2607.05147), whose plain head has a table of pairs of tokens in place of
the state, `e` and `O` alone; the state is a GRU's with one gate. Pure PyTorch: vLLM's class and the training share it.
"""

from __future__ import annotations

import torch
from torch import nn


class SequentialHead(nn.Module):
    """Without any effect to begin with."""

    def __init__(self, vocab_size: int, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.tokens = nn.Embedding(vocab_size, rank)
        self.places = nn.Linear(hidden_size, 2 * rank)
        self.mix = nn.Linear(2 * rank, 2 * rank, bias=False)
        self.out = nn.Linear(rank, vocab_size, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.5)
        nn.init.zeros_(self.out.weight)

    def start(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Prepare blocks: hidden [..., γ, H] → what each place brings [..., γ, 2r], and the state before them [..., r].

        With γ places of a longer block the head goes no further than those.
        """
        return self.places(hidden), hidden.new_zeros(*hidden.shape[:-2], self.rank)

    def advance(self, state: torch.Tensor, token: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Go on by a place: state [..., r], the token before it [...] int, what the place brings [..., 2r]."""
        gate, new = (self.mix(torch.cat([self.tokens(token), state], dim=-1)) + place).chunk(2, dim=-1)
        return torch.lerp(state, new.tanh(), gate.sigmoid())

    def bias(self, state: torch.Tensor) -> torch.Tensor:
        """Return what a state [..., r] adds to the logits of its place, [..., V]."""
        bias: torch.Tensor = self.out(state)
        return bias

    def forward(self, hidden: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """Return what is added to the logits of blocks [..., γ, V] whose tokens are known.

        hidden [..., γ, H]; previous [..., γ] int: the anchor and the tokens of all places but the last.
        """
        places, state = self.start(hidden)
        states = []
        for place, token in zip(places.unbind(-2), previous.unbind(-1), strict=True):
            state = self.advance(state, token, place)
            states.append(state)
        return self.bias(torch.stack(states, dim=-2))
