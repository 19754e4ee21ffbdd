"""The result of bench/swap: `swap.json`, schema laguna_serve.swap/1."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from laguna_serve.bench.stats.quartiles import Quartiles
from laguna_serve.serving.kit.environment import Environment

SituationName = Literal["warm", "cold", "swap", "rested", "woken", "restart"]


class Situation(Struct, frozen=True, kw_only=True):
    """Requests to one model in one situation.

    Attributes:
        ttft_s: seconds from a request to its first token, in the order of asking.
        spread: their median and quartiles.
    """

    name: SituationName
    model: str
    ttft_s: list[float]
    spread: Quartiles


class SwapResult(Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.swap/1"):
    """Time to first token of two models, by what had to be done before.

    Attributes:
        memory_gib: room of the group in which one model makes way for the other.
        sleep_level: of vLLM's, for "woken"; 0 where engines do not sleep.
        rounds: that are in it.
        swap_to_restart: the gateway's swap ÷ a restart by hand, both means over a round's requests, over rounds.
        rest_s: how long an engine had been there before a "rested" swap.
        rested_to_restart: the same of these swaps.
    """

    environment: Environment
    models: tuple[str, str]
    max_tokens: int
    eager: bool
    kv_cache_gib: float
    memory_gib: float
    sleep_level: int
    rounds: int
    situations: list[Situation]
    swap_to_restart: Quartiles
    rest_s: float | UnsetType = UNSET
    rested_to_restart: Quartiles | UnsetType = UNSET
