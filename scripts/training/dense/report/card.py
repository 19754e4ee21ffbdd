"""The dense student's model card."""

from __future__ import annotations

from pathlib import Path

from msgspec import UnsetType

from laguna_serve.scripts.training.card import Card, format_figures
from laguna_serve.scripts.training.dense.report.result import DistillResult
from laguna_serve.serving.checkpoint import name_checkpoint
from laguna_serve.serving.kit.tables import Table

SUMMARY = """A dense student of {base}, a mixture of experts: every sparse block is replaced by one SwiGLU of the width
that a token takes there, {true:,} parameters instead of {teacher:,}. Stored zero-padded to one width for all layers
({stored:,} parameters) as stock Laguna, which changes no output; `laguna serve` loads it at its true widths."""

USE = """```sh
laguna serve {name}                              # at its true widths
laguna unpad {name} --out {name}-narrow          # stored so; laguna pad goes back
laguna drafter train {name} --prompts prompts.jsonl --out {name}-drafter    # a DFlash drafter for it
```

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```"""

LIMITS = """- It was measured on text ({held_out_text}) and conversations ({held_out_chats}) alone. No benchmark was
  run: those of `evals/` decide what it is good for.
- What its teacher gets wrong it has learned, too. It was taught {tokens:,} tokens in stage 2, the assistant's and all
  others, of {chats}."""

FIGURES = {
    "stage1_nmse.png": "Stage 1: normalised error of every block",
    "stage2_kl.png": "Stage 2: KL to the teacher",
    "stage2_held_out.png": "Stage 2 on held-out conversations: KL, entropies, answers that stop",
}


def describe_student(result: DistillResult, folder: Path) -> Card:
    """Describe a student from its result; `folder` is where it was written."""
    base, recipe, parameters = name_checkpoint(result.teacher), result.recipe, result.parameters
    tokens = int(recipe["stage2_steps"]) * int(recipe["rows"]) * int(recipe["length"])
    widths = sorted(set(result.widths))
    shown = [(name.replace("_", " "), str(value)) for name, value in recipe.items()]
    shown += [("widths × layers", ", ".join(f"{width} × {result.widths.count(width)}" for width in widths))]
    shown += [(f"{stage}, minutes", f"{minutes:g}") for stage, minutes in result.minutes.items()]
    if not isinstance(result.store, UnsetType):
        kept = f"the {result.store.top_k} likeliest tokens, {result.store.tail_mass:.2g} of the mass not among them"
        shown.append(("teacher's logits", kept))
    return Card(
        title=folder.resolve().name,
        summary=SUMMARY.format(base=base, **parameters),
        base=result.teacher,
        tags=("laguna", "distillation", "moe-to-dense", "code"),
        sections={
            "Figures": f"{format_figures(result.measured)}\n\nLosses, KL and entropies in nats per token.",
            "Use": USE.format(name=folder.resolve().name),
            "Recipe": Table("lr", ("", ""), shown).to_markdown(),
            "What is not known": LIMITS.format(
                tokens=tokens,
                chats=recipe.get("chats", "conversations"),
                held_out_text=recipe.get("held_out_text", "held out"),
                held_out_chats=recipe.get("held_out_chats", "held out"),
            ),
        },
        environment=result.environment,
        figures=FIGURES,
    )
