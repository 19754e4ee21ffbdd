"""A distillation's work folder: whose states it holds, and how long its stages have taken."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from laguna_serve.scripts.training.dense.config import DistillConfig, Recipe
from laguna_serve.scripts.training.ranks import Ranks
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.kit.run_dir import check_out, fingerprint, require_removable
from laguna_serve.serving.kit.signals import defer_signals

ROOT = Path(__file__).resolve().parents[3]


@dataclass(slots=True)
class Clock:
    """How long stages take, earlier runs that were stopped included; noted in the work folder."""

    work: Path
    ranks: Ranks

    @property
    def minutes(self) -> dict[str, float]:
        """Minutes of every stage so far."""
        noted = self.work / "minutes.json"
        minutes: dict[str, float] = json.loads(noted.read_text()) if noted.exists() else {}
        return minutes

    def time(self, stage: str, act: Callable[[], Any]) -> Any:
        """Do a stage, which Ctrl-C stops where nothing is lost, and add to what it took."""
        started = time.monotonic()
        try:
            with defer_signals():
                return act()
        finally:
            if self.ranks.first:
                minutes = self.minutes
                minutes[stage] = round(minutes.get(stage, 0.0) + (time.monotonic() - started) / 60, 1)
                (self.work / "minutes.json").write_text(json.dumps(minutes))


def open_work(config: DistillConfig, recipe: Recipe, folder: Path, ranks: Ranks) -> Path:
    """Open the folder of the training states.

    Raises:
        CheckpointError, RunDirError: it holds another run's, or is closed.
    """
    wanted: dict[str, Any] = asdict(recipe) | {
        "text": [config.text, fingerprint(config.text)],
        "chats": [config.chats, fingerprint(config.chats)],
        "width": sorted(config.width),
        # Nothing else is set aside then: more is trained on.
        "held_out": [config.held_out_text is not None, config.held_out_chats is not None],
    }
    wanted |= {"layerwise": config.layerwise, "top_k": config.top_k if config.store else None}
    wanted["teacher"] = hashlib.sha256(f"{fingerprint(str(folder))} {folder.resolve()}".encode()).hexdigest()[:16]
    digest = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:12]
    work = config.work or ROOT / ".cache" / f"distill-{digest}"
    if ranks.first:
        check_out(work, "--work")
        if config.fresh:
            require_removable(work, "recipe.json")
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        noted = work / "recipe.json"
        if noted.exists() and noted.read_text() != json.dumps(wanted):
            raise CheckpointError(f"{work}: expected the states of this run, got another run's; pass --fresh or --work")
        noted.write_text(json.dumps(wanted))
    ranks.wait()
    return work
