"""Sends one sequence through an engine of this process one row at a time and then otherwise; says what differs first.

    python -m laguna_serve.plugins.probes.row_probe < request.json

The request: `arguments` (vLLM's flags), `sequence` (token ids), `rows` (at once, γ + 1), `copies` (of the sequence,
beside each other). The last line of stdout is a JSON object; serving/engine/row_check.py reads it.

vLLM runs eagerly and in this process, so that its modules can be hooked. How many rows it takes at once are two
settings of its scheduler's, which are changed between the runs (checked against vLLM 0.32.0).
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from laguna_serve.plugins.probes.rows import Event, RowRecorder, Seen, find_layer, measure

Report = dict[str, Any]


class Rows:
    """An engine through which one sequence is sent."""

    def __init__(self, arguments: Sequence[str], sequence: Sequence[int]) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.llm_engine import LLMEngine

        parser = FlexibleArgumentParser()
        EngineArgs.add_cli_args(parser)
        given, _ = parser.parse_known_args([*arguments, "--enforce-eager"])
        settings = dataclasses.replace(EngineArgs.from_cli_args(given), enable_chunked_prefill=True)
        self.engine: Any = LLMEngine.from_engine_args(settings)
        self.sequence = list(sequence)
        self.core: Any = self.engine.engine_core.engine_core
        self.model: Any = self.engine.model_executor.driver_worker.worker.model_runner.get_model()
        self.most: int = self.core.scheduler.max_num_scheduled_tokens
        self.sent = 0

    def send(self, rows: int, copies: int = 1, *, cached: bool = False) -> None:
        """Send the sequence, `copies` times beside each other, `rows` tokens of each at once (0: as many as fit)."""
        from vllm import SamplingParams

        scheduler = self.core.scheduler
        scheduler.scheduler_config.long_prefill_token_threshold = rows
        scheduler.max_num_scheduled_tokens = rows * copies or self.most
        if not cached:
            self.engine.reset_prefix_cache()
        for _ in range(copies):
            self.sent += 1
            prompt = {"prompt_token_ids": self.sequence}
            self.engine.add_request(str(self.sent), prompt, SamplingParams(temperature=0, max_tokens=1))
        while self.engine.has_unfinished_requests():
            self.engine.step()


def main() -> None:
    """Read the request, answer it."""
    request = json.load(sys.stdin)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    rows, copies = request["rows"], request["copies"]
    engine = Rows(request["arguments"], request["sequence"])
    recorder = RowRecorder(engine.model, request["sequence"])
    hidden = _HiddenStates(engine.model, rows)
    with recorder.learn(), hidden:
        engine.send(1)
    ways: dict[str, tuple[str, Callable[[], None]]] = {
        "again": ("one row, again", lambda: engine.send(1)),
        "rows": (f"{rows} rows", lambda: engine.send(rows)),
        "copies": (f"{copies} requests of {rows} rows each", lambda: engine.send(rows, copies)),
        "whole": ("all rows at once, as a prompt", lambda: engine.send(0)),
    }
    if "--enable-prefix-caching" in request["arguments"]:
        ways["cached"] = ("the rest of a prompt whose beginning is cached", lambda: engine.send(0, cached=True))
    found: dict[str, Seen | None] = {}
    compared: dict[str, int] = {}
    for name, (_, send) in ways.items():
        with recorder.compare():
            send()
        found[name], compared[name] = recorder.found, recorder.compared
    differing = [seen for seen in found.values() if seen is not None]
    if differing:
        with recorder.fetch(_merge(differing)):
            engine.send(1)
    kinds = {name: type(module).__name__ for name, module in engine.model.named_modules()}
    report = []
    for name, (label, _) in ways.items():
        seen = found[name]
        first = None if seen is None else describe(seen, recorder, kinds)
        if first is None and name == "rows":
            first = check_logits(engine.model, hidden.stack())
        report.append({"name": name, "label": label, "compared": compared[name], "first": first})
    print("\n" + json.dumps({"tokens": len(engine.sequence), "ways": report}))


class _HiddenStates:
    """The model's last outputs for single rows, while it is entered."""

    def __init__(self, model: Any, rows: int) -> None:
        self._model, self._rows, self._kept = model, rows, list[torch.Tensor]()

    def __enter__(self) -> None:
        self._handle = self._model.register_forward_hook(self._keep)

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _keep(self, _model: Any, _inputs: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        if isinstance(states, torch.Tensor) and states.shape[0] == 1:
            self._kept = [*self._kept, states.detach().clone()][-self._rows :]

    def stack(self) -> torch.Tensor:
        """Stack the rows as one batch, [rows, H]."""
        return torch.cat(self._kept)


def check_logits(model: Any, hidden: torch.Tensor) -> Report | None:
    """Check the output layer, which only the last row of a prompt goes through: rows together against each alone."""
    with torch.inference_mode():
        together = model.compute_logits(hidden)
        alone = torch.cat([model.compute_logits(hidden[row : row + 1]) for row in range(len(hidden))])
    if torch.equal(together, alone):
        return None
    rows = (together != alone).any(dim=1).nonzero().squeeze(1).tolist()
    largest, ulps = measure(alone, together)
    return {
        "layer": None,
        "module": "lm_head",
        "kind": "compute_logits",
        "side": "output",
        "operations": [],
        "positions": rows,
        "inputs_alone": [[1, *hidden.shape[1:]]],
        "inputs": [list(hidden.shape)],
        "dtype": str(together.dtype).removeprefix("torch."),
        "largest": largest,
        "ulps": ulps,
    }


def describe(seen: Seen, recorder: RowRecorder, kinds: dict[str, str]) -> Report:
    """Describe the operation and its largest difference from the row alone."""
    event = seen.event
    alone = recorder.fetched[event]
    order = {position: row for row, position in enumerate(alone.positions)}
    largest, ulps = measure(alone.values[[order[position] for position in seen.positions]], seen.values)
    return {
        "layer": find_layer(event.module),
        "module": event.module,
        "kind": kinds[event.module],
        "side": event.side,
        "operations": recorder.operations.get(event, []) if event.side == "output" else [],
        "positions": sorted(set(seen.positions)),
        "inputs_alone": alone.inputs,
        "inputs": seen.inputs,
        "dtype": str(seen.values.dtype).removeprefix("torch."),
        "largest": largest,
        "ulps": ulps,
    }


def _merge(differing: Sequence[Seen]) -> list[Seen]:
    """One for each event, with all positions."""
    by_event: dict[Event, Seen] = {}
    for seen in differing:
        before = by_event.get(seen.event, seen)
        positions = tuple(sorted({*before.positions, *seen.positions}))
        by_event[seen.event] = dataclasses.replace(before, positions=positions)
    return list(by_event.values())


if __name__ == "__main__":
    main()
