"""Draw drafts for the toy teacher and write down what was drawn, and from what verification is told that it was.

    python drawn_probe.py TOY_FOLDER DRAFTER OUT.json

It wraps and calls methods of vLLM's proposer on the instance (checked against 0.32.0).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

TEMPERATURES = (0.6, 1.0)
GAMMA, TOKENS = 5, 24
COPIES, ROUNDS, PLACES = 64, 200, 3


def main(toy: Path, drafter: Path, out: Path) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    import torch
    from vllm import LLM, SamplingParams

    speculation = {"method": "dflash", "model": str(drafter), "num_speculative_tokens": GAMMA}
    llm = LLM(
        model=str(toy / "teacher"),
        speculative_config={**speculation, "draft_sample_method": "probabilistic"},
        dtype="float32",
        max_num_seqs=4,
        max_model_len=512,
        kv_cache_memory_bytes=2**27,
        enforce_eager=True,
        worker_cls="laguna_serve.plugins.worker.CPUWorker",
    )
    engine: Any = llm.llm_engine
    runner = engine.model_executor.driver_worker.worker.model_runner
    proposer = runner.drafter
    inner, blocks, held = proposer._sample_draft_tokens, [], {}

    def sample(hidden: torch.Tensor, metadata: Any) -> Any:
        held.update(hidden=hidden, metadata=metadata, anchors=proposer.input_ids.clone())
        drafts, told = inner(hidden, metadata)
        batch = runner.input_batch
        rows = drafts.view(batch.num_reqs, -1)
        chances = told.view(*rows.shape, -1).gather(-1, rows[..., None]).squeeze(-1)
        for row, request in enumerate(batch.req_ids):
            blocks.append(
                {
                    "request": request.partition("-")[0],
                    "anchor": int(proposer.positions[row * (rows.shape[1] + 1)]),
                    "drafts": rows[row].tolist(),
                    "told": chances[row].tolist(),
                    "temperature": float(batch.temperature_cpu[row]),
                }
            )
        return drafts, told

    proposer._sample_draft_tokens = sample
    prompts = [json.loads(line)["prompt"] for line in (toy / "prompts.jsonl").read_text().splitlines()[:4]]
    wishes = [SamplingParams(temperature=t, max_tokens=TOKENS, ignore_eos=True) for t in TEMPERATURES * 2]
    answers = llm.generate(prompts, wishes, use_tqdm=False)
    tokens = {answer.request_id: [*answer.prompt_token_ids, *answer.outputs[0].token_ids] for answer in answers}
    for block in blocks:
        block["context"] = tokens[block["request"]][: block["anchor"] + 1]
    # Some were drafted behind the last token that was asked for.
    blocks = [block for block in blocks if len(block["context"]) == block["anchor"] + 1]
    places = draw_often(proposer, inner, held)
    proposer._sample_draft_tokens = inner
    out.write_text(json.dumps({"blocks": blocks, "places": places, "grammar": draft_beside_grammar(llm, prompts)}))


def draft_beside_grammar(llm: Any, prompts: list[str]) -> list[dict[str, Any]]:
    """Sample two requests, one of them by a grammar: the largest and the drafted chances of each block of theirs."""
    import torch
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    draft, blocks = runner.drafter.draft, []

    def record(*given: Any) -> torch.Tensor:
        drafts: torch.Tensor = draft(*given)
        told = runner.drafter.take_last_draft_probs()
        for row, request in enumerate(runner.input_batch.req_ids):
            wish = runner.requests[request].sampling_params
            blocks.append(
                {
                    "grammar": wish.structured_outputs is not None,
                    "largest": told[row].amax(-1).tolist(),
                    "drafted": told[row].gather(-1, drafts[row, :, None]).squeeze(-1).tolist(),
                    "sums": told[row].sum(-1).tolist(),
                }
            )
        return drafts

    runner.drafter.draft = record
    grammar = StructuredOutputsParams(regex="[a-z ]{20,40}")
    wishes = [SamplingParams(temperature=1, max_tokens=TOKENS, structured_outputs=grammar)]
    wishes += [SamplingParams(temperature=1, max_tokens=TOKENS, ignore_eos=True)]
    llm.generate(prompts[:2], wishes, use_tqdm=False)
    runner.drafter.draft = draft
    return blocks


def draw_often(proposer: Any, sample: Any, held: dict[str, Any]) -> list[dict[str, Any]]:
    """Draw blocks behind one anchor: shares of the first place's tokens, and of those behind the likeliest of it.

    The expected ones are the head's, a place at a time.
    """
    from dataclasses import replace

    import torch

    torch.manual_seed(0)
    places = []
    with torch.inference_mode():
        hidden, prefix = held["hidden"][:PLACES], held["anchors"][:1].long()
        proposer.num_speculative_tokens = PLACES
        proposer.input_ids = prefix.repeat(COPIES * (PLACES + 1)).to(torch.int32)
        metadata = replace(held["metadata"], temperature=torch.ones(COPIES), all_random=True)
        rounds = [sample(hidden.repeat(COPIES, 1), metadata)[0].view(COPIES, PLACES) for _ in range(ROUNDS)]
        drawn = torch.cat(rounds)
        head, logits = proposer.model.model.sequential_head, proposer.model.compute_logits(hidden)
        for place in range(PLACES):
            expected = (logits[place] + head(hidden[: place + 1], prefix)[place]).softmax(-1)
            counts = torch.bincount(drawn[:, place], minlength=len(expected))
            shares = counts / len(drawn)
            places.append({"shares": shares.tolist(), "expected": expected.tolist(), "count": len(drawn)})
            drawn = drawn[drawn[:, place] == counts.argmax()]
            prefix = torch.cat([prefix, counts.argmax()[None]])
    return places


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
