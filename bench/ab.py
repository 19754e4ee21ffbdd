"""A/B of two vLLM engines: is the candidate faster, by how much, and does it give the same tokens?

Prints a table, then one JSON line (schema laguna_serve.ab/1); progress goes to stderr; DIR gets ab.json, ab.md, ab.png
and the engines' logs. How each figure is defined stands in the module that computes it (stats.py, metrics.py,
parity.py), and why one may be withheld in guards.py.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from laguna_serve.bench.arms import ArmSpec
from laguna_serve.bench.client import EndpointError
from laguna_serve.bench.endings import COULD_NOT_RUN, FELL_SHORT, HELD, INTERRUPTED, stop_on_signals
from laguna_serve.bench.plan import BASELINE, CANDIDATE, Plan, make_plan
from laguna_serve.bench.progress import Progress
from laguna_serve.bench.prompts import PromptsError, load_prompts, split_prompts
from laguna_serve.bench.record import current_argv, describe_environment, write_json, write_text
from laguna_serve.bench.report import render_markdown, render_text
from laguna_serve.bench.result import assemble, shorten
from laguna_serve.bench.run import MeasurementStoppedError, run_plan
from laguna_serve.serving.engine import EngineConfig, EngineError
from laguna_serve.serving.serve import parse_gamma

QUICK_PROMPTS = 16
MIN_WARMUP = 4

EXAMPLES = """
examples:
  speculation against plain decoding, engines started and stopped here:
    python bench/ab.py --model tests/toy/teacher --draft tests/toy/dflash --gamma 7 \\
        --prompts tests/toy/prompts.jsonl --out out/ab
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
    stop_on_signals()
    try:
        plan, specs = prepare(args)
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        environment = describe_environment(current_argv())
        run = run_plan(plan, specs, out, args.sequential, Progress())
    except KeyboardInterrupt:
        print("ab.py: interrupted before anything was measured", file=sys.stderr)
        return INTERRUPTED
    except (PromptsError, EngineError, EndpointError, MeasurementStoppedError, OSError) as error:
        print(f"ab.py: {error}", file=sys.stderr)
        return COULD_NOT_RUN
    result = assemble(
        run, plan, environment, dtype=find_dtype(args), drafting=args.draft is not None, prompts_file=args.prompts
    )
    publish(result, out)
    if run.interrupted:
        return INTERRUPTED
    defects = (result["parity"]["classes"] or {}).get("defect", 0)
    return FELL_SHORT if defects or result["refused"] or result["partial"] else HELD


def publish(result: dict[str, Any], out: Path) -> None:
    """Write the files, then print the table and, last, the one-line object."""
    write_json(out / "ab.json", result)
    write_text(out / "ab.md", render_markdown(result))
    try:
        from laguna_serve.bench.plot import draw  # matplotlib is optional, and takes a second to import
    except ImportError as error:
        print(f"ab.py: no picture: {error}; install matplotlib to get one", file=sys.stderr)
    else:
        draw(result, out / "ab.png")
    print(render_text(result))
    print(f"files in {out}: ab.json, ab.md, ab.png")
    print(json.dumps(shorten(result), ensure_ascii=False, allow_nan=False))


