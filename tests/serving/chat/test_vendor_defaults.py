"""The vendor's serving line by default, and what releases and users change about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_fakes import HERMES, LAGUNA_THINKS, LAGUNA_V2, LAGUNA_V8, PLAIN, REFUSES, TOKENS, write_release
from serving_fakes import TARGET, MakeCheckpoint

from laguna_serve.serving.chat.release import Release
from laguna_serve.serving.chat.template import Abilities, probe_template
from laguna_serve.serving.chat.vendor_defaults import (
    ChatOptions,
    choose_chat_flags,
    choose_environment,
    describe_chat,
)
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.kit.flags.vllm import find_value, find_whole
from laguna_serve.serving.machine.device import Device
from laguna_serve.serving.machine.memory import GIB
from laguna_serve.serving.planning.command import build_command, build_environment, choose_settings
from laguna_serve.serving.planning.engine_config import EngineConfig
from laguna_serve.serving.planning.inspection import inspect

CPU = Device("cpu", "cpu", 24 * GIB, 16 * GIB)
GPU = Device("gpu", "NVIDIA H200", 140 * GIB, 139 * GIB)
AUTO = ["--enable-auto-tool-choice"]
TOOLS = [*AUTO, "--tool-call-parser", "poolside_v1"]
MARKS = json.dumps({"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"})
REASONING = ["--reasoning-parser", "poolside_v1", "--reasoning-config", MARKS]
FP8_BLOCKS: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
        }
    },
}
NVFP4: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group"}}},
}


def kwargs(**variables: Any) -> list[str]:
    return ["--default-chat-template-kwargs", json.dumps(variables)]


def chat_flags(folder: Path, *extra: str, **options: Any) -> list[str]:
    """Those that the launcher adds to vLLM's command."""
    model, chat = str(folder), ChatOptions(**options)
    with_chat, without = (
        build_command(config, inspect(config), CPU, 8001)
        for config in (EngineConfig(model, chat=chat, extra_args=extra), EngineConfig(model, extra_args=extra))
    )
    end = len(with_chat) - len(extra)
    assert with_chat[end:] == list(extra)
    assert with_chat[: len(without) - len(extra)] == without[: len(without) - len(extra)]
    return with_chat[len(without) - len(extra) : end]


@pytest.mark.parametrize(
    ("template", "abilities"),
    [
        (LAGUNA_V2, Abilities(tools=True, thinking=True)),
        (LAGUNA_V8, Abilities(tools=True, thinking=True)),
        (LAGUNA_THINKS, Abilities(tools=True, thinking=True, thinks_by_default=True)),
        (PLAIN, Abilities()),
        (HERMES, Abilities()),
        ("{{ '<think>' }}", Abilities(thinks_by_default=True)),
        (REFUSES, Abilities(error="no chats here")),
        ("{% if %}", Abilities(error="Expected an expression, got 'end of statement block'")),
        ("{{ messages[7].content.upper() }}", Abilities(error="list object has no element 7")),
    ],
    ids=["v2", "v8", "thinks by default", "plain", "another form", "always thinks", "refuses", "syntax", "undefined"],
)
def test_probe_finds_what_a_template_can_do(template: str, abilities: Abilities) -> None:
    assert probe_template(template) == abilities


@pytest.mark.parametrize("template", [LAGUNA_V2, LAGUNA_V8])
@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json", "chat_template.json", "named"])
def test_release_gets_the_vendors_flags_wherever_its_template_lies(target: Path, template: str, where: str) -> None:
    assert chat_flags(write_release(target, template, where=where)) == [*TOOLS, *REASONING]


def test_benchmarks_and_other_engines_stay_as_they_were(target: Path) -> None:
    config = EngineConfig(str(write_release(target, LAGUNA_V2)))
    assert "poolside_v1" not in build_command(config, inspect(config), CPU, 8001)


def test_generation_config_names_parsers_and_variables(target: Path) -> None:
    generation = {
        "temperature": 1.0,
        "top_k": 20,
        "tool_call_parser": "poolside_v2",
        "reasoning_parser": "poolside_v3",
        "default_chat_template_kwargs": {"enable_thinking": True, "preserve_thinking": True},
    }
    folder = write_release(target, LAGUNA_V8, generation)
    parsers = [*AUTO, "--tool-call-parser", "poolside_v2", "--reasoning-parser", "poolside_v3"]
    assert chat_flags(folder) == [*parsers, *kwargs(enable_thinking=True, preserve_thinking=True)]
    assert chat_flags(folder, thinking="off") == [*parsers, *kwargs(enable_thinking=False, preserve_thinking=True)]
    assert chat_flags(folder, thinking="template") == [*parsers, *kwargs(preserve_thinking=True)]


