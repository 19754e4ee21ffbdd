"""What vLLM asks of a model's class on a CPU: asked in this process, which imports the class anyway.

Before it makes an engine, vLLM asks every model class what it can do (its attention, whether it pools), in a new
interpreter: an import there might take hold of a GPU. That interpreter imports torch and vLLM, six seconds on two
cores for the target and again for its drafter, at the first start after each change of a model's file. A CPU is not
taken hold of, and the engine's core, forked from this process (core.py), finds the class imported.

Checked against vLLM 0.32.0. It can go when `test_stock_asks_classes_in_another_interpreter` of
tests/plugins/test_processes.py fails.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")


def inspect_here() -> None:
    """Make vLLM inspect model classes in this process; calling it again changes nothing."""
    try:
        from vllm.model_executor.models import registry

        registry._run_in_subprocess  # noqa: B018
    except (ImportError, AttributeError) as error:
        logger.warning("model classes: expected the registry of vLLM 0.32, got %s; vLLM asks as it does", error)
        return
    registry._run_in_subprocess = ask_here


def ask_here(question: Callable[[], Answer]) -> Answer:
    """Answer what vLLM's `_run_in_subprocess` would have a new interpreter answer."""
    return question()
