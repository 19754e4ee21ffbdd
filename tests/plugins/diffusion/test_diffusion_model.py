"""The model: its names, an independent Llama with the same weights, and rows whose bits are their own."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion_models import MASK, VOCABULARY, make_canvases, make_config, make_model
from safetensors.torch import save_file

from laguna_serve.plugins.diffusion.checkpoint import read_config
from laguna_serve.plugins.diffusion.decoding.canvas import Canvas, State
from laguna_serve.plugins.diffusion.decoding.reference import Cache
from laguna_serve.plugins.diffusion.errors import DiffusionError
from laguna_serve.plugins.diffusion.model import Llada, load_model
from laguna_serve.plugins.diffusion.passes import RowSet, run_pass
from laguna_serve.plugins.diffusion.predictor import Ask, Predictor, Slot

CACHES: tuple[Cache, ...] = ("none", "prefix", "dual")


def write_folder(folder: Path, model: Llada, **keys: Any) -> Path:
    """A checkpoint in two shards."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"model-0000{number + 1}-of-00002.safetensors")
    config = {"model_type": "llada", **asdict(model.config), **keys}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def test_names_are_the_published_ones() -> None:
    names = set(make_model().state_dict())
    layer = ("attn_norm", "ff_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
    assert names == {
        *(f"model.transformer.{name}.weight" for name in ("wte", "ln_f", "ff_out")),
        *(f"model.transformer.blocks.{number}.{name}.weight" for number in range(2) for name in layer),
    }


def test_a_checkpoint_is_read_from_its_shards(tmp_path: Path) -> None:
    model = make_model()
    loaded = load_model(write_folder(tmp_path, model, n_kv_heads=2, block_type="llama", rope=True))
    assert loaded.config == model.config
    ids = torch.arange(5, 25)[None]
    assert torch.equal(loaded(ids), model(ids))


def test_logits_are_those_of_transformers_llama() -> None:
    """With the same weights under Llama's names and no causal mask."""
    from transformers import LlamaConfig, LlamaModel

    model = make_model()
    config = model.config
    llama = LlamaModel(
        LlamaConfig(
            vocab_size=config.embedding_size,
            hidden_size=config.d_model,
            intermediate_size=config.mlp_hidden_size,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            attn_implementation="eager",
        )
    ).eval()
    renamed = {"attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm", "attn_out": "self_attn.o_proj"}
    renamed |= {"ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj"}
    renamed |= {f"{name}_proj": f"self_attn.{name}_proj" for name in "qkv"}
    weights = {"embed_tokens.weight": model.state_dict()["model.transformer.wte.weight"]}
    weights["norm.weight"] = model.state_dict()["model.transformer.ln_f.weight"]
    for name, tensor in model.state_dict().items():
        if ".blocks." in name:
            number, part, _ = name.removeprefix("model.transformer.blocks.").split(".")
            weights[f"layers.{number}.{renamed[part]}.weight"] = tensor
    llama.load_state_dict(weights)
    ids = torch.arange(5, 45)[None]
    everything = torch.zeros(1, 1, 40, 40)
    hidden = llama(ids, attention_mask=everything).last_hidden_state
    expected = hidden @ model.state_dict()["model.transformer.ff_out.weight"].T
    torch.testing.assert_close(model(ids), expected[..., :VOCABULARY].float(), atol=1e-4, rtol=1e-4)


def test_all_positions_see_each_other() -> None:
    model = make_model()
    ids = torch.arange(5, 25)[None]
    changed = ids.clone()
    changed[0, -1] = 50
    assert not torch.equal(model(ids)[0, 0], model(changed)[0, 0])
    assert torch.equal(model(ids, causal=True)[0, 0], model(changed, causal=True)[0, 0])


def test_a_pass_gives_the_logits_of_the_whole_sequence() -> None:
    model = make_model()
    ids = tuple(range(5, 60))
    (alone,) = run_pass(model, [RowSet(ids, 0, slice(10, 30))])
    torch.testing.assert_close(alone.logits, model(torch.tensor([ids]))[0, 10:30], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_rows_bits_do_not_depend_on_its_company(threads: int) -> None:
    model = make_model()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sets = [RowSet(tuple(range(5, 5 + n)), 0, slice(0, n)) for n in (1, 7, 16, 31, 32, 33, 64, 90)]
        alone = [run_pass(model, [rows])[0].logits for rows in sets]
        for order in (sets, sets[::-1], sets[3:] + sets[:3] + sets):
            together = run_pass(model, order)
            assert all(
                torch.equal(output.logits, alone[sets.index(rows)])
                for rows, output in zip(order, together, strict=True)
            )
    finally:
        torch.set_num_threads(before)


def fill(canvas: Canvas, count: int) -> State:
    """The state with its first positions committed."""
    return canvas.commit(canvas.start(), {at: 10 + at for at in range(count)})


@pytest.mark.parametrize("guidance", [0.0, 1.0])
@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_that_is_fresh_changes_nothing_but_rounding(cache: Cache, guidance: float) -> None:
    """Keys and values of an open block's surroundings are exact as long as nothing in the block has changed."""
    canvas = make_canvases(1)[0]
    model = make_model()
    slot, state = Slot(), fill(canvas, 8)
    cached = Predictor(model, cache, guidance)
    opening = cached.predict([Ask(canvas, slot, [state])])[0][state]
    plain = Predictor(model, "none", guidance).predict([Ask(canvas, Slot(), [state])])[0][state]
    assert torch.equal(opening, plain)
    if cache != "none":
        assert slot.opened == state
        described = RowSet((canvas.prompt + state)[len(canvas.prompt) + 8 :], len(canvas.prompt) + 8, slice(0, 8))
        (again,) = run_pass(model, [RowSet(described.ids, described.first, described.wanted, slot.contexts[0])])
        if not guidance:
            torch.testing.assert_close(again.logits, plain, atol=1e-4, rtol=1e-4)


def test_cache_modes_differ_within_a_block() -> None:
    canvas, model = make_canvases(1)[0], make_model()
    logits = {}
    for cache in CACHES:
        slot, predictor = Slot(), Predictor(model, cache)
        predictor.predict([Ask(canvas, slot, [canvas.start()])])
        logits[cache] = predictor.predict([Ask(canvas, slot, [fill(canvas, 3)])])[0][fill(canvas, 3)]
        assert predictor.passes == 2
    assert not torch.equal(logits["none"], logits["prefix"])
    assert not torch.equal(logits["prefix"], logits["dual"])


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_lost_cache_is_made_again(cache: Cache) -> None:
    """A state in the middle of a block has the same logits with a slot that is new, for one pass more."""
    canvas, model = make_canvases(1)[0], make_model()
    slot, kept, lost = Slot(), Predictor(model, cache), Predictor(model, cache)
    state = fill(canvas, 11)
    kept.predict([Ask(canvas, slot, [canvas.begin_block(state)])])
    expected = kept.predict([Ask(canvas, slot, [state])])[0][state]
    assert torch.equal(lost.predict([Ask(canvas, Slot(), [state])])[0][state], expected)
    assert lost.passes == 2


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("guidance", [0.0, 0.5])
def test_rows_are_counted(cache: Cache, guidance: float) -> None:
    canvas, state = make_canvases(1)[0], fill(make_canvases(1)[0], 3)
    predictor, slot = Predictor(make_model(), cache, guidance), Slot()
    for each in (canvas.start(), state):
        before = predictor.rows
        predictor.predict([Ask(canvas, slot, [each])])
        assert predictor.rows - before == predictor.count_rows(canvas, each)


def test_a_sequence_that_is_too_long_is_refused() -> None:
    canvas = Canvas((7,) * 150, 16, 8, MASK)
    with pytest.raises(DiffusionError, match="sequence: expected at most 160 tokens of prompt and canvas, got 166"):
        Predictor(make_model()).predict([Ask(canvas, Slot(), [canvas.start()])])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "llama"}, 'expected "model_type": "llada", got \'llama\''),
        ({"include_bias": True}, "expected include_bias False, got True"),
        ({"d_model": None}, "got none of 'd_model'"),
        ({"n_heads": 3}, "expected heads of one even width"),
        ({"mask_token_id": 126336}, "expected an embedding with the mask in it"),
        ({"d_model": "32"}, "expected d_model to be a positive int, got '32'"),
        ({"n_kv_heads": 0}, "expected n_kv_heads to be a positive int, got 0"),
        ({"rope_theta": []}, r"expected rope_theta to be a float, got \[\]"),
        ({"weight_tying": 1}, "expected weight_tying to be a bool, got 1"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    config = {"model_type": "llada", **asdict(make_config()), **keys}
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(DiffusionError, match=message):
        read_config(tmp_path)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, make_model(), mlp_hidden_size=64)
    with pytest.raises(DiffusionError, match=r"expected \[64, 32\], got \[48, 32\]"):
        load_model(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(DiffusionError, match="expected the tensor"):
        load_model(folder)
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"short")
    with pytest.raises(DiffusionError, match="expected a whole safetensors file"):
        load_model(folder)
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(DiffusionError, match="expected weights"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(DiffusionError, match="expected a model's configuration"):
        load_model(folder)
