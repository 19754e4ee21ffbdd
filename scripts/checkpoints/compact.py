"""`laguna compact`: store only the blocks of the routed experts that a pruning mask keeps.

The base is read tensor by tensor and written file by file; a run that was stopped is continued by the same command.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from laguna_serve.plugins.pruning import ExpertShape, Pruning, read_shape
from laguna_serve.scripts.checkpoints.compaction.base import Base, check_config, read_base
from laguna_serve.scripts.checkpoints.compaction.choice import choose_pruning
from laguna_serve.scripts.checkpoints.compaction.savings import (
    DTYPE_BYTES,
    Savings,
    compute_savings,
    count_parameters,
    format_savings,
)
from laguna_serve.scripts.checkpoints.compaction.shards import (
    Advance,
    Job,
    Shard,
    build_tensors,
    plan_shards,
    tensor_bytes,
)
from laguna_serve.scripts.checkpoints.compaction.verify import TOLERANCE, DifferenceError, verify
from laguna_serve.scripts.checkpoints.compaction.zeroed import copy_zeroed
from laguna_serve.scripts.checkpoints.headers import INDEX, ITEM_BYTES
from laguna_serve.scripts.checkpoints.output import (
    Output,
    begin,
    copy_others,
    open_output,
    write_file,
    write_tensors,
)
from laguna_serve.scripts.checkpoints.tool import run_tool
from laguna_serve.serving.checkpoint import read_config, require_folder
from laguna_serve.serving.kit.cli import FELL_SHORT, HELD, Parser
from laguna_serve.serving.kit.signals import check_signals

SCHEMA = "laguna_serve.compact/1"
ARCHITECTURE = "LagunaSentinelForCausalLM"
EXAMPLES = """examples:
  laguna compact poolside/Laguna-XS.2 --keep-mask group_keep_mask_10pct.npy \\
      --group-indices group_indices_importance_sorted.npy --out xs2-10pct
  laguna compact BASE --random-mask 0.1 --dry-run         what would it save? (needs config.json only)
  laguna compact BASE --random-mask 0.25 --seed 1 --out random-25pct --verify
  laguna compact BASE --keep-mask M --group-indices G --out DIR --zeroed    for engines that know no blocks

`python scripts/score_experts.py` makes the mask and the indices.  Stopped?  The same command continues.
exit status: 0 done, 1 --verify found a difference, 2 it could not run, 130 interrupted
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked for flags that need or exclude each other."""
    parser = Parser(
        prog="laguna compact",
        description="Make a smaller Laguna: of the routed experts only the blocks that a mask keeps are stored.",
        epilog=EXAMPLES,
    )
    parser.add_argument("base", metavar="BASE", help="Laguna checkpoint: a folder, or a hub id in the local cache")
    mask = parser.add_mutually_exclusive_group(required=True)
    mask.add_argument("--keep-mask", type=Path, metavar="M.npy", help="bool [layers, experts, groups]: what stays")
    mask.add_argument("--random-mask", type=float, metavar="RATIO", help="prune this share of the groups at random")
    parser.add_argument("--group-indices", type=Path, metavar="G.npy", help="int64 [layers, experts, groups, atoms]")
    parser.add_argument("--block-size", type=int, metavar="N", help="random mask without indices: atoms in a group")
    parser.add_argument("--seed", type=int, metavar="N", help="of the random mask (default 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the checkpoint")
    parser.add_argument("--zeroed", action="store_true", help="keep the base's layout, with what is pruned at zero")
    parser.add_argument("--verify", action="store_true", help="compare the files written with the masked base")
    parser.add_argument("--dry-run", action="store_true", help="say what would be saved; write nothing")
    args = parser.parse_args(argv)
    if args.keep_mask is not None and args.group_indices is None:
        parser.error("--keep-mask: expected --group-indices beside it, got none; pass the indices of the same scores")
    if args.keep_mask is not None and args.seed is not None:
        parser.error("--seed: expected --random-mask with it, got --keep-mask; leave it out")
    if args.block_size is not None and (args.keep_mask is not None or args.group_indices is not None):
        parser.error("--block-size: expected a random mask without indices, got groups that have a size; leave it out")
    if args.out is None and not args.dry_run:
        parser.error("--out: expected a folder, got none; pass one, or --dry-run to write nothing")
    return args


def write_checkpoint(job: Job, shards: list[Shard], output: Output, source: dict[str, Any]) -> None:
    """Write what is not there yet; config.json and the index come last."""
    sizes = {shard.name: sum(tensor_bytes(job, shard).values()) for shard in shards}
    missing, progress = begin(output, sizes)
    todo = [shard for shard in shards if shard.name in missing]
    for shard in todo:
        progress.label = shard.name
        write_shard(job, shard, output.folder / shard.name, progress.advance)
        output.note(shard.name)
        check_signals()
    progress.finish()
    for name in copy_others(job.base.folder, output):
        output.note(name)
    write_description(job, shards, output, source)
    output.close()


def write_shard(job: Job, shard: Shard, path: Path, advance: Advance) -> None:
    """Write one file of the output."""
    if job.zeroed:
        write_file(path, lambda partial: copy_zeroed(job.base, job.pruning, shard.name, partial, advance))
        return
    with build_tensors(job, shard, advance) as tensors:
        write_tensors(path, tensors)


def write_description(job: Job, shards: list[Shard], output: Output, source: dict[str, Any]) -> None:
    """The index, where the base has one, and config.json."""
    files: dict[str, bytes] = {}
    if job.zeroed:
        for name in (INDEX, "config.json") if job.base.sharded else ("config.json",):
            files[name] = (job.base.folder / name).read_bytes()
    else:
        if job.base.sharded:
            sizes = {name: (shard.name, size) for shard in shards for name, size in tensor_bytes(job, shard).items()}
            total = sum(size for _, size in sizes.values())
            weight_map = {name: sizes[name][0] for name in sorted(sizes)}
            files[INDEX] = _encode({"metadata": {"total_size": total}, "weight_map": weight_map})
        files["config.json"] = _encode(describe_config(job, source))
    for name, content in files.items():
        write_file(output.folder / name, lambda partial, content=content: partial.write_bytes(content))  # type: ignore[misc]
        output.note(name)


def describe_config(job: Job, source: dict[str, Any]) -> dict[str, Any]:
    """The base's config with the architecture and the blocks of the output."""
    described = {
        "block_size": job.pruning.block_size,
        "blocks_per_expert": job.pruning.blocks_per_expert,
        "kept_blocks": job.pruning.kept_blocks,
        "source": {"base": _public_name(job.base.name), **source},
    }
    return {**job.base.config, "architectures": [ARCHITECTURE], "expert_pruning": described}


