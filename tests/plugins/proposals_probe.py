"""Run the toy teacher with a drafter in this process and write down every block of tokens that vLLM proposes.

    python proposals_probe.py TOY_FOLDER DRAFTER GAMMA OUT.json

It wraps one method of vLLM's proposer on the instance (checked against 0.32.0), hence the process of its own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

PROMPTS, TOKENS = 6, 48


def main(toy: Path, drafter: Path, gamma: int, out: Path) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(toy / "teacher"),
        speculative_config={"method": "dflash", "model": str(drafter), "num_speculative_tokens": gamma},
        dtype="float32",
        max_num_seqs=1,
        max_model_len=1024,
        kv_cache_memory_bytes=2**28,
        enable_prefix_caching=False,
        enforce_eager=True,
    )
    engine: Any = llm.llm_engine
    proposer = engine.model_executor.driver_worker.worker.model_runner.drafter
    inner, blocks = proposer.propose, []

    def propose(*args: Any, **kwargs: Any) -> Any:
        proposed = inner(*args, **kwargs)
        blocks.append(proposed[0].tolist())
        return proposed

    proposer.propose = propose
    requests = []
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    for line in (toy / "prompts.jsonl").read_text().splitlines()[:PROMPTS]:
        blocks.clear()
        answer = llm.generate(json.loads(line)["prompt"], greedy, use_tqdm=False)[0]
        requests.append(
            {
                "prompt": list(answer.prompt_token_ids),
                "output": list(answer.outputs[0].token_ids),
                "proposals": list(blocks),
            }
        )
    out.write_text(json.dumps({"requests": requests}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
