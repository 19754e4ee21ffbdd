"""vLLM as the target's side of a decode, without a cache: one state is one sequence of a pooling engine's.

It computes the same function by other kernels, with other bits: an oracle for this project's own passes, and a backend
where the uncached pass is bound by arithmetic and shared by many.

    with VllmModel(folder) as model:
        Decoder(Predictor(model), reference, stop).decode(canvases)
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

import torch

from laguna_serve.plugins.diffusion.checkpoint import read_config
from laguna_serve.plugins.diffusion.errors import DiffusionError
from laguna_serve.plugins.diffusion.passes import RowOutput, RowSet

# For the engine's process, which was asked to end.
STOP_S = 10.0


class VllmModel:
    """A pooling engine of vLLM's in this process that runs passes as `passes.run_pass` does; close it after use."""

    def __init__(self, folder: Path, dtype: str = "float32", **engine: Any) -> None:
        """Start the engine; `engine` goes to `vllm.LLM`.

        Raises:
            DiffusionError: the folder holds no LLaDA that is carried.
        """
        from vllm import LLM

        from laguna_serve.plugins.models.llada import describe

        self.config = read_config(folder)
        options = {"max_model_len": self.config.max_sequence_length, "enforce_eager": True} | engine
        with TemporaryDirectory() as described:  # transformers knows no "llada"
            describe(folder).save_pretrained(described)
            self._engine: Any = LLM(
                str(folder),
                runner="pooling",
                dtype=dtype,
                hf_config_path=described,
                disable_log_stats=True,
                **options,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the engine and its process, of which nothing is left."""
        self._engine.llm_engine.engine_core.shutdown()
        for process in multiprocessing.active_children():  # asking reaps those that have ended
            if process.name.startswith("EngineCore"):
                process.join(STOP_S)

    def run_pass(self, row_sets: Sequence[RowSet]) -> list[RowOutput]:
        """Compute the wanted logits of whole sequences.

        Raises:
            DiffusionError: a row set has a context or is to be kept: there is no cache.
        """
        from vllm import PoolingParams

        if any(rows.context is not None or rows.keep or rows.first for rows in row_sets):
            raise DiffusionError("cache: expected none with vLLM as the mask predictor, got one; use this engine's own")
        outputs = self._engine.encode(
            [{"prompt_token_ids": list(rows.ids)} for rows in row_sets],
            PoolingParams(use_activation=False),
            pooling_task="token_classify",
            use_tqdm=False,
        )
        return [
            RowOutput(self._cut(output.outputs.data)[rows.wanted], ())
            for rows, output in zip(row_sets, outputs, strict=True)
        ]

    def _cut(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[:, : self.config.vocab_size].float()
