"""`laguna drafter train` for models that are no Laguna, small ones with random weights, and their drafters served."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Olmo2Config,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from laguna_serve.scripts.checkpoints.drafters.dflash import LagunaDrafter
from laguna_serve.scripts.checkpoints.drafters.speculators import SpeculatorsDrafter
from laguna_serve.scripts.training.drafter.blocks import Blocks, Shared
from laguna_serve.scripts.training.drafter.command import plan_drafter, train_drafter
from laguna_serve.scripts.training.drafter.config import DrafterTrainConfig
from laguna_serve.scripts.training.drafter.data import states as states_module
from laguna_serve.scripts.training.drafter.data.records import Row
from laguna_serve.scripts.training.drafter.data.states import States
from laguna_serve.scripts.training.drafter.data.whole import WholeTarget
from laguna_serve.scripts.training.drafter.held_out import measure_drafter
from laguna_serve.scripts.training.drafter.models import NewDrafter, choose_shape, read_warm
from laguna_serve.scripts.training.drafter.training import Fit, fit_drafter
from laguna_serve.scripts.training.toy.tokenizer import load_tokenizer
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.checkpoint.others import read_served
from laguna_serve.serving.engine import Engine, EngineConfig
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.speculation.acceptance import read_acceptance
from laguna_serve.serving.speculation.drafting import open_drafter

TOY = Path(__file__).resolve().parents[2] / "toy"
SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 32}


def make_target(folder: Path, config: PretrainedConfig, scale: float = 3.0) -> Path:
    """A model of bf16 with random weights, large enough that its answers differ, and the toy's tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    model.to(torch.bfloat16).save_pretrained(folder)
    load_tokenizer(TOY / "teacher").save_pretrained(folder)
    return folder


def read_wanted(folder: Path, rows: list[Row], layers: tuple[int, ...]) -> list[torch.Tensor]:
    """States behind layers, of each row by itself, as transformers returns them."""
    model, wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), []
    for layer in layers:
        for row in rows:
            with torch.no_grad():
                states = model(
                    row.tokens.long()[None], output_hidden_states=True, output_router_logits=False
                ).hidden_states
            wanted.append(states[layer + 1][0])
    return wanted


