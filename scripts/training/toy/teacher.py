"""Train the toy teacher: a real Laguna mixture of experts, small enough for two cores.

Every trait of Laguna XS.2 that serving code must get right is there: a dense first layer, sigmoid routing with a
selection-only bias (balanced as in arXiv:2408.15664, so that the bias is not zero), a routed scale of 2.5, a shared
expert, full and sliding attention with different head counts, a softplus output gate and QK-norm.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LagunaConfig, LagunaForCausalLM, PreTrainedTokenizerFast

from laguna_serve.scripts.text.corpus import Module, conversation, functions
from laguna_serve.scripts.training.loop import Schedule, train
from laguna_serve.scripts.training.toy import tokenizer as vocabulary

SEQUENCE = 384
ROWS = 6
CHAT_SHARE = 0.25
SYSTEM_SHARE = 0.2
BIAS_STEP = 1e-3
SCHEDULE = Schedule(steps=1200, peak_lr=3e-3)


def teacher_config() -> LagunaConfig:
    """Six layers, hidden 160, 16 experts of 128 (eight blocks of 16) with 4 active: 6.2 M parameters."""
    return LagunaConfig(
        architectures=["LagunaForCausalLM"],
        vocab_size=vocabulary.VOCAB_SIZE,
        hidden_size=160,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_attention_heads_per_layer=[6, 8, 8, 8, 6, 8],
        num_key_value_heads=2,
        head_dim=32,
        layer_types=["full_attention", *["sliding_attention"] * 3, "full_attention", "sliding_attention"],
        sliding_window=128,
        mlp_layer_types=["dense", *["sparse"] * 5],
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
        num_experts=16,
        num_experts_per_tok=4,
        moe_routed_scaling_factor=2.5,
        router_aux_loss_coef=0.0,
        max_position_embeddings=2048,
        bos_token_id=vocabulary.BOS,
        eos_token_id=[vocabulary.EOS, vocabulary.END],
        pad_token_id=vocabulary.PAD,
    )


class ToyRows:
    """Training rows [ROWS, SEQUENCE] int64: code from the start of a line, or chats one after the other."""

    def __init__(self, modules: list[Module], tokenizer: PreTrainedTokenizerFast) -> None:
        texts = [tokenizer(m.text, add_special_tokens=False, verbose=False)["input_ids"] for m in modules]
        self.code = torch.tensor([i for ids in texts for i in [*ids, vocabulary.EOS]])
        newlines = {i for token, i in tokenizer.get_vocab().items() if "Ċ" in token}
        ends = torch.isin(self.code, torch.tensor(sorted(newlines)))
        self.line_starts = torch.nonzero(ends[: -SEQUENCE - 1]).flatten() + 1
        rng = random.Random(0)
        chats = [conversation(f, system=rng.random() < SYSTEM_SHARE) for m in modules for f in functions(m)]
        self.chats: list[list[int]] = [tokenizer.apply_chat_template(c, return_dict=False) for c in chats]

    def batch(self, seed: int, step: int) -> torch.Tensor:
        rng = random.Random(f"{seed}/{step}")
        return torch.stack([self._row(rng) for _ in range(ROWS)])

    def _row(self, rng: random.Random) -> torch.Tensor:
        return self._chat_row(rng) if rng.random() < CHAT_SHARE else self._code_row(rng)

    def _code_row(self, rng: random.Random) -> torch.Tensor:
        start = int(self.line_starts[rng.randrange(len(self.line_starts))])
        return torch.cat([torch.tensor([vocabulary.BOS]), self.code[start : start + SEQUENCE - 1]])

    def _chat_row(self, rng: random.Random) -> torch.Tensor:
        row: list[int] = []
        while len(row) < SEQUENCE:
            row += rng.choice(self.chats)
        return torch.tensor(row[:SEQUENCE])


def balance_experts(model: LagunaForCausalLM) -> Callable[[], dict[str, float]]:
    """Watch the routers; the function returned moves each selection bias towards an even load.

    It reports the busiest expert's load as a multiple of the mean.
    """
    loads: dict[Any, torch.Tensor] = {}
    routers = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]

    def count(router: Any, _inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
        loads[router] = torch.bincount(output[2].flatten(), minlength=router.num_experts).float()

    for router in routers:
        router.register_forward_hook(count)

    @torch.no_grad()
    def update() -> dict[str, float]:
        for router in routers:
            router.e_score_correction_bias += BIAS_STEP * torch.sign(loads[router].mean() - loads[router])
        return {"busiest": max(float(load.max() / load.mean()) for load in loads.values())}

    return update


def train_teacher(
    modules: list[Module], tokenizer: PreTrainedTokenizerFast, seed: int, steps: int | None, state_file: Path
) -> tuple[LagunaForCausalLM, list[dict[str, float]]]:
    """Train from scratch; returns the model in fp32 and the training log."""
    torch.manual_seed(seed)
    model = LagunaForCausalLM(teacher_config())
    rows = ToyRows(modules, tokenizer)
    update_bias = balance_experts(model)

    def loss_of_step(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        batch = rows.batch(seed, step)
        loss = model(input_ids=batch, labels=batch).loss
        return loss, update_bias()

    schedule = Schedule(steps or SCHEDULE.steps, SCHEDULE.peak_lr, SCHEDULE.weight_decay)
    log = train("teacher", model, schedule, loss_of_step, state_file)
    return model, log


@torch.no_grad()
def held_out_loss(model: LagunaForCausalLM, modules: list[Module], tokenizer: PreTrainedTokenizerFast) -> float:
    """Mean next-token loss in nats on the start of every held-out module."""
    model.eval()
    total, count = 0.0, 0
    for module in modules:
        ids = torch.tensor([tokenizer(module.text)["input_ids"][:SEQUENCE]])
        total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count
