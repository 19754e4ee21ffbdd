"""What vLLM draws with where a request does not say: the release's generation_config.json, else its own defaults."""

from __future__ import annotations

from collections.abc import Sequence

from laguna_serve.serving.chat.template import read_object
from laguna_serve.serving.checkpoint import CheckpointError, find_folder
from laguna_serve.serving.checkpoint.diffusion import find_diffusion

# Arguments of vLLM's that name other defaults, or a file with more arguments.
OTHERS = ("generation", "--config")


def find_temperature(model: str, extra_args: Sequence[str]) -> float | None:
    """Find the temperature of requests that state none; None: it cannot be known from the checkpoint.

    A release without generation_config.json may have it in config.json, as transformers' older ones do.
    """
    if any(other in argument for argument in extra_args for other in OTHERS if argument.startswith("-")):
        return None
    try:
        folder = find_folder(model)
        if folder is None or find_diffusion(model) is not None:
            return None
        path = folder / "generation_config.json"
        given = read_object(path if path.is_file() else folder / "config.json").get("temperature")
    except CheckpointError:
        return None
    if given is None:
        return 1.0
    return float(given) if isinstance(given, int | float) and given >= 0 else None
