"""Does prefix caching cost a DFlash drafter its acceptance? Measured cold, warm, in chunks, in groups and preempted.

Every scenario runs on engines started here; acceptance lengths come from vLLM's counters, intervals from the chunks of
each request. DIR gets prefix_cache.json, prefix_cache.md and the engines' logs; the last stdout line is one JSON object
(schema laguna_serve.prefix_cache/1). What is sent and why: prefix_traffic.py.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from laguna_serve.bench.harness.arms import Arm, ArmSpec, check_specs, open_arm
from laguna_serve.bench.harness.prompts import load_prompts
from laguna_serve.bench.prefix.report import render_markdown, render_text
from laguna_serve.bench.prefix.traffic import (
    REFERENCE,
    Comparison,
    EngineSetting,
    Scenario,
    Traffic,
    plan_second_turn,
    plan_traffic,
)
from laguna_serve.bench.stats.intervals import RoundPair, bootstrap_speedup, pool_speedup
from laguna_serve.serving.client.completions import Client, open_session
from laguna_serve.serving.client.counters import Counters, scrape_counters, settle_counters, summarise_acceptance
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.client.records import Record
from laguna_serve.serving.engine import EngineConfig
from laguna_serve.serving.kit.cli import FELL_SHORT, HELD, INTERRUPTED, Parser, add_json_flag, print_result, run_command
from laguna_serve.serving.kit.environment import current_argv, describe_environment
from laguna_serve.serving.kit.files import write_json, write_text
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.speculation.flags import parse_gamma

SCHEMA = "laguna_serve.prefix_cache/1"
# Acceptance "falls" when even the upper end of the interval of the ratio is below this.
FALLS_BELOW = 0.95
# Chunks of a stream and vLLM's counters must tell about the same acceptance, or intervals from chunks mean nothing.
# The last chunk is cut off at max_tokens, where the counters still see what was accepted: some per cent at 10 steps.
AGREEMENT = 0.1
EXAMPLES = """
examples:
  python bench/prefix_cache.py --model tests/toy/teacher --draft tests/toy/dflash \\
      --prompts tests/toy/prompts.jsonl --out out/prefix
  python bench/prefix_cache.py --model tests/toy/teacher --draft tests/toy/dflash-speculators --quick \\
      --prompts tests/toy/prompts.jsonl --out out/prefix

exit status:
  0    held: acceptance falls nowhere
  1    fell short: it falls somewhere, or a scenario could not be provoked
  2    could not run: bad input, or an engine did not start
  130  interrupted: what was measured is reported and marked partial
