"""What a GRPO run notes of its steps."""

from __future__ import annotations

import msgspec

from laguna_serve.scripts.training.rl.refresh.notes import DrafterNote, RefreshRun


class TiedTokens(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens at or behind a tie of two experts, and the largest difference of trainer and engine on them (nats)."""

    tokens: int
    mismatch_nats: float


class OffPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """What became of tokens on which trainer and engine differ (off_policy/importance.py, off_policy/replay.py).

    Attributes:
        mean_nats: mean |difference| of their log-probabilities over all sampled tokens.
        capped: tokens whose weight was cut to the cap.
        dropped: completions that were left out.
        rerouted: tokens, of prompts too, that the trainer would have sent to other experts; None without replay.
    """

    mean_nats: float
    capped: int
    dropped: int
    rerouted: int | None = None


class StepSeconds(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the parts of a step took; `refresh`: the drafter's, its checks included."""

    rollouts: float
    learning: float
    push: float
    refresh: float | None = None

    @property
    def total(self) -> float:
        """The whole step without measurements."""
        return self.rollouts + self.learning + self.push + (self.refresh or 0.0)


class Step(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One step; what was not measured in it, or after the last one, is left out.

    Attributes:
        version: of the weights that sampled.
        held_out_reward: mean over the held-out prompts.
        reward: mean over the step's rollouts, and `tokens` that they have.
        mismatch_nats: the largest difference of trainer and engine on sampled tokens that are behind no tie.
        acceptance_length: tokens per step of the engine with a drafter, over `drafts` such steps.
        held_out_greedy_length: the same while held-out prompts were answered greedily.
        processor_s: of the same parts as `seconds`, the processor time: the engine's for rollouts and push, the
            trainer's for learning and refresh.
        drafter: what became of a drafter that learns.
    """

    step: int
    version: str
    held_out_reward: float | None = None
    reward: float | None = None
    mismatch_nats: float | None = None
    tied: TiedTokens | None = None
    off_policy: OffPolicy | None = None
    acceptance_length: float | None = None
    tokens: int | None = None
    seconds: StepSeconds | None = None
    drafts: int | None = None
    held_out_greedy_length: float | None = None
    processor_s: StepSeconds | None = None
    drafter: DrafterNote | None = None


class GrpoRun(msgspec.Struct, frozen=True, kw_only=True):
    """What decides about a run; another run's folder is not continued. Older runs did not say what may be unset.

    `refresh`: of a drafter that learns; `gamma`: a number, "adaptive", or None for the drafter's most.
    """

    model: str
    draft: str | None
    gamma: int | str | None
    draft_sampling: str | msgspec.UnsetType = msgspec.UNSET
    prompts_per_step: int
    group: int
    max_tokens: int
    lr: float
    dtype: str
    seed: int
    prompts: str
    prompts_sha256: str | msgspec.UnsetType = msgspec.UNSET
    replay_experts: bool | msgspec.UnsetType = msgspec.UNSET
    importance_cap: float | msgspec.UnsetType = msgspec.UNSET
    drop_beyond: float | msgspec.UnsetType | None = msgspec.UNSET
    refresh: RefreshRun | msgspec.UnsetType = msgspec.UNSET


class HeldOut(msgspec.Struct, frozen=True, kw_only=True):
    """Mean reward on the held-out prompts before the first step and after the last."""

    first: float
    last: float
    prompts: int
