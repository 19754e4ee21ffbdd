"""The toy's student before it is taught: SmolLM3's shape, with a tokenizer of its own, trained on plain text.

Every trait that serving must get right is there: grouped queries, no rotary positions in every fourth layer, tied
embeddings.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast, SmolLM3Config, SmolLM3ForCausalLM

from laguna_serve.scripts.checkpoints.output import save_checkpoint
from laguna_serve.scripts.text.corpus import Module, conversation, functions
from laguna_serve.scripts.training.loop import Schedule, train
from laguna_serve.scripts.training.toy import tokenizer as vocabulary

VOCAB_SIZE = 1024
SEQUENCE = 256
ROWS = 8
PEAK_LR = 3e-3


def student_config() -> SmolLM3Config:
    """Four layers, hidden 128, one of them without rotary positions: 0.9 M parameters."""
    return SmolLM3Config(
        architectures=["SmolLM3ForCausalLM"],
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        no_rope_layer_interval=4,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        use_sliding_window=False,
        bos_token_id=vocabulary.BOS,
        eos_token_id=vocabulary.END,
        pad_token_id=vocabulary.PAD,
        dtype="float32",
    )


def make_student(modules: list[Module], out: Path, steps: int, seed: int, threads: int) -> None:
    """Train tokenizer and model on modules, and write both; the state beside `out` lets it continue."""
    tokenizer = vocabulary.train_tokenizer(modules, VOCAB_SIZE)
    torch.manual_seed(seed)
    model = SmolLM3ForCausalLM(student_config()).train()
    text = cut_rows(modules, tokenizer)

    def loss_of_step(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = random.Random(f"{seed}/{step}")
        starts = [rng.randrange(len(text) - SEQUENCE) for _ in range(ROWS)]
        rows = torch.stack([text[start : start + SEQUENCE] for start in starts])
        logits = model(input_ids=rows).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()), {}

    state = out.with_name(f"{out.name}.state")
    out.parent.mkdir(parents=True, exist_ok=True)
    train("student", model, Schedule(steps, PEAK_LR), loss_of_step, state, threads=threads)

    def save(folder: Path) -> None:
        model.eval().save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    save_checkpoint(out, save)
    state.unlink()


def cut_rows(modules: list[Module], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Encode modules one after the other [n] int64, then chats about their functions, as the teacher has seen both."""
    texts = [[*tokenizer(module.text, verbose=False)["input_ids"], vocabulary.EOS] for module in modules]
    chats = [conversation(function) for module in modules for function in functions(module)]
    texts += [tokenizer.apply_chat_template(chat, return_dict=False) for chat in chats]
    return torch.tensor([token for ids in texts for token in ids])
