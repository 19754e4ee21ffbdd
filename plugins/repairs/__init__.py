"""Repairs of vLLM's serving: what one request asks for neither ends the engine nor is refused without need.

One module per fault, each with the vLLM version it was checked against and the test that fails when it can go. They
replace attributes of vLLM's modules in every process that loads the plugin: the front end checks, the engine samples.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

# What holds for every device, in the front end.
FRONT_END = (
    "grammar_limits",
    "unsendable",
    "leaving",
    "client_errors",
    "anthropic_errors",
    "anthropic_streams",
    "inline_system",
    "response_nulls",
    "response_stream_errors",
    "router_errors",
)
# Sequences that one prompt may ask for (`n`, beams): OpenAI's limit. vLLM's own is 16,384, which one request of a few
# bytes turns into hours of everybody's time.
MOST_SEQUENCES = 128


def repair_front_end() -> None:
    """Repair what checks requests and answers them, on every device."""
    os.environ.setdefault("VLLM_MAX_N_SEQUENCES", str(MOST_SEQUENCES))
    for name in FRONT_END:
        _attempt(name, lambda name=name: importlib.import_module(f"{__name__}.front_end.{name}").apply())  # type: ignore[misc]


def repair_runner() -> None:
    """Repair model runner V1 on a CPU, its sampling and its start; calling it again changes nothing."""
    _attempt("the model runner", _repair_runner)
    _attempt("routed experts", _admit_routed_experts)


def _attempt(name: str, repair: Callable[[], None]) -> None:
    """Leave what another vLLM does not have as it is, with a warning: our classes do not need it."""
    try:
        repair()
    except (ImportError, AttributeError) as error:
        logger.warning("repair of %s: expected the modules of vLLM 0.32, got %s; it is left out", name, error)


def _admit_routed_experts() -> None:
    from laguna_serve.plugins.repairs import routed_experts

    routed_experts.apply()


def _repair_runner() -> None:
    """Repair the runner when it makes its sampler, not before.

    Its module brings every drafter's model along, and the front end needs neither.
    """
    from vllm.v1.sample.sampler import Sampler

    from laguna_serve.plugins.repairs import (
        drafted_sampling,
        parameters,
        thinking_budget,
        token_logprobs,
        trailing_block,
    )

    parameters.apply()
    trailing_block.apply()
    token_logprobs.apply()
    drafted_sampling.apply()
    thinking_budget.apply()
    stock_init = Sampler.__init__
    if getattr(stock_init, "repairs_runner", False):
        return

    def init(self: Sampler, *args: Any, **kwargs: Any) -> None:
        from laguna_serve.plugins.repairs import collectives, compilation, padded_rows, seeds

        collectives.apply()
        compilation.apply()
        seeds.apply()
        padded_rows.apply()
        drafted_sampling.apply_to_runner()
        stock_init(self, *args, **kwargs)

    init.repairs_runner = True  # type: ignore[attr-defined]
    Sampler.__init__ = init
