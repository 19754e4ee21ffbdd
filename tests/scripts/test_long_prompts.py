"""scripts/long_prompts.py: lengths by the model's own tokenizer, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from laguna_serve.bench.harness.prompts import load_prompts
from laguna_serve.scripts import long_prompts

ROOT = Path(__file__).resolve().parents[2]
TEACHER = ROOT / "tests" / "toy" / "teacher"


@pytest.mark.slow
def test_prompts_have_the_lengths_that_were_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "long.jsonl"
    command = ["--model", str(TEACHER), "--tokens", "300,3000", "--count", "3", "--out", str(out)]
    assert long_prompts.main(command) == 0
    line = json.loads(capsys.readouterr().out)
    prompts = load_prompts(out)
    assert [prompt.id for prompt in prompts] == ["300-0", "300-1", "300-2", "3000-0", "3000-1", "3000-2"]
    tokenizer = Tokenizer.from_file(str(TEACHER / "tokenizer.json"))
    for prompt in prompts:
        wanted = int(prompt.id.split("-")[0])
        count = len(tokenizer.encode(prompt.text, add_special_tokens=False).ids)
        assert count == line["tokens"][prompt.id] == pytest.approx(wanted, rel=0.02)
        assert prompt.text.startswith("# ")
        assert prompt.text.endswith("Answer with a short patch.\n")
    again = tmp_path / "again.jsonl"
    assert long_prompts.main([*command[:-1], str(again)]) == 0
    assert again.read_text() == out.read_text()


def test_only_what_a_person_wrote_is_taken(tmp_path: Path) -> None:
    for name in ("a.py", "sub/b.md", ".git/c.py", "sub/node_modules/d.js", "e.bin", "empty.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if name.startswith("empty") else "x = 1\n")
    assert long_prompts.list_files(tmp_path) == [tmp_path / "a.py", tmp_path / "sub/b.md"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokens", "100000000"], "expected text for 100000000 tokens, got"),
        (["--tokens", "3"], "--tokens: expected at least 64, got 3"),
        (["--text", "EMPTY"], "expected a folder with source files, got none; pass --text"),
        (["--model", "nobody/nothing"], "nobody/nothing: expected a model on this machine, got a hub id"),
    ],
)
def test_what_cannot_be_made_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "EMPTY").mkdir()
    flags = [str(tmp_path / flag) if flag == "EMPTY" else flag for flag in flags]
    command = ["--model", str(TEACHER), "--text", str(tmp_path), "--out", str(tmp_path / "out.jsonl"), *flags]
    try:
        status = long_prompts.main(command)
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_own_prompt_sets_are_prompts_files() -> None:
    sets = {name: load_prompts(ROOT / "bench" / "prompts" / f"{name}.jsonl") for name in ("mixed", "trivial")}
    assert {name: len(prompts) for name, prompts in sets.items()} == {"mixed": 14, "trivial": 20}
