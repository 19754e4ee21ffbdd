"""The distillation: its text, its starting point, what is committed, and a short run that is stopped and continued."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from safetensors.torch import load_file
from transformers import AutoTokenizer, LagunaForCausalLM
from warm import run_warm, start_warm

from laguna_serve.scripts import distill_dense
from laguna_serve.scripts.training.dense import initial, losses, stages, student, text
from laguna_serve.scripts.training.dense.config import DistillConfig, Recipe
from laguna_serve.scripts.training.dense.report import plot
from laguna_serve.scripts.training.dense.targets import Beside, Drawn
from laguna_serve.scripts.training.dense.tokens import open_tokens, write_tokens
from laguna_serve.scripts.training.dense.work import open_work
from laguna_serve.scripts.training.ranks import ALONE
from laguna_serve.serving.checkpoint import CheckpointError, read_target
from laguna_serve.serving.kit.files import WriteError

ROOT = Path(__file__).resolve().parents[3]
TOY = ROOT / "tests" / "toy"
FIXTURES = ROOT / "tests" / "fixtures" / "releases"
RESULT = ROOT / "bench" / "results" / "toy-distillation"
SCRIPT = str(ROOT / "scripts" / "distill_dense.py")
SAVES_SOON = f"""
import runpy
from laguna_serve.scripts.training import loop
loop.SAVE_EVERY = 40
runpy.run_path({SCRIPT!r}, run_name="__main__")
"""
SHORT = ["--width", "0=672", "--width", "3=613", "--rows", "2", "--length", "64", "--stage1-steps", "60"]
SHORT += ["--stage2-steps", "6", "--measure-tokens", "2048"]


@pytest.fixture(scope="module")
def teacher() -> Any:
    model = LagunaForCausalLM.from_pretrained(TOY / "teacher", dtype=torch.float32)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TOY / "teacher")


def test_committed_student_is_padded_and_as_good_as_its_report_says() -> None:
    manifest = json.loads((TOY / "dense" / "MANIFEST.json").read_text())
    report = json.loads((RESULT / "distillation.json").read_text())
    assert {key: value for key, value in report.items() if key != "logs"}.items() <= manifest.items()
    config = json.loads((TOY / "dense" / "config.json").read_text())
    assert config["intermediate_size"] == max(manifest["widths"]) == manifest["widths"][0]
    assert any(width % 8 for width in manifest["widths"])
    assert set(config["mlp_layer_types"]) == {"dense"}
    tensors = load_file(TOY / "dense" / "model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == manifest["parameters"]["stored"]
    after = manifest["measured"]["after_stage2"]
    assert after["kl"] < manifest["measured"]["after_stage1"]["kl"]
    assert after["loss_student"] < after["loss_teacher"] + 0.05
    assert len(report["logs"]["stage1"]) >= 50
    assert {f"layer {layer}" for layer in range(1, 6)} < report["logs"]["stage1"][0].keys()


@pytest.mark.slow
def test_student_begins_as_the_teachers_most_used_experts(teacher: Any, tokenizer: Any) -> None:
    recipe = Recipe(seed=0, stage1_steps=1, stage2_steps=1, rows=2, length=64)
    training = text.read_text("toy:training", tokenizer, 64)
    usage = stages.count_usage(teacher, [1, 3], training, recipe)
    assert all(int(used.counts.sum()) == stages.USAGE_BATCHES * 2 * 64 * 4 for used in usage.values())
    blocks = initial.start_blocks(teacher, [512, 640, 640, 613, 640, 640], usage)
    shared = teacher.model.layers[1].mlp.shared_experts
    assert torch.equal(blocks["1"].gate_proj.weight[:128], shared.gate_proj.weight)
    assert blocks["3"].down_proj.weight.shape == (160, 613)
    first = int(usage[1].counts.argmax())
    gate = teacher.model.layers[1].mlp.experts.gate_up_proj[first, :128]
    assert torch.equal(blocks["1"].gate_proj.weight[128:256], gate)


def test_widening_changes_nothing_before_training(teacher: Any) -> None:
    dense = teacher.model.layers[0].mlp
    block = student.LagunaMLP(teacher.config, 700)
    student.fill_block(block, dense.gate_proj.weight, dense.up_proj.weight, dense.down_proj.weight)
    x = torch.randn(4, 160)
    torch.testing.assert_close(block(x), dense(x))
    assert block.gate_proj.weight[512:].abs().min() > 0, "a unit of zeros could never learn"


def test_normalised_error() -> None:
    wanted = torch.tensor([[3.0, 4.0]])
    assert losses.normalised_error(torch.zeros(1, 2), wanted) == 1
    assert losses.normalised_error(torch.tensor([[3.0, 3.0]]), wanted) == pytest.approx(1 / 25)


def test_divergence_counts_the_assistants_tokens_alone(teacher: Any, tokenizer: Any) -> None:
    torch.manual_seed(0)
    other = LagunaForCausalLM(teacher.config).eval().requires_grad_(False)
    ids = torch.randint(8, 512, (1, 12))
    spoken = torch.zeros(1, 12, dtype=torch.bool)
    spoken[0, 5:8] = True
    with torch.no_grad():
        got = losses.divergence(teacher, other, ids, spoken)
        nothing = losses.divergence(teacher, teacher, ids, spoken)
        p, q = (model(input_ids=ids).logits[0, 4:7].double().log_softmax(-1) for model in (teacher, other))
    assert float(got) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert float(nothing) == pytest.approx(0, abs=1e-6)


def test_batch_without_a_word_of_the_assistants_costs_nothing(teacher: Any) -> None:
    other = LagunaForCausalLM(teacher.config)
    ids = torch.randint(8, 512, (1, 12))
    loss = losses.divergence(teacher, other, ids, torch.zeros(1, 12, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in other.parameters())


def test_held_out_batches_without_a_word_of_the_assistants_are_measured(teacher: Any) -> None:
    ids, silent = torch.randint(8, 512, (1, 12)), torch.zeros(1, 12, dtype=torch.bool)
    source = SimpleNamespace(spoken_batch=lambda *_: (ids, silent))
    drawn = Drawn(source, source, Recipe(seed=0, stage1_steps=1, stage2_steps=1, rows=1, length=12))  # type: ignore[arg-type]
    found = stages.measure(teacher, Beside(teacher, drawn), [ids[0]])
    assert found["kl"] == found["entropy_student"] == 0
    assert math.isfinite(found["loss_student"])


def spoken_text(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    ids, spoken = text.render(messages, tokenizer)
    return str(tokenizer.decode([i for i, said in zip(ids, spoken, strict=True) if said]))


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "x = 1"},
    {"role": "assistant", "content": "y = 2"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "z = 3"},
]


def test_template_says_what_the_assistant_says(tokenizer: Any) -> None:
    assert spoken_text(tokenizer, MESSAGES) == "y = 2<|end|>z = 3<|end|>"


def test_template_without_marks_is_read_turn_by_turn(tokenizer: Any) -> None:
    template = tokenizer.chat_template
    plain = template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    assert plain != template
    other = AutoTokenizer.from_pretrained(TOY / "teacher")
    other.chat_template = plain
    assert spoken_text(other, MESSAGES) == "y = 2<|end|>\nz = 3<|end|>\n"
    other.chat_template = "{% for m in messages %}{{ messages | length }}{{ m.role }}{{ m.content }}{% endfor %}"
    with pytest.raises(text.TextError, match="got one that rewrites earlier turns"):
        text.render(MESSAGES, other)


def test_rows_are_filled_with_whole_conversations(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": MESSAGES}) + "\n")
    ids, spoken = text.read_chats(str(path), tokenizer).batch("seed", 3, 100)
    assert ids.shape == spoken.shape == (3, 100)
    assert "y = 2<|end|>z = 3<|end|>" in tokenizer.decode(ids[0][spoken[0]])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "in line 1; fix it"),
        ('{"messages": [{"role": "user"}]}', "in line 1; fix it"),
        ('{"messages": [{"role": "assistant", "content": null}]}', "in line 1; fix it"),
        (
            '{"messages": [{"role": "user", "content": "x"}]}',
            "expected conversations with an assistant's turn, got none",
        ),
    ],
)
def test_chats_that_are_none_are_named(tmp_path: Path, tokenizer: Any, line: str, message: str) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(text.TextError, match=message):
        text.read_chats(str(path), tokenizer)


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return run_warm(SCRIPT, str(TOY / "teacher"), *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--width", "9=5"], "--width: expected a layer from 0 to 5, got 9"),
        (["--width", "0=100"], "--width: expected at least 512 for layer 0, got 100"),
        (["--width", "three"], "expected LAYER=N, got 'three'"),
        (["--text", "nowhere.txt"], "nowhere.txt: expected a text file"),
        (["--chats", "nowhere.jsonl"], "nowhere.jsonl: expected a JSON Lines file"),
        (["--rows", "0"], "--rows: expected at least 1, got 0"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "use_deterministic_algorithms", lambda *_given, **_named: None)
            status = distill_dense.main([str(TOY / "teacher"), *where, *flags])
    except SystemExit as ended:
        status = int(str(ended.code))
    assert status == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_an_axis_of_less_than_a_decade_has_labels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a short run it had none at all: errors from 0.6 to 0.8 lie between a 5 and a 1."""
    labels: list[str] = []

    def draw(_path: Path, _title: str, _measure: str, _source: str, curves: Callable[[Axes], None]) -> None:
        figure = Figure()
        axes = figure.subplots()
        curves(axes)
        figure.draw_without_rendering()
        low, high = axes.get_ylim()
        ticks = [*axes.yaxis.get_major_ticks(), *axes.yaxis.get_minor_ticks()]
        labels.extend(tick.label1.get_text() for tick in ticks if low <= tick.get_loc() <= high)

    monkeypatch.setattr(plot, "draw_figure", draw)
    for values, shown in (((0.8, 0.6), {"0.6", "0.7", "0.8"}), ((2.0, 0.02), {"0.02", "0.05", "0.1", "0.5", "1", "2"})):
        labels.clear()
        plot.draw_blocks([{"step": n, "layer 1": value} for n, value in enumerate(values)], tmp_path / "x.png", "")
        assert shown <= set(labels)
        assert not {"0.3", "0.9"} & set(labels)


