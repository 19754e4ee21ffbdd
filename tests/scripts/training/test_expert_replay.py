"""Rollout routing replay: the trainer computes what the engine computed, where routers are left to rounding, too."""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from laguna_serve.scripts.training.rl.off_policy.mismatch import TrainerMismatch, watch_routers
from laguna_serve.scripts.training.rl.off_policy.replay import UNKNOWN, replay_experts
from laguna_serve.scripts.training.rl.policy import RolloutBatch, find_logprobs, make_batch
from laguna_serve.scripts.training.rl.rollouts import Rollout, RolloutError, sample_groups
from laguna_serve.scripts.training.rl.service import open_service
from laguna_serve.serving.engine import EngineConfig

TOY = Path(__file__).resolve().parents[3] / "tests" / "toy"
LAYERS, TOP_K, EXPERTS, DENSE_LAYERS = 6, 4, 16, 1
ALIKE = 3  # experts of the planted teacher that score alike: the four chosen are never whole threes


def load(folder: Path) -> Any:
    from transformers import LagunaForCausalLM

    return LagunaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def teacher() -> Any:
    return load(TOY / "teacher")


def make_rollout(prompt: int, tokens: int) -> Rollout:
    ids = tuple(range(5, 5 + prompt)), tuple(range(20, 20 + tokens))
    return Rollout(*ids, (-1.0,) * tokens, 0.0, "v", np.zeros((prompt + tokens - 1, LAYERS, TOP_K), np.uint8))


def record(
    chosen: dict[int, torch.Tensor], number: int, _module: Any, _given: Any, output: tuple[torch.Tensor, ...]
) -> None:
    chosen[number] = output[2]


@pytest.mark.slow
def test_recorded_experts_are_taken_and_weighed_by_the_trainers_scores(teacher: Any) -> None:
    """Another model's choices, replayed: its experts, this one's weights; where nothing is recorded its own."""
    batch = make_batch([make_rollout(6, 5), make_rollout(4, 3)])
    tokens, length = batch.tokens, batch.tokens.shape[1] - 1
    experts = torch.rand(2, length, LAYERS, EXPERTS).topk(TOP_K).indices
    assert batch.experts is not None
    experts[batch.experts == UNKNOWN] = UNKNOWN
    taken: dict[int, tuple[torch.Tensor, ...]] = {}
    with replay_experts(teacher, experts) as replay:
        gates = {number: layer.mlp.gate for number, layer in enumerate(teacher.model.layers) if number >= DENSE_LAYERS}
        hooks = [
            gate.register_forward_hook(lambda _m, _g, output, number=number: taken.__setitem__(number, output))
            for number, gate in gates.items()
        ]
        find_logprobs(teacher, tokens)
        for hook in hooks:
            hook.remove()
    known = (experts[:, :, 0, 0] != UNKNOWN).flatten()
    assert not known.all(), "the shorter row is padded"
    for number, (logits, weights, ids) in taken.items():
        assert torch.equal(ids[known], experts[:, :, number].flatten(0, 1)[known])
        own = (logits.sigmoid() + gates[number].e_score_correction_bias).topk(TOP_K).indices
        assert torch.equal(ids[~known], own[~known])
        scores = logits.sigmoid().gather(-1, ids)
        torch.testing.assert_close(weights, scores / scores.sum(-1, keepdim=True))
    assert replay.rerouted is not None
    assert replay.rerouted[known].float().mean() > 0.9
    assert not replay.rerouted[~known].any()
    alone = find_logprobs(teacher, tokens)
    with replay_experts(teacher, None) as nothing:
        assert torch.equal(find_logprobs(teacher, tokens), alone), "the hooks are gone"
    assert nothing.rerouted is None


