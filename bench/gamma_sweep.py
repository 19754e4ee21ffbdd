"""How many tokens should a drafter propose here? Every γ at every concurrency, measured against plain decoding.

The baseline engine stays up for the whole sweep, a candidate engine is started per γ. What was measured is kept in
DIR/points: the same command continues after an interruption, and a γ that fails does not lose the others. DIR gets
sweep.json, sweep.md and sweep.png, and the schedule goes where `laguna serve --gamma auto` finds it; the last stdout
line is one JSON object (schema laguna_serve.gamma_sweep/1). How γ is chosen and predicted: gamma_model.py; what the
drafter's share of a step is: gamma_points.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from laguna_serve.bench.gamma.ablations import list_lever_specs, measure_levers, parse_lever
from laguna_serve.bench.gamma.cost_model import Point, choose_gamma, fit_costs, make_schedule
from laguna_serve.bench.gamma.mixed_load import compare_schedule
from laguna_serve.bench.gamma.points import make_spec, measure_point
from laguna_serve.bench.gamma.report import render_markdown, render_text
from laguna_serve.bench.harness.arm_options import parse_numbers
from laguna_serve.bench.harness.arms import check_specs, has_room_beside, open_arm
from laguna_serve.bench.harness.prompts import load_prompts
from laguna_serve.bench.harness.runner import MeasurementStoppedError
from laguna_serve.serving.checkpoint import CheckpointError, find_folder
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.engine import EngineError
from laguna_serve.serving.kit.cli import CONTINUES, FELL_SHORT, HELD, Parser, add_json_flag, print_result, run_command
from laguna_serve.serving.kit.environment import current_argv, describe_environment
from laguna_serve.serving.kit.files import write_json, write_text
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.run_dir import claim_folder, is_begun
from laguna_serve.serving.speculation.drafting import open_drafter
from laguna_serve.serving.speculation.gamma_store import Advice, store_advice

SCHEMA = "laguna_serve.gamma_sweep/1"
EXAMPLES = """
examples:
  python bench/gamma_sweep.py --model tests/toy/teacher --draft tests/toy/dflash \\
      --prompts tests/toy/prompts.jsonl --concurrency 1,4 --out out/sweep
  python bench/gamma_sweep.py --model MODEL --draft DRAFTER --gammas 3,5,7 --quick --prompts FILE --out DIR
  python bench/gamma_sweep.py --model tests/toy/teacher --draft tests/toy/dflash --concurrency 1,4 --mixed \\
      --stack fp8-kv prefix-caching chunked-prefill dense=tests/toy/dense \\
      --prompts tests/toy/prompts.jsonl --out out/sweep

then: laguna serve MODEL --draft DRAFTER --gamma auto

exit status:
  0    held: every γ was measured and no divergence is a defect
  1    fell short: a γ failed, or a divergence is a defect
  2    could not run: bad input, or the baseline did not start
  130  interrupted: the same command continues
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    args = parse_args(argv)
    return run_command("gamma_sweep.py", lambda: run(args), measures=True, interrupted=CONTINUES)


def run(args: argparse.Namespace) -> int:
    """Measure what is missing, choose γ, write the result and print it. Returns the exit status."""
    progress = Progress()
    gammas = choose_gammas(args)
    prompts = load_prompts(Path(args.prompts))
    if not is_begun(Path(args.out) / "points"):
        check_specs([*(make_spec(args, gamma) for gamma in (None, *gammas)), *list_lever_specs(args, max(gammas))])
    environment = describe_environment(current_argv())
    points = open_points(args, environment)
    failed = sweep(args, gammas, prompts, points, progress)
    entries = [entry for entry in read_points(points) if entry["gamma"] in gammas]
    if not entries:
        raise MeasurementStoppedError("no γ could be measured; see the logs beside the points")
    result = conclude(args, environment, entries, failed)
    try:
        extend(args, result, prompts, points, progress)
    finally:
        publish(result, Path(args.out), always_json=args.json)
    levers = result.get("stack", [])
    parities = [*(entry["parity"] for entry in entries), *(lever["parity"] for lever in levers if not lever["failed"])]
    defects = sum(parity["classes"]["defect"] for parity in parities)
    return FELL_SHORT if failed or defects or any(lever["failed"] for lever in levers) else HELD


