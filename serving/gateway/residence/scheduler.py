"""Which models are in memory: a state machine that is told what happened, and says what is to be done.

It waits for nothing, and the time is given to it.

Models of a group share its memory. Those that requests wait for are loaded in the order in which their oldest request
came; where there is no room, idle models go, the least recently used first, and busy ones after their time of
residence: they take no new requests then, and go when those in flight have ended. So no request in flight ever loses
its engine, and of two models that are asked for without a pause each has its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from laguna_serve.serving.engine.keeper import RestartPolicy
from laguna_serve.serving.gateway.residence.model import WAITABLE, Outcome, OwnedModel, State, Terms, Ticket
from laguna_serve.serving.gateway.residence.room import Room, choose_victims, find_lack, measure_room
from laguna_serve.serving.machine.memory import show_size

# What is to be done to a model: "load" starts or wakes it, "sleep" gives its memory back, "unload" ends its processes.
Act = Literal["load", "sleep", "unload"]
Order = tuple[Act, OwnedModel]


@dataclass(slots=True)
class Scheduler:
    """The models that a gateway owns, by name; `budgets`: bytes by group."""

    policy: RestartPolicy = field(default_factory=RestartPolicy)
    models: dict[str, OwnedModel] = field(default_factory=dict)
    budgets: dict[str, int] = field(default_factory=dict)

    def configure(self, terms: Mapping[str, Terms], budgets: Mapping[str, int]) -> None:
        """Take the models of a configuration. One that is not in it any more goes when nothing is in flight."""
        self.budgets = dict(budgets)
        for name, model in list(self.models.items()):
            if name not in terms:
                self._drop(model, "the configuration was reloaded, and the gateway no longer starts this model")
        for name, each in terms.items():
            model = self.models.setdefault(name, OwnedModel(name, each))
            if each.pinned and (model.loads == 0 or not model.terms.pinned):
                model.wanted = True
            model.terms, model.removed = each, False

    def ask(self, model: OwnedModel, now: float, deadline_s: float, settled: Callable[[], None]) -> Ticket:
        """Ask for a model, for a request: granted at once where it is ready, refused where it has just failed."""
        ticket = Ticket(model, now, deadline_s, settled)
        if model.serves:
            self._grant(ticket, now)
        elif model.state is State.FAILED and now < model.retry_s:
            self._refuse(ticket, model.cause or "", model.retry_s - now)
        else:
            model.waiting.append(ticket)
        return ticket

    def leave(self, ticket: Ticket, now: float) -> bool:
        """Note that a request has ended, or waits no more. Whether `advance` may find something to do for it."""
        model = ticket.model
        outcome, ticket.outcome = ticket.outcome, Outcome.LEFT
        if outcome is Outcome.WAITING:
            model.waiting.remove(ticket)
            return True
        if outcome is Outcome.GRANTED:
            model.in_flight -= 1
            model.used_s = now
            return not model.in_flight or model.state is not State.READY
        return False

    def advance(self, now: float) -> list[Order]:
        """Let time and what has been noted take effect; returns what is to be done now."""
        for model in self.models.values():
            for ticket in [t for t in model.waiting if t.deadline_s <= now]:
                model.waiting.remove(ticket)
                ticket.retry_after_s = model.load_s or 1.0
                self._settle(ticket, Outcome.TIMED_OUT)
            if model.state is State.FAILED and now >= model.retry_s:
                model.state, model.wanted = State.UNLOADED, model.terms.pinned
        orders: list[Order] = []
        for group in sorted({model.terms.group for model in self.models.values()}):
            orders += self._advance_group([m for m in self.models.values() if m.terms.group == group], group, now)
        for model in [m for m in self.models.values() if m.state in (State.UNLOADED, State.FAILED)]:
            model.leaving = False
            if model.removed:
                del self.models[model.name]
        return orders

    def find_wake(self, now: float) -> float | None:
        """When `advance` should be called next if nothing happens."""
        times = [time for model in self.models.values() for time in self._list_times(model) if time > now]
        return min(times, default=None)

    def note_ready(self, model: OwnedModel, size_bytes: int, now: float) -> None:
        """Note that a model has been loaded, warmed up and measured: requests may come."""
        model.state, model.ready_s, model.used_s = State.READY, now, now
        model.load_s, model.cause, model.wanted = now - model.began_s, None, False
        model.loads += 1
        model.load_seconds.add(model.load_s)
        self.note_memory(model, size_bytes)

    def note_memory(self, model: OwnedModel, size_bytes: int) -> None:
        """Note what a loaded model takes: its most is what it is given next time. One that is too large goes."""
        model.measured_bytes = max(model.measured_bytes or 0, size_bytes)
        budget = self.budgets.get(model.terms.group, 0)
        if model.measured_bytes > budget:
            model.leaving = True
            model.cause = f"it takes {show_size(model.measured_bytes)}, and its group has {show_size(budget)}"
            self._refuse_all(model, model.cause, self.policy.max_s)

    def note_failed(self, model: OwnedModel, cause: str, now: float) -> None:
        """Note that its engine could not be started, or has died: whoever waits learns why, and it is left alone."""
        if model.ready_s > model.began_s and now - model.ready_s >= self.policy.quick_s:
            model.failures = 0
        model.failures += 1
        model.failed += 1
        model.asleep_bytes = 0
        model.state, model.cause, model.wanted = State.FAILED, cause, False
        model.retry_s = now + self.policy.find_delay(model.failures)
        self._refuse_all(model, cause, model.retry_s - now)

    def note_death(self, model: OwnedModel) -> None:
        """Note that its engine has died: nothing is granted, and its memory counts until `note_failed` says why."""
        model.state = State.UNLOADING

    def note_unloaded(self, model: OwnedModel, asleep_bytes: int | None = None) -> None:
        """Note that its memory is free again, but for what it holds asleep; None: it has no process any more."""
        model.state = State.UNLOADED if asleep_bytes is None else State.ASLEEP
        model.asleep_bytes = asleep_bytes or 0
        model.leaving = False

    def _advance_group(self, models: Sequence[OwnedModel], group: str, now: float) -> Iterator[Order]:
        budget = self.budgets.get(group, 0)
        was_draining = {model for model in models if model.state is State.DRAINING}
        for model in models:  # first: else one that has just been loaded could go before it has served anybody
            if model.state is State.READY:
                self._serve(model, now)
        for model in was_draining:
            model.state = State.READY
        orders: dict[OwnedModel, Act] = {}
        room = measure_room(budget, models)
        if room.free < 0:  # one has turned out larger than it was taken for
            self._evict(choose_victims(models, -room.free - room.coming, now, was_draining), room, orders)
        for model in _list_wanted(models):
            if (lack := find_lack(model, budget, models)) is not None:
                model.wanted, model.cause = False, lack
                self._refuse_all(model, lack, self.policy.max_s)
                continue
            need = model.need_bytes - model.held_bytes
            if room.fits(need):
                model.wakes += model.state is State.ASLEEP
                model.state, model.began_s, model.asleep_bytes = State.LOADING, now, 0
                orders[model] = "load"
            elif (missing := need - room.free - room.coming) > 0:
                others = [m for m in models if m not in room.going and m is not model and m not in orders]
                self._evict(choose_victims(others, missing, now, was_draining), room, orders)
            room.reserve(need)
        for model in models:
            self._settle_model(model, now, orders)
        return ((act, model) for model, act in orders.items())

    def _evict(self, victims: Iterable[OwnedModel], room: Room, orders: dict[OwnedModel, Act]) -> None:
        for model in victims:
            room.expect(model)
            if model.state is State.ASLEEP:
                model.state = State.UNLOADING
                orders[model] = "unload"
            else:
                model.state = State.DRAINING
                model.evictions += not model.busy

    def _settle_model(self, model: OwnedModel, now: float, orders: dict[OwnedModel, Act]) -> None:
        """Grant a ready model to who waits; let one go that is to go, or that nobody has used for long."""
        if model.state is State.ASLEEP and model.leaving:
            model.state, orders[model] = State.UNLOADING, "unload"
            return
        if model.state not in (State.READY, State.DRAINING):
            return
        if model.state is State.READY:
            self._serve(model, now)
        timeout_s = model.terms.idle_timeout_s
        idle = timeout_s is not None and not model.terms.pinned and now >= model.used_s + timeout_s
        if not model.busy and (idle or model.leaving or model.state is State.DRAINING):
            model.state = State.UNLOADING
            orders[model] = "sleep" if model.terms.sleeps and not model.leaving else "unload"

    def _serve(self, model: OwnedModel, now: float) -> None:
        """Grant a ready model to all who wait for it."""
        if not model.leaving:
            for ticket in model.waiting:
                self._grant(ticket, now)
            model.waiting.clear()

    def _list_times(self, model: OwnedModel) -> Iterator[float]:
        yield from (ticket.deadline_s for ticket in model.waiting)
        if model.state is State.READY:
            yield model.find_residence_end()
            if model.terms.idle_timeout_s is not None and not model.busy:
                yield model.used_s + model.terms.idle_timeout_s
        elif model.state is State.FAILED:
            yield model.retry_s

    def _grant(self, ticket: Ticket, now: float) -> None:
        ticket.model.in_flight += 1
        ticket.model.used_s = now
        self._settle(ticket, Outcome.GRANTED)

    def _refuse_all(self, model: OwnedModel, cause: str, retry_after_s: float) -> None:
        waiting, model.waiting = model.waiting, []
        for ticket in waiting:
            self._refuse(ticket, cause, retry_after_s)

    def _refuse(self, ticket: Ticket, cause: str, retry_after_s: float) -> None:
        ticket.cause, ticket.retry_after_s = cause, retry_after_s
        self._settle(ticket, Outcome.FAILED)

    def _settle(self, ticket: Ticket, outcome: Outcome) -> None:
        ticket.outcome = outcome
        ticket.settled()

    def _drop(self, model: OwnedModel, cause: str) -> None:
        self._refuse_all(model, cause, 1.0)
        model.leaving, model.removed, model.wanted = True, True, False


def _list_wanted(models: Iterable[OwnedModel]) -> list[OwnedModel]:
    """List what is to be loaded, by who came first; what no request waits for comes last."""
    wanted = [model for model in models if model.state in WAITABLE and (model.waiting or model.wanted)]
    return sorted(wanted, key=lambda model: min((t.since_s for t in model.waiting), default=float("inf")))
