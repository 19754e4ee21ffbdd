"""An acceptance curve for others to use: `acceptance.json`, schema laguna_serve.acceptance_curve/1."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from laguna_serve.bench.harness.prompts import Thinking
from laguna_serve.serving.kit.environment import Environment


class CurvePoint(Struct, frozen=True, kw_only=True):
    """One γ.

    Attributes:
        tau: tokens emitted per verification step, the target's own token counted: 1 to γ + 1.
        per_position: of the drafts of γ tokens, the share whose token 1, 2, … was accepted; its sum + 1 is tau.
        speedup: over plain decoding on this device, with its 95% interval.
        differing: of `prompts`, those whose greedy tokens differ from plain decoding's.
        beyond_block: more tokens than the drafter was trained to propose.
    """

    gamma: int
    tau: float
    per_position: list[float]
    speedup: float
    ci95: tuple[float, float]
    prompts: int
    differing: int | None
    beyond_block: bool = False


class Curve(Struct, frozen=True, kw_only=True):
    """Acceptance by γ with one setting of the chat template; `thinking` None: the template's own default."""

    thinking: Thinking | None
    points: list[CurvePoint]


class AcceptanceCurve(Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.acceptance_curve/1"):
    """A drafter's acceptance by γ and position, on prompts asked through the target's chat template.

    Attributes:
        model, draft: hub ids, or names of folders.
        acceptance: "measured", never prescribed to the engine.
        prompts_sha256: of the prompts file.
        max_tokens: of an answer; answers go on past their end to so many, as `ignore_eos` says.
        temperature: 0 is greedy, where a draft is accepted if it is the target's first choice.
    """

    environment: Environment
    model: str
    draft: str
    acceptance: Literal["measured"] = "measured"
    prompts_file: str
    prompts_sha256: str
    num_prompts: int
    max_tokens: int
    ignore_eos: bool = True
    concurrency: int = 1
    temperature: float = 0.0
    dtype: str
    curves: list[Curve]
