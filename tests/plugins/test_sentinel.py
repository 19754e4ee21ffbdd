"""The pruned teacher in vLLM: the same tokens as the zeroed original, nothing of a pruned block in memory.

Weights loaded again in place, speculation, and what is refused, too.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from laguna_serve.serving.engine import Engine, EngineConfig, EngineError

pytestmark = pytest.mark.vllm
TOY = Path(__file__).resolve().parent.parent / "toy"
INDICES = TOY / "masks" / "group_indices_importance_sorted.npy"
PROMPTS = 64
BLOCK, HIDDEN, EXPERTS, BLOCKS = 16, 160, 16, 8


def mask(percent: int) -> Path:
    return TOY / "masks" / f"group_keep_mask_{percent}pct.npy"


def masks_override(percent: int) -> dict[str, Any]:
    files = {"keep_mask": str(mask(percent)), "group_indices": str(INDICES)}
    return {"architectures": ["LagunaSentinelForCausalLM"], "expert_pruning": files}


@pytest.mark.parametrize("percent", [10, 25, 40])
def test_same_greedy_tokens_as_the_zeroed_original(percent: int, make_checkpoint: Any, run_model: Any) -> None:
    zeroed = run_model(make_checkpoint(percent, "--zeroed"))
    compact = run_model(make_checkpoint(percent))
    assert compact["class"] == "LagunaSentinelForCausalLM"
    assert zeroed["class"] == "LagunaForCausalLM"
    assert len(compact["tokens"]) == PROMPTS
    assert all(len(tokens) == 64 for tokens in compact["tokens"])
    assert compact["tokens"] == zeroed["tokens"]


@pytest.mark.parametrize("percent", [10, 25, 40])
def test_memory_falls_by_exactly_the_pruned_blocks(percent: int, make_checkpoint: Any, run_model: Any) -> None:
    keep = np.load(mask(percent))
    assert (~keep).sum() == int(percent / 100 * keep.size)
    held = run_model(make_checkpoint(percent))["parameters"]
    blocks = [numel * size for name, (numel, size) in held.items() if name.endswith("_blocks")]
    assert len(blocks) == 2 * len(keep)
    assert sum(blocks) == (keep.size - (~keep).sum()) * 3 * BLOCK * HIDDEN * 4
    assert not [name for name in held if "experts" in name and not name.endswith(("_blocks", "score_correction_bias"))]


def test_masks_applied_while_loading(make_checkpoint: Any, run_model: Any) -> None:
    """A base checkpoint and the published files: the compact checkpoint's model, to the bit."""
    compact = run_model(make_checkpoint(25))
    masked = run_model(TOY / "teacher", hf_overrides=masks_override(25))
    assert masked["tokens"] == compact["tokens"]
    assert masked["parameters"] == compact["parameters"]


def test_chunked_prefill_and_prefix_caching(make_checkpoint: Any, run_model: Any) -> None:
    """Fewer rows in a batch change nothing that our kernel computes; of the rest, fp32 leaves no tie here."""
    whole = run_model(make_checkpoint(25))
    chunked = run_model(make_checkpoint(25), max_num_batched_tokens=80, enable_chunked_prefill=True)
    assert chunked["tokens"] == whole["tokens"]


def test_speculation_gives_the_same_tokens(make_checkpoint: Any, run_model: Any) -> None:
    """The drafter reads this model's auxiliary hidden states."""
    drafter = {"method": "dflash", "model": str(TOY / "dflash"), "num_speculative_tokens": 7}
    drafted = run_model(make_checkpoint(25), speculative_config=drafter)
    assert drafted["tokens"] == run_model(make_checkpoint(25))["tokens"]


def test_weights_load_again_in_place(make_checkpoint: Any, run_model: Any, tmp_path: Path) -> None:
    """Other weights give what they give in a fresh engine, and the first ones what they gave."""
    compact = make_checkpoint(25)
    other = tmp_path / "other"
    other.mkdir()
    for file in compact.iterdir():
        if file.suffix != ".safetensors":
            (other / file.name).write_bytes(file.read_bytes())
    weights = load_file(compact / "model.safetensors")
    for name in weights:
        if name.endswith(("w13_blocks", "e_score_correction_bias")):
            weights[name] = weights[name] * 1.25
    save_file(weights, other / "model.safetensors")
    report = run_model(compact, reload=[str(other), str(compact)])
    changed, restored = report["tokens_after_reload"]
    assert changed == run_model(other)["tokens"]
    assert changed != report["tokens"]
    assert restored == report["tokens"]


