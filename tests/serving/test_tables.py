"""serving/kit/tables: the same rows for a terminal and for a page."""

from __future__ import annotations

import pytest

from laguna_serve.serving.kit.tables import Table

TABLE = Table("lr", ["what", "µs"], [["one | two", "3.5"], ["", "12.25"]])


def test_text_is_aligned_and_has_no_trailing_spaces() -> None:
    assert TABLE.to_text("  ").split("\n") == ["  what          µs", "  one | two    3.5", "             12.25"]
    assert Table("ll", ["a", "b"], [["c", ""]]).to_text().split("\n") == ["a  b", "c"]


def test_markdown_says_how_columns_are_aligned() -> None:
    assert TABLE.to_markdown().split("\n") == ["| what | µs |", "|---|---:|", "| one \\| two | 3.5 |", "|  | 12.25 |"]


def test_a_bar_in_a_head_is_no_column_of_its_own() -> None:
    assert Table("r", ["a|b"], [["1"]]).to_markdown().split("\n") == ["| a\\|b |", "|---:|", "| 1 |"]


def test_rows_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 2 columns, got \\['a'\\]"):
        Table("lr", ["what", "µs"], [["a"]])
    with pytest.raises(ValueError, match="expected 2 columns"):
        Table("l", ["what", "µs"], [])
