"""The policy of a GRPO run: log-probabilities, the loss, and versions written as checkpoints.

Group-relative policy optimisation (arXiv:2402.03300) without a critic: a completion's advantage is its reward against
the other completions of its prompt. Two ratios are kept apart (arXiv:2110.00641): how far steps have moved the policy
since it was first asked about these tokens, clipped as in PPO (arXiv:1707.06347), and how far that policy was from the
engine which sampled them, by which a token is weighed (off_policy/importance.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import LagunaForCausalLM, PreTrainedTokenizerBase

from laguna_serve.scripts.training.rl.off_policy.importance import Correction, keep_completions, weigh_tokens
from laguna_serve.scripts.training.rl.off_policy.replay import UNKNOWN
from laguna_serve.scripts.training.rl.rollouts import Rollout, RolloutError
from laguna_serve.serving.kit.files import explain_write, hash_file

CLIP = 0.2
SPREAD_FLOOR = 1e-3  # a group whose rewards are all equal teaches nothing, and must not divide by zero


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """Rollouts as tensors, padded on the right: tokens [B, L] int64.

    Of every token but the first whether it was sampled, its log-probability in the engine, and its completion's
    advantage, each [B, L − 1]. `experts` [B, L − 1, layers, top_k] int64: what the engine chose for every token but
    the last, UNKNOWN in the padding; None where a rollout does not say.
    """

    tokens: torch.Tensor
    sampled: torch.Tensor
    behaviour: torch.Tensor
    advantages: torch.Tensor
    experts: torch.Tensor | None = None


def make_batch(rollouts: Sequence[Rollout]) -> RolloutBatch:
    """Make a group, one row per rollout: they share their prompt, so that little is padded."""
    length = max(len(rollout.prompt_ids) + len(rollout.token_ids) for rollout in rollouts)
    tokens = torch.zeros(len(rollouts), length, dtype=torch.int64)
    sampled = torch.zeros(len(rollouts), length - 1, dtype=torch.bool)
    behaviour, advantages = torch.zeros(2, len(rollouts), length - 1)
    for row, (rollout, advantage) in enumerate(zip(rollouts, find_advantages(rollouts), strict=True)):
        start, end = len(rollout.prompt_ids), len(rollout.prompt_ids) + len(rollout.token_ids)
        tokens[row, :end] = torch.tensor([*rollout.prompt_ids, *rollout.token_ids])
        place = slice(start - 1, end - 1)  # position p predicts token p + 1
        sampled[row, place] = True
        behaviour[row, place] = torch.tensor(rollout.logprobs)
        advantages[row, place] = advantage
    return RolloutBatch(tokens, sampled, behaviour, advantages, pad_experts(rollouts, length - 1))


def pad_experts(rollouts: Sequence[Rollout], length: int) -> torch.Tensor | None:
    """Pad what rollouts say of their experts to [B, length, layers, top_k].

    Raises:
        RolloutError: not a row per token that was computed.
    """
    recorded = [rollout.experts for rollout in rollouts if rollout.experts is not None]
    if len(recorded) < len(rollouts):
        return None
    padded = torch.full((len(rollouts), length, *recorded[0].shape[1:]), UNKNOWN, dtype=torch.int64)
    for row, (rollout, experts) in enumerate(zip(rollouts, recorded, strict=True)):
        computed = len(rollout.prompt_ids) + len(rollout.token_ids) - 1
        if experts.shape != (computed, *padded.shape[2:]):
            expected = f"expected {[computed, *padded.shape[2:]]}"
            raise RolloutError(f"rollouts: routed experts: {expected}, got {list(experts.shape)}; see the engine's log")
        padded[row, :computed] = torch.from_numpy(experts.astype("int64"))
    return padded


def find_advantages(group: Sequence[Rollout]) -> list[float]:
    """(reward − mean of the group) ÷ standard deviation of the group, of every rollout."""
    rewards = torch.tensor([rollout.reward for rollout in group], dtype=torch.float64)
    advantages: list[float] = ((rewards - rewards.mean()) / (rewards.std(correction=0) + SPREAD_FLOOR)).tolist()
    return advantages


def find_logprobs(model: LagunaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """tokens [B, L] → log-probability (nats) of every token but the first, [B, L − 1] fp32.

    Rows are padded on the right and attention is causal: what is left of the padding does not see it.
    """
    logits = model(input_ids=tokens[:, :-1]).logits.float()
    chosen = logits.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    logprobs: torch.Tensor = chosen - logits.logsumexp(-1)
    return logprobs


@dataclass(frozen=True, slots=True)
class Loss:
    """`total`: the negated objective, summed over the tokens that count; of these `tokens`, at the cap `capped`.

    `dropped` completions were left out, their tokens too.
    """

    total: torch.Tensor
    tokens: int
    capped: int
    dropped: int


def find_loss(logprobs: torch.Tensor, before: torch.Tensor, batch: RolloutBatch, correction: Correction) -> Loss:
    """Compute the clipped objective of weighted tokens; `logprobs` and `before` [B, L − 1] in nats.

    Args:
        before: the trainer's before its first step on this batch.
    """
    ratio = (logprobs - before).exp()
    gain = torch.minimum(ratio * batch.advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * batch.advantages)
    weights = weigh_tokens(before, batch.behaviour, correction.cap)
    kept = keep_completions(before, batch.behaviour, batch.sampled, correction.bound)
    counted = batch.sampled & kept[:, None]
    return Loss(
        total=-(weights * gain)[counted].sum(),
        tokens=int(counted.sum()),
        capped=int((weights[counted] == correction.cap).sum()),
        dropped=int((~kept).sum()),
    )


def write_version(model: LagunaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, str]:
    """Write a checkpoint that can be served and transferred; SHA-256 by file.

    An earlier folder of that name is replaced.

    Raises:
        WriteError: the disk is full or refuses; nothing of the folder stays, which would look like a checkpoint.
    """
    shutil.rmtree(folder, ignore_errors=True)
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise explain_write(folder, error) from None
    return {path.name: hash_file(path) for path in folder.glob("*.safetensors")}
