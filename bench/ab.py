"""A/B of two vLLM engines: is the candidate faster, by how much, and does it give the same tokens?

Prints a table, then one JSON line (schema laguna_serve.ab/1); progress goes to stderr; DIR gets ab.json, ab.md, ab.png
and the engines' logs. How each figure is defined stands in the module that computes it (stats.py, metrics.py,
parity.py), and why one may be withheld in guards.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from laguna_serve.bench.certificate.report import summarise
from laguna_serve.bench.certificate.verdict import DEFECT
from laguna_serve.bench.certify import certify_beside, list_own_specs
from laguna_serve.bench.harness.arm_options import add_arm_flags, check_arm_flags, find_dtype, make_spec
from laguna_serve.bench.harness.arms import ArmSpec, check_specs
from laguna_serve.bench.harness.prompts import load_prompts, split_prompts
from laguna_serve.bench.harness.report import render_markdown, render_text
from laguna_serve.bench.harness.result import assemble, shorten
from laguna_serve.bench.harness.runner import Run, run_plan
from laguna_serve.bench.harness.schedule import BASELINE, CANDIDATE, Plan, make_plan
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.engine import EngineError
from laguna_serve.serving.kit.cli import (
    COULD_NOT_RUN,
    FELL_SHORT,
    HELD,
    INTERRUPTED,
    Parser,
    add_json_flag,
    print_result,
    run_command,
)
from laguna_serve.serving.kit.environment import current_argv, describe_environment
from laguna_serve.serving.kit.files import write_json, write_text
from laguna_serve.serving.kit.progress import Progress

QUICK_PROMPTS = 16
MIN_WARMUP = 4

EXAMPLES = """
examples:
  speculation against plain decoding, engines started and stopped here:
    python bench/ab.py --model tests/toy/teacher --draft tests/toy/dflash --gamma 7 \\
        --prompts tests/toy/prompts.jsonl --out out/ab --certify
  two settings of one engine (extra vLLM flags for one arm; here there is no drafter):
    python bench/ab.py --model tests/toy/teacher --candidate-args="--max-num-batched-tokens 512" \\
        --prompts tests/toy/prompts.jsonl --out out/flags
  a pruned checkpoint against the one it stands for:
    python bench/ab.py --model out/zeroed --candidate-model out/compact --dtype float32 \\
        --prompts tests/toy/prompts.jsonl --out out/pruned
  two servers that already run (vLLM, started without prefix caching):
    python bench/ab.py --baseline-url http://127.0.0.1:8000 --candidate-url http://127.0.0.1:8001 \\
        --prompts tests/toy/prompts.jsonl --out out/urls

exit status:
  0    held: every figure could be reported and no divergence is a defect
  1    fell short: a divergence is a defect, or a figure was withheld (the reasons are printed)
  2    could not run: bad input, or an engine did not start
  130  interrupted: what was measured is reported and marked partial

On a GPU one engine fills the memory unless --kv-cache-gib is given; the arms are then measured one after the other.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    args = parse_args(argv)
    return run_command(
        "ab.py", lambda: measure(args), measures=True, interrupted="what was measured by then, if anything, is in --out"
    )


def measure(args: argparse.Namespace) -> int:
    """Run both arms, write the result and print it. Returns the exit status."""
    plan, specs = prepare(args)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    environment = describe_environment(current_argv())
    run = run_plan(plan, specs, out, args.sequential, Progress())
    result = assemble(
        run, plan, environment, dtype=find_dtype(args), drafting=args.draft is not None, prompts_file=args.prompts
    )
    status = judge(result, run)
    if args.certify and not run.stopped:
        write_json(out / "ab.json", result)  # whatever becomes of the certificate
        result["certificate"], certified = certify_arms(args, len(plan.prompts), environment)
        status = max(status, certified)
    publish(result, out, always_json=args.json)
    return status


def judge(result: dict[str, Any], run: Run) -> int:
    """The exit status of the A/B alone."""
    if run.interrupted:
        return INTERRUPTED
    defects = (result["parity"]["classes"] or {}).get("defect", 0)
    return FELL_SHORT if defects or result["refused"] or result["partial"] else HELD