"""


@dataclass(slots=True)
class Outcome:
    """What a scenario did: a record for every request, and how the counters moved."""

    scenario: Scenario
    records: list[Record]
    moved: Counters

    @property
    def steps(self) -> list[tuple[int, int]]:
        """Of every request the tokens that came in steps after the first, and these steps. One chunk is one step."""
        return [(sum(r.chunk_tokens[1:]), len(r.chunk_tokens) - 1) for r in self.records]

    @property
    def chunk_length(self) -> float:
        """Tokens per step by the chunks."""
        tokens, steps = sum(t for t, _ in self.steps), sum(s for _, s in self.steps)
        return tokens / max(1, steps)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    args = parse_args(argv)
    return run_command("prefix_cache.py", lambda: run(args), measures=True, interrupted="nothing was measured")


def run(args: argparse.Namespace) -> int:
    """Send the traffic, compare, write the result and print it. Returns the exit status."""
    outcomes: dict[str, Outcome] = {}
    interrupted = False
    progress = Progress()
    prompts, characters = load_prompts(Path(args.prompts)), (args.characters, 2 * args.characters)
    traffic = plan_traffic(prompts, args.num_prompts, characters, args.small_blocks, args.block_size)
    check_specs(make_spec(args, setting) for setting in traffic.engines)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    environment = describe_environment(current_argv())
    try:
        run_engines(args, traffic, out, progress, outcomes)
    except KeyboardInterrupt:
        if not outcomes:
            raise
        interrupted = True
        progress.say("interrupted: reporting what was measured")
    result = assemble(args, environment, outcomes, traffic.comparisons, interrupted)
    write_json(out / "prefix_cache.json", result)
    write_text(out / "prefix_cache.md", render_markdown(result))
    line = {**result, "scenarios": f"{len(outcomes)}, in the file"}
    print_result(render_text(result), line, out, always_json=args.json)
    if interrupted:
        return INTERRUPTED
    return HELD if all(comparison["verdict"] == "holds" for comparison in result["comparisons"]) else FELL_SHORT


def run_engines(
    args: argparse.Namespace, traffic: Traffic, out: Path, progress: Progress, outcomes: dict[str, Outcome]
) -> None:
    """Start one engine after the other and send each its scenarios; outcomes are filed as they come."""
    for setting in traffic.engines:
        scenarios = [scenario for scenario in traffic.scenarios if scenario.engine == setting.name]
        with open_arm(make_spec(args, setting), out, progress.say) as arm:
            asyncio.run(_run_scenarios(args, arm, setting, scenarios, traffic, progress, outcomes))


async def _run_scenarios(
    args: argparse.Namespace,
    arm: Arm,
    setting: EngineSetting,
    scenarios: list[Scenario],
    traffic: Traffic,
    progress: Progress,
    outcomes: dict[str, Outcome],
) -> None:
    async with open_session() as session:

        async def send(scenario: Scenario) -> None:
            progress.say(f"{scenario.name}: {len(scenario.prompts)} requests")
            before = await scrape_counters(session, arm.base_url)
            records: list[Record] = []
            sampling = {"temperature": 1.0} if scenario.sampled else None
            client = Client(session, arm.base_url, arm.model_name or "", args.max_tokens, sampling)
            for prompts in scenario.rounds:
                records += await client.run_round(prompts)
            failed = next((record.error for record in records if record.error is not None), None)
            if failed is not None:
                arm.check()
                raise EndpointError(f"{scenario.name}: a request failed: {failed}")
            tokens = sum(len(record.token_ids) for record in records)
            after = await settle_counters(session, arm.base_url, before, tokens)
            outcomes[scenario.name] = Outcome(scenario, records, after.since(before))

        for scenario in scenarios:
            await send(scenario)
        if setting.name in (REFERENCE, "caching"):
            answers = {record.prompt_id: record.text for record in outcomes["prompts"].records}
            await send(plan_second_turn(traffic.shorts, answers, setting.name))


def make_spec(args: argparse.Namespace, setting: EngineSetting) -> ArmSpec:
    """The engine of a setting; its name is its log's, too."""
    config = EngineConfig(
        model=args.model,
        draft=args.draft,
        gamma=args.gamma,
        dtype=args.dtype,
        enforce_eager=not args.compiled,
        prefix_caching=setting.prefix_caching,
        seed=args.seed,
        extra_args=setting.extra_args,
    )
    return ArmSpec(setting.name.replace(", ", "-").replace(" ", "-"), setting.name, config=config)


def assemble(
    args: argparse.Namespace,
    environment: dict[str, Any],
    outcomes: dict[str, Outcome],
    comparisons: Sequence[Comparison],
    interrupted: bool,
) -> dict[str, Any]:
    """The result object. Comparisons whose scenarios were not reached are left out of a partial result."""
    reached = [c for c in comparisons if c.scenario in outcomes and c.against in outcomes]
    return {
        "schema": SCHEMA,
        "environment": environment,
        "model": args.model,
        "draft": args.draft,
        "max_tokens": args.max_tokens,
        "partial": interrupted,
        "comparisons": [compare(c, outcomes[c.scenario], outcomes[c.against], args.seed) for c in reached],
        "scenarios": [describe(outcome) for outcome in outcomes.values()],
    }


def describe(outcome: Outcome) -> dict[str, Any]:
    """One scenario: acceptance by the counters and by the chunks, hits, preemptions."""
    acceptance, moved = summarise_acceptance(outcome.moved), outcome.moved
    return {
        "name": outcome.scenario.name,
        "engine": outcome.scenario.engine,
        "requests": len(outcome.records),
        "prompt_tokens": moved.prompt_tokens,
        "acceptance": None if acceptance is None else acceptance.length,
        "drafts": moved.drafts,
        "per_position": None if acceptance is None else acceptance.per_position,
        "tokens_per_chunk": outcome.chunk_length,
        "hit_rate": moved.prefix_cache_hits / moved.prefix_cache_queries if moved.prefix_cache_queries else 0.0,
        "preemptions": moved.preemptions,
    }


