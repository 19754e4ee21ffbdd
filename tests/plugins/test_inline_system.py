"""System messages between turns, as coding agents send them, where the chat template marks what the assistant says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from laguna_serve.plugins.repairs.front_end import inline_system

pytestmark = pytest.mark.vllm

TOY = Path(__file__).parents[1] / "toy"
MARKED = (TOY / "teacher" / "chat_template.jinja").read_text()
REFUSES = "{%- generation -%}{%- endgeneration -%}" + (
    "{%- for message in messages -%}{%- if message.role == 'system' and not loop.first -%}"
    "{{- undefined_function() -}}{%- endif -%}{%- endfor -%}"
)


@pytest.fixture
def stock() -> Callable[[str | None], bool]:
    """vLLM's own, also where the plugin has been loaded."""
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages

    found = AnthropicServingMessages._detect_merge_inline_system
    return found.__closure__[0].cell_contents if getattr(found, "knows_generation", False) else found


def test_stock_takes_the_generation_tag_for_a_refusal(stock: Callable[[str | None], bool]) -> None:
    """When this fails, vLLM knows the tag: retire plugins/repairs/front_end/inline_system.py."""
    assert stock(MARKED) is True


def test_marked_template_keeps_system_messages_in_place(stock: Callable[[str | None], bool]) -> None:
    assert inline_system.wrap(stock)(MARKED) is False
    assert inline_system.wrap(stock)(MARKED.replace("{%-", "{%").replace("-%}", "%}")) is False


@pytest.mark.parametrize("template", [None, "", REFUSES], ids=["none", "empty", "refuses"])
def test_other_templates_are_judged_as_before(stock: Callable[[str | None], bool], template: str | None) -> None:
    assert inline_system.wrap(stock)(template) is True


def test_apply_replaces_it_once(monkeypatch: pytest.MonkeyPatch, stock: Callable[[str | None], bool]) -> None:
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages

    monkeypatch.setattr(AnthropicServingMessages, "_detect_merge_inline_system", staticmethod(stock))
    inline_system.apply()
    repaired = AnthropicServingMessages._detect_merge_inline_system
    assert repaired(MARKED) is False
    inline_system.apply()
    assert AnthropicServingMessages._detect_merge_inline_system is repaired
