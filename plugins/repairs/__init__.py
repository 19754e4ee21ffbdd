"""Repairs of vLLM's sampling on a CPU: what one request may ask for no longer ends the engine, nor is it refused.

One module per fault, each with the vLLM version it was checked against and the test that fails when it can go.  All
are for model runner V1, the one that serves a CPU.  They replace attributes of vLLM's modules in every process that
loads the plugin: the front end checks the parameters, the engine samples.
"""

from __future__ import annotations

from typing import Any


def apply_repairs() -> None:
    """Repair this process's vLLM; calling it again changes nothing.

    The model runner's module brings every drafter's model along, and the front end needs neither: it is repaired when a
    runner makes its sampler, and not imported before.
    """
    from vllm.v1.sample.sampler import Sampler

    from laguna_serve.plugins.repairs import drafted_sampling, token_logprobs

    token_logprobs.apply()
    drafted_sampling.apply()
    stock_init = Sampler.__init__
    if getattr(stock_init, "repairs_runner", False):
        return

    def init(self: Sampler, *args: Any, **kwargs: Any) -> None:
        from laguna_serve.plugins.repairs import seeds

        seeds.apply()
        drafted_sampling.apply_to_runner()
        stock_init(self, *args, **kwargs)

    init.repairs_runner = True  # type: ignore[attr-defined]
    Sampler.__init__ = init
