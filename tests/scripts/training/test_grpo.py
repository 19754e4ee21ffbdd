"""GRPO: advantages and loss by hand, the log-probabilities that count, and a real run that is continued."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mock_engine import MockEngine, Settings
from warm import run_warm

from laguna_serve.scripts.training.rl import run
from laguna_serve.scripts.training.rl.config import GrpoConfig
from laguna_serve.scripts.training.rl.off_policy.importance import Correction, keep_completions, weigh_tokens
from laguna_serve.scripts.training.rl.off_policy.mismatch import TrainerMismatch, watch_routers
from laguna_serve.scripts.training.rl.policy import CLIP, find_advantages, find_logprobs, find_loss, make_batch
from laguna_serve.scripts.training.rl.rollouts import Rollout, sample_groups
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.client.sampling import PLAIN_SAMPLING
from laguna_serve.serving.kit.flags import FlagError

ROOT = Path(__file__).resolve().parents[3]
TOY = ROOT / "tests" / "toy"


def rollout(reward: float = 0.0, *, tokens: int = 2, prompt: int = 3, logprob: float = -1.0) -> Rollout:
    return Rollout(tuple(range(5, 5 + prompt)), tuple(range(20, 20 + tokens)), (logprob,) * tokens, reward, "v")


def test_advantages_compare_within_a_group() -> None:
    assert find_advantages([rollout(1.0), rollout(0.0)]) == pytest.approx([1.0, -1.0], abs=3e-3)
    assert find_advantages([rollout(0.5), rollout(0.5)]) == [0.0, 0.0]


def test_batch_marks_what_was_sampled() -> None:
    batch = make_batch([rollout(1.0, tokens=1, prompt=2), rollout(0.0, tokens=2, prompt=3)])
    assert batch.tokens.tolist() == [[5, 6, 20, 0, 0], [5, 6, 7, 20, 21]]
    assert batch.sampled.tolist() == [[False, True, False, False], [False, False, True, True]]
    assert batch.behaviour.tolist() == [[0, -1, 0, 0], [0, 0, -1, -1]]


def test_loss_raises_what_was_good_and_clips() -> None:
    batch = make_batch([rollout(1.0), rollout(0.0)])
    before = batch.behaviour
    logprobs = before.clone().requires_grad_()
    find_loss(logprobs, before, batch, Correction()).total.backward()  # type: ignore[no-untyped-call]
    assert logprobs.grad is not None
    good, bad = logprobs.grad[0][batch.sampled[0]], logprobs.grad[1][batch.sampled[1]]
    assert (good < 0).all()
    assert (bad > 0).all()
    assert not logprobs.grad[~batch.sampled].any()
    far = (before + math.log(1 + 2 * CLIP)).requires_grad_()
    find_loss(far, before, batch, Correction()).total.backward()  # type: ignore[no-untyped-call]
    assert far.grad is not None
    assert not far.grad[0].any(), "a good completion that is far more likely by now is not pushed further"
    assert far.grad[1][batch.sampled[1]].all(), "a bad one is pushed back from anywhere"


def test_a_token_weighs_what_trainer_and_engine_say_up_to_a_cap() -> None:
    """By hand: the trainer finds the tokens 1.5, 3 and 0.5 times as likely as the engine, capped at 2."""
    batch = make_batch([rollout(1.0, tokens=3), rollout(0.0, tokens=3)])
    ratios = torch.tensor([1.5, 3.0, 0.5])
    before = batch.behaviour.clone()
    before[0, batch.sampled[0]] += ratios.log()
    assert weigh_tokens(before, batch.behaviour, 2.0)[0, batch.sampled[0]].tolist() == pytest.approx([1.5, 2.0, 0.5])
    logprobs = before.clone().requires_grad_()
    loss = find_loss(logprobs, before, batch, Correction(cap=2.0))
    good, bad = find_advantages([rollout(1.0), rollout(0.0)])
    assert loss.total.item() == pytest.approx(-(good * (1.5 + 2.0 + 0.5) + bad * 3))
    assert (loss.tokens, loss.capped, loss.dropped) == (6, 1, 0)
    loss.total.backward()  # type: ignore[no-untyped-call]
    assert logprobs.grad is not None
    expected = [-good * weight for weight in (1.5, 2.0, 0.5)]  # of weight × ratio by the log-probability: the weight
    assert logprobs.grad[0, batch.sampled[0]].tolist() == pytest.approx(expected)


def test_completions_far_from_the_engines_are_left_out() -> None:
    """By hand: the ratios' geometric means are √(4 × 9) = 6, √(1/2 × 1/2) = 1/2 and √(8 × 1/8) = 1."""
    batch = make_batch([rollout(1.0), rollout(0.0), rollout(0.0)])
    before = batch.behaviour.clone()
    before[batch.sampled] += torch.tensor([4, 9, 1 / 2, 1 / 2, 8, 1 / 8]).log()
    for bound, kept in ((None, [1, 1, 1]), (6.1, [1, 1, 1]), (5.9, [0, 1, 1]), (1.9, [0, 0, 1])):
        assert keep_completions(before, batch.behaviour, batch.sampled, bound).int().tolist() == kept
    logprobs = before.clone().requires_grad_()
    loss = find_loss(logprobs, before, batch, Correction(bound=5.9))
    assert (loss.tokens, loss.dropped) == (4, 1)
    loss.total.backward()  # type: ignore[no-untyped-call]
    assert logprobs.grad is not None
    assert [bool(row.any()) for row in logprobs.grad] == [False, True, True]


