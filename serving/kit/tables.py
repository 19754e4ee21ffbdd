"""Tables for people: aligned columns for a terminal, the same rows in Markdown for a page.

Ours, and not rich's: rich fits a table to the terminal and cuts its cells at 80 columns where there is none, and the
reports that these tables stand in are files and pipes as often.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

GAP = "  "
# Below a table that Ctrl-C cut short.
INTERRUPTED_RUN = "partial: the run was interrupted"


@dataclass(frozen=True)
class Table:
    """Rows of cells under heads.

    Attributes:
        align: a letter per column, `l` or `r`.
        heads: one per column, as every row has as many cells.
    """

    align: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        """Raise ValueError where a row, or `align`, has not as many columns as there are heads."""
        for row in (self.align, *self.rows):
            if len(row) != len(self.heads):
                raise ValueError(f"table: expected {len(self.heads)} columns, got {list(row)}")

    def to_text(self, indent: str = "") -> str:
        """Columns as wide as their widest cell, without trailing spaces."""
        lines = [self.heads, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(indent + GAP.join(self._justify(line, widths)).rstrip() for line in lines)

    def to_markdown(self) -> str:
        """With a head that says how columns are aligned."""
        marks = ["---:" if letter == "r" else "---" for letter in self.align]
        cells = [[cell.replace("|", "\\|") for cell in row] for row in (self.heads, *self.rows)]
        head, *body = (f"| {' | '.join(row)} |" for row in cells)
        return "\n".join([head, f"|{'|'.join(marks)}|", *body])

    def _justify(self, line: Sequence[str], widths: Sequence[int]) -> list[str]:
        return [
            cell.rjust(width) if letter == "r" else cell.ljust(width)
            for letter, cell, width in zip(self.align, line, widths, strict=True)
        ]
