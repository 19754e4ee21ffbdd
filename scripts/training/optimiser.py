"""AdamW whose states and weights are fp32 even where the module computes in a narrower dtype.

A bf16 weight of size 0.02 does not change at all by a step of 2e-5: what is added up has to be wider than what is
multiplied. A narrow parameter's gradient moves to its fp32 master copy as soon as it is known, so that gradients of
several parts of a batch add up in fp32 and are never there twice.

Bytes per parameter: fp32 16 (weight, gradient, two moments); bf16 18 (weight, and the same four of its master copy).
Moments of 8 bits (torchao's blocks of 256 values with one scale each) take 2 instead of 8 of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from laguna_serve.scripts.training.ranks import Ranks
from laguna_serve.serving.kit.errors import CommandError

BETAS = (0.9, 0.95)
Moments = Literal["float32", "8bit"]
# What torch.save keeps of a training.
State = dict[str, Any]


def open_adamw(weights: Iterable[nn.Parameter], weight_decay: float, moments: Moments) -> torch.optim.Optimizer:
    """Make AdamW over fp32 weights. Raises CommandError where moments of 8 bits want torchao, which is not here."""
    if moments == "float32":
        return torch.optim.AdamW(weights, betas=BETAS, weight_decay=weight_decay, fused=True)
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        remedy = "run bash scripts/client_env.sh train, then this with .venv-train/bin/python"
        raise CommandError(f"--moments 8bit: expected an environment with torchao, got none; {remedy}") from None
    adamw: torch.optim.Optimizer = AdamW8bit(weights, betas=BETAS, weight_decay=weight_decay)
    return adamw


class Optimiser:
    """AdamW over the trainable parameters of a module, by way of fp32 master copies where they are narrower."""

    def __init__(self, module: nn.Module, weight_decay: float, moments: Moments = "float32") -> None:
        self._masters: dict[nn.Parameter, nn.Parameter] = {}
        for parameter in module.parameters():
            if parameter.requires_grad and parameter.dtype != torch.float32:
                self._masters[parameter] = nn.Parameter(parameter.detach().float())
                parameter.register_post_accumulate_grad_hook(self._move_gradient)
        self._module = module
        self._adamw = open_adamw(self.weights(module), weight_decay, moments)

    def weights(self, module: nn.Module) -> list[nn.Parameter]:
        """List the fp32 weights of a part of the module, which have the gradients."""
        return [self._masters.get(p, p) for p in module.parameters() if p.requires_grad]

    def clear(self) -> None:
        """Forget the gradients of the last step."""
        self._adamw.zero_grad()

    def add_gradients(self, ranks: Ranks) -> None:
        """Sum the gradients of all processes, in place."""
        ranks.add_gradients(self.weights(self._module))

    @torch.no_grad()
    def step(self, lr: float, clipped: Iterable[nn.Module]) -> None:
        """Clip the gradients of each module in `clipped` to norm 1, take a step, and round it to the parameters."""
        for group in self._adamw.param_groups:
            if isinstance(group["lr"], torch.Tensor):  # torchao's, which compiles the step
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        for part in clipped:
            nn.utils.clip_grad_norm_(self.weights(part), 1.0)
        self._adamw.step()
        for parameter, master in self._masters.items():
            parameter.copy_(master)

    def state_dict(self) -> State:
        """Return the module's state, the moments, and the master copies in the order of the parameters."""
        masters = [master.detach() for master in self._masters.values()]
        return {"module": self._module.state_dict(), "optimizer": self._adamw.state_dict(), "masters": masters}

    @torch.no_grad()
    def load_state_dict(self, state: State) -> None:
        """Take over what `state_dict` gave; states of before there were master copies have none."""
        self._module.load_state_dict(state["module"])
        self._adamw.load_state_dict(state["optimizer"])
        for master, saved in zip(self._masters.values(), state.get("masters", ()), strict=True):
            master.copy_(saved)

    def _move_gradient(self, parameter: torch.Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None
        master = self._masters[parameter]
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad += parameter.grad
        parameter.grad = None
