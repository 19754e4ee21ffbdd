"""`laguna compact`: store only the blocks of the routed experts that a pruning mask keeps.

The base is read tensor by tensor and written file by file; a run that was stopped is continued by the same command.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

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
from laguna_serve.scripts.checkpoints.output import open_output
from laguna_serve.scripts.checkpoints.tool import print_outcome, require_out, run_tool
from laguna_serve.serving.checkpoint import CheckpointError, Target, read_config, read_target, require_folder
from laguna_serve.serving.kit.cli import FELL_SHORT, HELD
from laguna_serve.serving.kit.flags import MOST_SEED, Flag, FlagError, check_bounds, read_flags
from laguna_serve.serving.kit.signals import check_signals

DESCRIPTION = "Make a smaller Laguna: of the routed experts only the blocks that a mask keeps are stored."
EXAMPLES = """examples:
  laguna compact poolside/Laguna-XS.2 --keep-mask group_keep_mask_10pct.npy \\
      --group-indices group_indices_importance_sorted.npy --out xs2-10pct
  laguna compact BASE --random-mask 0.1 --dry-run         what would it save? (needs config.json only)
  laguna compact BASE --shares 0,0.1,0.25,0.4 --dry-run   the same for several shares, in one table
  laguna compact BASE --random-mask 0.25 --seed 1 --out random-25pct --verify
  laguna compact BASE --keep-mask M --group-indices G --out DIR --zeroed    for engines that know no blocks
  laguna compact poolside/Laguna-XS.2-FP8 --random-mask 0.25 --dry-run      and beside which context does it fit?
  laguna compact BF16 --keep-mask M --group-indices G --to fp8 --out DIR    experts in FP8, a scale per atom

Bases in bf16, fp16, fp32, or in FP8 as released (compressed-tensors, 128×128 blocks), of which no value is changed.

`python scripts/score_experts.py` makes the mask and the indices.  Stopped?  The same command continues.
exit status: 0 done, 1 --verify found a difference, 2 it could not run, 130 interrupted
"""


@dataclass(frozen=True, kw_only=True)
class CompactConfig:
    """What to make smaller, by which mask, and where to."""

    base: Annotated[
        str, Flag("Laguna checkpoint: a folder, or a hub id in the local cache", metavar="BASE", positional=True)
    ]
    keep_mask: Annotated[
        Path | None, Flag("bool [layers, experts, groups]: what stays; this, or --random-mask", metavar="M.npy")
    ] = None
    random_mask: Annotated[float | None, Flag("prune this share of the groups at random", metavar="RATIO")] = None
    shares: Annotated[
        tuple[float, ...], Flag("with --dry-run: sizes of masks of these shares, in one table", metavar="RATIOS")
    ] = ()
    group_indices: Annotated[Path | None, Flag("int64 [layers, experts, groups, atoms]", metavar="G.npy")] = None
    block_size: Annotated[int | None, Flag("random mask without indices: atoms in a group", metavar="N")] = None
    seed: Annotated[int | None, Flag("of the random mask (default 0)", metavar="N", at_least=0, at_most=MOST_SEED)] = (
        None
    )
    out: Annotated[Path | None, Flag("folder for the checkpoint", metavar="DIR")] = None
    to: Annotated[Literal["fp8"] | None, Flag("round a plain base's experts to FP8, a scale per atom")] = None
    zeroed: Annotated[bool, Flag("keep the base's layout, with what is pruned at zero")] = False
    verify: Annotated[bool, Flag("compare the files written with the masked base")] = False
    dry_run: Annotated[bool, Flag("say what would be saved; write nothing")] = False

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.shares:
            self._check_shares()
            return
        if (self.keep_mask is None) == (self.random_mask is None):
            got = "neither" if self.keep_mask is None else "both"
            raise FlagError(f"--keep-mask or --random-mask: expected one of them, got {got}")
        if self.keep_mask is not None and self.group_indices is None:
            raise FlagError(
                "--keep-mask: expected --group-indices beside it, got none; pass the indices of the same scores"
            )
        if self.keep_mask is not None and self.seed is not None:
            raise FlagError("--seed: expected --random-mask with it, got --keep-mask; leave it out")
        if self.block_size is not None and (self.keep_mask is not None or self.group_indices is not None):
            raise FlagError(
                "--block-size: expected a random mask without indices, got groups that have a size; leave it out"
            )
        if self.zeroed and self.to is not None:
            raise FlagError(f"--zeroed: expected the base's own numbers, got --to {self.to}; leave one of them out")
        require_out(self.out, dry_run=self.dry_run)

    def _check_shares(self) -> None:
        if self.keep_mask is not None or self.random_mask is not None:
            given = "--keep-mask" if self.keep_mask is not None else "--random-mask"
            raise FlagError(f"--shares: expected no other mask, got {given}; leave one of them out")
        if not self.dry_run or self.zeroed:
            raise FlagError("--shares: expected --dry-run and no --zeroed, as it only counts; add or leave them")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    config = read_flags(CompactConfig, argv, prog="laguna compact", description=DESCRIPTION, epilog=EXAMPLES)
    return run_tool(lambda: run(config), "the same command continues from the last finished file")


def run(config: CompactConfig) -> int:
    """Compact and print it. Returns the exit status."""
    if config.shares:
        shares = compare_shares(config)
        print_outcome(format_shares(shares), shares)
        return HELD
    result = compact(config)
    if isinstance(result.verify, Verification) and result.verify.difference is not None:
        print(f"laguna: verify: {result.verify.difference}", file=sys.stderr)
    print_outcome(format_result(result), result)
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
