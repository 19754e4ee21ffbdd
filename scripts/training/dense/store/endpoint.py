"""The teacher's top K from a vLLM server: the log-probabilities of prompts.

A server gives no more than its `--max-logprobs` (20 unless it was started with more) and never the whole vocabulary in
reasonable time; the tail is what the K log-probabilities leave of 1.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any

import torch

from laguna_serve.scripts.training.dense.losses import Top
from laguna_serve.scripts.training.dense.store.format import StoreError
from laguna_serve.scripts.training.dense.targets import Batch
from laguna_serve.serving.client.completions import Client, find_model_name, open_session
from laguna_serve.serving.client.errors import EndpointError


class EndpointTeacher:
    """Asks for the rows of a batch at once; a context manager, whose connections end with it.

    Attributes:
        name: of the model there.

    Raises:
        EndpointError: nobody answers there, or not as a server of models does.
    """

    def __init__(self, url: str, model: str | None, k: int) -> None:
        self._url, self._k = url, k
        self._loop = asyncio.new_event_loop()
        self._session = self._loop.run_until_complete(_open())
        try:
            self.name = model or self._loop.run_until_complete(find_model_name(self._session, url))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> EndpointTeacher:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End its connections and its loop; it cannot be asked any more."""
        self._loop.run_until_complete(self._session.close())
        self._loop.close()

    def answer(self, _number: int, batch: Batch) -> list[Top]:
        """Ask for a batch: the top K at the predicted places of each row.

        Raises:
            EndpointError: a request failed. StoreError: a place has fewer than K tokens.
        """
        client = Client(self._session, self._url, self.name, max_tokens=1)

        async def ask() -> list[Any]:
            return await asyncio.gather(*(client.score_top(row, self._k) for row in batch.ids.tolist()))

        try:
            answers = self._loop.run_until_complete(ask())
        except EndpointError as error:
            raise EndpointError(f"{self._url}: {error}; start it with --max-logprobs {self._k}") from error
        return [self._keep(steps, row) for steps, row in zip(answers, batch.predicted.tolist(), strict=True)]

    def _keep(self, steps: list[dict[int, float]], predicted: list[bool]) -> Top:
        kept = [step for step, wanted in zip(steps, predicted, strict=True) if wanted]
        if any(len(step) != self._k for step in kept):
            got = min(len(step) for step in kept)
            raise StoreError(f"{self._url}: expected {self._k} log-probabilities a token, got {got}; lower --top-k")
        ids = torch.tensor([sorted(step, key=step.__getitem__, reverse=True) for step in kept]).view(-1, self._k)
        logprobs = torch.tensor([sorted(step.values(), reverse=True) for step in kept]).view(-1, self._k)
        left = 1 - logprobs.double().exp().sum(-1)
        # Rounding may leave less than nothing.
        return Top(ids.long(), logprobs, left.clamp(min=0).log().float())


async def _open() -> Any:
    return open_session()
