"""What does pruning add to a Laguna's loss? Ranked masks against random ones of the same size, on vLLM engines.

For every share of the groups and every mask `laguna compact` makes the pruned checkpoint, an engine serves it, and its
loss on held-out text is measured as loss.py does, on the same rows for all. Random masks prune as many of the same
groups, and like ranked ones keep a group of every expert. Intervals of differences are paired by document.

DIR gets pruning_loss.json, .md and .png, and keeps the losses of every model, so that the same command continues, and
one with more --shares or --seeds measures what is missing; the last stdout line is one JSON object (schema
laguna_serve.pruning_loss_endpoint/1). scripts/pruning_curve.py draws the curve by transformers: no engine, faster.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from laguna_serve.evals.perplexity.mean import average, subtract
from laguna_serve.evals.perplexity.pruning_arms import (
    INDICES,
    SCORES,
    Plan,
    Setting,
    find_mask,
    list_plans,
    list_settings,
    measure_plan,
    run_script,
)
from laguna_serve.evals.perplexity.pruning_plot import draw
from laguna_serve.evals.perplexity.rows import Row, read_documents
from laguna_serve.serving.checkpoint import CheckpointError, require_folder
from laguna_serve.serving.kit.cli import CONTINUES, FELL_SHORT, HELD, Parser, add_json_flag, print_result, run_command
from laguna_serve.serving.kit.environment import current_argv, describe_environment
from laguna_serve.serving.kit.files import write_json, write_text
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.run_dir import claim_folder

SCHEMA = "laguna_serve.pruning_loss_endpoint/1"
SHARES = (0.10, 0.20, 0.25, 0.40)
TOY_TEXT = "toy:held-out"
Losses = Mapping[str, Mapping[int, float]]
EXAMPLES = """
examples:
  python evals/pruning_loss.py --model tests/toy/teacher --out out/pruning-loss
  python evals/pruning_loss.py --model M --masks DIR --text held-out.jsonl --dtype bfloat16 --length 2048 --out out/p

exit status:
  0    held: at every share the ranked mask costs less than random ones do on average
  1    fell short: at some share it does not
  2    could not run: bad input, or an engine did not start or died
  130  interrupted: the same command continues
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    args = parse_args(argv)
    return run_command("pruning_loss.py", lambda: run(args), interrupted=CONTINUES)


def run(args: argparse.Namespace) -> int:
    """Measure what is missing, judge, write the result and print it. Returns the exit status."""
    out, progress = Path(args.out), Progress()
    environment = describe_environment(current_argv())
    setting = prepare(args)
    plans = list_plans(args.shares, args.seeds)
    losses: dict[str, dict[int, float]] = {}
    for done, plan in enumerate(plans, start=1):
        rows, losses[plan.name] = measure_plan(setting, plan, progress)
        progress.say(f"{done}/{len(plans)} {plan.name}: {average(rows, losses[plan.name]).nats:.4f} nats per token")
    measured = judge(args, setting, rows, losses)
    result = {"schema": SCHEMA, "environment": environment, **measured}
    write_json(out / "pruning_loss.json", result)
    write_text(out / "pruning_loss.md", render_markdown(result))
    draw(result, out / "pruning_loss.png")
    print_result(render_text(result), result, out, always_json=args.json)
    return HELD if all(point["ranked_is_better"] for point in result["points"]) else FELL_SHORT


def prepare(args: argparse.Namespace) -> Setting:
    """Check the files, before anything is started.

    Raises:
        CheckpointError, RowsError, ToolError: one is missing or of another kind.
    """
    model, folder = require_folder(args.model), Path(args.out) / "models"
    masks = Path(args.masks) if args.masks is not None else model.resolve().parent / "masks"
    for name in (INDICES, SCORES):
        if not (masks / name).is_file():
            remedy = "name the folder that scripts/score_experts.py wrote by --masks"
            raise CheckpointError(f"{masks}: expected {name} in it, got none; {remedy}")
    text = Path(args.text)
    if args.text == TOY_TEXT:
        folder.mkdir(parents=True, exist_ok=True)
        text = folder / "held-out.jsonl"
        run_script("scripts.toy_text", "--out", text)
    setting = Setting(model, masks, tuple(read_documents(text)), args.length, args.rows, args.dtype, folder)
    claim_folder(folder, list_settings(setting))
    for share in args.shares:
        find_mask(setting, share)
    return setting


def judge(args: argparse.Namespace, setting: Setting, rows: list[Row], losses: Losses) -> dict[str, Any]:
    """The result, JSON-ready."""
    base = losses[Plan("unpruned").name]
    return {
        "model": args.model,
        "dtype": args.dtype,
        "seeds": args.seeds,
        "data": {
            "source": args.text if args.text == TOY_TEXT else Path(args.text).name,
            "documents": len(setting.documents),
            "rows": len(rows),
            "length": args.length,
            "scored_tokens": sum(row.scored for row in rows),
        },
        "unpruned": average(rows, base).to_json(),
        "points": [describe_point(rows, share, args.seeds, losses) for share in args.shares],
    }


