"""Scores of a model of which one layer is in memory: their formulas by brute force, FP8, resumption, the bound."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_laguna import make_config, make_tiny, read_config, save_tiny

from laguna_serve.plugins.pruning import ExpertShape, read_shape
from laguna_serve.scripts.text.rows import TextRows
from laguna_serve.scripts.training.dense.run import Teacher
from laguna_serve.scripts.training.pruning.measurement import Measured, Measurement
from laguna_serve.scripts.training.pruning.scores import SCORES, find_constants, rank_mone
from laguna_serve.scripts.training.pruning.streaming import passes
from laguna_serve.scripts.training.pruning.streaming.layers import Layers
from laguna_serve.scripts.training.pruning.streaming.sizes import make_plan
from laguna_serve.scripts.training.pruning.streaming.weights import Weights, dequantise
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.run_dir import RunDirError

ROOT = Path(__file__).resolve().parents[3]
RELEASES = ROOT / "tests" / "fixtures" / "releases"
ATOMS = ((0, 0, 0), (0, 3, 5), (1, 1, 7), (1, 2, 2))


def make_text(*lengths: int) -> TextRows:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 64, (length,), generator=generator) for length in lengths]
    scored = [torch.arange(length) > 0 for length in lengths]
    return TextRows("tiny", len(rows), rows, scored)


def open_tiny(folder: Path, text: TextRows, score: str, dtype: torch.dtype = torch.float32) -> Measurement:
    config = read_config(folder)
    shape = read_shape(config, "tiny")
    layers = Layers(folder, Weights(folder, config), dtype, torch.device("cpu"))
    wanted = SCORES[score]
    plan = make_plan(layers, shape, text, score, wanted.needs_gradients, wanted.needs_text)
    return Measurement(folder, shape, layers, text, score, plan)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ExpertShape, Path]:
    model = make_tiny(layer_types=["full_attention", "sliding_attention", "full_attention"], sliding_window=8)
    folder = save_tiny(model, tmp_path_factory.mktemp("tiny") / "model")
    return model, read_shape(model.config.to_dict(), "tiny"), folder


@pytest.fixture(scope="module")
def text() -> TextRows:
    return make_text(20, 13)


@pytest.fixture(scope="module")
def measured(tiny: Any, text: TextRows, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return open_tiny(tiny[2], text, "heapr").run(tmp_path_factory.mktemp("work"))


def expert_runs(model: Any, layer: int, row: torch.Tensor, scored: torch.Tensor) -> dict[str, torch.Tensor]:
    """Routing of a row, the experts' inputs [T, H], and the gradient [T, H] of its loss at the layer's output."""
    found: dict[str, torch.Tensor] = {}
    block = model.model.layers[layer].mlp

    def watch(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        output.register_hook(lambda grad: found.update(grad=grad[0]))

    hooks = [
        block.register_forward_hook(watch),
        block.experts.register_forward_hook(
            lambda _module, inputs, _output: found.update(x=inputs[0], ids=inputs[1], weights=inputs[2])
        ),
    ]
    embedded = model.model.embed_tokens(row[None]).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits[0, :-1]
    F.cross_entropy(logits[scored[1:]], row[1:][scored[1:]], reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    return {name: tensor.detach() for name, tensor in found.items()}


def brute_force(model: Any, shape: ExpertShape, text: TextRows, index: int, expert: int, atom: int) -> dict[str, float]:
    """Every score of an atom from its definition; HEAPr's by the covariance matrix of the gradients."""
    experts, scale = model.model.layers[shape.layers[index]].mlp.experts, 2.5
    gate, up = experts.gate_up_proj[expert].detach().chunk(2)
    down = experts.down_proj[expert].detach()
    H = down.shape[0]
    M, squares, outputs, losses, norms, n = torch.zeros(H, H), 0.0, 0.0, 0.0, 0.0, 0
    for row, scored in zip(text.rows, text.scored, strict=True):
        run = expert_runs(model, shape.layers[index], row, scored)
        for token, slot in (run["ids"] == expert).nonzero().tolist():
            x, weight, grad = run["x"][token], scale * run["weights"][token, slot], run["grad"][token]
            strengths = F.silu(gate @ x) * (up @ x)
            delta = weight * strengths[atom] * down[:, atom]
            M += torch.outer(weight * grad, weight * grad)
            squares += float(strengths[atom].square())
            outputs += float(delta.square().sum())
            losses += 0.5 * float((grad @ delta).square())
            norms += float(weight * (down @ strengths).norm())
            n += 1
    column = down[:, atom]
    return {
        "loss": losses / text.targets,
        "output": outputs / text.targets,
        "heapr": squares / n * float(column @ (M / n) @ column),
        "reap": norms / n / down.shape[1],
        "magnitude": float(gate[atom].square().sum() + up[atom].square().sum() + column.square().sum()),
    }


