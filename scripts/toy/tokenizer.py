"""A byte-level BPE tokenizer with a chat template, trained on the toy corpus."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from laguna_serve.scripts.toy.corpus import Module

VOCAB_SIZE = 512
PAD, BOS, EOS, MASK, END, ROLE_SYSTEM, ROLE_USER, ROLE_ASSISTANT = range(8)
SPECIAL = ["<pad>", "<s>", "</s>", "<mask>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]

# Each turn is <|role|>, a newline, the text, <|end|>, a newline.  The generation markers let trainers mask the loss.
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message.role not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('role: expected system, user or assistant, got ' ~ message.role) -}}"
    "{%- endif -%}"
    "{{- '<|' ~ message.role ~ '|>\n' -}}"
    "{%- if message.role == 'assistant' -%}"
    "{%- generation -%}{{- message.content ~ '<|end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message.content ~ '<|end|>' -}}{%- endif -%}"
    "{{- '\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}"
)


def train_tokenizer(modules: list[Module]) -> PreTrainedTokenizerFast:
    """Train on the given modules; `VOCAB_SIZE` ids, the special ones first in the order of `SPECIAL`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((m.text for m in modules), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|end|>",
        mask_token="<mask>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Read back what `save_pretrained` wrote."""
    return PreTrainedTokenizerFast.from_pretrained(folder)
