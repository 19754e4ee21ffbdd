"""What the vendor's defaults rest on in the vLLM that is installed; a test that fails here says what can go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from laguna_serve.serving.chat.vendor_defaults import POOLSIDE, choose_environment

pytestmark = pytest.mark.vllm

TOY = Path(__file__).parents[2] / "toy"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TOY / "teacher")


def test_both_parsers_are_there_and_take_the_toys_tokenizer(tokenizer: Any) -> None:
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    assert ReasoningParserManager.get_reasoning_parser(POOLSIDE)(tokenizer, **thinking).reasoning_start_str == "<think>"
    assert ToolParserManager.get_tool_parser(POOLSIDE)(tokenizer).tool_call_start_token_id is not None


def test_stock_parser_does_not_tell_the_marks_of_thinking(tokenizer: Any) -> None:
    """While this holds, --reasoning-config must name them; vLLM asks a parser that was made without variables."""
    from vllm.reasoning import ReasoningParserManager

    assert ReasoningParserManager.get_reasoning_parser(POOLSIDE)(tokenizer).reasoning_start_str is None


def test_vllm_knows_every_variable() -> None:
    from vllm import envs

    fp8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    settings = [*choose_environment("cpu", drafter=True), *choose_environment("gpu", drafter=True, configs=[fp8])]
    assert len(settings) == 3
    assert {setting.name for setting in settings} <= set(envs.environment_variables)


@pytest.mark.parametrize(("variable", "v2"), [(None, True), ("0", False)], ids=["stock", "ours"])
def test_triton_on_a_cpu_would_choose_the_other_runner(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, v2: bool
) -> None:
    """On the day that the first case fails stock vLLM keeps to V1 by itself, and the variable can go."""
    from vllm.config import VllmConfig
    from vllm.config import vllm as config_module

    monkeypatch.setattr(config_module, "HAS_TRITON", True)
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    if variable is not None:
        (setting,) = choose_environment("cpu", drafter=False)
        assert (setting.name, setting.value) == ("VLLM_USE_V2_MODEL_RUNNER", variable)
        monkeypatch.setenv(setting.name, variable)
    assert VllmConfig().use_v2_model_runner is v2
