"""The tables of where the gateway listens: for clients, and for whoever steers it."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from laguna_serve.serving.gateway.config import endpoint
from laguna_serve.serving.gateway.config.base import ConfigTable
from laguna_serve.serving.gateway.config.values import Digest, Host, ModelName, Network, Origin, Port, Seconds, UrlPath
from laguna_serve.serving.machine.local_http import LOOPBACK

MIB = 1 << 20
MAX_WORKERS = 64


class Server(ConfigTable):
    """Where the gateway listens, and what it takes; HTTPS with a certificate and its key.

    `extra_paths` are passed on besides those that vLLM serves to clients. Pages of `allowed_origins` may read answers
    in a browser. What `trusted_proxies` say about whom a request is from is believed. An idle connection of a client is
    kept for `keepalive_s`: longer than load balancers in front keep theirs (AWS and nginx: 60 s). After SIGTERM the
    gateway answers for `lame_duck_s` as before and is not ready, so that balancers leave it in the meantime.

    So many processes (`workers`) take connections, and share the limits. With two engines or more of its own a process
    that has imported vLLM waits for the next one that starts (`spare_process`).
    """

    old_names: ClassVar[Mapping[str, str]] = types.MappingProxyType(
        {"head_timeout_s": "header_timeout_s", "drain_s": "shutdown_timeout_s", "more_paths": "extra_paths"}
    )
    host: Host = "127.0.0.1"
    port: Port = 8080
    header_timeout_s: Seconds = 10.0
    max_head_bytes: Annotated[int, Field(ge=1024, le=MIB)] = 64 * 1024
    max_body_bytes: Annotated[int, Field(ge=1024, le=1 << 30)] = 32 * MIB
    body_timeout_s: Seconds = 30.0
    keepalive_s: Seconds = 75.0
    shutdown_timeout_s: Seconds = 60.0
    lame_duck_s: Annotated[float, Field(ge=0, le=3600)] = 0.0
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    extra_paths: Annotated[tuple[UrlPath, ...], Field(strict=False)] = ()
    allowed_origins: Annotated[tuple[Origin, ...], Field(strict=False)] = ()
    trusted_proxies: Annotated[tuple[Network, ...], Field(strict=False)] = ()
    access_log: bool = False
    workers: Annotated[int, Field(ge=1, le=MAX_WORKERS)] = 1
    spare_process: bool = True

    @model_validator(mode="after")
    def _check_certificate(self) -> Self:
        endpoint.check_certificate(self.ssl_certfile, self.ssl_keyfile)
        return self


class Admin(ConfigTable):
    """Where the admin routes and the status page are: 0 is a free port.

    Anywhere but on this machine they need a key (its SHA-256). Under /trl a trainer's client finds the model `trl`, as
    a vLLM of its own.
    """

    host: Host = "127.0.0.1"
    port: Port = 0
    sha256: Digest | None = Field(default=None, repr=False)
    trl: ModelName | None = None

    @model_validator(mode="after")
    def _check_key(self) -> Self:
        if self.sha256 is None and self.host not in LOOPBACK:
            raise ValueError(f"expected a sha256 for a host other than {', '.join(LOOPBACK)}, got none")
        return self
