"""Losses of stage 2 against their definitions, and how a batch is cut and scheduled."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from laguna_serve.scripts.training.dense.initial import Usage, choose_experts
from laguna_serve.scripts.training.dense.losses import find_top, sum_lumped_kl, sum_over_places
from laguna_serve.scripts.training.dense.stages import split
from laguna_serve.scripts.training.loop import Curve, Schedule, train
from laguna_serve.scripts.training.optimiser import Optimiser
from laguna_serve.scripts.training.ranks import Ranks

PLACES, V = 5, 23


def make_logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(PLACES, V, generator=torch.Generator().manual_seed(seed))


def lumped_kl(p: list[float], q: list[float], k: int) -> float:
    """KL of two distributions over the k likeliest outcomes of p and one for all the others, literally."""
    best = sorted(range(len(p)), key=lambda i: -p[i])[:k]
    p_rest, q_rest = (1 - sum(d[i] for i in best) for d in (p, q))
    on_best = sum(p[i] * math.log(p[i] / q[i]) for i in best)
    return on_best + (p_rest * math.log(p_rest / q_rest) if k < len(p) else 0.0)


@pytest.mark.parametrize("k", [1, 4, V - 1, V])
def test_lumped_kl_is_its_definition(k: int) -> None:
    teacher, student = make_logits(0), make_logits(1)
    p, q = (logits.double().softmax(-1).tolist() for logits in (teacher, student))
    expected = sum(lumped_kl(a, b, k) for a, b in zip(p, q, strict=True))
    assert float(sum_lumped_kl(student, find_top(teacher, k))) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_lumped_kl_grows_with_k_up_to_that_of_the_vocabulary(seed: int) -> None:
    teacher, student = make_logits(seed), make_logits(seed + 100)
    found = [float(sum_lumped_kl(student, find_top(teacher, k))) for k in range(1, V + 1)]
    assert all(a <= b + 1e-5 for a, b in pairwise(found))
    assert found[0] > 0
    assert float(sum_lumped_kl(teacher, find_top(teacher, 4))) == pytest.approx(0, abs=1e-5)


def test_lumped_kl_corrects_mass_outside_of_the_top() -> None:
    """Renormalised over the top it would be 0 with a gradient of 0, and the student's tail stay as it is."""
    teacher = torch.tensor([[2.0, 1.0, -9.0, -9.0]])
    student = torch.tensor([[2.0, 1.0, 3.0, 3.0]], requires_grad=True)
    sum_lumped_kl(student, find_top(teacher, 2)).backward()
    assert student.grad is not None
    assert (student.grad[0, :2] < 0).all()
    assert (student.grad[0, 2:] > 0).all()


def test_teacher_without_a_tail_costs_no_nan() -> None:
    teacher = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    student = torch.zeros(1, 3, requires_grad=True)
    loss = sum_lumped_kl(student, find_top(teacher, 1))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(3))
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_head_in_chunks_is_the_head_at_once() -> None:
    head = nn.Linear(7, V, bias=False)
    student: Any = SimpleNamespace(lm_head=head)
    found = []
    for chunk in (0, 2):
        hidden = torch.randn(PLACES, 7, generator=torch.Generator().manual_seed(3)).requires_grad_()
        head.zero_grad()
        loss = sum_over_places(student, hidden, find_top(make_logits(0), 4), chunk)
        loss.backward()
        assert hidden.grad is not None
        assert head.weight.grad is not None
        found.append((loss.detach(), hidden.grad, head.weight.grad.clone()))
    for whole, chunked in zip(*found, strict=True):
        torch.testing.assert_close(whole, chunked)


@pytest.mark.parametrize(("curve", "end"), [("cosine", 0.05), ("linear", 0.05), ("constant", 1.0)])
def test_schedule_rises_evenly_and_falls_as_it_says(curve: Curve, end: float) -> None:
    schedule = Schedule(1000, 2.0, curve=curve, warm_up=10)
    assert schedule.lr(4) == pytest.approx(1.0, rel=0.01)
    assert schedule.lr(1000) == pytest.approx(2.0 * end)
    middle = 1.0 if curve == "constant" else 0.05 + 0.95 * 0.5
    assert schedule.lr(500) == pytest.approx(2.0 * middle)
    assert Schedule(10, 2.0, curve="constant", warm_up=0).lr(0) == 2.0


def test_steps_too_small_for_bf16_add_up_in_the_masters() -> None:
    layer = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    optimiser = Optimiser(layer, weight_decay=0.0)
    seen = []
    for _ in range(200):
        optimiser.clear()
        layer(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        assert layer.weight.grad is None, "it is the master's"
        optimiser.step(1e-4, [layer])
        seen.append(layer.weight.item())
    assert optimiser.weights(layer)[0].item() == pytest.approx(1 - 200 * 1e-4, rel=1e-3)
    assert seen[10] == 1.0
    assert seen[-1] == pytest.approx(0.98, abs=0.005)


def test_parts_of_a_batch_add_up_in_fp32() -> None:
    layer = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    optimiser = Optimiser(layer, weight_decay=0.0)
    for part in (256.0, 1.0, 1.0):  # 256 + 1 is 256 in bf16
        (layer(torch.tensor([[part]], dtype=torch.bfloat16))).sum().backward()
    gradient = optimiser.weights(layer)[0].grad
    assert gradient is not None
    assert gradient.item() == 258


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_that_is_resumed_is_training_in_one_go(dtype: torch.dtype, tmp_path: Path) -> None:
    def fit(steps: int, state: Path) -> nn.Module:
        torch.manual_seed(0)
        layer = nn.Linear(4, 4).to(dtype)

        def losses(step: int) -> Any:
            x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step)).to(dtype)
            return ((layer(part).float().square().sum() / 6, {}) for part in x.split(2))

        train("layer", layer, Schedule(steps, 1e-2, curve="constant"), losses, state, threads=1)
        return layer

    fit(5, tmp_path / "cut")
    resumed, whole = fit(9, tmp_path / "cut"), fit(9, tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_rows_are_shared_and_split_without_rest() -> None:
    shares = [Ranks(rank, 3).share(8) for rank in range(3)]
    parts = [part for share in shares for part in split(share, 2)]
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(8))
    assert split(slice(0, 2), 5) == [slice(0, 1), slice(1, 2)]


def test_starts_rank_and_weigh_experts_as_they_say() -> None:
    usage = Usage(torch.tensor([6.0, 0.0, 3.0, 1.0]), torch.tensor([1.0, 0.0, 3.0, 0.5]).double(), tokens=5)
    assert choose_experts(usage, 2, "usage") == [(0, pytest.approx(0.6)), (2, pytest.approx(0.3))]
    assert choose_experts(usage, 2, "weight") == [(2, pytest.approx(0.6)), (0, pytest.approx(0.2))]
    assert choose_experts(usage, 2, "concat") == [(2, 0.5), (0, 0.5)]
    assert choose_experts(usage, 2, "random") == []
