"""Laguna as vLLM serves it, with the router's bias loaded.

A checkpoint names that bias `mlp.experts.e_score_correction_bias`, or, as transformers' parameter, `mlp.gate.…`.  vLLM
hands every tensor under `experts.` to its expert loader, which passes over a name that it does not know, without a
word, and passes over biases that no module has: it stays zero, and tokens go to other experts than in training.  The
subclass takes these tensors out and loads them itself.

Read in vLLM 0.26.0, 0.29.0 and 0.32.0, run on 0.32.0.  It can go when
`tests/plugins/test_laguna.py::test_stock_loader_drops_the_router_bias` fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models import laguna

# As the releases have it, and by the name of transformers' own parameter.
BIASES = ("mlp.experts.e_score_correction_bias", "mlp.gate.e_score_correction_bias")


class LagunaForCausalLM(laguna.LagunaForCausalLM):  # type: ignore[misc]
    """vLLM's Laguna whose sparse layers select experts with the bias they were trained with."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint's tensors; returns the names of the parameters that were set."""
        biases: dict[str, torch.Tensor] = {}

        def without_biases() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                if name.endswith(BIASES):
                    biases[name[: name.rindex("mlp.")]] = tensor
                else:
                    yield name, tensor

        loaded: set[str] = super().load_weights(without_biases())
        parameters = dict(self.named_parameters())
        for layer, tensor in biases.items():
            for name in parameters:  # none, where another pipeline rank has the layer
                if name.startswith(layer) and name.endswith("e_score_correction_bias"):
                    default_weight_loader(parameters[name], tensor)
                    loaded.add(name)
        return loaded
