"""The dense student in vLLM: the same tokens as padded, nothing of the padding in memory; and what is refused.

Speculation, and weights loaded again in place, too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from warm import run_warm

pytestmark = pytest.mark.vllm
TOY = Path(__file__).resolve().parent.parent / "toy"
DENSE = TOY / "dense"
PROMPTS, HIDDEN = 64, 160
STOCK = {"architectures": ["LagunaForCausalLM"]}
OURS = {"architectures": ["LagunaDenseForCausalLM"]}
MLP = "model.layers.{}.mlp.{}_proj.weight"


@pytest.fixture(scope="session")
def widths() -> list[int]:
    """The student's true ones."""
    found: list[int] = json.loads((DENSE / "MANIFEST.json").read_text(encoding="utf-8"))["widths"]
    return found


@pytest.fixture(scope="session")
def unpadded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `laguna unpad` makes of the student."""
    out = tmp_path_factory.mktemp("unpadded") / "dense"
    done = run_warm("laguna_serve.serving.cli", "unpad", str(DENSE), "--out", str(out), "--verify")
    assert done.returncode == 0, done.stderr
    return out


def derive(out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of the student with changed weights."""
    out.mkdir(parents=True)
    for file in DENSE.iterdir():
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    weights = load_file(DENSE / "model.safetensors")
    change(weights)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture(scope="session")
def awkward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Units of one layer shuffled, so that zeros lie anywhere; in another a padded gate row is not quite zero."""

    def change(weights: dict[str, torch.Tensor]) -> None:
        stored = weights[MLP.format(1, "gate")].shape[0]
        order = torch.randperm(stored, generator=torch.Generator().manual_seed(0))
        for name, dim in (("gate", 0), ("up", 0), ("down", 1)):
            weights[MLP.format(1, name)] = weights[MLP.format(1, name)].index_select(dim, order).contiguous()
        weights[MLP.format(3, "gate")][-1, 7] = 1e-6

    return derive(tmp_path_factory.mktemp("awkward") / "dense", change)


def count(report: dict[str, Any]) -> int:
    """Parameters held, all in fp32."""
    assert {size for _, size in report["parameters"].values()} == {4}
    return sum(numel for numel, _ in report["parameters"].values())


def test_same_greedy_tokens_as_padded(run_model: Any) -> None:
    padded, ours = run_model(DENSE, hf_overrides=STOCK), run_model(DENSE, hf_overrides=OURS)
    assert padded["class"] == "LagunaForCausalLM"
    assert ours["class"] == "LagunaDenseForCausalLM"
    assert len(ours["tokens"]) == PROMPTS
    assert all(len(tokens) == 64 for tokens in ours["tokens"])
    assert ours["tokens"] == padded["tokens"]


def test_memory_is_that_of_the_true_parameters(run_model: Any, widths: list[int]) -> None:
    padded, ours = run_model(DENSE, hf_overrides=STOCK), run_model(DENSE, hf_overrides=OURS)
    manifest = json.loads((DENSE / "MANIFEST.json").read_text(encoding="utf-8"))
    assert count(padded) == manifest["parameters"]["stored"]
    assert count(ours) == manifest["parameters"]["true"]
    for layer, width in enumerate(widths):
        assert ours["parameters"][f"model.layers.{layer}.mlp.gate_up_proj.weight"][0] == 2 * width * HIDDEN
        assert ours["parameters"][f"model.layers.{layer}.mlp.down_proj.weight"][0] == width * HIDDEN


def test_unpadded_checkpoint_is_the_same_model_without_a_scan(run_model: Any, unpadded: Path) -> None:
    ours, direct = run_model(DENSE, hf_overrides=OURS), run_model(unpadded)
    assert direct["class"] == "LagunaDenseForCausalLM"
    assert direct["tokens"] == ours["tokens"]
    assert direct["parameters"] == ours["parameters"]
    assert "Looked for padding in 6 layers" in ours["log"]
    assert "Looked for padding" not in direct["log"]


def test_padding_anywhere_and_padding_that_is_not_zero(run_model: Any, awkward: Path, widths: list[int]) -> None:
    padded, ours = run_model(awkward, hf_overrides=STOCK), run_model(awkward, hf_overrides=OURS)
    assert ours["tokens"] == padded["tokens"]
    held = {layer: ours["parameters"][f"model.layers.{layer}.mlp.down_proj.weight"][0] // HIDDEN for layer in range(6)}
    assert held == dict(enumerate(widths)) | {3: max(widths)}
    warning = f"1 of 6 layers are kept whole (the first is layer 3, where unit {max(widths) - 1} is zero in part only)"
    assert ours["log"].count(warning) == 1
    assert "not exactly zero" not in run_model(DENSE, hf_overrides=OURS)["log"]


def test_compiled_as_eager(run_model: Any) -> None:
    """Other kernels round otherwise; of 64 prompts in fp32 most must stay as they are, and none may be garbage."""
    eager = run_model(DENSE, hf_overrides=OURS)["tokens"]
    compiled = run_model(DENSE, hf_overrides=OURS, enforce_eager=False)["tokens"]
    same = sum(a == b for a, b in zip(eager, compiled, strict=True))
    assert same >= PROMPTS - 4
    assert all(a[:4] == b[:4] for a, b in zip(eager, compiled, strict=True))


def test_speculation_gives_the_same_tokens(run_model: Any, unpadded: Path) -> None:
    """The teacher's drafter reads this model's auxiliary hidden states."""
    drafter = {"method": "dflash", "model": str(TOY / "dflash"), "num_speculative_tokens": 7}
    assert run_model(unpadded, speculative_config=drafter)["tokens"] == run_model(unpadded)["tokens"]


def test_weights_load_again_in_place(run_model: Any, unpadded: Path, tmp_path: Path) -> None:
    """Padded or not, other weights give what a fresh engine gives, and the first ones what they gave."""

    def scale(weights: dict[str, torch.Tensor]) -> None:
        for name in weights:
            if name.endswith("up_proj.weight"):
                weights[name] = weights[name] * 1.25

    other = derive(tmp_path / "other", scale)
    report = run_model(DENSE, hf_overrides=OURS, reload=[str(other), str(unpadded)])
    changed, restored = report["tokens_after_reload"]
    assert changed == run_model(other, hf_overrides=OURS)["tokens"]
    assert changed != report["tokens"]
    assert restored == report["tokens"]


def full_size_config() -> dict[str, Any]:
    """The published student's: 40 dense layers stored as 8192, of which all but the first have 4608 units."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    return {
        "architectures": ["LagunaForCausalLM"],
        "model_type": "laguna",
        "dtype": "bfloat16",
        "vocab_size": 100_352,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 40,
        "num_attention_heads": 48,
        "num_attention_heads_per_layer": [48, 64, 64, 64] * 10,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "sliding_window": 512,
        "layer_types": ["full_attention", *["sliding_attention"] * 3] * 10,
        "gating": True,
        "tie_word_embeddings": False,
        "rope_parameters": {"full_attention": rope, "sliding_attention": rope},
        "mlp_layer_types": ["dense"] * 40,
        "num_experts": 256,
    }


