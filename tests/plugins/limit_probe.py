"""Draft beside requests that end at the length limit and print, as JSON, the acceptance before, beside and afterwards.

    python limit_probe.py TOY_FOLDER WORKER_CLASS

WORKER_CLASS: what vLLM's --worker-cls takes, "auto" for its own. "beside" counts the neighbours' own drafts, too.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

PROMPTS, TOKENS, LENGTH, BLOCK = 8, 64, 400, 32


def main(toy: Path, worker: str) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(toy / "teacher"),
        speculative_config={"method": "dflash", "model": str(toy / "dflash"), "num_speculative_tokens": 7},
        worker_cls=worker,
        max_num_seqs=4,
        max_model_len=LENGTH,
        block_size=BLOCK,
        kv_cache_memory_bytes=2**28,
        enforce_eager=True,
        disable_log_stats=False,
    )
    texts = [json.loads(line)["prompt"] for line in (toy / "prompts.jsonl").read_text().splitlines()]
    tokenizer = llm.get_tokenizer()
    prompts = [tokenizer(text)["input_ids"] for text in texts[:PROMPTS]]
    filler = tokenizer("\n".join(texts[PROMPTS : PROMPTS + 40]), verbose=False)["input_ids"]
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    few = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)

    def count() -> tuple[int, int]:
        values = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
        return values["vllm:spec_decode_num_drafts"], values["vllm:spec_decode_num_accepted_tokens"]

    def run(beside: bool) -> dict[str, Any]:
        before = count()
        tokens = []
        for number, prompt in enumerate(prompts):
            requests, sampling = [{"prompt_token_ids": prompt}], [greedy]
            if beside:
                requests.append({"prompt_token_ids": filler[50 * number :][: LENGTH - 5]})
                sampling.append(few)
            tokens.append(list(llm.generate(requests, sampling, use_tqdm=False)[0].outputs[0].token_ids))
        drafts, accepted = (now - then for now, then in zip(count(), before, strict=True))
        return {"length": 1 + accepted / drafts, "tokens": tokens}

    report = {"alone": run(beside=False)}
    llm.reset_prefix_cache()
    report |= {"beside": run(beside=True), "afterwards": run(beside=False)}
    print("\n" + json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
