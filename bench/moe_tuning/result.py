"""The result of bench/moe_tuning: a table of tiles with its provenance, schema laguna_serve.moe_tiles/1.

kernels/sentinel_moe/tables.py reads `device` and `rows`; everything else says where they come from.
"""

from __future__ import annotations

from msgspec import Struct

from laguna_serve.serving.kit.environment import Environment


class TileSizes(Struct, frozen=True, kw_only=True):
    """As kernels/sentinel_moe/configs.py describes them."""

    members: int
    block_a: int
    block_h: int
    block_n: int
    block_k: int
    parts: int
    warps: tuple[int, int]
    stages: tuple[int, int]


class Candidate(Struct, frozen=True, kw_only=True):
    """Tiles that compile without spills.

    Attributes:
        registers, shared_bytes: of `gate_up` and of `down`.
        us: µs of a call, of each replay, by number of tokens; empty in a plan.
    """

    tiles: TileSizes
    registers: tuple[int, int]
    shared_bytes: tuple[int, int]
    us: dict[int, list[float]] = {}


class TunedRow(Struct, frozen=True, kw_only=True):
    """A path for a kind of weights: what was chosen, and what it was chosen from, the shipped row first."""

    path: str
    weights: str
    tiles: TileSizes
    candidates: list[Candidate]


class TilesTable(Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.moe_tiles/1"):
    """`device`: its name as torch says it, or the capability that a plan is for; `plan`: nothing was timed."""

    environment: Environment
    device: str
    plan: bool
    rows: list[TunedRow]