def test_every_score_is_its_definition(tiny: Any, text: TextRows, measured: Measured) -> None:
    model, shape, _ = tiny
    scores = {name: measured.scores(name) for name in SCORES}
    for where in ATOMS:
        for name, wanted in brute_force(model, shape, text, *where).items():
            assert scores[name].shape == (2, 4, 8)
            assert scores[name].dtype == np.float32
            assert wanted > 0
            assert scores[name][where] == pytest.approx(wanted, rel=1e-3), name
    assert measured.routed is not None
    assert measured.routed.sum(-1).tolist() == [33 * 2] * 2, "every token goes to two experts"


def test_loss_is_the_models_own_and_of_what_is_scored_alone(tiny: Any, text: TextRows, tmp_path: Path) -> None:
    model, shape, folder = tiny
    masked = TextRows("tiny", 2, text.rows, [torch.arange(20) > 12, torch.arange(13) % 3 == 1])
    measured = open_tiny(folder, masked, "loss").run(tmp_path)
    nats = 0.0
    with torch.no_grad():
        for row, scored in zip(masked.rows, masked.scored, strict=True):
            losses = F.cross_entropy(model(input_ids=row[None]).logits[0, :-1], row[1:], reduction="none")
            nats += float(losses[scored[1:]].sum())
    assert measured.loss == pytest.approx(nats / masked.targets, rel=1e-5)
    for where in ATOMS:
        wanted = brute_force(model, shape, masked, *where)
        assert measured.scores("loss")[where] == pytest.approx(wanted["loss"], rel=1e-3)


def test_layers_are_those_that_the_config_means(tmp_path: Path) -> None:
    """In spellings that transformers passes over: it would take layer 0 for a dense one, with random weights."""
    model = make_tiny(num_hidden_layers=2, mlp_layer_types=["sparse", "sparse"])
    folder = save_tiny(model, tmp_path / "model")
    described = read_config(folder)
    del described["mlp_layer_types"], described["rope_parameters"]
    spelled = {"mlp_only_layers": [], "decoder_sparse_step": 1, "rope_theta": 77.0}
    (folder / "config.json").write_text(json.dumps(described | spelled))
    layers = open_tiny(folder, make_text(8), "magnitude").layers
    wanted, got = model.model.layers[0].mlp.experts.down_proj, layers.load(0).mlp.experts.down_proj
    assert torch.equal(got, wanted)
    whole = Teacher(folder, torch.get_num_threads()).model
    assert torch.equal(whole.model.layers[0].mlp.experts.down_proj, wanted)
    for config in (layers.config, whole.config):
        assert config.rope_parameters["full_attention"]["rope_theta"] == 77


def test_forward_alone_gives_the_scores_that_need_no_gradients(
    tiny: Any, text: TextRows, measured: Measured, tmp_path: Path
) -> None:
    for name in ("reap", "output", "magnitude"):
        alone = open_tiny(tiny[2], text, name).run(tmp_path)
        np.testing.assert_allclose(alone.scores(name), measured.scores(name), rtol=1e-5)
        assert alone.loss is None
    assert not (tmp_path / "backward").exists()


