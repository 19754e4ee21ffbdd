"""The policy on simulated engines: against every fixed γ, when acceptance changes, when the machine does."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from adaptive_simulation import PROMPT_S, WIDTH, Simulation

from laguna_serve.plugins.adaptive.acceptance import MOST, Acceptance
from laguna_serve.plugins.adaptive.costs import CostTable, Measured, Pace, StepCosts, find_bucket, read
from laguna_serve.plugins.adaptive.policy import Policy
from laguna_serve.plugins.adaptive.prospect import PLAIN
from laguna_serve.plugins.adaptive.rows import round_rows

# As the toy's drafter on code: 3.5 tokens per step on the full width.
CODE = [0.76, 0.75, 0.75, 0.75, 0.8, 0.8, 0.8]
GREEDY, SAMPLED, BETWEEN = [0.8] * WIDTH, [0.36, *[0.48] * (WIDTH - 1)], [0.62] * WIDTH


@pytest.mark.slow
@pytest.mark.parametrize("requests", [1, 4, 16])
@pytest.mark.parametrize("chances", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_it_comes_within_two_percent_of_the_best_fixed_gamma(requests: int, chances: list[float]) -> None:
    steps = 3000 if requests == 1 else 1200
    simulation = Simulation(lambda _step, _number: chances, requests)
    gamma, rate = simulation.best(steps)
    assert simulation.run(steps, Policy(WIDTH)) > 0.98 * rate
    drafting = sum(width > 0 for width in simulation.widths[200:]) / (steps - 200)
    assert drafting > 0.85 if gamma else drafting < 0.05


def test_near_break_even_little_is_lost_either_way() -> None:
    simulation = Simulation(lambda _step, _number: BETWEEN)
    _, rate = simulation.best(3000)
    assert simulation.run(3000, Policy(WIDTH)) > 0.95 * rate


def code_prompt(number: int) -> int:
    """Prompt tokens of a request, 44 to 293."""
    return 44 + number * 7919 % 250


def test_at_64_at_once_with_prompts_in_most_steps_it_decodes_plainly_and_knows_what_a_prompt_token_takes() -> None:
    """No γ pays there; steps that read no prompt are too few to learn that from."""
    simulation = Simulation(lambda _step, _number: CODE, 64, length=32, spread=16, prompt=code_prompt)
    gamma, rate = simulation.best(256)
    policy = Policy(WIDTH)
    assert gamma == 0
    assert simulation.run(256, policy) > 0.98 * rate
    assert policy.costs.verify.rate.value * policy.costs.pace == pytest.approx(PROMPT_S, rel=0.1)


def test_where_drafts_pay_they_are_made_beside_prompts() -> None:
    """Most steps of four requests with short answers read prompts."""
    simulation = Simulation(
        lambda _step, _number: GREEDY, 4, length=12, spread=6, prompt=lambda number: 10 + number % 7
    )
    gamma, rate = simulation.best(800)
    assert gamma >= 3
    assert simulation.run(800, Policy(WIDTH)) > 0.98 * rate


@pytest.mark.parametrize("chances", [CODE, SAMPLED], ids=["greedy", "sampled"])
def test_short_answers_one_at_a_time(chances: list[float]) -> None:
    """Better than every fixed γ where drafts pay, as none is made that the answer has no room for."""
    simulation = Simulation(lambda _step, _number: chances, length=32, prompt=code_prompt)
    gamma, rate = simulation.best(3000)
    assert simulation.run(3000, Policy(WIDTH)) > (1.01 if gamma else 0.98) * rate


def test_a_decision_for_none_is_for_the_requests_that_it_was_made_for() -> None:
    """Of two sorts of requests that take turns, one is drafted for in most of its steps, however the other does."""

    def chances(_step: int, number: int) -> list[float]:
        return [0.9] * WIDTH if number % 2 else [0.02] * WIDTH

    simulation = Simulation(chances, length=32)
    _, rate = simulation.best(3000)
    assert simulation.run(3000, Policy(WIDTH)) > 1.01 * rate


def test_nobody_gets_more_drafts_than_there_is_room_for() -> None:
    policy = Policy(WIDTH)
    Simulation(lambda _step, _number: GREEDY, 4, length=100_000).run(300, policy)
    most = [0, 2, 5, 100]
    decisions = [policy.decide(["0", "1", "2", "3"], room=most) for _ in range(50)]
    drafting = [decision.counts for decision in decisions if decision.width]
    assert len(drafting) > 30
    assert all(count <= room for counts in drafting for count, room in zip(counts, most, strict=True))
    assert max(counts[3] for counts in drafting) > 2
    assert policy.decide(["0", "1"], room=[0, 0]) == PLAIN


def test_so_many_requests_as_never_before_begin_without_drafts() -> None:
    policy = Policy(WIDTH)
    for number in range(40):
        policy.add(str(number), 0)
    for count in (1, 8, 40):
        requests = [str(number) for number in range(count)]
        assert [policy.decide(requests) for _ in range(5)] == [PLAIN] * 5


def test_cold_steps_do_not_keep_one_request_from_drafts() -> None:
    """The first six steps with drafts take three times as long as later ones, which would pay."""

    class Cold(Simulation):
        def measure_step(self, step: Measured) -> Measured:
            self.cold = getattr(self, "cold", 6) - bool(step.drafted)
            slow = 3 if self.cold > 0 and step.drafted else 1
            return replace(step, target_s=step.target_s * slow, drafter_s=step.drafter_s * slow)

    simulation = Cold(lambda _step, _number: GREEDY)
    simulation.run(400, Policy(WIDTH))
    assert sum(width > 0 for width in simulation.widths[40:]) > 0.8 * 360


@pytest.mark.slow
@pytest.mark.parametrize(("requests", "seed"), [(1, 0), (4, 0), (8, 0), (16, 0), (16, 21)])
def test_what_a_busy_hour_said_is_forgotten(requests: int, seed: int) -> None:
    """While the machine was busy, steps with many drafted rows took four times as long; they were tried a few times."""

    class Busy(Simulation):
        def measure_step(self, step: Measured) -> Measured:
            wide = step.requests and step.drafted > 4.5 * step.requests
            return replace(step, target_s=step.target_s * (4 if wide else 1))

    load: dict[str, Any] = {"length": 96, "spread": 30, "prompt": lambda _number: 40}
    policy = Policy(WIDTH)
    Busy(lambda _step, _number: GREEDY, requests, seed=seed, **load).run(600, policy)
    simulation = Simulation(lambda _step, _number: GREEDY, requests, seed=5, **load)
    _, rate = simulation.best(3000)
    assert simulation.run(3000, policy) > 0.97 * rate


def test_what_others_said_long_ago_is_not_believed() -> None:
    """Twelve requests, of which there are few, keep what a busy hour said; 16 do not go by it for good."""
    table = CostTable([1.0] * 4, Pace())
    for level, seconds in [*enumerate([1.0, 1.2, 1.4, 8.0])] * 5:
        table.observe(12, level, seconds)
    assert table.curve(16)[3] == pytest.approx(8.0, rel=0.01)
    for _ in range(2100):
        for level, seconds in enumerate([1.0, 1.2, 1.4]):
            table.observe(16, level, seconds)
    assert table.curve(16)[3] == pytest.approx(1.4, rel=0.01)
    assert table.curve(12)[3] == pytest.approx(8.0, rel=0.01), "their own they keep"


def test_one_dear_width_makes_no_lesser_one_dear() -> None:
    """What is not tried seems to take four times as long; what is tried pays, with more than a draft for each."""

    class Steep(Simulation):
        def measure_step(self, step: Measured) -> Measured:
            wide = step.requests and step.drafted > 4.5 * step.requests
            return replace(step, target_s=step.target_s * (4 if wide else 1))

    policy = Policy(WIDTH)
    simulation = Steep(lambda _step, _number: GREEDY, 16, length=96)
    simulation.run(1200, policy)
    assert sum(3 <= width <= 4 for width in simulation.widths[600:]) > 0.7 * 600


def test_it_stops_when_acceptance_falls_and_comes_back_when_it_rises() -> None:
    def chances(step: int, _number: int) -> list[float]:
        return GREEDY if 2000 <= step < 4000 else SAMPLED

    simulation = Simulation(chances)
    simulation.run(6000, Policy(WIDTH))
    shares = [
        sum(width > 0 for width in simulation.widths[start : start + 1000]) / 1000 for start in range(0, 6000, 1000)
    ]
    assert shares[1] < 0.1
    assert shares[3] > 0.85
    assert shares[5] < 0.35
    assert shares[3] - shares[5] > 0.5


def test_a_request_that_accepts_less_gets_fewer_drafts_than_its_neighbours() -> None:
    policy = Policy(WIDTH)
    simulation = Simulation(lambda _step, number: [0.1] * WIDTH if number == 0 else GREEDY, 4, length=100_000)
    simulation.run(600, policy)
    counts = [decision.counts for _ in range(40) if (decision := policy.decide(["0", "1", "2", "3"])).width]
    assert sum(each[0] for each in counts) < 0.5 * sum(each[1] for each in counts)


@pytest.mark.slow
def test_load_of_others_changes_no_decision_for_long() -> None:
    def slow(step: int) -> float:
        return 2.0 if step // 300 % 2 else 1.0

    for chances in (GREEDY, SAMPLED):
        simulation = Simulation(lambda _step, _number, chances=chances: chances, slow=slow)  # type: ignore[misc]
        _, rate = simulation.best(3000)
        assert simulation.run(3000, Policy(WIDTH)) > 0.97 * rate


def test_exploring_is_paid_from_a_small_part_of_the_time() -> None:
    simulation = Simulation(lambda _step, _number: SAMPLED)
    simulation.run(6000, Policy(WIDTH))
    assert 5 < sum(width > 0 for width in simulation.widths[1000:]) < 0.02 * 5000


def test_exploring_pays_for_the_context_that_it_makes_up_first() -> None:
    """Rarer where more waits, and still not never: what is saved for it grows with what it costs."""
    counts = []
    for waiting_s in (0.0, 0.004, 0.016):
        simulation = Simulation(lambda _step, _number: SAMPLED, waiting_s=waiting_s)
        simulation.run(6000, Policy(WIDTH))
        counts.append(sum(width > 0 for width in simulation.widths[1000:]))
    assert counts[0] > 1.5 * max(counts[1:])
    assert min(counts) > 0


def test_no_request_no_drafts_and_ended_requests_are_forgotten() -> None:
    policy = Policy(3)
    assert policy.decide([]) == PLAIN
    policy.add("a", 0)
    policy.drop("a")
    policy.drop("a")
    policy.observe_drafts([("a", 3, 1)])  # verified after its end
    policy.add("b", 0)
    assert policy.decide(["b"]).width <= 3


def test_acceptance_by_position_forgets() -> None:
    shared = Acceptance(3)
    for step in range(2000):
        shared.observe([(3, step % 4)], step)
    assert shared.chances == pytest.approx([3 / 4, 2 / 3, 1 / 2], abs=0.03)
    for step in range(2000, 3000):
        shared.observe([(3, 0)], step)
    assert shared.chances[0] < 0.05


def test_costs_are_read_between_what_was_measured_and_beside_it() -> None:
    costs = StepCosts(4)
    for _ in range(10):
        costs.observe(Measured(1, 0, 0.010, 4, 0.004))
        costs.observe(Measured(1, 4, 0.020, 0, 0.0))
    curve = costs.verify.curve(1)
    assert curve[0] == pytest.approx(0.010)
    assert curve[4] == pytest.approx(0.020)
    assert curve[0] < curve[1] < curve[2] < curve[4]
    assert costs.find_draft_curve(1)[4] == pytest.approx(0.004)
    # Of another number of requests only the plain step is known: the rest is in proportion.
    for _ in range(10):
        costs.observe(Measured(16, 0, 0.050, 0, 0.0))
    assert costs.verify.curve(16)[4] == pytest.approx(0.100)
    assert read(curve, 0) == curve[0]
    assert read(curve, 2.5) == pytest.approx((curve[2] + curve[3]) / 2)
    assert find_bucket(8) == 8 < find_bucket(11) < find_bucket(16) < find_bucket(64)


def test_what_a_prompt_token_takes_is_told_from_what_else_a_step_takes() -> None:
    """Nearly all steps read prompts, which are most of their time; one in fifty is wild."""
    draw, table = random.Random(0), CostTable([1.0, 1.2, 1.4], Pace())
    for _ in range(300):
        level, tokens = draw.choice([0, 2]), draw.randrange(0, 600, 30)
        seconds = ((0.004, 0.0, 0.012)[level] + 20e-6 * tokens) * draw.gauss(1, 0.03)
        table.observe(57, level, seconds * (4 if draw.random() < 0.02 else 1), tokens)
    curve = table.curve(57)
    assert curve[2] / curve[0] == pytest.approx(3, rel=0.15)
    assert curve[0] / table.rate.value == pytest.approx(200, rel=0.15)


def test_a_step_of_next_to_nothing_but_prompts_says_nothing_of_the_rest() -> None:
    table = CostTable([1.0, 1.2], Pace())
    for tokens in (100, 200, 300, 400):
        table.observe(0, 0, 20e-6 * tokens + 0.001, tokens)
    for _ in range(5):
        table.observe(4, 0, 0.005)
    for _ in range(50):
        table.observe(4, 0, 0.5, 20_000)
    assert table.curve(4)[0] == pytest.approx(0.005)
    assert table.count(4, 0) == 5


def test_cold_measurements_are_forgotten_and_a_wild_first_one_is_not_believed() -> None:
    table = CostTable([1.0, 1.2, 1.4], Pace())
    for seconds in (0.9, 0.3, 0.1, 0.05, 0.03, 0.012, 0.010, 0.010):
        table.observe(1, 1, seconds)
    assert table.curve(1)[1] < 0.013
    table.observe(1, 2, 0.060)
    assert table.curve(1)[2] < 0.020


def test_one_cold_measurement_does_not_stand_against_many() -> None:
    table = CostTable([1.0, 1.2, 1.4], Pace())
    table.observe(1, 1, 0.5)
    for _ in range(200):
        table.observe(1, 2, 0.01)
    assert table.curve(1)[2] < 0.013
    assert table.curve(1)[1] <= table.curve(1)[2]


def test_a_width_that_only_other_loads_speak_against_is_tried() -> None:
    """Sixty requests at once pay little for a further row each; eight, measured beside other work, paid a lot."""

    def take(requests: int, level: int) -> float:
        each = 30e-3 if requests == 8 else 1e-3
        return 0.02 + 6e-3 * bool(level) + each * level

    policy, names = Policy(WIDTH), [str(number) for number in range(60)]
    for name in names:
        policy.add(name, "greedy")
    for requests, levels in ((8, range(WIDTH + 1)), (60, range(4))):
        for level in (*levels, *levels, *levels):
            drafter_s = 5e-3 if level else 0.0
            policy.observe_step(Measured(requests, level * requests, take(requests, level), level, drafter_s))
    costs = policy.costs.verify
    assert costs.curve(60)[6] > 1.3 * take(60, 6)
    assert costs.hope(60, 6) == pytest.approx(take(60, 6), rel=0.02)
    assert costs.hope(60, 3) == costs.curve(60)[3], "measured"
    assert costs.hope(33, 6) == costs.curve(33)[6], "nothing measured for so many"
    draw, widths = random.Random(0), []
    for _ in range(600):
        decision = policy.decide(names)
        widths.append(decision.width)
        level = round(decision.total / 60)
        drafter_s = 5e-3 if level else 0.0
        policy.observe_step(Measured(60, decision.total, take(60, level), decision.width, drafter_s))
        drafted = dict(zip(names, decision.counts, strict=False))
        policy.observe_drafts([(name, count, accept(draw, count)) for name, count in drafted.items()])
    assert sum(width > 5 for width in widths[400:]) > 180


@pytest.mark.parametrize(
    ("counts", "rounded"),
    [
        ([7] * 8, [7] * 8),
        ([3] * 9, [2] * 4 + [3] * 5),
        ([5, 1, *[0] * 12], [4, 0, *[0] * 12]),
        ([1, *[0] * 9], [1, *[0] * 9]),
        ([7] * 64, [7] * 64),
    ],
    ids=["few requests", "more", "longest first", "never to none", "even"],
)
def test_rows_come_in_steps(counts: list[int], rounded: list[int]) -> None:
    assert round_rows(counts) == tuple(rounded)


def accept(draw: random.Random, drafted: int) -> int:
    """Accept drafts in order, each with a chance of 0.8."""
    for place in range(drafted):
        if draw.random() > 0.8:
            return place
    return drafted


def test_what_is_learnt_of_drafts_ends_a_decision_for_none() -> None:
    policy = Policy(WIDTH)
    Simulation(lambda _step, _number: [0.02] * WIDTH, length=100_000).run(300, policy)
    while not policy.repeat_plain(["0"]):
        policy.decide(["0"])
    policy.observe_drafts([("0", 1, 1)])
    assert not policy.repeat_plain(["0"])


def test_context_that_must_be_made_up_first_is_a_cost_of_drafts() -> None:
    policy = Policy(WIDTH)
    Simulation(lambda _step, _number: [0.8] * WIDTH, length=100_000).run(300, policy)
    assert policy.decide(["0"]).width
    assert policy.decide(["0"], waiting_s=1e3) == PLAIN


def test_no_token_is_certain() -> None:
    shared = Acceptance(2)
    for step in range(1000):
        shared.observe([(2, 2)], step)
    assert shared.survivals(0, 2) == pytest.approx([MOST, MOST**2])


def test_plain_step_may_take_longer_than_one_with_drafts() -> None:
    """Two kernels do them; what one of them takes says nothing about the other."""
    table = CostTable([1.0, 1.1, 1.2], Pace())
    for _ in range(9):
        table.observe(1, 0, 5e-3)
        table.observe(1, 1, 3e-3)
    assert table.curve(1)[:2] == pytest.approx([5e-3, 3e-3], rel=1e-3)
