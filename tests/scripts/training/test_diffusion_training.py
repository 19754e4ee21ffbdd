"""The toy diffusion pair: masks and losses, heads that start at distances, pruning by one reading, distillation."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from laguna_serve.plugins.diffusion.calibration import measure_next_commits
from laguna_serve.plugins.diffusion.checkpoint import LladaConfig, Tensors
from laguna_serve.plugins.diffusion.decoding.canvas import Canvas
from laguna_serve.plugins.diffusion.decoding.reference import Reference
from laguna_serve.plugins.diffusion.errors import DiffusionError
from laguna_serve.plugins.diffusion.model import Llada, load_model
from laguna_serve.scripts.training.diffusion import calibrate, pretraining
from laguna_serve.scripts.training.diffusion.ablation import RATIOS, ablate
from laguna_serve.scripts.training.diffusion.distillation import (
    RATIO_RANGE,
    distillation_loss,
    draw_ratios,
    measure_agreement,
)
from laguna_serve.scripts.training.diffusion.masking import draw_masks, mask_rows, masked_loss
from laguna_serve.scripts.training.diffusion.prune import PruneConfig, prune
from laguna_serve.scripts.training.diffusion.saving import copy_tokenizer, write_checkpoint
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.kit.flags import FlagError

TOY = Path(__file__).resolve().parents[2] / "toy"
MASK = 3
CONFIG = LladaConfig(
    d_model=32,
    n_heads=2,
    n_kv_heads=2,
    n_layers=4,
    mlp_hidden_size=24,
    vocab_size=512,
    embedding_size=512,
    mask_token_id=MASK,
    eos_token_id=4,
    max_sequence_length=300,
)


def make_model(seed: int = 0) -> Llada:
    generator = torch.Generator().manual_seed(seed)
    model = Llada(CONFIG)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.eval().requires_grad_(False)


def make_rows(count: int, length: int = 40) -> torch.Tensor:
    return torch.randint(8, 512, (count, length), generator=torch.Generator().manual_seed(1))


def test_masks_have_their_ratio_and_half_of_them_a_prompt() -> None:
    ratios = torch.tensor([0.3, 0.3, 0.001, 0.9] * 200)
    masks = draw_masks((800, 100), ratios, torch.Generator().manual_seed(0))
    assert masks.any(-1).all()
    assert float(masks[::4].float().mean()) == pytest.approx(0.3, abs=0.01)
    starts = masks[3::4].float().argmax(-1)
    assert float((starts > 10).float().mean()) > 0.5
    assert float(masks[2::4].sum(-1).float().mean()) == pytest.approx(1.05, abs=0.1)


def test_masked_loss_is_the_mean_over_rows() -> None:
    model, ids = make_model(), make_rows(3)
    masks = torch.zeros(3, 40, dtype=torch.bool)
    masks[0, 5] = masks[1, 3:20] = masks[2, ::2] = True
    logits = model(mask_rows(ids, masks, MASK)).log_softmax(-1)
    rows = [-logits[n][masks[n]].gather(-1, ids[n][masks[n]][:, None]).mean() for n in range(3)]
    assert float(masked_loss(model, ids, masks)) == pytest.approx(float(sum(rows)) / 3, rel=1e-5)


def test_heads_start_at_their_distances() -> None:
    model = pretraining.start_model(0).eval().requires_grad_(False)
    x = model.embed(torch.randint(8, 512, (1, 64), generator=torch.Generator().manual_seed(2)))
    cosines, sines = model.rotary(torch.arange(64))
    for block, distances in zip(model.blocks, pretraining.DISTANCES, strict=False):
        q, k, _ = block.project(x, cosines, sines)
        scores = torch.einsum("bihd,bjhd->hij", q, k) / math.sqrt(block.head_size)
        for head, distance in enumerate(distances):
            places = torch.arange(8, 56)
            looked = scores[head].softmax(-1)[places]
            assert float(looked[torch.arange(48), places + distance].mean()) > 0.25  # of 64 positions
        x = block(x, cosines, sines, False)


def test_distillation_loss_is_the_cards() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 50, generator=generator) * 3 for _ in range(2))
    top = teacher.topk(32, -1).indices
    p, q = (x.gather(-1, top).softmax(-1) for x in (student, teacher))
    chosen = -student.log_softmax(-1).gather(-1, teacher.argmax(-1, keepdim=True)).mean()
    error = ((student.softmax(-1).amax(-1) - teacher.softmax(-1).amax(-1)) ** 2).mean()
    for direction, kl in (("student-teacher", p * (p / q).log()), ("teacher-student", q * (q / p).log())):
        expected = 0.5 * chosen + 0.3 * kl.sum(-1).mean() + 0.2 * error
        assert float(distillation_loss(student, teacher, direction)) == pytest.approx(float(expected), rel=1e-4)  # type: ignore[arg-type]


def test_ratios_are_beta() -> None:
    """Beta(2, 2): mean a half, variance a twentieth before the ends are cut."""
    ratios = draw_ratios(20_000, torch.Generator().manual_seed(0))
    assert float(ratios.min()) == pytest.approx(RATIO_RANGE[0])
    assert float(ratios.max()) == pytest.approx(RATIO_RANGE[1])
    assert float(ratios.mean()) == pytest.approx(0.5, abs=0.01)
    assert float((ratios < 0.5).float().mean()) == pytest.approx(0.5, abs=0.02)
    assert float((ratios < 0.3).float().mean()) == pytest.approx(3 * 0.09 - 2 * 0.027, abs=0.01)


def leave_out(model: Llada, kept: list[int]) -> Llada:
    """The model without some layers, made by renaming."""
    smaller = Llada(replace(CONFIG, n_layers=len(kept)))
    prefix = "model.transformer.blocks."
    state = {name: tensor for name, tensor in model.state_dict().items() if prefix not in name}
    for name, tensor in model.state_dict().items():
        number, _, part = name.removeprefix(prefix).partition(".")
        if prefix in name and int(number) in kept:
            state[f"{prefix}{kept.index(int(number))}.{part}"] = tensor
    smaller.load_state_dict(state)
    return smaller.eval().requires_grad_(False)


def test_one_reading_agrees_with_models_without_those_layers(tmp_path: Path) -> None:
    model, rows = make_model(), make_rows(3)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    with Tensors(tmp_path) as tensors:
        found = ablate(tensors, CONFIG, list(rows), 2, torch.float32, seed=0)
    assert list(found.agreement) == [0, 1, 2]
    for first, by_ratio in found.agreement.items():
        smaller = leave_out(model, [n for n in range(4) if not first <= n < first + 2])
        for ratio in RATIOS:
            agreed, _ = measure_agreement(model, smaller, list(rows), ratio, seed=0)
            assert by_ratio[ratio] == pytest.approx(agreed, abs=1e-6)
    assert len(found.activations) == 4
    assert all(units.shape == (24,) and bool((units > 0).all()) for units in found.activations)


@pytest.mark.slow
def test_a_pruned_checkpoint_is_the_model_without_what_went(tmp_path: Path) -> None:
    model = make_model()
    write_checkpoint(tmp_path / "whole", CONFIG, model.state_dict(), TOY / "teacher")
    whole = load_model(tmp_path / "whole")
    config = PruneConfig(model=tmp_path / "whole", out=tmp_path / "cut", remove_layers=1, keep_units=0.5, tokens=600)
    result = prune(config)
    cut = load_model(tmp_path / "cut")
    assert cut.config == replace(CONFIG, n_layers=3, mlp_hidden_size=12)
    assert result.parameters == tuple(sum(p.numel() for p in m.parameters()) for m in (whole, cut))
    assert (tmp_path / "cut" / "tokenizer.json").is_file()
    best = max(result.blocks, key=lambda block: sum(block.agreement.values()))
    assert result.removed == best.layers
    kept = [n for n in range(4) if n != result.removed[0]]
    for place, number in enumerate(kept):
        part = "model.transformer.blocks.{}.{}.weight"
        gate = cut.state_dict()[part.format(place, "ff_proj")]
        source = whole.state_dict()[part.format(number, "ff_proj")]
        units = [int((source == row).all(-1).nonzero()) for row in gate]
        assert units == sorted(units)
        down = whole.state_dict()[part.format(number, "ff_out")][:, units]
        assert torch.equal(cut.state_dict()[part.format(place, "ff_out")], down)


def test_what_cannot_be_pruned_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "whole", CONFIG, make_model().state_dict(), TOY / "teacher")
    with pytest.raises(DiffusionError, match="--remove-layers: expected fewer than 4, got 4"):
        prune(PruneConfig(model=tmp_path / "whole", out=tmp_path / "cut", remove_layers=4))
    before = (tmp_path / "whole" / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="got one that is read; choose another --out"):
        prune(PruneConfig(model=tmp_path / "whole", out=tmp_path / "cut" / ".." / "whole", remove_layers=1))
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == before
    with pytest.raises(FlagError, match="--keep-units: expected a share"):
        PruneConfig(model=tmp_path, out=tmp_path, keep_units=0.0)
    with pytest.raises(FlagError, match="--dtype: expected float32 or bfloat16, got int8"):
        PruneConfig(model=tmp_path, out=tmp_path, dtype="int8")


def test_what_cannot_be_calibrated_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The graphs were written among a model's files, and an empty file asked for a lower --first."""
    model, prompts = tmp_path / "model", tmp_path / "prompts.jsonl"
    write_checkpoint(model, CONFIG, make_model().state_dict(), TOY / "teacher")
    before = sorted(model.iterdir())
    prompts.write_text("")
    for folder, out, why in (
        (model, model, f"--out {model}: expected a folder of its own, got a model's; choose another"),
        (model, tmp_path / "out", f"{prompts}: expected prompts, got an empty file; add some"),
        (tmp_path / "no", tmp_path / "out", f"{tmp_path / 'no'}: expected a model's configuration, got no config.js"),
    ):
        assert calibrate.main([str(folder), "--prompts", str(prompts), "--out", str(out)]) == 2
        assert why in capsys.readouterr().err.splitlines()[-1]
    assert sorted(model.iterdir()) == before
    assert not (tmp_path / "out").exists()


def test_a_model_predicts_its_own_next_commits() -> None:
    model = make_model()
    canvases = [Canvas((9, 10, 11), 8, 4, MASK)]
    assert measure_next_commits(model, model, canvases, Reference(cache="dual")) == (1.0, 1.0)
    _, states = measure_next_commits(model, make_model(1), canvases, Reference(cache="dual"))
    assert states < 0.5


def test_a_written_checkpoint_has_the_published_keys(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG, make_model().state_dict(), TOY / "teacher")
    keys = json.loads((tmp_path / "config.json").read_text())
    assert keys["architectures"] == ["LLaDAModelLM"]
    assert keys["model_type"] == "llada"
    assert {name: keys[name] for name in asdict(CONFIG)} == asdict(CONFIG)
    copy_tokenizer(tmp_path / "nothing", tmp_path)