def test_thinking_by_the_templates_own_default_is_said_to_the_reasoning_parser(target: Path) -> None:
    folder = write_release(target, LAGUNA_THINKS)
    for thinking in (None, "template", "on"):
        assert chat_flags(folder, thinking=thinking) == [*TOOLS, *REASONING, *kwargs(enable_thinking=True)]
    assert chat_flags(folder, thinking="off") == [*TOOLS, *REASONING, *kwargs(enable_thinking=False)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"tool_call_parser": "none"}, REASONING),
        ({"tool_call_parser": "hermes"}, [*AUTO, "--tool-call-parser", "hermes", *REASONING]),
        ({"reasoning_parser": "none"}, TOOLS),
        ({"reasoning_parser": "qwen3"}, [*TOOLS, "--reasoning-parser", "qwen3"]),
        ({"thinking": "on"}, [*TOOLS, *REASONING, *kwargs(enable_thinking=True)]),
        ({"thinking": "off"}, [*TOOLS, *REASONING, *kwargs(enable_thinking=False)]),
        ({"thinking": "template"}, [*TOOLS, *REASONING]),
    ],
    ids=str,
)
def test_options_change_it(target: Path, options: dict[str, Any], expected: list[str]) -> None:
    assert chat_flags(write_release(target, LAGUNA_V2), **options) == expected


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--tool-call-parser", "hermes"], [*AUTO, *REASONING]),
        (["--tool_call_parser=hermes"], [*AUTO, *REASONING]),
        (["--no-enable-auto-tool-choice"], [*TOOLS[1:], *REASONING]),
        (["--reasoning-parser=qwen3"], TOOLS),
        (["--reasoning-config", "{}"], [*TOOLS, *REASONING[:2]]),
        (["--reasoning-config.reasoning_end_str", "</think>"], [*TOOLS, *REASONING[:2]]),
        (["--default-chat-template-kwargs", "{}"], [*TOOLS, *REASONING]),
        (["--chat-template", PLAIN], []),
        (["--chat-template", "{file}"], [*TOOLS, *REASONING, *kwargs(enable_thinking=True)]),
    ],
    ids=str,
)
def test_flags_after_the_dashes_win(target: Path, tmp_path: Path, extra: list[str], expected: list[str]) -> None:
    file = tmp_path / "thinks.jinja"
    file.write_text(LAGUNA_THINKS)
    given = [argument.replace("{file}", str(file)) if argument == "{file}" else argument for argument in extra]
    assert chat_flags(write_release(target, LAGUNA_V2), *given) == expected


@pytest.mark.parametrize(
    ("template", "tokens", "expected"),
    [
        (None, TOKENS, []),
        (PLAIN, TOKENS, []),
        (HERMES, TOKENS, []),
        (REFUSES, TOKENS, []),
        (LAGUNA_V2, ("<think>", "</think>"), TOOLS),
    ],
    ids=["no template", "plain", "another form", "refuses", "no <assistant>"],
)
def test_what_a_release_cannot_do_is_left_out(
    target: Path, template: str | None, tokens: tuple[str, ...], expected: list[str]
) -> None:
    assert chat_flags(write_release(target, template, tokens=tokens)) == expected


def test_absent_flags_have_a_reason(target: Path) -> None:
    def notes(template: str | None, tokens: tuple[str, ...] = TOKENS) -> tuple[str, ...]:
        config = EngineConfig(str(write_release(target, template, tokens=tokens)), chat=ChatOptions())
        return inspect(config).chat.notes

    assert notes(LAGUNA_V2) == ()
    assert "another form" in notes(HERMES)[0]
    assert "no chats here" in notes(REFUSES)[0]
    assert notes(LAGUNA_V2, ("<think>",)) == (
        "no reasoning parser: the tokenizer has no token <assistant> or </think>",
    )


def test_every_flag_has_a_reason() -> None:
    contract = choose_chat_flags(Release("m", Abilities(True, True, True)), ChatOptions())
    assert [setting.name for setting in contract.flags] == [*AUTO, TOOLS[1], *REASONING[::2], kwargs()[0]]
    assert all(setting.reason for setting in contract.flags)


