"""One module's weights, gradients and moments shared out among the processes that train it (FSDP2).

Each process keeps its part in fp32; a layer's weights are gathered, in the dtype that is computed in, when the layer is
reached, and let go behind it. What the root has besides its layers stays gathered from the forward pass to the end of
the backward one. Every process has to go through the module as often as the others.

Source: torch.distributed.fsdp.fully_shard, of torch 2.13.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from laguna_serve.scripts.training.optimiser import Optimiser, State
from laguna_serve.scripts.training.ranks import Ranks, make_mesh

# The first process has everything, in the machine's memory; the others have nothing.
ON_THE_FIRST = StateDictOptions(full_state_dict=True, cpu_offload=True)
WHOLE = StateDictOptions(full_state_dict=True)


def shard(module: nn.Module, layers: Iterable[nn.Module], computed_in: torch.dtype, device: torch.device) -> None:
    """Share an fp32 module out among all processes' devices, in place; gradients are summed, not averaged.

    One that lies in the machine's memory moves a layer at a time: no device has it whole.
    """
    mesh = make_mesh(device)
    policy = MixedPrecisionPolicy(param_dtype=computed_in, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo has plain sums alone


def is_sharded(module: nn.Module) -> bool:
    """Say whether `shard` was here."""
    return isinstance(module, FSDPModule)


def gather(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Give every process the state of a sharded module: name and whole fp32 tensor, on its device, one at a time."""
    for name, part in module.state_dict().items():
        yield name, part.full_tensor() if isinstance(part, DTensor) else part


class ShardedOptimiser(Optimiser):
    """AdamW over each process's part of a sharded module. Its state is gathered by all processes together."""

    def add_gradients(self, ranks: Ranks) -> None:
        """Leave them: the backward pass has summed them already."""

    def state_dict(self) -> State:
        """Return module and moments by name to the first process, empty ones to the others."""
        moments = get_optimizer_state_dict(self._module, self._adamw, options=ON_THE_FIRST)
        return {"module": get_model_state_dict(self._module, options=ON_THE_FIRST), "optimizer": moments}

    def load_state_dict(self, state: State) -> None:
        """Take this process's part of what the first one's `state_dict` gave."""
        set_state_dict(
            self._module,
            self._adamw,
            model_state_dict=state["module"],
            optim_state_dict=state["optimizer"],
            options=WHOLE,
        )
