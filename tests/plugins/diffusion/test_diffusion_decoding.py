"""Reference decodes without a model: against the published loop written out, and rule by rule."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import published
import pytest
import torch
from diffusion_models import MASK

from laguna_serve.plugins.diffusion.decoding.canvas import Canvas, State
from laguna_serve.plugins.diffusion.decoding.noise import draw_gumbel
from laguna_serve.plugins.diffusion.decoding.reference import (
    Evenly,
    PerStep,
    Reference,
    Schedule,
    Threshold,
    rank,
    step,
)
from laguna_serve.plugins.diffusion.errors import DiffusionError

V = 40
LENGTH = 64
CPU = torch.device("cpu")


class Neighbours:
    """Logits [1, n, V] of ids [1, n] from what is left, right and at the far left of each position: no rounding."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tables = [torch.randint(-64, 64, (V, V), generator=generator) / 16 for _ in range(3)]
        self.places = torch.randint(-16, 16, (128, V), generator=generator) / 16

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        row = ids[0]
        left, right, far = self.tables
        logits = left[row.roll(1)] + right[row.roll(-1)] + far[row[0]] / 4 + self.places[: len(row)]
        logits[:, MASK] = -30.0
        return logits[None]


MODEL = Neighbours()


def draw_prompt(rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.randrange(5, V) for _ in range(rng.randrange(1, 30)))


def evaluate(canvas: Canvas, state: State, guidance: float = 0.0) -> torch.Tensor:
    """The open block's logits by `MODEL`, guided as published."""
    block = canvas.find_block(state)
    assert block is not None
    sides = [
        MODEL(torch.tensor([prompt + state]))[0, len(prompt) :][block.start : block.stop]
        for prompt in (canvas.prompt, (MASK,) * len(canvas.prompt))
    ]
    return sides[1] + (guidance + 1) * (sides[0] - sides[1]) if guidance else sides[0]


def decode(canvas: Canvas, reference: Reference, stepper: Callable[..., State] = step) -> tuple[State, int]:
    """The finished state, and in how many steps."""
    state, steps = canvas.start(), 0
    while canvas.find_block(state) is not None:
        state = stepper(canvas, reference, state, evaluate(canvas, state, reference.guidance))
        steps += 1
    return state, steps


