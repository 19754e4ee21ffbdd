"""Writes a compact checkpoint file by file; config.json and the index come last."""

from __future__ import annotations

from pathlib import Path

from laguna_serve.scripts.checkpoints.compaction.shards import Advance, Compaction, Shard, build_tensors, tensor_bytes
from laguna_serve.scripts.checkpoints.compaction.zeroed import copy_zeroed
from laguna_serve.scripts.checkpoints.headers import INDEX
from laguna_serve.scripts.checkpoints.output import Output, write_described, write_file, write_files, write_tensors
from laguna_serve.serving.checkpoint import ConfigJson, name_checkpoint
from laguna_serve.serving.kit.results import JsonObject

ARCHITECTURE = "LagunaSentinelForCausalLM"


def write_checkpoint(job: Compaction, shards: list[Shard], output: Output, source: JsonObject) -> None:
    """Write what is not there yet; config.json and the index come last."""
    sizes = {shard.name: sum(tensor_bytes(job, shard).values()) for shard in shards}
    by_name = {shard.name: shard for shard in shards}

    def write(name: str, path: Path, advance: Advance) -> None:
        write_shard(job, by_name[name], path, advance)

    with write_files(output, job.base.folder, sizes, write):
        write_description(job, shards, output, source)


def write_shard(job: Compaction, shard: Shard, path: Path, advance: Advance) -> None:
    """Write one file of the output."""
    if job.zeroed:
        write_file(path, lambda partial: copy_zeroed(job.base, job.pruning, shard.name, partial, advance))
        return
    with build_tensors(job, shard, advance) as tensors:
        write_tensors(path, tensors)


def write_description(job: Compaction, shards: list[Shard], output: Output, source: JsonObject) -> None:
    """Write the index, where the base has one, and config.json."""
    if job.zeroed:
        for name in (INDEX, "config.json") if job.base.sharded else ("config.json",):
            write_described(output, name, (job.base.folder / name).read_bytes())
        return
    if job.base.sharded:
        sizes = {name: (shard.name, size) for shard in shards for name, size in tensor_bytes(job, shard).items()}
        total = sum(size for _, size in sizes.values())
        weight_map = {name: sizes[name][0] for name in sorted(sizes)}
        write_described(output, INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_described(output, "config.json", describe_config(job, source))


def describe_config(job: Compaction, source: JsonObject) -> ConfigJson:
    """Describe the base's config with the architecture and the blocks of the output."""
    described = {
        "format": job.format,
        "block_size": job.pruning.block_size,
        "blocks_per_expert": job.pruning.blocks_per_expert,
        "kept_blocks": job.pruning.kept_blocks,
        "source": {"base": name_checkpoint(job.base.name), **source},
    }
    return {**job.base.config, "architectures": [ARCHITECTURE], "expert_pruning": described}
