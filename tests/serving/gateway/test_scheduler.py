"""The scheduler of models alone, on a clock that the test moves: cases, then random walks that hold its promises."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laguna_serve.serving.engine.keeper import RestartPolicy
from laguna_serve.serving.gateway.relay.admission import check_ticket
from laguna_serve.serving.gateway.residence.model import RUNNING, Outcome, OwnedModel, State, Terms, Ticket
from laguna_serve.serving.gateway.residence.owner import Owner
from laguna_serve.serving.gateway.residence.scheduler import Scheduler
from laguna_serve.serving.gateway.wire.errors import GatewayError

GIB = 1 << 30
POLICY = RestartPolicy(first_s=1.0, max_s=8.0, quick_s=300.0)


@dataclass
class World:
    """A scheduler, the orders that it gave and that are not carried out, and the time."""

    scheduler: Scheduler
    now: float = 0.0
    orders: list[tuple[str, OwnedModel]] = field(default_factory=list)
    settled: int = 0

    def ask(self, name: str, wait_s: float = 100.0) -> Ticket:
        ticket = self.scheduler.ask(self.scheduler.models[name], self.now, self.now + wait_s, self.count)
        self.advance()
        return ticket

    def count(self) -> None:
        self.settled += 1

    def advance(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.orders += self.scheduler.advance(self.now)

    def leave(self, ticket: Ticket) -> None:
        if self.scheduler.leave(ticket, self.now):
            self.advance()

    def carry_out(self, seconds: float = 0.0, size: int | None = None) -> list[str]:
        """Carry out all orders, those that follow from them too; what they were."""
        done = []
        while self.orders:
            act, model = self.orders.pop(0)
            self.now += seconds
            done.append(f"{act} {model.name}")
            if act == "load":
                self.scheduler.note_ready(model, size or model.terms.planned_bytes, self.now)
            else:
                self.scheduler.note_unloaded(model, GIB // 8 if act == "sleep" else None)
            self.advance()
        return done

    def visit(self, name: str) -> list[str]:
        """A request from its beginning to its end, and what was done for it."""
        ticket = self.ask(name)
        done = self.carry_out(1.0)
        assert ticket.outcome is Outcome.GRANTED
        self.leave(ticket)
        return done

    def state(self, name: str) -> State:
        return self.scheduler.models[name].state


def make_world(budget: float = 10, **models: Terms) -> World:
    scheduler = Scheduler(POLICY)
    scheduler.configure(models, {"default": int(budget * GIB)})
    world = World(scheduler)
    world.advance()
    return world


def terms(size: float, **more: object) -> Terms:
    return Terms(planned_bytes=int(size * GIB), **more)  # type: ignore[arg-type]


def test_a_request_loads_its_model_and_goes_on_when_that_is_ready() -> None:
    world = make_world(a=terms(4))
    ticket = world.ask("a")
    assert (ticket.outcome, world.state("a")) == (Outcome.WAITING, State.LOADING)
    assert world.carry_out() == ["load a"]
    assert ticket.outcome is Outcome.GRANTED
    assert world.ask("a").outcome is Outcome.GRANTED
    assert world.scheduler.models["a"].in_flight == 2


def test_a_model_that_is_to_go_is_loaded_again_where_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    world, owner = make_world(a=terms(4)), Owner()
    monkeypatch.setattr(owner, "drive", world.advance)
    ticket, model = world.ask("a"), world.scheduler.models["a"]
    world.carry_out()
    owner.unload(model)
    owner.load(model)
    world.leave(ticket)
    assert world.carry_out() == ["unload a", "load a"]
    assert (model.leaving, model.wanted) == (False, False)


def test_the_least_recently_used_idle_model_makes_room() -> None:
    world = make_world(a=terms(4), b=terms(4), c=terms(4))
    for name in "ab":
        ticket = world.ask(name)
        world.carry_out(1.0)
        world.leave(ticket)
    world.now += 1
    world.leave(world.ask("a"))
    world.now += 1
    world.ask("c")
    assert world.carry_out(1.0) == ["unload b", "load c"]
    assert world.scheduler.models["b"].evictions == 1


def test_a_model_with_a_request_in_flight_is_never_evicted() -> None:
    world = make_world(a=terms(6, min_residence_s=2.0), b=terms(6))
    first = world.ask("a")
    world.carry_out()
    waiting = world.ask("b")
    assert not world.orders
    second = world.ask("a")
    assert second.outcome is Outcome.GRANTED  # within its residence it goes on
    world.advance(3.0)
    assert world.state("a") is State.DRAINING
    late = world.ask("a")
    assert late.outcome is Outcome.WAITING
    world.leave(first)
    assert not world.orders
    world.leave(second)
    assert world.carry_out() == ["unload a", "load b"]
    assert waiting.outcome is Outcome.GRANTED
    assert late.outcome is Outcome.WAITING


def test_a_draining_model_goes_on_when_nobody_waits_for_its_room_any_more() -> None:
    world = make_world(a=terms(6, min_residence_s=0.0001), b=terms(6))
    world.ask("a")
    world.carry_out()
    world.now += 1
    waiting = world.ask("b")
    assert world.state("a") is State.DRAINING
    late = world.ask("a")
    world.leave(waiting)
    assert world.state("a") is State.READY
    assert late.outcome is Outcome.GRANTED


def test_two_models_asked_for_without_pause_take_turns() -> None:
    world = make_world(a=terms(6, min_residence_s=5.0), b=terms(6, min_residence_s=5.0))
    in_flight: list[Ticket] = []
    waiting: dict[str, list[Ticket]] = {"a": [], "b": []}
    longest = {"a": 0.0, "b": 0.0}
    for _ in range(400):
        for name in "ab":
            waiting[name].append(world.ask(name, wait_s=1000))
        world.carry_out(0.5)
        for name, tickets in waiting.items():
            for ticket in [t for t in tickets if t.outcome is Outcome.GRANTED]:
                tickets.remove(ticket)
                in_flight.append(ticket)
                longest[name] = max(longest[name], world.now - ticket.since_s)
        world.advance(0.1)
        while len(in_flight) > 3 or (in_flight and world.state(in_flight[0].model.name) is State.DRAINING):
            world.leave(in_flight.pop(0))
    assert max(longest.values()) < 10
    assert all(world.scheduler.models[name].loads > 3 for name in "ab")


def test_pinned_models_are_loaded_at_the_start_and_stay() -> None:
    world = make_world(a=terms(6, pinned=True), b=terms(3), c=terms(6))
    assert world.carry_out() == ["load a"]
    world.ask("b")
    world.carry_out()
    ticket = world.ask("c")
    assert ticket.outcome is Outcome.FAILED
    assert ticket.cause == "it needs 6.0 GiB, and pinned models leave 4.0 GiB of 10.0 GiB"
    world.advance(10_000)
    assert world.state("a") is State.READY


def test_what_is_larger_than_the_budget_is_refused_in_a_line() -> None:
    world = make_world(a=terms(11))
    ticket = world.ask("a")
    assert (ticket.outcome, ticket.cause) == (Outcome.FAILED, "it needs 11.0 GiB, and its group has 10.0 GiB")


def test_one_that_turns_out_larger_than_the_budget_goes_again() -> None:
    world = make_world(a=terms(4))
    ticket = world.ask("a")
    assert world.carry_out(size=12 * GIB) == ["load a", "unload a"]
    assert ticket.cause == "it takes 12.0 GiB, and its group has 10.0 GiB"
    assert world.ask("a").outcome is Outcome.FAILED


def test_one_that_grows_pushes_out_an_idle_one() -> None:
    world = make_world(a=terms(4), b=terms(4))
    for name in "ab":
        world.leave(world.ask(name))
        world.carry_out(1.0)
    world.leave(world.ask("b"))
    world.scheduler.note_memory(world.scheduler.models["b"], 7 * GIB)
    world.advance(1.0)
    assert world.carry_out() == ["unload a"]


def test_what_was_measured_is_what_the_next_load_is_given() -> None:
    world = make_world(a=terms(9), b=terms(4))
    world.leave(world.ask("a"))
    world.carry_out(1.0, size=5 * GIB)
    world.ask("b")
    assert world.carry_out() == ["load b"]
    assert world.state("a") is State.READY


def test_a_failed_start_tells_all_who_wait_and_backs_off() -> None:
    world = make_world(a=terms(4))
    tickets = [world.ask("a") for _ in range(3)]
    model = world.scheduler.models["a"]
    for delay in (1.0, 2.0, 4.0, 8.0, 8.0):
        world.orders.clear()
        world.scheduler.note_failed(model, "no such file", world.now)
        assert all((t.outcome, t.cause, t.retry_after_s) == (Outcome.FAILED, "no such file", delay) for t in tickets)
        world.advance(delay / 2)
        refused = world.ask("a")
        assert (refused.outcome, refused.retry_after_s) == (Outcome.FAILED, delay / 2)
        world.advance(delay / 2)
        tickets = [world.ask("a")]
        assert world.state("a") is State.LOADING
    world.carry_out()
    assert tickets[0].outcome is Outcome.GRANTED


def test_a_pinned_model_that_died_is_started_again() -> None:
    world = make_world(a=terms(4, pinned=True))
    world.carry_out()
    world.scheduler.note_failed(world.scheduler.models["a"], "killed", world.now)
    assert world.scheduler.find_wake(world.now) == world.now + 1.0
    world.advance(1.0)
    assert world.carry_out() == ["load a"]


def test_deadlines_end_waiting_and_a_load_goes_on() -> None:
    world = make_world(a=terms(4))
    ticket = world.ask("a", wait_s=5)
    assert world.scheduler.find_wake(world.now) == 5
    world.advance(5)
    assert ticket.outcome is Outcome.TIMED_OUT
    world.carry_out()
    assert world.state("a") is State.READY


def test_idle_models_go_after_their_time() -> None:
    world = make_world(a=terms(4, idle_timeout_s=60.0))
    ticket = world.ask("a")
    world.carry_out()
    world.advance(1000)
    assert not world.orders
    world.leave(ticket)
    assert world.scheduler.find_wake(world.now) == world.now + 60
    world.advance(60)
    assert world.carry_out() == ["unload a"]


def test_sleeping_models_hold_a_little_and_go_whole_where_that_is_missing() -> None:
    world = make_world(10, a=terms(6, sleeps=True), b=terms(6), c=terms(10))
    assert world.visit("a") == ["load a"]
    assert world.visit("b") == ["sleep a", "load b"]
    assert world.state("a") is State.ASLEEP
    assert world.visit("a") == ["unload b", "load a"]
    assert world.visit("c") == ["sleep a", "unload a", "load c"]
    assert [(model.loads, model.wakes) for model in world.scheduler.models.values()] == [(2, 1), (1, 0), (1, 0)]


def test_groups_do_not_share() -> None:
    scheduler = Scheduler(POLICY)
    each = {"a": Terms("one", 6 * GIB), "b": Terms("two", 6 * GIB)}
    scheduler.configure(each, {"one": 7 * GIB, "two": 7 * GIB})
    world = World(scheduler)
    world.ask("a")
    world.ask("b")
    assert world.carry_out() == ["load a", "load b"]


def test_one_that_is_removed_finishes_first() -> None:
    world = make_world(a=terms(4), b=terms(4))
    ticket = world.ask("a")
    world.carry_out()
    world.scheduler.configure({"b": terms(4)}, {"default": 10 * GIB})
    world.advance()
    assert not world.orders
    world.leave(ticket)
    assert world.carry_out() == ["unload a"]
    assert list(world.scheduler.models) == ["b"]


BUDGET = 10


def check(world: World, tickets: list[Ticket]) -> None:
    models = world.scheduler.models.values()
    assert sum(m.held_bytes for m in models) <= BUDGET * GIB
    for model in models:
        granted = [t for t in tickets if t.model is model and t.outcome is Outcome.GRANTED]
        assert model.in_flight == len(granted)
        assert not (granted and model.state in (State.UNLOADING, State.UNLOADED, State.ASLEEP, State.LOADING))
        assert all(t.outcome is Outcome.WAITING and t.deadline_s > world.now for t in model.waiting)
        assert not (model.terms.pinned and model.state is State.UNLOADING)


@pytest.mark.slow
@settings(max_examples=30)
@given(st.integers(0, 1 << 32))
def test_random_walks_keep_the_promises(seed: int) -> None:
    """Memory stays within the budget, nothing in flight loses its model, and every request ends in one way."""
    dice = random.Random(seed)
    models = {
        name: terms(
            dice.choice((2, 4, 6, 9)),
            sleeps=dice.random() < 0.3,
            idle_timeout_s=dice.choice((None, 20.0)),
            min_residence_s=dice.choice((None, 0.001, 5.0)),
            pinned=name == "p",
        )
        for name in ("a", "b", "c", "d", *(["p"] if dice.random() < 0.3 else []))
    }
    world, tickets = make_world(BUDGET, **models), []
    for _ in range(250):
        roll = dice.random()
        living = [t for t in tickets if t.outcome in (Outcome.WAITING, Outcome.GRANTED)]
        if roll < 0.35:
            tickets.append(world.ask(dice.choice(sorted(models)), dice.choice((1.0, 30.0, 300.0))))
        elif roll < 0.65 and living:
            world.leave(dice.choice(living))
        elif roll < 0.85 and world.orders:
            finish_one(world, dice)
        else:
            world.advance(dice.choice((0.1, 1.0, 10.0)))
        check(world, tickets)
    for _ in range(2000):  # whoever has an answer ends, and whoever waits is served or refused
        for ticket in [t for t in tickets if t.outcome is Outcome.GRANTED]:
            world.leave(ticket)
        if world.orders:
            finish_one(world, dice)
        else:
            world.advance(1.0)
        check(world, tickets)
        if not world.orders and all(t.outcome not in (Outcome.WAITING, Outcome.GRANTED) for t in tickets):
            break
    assert all(t.outcome in (Outcome.LEFT, Outcome.TIMED_OUT, Outcome.FAILED) for t in tickets)
    assert not any(m.in_flight or m.waiting for m in world.scheduler.models.values())


def finish_one(world: World, dice: random.Random) -> None:
    act, model = world.orders.pop(dice.randrange(len(world.orders)))
    if act == "load" and dice.random() < 0.2:
        world.scheduler.note_failed(model, "it died", world.now)
    elif act == "load":
        world.scheduler.note_ready(model, model.terms.planned_bytes * (6 + ord(model.name) % 5) // 10, world.now)
    else:
        world.scheduler.note_unloaded(model, GIB // 8 if act == "sleep" else None)
    world.advance()


@pytest.mark.parametrize("state", sorted(RUNNING))
def test_memory_counts_while_processes_may_have_it(state: State) -> None:
    model = OwnedModel("a", terms(3), state=state)
    assert model.held_bytes == 3 * GIB


@pytest.mark.parametrize(("left_s", "said"), [(0.0, 1), (29.2, 30)])
def test_request_for_a_model_that_cannot_be_loaded_is_told_when_to_come_back(left_s: float, said: int) -> None:
    ticket: Any = SimpleNamespace(retry_after_s=left_s, outcome=Outcome.FAILED, cause="no room; see the log")
    with pytest.raises(GatewayError, match="no room") as caught:
        check_ticket(ticket)
    assert caught.value.retry_after_s == said
