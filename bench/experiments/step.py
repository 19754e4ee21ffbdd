"""One step of the campaign: a command of this project, what is expected of it, and what it takes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

PACKAGE = Path(__file__).resolve().parents[2]
# The repository: what an installed wheel has no tests and fixtures of is looked for in the current folder.
ROOT = Path.cwd() if not (PACKAGE / "tests").exists() and (Path.cwd() / "tests" / "toy").exists() else PACKAGE
Part = Literal["kernels", "engine", "full-size", "published", "host"]
PARTS: tuple[Part, ...] = get_args(Part)
# Seconds until an engine answers on an H100: imports, weights, compilation, capture of graphs.
TOY_START_S = 45
FULL_START_S = 100
# A step is stopped at so many times its estimate.
PATIENCE = 3
LEAST_LIMIT_S = 120
# What stands for a path or a checkpoint in a command.
PYTHON, OUT, TOY, DRAFT, PROMPTS = "{python}", "{out}", "{toy}", "{draft}", "{prompts}"
XS2_RANDOM, XS2_DRAFT_RANDOM, XS2_PRUNED_RANDOM = "{xs2-random}", "{xs2-draft-random}", "{xs2-pruned-random}"
XS2_FP8_RANDOM, XS2_FP8_PRUNED_RANDOM = "{xs2-fp8-random}", "{xs2-fp8-pruned-random}"
DENSE_CONFIG, DENSE_RANDOM = "{dense-config}", "{dense-random}"
XS2, XS2_DRAFT, XS2_PRUNED = "{xs2}", "{xs2-draft}", "{xs2-pruned}"
# Engines at toy size on a CPU: not compiled, with a small cache.
SMALL_ENGINE = ("--eager", "--kv-cache-gib", "0.05")
TOY_FILES = ("tests/toy/teacher", "tests/toy/dflash", "tests/toy/prompts.jsonl")
MADE = (XS2_RANDOM, XS2_DRAFT_RANDOM, XS2_PRUNED_RANDOM, XS2_FP8_RANDOM, XS2_FP8_PRUNED_RANDOM, DENSE_CONFIG)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step; its commands name paths by the placeholders above.

    Attributes:
        row: its number in bench/results/GPU_TODO.md.
        command: on a GPU; empty where a person has to run it, as `by_hand` says.
        rehearsal: the same at toy size on a CPU; empty where there is no such thing.
        result: the result file below the step's folder, or "" for the JSON line that the command prints last.
        expected: what a GPU should show; `why`: what depends on it.
        starts: engines that are started one after the other; `work_s`: seconds of everything else, on an H100.
        full_size: its engines are XS.2's size: they take FULL_START_S each.
        synthetic: acceptance is prescribed, not measured.
        falls_short: status 1 of the command is what is expected: the answers of two models, or prescribed ones, differ,
            or speculation does not pay.
        needs: paths in the repository, or checkpoints (placeholders), without which it cannot run.
    """

    name: str
    part: Part
    row: int
    command: tuple[str, ...] = ()
    by_hand: str = ""
    rehearsal: tuple[str, ...] = ()
    result: str = ""
    expected: str
    why: str
    starts: int = 0
    work_s: int = 0
    full_size: bool = False
    synthetic: bool = False
    falls_short: bool = False
    needs: tuple[str, ...] = ()

    @property
    def estimate_s(self) -> int:
        """Seconds on an H100."""
        return self.starts * (FULL_START_S if self.full_size else TOY_START_S) + self.work_s

    @property
    def limit_s(self) -> int:
        """Seconds after which it is stopped."""
        return max(LEAST_LIMIT_S, PATIENCE * self.estimate_s)


def fill(command: tuple[str, ...], places: Mapping[str, str]) -> list[str]:
    """Fill the placeholders of a command, also within words."""
    filled = []
    for word in command:
        for name, value in places.items():
            word = word.replace(name, value)
        filled.append(word)
    return filled


def list_named(command: Sequence[str], given: Iterable[str]) -> list[str]:
    """List the placeholders, of those given, that a command has."""
    return [name for name in given if any(name in word for word in command)]


def shorten_command(command: Sequence[str], out: Path) -> list[str]:
    """Shorten a command to what a person would repeat in the repository's folder; the campaign's own, `out`, is DIR."""
    own = str(out.resolve())
    return [
        "python" if word == sys.executable else word.replace(own, "DIR").replace(f"{ROOT}/", "") for word in command
    ]


def list_places(out: Path, checkpoints: Path, given: Mapping[str, str]) -> dict[str, str]:
    """List what the placeholders stand for; `given`: checkpoints of the user's."""
    toy = ROOT / "tests" / "toy"
    return {
        PYTHON: sys.executable,
        OUT: str(out),
        TOY: str(toy / "teacher"),
        DRAFT: str(toy / "dflash"),
        PROMPTS: str(toy / "prompts.jsonl"),
        **{name: str(checkpoints / name.strip("{}")) for name in (*MADE, DENSE_RANDOM)},
        **given,
    }
