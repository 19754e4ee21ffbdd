"""What a run keeps as it comes, so that the same command continues: prompts as token ids, answers, times, losses.

A reference's answers lie in a folder of its own, so that another reference may be added later, and the losses on them
beside them, in a file for each judge: whoever removes the folder removes what was said of its answers, too.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from laguna_serve.serving.kit.journal import Journal, KeyedJournal


class ReadPrompt(msgspec.Struct, frozen=True):
    """A prompt as the baseline's engine read it.

    Attributes:
        prompt_ids: what every reference is sent; the end of what was read where that was too long (`is_cut`).
        plain_ids: its text without special tokens, uncut, by which tokenizers are compared.
    """

    id: str
    prompt_ids: tuple[int, ...]
    plain_ids: tuple[int, ...]
    is_cut: bool


class Answer(msgspec.Struct, frozen=True):
    """A reference's answer to a prompt: the token that ends it is among the ids, and not in the text.

    `ended`: by itself, before the length that was allowed.
    """

    id: str
    token_ids: tuple[int, ...]
    text: str
    ended: bool


class Stretch(msgspec.Struct, frozen=True):
    """One stretch of asking that came to its end; `steps` is None where the engine counts none."""

    answers: int
    tokens: int
    steps: int | None
    seconds: float


class Loss(msgspec.Struct, frozen=True):
    """The judge's loss on an answer, summed over its tokens; `context`: tokens of the prompt that it read before."""

    id: str
    nats: float
    tokens: int
    context: int


KeptPrompts = KeyedJournal[str, ReadPrompt]
KeptLosses = KeyedJournal[str, Loss]


class KeptAnswers(KeyedJournal[str, Answer]):
    """A reference's answers; `stretches`: how long they took."""

    def __init__(self, folder: Path) -> None:
        """Read those that are there. Raises JournalError."""
        super().__init__(folder / "answers.jsonl", Answer, lambda answer: answer.id)
        self._stretches = Journal(folder / "stretches.jsonl", Stretch)

    @property
    def stretches(self) -> list[Stretch]:
        """Every stretch of asking that came to its end."""
        return self._stretches.entries

    def add_stretch(self, stretch: Stretch) -> None:
        """File what a stretch took."""
        self._stretches.append(stretch)
