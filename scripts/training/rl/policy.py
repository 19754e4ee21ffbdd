"""The policy of a GRPO run: log-probabilities, the loss, and versions written as checkpoints.

Group-relative policy optimisation (arXiv:2402.03300) without a critic: a completion's advantage is its reward against
the other completions of its prompt.  The ratio is clipped as in PPO (arXiv:1707.06347); its denominator is what the
engine said when it sampled, so that a policy that is not the one that sampled is accounted for, and seen.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LagunaForCausalLM, PreTrainedTokenizerBase

from laguna_serve.scripts.training.rl.rollouts import Rollout

CLIP = 0.2
SPREAD_FLOOR = 1e-3  # a group whose rewards are all equal teaches nothing, and must not divide by zero


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """Rollouts as tensors, padded on the right: tokens [B, L] int64.

    Of every token but the first whether it was sampled, its log-probability in the engine, and its completion's
    advantage, each [B, L − 1].
    """

    tokens: torch.Tensor
    sampled: torch.Tensor
    behaviour: torch.Tensor
    advantages: torch.Tensor


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
    return RolloutBatch(tokens, sampled, behaviour, advantages)


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


def find_loss(logprobs: torch.Tensor, batch: RolloutBatch) -> torch.Tensor:
    """Compute the clipped objective, negated: sum over all sampled tokens."""
    ratio = (logprobs - batch.behaviour).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    gain = torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
    return -gain[batch.sampled].sum()


def write_version(model: LagunaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, str]:
    """Write a checkpoint that can be served and transferred; SHA-256 by file.

    An earlier folder of that name is replaced.
    """
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}
