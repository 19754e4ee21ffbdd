"""The pinned settings of the standard suites: what suites.toml says, checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from laguna_serve.evals.problems.mbpp_splits import SPLITS, describe_split
from laguna_serve.evals.problems.protocols import PROTOCOLS
from laguna_serve.serving.kit.errors import CommandError

SHIPPED = Path(__file__).resolve().parents[1] / "suites.toml"


class SuiteError(CommandError, ValueError):
    """A suite that cannot be run or a result that cannot be read; one line with the remedy."""


class Suite(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One suite; suites.toml explains the fields."""

    name: str
    title: str
    run: Literal["loglikelihood", "generate", "code"]
    task: str
    shots: int
    seed: int
    scores: tuple[str, ...]
    data: str
    splits: tuple[str, ...]
    rows: str
    dataset: str
    source: str
    file: str = ""
    tag: str = ""
    files: tuple[str, ...] = ()

    @property
    def split(self) -> str:
        """Return the split that one of MBPP's suites asks, else ""."""
        return self.splits[-1] if self.data == "mbpp" else ""


def load_suites(path: Path = SHIPPED) -> dict[str, Suite]:
    """Every suite by name, in the file's order.

    Raises:
        SuiteError: a key is missing, unknown or of another kind, or a code suite's task is no protocol.
    """
    suites = {}
    for name, table in msgspec.toml.decode(path.read_bytes()).items():
        try:
            suite = msgspec.convert({"name": name, **table}, Suite)
        except msgspec.ValidationError as error:
            raise SuiteError(
                f"{path.name}: [{name}]: expected the settings of a suite, got some where {error}"
            ) from None
        if suite.run == "code" and suite.task not in PROTOCOLS:
            expected = f"expected one of {', '.join(PROTOCOLS)}"
            raise SuiteError(f"{path.name}: [{name}]: task: {expected}, got {suite.task!r}")
        suites[name] = suite
    return suites


def choose_suites(names: str, suites: dict[str, Suite]) -> list[Suite]:
    """Choose the suites of a list such as "gsm8k,mmlu-5,mbpp-bigcode:train".

    Raises:
        SuiteError: one of them is not known, or has no such split.
    """
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    unknown = [name for name in wanted if name.partition(":")[0] not in suites]
    if unknown or not wanted:
        raise SuiteError(f"--suites: expected some of {', '.join(suites)}, got {', '.join(unknown) or 'none'}")
    chosen = []
    for name in wanted:
        suite, _, split = (part.strip() for part in name.partition(":"))
        chosen.append(_take_split(suites[suite], split) if ":" in name else suites[suite])
    return chosen


def _take_split(suite: Suite, split: str) -> Suite:
    if not suite.split or split not in SPLITS:
        expected = (
            f"one of the splits {', '.join(SPLITS)}" if suite.split else "no split (only MBPP's suites have some)"
        )
        raise SuiteError(f"--suites: {suite.name}: expected {expected}, got {split!r}")
    return msgspec.structs.replace(suite, name=f"{suite.name}:{split}", splits=(split,))


def render_list(suites: Sequence[Suite]) -> str:
    """Render the settings in columns; below each its source, and what its data are and where they are to be had."""
    lines = [f"{'suite':<18} {'run':<14} {'task':<14} {'shots':>5} {'seed':>5}  scores"]
    for suite in suites:
        scores = "; ".join(score.removesuffix(",none") for score in suite.scores)
        lines.append(f"{suite.name:<18} {suite.run:<14} {suite.task:<14} {suite.shots:>5} {suite.seed:>5}  {scores}")
        split = f", split {describe_split(suite.split)}" if suite.split else ""
        lines += [f"    {line}" for line in (f"{suite.title}{split}", suite.source, f"data: {suite.dataset}")]
        lines.append(f"    --data: {_describe_files(suite)}, rows of {suite.rows}")
    return "\n".join(lines)


def _describe_files(suite: Suite) -> str:
    if suite.files:
        return f"DIR/{suite.data}/" + " or ".join(file.replace("{split}", suite.splits[-1]) for file in suite.files)
    folder = suite.data.replace("{subject}", "SUBJECT")
    return " and ".join(f"DIR/{folder}/{split}.jsonl or .parquet" for split in dict.fromkeys(suite.splits))
