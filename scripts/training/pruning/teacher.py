"""The model whose experts are scored or pruned."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_model(folder: Path, threads: int) -> tuple[Any, Any]:
    """Load transformers' Laguna in fp32 on the CPU, and its tokenizer."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.LagunaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)
