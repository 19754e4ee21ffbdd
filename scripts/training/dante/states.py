"""What transformers' Trainer has saved of a training: which of its folders is whole."""

from __future__ import annotations

import json
from pathlib import Path


def find_state(work: Path) -> str | None:
    """Find the last state that was written to its end; None where there is none.

    Trainer writes trainer_state.json when all else is there, and deletes an older folder after that: one that was
    killed meanwhile leaves a folder without it, or with half of it, and the older one.
    """
    whole = [folder for folder in work.glob("checkpoint-*") if _is_whole(folder)]
    return str(max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]))) if whole else None


def _is_whole(folder: Path) -> bool:
    try:
        return isinstance(json.loads((folder / "trainer_state.json").read_text()), dict)
    except (OSError, ValueError):
        return False
