"""Which tensors a model lacks, on modules that are parameters with names alone; vLLM's loading is not needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from laguna_serve.plugins.formats.completeness import IncompleteError, list_missing, list_unscaled, refuse_incomplete

ATTENTION = "model.layers.0.self_attn"
FP8 = torch.float8_e4m3fn


def make_model(*names: str, size: int = 1, **attributes: Any) -> Any:
    """A model with parameters of these names; every module that has one has the attributes."""
    root = nn.Module()
    for name in names:
        module = root
        *parents, last = name.split(".")
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        module.register_parameter(last, nn.Parameter(torch.zeros(size)))
        vars(module).update(attributes)
    vars(root).update(config=SimpleNamespace(num_experts=1, name_or_path="folder"))
    return root


PLAIN = ("model.norm.weight", "lm_head.weight")
QKV = f"{ATTENTION}.qkv_proj.weight"
PARTS = [f"{ATTENTION}.{part}_proj.weight" for part in "qkv"]
W2, DOWN = "model.layers.0.mlp.experts.routed_experts.w2_weight", "layers.0.mlp.experts.0.down_proj.weight"
STORED = {part.removeprefix("model.") for part in PARTS}


@pytest.mark.parametrize(
    ("names", "stored", "loaded", "missing"),
    [
        (PLAIN, {"norm.weight", "lm_head.weight"}, {*PLAIN}, []),
        (PLAIN, {"norm.weight", "lm_head.weight"}, None, []),
        (PLAIN, {"norm.weight"}, None, ["lm_head.weight"]),
        (PLAIN, {"norm.weight"}, {"model.norm.weight"}, ["lm_head.weight"]),
        (PLAIN, {"norm.weight", "lm_head.weight"}, {"lm_head.weight"}, ["model.norm.weight"]),  # read and not set
        ([QKV], STORED, {QKV}, []),
        ([QKV], {*sorted(STORED)[:1]}, {QKV}, [PARTS[0], PARTS[2]]),  # sorted: k
        ([QKV], {*sorted(STORED)[:1]}, set(), [PARTS[0], PARTS[2]]),
        ([QKV], {"layers.0.self_attn.qkv_proj.weight"}, {QKV}, []),  # merged on the disk
        ([QKV], {"layers.0.self_attn.qkv_proj.weight"}, None, []),
        ([QKV], {"something.else"}, {QKV}, []),  # merged by the model
        ([QKV], set(), None, PARTS),
        (["a.mlp.gate_up_proj.weight"], {"a.mlp.up_proj.weight"}, None, ["a.mlp.gate_proj.weight"]),
        (["a.mlp.gate.e_score_correction_bias"], set(), None, ["a.mlp.experts.e_score_correction_bias"]),
        (["a.mlp.gate.e_score_correction_bias"], {"a.mlp.experts.e_score_correction_bias"}, None, []),
        (["a.attn.k_scale", "a.input_global_scale", "a.mask_embedding", "a.weight_g_idx"], set(), None, []),
        (["a.q_norm_scale", "a.scale"], set(), None, ["a.q_norm_scale", "a.scale"]),
        ([W2], {DOWN}, {W2}, []),
        ([W2], {DOWN}, {W2.replace(".routed_experts", "")}, []),  # as vLLM before 0.32 names what it has set
        ([W2], set(), {W2.replace(".routed_experts", "")}, []),  # merged by the model
        ([W2], {DOWN}, set(), [W2]),  # read and not set
    ],
)
def test_missing_tensors_by_name(
    names: list[str], stored: set[str], loaded: set[str] | None, missing: list[str]
) -> None:
    assert list_missing(make_model(*names), stored, loaded) == missing


def test_parameter_without_values_need_not_come() -> None:
    assert list_missing(make_model("a.weight", size=0), set(), None) == []


def test_quantised_matrix_may_have_any_of_its_tensors() -> None:
    method = type("SomeLinearMethod", (), {})()
    model = make_model("a.weight_packed", "a.weight_scale", "b.weight", "c.of_its_own", quant_method=method)
    assert list_missing(model, {"a.qweight"}, set()) == ["b.weight"]
    assert list_missing(model, {"a.qweight", "b.weight"}, set()) == []
    plain = make_model("a.weight_scale", quant_method=type("UnquantizedLinearMethod", (), {})())
    assert list_missing(plain, set(), None) == ["a.weight_scale"], "no tensor of a method's own"


def test_what_is_quantised_while_it_loads_needs_the_weight_alone() -> None:
    method = type("UnquantizedOnline", (), {"uses_meta_device": True})()
    model = make_model("a.weight", "a.scale_of_its_own", quant_method=method)
    assert list_missing(model, set(), None) == ["a.weight"]
    assert list_missing(model, {"a.weight"}, None) == []


def test_module_says_itself_which_blocks_have_not_come() -> None:
    def list_blocks() -> list[str]:
        return ["w2_blocks.3", "w2_blocks.4"]

    model = make_model("a.experts.w13_blocks", "a.experts.w2_blocks", "a.experts.start", missing_tensors=list_blocks)
    named = ["a.experts.w2_blocks.3", "a.experts.w2_blocks.4", "a.experts.start"]
    assert list_missing(model, set(), set()) == named
    model = make_model("a.experts.w2_blocks", missing_tensors=list_blocks)
    assert list_missing(model, {"a.experts.w2_blocks"}, {"a.experts.w2_blocks"}) == []


@pytest.mark.parametrize(
    ("stored", "unscaled"),
    [
        ({"a.weight": FP8}, ["a.weight_scale"]),
        ({"a.weight": FP8, "a.weight_scale": torch.float32}, []),
        ({"a.weight": FP8, "a.weight_scale_inv": torch.float32}, []),
        ({"a.weight": FP8, "b.weight_scale": torch.float32}, ["a.weight_scale"]),
        ({"scale.a.weight": FP8}, ["scale.a.weight_scale"]),
        ({"a.weight": torch.bfloat16, "a.k_cache": FP8}, []),
    ],
)
def test_matrices_in_fp8_need_a_scale(stored: dict[str, torch.dtype], unscaled: list[str]) -> None:
    assert list_unscaled(stored) == unscaled


def load(
    model: Any,
    *names: str,
    whole: bool = True,
    says: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    rename: Any = str,
) -> Any:
    """Load tensors of these names, of a whole checkpoint or not, into a model that says which it has set, or not."""

    def get_weights() -> Any:
        yield from ((name, torch.zeros(1, dtype=dtype)) for name in names)

    def take(_model: Any, weights: Any) -> set[str] | None:
        taken = {name for name, _ in weights}
        return taken if says else None

    get_weights.__qualname__ = "DefaultModelLoader.get_all_weights" if whole else "get_weights"
    checked: Any = refuse_incomplete(take, rename=rename)
    return checked(model, get_weights())


NAMES = tuple(f"layers.{n}.weight" for n in range(5))
REMEDY = "; fetch the checkpoint again, all of it"


@pytest.mark.parametrize(
    ("stored", "named"),
    [
        (NAMES[1:], f"{NAMES[0]}{REMEDY}"),
        (NAMES[3:], f"{', '.join(NAMES[:3])}{REMEDY}"),
        (NAMES[4:], f"{', '.join(NAMES[:3])} and 1 more{REMEDY}"),
    ],
)
def test_refusal_names_three_at_most(stored: tuple[str, ...], named: str) -> None:
    with pytest.raises(IncompleteError) as caught:
        load(make_model(*NAMES), *stored)
    assert str(caught.value) == f"folder: expected a tensor for every parameter, got none for {named}"


def test_refusal_names_the_drafters_folder_and_says_what_a_router_needs() -> None:
    bias = "a.mlp.experts.e_score_correction_bias"
    model = make_model(bias)
    model.draft_model_config = SimpleNamespace(model="drafter")
    with pytest.raises(IncompleteError) as caught:
        load(model, "b.weight")
    assert str(caught.value) == (
        f"drafter: expected a tensor for every parameter, got none for {bias}"
        f"{REMEDY}, or store zeros for a router that was trained without"
    )


def test_refusal_names_the_class_of_a_model_without_a_folder() -> None:
    model = make_model("a.weight")
    model.config.name_or_path = ""
    with pytest.raises(
        IncompleteError, match=r"^Module: expected a tensor for every parameter, got none for a\.weight"
    ):
        load(model)


def test_shared_parameters_come_from_elsewhere() -> None:
    model = make_model(*NAMES[:2])
    model.shared_parameters = (NAMES[1],)
    assert load(model, NAMES[0]) == {NAMES[0]}


def test_checkpoint_may_have_other_names_for_its_tensors() -> None:
    """A prefix is none of them: drafters' checkpoints leave it out."""
    names = [f"a.{part}" for part in sorted(STORED)]
    assert load(make_model(QKV), *names, says=False, rename=lambda name: name.replace("a.", "model.", 1)) is None
    with pytest.raises(IncompleteError, match=f"got none for {', '.join(PARTS)};"):
        load(make_model(QKV), *names, says=False)


def test_whole_checkpoint_without_scales_is_refused() -> None:
    with pytest.raises(IncompleteError, match=r"got none for layers\.0\.weight_scale"):
        load(make_model(NAMES[0]), NAMES[0], dtype=FP8)


def test_parts_are_not_held_against_a_model_and_a_whole_one_is_once() -> None:
    model = make_model(*NAMES)
    assert load(model, NAMES[0], whole=False) == {NAMES[0]}
    with pytest.raises(IncompleteError):
        load(model, NAMES[0])
    load(model, *NAMES)
    assert load(model, NAMES[0]) == {NAMES[0]}
