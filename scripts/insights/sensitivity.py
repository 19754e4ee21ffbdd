"""How benchmarks fall as more is pruned, from the result files of evals/suites.py."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import msgspec

from laguna_serve.evals.harnesses.results import Cell
from laguna_serve.evals.harnesses.table import SuitesResult, find_differences
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.results import read_result

USUAL = "0=base/suites.json 0.1=pruned/suites.json"


class SuiteError(CommandError):
    """A result of a suite that cannot be placed, as one line."""


class SuitePoint(msgspec.Struct, frozen=True, kw_only=True):
    """A model's number: share of groups pruned, value (0 to 1), its 95% interval over `n` questions."""

    ratio: float
    value: float
    ci95: tuple[float, float] | None
    n: int


class SuiteCurve(msgspec.Struct, frozen=True, kw_only=True):
    """One metric of one suite; `differ`: settings in which its points were not measured alike."""

    suite: str
    metric: str
    points: tuple[SuitePoint, ...]
    differ: tuple[str, ...]


def read_curves(given: Sequence[str]) -> tuple[SuiteCurve, ...]:
    """Read SHARE=FILE, or SHARE=FILE#COLUMN where a file has several models; curves in the files' order.

    Raises:
        SuiteError, ResultError: a share or column that there is not, the same share twice, no such file.
    """
    cells: dict[tuple[str, str], dict[float, Cell]] = defaultdict(dict)
    seen: set[float] = set()
    for text in given:
        ratio, table, column = _open(text)
        if ratio in seen:
            raise SuiteError(f"--suites: expected each share once, got {ratio:g} twice; leave one of them out")
        seen.add(ratio)
        for row in table.rows:
            if column in row.cells:
                cells[row.suite, row.metric][ratio] = row.cells[column]
    return tuple(_make_curve(*key, found) for key, found in cells.items() if len(found) > 1)


def _open(text: str) -> tuple[float, SuitesResult, str]:
    share, _, place = text.partition("=")
    try:
        ratio = float(share)
    except ValueError:
        ratio = -1.0
    if not place or not 0 <= ratio < 1:
        raise SuiteError(f"--suites: expected SHARE=FILE, a share from 0 to 1, got {text!r}; as in {USUAL}")
    name, _, column = place.partition("#")
    table = read_result(Path(name), SuitesResult)
    if not column and len(table.columns) != 1:
        expected = f"one model, or {share}={name}#COLUMN"
        raise SuiteError(f"{name}: expected {expected}, got {len(table.columns)}: {', '.join(table.columns)}")
    if column and column not in table.columns:
        raise SuiteError(f"{name}: expected a column of {', '.join(table.columns)}, got {column}")
    return ratio, table, column or table.columns[0]


def _make_curve(suite: str, metric: str, cells: dict[float, Cell]) -> SuiteCurve:
    points = [
        SuitePoint(ratio=ratio, value=cell.value, ci95=cell.ci95, n=cell.n) for ratio, cell in sorted(cells.items())
    ]
    differ = find_differences(list(cells.values()))
    return SuiteCurve(suite=suite, metric=metric, points=tuple(points), differ=tuple(differ))
