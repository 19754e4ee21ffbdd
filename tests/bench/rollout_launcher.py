"""Takes the launcher's place for rollouts: mock engines with groups, new weights and a controlled clock."""

from __future__ import annotations

from typing import Any, ClassVar

from ab_harness import MockLauncher
from mock_engine import START, Clock, MockEngine, Rollouts, Settings, Weights

from laguna_serve.serving.engine import EngineConfig

GAMMA = 7


class RolloutLauncher(MockLauncher):
    """Takes the launcher's place: its engines are mocks that share `clock`.

    `tau`, `cost`, `fault` and `die_after` are those of the speculating engine; `fault` is a route that fails, "deaf" or
    "foreign". Without `drafts` it decides against them.
    """

    tau: ClassVar[dict[str, int]] = {START: 4}
    cost: ClassVar[float] = 2.0
    drafts: ClassVar[bool] = True
    fault: ClassVar[str | None] = None
    die_after: ClassVar[int | None] = None
    clock: ClassVar[Clock] = Clock()
    engines: ClassVar[tuple[MockEngine, ...]] = ()

    def __init__(self, config: EngineConfig, **more: Any) -> None:
        super().__init__(config, **more)
        type(self).engines += (self._fake,)

    def choose(self, config: EngineConfig) -> Settings:
        """By whether it drafts."""
        made = type(self)
        if config.draft is None or not made.drafts:
            return Settings(says=Rollouts(made.tau), weights=Weights(), clock=made.clock)
        weights = Weights(deaf=made.fault == "deaf")
        weights.fail |= {made.fault} if made.fault is not None and made.fault.startswith("/") else set()
        return Settings(
            says=Rollouts(made.tau, made.cost, foreign=made.fault == "foreign"),
            weights=weights,
            clock=made.clock,
            gamma=GAMMA,
            die_after=made.die_after,
        )
