"""`laguna quantise`: a Laguna in FP8 as it is released, or one in FP8 in plain numbers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from laguna_serve.scripts.checkpoints.mirrored import Status, write_mirrored
from laguna_serve.scripts.checkpoints.requantised import read_numbers
from laguna_serve.scripts.checkpoints.tool import format_rows, print_outcome, require_out, run_tool
from laguna_serve.serving.checkpoint import require_folder
from laguna_serve.serving.kit.cli import HELD
from laguna_serve.serving.kit.flags import Flag, read_flags

DESCRIPTION = (
    "Store a Laguna's feed-forward layers in FP8 as the releases have them, or dequantise those of one in FP8."
)
JOURNAL = "quantise.json"
EXAMPLES = """examples:
  laguna quantise tests/toy/teacher --to fp8 --out out/teacher-fp8     128×128 blocks, compressed-tensors
  laguna quantise poolside/Laguna-XS.2-FP8 --to bf16 --out xs2-bf16    for a device without FP8
  laguna quantise out/teacher-fp8 --to fp32 --out out/exact            every FP8 value times its scale, exactly

`laguna compact --to fp8` is for experts alone, with a scale per atom.  Stopped?  The same command continues.
exit status: 0 done, 2 it could not run, 130 interrupted
"""


@dataclass(frozen=True, kw_only=True)
class QuantiseConfig:
    """A checkpoint to store in other numbers."""

    source: Annotated[
        str, Flag("Laguna checkpoint: a folder, or a hub id in the local cache", metavar="IN", positional=True)
    ]
    to: Annotated[Literal["fp8", "bf16", "fp32"], Flag("the numbers that are wanted")]
    out: Annotated[Path | None, Flag("folder for the checkpoint", metavar="DIR")] = None
    dry_run: Annotated[bool, Flag("say how large it becomes; write nothing")] = False

    def __post_init__(self) -> None:
        require_out(self.out, dry_run=self.dry_run)


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
    config = read_flags(QuantiseConfig, argv, prog="laguna quantise", description=DESCRIPTION, epilog=EXAMPLES)

    def run() -> int:
        result = quantise(config)
        print_outcome(format_result(result), result)
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
