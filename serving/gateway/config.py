"""The gateway's configuration: one TOML file, validated whole before anything listens.

[server]
port = 8080
access_log = true

[admin]                  # status page, weights; on this machine only, unless it has a key
port = 8081

[[keys]]                 # without any, everybody may ask
name = "agents"
sha256 = "…"             # printf %s "$KEY" | sha256sum
max_in_flight = 32
requests_per_minute = 600

[[models]]
name = "laguna"          # as requests call it
affinity = "session"

[[models.upstreams]]
name = "dflash"
url = "http://127.0.0.1:8000"
max_in_flight = 64
gamma_schedule = [[1, 8, 7], [9, 64, 0]]

[[models.upstreams]]
name = "plain"
url = "http://127.0.0.1:8001"

[[models.shadows]]       # gets copies of greedy requests; where its tokens differ is logged and counted
name = "candidate"
url = "http://127.0.0.1:8002"
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

MIB = 1 << 20
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$")]


def _check_url(url: str) -> str:
    """An engine's root; what is served under it is the request's to say."""
    parts = urlsplit(url)
    more = parts.path not in ("", "/") or parts.query or parts.fragment or "@" in url
    if parts.scheme not in ("http", "https") or not parts.hostname or more:
        raise ValueError(f"expected http://host:port, got {url!r}")
    return url.rstrip("/")


def _read_schedule(value: Any) -> Any:
    """A schedule, or the sweep.json that has it."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(Path(value).read_text(encoding="utf-8"))["schedule"]["num_speculative_tokens_per_batch_size"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"expected a schedule or a sweep.json, got {value!r}: {error!r}") from None


ModelName = Annotated[str, StringConstraints(min_length=1, max_length=512, pattern=r"^[^\x00-\x1f\x7f]+$")]
Url = Annotated[str, AfterValidator(_check_url)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
LOOPBACK = ("127.0.0.1", "::1", "localhost")
Range = tuple[int, int, Annotated[int, Field(ge=0)]]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]


class ConfigError(ValueError):
    """A configuration that cannot be used; one line naming file, key and what was expected."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Server(_Table):
    """Where the gateway listens, and what it takes; HTTPS with a certificate and its key. `more_paths` are passed on
    besides those that vLLM serves to clients."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8080
    head_timeout_s: Seconds = 10.0
    max_head_bytes: Annotated[int, Field(ge=1024, le=MIB)] = 64 * 1024
    max_body_bytes: Annotated[int, Field(ge=1024, le=1 << 30)] = 32 * MIB
    body_timeout_s: Seconds = 30.0
    drain_s: Seconds = 60.0
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    more_paths: Annotated[tuple[str, ...], Field(strict=False)] = ()
    access_log: bool = False


class Admin(_Table):
    """Where the admin routes and the status page are: 0 is a free port. Anywhere but on this machine they need a key
    (its SHA-256)."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 0
    sha256: Digest | None = None

    @model_validator(mode="after")
    def _check_key(self) -> Self:
        if self.sha256 is None and self.host not in LOOPBACK:
            raise ValueError(f"expected a sha256 for a host other than {', '.join(LOOPBACK)}, got none")
        return self


class Limits(_Table):
    """How long requests may wait, for a slot and for the engine."""

    max_queued: Annotated[int, Field(ge=0, le=1_000_000)] = 256
    queue_timeout_s: Seconds = 30.0
    connect_timeout_s: Seconds = 5.0
    silence_timeout_s: Seconds = 300.0


class Upstream(_Table):
    """One engine. `max_in_flight` requests are in it at once; `weight` is its share where arms are compared. A
    speculative engine may have the `gamma_schedule` that bench/gamma_sweep.py found, as its sweep.json or as (first,
    last, γ) by requests at once: where its γ is 0, requests overflow to the model's engines that have none."""

    name: Name
    url: Url
    max_in_flight: Count = 64
    weight: Annotated[float, Field(gt=0, le=1_000)] = 1.0
    gamma_schedule: Annotated[
        tuple[Annotated[Range, Field(strict=False)], ...], BeforeValidator(_read_schedule), Field(strict=False)
    ] = ()

    def pays(self, requests: int) -> bool:
        """Is speculation worth having with so many at once?"""
        fitting = [gamma for first, _, gamma in self.gamma_schedule if first <= requests]
        return not fitting or fitting[-1] > 0

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        ends = [0, *(last for _, last, _ in self.gamma_schedule)]
        for (first, last, _), end in zip(self.gamma_schedule, ends, strict=False):
            if not end < first <= last:
                raise ValueError(f"expected ascending ranges (first, last, γ), got {first} to {last} after {end}")
        return self


class Shadow(_Table):
    """An engine that gets a copy of every greedy request, whose answers nobody but the gateway sees."""

    name: Name
    url: Url


class Model(_Table):
    """A name in requests and the engines behind it. `affinity` keeps what belongs together on one engine while that has
    room: `session` by the header X-Session-ID, else by the API key, `prefix` by how a request begins; `none` goes by
    load. Either way engines get shares by their weights."""

    name: ModelName
    affinity: Literal["none", "session", "prefix"] = "none"
    upstreams: Annotated[tuple[Upstream, ...], Field(min_length=1, strict=False)]
    shadows: Annotated[tuple[Shadow, ...], Field(strict=False)] = ()


class Key(_Table):
    """Who may ask: the SHA-256 of the key, never the key."""

    name: Name
    sha256: Digest
    max_in_flight: Count | None = None
    requests_per_minute: Count | None = None


class Config(_Table):
    """Everything."""

    server: Server = Server()
    admin: Admin = Admin()
    limits: Limits = Limits()
    models: Annotated[tuple[Model, ...], Field(min_length=1, strict=False)]
    keys: Annotated[tuple[Key, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        _check_distinct("models", [model.name for model in self.models])
        # Over all models, as logs and metrics name an engine by it.
        upstreams = [upstream.name for model in self.models for upstream in model.upstreams]
        _check_distinct("upstreams", upstreams + [shadow.name for model in self.models for shadow in model.shadows])
        _check_distinct("keys", [key.name for key in self.keys])
        return self


def load_config(path: Path) -> Config:
    """Read and validate a file.

    Raises:
        ConfigError: it cannot be read, is no TOML, or a value is not what it must be.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: expected a configuration, got {error.strerror or error}; check --config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected TOML, got {error}; fix the file") from None
    return parse_config(tables, str(path))


def parse_config(tables: dict[str, Any], source: str) -> Config:
    """Validate tables that were read from `source`. Raises ConfigError."""
    try:
        return Config.model_validate(tables)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "expected no such key"
        elif first["type"] == "missing":
            message = "expected a value, got none"
        else:
            message = message if message.startswith("expected") else f"expected another value: {message}"
            message += "" if ", got " in message else f", got {first['input']!r}"
        raise ConfigError(f"{source}: {key}: {message}; see serving/gateway/config.py for what there is") from None


def _check_distinct(what: str, names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"expected distinct names of {what}, got {name!r} twice")