def compare(comparison: Comparison, outcome: Outcome, against: Outcome, seed: int) -> dict[str, Any]:
    """The ratio of acceptance lengths with its interval, and the verdict.

    Pairs are prompts, of a greedy group all copies together, as they say the same; sampled copies are draws of their
    own. The tokens after the first chunk stand for a rate's numerator, the steps for its seconds.
    """
    samples = (side.steps if side.scenario.sampled else _by_prompt(side) for side in (against, outcome))
    sides = zip(*samples, strict=True)
    pairs = [RoundPair(b, float(b_steps), a, float(a_steps)) for (b, b_steps), (a, a_steps) in sides]
    low, high = bootstrap_speedup(pairs, seed)
    here, there = (summarise_acceptance(side.moved) for side in (outcome, against))
    ratio = None if here is None or there is None else here.length / there.length
    differing = sum(a.token_ids != b.token_ids for a, b in zip(outcome.records, against.records, strict=True))
    provoked = comparison.provoked_by is None or getattr(outcome.moved, comparison.provoked_by) > 0
    by_chunks = pool_speedup(pairs)
    agrees = ratio is not None and abs(by_chunks / ratio - 1) <= AGREEMENT
    verdict = "holds" if high >= FALLS_BELOW else "falls"
    if not provoked:
        verdict = f"not provoked: {comparison.provoked_by} stayed 0"
    elif not agrees:
        verdict = f"withheld: chunks say {by_chunks:.3f}, vLLM's counters {ratio}"
    return {
        **asdict(comparison),
        "ratio": ratio,
        "ratio_by_chunks": by_chunks,
        "ci95": [low, high],
        "pairs": len(pairs),
        "differing": None if outcome.scenario.sampled else differing,
        "verdict": verdict,
    }


def _by_prompt(outcome: Outcome) -> list[tuple[int, int]]:
    """Tokens and steps of every prompt; the copies in a group count together."""
    by_prompt: dict[str, list[int]] = {}
    for prompt, (tokens, steps) in zip(outcome.scenario.prompts, outcome.steps, strict=True):
        sums = by_prompt.setdefault(prompt.text, [0, 0])
        sums[0] += tokens
        sums[1] += steps
    return [(tokens, steps) for tokens, steps in by_prompt.values()]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and complete the command line; argparse exits with status 2 on a bad one."""
    parser = Parser(
        prog="bench/prefix_cache.py",
        description=__doc__,
        epilog=EXAMPLES,
    )
    parser.add_argument("--model", metavar="M", required=True, help="target checkpoint, folder or hub id")
    parser.add_argument("--draft", metavar="D", required=True, help="DFlash drafter checkpoint")
    gamma = "tokens drafted per step, N or max (default: the drafter's most)"
    parser.add_argument("--gamma", metavar="N", type=parse_gamma, help=gamma)
    parser.add_argument("--prompts", metavar="FILE", required=True, help='JSONL, one {"prompt": "…"} per line')
    parser.add_argument("--num-prompts", metavar="N", type=int, help="joined prompts (default: 24)")
    characters = "least length of a prompt, twice that of a long one; stay where the drafter is good (%(default)s)"
    parser.add_argument("--characters", metavar="N", type=int, default=320, help=characters)
    parser.add_argument("--max-tokens", metavar="N", type=int, help="output tokens per request (default: 96)")
    parser.add_argument("--block-size", metavar="N", type=int, default=32, help="tokens in a KV block (%(default)s)")
    blocks = "KV blocks of the small cache, in which not all prompts fit together (default: %(default)s)"
    parser.add_argument("--small-blocks", metavar="N", type=int, default=64, help=blocks)
    parser.add_argument("--dtype", default="auto", help="vLLM's --dtype (default: the checkpoint's)")
    parser.add_argument("--compiled", action="store_true", help="compile the model: slower to start five engines")
    parser.add_argument("--seed", type=int, default=0, help="bootstrap and engines (default: 0)")
    parser.add_argument("--quick", action="store_true", help="8 prompts × 48 tokens, unless given")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for the result files")
    add_json_flag(parser)
    args = parser.parse_args(argv)
    for name, value in {"num_prompts": 8 if args.quick else 24, "max_tokens": 48 if args.quick else 96}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, least in {"num_prompts": 4, "max_tokens": 8, "block_size": 1, "small_blocks": 1}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(args, name)}")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
