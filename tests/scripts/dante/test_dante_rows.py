"""Records as rows: what is a target, what ends, in which order; and nats per byte."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from laguna_serve.scripts.training.dante.losses import CENTER, IGNORED
from laguna_serve.scripts.training.dante.measure import Passage, measure_passages
from laguna_serve.scripts.training.dante.records import CacheError, CacheRecord
from laguna_serve.scripts.training.dante.rows import draw_records, encode_records, order_records, rank_entropies
from laguna_serve.scripts.training.toy.tokenizer import BOS, END, load_tokenizer

TOY = Path(__file__).resolve().parents[2] / "toy"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(TOY / "teacher")


def record(text: str = "return x\n", **changes: Any) -> CacheRecord:
    usual = CacheRecord(
        prompt="def f(x):\n    ",
        teacher_text=text,
        output_entropy=0.5,
        self_consistency=1.0,
        difficulty_score=0.2,
        finish_reason="stop",
        teacher="t",
        weight_version=None,
        top_k=20,
        tail_mass=0.0,
    )
    return msgspec.structs.replace(usual, **changes)


def test_prompt_is_context_and_the_end_is_taught(tokenizer: Any) -> None:
    (row,) = encode_records([record()], tokenizer, 100).rows
    targets = [token for token in row.labels if token != IGNORED]
    assert tokenizer.decode(targets[:-1]) == "return x\n"
    assert targets[-1] == row.input_ids[-1] == END
    assert row.labels[0] == IGNORED
    assert row.input_ids[0] == BOS
    assert tokenizer.decode(row.input_ids[1 : -len(targets)]) == "def f(x):\n    "
    assert row.labels[-len(targets) :] == row.input_ids[-len(targets) :]


def test_answers_that_were_cut_off_do_not_teach_to_stop(tokenizer: Any) -> None:
    whole = encode_records([record()], tokenizer, 100)
    cut = encode_records([record(finish_reason="length")], tokenizer, 100)
    assert (whole.cut, cut.cut) == (0, 1)
    assert cut.rows[0].input_ids == whole.rows[0].input_ids[:-1]
    short = encode_records([record()], tokenizer, len(whole.rows[0].input_ids) - 1)
    assert (short.cut, short.rows[0].input_ids) == (1, cut.rows[0].input_ids)


def test_chats_go_through_the_template(tokenizer: Any) -> None:
    messages = ({"role": "user", "content": "Hi"},)
    (row,) = encode_records([record("Yes", prompt=messages)], tokenizer, 100).rows
    assert tokenizer.decode(row.input_ids) == "<s><user>\nHi<|end|>\n<assistant>\nYes<|end|>"
    with pytest.raises(CacheError, match="messages that the student's template takes"):
        encode_records([record(prompt=({"role": "nobody", "content": ""},))], tokenizer, 100)


def test_what_has_no_room_is_left_out(tokenizer: Any) -> None:
    long = record(prompt="def f(x):\n    " * 10)
    assert encode_records([record(), long], tokenizer, 30).left_out == 1
    with pytest.raises(CacheError, match="--length"):
        encode_records([long], tokenizer, 30)
    with pytest.raises(CacheError, match="end token"):
        encode_records([record()], SimpleNamespace(eos_token_id=None), 30)


def test_curriculum_is_from_easy_to_hard() -> None:
    records = [record(output_entropy=e, difficulty_score=d) for e, d in [(2.0, 0.1), (1.0, 0.9), (3.0, 0.5)]]
    assert [one.output_entropy for one in order_records(records, "output_entropy")] == [1.0, 2.0, 3.0]
    assert [one.difficulty_score for one in order_records(records, "difficulty_score")] == [0.1, 0.5, 0.9]
    assert order_records(records, "none") == records


@given(st.floats(0.05, 1), st.integers(0, 99))
def test_draws_are_by_seed_and_in_order(share: float, seed: int) -> None:
    records = [record(output_entropy=float(number)) for number in range(20)]
    drawn = draw_records(records, share, seed)
    assert len(drawn) == max(1, round(share * 20))
    assert drawn == sorted(drawn, key=lambda one: one.output_entropy) == draw_records(records, share, seed)


def test_ranks_spread_the_weight_around_its_centre() -> None:
    ranks = rank_entropies([0.12, 0.5, 0.11, 0.13, 0.14])
    assert ranks == [CENTER / 2, 2 * CENTER, 0.0, CENTER, 1.5 * CENTER]
    assert rank_entropies([1.0]) == [0.0]


class Uniform:
    """A model for which every token is as likely as any other."""

    device = torch.device("cpu")

    def __init__(self, size: int) -> None:
        self._size = size

    def __call__(self, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, self._size))


def test_nats_per_byte_are_of_the_text_alone(tokenizer: Any) -> None:
    texts = ["return x\n", "é = 'ü'\n", "pass"]
    passages = [Passage("def f(x):\n    ", texts[0]), Passage("", texts[1]), Passage("x", texts[2])]
    nats, sizes = measure_passages(Uniform(512), tokenizer, passages, 100, batch=2)
    counts = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    assert nats.tolist() == pytest.approx([count * math.log(512) for count in counts])
    assert sizes.tolist() == [len(text.encode()) for text in texts]


def test_what_goes_beyond_the_length_is_not_counted(tokenizer: Any) -> None:
    ids = tokenizer("return x\n", add_special_tokens=False)["input_ids"]
    nats, sizes = measure_passages(Uniform(512), tokenizer, [Passage("", "return x\n")], len(ids))
    assert nats[0] == pytest.approx((len(ids) - 1) * math.log(512))
    assert sizes[0] == len(tokenizer.decode(ids[:-1]).encode())
