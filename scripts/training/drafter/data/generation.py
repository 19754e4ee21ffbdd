"""The target's own answers, asked of an OpenAI endpoint that returns token ids, and kept as recorded traffic.

Every answer is in the file when the next one is asked for, so that an interruption loses what was in flight alone. A
request has a seed of its own, worked out of the run's: the same command asks the same again.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import msgspec

from laguna_serve.scripts.training.drafter.data.records import Prompt, hash_prompt
from laguna_serve.serving.client.closed_loop import run_closed_loop
from laguna_serve.serving.client.completions import find_model_name, find_root, open_session
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.client.sampling import PLAIN_SAMPLING
from laguna_serve.serving.client.traffic import TrafficRecord
from laguna_serve.serving.engine import Engine, EngineConfig
from laguna_serve.serving.kit.journal import Journal
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import JsonObject

# What an overloaded or restarting endpoint gets before it is an error.
PAUSES_S = (1.0, 5.0, 20.0)
KEY_VARIABLE = "OPENAI_API_KEY"

Key = tuple[Prompt, float, int]


@dataclass(frozen=True, slots=True)
class Ask:
    """One answer that is wanted."""

    prompt: Prompt
    temperature: float
    seed: int

    @property
    def key(self) -> Key:
        """What the answer is found by again."""
        return self.prompt, self.temperature, self.seed


@dataclass(frozen=True, slots=True)
class Asking:
    """How answers are asked for: `max_tokens` of each, past its end token with `ignore_eos`."""

    max_tokens: int
    ignore_eos: bool
    concurrency: int


def list_asks(prompts: Sequence[Prompt], temperatures: Sequence[float], samples: int, seed: int) -> list[Ask]:
    """List what is to be asked: `samples` answers per prompt and temperature, one at temperature 0."""
    return [
        Ask(prompt, temperature, _derive(seed, prompt, temperature, number))
        for prompt in prompts
        for temperature in temperatures
        for number in range(samples if temperature > 0 else 1)
    ]


def _derive(seed: int, prompt: Prompt, temperature: float, number: int) -> int:
    text = f"{seed}/{hash_prompt(prompt)}/{temperature!r}/{number}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1


def find_missing(asks: Sequence[Ask], journal: Journal[TrafficRecord]) -> list[Ask]:
    """Find what the journal lacks."""
    have = {_read_key(record) for record in journal.entries}
    return [ask for ask in asks if ask.key not in have]


def collect(asks: Sequence[Ask], journal: Journal[TrafficRecord]) -> list[TrafficRecord]:
    """Collect the answers in the order of the asks, whatever the order in which they came."""
    answers = {_read_key(record): record for record in journal.entries}
    return [answers[ask.key] for ask in asks]


def _read_key(record: TrafficRecord) -> Key:
    return tuple(record.prompt_token_ids), record.temperature, record.seed or 0


def open_journal(path: Path, progress: Progress) -> Journal[TrafficRecord]:
    """Open what was generated so far."""
    return Journal(path, TrafficRecord, progress.say)


def generate(
    asks: Sequence[Ask],
    how: Asking,
    journal: Journal[TrafficRecord],
    base_url: str,
    model: str | None,
    progress: Progress,
) -> None:
    """Ask for what is missing; every answer goes into the journal.

    Raises:
        EndpointError: the endpoint does not answer, or returns no token ids.
    """
    missing = find_missing(asks, journal)
    if missing:
        asyncio.run(_generate(missing, how, journal, find_root(base_url), model, progress))


def generate_with_engine(
    asks: Sequence[Ask], how: Asking, path: Path, target: Path, *, eager: bool, longest: int | None = None
) -> list[TrafficRecord]:
    """Ask an engine that is started for it, unless nothing is missing; all answers, in the order of the asks.

    Args:
        path: the journal, beside which the engine's log is written.
        target: the model's folder.
        eager: start without compiling.
        longest: sequence that the model takes; None: no limit.

    Raises:
        EngineError: the engine does not start; else as `generate`.
    """
    progress = Progress()
    journal = open_journal(path, progress)
    missing = find_missing(asks, journal)
    if missing:
        wanted = max(len(ask.prompt) for ask in missing) + how.max_tokens
        config = EngineConfig(
            model=str(target),
            max_num_seqs=how.concurrency,
            max_model_len=wanted if longest is None else min(wanted, longest),
            enforce_eager=eager,
            served_model_name="target",
        )
        with Engine(config, log_path=path.with_name("engine.log"), announce=progress.say) as engine:
            generate(asks, how, journal, engine.base_url, engine.model_name, progress)
    return collect(asks, journal)


async def _generate(
    asks: Sequence[Ask],
    how: Asking,
    journal: Journal[TrafficRecord],
    root: str,
    model: str | None,
    progress: Progress,
) -> None:
    key = os.environ.get(KEY_VARIABLE)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    progress.begin()
    done = 0
    async with open_session() as session:
        name = model or await find_model_name(session, root)

        async def work(ask: Ask) -> None:
            nonlocal done
            body = {
                **PLAIN_SAMPLING,
                "model": name,
                "prompt": list(ask.prompt),
                "max_tokens": how.max_tokens,
                "temperature": ask.temperature,
                "seed": ask.seed,
                "ignore_eos": how.ignore_eos,
                "return_token_ids": True,
            }
            answer = await _post(session, f"{root}/v1/completions", body, headers)
            journal.append(_read_answer(ask, answer, root))
            done += 1
            progress.step("generated", done, len(asks))

        await run_closed_loop(asks, how.concurrency, work)


async def _post(session: aiohttp.ClientSession, url: str, body: JsonObject, headers: dict[str, str]) -> JsonObject:
    for pause in (*PAUSES_S, None):
        try:
            async with session.post(url, json=body, headers=headers) as response:
                if response.status == 200:
                    answer: JsonObject = await response.json()
                    return answer
                error = f"HTTP {response.status}: {(await response.text(errors='replace'))[:200]}"
                final = response.status < 500 and response.status != 429
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as caught:
            error, final = f"{type(caught).__name__}: {caught}", False
        if pause is None or final:
            break
        await asyncio.sleep(pause)
    raise EndpointError(f"{url}: expected an answer, got {error}; what came so far is kept")


def _read_answer(ask: Ask, answer: JsonObject, root: str) -> TrafficRecord:
    try:
        tokens = answer["choices"][0]["token_ids"]
        record = {"prompt_token_ids": list(ask.prompt), "token_ids": tokens, "temperature": ask.temperature}
        return msgspec.convert(record | {"seed": ask.seed}, TrafficRecord)
    except (KeyError, IndexError, TypeError, msgspec.ValidationError):
        expected = "token_ids in its answers (vLLM's return_token_ids)"
        raise EndpointError(f"{root}: expected {expected}, got none; ask an engine of vLLM's, or the gateway") from None
