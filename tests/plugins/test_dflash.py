"""The drafter on a CPU: stock vLLM's grouped norm, ours, and the proposals against plain PyTorch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from probes import run_program
from sequential_toy import make_sequential

from laguna_serve.plugins.drafting.context import finish_keys, normalize_slices
from laguna_serve.plugins.processes.inspection import ask_here

pytestmark = pytest.mark.vllm
TESTS = Path(__file__).resolve().parent.parent
TOY = TESTS / "toy"
PUBLISHED = TESTS / "fixtures" / "releases" / "Laguna-XS-2.1-DFlash"
LAYERS, TOKENS, HEADS, DIM, EPS = 3, 5, 2, 32, 1e-6


def norm_per_layer(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The specification: each layer's rows [..., D] normalised with that layer's weights."""
    return torch.stack(
        [F.rms_norm(rows, (rows.shape[-1],), weight, EPS) for rows, weight in zip(x, weights, strict=True)]
    )


def keys_and_weights() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(LAYERS, TOKENS, HEADS, DIM), torch.rand(LAYERS, DIM) + 0.5


def test_stock_grouped_norm_ignores_the_layer() -> None:
    """When this fails, vLLM's CPU norm knows grouped weights: retire what dflash_cpu.py says of norms."""
    from vllm import _custom_ops as ops

    keys, weights = keys_and_weights()
    stock = torch.full_like(keys, torch.nan)
    ops.rms_norm(stock, keys, weights, EPS)
    right = norm_per_layer(keys, weights)
    torch.testing.assert_close(stock[0], right[0])
    assert not torch.allclose(stock[1:], right[1:], atol=1e-2)