def experts(percent: int, *, masked: bool, rank: int = 0, ranks: int = 1) -> Any:
    """A sparse layer's experts by themselves, and the artefacts they were built from."""
    from laguna_serve.plugins.models.sentinel import LayerPlan, SentinelExperts
    from laguna_serve.plugins.pruning import read_pruning, read_shape
    from laguna_serve.plugins.shards import Shard

    config = json.loads((TOY / "teacher" / "config.json").read_text(encoding="utf-8"))
    pruning = read_pruning(mask(percent), INDICES, read_shape(config, "toy"))
    plan = LayerPlan(pruning.kept_blocks[2], BLOCK, BLOCKS, pruning if masked else None, 2)
    return SentinelExperts(EXPERTS, HIDDEN, plan, "layer", Shard(rank, ranks)), pruning


def layer_tensors() -> list[tuple[str, torch.Tensor]]:
    """Sparse layer 2's (model layer 3's) tensors under `mlp.experts.`."""
    prefix = "model.layers.3.mlp.experts."
    with safe_open(TOY / "teacher" / "model.safetensors", "pt") as file:
        return [(name.removeprefix(prefix), file.get_tensor(name)) for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118


def test_experts_are_cut_as_the_files_say() -> None:
    module, pruning = experts(25, masked=True)
    tensors = layer_tensors()
    names = [name for half in (tensors[:20], tensors[20:]) for name in module.load_weights(half)]
    assert sorted(names) == ["e_score_correction_bias", "w13_blocks", "w2_blocks"]
    base = dict(tensors)
    block = 0
    for expert in range(EXPERTS):
        for group in range(BLOCKS):
            if not pruning.keep[2, expert, group]:
                continue
            atoms = pruning.indices[2, expert, group].tolist()
            for part, name in enumerate(("gate_proj", "up_proj")):
                assert torch.equal(module.w13_blocks[block, part].bfloat16(), base[f"{expert}.{name}.weight"][atoms])
            assert torch.equal(module.w2_blocks[block].bfloat16(), base[f"{expert}.down_proj.weight"].t()[atoms])
            block += 1
        assert module.block_start[expert + 1] == block
    assert block == len(module.w2_blocks)


@pytest.mark.parametrize("masked", [True, False], ids=["cut while loading", "compact"])
def test_ranks_share_the_blocks(masked: bool) -> None:
    """Three ranks' blocks, taken in turn, are the layer's; their partial outputs add up to its output."""
    whole, _ = experts(25, masked=True)
    list(whole.load_weights(layer_tensors()))
    bias = ("e_score_correction_bias", whole.e_score_correction_bias)
    compact = [(name, getattr(whole, name)) for name in ("w13_blocks", "w2_blocks", "block_start")]
    x, weights = torch.randn(5, HIDDEN), torch.rand(5, 4)
    ids = torch.stack([torch.randperm(EXPERTS)[:4] for _ in range(5)]).int()
    total = torch.zeros(5, HIDDEN)
    for rank in range(3):
        part, _ = experts(25, masked=masked, rank=rank, ranks=3)
        assert "w13_blocks" in set(part.load_weights(layer_tensors() if masked else [*compact, bias]))
        assert torch.equal(part.w13_blocks, whole.w13_blocks[rank::3])
        assert torch.equal(part.w2_blocks, whole.w2_blocks[rank::3])
        assert part.block_start[-1] == len(part.w2_blocks)
        total += part(x, weights, ids)
    torch.testing.assert_close(total, whole(x, weights, ids), rtol=1e-4, atol=1e-5)


def test_incomplete_expert_is_not_reported_as_loaded() -> None:
    """vLLM then refuses to start and names the parameters."""
    module, _ = experts(25, masked=True)
    assert "w13_blocks" not in set(module.load_weights(layer_tensors()[1:]))


@pytest.mark.parametrize(("name", "sizes"), [("0.up_proj.weight", (256, HIDDEN)), ("3.down_proj.weight", (HIDDEN, 64))])
def test_expert_of_another_size_is_not_cut(name: str, sizes: tuple[int, int]) -> None:
    """Its first atoms would pass for all."""
    module, _ = experts(25, masked=True)
    expected = [128, HIDDEN] if "up" in name else [HIDDEN, 128]
    message = re.escape(f"layer: expected {name} {expected}, got {list(sizes)}")
    with pytest.raises(ValueError, match=message):
        list(module.load_weights([(name, torch.zeros(sizes))]))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("w13_blocks", torch.zeros(3, 2, BLOCK, HIDDEN), r"layer: expected w13_blocks \[\d+, 2, 16, 160\], got \[3, "),
        ("block_start", torch.arange(EXPERTS + 1), r"layer: expected block_start of 17 entries from 0 to \d+, got 17 "),
        ("block_start", torch.arange(EXPERTS), r"layer: expected block_start of 17 entries"),
        ("0.gate_proj.weight", torch.zeros(128, HIDDEN), r"layer: expected kept blocks, or a base checkpoint with"),
    ],
)
def test_tensor_that_does_not_fit_is_named(name: str, tensor: torch.Tensor, message: str) -> None:
    module, _ = experts(25, masked=False)
    with pytest.raises(ValueError, match=message):
        list(module.load_weights([(name, tensor)]))


