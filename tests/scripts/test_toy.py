"""The toy family: what is committed is what the manifest says, and the parts that made it do what they claim."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from laguna_serve.scripts.toy import corpus
from laguna_serve.scripts.toy.dflash import Drafter, DrafterShape
from laguna_serve.scripts.toy.training import Schedule, train

TOY = Path(__file__).resolve().parent.parent / "toy"


OWN_MANIFEST = ("masks", "dense")


@pytest.mark.parametrize("folder", [TOY, *(TOY / name for name in OWN_MANIFEST)], ids=lambda folder: folder.name)
def test_manifest_describes_the_committed_files(folder: Path) -> None:
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    described = {name for name in files if Path(name).name not in ("MANIFEST.json", "README.md")}
    if folder == TOY:
        described = {name for name in described if name.split("/")[0] not in OWN_MANIFEST}
    assert set(manifest["sha256"]) == described
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name


def test_family_fits_the_repository() -> None:
    assert sum(p.stat().st_size for p in TOY.rglob("*") if p.is_file()) <= 20 * 2**20


def test_teacher_and_drafter_fit_the_size_limit() -> None:
    size = sum(p.stat().st_size for folder in ("teacher", "dflash") for p in (TOY / folder).iterdir())
    assert size <= 16 * 2**20


def test_prompts_come_from_modules_that_training_never_saw() -> None:
    prompts = [json.loads(line) for line in (TOY / "prompts.jsonl").read_text().splitlines()]
    held_out = json.loads((TOY / "MANIFEST.json").read_text())["stages"]["teacher"]["held_out_modules"]
    assert len(prompts) >= 200
    assert len({p["prompt"] for p in prompts}) == len(prompts)
    assert {p["id"].split(":")[0] for p in prompts} <= set(held_out)
    assert all(corpus.Module(name, "").held_out for name in held_out)


def test_chat_template_renders_turns_and_refuses_unknown_roles() -> None:
    from laguna_serve.scripts.toy.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(TOY / "teacher")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x = 1"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<s><|system|>\nBe brief.<|end|>\n<|user|>\nx = 1<|end|>\n<|assistant|>\n"
    answered = [*messages, {"role": "assistant", "content": "y = 2"}]
    encoded = tokenizer.apply_chat_template(answered, return_dict=True, return_assistant_tokens_mask=True)
    spoken = [i for i, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(spoken) == "y = 2<|end|>"
    with pytest.raises(Exception, match="expected system, user or assistant, got tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


def test_tokenizer_gives_back_every_byte() -> None:
    from laguna_serve.scripts.toy.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(TOY / "teacher")
    text = "def größe(x):\n\treturn '→', x  # 学\r\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_drafter_checkpoint_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = DrafterShape(vocab_size=64, hidden_size=32, target_layer_ids=(0, 2), mask_token_id=3, num_hidden_layers=1)
    drafter = Drafter(shape).to(torch.bfloat16).float()
    drafter.save(tmp_path)
    again = Drafter.load(tmp_path)
    assert again.shape == shape
    states, table = torch.randn(5, 2, 32), torch.randn(64, 32)
    assert again.propose(7, states, 7, table, table) == drafter.propose(7, states, 7, table, table)


def train_line(steps: int, state_file: Path, stop_at: int | None = None) -> list[float]:
    """A linear model learning a line; `stop_at` interrupts it as Ctrl-C would."""
    torch.manual_seed(0)
    module = nn.Linear(2, 1)

    def loss_of_step(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 2, generator=torch.Generator().manual_seed(step))
        return (module(x) - x.sum(-1, keepdim=True)).square().mean(), {}

    log = train("line", module, Schedule(steps, 1e-2), loss_of_step, state_file)
    assert log[-1]["step"] == steps
    return [*module.weight.flatten().tolist(), *module.bias.tolist()]


def test_interrupted_training_continues_to_the_same_weights(tmp_path: Path) -> None:
    whole = train_line(450, tmp_path / "whole.state")
    with pytest.raises(KeyboardInterrupt):
        train_line(450, tmp_path / "cut.state", stop_at=333)
    assert train_line(450, tmp_path / "cut.state") == whole
