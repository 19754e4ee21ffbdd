"""Have an engine return the experts of every token, in all the ways that it comes by them, and print what it returns.

    python routed_probe.py TOY_FOLDER SETTINGS PASSES

SETTINGS: JSON of vLLM's arguments beside those below. PASSES: JSON, name → sampling parameters; one after the other,
in one engine. Printed, as JSON: by pass the answers (prompt, tokens, cached tokens, experts as vLLM's servers encode
them), and what the engine counted.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

PROMPTS = 6


def main(toy: Path, settings: dict[str, Any], passes: dict[str, dict[str, Any]]) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    from vllm import LLM, SamplingParams
    from vllm.utils.serial_utils import numpy2base64

    llm = LLM(
        **{
            "model": str(toy / "teacher"),
            "worker_cls": "laguna_serve.plugins.worker.CPUWorker",
            "distributed_executor_backend": "vllm.v1.executor.uniproc_executor.UniProcExecutor",
            "dtype": "float32",
            "max_num_seqs": 8,
            "max_model_len": 512,
            "kv_cache_memory_bytes": 2**27,
            "block_size": 16,
            "enforce_eager": True,
            "enable_return_routed_experts": True,
            "disable_log_stats": False,
            **settings,
        }
    )
    texts = [json.loads(line)["prompt"] for line in (toy / "prompts.jsonl").read_text().splitlines()[:PROMPTS]]
    texts.append("".join(texts)[:900])  # longer than a step takes, where SETTINGS bound it
    report: dict[str, Any] = {}
    for name, sampling in passes.items():
        if name.startswith("reset"):
            assert llm.reset_prefix_cache()
        parameters = SamplingParams(**{"temperature": 0, "max_tokens": 24, "ignore_eos": True, **sampling})
        report[name] = [
            {
                "prompt": list(answer.prompt_token_ids),
                "tokens": list(choice.token_ids),
                "cached": answer.num_cached_tokens,
                "experts": numpy2base64(choice.routed_experts),
            }
            for answer in llm.generate(texts, parameters, use_tqdm=False)
            for choice in answer.outputs
        ]
    counted = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    report["preemptions"] = counted["vllm:num_preemptions"]
    report["accepted"] = counted.get("vllm:spec_decode_num_accepted_tokens", 0)
    print("\n" + json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3]))
