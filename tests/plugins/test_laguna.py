"""The router on a CPU: what stock vLLM lacks, what ours computes, and the whole model against transformers' own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from probes import run_probe
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from laguna_serve.serving.engine import Engine, EngineConfig

pytestmark = pytest.mark.vllm
TOY = Path(__file__).resolve().parent.parent / "toy"
EXPERTS, TOP_K = 16, 4
PARITY_PROMPTS, PARITY_TOKENS = 56, 64


def cpu_router(scoring_func: str) -> object:
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    bias = torch.linspace(-1, 1, EXPERTS)
    return CPURouter(TOP_K, EXPERTS, scoring_func=scoring_func, e_score_correction_bias=bias)


def test_stock_router_cannot_score_with_a_sigmoid() -> None:
    """When this fails, vLLM routes Laguna on a CPU by itself: compare its result with ours and retire the subclass."""
    router = cpu_router("sigmoid")
    with pytest.raises(AssertionError):
        router._compute_routing(torch.zeros(3, 8), torch.randn(3, EXPERTS), None)  # type: ignore[attr-defined]


def router_biases(loader: str) -> torch.Tensor:
    """The biases [sparse layers, E] that a fresh process holds after loading the toy teacher (see bias_probe.py)."""
    return torch.tensor(run_probe("bias_probe.py", str(TOY), loader))


def test_stock_loader_drops_the_router_bias() -> None:
    """When this fails, vLLM loads the bias by itself: retire `plugins/models/laguna.py`."""
    assert not router_biases("stock").any()


def test_router_bias_is_loaded() -> None:
    with safe_open(TOY / "teacher" / "model.safetensors", "pt") as file:
        stored = [file.get_tensor(name) for name in sorted(file.keys()) if name.endswith("e_score_correction_bias")]
    assert torch.stack(stored).any(), "a bias of zeros would prove nothing"
    torch.testing.assert_close(router_biases("ours"), torch.stack(stored).float())


def test_router_bias_under_the_gate_is_loaded(tmp_path: Path, run_model: Any) -> None:
    """By transformers' name of it; without the bias the tokens are others."""
    for file in (TOY / "teacher").glob("*.json"):
        shutil.copy(file, tmp_path)
    weights = load_file(TOY / "teacher" / "model.safetensors")
    renamed = {name.replace("experts.e_score", "gate.e_score"): tensor for name, tensor in weights.items()}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert run_model(tmp_path)["tokens"] == run_model(TOY / "teacher")["tokens"]


@pytest.mark.parametrize("tokens", [0, 1, 7, 64])
def test_sigmoid_topk_routes_as_transformers_does(tokens: int) -> None:
    from transformers import LagunaConfig
    from transformers.models.laguna.modeling_laguna import LagunaTopKRouter

    from laguna_serve.plugins.models.laguna_cpu import sigmoid_topk

    torch.manual_seed(tokens)
    reference = LagunaTopKRouter(LagunaConfig(hidden_size=32, num_experts=EXPERTS, num_experts_per_tok=TOP_K))
    torch.nn.init.normal_(reference.weight)
    torch.nn.init.normal_(reference.e_score_correction_bias)
    x = torch.randn(tokens, 32)
    logits, weights, ids = reference(x)
    router = cpu_router("sigmoid")
    router.e_score_correction_bias = reference.e_score_correction_bias.data  # type: ignore[attr-defined]
    router.custom_routing_function = partial(sigmoid_topk, router=router)  # type: ignore[attr-defined]
    ours = router._compute_routing(x, logits, None)  # type: ignore[attr-defined]
    assert ours[1].dtype == torch.int32
    assert torch.equal(ours[1].long(), ids)
    torch.testing.assert_close(ours[0], weights)


def test_bias_selects_but_does_not_weigh() -> None:
    from laguna_serve.plugins.models.laguna_cpu import sigmoid_topk

    router = cpu_router("sigmoid")
    router.e_score_correction_bias = torch.tensor([0.0, 0.0, 0.0, 5.0])  # type: ignore[attr-defined]
    logits = torch.tensor([[3.0, 2.0, 1.0, -4.0]])
    weights, ids = sigmoid_topk(torch.empty(1, 1), logits, 2, False, router=router)  # type: ignore[arg-type]
    assert ids.tolist() == [[3, 0]]
    torch.testing.assert_close(weights, logits.sigmoid()[:, [3, 0]])


def greedy_by_transformers(prompts: list[list[int]]) -> list[list[int]]:
    """Each prompt's greedy continuation, one full forward pass per token over all prompts of a length at once."""
    from transformers import LagunaForCausalLM

    model = LagunaForCausalLM.from_pretrained(TOY / "teacher", dtype=torch.float32).eval()
    rows = []
    for prompt in prompts:
        with torch.no_grad():
            out = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                do_sample=False,
                min_new_tokens=PARITY_TOKENS,
                max_new_tokens=PARITY_TOKENS,
                eos_token_id=None,
            )
        rows.append(out[0, len(prompt) :].tolist())
    return rows


def test_greedy_tokens_equal_transformers_in_fp32(fp32_engine: Engine) -> None:
    choices = ask_greedily(fp32_engine)
    assert len(choices) == PARITY_PROMPTS
    expected = greedy_by_transformers([choice["prompt_token_ids"] for choice in choices])
    assert [choice["token_ids"] for choice in choices] == expected


def test_data_parallel_ranks_with_a_drafter_give_the_same_tokens(fp32_engine: Engine, tmp_path: Path) -> None:
    """They share the experts, whose sums come in another order; 56 prompts, so that both have unlike many rows."""
    flags = ("--data-parallel-size", "2")
    config = EngineConfig(fp32_engine.config.model, draft=str(TOY / "dflash"), dtype="float32", enforce_eager=True)
    config = replace(config, max_num_seqs=64, extra_args=flags)
    with Engine(config, log_path=tmp_path / "ranks.log") as ranks:
        found = ask_greedily(ranks)
    assert [choice["token_ids"] for choice in found] == [choice["token_ids"] for choice in ask_greedily(fp32_engine)]


def ask_greedily(engine: Engine) -> list[dict[str, Any]]:
    """The choices of the first PARITY_PROMPTS prompts, PARITY_TOKENS each."""
    lines = (TOY / "prompts.jsonl").read_text().splitlines()[:PARITY_PROMPTS]
    answer = httpx.post(
        f"{engine.base_url}/v1/completions",
        json={
            "model": engine.model_name,
            "prompt": [json.loads(line)["prompt"] for line in lines],
            "max_tokens": PARITY_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        },
        timeout=300,
    )
    answer.raise_for_status()
    return sorted(answer.json()["choices"], key=lambda choice: choice["index"])


def test_chat_stops_at_the_end_of_turn(fp32_engine: Engine) -> None:
    request = "Complete this function:\ndef __repr__(self):"
    answer = httpx.post(
        f"{fp32_engine.base_url}/v1/chat/completions",
        json={
            "model": fp32_engine.model_name,
            "messages": [{"role": "user", "content": request}],
            "temperature": 0,
            "max_tokens": 200,
            "return_token_ids": True,
        },
        timeout=120,
    )
    answer.raise_for_status()
    choice = answer.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"].startswith("def __repr__(self):")
    assert "<|" not in choice["message"]["content"]
