"""The launcher with vLLM itself: it serves with a drafter, nothing survives a kill, and a failure is quoted."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from serving_fakes import wait_until_gone

from laguna_serve.serving.engine import Engine, EngineConfig, EngineError
from laguna_serve.serving.machine.memory import process_memory

TOY = Path(__file__).resolve().parents[2] / "toy"
pytestmark = pytest.mark.vllm

LAUNCHER = """
import json, sys, time
from pathlib import Path
from laguna_serve.serving.engine import Engine, EngineConfig
config = EngineConfig(model=sys.argv[1], draft=sys.argv[2], enforce_eager=True)
with Engine(config, log_path=Path(sys.argv[3])) as engine:
    print(json.dumps([engine.base_url, engine.model_name, engine.pids()]), flush=True)
    time.sleep(600)
"""


def complete(base_url: str, model: str, prompt: str | list[str] = "def f(", max_tokens: int = 16) -> int:
    """Number of tokens that the server generated."""
    asked = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
    body = json.dumps(asked).encode()
    request = urllib.request.Request(f"{base_url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        tokens: int = json.load(response)["usage"]["completion_tokens"]
        return tokens


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """Kill the process of a test that fails: leaving `Popen` waits for it."""
    try:
        yield
    finally:
        process.kill()


def test_killed_launcher_of_vllm_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LAUNCHER, str(TOY / "teacher"), str(TOY / "dflash"), str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher, ended(launcher):
        assert launcher.stdout is not None
        base_url, model, pids = json.loads(launcher.stdout.readline())
        assert complete(base_url, model) == 16
        with urllib.request.urlopen(f"{base_url}/metrics", timeout=30) as response:
            assert "vllm:spec_decode_num_drafts_total" in response.read().decode()
        memory = process_memory(pids)
        assert {"APIServer", "EngineCore"} <= {process.name for process in memory.processes}
        # A page's share falls with every process that has it: an engine's core is forked, and others may be running.
        assert memory.pss_bytes > 1 << 29
        os.kill(launcher.pid, signal.SIGKILL)
    wait_until_gone(pids, timeout_s=20)


def test_drafter_of_another_model_serves_and_its_acceptance_is_shown(tmp_path: Path) -> None:
    """The student with the teacher's drafter in the other format, from the command line."""
    command = [sys.executable, "-m", "laguna_serve.serving.cli", "serve", str(TOY / "dense"), "--eager", "--port", "0"]
    command += ["--draft", str(TOY / "dflash-speculators"), "--gamma", "max", "--log", str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server, ended(server):
        assert server.stdout is not None
        assert server.stderr is not None
        base_url = server.stdout.readline().split()[3].removesuffix("/v1")
        for line in (TOY / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[:40]:
            assert complete(base_url, "dense", json.loads(line)["prompt"], 48) == 48
        lines = []
        for line in server.stderr:
            lines.append(line)
            if line.startswith("acceptance: "):
                break
        server.send_signal(signal.SIGINT)
        out, _ = server.communicate(timeout=60)
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert sum("trained for teacher, drafts for" in line for line in warnings) == 1
    assert sum("longest sequence: 2040 tokens instead of 2048" in line for line in warnings) == 1
    assert len(warnings) == 2
    result = json.loads(out.splitlines()[-1])
    assert server.returncode == 0
    assert result["acceptance"]["drafts"] >= 200
    assert result["acceptance"]["length"] > 1.5
    assert "LagunaDenseForCausalLM" in (tmp_path / "log").read_text(encoding="utf-8")


def count_drafts(base_url: str) -> tuple[float, float]:
    """Steps with a draft, and tokens drafted."""
    with urllib.request.urlopen(f"{base_url}/metrics", timeout=30) as response:
        text = response.read().decode()
    found = dict(re.findall(r"^vllm:spec_decode_num_(drafts|draft_tokens)_total\{.*\} (\S+)$", text, re.MULTILINE))
    return float(found["drafts"]), float(found["draft_tokens"])


def test_schedule_by_batch_size_is_followed(tmp_path: Path) -> None:
    """γ 7 for a request alone, none for four together. `exact` has compared the tokens of both, to the bit."""
    schedule = ((1, 1, 7), (2, 8, 0))
    config = EngineConfig(str(TOY / "teacher"), draft=str(TOY / "dflash"), gamma=7, gamma_schedule=schedule, exact=True)
    prompts = [json.loads(line)["prompt"] for line in (TOY / "prompts.jsonl").read_text().splitlines()[:4]]
    with Engine(replace(config, enforce_eager=True), log_path=tmp_path / "log") as engine:
        before = count_drafts(engine.base_url)
        assert complete(engine.base_url, engine.model_name, prompts[0], 48) == 48
        alone = count_drafts(engine.base_url)
        assert complete(engine.base_url, engine.model_name, prompts, 48) == 4 * 48
        together = count_drafts(engine.base_url)
    assert alone[0] - before[0] >= 6
    assert alone[1] - before[1] == 7 * (alone[0] - before[0])
    assert together[0] - alone[0] <= 4, "but for the first one in and the last one out"


BATCH_DEPENDENT = """
from vllm.model_executor.layers.logits_processor import LogitsProcessor


def register():
    compute = LogitsProcessor.forward

    def forward(self, lm_head, hidden_states, *more):
        logits = compute(self, lm_head, hidden_states, *more)
        return logits if logits is None or len(logits) < 4 else logits * (1 + 2**-7)

    LogitsProcessor.forward = forward
"""


def test_exact_engine_that_depends_on_the_batch_is_not_served(tmp_path: Path, plant: Callable[[str], None]) -> None:
    """Planted in vLLM: logits of four rows and more are another number of ulps."""
    plant(BATCH_DEPENDENT)
    config = EngineConfig(model=str(TOY / "teacher"), enforce_eager=True, exact=True)
    with (
        pytest.raises(EngineError, match=r"--exact: expected .*the kernels here depend on the batch"),
        Engine(config, log_path=tmp_path / "log"),
    ):
        pass


def test_failure_of_vllm_is_quoted(tmp_path: Path) -> None:
    overrides = ("--hf-overrides", "{}")  # beside which lengths are left to vLLM
    config = EngineConfig(model=str(TOY / "teacher"), max_model_len=1 << 30, kv_cache_gib=0.25, extra_args=overrides)
    with pytest.raises(EngineError, match="max_model_len"), Engine(config, log_path=tmp_path / "log"):
        pass
