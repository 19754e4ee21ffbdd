"""The file of the keeper of weights: the version of every model, and the replicas that may not go on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from laguna_serve.serving.cluster.messages import Version
from laguna_serve.serving.kit.files import write_json
from laguna_serve.serving.kit.results import JsonObject

SCHEMA = "laguna_serve.cluster_weights/1"
# Ray gives every replica a name of its own, and replaces one that is struck off within seconds.
MOST_STRUCK = 1_000


def read_versions(file: Path) -> dict[str, Version]:
    """Read the versions of a file; none where there is no file yet. Raises ValueError: it is not ours."""
    return {name: Version(**version) for name, version in _read(file).get("models", {}).items()}


def read_struck(file: Path) -> list[str]:
    """Read which replicas were struck off, the latest last. Raises ValueError: the file is not ours."""
    return [str(name) for name in _read(file).get("struck", ())]


def write_versions(file: Path, versions: Mapping[str, Version], struck: Iterable[str] = ()) -> None:
    """Write them whole. Raises WriteError."""
    models = {name: asdict(version) for name, version in versions.items()}
    write_json(file, {"schema": SCHEMA, "models": models, "struck": [*struck][-MOST_STRUCK:]})


def _read(file: Path) -> JsonObject:
    try:
        read: JsonObject = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    if read.get("schema") != SCHEMA:
        raise ValueError(f"weights.file {file}: expected {SCHEMA}, got {read.get('schema')!r}; name another file")
    return read
