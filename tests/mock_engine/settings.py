"""What a mock engine is, says and does."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from laguna_serve.serving.client.sampling import PLAIN_SAMPLING
from mock_engine.clock import Clock
from mock_engine.models import Model
from mock_engine.weights import Weights


def keep(steps: list[Any]) -> Any:
    """The answer as it is."""
    return steps


@dataclass
class Settings:
    """The defaults are an engine that drafts nothing and fails at nothing.

    What it is: `models` are listed at /v1/models, the first with `max_model_len` and `root` where `listed_length`;
    `key` is asked for; `headers` are added to answers; `requires` are fields without which a request is refused;
    `weights` have routes.

    What it says: `says` answers a request (models.py); without it there is a greedy continuation of the prompt, made of
    its checksum. From `flips[prompt]` on every id is one higher, by `flips_again` where it is asked not to stream.
    `margin` is between the two best log-probabilities, `noise` is on the best one before a flip; `hide_second` hides
    the rival at a flip; `next_top` is said to a prompt of token ids. A prompt's token costs `losses[token]`, or `loss`;
    `spoil` spoils these answers. `sharpen` is the share of samples that are the likeliest instead. An answer
    ends by itself after `ends[prompt]` tokens, unless the end is ignored; of a chat the prompt is `<role>content…`.

    How fast: a chunk of `chunk_tokens` takes `delay_s`, of `clock` where there is one. All but the first
    answer wait until `together` requests have been in flight at once.

    What it counts: drafts of `gamma` tokens, if `count_drafts`, or `drafts_per_answer` of which all but one token is
    accepted; `prefix_hits` and `foreign_tokens` per request. One that is not `counted` has no /metrics.

    How it fails: `faults` maps a prompt to http_500, error_event, truncate, no_done or wrong_usage; after `die_after`
    requests it breaks off every one, or answers `dies_with`. Answers may lack token `ids`, have `other_text`, be
    `shorten`ed, come in pieces of `split_bytes`, or echo prompt ids that are `prompt_shift` higher.
    """

    models: Collection[str] = ("fake",)
    max_model_len: int = 64
    root: str = "somewhere/fake"
    listed_length: bool = False
    vocabulary: int = 1_000_000
    key: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    requires: Collection[str] = ("temperature", *PLAIN_SAMPLING)
    weights: Weights | None = None

    says: Model | None = None
    flips: dict[str, int] = field(default_factory=dict)
    flips_again: dict[str, int] = field(default_factory=dict)
    margin: float = 0.01
    noise: float = 0.0
    hide_second: bool = False
    next_top: dict[int, float] = field(default_factory=lambda: {0: -0.1})
    loss: Callable[[int], float] | float = 2.5
    losses: dict[int, float] = field(default_factory=dict)
    spoil: Callable[[list[Any]], Any] = keep
    sharpen: float = 0.0
    ends: dict[str, int] = field(default_factory=dict)

    chunk_tokens: int = 1
    delay_s: float = 0.0
    clock: Clock | None = None
    together: int = 0

    counted: bool = True
    gamma: int = 0
    drafts_per_answer: int = 0
    count_drafts: bool = True
    prefix_hits: int = 0
    foreign_tokens: int = 0

    faults: dict[str, str] = field(default_factory=dict)
    die_after: int | None = None
    dies_with: int | None = None
    ids: bool = True
    other_text: bool = False
    shorten: int = 0
    split_bytes: int = 0
    prompt_shift: int = 0

    def find_loss(self, token: int) -> float:
        """Nats that a prompt's token costs."""
        usual = self.loss if isinstance(self.loss, int | float) else self.loss(token)
        return self.losses.get(token, usual)
