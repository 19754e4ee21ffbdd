"""The last block of a prefix-cache hit beside a DFlash drafter: it is kept, as without one.

vLLM computes the last matched block again for every drafter that reads the target's hidden states. An EAGLE drafter
needs that: its entry for a token is made of that token's hidden state and of the *next* token, which is another one
where the prompts part. A DFlash drafter's entry is made of the token's hidden state alone, by the same step that makes
the target's entry, and lies in the same block (one block table for all groups of layers is hit or missed as a whole):
whatever the target may read of a cached block, the drafter may, too. A CPU's block has 128 tokens, so that prompts of
less than two blocks shared nothing.

A step without the drafter's pass would break this. There are two: beside a request at the length limit, which
plugins/worker.py mends, and under `--gamma adaptive`, whose context is written before a hit is read
(plugins/adaptive/context.py).

Checked against vLLM 0.32.0, which has `disable_eagle_block_drop` for it; as a replacement it asks nothing of a vLLM
that has not. It can go when `tests/plugins/test_repairs.py::test_stock_drops_the_trailing_block` fails.
"""

from __future__ import annotations

from vllm.config.speculative import SpeculativeConfig

stock_drop = SpeculativeConfig.use_eagle_block_drop


def drops_trailing_block(self: SpeculativeConfig) -> bool:
    """`SpeculativeConfig.use_eagle_block_drop`, never for DFlash."""
    return not self.use_dflash() and bool(stock_drop(self))


def apply() -> None:
    """Put `drops_trailing_block` in the place of the configuration's method."""
    SpeculativeConfig.use_eagle_block_drop = drops_trailing_block