def rotate(keys: torch.Tensor, angles: torch.Tensor, *, neox: bool) -> torch.Tensor:
    """Rotate the first dimensions of keys [L, T, heads, D] by angles [T, rotated], cosines first."""
    cosine, sine = angles[None, :, None].chunk(2, -1)
    rotated = angles.shape[1]
    head, rest = keys[..., :rotated], keys[..., rotated:]
    first, second = head.chunk(2, -1) if neox else (head[..., ::2], head[..., 1::2])
    turned = first * cosine - second * sine, second * cosine + first * sine
    both = torch.cat(turned, -1) if neox else torch.stack(turned, -1).flatten(-2)
    return torch.cat([both, rest], -1)


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_have_their_layers_norm_and_their_positions_rotation(dtype: torch.dtype, neox: bool) -> None:
    keys, weights = keys_and_weights()
    keys, angles = keys.to(dtype), torch.rand(TOKENS, DIM // 2).to(dtype)
    before = keys.clone()
    right = rotate(norm_per_layer(keys.float(), weights), angles.float(), neox=neox)
    ours = finish_keys(keys.transpose(0, 2).contiguous().transpose(0, 2), weights, EPS, angles, neox=neox)
    assert ours.dtype == dtype
    assert ours.is_contiguous()
    assert torch.equal(keys, before)
    torch.testing.assert_close(ours, right.to(dtype), rtol=1.6e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_slice_has_its_own_norm(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, weights = torch.randn(TOKENS, 3 * DIM).to(dtype), torch.rand(3, DIM) + 0.5
    before = rows.clone()
    right = F.rms_norm(rows.float().view(TOKENS, 3, DIM), (DIM,), eps=EPS) * weights
    ours = normalize_slices(rows, weights, EPS)
    assert ours.dtype == dtype
    assert torch.equal(rows, before)
    torch.testing.assert_close(
        ours, right.flatten(1).to(dtype), rtol=1.6e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
    )


def make_deep_speculators(folder: Path) -> Path:
    """An untrained drafter of two layers in the speculators format whose proposals vary.

    Its layers' norms differ, so that one taken for the other is seen.
    """
    from laguna_serve.scripts.checkpoints.drafters.speculators import SpeculatorsDrafter

    toy = SpeculatorsDrafter.load(TOY / "dflash-speculators")
    torch.manual_seed(0)
    shape = replace(toy.shape, num_hidden_layers=2, num_attention_heads=6, target_layer_ids=(0, 2, 4, 5))
    drafter = SpeculatorsDrafter(shape, toy.get_buffer("vocabulary")[::2])
    for name, parameter in drafter.named_parameters():
        parameter.data = torch.rand_like(parameter) + 0.5 if "norm" in name else 3 * parameter.data
    drafter.save(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((TOY / "dflash-speculators" / file).read_bytes())
    return folder


def make_published(folder: Path) -> Path:
    """An untrained drafter whose config.json has the keys of Laguna-XS-2.1-DFlash and no other, at the toy's sizes.

    Causal, sliding (over fewer tokens than the prompts have), fused queries, keys and values, `rope_theta` alone.
    """
    from laguna_serve.scripts.checkpoints.drafters.dflash import LagunaDrafter
    from laguna_serve.scripts.checkpoints.drafters.shape import DrafterShape

    config = json.loads((PUBLISHED / "config.json").read_text())
    toy = json.loads((TOY / "dflash" / "config.json").read_text())
    sizes = {key: toy[key] for key in config if isinstance(config[key], int) and key in toy}
    window = {"layer_types": config["layer_types"][: toy["num_hidden_layers"]], "sliding_window": 16}
    taps = {"eagle_aux_hidden_state_layer_ids": toy["eagle_aux_hidden_state_layer_ids"]}
    dflash = config["dflash_config"] | {
        key: toy["dflash_config"][key] for key in ("mask_token_id", "num_target_layers", "target_layer_ids")
    }
    config |= {**sizes, **window, **taps, "dflash_config": dflash}
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    drafter = LagunaDrafter(DrafterShape.from_config(config))
    for name, parameter in drafter.named_parameters():
        parameter.data = torch.rand_like(parameter) + 0.5 if "norm" in name else 3 * parameter.data
    drafter.save(folder)
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((TOY / "dflash" / file).read_bytes())
    return folder


MAKERS = {"deep": make_deep_speculators, "published": make_published, "head": make_sequential}


@pytest.fixture(
    scope="module",
    params=[
        *(("dflash", 7), ("dflash", 3), ("dflash-speculators", 7), ("deep", 5), ("published", 15)),
        *(("head", 7), ("head", 3)),
    ],
    ids=lambda case: f"{case[0]}-gamma{case[1]}",
)
def observed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM's drafter proposed at each step on a few prompts, in fp32 (see proposals_probe.py)."""
    name, gamma = request.param
    folder = MAKERS[name](tmp_path_factory.mktemp(name)) if name in MAKERS else TOY / name
    out = tmp_path_factory.mktemp("proposals") / "proposals.json"
    run_program("proposals_probe.py", str(TOY), str(folder), str(gamma), str(out))
    return {"drafter": folder, **json.loads(out.read_text())}


def test_proposals_equal_plain_pytorch(observed: dict[str, Any]) -> None:
    from transformers import LagunaForCausalLM

    from laguna_serve.scripts.checkpoints.drafters.dflash import LagunaDrafter, TapReader
    from laguna_serve.scripts.checkpoints.drafters.speculators import SpeculatorsDrafter

    teacher = LagunaForCausalLM.from_pretrained(TOY / "teacher", dtype=torch.float32).eval()
    folder = observed["drafter"]
    speculators = "speculators_model_type" in json.loads((folder / "config.json").read_text())
    drafter = SpeculatorsDrafter.load(folder) if speculators else LagunaDrafter.load(folder)
    taps = TapReader(teacher, drafter.shape.target_layer_ids)
    embedding, head = teacher.model.embed_tokens.weight, teacher.lm_head.weight
    steps, seen = 0, set()
    for request in observed["requests"]:
        tokens = [*request["prompt"], *request["output"]]
        with torch.no_grad():
            teacher.model(input_ids=torch.tensor([tokens]))
        hidden_states = taps.read()[0]
        anchor = len(request["prompt"])
        for proposed in request["proposals"]:
            if anchor >= len(tokens):  # drafted after the last token that was asked for
                break
            gamma = len(proposed)
            expected = drafter.propose(tokens[anchor], hidden_states[:anchor], gamma, embedding, head)
            assert proposed == expected, f"step {steps}: the drafter saw another context than the reference"
            seen.update(proposed)
            verified = tokens[anchor + 1 : anchor + 1 + gamma]
            accepted = next(
                (i for i, (a, b) in enumerate(zip(proposed, verified, strict=False)) if a != b), len(verified)
            )
            anchor += accepted + 1
            steps += 1
    assert steps > 40
    assert len(seen) > 20, "the same few tokens again and again prove little"


def read_draft_config(drafter: Path) -> Any:
    """The drafter's config as vLLM holds it once it has checked target and drafter."""
    from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig
    from vllm.model_executor.models import registry

    with pytest.MonkeyPatch.context() as patch:  # a new interpreter for each class takes six seconds
        patch.setattr(registry, "_run_in_subprocess", ask_here)
        target = ModelConfig(model=str(TOY / "teacher"), max_model_len=512)
        draft = SpeculativeConfig(
            method="dflash",
            model=str(drafter),
            num_speculative_tokens=7,
            target_model_config=target,
            target_parallel_config=ParallelConfig(),
        )
    return draft.draft_model_config.hf_config


def test_stock_drops_the_published_theta(tmp_path: Path) -> None:
    """When this fails, transformers or vLLM reads `rope_theta` alone: retire `plugins/models/dflash.py`."""
    config = read_draft_config(make_published(tmp_path / "published"))
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 10_000.0


def test_published_theta_is_kept(tmp_path: Path) -> None:
    from laguna_serve.plugins.models.dflash import complete_config

    config = read_draft_config(make_published(tmp_path / "published"))
    complete_config(config)
    rope = {"rope_type": "default", "rope_theta": 500_000.0, "partial_rotary_factor": 1.0}
    assert config.rope_parameters == {"full_attention": rope, "sliding_attention": rope}


def test_rope_said_in_full_stays() -> None:
    from laguna_serve.plugins.models.dflash import complete_config

    config = read_draft_config(TOY / "dflash")
    before = json.loads(json.dumps(config.rope_parameters))
    complete_config(config)
    assert config.rope_parameters == before
    assert before["sliding_attention"]["partial_rotary_factor"] == 0.5
