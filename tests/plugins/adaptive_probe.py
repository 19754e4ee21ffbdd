"""Run the toy pair under a script of decisions, in this process, and write down tokens and proposals.

    python adaptive_probe.py TOY_FOLDER DRAFTER (cached | uncached)

One engine; each run replaces the policy, so that what differs is what was decided and nothing else.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TOKENS = 40
WIDTH = 7


def main(toy: Path, drafter: Path, *, caching: bool) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    from vllm import LLM, SamplingParams

    from laguna_serve.plugins.adaptive.policy import Policy
    from laguna_serve.plugins.adaptive.prospect import PLAIN, Decision

    class Scripted(Policy):
        """Decides by the number of the step and the request's place; learns as the real one."""

        script: Callable[[int, int], tuple[int, int]]

        def decide(
            self, requests: Sequence[str], waiting_s: float = 0.0, room: Sequence[int] | None = None
        ) -> Decision:
            self._step += 1
            decided = [self.script(self._step, place) for place in range(len(requests))]
            width = max((width for width, _ in decided), default=0)
            return Decision(width, tuple(min(count, width) for _, count in decided)) if width else PLAIN

    llm = LLM(
        model=str(toy / "teacher"),
        speculative_config={"method": "dflash", "model": str(drafter), "num_speculative_tokens": WIDTH},
        worker_cls="laguna_serve.plugins.worker.AdaptiveCPUWorker",
        distributed_executor_backend="vllm.v1.executor.uniproc_executor.UniProcExecutor",
        dtype="float32",
        max_num_seqs=8,
        max_model_len=1024,
        kv_cache_memory_bytes=2**27,
        enforce_eager=True,
        enable_prefix_caching=caching,
    )
    engine: Any = llm.llm_engine
    runner = engine.model_executor.driver_worker.worker.model_runner
    proposer = runner.drafter
    inner, proposals = proposer.draft, {}

    def draft(*args: Any, **kwargs: Any) -> Any:
        proposed = inner(*args, **kwargs)
        proposals[int(runner.input_batch.num_tokens_no_spec[0])] = proposed[0].tolist()
        return proposed

    proposer.draft = draft
    write, written = runner._context._write, [0]

    def count_written(model: Any, chosen: Any) -> None:
        written[0] += int(chosen.sum())
        write(model, chosen)

    runner._context._write = count_written
    prompts = [json.loads(line)["prompt"] for line in (toy / "prompts.jsonl").read_text().splitlines()[:6]]
    long = "".join(prompts)

    def run(script: Callable[[int, int], tuple[int, int]], asked: list[str], **sampling: Any) -> dict[str, Any]:
        proposals.clear()
        written[0] = 0
        runner.policy = Scripted(WIDTH)
        runner.policy.script = script
        parameters = SamplingParams(**{"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, **sampling})
        answers = llm.generate(asked, parameters, use_tqdm=False)
        return {
            "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
            "cached": answers[0].num_cached_tokens,
            "proposals": {str(place): drafts for place, drafts in proposals.items()},
            "accepted": sum(sum(shared.successes) for shared in runner.policy._shared.values()),
            "known": len(runner.policy._own),
            "written": written[0],
        }

    def never(_step: int, _place: int) -> tuple[int, int]:
        return 0, 0

    def unverified(_step: int, _place: int) -> tuple[int, int]:
        return WIDTH, 0

    def seldom(step: int, _place: int) -> tuple[int, int]:
        return (WIDTH, 0) if step % 9 == 0 else (0, 0)

    def mixed(step: int, place: int) -> tuple[int, int]:
        width = (7, 0, 3, 1, 0, 0, 5)[step % 7]
        return width, (step * 3 + place) % (width + 1)

    report: dict[str, Any] = {}
    for name, script in (("never", never), ("mixed", mixed)):
        report[name] = run(script, prompts)
        report[f"seeded {name}"] = run(script, prompts, temperature=1.0, seed=7)
    for name, script in (("every", unverified), ("seldom", seldom)):
        llm.reset_prefix_cache()
        report[name] = run(script, prompts[:1])
    for name, script in (("after drafts", unverified), ("after none", never)):
        llm.reset_prefix_cache()
        run(script, [long], max_tokens=TOKENS)
        report[name] = run(unverified, [long])
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), caching=sys.argv[3] == "cached")
