"""What `serve run laguna_serve.serving.ray_app:build config=FILE` reads: models, their engines, how many of each.

cluster.example.toml, beside this file, has every key that is not an engine's; those are gateway.toml's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from laguna_serve.serving.gateway.config import ConfigError, faults
from laguna_serve.serving.gateway.config.base import ConfigTable
from laguna_serve.serving.gateway.config.owned import OwnedEngine
from laguna_serve.serving.gateway.config.reader import read_tables
from laguna_serve.serving.gateway.config.values import Count, Digest, ModelName, Seconds
from laguna_serve.serving.kit.results import JsonObject

EXAMPLE = "see serving/cluster/cluster.example.toml"
Share = Annotated[float, Field(ge=0, le=1024)]
Delay = Annotated[float, Field(ge=0, le=86_400)]


class Replicas(ConfigTable):
    """How many engines a model has, and what each needs of a machine.

    Attributes:
        target_ongoing_requests: Ray adds replicas while they have more than this each.
        max_ongoing_requests: a replica takes at most so many at once.
        upscale_delay_s, downscale_delay_s: for how long there must be more, or fewer, before Ray adds or ends replicas.
        look_back_period_s: over which Ray averages.
        num_cpus, num_gpus: what Ray sets aside for a replica; without `num_gpus` its engine sees no GPU.
        shutdown_timeout_s: for a replica that is ended to finish its requests.
    """

    min_replicas: Count = 1
    max_replicas: Count = 1
    target_ongoing_requests: Annotated[float, Field(gt=0, le=1_000_000)] = 16.0
    max_ongoing_requests: Count = 128
    upscale_delay_s: Delay = 30.0
    downscale_delay_s: Delay = 600.0
    look_back_period_s: Seconds = 30.0
    num_cpus: Share = 1.0
    num_gpus: Share = 0.0
    shutdown_timeout_s: Seconds = 60.0
    health_period_s: Seconds = 2.0
    routing: Literal["power-of-two", "prefix"] = "power-of-two"

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"expected max_replicas of at least min_replicas, {self.min_replicas}, got {self.max_replicas}"
            )
        return self


class ClusterModel(ConfigTable):
    """A name in requests, the engine of each replica as gateway.toml has it, and how many there are."""

    name: ModelName
    engine: OwnedEngine
    replicas: Replicas = Replicas()

    @model_validator(mode="after")
    def _check_engine(self) -> Self:
        if self.engine.sleep_level or self.engine.idle_timeout_s is not None:
            raise ValueError("expected no sleep_level and no idle_timeout_s: Ray decides how many replicas there are")
        return self


class Ingress(ConfigTable):
    """The replicas that take requests over HTTP and pass them to the models'."""

    num_replicas: Count = 1
    num_cpus: Share = 0.0


class Weights(ConfigTable):
    """New weights: the `file` has the version that serves now, for replicas that start later, on whatever machine.

    It is written whole by one process. `sha256` is of the key that POST /admin/update_weights asks for; without it
    there is no such route, and updates come over Ray alone.
    """

    file: str | None = None
    sha256: Digest | None = Field(default=None, repr=False)


class ClusterConfig(ConfigTable):
    """A whole configuration, validated before anything is deployed."""

    models: Annotated[tuple[ClusterModel, ...], Field(min_length=1, strict=False)]
    ingress: Ingress = Ingress()
    weights: Weights = Weights()

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError(f"expected distinct names of models, got {', '.join(names)}")
        if self.weights.file is None and any(model.engine.weight_updates for model in self.models):
            raise ValueError(
                "expected weights.file beside weight_updates: a new replica reads there what it must serve"
            )
        return self


def list_waiting(config: ClusterConfig, machines: Sequence[Mapping[str, float]]) -> list[str]:
    """List the models whose replicas fit no machine, by what Ray counts of each; they wait until one joins."""
    lines = []
    for model in config.models:
        wanted = {"CPU": model.replicas.num_cpus, "GPU": model.replicas.num_gpus}
        if any(all(machine.get(kind, 0.0) >= count for kind, count in wanted.items()) for machine in machines):
            continue
        expected = " and ".join(f"{kind} {count:g}" for kind, count in wanted.items())
        found = [" and ".join(f"{kind} {machine.get(kind, 0.0):g}" for kind in wanted) for machine in machines]
        had = ", ".join(dict.fromkeys(found))
        remedy = "its replicas wait until one joins; correct num_cpus and num_gpus if none will"
        lines.append(f"model {model.name}: expected a machine with {expected}, got {had or 'none'}; {remedy}")
    return lines


def load_cluster(path: Path) -> ClusterConfig:
    """Read and validate a file. Raises ConfigError, which names all that is wrong."""
    return parse_cluster(read_tables(path), str(path))


def parse_cluster(tables: JsonObject, source: str) -> ClusterConfig:
    """Validate tables that were read from `source`. Raises ConfigError."""
    try:
        return ClusterConfig.model_validate(tables)
    except ValidationError as error:
        raise ConfigError(faults.describe(error, ClusterConfig, source, EXAMPLE)) from None
