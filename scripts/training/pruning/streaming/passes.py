"""Forward and backward through a model of which one layer at a time is in memory, with its experts' sums on the way.

Forward, every layer's input is kept on disk; the head gives the gradient of the loss with regard to the last layer's
output; backward, from the last layer to the first sparse one, a layer is read again, its forward pass repeated row by
row, and the gradient passed on to its input. A score without gradients needs the first of these alone.

A step is a layer in one direction. Its files are there before the journal says so; the run goes on after the last step
that the journal has, so that an interruption loses one layer's work at most.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import torch
import torch.nn.functional as F

from laguna_serve.plugins.pruning import ExpertShape
from laguna_serve.scripts.text.rows import TextRows
from laguna_serve.scripts.training.pruning.scores import ExpertCall, ExpertSums
from laguna_serve.scripts.training.pruning.streaming.layers import Layers
from laguna_serve.scripts.training.pruning.streaming.store import read_rows, write_rows
from laguna_serve.serving.kit.files import write_stream
from laguna_serve.serving.kit.journal import Journal
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.signals import check_signals

# Positions whose logits are in memory at once.
HEAD_CHUNK = 256
# A backward step repeats the forward one and is twice as much again.
COSTS = {"embed": 0, "forward": 1, "head": 1, "backward": 3}


class Step(msgspec.Struct, frozen=True, omit_defaults=True):
    """A step that is done; `nats`: the head's summed loss."""

    kind: Literal["embed", "forward", "head", "backward"]
    layer: int = 0
    nats: float | None = None


def list_steps(shape: ExpertShape, num_layers: int, needs_gradients: bool) -> list[Step]:
    """List the steps in their order."""
    if not needs_gradients:
        return [Step("embed"), *(Step("forward", layer) for layer in range(shape.layers[-1] + 1))]
    forward = [Step("forward", layer) for layer in range(num_layers)]
    backward = [Step("backward", layer) for layer in reversed(range(shape.layers[0], num_layers))]
    return [Step("embed"), *forward, Step("head"), *backward]


