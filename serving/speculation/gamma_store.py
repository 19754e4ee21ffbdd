"""What a γ sweep found for a model, a drafter, a device and a vLLM: kept in the user's cache for `--gamma auto`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.kit.files import expand, write_text
from laguna_serve.serving.machine.cache import find_own_cache
from laguna_serve.serving.machine.device import find_device, find_vllm
from laguna_serve.serving.speculation.drafting import DRAFT_SAMPLING
from laguna_serve.serving.speculation.flags import ADAPTIVE

AUTO: Literal["auto"] = "auto"
SWEEP = "python bench/gamma_sweep.py --model {model} --draft {draft} --prompts FILE --out DIR"


@dataclass(frozen=True, slots=True)
class Advice:
    """`schedule`: vLLM's inclusive (first, last, K) ranges of batch sizes, K = 0 for plain decoding."""

    model: str
    draft: str
    schedule: tuple[tuple[int, int, int], ...]
    date: str

    @property
    def gamma(self) -> int:
        """The largest K, 0 when speculation pays nowhere."""
        return max(entry[2] for entry in self.schedule)


def store_advice(advice: Advice) -> Path:
    """Write it where `find_advice` looks; a later sweep of the same overwrites it."""
    path = _place(advice.model, advice.draft)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(asdict(advice)) + "\n")
    return path


def find_advice(model: str, draft: str) -> Advice:
    """Find what was stored for this pair on this device with this vLLM.

    Raises:
        CheckpointError: nothing, or a file that cannot be read; the message says how to get one.
    """
    path = _place(model, draft)
    remedy = SWEEP.format(model=model, draft=draft)
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        ranges = tuple((int(first), int(last), int(count)) for first, last, count in stored["schedule"])
        if not ranges:
            raise ValueError("an empty schedule")
        return Advice(stored["model"], stored["draft"], ranges, stored["date"])
    except FileNotFoundError:
        expected = "a sweep of this model, drafter, device and vLLM"
        raise CheckpointError(f"--gamma auto: expected {expected}, got none; run `{remedy}`") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: expected a sweep's schedule, got {error!r}; run `{remedy}` again") from None


@dataclass(frozen=True, slots=True)
class Drafting:
    """What an engine drafts with; `advice`: the sweep that γ "auto" went by, None for any other γ."""

    draft: str | None
    gamma: int | None
    adaptive: bool
    schedule: tuple[tuple[int, int, int], ...] | None
    sampling: str
    advice: Advice | None = None


def settle_gamma(model: str, draft: str | None, gamma: int | str | None, sampling: str) -> Drafting:
    """Settle γ as it is asked for: a number, "adaptive", "auto", or the drafter's maximum for anything else.

    Where "auto" finds that plain decoding is the fastest, nothing is drafted.

    Raises:
        CheckpointError: γ "auto" without a sweep of this pair.
    """
    if gamma == AUTO and draft is not None:
        advice = find_advice(model, draft)
        if advice.gamma:
            return Drafting(draft, advice.gamma, False, advice.schedule, sampling, advice)
        return Drafting(None, None, False, None, DRAFT_SAMPLING[0], advice)
    return Drafting(draft, None if isinstance(gamma, str) else gamma, gamma == ADAPTIVE, None, sampling)


def _place(model: str, draft: str) -> Path:
    install = find_vllm()
    device = find_device(install)
    parts = [_name(model), _name(draft), "none" if device is None else device.name]
    parts.append("none" if install is None else install.version)
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return find_own_cache() / "gamma" / f"{digest}.json"


def _name(checkpoint: str) -> str:
    """Name a folder by where it really lies, a hub id as it is."""
    path = expand(checkpoint)
    return str(path.resolve()) if path.is_dir() else checkpoint
