"""`laguna drafter train`: what it reads, that it goes on where it was stopped, and what its drafters accept."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LagunaForCausalLM

from laguna_serve.plugins.formats.sequential_head import head_shapes
from laguna_serve.scripts.checkpoints.compact import CompactConfig, compact
from laguna_serve.scripts.checkpoints.drafters.dflash import LagunaDrafter
from laguna_serve.scripts.checkpoints.quantise import QuantiseConfig, quantise
from laguna_serve.scripts.checkpoints.unpad import WidthsConfig, unpad
from laguna_serve.scripts.training.drafter import training
from laguna_serve.scripts.training.drafter.command import main, plan_drafter, train_drafter
from laguna_serve.scripts.training.drafter.config import DrafterTrainConfig
from laguna_serve.scripts.training.drafter.data import states as states_module
from laguna_serve.scripts.training.drafter.data.records import Row, choose_held_out
from laguna_serve.scripts.training.drafter.data.states import States
from laguna_serve.scripts.training.drafter.data.target import TargetLayers
from laguna_serve.scripts.training.drafter.held_out import count_row, walk
from laguna_serve.scripts.training.minutes import MINUTES
from laguna_serve.serving.checkpoint import CheckpointError, read_target
from laguna_serve.serving.client.traffic import TrafficError, read_traffic
from laguna_serve.serving.engine import Engine, EngineConfig
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.run_dir import RunDirError
from laguna_serve.serving.speculation.acceptance import read_acceptance
from laguna_serve.serving.speculation.drafting import check_fit, open_drafter

TOY = Path(__file__).resolve().parents[2] / "toy"
ANSWERED = 48


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """Two threads on a busy machine wait for each other."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before[0])
    torch.use_deterministic_algorithms(before[1])


