"""Everything a client can send, to an engine with a drafter or without: does it live, and answer as its API says?

Every parameter of every route with every value of a list, alone (bench/fuzzing/values.py), and in between batches of
unlike requests drawn from a hypothesis strategy, streamed and not, some of whose clients leave.  After each batch
/health must answer 200 and a greedy request give the tokens that it gave at the start.  What is wrong is cut down to
the smallest batch that still shows it; after a death the run goes on with a new engine, and with `--resume` where an
earlier run into the same folder stopped.  The parameters come from the engine's own /openapi.json.

OUT/fuzz.json has every finding, OUT/sent.jsonl all requests in order.  The last stdout line is one JSON object (schema
laguna_serve.fuzz/1).  Needs hypothesis: the locked environments have it, for others it is the extra `fuzz`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from laguna_serve.bench.fuzzing.client import Answer, ask_control, check_batch, open_session
from laguna_serve.bench.fuzzing.minimise import minimise
from laguna_serve.bench.fuzzing.requests import Request, draw_batches, list_parameters, list_singles
from laguna_serve.serving.chat.vendor_defaults import ChatOptions
from laguna_serve.serving.engine import Engine, EngineConfig, EngineError
from laguna_serve.serving.engine.log import find_cause, read_log
from laguna_serve.serving.kit.cli import FELL_SHORT, HELD, Parser, add_json_flag, print_result, run_command
from laguna_serve.serving.kit.environment import current_argv, describe_environment
from laguna_serve.serving.kit.files import write_json
from laguna_serve.serving.kit.progress import Progress

SCHEMA = "laguna_serve.fuzz/1"
SINGLES_TOGETHER, BATCHES_PER_ROUND, REPORT_EVERY = 8, 50, 50
# Tokens that one step computes at most: longer prompts are cut.
STEP_TOKENS = 256
# How often a finding is tried again while it is cut down: each death costs the start of an engine.
MOST_ATTEMPTS = 14
KIND_CHARS = 160
EXAMPLES = """
examples:
  python bench/fuzz.py --model tests/toy/teacher --draft tests/toy/dflash --minutes 20 --seed 1 --out out/fuzz-drafter
  python bench/fuzz.py --model tests/toy/teacher --minutes 20 --out out/fuzz --resume

exit status: 0 nothing found, 1 something found, 2 could not run, 130 interrupted (what was found until then is written)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    args = parse_args(argv)
    return run_command("fuzz.py", lambda: run(args), interrupted="--resume continues")


