"""`laguna quantise`: a Laguna in FP8 as it is released, or one in FP8 in plain numbers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal

import msgspec

from laguna_serve.scripts.checkpoints.mirrored import Status, write_mirrored
from laguna_serve.scripts.checkpoints.options import QuantiseConfig, read_quantise
from laguna_serve.scripts.checkpoints.requantised import read_numbers
from laguna_serve.scripts.checkpoints.tool import format_rows, run_tool
from laguna_serve.serving.checkpoint import require_folder
from laguna_serve.serving.kit.cli import HELD, print_result
from laguna_serve.serving.kit.results import to_json

__all__ = ["QuantiseConfig", "QuantiseResult", "execute", "main", "quantise"]

JOURNAL = "quantise.json"


class QuantiseResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.quantise/1"):
    """What was stored in other numbers, or would be; bytes are those of all tensors."""

    source: str
    to: Literal["fp8", "bf16", "fp32"]
    out: str | None
    status: Status
    bytes_before: int
    bytes_after: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status."""
    return execute(*read_quantise(argv))


def execute(config: QuantiseConfig, always_json: bool) -> int:
    """Store the checkpoint in other numbers; return the exit status."""

    def run() -> int:
        result = quantise(config)
        print_result(format_result(result), to_json(result), None, always_json=always_json)
        return HELD

    return run_tool(run, "the same command continues from the last finished file")


def quantise(config: QuantiseConfig) -> QuantiseResult:
    """Store a checkpoint in other numbers, or continue to.

    Raises:
        CheckpointError, ExpertFormatError: the source or the output folder cannot be used.
        KeyboardInterrupt: a signal came; the same configuration continues.
    """
    folder = require_folder(config.source)
    source = read_numbers(folder, config.source, config.to)
    status = write_mirrored(source, config.out, {"to": config.to}, JOURNAL, dry_run=config.dry_run)
    return QuantiseResult(
        source=config.source,
        to=config.to,
        out=None if config.out is None else str(config.out),
        status=status,
        bytes_before=sum(entry.num_bytes for entry in source.tensors.values()),
        bytes_after=sum(map(source.size, source.files)),
    )


def format_result(result: QuantiseResult) -> str:
    """Format the result as rows for people."""
    rows = [("on disk", f"{result.bytes_before / 2**20:,.1f} → {result.bytes_after / 2**20:,.1f} MiB")]
    if result.status != "dry run":
        rows.append(("checkpoint", f"{result.out}: {result.status}"))
    return format_rows(rows)


if __name__ == "__main__":
    sys.exit(main())
