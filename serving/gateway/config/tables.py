"""The tables of a configuration, which is validated whole before anything listens.

Files that it names (certificates, keys of engines, schedules) are read when it is validated, so that whatever is wrong
with them is found by `--check`, at the start and at a reload alike.
"""

from __future__ import annotations

import os
import ssl
import types
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, SecretStr, ValidationInfo, model_validator

from laguna_serve.serving.gateway.config import endpoint
from laguna_serve.serving.gateway.config.base import ConfigTable
from laguna_serve.serving.gateway.config.keys import AccessTable, Key
from laguna_serve.serving.gateway.config.listening import MIB, Admin, Server
from laguna_serve.serving.gateway.config.owned import NOWHERE, QUEUE_FACTOR, Group, OwnedEngine, name_engine
from laguna_serve.serving.gateway.config.telemetry import Traces, Tracing
from laguna_serve.serving.gateway.config.values import Count, ModelName, Name, Schedule, Seconds, Url, UrlPath
from laguna_serve.serving.kit.results import JsonObject

ANY_ADDRESS = ("", "0.0.0.0", "::")
FallbackCause = Literal["down", "lost", "silent", "queue_full", "queue_timeout", "load_failed"]


class Limits(ConfigTable):
    """How long requests may wait, for a slot and for the engine; how many of them, and how many bytes of bodies.

    The bytes are of bodies that are not with an engine yet. `read_timeout_s` is between two pieces of an answer's body.
    Before the first one `first_byte_timeout_s` counts, without which an answer may take any time to begin: one that is
    not streamed is silent until it is complete. For an engine that the gateway has to start first, requests wait
    `load_timeout_s`, of which those that stream get a comment every `heartbeat_s`.
    """

    old_names: ClassVar[Mapping[str, str]] = types.MappingProxyType({"silence_timeout_s": "read_timeout_s"})
    max_queued: Annotated[int, Field(ge=0, le=1_000_000)] = 256
    max_queued_bytes: Annotated[int, Field(ge=1024, le=1 << 40)] = 512 * MIB
    queue_timeout_s: Seconds = 30.0
    connect_timeout_s: Seconds = 5.0
    first_byte_timeout_s: Seconds | None = None
    read_timeout_s: Seconds = 300.0
    load_timeout_s: Seconds = 300.0
    heartbeat_s: Seconds = 5.0


class Health(ConfigTable):
    """How engines are asked whether they are well: each every `interval_s`.

    One that refuses the connection is down at once; one that gives another answer than 200, or none within `timeout_s`,
    after so many `failures` in a row.
    """

    interval_s: Seconds = 2.0
    timeout_s: Seconds = 5.0
    failures: Annotated[int, Field(ge=1, le=1_000)] = 3
    path: UrlPath = "/health"


class Endpoint(ConfigTable):
    """How an engine is reached.

    The API key that it asks for is in a file or in the environment, never here. Over https its certificate is checked
    against the system's authorities, or those in `tls_ca_file` alone.
    """

    name: Name
    url: Url
    api_key_file: str | None = Field(default=None, repr=False)
    api_key_env: str | None = Field(default=None, repr=False)
    tls_ca_file: str | None = None
    tls_verify: bool = True
    _credential: SecretStr | None = PrivateAttr(default=None)
    _tls: ssl.SSLContext | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _read_files(self, info: ValidationInfo) -> Self:
        credential = endpoint.read_credential(self.api_key_file, self.api_key_env)
        self._credential = None if credential is None else SecretStr(credential)
        if self.url.startswith("https:"):
            made = {} if info.context is None else info.context
            self._tls = endpoint.share_client_context(self.tls_ca_file, self.tls_verify, made)
        elif self.tls_ca_file is not None or not self.tls_verify:
            raise ValueError("expected an https url beside tls_ca_file and tls_verify, got one of http")
        return self

    @property
    def authorization(self) -> str | None:
        """The header's value for this engine, where it asks for a key."""
        return None if self._credential is None else f"Bearer {self._credential.get_secret_value()}"

    @property
    def tls(self) -> ssl.SSLContext | None:
        """For connections over https."""
        return self._tls

    def request_options(self) -> JsonObject:
        """List what every request of the gateway's own to this engine needs, as aiohttp's arguments.

        Redirects are not followed: they would lead the credential elsewhere.
        """
        authorization = self.authorization
        headers = {} if authorization is None else {"Authorization": authorization}
        return {"headers": headers, "ssl": self._tls or True, "allow_redirects": False}


