"""How a student is taught, and what is noted of its steps and of the whole."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from laguna_serve.scripts.training.dante.losses import CENTER, Anchor
from laguna_serve.scripts.training.dante.rows import Curriculum, EntropyScale
from laguna_serve.serving.kit.environment import Environment
from laguna_serve.serving.kit.flags import MOST_SEED, MOST_THREADS, Flag, FlagError, check_bounds


@dataclass(frozen=True, kw_only=True)
class DanteConfig:
    """A student, a cache, and how the one learns the other."""

    model: Annotated[Path, Flag("the student's initialisation: a checkpoint's folder, or a hub id", positional=True)]
    cache: Annotated[Path, Flag("folder of scripts/dante cache, or one shard", metavar="DIR")]
    out: Annotated[Path, Flag("folder for the student", metavar="DIR")]
    work: Annotated[Path | None, Flag("training state (default: OUT with .work behind its name)", metavar="DIR")] = None
    steps: Annotated[int, Flag("default 2000", at_least=1)] = 2000
    warm_up: Annotated[int | None, Flag("steps (default: a tenth)", metavar="N", at_least=0)] = None
    batch: Annotated[int, Flag("rows of a step, over all processes (default 128)", at_least=1)] = 128
    micro_batch: Annotated[
        int | None, Flag("rows at once in a process (default: all of its part)", metavar="N", at_least=1)
    ] = None
    length: Annotated[int, Flag("tokens of a row at most (default 4096)", at_least=16)] = 4096
    lr: Annotated[float, Flag("peak (default 2e-5), cosine after the warm-up")] = 2e-5
    share: Annotated[float, Flag("of the records, drawn by --seed (default 1)")] = 1.0
    curriculum: Annotated[Curriculum, Flag("what rows are sorted by; none shuffles (default output_entropy)")] = (
        "output_entropy"
    )
    plain: Annotated[bool, Flag("plain fine-tuning: no weights, no anchor, no λ", group="the objective")] = False
    no_weights: Annotated[bool, Flag("leave CWCE out")] = False
    anchor: Annotated[Anchor, Flag("TEA: over the initialisation's norm, as printed, or none")] = "relative"
    entropy_scale: Annotated[EntropyScale, Flag("what CWCE weighs by: as measured, or ranks spread over 0 to 3")] = (
        "nats"
    )
    entropy_center: Annotated[float, Flag(f"where the weight is half-way (default {CENTER})", metavar="H")] = CENTER
    precision: Annotated[Literal["float32", "bfloat16"], Flag("what is computed in", group="the machine")] = "float32"
    checkpointing: Annotated[bool, Flag("activation checkpointing: less memory, a third more work")] = False
    device: Annotated[Literal["cpu", "cuda"], Flag("where (default cpu)")] = "cpu"
    threads: Annotated[int, Flag("of the processor, of each process (default 1)", at_least=1, at_most=MOST_THREADS)] = 1
    save_every: Annotated[int, Flag("steps between saved states (default 200)", metavar="N", at_least=1)] = 200
    seed: Annotated[int, Flag("default 42", at_least=0, at_most=MOST_SEED)] = 42

    def __post_init__(self) -> None:
        """Refuse what means nothing. Raises FlagError."""
        check_bounds(self)
        if not 0 < self.lr < 1:
            raise FlagError(f"--lr: expected a rate between 0 and 1, got {self.lr}")
        if not 0 < self.share <= 1:
            raise FlagError(f"--share: expected more than 0 and at most 1, got {self.share}")

    @property
    def warm_up_steps(self) -> int:
        """Steps in which the rate rises and λ_CE is held."""
        return self.steps // 10 if self.warm_up is None else self.warm_up

    @property
    def weighs(self) -> bool:
        """Whether CWCE is on."""
        return not (self.plain or self.no_weights)

    @property
    def anchored(self) -> Anchor:
        """Which TEA is on."""
        return "none" if self.plain else self.anchor

    @property
    def decisive(self) -> dict[str, Any]:
        """What decides about the student; how many processes share a step does not."""
        machine = ("model", "cache", "out", "work", "micro_batch", "device", "threads", "save_every", "checkpointing")
        return {name: value for name, value in asdict(self).items() if name not in machine}


class DanteStep(msgspec.Struct, frozen=True, kw_only=True):
    """One step: the total loss, the mean cross entropy, the mean weight, the embedding's relative drift before it."""

    step: int
    loss: float
    cross_entropy: float
    weight: float
    drift: float
    grad_norm: float
    lr: float


class DanteResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.dante_training/1"):
    """What was taught, and how it went.

    Attributes:
        rows: taught in an epoch; `cut` of the encoded rows do not teach where to stop, `left_out` had no room.
        epochs: how often the curriculum starts again.
        weights: least, mean and most w(H) of the rows: a spread near 0 makes CWCE a constant.
        drift: of the embedding after the last step: squared, over the initialisation's norm.
    """

    environment: Environment
    model: str
    out: str
    objective: dict[str, str | float | bool]
    rows: int
    cut: int
    left_out: int
    steps: int
    batch: int
    processes: int
    epochs: float
    weights: tuple[float, float, float]
    drift: float
    minutes: float
    log: tuple[DanteStep, ...]

    def list_figures(self) -> list[tuple[str, str]]:
        """List what was measured while it was taught, for people."""
        first, last = self.log[0], self.log[-1]
        least, mean, most = self.weights
        return [
            ("w(H): least, mean, most", f"{least:.3f}, {mean:.3f}, {most:.3f}"),
            ("cross entropy, first and last step", f"{first.cross_entropy:.3f}, {last.cross_entropy:.3f} nats"),
            ("drift of the embedding", f"{self.drift:.2e}"),
        ]
