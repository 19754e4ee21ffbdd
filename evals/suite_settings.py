"""The pinned settings of the standard suites: what suites.toml says, checked."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

SHIPPED = Path(__file__).resolve().parent / "suites.toml"
RUNS = ("loglikelihood", "generate", "code")


class SuiteError(ValueError):
    """A suite that cannot be run or a result that cannot be read; one line with the remedy."""


@dataclass(frozen=True, slots=True)
class Suite:
    """One suite; suites.toml explains the fields."""

    name: str
    title: str
    run: str
    task: str
    shots: int
    seed: int
    scores: tuple[str, ...]
    data: str
    splits: tuple[str, ...]
    source: str
    file: str = ""
    tag: str = ""


def load_suites(path: Path = SHIPPED) -> dict[str, Suite]:
    """Every suite by name, in the file's order.

    Raises:
        SuiteError: a key is missing or unknown, or `run` is none of RUNS.
    """
    with path.open("rb") as file:
        tables = tomllib.load(file)
    known = {field.name for field in fields(Suite)} - {"name"}
    suites = {}
    for name, table in tables.items():
        wrong = sorted((set(table) ^ known) - {"file", "tag"})
        if wrong:
            raise SuiteError(f"{path.name}: [{name}]: expected the keys {sorted(known)}, got a difference in {wrong}")
        if table["run"] not in RUNS:
            raise SuiteError(f"{path.name}: [{name}]: run: expected one of {', '.join(RUNS)}, got {table['run']!r}")
        lists = {key: tuple(table[key]) for key in ("scores", "splits")}
        suites[name] = Suite(name=name, **{**table, **lists})
    return suites


def choose_suites(names: str, suites: dict[str, Suite]) -> list[Suite]:
    """The suites of a list such as "gsm8k,mmlu-5".

    Raises:
        SuiteError: one of them is not known.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in suites]
    if unknown or not wanted:
        raise SuiteError(f"--suites: expected some of {', '.join(suites)}, got {', '.join(unknown) or 'none'}")
    return [suites[name] for name in dict.fromkeys(wanted)]


def render_list(suites: Sequence[Suite]) -> str:
    """The settings in columns, each with its source below."""
    lines = [f"{'suite':<15} {'needs':<14} {'task':<15} {'shots':>5} {'seed':>5}  scores"]
    for suite in suites:
        scores = "; ".join(score.removesuffix(",none") for score in suite.scores)
        lines.append(f"{suite.name:<15} {suite.run:<14} {suite.task:<15} {suite.shots:>5} {suite.seed:>5}  {scores}")
        lines.append(f"{'':<15} {suite.source}")
    return "\n".join(lines)
