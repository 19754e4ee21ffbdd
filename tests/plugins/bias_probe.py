"""Load the toy teacher in this process, by vLLM's own loader or by ours, and print its routers' biases as JSON.

python bias_probe.py TOY_FOLDER stock|ours
"""

from __future__ import annotations

import json
import os
import sys


def main(toy: str, loader: str) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    from vllm import LLM, ModelRegistry
    from vllm.model_executor.models import laguna as stock
    from vllm.plugins import load_general_plugins

    from laguna_serve.plugins.models import laguna_cpu

    load_general_plugins()
    if loader == "stock":

        class StockLoader(laguna_cpu.LagunaForCausalLM):
            """Our routing, so that the engine starts, and vLLM's loading."""

            load_weights = stock.LagunaForCausalLM.load_weights

        ModelRegistry.register_model("LagunaForCausalLM", StockLoader)
    llm = LLM(
        model=f"{toy}/teacher", max_num_seqs=1, max_model_len=256, kv_cache_memory_bytes=2**28, enforce_eager=True
    )
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    routers = [layer.mlp.experts.router for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    print("\n" + json.dumps([router.e_score_correction_bias.tolist() for router in routers]))


if __name__ == "__main__":
    main(*sys.argv[1:])
