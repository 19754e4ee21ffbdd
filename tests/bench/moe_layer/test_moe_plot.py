"""The picture of bench/moe.py: nothing in it is cut off at its edge."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from laguna_serve.bench.moe_layer import plot
from laguna_serve.bench.moe_layer.result import MoeResult
from laguna_serve.serving.kit.results import read_result

RESULT = Path(__file__).resolve().parents[3] / "bench" / "results" / "moe-cpu" / "two-threads" / "moe.json"


@pytest.mark.slow
def test_all_words_lie_within_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The titles of weights in 8 bits ended beyond the right edge."""
    outside: list[str] = []
    open_figure = plot.open_figure

    @contextmanager
    def open_and_look(path: Path, *args: Any, **options: Any) -> Iterator[tuple[Any, Any]]:
        with open_figure(path, *args, **options) as (figure, axes):
            yield figure, axes
            figure.canvas.draw()
            width, height = figure.canvas.get_width_height()
            for text in [*figure.texts, *(text for panel in axes.flat for text in panel.texts)]:
                box = text.get_window_extent()
                if not (box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height):
                    outside.append(text.get_text())

    monkeypatch.setattr(plot, "open_figure", open_and_look)
    plot.draw(read_result(RESULT, MoeResult), tmp_path / "moe.png")
    assert outside == []


def test_labels_do_not_stand_on_each_other() -> None:
    assert plot.label_apart([1, 2, 16, 17, 32]) == ["1", "2", "16", "", "32"]