@pytest.mark.parametrize("thinking", ["on", "off"])
@pytest.mark.parametrize(("template", "got"), [(None, "no chat template"), (PLAIN, "one without that switch")])
def test_thinking_is_refused_where_the_template_has_no_switch(
    target: Path, template: str | None, got: str, thinking: str
) -> None:
    with pytest.raises(CheckpointError, match=f"^--thinking {thinking}: expected a chat template with .*, got {got}; "):
        chat_flags(write_release(target, template), thinking=thinking)


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"tool_call_parser": ["x"]}, r"expected tool_call_parser to be a name, got \['x'\]"),
        ({"default_chat_template_kwargs": "x"}, "expected default_chat_template_kwargs to be an object, got 'x'"),
        ([], "expected a JSON object, got list"),
    ],
    ids=str,
)
def test_damaged_generation_config_is_one_line(target: Path, generation: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        chat_flags(write_release(target, LAGUNA_V2, generation))


@pytest.mark.parametrize(
    ("hub_id", "expected"),
    [
        ("poolside/Laguna-XS.2", [*TOOLS, *REASONING]),
        (
            "poolside/Laguna-S-2.1-FP8",
            [*TOOLS, *REASONING, "--default-chat-template-kwargs", '{"enable_thinking": true}'],
        ),
        ("poolside/Laguna-XS.2-base", []),
        ("someone/laguna-tune", []),
    ],
)
def test_hub_id_that_is_not_here_is_known_by_its_publisher(
    hub_id: str, expected: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    config = EngineConfig(hub_id, chat=ChatOptions())
    assert inspect(config).chat.arguments == expected


def test_gpu_environment_is_what_the_checkpoints_need(make_checkpoint: MakeCheckpoint, drafter: Path) -> None:
    def chosen(device: Device, draft: bool, **changes: Any) -> dict[str, str | None]:
        name = f"target-{device.kind}-{draft}-{'-'.join(changes)}"
        folder = make_checkpoint(name, TARGET, **changes)
        config = EngineConfig(str(folder), draft=str(drafter) if draft else None)
        settings = choose_settings(config, inspect(config), device)
        assert all(setting.reason for setting in settings)
        return {setting.name: setting.value for setting in settings}

    assert chosen(GPU, draft=False) == {}
    assert chosen(GPU, draft=True) == {"VLLM_USE_DEEP_GEMM": "0"}
    fp8 = {"VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER": "0"}
    assert chosen(GPU, draft=False, quantization_config=FP8_BLOCKS) == fp8
    assert chosen(GPU, draft=True, quantization_config=FP8_BLOCKS) == {"VLLM_USE_DEEP_GEMM": "0", **fp8}
    assert chosen(CPU, draft=True) == {"VLLM_USE_V2_MODEL_RUNNER": "0"}


@pytest.mark.parametrize(
    ("quantization", "blocks"),
    [
        (FP8_BLOCKS, True),
        (NVFP4, False),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, True),
        ({"quant_method": "fp8"}, False),
        (None, False),
    ],
    ids=["compressed-tensors", "nvfp4", "fp8 blocks", "fp8 tensors", "none"],
)
def test_flashinfer_variable_is_for_fp8_blocks(quantization: object, blocks: bool) -> None:
    settings = choose_environment("gpu", drafter=False, configs=[{"quantization_config": quantization}])
    assert bool(settings) is blocks


def test_users_own_environment_stays() -> None:
    settings = choose_environment("cpu", drafter=False)
    chosen = build_environment({"VLLM_USE_V2_MODEL_RUNNER": "1"}, CPU, local=True, settings=settings)
    assert chosen["VLLM_USE_V2_MODEL_RUNNER"] == "1"
    assert build_environment({}, CPU, local=True, settings=settings)["VLLM_USE_V2_MODEL_RUNNER"] == "0"


def test_find_value_takes_the_last_in_any_spelling() -> None:
    assert find_value(["--a", "1", "--tool_call_parser=x", "--tool-call-parser", "y"], "--tool-call-parser") == "y"
    assert find_value(["--tool-call-parser"], "--tool-call-parser") is None
    assert find_value([], "--a") is None


@pytest.mark.parametrize(
    ("text", "number"),
    [("8192", 8192), (" 8k", 8000), ("8K", 8192), ("2.5g", 2_500_000_000), ("4G", 4 << 30), ("1T", 1 << 40)]
    + [(text, None) for text in ("", "2.5G", "4e9", "1GiB", "-1", "auto", "1.5")],
)
def test_find_whole_reads_numbers_as_vllm_does(text: str, number: int | None) -> None:
    assert find_whole([f"--kv_cache_memory_bytes={text}"], "--kv-cache-memory-bytes") == number


def test_people_are_told_what_a_chat_can_do(target: Path) -> None:
    def said(template: str | None, *extra: str, **options: Any) -> list[str]:
        config = EngineConfig(str(write_release(target, template)), chat=ChatOptions(**options), extra_args=extra)
        return describe_chat(inspect(config).chat)

    assert said(None) == []
    switch = ' (per request: "chat_template_kwargs": {"enable_thinking": true|false})'
    assert said(LAGUNA_V2) == [f"tool calls: on (poolside_v1); thinking: off{switch}"]
    assert said(LAGUNA_V2, thinking="on", tool_call_parser="none") == [f"tool calls: off; thinking: on{switch}"]
    assert said(LAGUNA_V2, *kwargs(enable_thinking=True)) == [f"tool calls: on (poolside_v1); thinking: on{switch}"]
    assert said(PLAIN)[0] == "tool calls: off; thinking: not by this chat template"
