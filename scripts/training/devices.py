"""Where training computes: a device that was asked for is there, or one line says that it is not."""

from __future__ import annotations

import torch

from laguna_serve.serving.kit.errors import CommandError


def require_device(device: str) -> None:
    """Raise CommandError for a GPU that torch cannot use; Accelerate would take the processor without a word."""
    if device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device: expected a GPU that torch can use, got none; leave it out for the CPU")