def test_rollouts_are_sampled_as_the_loss_takes_them() -> None:
    choice = {"prompt_token_ids": [5], "token_ids": [6], "logprobs": {"token_logprobs": [-1.0]}, "text": "a"}
    sampler = Settings(says=lambda _, body: {"choices": [choice] * body["n"]}, headers={"X-Weight-Version": "v"})
    with MockEngine(sampler) as service:
        groups = asyncio.run(sample_groups(service.url, "m", ["p"], group=2, max_tokens=1))
    assert [[r.version for r in group] for group in groups] == [["v", "v"]]
    (body,) = service.bodies
    assert body == body | PLAIN_SAMPLING | {"temperature": 1.0}, "a release's top_k would cut the policy off"


def test_prompts_of_a_step_are_asked_all_at_once() -> None:
    choice = {"prompt_token_ids": [5], "token_ids": [6], "logprobs": {"token_logprobs": [-1.0]}, "text": "a"}
    with MockEngine(Settings(says=lambda _, body: {"choices": [choice]}, together=105)) as service:
        asked = sample_groups(service.url, "m", [f"p{i}" for i in range(110)], group=1, max_tokens=1)
        assert len(asyncio.run(asked)) == 110
        assert service.most >= 105  # the first one does not wait for the others


@pytest.fixture(scope="module")
def teacher() -> Any:
    from transformers import LagunaForCausalLM

    return LagunaForCausalLM.from_pretrained(TOY / "teacher", dtype=torch.float32).eval().requires_grad_(False)


@pytest.mark.slow
def test_logprobs_do_not_see_the_padding(teacher: Any) -> None:
    short, long = rollout(1.0, tokens=3, prompt=4), rollout(0.0, tokens=9, prompt=12)
    with torch.no_grad():
        alone, padded = make_batch([short]), make_batch([short, long])
        expected = find_logprobs(teacher, alone.tokens)[0]
        found = find_logprobs(teacher, padded.tokens)[0, : expected.numel()]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_difference_of_trainer_and_engine_is_found_on_sampled_tokens(teacher: Any) -> None:
    batch = make_batch([rollout(1.0, tokens=4), rollout(0.0, tokens=6)])
    with watch_routers(teacher) as routers:
        logprobs = find_logprobs(teacher, batch.tokens)
    engine = logprobs + torch.where(batch.sampled, 0.25, 9.0)
    known, mismatch = replace(batch, behaviour=engine), TrainerMismatch()
    mismatch.add(logprobs, known, routers.find_tied(known))
    assert (mismatch.nats, mismatch.tied_nats, mismatch.tied_tokens) == (pytest.approx(0.25), 0, 0)
    assert mismatch.mean == pytest.approx(0.25)


def test_tokens_behind_a_tie_of_experts_are_told_apart(teacher: Any) -> None:
    """An engine that rounds otherwise reports what the trainer computes with the other of two tied experts."""
    batch = make_batch([rollout(1.0, tokens=6, prompt=5), rollout(0.0, tokens=6, prompt=5)])
    router = teacher.model.layers[2].mlp.gate
    row, place = 1, 7

    def tie(module: Any, given: Any, chosen: tuple[torch.Tensor, ...], swap: int) -> tuple[torch.Tensor, ...]:
        logits, weights, experts = (value.clone() for value in chosen)
        token = row * batch.sampled.shape[1] + place
        best = (logits[token].sigmoid() + module.e_score_correction_bias).topk(module.top_k + 1).indices
        last, following = best[-2:]
        level = logits[token][last].sigmoid() + module.e_score_correction_bias[last]
        logits[token][following] = (level - module.e_score_correction_bias[following] - 1e-7).logit()
        experts[token] = torch.cat([best[:-2], best[-2 + swap].view(1)])
        taken = logits[token].sigmoid()[experts[token]]
        weights[token] = taken / taken.sum()
        return logits, weights, experts

    found = []
    for swap in (0, 1):
        with watch_routers(teacher) as routers:
            hook = router.register_forward_hook(partial(tie, swap=swap), prepend=True)
            found.append(find_logprobs(teacher, batch.tokens))
            hook.remove()
    expected = torch.zeros_like(batch.sampled)
    expected[row, place:] = True
    assert torch.equal(routers.find_tied(batch), expected)
    mismatch = TrainerMismatch()
    mismatch.add(found[0], replace(batch, behaviour=found[1]), expected)
    assert mismatch.nats < 1e-5
    assert mismatch.tied_nats > 1e-4
    assert mismatch.tied_tokens == int(batch.sampled[row, place:].sum())


