"""Certificates of masked diffusion: proposals are certified to the bit, greedy and drawn, and defects are found."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file
from tiny_llada import make_tokenizer, write_llada

from laguna_serve.bench import certify
from laguna_serve.bench.arms import arms
from laguna_serve.serving.planning.launch import find_port

pytestmark = pytest.mark.slow

SERVERS = Path(__file__).with_name("defective_diffusion.py")
PROMPTS = ("tell me", "once upon a time", "def add(a, b):", "the end of")
DRAWN = ("--temperature", "0.8")
START_S = 120.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with ties at every step: capital letters have the logits of small ones, and lower ids."""
    folder = write_llada(tmp_path_factory.mktemp("llada") / "llada")
    encode = make_tokenizer().encode
    tensors = load_file(folder / "model.safetensors")
    head = next(tensor for name, tensor in tensors.items() if name.endswith("transformer.ff_out.weight"))
    head[encode("ABCDEFGHIJKLMNOPQRSTUVWXYZ")] = head[encode("abcdefghijklmnopqrstuvwxyz")]
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def urls(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Servers by what is wrong with them; "baseline" proposes nothing."""
    draft = write_llada(tmp_path_factory.mktemp("draft") / "draft", error=0.02)
    ports = {name: find_port("127.0.0.1") for name in ("baseline", "none", "ties", "membership", "stale", "noise")}
    common = ["--cache", "dual", "--served-model-name", "llada", "--block-length", "8"]
    proposing = ["--draft", str(draft), "--states", "4", "--draft-policy", "always"]
    servers = [
        ("none" if name == "baseline" else name,
         [str(folder), "--port", str(port), *common, *([] if name == "baseline" else proposing)])
        for name, port in ports.items()
    ]  # fmt: skip
    with subprocess.Popen([sys.executable, str(SERVERS), json.dumps(servers)]) as process:
        try:
            found = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
            for url in found.values():
                wait_until_healthy(url)
            yield found
        finally:
            process.terminate()


def wait_until_healthy(url: str) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def run(urls: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(arms, "DEATH_S", 0.0)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"id": str(n), "prompt": text}) + "\n" for n, text in enumerate(PROMPTS)))

    def certify_candidate(candidate: str, *more: str) -> tuple[int, dict[str, Any]]:
        flags = ["--baseline-url", urls["baseline"], "--candidate-url", urls[candidate], "--model", "llada"]
        flags += ["--prompts", str(prompts), "--max-tokens", "24", "--concurrency", "1,3", "--dtype", "float32"]
        status = certify.main([*flags, "--identical", "--out", str(tmp_path / "out"), *more])
        return status, json.loads((tmp_path / "out" / "certificate.json").read_text())

    return certify_candidate


@pytest.mark.parametrize("more", [(), DRAWN], ids=["greedy", "drawn"])
def test_proposals_change_no_bit(run: Any, more: tuple[str, ...]) -> None:
    status, result = run("none", *more)
    assert (status, result["verdict"], result["reasons"]) == (0, "identical", [])
    assert result["arms"]["candidate"]["acceptance"] > 1.2
    assert result["workload"]["identical"]
    for load in result["loads"]:
        assert load["candidate"]["difference"]["max"] == 0
        assert load["candidate"]["tokens"] == 24 * len(PROMPTS)


@pytest.mark.parametrize(
    ("defect", "more"), [("ties", ()), ("membership", ()), ("membership", DRAWN), ("stale", ()), ("noise", DRAWN)]
)
def test_planted_defects_are_found(run: Any, defect: str, more: tuple[str, ...]) -> None:
    status, result = run(defect, *more)
    assert (status, result["verdict"]) == (1, "defect")
    assert any("candidate" in reason for reason in result["reasons"])


def test_draws_are_refused_where_answers_may_differ(urls: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"id": "0", "prompt": "a"}) + "\n")
    flags = ["--baseline-url", urls["baseline"], "--candidate-url", urls["none"], "--model", "llada"]
    status = certify.main([*flags, "--prompts", str(prompts), "--out", str(tmp_path / "out"), "--temperature", "0.5"])
    assert status == 2
    assert "--temperature: expected --identical beside it" in capsys.readouterr().err
