"""What is different about arms that serve a masked diffusion model, whose engine is this project's own.

Its answers are a function of the request alone, to the bit, so that between two arms a tie is a defect too; and there
is nothing that an autoregressive control or a teacher-forced replay could be asked.
"""

from __future__ import annotations

from collections.abc import Sequence

from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.checkpoint.diffusion import find_diffusion

# A benchmark measures what it is asked to, where the engine would leave out what does not pay.
POLICY, KEEP = "--draft-policy", "always"
NO_ROW_MATCHED = "in masked diffusion no row sees what shares its pass: the baseline again is the control"
NO_REPLAY = "masked diffusion has no prefix that could be replayed"
# γ of a sweep that names none: states beside the current one.
MOST_STATES = 8


def serves_diffusion(model: str | None) -> bool:
    """Say whether it is a masked diffusion model; one that cannot be read is not: who starts it says what is wrong."""
    try:
        return model is not None and find_diffusion(model) is not None
    except CheckpointError:
        return False


def keep_proposals(flags: Sequence[str]) -> tuple[str, ...]:
    """Return the flags of an engine that proposes whether that pays or not, unless they say otherwise."""
    named = any(flag.partition("=")[0] == POLICY for flag in flags)
    return (*flags, *(() if named else (POLICY, KEEP)))