def prepare(args: argparse.Namespace) -> tuple[Plan, tuple[ArmSpec, ArmSpec]]:
    """Everything that can be refused before an engine starts.

    Raises:
        PromptsError: the prompts file cannot be used.
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
    return plan, (make_spec(args, BASELINE), make_spec(args, CANDIDATE))


def make_spec(args: argparse.Namespace, name: str) -> ArmSpec:
    """One arm from the command line. The baseline is the candidate without what --candidate-… and --draft give it."""
    url = args.baseline_url if name == BASELINE else args.candidate_url
    if url is not None:
        return ArmSpec(name, f"running at {url}", url=url, model_name=args.model)
    extra = tuple(shlex.split(args.baseline_args if name == BASELINE else args.candidate_args))
    drafting = name == CANDIDATE and args.draft is not None
    model = args.candidate_model or args.model if name == CANDIDATE else args.model
    config = EngineConfig(
        model=model,
        draft=args.draft if drafting else None,
        gamma=args.gamma if drafting else None,
        dtype=args.dtype,
        enforce_eager=args.eager,
        prefix_caching=args.prefix_caching,
        kv_cache_gib=args.kv_cache_gib,
        seed=args.seed,
        extra_args=extra,
    )
    gamma = "its trained maximum" if args.gamma is None else str(args.gamma)
    parts = [model, f"drafter {args.draft}, γ {gamma}" if drafting else "no drafter"]
    parts += ["eager"] if args.eager else []
    parts += [shlex.join(extra)] if extra else []
    return ArmSpec(name, "; ".join(parts), config=config)


def find_dtype(args: argparse.Namespace) -> str:
    """The models' dtype: as asked, else as the checkpoint says, else unknown (judged as strictly as float32)."""
    if args.dtype != "auto":
        return {"half": "float16", "float": "float32"}.get(args.dtype, str(args.dtype))
    try:
        config = json.loads((Path(args.model or "") / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "unknown"
    return str(config.get("dtype") or config.get("torch_dtype") or "unknown")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and complete the command line; argparse exits with status 2 on a bad one."""
    parser = _make_parser()
    args = parser.parse_args(argv)
    by_url = args.baseline_url is not None
    if by_url != (args.candidate_url is not None):
        parser.error("--baseline-url and --candidate-url: expected both or neither, got one")
    if by_url and any((args.draft, args.gamma, args.candidate_model, args.baseline_args, args.candidate_args)):
        parser.error(
            "--draft, --gamma, --candidate-model and extra args: expected none with URLs, as those servers already "
            "run; drop them"
        )
    if not by_url and args.model is None:
        parser.error("--model: expected a checkpoint, or two URLs, got neither")
    if args.gamma is not None and args.draft is None:
        parser.error("--gamma: expected --draft beside it, got none")
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
    parser = argparse.ArgumentParser(
        prog="bench/ab.py",
        description="Measure a baseline and a candidate vLLM engine on the same prompts, paired: speed and equality.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    engines = parser.add_argument_group("engines to start here")
    engines.add_argument(
        "--model", metavar="M", help="target checkpoint, folder or hub id (with URLs: the served name)"
    )
    engines.add_argument(
        "--candidate-model", metavar="M", help="the candidate's checkpoint, where it is another (pruned, unpadded)"
    )
    engines.add_argument("--draft", metavar="D", help="DFlash drafter checkpoint: the candidate's only difference")
    gamma = "tokens drafted per step, N or max (default: the drafter's most)"
    engines.add_argument("--gamma", metavar="N", type=parse_gamma, help=gamma)
    engines.add_argument(
        "--baseline-args", metavar="…", default="", help="extra vLLM flags for the baseline, after an ="
    )
    engines.add_argument(
        "--candidate-args", metavar="…", default="", help="extra vLLM flags for the candidate, after an ="
    )
    engines.add_argument("--dtype", default="auto", help="vLLM's --dtype for both (default: the checkpoint's)")
    engines.add_argument("--eager", action="store_true", help="no compilation, no graphs: starts fast, runs slowly")
    engines.add_argument("--prefix-caching", action="store_true", help="turn prefix caching on (default: off)")
    engines.add_argument(
        "--kv-cache-gib", metavar="G", type=float, help="KV cache per engine (default: by free memory)"
    )
    engines.add_argument("--sequential", action="store_true", help="one engine at a time, even if both would fit")
    urls = parser.add_argument_group("or endpoints that already run")
    urls.add_argument("--baseline-url", metavar="U", help="for example http://127.0.0.1:8000")
    urls.add_argument("--candidate-url", metavar="U")
    work = parser.add_argument_group("what to measure")
    work.add_argument("--prompts", metavar="FILE", required=True, help='JSONL, one {"prompt": "…"} per line')
    work.add_argument("--num-prompts", metavar="N", type=int, help="the first N prompts (default: all)")
    work.add_argument("--max-tokens", metavar="N", type=int, help="output tokens per prompt (default: 128)")
    work.add_argument("--concurrency", metavar="N", type=int, default=1, help="prompts sent together (default: 1)")
    work.add_argument("--control", metavar="N", type=int, help="prompts the baseline runs twice (default: 16; 0: none)")
    work.add_argument("--seed", type=int, default=0, help="order of the arms, bootstrap, engines (default: 0)")
    work.add_argument("--quick", action="store_true", help="16 prompts × 64 tokens, 4 controls, unless given")
    work.add_argument("--out", metavar="DIR", required=True, help="folder for the result files")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