def run(args: argparse.Namespace) -> int:
    """Send requests until the time is over; what was found by then is written. Returns the exit status."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    fuzz = Fuzz(args, out, Progress())
    try:
        asyncio.run(fuzz.run())
    finally:
        fuzz.close()
        result = fuzz.report()
    text = f"{result['requests']:,} requests in {result['minutes']:.1f} min: {len(result['findings'])} findings"
    line = {key: value for key, value in result.items() if key != "statuses"}
    print_result(text, line, out, always_json=args.json)
    return FELL_SHORT if result["findings"] else HELD


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = Parser(
        prog="fuzz.py", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="checkpoint folder or hub id")
    parser.add_argument("--draft", help="DFlash drafter")
    parser.add_argument(
        "--minutes", type=float, default=20.0, help="how long requests are sent, starts of engines counted"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the drawn batches")
    parser.add_argument("--out", required=True, help="folder for the results")
    add_json_flag(parser)
    parser.add_argument("--resume", action="store_true", help="go on where a run into the same folder stopped")
    return parser.parse_args(argv)


class Fuzz:
    """One run: the engine, what was sent, and what was found."""

    def __init__(self, args: argparse.Namespace, out: Path, progress: Progress) -> None:
        self._args, self._out, self._progress = args, out, progress
        self._engine: Engine | None = None
        self._control: list[int] = []
        self._totals: dict[str, Any] = {"batches": 0, "requests": 0, "starts": 0, "minutes": 0.0}
        self._findings: list[dict[str, Any]] = []
        self._statuses: Counter[str] = Counter()
        self._environment = describe_environment(current_argv())
        if args.resume and (out / "fuzz.json").exists():
            earlier = json.loads((out / "fuzz.json").read_text(encoding="utf-8"))
            self._totals = {key: earlier[key] for key in self._totals}
            self._findings = earlier["findings"]
            self._statuses.update(earlier["statuses"])
        else:
            (out / "sent.jsonl").write_text("", encoding="utf-8")

    async def run(self) -> None:
        """Send until the time is over."""
        began, before = time.monotonic(), self._totals["minutes"]
        engine = await self._start()
        async with open_session() as session, session.get(engine.base_url + "/openapi.json") as response:
            parameters = list_parameters(await response.json())
        for batch in self._list_batches(parameters, engine.model_name):
            await self._try(batch)
            self._totals["batches"] += 1
            self._totals["minutes"] = before + (time.monotonic() - began) / 60
            if self._totals["batches"] % REPORT_EVERY == 0:
                self.report()
            if time.monotonic() - began > 60 * self._args.minutes:
                return

    def report(self) -> dict[str, Any]:
        """Write what is known so far; the same, JSON-ready."""
        result = {
            "schema": SCHEMA,
            "environment": self._environment,
            "engine": {"model": self._args.model, "draft": self._args.draft, "seed": self._args.seed},
            **self._totals,
            "deaths": sum(finding["died"] for finding in self._findings),
            "findings": self._findings,
            "statuses": dict(sorted(self._statuses.items())),
        }
        write_json(self._out / "fuzz.json", result)
        totals = self._totals
        self._progress.say(
            f"{totals['batches']} batches, {totals['requests']} requests, {len(self._findings)} findings,"
            f" {totals['minutes']:.1f} min"
        )
        return result

    def close(self) -> None:
        """Take the engine down."""
        if self._engine is not None:
            self._engine.stop()
            self._engine = None

    def _list_batches(self, parameters: dict[str, dict[str, Any]], model: str) -> Iterator[list[Request]]:
        """Parameters alone, in an order drawn by seed, and drawn batches between; from where an earlier run stopped."""
        singles = list_singles(parameters, model)
        random.Random(self._args.seed).shuffle(singles)
        alone = (singles[start : start + SINGLES_TOGETHER] for start in range(0, len(singles), SINGLES_TOGETHER))

        def draw() -> Iterator[list[Request]]:
            for seed_value in count(self._args.seed * 1_000_003):
                yield from draw_batches(parameters, model, seed_value=seed_value, count=BATCHES_PER_ROUND)

        drawn = draw()
        mixed = chain(chain.from_iterable(zip(alone, drawn, strict=False)), drawn)
        return islice(mixed, self._totals["batches"], None)

    async def _start(self) -> Engine:
        """The engine, started if it is not running."""
        if self._engine is not None:
            return self._engine
        config = EngineConfig(
            model=self._args.model,
            draft=self._args.draft,
            dtype="float32",
            enforce_eager=True,
            max_num_seqs=16,
            chat=ChatOptions(),
            extra_args=("--max-num-batched-tokens", str(STEP_TOKENS)),
        )
        engine = Engine(config, log_path=self._out / f"engine-{self._totals['starts']}.log")
        self._engine = await asyncio.to_thread(engine.__enter__)
        self._totals["starts"] += 1
        async with open_session() as session:
            tokens = await ask_control(session, engine.base_url, engine.model_name)
        if tokens is None:
            raise EngineError(f"engine {engine.model_name}: expected an answer to the control request, got none")
        self._control = tokens
        return self._engine

    async def _send(self, batch: list[Request]) -> tuple[list[Answer], list[str], bool]:
        """Answers, what is wrong, and whether the engine died; it is not replaced here."""
        engine = await self._start()
        async with open_session() as session:
            answers, wrong = await check_batch(session, engine.base_url, engine.model_name, batch, self._control)
        died = bool(wrong) and wrong[0].startswith("death")
        if died:
            self.close()
            wrong.insert(0, f"death: {find_cause(read_log(engine.log_path))}")
        return answers, wrong, died

    async def _try(self, batch: list[Request]) -> None:
        with (self._out / "sent.jsonl").open("a", encoding="utf-8") as sent:
            sent.writelines(json.dumps(request.as_dict()) + "\n" for request in batch)
        answers, wrong, died = await self._send(batch)
        self._totals["requests"] += len(batch)
        self._statuses.update(
            f"{request.route} {answer.status or 'none'}" for request, answer in zip(batch, answers, strict=True)
        )
        if not wrong:
            return
        kind = normalise(wrong[0])
        known = next((finding for finding in self._findings if finding["kind"] == kind), None)
        if known is not None:
            known["seen"] += 1
            return

        async def persists(smaller: list[Request]) -> bool:
            return any(normalise(line) == kind for line in (await self._send(smaller))[1])

        smallest = await minimise(batch, persists, most=MOST_ATTEMPTS)
        requests = [request.as_dict() for request in smallest]
        self._findings.append({"kind": kind, "wrong": wrong, "died": died, "seen": 1, "requests": requests})
        self._progress.say(f"found: {wrong[0][:300]}\n  with {str(requests)[:600]}")
        self.report()


def normalise(wrong: str) -> str:
    """What is wrong without the numbers in it, so that it is reported once."""
    return re.sub(r"\d+", "#", wrong)[:KIND_CHARS]


if __name__ == "__main__":
    sys.exit(main())
