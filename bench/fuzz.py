"""Sends an engine everything a client can, with a drafter or without: it must live, and answer as its API says.

Every parameter of every route with every value of a list, alone (fuzzing/values.py), and in between batches of unlike
requests drawn from a hypothesis strategy, streamed and not, some of whose clients leave. After each batch /health must
answer 200 and a greedy request give the tokens that it gave at the start. What is wrong is cut down to the smallest
batch that still shows it; after a death the run goes on with a new engine, and with `--resume` where an earlier run
into the same folder stopped. The parameters come from the engine's own /openapi.json.

OUT/fuzz.json has every finding, OUT/sent.jsonl all requests in order. The last stdout line is one JSON object (schema
laguna_serve.fuzz/1). Needs hypothesis: the locked environments have it, for others it is the extra `fuzz`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from laguna_serve.bench.fuzzing.options import FuzzConfig
from laguna_serve.bench.fuzzing.result import LINE, FuzzResult
from laguna_serve.bench.fuzzing.runner import Fuzz
from laguna_serve.serving.kit.cli import FELL_SHORT, HELD
from laguna_serve.serving.kit.command import Command
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.run_dir import hold_out
from laguna_serve.serving.planning.launch import check_launches

__all__ = ["FuzzConfig", "FuzzResult", "fuzz_engine", "main"]
EXAMPLES = """
examples:
  python bench/fuzz.py --model tests/toy/teacher --draft tests/toy/dflash --minutes 20 --seed 1 --out out/fuzz-drafter
  python bench/fuzz.py --model tests/toy/teacher --minutes 20 --out out/fuzz --resume

exit status: 0 nothing found, 1 something found, 2 could not run, 130 interrupted (what was found until then is written)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command = Command("bench/fuzz.py", FuzzConfig, __doc__, EXAMPLES, interrupted="--resume continues")
    return command.run(
        argv, fuzz_engine, show=render_text, line=LINE, judge=lambda result: FELL_SHORT if result.findings else HELD
    )


def render_text(result: FuzzResult) -> str:
    """Render the result in one line."""
    return f"{result.requests:,} requests in {result.minutes:.1f} min: {len(result.findings)} findings"


@hold_out
def fuzz_engine(config: FuzzConfig) -> FuzzResult:
    """Send requests until the time is over; fuzz.json and sent.jsonl are in `config.out` however it ends.

    Raises:
        RunDirError: `config.out` cannot be a folder, or another run writes there.
        EngineError: the engine cannot or did not start, or does not answer the control request.
        ResultError: the folder of a run to resume holds another file.
    """
    check_launches([config.make_engine()])
    fuzz = Fuzz(config, Progress())
    try:
        asyncio.run(fuzz.run())
    finally:
        fuzz.close()
        result = fuzz.report()
    return result


if __name__ == "__main__":
    raise SystemExit(main())
