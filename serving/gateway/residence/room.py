"""Who must go so that another model fits: arithmetic on one group's budget."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from laguna_serve.serving.gateway.residence.model import OwnedModel, State
from laguna_serve.serving.machine.memory import show_size


@dataclass(slots=True)
class Room:
    """What is left of a budget: `free` now, `coming` from models that are on their way out.

    Models that wait for room take theirs off `free` in the order in which they came, so that no later one takes it;
    `free` may be less than nothing for it.
    """

    free: int
    coming: int = 0
    going: set[OwnedModel] = field(default_factory=set)

    def fits(self, need: int) -> bool:
        """Whether it can be loaded now."""
        return need <= self.free

    def reserve(self, need: int) -> None:
        """Keep room for a model that waits, or is loaded."""
        self.free -= need

    def expect(self, leaving: OwnedModel) -> None:
        """Count on what a model holds that is on its way out."""
        self.coming += leaving.held_bytes
        self.going.add(leaving)


def measure_room(budget: int, models: Iterable[OwnedModel]) -> Room:
    """Measure what a group's models leave of its budget."""
    room = Room(budget)
    for model in models:
        room.free -= model.held_bytes
        if model.state is State.UNLOADING or model.leaving:
            room.expect(model)
    return room


def find_lack(model: OwnedModel, budget: int, others: Iterable[OwnedModel]) -> str | None:
    """Say why a model can never have room; None where it can."""
    need, kept = model.need_bytes, sum(o.need_bytes for o in others if o.terms.pinned and o is not model)
    if need > budget:
        return f"it needs {show_size(need)}, and its group has {show_size(budget)}"
    if need + kept > budget:
        return f"it needs {show_size(need)}, and pinned models leave {show_size(budget - kept)} of {show_size(budget)}"
    return None


def choose_victims(
    models: Iterable[OwnedModel], lack: int, now: float, was_draining: Collection[OwnedModel]
) -> Sequence[OwnedModel]:
    """Choose models that go so that `lack` bytes become free: none where all together would not do.

    Idle ones go first, then those that were on their way out, then the least recently used. What is pinned or loading
    stays, and a busy one that has not been resident for its time.
    """
    candidates = [m for m in models if _may_go(m, now)]
    candidates.sort(key=lambda m: (m.busy, m not in was_draining, m.state is State.ASLEEP, m.used_s))
    chosen: list[OwnedModel] = []
    for model in candidates:
        if lack <= 0:
            break
        chosen.append(model)
        lack -= model.held_bytes
    if lack > 0:
        return ()
    for model in list(chosen):  # what a later, larger one made superfluous
        if lack + model.held_bytes <= 0:
            chosen.remove(model)
            lack += model.held_bytes
    return chosen


def _may_go(model: OwnedModel, now: float) -> bool:
    if model.terms.pinned or model.leaving or not model.held_bytes:
        return False
    if model.state is State.ASLEEP:
        return True
    return model.state is State.READY and (not model.busy or now >= model.find_residence_end())
