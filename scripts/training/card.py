"""A model card from a training run: what was made, from what, how, what was measured, how to use it, what is not known.

The front matter is Hugging Face's (`huggingface_hub.ModelCardData`), so that a hub takes the folder as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCardData

from laguna_serve.serving.checkpoint import name_checkpoint
from laguna_serve.serving.kit.environment import Environment
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.tables import Table

# A card without this line is somebody's own, and stays.
MARK = "<!-- written by the training command; a card without this line is left as it is -->"


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What a card says.

    Attributes:
        base: the model's folder or hub id that this one was made from; its card's licence is taken over.
        sections: heading → Markdown.
        figures: file beside the card → what it shows; those that are not there are left out.
    """

    title: str
    summary: str
    base: str
    tags: Sequence[str]
    sections: Mapping[str, str]
    environment: Environment
    figures: Mapping[str, str] = field(default_factory=dict)


def write_card(card: Card, folder: Path) -> bool:
    """Write README.md into a checkpoint's folder, unless somebody's own is there; say whether it was written."""
    path = folder / "README.md"
    if path.exists() and MARK not in path.read_text(encoding="utf-8"):
        return False
    write_text(path, format_card(card, folder))
    return True


def format_card(card: Card, folder: Path) -> str:
    """Format the card, with the figures that lie in the folder."""
    data = ModelCardData(
        base_model=name_checkpoint(card.base),
        license=read_license(card.base),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(card.tags),
    )
    parts = [f"# {card.title}", MARK, card.summary]
    parts += [f"## {heading}\n\n{text}" for heading, text in card.sections.items()]
    shown = [f"![{text}]({name})" for name, text in card.figures.items() if (folder / name).exists()]
    if shown:
        parts.append("## Curves\n\n" + "\n\n".join(shown))
    parts.append("## How it was made\n\n" + describe_environment(card.environment))
    body = "\n\n".join(parts)
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"


def describe_environment(environment: Environment) -> str:
    """Describe the machine, the versions and the command."""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(environment.versions.items()))
    where = f"{environment.date[:10]}, {environment.device_name}, {environment.cores} cores"
    return f"{where}; {versions or 'versions unknown'}.\n\n```sh\n{environment.command}\n```"


def format_figures(figures: Mapping[str, Mapping[str, float]]) -> str:
    """Format measured figures as a table: a column for each time of measuring, a row for each figure."""
    names = list(dict.fromkeys(name for measured in figures.values() for name in measured))
    rows = [
        (name.replace("_", " "), *(f"{m[name]:.4f}" if name in m else "" for m in figures.values())) for name in names
    ]
    heads = ("", *(when.replace("_", " ").replace("stage", "stage ") for when in figures))
    return Table("l" + "r" * len(figures), heads, rows).to_markdown()


def read_license(base: str) -> str | None:
    """Read the licence in the front matter of the card in a model's folder; None where none is stated."""
    path = Path(base) / "README.md"
    parts = path.read_text(encoding="utf-8").split("---\n", 2) if path.is_file() else []
    stated = re.search(r"^license: *([\w.-]+) *$", parts[1], re.MULTILINE) if len(parts) == 3 and not parts[0] else None
    return stated[1] if stated else None
