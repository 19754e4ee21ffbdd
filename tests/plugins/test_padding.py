"""Which units of a feed-forward layer are padding: the rule, the cases at its edges, and what it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from laguna_serve.plugins.layers import PaddingError, read_widths
from laguna_serve.plugins.padding import Units, find_units, is_dense, round_width, scan_layers

STORED, HIDDEN = 48, 16
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def layer(kept: list[int], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A layer of random units, zero but for those kept."""
    generator = torch.Generator().manual_seed(len(kept))
    tensors = {
        "gate": torch.randn(STORED, HIDDEN, generator=generator),
        "up": torch.randn(STORED, HIDDEN, generator=generator),
        "down": torch.randn(HIDDEN, STORED, generator=generator),
    }
    gone = torch.ones(STORED, dtype=torch.bool)
    gone[kept] = False
    tensors["gate"][gone] = 0
    tensors["up"][gone] = 0
    tensors["down"][:, gone] = 0
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "kept",
    [
        list(range(STORED)),
        list(range(37)),
        list(range(5, STORED)),
        [*range(7), *range(20, 31), STORED - 1],
        list(range(0, STORED, 2)),
        [0],
        [STORED - 1],
    ],
    ids=["none", "tail", "head", "holes", "every other", "first alone", "last alone"],
)
def test_units_that_are_not_zero_are_found(kept: list[int], dtype: torch.dtype) -> None:
    units = find_units(**layer(kept, dtype))
    assert units.index().tolist() == kept
    assert units.stored == STORED
    assert units.broken is None
    gone = sorted(set(range(STORED)) - set(kept))
    assert (units.padding.index().tolist() if gone else []) == gone


def test_cutting_and_padding_are_inverse() -> None:
    tensors = layer([*range(7), *range(20, 31), 40])
    units = find_units(**tensors)
    for name, dim in (("gate", 0), ("up", 0), ("down", 1)):
        cut = units.trim(tensors[name], dim)
        assert cut.shape[dim] == units.width == 19
        assert torch.equal(units.pad(cut, dim), tensors[name])


