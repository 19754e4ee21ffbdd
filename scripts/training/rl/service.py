"""What a GRPO run trains against: an engine that takes new weights, behind the gateway."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from laguna_serve.serving.engine import Engine, EngineConfig
from laguna_serve.serving.gateway.config import parse_config
from laguna_serve.serving.gateway.run import in_background
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.results import JsonObject

UPDATE_S = 600.0
# Requests beyond those that run wait in the engine, which batches them; the gateway only counts them.
IN_FLIGHT = 4096


class UpdateRefusedError(CommandError, RuntimeError):
    """New weights were not taken; the message says by what the model is served now."""


@dataclass(frozen=True, slots=True)
class TrainingService:
    """`base_url` and `admin_url` are the gateway's, `engine_url` is for metrics."""

    base_url: str
    admin_url: str
    engine_url: str
    model_name: str

    def push(self, version: str, folder: Path, digests: dict[str, str], previous: Path) -> None:
        """Serve the weights of a folder from now on, or go on with those of `previous`.

        Raises:
            UpdateRefusedError: the engine goes on with `previous`, or with nothing.
        """
        update = {"folder": str(folder.resolve()), "sha256": digests}
        body: JsonObject = {"weight_version": version, "update": [update], "mode": "wait"}
        body["rollback"] = {"update": [{"folder": str(previous.resolve())}]}
        data = json.dumps(body).encode()
        url = f"{self.admin_url}/admin/update_weights"
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=UPDATE_S) as response:
                json.load(response)
        except urllib.error.HTTPError as error:
            answer = json.loads(error.read() or b"{}")
            outcome = f"{answer.get('outcome', error.code)}: {answer.get('error', '')}"
            raise UpdateRefusedError(
                f"version {version}: expected it to be served, got {outcome}; see {folder}"
            ) from None
        except OSError as error:
            raise UpdateRefusedError(f"{url}: expected an answer, got {error}; see the engine's log") from None


@contextmanager
def open_service(config: EngineConfig, log_path: Path, announce: Callable[[str], None]) -> Iterator[TrainingService]:
    """Start the engine and the gateway for as long as the block runs. Raises EngineError when one does not start."""
    with Engine(config, log_path=log_path, announce=announce) as engine:
        upstream = {"name": "engine", "url": engine.base_url, "max_in_flight": IN_FLIGHT}
        tables: JsonObject = {"server": {"port": 0, "shutdown_timeout_s": 5}, "models": []}
        tables["models"] = [{"name": engine.model_name, "upstreams": [upstream]}]
        with in_background(parse_config(tables, "grpo")) as (base_url, admin_url):
            yield TrainingService(base_url, admin_url.rstrip("/"), engine.base_url, engine.model_name)
