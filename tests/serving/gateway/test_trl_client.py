"""TRL's own client, as released, against the gateway: rollouts from a real engine, and how far weights get on a CPU."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from gateway_fakes import Gateway, Upstream, gateway
from trl_engine import TrlEngine
from warm import run_warm

from laguna_serve.serving.engine import Engine
from laguna_serve.serving.gateway.traces.store import TraceFile

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
PYTHON = ROOT / ".venv-train" / "bin" / "python"
PROBE = Path(__file__).with_name("trl_probe.py")
TOY = ROOT / "tests" / "toy" / "teacher"
needs_trl = pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-train: bash scripts/client_env.sh train makes it")
PROMPTS = ["def add(a, b):\n", "class A:\n"]


def call(url: str, *calls: tuple[str, dict[str, Any]], train: Path | None = None) -> list[Any]:
    """The answers of TRL's client to its constructor (the model) and to calls of methods; of a trainer of a model."""
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    arguments = [url, json.dumps(calls), *([] if train is None else [str(train)])]
    done = run_warm(PROBE, *arguments, environment=env, timeout=300, venv=PYTHON.parents[1].name)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return [answer.get("value", answer) for answer in answers]


def address(front: Gateway, credentials: str = "") -> str:
    return f"http://{credentials}127.0.0.1:{front.admin_port}/trl"


@pytest.mark.vllm
@needs_trl
def test_rollouts_of_a_real_engine(fp32_engine: Engine, tmp_path: Path) -> None:
    """Under keys in the address; the gateway records them, and the engine is left as it was."""
    digests = [hashlib.sha256(key).hexdigest() for key in (b"root", b"sk")]
    name, traces = fp32_engine.model_name, tmp_path / "traces.db"
    tables: dict[str, Any] = {"traces": {"file": str(traces)}, "keys": [{"name": "trainer", "sha256": digests[1]}]}
    admin = {"trl": name, "sha256": digests[0]}
    greedy = {"temperature": 0.0, "max_tokens": 8}
    with gateway(Upstream(url=fp32_engine.base_url), model={"name": name}, admin=admin, **tables) as front:
        model, texts, again, groups, chat, scores, world, reset, info, refused = call(
            address(front, "sk:root@"),
            ("generate", {"prompts": PROMPTS, **greedy}),
            ("generate", {"prompts": PROMPTS, **greedy}),
            ("generate", {"prompts": [[10, 20, 30]], "n": 3, "max_tokens": 4}),
            ("chat", {"messages": [[{"role": "user", "content": "Complete:\ndef f("}]], **greedy}),
            ("get_sequence_logprobs", {"sequences": [[10, 20, 30, 40]], "prompt_lengths": [2], "top_logprobs": 5}),
            ("get_world_size", {}),
            ("reset_prefix_cache", {}),
            ("get_server_info", {}),
            ("init_communicator", {"device": "cpu"}),
        )
    assert model == name
    assert texts["completion_ids"] == again["completion_ids"]
    assert [len(ids) for ids in texts["completion_ids"]] == [8, 8]
    assert all(len(step) == 1 and step[0] <= 0 for answer in texts["logprobs"] for step in answer)
    assert texts["logprob_token_ids"] == [[[token] for token in ids] for ids in texts["completion_ids"]]
    assert (groups["prompt_ids"], len(groups["completion_ids"])) == ([[10, 20, 30]], 3)
    assert len(chat["completion_ids"][0]) == 8
    assert scores["actual_token_ids"] == [[[30], [40]]]
    assert [len(step) for step in scores["logprobs"][0]] == [5, 5]
    assert (world, reset) == (1, None)
    assert info["model_config"]["model"] == fp32_engine.config.model
    assert info["weight_transfer_config"] is None, "the engine's is of folders, which TRL cannot use"
    assert refused["error"] == "RuntimeError"
    assert "has no weight-transfer engine" in refused["text"]
    file = TraceFile(traces)
    kept = list(file.read())
    file.close()
    assert {trace.key for trace in kept} == {"trainer"}
    assert [trace.token_ids for trace in kept[:2]] == texts["completion_ids"]


@needs_trl
def test_transfer_is_trls_to_refuse_without_cuda() -> None:
    """With engines that have NCCL its client goes no further than its own device; so does its trainer."""
    with TrlEngine(2) as one, TrlEngine() as two, gateway(one, two, admin={"trl": "m"}) as front:
        url = address(front)
        model, world, refused, started, finished, trained = call(
            url,
            ("get_world_size", {}),
            ("init_communicator", {"device": "cpu"}),
            ("_start_weight_update", {}),
            ("_finish_weight_update", {}),
            train=TOY,
        )
        assert (model, world) == ("m", 3)
        assert refused["error"] == "NotImplementedError"
        assert "needs a CUDA device, got 'cpu'" in refused["text"]
        assert "Request failed: 409" in started["text"]
        assert "call init_weight_transfer_engine first" in started["text"]
        assert "call start_weight_update" in finished["text"]
        assert one.calls == two.calls == []
        assert front.relay.pools["m"].paused is False
        assert trained == refused
