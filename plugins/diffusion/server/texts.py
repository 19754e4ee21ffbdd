"""Texts and ids: prompts, chats by the checkpoint's template, and answers as they grow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jinja2
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from laguna_serve.plugins.diffusion.errors import DiffusionError
from laguna_serve.plugins.diffusion.server.bodies import ChatMessage

# What bytes decode to that are no whole character, or not yet.
INCOMPLETE = "�"
# The bytes that the characters of a byte-level vocabulary stand for.
BYTES = {mark: byte for byte, mark in bytes_to_unicode().items()}


class Texts:
    """The tokenizer of a checkpoint."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer

    @property
    def chats(self) -> bool:
        """Whether there is a chat template."""
        return self._tokenizer.chat_template is not None

    @property
    def end_ids(self) -> list[int]:
        """The tokenizer's own end of a text, if it names one."""
        end = self._tokenizer.eos_token_id
        return [] if end is None else [int(end)]

    def find_ids(self, token: str) -> list[int]:
        """Find a token by its text: its id, or nothing."""
        found = self._tokenizer.get_vocab().get(token)
        return [] if found is None else [int(found)]

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Encode a text, by default with what the tokenizer puts around it."""
        return list(self._tokenizer.encode(text, add_special_tokens=special))

    def render_chat(
        self, messages: Sequence[ChatMessage], *, prompt_for_answer: bool, kwargs: Mapping[str, object]
    ) -> list[int]:
        """Render a chat by the checkpoint's template.

        Raises:
            DiffusionError: there is no template, it refuses the messages, or the client brings its own, which could
                run for hours.
        """
        if not self.chats:
            raise DiffusionError(
                "messages: expected a model with a chat template, got one without; ask /v1/completions"
            )
        if "chat_template" in kwargs:
            raise DiffusionError("chat_template_kwargs: expected no chat_template, got one; the model's own is used")
        options = {**kwargs, "tokenize": False, "add_generation_prompt": prompt_for_answer}
        plain = [message.model_dump(exclude_unset=True) | {"content": message.text} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(plain, **options)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise DiffusionError(f"messages: expected what the chat template takes, got {error}") from None
        return self.encode(str(text), special=False)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Decode ids to a text."""
        return str(
            self._tokenizer.decode(list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        )

    def find_bytes(self, token: int) -> bytes:
        """Find the bytes of a token, also of one that is half a character where the vocabulary is one of bytes."""
        text = self.decode([token], skip_special=False)
        name = self.list_tokens([token])[0]
        if INCOMPLETE not in text or not all(mark in BYTES for mark in name):
            return text.encode()
        return bytes(BYTES[mark] for mark in name)

    def list_tokens(self, ids: Sequence[int]) -> list[str]:
        """List the texts of single tokens as the vocabulary has them."""
        return [str(token) for token in self._tokenizer.convert_ids_to_tokens(list(ids))]


class TextStream:
    """An answer's text as its tokens come: no half characters, and nothing of what may become a stop string.

    What it gives in all depends on the tokens alone, not on how many came together.

    Attributes:
        tokens: so many belong to the answer, that of a stop string included.
        stopped: the stop string that ended it.
    """

    def __init__(self, texts: Texts, stops: Sequence[str] = (), *, skip_special: bool = True) -> None:
        self._texts, self._stops, self._skip_special = texts, tuple(stops), skip_special
        self._ids: list[int] = []
        self._sent = 0
        self.tokens = 0
        self.stopped: str | None = None

    def push(self, ids: Sequence[int], *, last: bool = False, unspoken: int = 0) -> str:
        """Give the text that can be given now, after these ids; the rest of it where they are the `last`.

        Args:
            ids: new ones.
            last: no more will come.
            unspoken: so many of the last ids say nothing, such as the one that ended the answer.
        """
        assert self.stopped is None, "an answer that has ended"
        spoken = len(ids) - unspoken
        self._ids += ids[:spoken]
        found = self._find_stop(spoken) if self._stops else None
        self.tokens = len(self._ids) + (0 if found is not None else unspoken)
        text = self._decode(len(self._ids)) if found is None else found
        if found is None and not last:
            text = text.rstrip(INCOMPLETE)
            text = text[: max(0, len(text) - max(map(len, self._stops), default=1) + 1)]
        new = text[self._sent :]
        self._sent = max(self._sent, len(text))
        return new

    def _find_stop(self, new: int) -> str | None:
        """Find the first token with which a stop string is there, and the text before that string."""
        for count in range(len(self._ids) - new + 1, len(self._ids) + 1):
            text = self._decode(count)
            places = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
            if places:
                at, self.stopped = min(places, key=lambda place: place[0])
                del self._ids[count:]
                return text[:at]
        return None

    def _decode(self, count: int) -> str:
        return self._texts.decode(self._ids[:count], skip_special=self._skip_special)
