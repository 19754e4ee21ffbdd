"""Which routes an engine of the gateway's own lacks, so that no request for one of them loads it for a 404.

vLLM has those of embeddings, scores and audio only for models that are of that kind. Of a Laguna, of other models that
only generate text and of masked diffusion that is known before the first load; what any other has it lists itself then.
"""

from __future__ import annotations

import json

from laguna_serve.serving.checkpoint import CheckpointError, find_folder
from laguna_serve.serving.checkpoint.diffusion import find_diffusion
from laguna_serve.serving.checkpoint.others import PLANNED, read_served
from laguna_serve.serving.gateway.config.owned import OwnedEngine
from laguna_serve.serving.gateway.wire.paths import ANSWERED
from laguna_serve.serving.kit.files import expand
from laguna_serve.serving.machine.local_http import OK, ask_engine

# Of vLLM 0.32 and 0.33.
POOLING = frozenset(
    (
        *("/v1/embeddings", "/v2/embed", "/pooling", "/classify"),
        *("/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"),
    )
)
AUDIO = frozenset(("/v1/audio/transcriptions", "/v1/audio/translations"))
# What plugins/diffusion/server answers.
DIFFUSION = frozenset(("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"))
# Flags by which a model becomes one of another kind.
CHOOSING = ("--runner", "--convert", "--task", "--hf-overrides", "--config")
# By which vLLM knows a model for embeddings, whatever its class.
SENTENCE_TRANSFORMER = "modules.json"
LIST_TIMEOUT_S = 30.0
NONE = frozenset[str]()


class Routes:
    """What is known of the engines of a configuration, by their tables."""

    def __init__(self) -> None:
        self._absent: dict[OwnedEngine, frozenset[str] | None] = {}

    def find_absent(self, table: OwnedEngine | None) -> frozenset[str]:
        """Find the routes that an engine is known to lack; none of one of which nothing is known yet."""
        if table is None:
            return NONE
        if table not in self._absent:
            self._absent[table] = foresee(table)
        return self._absent[table] or NONE

    def learn(self, table: OwnedEngine, url: str) -> None:
        """Learn what an engine that runs lacks, where that is not known. It blocks: called in a thread."""
        self.find_absent(table)
        if self._absent[table] is None:
            self._absent[table] = ask(url)


def foresee(table: OwnedEngine) -> frozenset[str] | None:
    """Foresee what an engine will lack, from its model's folder; None where that does not tell."""
    try:
        if find_diffusion(table.model) is not None:
            return ANSWERED - DIFFUSION
        folder = find_folder(table.model)
        if folder is None or any(map(_may_choose, table.extra_args)) or (folder / SENTENCE_TRANSFORMER).exists():
            return None
        served = read_served(folder)
    except (CheckpointError, OSError):
        return None  # it says so when it is started
    # Of a hub id the file above may be on the hub alone.
    plain = served.other is None or (served.other in PLANNED and expand(table.model).is_dir())
    return POOLING | AUDIO if plain else None


def ask(url: str) -> frozenset[str] | None:
    """Ask an engine on this machine for its routes, and return which it lacks; None where it does not say."""
    try:
        status, answer = ask_engine(url, "/openapi.json", timeout_s=LIST_TIMEOUT_S)
        listed = json.loads(answer)["paths"] if status == OK else {}
        found = {path for path, methods in listed.items() if "post" in methods}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return ANSWERED - found if found & ANSWERED else None


def _may_choose(argument: str) -> bool:
    """Whether a flag chooses a kind, written out or shortened."""
    name = argument.partition("=")[0].replace("_", "-")
    return name.startswith("-") and any(flag.startswith(name) or name.startswith(flag) for flag in CHOOSING)
