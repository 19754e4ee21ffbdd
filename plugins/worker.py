"""vLLM's CPU worker, with a drafter that goes on drafting beside a request at the length limit.

vLLM's V1 model runner skips the drafter for a whole step when one sequence of the batch leaves no room for γ + 1 more
tokens below the maximum length. A DFlash drafter then never gets the keys and values of what that step computed, for
any request: beside a request that ends at the limit, the others' prompts are missing from their context for good, and
with prefix caching from that of later requests, too. (On the toy pair τ falls from 3.69 to 1.58, and to 2.24
afterwards.) The V2 runner, which a CPU cannot run, drafts on and clamps.

Here the room is counted up to the end of the last block, which exists anyway; the launcher chooses a length that leaves
enough of it (serving/planning/command.py), and with less nothing is changed.

An engine that returns routed experts gets a runner that records them (routed_experts/runner.py).

Checked against vLLM 0.32.0. It can go when
`tests/plugins/test_worker.py::test_stock_worker_loses_the_context_of_other_requests` fails.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker import cpu_worker

from laguna_serve.plugins.routed_experts.tap import returns_experts


class CPUWorker(cpu_worker.CPUWorker):  # type: ignore[misc]
    """Given to vLLM with --worker-cls; does nothing of its own without a drafter or routed experts to return."""

    def find_runner(self) -> type[cpu_worker.CPUModelRunner]:
        """Find the class of the model runner to make."""
        from laguna_serve.plugins.drafting.runner import DraftingModelRunner

        return DraftingModelRunner

    def init_device(self) -> None:
        """Make the model runner, and count the places behind the maximum length as room for drafts."""
        runner: Any = self.find_runner()
        if returns_experts(self.vllm_config):
            from laguna_serve.plugins.routed_experts.runner import RecordingRunner

            runner = type(f"Recording{runner.__name__}", (RecordingRunner, runner), {})
        stock, cpu_worker.CPUModelRunner = cpu_worker.CPUModelRunner, runner
        try:
            super().init_device()
        finally:
            cpu_worker.CPUModelRunner = stock
        speculation = self.vllm_config.speculative_config
        if speculation is None:
            return
        block, length = self.vllm_config.cache_config.block_size, self.model_runner.max_model_len
        room = -length % block
        if room >= speculation.num_speculative_tokens + 1:
            self.model_runner.effective_drafter_max_model_len += room


class AdaptiveCPUWorker(CPUWorker):
    """The same, with the number of drafted tokens decided before every step (`--gamma adaptive`)."""

    def find_runner(self) -> type[cpu_worker.CPUModelRunner]:
        """Find the class of the runner that decides."""
        from laguna_serve.plugins.adaptive.runner import AdaptiveModelRunner

        return AdaptiveModelRunner
