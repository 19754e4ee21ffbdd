"""What vLLM's linear layers multiply with on a processor held to AVX2, stock and ours, as JSON.

python linear_probe.py MODEL PROMPTS.jsonl
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main(model: str, prompts_file: str) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    import torch
    from vllm import LLM, SamplingParams
    from vllm.model_executor.layers import utils

    stock = make_layer(torch.bfloat16, size=1024)
    utils.dispatch_cpu_unquantized_gemm(stock, remove_weight=True)
    report: dict[str, Any] = {"stock_keeps_the_weight": stock.weight.numel() > 0}

    from laguna_serve.kernels.linear import linear
    from laguna_serve.plugins.register import register

    register()
    register()
    report["wrapped_once"] = not hasattr(utils.dispatch_cpu_unquantized_gemm.__wrapped__, "__wrapped__")
    for dtype in (torch.bfloat16, torch.float32):
        layer = make_layer(dtype)
        utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
        report[str(dtype)] = layer.cpu_linear is linear

    with open(prompts_file, encoding="utf-8") as lines:
        prompts = [json.loads(line)["prompt"] for line in lines][:4]
    llm = LLM(model=model, enforce_eager=True, max_model_len=512, kv_cache_memory_bytes=2**28)
    held = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    chosen = [module.cpu_linear is linear for module in held.modules() if hasattr(module, "cpu_linear")]
    report["layers"] = {"all": len(chosen), "ours": sum(chosen)}
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    report["texts"] = [output.outputs[0].text for output in llm.generate(prompts, sampling, use_tqdm=False)]
    print("\n" + json.dumps(report))


def make_layer(dtype: Any, size: int = 64) -> Any:
    import torch

    layer = torch.nn.Linear(size, size, bias=False, dtype=dtype)
    layer.weight.requires_grad_(False)
    return layer


if __name__ == "__main__":
    main(*sys.argv[1:])
