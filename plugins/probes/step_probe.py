"""Decodes one prompt after another on an engine of this process, and says what its steps cost and which part of them.

    python -m laguna_serve.plugins.probes.step_probe MARK 'ARGUMENTS'

MARK: what an answer's line is to begin with; ARGUMENTS: vLLM's flags, a JSON list. A line of stdin is a request,
`{"prompt": token ids or text, "max_tokens": N, "temperature": T, "apart": bool}`; a line of stdout that begins with
MARK is its answer, a `Decoded`, and the first one `null`, when the engine is up. bench/step_cost reads them.

Times are processor time of the whole process: what others take of the machine counts as little as it can. Steps that
read a prompt are left out. With `apart`, every call of a part is timed, too, each call's time without that of the
parts that it calls; that costs a few per cent, so that totals come from requests without it.

Checked against vLLM 0.32.0, whose functions PARTS names.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from time import process_time_ns
from typing import Any

FRONT, REST = "front end", "engine core, the rest"
# Label → where its functions are: an attribute path from the engine core ("core") or the model runner ("runner").
PARTS: dict[str, tuple[str, ...]] = {
    "scheduling": (
        "core.scheduler.schedule",
        "core.scheduler.update_from_output",
        "core.scheduler.update_draft_token_ids",
    ),
    "inputs": (
        "runner._update_states",
        "runner._prepare_inputs",
        "runner._get_slot_mappings",
        "runner._build_attention_metadata",
        "runner._determine_batch_execution_and_padding",
    ),
    "model": ("runner._model_forward",),
    "logits": ("runner.model.compute_logits",),
    "sampling": ("runner._sample",),
    "bookkeeping": ("runner._bookkeeping_sync", "runner.take_draft_token_ids", "runner._copy_draft_token_ids_to_cpu"),
    "runner, the rest": ("runner.execute_model", "runner.sample_tokens"),
    "drafter: inputs": (
        "runner.drafter.prepare_next_token_ids_padded",
        "runner.drafter.prepare_inputs_padded",
        "runner.drafter.set_inputs_first_pass",
        "runner.drafter.build_per_group_and_layer_attn_metadata",
    ),
    "drafter: context": (
        "runner.drafter.model.store_taps",
        "runner.drafter.model.combine_hidden_states",
        "runner.drafter.model.precompute_and_store_context_kv",
    ),
    "drafter: model": ("runner.drafter.model.forward",),
    "drafter: tokens": ("runner.drafter._sample_draft_tokens",),
    "drafter: the rest": ("runner.propose_draft_token_ids",),
}


class Stopwatch:
    """Time of nested parts, each without its inner ones."""

    def __init__(self) -> None:
        self.ns: Counter[str] = Counter()
        self.running = False
        self._inner = [0]

    def wrap(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Make the function count as `label` while the watch runs."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.running:
                return function(*args, **kwargs)
            self._inner.append(0)
            begin = process_time_ns()
            try:
                return function(*args, **kwargs)
            finally:
                took = process_time_ns() - begin
                self.ns[label] += took - self._inner.pop()
                self._inner[-1] += took

        return timed


class Steps:
    """An engine that decodes one prompt at a time."""

    def __init__(self, arguments: Sequence[str]) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.llm_engine import LLMEngine

        parser = FlexibleArgumentParser()
        EngineArgs.add_cli_args(parser)
        given, _ = parser.parse_known_args(list(arguments))
        self.engine: Any = LLMEngine.from_engine_args(EngineArgs.from_cli_args(given))
        self.core: Any = self.engine.engine_core.engine_core
        self.runner: Any = self.engine.model_executor.driver_worker.worker.model_runner
        self.watch = Stopwatch()
        self.sent = 0
        for label, paths in PARTS.items():
            for path in paths:
                self._wrap(label, path)
        self.core.step_fn = self.watch.wrap(REST, self.core.step_fn)

    def _wrap(self, label: str, path: str) -> None:
        """Time what a path leads to; nothing where this engine has no such thing (a drafter's parts without one)."""
        *owners, name = path.split(".")
        owner: Any = self
        for attribute in owners:
            owner = getattr(owner, attribute, None)
        if owner is not None and hasattr(owner, name):
            setattr(owner, name, self.watch.wrap(label, getattr(owner, name)))

    def decode(self, prompt: str | list[int], max_tokens: int, temperature: float, apart: bool) -> dict[str, Any]:
        """Decode past any end: steps, tokens and processor time after the prompt's step, and the tokens."""
        from vllm import SamplingParams

        self.sent += 1
        asked = prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt}
        sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens, ignore_eos=True)
        self.engine.add_request(str(self.sent), asked, sampling)
        tokens: list[int] = []
        while not tokens:
            tokens = self._step()
        first, steps = len(tokens), 0
        self.watch.ns.clear()
        self.watch.running = apart
        begin = process_time_ns()
        while self.engine.has_unfinished_requests():
            tokens = self._step() or tokens
            steps += 1
        took = process_time_ns() - begin
        self.watch.running = False
        parts = dict(self.watch.ns)
        if apart:
            parts[FRONT] = took - sum(parts.values())
        return {"steps": steps, "tokens": len(tokens) - first, "ns": took, "parts": parts, "token_ids": tokens}

    def _step(self) -> list[int]:
        """Take a step; the request's tokens so far."""
        outputs = self.engine.step()
        return list(outputs[0].outputs[0].token_ids) if outputs else []


def main() -> None:
    """Start the engine, answer requests."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    mark, arguments = sys.argv[1:]
    engine = Steps(json.loads(arguments))
    print(f"{mark}null", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = engine.decode(**request)
        print(f"{mark}{json.dumps(answer)}", flush=True)


if __name__ == "__main__":
    main()
