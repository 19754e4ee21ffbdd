"""What says how a model on the hub is served, fetched before anything is planned: configs, templates, tokenizers.

vLLM fetches a model while it starts, after its flags were chosen: without these files they would be chosen by the
model's name, and others at the next start. Weights are left to vLLM.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from laguna_serve.serving.checkpoint.folder import HUB_ID, find_cached_snapshot
from laguna_serve.serving.kit.files import expand

SMALL = ("*.json", "*.jinja")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
# Of variables that keep huggingface_hub, or vLLM, from this hub.
ELSEWHERE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "VLLM_USE_MODELSCOPE")
TIMEOUT_S = 10.0


def fetch_description(name: str, *, drafter: bool = False) -> str | None:
    """Fetch what is missing of a hub id's small files, unless this machine is kept from the hub.

    Args:
        name: a folder, of which there is nothing to fetch, or a hub id.
        drafter: it has no tokenizer of its own.

    Returns:
        Why they could not be had, in a line: flags are chosen by what is known of the name then.
    """
    if expand(name).exists() or not HUB_ID.fullmatch(name) or any(map(_is_set, ELSEWHERE)):
        return None
    if _is_described(find_cached_snapshot(name), drafter=drafter):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    try:
        snapshot_download(name, allow_patterns=list(SMALL), etag_timeout=TIMEOUT_S)
    except Exception as error:  # of its HTTP library, of the hub, of the disk: vLLM says more when it asks itself
        cause = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return f"{name}: its configuration could not be fetched ({cause}); flags are chosen by its name"
    return None


def describe_models(model: str, draft: str | None) -> None:
    """Fetch what describes a model and its drafter before they are served; what cannot be had is said on stderr."""
    for name, drafter in ((model, False), (draft, True)):
        if name is not None and (note := fetch_description(name, drafter=drafter)) is not None:
            print(f"warning: {note}", file=sys.stderr, flush=True)


def _is_described(folder: Path | None, *, drafter: bool) -> bool:
    return folder is not None and (drafter or any((folder / file).exists() for file in TOKENIZERS))


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE")
