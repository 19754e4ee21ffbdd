"""A journal survives an interruption at any byte, and does not hide what no interruption leaves."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import msgspec
import pytest

from laguna_serve.serving.kit.journal import Journal, JournalError, KeyedJournal


class Entry(msgspec.Struct, frozen=True):
    name: str
    value: float | None = None


ENTRIES = [Entry("a", 1.5), Entry("\ud800 é \u2028", None), Entry("c", 0.1 + 0.2)]


def write(path: Path) -> bytes:
    journal = Journal(path, Entry)
    for entry in ENTRIES:
        journal.append(entry)
    return path.read_bytes()


def test_entries_come_back(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    assert Journal(path, Entry).entries == []
    assert write(path).isascii()
    again = Journal(path, Entry)
    assert again.entries == ENTRIES
    again.append(ENTRIES[0])
    assert Journal(path, Entry).entries == again.entries == [*ENTRIES, ENTRIES[0]]


def test_latest_entry_of_a_key_counts(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(path)
    journal = KeyedJournal(path, Entry, lambda entry: entry.name)
    assert list(journal.by_key.values()) == ENTRIES
    for value in (2.0, 3.0):
        journal.add(Entry("a", value))
        assert journal.by_key["a"].value == value
    again = KeyedJournal(path, Entry, lambda entry: entry.name)
    assert again.by_key == journal.by_key == {entry.name: entry for entry in (*ENTRIES, Entry("a", 3.0))}
    assert len(Journal(path, Entry).entries) == len(ENTRIES) + 2


def test_cut_at_any_byte_it_keeps_what_was_whole_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "journal.jsonl"
    data = write(path)
    for size in range(len(data)):
        path.write_bytes(data[:size])
        said: list[str] = []
        journal = Journal(path, Entry, said.append)
        whole = data[:size].count(b"\n")
        assert journal.entries == ENTRIES[:whole]
        cut_off = size - len(b"".join(data.splitlines(keepends=True)[:whole]))
        assert [f"cut off in writing ({cut_off} bytes)" in text for text in said] == [True] * bool(cut_off)
        for entry in ENTRIES[whole:]:
            journal.append(entry)
        assert path.read_bytes() == data
    path.write_bytes(data[:-1])
    Journal(path, Entry)
    assert "journal.jsonl: the last line was cut off in writing" in capsys.readouterr().err


@pytest.mark.parametrize("line", ['{"name": "b", "val', '{"name": 7}', "[]", "", '{"value": 1}', "\x00", "[" * 9999])
def test_line_that_no_interruption_leaves_is_an_error_that_names_it(tmp_path: Path, line: str) -> None:
    path = tmp_path / "journal.jsonl"
    lines = write(path).splitlines(keepends=True)
    for place in (1, 3):  # in the middle, and whole at the end
        data = b"".join([*lines[:place], line.encode() + b"\n", *lines[place:]])
        path.write_bytes(data)
        with pytest.raises(
            JournalError, match=rf"journal\.jsonl:{place + 1}: expected a line of this journal, got one"
        ):
            Journal(path, Entry)
        assert path.read_bytes() == data


def test_second_process_that_writes_is_told_so(tmp_path: Path) -> None:
    """Their lines would stand for one measurement, of which each has seen a part."""
    path = tmp_path / "journal.jsonl"
    one, two = Journal(path, Entry), Journal(path, Entry)
    one.append(ENTRIES[0])
    with pytest.raises(JournalError, match="expected no other command to write here meanwhile"):
        two.append(ENTRIES[1])
    one.append(ENTRIES[2])
    assert Journal(path, Entry).entries == one.entries == [ENTRIES[0], ENTRIES[2]]


def test_lines_are_read_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    other = "x" * 50_000
    with path.open("w") as file:
        file.writelines(f'{{"name": "{number}", "other": "{other}"}}\n' for number in range(200))
        file.write('{"name": "cut')
    tracemalloc.start()
    try:
        journal = Journal(path, Entry, lambda _: None)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000, "of ten in the file"
    finally:
        tracemalloc.stop()
    assert len(journal.entries) == 200
    journal.append(ENTRIES[0])
    assert len(Journal(path, Entry).entries) == 201
