"""Students as transformers loads them: whole, and without its bars and warnings of other libraries."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from laguna_serve.serving.kit.errors import CommandError, first_line

# Of kernels that a CPU does not load, and of torchao's own use of torch.
NOISY = ("torchao", "torch.utils._pytree")


def quieten_libraries() -> None:
    """Silence what says nothing of a training: bars of loading and saving, and warnings of `NOISY`."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


def load_student(folder: Path, dtype: torch.dtype | str = torch.float32) -> Any:
    """Load a causal language model.

    Raises:
        CommandError: there is none, or weights are missing, as in a drafter: they would be random numbers.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it has a table of what is missing, a page of which one line is enough
    expected = f"{folder}: expected a causal language model"
    try:
        model, how = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise CommandError(f"{expected}, got: {first_line(error)}") from None
    finally:
        transformers_logging.set_verbosity(before)
    if missing := sorted(how["missing_keys"]):
        got = f"got one without {len(missing)} of its tensors, {missing[0]} for one"
        raise CommandError(f"{expected}, {got}; is it a drafter, or part of a model?")
    return model
