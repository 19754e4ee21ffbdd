"""What a drafter's context is made with, and the call that makes it."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from laguna_serve.kernels.isa import choose_path
from laguna_serve.kernels.linear import load_library as load_product
from laguna_serve.kernels.linear.build import FLAGS, PATH_FLAGS
from laguna_serve.kernels.linear.launch import require_tiles
from laguna_serve.kernels.toolchain import BuildError, keep_compiled

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("native") / "context.cpp"
OK, NO_MEMORY = 0, 1
LARGEST_HEAD = 1024
MATRICES = ("fc", "kv", "kv_bias", "angles")
NORMS = ("tap_norms", "hidden_norm", "context_norm", "key_norms")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What makes the context; S taps of the target of D values each, a drafter of L layers and hidden size H.

    Matrices, angles and biases are bfloat16, norms float32; all are contiguous.

    Attributes:
        fc: [H, S · D], of the taps side by side.
        kv: [L · 2 · kv_heads · head_dim, H], of each layer the keys' rows and then the values'.
        context_norm: [H], behind fc and, where there is one, `hidden_norm`.
        key_norms: [L, head_dim].
        angles: [positions, rotated], cosines and then sines; dimensions behind `rotated` stay as they are.
        kv_heads: of a layer.
        eps: of all norms.
        neox: whether a dimension is rotated with the one half of `rotated` further, or else with its neighbour.
        tap_norms: [S, D], or None for taps as they are.
        hidden_norm: [H], or None.
        kv_bias: [L · 2 · kv_heads · head_dim], or None.

    Raises:
        ValueError: a dtype, shape or stride is not as above.
    """

    fc: torch.Tensor
    kv: torch.Tensor
    context_norm: torch.Tensor
    key_norms: torch.Tensor
    angles: torch.Tensor
    kv_heads: int
    eps: float
    neox: bool
    tap_norms: torch.Tensor | None = None
    hidden_norm: torch.Tensor | None = None
    kv_bias: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for names, dtype in ((MATRICES, torch.bfloat16), (NORMS, torch.float32)):
            for name in names:
                tensor = getattr(self, name)
                if tensor is not None and (tensor.dtype != dtype or not tensor.is_contiguous()):
                    got = f"{tensor.dtype} with strides {tensor.stride()}"
                    raise ValueError(f"{name}: expected {dtype}, contiguous, got {got}")
        layers, size = self.key_norms.shape
        hidden, width = self.fc.shape
        both, taps = layers * 2 * self.kv_heads * size, 1 if self.tap_norms is None else len(self.tap_norms)
        shapes = {
            "kv": (both, hidden),
            "kv_bias": (both,),
            "tap_norms": (taps, width // taps),
            "hidden_norm": (hidden,),
            "context_norm": (hidden,),
        }
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"{name}: expected {list(shape)}, got {list(tensor.shape)}")
        if not self.angles.shape[1] <= size <= LARGEST_HEAD:
            raise ValueError(f"head_dim: expected {self.angles.shape[1]} to {LARGEST_HEAD}, got {size}")


