"""The tables of keys: who may ask, for which models and how much, and where what was used is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from laguna_serve.serving.gateway.config import endpoint
from laguna_serve.serving.gateway.config.base import ConfigTable
from laguna_serve.serving.gateway.config.key_file import read_key_tables
from laguna_serve.serving.gateway.config.values import Count, Digest, FileName, ModelName, Name, Seconds, TokenCount

MAX_KEY_FILE_BYTES = 64 << 20
REMEDY = "; make it with laguna keys new NAME --file FILE"


class Key(ConfigTable):
    """Who may ask: the SHA-256 of the key, never the key.

    `models` are the names that it may ask for, all without any; one of the configuration stands for all names of that
    model. Requests and tokens of a minute come back through the minute, those of a day at midnight UTC. A smaller
    `priority` goes first, as in vLLM.
    """

    name: Name
    sha256: Digest = Field(repr=False)
    models: Annotated[tuple[ModelName, ...], Field(strict=False)] = ()
    max_in_flight: Count | None = None
    requests_per_minute: Count | None = None
    tokens_per_minute: TokenCount | None = None
    tokens_per_day: TokenCount | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0


class AccessTable(ConfigTable):
    """Where keys are besides this file, and what was used of their budgets.

    Without a `usage_file` a restart forgets it. It is written every `usage_write_s`, which is what a crash may lose at
    most. A request that does not say how many tokens it wants is taken to want `assumed_output_tokens` until it ends.
    """

    keys_file: str | None = None
    usage_file: FileName | None = None
    usage_write_s: Seconds = 5.0
    assumed_output_tokens: Count = 512
    _keys: tuple[Key, ...] = PrivateAttr(default=())

    @model_validator(mode="after")
    def _read_keys(self) -> Self:
        if self.keys_file is not None:
            self._keys = read_keys(self.keys_file)
        if self.usage_file is not None and not Path(self.usage_file).absolute().parent.is_dir():
            raise ValueError(f"usage_file: expected a file in a folder that exists, got {self.usage_file!r}")
        return self

    @property
    def keys(self) -> tuple[Key, ...]:
        """The keys that `keys_file` has."""
        return self._keys


def read_keys(path: str) -> tuple[Key, ...]:
    """Read a file of keys. Raises ValueError, without any of its values."""
    tables = read_key_tables(endpoint.read_file(path, "keys_file", MAX_KEY_FILE_BYTES, REMEDY))
    try:
        return tuple(Key.model_validate(table) for table in tables)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "a key"
        message = f"keys_file: {where}: {first['msg'].removeprefix('Value error, ')}"
        raise ValueError(message + ", got something else (not shown); see laguna keys --help") from None
