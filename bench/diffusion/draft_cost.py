"""When a draft model pays in exact masked diffusion: the arithmetic of a pass of the draft per proposed state.

With the chance p that the draft's next state is the target's, each time anew, m proposed states bring
(1 − p^(m+1)) ÷ (1 − p) steps, and the pass takes 1 + m (c + r) target passes: c the draft's pass, r a state's rows.
"""

from __future__ import annotations

# Of a target's pass, where weights are what bounds it: LLaDA-8B's rows on an H100.
ROWS = 0.02
# The published 24-layer draft of LLaDA-8B in passes of its bfloat16 target, by the bytes that a pass reads.
DRAFTS = {"bfloat16": 0.646, "FP8": 0.358, "int4, head in bfloat16": 0.222}
MOST_STATES = 16


def find_speedup(chance: float, cost: float, states: int, rows: float = ROWS) -> float:
    """Find steps per time against decoding without a draft.

    Args:
        chance: that the draft's next state is the target's; below 1.
        cost: of the draft's pass, in target passes.
        states: proposed in a pass of the target.
        rows: of a state, in target passes.
    """
    return (1 - chance ** (states + 1)) / (1 - chance) / (1 + states * (cost + rows))


def choose_states(chance: float, cost: float) -> int:
    """Choose how many states to propose; 0 where the draft loses."""
    return max(range(MOST_STATES + 1), key=lambda states: find_speedup(chance, cost, states))


def find_best(chance: float, cost: float) -> float:
    """Find the speed-up with the best number of states, 1 where that is none."""
    return find_speedup(chance, cost, choose_states(chance, cost))
