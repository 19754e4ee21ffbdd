"""vLLM's CPU model runner with the experts of every step recorded and handed to the scheduler.

vLLM's connector for this is wired to model runner V2, which a CPU cannot run; its scheduler does not ask which runner
there is. Here runner V1 drives the same connector: the rows of a step, less those of rejected drafts, become blocks
under the hashes of the KV cache, so that a request which finds its prompt there finds its experts, too.

Checked against vLLM 0.32.0, without asynchronous scheduling, which vLLM turns off on a CPU. It can go when
`tests/plugins/test_routed_experts.py::test_stock_runner_is_refused` fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm.distributed.aux_output_connector.worker import AuxOutputWorkerConnector, get_aux_output_connector
from vllm.v1.worker.cpu_model_runner import CPUModelRunner


@dataclass(frozen=True, slots=True)
class StepRows:
    """Which rows of a step are whose, in the names of runner V2's batch.

    Request i has the rows from `query_start_loc_np[i]` to `[i + 1]`, of its tokens from `num_computed_tokens_np[i]` on.
    """

    req_ids: list[str]
    query_start_loc_np: np.ndarray
    num_computed_tokens_np: np.ndarray


class RecordingRunner(CPUModelRunner):  # type: ignore[misc]
    """Model runner V1, or one derived from it beside this class, that returns routed experts."""

    _recorder: AuxOutputWorkerConnector
    _scheduled: Any

    def initialize_kv_cache(self, kv_cache_config: Any, is_profiling: bool = False, **named: Any) -> None:
        """Bind a recorder to the model, whose store has room for what the KV cache has."""
        super().initialize_kv_cache(kv_cache_config, is_profiling, **named)
        if not is_profiling:
            self._recorder = get_aux_output_connector(self.model, self.vllm_config, self.kv_cache_config)

    def execute_model(self, scheduler_output: Any, *args: Any, **named: Any) -> Any:
        """Tell the recorder who comes and goes, and run the model."""
        self._scheduled = scheduler_output
        self._recorder.begin_step(scheduler_output.aux_output_connector_metadata)
        return super().execute_model(scheduler_output, *args, **named)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample, and send the experts of the tokens that stay with them."""
        if self.execute_model_state is None:
            return super().sample_tokens(grammar_output)
        requests = self.input_batch.num_reqs
        rows = StepRows(
            list(self.input_batch.req_ids),
            self.query_start_loc.np[: requests + 1].copy(),
            self.input_batch.num_computed_tokens_cpu[:requests].copy(),
        )
        output = super().sample_tokens(grammar_output)
        recorded = self._recorder.prepare_output(rows)
        if recorded is not None:
            sampled = np.array([len(tokens) for tokens in output.sampled_token_ids])
            drafts = self._scheduled.scheduled_spec_decode_tokens
            drafted = np.array([len(drafts.get(request, ())) for request in rows.req_ids])
            rejected = np.where(sampled > 0, drafted + 1 - sampled, 0)
            recorded.enqueue_cpu_copy(sampled, rejected)
            output.aux_output_connector_output = recorded.process_output()
        return output
