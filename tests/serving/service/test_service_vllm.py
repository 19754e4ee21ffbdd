"""laguna serve with vLLM itself, whose processes are killed under load: everybody gets an answer or an error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file, save_file
from serving_fakes import post, serving, wait_until_gone
from test_service import COMPLETIONS, Stream, read_until, stop

TOY = Path(__file__).resolve().parents[2] / "toy"
PROMPTS = [json.loads(line)["prompt"] for line in (TOY / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[:8]]
pytestmark = pytest.mark.vllm
ENDLESS = {"max_tokens": 1500, "ignore_eos": True, "temperature": 0}


def find_vllm(server: subprocess.Popen[str]) -> dict[str, list[int]]:
    """The processes of the engine: its core, and all."""
    found = [child for child in psutil.Process(server.pid).children(recursive=True) if not is_supervisor(child)]
    core = [child.pid for child in found if " ".join(child.cmdline()).startswith("VLLM::EngineCore")]
    return {"core": core, "all": [child.pid for child in found]}


def is_supervisor(process: psutil.Process) -> bool:
    return "laguna_serve.serving.supervision.reaper" in process.cmdline()


def read_greeting(server: subprocess.Popen[str]) -> tuple[str, str]:
    """The gateway's URL and its admin page's."""
    assert server.stdout is not None
    url = server.stdout.readline().split()[3].removesuffix("/v1")
    return url, server.stdout.readline().split()[1]


def read_status(admin: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{admin}/admin/status", timeout=30) as answer:
        upstream: dict[str, Any] = json.load(answer)["models"]["teacher"]["upstreams"][0]
        return upstream


def read_digests(admin: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{admin}/admin/weight_digests", timeout=30) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


@pytest.mark.parametrize("victims", ["core", "all"])
def test_killed_under_load(tmp_path: Path, victims: str) -> None:
    flags = ["--draft", str(TOY / "dflash"), "--eager", "--max-num-seqs", "8", "--kv-cache-gib", "0.25"]
    with serving(TOY / "teacher", tmp_path, *flags) as server, ThreadPoolExecutor(16) as pool:
        url, admin = read_greeting(server)

        def ask(prompt: str) -> Any:
            return post(url, COMPLETIONS, {"model": "teacher", "prompt": prompt, "max_tokens": 16, "temperature": 0})

        before = [ask(prompt)["choices"][0]["text"] for prompt in PROMPTS]
        bodies = [{"model": "teacher", "prompt": prompt, "stream": True, **ENDLESS} for prompt in PROMPTS[:4]]
        chat = {"model": "teacher", "messages": [{"role": "user", "content": PROMPTS[0]}], "stream": True, **ENDLESS}
        streams = [*(Stream(url, body=body) for body in bodies), Stream(url, "/v1/chat/completions", chat)]
        pids = find_vllm(server)
        for pid in pids[victims]:
            os.kill(pid, signal.SIGKILL)
        told = read_until(server, "starting it again in 1 s (failure 1 of 5 in a row)")
        assert "killed without a word in its log" in told[-1]
        after = [pool.submit(ask, prompt) for prompt in PROMPTS]
        read_until(server, "serving again, restart 1")
        wait_until_gone(pids["all"], timeout_s=0)
        # Which of them are computed together is chance, and bf16 sums of more rows may round another way.
        assert [request.result()["usage"]["completion_tokens"] for request in after] == [16] * len(PROMPTS)
        assert [ask(prompt)["choices"][0]["text"] for prompt in PROMPTS] == before
        for stream in streams:
            *_, error, done = stream.read_end()
            assert done == "data: [DONE]"
            assert "error" in json.loads(error.removeprefix("data: "))
        status = read_status(admin)
        assert (status["state"], status["restarts"]) == ("up", 1)
        result, _ = stop(server)
    assert (result["outcome"], result["restarts"], len(result["deaths"])) == ("stopped", 1, 1)
    assert result["acceptance"]["drafts"] > 0
    assert (tmp_path / "log.1").stat().st_size > 0


def test_updated_weights_are_not_served_from_the_checkpoint(tmp_path: Path) -> None:
    """A new engine has the checkpoint's: it is fenced off until it is given the updated ones again."""
    new = tmp_path / "new"
    new.mkdir()
    tensors = load_file(TOY / "teacher" / "model.safetensors")
    save_file({name: -t if "o_proj" in name else t for name, t in tensors.items()}, new / "model.safetensors")
    update = {"weight_version": "step-2", "update": [{"folder": str(new)}], "digests": True}
    flags = ["--weight-updates", "--eager", "--max-num-seqs", "4", "--kv-cache-gib", "0.25"]
    with serving(TOY / "teacher", tmp_path, *flags) as server:
        url, admin = read_greeting(server)
        body = {"model": "teacher", "prompt": PROMPTS[0], "max_tokens": 16, "temperature": 0}
        old = post(url, COMPLETIONS, body)["choices"][0]["text"]
        loaded = read_digests(admin)
        assert post(admin, "/admin/update_weights", update)["outcome"] == "updated"
        updated = read_digests(admin)
        assert updated != loaded
        text = post(url, COMPLETIONS, body)["choices"][0]["text"]
        assert text != old
        for pid in find_vllm(server)["all"]:
            os.kill(pid, signal.SIGKILL)
        read_until(server, "serving again, restart 1")
        for _ in range(3):
            assert post(url, COMPLETIONS, body)["status"] == 503
            time.sleep(0.5)  # a health check or two, none of which may take the fence away
        status = read_status(admin)
        assert status["state"] == "fenced"
        assert status["last_error"].startswith("weights: expected version step-2, got ")
        assert post(admin, "/admin/update_weights", update)["outcome"] == "updated"
        deadline = time.monotonic() + 30
        while (answer := post(url, COMPLETIONS, body)).get("status") == 503:
            assert time.monotonic() < deadline
        assert answer["choices"][0]["text"] == text
        assert read_status(admin)["weight_version"] == "step-2"
        assert read_digests(admin) == updated
        assert stop(server)[0]["restarts"] == 1