@pytest.mark.parametrize("own", [True, False], ids=["the teacher", "another one"])
def test_other_checkpoints_are_not_written_over(own: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(TOY / "teacher", tmp_path / "teacher")
    teacher = folder if own else TOY / "teacher"
    where = ["--out", str(folder), "--work", str(tmp_path / "work")]
    assert distill_dense.main([str(teacher), *where, *SHORT]) == 2
    said = capsys.readouterr().err
    assert ("expected a folder of its own" if own else "expected an empty folder") in said
    before = (TOY / "teacher" / "model.safetensors").read_bytes()
    assert (folder / "model.safetensors").read_bytes() == before


def test_states_of_a_teacher_with_other_weights_are_not_gone_on_with(tmp_path: Path) -> None:
    folder = shutil.copytree(TOY / "teacher", tmp_path / "teacher")
    config = DistillConfig(teacher=str(folder), out=tmp_path / "out", work=tmp_path / "work")
    for _ in range(2):
        open_work(config, config.recipe, folder, ALONE)
    os.utime(folder / "model.safetensors", (1, 1))  # written anew
    with pytest.raises(CheckpointError, match="got another run's; pass --fresh or --work"):
        open_work(config, config.recipe, folder, ALONE)


def test_states_of_other_words_under_the_same_name_are_not_gone_on_with(tmp_path: Path) -> None:
    words = {"text": tmp_path / "text.jsonl", "chats": tmp_path / "chats.jsonl"}
    for path in words.values():
        path.write_text("a\n")
    given = {name: str(path) for name, path in words.items()}
    config = DistillConfig(teacher=str(TOY / "teacher"), out=tmp_path / "out", work=tmp_path / "work", **given)
    for path in words.values():
        for _ in range(2):
            open_work(config, config.recipe, TOY / "teacher", ALONE)
        path.write_text("b\n")
        with pytest.raises(CheckpointError, match="got another run's; pass --fresh or --work"):
            open_work(config, config.recipe, TOY / "teacher", ALONE)
        path.write_text("a\n")


@pytest.mark.slow
def test_own_documents_are_set_aside_to_measure_on(tmp_path: Path, tokenizer: Any) -> None:
    """One in fifty, equal ones together, of text as of conversations; none of them is trained on."""
    said = [f"def f{number % 600}(x):\n    return x + {number % 600}\n" for number in range(1200)]
    lines = {
        "text": [{"text": text_} for text_ in said],
        "chats": [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": s}]} for s in said],
    }
    given = {}
    for name, documents in lines.items():
        given[name] = str(tmp_path / f"{name}.jsonl")
        Path(given[name]).write_text("".join(json.dumps(document) + "\n" for document in documents))
    config = DistillConfig(teacher=str(TOY / "teacher"), out=tmp_path / "out", length=32, **given)
    corpus = text.read_corpus(config, tokenizer, tmp_path / "work", ALONE)
    learned, measured = corpus.drawn.training, corpus.drawn.held_out_source
    assert 4 <= measured.tokens.documents <= 60
    assert measured.tokens.documents + learned.tokens.documents == 1200
    for kept, aside in ((learned.tokens, measured.tokens), (corpus.training.tokens, None)):
        words = [set(map(tuple, np.split(part.ids, part.starts[1:-1]))) for part in (kept, aside) if part is not None]
        assert len(words) == 1 or not words[0] & words[1]
    asked = list(text.stream_conversations(given["chats"], aside=True))
    assert len(asked) == measured.tokens.documents
    assert corpus.describe_held_out() == {
        f"held_out_{name}": f"one in 50 documents of {path}" for name, path in given.items()
    }
    few = tmp_path / "few.jsonl"
    few.write_text(json.dumps(lines["chats"][0]) + "\n")
    config = DistillConfig(
        teacher=str(TOY / "teacher"), out=tmp_path / "out", chats=str(few), held_out_text=given["text"]
    )
    described = text.read_corpus(config, tokenizer, tmp_path / "few", ALONE).describe_held_out()
    assert described["held_out_text"] == given["text"]
    assert described["held_out_chats"].startswith(f"{few}, which was trained on: it has too few documents")


def test_one_document_is_measured_on_as_it_is_learned(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not its hash would set it aside, and leave nothing to train on."""
    corpus = tmp_path / "text.txt"
    corpus.write_text("def f(x):\n    return x\n" * 50)
    given = {"text": str(corpus), "held_out_chats": "toy:held-out", "chats": "toy:held-out"}
    config = DistillConfig(teacher=str(TOY / "teacher"), out=tmp_path / "out", length=32, **given)
    for aside in (True, False):
        monkeypatch.setattr(text, "is_aside", lambda _document, aside=aside: aside)
        read = text.read_corpus(config, tokenizer, tmp_path / str(aside), ALONE)
        assert read.held_out_text.learned
        assert read.training.tokens.documents == 1
        with monkeypatch.context() as patch:  # other processes, and a later run, map what is there
            patch.setattr(text, "write_tokens", lambda *_: pytest.fail("written again"))
            again = text.read_corpus(config, tokenizer, tmp_path / str(aside), ALONE)
        assert again.training.tokens.digest() == read.training.tokens.digest()


def test_what_is_set_aside_is_another_run(tmp_path: Path) -> None:
    def open_with(**more: str) -> None:
        config = DistillConfig(teacher=str(TOY / "teacher"), out=tmp_path / "out", work=tmp_path / "work", **more)
        open_work(config, config.recipe, TOY / "teacher", ALONE)

    open_with()
    for name in ("held_out_text", "held_out_chats"):
        with pytest.raises(CheckpointError, match="got another run's"):
            open_with(**{name: "toy:held-out"})


def test_student_is_asked_as_its_teacher_is(teacher: Any, tokenizer: Any, tmp_path: Path) -> None:
    folder, release = tmp_path / "teacher", FIXTURES / "Laguna-XS.2-FP8"
    folder.mkdir()
    config = json.loads((TOY / "teacher" / "config.json").read_text())
    rotation = json.loads((release / "config.json").read_text())["quantization_config"]["transform_config"]
    (folder / "config.json").write_text(json.dumps({**config, "transform_config": rotation}))
    shutil.copyfile(release / "generation_config.json", folder / "generation_config.json")
    widths = [640] * teacher.config.num_hidden_layers
    made = LagunaForCausalLM(student.student_config(teacher.config, widths))
    made.config.auto_map = {"AutoConfig": "configuration_laguna.LagunaConfig"}
    student.save_padded(made, tokenizer, widths, torch.float32, folder, tmp_path / "out")
    out = tmp_path / "out"
    assert (out / "generation_config.json").read_bytes() == (folder / "generation_config.json").read_bytes()
    described = json.loads((out / "config.json").read_text())
    assert "auto_map" not in described
    assert read_target(out).rotated


@pytest.mark.slow
def test_student_is_not_distilled_again(tmp_path: Path) -> None:
    done = run_warm(SCRIPT, str(TOY / "dense"), "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"))
    assert done.returncode == 2
    assert "expected a mixture of experts, got dense layers alone" in done.stderr


@pytest.mark.slow
def test_interrupted_run_continues_to_the_same_student(tmp_path: Path) -> None:
    """Stopped in stage 1 after a state was saved, sooner than usual; the blocks at the end are a run's in one go."""
    prompts = [json.loads(line)["prompt"] for line in (TOY / "prompts.jsonl").read_text().splitlines()]
    turns = [[{"role": "user", "content": "Go on."}, {"role": "assistant", "content": prompt}] for prompt in prompts]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    short = [*SHORT, "--text", str(TOY / "prompts.jsonl"), "--chats", str(chats)]
    cut = [*short, "--work", str(tmp_path / "cut.work"), "--out", str(tmp_path / "cut")]
    first = start_warm(SAVES_SOON, str(TOY / "teacher"), *cut, error=tmp_path / "said")
    try:
        deadline = time.monotonic() + 600
        while not (tmp_path / "cut.work" / "stage1.state").exists():
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        first.send_signal(signal.SIGINT)
        assert first.wait(60) == 130
    finally:
        first.kill()
    assert "the same command continues" in (tmp_path / "said").read_text()
    resumed = run(*cut)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert re.search(r"stage 1: resuming at step [45]\d of 60", resumed.stderr)
    whole = run(*short, "--work", str(tmp_path / "whole.work"), "--out", str(tmp_path / "whole"))
    assert whole.returncode == 0
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    result = json.loads(whole.stdout.splitlines()[-1])
    assert result["widths"] == [672, 640, 640, 613, 640, 640]
    assert all(math.isfinite(value) for value in result["measured"]["after_stage2"].values())
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {"stage1_nmse.png", "stage2_kl.png", "distillation.json", "MANIFEST.json", "config.json"} <= names
    other = run(*short, "--seed", "1", "--work", str(tmp_path / "cut.work"), "--out", str(tmp_path / "other"))
    assert other.returncode == 2
    assert "got another run's; pass --fresh or --work" in other.stderr


def test_tokens_that_the_disk_has_no_room_for_are_not_taken_for_others(tmp_path: Path) -> None:
    key, others = {"source": "a"}, {"source": "b"}
    write_tokens([([1, 2], [True, True])], tmp_path, key)

    def stream() -> Iterator[tuple[list[int], list[bool]]]:
        yield [3], [True]
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(WriteError, match=f"{tmp_path}: expected to write it, got no space left"):
        write_tokens(stream(), tmp_path, others)
    assert open_tokens(tmp_path, key) is None
    assert open_tokens(tmp_path, others) is None
