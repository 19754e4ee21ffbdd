"""Masks of expert pruning: what is read, refused and ranked, on arrays that are written out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from laguna_serve.plugins.pruning import (
    ExpertShape,
    Pruning,
    PruningError,
    check_pruning,
    draw_random_mask,
    load_array,
    narrow_scores,
    rank_groups,
    read_pruning,
    read_shape,
)

TOY = Path(__file__).resolve().parents[1] / "toy"
# Two sparse layers, 1 and 3, of two experts with six atoms in three groups.
SHAPE = ExpertShape(layers=(1, 3), num_experts=2, intermediate_size=6, hidden_size=4)
KEEP = np.array([[[True, False, True], [False, True, False]], [[True, True, True], [False, False, True]]])
INDICES = np.tile(np.array([[5, 0], [1, 4], [3, 2]]), (2, 2, 1, 1))


def read_config(**changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((TOY / "teacher" / "config.json").read_text())
    return config | changes


def test_shape_is_that_of_the_config() -> None:
    assert read_shape(read_config(), "toy") == ExpertShape((1, 2, 3, 4, 5), 16, 128, 160)
    sparse = {"mlp_layer_types": ["sparse", "dense"] * 3}
    assert read_shape(read_config(**sparse), "toy").layers == (0, 2, 4)
    plain = {"model_type": "laguna"}
    assert read_shape(plain, "toy") == ExpertShape(tuple(range(1, 40)), 256, 512, 2048), "transformers' defaults"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "toy: expected model_type 'laguna', got 'llama'; pass the base Laguna checkpoint"),
        ({"model_type": None, "architectures": ["A"]}, "toy: expected model_type 'laguna', got ['A']; pass the base"),
        ({"model_type": None, "architectures": None}, "toy: expected model_type 'laguna', got 'nothing'; pass"),
        ({"hidden_size": 0}, "toy: expected hidden_size to be a positive integer, got 0; fetch it again"),
        ({"num_experts": True}, "toy: expected num_experts to be a positive integer, got True; fetch it again"),
        ({"moe_intermediate_size": "128"}, "toy: expected moe_intermediate_size to be a positive integer, got '128'"),
        ({"num_hidden_layers": 7}, "toy: expected mlp_layer_types to be 7 of 'dense' and 'sparse', got 6 of"),
        ({"mlp_layer_types": ["dense"] * 6}, "toy: expected sparse layers, got a model without any; there is nothing"),
    ],
)
def test_config_of_another_model_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PruningError) as caught:
        read_shape(read_config(**changes), "toy")
    assert str(caught.value).startswith(message)


def test_kept_blocks_are_counted_and_found() -> None:
    pruning = check_pruning(KEEP, INDICES, SHAPE)
    assert (pruning.block_size, pruning.blocks_per_expert) == (2, 3)
    assert (pruning.kept_blocks, pruning.pruned_blocks) == ([3, 4], 5)
    assert [pruning.block_start(layer).tolist() for layer in (0, 1)] == [[0, 2, 3], [0, 3, 4]]
    assert pruning.block_start(0).dtype == np.int32
    assert pruning.atoms(0, 0).tolist() == [[5, 0], [3, 2]]
    assert pruning.atoms(1, 1).tolist() == [[3, 2]]


def without_expert() -> np.ndarray[Any, Any]:
    keep = KEEP.copy()
    keep[1, 0] = False
    return keep


def with_an_atom_twice() -> np.ndarray[Any, Any]:
    indices = INDICES.copy()
    indices[1, 1, 0, 0] = 0
    return indices


@pytest.mark.parametrize(
    ("keep", "indices", "message"),
    [
        (KEEP, INDICES.astype(np.int32), "group indices: expected dtype int64, got int32; pass the published array"),
        (KEEP, INDICES.reshape(2, 2, 6), "group indices: expected shape [2, 2, G, B] with G·B = 6, got [2, 2, 6]; is"),
        (KEEP, INDICES[:1], "group indices: expected shape [2, 2, G, B] with G·B = 6, got [1, 2, 3, 2]; is it for"),
        (KEEP, INDICES[:, :, :2], "group indices: expected shape [2, 2, G, B] with G·B = 6, got [2, 2, 2, 2]; is it"),
        (KEEP.astype(np.int8), INDICES, "keep mask: expected dtype bool, got int8; save it with .astype(bool)"),
        (KEEP[:, :, :2], INDICES, "keep mask: expected shape [2, 2, 3], that of the indices' groups, got [2, 2, 2]"),
        (
            without_expert(),
            INDICES,
            "keep mask: expected at least one kept group in every expert, got none in layer 3, expert 0 (1 such",
        ),
        (
            KEEP,
            with_an_atom_twice(),
            "group indices: expected a permutation of 0…5 for every expert, got something else in layer 3, expert 1 (1",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    keep: np.ndarray[Any, Any], indices: np.ndarray[Any, Any], message: str
) -> None:
    with pytest.raises(PruningError) as caught:
        check_pruning(keep, indices, SHAPE)
    assert str(caught.value).startswith(message)


def test_files_are_named_where_they_do_not_fit(tmp_path: Path) -> None:
    mask, indices = tmp_path / "mask.npy", tmp_path / "indices.npy"
    np.save(mask, KEEP)
    np.save(indices, INDICES)
    found = read_pruning(mask, indices, SHAPE)
    assert isinstance(found, Pruning)
    assert np.array_equal(found.keep, KEEP)
    np.save(tmp_path / "half.npy", KEEP[:1])
    with pytest.raises(PruningError, match=r"half\.npy: expected shape \[2, 2, 3\]"):
        read_pruning(tmp_path / "half.npy", indices, SHAPE)
    np.save(tmp_path / "from_1.npy", INDICES + 1)
    with pytest.raises(PruningError, match=r"from_1\.npy: expected a permutation of 0…5"):
        read_pruning(mask, tmp_path / "from_1.npy", SHAPE)


@pytest.mark.parametrize("mapped", [True, False])
def test_what_is_no_array_is_refused(tmp_path: Path, mapped: bool) -> None:
    path = tmp_path / "a.npy"
    with pytest.raises(PruningError, match=r"a\.npy: expected a NumPy file, got none; check the path"):
        load_array(path, mapped=mapped)
    for content in (b"", b"text", b"\x93NUMPY\x01\x00\x10\x00{'a'"):
        path.write_bytes(content)
        with pytest.raises(PruningError, match=r"a\.npy: expected a NumPy file \(\.npy\), got one that cannot be read"):
            load_array(path, mapped=mapped)
    np.savez(tmp_path / "a.npz", a=KEEP)
    with pytest.raises(PruningError, match=r"a\.npz: expected one array \(\.npy\), got an archive"):
        load_array(tmp_path / "a.npz", mapped=mapped)
    np.save(path, KEEP)
    assert isinstance(load_array(path, mapped=mapped), np.memmap) == mapped


SCORES = np.array([[[4, 1, 2, 3], [8, 1, 6, 7]]], dtype=np.float32)


@pytest.mark.parametrize(
    ("ratio", "keep"),
    [
        (0.0, ["1111", "1111"]),
        (0.125, ["1011", "1111"]),  # of two equal ones the earlier goes
        (0.25, ["1011", "1011"]),
        (0.5, ["1000", "1011"]),
        (0.74, ["1000", "1001"]),  # 5.92 are 5
        (0.75, ["1000", "1000"]),  # the best of an expert stays, though it has less than all that go
    ],
)
def test_groups_go_from_the_lowest_but_the_best_of_each_expert(ratio: float, keep: list[str]) -> None:
    assert rank_groups(SCORES, ratio).tolist() == [[[letter == "1" for letter in row] for row in keep]]


def test_of_many_equal_groups_the_earlier_go() -> None:
    keep = rank_groups(np.zeros((1, 40, 20), dtype=np.float32), 0.5)[0]
    assert keep[:, 0].all(), "the best of each"
    assert np.array_equal(keep[:, 1:].ravel(), np.arange(40 * 19) >= 400)


def test_ratio_that_is_a_whole_number_of_groups_takes_them_all() -> None:
    assert 0.29 * 100 < 29
    scores = np.arange(100, dtype=np.float32).reshape(1, 10, 10)
    assert int((~rank_groups(scores, 0.29)).sum()) == 29


@pytest.mark.parametrize(
    ("scores", "ratio", "message"),
    [
        (SCORES, 1.0, "--ratio: expected at least 0 and less than 1, got 1.0; 0.1 prunes a tenth of the groups"),
        (SCORES, -0.1, "--ratio: expected at least 0 and less than 1, got -0.1"),
        (SCORES, 0.9, "--ratio: expected at most 0.75 with one group kept in every expert, got 0.9; lower it"),
        (SCORES[0], 0.5, r"scores: expected finite \[layers, experts, groups\], got shape \[2, 4\]"),
        (
            SCORES * np.float32(np.inf),
            0.5,
            r"scores: expected finite \[layers, experts, groups\], got shape \[1, 2, 4\]",
        ),
    ],
)
def test_what_cannot_be_ranked_is_refused(scores: np.ndarray[Any, Any], ratio: float, message: str) -> None:
    with pytest.raises(PruningError, match=message):
        rank_groups(scores, ratio, "--ratio")


def test_random_mask_is_the_seeds_and_prunes_so_many() -> None:
    masks = [draw_random_mask(SHAPE, 3, 0.5, seed) for seed in range(20)]
    assert all((mask.shape, int((~mask).sum()), bool(mask.any(-1).all())) == ((2, 2, 3), 6, True) for mask in masks)
    assert np.array_equal(masks[3], draw_random_mask(SHAPE, 3, 0.5, 3))
    assert len({mask.tobytes() for mask in masks}) > 10
    with pytest.raises(PruningError, match=r"ratio: expected at most 0\.6667 with one group kept in every expert"):
        draw_random_mask(SHAPE, 3, 0.8, 0)


def test_scores_are_narrowed_where_float32_has_them() -> None:
    narrowed = narrow_scores(np.array([1.0, 0.1]), Path("s.npy"))
    assert narrowed.dtype == np.float32
    assert narrowed.tolist() == [1.0, pytest.approx(0.1)]
    with pytest.raises(PruningError, match=r"s\.npy: expected finite float32 scores, got 3 that are not; score again"):
        narrow_scores(np.array([1.0, 1e39, np.nan, -np.inf]), Path("s.npy"))
