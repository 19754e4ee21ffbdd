"""How large a teacher and its student are, and what their layers leave behind, from config.json alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from laguna_serve.plugins.layers import DENSE, SPARSE
from laguna_serve.scripts.training.dense.student import choose_widths
from laguna_serve.scripts.training.pruning.streaming.layers import read_laguna
from laguna_serve.serving.checkpoint.parameters import count_other, count_parameters, list_modules
from laguna_serve.serving.checkpoint.target import Target, read_target

FP32 = 4


@dataclass(frozen=True)
class Sizes:
    """A student's sizes, and its teacher's.

    Attributes:
        widths: units of every layer.
        teacher: parameters.
        largest_layer: parameters of the teacher's largest decoder layer.
    """

    target: Target
    widths: tuple[int, ...]
    teacher: int
    largest_layer: int

    @property
    def dense(self) -> Target:
        """The student's own config, as far as it has no widths."""
        return replace(self.target, mlp_kinds=(DENSE,) * self.target.num_layers, quantisation=None)

    @property
    def outside(self) -> int:
        """Parameters of the student outside its layers, the few of norms and biases among them."""
        return count_other(self.dense)

    @property
    def student(self) -> int:
        """Parameters of the student at its true widths."""
        return self.outside + sum(self.layer(number) for number in range(self.target.num_layers))

    def layer(self, number: int) -> int:
        """Parameters of a layer of the student's."""
        return self._attention[number] + self.block(self.widths[number])

    @cached_property
    def _attention(self) -> list[int]:
        counts = [0] * self.target.num_layers
        for module in list_modules(self.dense):
            if ".mlp." not in module.name:
                counts[int(module.name.split(".")[2])] += module.numel
        return counts

    def block(self, width: int) -> int:
        """Parameters of a dense block."""
        return 3 * self.target.hidden_size * width

    @property
    def sparse(self) -> list[int]:
        """Numbers of the layers whose blocks stage 1 trains."""
        return [number for number, kind in enumerate(self.target.mlp_kinds) if kind == SPARSE]

    def activations(self, layer: int, item: int) -> int:
        """Bytes that a token leaves in a layer for the backward pass."""
        t = self.target
        H, Q, KV = t.hidden_size, t.heads[layer] * t.head_dim, t.num_kv_heads * t.head_dim
        return FP32 * (2 * H + Q + KV) + item * (4 * H + 5 * Q + 3 * KV + 4 * self.widths[layer])


def read_sizes(folder: Path, overrides: dict[int, int]) -> Sizes:
    """Read a teacher's config.json. Raises CheckpointError, WidthError."""
    target = read_target(folder)
    widths = choose_widths(read_laguna(folder), overrides)
    layers = [0] * target.num_layers
    for module in list_modules(target):
        layers[int(module.name.split(".")[2])] += module.numel
    return Sizes(target, tuple(widths), count_parameters(target), max(layers))
