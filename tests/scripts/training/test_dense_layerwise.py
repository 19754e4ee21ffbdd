"""A teacher that is never whole in memory, and several processes, give the student that one with all of it gives."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_laguna import make_tiny, read_config, save_tiny
from warm import run_warm

from laguna_serve.scripts import distill_dense
from laguna_serve.scripts.training.dense.config import DistillConfig, Recipe
from laguna_serve.scripts.training.dense.initial import start_blocks
from laguna_serve.scripts.training.dense.layerwise.blocks import train_layerwise
from laguna_serve.scripts.training.dense.layerwise.hidden import DiskError
from laguna_serve.scripts.training.dense.run import Teacher, distil
from laguna_serve.scripts.training.dense.stages import count_usage, train_blocks
from laguna_serve.scripts.training.dense.text import Text
from laguna_serve.scripts.training.dense.tokens import write_tokens
from laguna_serve.scripts.training.pruning.streaming.layers import Layers
from laguna_serve.scripts.training.pruning.streaming.weights import Weights
from laguna_serve.scripts.training.ranks import ALONE, Ranks
from laguna_serve.serving.kit.flags import FlagError

ROOT = Path(__file__).resolve().parents[3]
TOY = ROOT / "tests" / "toy"
WIDTHS = [24, 30, 24]
RECIPE = Recipe(seed=0, stage1_steps=6, stage2_steps=1, rows=2, length=12, warm_up=2, init="weight")


@pytest.fixture
def tiny() -> Any:
    return make_tiny(
        layer_types=["full_attention", "sliding_attention", "full_attention"], sliding_window=8
    ).requires_grad_(False)


@pytest.fixture
def text() -> Text:
    ids = torch.randint(3, 64, (400,), generator=torch.Generator().manual_seed(2)).tolist()
    return Text(write_tokens([(ids, [True] * len(ids))], None, {}))


def open_layers(folder: Path) -> Layers:
    return Layers(folder, Weights(folder, read_config(folder)), torch.float32, torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("batches", [0, 4])
def test_blocks_one_at_a_time_are_those_beside_the_teacher(batches: int, tiny: Any, text: Text, tmp_path: Path) -> None:
    recipe = Recipe(**{name: getattr(RECIPE, name) for name in RECIPE.__slots__} | {"stage1_batches": batches})
    beside = start_blocks(tiny, WIDTHS, count_usage(tiny, [1, 2], text, recipe), recipe.init)
    log = train_blocks(tiny, beside, text, recipe, tmp_path / "state", threads=1)
    layers = open_layers(save_tiny(tiny, tmp_path / "model"))
    blocks, other = train_layerwise(layers, WIDTHS, text, recipe, tmp_path / "work", 1, ALONE)
    for name, tensor in beside.state_dict().items():
        torch.testing.assert_close(blocks.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
    assert other[-1] == pytest.approx(log[-1], rel=1e-4)
    assert other[-1].keys() == log[-1].keys()
    assert not list((tmp_path / "work" / "hidden").iterdir())


@pytest.mark.slow
def test_layers_that_are_done_are_not_trained_again(
    tiny: Any, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second layer: the first stays, and the end is that of a run in one go."""
    layers = open_layers(save_tiny(tiny, tmp_path / "model"))
    whole, _ = train_layerwise(layers, WIDTHS, text, RECIPE, tmp_path / "whole", 1, ALONE)
    cut, load, wanted = tmp_path / "cut", Layers.load, [0, 1, 1]

    def stop(self: Layers, number: int) -> Any:
        if not wanted or number != wanted.pop(0):
            raise KeyboardInterrupt
        return load(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Layers, "load", stop)
        with pytest.raises(KeyboardInterrupt):
            train_layerwise(layers, WIDTHS, text, RECIPE, cut, 1, ALONE)
    first = (cut / "layer-001.safetensors").stat().st_mtime_ns
    assert not (cut / "layer-002.safetensors").exists()
    blocks, _ = train_layerwise(layers, WIDTHS, text, RECIPE, cut, 1, ALONE)
    assert (cut / "layer-001.safetensors").stat().st_mtime_ns == first
    assert all(torch.equal(a, whole.state_dict()[name]) for name, a in blocks.state_dict().items())


