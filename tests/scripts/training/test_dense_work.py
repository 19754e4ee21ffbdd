"""The plan's arithmetic: what torch counts while a student and its teacher run, and the keys that a token sees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_laguna import make_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import LagunaForCausalLM

from laguna_serve.scripts.training.dense.config import DistillConfig
from laguna_serve.scripts.training.dense.plan.page import format_plan, plan_memory
from laguna_serve.scripts.training.dense.plan.rates import PASSES, Stopwatch, assume_rates, choose_layers
from laguna_serve.scripts.training.dense.plan.sizes import read_sizes
from laguna_serve.scripts.training.dense.plan.work import (
    count_block_flops,
    count_student_flops,
    count_student_layers,
    count_teacher_flops,
    count_teacher_layers,
    mean_keys,
    plan_work,
)
from laguna_serve.scripts.training.dense.stages import USAGE_BATCHES
from laguna_serve.scripts.training.dense.student import student_config
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.flags import FlagError

XS2 = Path(__file__).resolve().parents[2] / "fixtures" / "releases" / "Laguna-XS.2"
ROWS, LENGTH = 3, 16


def count(model: Any, *, backward: bool) -> float:
    """Operations of a token; all keys are multiplied, those that are masked, too."""
    ids = torch.randint(3, 60, (ROWS, LENGTH))
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        logits = model(input_ids=ids).logits
        if backward:
            logits.sum().backward()
    return counter.get_total_flops() / (ROWS * LENGTH)


@pytest.mark.parametrize(("length", "window"), [(1, 1), (7, 3), (16, 16), (16, 40), (100, 8)])
def test_keys_that_a_token_sees(length: int, window: int) -> None:
    seen = [min(place + 1, window) for place in range(length)]
    assert mean_keys(length, window) == pytest.approx(sum(seen) / length)


def test_arithmetic_is_what_torch_counts(tmp_path: Path) -> None:
    config = make_config(attn_implementation="eager", architectures=["LagunaForCausalLM"], gating=True)
    config.save_pretrained(tmp_path)
    sizes = read_sizes(tmp_path, {})
    target = sizes.target
    masked = sum(4 * heads * target.head_dim for heads in target.heads) * LENGTH
    for heads, kind in zip(target.heads, target.attention_kinds, strict=True):
        window = target.sliding_window if kind == "sliding_attention" else None
        masked -= 4 * heads * target.head_dim * mean_keys(LENGTH, window or LENGTH)
    widest = student_config(config, list(sizes.widths))
    student = LagunaForCausalLM._from_config(widest, attn_implementation="eager")
    padding = sum(2 * 3 * target.hidden_size * (max(sizes.widths) - width) for width in sizes.widths)
    forward = count(student, backward=False)
    assert count_student_flops(sizes, LENGTH) == pytest.approx(forward - masked - padding, rel=0.02)
    # The backward pass multiplies twice; nothing is passed on to the ids.
    assert count(student, backward=True) == pytest.approx(3 * forward, rel=0.1)
    teacher = LagunaForCausalLM._from_config(config, attn_implementation="eager", experts_implementation="eager")
    assert count_teacher_flops(target, LENGTH) == pytest.approx(count(teacher, backward=False) - masked, rel=0.05)


def test_hours_are_arithmetic_over_rate() -> None:
    given: dict[str, Any] = {"teacher": str(XS2), "out": Path("out"), "length": 2048, "rows": 16}
    sizes = read_sizes(XS2, {})
    beside = DistillConfig(**given, stage2_steps=100, stage1_steps=50)
    rates = assume_rates(beside)
    first, second = plan_work(beside, sizes, (1, 8), rates)
    assert (first.tokens, second.tokens) == (50 * 16 * 2048, 100 * 16 * 2048)
    taught = second.tokens * 3 * count_student_flops(sizes, 2048)
    assert second.hours["1"] == pytest.approx((taught / 0.33 + (second.flops - taught) / 0.2) / (989e12 * 3600))
    assert second.hours["8"] == pytest.approx(second.hours["1"] / 8)
    lean = DistillConfig(**given, stage2_steps=100, stage1_steps=50, store=Path("s"), layerwise=True, stage1_batches=5)
    read, store, alone = plan_work(lean, sizes, (1,), rates)
    assert alone.flops == pytest.approx(taught)
    assert store.flops + alone.flops == pytest.approx(second.flops)
    layers, batch = count_teacher_layers(sizes.target, 2048), 16 * 2048
    blocks = 50 * batch * count_block_flops(sizes)
    assert first.flops == pytest.approx((50 + USAGE_BATCHES) * batch * sum(layers) + blocks)
    # Through all layers once, and then the sparse one of each step.
    seen = (5 + USAGE_BATCHES) * sum(layers) + (50 + USAGE_BATCHES) * sum(layers[number] for number in sizes.sparse)
    assert read.flops == pytest.approx(seen * batch + blocks)
    again = DistillConfig(**given, stage2_steps=100, stage1_steps=50, store=Path("s"), checkpointing=True)
    assert plan_work(again, sizes, (1,), rates)[-1].flops == pytest.approx(alone.flops * 4 / 3)
    assert "33% of 989 TFLOP/s, sparse layers forward 20%, not measured here" in format_plan(plan_memory(beside, XS2))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"mfu": 1.5}, r"--mfu, --tflops: expected a share and a rate, got 1\.5 of 989"),
        ({"teacher_mfu": 0.0}, r"--teacher-mfu, --tflops: expected a share and a rate, got 0\.0 of 989"),
        ({"measure": True}, r"--measure: expected --dry-run with it, got none"),
    ],
)
def test_rates_that_mean_nothing_are_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(FlagError, match=message):
        DistillConfig(teacher=str(XS2), out=Path("out"), **flags)


LEAN: dict[str, Any] = {"store": Path("s"), "top_k": 4, "accumulate": 2, "checkpointing": True, "logit_chunk": 8}


@pytest.mark.parametrize("flags", [{}, LEAN])
def test_rates_are_of_all_layers_and_one_head(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: dict[str, Any]
) -> None:
    make_config(gating=True).save_pretrained(tmp_path)
    sizes = read_sizes(tmp_path, {})
    given = DistillConfig(
        teacher=str(tmp_path), out=Path("out"), rows=3, length=16, dry_run=True, measure=True, **flags
    )
    chosen = choose_layers(sizes)
    assert {sizes.target.attention_kinds[number] for number in chosen} == set(sizes.target.attention_kinds)
    layers, tokens, passes = count_student_layers(sizes, 16), 3 * 16, 4 if flags else 3

    def take(_self: Stopwatch, name: str, act: Callable[[], Any]) -> float:
        """Run it, and say what a device takes that does 1e9 operations a second and spends 5 ms on every loss."""
        act()
        if "layers" not in name:
            return 1.0
        depth = int(name.split()[-2]) // len(chosen)
        return 0.005 + depth * passes * sum(layers[number] for number in chosen) * tokens / 1e9

    monkeypatch.setattr(Stopwatch, "time", take)
    rates = plan_memory(given, tmp_path).rates
    assert rates is not None
    seconds = 0.005 + passes * sum(layers) * tokens / 1e9
    assert rates.student == pytest.approx(passes * count_student_flops(sizes, 16) * tokens / seconds)
    teacher = count_teacher_layers(sizes.target, 16)
    assert rates.teacher == pytest.approx(sum(teacher[number] for number in chosen) * tokens)
    assert "as measured on" in rates.source
    monkeypatch.setattr(Stopwatch, "time", lambda *_: 1.0)
    with pytest.raises(CommandError, match="expected more layers to take longer, got 1 s with"):
        plan_memory(given, tmp_path)


def test_first_call_is_not_timed() -> None:
    calls: list[float] = []
    seconds = Stopwatch(torch.device("cpu")).time("it", lambda: calls.append(0.0))
    assert len(calls) == PASSES + 1
    assert seconds >= 0


def test_shards_take_less_of_each_device() -> None:
    lean: dict[str, Any] = {"store": Path("s"), "layerwise": True, "weights": "bfloat16", "checkpointing": True}
    given = DistillConfig(teacher=str(XS2), out=Path("out"), length=2048, rows=16, logit_chunk=1024, **lean)
    whole = {s.devices: s for s in plan_memory(given, XS2).stages if s.stage == "stage 2"}
    sharded = DistillConfig(**{**{n: getattr(given, n) for n in given.__dataclass_fields__}, "fsdp": True})
    parts = {s.devices: s for s in plan_memory(sharded, XS2).stages if s.stage == "stage 2"}
    assert parts[1] == whole[1], "one device has nobody to share with"
    assert parts[8].optimiser * 8 == pytest.approx(whole[8].optimiser, rel=1e-6)
    assert parts[8].total < 0.4 * whole[8].total
    assert parts[8].activations == whole[8].activations
    narrow = DistillConfig(**{**{n: getattr(given, n) for n in given.__dataclass_fields__}, "moments": "8bit"})
    eight = {s.devices: s for s in plan_memory(narrow, XS2).stages if s.stage == "stage 2"}
    assert eight[1].optimiser == pytest.approx(whole[1].optimiser / 4, rel=0.02)