def test_width_beyond_the_configured_blocks_is_refused() -> None:
    module, _ = experts(25, masked=False)
    start = torch.zeros(EXPERTS + 1, dtype=torch.int32)
    start[1:] = len(module.w2_blocks)
    with pytest.raises(ValueError, match="expected 0 to 8 blocks for every expert"):
        list(module.load_weights([("block_start", start)]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kept_blocks": [100] * 4},
            "expected expert_pruning.kept_blocks to be one number for each of 5 sparse layers",
        ),
        (
            {"kept_blocks": None},
            "expected expert_pruning.kept_blocks to be one number for each of 5 sparse layers, got No",
        ),
        ({"block_size": 32}, "expected expert_pruning.block_size × blocks_per_expert to be 128, got 32 × 8"),
        (
            {"blocks_per_expert": None},
            "expected expert_pruning.block_size × blocks_per_expert to be 128, got 16 × None",
        ),
        ({"block_size": 8, "blocks_per_expert": 16}, "config.json: expected blocks of a multiple of 16 atoms, got 8; "),
    ],
)
def test_config_that_describes_no_pruned_laguna_is_refused(changes: dict[str, Any], message: str) -> None:
    from transformers import AutoConfig

    from laguna_serve.plugins.models.sentinel import _plan_layers
    from laguna_serve.plugins.pruning import PruningError

    config = AutoConfig.from_pretrained(TOY / "teacher")
    config.expert_pruning = {"kept_blocks": [100] * 5, "block_size": BLOCK, "blocks_per_expert": BLOCKS} | changes
    with pytest.raises(PruningError, match=message):
        _plan_layers(config)


def test_sizes_are_those_that_the_op_takes() -> None:
    """What is refused before anything loads is what the op would refuse at the first token, and no more."""
    from laguna_serve.kernels.sentinel_moe import sentinel_moe
    from laguna_serve.plugins.formats.experts import find_unserved

    for B, H, k in ((16, 48, 16), (8, 48, 1), (24, 48, 1), (16, 40, 1), (16, 16, 17), (32, 16, 1)):
        ids, start = torch.zeros(2, k, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
        tensors = torch.zeros(2, H), torch.zeros(2, k), ids, torch.zeros(1, 2, B, H), torch.zeros(1, B, H), start
        try:
            sentinel_moe(*tensors)
            taken = True
        except ValueError:
            taken = False
        assert (find_unserved(B, H, k) is None) == taken


def test_weights_are_renormalised_as_the_bases_are(make_checkpoint: Any, run_model: Any) -> None:
    """Whatever an older config says: neither transformers' Laguna nor vLLM's reads that key."""
    compact, older = make_checkpoint(25), {"norm_topk_prob": False}
    assert run_model(compact, hf_overrides=older)["tokens"] == run_model(compact)["tokens"]


def test_two_ranks_give_the_same_greedy_tokens(make_checkpoint: Any, run_model: Any, tmp_path: Path) -> None:
    """Tensor parallel in fp32: sums in another order; behind a server, as the ranks are processes of their own."""
    compact = make_checkpoint(25)
    prompts = [json.loads(line)["prompt"] for line in (TOY / "prompts.jsonl").read_text().splitlines()[:4]]
    flags = ("--tensor-parallel-size", "2", "--max-model-len", "512")
    config = EngineConfig(str(compact), dtype="float32", enforce_eager=True, max_num_seqs=64, extra_args=flags)
    body = {"prompt": prompts, "max_tokens": 16, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    with Engine(config, log_path=tmp_path / "engine.log") as engine:
        body["model"] = engine.model_name
        answer = httpx.post(f"{engine.base_url}/v1/completions", json=body, timeout=300).raise_for_status().json()
    tokens = [choice["token_ids"] for choice in sorted(answer["choices"], key=lambda choice: choice["index"])]
    assert tokens == [whole[:16] for whole in run_model(compact)["tokens"][:4]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--enable-expert-parallel"], "expected experts on every rank, got expert parallelism"),
        (["--hf-overrides", '{"architectures": ["LagunaSentinelForCausalLM"]}'], "expected expert_pruning, got None"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(flags: list[str], message: str, tmp_path: Path) -> None:
    overrides = ["--hf-overrides", json.dumps(masks_override(25))] if "--hf-overrides" not in flags else []
    config = EngineConfig(str(TOY / "teacher"), enforce_eager=True, extra_args=(*overrides, *flags))
    with pytest.raises(EngineError, match=message), Engine(config, log_path=tmp_path / "engine.log"):
        pass
