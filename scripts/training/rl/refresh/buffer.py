"""Rollouts to learn from again: a bounded buffer of recorded traffic, recent versions preferred."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from laguna_serve.serving.client.traffic import TrafficRecord

Prompt = tuple[int, ...]
# Versions after which a rollout is drawn half as often.
HALF_LIFE = 4.0


@dataclass(slots=True)
class ReplayBuffer:
    """The last `size` sampled answers, and the last `size` greedy ones, in the order in which they came.

    A version is as old as there are different ones behind it.
    """

    size: int
    sampled: list[TrafficRecord] = field(default_factory=list)
    greedy: list[TrafficRecord] = field(default_factory=list)

    def add(self, records: Iterable[TrafficRecord]) -> None:
        """Take in answers, newest last; the oldest go."""
        for record in records:
            (self.sampled if record.temperature > 0 else self.greedy).append(record)
        del self.sampled[: -self.size], self.greedy[: -self.size]

    def draw(
        self, count: int, greedy_share: float, rng: random.Random, without: Collection[Prompt] = ()
    ) -> list[TrafficRecord]:
        """Draw `count` answers with replacement, `greedy_share` of them greedy ones, none to the prompts `without`.

        Where there are none of one kind, all are of the other; [] where there is nothing at all.
        """
        kinds = [
            [record for record in kind if tuple(record.prompt_token_ids) not in without]
            for kind in (self.sampled, self.greedy)
        ]
        greedy = round(count * greedy_share)
        if not kinds[0] or not kinds[1]:
            greedy = 0 if kinds[0] else count
        drawn = [
            rng.choices(kind, weigh(kind), k=number)
            for kind, number in zip(kinds, (count - greedy, greedy), strict=True)
            if kind and number
        ]
        mixed = [record for part in drawn for record in part]
        rng.shuffle(mixed)
        return mixed

    def dump(self) -> str:
        """Write both kinds as JSON Lines of laguna_serve.traffic/1."""
        encoder = msgspec.json.Encoder()
        return "".join(encoder.encode(record).decode() + "\n" for record in (*self.sampled, *self.greedy))

    def load(self, text: str) -> None:
        """Take in what `dump` wrote."""
        decoder = msgspec.json.Decoder(TrafficRecord)
        self.add(decoder.decode(line) for line in text.split("\n") if line)


def weigh(records: Sequence[TrafficRecord]) -> list[float]:
    """Weigh answers by the age of their version: half for every HALF_LIFE versions."""
    order = list(dict.fromkeys(record.weight_version for record in records))
    newest = len(order) - 1
    age = {version: newest - place for place, version in enumerate(order)}
    return [0.5 ** (age[record.weight_version] / HALF_LIFE) for record in records]
