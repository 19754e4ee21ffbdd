"""GPUs that can be planned for without having one.

Memory is what nvidia-smi reports in total, as the vendors' figures leave out what the driver and ECC keep.
"""

from __future__ import annotations

from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.machine.device import Device
from laguna_serve.serving.machine.memory import MIB

# name → what it is called, compute capability × 10, MiB
GPUS: dict[str, tuple[str, int, int]] = {
    "a100-40gb": ("NVIDIA A100 40GB", 80, 40960),
    "a100-80gb": ("NVIDIA A100 80GB", 80, 81920),
    "rtx3090": ("NVIDIA GeForce RTX 3090", 86, 24576),
    "a6000": ("NVIDIA RTX A6000", 86, 49140),
    "l4": ("NVIDIA L4", 89, 23034),
    "l40s": ("NVIDIA L40S", 89, 46068),
    "rtx4090": ("NVIDIA GeForce RTX 4090", 89, 24564),
    "h100-80gb": ("NVIDIA H100 80GB", 90, 81559),
    "h200": ("NVIDIA H200", 90, 143771),
    "b200": ("NVIDIA B200", 100, 183359),
    "rtx5090": ("NVIDIA GeForce RTX 5090", 120, 32607),
    "rtx-pro-6000": ("NVIDIA RTX PRO 6000 Blackwell", 120, 97887),
}


def plan_for(name: str) -> Device:
    """Plan an idle GPU of that name. Raises CheckpointError for one that is not in the table."""
    if name not in GPUS:
        raise CheckpointError(f"--as-device: expected one of {', '.join(GPUS)}, got {name!r}; take the nearest")
    title, capability, mib = GPUS[name]
    return Device("gpu", title, mib * MIB, mib * MIB, capability=capability)
