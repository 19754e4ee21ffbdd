"""The published releases' configs and headers (tests/fixtures/releases), and which drafter goes with which model."""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

RELEASES = Path(__file__).resolve().parents[1] / "fixtures" / "releases"
NAMES = sorted(path.name for path in RELEASES.iterdir() if path.is_dir())
DRAFTERS = [name for name in NAMES if "dflash" in name.lower()]
TARGETS = [name for name in NAMES if name not in DRAFTERS]
FORMATS = {"FP8": "fp8", "NVFP4": "nvfp4", "INT4": "int4"}
ITEM_BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1, "I32": 4, "I64": 8, "BOOL": 1}


def folder(name: str) -> str:
    return str(RELEASES / name)


def find_drafter(target: str) -> str | None:
    """The drafter published for a model; one in the same numbers where there is one."""
    family = re.sub(r"-(FP8|NVFP4|INT4)$", "", target)
    own = target.replace(family, f"{family}-DFlash")
    return next((name for name in (own, f"{family}-speculator.dflash") if name in DRAFTERS), None)


def find_kind(name: str) -> str | None:
    """What a release's name says of its numbers; a drafter's is that of the model it goes with, and says nothing."""
    return FORMATS.get(name.rpartition("-")[2]) if name in TARGETS else None


def read_tensors(name: str) -> dict[str, tuple[str, list[int]]]:
    """Every tensor's dtype and shape: the ranges in the file's names spelled out."""
    found = {}
    for pattern, (dtype, shape) in json.loads((RELEASES / name / "tensors.json").read_text()).items():
        for key in _expand(pattern):
            found[key] = (dtype, shape)
    return found


@functools.cache
def weigh(name: str) -> int:
    """Bytes of the release's tensors."""
    return sum(ITEM_BYTES[dtype] * math.prod(shape) for dtype, shape in read_tensors(name).values())


def read_config(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((RELEASES / name / "config.json").read_text())
    return config


def _expand(pattern: str) -> list[str]:
    parts = re.split(r"\{([^}]*)\}", pattern)
    choices = [_choices(part) if number % 2 else [part] for number, part in enumerate(parts)]
    return ["".join(parts) for parts in itertools.product(*choices)]


def _choices(text: str) -> list[str]:
    found = []
    for item in text.split(","):
        first, dash, last = item.partition("-")
        numbers = dash and first.isdigit() and last.isdigit()
        found += [str(number) for number in range(int(first), int(last) + 1)] if numbers else [item]
    return found