def choose_gammas(args: argparse.Namespace) -> list[int]:
    """The γ to measure: those given, else 1 to the drafter's block − 1, of these three in a quick run.

    Raises:
        CheckpointError: the drafter cannot be read, or was not trained for one of them.
    """
    folder = find_folder(args.draft)
    if folder is None:
        if args.gammas is None:
            expected = "--gammas for a drafter that is not on this machine"
            raise CheckpointError(f"{args.draft}: expected {expected}, got none; pass them")
        return list(args.gammas)
    most = open_drafter(folder, args.draft).max_gamma
    default = sorted({1, (most + 1) // 2, most}) if args.quick else range(1, most + 1)
    gammas = list(args.gammas or default)
    if max(gammas) > most:
        raise CheckpointError(
            f"--gammas: expected at most {most}, the drafter's block − 1, got {max(gammas)}; lower it"
        )
    return gammas


def open_points(args: argparse.Namespace, environment: dict[str, Any]) -> Path:
    """The folder of finished measurements. Raises CheckpointError when it holds those of another sweep."""
    folder = Path(args.out) / "points"
    decisive = ("model", "draft", "prompts", "num_prompts", "max_tokens", "dtype", "eager", "seed")
    settings = {name: getattr(args, name) for name in decisive}
    settings |= {"versions": environment["versions"], "device": (environment["device"] or {}).get("name")}
    claim_folder(folder, settings)
    return folder


def read_points(folder: Path) -> list[dict[str, Any]]:
    """Every finished measurement, by γ and concurrency."""
    entries = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("gamma*-c*.json")]
    return sorted(entries, key=lambda entry: (entry["gamma"], entry["concurrency"]))


def sweep(
    args: argparse.Namespace, gammas: list[int], prompts: list[Prompt], points: Path, progress: Progress
) -> dict[int, str]:
    """Measure what is missing. Returns γ → what went wrong, for those that failed."""
    done = {(entry["gamma"], entry["concurrency"]) for entry in read_points(points)}
    missing = {gamma: [c for c in args.concurrency if (gamma, c) not in done] for gamma in gammas}
    missing = {gamma: concurrencies for gamma, concurrencies in missing.items() if concurrencies}
    if done:
        progress.say(f"continuing: {len(done)} points are there")
    failed: dict[int, str] = {}
    if not missing:
        return failed
    with ExitStack() as stack:
        baseline = stack.enter_context(open_arm(make_spec(args, None), points, progress.say))
        if not has_room_beside(baseline):
            raise EngineError("memory: expected room for two engines, got too little; pass a smaller --kv-cache-gib")
        for gamma, concurrencies in missing.items():
            try:
                with open_arm(make_spec(args, gamma), points, progress.say) as candidate:
                    for concurrency in concurrencies:
                        progress.say(f"γ {gamma}, concurrency {concurrency}")
                        entry = measure_point(args, gamma, concurrency, prompts, (baseline, candidate), progress)
                        write_json(points / f"gamma{gamma}-c{concurrency}.json", entry)
            except (EngineError, EndpointError, MeasurementStoppedError) as error:
                baseline.check()
                failed[gamma] = str(error)
                progress.say(f"γ {gamma} failed and is left out: {error}")
    return failed


def extend(
    args: argparse.Namespace, result: dict[str, Any], prompts: list[Prompt], points: Path, progress: Progress
) -> None:
    """Add what was asked for beyond the sweep: levers at γ*, and the schedule against the best single γ."""
    if args.stack:
        gamma = next(choice["gamma"] for choice in result["choices"] if choice["concurrency"] == args.concurrency[0])
        gamma = gamma or max(point["gamma"] for point in result["points"])  # γ* is plain decoding: show the most
        result["stack"] = measure_levers(args, gamma, prompts, points, progress)
    if args.mixed:
        schedule = result["schedule"]["num_speculative_tokens_per_batch_size"]
        result["mixed"] = compare_schedule(args, result["points"], schedule, prompts, points, progress)


def conclude(
    args: argparse.Namespace, environment: dict[str, Any], entries: list[dict[str, Any]], failed: dict[int, str]
) -> dict[str, Any]:
    """Choices, schedule and predictions; the schedule is stored for `laguna serve --gamma auto`."""
    by_concurrency: dict[int, list[Point]] = {}
    for entry in entries:
        by_concurrency.setdefault(entry["concurrency"], []).append(Point.from_json(entry))
    choices = [choose_gamma(points, args.seed) for points in by_concurrency.values()]
    models = {concurrency: fit_costs(points) for concurrency, points in by_concurrency.items()}
    for entry in entries:
        entry["predicted"] = models[entry["concurrency"]].speedup(entry["gamma"])
    schedule = make_schedule(choices)
    advice = Advice(args.model, args.draft, tuple(schedule), environment["date"])
    stored = store_advice(advice)
    return {
        "schema": SCHEMA,
        "environment": environment,
        "model": args.model,
        "draft": args.draft,
        "workload": {"prompts": args.prompts, "num_prompts": args.num_prompts, "max_tokens": args.max_tokens},
        "choices": [
            {"concurrency": choice.concurrency, "gamma": choice.gamma, "reason": choice.reason} for choice in choices
        ],
        "schedule": {"num_speculative_tokens_per_batch_size": [list(entry) for entry in schedule]},
        "stored": stored.name,
        "cost": {
            str(concurrency): {"fixed": model.fixed, "per_token": model.per_token}
            for concurrency, model in models.items()
        },
        "failed": {str(gamma): reason for gamma, reason in failed.items()},
        "points": [{key: value for key, value in entry.items() if key != "pairs"} for entry in entries],
    }


def publish(result: dict[str, Any], out: Path, *, always_json: bool) -> None:
    """Write the files and print the result."""
    write_json(out / "sweep.json", result)
    write_text(out / "sweep.md", render_markdown(result))
    from laguna_serve.bench.gamma.plot import draw  # takes a second to import

    draw(result, out / "sweep.png")
    line = {**result, "points": len(result["points"])}
    print_result(render_text(result), line, out, always_json=always_json)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and complete the command line; argparse exits with status 2 on a bad one."""
    parser = Parser(
        prog="bench/gamma_sweep.py",
        description=__doc__,
        epilog=EXAMPLES,
    )
    parser.add_argument("--model", metavar="M", required=True, help="target checkpoint, folder or hub id")
    parser.add_argument("--draft", metavar="D", required=True, help="DFlash drafter checkpoint")
    gammas = "γ to measure, such as 1,3,7 (default: 1 to the drafter's block − 1)"
    parser.add_argument("--gammas", metavar="N,…", type=parse_numbers, help=gammas)
    parser.add_argument("--concurrency", metavar="N,…", type=parse_numbers, default=[1], help="default: 1")
    parser.add_argument("--prompts", metavar="FILE", required=True, help='JSONL, one {"prompt": "…"} per line')
    parser.add_argument("--num-prompts", metavar="N", type=int, help="the first N prompts (default: 32)")
    parser.add_argument("--max-tokens", metavar="N", type=int, help="output tokens per prompt (default: 96)")
    parser.add_argument("--dtype", default="auto", help="vLLM's --dtype for both (default: the checkpoint's)")
    parser.add_argument("--eager", action="store_true", help="no compilation: starts fast, runs slowly")
    stack = "then levers at the γ chosen for the first concurrency, each against its own plain decoding and the plain "
    stack += "target: fp8-kv, prefix-caching, chunked-prefill, pruned=CHECKPOINT, dense=CHECKPOINT"
    parser.add_argument("--stack", metavar="LEVER", nargs="+", type=parse_lever, default=[], help=stack)
    mixed = "then the schedule against the best single γ, under a load that changes"
    parser.add_argument("--mixed", action="store_true", help=mixed)
    parser.add_argument("--kv-cache-gib", metavar="G", type=float, help="KV cache per engine (default: by free memory)")
    parser.add_argument("--seed", type=int, default=0, help="order of the arms, bootstrap, engines (default: 0)")
    parser.add_argument("--quick", action="store_true", help="16 prompts × 48 tokens, three γ, unless given")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for the result files")
    add_json_flag(parser)
    args = parser.parse_args(argv)
    for name, value in {"num_prompts": 16 if args.quick else 32, "max_tokens": 48 if args.quick else 96}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    if args.num_prompts < 8 * max(args.concurrency):
        need = 8 * max(args.concurrency)
        parser.error(
            f"--num-prompts: expected at least {need}, 8 rounds of {max(args.concurrency)}, got {args.num_prompts}"
        )
    return args


if __name__ == "__main__":
    raise SystemExit(main())
