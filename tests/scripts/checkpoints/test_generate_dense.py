"""Random dense checkpoints: complete, padded as asked, and loadable."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compact_cases import read_tensors
from safetensors.torch import load_file
from warm import run_warm

from laguna_serve.plugins.padding import scan_layers

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
DENSE = ROOT / "tests" / "toy" / "dense"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_warm(ROOT / "scripts" / "generate_dense.py", *map(str, arguments))


def test_checkpoint_has_the_students_shapes_and_widths(tmp_path: Path) -> None:
    flags = ["--width", "1-2=640", "--width", "3=13", "--seed", "4"]
    done = run(DENSE, "--out", tmp_path / "a", *flags)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["widths"] == [672, 640, 640, 13, 672, 672]
    made, toy = read_tensors(tmp_path / "a"), load_file(DENSE / "model.safetensors")
    assert {name: tensor.shape for name, tensor in made.items()} == {name: t.shape for name, t in toy.items()}
    assert result["parameters"] == sum(tensor.numel() for tensor in made.values())
    found = scan_layers((tmp_path / "a").glob("*.safetensors"), layers=6)
    assert [found[layer].width for layer in range(6)] == result["widths"]
    assert run(DENSE, "--out", tmp_path / "b", *flags).returncode == 0
    again = read_tensors(tmp_path / "b")
    assert all(torch.equal(made[name], again[name]) for name in made)


def test_transformers_loads_it(tmp_path: Path) -> None:
    from transformers import LagunaForCausalLM

    assert run(DENSE, "--out", tmp_path / "a").returncode == 0
    model, loading = LagunaForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert model(input_ids=torch.arange(5)[None]).logits.isfinite().all()


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ("dense", ["--width", "6=5"], "--width: expected layers 0 to 5 and at most 672, got 6-6=5"),
        ("dense", ["--width", "1=700"], "at most 672"),
        ("dense", ["--width", "x"], "expected LAYER=N or FIRST-LAST=N, got 'x'"),
        ("teacher", [], "expected the config of a dense Laguna, got another"),
        ("dflash", [], "expected the config of a dense Laguna, got another"),
        ("nowhere", [], "got a folder without config.json"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, model: str, flags: list[str], message: str) -> None:
    done = run(DENSE.parent / model, "--out", tmp_path / "a", *flags)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert not (tmp_path / "a").exists()


def test_a_full_disk_leaves_nothing_that_refuses_the_next_command(tmp_path: Path) -> None:
    """It asked for the command again, which then refused the files that were left."""
    script = [sys.executable, str(ROOT / "scripts" / "generate_dense.py"), str(DENSE), "--out", str(tmp_path / "a")]
    done = subprocess.run(["bash", "-c", 'ulimit -f 2000; "$@"', "_", *script], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("got no space left; free some and repeat the command")
    assert not list((tmp_path / "a").iterdir())
    assert run(DENSE, "--out", tmp_path / "a").returncode == 0
