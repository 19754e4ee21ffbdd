"""Checkpoints that lack tensors, or name a class that reads them in part: refused when they are loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from probes import run_probe
from safetensors.torch import load_file, save_file
from torch import nn

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
TOY = Path(__file__).resolve().parent.parent / "toy"


def cut(source: Path, out: Path, *lacks: str, **config: object) -> Path:
    """Copy a checkpoint without tensors of which the name has a part, and with other fields in its config."""
    out.mkdir()
    for path in source.glob("*.json"):
        shutil.copy(path, out)
    tensors = load_file(source / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not any(part in name for part in lacks)}
    assert bool(lacks) == (len(kept) < len(tensors))
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    stated = json.loads((out / "config.json").read_text(encoding="utf-8")) | config
    (out / "config.json").write_text(json.dumps(stated), encoding="utf-8")
    return out


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Any) -> dict[str, str | None]:
    """What comes of loading each case, all in one process."""
    root = tmp_path_factory.mktemp("incomplete")
    pruned = make_checkpoint(40)
    teacher, plain = TOY / "teacher", {"architectures": ["LagunaForCausalLM"]}

    def model(name: str, source: Path, *lacks: str, **config: object) -> dict[str, Any]:
        return {"model": str(cut(source, root / name, *lacks, **config))}

    def drafter(name: str, source: Path, *lacks: str) -> dict[str, Any]:
        return {"model": str(teacher), "draft": str(cut(source, root / name, *lacks))}

    def unscaled(name: str, source: Path) -> dict[str, Any]:
        path = Path(model(name, source)["model"]) / "model.safetensors"
        tensors = load_file(path)
        up = "model.layers.1.mlp.up_proj.weight"
        save_file(tensors | {up: tensors[up].to(torch.float8_e4m3fn)}, path, metadata={"format": "pt"})
        return {"model": str(path.parent)}

    cases = {
        "unscaled": unscaled("unscaled", TOY / "dense"),
        "biases": model("biases", teacher, "e_score_correction_bias"),
        "gates": model("gates", teacher, ".g_proj."),
        "query": model("query", teacher, "layers.1.self_attn.q_proj"),
        "expert": model("expert", teacher, "layers.1.mlp.experts.3.up_proj"),
        "head": model("head", teacher, "lm_head", tie_word_embeddings=False),
        "dense": model("dense", TOY / "dense", "layers.1.mlp.down_proj"),
        "dense half": model("dense-half", TOY / "dense", "layers.1.mlp.up_proj"),
        "blocks": model("blocks", pruned, "layers.1.mlp.experts.w2_blocks"),
        "starts": model("starts", pruned, "layers.1.mlp.experts.block_start"),
        "pruned bias": model("pruned-bias", pruned, "layers.1.mlp.experts.e_score"),
        "drafter": drafter("drafter", TOY / "dflash", "layers.0.self_attn.o_proj"),
        "speculators": drafter("speculators", TOY / "dflash-speculators", "layers.0.self_attn.q_proj"),
        "vocabulary": drafter("vocabulary", TOY / "dflash-speculators", "d2t"),
        "plain class": model("plain", pruned, **plain),
        "plain class without a word": model("silent", pruned, **plain, expert_pruning=None),
        "whole": {"model": str(teacher), "draft": str(TOY / "dflash")},
        "whole speculators": {"model": str(teacher), "draft": str(TOY / "dflash-speculators")},
        "whole dense": {"model": str(TOY / "dense")},
        "whole pruned": {"model": str(pruned)},
        "by stock": {**model("stock", teacher, ".g_proj.", "e_score_correction_bias"), "stock": True},
        "random": {**model("random", teacher, ".g_proj."), "arguments": {"load_format": "dummy"}},
    }
    return dict(zip(cases, run_probe("loading_probe.py", json.dumps(list(cases.values()))), strict=True))


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("gates", ", ".join(f"model.layers.{n}.self_attn.g_proj.weight" for n in range(3)) + " and 3 more;"),
        ("query", "got none for model.layers.1.self_attn.q_proj.weight;"),
        ("expert", "got none for model.layers.1.mlp.experts.3.up_proj.weight;"),
        ("head", "got none for lm_head.weight;"),
        ("dense", "got none for model.layers.1.mlp.down_proj.weight;"),
        ("unscaled", "got none for layers.1.mlp.up_proj.weight_scale;"),
        ("dense half", "got none for model.layers.1.mlp.up_proj.weight;"),
        ("blocks", "got none for model.layers.1.mlp.experts.w2_blocks;"),
        ("starts", "got none for model.layers.1.mlp.experts.block_start;"),
        ("pruned bias", "got none for model.layers.1.mlp.experts.e_score_correction_bias;"),
        ("drafter", "drafter: expected a tensor for every parameter, got none for model.layers.0.self_attn.o_proj."),
        ("speculators", "speculators: expected a tensor for every parameter, got none for model.layers.0.self_attn.q_"),
        ("vocabulary", "got none for draft_id_to_target_id;"),
    ],
)
def test_missing_tensors_are_refused_by_name(outcomes: dict[str, str | None], case: str, named: str) -> None:
    refusal = outcomes[case]
    assert refusal is not None
    assert refusal.startswith("IncompleteError: ")
    assert named in refusal
    assert refusal.endswith("; fetch the checkpoint again, all of it") or case == "pruned bias"
    assert "\n" not in refusal


def test_a_router_without_biases_is_told_what_to_store(outcomes: dict[str, str | None]) -> None:
    """Every router has them, in transformers too, whatever the config says: no field of it leaves them out."""
    refusal = outcomes["biases"]
    assert refusal is not None
    assert "model.layers.1.mlp.experts.e_score_correction_bias" in refusal
    assert refusal.endswith(", or store zeros for a router that was trained without")


def test_stock_loads_what_lacks_tensors(outcomes: dict[str, str | None]) -> None:
    """When this fails, vLLM notices by itself: see what else it does, and retire `plugins/formats/completeness.py`."""
    assert outcomes["by stock"] is None


@pytest.mark.parametrize("case", ["plain class", "plain class without a word"])
def test_a_pruned_checkpoint_of_the_plain_class_is_refused(outcomes: dict[str, str | None], case: str) -> None:
    refusal = outcomes[case]
    assert refusal is not None
    assert "expected whole layers for LagunaForCausalLM, got" in refusal
    assert "its config.json must name" in refusal
    assert "LagunaSentinelForCausalLM" in refusal


@pytest.mark.parametrize("case", ["whole", "whole speculators", "whole dense", "whole pruned", "random"])
def test_whole_checkpoints_load_and_random_weights_are_not_asked(outcomes: dict[str, str | None], case: str) -> None:
    assert outcomes[case] is None


class Tiny(nn.Module):
    """A module tree by names alone, with an expert's two merged matrices."""

    def __init__(self, **expert_map: Any) -> None:
        super().__init__()
        self.config = type("Config", (), {"num_experts": 2, "name_or_path": "tiny"})()
        routed = nn.Module()
        for name in ("w13_weight", "w2_weight", "w13_input_scale"):
            routed.register_parameter(name, nn.Parameter(torch.zeros(1)))
        vars(routed).update(expert_map)
        self.layers = nn.Module()
        self.layers.experts = nn.Module()
        self.layers.experts.routed_experts = routed


