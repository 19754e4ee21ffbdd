"""Compares this client's tok/s with that of vLLM's own serving benchmark, on the same endpoint and prompts.

Both send the same prompts in the same order, greedy, to the same length, with the same number in flight, and both
figures are output tokens ÷ the time from the first request sent to the last answer ended: that is what vLLM's
`output_throughput` divides by (`benchmark_duration` in vllm/benchmarks/serve.py, which excludes its test request and
warm-up). They are interleaved; the medians are compared. At concurrency 1 this is bench/ab.py's tok/s but for the
fraction of a millisecond that a client needs between two requests.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from laguna_serve.bench.harness.prompts import load_texts, split_prompts
from laguna_serve.bench.rate_check.clients import CrosscheckConfig, measure_both
from laguna_serve.bench.rate_check.result import CLIENT, VLLM, CrosscheckResult, render_text
from laguna_serve.serving.checkpoint import find_folder
from laguna_serve.serving.kit.cli import FELL_SHORT, HELD
from laguna_serve.serving.kit.command import Command
from laguna_serve.serving.kit.results import write_indented
from laguna_serve.serving.kit.run_dir import check_out_file

__all__ = ["CrosscheckConfig", "CrosscheckResult", "crosscheck", "main"]
MARK = 0.05
WARMUP_PROMPTS = 4
DESCRIPTION = "Compare this client's tok/s with vLLM's own serving benchmark on one running endpoint."
EXAMPLES = """
example: python bench/crosscheck.py --url http://127.0.0.1:8000 --model tests/toy/teacher \\
    --prompts tests/toy/prompts.jsonl --num-prompts 64

The endpoint must run with prefix caching off: laguna serve tests/toy/teacher --no-prefix-caching
Exit status: 0 within 5%, 1 outside, 2 could not run, 130 interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 within the mark, 1 outside it, 2 if it could not run, 130 if interrupted."""
    command = Command("bench/crosscheck.py", CrosscheckConfig, DESCRIPTION, EXAMPLES, measures=True)
    return command.run(argv, crosscheck, show=render_text, judge=lambda result: HELD if result.held else FELL_SHORT)


def crosscheck(config: CrosscheckConfig) -> CrosscheckResult:
    """Warm up, then alternate both clients; written to `config.out`, if that is given.

    Raises:
        RunDirError: `config.out` cannot be a file.
        CheckpointError: the model is neither a folder nor a hub id.
        PromptsError: the prompts file cannot be used.
        EndpointError, CrosscheckError: a side failed, or the prefix cache helped whoever came second.
    """
    if config.out is not None:
        check_out_file(config.out)
    find_folder(config.model)
    prompts, warmup = split_prompts(load_texts(config.prompts), config.num_prompts, WARMUP_PROMPTS)
    with tempfile.TemporaryDirectory() as folder:
        rates = measure_both(config, prompts, warmup, Path(folder))
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
        write_indented(config.out, result)
    return result


if __name__ == "__main__":
    raise SystemExit(main())