@dataclass(frozen=True, slots=True)
class Passes:
    """One run over a text, in a folder that holds it alone."""

    layers: Layers
    shape: ExpertShape
    text: TextRows
    folder: Path
    needs_gradients: bool
    progress: Progress

    def run(self) -> tuple[list[ExpertSums], float | None]:
        """Do what the journal lacks; each sparse layer's sums, and with gradients the mean loss in nats.

        Raises:
            CheckpointError, JournalError, WriteError: the model or the folder cannot be read or written.
        """
        journal = Journal(self.folder / "journal.jsonl", Step, self.progress.say)
        steps = list_steps(self.shape, self.layers.config.num_hidden_layers, self.needs_gradients)
        missing = steps[len(journal.entries) :]
        total = sum(COSTS[step.kind] for step in missing) * len(self.text.rows)
        if missing and journal.entries:
            self.progress.say(f"continues after {len(journal.entries)} of {len(steps)} steps")
        self.progress.begin()
        done = 0
        for step in missing:
            journal.append(self._take(step, done, total))
            done += COSTS[step.kind] * len(self.text.rows)
            self._tidy(step)
        for path in (*self.folder.glob("input-*.bin"), *self.folder.glob("gradient-*.bin")):
            path.unlink()
        nats = next((step.nats for step in journal.entries if step.nats is not None), None)
        return self._read_sums(), None if nats is None else nats / self.text.targets

    def _take(self, step: Step, done: int, total: int) -> Step:
        def count(rows: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
            for number, row in enumerate(rows, start=1):
                check_signals()
                yield row
                label = f"{step.kind} {step.layer}"
                self.progress.step(label, done + number * COSTS[step.kind], total)

        if step.kind == "embed":
            embedding = self.layers.load_embedding()
            write_rows(self._input(0), (F.embedding(row.to(embedding.device), embedding) for row in self.text.rows))
            return step
        if step.kind == "head":
            return self._take_head(count)
        layer = self.layers.load(step.layer)
        if step.kind == "forward":
            self._take_forward(step.layer, layer, count)
        else:
            self._take_backward(step.layer, layer, count)
        return step

    def _take_forward(self, number: int, layer: Any, count: Any) -> None:
        watch = not self.needs_gradients and number in self.shape.layers
        tap = Tap(layer.mlp) if watch else None

        def outputs() -> Iterator[torch.Tensor]:
            for hidden in count(self._read(self._input(number))):
                with torch.no_grad():
                    yield layer(hidden[None], **self.layers.surround(hidden[None], number))[0]
                if tap is not None:
                    tap.add(None)

        write_rows(self._input(number + 1), outputs())
        if tap is not None:
            self._write_sums(number, tap.sums)

    def _take_head(self, count: Any) -> Step:
        head, nats = self.layers.load_head(), 0.0
        last = self.layers.config.num_hidden_layers

        def gradients() -> Iterator[torch.Tensor]:
            nonlocal nats
            texts = zip(count(self._read(self._input(last))), self.text.rows, self.text.scored, strict=True)
            for hidden, ids, scored in texts:
                grads = torch.zeros_like(hidden)
                for start in range(0, len(ids) - 1, HEAD_CHUNK):
                    stop = min(start + HEAD_CHUNK, len(ids) - 1)
                    part = hidden[start:stop].detach().requires_grad_()
                    wanted = ids[start + 1 : stop + 1].where(scored[start + 1 : stop + 1], -100).to(part.device)
                    loss = F.cross_entropy(head(part), wanted, reduction="sum", ignore_index=-100)
                    (grads[start:stop],) = torch.autograd.grad(loss, part)
                    nats += float(loss.detach())
                yield grads

        write_rows(self._gradient(last), gradients())
        return Step("head", nats=nats)

    def _take_backward(self, number: int, layer: Any, count: Any) -> None:
        tap = Tap(layer.mlp) if number in self.shape.layers else None
        is_last = number == self.shape.layers[0]

        def gradients() -> Iterator[torch.Tensor]:
            upper = self._read(self._gradient(number + 1))
            for hidden, grads in zip(count(self._read(self._input(number))), upper, strict=True):
                hidden.requires_grad_()
                output = layer(hidden[None], **self.layers.surround(hidden[None], number))[0]
                wanted = [] if is_last else [hidden]
                if tap is not None:
                    wanted.append(tap.output)
                found = torch.autograd.grad(output, wanted, grads)
                if tap is not None:
                    tap.add(found[-1])
                if not is_last:
                    yield found[0]

        if is_last:
            for _ in gradients():
                pass
        else:
            write_rows(self._gradient(number), gradients())
        if tap is not None:
            self._write_sums(number, tap.sums)

    def _tidy(self, step: Step) -> None:
        """Remove what no later step reads."""
        if step.kind == "forward" and (not self.needs_gradients or step.layer < self.shape.layers[0]):
            self._input(step.layer).unlink(missing_ok=True)
        elif step.kind == "head":
            self._input(self.layers.config.num_hidden_layers).unlink(missing_ok=True)
        elif step.kind == "backward":
            self._input(step.layer).unlink(missing_ok=True)
            self._gradient(step.layer + 1).unlink(missing_ok=True)

    def _read(self, path: Path) -> Iterator[torch.Tensor]:
        lengths = [len(row) for row in self.text.rows]
        rows = read_rows(path, lengths, self.layers.config.hidden_size, self.layers.dtype)
        return (row.to(self.layers.device) for row in rows)

    def _write_sums(self, number: int, sums: ExpertSums) -> None:
        arrays = sums.to_arrays()
        write_stream(self.folder / f"sums-{number:03}.npz", lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]

    def _read_sums(self) -> list[ExpertSums]:
        return [ExpertSums.from_arrays(np.load(self.folder / f"sums-{layer:03}.npz")) for layer in self.shape.layers]

    def _input(self, layer: int) -> Path:
        return self.folder / f"input-{layer:03}.bin"

    def _gradient(self, layer: int) -> Path:
        return self.folder / f"gradient-{layer:03}.bin"


class Tap:
    """Watches a sparse layer's routed experts: what goes in and comes out of the last row, and the sums of all."""

    def __init__(self, block: Any) -> None:
        # The weights, not the module: it holds this object's method, and a cycle would keep a layer in memory.
        self._gate_up, self._down = block.experts.gate_up_proj.data, block.experts.down_proj.data
        self._scale = float(block.routed_scaling_factor)
        self.sums = ExpertSums.of_weights(self._gate_up, self._down)
        block.experts.register_forward_hook(self._watch)

    def _watch(self, _module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self._x, self._ids, self._weights = (tensor.detach() for tensor in inputs)
        self.output = output

    def add(self, grads: torch.Tensor | None) -> None:
        """Add the last row; `grads` [T, H]: of the summed loss with regard to `output`."""
        with torch.no_grad():
            for expert in self._ids.unique().tolist():
                rows, slots = (self._ids == expert).nonzero(as_tuple=True)
                # The layer scales what its experts give; the gradient here is before that, the atom's share after.
                call = ExpertCall(
                    gate_up=self._gate_up[expert],
                    down=self._down[expert],
                    x=self._x[rows],
                    weights=self._weights[rows, slots] * self._scale,
                    grads=None if grads is None else grads[rows] / self._scale,
                )
                self.sums.add(expert, call)
        del self.output
