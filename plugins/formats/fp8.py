"""FP8 weights (e4m3) and their scales: by 128×128 blocks of a matrix as the releases have them, or by atom.

A weight is its FP8 value times its scale. compressed-tensors shares a scale among 128 rows and 128 columns; pruning
takes atoms out of a matrix in another order than they lie in, so that an atom keeps its own copy of the scales of its
128 columns. FP8 payload and scales then are those of the base, to the bit.

An FP8 value has 4 significant bits and a scale in bf16 8: their product is exact in fp32, and rounded in bf16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from laguna_serve.plugins.formats.experts import SCALE_BLOCK

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3; what is larger becomes NaN


class NotFiniteError(ValueError):
    """Values that have no scale: NaN or infinity among them."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight matrix as it is stored: `values` [R, C], with `scale` [⌈R/128⌉, ⌈C/128⌉] where they are FP8."""

    values: torch.Tensor
    scale: torch.Tensor | None = None

    def t(self) -> Matrix:
        """Rows as columns, without a copy."""
        return Matrix(self.values.t(), None if self.scale is None else self.scale.t())

    def float(self) -> torch.Tensor:
        """Return what the matrix is, in fp32 and exactly."""
        return self.values.float() if self.scale is None else dequantise_blocks(self.values, self.scale)

    def require_scale(self) -> torch.Tensor:
        """Return the scale of a matrix that is known to be in FP8."""
        assert self.scale is not None
        return self.scale

    def gather(self, atoms: torch.Tensor) -> Matrix:
        """Take the rows of these atoms, each with its own scales.

        atoms [n, B] int64 → values [n, B, C] in the stored dtype and, of FP8, scale [n, B, ⌈C/128⌉].
        """
        return Matrix(self.values[atoms], None if self.scale is None else gather_scales(self.scale, atoms))


def gather_scales(scale: torch.Tensor, atoms: torch.Tensor) -> torch.Tensor:
    """Scale [⌈R/128⌉, ⌈C/128⌉] of a matrix with atoms as rows → each atom's own, [n, B, ⌈C/128⌉] of atoms [n, B]."""
    return scale[atoms // SCALE_BLOCK]


def count_blocks(size: int) -> int:
    """Blocks of scales along a dimension, the last of which may be narrower."""
    return -(-size // SCALE_BLOCK)


def dequantise_blocks(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Values [R, C] in FP8 times the scale [⌈R/128⌉, ⌈C/128⌉] of their block, in fp32."""
    rows, columns = values.shape
    wide = scale.float().repeat_interleave(SCALE_BLOCK, dim=0)[:rows]
    return values.float().mul_(wide.repeat_interleave(SCALE_BLOCK, dim=1)[:, :columns])


def dequantise_atoms(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Values […, H] in FP8 times the scales […, ⌈H/128⌉] of their 128 columns, in fp32."""
    return values.float().mul_(scales.float().repeat_interleave(SCALE_BLOCK, dim=-1)[..., : values.shape[-1]])


def quantise_atoms(values: torch.Tensor, scale_dtype: torch.dtype = torch.bfloat16) -> Matrix:
    """Rows […, H] in FP8, each with a scale for 128 columns: their largest value becomes e4m3's largest."""
    H = values.shape[-1]
    groups = _pad(values.float(), -1).unflatten(-1, (-1, SCALE_BLOCK))
    scales = _choose_scales(groups.abs().amax(-1), scale_dtype)
    return Matrix(_round(groups / scales.float()[..., None]).flatten(-2)[..., :H].contiguous(), scales)


def quantise_blocks(values: torch.Tensor, scale_dtype: torch.dtype = torch.bfloat16) -> Matrix:
    """Round a matrix [R, C] to FP8 with a scale for each 128×128 block, as compressed-tensors stores it."""
    R, C = values.shape
    blocks = _pad(_pad(values.float(), -1), -2).unflatten(-1, (-1, SCALE_BLOCK)).unflatten(0, (-1, SCALE_BLOCK))
    scale = _choose_scales(blocks.abs().amax((1, 3)), scale_dtype)
    rounded = _round(blocks / scale.float()[:, None, :, None])
    return Matrix(rounded.flatten(2).flatten(0, 1)[:R, :C].contiguous(), scale)


def _pad(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Zeros up to whole blocks along one of the last two dimensions."""
    missing = -values.shape[dim] % SCALE_BLOCK
    return F.pad(values, (0, missing) if dim == -1 else (0, 0, 0, missing))


def _choose_scales(largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """1 where everything is zero, and a number of the scale's dtype elsewhere, so that nothing is divided by zero.

    Raises NotFiniteError: one such value would take all that share its scale with it.
    """
    if not torch.isfinite(largest).all():
        raise NotFiniteError("expected finite values, got NaN or infinity; repair the weights")
    return torch.where(largest > 0, (largest / LARGEST).clamp_min(torch.finfo(dtype).tiny), 1.0).to(dtype)


def _round(scaled: torch.Tensor) -> torch.Tensor:
    """To the nearest FP8 value; a scale that was rounded down leaves a largest value a little above e4m3's."""
    return scaled.clamp_(-LARGEST, LARGEST).to(DTYPE)
