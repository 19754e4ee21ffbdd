"""Draft on a real engine by stock vLLM's functions and by ours in the same step; print, as JSON, where they differ.

    python drafting_probe.py TOY_FOLDER DRAFTER KERNELS

KERNELS: `ours`, with which the context is made by one call, or `vllm`.
Several requests of different lengths run beside each other, prompts come in parts, one request ends early.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

PROMPTS, TOKENS, PART = 6, 40, 48


def main(toy: Path, drafter: str, kernels: str) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    if kernels == "vllm":
        os.environ["LAGUNA_CPU_KERNELS"] = kernels
    from vllm import LLM, SamplingParams
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from laguna_serve.plugins.drafting.runner import DraftingModelRunner

    seen = {"steps": 0, "drafts": 0, "differing": 0, "rejected": 0, "reading": 0, "together": 0}
    ours = DraftingModelRunner.propose_draft_token_ids

    def both(self: Any, scheduler_output: Any, sampled: Any, *rest: Any) -> Any:
        width = scheduler_output.num_spec_tokens_to_schedule
        stock = GPUModelRunner.propose_draft_token_ids(self, scheduler_output, sampled, *rest).clone()
        drafts = ours(self, scheduler_output, sampled, *rest)
        assert drafts.shape == stock.shape == (self.input_batch.num_reqs, width)
        assert drafts.dtype == stock.dtype
        seen["steps"] += 1
        seen["drafts"] += drafts.numel()
        seen["differing"] += int((drafts != stock).sum())
        seen["rejected"] += int((sampled == -1).sum())
        seen["reading"] += int(self.discard_request_mask.np[: self.input_batch.num_reqs].sum())
        seen["together"] = max(seen["together"], self.input_batch.num_reqs)
        return drafts

    DraftingModelRunner.propose_draft_token_ids = both  # type: ignore[method-assign]
    llm = LLM(
        model=str(toy / "teacher"),
        speculative_config={"method": "dflash", "model": str(toy / drafter), "num_speculative_tokens": 7},
        worker_cls="laguna_serve.plugins.worker.CPUWorker",
        max_num_seqs=3,
        max_model_len=512,
        max_num_batched_tokens=PART,
        block_size=32,
        kv_cache_memory_bytes=2**27,
        enforce_eager=True,
    )
    texts = [json.loads(line)["prompt"] for line in (toy / "prompts.jsonl").read_text().splitlines()[:PROMPTS]]
    sampling = [
        SamplingParams(temperature=0 if i % 3 else 0.8, seed=i, max_tokens=TOKENS // (1 + i % 2), ignore_eos=True)
        for i in range(PROMPTS)
    ]
    llm.generate(texts, sampling, use_tqdm=False)
    print("\n" + json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
