"""Weights that are missing, cut off or not to be read: one line each, before anything is started."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.checkpoint.stored.weight_files import INDEX, count_values, measure_weights, require_weights
from laguna_serve.serving.cli import main

SHARD = "model-00001-of-00002.safetensors"
OTHER = "model-00002-of-00002.safetensors"
Fault = Callable[[Path], object]


@pytest.fixture
def sharded(target: Path) -> Path:
    """A checkpoint of two shards with their index."""
    (target / "model.safetensors").unlink()
    save_file({"a": np.zeros(8, np.float16)}, target / SHARD)
    save_file({"b": np.zeros(4, np.float16)}, target / OTHER)
    (target / INDEX).write_text(json.dumps({"weight_map": {"a": SHARD, "b": OTHER, "c": OTHER}}), encoding="utf-8")
    return target


def dangle(shard: Path) -> None:
    shard.unlink()
    shard.symlink_to("../../blobs/0123")


def cut(shard: Path, size: int) -> None:
    shard.write_bytes(shard.read_bytes()[:size])


def fill(shard: Path, data: bytes) -> None:
    shard.write_bytes(data)


def replace_by_folder(shard: Path) -> None:
    shard.unlink()
    shard.mkdir()


def write_index(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text, encoding="utf-8")


FAULTS: dict[str, tuple[Fault, str]] = {
    "dangling-link": (lambda f: dangle(f / SHARD), f"{SHARD}: expected weights, got a link to ../../blobs/0123, which"),
    "missing-shard": (lambda f: (f / OTHER).unlink(), f"expected {OTHER}, which {INDEX} names, got no such file"),
    "empty": (lambda f: fill(f / SHARD, b""), f"{SHARD}: expected a whole safetensors file, got one of 0 bytes"),
    "cut-in-header": (lambda f: cut(f / SHARD, 20), "got one cut off in its header, or another format"),
    "cut-in-data": (lambda f: cut(f / SHARD, -3), r"of \d+ bytes, as its header says, got \d+; fetch it again"),
    "too-long": (lambda f: fill(f / SHARD, (f / SHARD).read_bytes() + b"!"), "as its header says, got"),
    "html": (lambda f: fill(f / SHARD, b"<!doctype html><p>404"), "or another format"),
    "lfs-pointer": (lambda f: fill(f / SHARD, b"version https://git-lfs.github.com/spec/v1\n"), "or another format"),
    "header-no-json": (lambda f: fill(f / SHARD, b"\x04" + bytes(7) + b"abcd"), "got one whose header is no such JSON"),
    "header-no-object": (lambda f: fill(f / SHARD, b"\x02" + bytes(7) + b"[]"), "whose header is no such JSON"),
    "shard-is-a-folder": (lambda f: replace_by_folder(f / SHARD), f"{SHARD}: expected weights, got a folder"),
    "index-no-json": (lambda f: write_index(f, "{"), f"{INDEX}: expected JSON with a weight_map, got something else"),
    "index-no-map": (lambda f: write_index(f, '{"weight_map": [1]}'), "expected JSON with a weight_map"),
    "no-weights": (lambda f: [p.unlink() for p in (f / SHARD, f / OTHER, f / INDEX)], "expected weights .*, got none"),
    "config-is-a-folder": (lambda f: replace_by_folder(f / "config.json"), "config.json: expected JSON, got"),
}


def test_whole_checkpoint_passes(sharded: Path) -> None:
    require_weights(sharded, complete=True)
    assert measure_weights(sharded) == sum((sharded / name).stat().st_size for name in (SHARD, OTHER))


def test_checkpoint_of_which_a_part_was_fetched_has_no_measure_yet(sharded: Path) -> None:
    """It is planned by its config, not by the shard that is there."""
    (sharded / OTHER).unlink()
    assert measure_weights(sharded) == 0


@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("options", [[], ["--no-gateway"]], ids=["gateway", "bare"])
def test_faulty_checkpoint_is_refused_in_one_line(
    fake_vllm: Path, sharded: Path, capfd: pytest.CaptureFixture[str], fault: Fault, message: str, options: list[str]
) -> None:
    fault(sharded)
    assert main(["serve", str(sharded), "--port", "0", *options]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert re.search(message, err), err
    assert not fake_vllm.exists(), "an engine was started"


def test_drafters_weights_are_checked_too(
    fake_vllm: Path, target: Path, drafter: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dangle(drafter / "model.safetensors")
    assert main(["serve", str(target), "--draft", str(drafter), "--port", "0"]) == 2
    assert len(capfd.readouterr().err.splitlines()) == 1
    assert not fake_vllm.exists()


def test_snapshot_of_a_hub_id_may_be_incomplete(sharded: Path) -> None:
    """vLLM fetches what is missing."""
    (sharded / OTHER).unlink()
    require_weights(sharded, complete=False)
    with pytest.raises(CheckpointError, match="names, got no such file"):
        require_weights(sharded, complete=True)


def test_other_formats_are_left_to_vllm(target: Path) -> None:
    (target / "model.safetensors").unlink()
    (target / "pytorch_model.bin").write_bytes(b"")
    require_weights(target, complete=True)


UNREADABLE = """
import os, sys
from pathlib import Path
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.checkpoint.stored.weight_files import require_weights
if os.geteuid() == 0:
    os.seteuid(65534)
try:
    require_weights(Path(sys.argv[1]), complete=True)
except CheckpointError as error:
    print(error)
"""


@pytest.mark.parametrize("what", ["file", "folder"])
def test_permissions_are_told(tmp_path: Path, what: str) -> None:
    """As another user than root, who may read everything."""
    for above in (tmp_path, *tmp_path.parents):
        if above.stat().st_uid == os.geteuid() and above != Path("/"):
            above.chmod(above.stat().st_mode | 0o055)
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": np.zeros(8, np.float16)}, folder / SHARD)
    denied = folder / SHARD if what == "file" else folder
    denied.chmod(0)
    try:
        command = [sys.executable, "-c", UNREADABLE, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    finally:
        denied.chmod(0o700)
    assert "Permission denied" in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_weights_that_are_there_twice_count_once(tmp_path: Path) -> None:
    """Mistral's releases have them under its own names as well."""
    save_file({"w": np.zeros(10, np.float32)}, tmp_path / "consolidated-00001-of-00001.safetensors")
    assert count_values(tmp_path) == 10
    save_file({"w": np.zeros(12, np.float32)}, tmp_path / "model-00001-of-00001.safetensors")
    assert count_values(tmp_path) == 12


def test_scales_of_blocks_are_no_parameters(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {"w2_blocks": torch.zeros(3, 4, 128).to(torch.float8_e4m3fn), "w2_scales": torch.ones(3, 4, 1)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert count_values(tmp_path) == 3 * 4 * 128
