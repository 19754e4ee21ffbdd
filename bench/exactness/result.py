"""The result of bench/exactness: `exactness.json`, schema laguna_serve.diffusion_exactness/1."""

from __future__ import annotations

from msgspec import Struct

from laguna_serve.serving.kit.environment import Environment


class ExactPoint(Struct, frozen=True, kw_only=True):
    """One proposer under one reference.

    Attributes:
        schedule, cache, temperature: of the reference.
        differing: answers that are not the reference's to the token; anything but 0 is a defect.
        slower: answers that took more passes of the target than the reference has steps; likewise.
        steps, passes: over all prompts.
    """

    schedule: str
    cache: str
    temperature: float
    proposer: str
    prompts: int
    differing: int
    slower: int
    steps: int
    passes: int


class ExactnessResult(Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.diffusion_exactness/1"):
    """Every proposer under every reference."""

    environment: Environment
    model: str
    draft: str | None
    canvas: int
    block: int
    prompts: int
    prompt_tokens: int | None
    states: int
    concurrency: int
    points: list[ExactPoint]

    @property
    def wrong(self) -> int:
        """Answers that differ or took more passes."""
        return sum(point.differing + point.slower for point in self.points)
