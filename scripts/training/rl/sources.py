"""Whether a GRPO run still has the model and the drafter that it began with: by their content, not by their path."""

from __future__ import annotations

from pathlib import Path

import msgspec

from laguna_serve.serving.checkpoint import CheckpointError, find_folder
from laguna_serve.serving.checkpoint.digest import digest_checkpoint
from laguna_serve.serving.kit.files import write_text

SOURCES = "sources.json"


def check_sources(out: Path, names: tuple[str | None, ...]) -> None:
    """Refuse to go on, or to print what is finished, where a checkpoint was written anew under the same path.

    A run that an earlier version began has not noted any, and goes on.

    Raises:
        CheckpointError: naming it.
    """
    try:
        noted = msgspec.json.decode((out / SOURCES).read_bytes(), type=dict[str, str])
    except (OSError, msgspec.MsgspecError):
        return
    for name, digest in _digest(names).items():
        if noted.get(name, digest) != digest:
            expected = f"expected {name} as it was when this run began"
            raise CheckpointError(f"{out}: {expected}, got other weights or settings; choose another --out")


def note_sources(out: Path, names: tuple[str | None, ...]) -> None:
    """Note what a run begins with."""
    write_text(out / SOURCES, msgspec.json.format(msgspec.json.encode(_digest(names))).decode() + "\n")


def _digest(names: tuple[str | None, ...]) -> dict[str, str]:
    folders = {name: find_folder(name) for name in names if name is not None}
    return {name: digest_checkpoint(folder) for name, folder in folders.items() if folder is not None}
