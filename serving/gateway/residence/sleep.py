"""vLLM's sleep mode: a GPU's memory is given back while the processes stay.

Level 1 keeps the weights in the machine's memory; level 2 drops them, and vLLM restores the model's alone, not its
drafter's (vllm#52487). So both are loaded anew from their folders here, by the routes of new weights (docs/rl.md),
before the KV cache is made: plugins/weight_folder.py. Only for GPUs, and written against vLLM 0.32; it has not run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from laguna_serve.serving.checkpoint import find_folder
from laguna_serve.serving.engine import EngineError
from laguna_serve.serving.gateway.config.owned import OwnedEngine
from laguna_serve.serving.machine.device import Device
from laguna_serve.serving.machine.local_http import OK, ask_engine

TIMEOUT_S = 600.0
UPDATES = (("/start_weight_update", "model"), ("/start_draft_weight_update", "draft"))


def require_support(device: Device, table: OwnedEngine) -> None:
    """Refuse what could not be woken again. Raises EngineError."""
    if device.kind != "gpu":
        raise EngineError(f"sleep_level: expected 0 on {device.name}, got {table.sleep_level}; it is a GPU's alone")
    for name in filter(None, (table.model, table.draft)):
        if table.sleep_level == 2 and find_folder(name) is None:
            raise EngineError(f"sleep_level: expected weights in a folder for level 2, got {name}; use level 1")


def put_to_sleep(url: str, level: int) -> None:
    """Take its memory: requests must not be in flight. Raises EngineError."""
    _step(url, f"/sleep?level={level}")


def wake(url: str, table: OwnedEngine) -> None:
    """Give it its memory back, and after level 2 its weights and its drafter's. Raises EngineError."""
    if table.sleep_level == 1:
        _step(url, "/wake_up")
        return
    _step(url, "/wake_up?tags=weights")
    for start, which in UPDATES:
        name = table.model if which == "model" else table.draft
        if name is None:
            continue
        folder = find_folder(name)
        _step(url, start)
        _step(url, "/update_weights", {"update_info": {"folder": os.path.abspath(str(folder))}})
        _step(url, "/finish_weight_update", {"weight_version": None})
    _step(url, "/wake_up?tags=kv_cache")
    _step(url, "/reset_prefix_cache")


def post(url: str, path: str, body: Mapping[str, object] | None, timeout_s: float) -> int:
    """POST to an engine on this machine; the status of its answer. Raises EngineError: there is none."""
    try:
        return ask_engine(url, path, body or {}, method="POST", timeout_s=timeout_s)[0]
    except OSError as error:
        raise EngineError(f"engine at {url}: {path}: expected an answer, got {error!r}; see its log") from None


def _step(url: str, path: str, body: Mapping[str, object] | None = None) -> None:
    if (status := post(url, path, body, TIMEOUT_S)) != OK:
        raise EngineError(f"engine at {url}: {path}: expected HTTP 200, got {status}; see its log")