@pytest.mark.slow
@pytest.mark.parametrize("kind", [SmolLM3Config, Qwen3MoeConfig], ids=["smollm3", "qwen3_moe"])
def test_states_are_transformers_also_after_an_interruption(
    kind: type[PretrainedConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states_module.list_shards, "__defaults__", (60,))
    config = kind(**SIZES, **(MIXTURE if kind is Qwen3MoeConfig else {}))
    folder = make_target(tmp_path / "target", config)
    generator = torch.Generator().manual_seed(0)
    rows = [Row(torch.randint(5, 500, (n,), dtype=torch.int32, generator=generator), 4, 0.0) for n in (40, 9, 120, 33)]
    described = read_served(folder).target
    assert described is not None

    def run(out: Path) -> list[torch.Tensor]:
        target = WholeTarget(folder, described, torch.float32, torch.device("cpu"))
        states = States(out, rows, (0, 2), target.count, SIZES["hidden_size"])
        states.compute_whole(target, Progress(quiet=True))
        return [states.read(layer, n, len(row.tokens)) for layer in (0, 2) for n, row in enumerate(rows)]

    whole = run(tmp_path / "whole")
    for got, wanted in zip(whole, read_wanted(folder, rows, (0, 2)), strict=True):
        assert torch.allclose(got.float(), wanted, rtol=0.02, atol=float(wanted.abs().max()) * 5e-3)

    calls = iter(range(9))

    def stop() -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(states_module, "check_signals", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut")
    computed: list[int] = []
    monkeypatch.setattr(states_module, "check_signals", lambda: computed.append(1))
    assert all(map(torch.equal, run(tmp_path / "cut"), whole))
    assert len(computed) == 1  # of three shards


def describe(target: Path, prompts: Path, out: Path, **changes: Any) -> DrafterTrainConfig:
    settings: dict[str, Any] = {
        "target": str(target),
        "prompts": prompts,
        "out": out,
        "temperature": (0.0,),
        "measure": (0.0,),
        "max_tokens": 48,
        "ignore_eos": True,
        "held_out": 2,
        "steps": 100,
        "layers": 1,
        "width": 128,
        "rows": 4,
        "lr": 3e-3,
        "mask_token": 3,
        "threads": 1,
        "eager": True,
    }
    return DrafterTrainConfig(**settings | changes)


def write_prompts(path: Path, count: int) -> Path:
    lines = (TOY / "prompts.jsonl").read_text().splitlines()[:count]
    path.write_text("\n".join(lines) + "\n")
    return path


def ask(engine: Engine, prompt: list[int], tokens: int) -> list[int]:
    body = {"model": engine.model_name, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    data = json.dumps(body | {"ignore_eos": True, "return_token_ids": True}).encode()
    request = urllib.request.Request(f"{engine.base_url}/v1/completions", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        tokens_out: list[int] = json.load(response)["choices"][0]["token_ids"]
        return tokens_out


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("form", ["laguna", "speculators"])
def test_drafter_is_served_and_accepted_as_measured(form: str, tmp_path: Path) -> None:
    """On what it learned by heart, as the answers of random weights have nothing in common with others."""
    target = make_target(tmp_path / "target", SmolLM3Config(**SIZES))
    asked = describe(target, write_prompts(tmp_path / "prompts.jsonl", 10), tmp_path / "out", format=form)
    train_drafter(asked)
    answers = [json.loads(line) for line in (tmp_path / "out/work/answers/answers.jsonl").read_text().splitlines()]
    drafter = (LagunaDrafter if form == "laguna" else SpeculatorsDrafter).load(tmp_path / "out")
    rows = [
        Row(torch.tensor(a["prompt_token_ids"] + a["token_ids"], dtype=torch.int32), len(a["prompt_token_ids"]), 0.0)
        for a in answers
    ]
    described = read_served(target).target
    assert described is not None
    whole = WholeTarget(target, described, torch.float32, torch.device("cpu"))
    states = States(tmp_path / "states", rows, drafter.shape.target_layer_ids, whole.count, SIZES["hidden_size"])
    states.compute_whole(whole, Progress(quiet=True))
    (expected,) = measure_drafter(drafter.eval(), Blocks(rows, states, Shared(*whole.load_shared())))
    assert expected.tau > 3

    config = EngineConfig(model=str(target), draft=str(tmp_path / "out"), enforce_eager=True, max_num_seqs=4)
    with Engine(config, log_path=tmp_path / "engine.log") as engine:
        said = [ask(engine, a["prompt_token_ids"], 48) for a in answers]
        counted = read_acceptance(engine.base_url)
    assert said == [a["token_ids"] for a in answers]
    assert counted is not None
    assert counted.length == pytest.approx(expected.tau, rel=0.12)


def write_original(folder: Path, drafter: SpeculatorsDrafter, layers: int) -> None:
    """A drafter without a head of its own, as DFlash's authors publish theirs."""
    shape, config = drafter.shape, drafter.config("target")["transformer_layer_config"]
    inner = {"mask_token_id": shape.mask_token_id, "target_layer_ids": list(shape.target_layer_ids)}
    names = {"architectures": ["DFlashDraftModel"], "dtype": "bfloat16", "num_target_layers": layers}
    folder.mkdir()
    config |= names | {"block_size": shape.block_size, "dflash_config": inner}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(drafter.list_tensors(), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.vllm
@pytest.mark.slow
def test_drafter_in_dflashs_own_format_is_served_and_nothing_else(tmp_path: Path) -> None:
    target = make_target(tmp_path / "target", Qwen3Config(**SIZES, head_dim=32))
    described = read_served(target).target
    assert described is not None
    whole = WholeTarget(target, described, torch.float32, torch.device("cpu"))
    shape = choose_shape(described, NewDrafter(format="speculators", layers=1, width=128), 3)
    torch.manual_seed(0)
    drafter = SpeculatorsDrafter(shape, torch.arange(512), own_head=False)
    texts = [json.loads(line)["prompt"] for line in (TOY / "prompts.jsonl").read_text().splitlines()[:6]]
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    tokens = load_tokenizer(TOY / "teacher")(texts)["input_ids"]
    rows = []
    for prompt in tokens:
        answer = model.generate(torch.tensor([prompt]), max_new_tokens=48, do_sample=False, pad_token_id=0)[0]
        rows.append(Row(answer.int(), len(prompt), 0.0))
    states = States(tmp_path / "states", rows, shape.target_layer_ids, whole.count, SIZES["hidden_size"])
    states.compute_whole(whole, Progress(quiet=True))
    blocks = Blocks(rows, states, Shared(*whole.load_shared()))
    fit_drafter(drafter, blocks, Fit("ce", 260, 3e-3, 4, 16, 4.0, 0, 1), tmp_path / "training.state")
    (expected,) = measure_drafter(drafter.eval(), blocks)
    assert expected.tau > 3
    folder = tmp_path / "original"
    write_original(folder, drafter, whole.count)

    config = EngineConfig(str(target), draft=str(folder), dtype="float32", enforce_eager=True, max_num_seqs=4)
    with Engine(config, log_path=tmp_path / "engine.log") as engine:
        said = [ask(engine, prompt, 48) for prompt in tokens]
        counted = read_acceptance(engine.base_url)
    assert said == [row.tokens[row.start :].tolist() for row in rows]
    assert counted is not None
    assert counted.length == pytest.approx(expected.tau, rel=0.12)
    with pytest.raises(CheckpointError, match="DFlash's own, which is only served"):
        read_warm(folder, described)


def test_plan_counts_the_whole_target(tmp_path: Path) -> None:
    target = make_target(tmp_path / "target", SmolLM3Config(**SIZES))
    plan = plan_drafter(describe(target, TOY / "prompts.jsonl", tmp_path / "out", dtype="bfloat16", taps=(0, 2)))
    weights = (target / "model.safetensors").stat().st_size
    assert weights < plan.states_memory_bytes < weights + 3 * 2 * 128 * 32768 + 4 * 2 * 4096 * 400
    assert plan.taps == (0, 2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (Gemma2Config(**SIZES, head_dim=32), "expected a Laguna, or one of .*Qwen3.*, got Gemma2ForCausalLM"),
        (Olmo2Config(**SIZES, rope_scaling={"rope_type": "yarn", "factor": 2.0}), "lengthened by its positions"),
    ],
    ids=["scaled embedding", "not planned"],
)
def test_what_no_drafter_can_be_trained_for_is_refused(config: PretrainedConfig, says: str, tmp_path: Path) -> None:
    folder = tmp_path / "target"
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    load_tokenizer(TOY / "teacher").save_pretrained(folder)
    with pytest.raises(CheckpointError, match=says):
        plan_drafter(describe(folder, TOY / "prompts.jsonl", tmp_path / "out"))


def test_whole_vocabulary_has_no_tables(tmp_path: Path) -> None:
    """vLLM has no place for them there, and refuses the checkpoint."""
    shape = LagunaDrafter.load(TOY / "dflash").shape
    for size, tables in ((shape.vocab_size, set()), (64, {"d2t", "t2d"})):
        folder = tmp_path / str(size)
        SpeculatorsDrafter(shape, torch.arange(size)).save(folder)
        found = set(SpeculatorsDrafter.load(folder).list_tensors())
        assert found & {"d2t", "t2d"} == tables
        assert open_drafter(folder, str(folder)).draft_vocab_size == size