def certify_arms(args: argparse.Namespace, prompts: int, environment: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """The certificate of the same arms in short, and its exit status."""
    try:
        found = certify_beside(args, prompts, environment)
    except KeyboardInterrupt:
        return {"verdict": None, "reasons": ["interrupted"]}, INTERRUPTED
    except (CheckpointError, EngineError, EndpointError, OSError) as error:
        return {"verdict": None, "reasons": [str(error)]}, COULD_NOT_RUN
    short = {"verdict": found["verdict"], "summary": summarise(found), "reasons": found["reasons"]}
    return short, FELL_SHORT if found["verdict"] == DEFECT else HELD


def publish(result: dict[str, Any], out: Path, *, always_json: bool) -> None:
    """Write the files and print the result."""
    write_json(out / "ab.json", result)
    write_text(out / "ab.md", render_markdown(result))
    from laguna_serve.bench.harness.plot import draw  # takes a second to import

    draw(result, out / "ab.png")
    text = render_text(result)
    if (certificate := result.get("certificate")) is not None:
        summary = certificate.get("summary") or f"none: {'; '.join(certificate['reasons'])}"
        text += f"\ncertificate {summary}" + (" (certificate/certificate.html)" if certificate["verdict"] else "")
    print_result(text, shorten(result), out, always_json=always_json)


def prepare(args: argparse.Namespace) -> tuple[Plan, tuple[ArmSpec, ArmSpec]]:
    """Everything that can be refused before an engine starts.

    Raises:
        PromptsError: the prompts file cannot be used.
        EngineError: an arm could not be started; with --certify also the certificate's own.
    """
    prompts = load_prompts(Path(args.prompts))
    count = min(QUICK_PROMPTS, len(prompts)) if args.quick and args.num_prompts is None else args.num_prompts
    timed, warmup = split_prompts(prompts, count, max(MIN_WARMUP, args.concurrency))
    plan = make_plan(
        timed,
        warmup,
        max_tokens=args.max_tokens,
        concurrency=args.concurrency,
        control=args.control,
        seed=args.seed,
    )
    specs = make_spec(args, BASELINE), make_spec(args, CANDIDATE)
    check_specs([*specs, *(list_own_specs(args) if args.certify else [])])
    return plan, specs


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and complete the command line; argparse exits with status 2 on a bad one."""
    parser = _make_parser()
    args = parser.parse_args(argv)
    check_arm_flags(parser, args)
    for name in ("max_tokens", "concurrency", "num_prompts"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    if args.control is not None and args.control < 0:
        parser.error(f"--control: expected 0 or more prompts, got {args.control}")
    for name, value in {"max_tokens": 64 if args.quick else 128, "control": 4 if args.quick else 16}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def _make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="bench/ab.py",
        description="Measure a baseline and a candidate vLLM engine on the same prompts, paired: speed and equality.",
        epilog=EXAMPLES,
    )
    add_arm_flags(parser)
    work = parser.add_argument_group("what to measure")
    work.add_argument("--prompts", metavar="FILE", required=True, help='JSONL, one {"prompt": "…"} per line')
    work.add_argument("--num-prompts", metavar="N", type=int, help="the first N prompts (default: all)")
    work.add_argument("--max-tokens", metavar="N", type=int, help="output tokens per prompt (default: 128)")
    work.add_argument("--concurrency", metavar="N", type=int, default=1, help="prompts sent together (default: 1)")
    work.add_argument("--sequential", action="store_true", help="one engine at a time, even if both would fit")
    work.add_argument("--control", metavar="N", type=int, help="prompts the baseline runs twice (default: 16; 0: none)")
    certify = "then certify parity on the same prompts (bench/certify.py), with one page in DIR/certificate"
    work.add_argument("--certify", action="store_true", help=certify)
    work.add_argument("--seed", type=int, default=0, help="order of the arms, bootstrap, engines (default: 0)")
    work.add_argument("--quick", action="store_true", help="16 prompts × 64 tokens, 4 controls, unless given")
    work.add_argument("--out", metavar="DIR", required=True, help="folder for the result files")
    add_json_flag(work)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
