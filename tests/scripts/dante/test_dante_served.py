"""A SmolLM3 behind the real vLLM gives transformers' tokens; the toy's prompts are drawn once each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import SmolLM3ForCausalLM

from laguna_serve.scripts.dante.toy import LONGEST_HEAD, list_prompts, serve_student
from laguna_serve.scripts.text import corpus
from laguna_serve.scripts.training.dante.records import Prompt
from laguna_serve.scripts.training.dante.student import student_config
from laguna_serve.scripts.training.toy.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

TOY = Path(__file__).resolve().parents[2] / "toy"


def make(folder: Path, scale: float = 6.0) -> Path:
    """Make a student with random weights, large enough for its answers to differ."""
    torch.manual_seed(0)
    config = student_config()
    config.update({"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "head_dim": 32})
    model = SmolLM3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    model.save_pretrained(folder)
    load_tokenizer(TOY / "teacher").save_pretrained(folder)
    return folder


@pytest.mark.vllm
def test_served_student_is_the_trained_one(tmp_path: Path) -> None:
    folder = make(tmp_path / "student")
    prompts: list[Prompt] = ["def f(x):\n", "import os\n\n\ndef main() -> None:\n", "x = 1\n" * 40]
    prompts.append(({"role": "user", "content": "Complete this function:\ndef f():"},))
    served = serve_student(folder, prompts, tmp_path / "engine.log", tokens=16)
    assert (served.answers, served.tokens, served.different) == (4, 64, 0), "see the log beside it"


def test_prompts_are_drawn_once_each() -> None:
    modules = corpus.read_modules()
    halves = [[m for m in modules if m.held_out == held_out][:20] for held_out in (False, True)]
    texts = [list_prompts(half, 60) for half in halves]
    drawn = [[json.loads(line)["messages"][0]["content"] for line in text.splitlines()] for text in texts]
    assert [len(set(one)) for one in drawn] == [60, 60]
    heads = len(corpus.REQUEST.format(head=""))
    assert max(map(len, drawn[0] + drawn[1])) <= heads + LONGEST_HEAD
    assert texts[0] == list_prompts(halves[0], 60)