def test_mones_score_and_constant_are_of_the_experts_outputs(tiny: Any, text: TextRows, measured: Measured) -> None:
    model, shape, _ = tiny
    experts = model.model.layers[shape.layers[1]].mlp.experts
    outputs, asked = [], 0.0
    for row, scored in zip(text.rows, text.scored, strict=True):
        run = expert_runs(model, shape.layers[1], row, scored)
        x = run["x"][(run["ids"] == 2).any(-1)]
        gate, up = (x @ experts.gate_up_proj[2].detach().t()).chunk(2, dim=-1)
        outputs.append((F.silu(gate) * up) @ experts.down_proj[2].detach().t())
        asked += 2.5 * float(run["weights"][run["ids"] == 2].sum())
    given = torch.cat(outputs)
    torch.testing.assert_close(torch.from_numpy(measured.constants()[1, 2]), given.mean(0))
    wanted = float(given.var(0, unbiased=True).sum().sqrt()) * asked / text.targets
    assert measured.rank_experts("mone")[1, 2] == pytest.approx(wanted, rel=1e-4)
    atoms = measured.scores("reap")[1, 2]
    assert measured.rank_experts("reap")[1, 2] == pytest.approx(float(atoms.sum()), rel=1e-5)


def test_an_expert_without_tokens_scores_nothing(tiny: Any, measured: Measured) -> None:
    sums = measured.layers[0]
    empty = type(sums).of_weights(torch.ones(4, 16, 16), torch.ones(4, 16, 8))
    for name, score in SCORES.items():
        values = score.compute(empty, 5)
        assert torch.isfinite(values).all()
        assert bool(values.any()) == (name == "magnitude")
    assert not rank_mone(empty, 5).any()
    assert not find_constants(empty).any()


