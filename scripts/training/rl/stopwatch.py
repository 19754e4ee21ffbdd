"""What the parts of a step take: seconds, and the processor time of whoever works in it."""

from __future__ import annotations

import time

from laguna_serve.scripts.training.rl.service import TrainingService

# Parts in which the engine works, and this process waits.
OF_ENGINE = ("rollouts", "push")


class Stopwatch:
    """`wall_s` and `processor_s` by part: the engine's in `OF_ENGINE`, this process's in the others."""

    def __init__(self, service: TrainingService) -> None:
        self._service = service
        self.wall_s: dict[str, float] = {}
        self.processor_s: dict[str, float] = {}
        self._started = (0.0, 0.0, 0.0)

    def start(self) -> None:
        """Begin a part of the step."""
        self._started = self._read()

    def stop(self, part: str) -> None:
        """End the part, under its name."""
        wall, own, engine = (now - then for now, then in zip(self._read(), self._started, strict=True))
        self.wall_s[part] = wall
        self.processor_s[part] = engine if part in OF_ENGINE else own

    def _read(self) -> tuple[float, float, float]:
        return time.monotonic(), time.process_time(), self._service.read_cpu_s()
