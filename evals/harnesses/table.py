"""One table of several models' scores: suites.json, schema laguna_serve.suites/1; a row per suite and metric."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from laguna_serve.evals.harnesses.pairing import Pair, pair, render_pairs
from laguna_serve.evals.harnesses.results import Cell, Score, Setting
from laguna_serve.evals.harnesses.settings import Suite
from laguna_serve.serving.kit.environment import Environment
from laguna_serve.serving.kit.tables import Table


class Row(Struct, frozen=True, kw_only=True):
    """A suite and metric: column → what its model got. `differ`: settings in which cells were not measured alike."""

    suite: str
    metric: str
    cells: dict[str, Cell]
    differ: list[str]


class SuitesResult(Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.suites/1"):
    """suites.json. A column is a model; one that several folders hold gets a column per folder.

    `pairs`: columns against the first one, where it is known what became of single questions.
    """

    environment: Environment
    columns: list[str]
    rows: list[Row]
    pairs: list[Pair] = []


def merge(scores_of: Mapping[Path, Sequence[Score]], suites: Sequence[Suite], environment: Environment) -> SuitesResult:
    """Merge the folders' scores into one table.

    Of several runs of the same suite and metric in a folder the newest counts.
    """
    places = Counter(model for scores in scores_of.values() for model in {score.model for score in scores})
    found: dict[tuple[str, str], dict[str, Score]] = {}
    columns: dict[str, None] = {}
    for folder, scores in scores_of.items():
        for score in scores:
            column = score.model if places[score.model] == 1 else f"{score.model} ({folder})"
            columns[column] = None
            found.setdefault((score.suite, score.metric), {})[column] = score
    order = {(suite.name, key.removesuffix(",none")): at for at, (suite, key) in enumerate(_list_scores(suites))}

    def place(key: tuple[str, str]) -> tuple[int, tuple[str, str]]:
        # A code suite's name goes on with how it was asked.
        return order.get((re.split("[:,]", key[0])[0], key[1]), len(order)), key

    placed = dict(sorted(found.items(), key=lambda item: place(item[0])))
    rows = []
    for (suite, metric), row in placed.items():
        cells = {column: score.cell for column, score in row.items()}
        rows.append(Row(suite=suite, metric=metric, cells=cells, differ=find_differences(list(cells.values()))))
    return SuitesResult(environment=environment, columns=list(columns), rows=rows, pairs=pair(placed))


def _list_scores(suites: Sequence[Suite]) -> list[tuple[Suite, str]]:
    return [(suite, key) for suite in suites for key in suite.scores]


def find_differences(cells: Sequence[Cell]) -> list[str]:
    """Name the settings, `n` among them, that are not the same in all of the cells."""
    settings: list[dict[str, Setting]] = [{**cell.settings, "n": cell.n} for cell in cells]
    names = dict.fromkeys(name for one in settings for name in one)
    return [name for name in names if any(one.get(name) != settings[0].get(name) for one in settings)]


def render_text(table: SuitesResult) -> str:
    """Render the results in columns, with the settings below."""
    return "\n".join([_tabulate(table).to_text(), "", *_list_pairs(table), *_list_notes(table)])


def render_markdown(table: SuitesResult) -> str:
    """Render the table as a page, its notes below."""
    lines = [
        "# Standard suites",
        "",
        _tabulate(table).to_markdown(),
        "",
        "Share, its 95% interval, and the number of questions.",
        "",
    ]
    if table.pairs:
        lines += [
            "Question by question, against the first column whose questions are known (McNemar's exact test):",
            "",
            *(f"- {line}" for line in _list_pairs(table)),
            "",
        ]
    footer = f"`{table.environment.command}` on {table.environment.date}."
    return "\n".join([*lines, *(f"- {note}" for note in _list_notes(table)), "", footer]) + "\n"


def _tabulate(table: SuitesResult) -> Table:
    rows = [
        [row.suite, row.metric + _mark(row), *(_show(row.cells.get(column)) for column in table.columns)]
        for row in table.rows
    ]
    return Table("ll" + "r" * len(table.columns), ("suite", "metric", *table.columns), rows)


def _list_pairs(table: SuitesResult) -> list[str]:
    return render_pairs(table.pairs, {(row.suite, row.metric): _mark(row) for row in table.rows})


def _show(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    interval = "" if cell.ci95 is None else f" [{cell.ci95[0]:.3f}, {cell.ci95[1]:.3f}]"
    return f"{cell.value:.4f}{interval} n {cell.n}"


def _mark(row: Row) -> str:
    return " †" if row.differ else ""


def _list_notes(table: SuitesResult) -> list[str]:
    """How each row was measured, and where its cells were not measured alike."""
    notes: dict[str, list[str]] = {}
    for row in table.rows:
        first = next(iter(row.cells.values())).settings
        shared = {name: value for name, value in first.items() if name not in row.differ and _says_something(value)}
        note = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shared.items())
        for name in row.differ:
            values = [f"{column}: {_look_up(cell, name)}" for column, cell in row.cells.items()]
            note += f"; † {name.replace('_', ' ')} differs ({'; '.join(values)})"
        notes.setdefault(note, []).append(row.suite)
    return [f"{', '.join(dict.fromkeys(names))}: {note}" for note, names in notes.items()]


def _says_something(value: Setting) -> bool:
    return value is not None and value is not False and value != 0


def _look_up(cell: Cell, name: str) -> Setting:
    return cell.n if name == "n" else cell.settings.get(name)