def describe_point(rows: list[Row], share: float, seeds: int, losses: Losses) -> dict[str, Any]:
    """One share: the ranked mask's loss, those of the random ones, and what each adds."""
    base, ranked = losses[Plan("unpruned").name], losses[Plan("ranked", share).name]
    random = [average(rows, losses[Plan("random", share, seed).name]).nats for seed in range(seeds)]
    loss = average(rows, ranked).nats
    return {
        "share": share,
        "ranked": loss,
        "ranked_delta": subtract(rows, ranked, base).to_json(),
        "random": random,
        "random_delta": statistics.mean(random) - average(rows, base).nats,
        "ranked_is_better": loss < statistics.mean(random),
    }


def render_text(result: Mapping[str, Any]) -> str:
    """In columns."""
    rows = [("groups pruned", "ranked", "Δ", "95% interval of Δ", "random", "Δ", "least to most"), *_list_cells(result)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, "", _tell_data(result)])


def render_markdown(result: Mapping[str, Any]) -> str:
    """The same as a page."""
    environment = result["environment"]
    lines = ["# What pruning adds to the loss, through vLLM", "", f"{result['model']}, nats per token.", ""]
    lines += ["| groups pruned | ranked | Δ | 95% interval of Δ | random, mean | Δ | random, least to most |"]
    lines += ["|--|--|--|--|--|--|--|", *(f"| {' | '.join(cells)} |" for cells in _list_cells(result)), ""]
    where = f"{environment['cpu']}, {environment['cores']} cores, {environment['date']}"
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    lines += ["![curve](pruning_loss.png)", "", _tell_data(result), ""]
    return "\n".join([*lines, f"`{environment['command']}` on {where}; {versions}."]) + "\n"


def _list_cells(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    base = f"{result['unpruned']['nats_per_token']:.4f}"
    cells: list[tuple[str, ...]] = [("0%", base, "", "", base, "", "")]
    for point in result["points"]:
        delta, random = point["ranked_delta"], point["random"]
        interval = "–" if delta["ci95"] is None else f"{delta['ci95'][0]:+.4f} to {delta['ci95'][1]:+.4f}"
        ranked = (f"{point['ranked']:.4f}", f"{delta['nats_per_token']:+.4f}", interval)
        drawn = (f"{statistics.mean(random):.4f}", f"{point['random_delta']:+.4f}")
        cells.append((f"{point['share']:.0%}", *ranked, *drawn, f"{min(random):.4f} to {max(random):.4f}"))
    return cells


def _tell_data(result: Mapping[str, Any]) -> str:
    data, base = result["data"], result["unpruned"]
    rows = f"{data['rows']} evenly spaced rows of at most {data['length']}"
    return (
        f"Over {data['scored_tokens']:,} tokens of {data['source']} ({data['documents']} documents, {rows}),"
        f" {result['dtype']}. Random masks per share: {result['seeds']}. The intervals draw {base['units']}"
        f" {base['drawn']}."
    )


def parse_shares(text: str) -> tuple[float, ...]:
    """ "0.1,0.2": shares of the groups, each between 0 and 1, smallest first."""
    try:
        shares = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        shares = ()
    if not shares or not 0 < shares[0] <= shares[-1] < 1:
        raise argparse.ArgumentTypeError(f"expected shares between 0 and 1 like 0.1,0.2, got {text!r}")
    return shares


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line; argparse exits with status 2 on a bad one."""
    parser = Parser(
        prog="evals/pruning_loss.py",
        description=__doc__,
        epilog=EXAMPLES,
    )
    parser.add_argument("--model", metavar="M", required=True, help="Laguna checkpoint, unpruned: folder or hub id")
    masks = "what scripts/score_experts.py wrote (default: the folder masks beside the model's)"
    parser.add_argument("--masks", metavar="DIR", help=masks)
    text = f'UTF-8 text, or .jsonl with a "text" per line (default: {TOY_TEXT}, the toy family\'s)'
    parser.add_argument("--text", metavar="FILE", default=TOY_TEXT, help=text)
    parser.add_argument("--shares", metavar="S,…", type=parse_shares, default=SHARES, help="default: 0.1,0.2,0.25,0.4")
    parser.add_argument("--seeds", metavar="N", type=int, default=5, help="random masks per share (default: 5)")
    parser.add_argument("--length", metavar="N", type=int, default=384, help="tokens in a row (default: 384)")
    parser.add_argument("--rows", metavar="N", type=int, default=171, help="evenly spaced rows (default: 171)")
    parser.add_argument("--dtype", default="float32", help="vLLM's --dtype (default: float32)")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for the result files")
    add_json_flag(parser)
    args = parser.parse_args(argv)
    for name, least in {"seeds": 1, "length": 16, "rows": 1}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name}: expected at least {least}, got {getattr(args, name)}")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
