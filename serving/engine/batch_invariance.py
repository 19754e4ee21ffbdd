"""`laguna serve --exact`: greedy output that depends on the prompt alone, and the check that it does so here.

A row of a matrix product may round otherwise beside other rows. That is how batching, chunked prefill and
speculation (γ + 1 rows verified at once) come to change greedy output. Exact serving asks the engine for kernels whose
rows do not depend on the batch (planning/command.py), and then does not take its word for it: the running engine
answers prompts alone, all together, and once more through prefill, and every token and every bit of every
log-probability must be the same, or the engine is not served.

What it cannot show is equality with an engine of another build, dtype or compile mode; bench/certify.py compares two.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from laguna_serve.serving.kit.results import JsonObject
from laguna_serve.serving.machine.local_http import OK, ask_engine

PROMPTS = tuple(
    f"def step_{lines}(value, limit={lines}):\n" + "".join(f"    value = value * {n} + limit\n" for n in range(lines))
    for lines in range(1, 9)
)
COPIES = 2
TOKENS = 24
TIMEOUT_S = 300.0


class ExactError(RuntimeError):
    """An engine whose greedy output depends on more than the prompt; one line."""


@dataclass(frozen=True, slots=True)
class _Answer:
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    top: tuple[Mapping[str, float], ...]


def check_exact(base_url: str, model_name: str, api_key: str | None = None) -> int:
    """Compare answers alone, together and through prefill, to the bit. Returns how many tokens were compared.

    Raises:
        ExactError: some differ; or the engine did not answer.
    """
    server = _Server(base_url, model_name, api_key)
    alone = [server.complete(prompt) for prompt in PROMPTS]
    crowd = [*range(len(PROMPTS))] * COPIES
    with ThreadPoolExecutor(len(crowd)) as pool:
        together = list(pool.map(lambda index: server.complete(PROMPTS[index]), crowd))
    for index, answer in zip(crowd, together, strict=True):
        _compare(alone[index], answer, f"among {len(crowd)} requests")
    for answer in alone:
        _compare_prefilled(answer, server.prefill(answer))
    return TOKENS * (len(crowd) + len(PROMPTS))


def _compare(alone: _Answer, again: _Answer, how: str) -> None:
    for index, (a, b) in enumerate(zip(alone.token_ids, again.token_ids, strict=True)):
        if a != b:
            raise ExactError(_explain(f"token {index} to be {a}, as alone, {how}, got {b}"))
    for index, (x, y) in enumerate(zip(alone.top, again.top, strict=True)):
        if x != y:
            raise ExactError(
                _explain(f"the log-probabilities of token {index}, {how}, to be those alone ({x}), got {y}")
            )


def _compare_prefilled(answer: _Answer, prefilled: Sequence[float]) -> None:
    for index, (token, step, value) in enumerate(zip(answer.token_ids, answer.top, prefilled, strict=True)):
        decoded = step[f"token_id:{token}"]
        if decoded != value:
            expected = f"the log-probability of token {index} to be the same decoded and prefilled ({decoded})"
            raise ExactError(_explain(f"{expected}, got {value}"))


def _explain(what: str) -> str:
    return f"--exact: expected {what}; the kernels here depend on the batch: serve without --exact"


@dataclass(frozen=True, slots=True)
class _Server:
    base_url: str
    model_name: str
    api_key: str | None

    def complete(self, prompt: str) -> _Answer:
        choice = self._post({"prompt": prompt, "max_tokens": TOKENS, "logprobs": 2})
        return _Answer(
            tuple(choice["prompt_token_ids"]), tuple(choice["token_ids"]), tuple(choice["logprobs"]["top_logprobs"])
        )

    def prefill(self, answer: _Answer) -> list[float]:
        """Return the log-probabilities of an answer's tokens when prompt and answer are read at once."""
        prompt = [*answer.prompt_ids, *answer.token_ids]
        choice = self._post({"prompt": prompt, "max_tokens": 1, "prompt_logprobs": 0})
        steps = choice["prompt_logprobs"][len(answer.prompt_ids) :]
        return [steps[i][str(token)]["logprob"] for i, token in enumerate(answer.token_ids)]

    def _post(self, body: JsonObject) -> JsonObject:
        body |= {"model": self.model_name, "temperature": 0, "ignore_eos": True}
        body |= {"return_token_ids": True, "return_tokens_as_token_ids": True}
        try:
            status, answer = ask_engine(
                self.base_url, "/v1/completions", body, method="POST", timeout_s=TIMEOUT_S, api_key=self.api_key
            )
            if status != OK:
                raise ConnectionError(f"HTTP {status}: {answer[:200].decode(errors='replace')}")
            choice: JsonObject = json.loads(answer)["choices"][0]
            return choice
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ExactError(f"--exact: expected the engine to answer the check, got {error}; see its log") from None
