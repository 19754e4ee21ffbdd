"""What is fuzzed: the configuration of bench/fuzz.py, and its engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from laguna_serve.serving.chat.vendor_defaults import ChatOptions
from laguna_serve.serving.engine import EngineConfig
from laguna_serve.serving.kit.flags import MOST_SEED, BoundedConfig, Flag

# Tokens that one step computes at most: longer prompts are cut.
STEP_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class FuzzConfig(BoundedConfig):
    """An engine to send requests to, and for how long; the files go to `out`."""

    model: Annotated[str, Flag("checkpoint folder or hub id")]
    draft: Annotated[str | None, Flag("DFlash drafter")] = None
    minutes: Annotated[
        float, Flag("how long requests are sent, starts of engines counted (default: 20)", at_least=0)
    ] = 20.0
    seed: Annotated[int, Flag("of the drawn batches (default: 1)", at_least=0, at_most=MOST_SEED)] = 1
    out: Annotated[Path, Flag("folder for the results")]
    resume: Annotated[bool, Flag("go on where a run into the same folder stopped")] = False

    def make_engine(self) -> EngineConfig:
        """float32, eager, and small steps, so that prompts are cut."""
        return EngineConfig(
            model=self.model,
            draft=self.draft,
            dtype="float32",
            enforce_eager=True,
            max_num_seqs=16,
            chat=ChatOptions(),
            extra_args=("--max-num-batched-tokens", str(STEP_TOKENS)),
        )
