"""The experts that an engine returns are those that transformers' own router chooses for the same tokens.

In every way that a token's keys and values come about: read in one step or several, found in the prefix cache, sampled
one by one, drafted and accepted, computed again after a preemption; from a graph that was compiled, and of a pruned
model. Left out is what stands at or behind a tie of two experts, where rounding decides.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from probes import run_probe

from laguna_serve.scripts.training.rl.off_policy.mismatch import TIE

pytestmark = pytest.mark.vllm
TOY = Path(__file__).resolve().parent.parent / "toy"
DENSE_LAYERS, LAYERS, TOP_K = 1, 6, 4
DRAFTER = {"method": "dflash", "model": str(TOY / "dflash"), "num_speculative_tokens": 7}
CHUNKS = {"max_num_batched_tokens": 48}
PASSES: dict[str, dict[str, Any]] = {
    "fresh": {},
    "cached": {},
    "sampled": {"temperature": 1.0, "n": 2, "seed": 3},
    "stopped": {"stop": ["e"], "temperature": 1.0, "seed": 5},
    "reset": {"max_tokens": 1},
    "late": {"routed_experts_prompt_start": 20},
}


def run(settings: dict[str, Any], passes: dict[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    report: dict[str, Any] = run_probe("routed_probe.py", str(TOY), json.dumps(settings), json.dumps(passes or PASSES))
    return report


def read_experts(answer: dict[str, Any]) -> np.ndarray:
    return np.asarray(np.load(io.BytesIO(base64.b64decode(answer["experts"]))))


def load_teacher(folder: Path = TOY / "teacher") -> Any:
    from transformers import LagunaForCausalLM

    return LagunaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def teacher() -> Any:
    return load_teacher()


def choose_by_transformers(model: Any, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Experts [T, sparse layers, k], sorted, and whether a tie is at or before a token, [T]."""
    chosen, closest = [], []

    def note(router: Any, _: Any, output: tuple[torch.Tensor, ...]) -> None:
        scores = (output[0].sigmoid() + router.e_score_correction_bias).topk(TOP_K + 1).values
        chosen.append(output[2].sort(-1).values)
        closest.append(scores[:, -2] - scores[:, -1])

    hooks = [layer.mlp.gate.register_forward_hook(note) for layer in model.model.layers[DENSE_LAYERS:]]
    model(input_ids=torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    tied = torch.stack(closest).min(0).values < TIE
    return torch.stack(chosen, 1).numpy(), np.logical_or.accumulate(tied.numpy())


def check(model: Any, answers: list[dict[str, Any]], start: int = 0) -> None:
    compared = total = 0
    for answer in answers:
        tokens = [*answer["prompt"], *answer["tokens"]][:-1]  # the last one was never computed
        experts = read_experts(answer)
        assert experts.dtype == np.uint8
        assert experts.shape == (len(tokens) - start, LAYERS, TOP_K)
        assert not experts[:, :DENSE_LAYERS].any(), "a dense layer has none"
        expected, tied = choose_by_transformers(model, tokens)
        ours = np.sort(experts[:, DENSE_LAYERS:], -1)
        same = (ours == expected[start:]).all((1, 2))
        assert (same | tied[start:]).all(), f"rows {np.flatnonzero(~(same | tied[start:]))}"
        compared, total = compared + int((~tied[start:]).sum()), total + len(same)
    assert compared > total / 2


def check_all(model: Any, report: dict[str, Any]) -> None:
    for name, sampling in PASSES.items():
        check(model, report[name], sampling.get("routed_experts_prompt_start", 0))


def test_stock_runner_is_refused() -> None:
    """When this fails, vLLM's runner V1 returns routed experts by itself: retire plugins/routed_experts/runner.py."""
    with pytest.raises(AssertionError, match="AuxOutput Connector requires Model Runner V2"):
        run({"worker_cls": "auto"})


def test_experts_of_chunked_and_cached_prompts(teacher: Any) -> None:
    report = run(CHUNKS)
    assert min(answer["cached"] for answer in report["cached"]) >= 64
    assert max(len(answer["prompt"]) for answer in report["fresh"]) > 4 * CHUNKS["max_num_batched_tokens"]
    assert {len(answer["tokens"]) for answer in report["stopped"]} - {24}, "none was stopped"
    check_all(teacher, report)
    for fresh, cached in zip(report["fresh"], report["cached"], strict=True):
        assert np.array_equal(read_experts(fresh), read_experts(cached))


def test_experts_of_accepted_drafts(teacher: Any) -> None:
    report = run(CHUNKS | {"speculative_config": DRAFTER})
    assert report["accepted"] > 100
    check_all(teacher, report)
    plain = run(CHUNKS)
    assert [answer["tokens"] for answer in plain["fresh"]] == [answer["tokens"] for answer in report["fresh"]]


def test_experts_under_decided_drafts(teacher: Any) -> None:
    worker = "laguna_serve.plugins.worker.AdaptiveCPUWorker"
    report = run(CHUNKS | {"speculative_config": DRAFTER, "worker_cls": worker})
    check_all(teacher, report)


@pytest.mark.parametrize("speculation", [{}, {"speculative_config": DRAFTER}])
def test_experts_of_preempted_requests(teacher: Any, speculation: dict[str, Any]) -> None:
    long = {"temperature": 1.0, "n": 4, "seed": 1, "max_tokens": 100}
    report = run({"num_gpu_blocks_override": 56, **speculation}, {"first": long, "again": long})
    assert report["preemptions"] > 5
    for name in ("first", "again"):
        check(teacher, report[name])


def test_experts_from_a_compiled_graph(teacher: Any) -> None:
    check_all(teacher, run(CHUNKS | {"enforce_eager": False, "speculative_config": DRAFTER}))


@pytest.mark.parametrize("before_0_31", [True, False])
def test_what_would_return_zeros_is_refused(monkeypatch: pytest.MonkeyPatch, before_0_31: bool) -> None:
    """Before vLLM 0.28 nothing but its own routers was asked for experts."""
    from vllm.model_executor.layers.fused_moe import routed_experts_capturer

    from laguna_serve.plugins.routed_experts.tap import refuse_silence, returns_experts

    asks, silent = (SimpleNamespace(enable_return_routed_experts=asked) for asked in (True, False))
    said = {"model_config": asks} if before_0_31 else {"aux_output_config": asks, "model_config": None}
    config = SimpleNamespace(**said)
    assert returns_experts(config)
    refuse_silence(config)
    monkeypatch.delattr(routed_experts_capturer, "RoutedExpertsCaptureSource")
    with pytest.raises(ValueError, match=r"--return-routed-experts: expected vLLM 0\.28 or later with a pruned model"):
        refuse_silence(config)
    setattr(config, "model_config" if before_0_31 else "aux_output_config", silent)
    refuse_silence(config)


def test_experts_of_a_pruned_model(make_checkpoint: Any) -> None:
    zeroed = load_teacher(make_checkpoint(25, "--zeroed"))
    check_all(zeroed, run(CHUNKS | {"model": str(make_checkpoint(25))}))