def test_own_choices_replayed_change_nothing(teacher: Any) -> None:
    batch = make_batch([make_rollout(6, 5)])
    chosen: dict[int, torch.Tensor] = {}
    hooks = [
        layer.mlp.gate.register_forward_hook(partial(record, chosen, number))
        for number, layer in enumerate(teacher.model.layers)
        if number >= DENSE_LAYERS
    ]
    expected = find_logprobs(teacher, batch.tokens)
    for hook in hooks:
        hook.remove()
    shape = (1, batch.tokens.shape[1] - 1, TOP_K)
    rows = [chosen[n].view(shape) if n in chosen else torch.zeros(shape, dtype=torch.int64) for n in range(LAYERS)]
    with replay_experts(teacher, torch.stack(rows, 2)) as replay:
        assert torch.equal(find_logprobs(teacher, batch.tokens), expected)
    assert replay.rerouted is not None
    assert not replay.rerouted.any()


def test_experts_of_another_model_are_refused(teacher: Any) -> None:
    with (
        pytest.raises(ValueError, match=r"expected \[layers, top_k\] \[6, 4\], got \[5, 4\]"),
        replay_experts(teacher, torch.zeros(1, 4, 5, 4, dtype=torch.int64)),
    ):
        pass


def test_rollouts_have_a_row_for_every_token_that_was_computed() -> None:
    short, long = make_rollout(4, 3), make_rollout(6, 5)
    batch = make_batch([short, long])
    assert batch.experts is not None
    assert batch.experts.shape == (2, 10, LAYERS, TOP_K)
    assert (batch.experts[0, :6] == 0).all()
    assert (batch.experts[0, 6:] == UNKNOWN).all()
    assert make_batch([short, replace(long, experts=None)]).experts is None
    with pytest.raises(RolloutError, match=r"expected \[10, 6, 4\], got \[9, 6, 4\]"):
        make_batch([short, replace(long, experts=np.zeros((9, LAYERS, TOP_K), np.uint8))])


def plant_ties(folder: Path) -> Path:
    """Make a teacher whose experts score alike in threes, but for what fp32 rounds away: other experts, though."""
    shutil.copytree(TOY / "teacher", folder)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in weights.items():
        if name.endswith(("mlp.gate.weight", "e_score_correction_bias")):
            alike = tensor.float()[torch.arange(EXPERTS) // ALIKE * ALIKE]
            noise = torch.randn(alike.shape, generator=generator) * 1e-8 * (name.endswith("weight"))
            weights[name] = alike + noise
    save_file(
        {name: tensor.float() for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return folder


@pytest.mark.vllm
@pytest.mark.parametrize("draft", [None, TOY / "dflash"], ids=["plain", "drafted"])
def test_ties_make_no_difference_where_the_engines_experts_are_replayed(tmp_path: Path, draft: Path | None) -> None:
    folder = plant_ties(tmp_path / "planted")
    engine = EngineConfig(
        model=str(folder),
        draft=None if draft is None else str(draft),
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=16,
        return_routed_experts=True,
        extra_args=("--max-num-batched-tokens", "96"),
    )
    prompts = [json.loads(line)["prompt"] for line in (TOY / "prompts.jsonl").read_text().splitlines()[:6]]
    with open_service(engine, tmp_path / "engine.log", lambda _line: None) as service:
        asked = sample_groups(service.base_url, service.model_name, prompts, group=4, max_tokens=24)
        groups = asyncio.run(asked)
    batches = [make_batch(group) for group in groups]
    trainer = load(folder)

    def find_largest(replayed: bool) -> tuple[float, int]:
        mismatch, rerouted = TrainerMismatch(), 0
        for batch in batches:
            assert batch.experts is not None
            given: RolloutBatch = batch if replayed else replace(batch, experts=None)
            with watch_routers(trainer) as routers, replay_experts(trainer, given.experts) as replay:
                logprobs = find_logprobs(trainer, batch.tokens)
            mismatch.add(logprobs, batch, routers.find_tied(batch))
            rerouted += 0 if replay.rerouted is None else int(replay.rerouted.sum())
        assert mismatch.tied_tokens == sum(int(batch.sampled.sum()) for batch in batches), "every token is behind a tie"
        return mismatch.tied_nats, rerouted

    without, _ = find_largest(False)
    with_replay, rerouted = find_largest(True)
    assert without > 0.05
    assert with_replay < 1e-3
    assert rerouted > 20
