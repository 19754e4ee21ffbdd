"""An update of a model's weights, as the admin port takes it: what a version is made of, and what became of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints

from laguna_serve.serving.gateway.engines.engine import Engine
from laguna_serve.serving.gateway.engines.pool import VERSION, Pool
from laguna_serve.serving.kit.results import JsonObject

Version = Annotated[str, StringConstraints(pattern=VERSION)]
PauseMode = Literal["keep", "wait", "abort"]
# A query; pairs where a name may come several times.
Params = Mapping[str, str] | Sequence[tuple[str, str]]
# What an update brings: the model's weights, its drafter's, a name for the former. Named as the fields of `Update`.
Part = Literal["update", "draft_update", "weight_version"]
PARTS: Sequence[Part] = ("update", "draft_update", "weight_version")
logger = logging.getLogger(__name__)


class StepError(Exception):
    """A step failed on some engines; `errors` by engine."""

    def __init__(self, step: str, errors: Mapping[Engine, str]) -> None:
        causes = "; ".join(f"{engine.name}: {error}" for engine, error in errors.items())
        super().__init__(f"{step}: {causes}")
        self.errors = errors


class RefusedError(Exception):
    """A step that was refused before any engine was told of it, as one line."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Update(_Body):
    """What one version is made of: the bodies of `/update_weights`, in order, for the model and for its drafter."""

    weight_version: Version | None = None
    update: Sequence[JsonObject] = ()
    draft_version: Version | None = None
    draft_update: Sequence[JsonObject] = ()

    def list_parts(self) -> set[Part]:
        """List what it brings."""
        return {part for part in PARTS if getattr(self, part)}


class UpdateRequest(Update):
    """An update, how to take it back where it fails half-way, and whether all engines are to show the same digests."""

    mode: PauseMode = "keep"
    rollback: Update | None = None
    digests: bool = False


def find_outcome(pool: Pool) -> str:
    """Find what became of an update that failed."""
    fenced = [engine.fenced is not None for engine in pool.engines]
    return "unavailable" if all(fenced) else "reduced" if any(fenced) else "rolled_back"


def make_report(pool: Pool, outcome: str, error: str | None) -> JsonObject:
    """Make the report of an update, JSON-ready; what went wrong is in the log, too."""
    if error is not None:
        logger.warning("model %s: update of weights, %s: %s", pool.model.name, outcome, error)
    engines = {
        engine.name: {
            "weight_version": engine.versions[0].decode(),
            "draft_version": engine.versions[1].decode(),
            "fenced": engine.fenced,
        }
        for engine in pool.engines
    }
    return {"outcome": outcome, "model": pool.model.name, "error": error, "upstreams": engines}