def _public_name(name: str) -> str:
    """A hub id as it is, of a folder its last part: where it lay is nobody's business."""
    path = Path(name).expanduser()
    return path.resolve().name if path.is_dir() else name


def _encode(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def dry_run(config: dict[str, Any], folder: Path, name: str, pruning: Pruning, shape: ExpertShape) -> Savings:
    """What would be saved, by the config, and by the weights' headers where they are there."""
    if (folder / INDEX).is_file() or (folder / "model.safetensors").is_file():
        return measure_savings(read_base(folder, name), pruning)
    item_bytes = DTYPE_BYTES.get(str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"), 2)
    return compute_savings(count_parameters(config, shape), shape, pruning, item_bytes)


def measure_savings(base: Base, pruning: Pruning) -> Savings:
    """What is saved, counted in the headers; says so when the config tells another story."""
    stored = sum(entry.numel for entry in base.tensors.values())
    expected = count_parameters(base.config, base.shape)
    if stored != expected:
        note = f"the files hold {stored:,} parameters, config.json describes {expected:,}; the files are counted"
        print(f"laguna: note: {base.name}: {note}", file=sys.stderr)
    return compute_savings(stored, base.shape, pruning, ITEM_BYTES[base.dtype])


def run_verify(job: Job, shards: list[Shard], out: Path) -> tuple[dict[str, Any], bool]:
    """Compare, and say how it went: what goes into the result, and whether it held."""

    def say(text: str) -> None:
        check_signals()
        print(f"  {text}", file=sys.stderr)

    try:
        errors = verify(job, shards, out, say)
    except DifferenceError as error:
        print(f"laguna: verify: {error}", file=sys.stderr)
        return {"held": False, "difference": str(error)}, False
    held = all(error <= TOLERANCE for error in errors)  # also false for NaN
    verdict = "held" if held else "FELL SHORT"
    print(f"{'verify':<15} {verdict}: largest relative error {max(errors):.1e}, at most {TOLERANCE:.0e} expected")
    shown = [error if error == error else None for error in errors]
    return {"held": held, "tolerance": TOLERANCE, "max_relative_error": shown}, held


def run(args: argparse.Namespace) -> int:
    """The whole command; the last line of stdout is the result as JSON."""
    folder = require_folder(args.base)
    config = read_config(folder)
    check_config(config, args.base)
    shape = read_shape(config, args.base)
    pruning, source = choose_pruning(
        shape, args.keep_mask, args.group_indices, args.random_mask, args.block_size, args.seed or 0
    )
    mode = "zeroed" if args.zeroed else "compact"
    result: dict[str, Any] = {"schema": SCHEMA, "mode": mode, "base": args.base, "out": str(args.out or "") or None}
    if args.dry_run:
        report_savings(args, dry_run(config, folder, args.base, pruning, shape), result)
        print(json.dumps({**result, "status": "dry run"}))
        return HELD
    job = Job(read_base(folder, args.base), pruning, args.zeroed)
    shards = plan_shards(job)
    decisive = {"base": job.base.fingerprint, "mode": mode, "block_size": pruning.block_size, **source}
    decisive.pop("keep_mask", None)  # the file may have another name by now
    output = open_output(args.out, folder, decisive)
    result["status"] = "already complete" if output.complete else "written"
    savings = measure_savings(job.base, pruning)
    if not output.complete:
        write_checkpoint(job, shards, output, source)
    report_savings(args, savings, result)
    print(f"{'checkpoint':<15} {args.out}: {result['status']}")
    result["verify"], held = run_verify(job, shards, args.out) if args.verify else (None, True)
    print(json.dumps(result))
    return HELD if held else FELL_SHORT


def report_savings(args: argparse.Namespace, savings: Savings, result: dict[str, Any]) -> None:
    """Print what is saved and add it to the result.  The zeroed form saves nothing."""
    if args.zeroed:
        savings = replace(savings, parameters_after=savings.parameters_before, bytes_saved=0)
    print(format_savings(savings))
    result |= asdict(savings)


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(run, parse(argv), "the same command continues from the last finished file")


if __name__ == "__main__":
    sys.exit(main())
