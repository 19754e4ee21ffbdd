"""OpenAI's own client against an endpoint: answers as token ids, latencies, and a closed loop of streams."""

from __future__ import annotations

import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import openai

from laguna_serve.bench.cluster.result import Agreement, Latency

TIMEOUT_S = 300.0
AT_ONCE = 4
# Streams before those that are measured.
WARM_UP = 2


@dataclass(frozen=True)
class Answer:
    """An answer's token ids, and what its headers say of who gave it."""

    tokens: tuple[int, ...]
    replica: str
    version: str


@dataclass(frozen=True)
class Ended:
    """A request of a closed loop: when it began and ended (`time.monotonic`), its events, and how it failed."""

    begun_s: float
    ended_s: float
    events: int
    error: str | None


class Asker:
    """Asks one model greedily, for a fixed number of tokens, without retries of the client's own."""

    def __init__(self, url: str, model: str, max_tokens: int) -> None:
        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S)
        self._model, self._max_tokens = model, max_tokens

    def ask(self, prompt: str) -> Answer:
        """Ask for one answer. Raises openai.OpenAIError."""
        raw = self._client.completions.with_raw_response.create(
            model=self._model,
            prompt=prompt,
            max_tokens=self._max_tokens,
            temperature=0.0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        choice = raw.parse().choices[0].model_dump()
        said = raw.headers
        return Answer(tuple(choice["token_ids"]), said.get("x-replica", ""), said.get("x-weight-version", ""))

    def ask_all(self, prompts: Sequence[str]) -> list[Answer]:
        """Ask for all of them, a few at once."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(self.ask, prompts))

    def stream(self, prompt: str) -> tuple[float, float, int]:
        """Stream one answer: seconds to the first event, of all of it, and its events. Raises openai.OpenAIError."""
        started, first_s, events = time.monotonic(), 0.0, 0
        try:
            for _ in self._client.completions.create(
                model=self._model,
                prompt=prompt,
                max_tokens=self._max_tokens,
                temperature=0.0,
                stream=True,
                extra_body={"ignore_eos": True},
            ):
                first_s = first_s or time.monotonic() - started
                events += 1
        except openai.OpenAIError as error:
            raise StreamError(f"{type(error).__name__}: {error}", events) from error
        return first_s, time.monotonic() - started, events

    def measure(self, prompts: Sequence[str]) -> Latency:
        """Stream answers one after the other, after a few that are not counted."""
        for prompt in prompts[:WARM_UP]:
            self.stream(prompt)
        taken = [self.stream(prompt) for prompt in prompts]
        first, whole = (statistics.median(one[i] for one in taken) * 1e3 for i in (0, 1))
        return Latency(requests=len(taken), first_event_ms=round(first, 2), whole_ms=round(whole, 2))


class StreamError(Exception):
    """A stream that failed after so many `events`."""

    def __init__(self, cause: str, events: int) -> None:
        super().__init__(cause)
        self.events = events


@dataclass
class Loop:
    """Clients that stream one answer after the other until `stop`, as a context manager."""

    asker: Asker
    prompts: Sequence[str]
    clients: int
    ended: list[Ended] = field(default_factory=list)

    def __enter__(self) -> Loop:
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, enough: Callable[[Sequence[Ended]], bool], limit_s: float) -> None:
        """Wait until what has ended is enough, at most so long."""
        deadline = time.monotonic() + limit_s
        while not enough(self.ended) and time.monotonic() < deadline:
            time.sleep(0.05)

    def _run(self, number: int) -> None:
        turn = number
        while not self._stopped.is_set():
            begun, error = time.monotonic(), None
            try:
                _, _, events = self.asker.stream(self.prompts[turn % len(self.prompts)])
            except StreamError as broken:
                events, error = broken.events, str(broken)[:300]
            self.ended.append(Ended(begun, time.monotonic(), events, error))
            turn += self.clients


def compare(answers: Sequence[Answer], expected: Mapping[str, tuple[int, ...]], prompts: Sequence[str]) -> Agreement:
    """Compare answers with one engine's, prompt by prompt."""
    differing = sum(answer.tokens != expected[prompt] for answer, prompt in zip(answers, prompts, strict=True))
    counts = Counter(answer.replica for answer in answers)
    return Agreement(prompts=len(prompts), differing=differing, by_replica=dict(sorted(counts.items())))