def test_an_interrupted_run_continues_at_its_layer(
    tiny: Any, text: TextRows, measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = len(passes.list_steps(tiny[1], 3, needs_gradients=True))
    loaded: list[int] = []
    load = Layers.load

    def stop_at_the_third(self: Layers, number: int) -> Any:
        loaded.append(number)
        if len(loaded) % 3 == 0:
            raise KeyboardInterrupt
        return load(self, number)

    monkeypatch.setattr(Layers, "load", stop_at_the_third)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            open_tiny(tiny[2], text, "heapr").run(tmp_path)
    again = open_tiny(tiny[2], text, "heapr").run(tmp_path)
    assert loaded == [0, 1, 2, 2, 2, 1, 1], "each interruption lost the layer that it was at"
    assert len((tmp_path / "backward" / "journal.jsonl").read_text().splitlines()) == steps
    assert not list(tmp_path.rglob("*.bin"))
    for name in SCORES:
        assert np.array_equal(again.scores(name), measured.scores(name))
    assert again.loss == measured.loss
    loaded.clear()
    open_tiny(tiny[2], text, "loss").run(tmp_path)
    assert not loaded, "another score of the same sums reads no layer"
    with pytest.raises(RunDirError, match="another one's"):
        open_tiny(tiny[2], make_text(20), "heapr").run(tmp_path)


def test_bf16_comes_close(tiny: Any, text: TextRows, measured: Measured, tmp_path: Path) -> None:
    half = open_tiny(tiny[2], text, "heapr", torch.bfloat16).run(tmp_path)
    assert half.loss == pytest.approx(measured.loss, rel=0.02)
    exact, rounded = measured.scores("heapr").ravel(), half.scores("heapr").ravel()
    assert np.corrcoef(np.argsort(np.argsort(exact)), np.argsort(np.argsort(rounded)))[0, 1] > 0.9


def quantise(folder: Path, out: Path) -> Path:
    """The experts' and the dense layer's matrices in FP8 by 128×128 blocks, named and configured as the releases."""
    out.mkdir()
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, values in load_file(path).items():
            if not (".mlp." in name and name.endswith("_proj.weight")):
                tensors[name] = values
                continue
            rows, columns = (-(-size // 128) for size in values.shape)
            scale = torch.rand(rows, columns).add(0.5).mul(0.01).to(torch.bfloat16)
            wide = scale.float().repeat_interleave(128, 0)[: len(values)].repeat_interleave(128, 1)
            tensors[name] = (values.float() / wide[:, : values.shape[1]]).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale"] = scale
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    release = RELEASES / "Laguna-XS.2-FP8" / "config.json"
    described = json.loads(release.read_text())["quantization_config"]
    (out / "config.json").write_text(json.dumps(read_config(folder) | {"quantization_config": described}))
    return out


@pytest.mark.slow
def test_fp8_is_read_through_its_scales(tmp_path: Path) -> None:
    model = make_tiny(hidden_size=160, moe_intermediate_size=136, intermediate_size=200)
    fp8 = quantise(save_tiny(model, tmp_path / "bf16"), tmp_path / "fp8")
    weights = Weights(fp8, read_config(fp8))
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file(
        {name: weights.read(name) for name in weights.names() if not name.endswith("_scale")},
        plain / "model.safetensors",
        {"format": "pt"},
    )
    (plain / "config.json").write_text(json.dumps(read_config(tmp_path / "bf16")))
    original = load_file(plain / "model.safetensors")["model.layers.1.mlp.experts.0.down_proj.weight"]
    torch.testing.assert_close(original, model.model.layers[1].mlp.experts.down_proj[0].detach(), rtol=0.07, atol=0.01)
    text = make_text(20)
    for name in ("heapr", "magnitude"):
        wanted = open_tiny(plain, text, name).run(tmp_path / "work-plain").scores(name)
        assert np.array_equal(open_tiny(fp8, text, name).run(tmp_path / "work").scores(name), wanted)


def test_scales_of_rows_and_of_matrices_are_read_and_others_refused() -> None:
    values = torch.ones(3, 130).to(torch.float8_e4m3fn)
    assert dequantise(values, torch.tensor([[1.0], [2.0], [3.0]]), "w")[:, 0].tolist() == [1, 2, 3]
    assert dequantise(values, torch.tensor([2.0]), "w").unique().tolist() == [2]
    assert dequantise(values, torch.tensor([[1.0, 5.0]]), "w")[0, [0, 127, 128]].tolist() == [1, 1, 5]
    with pytest.raises(CheckpointError, match=r"w: expected scales \[1, 2\].*got \[2, 2\]"):
        dequantise(values, torch.ones(2, 2), "w")


def test_what_cannot_be_read_is_refused_in_one_line(tiny: Any, text: TextRows, tmp_path: Path) -> None:
    config = read_config(tiny[2])
    for name in ("Laguna-XS.2-NVFP4", "Laguna-XS.2-INT4"):
        described = json.loads((RELEASES / name / "config.json").read_text())["quantization_config"]
        with pytest.raises(CheckpointError, match="score the bf16 or FP8 release"):
            Weights(tiny[2], config | {"quantization_config": described})
    cut = save_tiny(make_tiny(), tmp_path / "cut")
    (cut / "config.json").write_text(json.dumps(read_config(cut) | {"moe_intermediate_size": 16}))
    wrong = open_tiny(cut, text, "heapr")
    with pytest.raises(CheckpointError, match=r"expected \[16, 16\].*got \[8, 16\]"):
        wrong.run(tmp_path / "work")


def test_files_that_the_index_does_not_name_are_not_read(tmp_path: Path) -> None:
    folder = save_tiny(make_tiny(), tmp_path / "model")
    before = Weights(folder, read_config(folder))
    name = "model.norm.weight"
    save_file({name: before.read(name) + 1}, folder / "of-another-download.safetensors")
    (folder / "torn.safetensors").write_bytes(b"torn")
    after = Weights(folder, read_config(folder))
    assert torch.equal(after.read(name), before.read(name))


def write_hollow(release: str, folder: Path) -> Path:
    """A published checkpoint's headers, and a file with holes in the place of its tensors."""
    sizes = {"BF16": 2, "F32": 4, "F8_E4M3": 1}
    headers, end = {}, 0
    for pattern, (dtype, shape) in json.loads((RELEASES / release / "tensors.json").read_text()).items():
        for name in expand(pattern):
            begin, end = end, end + sizes[dtype] * math.prod(shape)
            headers[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(headers).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    (folder / "config.json").write_text((RELEASES / release / "config.json").read_text())
    return folder


def expand(pattern: str) -> list[str]:
    """The names that a fixture's pattern stands for: {a,b} and {0-39}."""
    found = re.search(r"\{([^}]*)\}", pattern)
    if found is None:
        return [pattern]
    parts: list[str] = []
    for part in found[1].split(","):
        first, _, last = part.partition("-")
        parts += [str(number) for number in range(int(first), int(last) + 1)] if last else [part]
    return [name for part in parts for name in expand(pattern[: found.start()] + part + pattern[found.end() :])]


@pytest.mark.slow
@pytest.mark.parametrize(("release", "stored"), [("Laguna-XS.2", 66_885_254_144), ("Laguna-XS.2-FP8", 35_309_145_888)])
def test_33_billion_parameters_fit_in_seven_gibibytes(release: str, stored: int, tmp_path: Path) -> None:
    folder = write_hollow(release, tmp_path / "model")
    rows = [torch.zeros(2048, dtype=torch.int64)] * 128
    scored = [torch.arange(2048) > 0] * 128
    plan = open_tiny(folder, TextRows("wikitext", 1, rows, scored), "heapr", torch.bfloat16).plan
    assert plan.model_bytes == stored
    assert plan.memory_bytes < 7 * 2**30
    assert plan.disk_bytes < 45 * 2**30
    assert plan.memory_bytes == plan.row_bytes + 3 * plan.part_bytes + 8 * 256 * (6 * 512 + 2048)


CHILD = """
import json, resource, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from transformers import LagunaForCausalLM
from test_streaming_scores import make_text, open_tiny

folder, work = Path(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
measurement = open_tiny(folder, make_text(64, 512), "heapr")
torch.randn(64, 64, requires_grad=True).mm(torch.randn(64, 64)).sum().backward()  # the engine's threads are there
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
allowed = measurement.plan.memory_bytes + int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_AS, (taken + allowed, taken + allowed))
measured = measurement.run(work)
try:
    LagunaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    whole = True
except (MemoryError, RuntimeError, OSError):
    whole = False
print(json.dumps({"bound": measurement.plan.memory_bytes, "allowed": allowed, "whole": whole,
                  "layers": len(measured.layers), "loss": measured.loss}))
"""
SLACK = 24 << 20  # the allocator's arenas, buffers of NumPy's archives


def write_large(folder: Path, layers: int) -> int:
    """A checkpoint of equal layers, one shard each; bytes of its tensors."""
    config = make_config(
        num_hidden_layers=layers, hidden_size=256, moe_intermediate_size=256, num_experts=16, num_attention_heads=4
    )
    with torch.device("meta"):
        from transformers import LagunaForCausalLM

        names = LagunaForCausalLM(config).state_dict()
    folder.mkdir()
    config.save_pretrained(folder)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    noise = torch.randn(16 * 512 * 256).mul_(0.05).to(torch.bfloat16)
    for name, tensor in names.items():
        part = "-".join(name.split(".")[:3]) if ".layers." in name else "rest"
        values = torch.ones(tensor.shape, dtype=torch.bfloat16) if "norm" in name else noise[: tensor.numel()]
        shards.setdefault(part, {})[name] = values.view(tensor.shape).clone()
    weight_map = {name: f"{part}.safetensors" for part, tensors in shards.items() for name in tensors}
    for part, tensors in shards.items():
        save_file(tensors, folder / f"{part}.safetensors", {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(2 * tensor.numel() for tensors in shards.values() for tensor in tensors.values())


@pytest.mark.slow
def test_a_model_many_times_larger_than_the_allowed_memory_is_scored(tmp_path: Path) -> None:
    stored = write_large(tmp_path / "large", 64)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "large"), str(tmp_path / "work"), str(SLACK)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["layers"] == 63
    assert np.isfinite(said["loss"])
    assert not said["whole"], "the limit holds: the model itself does not fit"
    assert stored > 4 * said["allowed"] > 4 * said["bound"], "and is computed in fp32, of twice the size"


def test_a_disk_that_is_too_full_is_said_before_the_work(
    tiny: Any, text: TextRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measurement = open_tiny(tiny[2], text, "heapr")
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=measurement.plan.disk_bytes - 1))
    with pytest.raises(CommandError, match=r"free for activations.*--work"):
        measurement.run(tmp_path / "work")
    assert not (tmp_path / "work" / "backward").exists()
