"""What scores are measured on: conversations of which the answers count, token ids, and files that are neither."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from laguna_serve.plugins.pruning import PruningError
from laguna_serve.scripts.dante.overlap import read_grams
from laguna_serve.scripts.text.rows import read_documents, read_rows
from laguna_serve.scripts.training.dante.records import read_prompts as read_cached
from laguna_serve.scripts.training.dense.text import stream_conversations
from laguna_serve.scripts.training.drafter.data.prompts import read_prompts
from laguna_serve.serving.kit.errors import CommandError

TEACHER = Path(__file__).resolve().parents[2] / "toy" / "teacher"
QUESTION = {"role": "user", "content": "Write a function that adds two numbers."}
ANSWER = {"role": "assistant", "content": "def add(a, b):\n    return a + b\n"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TEACHER)


def write_lines(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_of_a_conversation_the_answers_are_scored(tokenizer: Any, tmp_path: Path) -> None:
    other = {"role": "assistant", "content": "return 1"}
    source = write_lines(
        tmp_path / "c.jsonl", {"messages": [QUESTION, ANSWER, QUESTION, other]}, {"text": "import os\n" * 20}
    )
    found = read_rows(source, tokenizer, None, 10_000)
    conversation, plain = zip(found.rows, found.scored, strict=True)
    assert tokenizer.decode(conversation[0][conversation[1]]) == f"{ANSWER['content']}<|end|>return 1<|end|>"
    assert not plain[1][0]
    assert plain[1][1:].all()
    assert found.targets == int(conversation[1].sum()) + len(plain[0]) - 1
    assert found.documents == 2


def test_rows_of_a_conversation_without_answers_are_left_out(tokenizer: Any, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "c.jsonl", {"messages": [QUESTION | {"content": "x = 1\n" * 50}, ANSWER]})
    found = read_rows(source, tokenizer, 32, 10_000)
    assert all(scored.any() for scored in found.scored)
    assert len(found.rows) < len(tokenizer(QUESTION["content"] * 3)["input_ids"])
    alone = write_lines(tmp_path / "q.jsonl", {"messages": [QUESTION]})
    with pytest.raises(PruningError, match="at least 16 tokens"):
        read_rows(alone, tokenizer, None, 10_000)


def test_a_template_that_marks_nothing_is_refused(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    source = write_lines(tmp_path / "c.jsonl", {"messages": [QUESTION, ANSWER]})
    with pytest.raises(PruningError, match="generation"):
        read_rows(source, tokenizer, None, 10_000)
    wrong = write_lines(tmp_path / "w.jsonl", {"messages": [{"role": "judge", "content": "no"}]})
    with pytest.raises(PruningError, match="role: expected system, user, assistant or tool, got judge"):
        read_rows(wrong, AutoTokenizer.from_pretrained(TEACHER), None, 10_000)


def test_token_ids_keep_their_rows(tokenizer: Any, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, len(tokenizer), (6, 700), dtype=np.uint16)
    np.save(tmp_path / "chunks.npy", ids)
    source = str(tmp_path / "chunks.npy")
    found = read_rows(source, tokenizer, None, 10_000)
    assert [row.tolist() for row in found.rows] == ids.tolist()
    assert found.targets == 6 * 699
    assert len(read_rows(source, tokenizer, None, 1400).rows) == 2
    assert [len(row) for row in read_rows(source, tokenizer, 400, 10_000).rows[:2]] == [400, 300]


def test_of_short_documents_more_are_read(tokenizer: Any, tmp_path: Path) -> None:
    """Each counted as a whole row: of prompts of 150 tokens, less than half of what was asked for was read."""
    source = write_lines(tmp_path / "s.jsonl", *({"text": f"x = {i}\n" * 10} for i in range(100)))
    found = read_rows(source, tokenizer, None, 1000)
    assert found.tokens == pytest.approx(1000, rel=0.1)
    assert read_rows(source, tokenizer, None, None).tokens > 3000


@pytest.mark.parametrize(
    ("ids", "why"),
    [
        (np.zeros((2, 20), np.float32), "float32"),
        (np.zeros(20, np.int64), r"\[20\]"),
        (np.full((2, 20), 512), "below 512"),
        (np.full((2, 20), -1), "-1 to -1"),
        (np.zeros((0, 20), np.int64), r"\[0, 20\]"),
    ],
)
def test_token_ids_of_another_kind_are_refused(tokenizer: Any, tmp_path: Path, ids: Any, why: str) -> None:
    np.save(tmp_path / "chunks.npy", ids)
    with pytest.raises(PruningError, match=why):
        read_rows(str(tmp_path / "chunks.npy"), tokenizer, None, 1000)


def test_a_line_that_says_nothing_is_named(tokenizer: Any, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "t.jsonl", {"text": "a = 1\n" * 20}, {"x": 1})
    with pytest.raises(PruningError, match=r'"messages", got \{"x": 1\} in line 2'):
        read_rows(source, tokenizer, None, 1000)
    write_lines(tmp_path / "t.jsonl", {"prompt": [5, 6, 7]})
    with pytest.raises(PruningError, match=r'got \{"prompt": \[5, 6, 7\]\} in line 1'):
        read_rows(source, tokenizer, None, 1000)
    write_lines(tmp_path / "t.jsonl", {"text": "a \ud800 b"})
    with pytest.raises(PruningError, match=r'got \{"text": "a \\ud800 b"\} in line 1'):
        read_rows(source, tokenizer, None, 1000)
    (tmp_path / "t.jsonl").write_text("{\n")
    with pytest.raises(PruningError, match="got no JSON in line 1"):
        read_rows(source, tokenizer, None, 1000)


def test_blank_lines_are_passed_over(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('\n{"text": "%s"}\n  \n\n' % ("a = 1 " * 20))
    assert read_rows(str(tmp_path / "t.jsonl"), tokenizer, None, 1000).documents == 1


def test_rows_are_drawn_by_a_seed(tokenizer: Any, tmp_path: Path) -> None:
    source = str(tmp_path / "chunks.npy")
    np.save(source, np.arange(5, 5 + 20)[:, None].repeat(32, axis=1))

    def draw(seed: int | None, tokens: int | None = 128) -> list[int]:
        return [int(row[0]) - 5 for row in read_rows(source, tokenizer, None, tokens, seed).rows]

    assert draw(None) == [0, 5, 10, 15]
    assert draw(0) == draw(0) == sorted(set(draw(0)))
    assert len(draw(0)) == 4
    assert draw(0) != draw(1)
    assert draw(None, None) == list(range(20)), "everything"
    assert read_rows(source, tokenizer, None, 128, 0).available == 20
    first, second = (read_rows(source, tokenizer, None, 128, seed) for seed in (0, 1))
    assert first.digest == read_rows(source, tokenizer, None, 128, 0).digest != second.digest


def test_mark_of_the_encoding_is_no_part_of_a_text(tmp_path: Path) -> None:
    """It was a token of the first document, to score and to learn; of JSON lines it was no JSON."""
    for name, text in (("a.txt", "x = 1\n"), ("a.jsonl", '{"text": "x = 1\\n"}\n')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert read_documents(str(tmp_path / name)) == ["x = 1\n"]


@pytest.mark.parametrize(
    "read",
    [
        lambda path: read_documents(str(path)),
        lambda path: list(stream_conversations(str(path))),
        lambda path: read_grams([path]),
        read_cached,
        lambda path: read_prompts(path, None, 9),
    ],
    ids=["documents", "conversations", "evaluations", "prompts of a cache", "prompts"],
)
def test_a_file_that_cannot_be_read_is_named_once_and_says_what_to_do(
    read: Callable[[Path], object], tmp_path: Path
) -> None:
    path = tmp_path / "text.jsonl"
    for make, why in (
        (lambda: None, "got none; check the path"),
        (lambda: path.write_bytes(b"ab\xff"), r"got bytes that are no UTF-8 \(the first is number 2\); name another"),
        (lambda: (path.unlink(), path.mkdir()), "got Is a directory; check the path"),
    ):
        make()
        with pytest.raises((CommandError, PruningError), match=f"text.jsonl: expected .*{why}") as refused:
            read(path)
        assert str(refused.value).count("text.jsonl") == 1