class Upstream(Endpoint):
    """One engine, or a provider.

    `max_in_flight` requests are in it at once; `health_path` is asked instead of that of all engines; `weight` is its
    share where arms are compared; `default_temperature` is that of requests that state none, for traces. A speculative
    engine may have the `gamma_schedule` that bench/gamma_sweep.py found, as its sweep.json or as (first, last, γ) by
    requests at once: where its γ is 0, requests overflow to the model's engines that have none.
    """

    max_in_flight: Count = 64
    health_path: UrlPath | None = None
    weight: Annotated[float, Field(gt=0, le=1_000)] = 1.0
    gamma_schedule: Schedule = ()
    default_temperature: Annotated[float, Field(ge=0, le=1_000)] | None = None

    def pays(self, requests: int) -> bool:
        """Whether speculation is worth having with so many at once."""
        fitting = [gamma for first, _, gamma in self.gamma_schedule if first <= requests]
        return not fitting or fitting[-1] > 0

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        ends = [0, *(last for _, last, _ in self.gamma_schedule)]
        for (first, last, _), end in zip(self.gamma_schedule, ends, strict=False):
            if not end < first <= last:
                raise ValueError(f"expected ascending ranges (first, last, γ), got {first} to {last} after {end}")
        return self


class Shadow(Endpoint):
    """An engine that gets a copy of every greedy request, whose answers nobody but the gateway sees."""


class Model(ConfigTable):
    """A name in requests and the engines behind it.

    `aliases` are other names that these serve (--served-model-name, --lora-modules); with several models, those that
    are not listed here are looked up in the engines' /v1/models. `affinity` keeps what belongs together on one engine
    while that has room: `session` by the header X-Session-ID, else by the API key, `prefix` by how a request begins;
    `none` goes by load. Either way engines get shares by their weights. Instead of upstreams a model may have an
    `engine`, which the gateway starts when it is asked for.

    Where one of `fallback_on` keeps a request from an answer's first byte, it goes to the models of `fallback`, one
    after the other. With `pass_priority` engines are told the priority of its key (vLLM with --scheduling-policy
    priority); with `ask_usage` a stream for a key is asked for its usage, which its client does not see.
    """

    name: ModelName
    aliases: Annotated[tuple[ModelName, ...], Field(strict=False)] = ()
    affinity: Literal["none", "session", "prefix"] = "none"
    upstreams: Annotated[tuple[Upstream, ...], Field(min_length=1, strict=False)]
    shadows: Annotated[tuple[Shadow, ...], Field(strict=False)] = ()
    engine: OwnedEngine | None = None
    fallback: Annotated[tuple[ModelName, ...], Field(strict=False)] = ()
    fallback_on: Annotated[tuple[FallbackCause, ...], Field(strict=False)] = ("down", "queue_full", "load_failed")
    pass_priority: bool = False
    ask_usage: bool = False

    @model_validator(mode="before")
    @classmethod
    def _stand_in(cls, given: Any) -> Any:
        """Put an upstream that is nowhere in the place of an engine that has not been started."""
        if not isinstance(given, dict) or not isinstance(given.get("engine"), dict):
            return given
        if "upstreams" in given:
            raise ValueError("expected upstreams or an engine, got both")
        sequences = given["engine"].get("max_num_seqs")
        most = QUEUE_FACTOR * (sequences if type(sequences) is int and 0 < sequences < 1 << 16 else 64)
        upstream = {"name": name_engine(str(given.get("name", ""))), "url": NOWHERE, "max_in_flight": most}
        return {**given, "upstreams": [upstream]}


