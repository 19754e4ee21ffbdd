"""vLLM refuses to return routed experts without model runner V2; our worker does it on a CPU without (runner.py).

All else that vLLM's check refuses stays refused: dense models, no prefix caching, several pipeline stages.
Checked against vLLM 0.32.0.
"""

from __future__ import annotations

from typing import Any

# Where the workers are that record.
WORKERS = "laguna_serve.plugins.worker."


class _OnRunnerV2:
    """A configuration as the check reads it, with the runner that it asks for."""

    use_v2_model_runner = True

    def __init__(self, vllm_config: Any) -> None:
        self._vllm_config = vllm_config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vllm_config, name)


def apply() -> None:
    """Make the check pass for an engine whose worker records; calling it again changes nothing."""
    from vllm.config import VllmConfig

    stock = VllmConfig._verify_aux_output_compatibility
    if getattr(stock, "knows_recording_workers", False):
        return

    def verify(self: Any) -> None:
        stock(_OnRunnerV2(self) if str(self.parallel_config.worker_cls).startswith(WORKERS) else self)

    verify.knows_recording_workers = True  # type: ignore[attr-defined]
    VllmConfig._verify_aux_output_compatibility = verify
