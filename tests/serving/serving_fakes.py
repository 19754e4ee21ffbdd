"""Configs of small checkpoints, the fake vLLM's folder, and what tests ask of servers and about processes."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from safetensors.numpy import save_file

from laguna_serve.serving.checkpoint.drafter import read_drafter
from laguna_serve.serving.checkpoint.stored.drafter_weights import expected_tensors

LAGUNA = [sys.executable, "-m", "laguna_serve.serving.cli"]
# A real engine may take minutes to start again on a busy machine.
TIMEOUT_S = 400.0
FAKE_SITE = Path(__file__).parent / "fake_site"

TARGET: dict[str, Any] = {
    "architectures": ["LagunaForCausalLM"],
    "model_type": "laguna",
    "dtype": "bfloat16",
    "vocab_size": 1024,
    "hidden_size": 160,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
}
DRAFTER: dict[str, Any] = {
    **TARGET,
    "architectures": ["DFlashLagunaForCausalLM"],
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "layer_types": ["full_attention"] * 2,
    "draft_vocab_size": 1024,
    "block_size": 8,
    "dflash_config": {"target_layer_ids": [0, 2, 5], "mask_token_id": 3},
}
SPECULATORS: dict[str, Any] = {
    "architectures": ["DFlashSpeculator"],
    "speculators_model_type": "dflash",
    "transformer_layer_config": {
        "model_type": "qwen3",
        "vocab_size": 1024,
        "hidden_size": 160,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
    },
    "draft_vocab_size": 512,
    "block_size": 8,
    "mask_token_id": 12,
    "aux_hidden_state_layer_ids": [1, 3, 6],
}

MakeCheckpoint = Callable[..., Path]


def write_drafter_weights(folder: Path) -> None:
    """Zeros in every tensor that the folder's config.json asks for; a reduced vocabulary is every other token."""
    drafter = read_drafter(folder)
    tensors = {name: np.zeros(shape, np.float16) for name, shape in expected_tensors(drafter).items()}
    if drafter.draft_vocab_size != drafter.target_vocab_size:
        size = min(drafter.draft_vocab_size, drafter.target_vocab_size // 2)
        tensors["d2t"] = np.arange(size)
        tensors["t2d"] = np.arange(drafter.target_vocab_size) % 2 == 0
        tensors["t2d"][2 * size :] = False
    save_file(tensors, folder / "model.safetensors")


def read_pids(path: Path, count: int) -> list[int]:
    """The ids in the file, once there are that many."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        pids = [int(line) for line in path.read_text().split()] if path.exists() else []
        if len(pids) >= count:
            return pids
        time.sleep(0.02)
    raise AssertionError(f"expected {count} process ids in {path}")


def wait_until_gone(pids: list[int], timeout_s: float = 30.0) -> None:
    """Fails if any of the processes is still there after the timeout."""
    deadline = time.monotonic() + timeout_s
    while living := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, f"still alive: {living}"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def post(base_url: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
    """The JSON of the answer, of an error with its `status`; None where there was none."""
    data = json.dumps({} if body is None else body).encode()
    request = urllib.request.Request(base_url + path, data, {"Content-Type": "application/json", **(headers or {})})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=TIMEOUT_S) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return {"status": error.code, **json.load(error)}
    except (OSError, http.client.HTTPException):
        return None


@contextmanager
def serving(target: Path, tmp_path: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """`laguna serve` as a process, at a free port, with its log in the folder."""
    command = [*LAGUNA, "serve", str(target), "--port", "0", "--log", str(tmp_path / "log"), *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            yield server
        finally:
            server.kill()


def read_addresses(server: subprocess.Popen[str]) -> tuple[str, str]:
    """The addresses of the engine and of the administration from the lines that greet the user."""
    assert server.stdout is not None
    url, admin = server.stdout.readline().split()[3].removesuffix("/v1"), server.stdout.readline().split()
    assert admin[0] == "status:"
    assert admin[1].startswith("http://127.0.0.1:")
    read_rest_of_greeting(server, url)
    return url, admin[1]


def read_url(server: subprocess.Popen[str], *, gateway: bool = True) -> str:
    """The engine's address from the lines that greet the user; they are on stdout together."""
    if gateway:
        return read_addresses(server)[0]
    assert server.stdout is not None
    url = server.stdout.readline().split()[3].removesuffix("/v1")
    read_rest_of_greeting(server, url)
    return url


def read_rest_of_greeting(server: subprocess.Popen[str], url: str) -> None:
    assert server.stdout is not None
    log, example = server.stdout.readline(), server.stdout.readline()
    assert log.startswith("log: ")
    assert example.startswith(f"try: curl {url}/v1/completions ")
