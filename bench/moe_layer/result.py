"""The result of bench/moe.py: `moe.json`, schema laguna_serve.moe/1."""

from __future__ import annotations

from msgspec import UNSET, Struct, UnsetType

from laguna_serve.serving.kit.environment import Environment

Interval = tuple[float, float]


class LayerSettings(Struct, frozen=True, kw_only=True):
    """The layer, and where it ran: `device` is a GPU's name or "cpu", `path` the instructions that a CPU's op used.

    `clock` is "wall", or "processor" where one thread's processor time was taken; None, in older files, is "wall".
    """

    device: str
    threads: int
    experts: int
    hidden: int
    intermediate: int
    block: int
    topk: int
    dtype: str
    seed: int
    path: str | None = None
    clock: str | None = None


class MoeRow(Struct, frozen=True, kw_only=True):
    """One number of tokens, share of pruned blocks and routing.

    Attributes:
        weights: "full" for the layer's dtype, "fp8" for e4m3 with scales; None, in older files, is "full".
        us: median of a call; `us_p10_p90`: its deciles.
        floor_us: on a CPU the median time of reading the same bytes, in turn with the calls, and `percent_of_floor` the
            median ratio of the two; on a GPU, and in older files, its `bytes` at the floor's bandwidth.
        error: against the reference, relative; None where it is not finite.
        refused: why there is no time; then the others are unset.
        ratio: time ÷ that of vLLM's kernel (`stock_us`, always with weights of the layer's dtype), None where that was
            not measured.
    """

    tokens: int
    pruning: float
    routing: str
    weights: str | None = None
    effective_experts: float
    us: float | UnsetType = UNSET
    us_p10_p90: Interval | UnsetType = UNSET
    bytes: float | UnsetType = UNSET
    gb_s: float | UnsetType = UNSET
    floor_us: float | UnsetType = UNSET
    percent_of_floor: float | UnsetType = UNSET
    error: float | None
    refused: str | None
    distinct_experts: float | UnsetType = UNSET
    stock_us: float | UnsetType | None = UNSET
    ratio: float | UnsetType | None = UNSET
    ratio_ci95: Interval | UnsetType | None = UNSET

    @property
    def kind(self) -> str:
        """What the weights were."""
        return self.weights or "full"

    @property
    def key(self) -> tuple[float, bool, int, bool]:
        """What tells it from other rows, in the order in which these are listed by default."""
        return self.pruning, self.routing != "uniform", self.tokens, self.kind != "full"

    @property
    def name(self) -> str:
        """The row's label in tables and figures."""
        kind = "" if self.kind == "full" else f", {self.kind}"
        return f"{self.routing}, {self.tokens} tokens, {self.pruning:.0%} pruned{kind}"


class MoeResult(Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.moe/1"):
    """The sentinel MoE kernel against the bandwidth floor and vLLM's fused MoE.

    Attributes:
        bandwidth_gb_s: of a copy, on a CPU of a sum ("read"), and the better of them ("floor").
        stock: which kernel of vLLM's it was held against, or why none.
        refused: of the rows without a time, what was wrong.
        partial: the run was interrupted.
    """

    environment: Environment
    settings: LayerSettings
    bandwidth_gb_s: dict[str, float]
    stock: str
    rows: list[MoeRow]
    refused: list[str]
    partial: bool
