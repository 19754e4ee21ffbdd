"""`laguna unpad` stores a dense Laguna at its true widths, without the zeros that fill its layers up.

`laguna pad` is the way back.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from laguna_serve.plugins.layers import PaddingError
from laguna_serve.scripts.checkpoints.mirrored import Status, write_mirrored
from laguna_serve.scripts.checkpoints.options import WidthsConfig, read_widths
from laguna_serve.scripts.checkpoints.tool import format_rows, run_tool
from laguna_serve.scripts.checkpoints.width_checks import compare, count_negative_zeros
from laguna_serve.scripts.checkpoints.widths import WidthsSource, read_padded, read_unpadded
from laguna_serve.serving.checkpoint import require_folder
from laguna_serve.serving.kit.cli import FELL_SHORT, HELD, print_result
from laguna_serve.serving.kit.results import JsonObject, to_json
from laguna_serve.serving.machine.memory import GIB, MIB

__all__ = ["PadResult", "UnpadResult", "WidthsConfig", "WidthsResult", "execute", "main", "pad", "unpad"]


class WidthsResult(msgspec.Struct, frozen=True, kw_only=True):
    """What changed, or would.

    Attributes:
        widths: of each layer, of `stored_width` units in the padded form.
        whole_layers: kept whole, as a unit of theirs is zero in part only.
        negative_zeros: of the padding, which `laguna pad` gives back as +0.
        read_s: what reading the source took, with the search for padding.
        verified: every tensor is the source's, bit for bit; absent where it was not asked for.
    """

    source: str
    out: str | None
    parameters_before: int
    parameters_after: int
    bytes_saved: int
    widths: tuple[int, ...]
    stored_width: int
    whole_layers: tuple[int, ...]
    negative_zeros: int
    read_s: float
    status: Status
    verified: bool | UnsetType = UNSET


class UnpadResult(WidthsResult, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.unpad/1"):
    """A dense checkpoint at its layers' true widths."""


class PadResult(WidthsResult, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.pad/1"):
    """A dense checkpoint in its stock layout."""


def main(argv: Sequence[str] | None = None, tool: Literal["unpad", "pad"] = "unpad") -> int:
    """Run the command line of either tool; return the exit status."""
    return execute(*read_widths(argv, tool), tool)


def execute(config: WidthsConfig, always_json: bool, tool: Literal["unpad", "pad"]) -> int:
    """Use either tool; return the exit status."""
    return run_tool(lambda: run(config, always_json, tool), "the same command continues from the last finished file")


def run(config: WidthsConfig, always_json: bool, tool: Literal["unpad", "pad"]) -> int:
    """Either tool, printed. Returns the exit status."""
    result = unpad(config) if tool == "unpad" else pad(config)
    print_result(format_result(result), to_json(result), None, always_json=always_json)
    return FELL_SHORT if result.verified is False else HELD


def unpad(config: WidthsConfig) -> UnpadResult:
    """Store a checkpoint without its padding, or continue to.

    Raises:
        CheckpointError, PaddingError: the source or the output folder cannot be used.
        KeyboardInterrupt: a signal came; the same configuration continues.
    """
    folder, started = require_folder(config.source), time.monotonic()
    source = read_padded(folder, config.source)
    return UnpadResult(**_convert(config, folder, source, "unpad", time.monotonic() - started))


def pad(config: WidthsConfig) -> PadResult:
    """Store a checkpoint with its padding, or continue to. Raises as `unpad`."""
    folder, started = require_folder(config.source), time.monotonic()
    source = read_unpadded(folder, config.source)
    return PadResult(**_convert(config, folder, source, "pad", time.monotonic() - started))


def _convert(config: WidthsConfig, folder: Path, source: WidthsSource, tool: str, read_s: float) -> JsonObject:
    """Write what is not there yet; return the fields of a WidthsResult."""
    status = write_mirrored(source, config.out, {"tool": tool}, f"{tool}.json", dry_run=config.dry_run)
    verified: bool | UnsetType = UNSET
    if config.out is not None and not config.dry_run and config.verify:
        verified = is_equal(source, config.out)
    before = sum(entry.num_bytes for entry in source.tensors.values())
    return {
        "source": config.source,
        "out": None if config.out is None else str(config.out),
        "parameters_before": source.parameters(changed=False),
        "parameters_after": source.parameters(changed=True),
        "bytes_saved": before - sum(map(source.size, source.files)),
        "widths": tuple(source.units[layer].width for layer in sorted(source.units)),
        "stored_width": next(iter(source.units.values())).stored,
        "whole_layers": _list_whole_layers(source),
        "negative_zeros": _count_negative_zeros(source),
        "read_s": round(read_s, 2),
        "status": status,
        "verified": verified,
    }


def is_equal(source: WidthsSource, out: Path) -> bool:
    """Whether every tensor that was written is the source's; what is not is named on stderr."""
    try:
        compare(source, out)
    except PaddingError as error:
        print(f"laguna: verify: {error}", file=sys.stderr)
        return False
    return True


def _list_whole_layers(source: WidthsSource) -> tuple[int, ...]:
    broken = {layer: units.broken for layer, units in source.units.items() if units.broken is not None}
    for layer, unit in broken.items():
        print(f"laguna: note: layer {layer} is kept whole: unit {unit} is zero in part only", file=sys.stderr)
    return tuple(sorted(broken))


def _count_negative_zeros(source: WidthsSource) -> int:
    negative = count_negative_zeros(source) if source.unpads else 0
    if negative:
        print(f"laguna: note: {negative:,} zeros of the padding are −0; `laguna pad` gives +0", file=sys.stderr)
    return negative


def format_result(result: WidthsResult) -> str:
    """Format the result as rows for people."""
    before, after = result.parameters_before, result.parameters_after
    saved, unpads = abs(result.bytes_saved), isinstance(result, UnpadResult)
    rows = [
        ("layers", f"{_format_widths(result.widths)} of {result.stored_width} units"),
        ("parameters", f"{before:,} → {after:,} ({(after - before) / before:+.2%})"),
        (
            "saved" if unpads else "added",
            f"{saved / GIB:.3f} GiB" if saved >= GIB else f"{saved / MIB:.2f} MiB",
        ),
    ]
    if unpads:
        rows.append(("found in", f"{result.read_s} s"))
    if result.status != "dry run":
        rows.append(("checkpoint", f"{result.out}: {result.status}"))
    if result.verified is True:
        rows.append(("verify", "held: every tensor is the source's, bit for bit"))
    return format_rows(rows)


def _format_widths(widths: Sequence[int]) -> str:
    """Layers of one width in one range."""
    parts = []
    for width, run in groupby(enumerate(widths), key=lambda item: item[1]):
        layers = [layer for layer, _ in run]
        parts.append(f"{layers[0] if len(layers) == 1 else f'{layers[0]}–{layers[-1]}'}: {width}")
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
