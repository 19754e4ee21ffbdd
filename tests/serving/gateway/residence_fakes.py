"""A gateway that owns light engines: real processes under the real supervisor, by a plan that needs no checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from gateway_fakes import Gateway, gateway

from laguna_serve.serving.chat.vendor_defaults import NO_CONTRACT
from laguna_serve.serving.engine import engine as engine_module
from laguna_serve.serving.planning.engine_config import EngineConfig
from laguna_serve.serving.planning.launch import Launch, find_port

LIGHT = Path(__file__).parent / "light_engine.py"
PATH = "/v1/completions"


def plan_light(config: EngineConfig, _key: str | None = None) -> Launch:
    """`extra_args` are the light engine's own."""
    port = find_port("127.0.0.1")
    command = [sys.executable, "-S", "-E", str(LIGHT), "--port", str(port), "--name", config.model_name]
    url = f"http://127.0.0.1:{port}"
    return Launch([*command, *config.extra_args], dict(os.environ), url, None, NO_CONTRACT, ())


@contextlib.contextmanager
def owning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, models: dict[str, dict[str, Any]], gib: float = 0.08, **more: Any
) -> Iterator[Gateway]:
    """A gateway for these models, of which one fits; a model's table is its `engine`'s.

    No process is left when it has ended.
    """
    monkeypatch.setattr(engine_module, "plan_launch", plan_light)
    monkeypatch.setattr(engine_module, "POLL_S", 0.02)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tables = []
    for name, table in models.items():
        arguments = ["--megabytes", "40", *table.get("extra_args", ())]
        engine = {"model": f"folder/{name}", "memory_gib": 0.06, **table, "extra_args": arguments}
        tables.append({"name": name, "engine": engine})
    groups = [{"name": "default", "memory_gib": gib}]
    with gateway(models=tables, groups=groups, **more) as front:
        yield front
    assert not list_engines()


def list_engines() -> list[int]:
    """Processes of light engines and of their supervisors that descend from this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE and str(LIGHT) in process.cmdline():
                found.append(process.pid)
    return found


def ask(front: Gateway, model: str, **body: Any) -> Any:
    return front.ask(PATH, json.dumps({"model": model, "prompt": "a", **body}).encode())
