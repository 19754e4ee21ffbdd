"""The toy family: what is committed is what the manifest says, and the parts that made it do what they claim."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn

from laguna_serve.scripts.checkpoints.drafters.dflash import LagunaDrafter
from laguna_serve.scripts.checkpoints.drafters.shape import DrafterShape
from laguna_serve.scripts.text import corpus
from laguna_serve.scripts.training.loop import Schedule, train
from laguna_serve.scripts.training.toy import tokenizer as tokenizer_source
from laguna_serve.scripts.training.toy.tokenizer import load_tokenizer
from laguna_serve.serving.chat.release import read_release
from laguna_serve.serving.chat.template import Abilities

TOY = Path(__file__).resolve().parents[2] / "toy"


OWN_MANIFEST = ("masks", "dense")
# Made by another command, which describes them in LLADA.json; what was learnt of them is in calibration.json.
DIFFUSION = ("llada", "llada-draft", "llada-proposals", "LLADA.json")


@pytest.mark.parametrize("folder", [TOY, *(TOY / name for name in OWN_MANIFEST)], ids=lambda folder: folder.name)
def test_manifest_describes_the_committed_files(folder: Path) -> None:
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    described = {name for name in files if Path(name).name not in ("MANIFEST.json", "README.md")}
    if folder == TOY:
        described = {name for name in described if name.split("/")[0] not in (*OWN_MANIFEST, *DIFFUSION)}
    assert set(manifest["sha256"]) == described
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name


def test_diffusion_pair_is_what_its_record_says_and_good_enough() -> None:
    record = json.loads((TOY / "LLADA.json").read_text())
    files = [path for name in DIFFUSION[:2] for path in (TOY / name).iterdir()]
    assert {p.relative_to(TOY).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files} == record[
        "sha256"
    ]
    assert record["held_out_loss"]["0.3"] <= 2.5


def test_family_fits_the_repository() -> None:
    sizes = {p: p.stat().st_size for p in TOY.rglob("*") if p.is_file()}
    diffusion = sum(size for p, size in sizes.items() if p.relative_to(TOY).parts[0] in DIFFUSION)
    assert diffusion <= 10 * 2**20
    assert sum(sizes.values()) - diffusion <= 20 * 2**20


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


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x = 1"}]
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALLS = [
    {"id": "a", "type": "function", "function": {"name": "add", "arguments": {"path": "a\nb", "count": 2}}},
    {"id": "b", "type": "function", "function": {"name": "stop", "arguments": {}}},
]


def test_chat_template_renders_turns_and_refuses_unknown_roles() -> None:
    tokenizer = load_tokenizer(TOY / "teacher")
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert text == "<s><system>\nBe brief.<|end|>\n<user>\nx = 1<|end|>\n<assistant>\n"
    answered = [*MESSAGES, {"role": "assistant", "content": "y = 2"}]
    encoded = tokenizer.apply_chat_template(answered, return_dict=True, return_assistant_tokens_mask=True)
    spoken = [i for i, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(spoken) == "y = 2<|end|>"
    with pytest.raises(Exception, match="expected system, user, assistant or tool, got critic"):
        tokenizer.apply_chat_template([{"role": "critic", "content": "x"}])


def test_chat_template_calls_tools_as_the_releases_do() -> None:
    tokenizer = load_tokenizer(TOY / "teacher")
    turns = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": CALLS},
        {"role": "tool", "tool_call_id": "a", "content": "3"},
    ]
    text = tokenizer.apply_chat_template(turns, tools=[ADD], tokenize=False, add_generation_prompt=True)
    assert text == (
        "<s><system>\nBe brief.\n\n### Tools\n\nYou may call these functions:\n<available_tools>\n"
        f"{json.dumps(ADD)}\n</available_tools><|end|>\n<user>\nx = 1<|end|>\n<assistant>\n"
        "<tool_call>add\n<arg_key>path</arg_key>\n<arg_value>a\nb</arg_value>\n"
        "<arg_key>count</arg_key>\n<arg_value>2</arg_value>\n</tool_call><tool_call>stop\n</tool_call><|end|>\n"
        "<tool_response>\n3\n</tool_response>\n<assistant>\n"
    )
    without = tokenizer.apply_chat_template(MESSAGES[1:], tools=[ADD], tokenize=False)
    assert without.startswith("<s><system>\n### Tools\n")


@pytest.mark.parametrize(
    ("variables", "opening", "earlier"),
    [({}, "", ""), ({"enable_thinking": True}, "<think>", "</think>"), ({"enable_thinking": False}, *["</think>"] * 2)],
    ids=["unsaid", "on", "off"],
)
def test_chat_template_thinks(variables: dict[str, bool], opening: str, earlier: str) -> None:
    tokenizer = load_tokenizer(TOY / "teacher")
    turns = [
        {"role": "assistant", "content": "y", "reasoning": "because"},
        {"role": "assistant", "content": "z"},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **variables)
    thought = "<assistant>\n<think>because</think>y<|end|>\n"
    assert text == f"<s>{thought}<assistant>\n{earlier}z<|end|>\n<assistant>\n{opening}"


def test_launcher_finds_that_it_can() -> None:
    for folder in ("teacher", "dense", "dflash", "dflash-speculators"):
        release = read_release(TOY / folder, TOY / folder)
        assert release.abilities == Abilities(tools=True, thinking=True)
        assert release.missing_tokens == ()


@pytest.mark.slow
def test_marks_take_the_ids_of_bytes_that_no_text_holds() -> None:
    """So naming them changes the ids of no text, and the weights stay what they are."""
    alphabet = dict(zip(tokenizer_source.UNUSED_BYTES, tokenizer_source.MARKS, strict=True))
    characters = "".join(chr(number) for number in range(0x110000) if not 0xD800 <= number < 0xE000)
    plain = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]))
    plain.pre_tokenizer, plain.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    named = tokenizer_source.name_marks(plain)
    for start in range(0, len(characters), 1 << 16):
        piece = characters[start : start + (1 << 16)]
        assert named.encode(piece).ids == plain.encode(piece).ids
    for byte, mark in alphabet.items():
        assert named.encode(f"a{mark}b").ids == [plain.token_to_id(token) for token in ("a", byte, "b")]
        assert named.decode([plain.token_to_id(byte)]) == mark


def test_every_folder_has_the_same_tokenizer_and_the_sources_template() -> None:
    vocabulary = (TOY / "teacher" / "tokenizer.json").read_bytes()
    for folder in ("teacher", "dense", "dflash", "dflash-speculators"):
        assert (TOY / folder / "tokenizer.json").read_bytes() == vocabulary
        assert (TOY / folder / "chat_template.jinja").read_text() == tokenizer_source.CHAT_TEMPLATE


@pytest.mark.slow
def test_texts_keep_the_ids_that_the_weights_were_trained_on() -> None:
    """The digest was taken before the marks were named: published figures rest on these ids."""
    tokenizer = load_tokenizer(TOY / "teacher")
    digest = hashlib.sha256()
    for line in (TOY / "prompts.jsonl").read_text().splitlines():
        prompt = json.loads(line)["prompt"]
        digest.update(json.dumps(tokenizer(prompt)["input_ids"]).encode())
        chat = [*MESSAGES, {"role": "assistant", "content": "y"}, {"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        digest.update(json.dumps(ids).encode())
    assert digest.hexdigest() == "7c39f00cdad9a9415842543d0d2083c44741522517e3384a7e122788566626f7"


def test_tokenizer_gives_back_every_byte() -> None:
    tokenizer = load_tokenizer(TOY / "teacher")
    text = "def größe(x):\n\treturn '→', x  # 学\r\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_drafter_checkpoint_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = DrafterShape(vocab_size=64, hidden_size=32, target_layer_ids=(0, 2), mask_token_id=3, num_hidden_layers=1)
    drafter = LagunaDrafter(shape).to(torch.bfloat16).float()
    drafter.save(tmp_path)
    again = LagunaDrafter.load(tmp_path)
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


@pytest.mark.slow
def test_interrupted_training_continues_to_the_same_weights(tmp_path: Path) -> None:
    whole = train_line(450, tmp_path / "whole.state")
    with pytest.raises(KeyboardInterrupt):
        train_line(450, tmp_path / "cut.state", stop_at=333)
    assert train_line(450, tmp_path / "cut.state") == whole


def test_progress_is_printed_before_the_first_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = nn.Linear(1, 1)

    def losses(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        return (module.bias * 0 + step).sum(), {}

    log = train("line", module, Schedule(100, 1e-2), losses, tmp_path / "state", log_every=100)
    assert [record["step"] for record in log] == [100]
    assert [line.partition("  ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "line: step 50/100",
        "line: step 100/100",
    ]