class Context:
    """Makes keys and values; reads the tensors of its weights in every call, whose values may change in place."""

    def __init__(self, weights: Weights, library: Callable[..., int], product: Any) -> None:
        self._weights, self._library, self._threads = weights, library, torch.get_num_threads()
        layers, size = weights.key_norms.shape
        self._shape = (layers, weights.kv_heads, size)
        taps = 1 if weights.tap_norms is None else len(weights.tap_norms)
        tensors = {name: getattr(weights, name) for name in (*MATRICES, *NORMS)}
        self._native = _Drafter(
            taps=taps,
            tap_size=weights.fc.shape[1] // taps,
            hidden=weights.fc.shape[0],
            layers=layers,
            heads=weights.kv_heads,
            head_size=size,
            rotated=weights.angles.shape[1],
            positions=weights.angles.shape[0],
            neox=weights.neox,
            eps=weights.eps,
            product=ctypes.cast(product, ctypes.c_void_p).value,
            **{name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()},
        )
        self._at = ctypes.addressof(self._native)

    def make(self, states: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Make keys and values, each [L, T, kv_heads, head_dim] bf16.

        Args:
            states: [T, S · D] bf16 contiguous, the target's taps side by side.
            positions: [T] int64 contiguous; one that `angles` does not have counts as the last that it has.

        Raises:
            ValueError: a dtype, shape or stride is not as above.
            MemoryError: no room for the rows of some hundred states.
            RuntimeError: Linux gives this process no tiles of AMX.
        """
        layers, heads, size = self._shape
        rows, width = len(positions), self._weights.fc.shape[1]
        good = states.dtype == torch.bfloat16 and positions.dtype == torch.int64 and states.shape == (rows, width)
        if not (good and states.is_contiguous() and positions.is_contiguous()):
            got = f"{states.dtype} {list(states.shape)} and {positions.dtype} {list(positions.shape)}"
            raise ValueError(f"context: expected bfloat16 [T, {width}] and int64 [T], contiguous, got {got}")
        keys = states.new_empty((layers, rows, heads, size))
        values = torch.empty_like(keys)
        status = self._library(
            self._at, rows, states.data_ptr(), positions.data_ptr(), keys.data_ptr(), values.data_ptr(), self._threads
        )
        if status == NO_MEMORY:
            raise MemoryError(
                f"a drafter's context: expected room for {min(rows, 256)} rows, got none; free some memory"
            )
        require_tiles(status)
        assert status == OK
        return keys, values


def make_context(weights: Weights) -> Context | None:
    """Prepare a drafter's context to be made by one call; None, with a warning, where that cannot be built."""
    library, product = _load_library(), load_product()
    return None if library is None or product is None else Context(weights, library, product)


def context_reference(
    weights: Weights, states: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Define the call, in the modules of torch; rounded to bf16 behind every norm and product.

    The formulas are those of vLLM's `laguna_dflash.py` and `qwen3_dflash.py`.
    """

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (F.rms_norm(x.float(), x.shape[-1:], eps=weights.eps) * weight.float()).bfloat16()

    (layers, size), rows = weights.key_norms.shape, len(states)
    if weights.tap_norms is not None:
        states = norm(states.unflatten(1, weights.tap_norms.shape), weights.tap_norms).flatten(1)
    context = F.linear(states.float(), weights.fc.float()).bfloat16()
    if weights.hidden_norm is not None:
        context = norm(context, weights.hidden_norm)
    bias = None if weights.kv_bias is None else weights.kv_bias.float()
    kv = F.linear(norm(context, weights.context_norm).float(), weights.kv.float(), bias).bfloat16()
    keys, values = kv.view(rows, layers, 2, weights.kv_heads, size).permute(2, 1, 0, 3, 4)
    keys = norm(keys, weights.key_norms[:, None, None])
    angles = weights.angles[positions.clamp(0, len(weights.angles) - 1)].float()
    cosine, sine = angles[None, :, None].chunk(2, -1)
    turned, rest = keys.float().tensor_split([angles.shape[1]], -1)
    one, other = turned.chunk(2, -1) if weights.neox else (turned[..., ::2], turned[..., 1::2])
    both = one * cosine - other * sine, other * cosine + one * sine
    turned = torch.cat(both, -1) if weights.neox else torch.stack(both, -1).flatten(-2)
    return torch.cat([turned, rest], -1).bfloat16(), values.contiguous()


class _Drafter(ctypes.Structure):
    """The weights as context.cpp reads them, its `Drafter`."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("taps", "tap_size", "hidden", "layers", "heads", "head_size")),
        ("rotated", ctypes.c_int64),
        ("positions", ctypes.c_int64),
        ("neox", ctypes.c_int32),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in (*NORMS, *MATRICES, "product")),
    )


@functools.cache
def _load_library() -> Callable[..., int] | None:
    path = choose_path()
    try:
        function = ctypes.CDLL(str(keep_compiled(f"dflash-{path}", SOURCE, (*FLAGS, *PATH_FLAGS[path])))).dflash_context
    except (BuildError, OSError) as error:
        logger.warning("a drafter's context: made by some twenty calls instead of one: %s", error)
        return None
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [pointer, size, pointer, pointer, pointer, pointer, ctypes.c_int]
    function.restype = ctypes.c_int
    entry: Callable[..., int] = function
    return entry
