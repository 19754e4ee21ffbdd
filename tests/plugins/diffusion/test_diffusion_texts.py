"""Texts of growing answers: whole characters, stop strings, the same however the tokens come."""

from __future__ import annotations

import random

import pytest
from tiny_llada import END, MASK, START, make_tokenizer

from laguna_serve.plugins.diffusion.errors import DiffusionError
from laguna_serve.plugins.diffusion.server.bodies import ChatMessage
from laguna_serve.plugins.diffusion.server.texts import Texts, TextStream

TEXTS = Texts(make_tokenizer())
SAID = "Grüße, 世界! 🦙 fin"


def stream(ids: list[int], sizes: list[int], *stops: str, unspoken: int = 0) -> tuple[list[str], TextStream]:
    """Push the ids in pieces of these sizes."""
    made, pieces, at = TextStream(TEXTS, stops), [], 0
    for number, size in enumerate(sizes):
        last = number == len(sizes) - 1
        pieces.append(made.push(ids[at : at + size], last=last, unspoken=unspoken if last else 0))
        at += size
        if made.stopped is not None:
            break
    return pieces, made


def cut(rng: random.Random, length: int) -> list[int]:
    sizes = []
    while sum(sizes) < length:
        sizes.append(min(rng.randrange(0, 5), length - sum(sizes)))
    return [*sizes, 0]


def test_characters_are_whole() -> None:
    ids = TEXTS.encode(SAID)
    pieces, made = stream(ids, [1] * len(ids))
    assert "".join(pieces) == SAID
    assert "�" not in "".join(pieces)
    assert pieces.count("") > 8
    assert made.tokens == len(ids)


def test_tokens_that_are_half_a_character_have_their_bytes() -> None:
    assert b"".join(map(TEXTS.find_bytes, TEXTS.encode(SAID))) == SAID.encode()
    assert TEXTS.find_bytes(MASK) == TEXTS.decode([MASK], skip_special=False).encode()


def test_the_text_is_that_of_all_tokens_however_they_come() -> None:
    rng = random.Random(0)
    for _ in range(60):
        ids = [rng.randrange(5, 261) for _ in range(24)]
        pieces, _ = stream(ids, cut(rng, len(ids)))
        assert "".join(pieces) == TEXTS.decode(ids)


def test_stop_strings_do_not_depend_on_pieces() -> None:
    """The first token with which one is there decides, not the piece that it came in."""
    rng = random.Random(1)
    for _ in range(60):
        ids = TEXTS.encode("".join(rng.choice("abc") for _ in range(20)))
        seen = set()
        for sizes in ([1] * len(ids), [len(ids)], cut(rng, len(ids))):
            pieces, made = stream(ids, sizes, "abc", "b", "cca")
            seen.add(("".join(pieces), made.tokens, made.stopped))
        assert len(seen) == 1
        text, tokens, stopped = seen.pop()
        assert stopped is None or TEXTS.decode(ids[:tokens]).endswith(stopped)
        assert not any(stop in text for stop in ("abc", "b", "cca"))


def test_nothing_of_a_stop_string_is_sent() -> None:
    ids = TEXTS.encode("say </end> now")
    pieces, made = stream(ids, [1] * len(ids), "</end>")
    assert "".join(pieces) == "say "
    assert made.stopped == "</end>"
    assert made.tokens == len("say </end>")
    pieces, made = stream(ids[:8], [1] * 8, "</end>")
    assert "".join(pieces) == "say </en"
    assert made.stopped is None


def test_the_end_says_nothing_and_counts() -> None:
    ids = [*TEXTS.encode("ab"), TEXTS.encode("c")[0]]
    pieces, made = stream(ids, [3], unspoken=1)
    assert pieces == ["ab"]
    assert made.tokens == 3


def test_chats_are_rendered_by_the_template() -> None:
    ids = TEXTS.render_chat([ChatMessage(role="user", content="hi")], prompt_for_answer=True, kwargs={})
    assert ids[0] == START
    assert TEXTS.decode(ids, skip_special=False) == "<|startoftext|><|role|>user\nhi<|eot_id|><|role|>assistant\n"
    assert TEXTS.end_ids == [END]
    assert TEXTS.find_ids("<|mdm_mask|>") == [MASK]
    assert TEXTS.find_ids("<|nothing|>") == []


def test_chats_without_a_template_are_refused() -> None:
    with pytest.raises(DiffusionError, match="chat template"):
        Texts(make_tokenizer(None)).render_chat([], prompt_for_answer=True, kwargs={})
    refusing = Texts(make_tokenizer("{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(DiffusionError, match="roles must alternate"):
        refusing.render_chat([ChatMessage(role="user", content="a")], prompt_for_answer=True, kwargs={})
