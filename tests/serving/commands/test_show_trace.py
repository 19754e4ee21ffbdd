"""`laguna traces show`: what it says of a request, its text with a tokenizer alone, nothing that a terminal obeys."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest
from tokenizers import Tokenizer

from laguna_serve.serving.cli import main
from laguna_serve.serving.commands.show_trace import describe, render
from laguna_serve.serving.gateway.traces.store import Trace, TraceFile

TOY = Path(__file__).parents[2] / "toy" / "teacher"
KEPT = Trace(
    time=1.0,
    request_id="r1",
    choice=0,
    key=None,
    model="m",
    engine="a",
    weight_versions=("7",),
    draft_versions=("default",),
    temperature=1.0,
    seed=None,
    finish_reason="stop",
    first_token_s=0.1,
    total_s=0.2,
    prompt_token_ids=[1] * 10,
    token_ids=list(range(10)),
    logprobs=[-0.5] * 10,
    routed_experts=None,
    speculation=None,
)


def write_rollout(path: Path) -> list[int]:
    """Two answers to one request; the ids of the second one's text."""
    ids: list[int] = (
        Tokenizer.from_file(str(TOY / "tokenizer.json")).encode("def f(x):\n", add_special_tokens=False).ids
    )
    first = msgspec.structs.replace(KEPT, request_id="asked", logprobs=None, weight_versions=("step-1", "step-2"))
    second = msgspec.structs.replace(
        KEPT, request_id="asked", choice=1, key="alice", seed=5, token_ids=ids, logprobs=[-0.25] * len(ids)
    )
    file = TraceFile(path, 1 << 20)
    file.add([KEPT, first, second])
    file.close()
    return ids


def test_one_request_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "traces.db"
    ids = write_rollout(path)
    assert main(["traces", "show", str(path), "asked"]) == 0
    shown, line = capsys.readouterr().out.rsplit("\n", 2)[:2]
    one, two = shown.split("\n\n")
    for text in (
        "asked, answer 1 of 2",
        "step-1, then step-2",
        "prompt 10, answer 10; stop",
        "logprobs  not asked for",
    ):
        assert text in one
    for text in ("asked, answer 2 of 2", "m by a, for alice", "temperature 1, seed 5"):
        assert text in two
    assert f"sum {-0.25 * len(ids):.3f}, mean -0.250 nats" in two
    assert "def f" not in shown
    assert [answer["output_tokens"] for answer in json.loads(line)["answers"]] == [10, len(ids)]


def test_text_is_shown_with_a_tokenizer_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "traces.db"
    ids = write_rollout(path)
    assert main(["traces", "show", str(path), "asked", "--tokens", "--model", str(TOY)]) == 0
    shown = capsys.readouterr().out
    assert "answer:\n  | def f(x):\n  | \n" in shown
    listed = re.findall(r"^ *(\d+) +(\d+) +-0\.2500  '(.*)'$", shown, re.MULTILINE)
    assert [int(token) for _, token, _ in listed] == ids
    assert "".join(text for *_, text in listed) == r"def f(x):\n"


def test_request_or_tokenizer_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "traces.db"
    write_rollout(path)
    assert main(["traces", "show", str(path), "other"]) == 2
    assert "other: expected a request that" in capsys.readouterr().err
    assert main(["traces", "show", str(path), "asked", "--model", str(tmp_path)]) == 2
    assert "expected a folder with a tokenizer.json" in capsys.readouterr().err


def test_what_a_terminal_would_obey_is_not_printed() -> None:
    answer = describe(KEPT, None)
    shown = render("r", msgspec.structs.replace(answer, prompt="a\x1b[2J\r\tb", answer="\x9b"), 1)
    assert not re.search(r"[\x1b\r\x9b]", shown)
    assert "\tb" in shown
