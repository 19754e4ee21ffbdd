"""What the server is started with; read without torch, so that a launcher can refuse at once what it would refuse."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any, NoReturn

from laguna_serve.plugins.diffusion.errors import DiffusionError

CACHES = ("none", "prefix", "dual")
# Name → what `load_proposers` calls it, whether it takes a draft, and whether it has to be learnt first.
PROPOSERS = {
    "chain": ("chain", False, False),
    "graph": ("graph", False, True),
    "order": ("order", False, True),
    "union": ("union", False, True),
    "draft": ("draft", True, False),
    "corrected": ("draft, corrected", True, False),
    "sequential": ("draft, gated", True, False),
    "order-draft": ("order and draft", True, True),
    "order-corrected": ("order and corrected", True, True),
}
# auto: proposals are tried for a few seconds before anybody is served, and left out where they lose.
POLICIES = ("auto", "always", "off")
# Of a draft's matrices; "target": the target's dtype.
DRAFT_WEIGHTS = ("target", "fp8", "int8", "int4")
DTYPES = ("auto", "float32", "float", "bfloat16", "float16", "half")
# Where something to propose them by is named, and no number.
DRAFTED_STATES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """A model to serve, and what requests get that do not choose for themselves.

    Attributes:
        model: a folder.
        served_model_name: in requests; None: the folder's name.
        dtype: "auto" is the checkpoint's on a GPU, float32 on a CPU.
        max_model_len: of prompt and canvas together; None: the model's own.
        max_num_seqs: requests that share passes.
        max_waiting: beyond those; one more is refused.
        max_cached_tokens: of prompts and canvases that share passes, where there is a cache; None: by the free memory.
        canvas_length: of an answer whose request says no max_tokens, or what the prompt leaves room for.
        tokens_per_step, steps_per_block, threshold: the schedule, one of them; none: a token a step.
        cache, guidance: of all requests.
        draft: a smaller model's folder.
        draft_weights: one of DRAFT_WEIGHTS.
        proposals: a folder of what was learnt of the model's decodes (scripts/training/diffusion/calibrate.py).
        states: proposed per request and pass; None: DRAFTED_STATES with a draft or `proposals`, else none.
        proposer: None: "corrected" with a draft, else "order" with `proposals`, else "chain".
        draft_policy: one of POLICIES.
        rows: positions of all proposals of a pass together, so that a crowd proposes less.
        seed: requests that are drawn and have no seed get theirs by it, in their order; None: by chance.
        allowed_origins: of pages in browsers, a JSON list.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_waiting: int = 1024
    max_cached_tokens: int | None = None
    canvas_length: int = 128
    block_length: int = 32
    tokens_per_step: int | None = None
    steps_per_block: int | None = None
    threshold: float | None = None
    cache: str = "none"
    guidance: float = 0.0
    draft: str | None = None
    draft_weights: str = DRAFT_WEIGHTS[0]
    states: int | None = None
    proposals: str | None = None
    proposer: str | None = None
    draft_policy: str = "auto"
    rows: int = 256
    seed: int | None = None
    allowed_origins: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "canvas_length", "block_length", "tokens_per_step"):
            _require_positive(name, getattr(self, name))
        for name in ("steps_per_block", "rows", "max_cached_tokens"):
            _require_positive(name, getattr(self, name))
        for name, value in (("max_waiting", self.max_waiting), ("states", self.states)):
            if value is not None and value < 0:
                raise DiffusionError(f"--{_dash(name)}: expected 0 or more, got {value}")
        schedules = [name for name in ("tokens_per_step", "steps_per_block", "threshold") if getattr(self, name)]
        if len(schedules) > 1:
            got = " and ".join(f"--{_dash(name)}" for name in schedules)
            raise DiffusionError(f"schedule: expected one of them, got {got}; drop one")
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise DiffusionError(f"--threshold: expected a probability between 0 and 1, got {self.threshold}")
        if not 0 <= self.guidance < math.inf:
            raise DiffusionError(f"--guidance: expected 0 or more, got {self.guidance}")
        if self.draft_weights != DRAFT_WEIGHTS[0] and self.draft is None:
            got = f"--draft-weights {self.draft_weights}"
            raise DiffusionError(f"{got}: expected --draft beside it, got none; name the draft")
        _, drafts, learnt = PROPOSERS[self.chosen_proposer]
        if drafts and self.draft is None:
            raise DiffusionError(f"--proposer {self.proposer}: expected --draft beside it, got none; name the draft")
        if learnt and self.proposals is None:
            raise DiffusionError(
                f"--proposer {self.proposer}: expected --proposals beside it, got none; name the folder"
            )

    def check_block(self, longest: int) -> None:
        """Raise DiffusionError where a block leaves no room for a prompt; `longest`: of the model's sequences."""
        longest = min(longest, self.max_model_len or longest)
        if self.block_length >= longest:
            expected = f"expected fewer than {longest}, the longest sequence of prompt and answer"
            raise DiffusionError(f"--block-length: {expected}, got {self.block_length}; lower it")

    @property
    def chosen_proposer(self) -> str:
        """What proposes, by its name in PROPOSERS."""
        if self.proposer is not None:
            return self.proposer
        return "corrected" if self.draft is not None else "order" if self.proposals is not None else "chain"

    @property
    def proposed_states(self) -> int:
        """States that are proposed per request and pass."""
        if self.draft_policy == "off":
            return 0
        if self.states is not None:
            return self.states
        return 0 if self.draft is self.proposals is None else DRAFTED_STATES


def parse_options(argv: Sequence[str]) -> ServerOptions:
    """Parse a command line.

    Raises:
        DiffusionError: it is not as expected.
    """
    parser = _Parser(prog="python -m laguna_serve.plugins.diffusion.server", allow_abbrev=False)
    kinds = {"int": int, "float": float, "str": str}
    choices = {"dtype": DTYPES, "cache": CACHES, "proposer": tuple(PROPOSERS), "draft_policy": POLICIES}
    choices["draft_weights"] = DRAFT_WEIGHTS
    parser.add_argument("model", help="checkpoint folder")
    for field in fields(ServerOptions)[1:]:
        kind = kinds[str(field.type).partition(" ")[0]]
        more: dict[str, Any] = {"choices": choices[field.name]} if field.name in choices else {}
        parser.add_argument(f"--{_dash(field.name)}", type=kind, default=field.default, **more)
    return ServerOptions(**vars(parser.parse_args(list(argv))))


def require_torchao(draft_weights: str) -> None:
    """Raise DiffusionError where a draft's matrices are to have fewer bits and torchao is not installed."""
    if draft_weights != DRAFT_WEIGHTS[0] and find_spec("torchao") is None:
        expected = "expected an environment with torchao, got none"
        raise DiffusionError(f"--draft-weights {draft_weights}: {expected}; pip install 'laguna-serve[quantised]'")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise DiffusionError(f"options: {message}; see --help")


def _require_positive(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise DiffusionError(f"--{_dash(name)}: expected at least 1, got {value}")


def _dash(name: str) -> str:
    return name.replace("_", "-")