@pytest.fixture(scope="module")
def traffic(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Greedy answers of a toy model to 24 prompts, as recorded traffic."""
    folder, made = tmp_path_factory.mktemp("traffic"), {}

    def record(name: str) -> Path:
        if name in made:
            return made[name]
        model = LagunaForCausalLM.from_pretrained(TOY / name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(TOY / name)
        texts = [json.loads(line)["prompt"] for line in (TOY / "prompts.jsonl").read_text().splitlines()[:24]]
        prompts = torch.tensor([tokenizer(text)["input_ids"][:40] for text in texts])
        answers = model.generate(prompts, max_new_tokens=ANSWERED, do_sample=False, eos_token_id=None, pad_token_id=0)
        made[name] = folder / f"{name}.jsonl"
        with made[name].open("w") as file:
            for row in answers.tolist():
                record = {"prompt_token_ids": row[:40], "token_ids": row[40:], "temperature": 0}
                file.write(json.dumps(record) + "\n")
        return made[name]

    return record


def describe(target: str, tokens: Path, out: Path, **changes: Any) -> DrafterTrainConfig:
    settings: dict[str, Any] = {"steps": 12, "rows": 3, "anchors": 6, "lr": 3e-3, "threads": 1, "held_out": 4}
    where = {"target": str(TOY / target), "tokens": (tokens,), "out": out, "recorded_only": True}
    return DrafterTrainConfig(**where, **settings | changes)


def read_weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the midst of a step."""
    calls, whole = [0], training.find_loss

    def find_loss(*given: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == step:
            os.kill(os.getpid(), signal.SIGINT)
        return whole(*given)

    monkeypatch.setattr(training, "find_loss", find_loss)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["teacher", "dense"])
def test_interrupted_run_ends_in_the_same_bits(
    target: str, traffic: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = {"layers": 1, "taps": (1, 4), "width": 64, "loss": "dspark" if target == "dense" else "ce"}
    whole = train_drafter(describe(target, traffic(target), tmp_path / "whole", **new))
    cut = describe(target, traffic(target), tmp_path / "cut", **new)
    with monkeypatch.context() as patch:
        interrupt_at(5, patch)
        with pytest.raises(KeyboardInterrupt):
            train_drafter(cut)
    assert not (cut.out / "config.json").exists()
    (cut.work_folder / MINUTES).write_text("100")
    again = train_drafter(cut)
    assert again.minutes >= 100 > whole.minutes
    assert read_weights(cut.out) == read_weights(tmp_path / "whole")
    assert (again.log, again.before, again.after) == (whole.log, whole.before, whole.after)
    assert (whole.answers, whole.temperatures, whole.before[0].answers) == (20, (0.0,), 4)
    check_fit(read_target(TOY / target), open_drafter(cut.out, str(cut.out)))
    with pytest.raises(RunDirError, match="remove it"):
        train_drafter(replace(cut, lr=1e-3))


@pytest.mark.slow
def test_new_drafter_learns_and_a_warm_start_goes_on_from_it(traffic: Callable[[str], Path], tmp_path: Path) -> None:
    new = {"format": "speculators", "draft_vocab": 200, "layers": 1, "taps": (2, 5), "width": 128, "steps": 90}
    first = train_drafter(describe("dense", traffic("dense"), tmp_path / "first", **new))
    assert first.log[-1]["loss"] < first.log[0]["loss"]
    assert first.after[0].tau > first.before[0].tau
    warm = describe("dense", traffic("dense"), tmp_path / "second", warm_start=str(tmp_path / "first"), steps=1, lr=0.0)
    second = train_drafter(warm)
    assert second.before == second.after
    assert second.before[0].tau == pytest.approx(first.after[0].tau, abs=0.05)  # stored in bf16 in between
    assert read_weights(tmp_path / "second") == read_weights(tmp_path / "first")
    described = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second")]
    assert described[0] == described[1]
    assert described[0]["aux_hidden_state_layer_ids"] == [3, 6]


@pytest.mark.slow
def test_a_head_begins_without_effect_and_learns(traffic: Callable[[str], Path], tmp_path: Path) -> None:
    """Put on a drafter it changes nothing; trained, the next run goes on with it; another rank is refused."""
    plain = train_drafter(describe("teacher", traffic("teacher"), tmp_path / "plain", layers=1, taps=(1, 4), width=64))
    warm = {"warm_start": str(tmp_path / "plain"), "sequential_head": 6}
    still = train_drafter(describe("teacher", traffic("teacher"), tmp_path / "still", **warm, steps=1, lr=0.0))
    assert still.before == still.after
    assert still.before[0].tau == pytest.approx(plain.after[0].tau, abs=0.05)  # stored in bf16 in between
    assert still.parameters == plain.parameters + sum(map(math.prod, head_shapes(512, 160, 6).values()))
    learned = train_drafter(describe("teacher", traffic("teacher"), tmp_path / "learned", **warm, steps=40))
    assert learned.before == still.before
    assert learned.after[0].tau > learned.before[0].tau
    drafter = open_drafter(tmp_path / "learned", str(tmp_path / "learned"))
    assert drafter.head_rank == 6
    assert LagunaDrafter.load(tmp_path / "learned").sequential_head is not None
    went_on = {"warm_start": str(tmp_path / "learned"), "steps": 1, "lr": 0.0}
    again = train_drafter(describe("teacher", traffic("teacher"), tmp_path / "again", **went_on))
    assert again.before[0].tau == pytest.approx(learned.after[0].tau, abs=0.05)
    assert read_weights(tmp_path / "again") == read_weights(tmp_path / "learned")


def run_states(folder: Path, out: Path, taps: tuple[int, ...] = (1, 3)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = (40, 9, 170, 33)
    rows = [Row(torch.randint(5, 500, (n,), dtype=torch.int32, generator=generator), 4, 0.0) for n in lengths]
    layers = TargetLayers(folder, torch.float32, torch.device("cpu"))
    states = States(out, rows, taps, layers.count, 160)
    states.compute(layers, Progress(quiet=True))
    return [states.read(layer, row, n).float() for layer in (*taps, 5) for row, n in enumerate(lengths)]


def agree(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    """To the bf16 in which both are stored."""
    return all(
        torch.allclose(a, b, rtol=0.02, atol=float(b.abs().max()) * 5e-3) for a, b in zip(got, wanted, strict=True)
    )


MASK: dict[str, Any] = {
    "keep_mask": TOY / "masks/group_keep_mask_25pct.npy",
    "group_indices": TOY / "masks/group_indices_importance_sorted.npy",
}


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["plain", "unpadded", "compact", "fp8", "compact of fp8"])
def test_states_are_those_of_the_model_however_it_is_stored(stored: str, tmp_path: Path) -> None:
    made, plain = tmp_path / "made", tmp_path / "plain"
    if stored == "plain":
        made = plain = TOY / "teacher"
    elif stored == "unpadded":
        unpad(WidthsConfig(source=str(TOY / "dense"), out=made))
        plain = TOY / "dense"
    elif stored == "compact":
        compact(CompactConfig(base=str(TOY / "teacher"), out=made, **MASK))
        compact(CompactConfig(base=str(TOY / "teacher"), out=plain, zeroed=True, **MASK))
    else:
        quantise(QuantiseConfig(source=str(TOY / "teacher"), out=tmp_path / "fp8", to="fp8"))
        quantise(QuantiseConfig(source=str(tmp_path / "fp8"), out=plain, to="fp32"))
        made = tmp_path / "fp8"
        if stored.startswith("compact"):
            compact(CompactConfig(base=str(made), out=tmp_path / "compact", **MASK))
            compact(CompactConfig(base=str(plain), out=tmp_path / "zeroed", zeroed=True, **MASK))
            made, plain = tmp_path / "compact", tmp_path / "zeroed"
    got = run_states(made, tmp_path / "got")
    model = LagunaForCausalLM.from_pretrained(plain, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 500, (n,), dtype=torch.int32, generator=generator) for n in (40, 9, 170, 33)]
    seen: dict[int, torch.Tensor] = {}
    for layer in (1, 3, 5):
        keep = lambda _m, _i, output, layer=layer: seen.__setitem__(layer, output)  # noqa: E731
        model.model.layers[layer].register_forward_hook(keep)
    wanted: dict[int, list[torch.Tensor]] = {1: [], 3: [], 5: []}
    for row in rows:
        with torch.no_grad():
            model.model(row.long()[None])
        for layer, found in wanted.items():
            output = seen[layer]
            found.append((output[0] if isinstance(output, tuple) else output)[0])
    assert agree(got, [state for found in wanted.values() for state in found])


@pytest.mark.slow
def test_interrupted_states_go_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states_module, "SHARD_TOKENS", 60)
    monkeypatch.setattr(states_module.list_shards, "__defaults__", (60,))
    whole = run_states(TOY / "dense", tmp_path / "whole")
    calls = [0]

    def stop() -> None:
        calls[0] += 1
        if calls[0] == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(states_module, "check_signals", stop)
        with pytest.raises(KeyboardInterrupt):
            run_states(TOY / "dense", tmp_path / "cut")
    assert len(list((tmp_path / "cut" / "running").iterdir())) > 1
    assert all(map(torch.equal, run_states(TOY / "dense", tmp_path / "cut"), whole))
    assert list((tmp_path / "cut" / "running").iterdir()) == []


@pytest.mark.slow
def test_expected_counts_are_the_mean_of_decoding_runs() -> None:
    generator = np.random.default_rng(0)
    alpha = generator.random((30, 3))
    steps, accepted, runs = 0, np.zeros(3), 4000
    for _ in range(runs):
        place = 0
        while place < len(alpha):
            kept = int((generator.random(3) < alpha[place]).cumprod().sum())
            steps, place = steps + 1, place + kept + 1
            accepted[:kept] += 1
    counted = walk(alpha)
    assert counted[0] == pytest.approx(steps / runs, rel=0.02)
    assert counted[1:] == pytest.approx(accepted / runs, rel=0.06)


def test_answers_to_one_prompt_are_on_one_side() -> None:
    prompts = [(n % 10, 1) for n in range(80)]
    held = choose_held_out(prompts, 64)
    assert len(held) == 2  # a quarter of the ten different ones
    assert held == choose_held_out(reversed(prompts), 64)
    with pytest.raises(TrafficError, match="at least two different prompts"):
        choose_held_out([(1, 2)] * 9, 4)


GOOD = {"prompt_token_ids": [5, 6], "token_ids": [7, 8, 9], "temperature": 1.0}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (GOOD | {"text": "a secret"}, "text"),
        (GOOD | {"token_ids": []}, "token_ids"),
        (GOOD | {"token_ids": ["x"]}, "token_ids"),
        (GOOD | {"prompt_token_ids": [-1]}, "prompt_token_ids"),
        (GOOD | {"temperature": -1}, "temperature"),
        (GOOD | {"schema": "laguna_serve.traffic/9"}, "schema"),
    ],
)
def test_traffic_holds_tokens_alone(line: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = tmp_path / "traffic.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(TrafficError, match=f"traffic.jsonl:2: expected token ids .*{says}") as refused:
        list(read_traffic(path))
    assert "secret" not in str(refused.value)


def test_traffic_that_is_still_being_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "traffic.jsonl"
    tagged = {"schema": "laguna_serve.traffic/1", "weight_version": "step-3", **GOOD}
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(tagged) + "\n" + json.dumps(GOOD)[:20])
    assert [record.weight_version for record in read_traffic(path)] == [None, "step-3"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "--prompts and --tokens: expected one of them, got neither"),
        (["--prompts", "{prompts}", "--taps", "1,9"], "--taps: expected different layers of the target, 0 to 5"),
        (["--prompts", "{prompts}", "--warm-start", "{toy}/dflash", "--layers", "3"], "--layers: expected the shape"),
        (["--prompts", "{prompts}", "--draft-vocab", "9"], "--draft-vocab: expected --format speculators"),
        (
            ["--prompts", "{prompts}", "--sequential-head", "8", "--format", "speculators"],
            "--sequential-head: expected --format laguna",
        ),
        (["--prompts", "{prompts}", "--sequential-head", "0"], "--sequential-head"),
        (
            ["--prompts", "{prompts}", "--sequential-head", "8", "--warm-start", "{toy}/dflash-speculators"],
            "expected Laguna's format for a sequential_head",
        ),
        (
            ["--prompts", "{prompts}", "--sequential-head", "8", "--warm-start", "{headed}"],
            "expected no sequential_head, or one of rank 8, got one of rank 4",
        ),
        (["--prompts", "{prompts}", "--temperature", "1", "1"], "--temperature: expected different temperatures"),
        (["--prompts", "{prompts}", "--mask-token", "512"], "--mask-token: expected 0 to 511, got 512"),
        (["--tokens", "{strange}"], "below 512, the target's vocabulary, got 900"),
        (["--prompts", "{strange}"], 'expected an object with "prompt"'),
        (["--tokens", "/dev/null"], "/dev/null: expected at least two different prompts, one to learn from"),
        (["--prompts", "{prompts}", "--warm-start", "{toy}/teacher"], "expected a DFlash drafter"),
        (["--prompts", "{prompts}", "--warm-start", "{other}"], "target's vocabulary 512, got 600"),
        (["--prompts", "{prompts}", "--warm-start", "{deep}"], "target layer ids from 0 to 5, got [9]"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    flags: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strange = tmp_path / "strange.jsonl"
    strange.write_text(json.dumps({"prompt_token_ids": [5], "token_ids": [900, 3], "temperature": 0}) + "\n")
    torch.manual_seed(0)
    shape = LagunaDrafter.load(TOY / "dflash").shape
    LagunaDrafter(replace(shape, vocab_size=600)).save(tmp_path / "other")
    LagunaDrafter(replace(shape, target_layer_ids=(9,), num_target_layers=None)).save(tmp_path / "deep")
    names = {"prompts": TOY / "prompts.jsonl", "toy": TOY, "strange": strange}
    LagunaDrafter(replace(shape, head_rank=4)).save(tmp_path / "headed")
    names |= {"headed": tmp_path / "headed", "other": tmp_path / "other", "deep": tmp_path / "deep"}
    given = [flag.format(**names) for flag in flags]
    try:
        status: Any = main([str(TOY / "teacher"), "--out", str(tmp_path / "out"), *given])
    except SystemExit as ended:
        status = ended.code
    said = capsys.readouterr().err
    assert status == 2
    assert says in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("own", [True, False], ids=["the one that is read", "another one"])
def test_other_checkpoints_are_not_written_over(own: bool, tmp_path: Path) -> None:
    folder = shutil.copytree(TOY / "dflash", tmp_path / "dflash")
    asked = DrafterTrainConfig(
        target=str(TOY / "teacher"),
        prompts=TOY / "prompts.jsonl",
        warm_start=str(folder if own else TOY / "dflash"),
        out=folder,
    )
    with pytest.raises(CheckpointError, match="choose another --out"):
        train_drafter(asked)
    assert read_weights(folder) == read_weights(TOY / "dflash")


def test_a_drafter_without_its_result_is_gone_on_with(traffic: Callable[[str], Path], tmp_path: Path) -> None:
    asked = describe("teacher", traffic("teacher"), tmp_path / "out", steps=1, layers=1, taps=(1,), width=16, rows=1)
    train_drafter(asked)
    (tmp_path / "out" / "drafter_train.json").unlink()  # as where the disk became full in front of it
    before = read_weights(tmp_path / "out")
    train_drafter(asked)
    assert (tmp_path / "out" / "drafter_train.json").exists()
    assert read_weights(tmp_path / "out") == before


def test_a_loss_that_is_not_finite_ends_the_training(traffic: Callable[[str], Path], tmp_path: Path) -> None:
    asked = describe("teacher", traffic("teacher"), tmp_path / "out", lr=1e30, layers=1, taps=(1,), width=16, rows=1)
    with pytest.raises(
        CommandError, match=r"drafter: expected a finite loss, got nan in step .* lower the learning rate"
    ):
        train_drafter(asked)
    assert not (tmp_path / "out" / "config.json").exists()


def test_prompts_are_lines_and_fit_the_target(tmp_path: Path) -> None:
    """One that the model has no room for would end every run with the engine's refusal."""
    prompts = [{"prompt": [5] * count} for count in (3, 4, 2032, 2033, 3000)] + [{"prompt": "a\u2028b"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in prompts))
    plan = plan_drafter(DrafterTrainConfig(target=str(TOY / "teacher"), prompts=path, out=tmp_path / "out"))
    assert plan.prompts == 4


@pytest.mark.slow
def test_dry_run_counts_and_writes_nothing(tmp_path: Path) -> None:
    asked = DrafterTrainConfig(
        target=str(TOY / "teacher"),
        prompts=TOY / "prompts.jsonl",
        temperature=(0.0, 1.0),
        samples=2,
        held_out=32,
        out=tmp_path / "out",
        warm_start=str(TOY / "dflash"),
        dry_run=True,
    )
    plan = plan_drafter(asked)
    assert (plan.prompts, plan.held_out_prompts, plan.parameters) == (512, 32, 884_288)
    assert plan.generated == plan.missing == 480 * 3 + 32 * 3
    assert plan.tokens >= plan.generated * 256
    assert plan.states_bytes > plan.tokens * 160 * 2 * 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_full_disk_is_refused_before_anything_is_computed(
    traffic: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage)
    with pytest.raises(Exception, match=r"expected .* bytes free .*, got 1,000; free some"):
        train_drafter(describe("dense", traffic("dense"), tmp_path / "out", layers=1))


@pytest.mark.vllm
@pytest.mark.parametrize("rank", [None, pytest.param(16, marks=pytest.mark.slow)])
def test_drafter_of_the_engines_own_answers_is_served_and_accepted_as_measured(
    rank: int | None, tmp_path: Path
) -> None:
    """Also with a head, which changes what is drafted after a few steps at a high rate."""
    lines = (TOY / "prompts.jsonl").read_text().splitlines()[:14]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(lines) + "\n")
    asked = DrafterTrainConfig(
        target=str(TOY / "teacher"),
        prompts=prompts,
        measure=(0.0, 1.0),
        temperature=(0.0, 1.0),
        max_tokens=96,
        ignore_eos=True,
        held_out=3,
        out=tmp_path / "out",
        warm_start=str(TOY / "dflash"),
        sequential_head=rank,
        steps=3 if rank is None else 60,
        rows=2,
        lr=1e-4 if rank is None else 3e-3,
        threads=1,
        eager=True,
    )
    result = train_drafter(asked)
    assert [(tau.temperature, tau.drafts) for tau in result.after] == [
        *((0.0, "greedy"), (1.0, "greedy"), (1.0, "probabilistic"))
    ]
    answers = [json.loads(line) for line in (tmp_path / "out/work/answers/answers.jsonl").read_text().splitlines()]
    assert len(answers) == 11 * 2 + 3 * 2
    learned = {tuple(row["prompt_token_ids"]) for row in answers if row["temperature"] == 1.0}
    assert len(learned) == 14
    engine = EngineConfig(model=str(TOY / "teacher"), draft=str(tmp_path / "out"), enforce_eager=True, max_num_seqs=4)
    held = choose_held_out([tuple(row["prompt_token_ids"]) for row in answers], 3)
    with Engine(engine, log_path=tmp_path / "engine.log") as served:
        for prompt in held:
            body = {"model": served.model_name, "prompt": list(prompt), "max_tokens": 96, "temperature": 0}
            data = json.dumps(body | {"ignore_eos": True, "return_token_ids": True}).encode()
            url = f"{served.base_url}/v1/completions"
            asked_again = urllib.request.Request(url, data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(asked_again, timeout=60) as response:
                answer = json.load(response)
            mine = [r for r in answers if tuple(r["prompt_token_ids"]) == prompt and r["temperature"] == 0]
            assert answer["choices"][0]["token_ids"] == mine[0]["token_ids"]
        counted = read_acceptance(served.base_url)
    assert counted is not None
    assert counted.length == pytest.approx(result.after[0].tau, rel=0.12)
    assert rank is None or result.after[0] != result.before[0]
    assert counted.drafts == pytest.approx(result.after[0].steps, rel=0.2)


@pytest.mark.parametrize("tokens", [3, 5, 12])
def test_answers_shorter_than_a_block_count_nothing(tokens: int) -> None:
    """Two of prompt and some of answer, against a drafter of ten tokens."""
    drafter: Any = SimpleNamespace(shape=SimpleNamespace(gamma=10))
    row = SimpleNamespace(start=2, tokens=torch.arange(tokens), temperature=1.0)
    blocks: Any = SimpleNamespace(rows=[row], open=lambda rows: None)
    (counts,) = count_row(drafter, blocks, 0, ["probabilistic"])
    assert counts.tolist() == [0.0] * 11