def test_full_disk_is_refused_before_it_begins(
    tiny: Any, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("laguna_serve.scripts.training.dense.layerwise.hidden.disk_usage", lambda _path: usage)
    layers = open_layers(save_tiny(tiny, tmp_path / "model"))
    with pytest.raises(DiskError, match=r"expected .* GiB free for hidden states, got 0\.0; train on fewer batches"):
        train_layerwise(layers, WIDTHS, text, RECIPE, tmp_path / "work", 1, ALONE)


@pytest.mark.slow
def test_fp8_teacher_is_read_through_its_scales(tmp_path: Path) -> None:
    from laguna_serve.scripts.checkpoints.quantise import QuantiseConfig, quantise

    quantise(QuantiseConfig(source=str(TOY / "teacher"), out=tmp_path / "fp8", to="fp8"))
    quantise(QuantiseConfig(source=str(tmp_path / "fp8"), out=tmp_path / "plain", to="fp32"))
    ids = torch.arange(8, 40)[None]
    with torch.no_grad():
        fp8, plain, original = (
            Teacher(folder, threads=1).model(input_ids=ids).logits
            for folder in (tmp_path / "fp8", tmp_path / "plain", TOY / "teacher")
        )
    torch.testing.assert_close(fp8, plain, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(fp8, original, atol=1e-3), "it is rounded"


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    prompts = [json.loads(line)["prompt"] for line in (TOY / "prompts.jsonl").read_text().splitlines()[:20]]
    turns = [[{"role": "user", "content": "Go on."}, {"role": "assistant", "content": prompt}] for prompt in prompts]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    flags = ["--text", str(tmp_path / "text.jsonl"), "--chats", str(tmp_path / "chats.jsonl"), "--dtype", "float32"]
    flags += ["--rows", "4", "--length", "32", "--stage1-steps", "4", "--stage2-steps", "4", "--measure-tokens", "128"]
    return [
        str(ROOT / "scripts" / "distill_dense.py"),
        str(TOY / "teacher"),
        *flags,
        "--threads",
        "1",
        "--warm-up",
        "2",
    ]


@pytest.mark.slow
def test_two_processes_make_the_student_that_one_makes(command: list[str], tmp_path: Path) -> None:
    """Stage 1 to the bit; stage 2, whose sums are ordered otherwise, to rounding, in parts and chunks as well."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arms = {"one": ([], []), "two": (torchrun, ["--accumulate", "2", "--logit-chunk", "16", "--checkpointing"])}
    logs = {}
    for name, (launcher, flags) in arms.items():
        where = [f"--{what}={tmp_path / name / what}" for what in ("out", "work", "store")]
        program, *line = [*launcher, *command, *where, *flags, "--layerwise", "--top-k", "16"]
        done = run_warm(program, *line)
        assert done.returncode == 0, done.stderr[-2000:]
        logs[name] = json.loads((tmp_path / name / "out" / "distillation.json").read_text())
    for layer in range(1, 6):
        block = f"work/layer-{layer:03d}.safetensors"
        assert (tmp_path / "one" / block).read_bytes() == (tmp_path / "two" / block).read_bytes()
    one, two = (load_file(tmp_path / name / "out" / "model.safetensors") for name in arms)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)
    losses = [[record["loss"] for record in logs[name]["logs"]["stage2"]] for name in arms]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert logs["one"]["store"] == logs["two"]["store"]


def test_processes_need_layers_and_a_store(tmp_path: Path) -> None:
    config = DistillConfig(teacher=str(TOY / "teacher"), out=tmp_path / "out", work=tmp_path / "work")
    with pytest.raises(FlagError, match=r"expected both with several processes, got 2 processes without them; pass"):
        distil(config, Ranks(0, 2))
    wide = replace(config, layerwise=True, store=tmp_path / "store", rows=1)
    with pytest.raises(FlagError, match=r"--rows: expected at least one for each of 2 processes, got 1; raise it"):
        distil(wide, Ranks(0, 2))
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--endpoint", "http://127.0.0.1:1"], "--endpoint: expected --store with it, got none"),
        (["--only-store"], "--only-store: expected --store with it, got none"),
        (["--accumulate", "5"], "--accumulate: expected at most --rows 4, got 5; lower it"),
        (["--top-k", "some"], "expected a number of tokens or 'full', got 'some'"),
        (["--init", "best"], "invalid choice: 'best'"),
    ],
)
def test_flags_that_mean_nothing_are_refused(
    flags: list[str], message: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        distill_dense.main([*command[1:], "--out", str(tmp_path / "out"), *flags])
    assert message in capsys.readouterr().err.splitlines()[-1]
