"""Log-probabilities of an answer's tokens, as completions and as chats have them.

A token's is that of the step that committed it, with all that was committed by then in sight on both sides: not of
what is left of it alone, as an autoregressive model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from laguna_serve.plugins.diffusion.decoding.likelihoods import Likelihood
from laguna_serve.plugins.diffusion.server.texts import Texts
from laguna_serve.plugins.diffusion.server.writing.forms import ChatLogprobs, CompletionLogprobs, TokenLogprob


@dataclass(frozen=True, slots=True)
class LogprobWriter:
    """Writes them. `by_id`: tokens are named "token_id:7", as their texts need not be unlike each other."""

    texts: Texts
    by_id: bool

    def write_completion(
        self, ids: Sequence[int], likelihoods: Sequence[Likelihood], offset: int
    ) -> CompletionLogprobs:
        """Write those of new tokens; the first one's text begins `offset` characters into the answer."""
        form = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
        for token, likelihood in zip(ids, likelihoods, strict=True):
            name = self._name(token)
            form.text_offset.append(offset)
            form.token_logprobs.append(likelihood.value)
            form.tokens.append(name)
            listed: dict[str, float] = {name: likelihood.value}
            for each, value in likelihood.top:
                listed.setdefault(self._name(each), value)
            form.top_logprobs.append(listed)
            offset += len(self._spell(token))
        return form

    def write_chat(self, ids: Sequence[int], likelihoods: Sequence[Likelihood]) -> ChatLogprobs:
        """Write those of new tokens."""
        return ChatLogprobs(
            content=[
                self._describe(token, likelihood.value, [self._describe(*each) for each in likelihood.top])
                for token, likelihood in zip(ids, likelihoods, strict=True)
            ]
        )

    def measure(self, ids: Sequence[int]) -> int:
        """Count the characters of tokens one by one, by which offsets advance."""
        return sum(len(self._spell(token)) for token in ids)

    def _describe(self, token: int, value: float, top: list[TokenLogprob] | None = None) -> TokenLogprob:
        form = TokenLogprob(token=self._name(token), logprob=value, bytes=list(self.texts.find_bytes(token)))
        if top is not None:
            form.top_logprobs = top
        return form

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self.by_id else self._spell(token)

    def _spell(self, token: int) -> str:
        return self.texts.decode([token], skip_special=False)
