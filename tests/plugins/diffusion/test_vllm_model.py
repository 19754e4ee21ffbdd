"""vLLM as a LLaDA's mask predictor: an oracle of other kernels that decodes to the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from vllm.model_executor.models.llama import LlamaForCausalLM

from laguna_serve.plugins.diffusion.checkpoint import LladaConfig
from laguna_serve.plugins.diffusion.decoding.canvas import Canvas
from laguna_serve.plugins.diffusion.decoding.reference import PerStep, Reference, Threshold
from laguna_serve.plugins.diffusion.errors import DiffusionError
from laguna_serve.plugins.diffusion.model import Llada, load_model
from laguna_serve.plugins.diffusion.passes import RowSet, run_pass
from laguna_serve.plugins.diffusion.predictor import Predictor
from laguna_serve.plugins.diffusion.proposing.shapes import Chain
from laguna_serve.plugins.diffusion.proposing.sources import Stale
from laguna_serve.plugins.diffusion.speculation import Decoder, Speculation
from laguna_serve.plugins.diffusion.vllm_model import VllmModel
from laguna_serve.plugins.models.llada import LladaForMaskPrediction, describe, rename
from laguna_serve.scripts.training.diffusion.saving import write_checkpoint

pytestmark = pytest.mark.vllm

TOY = Path(__file__).resolve().parents[2] / "toy"
SHAPE = LladaConfig(
    d_model=64,
    n_heads=2,
    n_kv_heads=2,
    n_layers=2,
    mlp_hidden_size=48,
    vocab_size=510,
    embedding_size=512,
    mask_token_id=3,
    eos_token_id=4,
    max_sequence_length=200,
    rope_theta=500000.0,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llada")
    torch.manual_seed(0)
    model = Llada(SHAPE)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    write_checkpoint(folder, SHAPE, model.state_dict(), TOY / "teacher")
    return folder


@pytest.fixture(scope="module")
def backend(folder: Path) -> Iterator[VllmModel]:
    before = {process.pid for process in psutil.Process().children()}
    with VllmModel(folder, kv_cache_memory_bytes=64 << 20) as model:
        yield model
    left = [process for process in psutil.Process().children() if process.pid not in before]
    assert not [process for process in left if process.status() == psutil.STATUS_ZOMBIE]


def draw_ids(count: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(5, 510, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def test_published_names_are_a_llamas(folder: Path) -> None:
    names = {rename(name) for name in load_file(folder / "model.safetensors")}
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= names
    assert "model.layers.1.mlp.down_proj.weight" in names
    assert len(names) == 3 + 9 * SHAPE.n_layers
    shape = describe(folder)
    assert not shape.is_causal
    assert shape.vocab_size == SHAPE.embedding_size
    assert issubclass(LladaForMaskPrediction, LlamaForCausalLM)


def test_logits_are_those_of_this_projects_pass(folder: Path, backend: VllmModel) -> None:
    model = load_model(folder)
    rows = [RowSet(draw_ids(count, count), 0, slice(1, count)) for count in (9, 30, 64)]
    for theirs, ours in zip(backend.run_pass(rows), run_pass(model, rows), strict=True):
        assert theirs.logits.shape == ours.logits.shape
        torch.testing.assert_close(theirs.logits, ours.logits, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "reference", [Reference(), Reference(PerStep(2)), Reference(Threshold(0.5), guidance=1.0)], ids=["R1", "R2", "τ"]
)
def test_decodes_to_the_same_tokens(folder: Path, backend: VllmModel, reference: Reference) -> None:
    canvases = [Canvas(draw_ids(5 + 7 * number, number), 16, 8, SHAPE.mask_token_id) for number in range(4)]
    theirs = Decoder(Predictor(backend), reference).decode(canvases)
    ours = Decoder(Predictor(load_model(folder)), reference).decode(canvases)
    assert [run.state for run in theirs] == [run.state for run in ours]


def test_what_it_has_not_is_refused(backend: VllmModel) -> None:
    canvas = Canvas(draw_ids(5, 0), 16, 8, SHAPE.mask_token_id)
    with pytest.raises(DiffusionError, match="cache: expected none with vLLM"):
        Decoder(Predictor(backend), Reference(cache="dual")).decode([canvas])
    with pytest.raises(DiffusionError, match="proposals: expected none"):
        Decoder(Predictor(backend), Reference(), (), Speculation(Chain(Stale()), states=2))