@pytest.mark.parametrize("text", ["", "{", '{"id": "a:1"}\n', '{"id": "a:1", "prompt": "x"}\n', "[]\n"])
def test_unusable_prompts_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(CheckpointError, match="prompts"):
        run.read_prompts(path)


def test_prompts_are_texts_with_separators_of_lines_in_them(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    items = [{"id": f"file{number}:1", "prompt": f"a\u2028{number}"} for number in range(64)]
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
    prompts = run.read_prompts(path)
    assert sorted([*prompts.training, *prompts.held_out]) == sorted(item["prompt"] for item in items)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as editors on Windows put before a text
    assert run.read_prompts(path) == prompts
    for wrong in ("[1, 2]", "null", r'"\ud800"'):
        path.write_text(f'{{"id": "a:1", "prompt": {wrong}}}\n')
        with pytest.raises(CheckpointError, match=r"the prompt .* of a:1"):
            run.read_prompts(path)


def test_other_prompts_are_another_run(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"id": "a:1", "prompt": "x"}')
    config = GrpoConfig(model="m", out=tmp_path, prompts=path)
    before = config.decisive
    assert config.decisive == before
    path.write_text('{"id": "a:1", "prompt": "y"}')
    assert config.decisive != before


@pytest.mark.parametrize("rate", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["lr", "refresh_lr"])
def test_rates_from_which_nothing_comes_back_are_refused(tmp_path: Path, name: str, rate: float) -> None:
    with pytest.raises(FlagError, match=f"--{name.replace('_', '-')}: expected "):
        GrpoConfig(model="m", out=tmp_path, **{name: rate})  # type: ignore[arg-type]


def test_a_file_is_on_one_side() -> None:
    prompts = run.read_prompts(TOY / "prompts.jsonl")
    assert len(prompts.training) + len(prompts.held_out) == 512
    assert 64 < len(prompts.held_out) < 192


def run_grpo(out: Path, *flags: str) -> tuple[int, dict[str, Any], str]:
    command = [str(ROOT / "scripts" / "grpo.py"), "--model", str(TOY / "teacher"), "--out", str(out)]
    done = run_warm(*command, *flags, timeout=500, engines=True)
    lines = done.stdout.strip().splitlines()
    return done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr


@pytest.mark.vllm
def test_run_is_continued_and_the_engine_has_the_trainers_weights(tmp_path: Path) -> None:
    out = tmp_path / "run"
    # An eighth of them: those of the modules that are held out are all asked at every measurement.
    lines = (TOY / "prompts.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "prompts.jsonl").write_text("".join(lines[::8]), encoding="utf-8")
    small = ["--draft", str(TOY / "dflash"), "--prompts-per-step", "4", "--group", "2", "--max-tokens", "12"]
    small += ["--prompts", str(tmp_path / "prompts.jsonl")]
    small += ["--draft-sampling", "probabilistic"]
    status, _, said = run_grpo(out, *small, "--steps", "2", "--measure-every", "2")
    assert status in (0, 1), said
    status, result, said = run_grpo(out, *small, "--steps", "3", "--measure-every", "2")
    assert status in (0, 1), said
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["version"]) for line in log] == [(i, f"step-{i}") for i in range(4)]
    steps = [line for line in log if "reward" in line]
    assert len(steps) == 3
    # The weights that sampled are the trainer's: after every update, and after the start from the saved state.
    # Behind a tie of two experts, too, as the trainer took the engine's.
    assert all(max(line["mismatch_nats"], line["tied"]["mismatch_nats"]) < 1e-3 for line in steps)
    assert all(line["off_policy"]["capped"] == line["off_policy"]["dropped"] == 0 for line in steps)
    assert all("rerouted" in line["off_policy"] for line in steps)
    assert all(1 <= line["acceptance_length"] <= 8 for line in steps)
    assert result["held_out_reward"]["prompts"] > 0
    assert {path.name for path in (out / "versions").iterdir()} == {"step-0", "step-2", "step-3"}
    assert (out / "reward.png").stat().st_size > 10_000
    status, _, said = run_grpo(out, *small, "--steps", "3", "--seed", "1")
    assert status == 2
    assert "another run's" in said
