"""An update of a model's weights, as the admin port takes it: what a version is made of, and how it is to be taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints

from laguna_serve.serving.gateway.engines.pool import VERSION
from laguna_serve.serving.kit.results import JsonObject

Version = Annotated[str, StringConstraints(pattern=VERSION)]
PauseMode = Literal["keep", "wait", "abort"]
# What an update brings: the model's weights, its drafter's, a name for the former. Named as the fields of `Update`.
Part = Literal["update", "draft_update", "weight_version"]
PARTS: Sequence[Part] = ("update", "draft_update", "weight_version")


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
