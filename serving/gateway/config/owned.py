"""Engines that the gateway starts itself, and the groups whose memory they share."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from laguna_serve.serving.gateway.config.base import ConfigTable
from laguna_serve.serving.gateway.config.values import Count, FileName, Name, Seconds
from laguna_serve.serving.kit.flags import MOST_SEED

# Requests in an engine at once for each sequence that it decodes: it queues by itself, and better, as it batches them.
QUEUE_FACTOR = 8
# Where an engine is that has not been started; nothing is sent there.
NOWHERE = "http://127.0.0.1:1"
Gib = Annotated[float, Field(gt=0, le=1 << 20)]
Positive = Annotated[int, Field(ge=1)]


class Group(ConfigTable):
    """Memory that engines share; without a size nine tenths of what was free when the gateway started."""

    name: Name
    memory_gib: Gib | None = None


class OwnedEngine(ConfigTable):
    """An engine that is started when somebody asks for it: what `laguna serve` takes, and how long it stays.

    It goes after `idle_timeout_s` without requests, or when its group has no room for another model; a `pinned` one is
    loaded at the start and stays. While it is busy it need not make room before it was there for `min_residence_s` (by
    default as long as it took to load). What it needs is planned before its first load, or given as `memory_gib`, and
    measured from then on. With a `sleep_level` of vLLM's a GPU's memory is given back without ending the engine.
    """

    model: str
    keep_mask: str | None = None
    group_indices: str | None = None
    draft: str | None = None
    gamma: Positive | Literal["max", "auto", "adaptive"] = "max"
    draft_sampling: Literal["greedy", "probabilistic"] = "greedy"
    dtype: str = "auto"
    max_model_len: Positive | None = None
    max_num_seqs: Count = 64
    kv_cache_gib: Gib | None = None
    eager: bool = False
    prefix_caching: bool = True
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    thinking: Literal["on", "off", "template"] | None = None
    exact: bool = False
    weight_updates: bool = False
    return_routed_experts: bool = False
    seed: Annotated[int, Field(ge=0, le=MOST_SEED)] = 0
    log: FileName | None = None
    extra_args: Annotated[tuple[str, ...], Field(strict=False)] = ()
    group: Name = "default"
    pinned: bool = False
    idle_timeout_s: Seconds | None = None
    min_residence_s: Seconds | None = None
    memory_gib: Gib | None = None
    sleep_level: Annotated[int, Field(ge=0, le=2)] = 0
    start_timeout_s: Seconds = 600.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.gamma in ("auto", "adaptive") and self.draft is None:
            raise ValueError(f"expected a draft beside gamma {self.gamma!r}, got none")
        if self.pinned and self.idle_timeout_s is not None:
            raise ValueError("expected no idle_timeout_s of a model that is pinned, got both")
        if "\0" in "".join((self.model, *self.extra_args)):
            raise ValueError("expected model and extra_args without the character NUL, which no command takes")
        if not self.model:
            raise ValueError("expected a checkpoint folder or a hub id as model, got nothing")
        return self


def name_engine(model: str) -> str:
    """Name the engine of a model, in logs and metrics: the model's name as far as it may be one."""
    return re.sub(r"[^A-Za-z0-9._/-]", "-", model).lstrip("._/-")[:128] or "engine"
