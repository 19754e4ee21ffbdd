"""What of a configuration is read at the start alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from laguna_serve.serving.gateway.config.tables import Config

# What is bound to listeners, and to connections that are open.
FIXED: Mapping[str, Sequence[str]] = {
    "server": (
        "host",
        "port",
        "header_timeout_s",
        "max_head_bytes",
        "keepalive_s",
        "shutdown_timeout_s",
        "lame_duck_s",
        "ssl_certfile",
        "ssl_keyfile",
        "access_log",
        "workers",
    ),
    "admin": ("host", "port", "sha256", "trl"),
    "access": ("usage_file", "usage_write_s"),
    "tracing": ("endpoint", "service_name", "sample_ratio"),
    "traces": ("file", "max_bytes"),
}


def keep_fixed(before: Config, after: Config) -> Config:
    """Keep of a configuration what is read at the start alone, as it was `before`."""
    kept = {
        table: getattr(after, table).model_copy(update={key: getattr(getattr(before, table), key) for key in keys})
        for table, keys in FIXED.items()
    }
    return after.model_copy(update=kept)


def list_fixed_changes(before: Config, after: Config) -> list[str]:
    """List the keys that differ and are read at the start alone."""
    return [
        f"{table}.{key}"
        for table, keys in FIXED.items()
        for key in keys
        if getattr(getattr(before, table), key) != getattr(getattr(after, table), key)
    ]
