"""The rows that are scored so far, one JSON object per line, so that a measurement continues where it was stopped."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from laguna_serve.evals.perplexity.rows import Row
from laguna_serve.serving.kit.files import write_text


class Journal:
    """`nats`: the summed loss of every scored row, by its number. A line that was cut off in writing is dropped, and
    its row scored again."""

    def __init__(self, path: Path) -> None:
        self.nats: dict[int, float] = {}
        self._path = path
        if not path.exists():
            return
        text = path.read_text(encoding="utf-8")
        whole = [line for line in text.splitlines(keepends=True) if (item := _parse(line)) and self._take(item)]
        if "".join(whole) != text:
            write_text(path, "".join(whole))

    def open(self) -> TextIO:
        """The file, to add to."""
        return self._path.open("a", encoding="utf-8")

    def add(self, file: TextIO, number: int, row: Row, nats: float) -> None:
        """File a row's loss; it is on disk when this returns."""
        item = {"row": number, "document": row.document, "tokens": row.scored, "nats": nats}
        file.write(json.dumps(item) + "\n")
        file.flush()
        self.nats[number] = nats

    def _take(self, item: dict[str, Any]) -> bool:
        with suppress(KeyError, TypeError, ValueError):
            self.nats[int(item["row"])] = float(item["nats"])
            return True
        return False


def _parse(line: str) -> dict[str, Any] | None:
    with suppress(ValueError):
        item = json.loads(line)
        return item if line.endswith("\n") and isinstance(item, dict) else None
    return None
