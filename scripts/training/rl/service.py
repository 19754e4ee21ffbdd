"""What a GRPO run trains against: an engine that takes new weights, behind the gateway."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from laguna_serve.scripts.training.rl.refresh.pushed import Pushed
from laguna_serve.serving.client.counters import Counters, scrape_counters, settle_counters
from laguna_serve.serving.engine import Engine, EngineConfig
from laguna_serve.serving.gateway.config import parse_config
from laguna_serve.serving.gateway.run import open_background
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.results import JsonObject
from laguna_serve.serving.machine.local_http import OK, ask_engine
from laguna_serve.serving.machine.processes import read_cpu_s

UPDATE_PATH, UPDATE_S = "/admin/update_weights", 600.0
# Of an answer that is no report.
MAX_SHOWN = 300
# Requests beyond those that run wait in the engine, which batches them; the gateway only counts them.
IN_FLIGHT = 4096


class UpdateRefusedError(CommandError, RuntimeError):
    """New weights were not taken; the message says by what the model is served now."""


@dataclass(frozen=True, slots=True)
class TrainingService:
    """`base_url` and `admin_url` are the gateway's, `engine_url` is for metrics, `pids` are the engine's processes."""

    base_url: str
    admin_url: str
    engine_url: str
    model_name: str
    pids: Callable[[], list[int]]

    def read_cpu_s(self) -> float:
        """Processor time that the engine has used, in seconds."""
        return read_cpu_s(self.pids())

    def count(self, before: Counters | None = None, tokens: int = 0) -> Counters:
        """Read the engine's counters; given earlier ones, when so many tokens are counted since. Raises EndpointError.

        An engine that does not speculate counts no drafts.
        """

        async def read() -> Counters:
            async with aiohttp.ClientSession() as session:
                if before is None:
                    return await scrape_counters(session, self.engine_url)
                return await settle_counters(session, self.engine_url, before, tokens)

        return asyncio.run(read())

    def push(
        self,
        version: str,
        folder: Path,
        digests: dict[str, str],
        previous: Path,
        draft: Pushed | None = None,
        previous_draft: Pushed | None = None,
    ) -> None:
        """Serve the weights of a folder from now on, and a drafter's if one is given, or go on with the previous ones.

        Raises:
            UpdateRefusedError: the engine goes on with `previous` and `previous_draft`, or with nothing.
        """
        update = {"folder": str(folder.resolve()), "sha256": digests}
        body: JsonObject = {"weight_version": version, "update": [update], "mode": "wait"}
        body["rollback"] = {"update": [{"folder": str(previous.resolve())}]}
        if draft is not None and previous_draft is not None:
            body["draft_version"] = draft.version
            body["draft_update"] = [{"folder": str(draft.folder.resolve()), "sha256": draft.sha256}]
            body["rollback"]["draft_update"] = [{"folder": str(previous_draft.folder.resolve())}]
        try:
            status, answer = ask_engine(self.admin_url, UPDATE_PATH, body, method="POST", timeout_s=UPDATE_S)
        except OSError as error:
            got = f"got {error}; see the engine's log"
            raise UpdateRefusedError(f"{self.admin_url}{UPDATE_PATH}: expected an answer, {got}") from None
        if status != OK:
            outcome = describe_refusal(status, answer)
            raise UpdateRefusedError(f"version {version}: expected it to be served, got {outcome}; see {folder}")


def describe_refusal(status: int, answer: bytes) -> str:
    """Describe why an update was not taken, by the gateway's report, or what else has answered."""
    try:
        report = json.loads(answer)
    except ValueError:
        report = None
    if not isinstance(report, dict):
        return f"HTTP {status}: {answer[:MAX_SHOWN].decode(errors='replace')}"
    cause = report.get("error", "")  # words in a report, an object where it was not even tried
    return f"{report.get('outcome', status)}: {cause.get('message', '') if isinstance(cause, dict) else cause}"


@contextmanager
def open_service(config: EngineConfig, log_path: Path, announce: Callable[[str], None]) -> Iterator[TrainingService]:
    """Start the engine and the gateway for as long as the block runs. Raises EngineError when one does not start."""
    with Engine(config, log_path=log_path, announce=announce) as engine:
        upstream = {"name": "engine", "url": engine.base_url, "max_in_flight": IN_FLIGHT}
        tables: JsonObject = {"server": {"port": 0, "shutdown_timeout_s": 5}, "models": []}
        tables["models"] = [{"name": engine.model_name, "upstreams": [upstream]}]
        with open_background(parse_config(tables, "grpo")) as (base_url, admin_url, _):
            yield TrainingService(base_url, admin_url.rstrip("/"), engine.base_url, engine.model_name, engine.pids)
