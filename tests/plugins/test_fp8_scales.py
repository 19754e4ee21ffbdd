"""FP8 matrices with their scales by hand: which values share one, and that nothing becomes NaN."""

from __future__ import annotations

import pytest
import torch

from laguna_serve.plugins.formats.fp8 import (
    DTYPE,
    LARGEST,
    Matrix,
    count_blocks,
    dequantise_atoms,
    dequantise_blocks,
    gather_scales,
    quantise_atoms,
    quantise_blocks,
)

# 130 rows and columns: blocks of 128 and of 2.
SIZE = 130
SCALE = torch.tensor([[1.0, 2.0], [4.0, 8.0]], dtype=torch.bfloat16)


def test_largest_is_that_of_the_format() -> None:
    assert torch.finfo(DTYPE).max == LARGEST


def test_blocks_cover_a_size() -> None:
    assert [count_blocks(size) for size in (1, 128, 129, 256, 257)] == [1, 1, 2, 2, 3]


def test_each_block_has_its_scale() -> None:
    values = torch.full((SIZE, SIZE), 3.0).to(DTYPE)
    found = dequantise_blocks(values, SCALE)
    assert (found.dtype, found.shape) == (torch.float32, (SIZE, SIZE))
    expected = torch.full((SIZE, SIZE), 3.0)
    expected[:128, 128:], expected[128:, :128], expected[128:, 128:] = 6.0, 12.0, 24.0
    assert torch.equal(found, expected)
    matrix = Matrix(values, SCALE)
    assert torch.equal(matrix.float(), expected)
    assert torch.equal(matrix.t().float(), expected.t())
    assert torch.equal(matrix.require_scale(), SCALE)
    assert torch.equal(Matrix(expected.bfloat16()).float(), expected), "a plain matrix is itself"


def test_atoms_have_the_scales_of_the_rows_that_they_were() -> None:
    values = torch.arange(SIZE, dtype=torch.float32)[:, None].expand(SIZE, SIZE).contiguous().to(DTYPE)
    atoms = torch.tensor([[129, 3], [127, 128]])
    gathered = Matrix(values, SCALE).gather(atoms)
    assert gathered.values.shape == (2, 2, SIZE)
    assert torch.equal(gathered.values[..., 0].float(), values[atoms, 0].float())
    assert torch.equal(gathered.require_scale(), gather_scales(SCALE, atoms))
    assert gathered.require_scale().tolist() == [[[4, 8], [1, 2]], [[1, 2], [4, 8]]]
    whole = dequantise_blocks(values, SCALE)
    assert torch.equal(dequantise_atoms(gathered.values, gathered.require_scale()), whole[atoms])
    assert Matrix(values).gather(atoms).scale is None


def test_largest_value_of_a_block_becomes_e4m3s_largest() -> None:
    values = torch.zeros(SIZE, SIZE)
    values[0, 0], values[5, 7] = -LARGEST, 16.0
    values[0, 129] = 4 * LARGEST
    found = quantise_blocks(values)
    assert (found.values.dtype, found.values.shape) == (DTYPE, (SIZE, SIZE))
    assert found.values.is_contiguous()
    assert found.require_scale().dtype == torch.bfloat16
    assert found.require_scale().tolist() == [[1.0, 4.0], [1.0, 1.0]], "1 where all is zero"
    assert torch.equal(found.float(), values)


def test_each_atom_has_a_scale_for_128_columns() -> None:
    values = torch.zeros(2, 3, SIZE)
    values[0, 0, 127], values[0, 0, 128], values[1, 2, 5] = 2 * LARGEST, 8 * LARGEST, -LARGEST / 2
    found = quantise_atoms(values, torch.float32)
    scales = torch.ones(2, 3, 2)
    scales[0, 0, 0], scales[0, 0, 1], scales[1, 2, 0] = 2.0, 8.0, 0.5
    assert torch.equal(found.require_scale(), scales)
    assert torch.equal(dequantise_atoms(found.values, found.require_scale()), values)
    assert found.values.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1e-42, 1e-6, 1.0, 1e4])
def test_no_value_becomes_nan(dtype: torch.dtype, size: float) -> None:
    """A scale of zero would divide by it, and what is larger than e4m3's largest is NaN."""
    values = size * torch.linspace(-1.0, 1.0, 4 * SIZE).reshape(4, SIZE)
    for found in (quantise_atoms(values, dtype), quantise_blocks(values, dtype)):
        assert not found.values.float().isnan().any()
        assert (found.require_scale() > 0).all()
        assert found.values.float().abs().max() <= LARGEST
