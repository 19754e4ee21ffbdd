"""A drafter's context by one call: every path against torch's modules, in the shapes of both formats of drafters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from laguna_serve.kernels import isa
from laguna_serve.kernels.dflash_context import context_reference, launch, make_context
from laguna_serve.kernels.dflash_context.launch import Weights
from laguna_serve.kernels.linear import load_library as load_product
from laguna_serve.kernels.toolchain import BuildError

RUNNABLE = [path for path, needed in isa.PATHS.items() if needed <= isa.find_usable()]


def forget() -> None:
    load_product.cache_clear()
    launch._load_library.cache_clear()


@pytest.fixture
def forgotten() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.fixture(params=RUNNABLE)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, forgotten: None) -> str:
    monkeypatch.setenv("LAGUNA_CPU_ISA", request.param)
    return str(request.param)


def make_weights(*, taps: int, size: int, hidden: int, layers: int, heads: int, head: int, rotated: int) -> Weights:
    """A drafter's in Laguna's format, with a bias."""
    torch.manual_seed(taps + size + head)
    both = layers * 2 * heads * head
    angle = torch.rand(300, rotated // 2) * 6
    return Weights(
        fc=(torch.randn(hidden, taps * size) / (taps * size) ** 0.5).bfloat16(),
        kv=(torch.randn(both, hidden) / hidden**0.5).bfloat16(),
        context_norm=torch.rand(hidden) + 0.5,
        key_norms=torch.rand(layers, head) + 0.5,
        angles=torch.cat([angle.cos(), angle.sin()], -1).bfloat16(),
        kv_heads=heads,
        eps=1e-6,
        neox=True,
        tap_norms=torch.rand(taps, size) + 0.5,
        hidden_norm=torch.rand(hidden) + 0.5,
        kv_bias=torch.randn(both).bfloat16(),
    )


LAGUNA = make_weights(taps=4, size=160, hidden=96, layers=2, heads=2, head=32, rotated=16)
ODD = make_weights(taps=3, size=50, hidden=33, layers=3, heads=1, head=10, rotated=10)
DRAFTERS = {
    "Laguna's": LAGUNA,
    "without biases": replace(LAGUNA, kv_bias=None),
    "speculators'": replace(LAGUNA, tap_norms=None, hidden_norm=None),
    "neighbours rotated": replace(LAGUNA, neox=False),
    "odd sizes": ODD,
    "odd sizes, neighbours rotated": replace(ODD, neox=False, hidden_norm=None),
}


def make_states(weights: Weights, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(rows)
    return torch.randn(rows, weights.fc.shape[1]).bfloat16(), torch.randint(0, len(weights.angles), (rows,))


def assert_close(found: torch.Tensor, right: torch.Tensor) -> None:
    """Within some roundings to bfloat16: a norm that rounds the other way moves all that follow by as much."""
    assert found.dtype == right.dtype == torch.bfloat16
    assert found.shape == right.shape
    difference = (found.float() - right.float()).abs()
    assert float(difference.max()) <= 0.03 * float(right.float().abs().max())
    assert float(difference.mean()) <= 1e-3 * float(right.float().abs().max())


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_values(name: str, rows: int) -> None:
    weights = DRAFTERS[name]
    context = make_context(weights)
    assert context is not None
    states, positions = make_states(weights, rows)
    for found, right in zip(
        context.make(states, positions), context_reference(weights, states, positions), strict=True
    ):
        assert found.is_contiguous()
        assert_close(found, right)


def test_rows_do_not_depend_on_each_other() -> None:
    context = make_context(LAGUNA)
    assert context is not None
    states, positions = make_states(LAGUNA, 300)
    together = context.make(states, positions)
    for row in (0, 7, 255, 256, 299):
        alone = context.make(states[row : row + 1], positions[row : row + 1])
        assert all(torch.equal(one[:, row], each[:, 0]) for one, each in zip(together, alone, strict=True))


def test_new_values_in_place_are_read() -> None:
    weights = replace(LAGUNA, fc=LAGUNA.fc.clone(), key_norms=LAGUNA.key_norms.clone())
    context = make_context(weights)
    assert context is not None
    given = make_states(weights, 3)
    context.make(*given)
    weights.fc.neg_()
    weights.key_norms.mul_(2)
    for found, right in zip(context.make(*given), context_reference(weights, *given), strict=True):
        assert_close(found, right)


@pytest.mark.parametrize(
    ("states", "positions"),
    [
        (torch.zeros(3, 640), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(3, 640).bfloat16(), torch.zeros(3, dtype=torch.int32)),
        (torch.zeros(3, 160).bfloat16(), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(2, 640).bfloat16(), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(640, 3).bfloat16().T, torch.zeros(3, dtype=torch.int64)),
    ],
)
def test_other_rows_are_refused(states: torch.Tensor, positions: torch.Tensor) -> None:
    context = make_context(LAGUNA)
    assert context is not None
    with pytest.raises(ValueError, match=r"expected bfloat16 \[T, 640\] and int64 \[T\], contiguous, got torch"):
        context.make(states, positions)


def test_positions_that_a_drafter_does_not_know_count_as_its_last() -> None:
    context = make_context(LAGUNA)
    assert context is not None
    states, _ = make_states(LAGUNA, 4)
    last = len(LAGUNA.angles) - 1
    beyond = context.make(states, torch.tensor([last, last + 1, 30_000_000, -1]))
    known = context.make(states, torch.tensor([last, last, last, 0]))
    assert all(torch.equal(one, other) for one, other in zip(beyond, known, strict=True))


@pytest.mark.parametrize(("status", "error", "said"), [(1, MemoryError, "free some"), (2, RuntimeError, "AMX's tiles")])
def test_what_the_product_refuses_is_told(
    path: str, status: int, error: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = make_context(LAGUNA)
    assert context is not None
    monkeypatch.setattr(context, "_library", lambda *_: status)
    with pytest.raises(error, match=said):
        context.make(torch.zeros(1, 4 * 160, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int64))


def test_no_rows() -> None:
    context = make_context(LAGUNA)
    assert context is not None
    keys, values = context.make(*make_states(LAGUNA, 0))
    assert keys.shape == values.shape == (2, 0, 2, 32)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"fc": LAGUNA.fc.float()}, "fc: expected torch.bfloat16, contiguous, got torch.float32"),
        ({"kv": LAGUNA.kv.T}, "kv: expected torch.bfloat16, contiguous, got torch.bfloat16 with strides"),
        ({"key_norms": LAGUNA.key_norms.bfloat16()}, "key_norms: expected torch.float32"),
        ({"kv_heads": 3}, "kv: expected \\[384, 96\\], got \\[256, 96\\]"),
        ({"hidden_norm": torch.ones(95)}, "hidden_norm: expected \\[96\\], got \\[95\\]"),
        ({"tap_norms": torch.ones(3, 160)}, "tap_norms: expected \\[3, 213\\], got"),
        ({"angles": torch.zeros(4, 64).bfloat16()}, "head_dim: expected 64 to 1024, got 32"),
    ],
)
def test_weights_of_other_shapes_are_refused(changed: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(LAGUNA, **changed)  # type: ignore[arg-type]


@pytest.mark.usefixtures("forgotten")
def test_without_a_compiler_there_is_none(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*_: object) -> None:
        raise BuildError("no compiler")

    monkeypatch.setattr(launch, "keep_compiled", refuse)
    assert make_context(LAGUNA) is None
    assert "made by some twenty calls instead of one: no compiler" in caplog.text