EXPERT_1 = {f"layers.experts.1.{part}_proj.weight" for part in ("gate", "up", "down")}
LOADED = {"layers.experts.routed_experts.w13_weight", "layers.experts.routed_experts.w2_weight"}


@pytest.mark.parametrize(
    ("stored", "expert_map", "missing"),
    [
        (EXPERT_1, {}, ["gate", "up", "down"]),
        (EXPERT_1, {"expert_map": torch.tensor([-1, 0])}, []),  # this rank reads its own experts alone
        ({"layers.experts.w13_weight", "layers.experts.w2_weight"}, {}, []),  # merged on the disk
    ],
)
def test_experts_of_other_ranks_and_merged_ones(
    stored: set[str], expert_map: dict[str, Any], missing: list[str]
) -> None:
    from laguna_serve.plugins.formats.completeness import list_missing

    expected = [f"layers.experts.0.{part}_proj.weight" for part in missing]
    assert list_missing(Tiny(**expert_map), stored, LOADED) == expected


@pytest.mark.parametrize("named", ["weight", "weight_packed"])
def test_quantised_matrices_may_have_tensors_of_any_name(named: str) -> None:
    """What a quantisation method makes of a matrix is its own affair; that nothing of it came is not."""
    from laguna_serve.plugins.formats.completeness import list_missing

    method = type("SomeFormatMoEMethod", (), {})()
    stored = {name.replace("weight", named) for name in EXPERT_1} | {"layers.experts.0.down_proj.weight_scale"}
    expected = [f"layers.experts.0.{part}_proj.weight" for part in ("gate", "up")]
    model = Tiny(quant_method=method)
    model.layers.experts.routed_experts.register_parameter("w2_zero_of_its_own", nn.Parameter(torch.zeros(1)))
    assert list_missing(model, stored, LOADED) == expected
    assert list_missing(model, stored, set()) == expected


def test_parts_and_later_loads_are_not_held_against_the_model() -> None:
    """New weights may come in several calls; only what the loader reads of a checkpoint is whole."""
    from laguna_serve.plugins.formats.completeness import IncompleteError, refuse_incomplete

    def load(model: Any, weights: Any) -> set[str]:
        return {name for name, _ in weights}

    def whole(names: set[str]) -> Any:
        class DefaultModelLoader:
            def get_all_weights(self) -> Any:
                yield from ((name, torch.zeros(1)) for name in names)

        DefaultModelLoader.get_all_weights.__qualname__ = "DefaultModelLoader.get_all_weights"
        return DefaultModelLoader().get_all_weights()

    checked: Callable[..., set[str]] = refuse_incomplete(load)
    model = Tiny()
    assert checked(model, iter([])) == set()
    with pytest.raises(IncompleteError, match=r"tiny: expected a tensor for every parameter, got none for layers\."):
        checked(model, whole(set()))
    assert checked(model, whole(LOADED)) == LOADED
    assert checked(model, whole(set())) == set()
