"""The first operation that gives a row other values beside other rows: on small modules, and on a real engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from laguna_serve.plugins.probes.row_probe import check_logits, describe
from laguna_serve.plugins.probes.rows import RowRecorder, find_layer, measure
from laguna_serve.serving.engine import EngineConfig
from laguna_serve.serving.engine.row_check import check_rows

TOY = Path(__file__).resolve().parent.parent / "toy"
WIDTH, SEQUENCE = 8, (3, 1, 4, 1, 5, 9, 2, 6)


class Linear(nn.Module):
    """A row's sum by itself: no matrix product, whose rounding may depend on the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([(self.weight * row).sum(dim=1) for row in x])


class Planted(Linear):
    """Beside more than three rows every row is a little larger."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (1 + 2**-20 * (len(x) > 3))


class Layer(nn.Module):
    def __init__(self, down: nn.Module, between: float) -> None:
        super().__init__()
        self.up, self.down, self.between = Linear(), down, between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x)
        if len(x) > 3:
            hidden = hidden + self.between
        return x + self.down(hidden)


class Model(nn.Module):
    """Three layers; the second has what is planted."""

    def __init__(self, down: nn.Module | None = None, between: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, WIDTH)
        nn.init.normal_(self.embed.weight, generator=torch.Generator().manual_seed(0))
        middle = Layer(down or Linear(), between)
        self.layers = nn.ModuleList([Layer(Linear(), 0.0), middle, Layer(Linear(), 0.0)])

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


def send(model: nn.Module, rows: int, *, wrong_from: int = len(SEQUENCE)) -> None:
    """The sequence, `rows` at once; from `wrong_from` on other tokens, as of drafts that are rejected."""
    tokens = [*SEQUENCE[:wrong_from], *(0 for _ in SEQUENCE[wrong_from:])]
    with torch.inference_mode():
        for start in range(0, len(SEQUENCE), rows):
            positions = range(start, min(start + rows, len(SEQUENCE)))
            model(input_ids=torch.tensor([tokens[i] for i in positions]), positions=torch.tensor(list(positions)))


def find_first(model: nn.Module, rows: int, **how: Any) -> dict[str, Any] | None:
    recorder = RowRecorder(model, SEQUENCE)
    with recorder.learn():
        send(model, 1)
    with recorder.compare():
        send(model, rows, **how)
    assert recorder.compared > 0
    if (seen := recorder.found) is None:
        return None
    with recorder.fetch([seen]):
        send(model, 1)
    return describe(seen, recorder, {name: type(module).__name__ for name, module in model.named_modules()})


def test_planted_operation_is_named() -> None:
    found = find_first(Model(Planted()), 4)
    assert found is not None
    assert (found["layer"], found["module"], found["kind"], found["side"]) == (1, "layers.1.down", "Planted", "output")
    assert (found["inputs_alone"], found["inputs"]) == ([[1, WIDTH]], [[4, WIDTH]])
    assert found["positions"] == [0, 1, 2, 3]
    assert "sum.dim_IntList" in found["operations"]
    assert 0 < found["largest"] < 1e-3
    assert found["ulps"] > 1  # 2⁻²⁰ is eight to sixteen ulp of float32


def test_rows_that_do_not_depend_on_others_are_silent() -> None:
    assert find_first(Model(), 4) is None
    assert find_first(Model(Planted()), 3) is None


def test_code_between_modules_is_named_by_what_it_feeds() -> None:
    found = find_first(Model(between=0.5), 4)
    assert found is not None
    assert (found["module"], found["side"], found["operations"]) == ("layers.1.down", "input", [])
    assert found["largest"] == pytest.approx(0.5)


def test_rejected_drafts_are_not_compared() -> None:
    """Their values differ, as their tokens do; nor does what follows them count."""
    assert find_first(Model(), 4, wrong_from=6) is None


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), (0.0, 0.0)),
        (torch.tensor([1.0]), torch.tensor([1.0 + 2**-22]), (2**-22, 2.0)),
        (torch.tensor([1.0]).bfloat16(), torch.tensor([1.0 + 2**-7]).bfloat16(), (2**-7, 1.0)),
        (torch.tensor([3]), torch.tensor([7]), (4.0, 1.0)),
    ],
)
def test_difference_in_units_of_the_last_place(
    one: torch.Tensor, other: torch.Tensor, expected: tuple[float, float]
) -> None:
    assert measure(one, other) == expected


def test_layer_by_name() -> None:
    assert find_layer("model.layers.12.self_attn.attn") == 12
    assert find_layer("lm_head") is None


class Head(nn.Module):
    def __init__(self, step: float) -> None:
        super().__init__()
        self.step = step

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.step * (len(hidden) > 1)


def test_output_layer_is_compared_by_itself() -> None:
    hidden = torch.ones(4, 3)
    assert check_logits(Head(0.0), hidden) is None
    found = check_logits(Head(0.25), hidden)
    assert found is not None
    assert (found["module"], found["largest"], found["positions"]) == ("lm_head", 0.25, [0, 1, 2, 3])


@pytest.mark.vllm
def test_real_engine(tmp_path: Path) -> None:
    """Without a defect nothing differs on this machine, or what does is named; one row again never does."""
    sequence = [1, *range(300, 339)]
    config = EngineConfig(model=str(TOY / "teacher"), max_model_len=256, kv_cache_gib=0.25)
    found = check_rows(config, sequence, 8, 2, tmp_path / "log")
    ways = {way.name: way for way in found.ways}
    assert found.tokens == 40
    assert list(ways) == ["again", "rows", "copies", "whole", "cached"]
    assert ways["again"].first is None
    # Six layers of at least eight modules, in and out.
    assert ways["again"].compared > 40 * 6 * 8 * 2
    for way in found.ways:
        assert way.first is None or way.first.module
