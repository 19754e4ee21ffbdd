"""Prompts files: what is refused, and how timed and warm-up prompts are divided."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
from mock_engine import MockEngine

from laguna_serve.bench.harness.prompts import (
    PromptsConfig,
    PromptsError,
    count_own_lengths,
    describe_load,
    fingerprint_prompts,
    load_prompts,
    load_texts,
    split_prompts,
)
from laguna_serve.bench.harness.schedule import make_plan
from laguna_serve.serving.client.completions import Client, open_session
from laguna_serve.serving.client.records import Prompt


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"file: expected lines like .* got an empty file"),
        ("\n \n", r"got an empty file"),
        ('{"prompt": "a"}\n{"prompt": ', r"file:2: .* invalid JSON"),
        ('{"prompt": "a"}\n["b"]\n', r"file:2: .* got a list"),
        ('\n{"text": "a"}\n', r"file:2: .* got None"),
        ('{"prompt": ""}\n', r"file:1: .* got ''"),
        ('{"prompt": 3}\n', r"file:1: .* got 3"),
        ('{"prompt": "a", "max_tokens": 0}\n', r"file:1: expected .max_tokens. to be a number from 1 on, got 0"),
        ('{"prompt": "a", "max_tokens": true}\n', r"file:1: expected .max_tokens. .* got True"),
        ('{"messages": []}\n', r"file:1: expected .messages. to be a list of .* got \[\]"),
        ('{"messages": [{"content": "x"}]}\n', r"file:1: expected .messages. .* got \[\{"),
        ('{"messages": "x"}\n', r"file:1: expected .messages. .* got .x."),
        ('{"messages": [{"role": "user", "content": "x"}], "prompt": "x"}\n', r"file:1: .* got both; remove one"),
        ('{"messages": [{"role": "user"}], "chat_template_kwargs": 3}\n', r"file:1: .* to be an object, got 3"),
        ('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "a"}\n', r"file:3: .* prompt of line 1 again"),
        ('{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}\n', r"file:2: .* id of line 1 again"),
        ('{"prompt": "a\\ud800"}\n', r"file:1: expected text that UTF-8 can write, got half a surrogate pair"),
        ('{"prompt": "a", "id": "\\udfff"}\n', r"file:1: expected text that UTF-8 can write"),
        ('{"prompt": "a", "id": ' + "1" * 5000 + "}\n", r"file:1: .* invalid JSON \(Exceeds the limit"),
        ('{"prompt": "a", "tools": ' + "[" * 100_000 + "}\n", r"file:1: .* invalid JSON \(maximum recursion"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(PromptsError, match=message) as caught:
        load_prompts(path)
    assert "\n" not in str(caught.value)


def test_byte_order_mark_and_ids_that_are_null_are_no_matter(tmp_path: Path) -> None:
    """As editors on Windows, and exports of tables, write them."""
    path = tmp_path / "file"
    path.write_text('{"prompt": "a", "id": null}\r\n{"prompt": "b", "id": null}\r\n', encoding="utf-8-sig")
    assert [(prompt.id, prompt.text) for prompt in load_prompts(path)] == [("1", "a"), ("2", "b")]


def test_conversations_and_prompts_asked_as_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    lines = [{"id": "c", "messages": turns, "tools": [], "chat_template_kwargs": {"x": 1}, "note": 1}, {"prompt": "p"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    conversation, text = load_prompts(path)
    assert conversation.chat == {"messages": turns, "tools": [], "chat_template_kwargs": {"x": 1}}
    assert json.loads(conversation.text) == conversation.chat
    assert (text.chat, text.text) == (None, "p")
    thinking, asked = load_prompts(path, chat=True, thinking="off")
    assert thinking.chat is not None
    assert thinking.chat["chat_template_kwargs"] == {"x": 1, "enable_thinking": False}
    assert asked.chat == {
        "messages": [{"role": "user", "content": "p"}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    with pytest.raises(PromptsError, match=r"expected a .prompt. on every line here.*got messages \(id c\)"):
        load_texts(path)


def test_a_line_may_have_a_shorter_answer(tmp_path: Path) -> None:
    path = tmp_path / "file"
    lines = [{"prompt": "a", "max_tokens": 3}, {"prompt": "b"}, {"prompt": "c", "max_tokens": 99}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts = load_prompts(path)
    assert load_prompts(path, chat=True)[0].max_tokens == 3

    async def ask(url: str) -> list[int]:
        async with open_session() as session:
            records = await Client(session, url, "m", 8).run_round(prompts, concurrency=1)
        return [len(record.token_ids) for record in records]

    with MockEngine() as engine:
        assert asyncio.run(ask(engine.url)) == [3, 8, 8]
        assert [body["max_tokens"] for body in engine.bodies] == [3, 8, 8]


def test_lengths_are_part_of_a_load_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text('{"prompt": "a", "id": "x", "max_tokens": 3}\n{"prompt": "b", "max_tokens": 8}\n')
    short, full = load_prompts(path)
    assert describe_load(2, 8, count_own_lengths([short, full], 8)) == "2 prompts × up to 8 tokens"
    assert describe_load(1, 8, count_own_lengths([full], 8)) == "1 prompts × 8 tokens"
    assert fingerprint_prompts([short]) != fingerprint_prompts([replace(short, max_tokens=4)])
    complaint = r'file: expected no "max_tokens" on a line, .* got 3 \(id x\); remove it'
    with pytest.raises(PromptsError, match=complaint):
        load_texts(path)
    with pytest.raises(PromptsError, match=complaint):
        PromptsConfig(prompts=path).load_prompts(lengths=False)


def test_synthetic_warm_up_prompts_stay_short_however_many() -> None:
    _, warmup = split_prompts([Prompt("a", "b")], 1, 256)
    assert len({prompt.text for prompt in warmup}) == 256
    assert len({len(prompt.text) for prompt in warmup[:8]}) == 8
    assert max(len(prompt.text) for prompt in warmup) < 2048


def test_thinking_needs_a_template(tmp_path: Path) -> None:
    (tmp_path / "file").write_text('{"prompt": "a"}\n')
    with pytest.raises(PromptsError, match=r"--thinking: expected messages in .*, or --chat, got texts"):
        load_prompts(tmp_path / "file", thinking="on")


def test_a_missing_file_and_one_in_another_encoding_are_named(tmp_path: Path) -> None:
    with pytest.raises(PromptsError, match="No such file"):
        load_prompts(tmp_path / "missing.jsonl")
    (tmp_path / "latin").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(PromptsError, match="expected UTF-8"):
        load_prompts(tmp_path / "latin")


def test_ids_default_to_line_numbers_and_odd_line_separators_stay_inside(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text('{"prompt": "a\u2028b"}\r\n\n{"id": "x", "prompt": "c"}')
    assert load_prompts(path) == [Prompt("1", "a\u2028b"), Prompt("x", "c")]


def test_warm_up_comes_from_what_is_not_timed_with_lengths_spread() -> None:
    prompts = [Prompt(str(i), "x" * (i + 1)) for i in range(20)]
    timed, warmup = split_prompts(prompts, 8, 4)
    assert timed == prompts[:8]
    assert [len(prompt.text) for prompt in warmup] == [9, 12, 15, 18]
    _, warmup = split_prompts(prompts[::-1], 8, 4)
    assert [len(prompt.text) for prompt in warmup] == [10, 7, 4, 1], "in the file's order"


def test_warm_up_is_filled_up_with_synthetic_prompts() -> None:
    prompts = [Prompt(str(i), "x" * (i + 1)) for i in range(9)]
    timed, warmup = split_prompts(prompts, None, 4)
    assert timed == prompts
    assert len({len(prompt.text) for prompt in warmup}) == 4
    assert not {prompt.text for prompt in warmup} & {prompt.text for prompt in prompts}
    with pytest.raises(PromptsError, match="expected at most 9, got 10"):
        split_prompts(prompts, 10, 4)


def test_orders_are_balanced_shuffled_and_seeded() -> None:
    prompts = [Prompt(str(i), f"p{i}") for i in range(41)]

    def orders(seed: int) -> list[str]:
        plan = make_plan(prompts, [], max_tokens=8, concurrency=2, control=3, seed=seed)
        assert [len(prompts) for prompts in plan.rounds] == [2] * 20 + [1]
        assert len(plan.control) == 2
        return [order[0] for order in plan.orders]

    assert abs(orders(0).count("baseline") - 10.5) == 0.5
    assert orders(0) == orders(0) != orders(1)
    assert make_plan(prompts, [], max_tokens=8, concurrency=2, control=0, seed=0).control == ()
