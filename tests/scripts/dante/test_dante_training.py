"""Training in its own environment: the loss is the formula's; an interruption or a second process changes nothing."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import SmolLM3ForCausalLM
from warm import run_warm, start_warm

from laguna_serve.scripts.dante import ablate, train
from laguna_serve.scripts.dante.options import DanteConfig, DanteResult
from laguna_serve.scripts.dante.train import require_trainer
from laguna_serve.scripts.training.dante.loading import load_student
from laguna_serve.scripts.training.dante.losses import IGNORED, confidence_weight
from laguna_serve.scripts.training.dante.records import CacheRecord, read_cache
from laguna_serve.scripts.training.dante.rows import encode_records, order_records
from laguna_serve.scripts.training.dante.student import student_config
from laguna_serve.scripts.training.minutes import MINUTES
from laguna_serve.scripts.training.toy.tokenizer import load_tokenizer
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.flags import FlagError
from laguna_serve.serving.kit.results import read_result
from laguna_serve.serving.kit.run_dir import hold_folder

ROOT = Path(__file__).resolve().parents[3]
TRAINER = ROOT / ".venv-train" / "bin"
needs_trainer = pytest.mark.skipif(
    not (TRAINER / "accelerate").exists(), reason="no .venv-train: bash scripts/client_env.sh train makes it"
)
STEPS, BATCH = 12, 4
FLAGS = ["--steps", f"{STEPS}", "--batch", f"{BATCH}", "--length", "48", "--lr", "0.01", "--warm-up", "2"]
PATIENCE_S = 240


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small student with random weights, and a cache of 22 records, a third of them cut off."""
    folder = tmp_path_factory.mktemp("dante")
    torch.manual_seed(0)
    config = student_config()
    config.update({"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48})
    SmolLM3ForCausalLM(config).save_pretrained(folder / "base")
    load_tokenizer(ROOT / "tests/toy/teacher").save_pretrained(folder / "base")
    records = [
        CacheRecord(
            prompt=f"def f_{number}(x):\n",
            teacher_text=f"    return x + {number * number}\n" * (1 + number % 3),
            output_entropy=round(0.1 + 2.5 * ((number * 7) % 22) / 22, 4),
            self_consistency=0.5,
            difficulty_score=0.5,
            finish_reason="length" if number % 3 == 0 else "stop",
            teacher="t",
            weight_version=None,
            top_k=20,
            tail_mass=0.0,
        )
        for number in range(22)
    ]
    lines = [json.dumps(msgspec.to_builtins(record)) for record in records]
    (folder / "cache.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def command(folder: Path, name: str, *more: str) -> list[str]:
    base = [str(folder / "base"), "--cache", str(folder / "cache.jsonl"), "--out", str(folder / name)]
    return [str(ROOT / "scripts" / "dante" / "train.py"), *base, *FLAGS, *more]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return run_warm(*arguments, timeout=PATIENCE_S, venv=TRAINER.parent.name)


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> DanteResult:
    done = run(command(folder, "whole"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["log"] == STEPS
    assert not (folder / "whole.work").exists()
    return read_result(folder / "whole" / "training.json", DanteResult)


def test_other_checkpoints_are_not_written_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "require_trainer", lambda: None)
    for out, why in ((folder / "base", "a folder of its own"), (ROOT / "tests" / "toy" / "dense", "an empty folder")):
        with pytest.raises(CheckpointError, match=f"expected {why}"):
            train.train_student(DanteConfig(model=folder / "base", cache=folder / "cache", out=out))


@pytest.mark.parametrize("command", [train.train_student, ablate.ablate])
def test_a_model_that_is_nowhere_is_named_at_once(
    command: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after every attempt to fetch it."""
    for module in (train, ablate):
        monkeypatch.setattr(module, "require_trainer", lambda: None)
    given: dict[str, Any] = {"model": Path("nowhere"), "cache": folder / "cache", "out": tmp_path / "out"}
    config: Any = DanteConfig(**given)
    if command is ablate.ablate:
        config = ablate.AblateConfig(**given, held_out=folder / "cache.jsonl", other=tmp_path)
    with pytest.raises(CheckpointError, match="nowhere: expected an existing folder or a hub id"):
        command(config)


@needs_trainer
@pytest.mark.slow
def test_what_was_refused_leaves_nothing_that_the_next_command_trips_over(folder: Path) -> None:
    done = run(command(folder, "refused", "--batch", "128"))
    assert (done.returncode, "--batch: expected at most the 22 rows" in done.stderr) == (2, True), done.stderr[-2000:]
    assert not (folder / "refused.work").exists()


@pytest.mark.slow
def test_a_model_without_its_weights_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    """The missing ones were random numbers, which ended in a traceback, or in a student of these."""
    with pytest.raises(CommandError, match=r"got one without 15 of its tensors, lm_head.weight for one; is it a draft"):
        load_student(ROOT / "tests/toy/dflash")
    with pytest.raises(CommandError, match=r"expected a causal language model, got: .*config.json"):
        load_student(ROOT / "tests/toy/masks")
    printed = capfd.readouterr()
    assert "MISSING" not in printed.out + printed.err


@needs_trainer
@pytest.mark.slow
def test_a_second_run_is_kept_out(folder: Path) -> None:
    """Two of them saved their states to the same folder."""
    with hold_folder(folder / "alone.work"):
        done = run(command(folder, "alone"))
    assert done.returncode == 2, done.stderr[-2000:]
    assert re.search(r"got another run at it( \(process \d+\))?; wait for its end", done.stderr), done.stderr[-2000:]
    assert not (folder / "alone").exists()


@needs_trainer
@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_training(folder: Path) -> None:
    """It wrote a student of NaN, and then ended in a traceback."""
    model = SmolLM3ForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    shutil.copytree(folder / "base", folder / "odd")
    model.save_pretrained(folder / "odd")
    program, _, *flags = command(folder, "unfinite")
    done = run([program, str(folder / "odd"), *flags])
    assert done.returncode == 2
    assert "training: expected a finite loss, got nan in step 1 of 12; lower --lr" in done.stderr, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert not (folder / "unfinite").exists()


@needs_trainer
@pytest.mark.slow
def test_first_steps_loss_is_the_formula(folder: Path, uninterrupted: DanteResult) -> None:
    """0.70 · mean(w · CE) over the four easiest records, the anchor being 0."""
    tokenizer = load_tokenizer(folder / "base")
    taught = encode_records(order_records(read_cache(folder / "cache.jsonl"), "output_entropy"), tokenizer, 48)
    model = SmolLM3ForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
    losses = []
    for row in taught.rows[:BATCH]:
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        parts = [-float(logs[t, k]) for t, k in enumerate(row.labels[1:]) if k != IGNORED]
        losses.append(float(confidence_weight(torch.tensor(row.entropy))) * sum(parts) / len(parts))
    first = uninterrupted.log[0]
    assert first.loss == pytest.approx(0.70 * sum(losses) / BATCH, abs=2e-4)
    assert (first.drift, uninterrupted.rows, uninterrupted.cut) == (0.0, 20, taught.cut)
    assert uninterrupted.log[-1].cross_entropy < first.cross_entropy - 0.3
    assert uninterrupted.drift == pytest.approx(_drift(folder, "whole"), rel=1e-3)


def _drift(folder: Path, name: str) -> float:
    key = "model.embed_tokens.weight"
    start, end = (load_file(folder / one / "model.safetensors")[key] for one in ("base", name))
    return float((end - start).square().sum() / start.square().sum())


@needs_trainer
@pytest.mark.slow
def test_student_has_a_card_and_curves(folder: Path, uninterrupted: DanteResult) -> None:
    card = ModelCard.load(folder / "whole" / "README.md")
    assert card.data.base_model == "base"
    assert f"{uninterrupted.log[-1].cross_entropy:.3f}" in card.text
    assert "taught the answers of t:" in card.text
    assert str(folder) not in card.text.split("## How it was made")[0]
    assert (folder / "whole" / "training.png").read_bytes().startswith(b"\x89PNG")


@needs_trainer
@pytest.mark.slow
def test_interrupted_and_continued_is_uninterrupted(folder: Path, uninterrupted: DanteResult) -> None:
    """The signal comes when the first state is saved; the loss curve and the weights are the same to the last bit."""
    arguments, said = command(folder, "again", "--save-every", "1"), folder / "again.said"
    work = folder / "again.work"
    process = start_warm(*arguments, error=said, venv=TRAINER.parent.name)
    end = time.monotonic() + PATIENCE_S
    while not list(work.glob("checkpoint-*")) and time.monotonic() < end:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_S) == 130, said.read_text()[-2000:]
    assert "the same command continues" in said.read_text()
    (work / MINUTES).write_text("100")
    done = run(arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    result = read_result(folder / "again" / "training.json", DanteResult)
    assert result.minutes >= 100 > uninterrupted.minutes
    assert [step.loss for step in result.log] == [step.loss for step in uninterrupted.log]
    one, other = (load_file(folder / name / "model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(one[key], other[key]) for key in one)


# Torch's launcher, on a CPU too; --cpu starts one process, whatever the number.
DDP = ["--multi_gpu"]
FSDP = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]


@needs_trainer
@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "program"), [(DDP, []), (FSDP, ["tests/scripts/dante/fsdp_on_cpu.py"])], ids=["DDP", "FSDP"]
)
def test_two_processes_have_the_loss_curve_of_one(
    folder: Path, uninterrupted: DanteResult, flags: list[str], program: list[str]
) -> None:
    launch = [str(TRAINER / "accelerate"), "launch", *flags, "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    name = f"two-{len(flags)}"
    arguments = [*launch, *program, *command(folder, name, "--micro-batch", "1")]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = read_result(folder / name / "training.json", DanteResult)
    assert result.processes == 2
    for one, other in zip(result.log, uninterrupted.log, strict=True):
        assert (one.loss, one.drift) == pytest.approx((other.loss, other.drift), abs=1e-3)
    assert result.drift == pytest.approx(_drift(folder, name), rel=1e-3)
    ours, theirs = (load_file(folder / made / "model.safetensors") for made in (name, "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-4) for key in ours)
    assert len([line for line in done.stdout.splitlines() if line.startswith("{")]) == 1, "one process speaks"


def test_without_trl_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CommandError, match=r"client_env\.sh train"):
        require_trainer()


@pytest.mark.parametrize("changes", [{"lr": 0.0}, {"share": 0.0}, {"share": 1.5}, {"steps": 0}])
def test_flags_that_mean_nothing(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(FlagError):
        DanteConfig(model=tmp_path, cache=tmp_path, out=tmp_path, **changes)


def test_plain_has_no_part_of_it(tmp_path: Path) -> None:
    plain = DanteConfig(model=tmp_path, cache=tmp_path, out=tmp_path, plain=True)
    assert (plain.weighs, plain.anchored, plain.warm_up_steps) == (False, "none", 200)
