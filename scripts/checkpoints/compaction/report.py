"""What a compaction reports: sizes before and after, what fits beside them, and whether what was written is right."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from laguna_serve.plugins.formats.experts import FP8
from laguna_serve.scripts.checkpoints.compaction.room import Room, format_room
from laguna_serve.scripts.checkpoints.compaction.rounding import Rounding, format_rounding
from laguna_serve.scripts.checkpoints.compaction.savings import Savings
from laguna_serve.scripts.checkpoints.compaction.verify import TOLERANCE
from laguna_serve.scripts.checkpoints.tool import format_rows
from laguna_serve.serving.kit.tables import Table
from laguna_serve.serving.machine.memory import GIB, MIB


class Verification(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was written against the masked base.

    Attributes:
        difference: the first tensor that is not as it should be; then nothing was computed.
        max_relative_error: of each sparse layer's routed output; None for NaN.
    """

    held: bool
    difference: str | None = None
    tolerance: float | None = None
    max_relative_error: tuple[float | None, ...] | None = None


class CompactResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.compact/1"):
    """What a compaction saved, or would save.

    Attributes:
        format: of the routed experts that are written, plain or fp8.
        bytes_before, bytes_after: of all tensors.
        bytes_saved: by the routed experts.
        expert_bytes, scale_bytes: the routed experts' values, and their scales where they are in FP8.
        held_bytes: the weights in a GPU's memory, where scales are fp32.
        kept_range: the fewest and the most blocks kept of any sparse layer, of `blocks_per_layer`.
        room: what fits beside them on two GPUs; of a dry run alone.
        rounding: what `--to fp8` costs; of what is written.
        verify: None where it was not asked for; absent from a dry run.
    """

    mode: Literal["compact", "zeroed"]
    base: str
    out: str | None
    status: Literal["written", "already complete", "dry run"]
    format: str
    parameters_before: int
    parameters_after: int
    blocks: int
    blocks_pruned: int
    bytes_before: int
    bytes_after: int
    bytes_saved: int
    expert_bytes: int
    scale_bytes: int
    held_bytes: int
    kept_range: tuple[int, int]
    blocks_per_layer: int
    room: tuple[Room, ...] | UnsetType = UNSET
    rounding: Rounding | UnsetType = UNSET
    verify: Verification | UnsetType | None = UNSET

    @property
    def held(self) -> bool:
        """No difference was found, or none was looked for."""
        return not isinstance(self.verify, Verification) or self.verify.held


class CompactShare(msgspec.Struct, frozen=True, kw_only=True):
    """What one share of pruned groups would leave.

    Attributes:
        bytes: on disk; `held_bytes`: in a GPU's memory, where scales are fp32.
        room: what fits beside them on two GPUs.
    """

    share: float
    blocks_pruned: int
    parameters: int
    bytes: int
    held_bytes: int
    room: tuple[Room, ...]


class CompactShares(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.compact_shares/1"):
    """Sizes by share of pruned groups, the same for any mask of so many groups; `released`: of the base as it is."""

    base: str
    format: str
    blocks: int
    released_bytes: int
    shares: tuple[CompactShare, ...]


def describe_share(share: float, savings: Savings, room: tuple[Room, ...]) -> CompactShare:
    """Describe a share by what it would save."""
    return CompactShare(
        share=share,
        blocks_pruned=savings.blocks_pruned,
        parameters=savings.parameters_after,
        bytes=savings.bytes_after,
        held_bytes=savings.held_bytes,
        room=room,
    )


def format_result(result: CompactResult) -> str:
    """Format the result as rows for people."""
    before, after = result.parameters_before, result.parameters_after
    low, high = result.kept_range
    rows = [
        ("parameters", f"{before:,} → {after:,} ({(after - before) / before:+.2%})"),
        ("blocks pruned", f"{result.blocks_pruned:,} of {result.blocks:,}"),
        ("saved", _size(result.bytes_saved)),
        ("kept per layer", f"{low:,} to {high:,} of {result.blocks_per_layer:,} blocks"),
        ("on disk", f"{_size(result.bytes_before)} → {_size(result.bytes_after)}"),
        ("experts", f"{_size(result.expert_bytes)}{_format_scales(result)}"),
    ]
    if not isinstance(result.room, UnsetType):
        rows.append(("on a GPU", _size(result.held_bytes)))
        rows += [("", f"{room.device}: {format_room(room)}") for room in result.room]
    if result.status != "dry run":
        rows.append(("checkpoint", f"{result.out}: {result.status}"))
    if not isinstance(result.rounding, UnsetType):
        rows.append(("rounding", format_rounding(result.rounding)))
    if isinstance(result.verify, Verification) and result.verify.max_relative_error is not None:
        errors = result.verify.max_relative_error
        largest = "NaN" if None in errors else f"{max(e for e in errors if e is not None):.1e}"
        verdict = "held" if result.verify.held else "FELL SHORT"
        rows.append(("verify", f"{verdict}: largest relative error {largest}, at most {TOLERANCE:.0e} expected"))
    return format_rows(rows)


def _format_scales(result: CompactResult) -> str:
    return f" in FP8 and {_size(result.scale_bytes)} of scales" if result.format == FP8 else ""


def _size(size: int) -> str:
    return f"{size / GIB:.3f} GiB" if size >= GIB else f"{size / MIB:.3f} MiB"


def format_shares(result: CompactShares) -> str:
    """Format a Markdown table: a row per share."""
    devices = [room.device for room in result.shares[0].room]
    context = result.shares[0].room[0].context
    heads = ["pruned", "parameters", "on disk, GiB", "on a GPU, GiB"]
    heads += [f"{context:,}-token sequences on {device}" for device in devices]
    rows = [
        [
            f"{row.share:.0%}",
            f"{row.parameters:,}",
            f"{row.bytes / GIB:.1f}",
            f"{row.held_bytes / GIB:.1f}",
            *(str(room.sequences) if room.longest else "too small" for room in row.room),
        ]
        for row in result.shares
    ]
    released = f"as released {result.released_bytes / GIB:.1f} GiB on disk; compact, experts in {result.format}:"
    return f"{result.base}: {released}\n\n{Table('l' + 'r' * (len(heads) - 1), heads, rows).to_markdown()}"
