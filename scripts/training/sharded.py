"""One module's weights, gradients and moments shared out among the processes that train it (FSDP2).

Each process keeps its part in fp32; a layer's weights are gathered, in the dtype that is computed in, when the layer is
reached, and let go behind it.  What the root has besides its layers stays gathered from the forward pass to the end of
the backward one.  Every process has to go through the module as often as the others.

Source: torch.distributed.fsdp.fully_shard, of torch 2.13.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from laguna_serve.scripts.training.optimiser import Optimiser, State
from laguna_serve.scripts.training.ranks import Ranks

# The first process has everything, in the machine's memory; the others have nothing.
ON_THE_FIRST = StateDictOptions(full_state_dict=True, cpu_offload=True)
WHOLE = StateDictOptions(full_state_dict=True)


def shard(module: nn.Module, layers: Iterable[nn.Module], computed_in: torch.dtype) -> None:
    """Share an fp32 module out among all processes, in place, layer by layer; gradients are summed, not averaged."""
    device = next(module.parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
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


def gather(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the whole state of a sharded module to every process: fp32 tensors, on its device."""
    return cast("dict[str, torch.Tensor]", get_model_state_dict(module, options=WHOLE))


class ShardedOptimiser(Optimiser):
    """AdamW over each process's part of a sharded module.  Its state is gathered by all processes together."""

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
