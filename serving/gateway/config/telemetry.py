"""The tables of what is kept of requests: spans that are sent away, and rollouts in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from laguna_serve.serving.gateway.config.base import ConfigTable
from laguna_serve.serving.gateway.config.values import FileName, Name, Url

MIB = 1 << 20


class Tracing(ConfigTable):
    """Where spans of requests go: OpenTelemetry's protocol over HTTP. Without an endpoint there are none."""

    endpoint: Url | None = None
    service_name: Name = "laguna-gateway"
    sample_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0


class Traces(ConfigTable):
    """Where rollouts are recorded, in tokens: nowhere without a `file`, which takes about `max_bytes` at most."""

    file: FileName | None = None
    max_bytes: Annotated[int, Field(ge=MIB, le=1 << 44)] = 1 << 30

    @model_validator(mode="after")
    def _check_file(self) -> Self:
        if self.file is not None and not Path(self.file).absolute().parent.is_dir():
            raise ValueError(f"file: expected a file in a folder that exists, got {self.file!r}")
        return self
