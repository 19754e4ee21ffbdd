"""`laguna compact`: store only the blocks of the routed experts that a pruning mask keeps.

The base is read tensor by tensor and written file by file; a run that was stopped is continued by the same command.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from msgspec import UNSET, UnsetType

from laguna_serve.plugins.formats.experts import find_unserved
from laguna_serve.plugins.pruning import ExpertShape, Pruning, read_shape
from laguna_serve.scripts.checkpoints.compaction.base import check_config, read_base
from laguna_serve.scripts.checkpoints.compaction.choice import choose_pruning
from laguna_serve.scripts.checkpoints.compaction.report import (
    CompactResult,
    CompactShares,
    Verification,
    describe_share,
    format_result,
    format_shares,
)
from laguna_serve.scripts.checkpoints.compaction.room import Room, find_room
from laguna_serve.scripts.checkpoints.compaction.rounding import Rounding, measure_rounding
from laguna_serve.scripts.checkpoints.compaction.savings import (
    Savings,
    count_parameters,
    cut_target,
    estimate_savings,
    measure_savings,
)
from laguna_serve.scripts.checkpoints.compaction.shards import Compaction, Shard, plan_shards
from laguna_serve.scripts.checkpoints.compaction.verify import TOLERANCE, DifferenceError, verify
from laguna_serve.scripts.checkpoints.compaction.writing import write_checkpoint
from laguna_serve.scripts.checkpoints.headers import INDEX, count_stored
from laguna_serve.scripts.checkpoints.options import CompactConfig, read_compact
from laguna_serve.scripts.checkpoints.output import open_output
from laguna_serve.scripts.checkpoints.tool import run_tool
from laguna_serve.serving.checkpoint import CheckpointError, Target, read_config, read_target, require_folder
from laguna_serve.serving.kit.cli import FELL_SHORT, HELD, print_result
from laguna_serve.serving.kit.results import to_json
from laguna_serve.serving.kit.signals import check_signals

__all__ = ["CompactConfig", "CompactResult", "compact", "compare_shares", "execute", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return execute(*read_compact(argv))


def execute(config: CompactConfig, always_json: bool) -> int:
    """Compact; return the exit status."""
    return run_tool(lambda: run(config, always_json), "the same command continues from the last finished file")


def run(config: CompactConfig, always_json: bool) -> int:
    """Compact and print it. Returns the exit status."""
    if config.shares:
        shares = compare_shares(config)
        print_result(format_shares(shares), to_json(shares), None, always_json=always_json)
        return HELD
    result = compact(config)
    if isinstance(result.verify, Verification) and result.verify.difference is not None:
        print(f"laguna: verify: {result.verify.difference}", file=sys.stderr)
    print_result(format_result(result), to_json(result), None, always_json=always_json)
    return HELD if result.held else FELL_SHORT


def compact(config: CompactConfig) -> CompactResult:
    """Write the smaller checkpoint, or continue to, or work out what it would save.

    Raises:
        CheckpointError, PruningError: base, mask or output folder cannot be used.
        KeyboardInterrupt: a signal came; the same configuration continues.
    """
    folder, shape, target, stored = open_config(config)
    pruning, source = choose_pruning(
        shape, config.keep_mask, config.group_indices, config.random_mask, config.block_size, config.seed or 0
    )
    if config.dry_run or config.out is None:
        savings = foresee(config, folder, target, pruning, shape, stored)
        pruned = target if config.zeroed else cut_target(target, pruning, stored)
        _note_unserved(config, pruning, target)
        return _report(config, "dry run", savings, room=find_room(pruned))
    job = Compaction(read_base(folder, config.base), pruning, config.zeroed, stored)
    shards = plan_shards(job)
    decisive = {"base": job.base.fingerprint, "mode": _mode(config), "block_size": pruning.block_size, **source}
    decisive.pop("keep_mask", None)  # the file may have another name by now
    output = open_output(config.out, folder, decisive if config.to is None else {**decisive, "to": config.to})
    was_complete = output.complete
    savings = measure(job, target)
    if not was_complete:
        write_checkpoint(
            job, shards, output, source if config.to is None else {**source, "rounded_from": job.base.dtype}
        )
    rounding = measure_rounding(job) if job.rounds else UNSET
    verification = run_verify(job, shards, config.out) if config.verify else None
    _note_unserved(config, pruning, target)
    return _report(config, "already complete" if was_complete else "written", savings, verification, rounding=rounding)


def _note_unserved(config: CompactConfig, pruning: Pruning, target: Target) -> None:
    """Say what keeps our kernels from the result; last, as an error is one line alone."""
    reason = find_unserved(pruning.block_size, target.hidden_size, target.experts_per_token)
    if reason is not None and not config.zeroed:
        print(f"laguna: note: {config.base}: what was cut from it cannot be served: {reason}", file=sys.stderr)


def open_config(config: CompactConfig) -> tuple[Path, ExpertShape, Target, str]:
    """Read the base's config: its folder, experts and sizes, and the format that the output's experts have."""
    folder = require_folder(config.base, config_alone=config.dry_run)
    described = read_config(folder)
    stored = check_config(described, config.base)
    if stored == config.to:
        raise CheckpointError(f"{config.base}: expected plain weights for --to {config.to}, got FP8; leave --to out")
    return folder, read_shape(described, config.base), read_target(folder), config.to or stored


def compare_shares(config: CompactConfig) -> CompactShares:
    """Work out what every share would leave; nothing is written. Raises as `compact`."""
    folder, shape, target, stored = open_config(config)
    rows, found = [], None
    for share in config.shares:
        indices, size = config.group_indices, config.block_size
        pruning, _ = choose_pruning(shape, None, indices, share, size, config.seed or 0)
        found = foresee(config, folder, target, pruning, shape, stored)
        rows.append(describe_share(share, found, find_room(cut_target(target, pruning, stored))))
    assert found is not None
    return CompactShares(
        base=config.base, format=stored, blocks=found.blocks, released_bytes=found.bytes_before, shares=tuple(rows)
    )


def _report(
    config: CompactConfig,
    status: Literal["written", "already complete", "dry run"],
    savings: Savings,
    verification: Verification | UnsetType | None = UNSET,
    *,
    room: tuple[Room, ...] | UnsetType = UNSET,
    rounding: Rounding | UnsetType = UNSET,
) -> CompactResult:
    return CompactResult(
        mode=_mode(config),
        base=config.base,
        out=None if config.out is None else str(config.out),
        status=status,
        **asdict(savings),
        room=room,
        rounding=rounding,
        verify=verification,
    )


def _mode(config: CompactConfig) -> Literal["compact", "zeroed"]:
    return "zeroed" if config.zeroed else "compact"


def foresee(
    config: CompactConfig, folder: Path, target: Target, pruning: Pruning, shape: ExpertShape, stored: str
) -> Savings:
    """Estimate what would be saved, by the config, and by the weights' headers where they are there."""
    if (folder / INDEX).is_file() or (folder / "model.safetensors").is_file():
        return measure(Compaction(read_base(folder, config.base), pruning, config.zeroed, stored), target)
    parameters = count_parameters(read_config(folder), shape)
    return estimate_savings(target, pruning, stored, parameters, shape, zeroed=config.zeroed)


def measure(job: Compaction, target: Target) -> Savings:
    """Measure what is saved, counted in the headers; says so when the config describes another number."""
    stored, expected = count_stored(job.base.tensors), count_parameters(job.base.config, job.base.shape)
    if stored != expected:
        note = f"the files hold {stored:,} parameters, config.json describes {expected:,}; the files are counted"
        print(f"laguna: note: {job.base.name}: {note}", file=sys.stderr)
    return measure_savings(job, target)


def run_verify(job: Compaction, shards: list[Shard], out: Path) -> Verification:
    """Compare what was written with the masked base; progress on stderr."""

    def say(text: str) -> None:
        check_signals()
        print(f"  {text}", file=sys.stderr)

    try:
        errors = verify(job, shards, out, say)
    except DifferenceError as error:
        return Verification(held=False, difference=str(error))
    return Verification(
        held=all(error <= TOLERANCE for error in errors),  # also false for NaN
        tolerance=TOLERANCE,
        max_relative_error=tuple(error if error == error else None for error in errors),
    )


if __name__ == "__main__":
    sys.exit(main())