class Config(ConfigTable):
    """A configuration file, validated as a whole: names, ports and keys must be distinct."""

    server: Server = Server()
    admin: Admin = Admin()
    limits: Limits = Limits()
    health: Health = Health()
    access: AccessTable = AccessTable()
    tracing: Tracing = Tracing()
    traces: Traces = Traces()
    models: Annotated[tuple[Model, ...], Field(min_length=1, strict=False)]
    keys: Annotated[tuple[Key, ...], Field(strict=False)] = ()
    groups: Annotated[tuple[Group, ...], Field(strict=False)] = ()

    @property
    def all_keys(self) -> tuple[Key, ...]:
        """Those of the file and those of `access.keys_file`."""
        return self.keys + self.access.keys

    @property
    def asks_for_keys(self) -> bool:
        """Whether a request needs a key: also where the file of keys has none any more."""
        return bool(self.keys) or self.access.keys_file is not None

    @model_validator(mode="after")
    def _check_distinct(self) -> Self:
        _require_distinct("models", [name for model in self.models for name in (model.name, *model.aliases)])
        # Over all models, as logs and metrics name an engine by it.
        upstreams = [upstream.name for model in self.models for upstream in model.upstreams]
        _require_distinct("upstreams", upstreams + [shadow.name for model in self.models for shadow in model.shadows])
        _require_distinct("keys", [key.name for key in self.all_keys])
        _require_distinct("groups", names := [group.name for group in self.groups])
        for model in self.models:
            if model.engine is not None and model.engine.group not in (*names, "default"):
                raise ValueError(f"expected a [[groups]] for every engine's group, got none for {model.engine.group!r}")
        _check_fallbacks(self.models)
        self.check_workers(self.server.workers)
        if self.admin.trl is not None and self.admin.trl not in [model.name for model in self.models]:
            raise ValueError(f"expected the name of a model as admin.trl, got {self.admin.trl!r}")
        by_digest: dict[str, str] = {}
        for key in self.all_keys:
            if (other := by_digest.setdefault(key.sha256, key.name)) != key.name:
                raise ValueError(f"expected distinct sha256 of keys, got one for both {other!r} and {key.name!r}")
        files = (self.traces.file, self.access.usage_file)
        if files[0] is not None and files[1] is not None and os.path.realpath(files[0]) == os.path.realpath(files[1]):
            raise ValueError(f"expected distinct files as traces.file and access.usage_file, got {files[0]!r} for both")
        hosts = (self.server.host, self.admin.host)
        if self.server.port == self.admin.port != 0 and (hosts[0] == hosts[1] or set(hosts) & set(ANY_ADDRESS)):
            raise ValueError(f"expected distinct ports of server and admin, got {self.admin.port} for both")
        return self

    def check_workers(self, workers: int) -> None:
        """Check that nothing is asked for that one process alone can do. Raises ValueError."""
        if workers == 1:
            return
        owned = [f"models.{model.name}.engine" for model in self.models if model.engine is not None]
        for key in [*owned, *(["admin.trl"] if self.admin.trl is not None else [])]:
            raise ValueError(f"expected server.workers = 1 beside {key}, got {workers}")


def _check_fallbacks(models: tuple[Model, ...]) -> None:
    """Check that fallbacks are other models, each once. Raises ValueError."""
    known = {model.name for model in models}
    for model in models:
        _require_distinct("fallback", list(model.fallback))
        if model.name in model.fallback or (unknown := [name for name in model.fallback if name not in known]):
            got = repr(model.name if model.name in model.fallback else unknown[0])
            raise ValueError(f"expected names of other models as fallback of {model.name!r}, got {got}")


def _require_distinct(what: str, names: list[str]) -> None:
    if (twice := next((name for name, count in Counter(names).items() if count > 1), None)) is not None:
        raise ValueError(f"expected distinct names of {what}, got {twice!r} twice")
