"""The experiments' result file, and its tables."""

from __future__ import annotations

import msgspec

from laguna_serve.scripts.training.dense.experiments.behaviour import Behaviour
from laguna_serve.serving.kit.environment import Environment
from laguna_serve.serving.kit.tables import Table


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """An initialisation: mean NMSE over layers at stage 1's last record, held-out loss and KL, nats."""

    init: str
    nmse: float
    untrained: dict[str, float]
    trained: dict[str, float]


class Arm(msgspec.Struct, frozen=True, kw_only=True):
    """Stage 2 from the same blocks on the same batches.

    Attributes:
        name: "beside", or "K=…" of a store.
        place_bytes: of the store, for each place; 0 without one.
        tail_mass: mean mass that the store does not keep.
        measured: held-out, against the teacher's whole distribution.
        behaviour: of its answers.
    """

    name: str
    place_bytes: float
    tail_mass: float
    measured: dict[str, float]
    behaviour: Behaviour


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens per second of stage 2's steps, arms in turn: of every round, and their median."""

    name: str
    median: float
    rounds: tuple[float, ...]


class DenseExperiments(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.dense_experiments/1"
):
    """All of it, for one seed.

    Attributes:
        store_seconds: of writing each store, the teacher whole in memory.
        answers: of the teacher, of the student after stage 1, and after stage 2 on text and on chats.
    """

    environment: Environment
    teacher: str
    settings: dict[str, int | float | str]
    starts: tuple[Start, ...]
    arms: tuple[Arm, ...]
    store_seconds: dict[str, float]
    rates: tuple[Rate, ...]
    answers: dict[str, Behaviour]
    on_text: dict[str, float]


def list_tables(result: DenseExperiments) -> tuple[Table, ...]:
    """Make the four tables: starts, arms, rates, answers."""
    starts = []
    for s in result.starts:
        figures = (s.untrained["loss_student"], s.untrained["kl"], s.nmse, s.trained["loss_student"], s.trained["kl"])
        starts.append((s.init, *(f"{figure:.3f}" for figure in figures)))
    arms = []
    for a in result.arms:
        measured = [a.measured[name] for name in ("loss_student", "kl", "same_top_token")]
        cells = [f"{figure:.4f}" for figure in (*measured, a.behaviour.stops)]
        arms.append((a.name, f"{a.place_bytes:.0f}", f"{a.tail_mass:.1e}", *cells))
    rates = [(r.name, f"{r.median:.0f} ({min(r.rounds):.0f} to {max(r.rounds):.0f})") for r in result.rates]
    answers = [
        (name, f"{b.stops:.2f}", f"{b.restates:.2f}", f"{b.parses:.2f}", f"{b.tokens:.0f}")
        for name, b in result.answers.items()
    ]
    return (
        Table("lrrrrr", ("start", "loss, untrained", "KL", "NMSE, stage 1", "loss", "KL"), starts),
        Table("lrrrrrr", ("stage 2 from", "bytes a place", "tail mass", "loss", "KL", "same token", "stops"), arms),
        Table("lr", ("stage 2, tok/s", "median (range)"), rates),
        Table("lrrrr", ("answers of", "stop", "restate the head", "parse", "tokens"), answers),
    )


def format_result(result: DenseExperiments) -> str:
    """Render the tables for a terminal."""
    return "\n\n".join(table.to_text() for table in list_tables(result))