def test_layer_of_zeros_keeps_one_unit() -> None:
    """A matrix of no rows is no matrix."""
    units = find_units(**layer([]))
    assert units.index().tolist() == [0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_zero_is_zero(dtype: torch.dtype) -> None:
    """What is zeroed by multiplying with a mask keeps its signs."""
    tensors = layer(list(range(30)), dtype)
    tensors["gate"][30:] = -0.0
    tensors["down"][:, 33:] = -0.0
    assert find_units(**tensors).width == 30


@pytest.mark.parametrize("value", [1e-30, -1e-6, float("nan"), float("inf")])
@pytest.mark.parametrize(("part", "place"), [("gate", (35, 3)), ("up", (47, 15)), ("down", (5, 30)), ("down", (0, 41))])
def test_padding_that_is_not_exactly_zero_keeps_the_layer_whole(
    part: str, place: tuple[int, int], value: float
) -> None:
    tensors = layer(list(range(30)))
    tensors[part][place] = value
    units = find_units(**tensors)
    assert units.is_whole
    assert units.broken == (place[1] if part == "down" else place[0])


def test_smallest_number_counts() -> None:
    tensors = layer(list(range(30)), torch.bfloat16)
    tensors["up"].view(torch.int16)[40, 0] = 1  # the least positive bf16
    assert find_units(**tensors).broken == 40


def test_live_unit_with_a_single_zero_is_not_padding() -> None:
    """A zero in the one row that is read first proves nothing."""
    tensors = layer(list(range(STORED)))
    tensors["down"][0, 11] = 0
    units = find_units(**tensors)
    assert units.is_whole
    assert units.broken is None


def test_unpadded_layer_is_barely_read() -> None:
    """Of gate, up and the other rows of down nothing: they are not even of a kind that can be read."""
    tensors = layer(list(range(STORED)))
    tensors["gate"] = torch.empty(STORED, HIDDEN, device="meta")
    tensors["up"] = torch.empty(STORED, HIDDEN, device="meta")
    assert find_units(**tensors).is_whole


def write_layers(folder: Path, layers: list[dict[str, torch.Tensor]]) -> list[Path]:
    """One file per kind of matrix, so that a layer's are spread over three."""
    paths = []
    for name in ("gate", "up", "down"):
        path = folder / f"{name}.safetensors"
        save_file({f"model.layers.{i}.mlp.{name}_proj.weight": t[name] for i, t in enumerate(layers)}, path)
        paths.append(path)
    return paths


def test_layers_are_found_across_files(tmp_path: Path) -> None:
    paths = write_layers(tmp_path, [layer(list(range(40))), layer(list(range(STORED))), layer([1, 2])])
    found = scan_layers(paths, layers=4)
    assert {number: units.width for number, units in found.items()} == {0: 40, 1: STORED, 2: 2}


def test_missing_matrix_is_named(tmp_path: Path) -> None:
    paths = write_layers(tmp_path, [layer([0])])
    message = r"model\.layers\.0\.mlp\.up_proj\.weight: expected it beside the other two, got none"
    with pytest.raises(PaddingError, match=message):
        scan_layers([paths[0], paths[2]], layers=1)


def test_matrices_that_do_not_fit_each_other_are_named(tmp_path: Path) -> None:
    tensors = layer([0]) | {"up": torch.zeros(STORED - 1, HIDDEN)}
    with pytest.raises(PaddingError, match=r"layers\.0\.mlp: expected gate and up \[N, H\] and down \[H, N\].*47, 16"):
        scan_layers(write_layers(tmp_path, [tensors]), layers=1)


def test_integers_are_refused(tmp_path: Path) -> None:
    tensors = {name: tensor.to(torch.int8) for name, tensor in layer([0]).items()}
    with pytest.raises(PaddingError, match=r"in bf16, fp16, fp32 or FP8, got .*int8"):
        scan_layers(write_layers(tmp_path, [tensors]), layers=1)


@pytest.mark.parametrize(
    ("width", "most", "rounded"),
    [
        (4608, 8192, 4608),
        (4607, 8192, 4608),
        (613, 672, 624),  # 640 would add 4%
        (640, 672, 640),
        (1000, 1000, 1000),
        (1001, 1002, 1001),  # no tile's multiple fits below the stored width
        (13, 48, 13),
        (6000, 8192, 6016),
        (8190, 8192, 8192),
    ],
)
def test_width_is_rounded_up_to_what_a_gpu_likes(width: int, most: int, rounded: int) -> None:
    assert round_width(width, most) == rounded


def test_rounding_never_costs_more_than_two_percent() -> None:
    for width in range(1, 9000, 7):
        assert width <= round_width(width, 9000) <= width * 1.02


def config(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "laguna",
        "num_hidden_layers": 2,
        "intermediate_size": STORED,
        "mlp_layer_types": ["dense", "dense"],
    } | changes


def test_widths_of_a_config() -> None:
    assert read_widths(config(), "x") is None
    assert read_widths(config(intermediate_size_per_layer=[48, 7]), "x") == [48, 7]


@pytest.mark.parametrize("widths", [[48], [48, 0], [49, 1], [48, 7.0], "48", [48, True], {}, []])
def test_widths_that_cannot_be_are_refused(widths: Any) -> None:
    message = "x: expected intermediate_size_per_layer to be 2 integers from 1 to 48, got "
    with pytest.raises(PaddingError, match=message):
        read_widths(config(intermediate_size_per_layer=widths), "x")


@pytest.mark.parametrize(
    ("changes", "dense"),
    [
        ({}, True),
        ({"mlp_layer_types": ["dense", "sparse"]}, False),
        ({"mlp_layer_types": ["dense", "sparse"], "num_experts": 0}, True),
        ({"mlp_layer_types": None}, False),
        ({"model_type": "llama"}, False),
        ({"mlp_layer_types": None, "num_experts": 0}, True),
        ({"mlp_layer_types": None, "mlp_only_layers": [0, 1]}, True),
        ({"mlp_layer_types": None, "mlp_only_layers": [0]}, False),
        ({"mlp_layer_types": None, "mlp_only_layers": [], "decoder_sparse_step": 1}, False),
        ({"mlp_layer_types": None, "decoder_sparse_step": 0}, True),
        ({"mlp_layer_types": ["dense", "sparse"], "mlp_only_layers": [0, 1], "decoder_sparse_step": 1}, True),
    ],
)
def test_dense_models_are_told_from_others(changes: dict[str, Any], dense: bool) -> None:
    assert is_dense(config(**changes)) == dense


def test_whole_layer_has_no_padding() -> None:
    assert Units(4, ((0, 4),)).padding.runs == ()
    assert Units(4, ((1, 2),)).padding.runs == ((0, 1), (2, 4))