def count_differences(prompts: int, block: int, steps: int, guidance: float, temperature: float = 0.0) -> int:
    """In how many of the prompts the published loop writes something else."""
    rng = random.Random(0)
    reference = Reference(Evenly(steps // (LENGTH // block)), temperature, seed=11, guidance=guidance)
    different = 0
    for _ in range(prompts):
        prompt = draw_prompt(rng)
        state, taken = decode(Canvas(prompt, LENGTH, block, MASK), reference)
        assert taken == steps
        expected = published.generate(
            MODEL,
            list(prompt),
            steps=steps,
            gen_length=LENGTH,
            block_length=block,
            mask_id=MASK,
            temperature=temperature,
            cfg_scale=guidance,
            noise=lambda at, left, size: draw_gumbel(11, at, left, size, CPU),
        )
        different += list(state) != expected
    return different


@pytest.mark.parametrize("guidance", [0.0, 1.0])
@pytest.mark.parametrize("block", [8, 32, 64])
def test_published_loop_in_half_as_many_steps(block: int, guidance: float) -> None:
    assert count_differences(2, block, LENGTH // 2, guidance) == 0


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [0.0, 1.0])
@pytest.mark.parametrize("steps", [LENGTH, LENGTH // 2])
@pytest.mark.parametrize("block", [8, 32, 64])
def test_published_loop(block: int, steps: int, guidance: float) -> None:
    assert count_differences(64, block, steps, guidance) == 0


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_published_loop_with_a_temperature(guidance: float) -> None:
    assert count_differences(2, 32, LENGTH // 2, guidance, temperature=0.7) == 0


def test_published_loop_catches_another_rule_for_ties() -> None:
    """Logits that are equal everywhere are ties in confidence: the wrong rule fills from the right."""

    def rightmost(canvas: Canvas, reference: Reference, state: State, logits: torch.Tensor) -> State:
        ranking = rank(canvas, reference, state, logits)
        equal = [place for place, c in enumerate(ranking.confidences) if c == ranking.confidences[0]]
        return canvas.commit(state, {ranking.positions[equal[-1]]: ranking.tokens[equal[-1]]})

    canvas = Canvas((7,), 8, 8, MASK)
    flat = torch.zeros(8, V)
    assert step(canvas, Reference(), canvas.start(), flat) != rightmost(canvas, Reference(), canvas.start(), flat)
    expected = published.generate(
        lambda ids: torch.zeros(*ids.shape, V), [7], steps=8, gen_length=8, block_length=8, mask_id=MASK
    )
    state = canvas.start()
    for _ in range(8):
        state = step(canvas, Reference(), state, flat)
    assert list(state) == expected


def test_ties_go_to_the_lowest_position_and_id() -> None:
    canvas = Canvas((7,), 4, 4, MASK)
    logits = torch.zeros(4, V)
    logits[1:3, 20] = logits[1:3, 9] = 5.0
    ranking = rank(canvas, Reference(), canvas.start(), logits)
    assert ranking.positions == (1, 2, 0, 3)
    assert ranking.tokens == (9, 9, 0, 0)


def test_the_mask_is_never_chosen_and_keeps_its_share() -> None:
    canvas = Canvas((7,), 2, 2, MASK)
    logits = torch.zeros(2, V)
    logits[0, MASK] = 9.0
    ranking = rank(canvas, Reference(), canvas.start(), logits)
    assert ranking.positions == (1, 0)
    assert MASK not in ranking.tokens
    assert float(ranking.confidences[1]) == pytest.approx(-math.log(math.exp(9) + V - 1), rel=1e-5)


@pytest.mark.parametrize(
    ("schedule", "counts"),
    [
        (PerStep(1), [1] * 8),
        (PerStep(3), [3, 3, 2]),
        (Evenly(8), [1] * 8),
        (Evenly(3), [3, 3, 2]),
        (Evenly(5), [2, 2, 2, 1, 1]),
        (Evenly(12), [1] * 8),
        (Threshold(0.5), [3, 1, 1, 1, 1, 1]),
    ],
    ids=str,
)
def test_schedules(schedule: Schedule, counts: list[int]) -> None:
    """Probabilities: three above a half, five below."""
    left = [0.9, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    seen = []
    while left:
        seen.append(schedule.count(torch.tensor(left).log(), 8))
        left = left[seen[-1] :]
    assert seen == counts


def test_blocks_are_filled_from_the_left() -> None:
    canvas = Canvas((7,), 12, 4, MASK)
    state = canvas.start()
    while (block := canvas.find_block(state)) is not None:
        assert MASK not in state[: block.start]
        assert set(state[block.stop :]) <= {MASK}
        assert canvas.begin_block(state)[block.start :] == (MASK,) * (12 - block.start)
        state = step(canvas, Reference(PerStep(3)), state, evaluate(canvas, state))
    assert MASK not in state


def test_two_ways_to_a_state_have_one_successor() -> None:
    canvas = Canvas((7, 8), 8, 8, MASK)
    reference = Reference(temperature=1.0, seed=3)
    one = canvas.commit(canvas.commit(canvas.start(), {2: 9}), {5: 11})
    other = canvas.commit(canvas.start(), {5: 11, 2: 9})
    assert one == other
    successors = {step(canvas, reference, state, evaluate(canvas, state)) for state in (one, other)}
    assert len(successors) == 1


def test_an_answer_is_finished_when_all_before_its_end_is_there() -> None:
    canvas = Canvas((7,), 8, 4, MASK)
    stop = {5}
    assert canvas.find_end((9, MASK, 5, 9, *[MASK] * 4), stop) is None
    assert canvas.find_end((9, 9, 5, MASK, *[MASK] * 4), stop) == 3
    assert canvas.find_end((9,) * 7 + (MASK,), stop) is None
    assert canvas.find_end((9,) * 8, stop) == 8
    assert canvas.read_prefix((9, 8, MASK, 7, *[MASK] * 4)) == (9, 8)


def test_the_end_is_the_same_in_the_whole_canvas() -> None:
    """What comes after the first stop token changes nothing before it."""
    rng = random.Random(5)
    stop, ended = {9, 17, 30}, 0
    for _ in range(8):
        canvas = Canvas(draw_prompt(rng), 32, 8, MASK)
        whole, _ = decode(canvas, Reference())
        state = canvas.start()
        while (end := canvas.find_end(state, stop)) is None:
            state = step(canvas, Reference(), state, evaluate(canvas, state))
        assert state[:end] == whole[: canvas.find_end(whole, stop)]
        ended += end < 32
    assert ended


def test_noise_is_gumbel_and_follows_from_its_key() -> None:
    values = torch.cat([draw_gumbel(1, at, 5, 4096, CPU) for at in range(16)]).double()
    assert float(values.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(values.var()) == pytest.approx(math.pi**2 / 6, rel=0.03)
    first = draw_gumbel(1, 2, 3, 64, CPU)
    assert torch.equal(first, draw_gumbel(1, 2, 3, 128, CPU)[:64])
    assert not any(torch.equal(first, draw_gumbel(*key, 64, CPU)) for key in ((2, 2, 3), (1, 3, 3), (1, 2, 4)))


@pytest.mark.slow
def test_noise_draws_from_the_distribution() -> None:
    """Of 3,000 seeds each draws the token of 20, 30 and 50% about as often; 4 standard errors are allowed."""
    canvas = Canvas((7,), 1, 1, MASK)
    logits = torch.full((1, V), -math.inf)
    shares = {10: 0.2, 11: 0.3, 12: 0.5}
    for token, share in shares.items():
        logits[0, token] = math.log(share)
    drawn = [step(canvas, Reference(temperature=1.0, seed=seed), canvas.start(), logits)[0] for seed in range(3000)]
    for token, share in shares.items():
        assert drawn.count(token) / 3000 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 3000))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Canvas((7,), 30, 8, MASK),
            "canvas: expected a positive number of whole blocks, got 30 in blocks of 8",
        ),
        (lambda: Canvas((), 8, 8, MASK), "prompt: expected at least one token"),
        (lambda: Canvas((7, MASK), 8, 8, MASK), "prompt: expected no mask"),
        (lambda: PerStep(0), "tokens per step: expected at least 1"),
        (lambda: Evenly(0), "steps per block: expected at least 1"),
        (lambda: Threshold(1.0), "threshold: expected a probability between 0 and 1"),
        (lambda: Reference(temperature=-1.0), "temperature: expected 0 or more"),
        (lambda: Reference(guidance=math.nan), "guidance: expected 0 or more"),
        (lambda: Reference(temperature=1e308), "temperature: expected 0 or more, at most 1,000,000, got 1e"),
    ],
)
def test_bad_input_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(DiffusionError, match=message):
        make()
