"""Run the toy teacher with and without padded steps, in this process, and write down tokens and rows.

python padded_rows_probe.py TOY_FOLDER
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any


def main(toy: Path) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    from vllm import LLM, SamplingParams
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from laguna_serve.plugins.repairs.padded_rows import wrap_padding

    llm = LLM(
        model=str(toy / "teacher"),
        distributed_executor_backend="vllm.v1.executor.uniproc_executor.UniProcExecutor",
        dtype="float32",
        max_num_seqs=8,
        max_model_len=512,
        max_num_batched_tokens=500,
        kv_cache_memory_bytes=2**27,
        enforce_eager=True,
        enable_prefix_caching=False,
    )
    engine: Any = llm.llm_engine
    model = engine.model_executor.driver_worker.worker.model_runner.model
    rows: list[int] = []
    model.register_forward_pre_hook(
        lambda _model, _args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    texts = [json.loads(line)["prompt"] for line in (toy / "prompts.jsonl").read_text().splitlines()[:12]]
    prompts = [{"prompt_token_ids": llm.get_tokenizer().encode(text)} for text in texts]

    def run() -> dict[str, Any]:
        rows.clear()
        answers = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), use_tqdm=False)
        return {"tokens": [list(answer.outputs[0].token_ids) for answer in answers], "rows": list(rows)}

    # Where our own product multiplies bfloat16 nothing is padded: here it is, so that the same is tested everywhere.
    runner, method = GPUModelRunner, "_determine_batch_execution_and_padding"
    stock = inspect.unwrap(getattr(runner, method))
    setattr(runner, method, wrap_padding(stock))
    padded = run()
    setattr(runner, method, stock)
    print(json.dumps({"padded": padded, "stock": run()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
