"""System messages between turns stay where they are, for chat templates that mark what the assistant says.

Coding agents of the Messages API put reminders into the conversation as system messages. vLLM tries once whether the
chat template takes those, with a Jinja that does not know transformers' `{% generation %}` tag, which every Laguna
release has: the template fails, is taken for one that does not, and each new reminder is moved to the very front of the
prompt. So the whole conversation misses the prefix cache at every turn.

Checked against vLLM 0.26.0, 0.32.0 and 0.33.0. It can go when
`tests/plugins/test_inline_system.py::test_stock_takes_the_generation_tag_for_a_refusal` fails.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

SERVING = "vllm.entrypoints.anthropic.serving"
GENERATION_TAG = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")


def wrap(stock: Callable[[str | None], bool]) -> Callable[[str | None], bool]:
    """Wrap the trial, which gets a template without the tags: they mark what they hold and change nothing."""

    def detect(chat_template: str | None) -> bool:
        return stock(GENERATION_TAG.sub("", chat_template) if chat_template else chat_template)

    detect.knows_generation = True  # type: ignore[attr-defined]
    return detect


def apply() -> None:
    """Replace vLLM's function in the process that answers requests; elsewhere its module is not there."""
    module = sys.modules.get(SERVING)
    if module is None:
        return
    stock = module.AnthropicServingMessages._detect_merge_inline_system
    if not getattr(stock, "knows_generation", False):
        module.AnthropicServingMessages._detect_merge_inline_system = staticmethod(wrap(stock))