@pytest.mark.parametrize(
    ("path", "changes", "parameters"),
    [
        ("vllm.model_executor.models.laguna", {}, 3_855_462_400),
        ("laguna_serve.plugins.models.dense", {}, 3_855_462_400),
        (
            "laguna_serve.plugins.models.dense",
            {"intermediate_size_per_layer": [8192, *[4608] * 39]},
            2_996_678_656,
        ),
    ],
    ids=["stock", "ours without a scan", "ours unpadded"],
)
def test_full_size_parameters_on_the_meta_device(
    path: str, changes: dict[str, Any], parameters: int, tmp_path: Path
) -> None:
    import importlib

    from vllm.config import LoadConfig, ModelConfig, VllmConfig, set_current_vllm_config

    (tmp_path / "config.json").write_text(json.dumps(full_size_config() | changes))
    model_config = ModelConfig(model=str(tmp_path), skip_tokenizer_init=True, dtype="bfloat16")
    config = VllmConfig(model_config=model_config, load_config=LoadConfig(load_format="dummy"))
    module = importlib.import_module(path)
    name = "LagunaDenseForCausalLM" if "dense" in path else "LagunaForCausalLM"
    with set_current_vllm_config(config), torch.device("meta"):
        model = getattr(module, name)(vllm_config=config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def make_mlp(runs: tuple[tuple[int, int], ...], stored: int, width: int) -> Any:
    """One layer by itself, its width perhaps rounded up as on a GPU."""
    from vllm.config import VllmConfig, set_current_vllm_config

    from laguna_serve.plugins.models.dense import DenseMLP
    from laguna_serve.plugins.padding import Units

    with set_current_vllm_config(VllmConfig()):
        return DenseMLP(16, Units(stored, runs), width, "layer")


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Any:
    """vLLM's linear layers ask for a tensor-parallel group."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
        parallel_state.initialize_model_parallel(1)
    yield
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def matrices(stored: int, runs: tuple[tuple[int, int], ...]) -> list[tuple[str, torch.Tensor]]:
    keep = torch.zeros(stored)
    for start, stop in runs:
        keep[start:stop] = 1
    generator = torch.Generator().manual_seed(0)
    gate, up, down = (torch.randn(stored, 16, generator=generator) * keep[:, None] for _ in range(3))
    return [("gate_proj.weight", gate), ("up_proj.weight", up), ("down_proj.weight", down.t().contiguous())]


@pytest.mark.parametrize("runs", [((0, 21),), ((2, 9), (30, 44))], ids=["tail", "holes"])
@pytest.mark.parametrize("padded", [True, False])
def test_rounded_width_computes_the_same(runs: tuple[tuple[int, int], ...], padded: bool) -> None:
    """What a GPU allocates to be quick: the places that round the width up are zeros."""
    tensors = matrices(48, runs)
    gate, up, down = (tensor for _, tensor in tensors)
    width = sum(stop - start for start, stop in runs)
    module = make_mlp(runs, 48, 32)
    if not padded:
        tensors = [(name, module.units.trim(t, 1 if "down" in name else 0)) for name, t in tensors]
    assert width < 32
    assert sorted(module.load_weights(tensors)) == ["down_proj.weight", "gate_up_proj.weight"]
    x = torch.randn(5, 16)
    expected = (torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t()
    matrix = module.gate_up_proj.weight
    hidden_gate, hidden_up = (x @ matrix.t()).chunk(2, dim=-1)
    got = (torch.nn.functional.silu(hidden_gate) * hidden_up) @ module.down_proj.weight.t()
    torch.testing.assert_close(got, expected)
    assert not matrix[width:32].any()


def test_half_of_the_merged_matrix_is_not_reported_as_loaded() -> None:
    """vLLM then refuses to start and names it."""
    module = make_mlp(((0, 21),), 48, 21)
    assert list(module.load_weights(matrices(48, ((0, 21),))[:1])) == []


def test_other_width_or_other_padding_is_refused() -> None:
    module = make_mlp(((0, 21),), 48, 21)
    with pytest.raises(
        ValueError, match=r"layer: expected gate_proj.weight of 21 units, or 48 with the padding, got 40"
    ):
        list(module.load_weights(matrices(40, ((0, 21),))))
    with pytest.raises(
        ValueError, match=r"gate_proj.weight with zeros in the 27 units cut off, got other values there"
    ):
        list(module.load_weights(matrices(48, ((0, 22),))))
    with pytest.raises(ValueError, match=r"layer: expected gate_proj, up_proj and down_proj, got bias"):
        list(module.load_weights([("bias", torch.zeros(3))]))


def test_what_cannot_be_served_is_refused_in_one_line(tmp_path: Path) -> None:
    from laguna_serve.serving.engine import Engine, EngineConfig, EngineError

    overrides = ("--hf-overrides", json.dumps(OURS))
    config = EngineConfig(str(TOY / "teacher"), enforce_eager=True, extra_args=overrides)
    message = "expected dense layers alone, got sparse ones"
    with pytest.raises(EngineError, match=message), Engine(config, log_path=tmp_path / "engine.log"):
        pass


def test_several_devices_are_refused() -> None:
    """Where no planner has seen to it (tests/serving/planning/test_command.py), as under `vllm serve`."""
    from laguna_serve.plugins.models.dense import PaddingError, _refuse_what_is_not_supported

    model = SimpleNamespace(hf_config=SimpleNamespace(to_dict=lambda: json.loads((DENSE / "config.json").read_text())))
    config = SimpleNamespace(model_config=model, parallel_config=SimpleNamespace(tensor_parallel_size=2))
    with pytest.raises(PaddingError, match="expected one device, got tensor parallel size 2"):
        _refuse_what_is_not_supported(config)  # type: ignore[arg-type]
