"""A LLaDA is recognised, planned for its own engine, and refused what means nothing for it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_llada import write_llada

from laguna_serve.plugins.diffusion.checkpoint import LladaConfig
from laguna_serve.plugins.diffusion.model import Llada
from laguna_serve.plugins.diffusion.server.options import parse_options
from laguna_serve.serving.chat.vendor_defaults import ChatOptions
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.checkpoint.diffusion import DEFAULT_LENGTH, DiffusionModel, find_diffusion
from laguna_serve.serving.cli import main
from laguna_serve.serving.machine.device import Device
from laguna_serve.serving.planning.diffusion.plan import DiffusionPlanResult, format_diffusion, plan_diffusion
from laguna_serve.serving.planning.engine_config import EngineConfig
from laguna_serve.serving.planning.launch import EngineError, plan_launch

CPU = Device("cpu", "a processor", 1 << 34, 1 << 34)


@pytest.fixture(scope="module")
def llada(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llada(tmp_path_factory.mktemp("llada") / "llada")


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llada(tmp_path_factory.mktemp("llada") / "draft", error=0.02)


def read(folder: Path) -> DiffusionModel:
    found = find_diffusion(str(folder))
    assert found is not None
    return found


def change(folder: Path, tmp_path: Path, **keys: Any) -> Path:
    """The checkpoint without weights, with other keys in its config.json."""
    changed = tmp_path / "changed"
    changed.mkdir()
    config = json.loads((folder / "config.json").read_text()) | keys
    (changed / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return changed


def plan(model: Path, device: Device = CPU, **changes: Any) -> DiffusionPlanResult:
    return plan_diffusion(EngineConfig(str(model), **changes), read(model), device)


def test_its_shape_is_read_as_the_engine_reads_it(llada: Path) -> None:
    config = json.loads((llada / "config.json").read_text())
    shape = LladaConfig(**{name: config[name] for name in LladaConfig.__dataclass_fields__})
    parameters = sum(parameter.numel() for parameter in Llada(shape).parameters())
    assert read(llada).parameters == parameters
    assert LladaConfig.__dataclass_fields__["max_sequence_length"].default == DEFAULT_LENGTH


def test_the_published_size() -> None:
    """8.015 billion parameters, 5.365 billion of the pruned draft."""
    made = DiffusionModel(
        name="m",
        folder=Path("m"),
        layers=32,
        hidden_size=4096,
        heads=32,
        kv_heads=32,
        intermediate_size=12288,
        vocab_size=126464,
        rows=126464,
        tied=False,
        mask_token_id=126336,
        max_model_len=4096,
        dtype="bfloat16",
    )
    assert made.parameters == pytest.approx(8.015e9, rel=1e-3)
    assert replace(made, layers=24, intermediate_size=9216).parameters == pytest.approx(5.365e9, rel=1e-3)


def test_the_command_is_the_diffusion_servers(llada: Path, draft: Path) -> None:
    more = ("--cache", "dual", "--block-length", "16")
    launch = plan_launch(EngineConfig(str(llada), draft=str(draft), gamma=3, max_num_seqs=4, extra_args=more), "key")
    assert launch.command[1:4] == ["-m", "laguna_serve.plugins.diffusion.server", str(llada)]
    options = parse_options(launch.command[3:])
    assert (options.draft, options.states, options.max_num_seqs) == (str(draft), 3, 4)
    assert (options.cache, options.block_length, options.served_model_name) == ("dual", 16, "llada")
    assert launch.base_url == f"http://127.0.0.1:{options.port}"
    assert launch.environment["VLLM_API_KEY"] == "key"
    assert launch.chat.template
    assert launch.imports == "torch"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"exact": True}, "--exact: expected a Laguna, got a masked diffusion model"),
    ({"enforce_eager": True}, "--eager: expected a Laguna"),
    ({"weight_updates": True}, "--weight-updates: expected a Laguna"),
    ({"chat": ChatOptions(tool_call_parser="hermes")}, "--tool-call-parser: expected a Laguna"),
    ({"max_model_len": 999}, "--max-model-len: expected at most 256"),
    ({"dtype": "int8"}, "options: argument --dtype: invalid choice"),
    ({"extra_args": ("--port", "1")}, "--port: expected it from the launcher"),
    ({"extra_args": ("--nonsense",)}, "options: unrecognized arguments: --nonsense"),
    ({"extra_args": ("--threshold", "2")}, "--threshold: expected a probability"),
    ({"extra_args": ("--threshold", "0.5", "--tokens-per-step", "2")}, "schedule: expected one of them"),
    ({"extra_args": ("--proposer", "draft")}, "--proposer draft: expected --draft beside it"),
    ({"extra_args": ("--block-length", "0")}, "--block-length: expected at least 1"),
    ({"extra_args": ("--block-length", "256")}, "--block-length: expected fewer than 256, the longest sequence"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_means_nothing_is_refused(llada: Path, changes: dict[str, Any], message: str) -> None:
    made = plan(llada, **changes)
    assert made.refusals[0].startswith(message)
    assert (made.ok, made.command) == (False, ())
    with pytest.raises(EngineError) as caught:
        plan_launch(EngineConfig(str(llada), **changes))
    assert str(caught.value).startswith(message)


def test_drafts_that_do_not_fit_are_refused(llada: Path, tmp_path: Path, target: Path) -> None:
    other = change(llada, tmp_path, vocab_size=200)
    with pytest.raises(CheckpointError, match="expected vocab_size 261, as the model has, got 200"):
        plan(llada, draft=str(other))
    with pytest.raises(CheckpointError, match="expected a smaller LLaDA"):
        plan(llada, draft=str(target))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"architectures": ["LLaDAMoEModelLM"], "model_type": "llada_moe"}, "expected LLaDAModelLM, as LLaDA-8B has"),
        ({"n_layers": None}, "expected n_layers to be an integer, got nothing"),
        ({"n_heads": 5}, "expected heads of one even width"),
    ],
)
def test_others_are_refused(llada: Path, tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        find_diffusion(str(change(llada, tmp_path, **keys)))


def test_other_models_are_left_to_vllm(target: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert find_diffusion(str(target)) is None
    assert find_diffusion("poolside/Laguna-XS.2") is None
    with pytest.raises(CheckpointError, match="hf download GSAI-ML/LLaDA-8B-Instruct"):
        find_diffusion("GSAI-ML/LLaDA-8B-Instruct")


def test_ends_that_are_no_tokens_are_seen_before_a_start(llada: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(llada, odd)
    (odd / "generation_config.json").write_text('{"eos_token_id": {}, "temperature": "unread"}')
    with pytest.raises(EngineError, match=r"expected eos_token_id to be a token id, or a list of them, got \{\}"):
        plan_launch(EngineConfig(str(odd)))


def test_missing_files_are_seen_before_a_start(llada: Path, tmp_path: Path) -> None:
    bare = change(llada, tmp_path)
    assert "expected weights" in plan(bare).refusals[0]
    (bare / "model.safetensors").write_bytes((llada / "model.safetensors").read_bytes())
    assert "expected a tokenizer" in plan(bare).refusals[0]
    with pytest.raises(EngineError, match="expected a tokenizer"):
        plan_launch(EngineConfig(str(bare)))


def test_weights_have_to_fit(llada: Path) -> None:
    made = plan(llada, Device("gpu", "a card", 1000, 1000))
    assert made.refusals[0].startswith("memory: expected weights within the 0.0 MiB of a card")
    assert (made.dtype, plan(llada).dtype, plan(llada, dtype="half").dtype) == ("bfloat16", "float32", "float16")
    assert made.target.weights * 2 == plan(llada).target.weights


def test_doctor_and_rehearsal_say_what_it_is(llada: Path, draft: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["doctor", str(llada), "--draft", str(draft)], ["serve", str(llada), "--dry-run", "--port", "0"]):
        assert main(argv) == 0
        text = capsys.readouterr().out
        result = json.loads(text.splitlines()[-1])
        assert result["schema"] == "laguna_serve.diffusion_plan/1"
        assert result["architecture"] == "LLaDAModelLM"
        assert "masked diffusion, 2 layers" in text
        assert "-m laguna_serve.plugins.diffusion.server" in text
    assert main(["serve", str(llada), "--dry-run", "--port", "0", "--eager"]) == 2
    assert "refused       --eager: expected a Laguna" in capsys.readouterr().out
    assert "draft" in format_diffusion(plan(llada, draft=str(draft)))
